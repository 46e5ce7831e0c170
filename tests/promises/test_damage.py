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

from cola_lightning import UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli.export import export
from tests.helpers.toy import ValidatedToy, assert_same_chain, batches, toy, trainer

CHAIN = {"every_n_train_steps": 2}


class Predicting(ValidatedToy):
    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])


def assert_usable(chain, theirs):
    """Each value is of its type; it may be another than that of the undamaged chain."""
    for link in chain.links:
        values = link.index, link.rank, link.alpha, link.start_step, link.end_step, *link.metrics.values()
        assert [type(value) for value in values] == [int, int, float, int, int] + [float] * len(link.metrics)
        link.norm()
    assert all(isinstance(text, str) for text in (chain.base.name, chain.base.fingerprint, *chain.base.dtypes))
    assert all(type(norm) is float for norm in chain.base.weight_norms.values())
    assert all(isinstance(value, str | None) for value in chain.base.values.values())


# ---------------------------------------------------------------------- what is stored


ARGUMENTS = {"target_modules": ["0"], "modules_to_save": ["2"]}


def make(**arguments):
    return toy(Predicting, **ARGUMENTS | arguments)


def write_checkpoint(folder):
    run = trainer(folder, chain=CHAIN, max_epochs=1)
    run.fit(make(), batches(), batches(2))
    run.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


def write_chain(folder):
    read_chain(write_checkpoint(folder)).save(folder / "chain")
    return folder / "chain"


def write_adapter(folder):
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["0", "2"], rank_pattern={"2": 5}, alpha_pattern={"^0": 9})
    get_peft_model(toy().merged_model(0), config).save_pretrained(folder / "peft")
    return folder / "peft"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Gives the path of what a function writes, once."""
    return functools.cache(lambda write: write(tmp_path_factory.mktemp("stored")))


def copied(path, folder):
    (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    return folder / path.name


# ---------------------------------------------------------------------- damage


def damages(whole, n):
    """A file's bytes n times with 1 to 6 of them changed, or with the end cut off."""
    rng = random.Random(0)
    for _ in range(n):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 6) if len(data) == len(whole) else 0):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        yield bytes(data)


WRONG = [None, "8", "x", -1, 0.5, float("nan"), float("inf"), [], [1], [None], {}, {"a": 1}, {"a": "1"}, {"a": None}, True]


def wrong_fields(whole):
    """A JSON document with each field, at every depth, missing or of another type: at each a third of all that it could be."""

    def places(value, place=()):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in items:
            yield (*place, key)
            yield from places(part, (*place, key))

    for k, (*parents, last) in enumerate(places(json.loads(whole))):
        for value in [..., *WRONG][k % 3 :: 3]:
            document = json.loads(whole)
            part = functools.reduce(operator.getitem, parents, document)
            if value is ...:
                del part[last]
            else:
                part[last] = value
            yield json.dumps(document).encode()


@pytest.mark.parametrize(
    ("write", "name", "kind", "check", "fewest_refused"),
    [
        (write_checkpoint, "", 150, assert_same_chain, 110),
        (write_chain, "chain.json", 150, assert_same_chain, 110),
        (write_chain, "chain.safetensors", 150, assert_same_chain, 110),
        (write_chain, "chain.json", wrong_fields, assert_usable, 100),
        # Nothing of PEFT's tells another number from the right one; what is read is one that can be used.
        (write_adapter, "adapter_config.json", 80, assert_usable, 1),
        (write_adapter, "adapter_model.safetensors", 80, assert_usable, 1),
        (write_adapter, "adapter_config.json", wrong_fields, assert_usable, 33),
    ],
)
def test_what_is_damaged_is_refused_in_one_line_or_unharmed(stored, tmp_path, write, name, kind, check, fewest_refused):
    path, whole = copied(stored(write), tmp_path), read_chain(stored(write))
    file, n_refused = path / name if name else path, 0
    data = file.read_bytes()
    for damaged in wrong_fields(data) if kind is wrong_fields else damages(data, kind):
        file.write_bytes(damaged)
        try:
            chain = read_chain(path)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
            n_refused += 1
        else:
            check(chain, whole)
            assert kind is not wrong_fields or len(chain) == len(whole)
    assert n_refused >= fewest_refused


def spoil_a_factor(path):
    """Changes one bit of one value of the first link's A, which no parser can see."""
    data = bytearray(path.read_bytes())
    data[data.index(read_chain(path).links[0].factors["0"][0].numpy().tobytes()) + 2] ^= 64
    path.write_bytes(data)


def resumed(path):
    return trainer(Path(), chain=CHAIN, max_epochs=2).fit(make(), batches(), batches(2), ckpt_path=path)


def exported(path):
    return export([str(path), "--format", "chain", "--output", str(path.parent / "out"), "--overwrite"])


READERS = {
    "load_from_checkpoint": Predicting.load_from_checkpoint,
    "load_from_checkpoint, an open file": lambda path: Predicting.load_from_checkpoint(io.BytesIO(path.read_bytes())),
    "init_chain": lambda path: make(init_chain=str(path)).configure_model(),
    "export": exported,
    "fit": resumed,
    "fit, from an address": lambda path: resumed(f"file://{path}"),
    "predict": lambda path: trainer(Path(), chain=CHAIN).predict(make(), batches(2), ckpt_path=path),
}


@pytest.mark.parametrize("reader", READERS)
def test_wherever_a_checkpoint_is_read_a_changed_bit_is_seen(stored, tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    path = copied(stored(write_checkpoint), tmp_path)
    READERS[reader](path)
    spoil_a_factor(path)
    with pytest.raises(UserError, match=r"checkpoint.*damaged"):
        READERS[reader](path)


def test_a_file_of_another_kind_is_refused(stored, tmp_path):
    path, checkpoint = tmp_path / "foreign.ckpt", torch.load(stored(write_checkpoint), weights_only=True)
    torch.save({"state_dict": {"chain.metadata": 3}}, path)
    with pytest.raises(UserError, match=r"^checkpoint"):
        read_chain(path)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)  # torch's old format, without checksums
    for read in (read_chain, resumed):
        with pytest.raises(UserError, match=r"^checkpoint"):
            read(path)


SPOILED = {  # what a finished link's factors may be in a state dict that someone has changed
    "without A": lambda pair: (None, pair[1]),
    "without B": lambda pair: (pair[0], None),
    "without both": lambda pair: (None, None),
    "of another rank": lambda pair: (pair[0][:1], pair[1]),
    "of a smaller rank": lambda pair: (pair[0][:1], pair[1][:, :1]),
    "of one input": lambda pair: (pair[0][:, :1], pair[1]),  # which torch would broadcast
    "of one output": lambda pair: (pair[0], pair[1][:1]),
    "of another type": lambda pair: (pair[0].long(), pair[1]),
    "not finite": lambda pair: (pair[0], pair[1] * float("nan")),
}


@pytest.mark.parametrize("change", SPOILED)
def test_a_state_without_a_links_factors_or_with_others_is_refused(change):
    module = make(target_modules=["0", "2"], modules_to_save=[])
    module.tie_knot()
    state = module.state_dict()
    names = [f"chain.0.0.lora_{factor}" for factor in "AB"]
    for name, value in zip(names, SPOILED[change]([state.pop(name) for name in names]), strict=True):
        state |= {} if value is None else {name: value}
    with pytest.raises(UserError, match=r"'0'|link 0"):
        module.load_state_dict(state)
