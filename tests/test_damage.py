"""What is damaged is refused in one line, or does no harm: no damage gives another chain."""

import functools
import io
import json
import operator
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cola_lightning import Chain, Link, UserError
from cola_lightning.chain import BaseIdentity
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.cli.export import export
from tests.toy import ValidatedToy, batches, toy, trainer

CHAIN = {"every_n_train_steps": 2}


class Predicting(ValidatedToy):
    """The toy with all that a trainer can be asked for."""

    test_step = ValidatedToy.validation_step

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


def assert_same(mine, theirs):
    """Everything of a chain that is of use: its updates, to the bit, and what is recorded of them."""
    assert mine.base == theirs.base
    assert len(mine) == len(theirs)
    for one, other in zip(mine.links, theirs.links, strict=True):
        facts = ("index", "rank", "alpha", "start_step", "end_step", "metrics")
        assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
        assert one.is_same_update(other)
        assert one.extras.keys() == other.extras.keys()
        assert all(torch.equal(value, other.extras[name]) for name, value in one.extras.items())


def damages(path, n=400):
    """Writes a file n times with 1 to 6 of its bytes changed, or with its end cut off; and then as it was."""
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(n):
        if rng.random() < 0.2:
            path.write_bytes(whole[: rng.randrange(len(whole))])
        else:
            data = bytearray(whole)
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(len(data))] ^= rng.randint(1, 255)
            path.write_bytes(data)
        yield
    path.write_bytes(whole)


def n_refused(damaged, read, check):
    """Of how many damages a file is refused; those that it can be read with must do no harm."""
    n = 0
    for _ in damaged:
        try:
            chain = read()
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            n += 1
        else:
            check(chain)
    return n


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    run = trainer(folder, chain=CHAIN, max_epochs=1)
    run.fit(toy(Predicting), batches(), batches(2))
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def test_a_damaged_checkpoint_is_refused_or_unharmed(checkpoint, tmp_path):
    path, whole = tmp_path / "copy.ckpt", read_chain(checkpoint)
    shutil.copy(checkpoint, path)
    assert n_refused(damages(path), lambda: read_chain(path), lambda chain: assert_same(chain, whole)) >= 300


def spoil_a_factor(path):
    """Changes one bit of one value of the first link's A, which no parser can see."""
    data = path.read_bytes()
    value = read_chain(path).links[0].factors["0"][0].numpy().tobytes()
    place = data.index(value) + 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])


ARGUMENTS = {"target_modules": "all-linear", "rank": 2, "alpha": 4, "seed": 0}


def evaluated(name, chain):
    return lambda path: getattr(trainer(path.parent, chain=chain), name)(toy(Predicting), batches(2), ckpt_path=path)


def resumed(path):
    return trainer(Path(), chain=CHAIN, max_epochs=2).fit(toy(Predicting), batches(), batches(2), ckpt_path=path)


def opened(path):
    return io.BytesIO(path.read_bytes())


READERS = {
    "load_from_checkpoint": Predicting.load_from_checkpoint,
    "load_from_checkpoint, an open file": lambda path: Predicting.load_from_checkpoint(
        io.BytesIO(path.read_bytes()), **ARGUMENTS
    ),
    "load_from_checkpoint, an address": lambda path: Predicting.load_from_checkpoint(f"file://{path}", **ARGUMENTS),
    "init_chain": lambda path: toy(init_chain=str(path)).configure_model(),
    "export": lambda path: export(
        ["--checkpoint", str(path), "--format", "chain", "--output", str(path.parent / "out"), "--overwrite"]
    ),
    "fit": resumed,
    "fit, from an address": lambda path: resumed(f"file://{path}"),
}
READERS |= {f"{name}, {chain}": evaluated(name, chain) for name in ("validate", "test", "predict") for chain in (None, CHAIN)}


@pytest.mark.parametrize("reader", READERS)
def test_wherever_a_checkpoint_is_read_a_changed_bit_is_seen(checkpoint, tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "copy.ckpt"
    shutil.copy(checkpoint, path)
    READERS[reader](path)
    spoil_a_factor(path)
    with pytest.raises(UserError, match=r"expected a checkpoint file, received '.*damaged"):
        READERS[reader](path)


def test_a_checkpoints_name_may_begin_with_a_tilde(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "~nobody's.ckpt")
    assert len(read_chain("~nobody's.ckpt")) == len(read_chain(checkpoint))
    Predicting.load_from_checkpoint("~nobody's.ckpt")


def test_a_checkpoint_of_another_kind_is_refused(checkpoint, tmp_path):
    path = tmp_path / "foreign.ckpt"
    for state in (None, [], 3):
        torch.save({"cola": state}, path)
        with pytest.raises(UserError, match=r"expected .*foreign.ckpt"):
            read_chain(path)
    torch.save(torch.load(checkpoint, weights_only=True), path, _use_new_zipfile_serialization=False)  # torch's old format
    for read in (read_chain, READERS["fit"]):
        with pytest.raises(UserError, match=r"expected a checkpoint file, received '.*foreign.ckpt'.*not a zip file"):
            read(path)


def test_a_checkpoint_is_whole_whatever_torch_is_told_of_checksums(checkpoint, tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        run = trainer(tmp_path, chain=CHAIN, max_steps=2)
        run.fit(toy(), batches())
        run.save_checkpoint(tmp_path / "end.ckpt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(read_chain(tmp_path / "end.ckpt")) == 1


# ---------------------------------------------------------------------- chain folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chain") / "chain"
    generator = torch.Generator().manual_seed(0)
    links = [
        Link(
            index=k,
            rank=rank,
            alpha=4.0 + k,
            start_step=10 * k,
            end_step=10 * k + 10,
            factors={
                name: (torch.randn(rank, 4, generator=generator), torch.randn(3, rank, generator=generator)) for name in "ab"
            },
            extras={"head": torch.ones(2), "self.scale": torch.ones(1)},
            metrics={"val_loss": 0.5, "broken": float("inf")} if k else {},
        )
        for k, rank in enumerate((3, 1))
    ]
    values = {"a.weight": "0" * 16, "head": None}
    base = BaseIdentity("a model", "f" * 64, ["float32"], {"a": 1.5, "b": 2.0}, values)
    Chain(links, base).save(path)
    return path


WRONG = [None, "8", "x", -1, 0.5, float("nan"), float("inf"), [], [1], [None], {}, {"a": 1}, {"a": "1"}, {"a": None}, True]


def wrong_fields(path):
    """Writes a JSON document with each field, at every depth, missing or of another type; and then as it was."""

    def places(value, place=()):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in items:
            yield (*place, key)
            yield from places(part, (*place, key))

    whole = path.read_text()
    for *parents, last in list(places(json.loads(whole))):
        for value in [..., *WRONG]:
            description = json.loads(whole)
            part = functools.reduce(operator.getitem, parents, description)
            if value is ...:
                del part[last]
            else:
                part[last] = value
            path.write_text(json.dumps(description))
            yield
    path.write_text(whole)


def test_a_damaged_chain_folder_is_refused_or_unharmed(folder, tmp_path):
    copy, whole = tmp_path / "chain", Chain.load(folder)
    shutil.copytree(folder, copy)
    for name in ("chain.json", "chain.safetensors"):
        refused = n_refused(damages(copy / name), lambda: Chain.load(copy), lambda chain: assert_same(chain, whole))
        assert refused >= 300
    assert n_refused(wrong_fields(copy / "chain.json"), lambda: Chain.load(copy), check_types) >= 300


def check_types(chain):
    for link in chain.links:
        assert [type(value) for value in (link.index, link.rank, link.alpha, link.start_step, link.end_step)] == [
            int, int, float, int, int,
        ]  # fmt: skip
        assert all(type(value) is float for value in link.metrics.values())
        link.norm()
    assert isinstance(chain.base.name, str)
    assert isinstance(chain.base.fingerprint, str)
    assert all(isinstance(name, str) for name in chain.base.dtypes)
    assert all(type(norm) is float for norm in chain.base.weight_norms.values())
    assert all(isinstance(value, str | None) for value in chain.base.values.values())


# ---------------------------------------------------------------------- adapters


@pytest.fixture(scope="module", params=["of peft", "of a chain"])
def adapter(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    if request.param == "of peft":
        config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], rank_pattern={"2": 5}, alpha_pattern={"^0": 9})
        get_peft_model(toy().merged_model(0), config).save_pretrained(path / "peft")
    else:
        run = trainer(path, chain=CHAIN, max_epochs=1)
        run.fit(toy(), batches())
        run.save_checkpoint(path / "end.ckpt")
        words = ["--checkpoint", str(path / "end.ckpt"), "--format", "peft", "--output", str(path / "peft")]
        assert main(["export", *words]) == 0
    return path / "peft"


def test_a_damaged_adapter_is_refused_or_read(adapter, tmp_path):
    """Nothing of PEFT's tells another number from the right one; what is read is one that can be used."""
    copy, whole = tmp_path / "peft", read_chain(adapter)
    shutil.copytree(adapter, copy)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        n_refused(damages(copy / name, 200), lambda: read_chain(copy), check_types)

    def check(chain):
        check_types(chain)
        assert len(chain) == len(whole)

    assert n_refused(wrong_fields(copy / "adapter_config.json"), lambda: read_chain(copy), check) >= 100
