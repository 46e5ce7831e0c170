"""A rolling chain: a knot finishes the oldest components of a link, and the others go on."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW, RMSprop
from torch.utils.data import DataLoader

from cola_lightning import AdaptedModel, Chain, ChainOfLoRA, COLACausalLM, UserError, lora_layers
from cola_lightning.chain.schedule import ChainSchedule, FitPosition, RunLength
from cola_lightning.seeding import derive_seed
from cola_lightning.study.config import as_words, resolved
from cola_lightning.study.methods import method
from tests import tiny
from tests.test_chain_of_lora import Watch
from tests.test_compare import DIGITS
from tests.test_resume import ARGUMENTS, FEW, Normed, fit, last
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights

ROLLING = {"every_n_train_steps": 5, "refresh_rank": 2}
RANK, ALPHA = 6, 9
EPS = 1e-12  # of the optimizers: it is added to second moments of which a component's step count is not its own


class Component:
    """A rank-one part of a link in plain tensors, with an Adam, or a momentum, of its own."""

    def __init__(self, a, b, start):
        self.values, self.start = [a, b], start
        self.moments = [(torch.zeros_like(one), torch.zeros_like(one)) for one in self.values]

    def step(self, gradients, rate, kind, now):
        count = now - self.start + 1
        for value, gradient, (first, second) in zip(self.values, gradients, self.moments, strict=True):
            if kind is SGD:
                first.mul_(0.9).add_(gradient)
                update = first
            elif kind is RMSprop:
                second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
                update = gradient / (second.sqrt() + EPS)
            else:
                first.lerp_(gradient, 0.1)
                second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                update = first / (1 - 0.9**count) / ((second / (1 - 0.999**count)).sqrt() + EPS)
            value.sub_(update, alpha=rate)


def hand_written_loop(kind, steps, every, refreshed, warmup, lr):
    """A rolling chain of components that know nothing of each other. Returns each layer's base and its current update."""
    module = toy(rank=RANK, alpha=ALPHA)
    layers = dict(lora_layers(module.model))
    weight = {name: layer.weight.detach().double().clone() for name, layer in layers.items()}
    bias = {name: layer.bias.detach().double() for name, layer in layers.items()}

    def draw(name, link):
        rows = torch.empty(RANK, weight[name].shape[1])
        torch.nn.init.kaiming_uniform_(
            rows, a=math.sqrt(5), generator=torch.Generator().manual_seed(derive_seed(0, link, name))
        )
        return rows.double()

    def begin(name, row, link, step):
        return Component(draw(name, link)[row].clone(), torch.zeros(len(weight[name]), dtype=torch.double), step)

    parts = {name: [begin(name, row, 0, 0) for row in range(RANK)] for name in layers}
    data, link, queue = list(batches(dtype=torch.double)), 0, list(range(RANK))
    for step in range(steps):
        if step and step % every == 0:
            link += 1
            rows, queue = queue[:refreshed], queue[refreshed:] + queue[:refreshed]
            for name, own in parts.items():
                for row in rows:
                    a, b = own[row].values
                    weight[name] += ALPHA / RANK * torch.outer(b, a)
                    own[row] = begin(name, row, link, step)
        x, y = data[step % len(data)]
        variables = {name: [[v.clone().requires_grad_() for v in part.values] for part in own] for name, own in parts.items()}
        for name in layers:
            delta = sum(torch.outer(b, a) for a, b in variables[name])
            x = F.linear(x, weight[name] + ALPHA / RANK * delta, bias[name])
            x = torch.tanh(x) if name == "0" else x
        F.mse_loss(x, y).backward()
        for name, own in parts.items():
            for part, pair in zip(own, variables[name], strict=True):
                age = step - part.start
                rate = lr * (1 - step / steps) * (min(1, age / warmup) if part.start and warmup else 1)
                part.step([one.grad for one in pair], rate, kind, step)
    update = {name: ALPHA / RANK * sum(torch.outer(p.values[1], p.values[0]) for p in own) for name, own in parts.items()}
    return weight, update


@pytest.mark.parametrize(
    ("kind", "options", "warmup"),
    [
        (AdamW, {"weight_decay": 0, "eps": EPS}, 3),
        (AdamW, {"weight_decay": 0, "eps": EPS}, 0),
        (SGD, {"momentum": 0.9}, 3),
        (RMSprop, {"eps": EPS}, 0),
    ],
)
@pytest.mark.parametrize("refreshed", [2, 4])
def test_a_rolling_chain_is_the_sum_of_components_that_train_alone(tmp_path, kind, options, warmup, refreshed):
    steps, every, lr = 40, 7, 0.3 if kind is SGD else 1e-2
    module = toy(
        rank=RANK,
        alpha=ALPHA,
        optimizer=lambda p: kind(p, lr=lr, **options),
        lr_schedule="linear",
        schedule_scope="run",
        knot_warmup_steps=warmup,
    )
    chain = {"every_n_train_steps": every, "refresh_rank": refreshed}
    run = trainer(tmp_path, chain=chain, max_steps=steps, max_epochs=-1, precision="64-true")
    run.fit(module, batches(dtype=torch.double))
    weight, update = hand_written_loop(kind, steps, every, refreshed, warmup, lr)
    assert module.link == (steps - 1) // every
    for name, layer in lora_layers(module.model).items():
        assert (layer.weight - weight[name]).abs().max() < 1e-6
        assert (layer.delta_weight() - update[name]).abs().max() < 1e-6
        assert update[name].abs().max() > 1e-3


def test_a_knot_finishes_the_oldest_components_and_leaves_the_others_as_they_are(tmp_path):
    def look(run, module):
        layer, state = module.model[0], run.optimizers[0].state
        moments = [state[layer.lora_A][name].clone() if layer.lora_A in state else None for name in ("exp_avg", "exp_avg_sq")]
        return layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), layer.weight.detach().clone(), moments

    ends = Watch(look)
    ends.on_train_batch_end = lambda run, module, *_: ends.seen.append(look(run, module))  # after a step
    ends.on_train_batch_start = lambda *_: None
    watch = Watch(look)
    module = toy(rank=RANK, alpha=ALPHA)
    trainer(tmp_path, watch, ends, chain=ROLLING, max_epochs=2).fit(module, batches())
    rows = [(0, 1), (2, 3), (4, 5)]
    for k, finished in enumerate(rows):
        step = 5 * (k + 1)
        (A, B, W, moments), (new_A, new_B, new_W, new_moments) = ends.seen[step - 1], watch.seen[step]
        others = [row for row in range(RANK) if row not in finished]
        assert torch.equal(new_A[others], A[others])
        assert torch.equal(new_B[:, others], B[:, others])
        assert not new_B[:, finished].any()
        assert not torch.equal(new_A[list(finished)], A[list(finished)])
        for moment, new in zip(moments, new_moments, strict=True):
            assert torch.equal(new[others], moment[others])
            assert not new[list(finished)].any()
        before, after = (w + ALPHA / RANK * b @ a for a, b, w in ((A, B, W), (new_A, new_B, new_W)))
        assert (after - before).abs().max() < 1e-6
    steps = [(link.rank, link.start_step, link.end_step) for link in module.full_chain().links]
    assert steps == [(2, 0, 5), (2, 0, 10), (2, 0, 15), (6, 5, 20)]
    assert {link.scaling for link in module.full_chain().links} == {ALPHA / RANK}


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, optimizer):
    def module():
        return toy(Normed, **ARGUMENTS, optimizer=lambda p: optimizer(p, lr=1e-2), knot_warmup_steps=2, schedule_scope="run")

    chain = {"every_n_train_steps": 2, "refresh_rank": 1}
    whole, expected, _ = fit(tmp_path / "whole", module=module(), chain=chain)
    assert whole.link > 3
    for stop in FEW:
        folder = tmp_path / f"{stop}"
        _, before, _ = fit(folder, stop, module=module(), chain=chain)
        resumed, after, _ = fit(folder / "resumed", ckpt_path=last(folder), module=module(), chain=chain)
        assert_bit_equal(weights(resumed), weights(whole))
        assert resumed.run.components == whole.run.components
        assert before.losses | after.losses == expected.losses, stop


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_checkpoint_replays_to_the_bit_and_goes_back(tmp_path, finished_links):
    module = toy(rank=3, alpha=7, finished_links=finished_links)  # a scaling that is no power of two
    run = trainer(tmp_path, chain={"every_n_train_steps": 2, "refresh_rank": 2}, max_epochs=1)
    run.fit(module, batches())
    path = tmp_path / "a.ckpt"
    run.save_checkpoint(path)
    loaded = type(module).load_from_checkpoint(path)
    assert_bit_equal(weights(loaded), weights(module))
    x = next(iter(batches()))[0]
    assert torch.equal(loaded.model(x), module.model(x))
    chain = module.full_chain()
    for name in chain.layers:
        moved = module.merged_model().get_parameter(f"{name}.weight") - module.merged_model(0).get_parameter(f"{name}.weight")
        assert (moved - chain.delta(name)).abs().max() < 1e-6
    back = type(module).load_from_checkpoint(path, links=2)
    assert [link.rank for link in back.chain.links] == [2, 2]
    assert back.run.components == []
    assert torch.equal(back.merged_model()[0].weight, module.merged_model(2)[0].weight)


@pytest.mark.parametrize(
    "base",
    [{}, {"dtype": "bfloat16", "finished_links": "stack"}, {"quantization": "nf4", "finished_links": "stack"}],
    ids=["merged", "half precision", "4 bits"],
)
def test_a_language_model_is_loaded_and_exported_as_with_whole_links(tmp_path, base):
    """An export is verified: it is loaded, and its logits are compared with the module's."""
    if "quantization" in base:
        pytest.importorskip("bitsandbytes")
    arguments = {"rank": 4, "alpha": 6, "seed": 0, "optimizer": lambda p: AdamW(p, lr=1e-2)} | base
    module = COLACausalLM(tiny.folder(tmp_path / "llama"), target_modules=["q_proj", "v_proj"], **arguments)
    ids = torch.randint(2, 400, (6, 2, 8), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch} for batch in ids]
    run = trainer(tmp_path, chain={"every_n_train_steps": 2, "refresh_rank": 1}, max_epochs=1)
    run.fit(module, *(DataLoader(part, batch_size=None) for part in (rows, rows[:1])))
    assert [link.rank for link in module.chain.links] == [1, 1]
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = COLACausalLM.load_from_checkpoint(tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.eval().model(ids[0]).logits, module.eval().model(ids[0]).logits)
    for format in ("merged", "peft", "chain"):
        loaded.export(tmp_path / format, format)
    assert [link.rank for link in Chain.load(tmp_path / "chain").links] == [1, 1, 4]


def test_a_knot_needs_no_trainer():
    def base():
        return torch.nn.Sequential(torch.nn.Linear(4, 3))

    adapted = AdaptedModel.of(base, rank=3, alpha=6, seed=0)
    layer = adapted.layers["0"]
    torch.nn.init.normal_(layer.lora_B)
    before, x = layer.delta_weight() + layer.weight, torch.randn(2, 4)
    y, kept = adapted.model(x), layer.lora_A[1].clone()
    link = adapted.tie_knot(components=[0, 2])
    assert (link.rank, link.alpha, link.scaling) == (2, 4.0, 2.0)
    assert torch.allclose(adapted.model(x), y, atol=1e-6)
    assert torch.allclose(layer.delta_weight() + layer.weight, before, atol=1e-6)
    assert torch.equal(layer.lora_A[1], kept)
    again = adapted.tie_knot(components=[-1, 2], rank=1)  # one component, and no other rank for those that go on
    assert (again.rank, layer.rank) == (1, 3)
    assert torch.allclose(adapted.model(x), y, atol=1e-6)


def test_so_many_knots_are_spread_over_a_share_of_the_run(tmp_path):
    watch = Watch(lambda run, module: (run.global_step, module.link))
    module = toy(rank=2)
    trainer(tmp_path, watch, chain={"knots": 3, "until": 0.6}, max_epochs=3).fit(module, batches())
    assert [link.end_step for link in module.chain.links] == [6, 12, 18]
    assert dict(watch.seen)[6] == 1
    endless = trainer(tmp_path, chain={"knots": 3}, max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(UserError, match=r"chain\.knots"):
        endless.fit(toy(), batches())
    run = RunLength(lambda epoch: 10, 4, math.inf)
    assert ChainSchedule(knots=3).in_run(run).at_steps == [10, 20, 30]
    assert not ChainSchedule(knots=3).is_due(FitPosition(0, 0), FitPosition(9, 90))  # its steps are not known


@pytest.mark.parametrize(("warmup", "expected"), [(0.5, [8, 8, 6]), (7, [7, 7, 7]), (0, [0, 0, 0])])
def test_a_component_keeps_the_warm_up_with_which_it_began(tmp_path, warmup, expected):
    """A number of steps, or a share of its life if the knots go on at this distance."""
    module = toy(rank=4, schedule_scope="run", knot_warmup_steps=warmup)
    trainer(tmp_path, chain={"at_steps": [8, 16, 22], "refresh_rank": 2}, max_steps=24).fit(module, batches())
    rises = {start: rise for _, start, rise in module.run.components}
    assert rises == dict(zip([16, 22], expected[1:], strict=True))


def test_a_rate_may_decay_over_a_run_whose_knots_are_not_known(tmp_path):
    chain = {"patience": 1, "refresh_rank": 1}
    module = toy(ValidatedToy, knot_warmup_steps=0.5, optimizer=lambda p: AdamW(p, lr=1e-1))
    trainer(tmp_path, chain=chain, max_epochs=4, num_sanity_val_steps=0).fit(module, batches(), batches(3))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0


def test_an_optimizer_of_two_fits_is_scaled_once(tmp_path):
    class Cached(Toy):
        @functools.cached_property
        def optimizer(self):
            return AdamW([p for _, p in self.trained_parameters()], lr=1e-2)

        def configure_optimizers(self):
            return self.optimizer

    found = []
    for epochs in [(2,), (1, 2)]:
        module = toy(Cached, rank=RANK)
        run = trainer(tmp_path, chain=ROLLING, max_epochs=0)
        for n_epochs in epochs:
            run.fit_loop.max_epochs = n_epochs
            run.fit(module, batches())
        found.append(weights(module))
    assert_bit_equal(*found)


def test_bitsandbytes_adam_has_a_bias_correction_of_its_own_too(tmp_path):
    optim = pytest.importorskip("bitsandbytes.optim")

    def moved(optimizer):
        module = toy(rank=RANK, optimizer=lambda p: optimizer(p, lr=1e-3, weight_decay=0), lr_schedule="constant")
        trainer(tmp_path, chain=ROLLING | {"every_n_train_steps": 30}, max_steps=33).fit(module, batches())
        return module.adapted.layers["0"].delta_weight()

    assert torch.allclose(moved(optim.AdamW), moved(AdamW), atol=1e-6)


def test_a_short_trial_run_has_fewer_knots(tmp_path):
    module = toy(rank=2)
    trainer(tmp_path, chain={"knots": 12}, max_steps=4).fit(module, batches())
    assert [link.end_step for link in module.chain.links] == [1, 2, 3]


@pytest.mark.parametrize(
    ("chain", "field"),
    [
        ({"refresh_rank": 2, "ranks": [4]}, r"refresh_rank and ranks"),
        ({"refresh_rank": 0}, r"chain\.refresh_rank"),
        ({"refresh_rank": 2}, r"chain\.refresh_rank"),
        ({"knots": 3, "until": 1.5}, r"chain\.until"),
        ({"every_n_epochs": 3, "until": 0.5}, r"chain\.until"),
        ({"knots": 0}, r"chain\.knots"),
        ({"knots": 3, "at_steps": [4]}, r"chain"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(chain, field):
    with pytest.raises(UserError, match=field):
        ChainOfLoRA(**chain)


def test_an_optimizer_without_a_moment_for_each_entry_is_refused(tmp_path):
    def optimizer(parameters):
        return torch.optim.Adafactor(parameters, lr=1e-3)

    with pytest.raises(UserError, match=r"chain\.refresh_rank.* Adafactor"):
        trainer(tmp_path, chain=ROLLING, max_epochs=1).fit(toy(rank=RANK, optimizer=optimizer), batches())


@pytest.mark.parametrize(
    ("options", "refreshed"), [({}, 6), ({"trained_factors": "random"}, 2), ({"kept_optimizer_state": 0.1}, 2)]
)
def test_a_module_for_whole_links_is_refused(tmp_path, options, refreshed):
    chain = {"every_n_train_steps": 5, "refresh_rank": refreshed}
    with pytest.raises(UserError, match=r"chain\.refresh_rank"):
        trainer(tmp_path, chain=chain, max_epochs=1).fit(toy(rank=RANK, **options), batches())


def test_a_rolling_run_is_not_resumed_as_another(tmp_path):
    run = trainer(tmp_path, chain=ROLLING, max_epochs=1)
    run.fit(toy(rank=RANK), batches())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"refresh_rank 2, received refresh_rank null"):
        trainer(tmp_path, chain={"every_n_train_steps": 5}, max_epochs=2).fit(
            toy(rank=RANK), batches(), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.mark.parametrize(
    ("name", "words", "knots", "refreshed"),
    [
        ("roll-7", [], 7, 2),
        ("roll", [], 12, 2),
        ("roll", ["--chain.every_n_epochs", "null", "--chain.knots", "5", "--chain.refresh_rank", "3"], 5, 3),
    ],
)
def test_a_rolling_chain_is_a_method_of_a_study(name, words, knots, refreshed):
    words = ["--config", DIGITS, "--model.rank", "8", *words]
    found = method(name, resolved(words))
    assert (found.links, found.rank) == (knots + 1, 8)
    chain = resolved([*words, *as_words(found.options)])["chain"]
    assert (chain["knots"], chain["refresh_rank"], chain["until"]) == (knots, refreshed, 0.75)
    assert method("cola", resolved([*words, *as_words(found.options)])).links == knots + 1
    sum_rank = method("lora-sum-rank", resolved([*words, *as_words(found.options)]))
    assert sum_rank.rank == knots * refreshed + 8
    assert resolved([*words, *as_words(sum_rank.options)])["chain"]["refresh_rank"] is None
