"""``state_dict()`` is all that training changed: loading it gives the same outputs, or is refused."""

import copy

import pytest
import torch
from torch import nn

from cola_lightning import UserError
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer, weights


def trained(tmp_path, **arguments):
    module = toy(**arguments)
    trainer(tmp_path, chain={"every_n_epochs": 1, "ranks": [2, 1, 2]}, max_epochs=3).fit(module, batches())
    return module


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
@pytest.mark.parametrize("source", ["state_dict", "checkpoint"])
def test_loading_it_into_a_new_module_gives_the_same_outputs(tmp_path, finished_links, source):
    module = trained(tmp_path, finished_links=finished_links)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "run.ckpt")
    if source == "checkpoint":  # which has no other copy
        module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    fresh = toy(finished_links=finished_links)
    fresh.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert fresh.link == 2
    assert_bit_equal(weights(fresh), weights(module))
    x = next(iter(batches()))[0]
    assert torch.equal(fresh.model(x), module.model(x))
    assert fresh.live_link().start_step == module.live_link().start_step == 20
    assert fresh.live_link().metrics == module.live_link().metrics


def test_a_copy_from_before_a_knot_takes_the_module_back_and_forth(tmp_path):
    module = trained(tmp_path)
    before, first = copy.deepcopy(module.state_dict()), weights(module)
    module.tie_knot(rank=1)
    with torch.no_grad():
        module.model[0].lora_B.add_(1)
    after, second = copy.deepcopy(module.state_dict()), weights(module)
    module.load_state_dict(before)
    assert module.link == 2
    assert_bit_equal(weights(module), first)
    module.load_state_dict(after)
    assert (module.link, module.model[0].rank) == (3, 1)
    assert_bit_equal(weights(module), second)


def test_what_cannot_be_loaded_right_is_refused(tmp_path):
    class Other(Toy):
        def build_model(self):
            model = super().build_model()
            nn.init.ones_(model[0].bias)
            return model

    state = trained(tmp_path).state_dict()
    other = toy(Other)
    before = weights(other)
    with pytest.raises(UserError, match=r"^base: "):
        other.load_state_dict(state)
    assert_bit_equal(weights(other), before)
    del state["cola"]
    with pytest.raises(UserError, match="no chain"):
        toy().load_state_dict(state)


def test_a_module_inside_another_carries_its_chain_too(tmp_path):
    outer, again = nn.ModuleDict({"inner": trained(tmp_path)}), nn.ModuleDict({"inner": toy()})
    again["inner"].configure_model()
    again.load_state_dict(outer.state_dict(), strict=False)
    assert_bit_equal(weights(again["inner"]), weights(outer["inner"]))


def test_where_all_is_trained_the_values_are_enough():
    class PartlyFrozen(Toy):
        def configure_model(self):
            self.model[0].requires_grad_(False)

    state = toy(target_modules=None).state_dict()
    changed = {name: value + 1 for name, value in state.items() if name != "cola"}
    for received in (changed, changed | {"cola": state["cola"]}):
        fresh = toy(target_modules=None)
        fresh.load_state_dict(received)
        assert_bit_equal(weights(fresh), changed)
    for other in (toy(), toy(PartlyFrozen, target_modules=None)):
        with pytest.raises(UserError):
            other.load_state_dict(changed)


def test_a_subclass_own_extra_state_is_beside_the_chain():
    class Counting(Toy):
        def get_extra_state(self):
            return torch.ones(1)

        def set_extra_state(self, state):
            self.counted = state

    module = toy(Counting)
    module.load_state_dict(module.state_dict())
    assert module.counted == 1
