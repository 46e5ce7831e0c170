"""A chain as a folder: what is in it, that later releases keep reading it, and its base. ``test_damage.py``: a damaged one."""

import json
import math

import pytest
import torch
from torch import nn

from cola_lightning import Chain, Link, LoRAConfig, UserError, inject_lora
from cola_lightning.chain.base import BaseIdentity, check_same_base, describe_base
from cola_lightning.chain.chain import VERSION
from tests.helpers.make_fixture import FIXTURES, Fixed, Trained, inputs
from tests.helpers.toy import Toy, assert_same_chain, batches, toy, trainer


def make_link(index, rank, names=("a.b", "c"), **facts):
    factors = {name: (torch.randn(rank, 4), torch.randn(3, rank)) for name in names}
    return Link(index, rank, 2.0 * rank, 10 * index, 10 * index + 10, factors, **facts)


@pytest.mark.parametrize("names", [("a.b", "c"), ("extras.0", "0.extras", "0")], ids=str)
def test_a_folder_gives_the_chain_back_to_the_bit(tmp_path, names):
    extras = {"lora_A.head": torch.randn(2, 2), "count": torch.tensor(3)}
    base = BaseIdentity("a model", "f" * 64, ["float32"], {"a.b": 1.5, "c": 2.0}, labels=["no", "yes"])
    links = [make_link(0, 3, names), make_link(1, 1, names, extras=extras, metrics={"val_loss": 0.1})]
    for length in (2, 0):
        chain = Chain(links[:length], base)
        chain.save(tmp_path / "a" / f"chain-{length}")
        assert_same_chain(Chain.load(tmp_path / "a" / f"chain-{length}"), chain)


def test_a_metric_that_is_nan_is_null_in_json_and_nan_again(tmp_path):
    Chain([make_link(0, 2, metrics={"val_loss": math.nan})], BaseIdentity("a model")).save(tmp_path)
    description = json.loads((tmp_path / "chain.json").read_text(), parse_constant=pytest.fail)
    assert description["links"][0]["metrics"] == {"val_loss": None}
    assert math.isnan(Chain.load(tmp_path).links[0].metrics["val_loss"])


# ---------------------------------------------------------------------- formats: what is in the fixtures is never written again


def expected_logits(name, links):
    return torch.tensor(json.loads((FIXTURES / f"{name}.logits.json").read_text())[links])


@pytest.mark.parametrize("links", range(4))
def test_a_chain_and_a_checkpoint_of_this_format_give_the_logits_that_they_gave(links):
    options = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "rank": 3, "alpha": 6, "seed": 0}
    module = Fixed(**options, init_chain=str(FIXTURES / f"chain-{VERSION}"), init_links=links)
    torch.testing.assert_close(module.model(inputs()), expected_logits(f"chain-{VERSION}", links), rtol=1e-5, atol=1e-6)
    assert [link.rank for link in module.chain.links] == [3, 1, 2][:links]
    loaded = Trained.load_from_checkpoint(FIXTURES / f"checkpoint-{VERSION}.ckpt", links=links)
    expected = expected_logits(f"checkpoint-{VERSION}", links)
    torch.testing.assert_close(loaded.merged_model()(inputs()), expected, rtol=1e-5, atol=1e-6)


def test_a_later_version_is_refused(tmp_path):
    Chain([make_link(0, 2)], BaseIdentity("a")).save(tmp_path)
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": VERSION + 1}))
    with pytest.raises(UserError, match=rf"^chain: .* has {VERSION + 1}"):
        Chain.load(tmp_path)


# ---------------------------------------------------------------------- its base, of which all that is frozen is looked at


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
    Other, checkpoint = type("Other", (Frozen,), {"changed": changed}), trained / "run.ckpt"
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
    module = toy(type("Other", (Frozen,), {"changed": "4.weight"}), **ARGUMENTS, init_chain=str(trained / "chain"))
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
