"""The relatives of COLA as rules on its engine: which factor a link trains, and what an optimizer keeps over a knot."""

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adafactor, AdamW

from cola_lightning import AdaptedModel, COLAModule, LoRALinear, UserError
from cola_lightning.chain import Chain
from cola_lightning.chain.rules import FROZEN_FACTOR, TrainedFactors, frozen_factor, keep_state
from cola_lightning.lora.initialization import DRAWS, Init
from cola_lightning.study.config import as_words, resolved
from cola_lightning.study.methods import METHODS, method
from tests.test_chain_of_lora import Watch
from tests.test_compare import DIGITS
from tests.test_resume import ARGUMENTS, FEW, Normed, fit, last
from tests.toy import assert_bit_equal, batches, toy, trainer, weights


def base():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def factors(module):
    layers = module.adapted.layers.items()
    return {name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in layers}


def test_each_rule_is_an_option_of_the_module():
    assert list(FROZEN_FACTOR) == list(get_args(TrainedFactors))


@pytest.mark.parametrize("drawn", ["A", "B"])
@pytest.mark.parametrize("init", DRAWS)
def test_a_link_begins_with_one_factor_drawn_and_the_other_zero(drawn, init):
    layer = LoRALinear.from_linear(nn.Linear(5, 7), rank=3, alpha=6, init=init)
    x = torch.randn(4, 5)
    before = layer(x)
    layer.reset(torch.Generator().manual_seed(1), rank=2, drawn=drawn)
    assert torch.equal(layer(x), before)
    assert not layer.has_begun
    other = layer.lora_B if drawn == "A" else layer.lora_A
    drawn_factor = layer.lora_A if drawn == "A" else layer.lora_B.T
    assert not other.any()
    assert drawn_factor[:2].ne(0).all()
    assert not drawn_factor[2:].any()
    theirs = LoRALinear.from_linear(nn.Linear(drawn_factor.shape[1], 2), rank=3, alpha=6, init=init)
    theirs.reset(torch.Generator().manual_seed(1), rank=2)
    assert torch.equal(drawn_factor, theirs.lora_A)  # as the A of the transposed layer would be


def test_which_factor_is_frozen_follows_from_seed_and_link():
    drawn = [frozen_factor("random", 3, link) for link in range(200)]
    assert drawn == [frozen_factor("random", 3, link) for link in range(200)]
    assert 70 < drawn.count("A") < 130
    assert {frozen_factor("both", 3, link) for link in range(9)} == {None}
    assert {frozen_factor("B", 3, link) for link in range(9)} == {"A"}


@pytest.mark.parametrize("trained", ["both", "B", "random"])
def test_each_link_moves_the_factors_that_it_trains(tmp_path, trained):
    starts, watch = {}, Watch(lambda run, module: starts.setdefault(module.link, factors(module)))
    module = toy(trained_factors=trained, optimizer=lambda p: AdamW(p, lr=1e-2), seed=0)
    trainer(tmp_path, watch, chain={"every_n_train_steps": 2}, max_epochs=2).fit(module, batches())
    frozen = [frozen_factor(trained, 0, link) for link in range(10)]
    assert trained != "random" or set(frozen) == {"A", "B"}
    for link, which in zip(module.full_chain().links, frozen, strict=True):
        for name, (lora_A, lora_B) in link.factors.items():
            was_A, was_B = starts[link.index][name]
            assert torch.equal(lora_A, was_A) == (which == "A")
            assert torch.equal(lora_B, was_B) == (which == "B")
            assert not (was_A if which == "B" else was_B).any()


@pytest.mark.parametrize("trained", ["both", "B", "random"])
def test_a_fit_says_how_many_parameters_its_optimizer_has(tmp_path, caplog, trained):
    module = toy(trained_factors=trained)
    watch = Watch(lambda run, _: sum(p.numel() for group in run.optimizers[0].param_groups for p in group["params"]))
    with caplog.at_level("INFO", "cola_lightning"):
        trainer(tmp_path, watch, max_steps=1).fit(module, batches())
    assert f"model: {watch.seen[0]} of 262 parameters are trained" in caplog.text


def test_a_link_of_rac_lora_is_a_projected_gradient_step(tmp_path):
    """Gradient descent on B, beside a frozen A, is W <- W - rate * scaling^2 * G A^T A; on A, likewise with B B^T G."""
    x, y = next(iter(batches()))
    seen = set()
    for seed in range(4):
        adapted = AdaptedModel.of(base, target_modules=["0"], rank=2, alpha=4, seed=seed, trained_factors="random")
        layer, before = adapted.layers["0"], adapted.merged_model()[0].weight.detach()
        plain = adapted.merged_model()
        F.mse_loss(plain(x), y).backward()
        gradient, (lora_A, lora_B) = plain[0].weight.grad, (factor.detach().clone() for factor in layer.factors)
        optimizer = SGD(adapted.trained_parameters(), lr=0.1)
        F.mse_loss(adapted.model(x), y).backward()
        optimizer.step()
        frozen = adapted.frozen_factor
        projected = gradient @ lora_A.T @ lora_A if frozen == "A" else lora_B @ lora_B.T @ gradient
        adapted.tie_knot()
        torch.testing.assert_close(adapted.model[0].weight.detach(), before - 0.1 * 4 * projected, rtol=1e-5, atol=1e-6)
        seen.add(frozen)
    assert seen == {"A", "B"}


def test_a_frozen_factor_is_in_no_optimizer_and_gathers_no_gradient(tmp_path):
    def look(run, module):
        for factor in module.adapted.frozen_factors():
            factor.grad = torch.full_like(factor, 1e9)  # what a step before would have left
        return len(run.optimizers[0].param_groups[0]["params"])

    watch, module = Watch(look), toy(trained_factors="B")
    trainer(tmp_path, watch, max_epochs=1, gradient_clip_val=0.1).fit(module, batches())
    assert set(watch.seen) == {2}
    assert len(module.adapted.frozen_factors()) == 2
    assert all(factor.grad.abs().max() < 1e6 for factor in module.adapted.frozen_factors())


def test_the_loss_falls_by_one_factor_alone(tmp_path):
    losses = Watch(lambda run, module: F.mse_loss(module.model(batch[0]), batch[1]).item())
    batch = next(iter(batches()))
    module = toy(trained_factors="random", optimizer=lambda p: AdamW(p, lr=1e-2))
    trainer(tmp_path, losses, chain={"every_n_epochs": 1}, max_epochs=6).fit(module, batches())
    assert losses.seen[-1] < 0.8 * losses.seen[0]


@pytest.mark.parametrize(
    "rule",
    [{"trained_factors": "B"}, {"trained_factors": "random"}, {"kept_optimizer_state": 0.1}, {"init": "orthogonal"}],
    ids=str,
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, rule):
    def module():
        return toy(Normed, **ARGUMENTS, **rule, optimizer=lambda p: AdamW(p, lr=1e-2))

    whole, expected, _ = fit(tmp_path / "whole", module=module())
    for stop in FEW:
        folder = tmp_path / f"{stop}"
        _, before, _ = fit(folder, stop, module=module())
        resumed, after, _ = fit(folder / "resumed", ckpt_path=last(folder), module=module())
        assert_bit_equal(weights(resumed), weights(whole))
        assert before.losses | after.losses == expected.losses, stop


def test_a_resume_trains_the_factors_of_its_run(tmp_path):
    fit(tmp_path, ("batch_end", 5), module=toy(Normed, **ARGUMENTS))
    with pytest.raises(UserError, match=r"model\.trained_factors: expected both, the checkpoint's, received B"):
        fit(tmp_path / "on", ckpt_path=last(tmp_path), module=toy(Normed, **ARGUMENTS, trained_factors="B"))


class Fixed(Normed):
    """A class that decides what its users need not."""

    def __init__(self, **arguments):
        super().__init__(trained_factors="B", **arguments)


class Defaulting(Normed):
    def __init__(self, trained_factors="B", **arguments):
        super().__init__(trained_factors=trained_factors, **arguments)


@pytest.mark.parametrize("cls", [Fixed, Defaulting])
def test_a_class_that_fixes_an_argument_resumes_its_own_runs(tmp_path, cls):
    whole, _, _ = fit(tmp_path / "whole", module=toy(cls, **ARGUMENTS))
    fit(tmp_path, ("batch_end", 5), module=toy(cls, **ARGUMENTS))
    resumed, _, _ = fit(tmp_path / "on", ckpt_path=last(tmp_path), module=toy(cls, **ARGUMENTS))
    assert_bit_equal(weights(resumed), weights(whole))
    with pytest.raises(UserError, match=r"model\.trained_factors: expected B, the checkpoint's, received both"):
        fit(tmp_path / "other", ckpt_path=last(tmp_path), module=toy(Normed, **ARGUMENTS))
    assert cls.load_from_checkpoint(last(tmp_path)).trained_factors == "B"
    fit(tmp_path / "plain", ("batch_end", 5), module=toy(Normed, **ARGUMENTS))
    assert cls.load_from_checkpoint(last(tmp_path / "plain")).trained_factors == "B"  # loaded as another class


def test_an_optimizer_keeps_the_largest_values_and_its_count_of_steps():
    parameters = [nn.Parameter(torch.zeros(4, 5)) for _ in range(2)]
    old, new = (AdamW(parameters, lr=1.0) for _ in range(2))
    for k in range(3):
        for parameter in parameters:
            parameter.grad = torch.arange(20.0).reshape(4, 5) - 9 + k
        old.step()
    keep_state(old, new, 0.1, {id(parameters[0]): (slice(4),)})
    factor, whole = (new.state[parameter] for parameter in parameters)
    for name in ("exp_avg", "exp_avg_sq"):
        was = old.state[parameters[0]][name]
        assert factor[name].count_nonzero() == 2
        assert set(factor[name][factor[name] != 0].tolist()) == set(was.flatten()[was.abs().flatten().topk(2).indices].tolist())
        assert torch.equal(whole[name], old.state[parameters[1]][name])
    assert factor["step"] == whole["step"] == 3
    new.step()


def test_the_moments_keep_the_same_entries():
    """A's gradient is 0 after a knot, where B is: a first moment whose second was pruned would be divided by zero."""
    parameter = nn.Parameter(torch.zeros(3))
    old, new = (AdamW([parameter], lr=1.0) for _ in range(2))
    for sign in (1, -1, 1, -1):
        parameter.grad = torch.tensor([10.0 * sign, 3.0, 1.0])  # the largest second moment, the largest first, and neither
        old.step()
    keep_state(old, new, 1 / 3, {id(parameter): (slice(3),)})
    kept = new.state[parameter]
    assert kept["exp_avg"].nonzero().tolist() == kept["exp_avg_sq"].nonzero().tolist() == [[1]]
    before, parameter.grad = parameter.detach().clone(), torch.zeros(3)
    new.step()
    assert (parameter - before).abs().max() < 10


@pytest.mark.parametrize("kept", [0, 0.25])
def test_a_knot_leaves_the_next_optimizer_its_share(tmp_path, kept):
    def look(run, module):
        state = run.optimizers[0].state
        return [(float(s["step"]), s["exp_avg"].count_nonzero().item() / s["exp_avg"].numel()) for s in state.values()]

    watch = Watch(look)
    module = toy(kept_optimizer_state=kept)
    trainer(tmp_path, watch, chain={"every_n_train_steps": 5}, max_epochs=1).fit(module, batches())
    if not kept:
        assert watch.seen[5] == []
        return
    assert [step for step, _ in watch.seen[5]] == [5.0] * 4
    assert [share for _, share in watch.seen[5]] == pytest.approx([0.25] * 4, abs=0.01)
    assert [step for step, _ in watch.seen[9]] == [9.0] * 4


@pytest.mark.parametrize(("kept", "ranks"), [(0.25, [2, 2]), (0.25, [4, 2]), (1, [4, 2]), (0.25, [2, 4])])
def test_the_share_is_of_the_entries_that_both_links_use(tmp_path, kept, ranks):
    """Factors have the entries of the largest rank: unused ones neither count, nor move by moments that a knot retains."""

    def look(run, module):
        state, layers = run.optimizers[0].state, module.adapted.layers.values()
        both = [(state[layer.lora_A], state[layer.lora_B]) for layer in layers if layer.lora_A in state]
        moments = [one for of_A, of_B in both for one in (of_A["exp_avg"].clone(), of_B["exp_avg"].T.clone())]
        unused = [one[layer.rank :].detach().clone() for layer in layers for one in (layer.lora_A, layer.lora_B.T)]
        return moments, unused

    used, watch = min(ranks), Watch(look)
    module = toy(rank=4, kept_optimizer_state=kept, optimizer=lambda p: AdamW(p, lr=0.1, weight_decay=0))
    trainer(tmp_path, watch, chain={"every_n_train_steps": 5, "ranks": ranks}, max_epochs=1).fit(module, batches())
    assert len(watch.seen[5][0]) == 4
    for moment in watch.seen[5][0]:
        assert not moment[used:].any()
        assert moment[:used].count_nonzero() == pytest.approx(kept * moment[:used].numel(), abs=1)
    for before, after in zip(watch.seen[5][1], watch.seen[9][1], strict=True):
        assert torch.equal(before, after)


def eight_bit(parameters):
    return pytest.importorskip("bitsandbytes.optim").AdamW8bit(parameters, lr=1e-3, min_8bit_size=1)


def refused(share, optimizer):
    return rf"model\.kept_optimizer_state: expected 0 or 1 with {optimizer}, whose .* received {share}"


@pytest.mark.parametrize(("make", "name"), [(eight_bit, "AdamW8bit"), (Adafactor, "Adafactor")])
def test_no_part_is_kept_of_a_state_that_is_no_value_for_each_entry(tmp_path, make, name):
    def fit(kept, chain):
        watch = Watch(lambda *_: None)
        try:
            module = toy(kept_optimizer_state=kept, optimizer=make, lr_schedule="constant")
            trainer(tmp_path, watch, chain=chain, max_epochs=1).fit(module, batches())
        finally:
            steps.append(len(watch.seen))

    steps = []
    with pytest.raises(UserError, match=refused(0.25, name)):
        fit(0.25, {"every_n_train_steps": 5})
    fit(0.25, {})  # without a knot nothing is kept
    for kept in (0, 1):
        fit(kept, {"every_n_train_steps": 5})
    assert steps == [1, 10, 10, 10]
    parameter = nn.Parameter(torch.ones(4, 5))
    old, new = make([parameter]), make([parameter])
    parameter.grad = torch.ones(4, 5)
    old.step()
    keep_state(old, new, 0.25, {})  # a factor's alone is kept in part
    with pytest.raises(UserError, match=refused(0.25, name)):
        keep_state(old, new, 0.25, {id(parameter): (slice(4),)})


@pytest.mark.parametrize(
    ("name", "links", "rule"),
    [
        ("rac", 10, {"trained_factors": "random"}),
        ("rac-4", 4, {"trained_factors": "random"}),
        (
            "relora",
            10,
            {"kept_optimizer_state": 0.01, "schedule_scope": "run", "lr_schedule": "cosine", "knot_warmup_steps": 0.1},
        ),
        ("asymmetric", 1, {"trained_factors": "B"}),
        ("boost", 10, {"init": "orthogonal"}),
        ("boost-4", 4, {"init": "orthogonal"}),
    ],
)
def test_a_relative_is_a_method_of_a_study(name, links, rule):
    found = method(name, resolved(["--config", DIGITS]))
    assert (found.links, found.rank) == (links, 1)
    config = resolved(["--config", DIGITS, *as_words(found.options)])
    assert rule.items() <= config["model"]["init_args"].items()
    assert config["chain"]["boosting"] == name.startswith("boost")
    assert name.split("-")[0] in METHODS


@pytest.mark.parametrize(("name", "expected"), [("lora", False), ("full", False), ("cola", True), ("cola-4", True)])
def test_the_chain_of_a_boosted_config_is_boosted_in_a_study_and_lora_is_not(name, expected):
    boosted = ["--config", DIGITS, "--chain.boosting", "true"]
    found = method(name, resolved(boosted))
    assert resolved([*boosted, *as_words(found.options)])["chain"]["boosting"] == expected


RULES = {"trained_factors": "both", "kept_optimizer_state": 0, "boosting": False}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("lora", {}),
        ("lora-sum-rank-4", {}),
        ("cola", {"trained_factors": "random", "kept_optimizer_state": 0.1, "boosting": True}),
        ("rac", {"trained_factors": "random"}),
        ("relora", {"kept_optimizer_state": 0.01}),
        ("relora-4", {"kept_optimizer_state": 0.01}),
        ("asymmetric", {"trained_factors": "B"}),
        ("boost", {"boosting": True}),
    ],
)
def test_a_method_follows_its_own_rules_and_cola_those_of_the_config(name, own):
    mixed = ["--model.trained_factors", "random", "--model.kept_optimizer_state", "0.1", "--chain.boosting", "true"]
    words = ["--config", DIGITS, *mixed]
    options = method(name, resolved(words)).options
    config = resolved([*words, *as_words(options)])
    has = config["model"]["init_args"] | {"boosting": config["chain"]["boosting"]}
    assert {rule: has[rule] for rule in RULES} == RULES | own


def test_a_module_without_the_rules_of_relatives_is_compared_with_lora():
    config = {"model": {"init_args": {"rank": 2, "alpha": 4}}, "chain": {}, "trainer": {}}
    assert not [name for name in method("lora", config).options if name.startswith("model.")]


# ---------------------------------------------------------------------- BoostLoRA: links orthogonal to those before


def rows_of(chain, name, place=0):
    """The factors of a layer's finished links, a list of rows x values."""
    return [(link.factors[name][0], link.factors[name][1].T)[place] for link in chain.links]


def cosines(mine, theirs):
    """The largest cosine between rows of two matrices."""
    mine, theirs = (F.normalize(rows.double()) for rows in (mine, theirs))
    return (mine @ theirs.T).abs().max().item()


def trained(finished_links="merge", knots=3, trained_factors="both", build=base, targets=("0", "2"), seed=0):
    """A model with finished links of ranks 2, 1, 2, ... that were trained: their A is no longer what was drawn."""
    options = {"init": "orthogonal", "finished_links": finished_links, "trained_factors": trained_factors, "seed": seed}
    adapted = AdaptedModel.of(build, target_modules=list(targets), rank=2, alpha=4, **options)
    for knot in range(knots):
        optimizer = AdamW(adapted.trained_parameters(), lr=5e-2)
        for x, y in batches(4):
            F.mse_loss(adapted.model(x).flatten(1)[:, :6], y).backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.tie_knot(rank=1 + knot % 2)
    return adapted


@pytest.mark.parametrize(("finished_links", "dtype"), [("merge", None), ("stack", None), ("stack", torch.bfloat16)])
def test_a_links_A_is_orthogonal_to_that_of_every_finished_link(finished_links, dtype):
    adapted = trained(finished_links, build=lambda: base().to(dtype))
    for name, layer in adapted.layers.items():
        before = rows_of(adapted.chain, name)
        assert sum(map(len, before)) == 5
        drawn = layer.factors[0].detach()
        assert cosines(drawn, torch.cat(before)) < 1e-6
        gram = drawn.double() @ drawn.double().T
        torch.testing.assert_close(gram, torch.eye(len(drawn), dtype=torch.float64) / 3)  # as long as kaiming's are
        assert not layer.lora_B.any()


def test_rows_are_as_long_as_kaimings():
    for rank, n in ((1, 64), (8, 512)):
        lengths = []
        for init in ("kaiming", "orthogonal"):
            layer = LoRALinear.from_linear(nn.Linear(n, rank), rank, alpha=1, init=init)
            layer.reset(torch.Generator().manual_seed(0))
            lengths.append(layer.lora_A.norm(dim=1).mean().item())
        assert lengths[1] == pytest.approx(lengths[0], rel=0.15)


def test_the_first_link_is_drawn_alike_in_each_default_dtype_and_device():
    drawn = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = torch.zeros(2, 8)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                DRAWS["orthogonal"](rows, torch.Generator("cpu").manual_seed(3), ())
        finally:
            torch.set_default_dtype(before)
        drawn.append(rows)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_a_B_that_is_drawn_is_orthogonal_to_those_before():
    adapted = trained(knots=1, trained_factors="random", seed=3)
    assert [frozen_factor("random", 3, link) for link in range(2)] == ["A", "B"]
    for name, layer in adapted.layers.items():
        (before,) = rows_of(adapted.chain, name, 1)
        assert before.any()
        assert cosines(layer.factors[1].T.detach(), before) < 1e-6
        assert not layer.lora_A.any()


def test_where_no_direction_is_left_the_basis_begins_again():
    """Eight inputs: links of rank 3 fill six directions, the third begins again, and the fourth has it alone before it."""
    adapted = AdaptedModel.of(base, target_modules=["0"], rank=3, alpha=3, init="orthogonal", trained_factors="B", seed=0)
    for _ in range(5):
        adapted.tie_knot()
    drawn = [*rows_of(adapted.chain, "0"), adapted.layers["0"].factors[0].detach()]
    is_orthogonal = [[cosines(one, other) < 1e-6 for other in drawn[:k]] for k, one in enumerate(drawn)]
    blocks = [k // 2 for k in range(6)]
    assert is_orthogonal == [[blocks[j] == blocks[k] for j in range(k)] for k in range(6)]


def test_with_frozen_As_the_ranks_of_the_links_add_up():
    adapted = trained(knots=4, trained_factors="B")
    for name in adapted.layers:
        total = adapted.chain.total_rank(name)
        assert torch.linalg.matrix_rank(adapted.chain.delta(name), rtol=1e-4) == min(total, 6) == 6
        rows = rows_of(adapted.chain, name)
        assert all(cosines(one, other) < 1e-6 for k, one in enumerate(rows) for other in rows[:k])


def test_what_is_drawn_follows_from_the_seed_and_the_finished_links_alone(tmp_path):
    adapted = trained()
    adapted.chain.save(tmp_path / "chain")
    torch.manual_seed(99)
    for links in (3, 1, 2):
        again = AdaptedModel.of(base, target_modules=["0", "2"], rank=2, alpha=4, init="orthogonal", seed=0)
        again.start_from(Chain.load(tmp_path / "chain").truncate(links))
        again.begin_link(*adapted.live)
        for name, layer in again.layers.items():
            before = rows_of(again.chain, name)
            assert cosines(layer.lora_A.detach(), torch.cat(before)) < 1e-6
        if links == 3:
            assert_bit_equal(factors_by_name(again), factors_by_name(adapted))
        again.go_to(adapted.chain)
        again.begin_link(*adapted.live)
        assert_bit_equal(factors_by_name(again), factors_by_name(adapted))


def factors_by_name(adapted):
    return {f"{name}.{k}": factor for name, layer in adapted.layers.items() for k, factor in enumerate(layer.factors)}


def test_a_module_that_goes_back_or_goes_on_from_a_chain_draws_orthogonal_to_what_is_left(tmp_path):
    module, path = toy(init="orthogonal"), tmp_path / "run.ckpt"
    run = trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=1)
    run.fit(module, batches())
    run.save_checkpoint(path)
    back = COLAModule.load_from_checkpoint(path, links=1)
    on = toy(init="orthogonal", init_chain=str(path), init_links=2)
    on.configure_model()
    for other, n_links in ((back, 1), (on, 2)):
        for name, layer in other.adapted.layers.items():
            before = rows_of(module.chain.truncate(n_links), name)
            assert cosines(layer.lora_A.detach(), torch.cat(before)) < 1e-6
            assert not layer.lora_B.any()


def test_convolutions_are_drawn_orthogonal_too():
    def build():
        return nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 6, 2))

    adapted = trained(build=build, targets=["1"])
    assert cosines(adapted.layers["1"].factors[0].detach(), torch.cat(rows_of(adapted.chain, "1"))) < 1e-6


def test_one_link_alone_can_be_as_wide_as_its_layer():
    layer = LoRALinear.from_linear(nn.Linear(5, 7), rank=5, alpha=5, init="orthogonal")
    layer.reset(torch.Generator().manual_seed(0), before=[torch.randn(5, 5)])
    torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(5) / 3)


def test_an_initialisation_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"model\.init: expected kaiming, gaussian, orthogonal, received 'svd'"):
        toy(init="svd")
    assert list(DRAWS) == list(get_args(Init))
