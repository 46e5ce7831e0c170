"""A chain as a folder: what is in it, and that later releases keep reading it."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from cola_lightning import Chain, Link, UserError
from cola_lightning.chain import BaseIdentity
from cola_lightning.chain.store import check_version
from tests.make_fixture import FIXTURES, Fixed, Trained, inputs
from tests.toy import toy


def make_link(index, rank, **facts):
    factors = {name: (torch.randn(rank, 4), torch.randn(3, rank)) for name in ("a.b", "c")}
    return Link(index, rank, 2.0 * rank, 10 * index, 10 * index + 10, factors, **facts)


def test_a_folder_gives_the_chain_back_to_the_bit(tmp_path):
    extras = {"head.weight": torch.randn(2, 2), "count": torch.tensor(3)}
    base = BaseIdentity("a model", "f" * 64, ["float32"], {"a.b": 1.5, "c": 2.0}, labels=["no", "yes"])
    chain = Chain([make_link(0, 3), make_link(1, 1, extras=extras, metrics={"val_loss": 0.1, "broken": math.nan})], base)
    chain.save(tmp_path / "a" / "chain")
    again = Chain.load(tmp_path / "a" / "chain")
    assert again.base == base
    assert again.is_beginning_of(chain) and len(again) == 2  # noqa: PT018
    for mine, theirs in zip(chain.links, again.links, strict=True):
        facts = ("index", "rank", "alpha", "start_step", "end_step")
        assert [getattr(mine, name) for name in facts] == [getattr(theirs, name) for name in facts]
    assert again.links[1].extras.keys() == extras.keys()
    assert all(torch.equal(again.links[1].extras[name], value) for name, value in extras.items())
    assert again.links[1].metrics["val_loss"] == 0.1
    assert math.isnan(again.links[1].metrics["broken"])


def test_the_two_files_can_be_read_without_this_package(tmp_path):
    Chain([make_link(0, 2, extras={"head": torch.ones(1)})], BaseIdentity("a model")).save(tmp_path / "chain")
    assert sorted(path.name for path in (tmp_path / "chain").iterdir()) == ["chain.json", "chain.safetensors"]
    with safe_open(tmp_path / "chain" / "chain.safetensors", "pt") as file:
        names = sorted(file.keys())
    assert names == ["links.0.a.b.lora_A", "links.0.a.b.lora_B", "links.0.c.lora_A", "links.0.c.lora_B", "links.0.extras.head"]
    description = json.loads((tmp_path / "chain" / "chain.json").read_text(), parse_constant=pytest.fail)
    assert description["format_version"] == 4
    assert description["targets"] == ["a.b", "c"]
    link = {"index": 0, "rank": 2, "alpha": 4.0, "start_step": 0, "end_step": 10, "layers": 2, "metrics": {}}
    assert description["links"] == [link]


def test_layers_may_have_any_name(tmp_path):
    factors = {name: (torch.randn(2, 4), torch.randn(3, 2)) for name in ("extras.0", "links.0.extras", "0")}
    chain = Chain([Link(0, 2, 2.0, 0, 1, factors, {"lora_A.head": torch.ones(1)})])
    chain.save(tmp_path / "chain")
    again = Chain.load(tmp_path / "chain")
    assert again.is_beginning_of(chain)
    assert list(again.links[0].extras) == ["lora_A.head"]


def test_a_chain_is_shown_in_a_line_a_link():
    chain = Chain([make_link(0, 2), make_link(1, 3)], BaseIdentity("a model"))
    lines = repr(chain).splitlines()
    assert lines[0] == "Chain of 2 links on a model"
    assert [line.split(":")[0] for line in lines[1:]] == ["  Link 0", "  Link 1"]
    assert max(map(len, lines)) < 120


def test_an_empty_chain_is_a_folder_too(tmp_path):
    Chain([], BaseIdentity("a model")).save(tmp_path / "chain")
    assert len(Chain.load(tmp_path / "chain")) == 0


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("links", range(4))
def test_a_chain_of_any_format_gives_the_logits_that_it_gave(links, version):
    """The folder is that of the release that began this format; it is never written again."""
    expected = json.loads((FIXTURES / f"chain-{version}.logits.json").read_text())[links]
    how = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "rank": 3, "alpha": 6, "seed": 0}
    module = Fixed(**how, init_chain=str(FIXTURES / f"chain-{version}"), init_links=links)
    module.configure_model()
    torch.testing.assert_close(module.model(inputs()), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert [link.rank for link in module.chain.links] == [3, 1, 2][:links]


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("links", range(4))
def test_a_checkpoint_of_any_format_gives_the_logits_that_it_gave(links, version):
    expected = json.loads((FIXTURES / f"checkpoint-{version}.logits.json").read_text())[links]
    module = Trained.load_from_checkpoint(FIXTURES / f"checkpoint-{version}.ckpt", links=links)
    torch.testing.assert_close(module.merged_model()(inputs()), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_chain_of_another_base_is_refused_by_name():
    class Other(Fixed):
        base_name = "another"

        def build_model(self):
            model = super().build_model()
            torch.nn.init.ones_(model[0].weight)
            return model

    module = Other(target_modules=["0", "2"], modules_to_save=["4"], rank=3, seed=0, init_chain=str(FIXTURES / "chain-2"))
    with pytest.raises(UserError, match=r"trained, 'fixture' \(fingerprint .* received another, 'another' \("):
        module.configure_model()


def test_an_older_version_is_told_from_a_newer_one():
    for version, needed in ((1, "an older"), (5, "a newer")):
        with pytest.raises(UserError, match=f"received {version} in here: {needed} release is needed$"):
            check_version(version, "here")


@pytest.mark.parametrize("change", [lambda j: j["links"][0].update(alpha=5.0), lambda j: j["base"].update(name="b")])
def test_another_number_or_name_in_the_json_is_seen(tmp_path, change):
    Chain([make_link(0, 2)], BaseIdentity("a")).save(tmp_path / "chain")
    path = tmp_path / "chain" / "chain.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"expected a whole chain .* received a damaged one .*checksum"):
        Chain.load(tmp_path / "chain")


def test_a_chain_whose_base_is_not_known_begins_a_run(tmp_path):
    factors = {name: (torch.ones(1, n_in), torch.ones(n_out, 1)) for name, n_in, n_out in (("0", 8, 12), ("2", 12, 6))}
    Chain([Link(0, 1, 1.0, 0, 1, factors)], BaseIdentity("a model")).save(tmp_path / "chain")
    module = toy(init_chain=str(tmp_path / "chain"))
    module.configure_model()
    assert module.link == 1
