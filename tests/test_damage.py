"""What is damaged is refused in one line, or does no harm: no damage gives another chain."""

import io
import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cola_lightning import Chain, Link, UserError
from cola_lightning.chain import BaseIdentity
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from tests.toy import ValidatedToy, batches, toy, trainer

CHAIN = {"every_n_train_steps": 2}


class Predicting(ValidatedToy):
    """The toy with all that a trainer can be asked for."""

    test_step = ValidatedToy.validation_step

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


def assert_same(mine, theirs):
    """Everything of a chain that is of use: its updates, to the bit, and what is told of them."""
    assert mine.base == theirs.base
    assert len(mine) == len(theirs)
    for one, other in zip(mine.links, theirs.links, strict=True):
        facts = ("index", "rank", "alpha", "start_step", "end_step", "metrics")
        assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
        assert one.is_same_update(other)
        assert one.extras.keys() == other.extras.keys()
        assert all(torch.equal(value, other.extras[name]) for name, value in one.extras.items())


def damaged(data, rng):
    """The bytes with 1 to 6 of them changed, or with their end cut off."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] ^= rng.randint(1, 255)
    return bytes(data)


def outcomes(whole, damages, read):
    """How many of the damages were refused, and how many did no harm; any other one fails."""
    counts = {"refused": 0, "unharmed": 0}
    for spoil in damages:
        spoil()
        try:
            chain = read()
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            counts["refused"] += 1
        else:
            assert_same(chain, whole)
            counts["unharmed"] += 1
    return counts


# ---------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted")
    run = trainer(folder, chain=CHAIN, max_epochs=1)
    run.fit(toy(Predicting), batches(), batches(2))
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def test_a_damaged_checkpoint_is_refused_or_unharmed(checkpoint, tmp_path):
    data, rng, path = checkpoint.read_bytes(), random.Random(0), tmp_path / "damaged.ckpt"
    damages = [lambda: path.write_bytes(damaged(data, rng)) for _ in range(400)]
    counts = outcomes(read_chain(checkpoint), damages, lambda: read_chain(path))
    assert counts["refused"] >= 300


def spoil_a_factor(path):
    """Changes one bit of one value of the first link's A, which no parser can see."""
    data = path.read_bytes()
    value = read_chain(path).links[0].factors["0"][0].numpy().tobytes()
    place = data.index(value) + 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])


READERS = {
    "load_from_checkpoint": lambda path: Predicting.load_from_checkpoint(path),
    "load_from_checkpoint, an open file": lambda path: Predicting.load_from_checkpoint(
        io.BytesIO(path.read_bytes()), target_modules="all-linear", rank=2, alpha=4, seed=0
    ),
    "load_from_checkpoint, an address": lambda path: Predicting.load_from_checkpoint(
        f"file://{path}", target_modules="all-linear", rank=2, alpha=4, seed=0
    ),
    "init_chain": lambda path: toy(init_chain=str(path)).configure_model(),
}
for chain in (None, CHAIN):
    suffix = ", with knots" if chain else ""
    for name in ("validate", "test", "predict"):
        READERS[name + suffix] = lambda path, name=name, chain=chain: getattr(trainer(path.parent, chain=chain), name)(
            toy(Predicting), batches(2), ckpt_path=path
        )
READERS["fit, with knots"] = lambda path: trainer(path.parent, chain=CHAIN, max_epochs=2).fit(
    toy(Predicting), batches(), batches(2), ckpt_path=path
)
READERS["fit, from an address"] = lambda path: trainer(path.parent, chain=CHAIN, max_epochs=2).fit(
    toy(Predicting), batches(), batches(2), ckpt_path=f"file://{path}"
)


@pytest.mark.parametrize("reader", READERS)
def test_wherever_a_checkpoint_is_read_a_changed_bit_is_seen(checkpoint, tmp_path, reader):
    path = tmp_path / "copy.ckpt"
    shutil.copy(checkpoint, path)
    READERS[reader](path)
    spoil_a_factor(path)
    with pytest.raises(UserError, match=r"expected a checkpoint file, received '.*damaged") as error:
        READERS[reader](path)
    assert "\n" not in str(error.value)


def test_a_checkpoints_name_may_begin_with_a_tilde(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "~nobody's.ckpt")
    assert len(read_chain("~nobody's.ckpt")) == len(read_chain(checkpoint))
    Predicting.load_from_checkpoint("~nobody's.ckpt")


@pytest.mark.parametrize("format_", ["chain", "merged"])
def test_no_damaged_checkpoint_is_exported(checkpoint, tmp_path, capsys, format_):
    path = tmp_path / "copy.ckpt"
    shutil.copy(checkpoint, path)
    spoil_a_factor(path)
    assert main(["export", "--checkpoint", str(path), "--format", format_, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint: expected a checkpoint file, received ")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_in_torchs_old_format_is_refused(checkpoint, tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save(torch.load(checkpoint, weights_only=True), path, _use_new_zipfile_serialization=False)
    for read in (read_chain, READERS["test"]):
        with pytest.raises(UserError, match=r"expected a checkpoint file, received '.*old.ckpt'.*not a zip file"):
            read(path)


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path, state):
    torch.save({"cola": state}, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"expected .*foreign.ckpt"):
        read_chain(tmp_path / "foreign.ckpt")


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


def places(value, path=()):
    """Where the fields of a JSON document are, at every depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(description, place, value=...):
    """A copy of a document with another value in a place, or without it."""
    copy = json.loads(json.dumps(description))
    *parents, last = place
    part = copy
    for key in parents:
        part = part[key]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return copy


@pytest.mark.parametrize("name", ["chain.json", "chain.safetensors"])
def test_a_damaged_chain_folder_is_refused_or_unharmed(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "chain")
    data, rng, path = (folder / name).read_bytes(), random.Random(0), tmp_path / "chain" / name
    damages = [lambda: path.write_bytes(damaged(data, rng)) for _ in range(400)]
    whole = Chain.load(folder)
    read = lambda: Chain.load(tmp_path / "chain")  # noqa: E731
    assert outcomes_of_folder(whole, damages, read)["refused"] >= 300


def outcomes_of_folder(whole, damages, read):
    """As :func:`outcomes`; a metric that is not finite is not equal to itself."""
    for link in whole.links:
        for name in [name for name, value in link.metrics.items() if value != value]:
            link.metrics[name] = "nan"

    def read_and_replace():
        chain = read()
        for link in chain.links:
            for name in [name for name, value in link.metrics.items() if value != value]:
                link.metrics[name] = "nan"
        return chain

    return outcomes(whole, damages, read_and_replace)


def test_a_field_of_another_type_is_refused_or_unharmed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "chain")
    path, description = tmp_path / "chain" / "chain.json", json.loads((folder / "chain.json").read_text())
    n_refused = 0
    for place in places(description):
        for value in [..., *WRONG]:
            path.write_text(json.dumps(changed(description, place, value)))
            try:
                chain = Chain.load(tmp_path / "chain")
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
                n_refused += 1
            else:
                check_types(chain)
    assert n_refused >= 300


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
    shutil.copytree(adapter, tmp_path / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        data, rng, path = (adapter / name).read_bytes(), random.Random(0), tmp_path / "peft" / name
        for _ in range(200):
            path.write_bytes(damaged(data, rng))
            try:
                check_types(read_chain(tmp_path / "peft"))
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
        path.write_bytes(data)


def test_an_adapters_field_of_another_type_is_refused_or_without_a_meaning(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "peft")
    whole, path = read_chain(adapter), tmp_path / "peft" / "adapter_config.json"
    config, n_refused = json.loads((adapter / "adapter_config.json").read_text()), 0
    for place in places(config):
        for value in [..., *WRONG]:
            path.write_text(json.dumps(changed(config, place, value)))
            try:
                chain = read_chain(tmp_path / "peft")
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
                n_refused += 1
            else:
                check_types(chain)
                assert len(chain) == len(whole)
    assert n_refused >= 100
