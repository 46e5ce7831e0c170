"""What happens to the last link of ``init_chain`` when a run begins from it: a new link, or one that goes on."""

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch.optim import AdamW

from cola_lightning import COLACausalLM, UserError
from tests.helpers.resuming import Data
from tests.helpers.toy import ValidatedToy, assert_bit_equal, assert_near, batches, toy, trainer, weights

KEPT = {"cola": None, "half": 0.5, "record": 1.0}  # of B


def make(**arguments):
    return toy(ValidatedToy, **{"optimizer": lambda p: AdamW(p, lr=1e-2), "rank": 2} | arguments)


def fit(folder, module, steps, *, at=None, ckpt_path=None, **chain):
    """With checkpoints of every step."""

    def save(run, *_):
        run.save_checkpoint(folder / f"{run.global_step}.ckpt")

    run = trainer(folder, LambdaCallback(on_train_batch_end=save), chain={"at_steps": at, **chain}, max_steps=steps)
    run.fit(module, Data(batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("knot", "finished_links"), [("cola", "stack"), ("half", "merge"), ("record", "stack")])
def test_a_stage_begins_with_a_knot_and_resumes(tmp_path, finished_links, knot):
    """Its knots inside are of another kind."""
    options, ((x, _),) = {"finished_links": finished_links}, batches(1)
    first = fit(tmp_path / "sft", make(**options), 7, at=[4], name="sft")
    live = first.live_link()
    options |= {"init_chain": str(tmp_path / "sft" / "7.ckpt"), "init_knot": knot}
    begun = make(**options)
    begun.configure_model()
    assert_near(begun(x), first(x), 1e-6)
    assert [link.share for link in begun.chain.links] == [1.0, 1.0 - (KEPT[knot] or 0.0)]
    assert begun.adapted.is_at_knot
    for name, layer in begun.adapted.layers.items():
        lora_A, lora_B = live.factors[name]
        assert torch.equal(layer.lora_A, lora_A) is (knot != "cola")
        assert torch.equal(layer.lora_B, lora_B * (KEPT[knot] or 0))

    inside = {"at": [4], "name": "dpo", "knot": "record"}
    second = fit(tmp_path / "dpo", make(**options), 8, **inside)
    assert second.link_names == ["sft", "sft", "dpo", "dpo"]
    assert not second.adapted.is_at_knot
    assert_bit_equal(weights(second.merged_model("sft")), weights(first.merged_model()))
    with second.at("sft") as model:
        assert_near(model(x), first(x), 1e-6)
    resumed = fit(tmp_path / "resumed", make(**options), 8, **inside, ckpt_path=tmp_path / "dpo" / "4.ckpt")  # at a knot
    assert_bit_equal(weights(resumed), weights(second))
    assert second.chain.is_beginning_of(resumed.chain)
    assert resumed.link_names == second.link_names
    for links in (2, 3):
        loaded = ValidatedToy.load_from_checkpoint(tmp_path / "dpo" / "8.ckpt", links=links)
        assert_bit_equal(weights(loaded.merged_model()), weights(second.merged_model(links)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 1}, r"^model\.init_knot: with half, .* 2 and 4, got 1 and 4$"),
        ({"trained_factors": "random"}, r"^chain\.knot: half "),
        ({"alpha_pattern": {"0": 3}}, r"^model\.rank_pattern, model\.alpha_pattern, model\.scaling: "),
    ],
)
def test_another_rank_or_alpha_cannot_go_on(tmp_path, arguments, message):
    fit(tmp_path, make(), 2)
    module = make(init_chain=str(tmp_path / "2.ckpt"), init_knot="half", **arguments)
    with pytest.raises(UserError, match=message):
        module.configure_model()


def test_it_is_an_option_of_the_first_chain(tmp_path):
    with pytest.raises(UserError, match=r"^model\.init_knot: needs model\.init_chain$"):
        COLACausalLM("any", init_knot="record")
    fit(tmp_path, make(), 2)
    options = {"init_chain": str(tmp_path / "2.ckpt"), "target_modules": "all-linear"}
    fit(tmp_path / "run", make(**options), 1)
    with pytest.raises(UserError, match=r"^model\.init_chain: must be "):
        fit(tmp_path, make(**options, init_knot="record"), 2, ckpt_path=tmp_path / "run" / "1.ckpt")
