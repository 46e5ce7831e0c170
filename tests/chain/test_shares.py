"""Knots over which A, the rest of B and the optimizer go on: those that merge a share of B A, and those that only record."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from transformers import AutoModelForCausalLM

from cola_lightning import AdaptedModel, LoRAConfig, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.report import report
from tests.helpers import tiny
from tests.helpers.resuming import Data
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, assert_near, batches, difference, toy, trainer, weights

modes = pytest.mark.parametrize("finished_links", ["merge", "stack"])
KNOTS = (5, 10, 15)  # of 20 steps
CHAIN = {"at_steps": KNOTS, "knot": "half"}


class Record(Callback):
    """Keeps merged copies of the model just before its knots and at its end, and some checkpoints."""

    def __init__(self, folder):
        self.folder, self.copies = folder, []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step in (5, 12, 20):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")
        if trainer.global_step in (*KNOTS, 20):
            self.copies.append(weights(module.merged_model()))


def fit(folder, *callbacks, cls=ValidatedToy, data=None, ckpt_path=None, chain=CHAIN, **arguments):
    optimization = {} if cls is OwnDecay else {"lr_schedule": "constant", "optimizer": lambda p: AdamW(p, lr=1e-2)}
    module = toy(cls, **optimization | arguments)
    made = trainer(folder, *callbacks, chain=chain, max_steps=20, num_sanity_val_steps=0)
    made.fit(module, data or Data(batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module", params=["merge", "stack"])
def run(request, tmp_path_factory):
    """A run of four links: its folder, its module, and the copies."""
    folder = tmp_path_factory.mktemp(request.param)
    record = Record(folder)
    return folder, fit(folder, record, finished_links=request.param), record.copies


def knot(share):
    """The options of a knot that merges a share and goes on."""
    return {"knot": "half", "share": share} if share else {"knot": "record"}


def trained_model(finished_links="merge", share=0.5, knots=3):
    """A model after some knots and five more steps, in a loop of one's own with one optimizer."""
    model = AdaptedModel(
        lambda: Toy.build_model(None), LoRAConfig("all-linear", rank=2, alpha=4, finished_links=finished_links)
    )
    optimizer = AdamW(model.trained_parameters(), lr=1e-2)
    for link in range(knots + 1):
        for x, y in batches(5):
            optimizer.zero_grad()
            F.mse_loss(model.model(x), y).backward()
            optimizer.step()
        if link < knots:
            model.tie_knot(**knot(share))
    return model


# ---------------------------------------------------------------------- the knot


@modes
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_a_knot_keeps_the_function_and_what_is_left_in_B(finished_links, share):
    model, ((x, _),) = trained_model(finished_links, share), batches(1)
    before, factors = model.model(x), {name: layer.lora_B.detach().clone() for name, layer in model.layers.items()}
    drawn = {name: layer.lora_A.detach().clone() for name, layer in model.layers.items()}
    link = model.tie_knot(**knot(share))
    assert link.share == share
    assert_near(model.model(x), before, 1e-6)
    for name, layer in model.layers.items():
        assert torch.equal(layer.lora_B, factors[name] * (1 - share))
        assert torch.equal(layer.lora_A, drawn[name])
        assert torch.equal(link.factors[name][1], factors[name])  # whole


class PlainLoRA(nn.Module):
    """A linear layer with LoRA, as one writes it without this package."""

    def __init__(self, linear, lora_A):
        super().__init__()
        self.weight, self.bias = (value.detach().clone() for value in (linear.weight, linear.bias))
        self.lora_A = nn.Parameter(lora_A.detach().clone())
        self.lora_B = nn.Parameter(torch.zeros(len(self.weight), len(lora_A)))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A) * 2.0, self.lora_B)

    @torch.no_grad()
    def merge(self, share):
        self.weight += share * 2.0 * (self.lora_B @ self.lora_A)
        self.lora_B *= 1 - share


def test_a_run_is_a_loop_in_plain_torch_to_the_bit(tmp_path):
    module, begun = fit(tmp_path, cls=Toy, data=batches()), toy()  # of the same seed: with the same base and the same first A
    begun.configure_model()
    first, last = (PlainLoRA(layer, layer.lora_A) for layer in begun.adapted.layers.values())
    model = nn.Sequential(first, nn.Tanh(), last)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    for step, (x, y) in enumerate([*batches(), *batches()]):
        if step in KNOTS:
            first.merge(0.5)
            last.merge(0.5)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for mine, layer in zip((first, last), module.adapted.layers.values(), strict=True):
        for name in ("weight", "lora_A", "lora_B"):
            assert torch.equal(getattr(mine, name), getattr(layer, name)), name


class OwnDecay(ValidatedToy):
    """A module with an optimizer of its own, and a schedule over the steps of its link."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for _, p in self.named_trained_parameters()], lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": LinearLR(optimizer, 1.0, 0.0, self.link_steps), "interval": "step"}]


@pytest.mark.parametrize(("cls", "finished_links"), [(ValidatedToy, "stack"), (OwnDecay, "merge")])
def test_knots_that_record_leave_the_run_its_bits(tmp_path, finished_links, cls):
    """Whatever happens at other knots: a new optimizer, a restarted schedule, a warm-up."""
    options = {} if cls is OwnDecay else {"lr_schedule": "cosine", "warmup_steps": 0.1, "knot_warmup_steps": 2}
    options |= {"cls": cls, "finished_links": finished_links}
    record, chain = Record(tmp_path), {**CHAIN, "knot": "record"}
    module = fit(tmp_path, record, chain=chain, **options)
    without_knots = fit(tmp_path / "lora", chain={}, **options)
    resumed = fit(tmp_path / "resumed", chain=chain, ckpt_path=tmp_path / "12.ckpt", **options)
    assert_bit_equal(weights(module.merged_model()), weights(without_knots.merged_model()))
    for name in ("lora_A", "lora_B"):
        for mine, *others in zip(*(one.adapted.layers.values() for one in (module, without_knots, resumed)), strict=True):
            assert all(torch.equal(getattr(mine, name), getattr(other, name)) for other in others)
    for k, expected in enumerate(record.copies, start=1):
        assert_bit_equal(weights(module.merged_model(k)), expected)


@pytest.mark.parametrize("step", [5, 12])  # at a knot, and after two
def test_a_run_resumes_with_the_same_bits(run, tmp_path, step):
    folder, module, _ = run
    mode = "merge" if module.adapted.merges else "stack"
    resumed = fit(tmp_path, ckpt_path=folder / f"{step}.ckpt", finished_links=mode)
    assert_bit_equal(weights(resumed), weights(module))
    assert [link.share for link in resumed.chain.links] == [0.5] * 3
    assert module.chain.is_beginning_of(resumed.chain)


def test_a_run_is_not_resumed_with_another_share(run, tmp_path):
    with pytest.raises(UserError, match=r"chain\.knot, chain\.share: must be .*0\.5.*, as in the run .* got .*1"):
        fit(tmp_path, chain={**CHAIN, "share": 1}, ckpt_path=run[0] / "12.ckpt")


# ---------------------------------------------------------------------- the first links


def test_the_first_links_are_the_model_as_it_was_at_that_knot(run):
    """Merged weights to the bit; the outputs of an earlier state to 1e-6."""
    folder, module, copies = run
    ((x, _),) = batches(1)
    plain = module.merged_model(0)
    for k, expected in enumerate([weights(plain), *copies]):
        assert_bit_equal(weights(module.merged_model(k)), expected)
        loaded = ValidatedToy.load_from_checkpoint(folder / "20.ckpt", links=k)
        assert_bit_equal(weights(loaded.merged_model()), expected)
        assert [link.share for link in loaded.full_chain().links][:k] == [0.5] * (k - 1) + [1.0] * (k > 0)
        plain.load_state_dict(expected)
        with module.at(k) as model:
            assert_near(model(x), plain(x), 1e-6)
        begun = toy(init_chain=str(folder / "20.ckpt"), init_links=k)
        begun.configure_model()
        assert_bit_equal(weights(begun.merged_model()), expected)


def test_a_scaled_chain_has_what_the_knots_merged(run):
    folder, module, _ = run
    chain, base = module.full_chain(), module.merged_model(0)
    loaded = ValidatedToy.load_from_checkpoint(folder / "20.ckpt", scale={0: -1.0, 2: 0})
    mine = loaded.merged_model().get_parameter("0.weight")
    first, second, _, live = (link.delta("0") for link in chain.links)
    assert_near(mine - base.get_parameter("0.weight"), second + live - first, 1e-5)
    assert [link.share for link in loaded.chain.links] == [0.5, 0.5, 1.0]
    assert report(chain)[0].update_norm == pytest.approx(chain[0].at_end().norm())
    assert chain[0].norm() == pytest.approx(chain[0].at_end().norm() / 2)


def test_exports_are_the_model(tmp_path):
    module = tiny.causal_lm(tmp_path)
    tiny.with_live_link(module)
    copies = []
    for _ in range(2):
        copies.append(copy.deepcopy(module.merged_model()))
        module.adapted.tie_knot(knot="half")
    with torch.no_grad():
        for layer in module.adapted.layers.values():
            layer.lora_A.add_(0.1)
    expected = tiny.logits(module.model)
    for kind in ("merged", "peft", "chain"):
        module.export(tmp_path / kind, kind)
    assert difference(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) <= 1e-5
    assert difference(tiny.logits(PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")), expected) <= 1e-5
    assert [link.share for link in read_chain(tmp_path / "chain").links] == [0.5, 0.5, 1.0]
    for kind, links, wanted in (("chain", 1, tiny.logits(copies[0])), ("chain", 3, expected), ("peft", 1, expected)):
        begun = tiny.causal_lm(tmp_path, init_chain=str(tmp_path / kind), init_links=links)
        assert difference(tiny.logits(begun.model), wanted) <= 1e-5


@modes
def test_a_record_adds_nothing_to_a_stack_or_to_an_adapter(tmp_path, finished_links):
    """Neither next to links that were merged nor alone; each recorded state can still be gone back to."""
    module = tiny.causal_lm(tmp_path, finished_links=finished_links)
    tiny.with_live_link(module)
    copies = []
    for kind in ("record", "cola", *["record"] * 3):
        copies.append(tiny.logits(module.merged_model()))
        module.adapted.tie_knot(knot=kind)
        with torch.no_grad():
            for layer in module.adapted.layers.values():
                layer.lora_B.add_(0.1)
    expected, rank = tiny.logits(module.model), module.run.config.rank
    stacks = [layer.stack.rank for layer in module.adapted.layers.values() if layer.stack]
    assert stacks == ([] if finished_links == "merge" else [rank] * len(module.adapted.layers))
    for links, wanted in enumerate(copies, start=1):
        assert difference(tiny.logits(module.merged_model(links)), wanted) <= 1e-5
        with module.at(links) as model:
            assert difference(tiny.logits(model), wanted) <= 1e-5
    assert [link.total_rank for link in report(module.full_chain())] == [2, 2, 4, 4, 4, 4]
    module.export(tmp_path / "peft", "peft")
    assert read_chain(tmp_path / "peft")[0].rank == 2 * rank
    assert difference(tiny.logits(PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")), expected) <= 1e-5


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"share": 0.5}, r"chain\.share"),
        ({"knot": "record", "share": 0.5}, r"chain\.share"),
        ({"knot": "half", "share": 0}, r"chain\.share"),
        ({"knot": "half", "rank": 1}, r"chain\.knot"),
    ],
)
def test_a_knot_that_would_lose_something_is_refused(given, field):
    model = trained_model(knots=0)
    with pytest.raises(UserError, match=field):
        model.tie_knot(**given)
    assert not model.chain.links


def test_a_refused_knot_blocks_no_later_checkpoint(tmp_path):
    class Knots(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            with pytest.raises(UserError, match=r"^chain\.knot: with half"):
                module.tie_knot(rank=1)

    run = trainer(tmp_path, Knots(), chain={"at_steps": [2], "knot": "half"}, max_steps=3)
    run.fit(module := toy(), batches())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert len(module.chain) == 1
