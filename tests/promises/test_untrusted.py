"""What reading the files of another person can do, by the sentences of docs/guarantees.md.

(That a configuration calls what it names is what each command of the other tests relies on.)
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from cola_lightning import COLACausalLM, COLAModule, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli.entry import main
from tests.helpers import tiny
from tests.helpers.toy import Toy, batches, saved, toy, trainer

REFUSED = (UserError, pickle.UnpicklingError)

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(tmp_path):
    """The file that code leaves behind where it runs."""
    return tmp_path / "ran"


def rewritten(path, *, class_path=None, hyper_parameters=None, **init_args):
    """The checkpoint with another class and other arguments, as its author may write them."""
    checkpoint = torch.load(path, weights_only=True)
    metadata = json.loads(bytes(checkpoint["state_dict"]["chain.metadata"].tolist()))
    module = metadata["facts"]["module"]
    assert "trust_remote_code" not in module["init_args"]
    module["init_args"] |= init_args
    module["class_path"] = class_path or module["class_path"]
    checkpoint["state_dict"]["chain.metadata"] = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)
    checkpoint["hyper_parameters"] = checkpoint.get("hyper_parameters", {}) | (hyper_parameters or init_args)
    torch.save(checkpoint, path)
    return path


# ---------------------------------------------------------------------- a model's own code


class SavingLM(COLACausalLM):
    """Its arguments are Lightning's hyperparameters, too."""

    def __init__(self, model_name, **arguments):
        super().__init__(model_name, **arguments)
        self.save_hyperparameters()


def test_a_checkpoint_cannot_say_that_a_models_code_is_to_be_trusted(tmp_path, mark, monkeypatch, capsys):
    # transformers copies a model's files there before it imports them, as a module named after their folder.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    base = Path(tiny.folder(tmp_path / f"base_{tmp_path.name}"))
    path = saved(COLACausalLM(str(base), target_modules=["q_proj"], trust_remote_code=True), tmp_path)
    (base / "own.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config = json.loads((base / "config.json").read_text()) | {"model_type": "own", "architectures": ["Own"]}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    rewritten(path, trust_remote_code=True)
    generate = ["generate", str(path), "--prompt", "The cat", "--max_new_tokens", "2"]
    export = ["export", str(path), "--format", "merged", "--output", str(tmp_path / "out")]
    for words in (generate, export):
        assert main(words) == 2
        assert "trust_remote_code=True" in capsys.readouterr().err.splitlines()[-1]
    for cls in (COLAModule, COLACausalLM, SavingLM):
        with pytest.raises(UserError, match="trust_remote_code=True"):
            cls.load_from_checkpoint(path)
    assert not mark.exists()
    for words in (generate, export):
        assert main([*words, "--trust_remote_code", "true"]) == 0
    assert mark.exists()
    assert COLAModule.load_from_checkpoint(path, trust_remote_code=True).pretrained.trust_remote_code


# ---------------------------------------------------------------------- objects


class Executing:
    """What a pickle runs when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_objects_in_a_checkpoint_are_not_made(tmp_path, mark):
    path = saved(toy(), tmp_path)
    honest = path.rename(tmp_path / "honest.ckpt")
    torch.save(torch.load(honest, weights_only=True) | {"x": Executing(mark)}, path)
    with path.open("rb") as file:
        for source in (path, f"file://{path}", file):
            with pytest.raises(REFUSED):
                Toy.load_from_checkpoint(source)
    for source in (path, f"file://{path}"):
        with pytest.raises(REFUSED):
            trainer(tmp_path, max_epochs=1).fit(toy(), batches(), ckpt_path=source)
    with pytest.raises(UserError):
        read_chain(path)
    assert Toy.load_from_checkpoint(f"file://{honest}").n_finished == 0
    assert not mark.exists()
    Toy.load_from_checkpoint(path, weights_only=False)  # which says that the file is trusted
    assert mark.exists()


def test_a_chain_folder_and_an_adapter_hold_no_code(tmp_path, mark):
    path = saved(COLACausalLM(tiny.folder(tmp_path / "base"), target_modules=["q_proj"]), tmp_path)
    for format_, name in (("chain", "chain.safetensors"), ("peft", "adapter_model.safetensors")):
        folder = tmp_path / format_
        assert main(["export", str(path), "--format", format_, "--output", str(folder)]) == 0
        assert len(read_chain(folder)) == 1
        (folder / name).unlink()
        for pickled in (name, "adapter_model.bin"):
            torch.save({"x": Executing(mark)}, folder / pickled)
            with pytest.raises(UserError):
                read_chain(folder)
    assert not mark.exists()


# ---------------------------------------------------------------------- names of code

called = []


def call(*args, **kwargs):
    called.append(args)


class Stranger:
    """A class that is not a module of this package."""

    def __init__(self, *args, **kwargs):
        called.append(args)


@pytest.mark.parametrize("name", ["call", "Stranger"])
def test_only_a_cola_module_is_made(tmp_path, name):
    hyper_parameters = {"_instantiator": f"{__name__}.call", "_class_path": f"{__name__}.{name}"}
    path = rewritten(saved(toy(), tmp_path), class_path=f"{__name__}.{name}", hyper_parameters=hyper_parameters)
    assert type(Toy.load_from_checkpoint(path, rank=2, alpha=4)) is Toy
    with pytest.raises(UserError):
        COLAModule.load_from_checkpoint(path)
    assert main(["export", str(path), "--format", "merged", "--output", str(tmp_path / "out")]) == 2
    assert main(["generate", str(path), "--prompt", "x"]) == 2
    assert called == []


def test_what_a_checkpoint_names_is_imported_and_its_model_read_by_transformers(tmp_path, mark, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_by_name.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")
    path = saved(COLACausalLM(tiny.folder(tmp_path / "one"), target_modules=["q_proj"]), tmp_path)
    with pytest.raises(UserError, match=r"^model\.model_name"):
        COLACausalLM.load_from_checkpoint(rewritten(path, model_name="no/where/at/all"))
    assert not mark.exists()
    with pytest.raises(TypeError, match="model_name"):  # which a COLAModule does not take
        COLAModule.load_from_checkpoint(rewritten(path, class_path="imported_by_name.Own"))
    assert mark.exists()


class Saving(Toy):
    """Its arguments are Lightning's hyperparameters, too."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.save_hyperparameters()


def test_no_stored_argument_names_code(tmp_path):
    stored = {"optimizer": {"class_path": f"{__name__}.Stranger"}, "attn_implementation": "owner/kernel"}
    path = rewritten(saved(toy(Saving), tmp_path), **stored, init_chain=str(tmp_path / "elsewhere"), compile=True)
    module = Saving.load_from_checkpoint(path)
    assert (module.run.start.sources, module.should_compile) == (None, False)
    trainer(tmp_path, max_epochs=1).fit(module, batches())
    assert called == []
