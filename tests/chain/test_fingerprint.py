"""A chain goes on the base that it was trained on, and on no other: all that is frozen is looked at."""

import pytest
import torch
from torch import nn

from cola_lightning import Chain, LoRAConfig, UserError, inject_lora
from cola_lightning.chain.base import check_same_base, describe_base
from tests.helpers.toy import Toy, batches, toy, trainer


class Frozen(Toy):
    """The toy behind a frozen layer, with a buffer; one value of it can be another."""

    changed: str | None = None

    def build_model(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))
        with torch.no_grad():
            if self.changed:
                model.state_dict()[self.changed].add_(1)
        return model


ARGUMENTS = {"target_modules": ["2"], "modules_to_save": ["4"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, module = tmp_path_factory.mktemp("trained"), toy(Frozen, **ARGUMENTS)
    run = trainer(folder, chain={"every_n_epochs": 1}, max_epochs=2)
    run.fit(module, batches())
    run.save_checkpoint(folder / "run.ckpt")
    module.full_chain().save(folder / "chain")
    return folder


@pytest.mark.parametrize("changed", ["0.weight", "1.running_mean", "2.bias", "2.weight"])
@pytest.mark.parametrize("way", ["load", "load_state_dict", "resume", "a checkpoint as init_chain", "a folder as init_chain"])
def test_another_value_of_what_is_frozen_is_refused(trained, changed, way):
    class Other(Frozen):
        pass

    Other.changed, checkpoint = changed, trained / "run.ckpt"
    run = trainer(trained, chain={}, max_epochs=3)
    ways = {
        "load": lambda: Other.load_from_checkpoint(checkpoint),
        "load_state_dict": lambda: toy(Other, **ARGUMENTS).load_state_dict(torch.load(checkpoint)["state_dict"]),
        "resume": lambda: run.fit(toy(Other, **ARGUMENTS), batches(), ckpt_path=checkpoint),
        "a checkpoint as init_chain": lambda: toy(Other, **ARGUMENTS, init_chain=str(checkpoint)).configure_model(),
        "a folder as init_chain": lambda: toy(Other, **ARGUMENTS, init_chain=str(trained / "chain")).configure_model(),
    }
    with pytest.raises(UserError, match=rf"^base: .* with other values of '{changed}'"):
        ways[way]()


def test_what_is_trained_whole_may_begin_otherwise(trained):
    class Other(Frozen):
        changed = "4.weight"

    module = toy(Other, **ARGUMENTS, init_chain=str(trained / "chain"))
    module.configure_model()
    assert torch.equal(module.model[4].weight, Chain.load(trained / "chain").links[-1].extras["4.weight"])


def described(*layers, dtype=torch.float32, finished_links="merge"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), *layers).to(dtype)
    inject_lora(model, LoRAConfig(["0"], rank=1, alpha=1, finished_links=finished_links))
    return describe_base(model)


def test_a_layer_more_or_less_is_refused_and_finished_links_may_go_elsewhere():
    more, less = described(nn.BatchNorm1d(4, affine=False)), described()
    for expected, received, word in ((more, less, "without"), (less, more, "with")):
        with pytest.raises(UserError, match=rf"{word} '1\.num_batches_tracked'"):
            check_same_base(expected, received)
    merged, stacked = (described(dtype=torch.bfloat16, finished_links=mode) for mode in ("merge", "stack"))
    assert merged == stacked  # which widens a weight and changes no value
