"""``state_dict()`` is all that training changed: loading it gives the same outputs, or is refused."""

import copy

import pytest
import torch
from torch import nn

from cola_lightning import UserError
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer, weights


def trained(tmp_path, epochs=3, module=None, **arguments):
    module = module or toy(**arguments)
    trainer(tmp_path, chain={"every_n_epochs": 1, "ranks": [2, 1, 2]}, max_epochs=epochs).fit(module, batches())
    return module


def outputs(module):
    return module.model(next(iter(batches()))[0])


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_loading_it_into_a_new_module_gives_the_same_outputs(tmp_path, finished_links):
    module = trained(tmp_path, finished_links=finished_links)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    fresh = toy(finished_links=finished_links)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.link == 2
    assert torch.equal(outputs(fresh), outputs(module))
    assert_bit_equal(weights(fresh), weights(module))
    assert fresh.live_link().start_step == module.live_link().start_step == 20


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

    module = trained(tmp_path)
    state = module.state_dict()
    other = toy(Other)
    other.configure_model()
    before = weights(other)
    with pytest.raises(UserError, match="base: expected the one on which the chain was trained"):
        other.load_state_dict(state)
    assert_bit_equal(weights(other), before)
    del state["cola"]
    with pytest.raises(UserError, match="which holds no chain"):
        toy().load_state_dict(state)


def test_it_is_all_that_a_checkpoint_has_of_the_module(tmp_path):
    module = trained(tmp_path)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    fresh = toy()
    fresh.load_state_dict(checkpoint["state_dict"])
    assert_bit_equal(weights(fresh), weights(module))
    assert fresh.live_link().metrics == module.live_link().metrics


def test_a_module_inside_another_carries_its_chain_too(tmp_path):
    outer = nn.ModuleDict({"inner": trained(tmp_path)})
    again = nn.ModuleDict({"inner": toy()})
    again["inner"].configure_model()
    again.load_state_dict(outer.state_dict(), strict=False)
    assert torch.equal(outputs(again["inner"]), outputs(outer["inner"]))


def test_where_all_is_trained_the_values_are_enough():
    class PartlyFrozen(Toy):
        def configure_model(self):
            self.model[0].requires_grad_(False)

    class Counting(Toy):
        def get_extra_state(self):
            return torch.ones(1)

        def set_extra_state(self, state):
            self.counted = state

    module = toy(target_modules=None)
    state = module.state_dict()
    assert state.keys() == {"cola"} | {f"model.{n}.{what}" for n in (0, 2) for what in ("weight", "bias")}
    changed = {name: value + 1 for name, value in state.items() if name != "cola"}
    nested = nn.ModuleDict({"inner": toy(target_modules=None)})
    nested["inner"].configure_model()
    nested.load_state_dict({f"inner.{name}": value for name, value in changed.items()})
    for received in (changed, changed | {"cola": state["cola"]}):
        fresh = toy(target_modules=None)
        fresh.load_state_dict(received)
        assert_bit_equal(weights(fresh), changed)
    assert_bit_equal(weights(nested["inner"]), changed)
    for other in (toy(), toy(PartlyFrozen, target_modules=None)):
        with pytest.raises(UserError, match="expected"):
            other.load_state_dict(changed)
    counting = toy(Counting)
    counting.load_state_dict(counting.state_dict())  # a subclass' own extra state is beside the chain
    assert counting.counted == 1
