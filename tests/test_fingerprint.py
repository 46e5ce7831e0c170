"""A chain goes on the base that it was trained on, and on no other: all that is frozen is looked at."""

import time

import pytest
import torch
from torch import nn

from cola_lightning import Chain, UserError, inject_lora
from cola_lightning.chain.base import check_same_base, describe_base
from tests.toy import Toy, batches, toy, trainer


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
FROZEN = ["0.weight", "0.bias", "1.weight", "1.running_mean", "2.bias"]


@pytest.fixture
def trained(tmp_path):
    module = toy(Frozen, **ARGUMENTS)
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    module.full_chain().save(tmp_path / "chain")
    return tmp_path


@pytest.mark.parametrize("changed", FROZEN)
@pytest.mark.parametrize("how", ["load", "resume", "init_chain from a checkpoint", "init_chain from a folder"])
def test_another_value_of_what_is_frozen_is_refused(trained, changed, how):
    class Other(Frozen):
        pass

    Other.changed = changed
    checkpoint, arguments = trained / "run.ckpt", ARGUMENTS | {"rank": 2, "alpha": 4, "seed": 0}
    take = {
        "load": lambda: Other.load_from_checkpoint(checkpoint, **arguments),
        "resume": lambda: trainer(trained, chain={}, max_epochs=3).fit(Other(**arguments), batches(), ckpt_path=checkpoint),
        "init_chain from a checkpoint": lambda: Other(**arguments, init_chain=str(checkpoint)).configure_model(),
        "init_chain from a folder": lambda: Other(**arguments, init_chain=str(trained / "chain")).configure_model(),
    }
    with pytest.raises(UserError, match=rf"base: expected the one .* trained, .* with other values of '{changed}'"):
        take[how]()


def test_what_is_trained_whole_may_begin_otherwise(trained):
    class Other(Frozen):
        changed = "4.weight"

    module = toy(Other, **ARGUMENTS, init_chain=str(trained / "chain"))
    module.configure_model()
    assert torch.equal(module.model[4].weight, toy_head(trained))


def toy_head(folder):
    return Chain.load(folder / "chain").links[-1].extras["4.weight"]


def test_a_layer_more_or_less_is_refused():
    def described(*layers):
        model = nn.Sequential(nn.Linear(4, 4), *layers)
        torch.manual_seed(0)
        nn.init.ones_(model[0].weight), nn.init.ones_(model[0].bias)
        inject_lora(model, ["0"], rank=1, alpha=1)
        return describe_base(model, "base")

    two, three = described(nn.BatchNorm1d(4, affine=False)), described()
    with pytest.raises(UserError, match=r"without '1\.num_batches_tracked'"):
        check_same_base(two, three)
    with pytest.raises(UserError, match=r"with '1\.num_batches_tracked'"):
        check_same_base(three, two)


def test_the_description_does_not_follow_from_dtype_or_mode():
    """What a weight is widened to, or where finished links go, changes no value."""

    def described(finished_links):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6)).bfloat16()
        inject_lora(model, ["1"], rank=1, alpha=1, finished_links=finished_links)
        return describe_base(model).values

    assert described("merge") == described("stack")


def test_describing_a_large_base_takes_no_time():
    """As many tensors as a model of 7 billion parameters has, and a value of each of them in 64."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(225)))
    inject_lora(model, [str(k) for k in range(0, 225, 4)], rank=1, alpha=1)
    begin = time.process_time()  # the same however busy the machine is
    describe_base(model)
    assert time.process_time() - begin < 2
