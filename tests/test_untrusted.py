"""What reading the files of another person can do: each sentence of docs/guarantees.md about them is a test here."""

import contextlib
import functools
import http.server
import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from cola_lightning import COLACausalLM, COLAModule, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli.entry import main
from tests import tiny
from tests.toy import ValidatedToy as Toy
from tests.toy import batches, toy, trainer

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class Own(LlamaForCausalLM):
    config_class = OwnConfig
"""


def changed_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """transformers copies a model's files there before it imports them."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")


@pytest.fixture
def mark(tmp_path):
    """The file that code leaves behind where it runs."""
    return tmp_path / "ran"


@pytest.fixture
def base(tmp_path):
    """A model without code; the folder's name is in that of the module that code in it would be, once for each test."""
    return Path(tiny.folder(tmp_path / f"base_{tmp_path.name}"))


def with_code(folder, mark):
    """The model, with a configuration that names a Python file of its own, and so must be loaded by that."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    changed_json(
        folder / "config.json",
        model_type="own",
        architectures=["Own"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    )
    return str(folder)


def fitted(tmp_path, module):
    run = trainer(tmp_path, max_steps=0, limit_val_batches=0)
    run.fit(module, batches(), batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def changed(path, **init_args):
    """The checkpoint with other stored arguments, as its author may write them."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["cola"]["module"]["init_args"] |= init_args
    checkpoint["hyper_parameters"] = checkpoint.get("hyper_parameters", {}) | init_args
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def checkpoint(tmp_path, base, mark):
    """One that names a model with code, and says that its code is to be trusted."""
    path = fitted(tmp_path, COLACausalLM(str(base), target_modules=["q_proj"], trust_remote_code=True))
    assert "trust_remote_code" not in torch.load(path, weights_only=True)["state_dict"]["cola"]["module"]["init_args"]
    with_code(base, mark)
    return changed(path, trust_remote_code=True)


@pytest.mark.parametrize("way", ["merged", "peft", "generate"])
def test_a_checkpoint_cannot_say_that_a_models_code_is_to_be_trusted(checkpoint, tmp_path, mark, way, capsys):
    words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "The cat", "--max_new_tokens", "2"]
    if way != "generate":
        words = ["export", "--checkpoint", str(checkpoint), "--format", way, "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert not mark.exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "`trust_remote_code=True`" in last
    assert main([*words, "--trust_remote_code", "true"]) == 0
    assert mark.exists()


def test_nor_can_one_that_is_loaded_in_python_by_lightnings_hyperparameters_either(checkpoint, mark):
    class SavingLM(COLACausalLM):
        def __init__(self, model_name, **arguments):
            super().__init__(model_name, **arguments)
            self.save_hyperparameters()

    for cls in (COLAModule, COLACausalLM, SavingLM):
        with pytest.raises(UserError, match="`trust_remote_code=True`"):
            cls.load_from_checkpoint(checkpoint)
    assert not mark.exists()
    assert COLAModule.load_from_checkpoint(checkpoint, trust_remote_code=True).pretrained.trust_remote_code
    assert mark.exists()


class Executing:
    """What a pickle runs when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_objects_in_a_checkpoint_are_not_made(tmp_path, mark, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = fitted(tmp_path, toy(Toy))
    honest = path.rename(tmp_path / "honest.ckpt")
    torch.save(torch.load(honest, weights_only=True) | {"x": Executing(mark)}, path)
    with pytest.raises(UserError, match="cannot be read"):
        read_chain(path)
    with served(tmp_path) as address:
        for source in (path, f"file://{path}", f"{address}/run.ckpt"):
            with pytest.raises((UserError, pickle.UnpicklingError)):
                Toy.load_from_checkpoint(source)
            with pytest.raises((UserError, pickle.UnpicklingError)):
                trainer(tmp_path, max_epochs=1).fit(toy(Toy), batches(), batches(), ckpt_path=source)
        assert not mark.exists()
        assert Toy.load_from_checkpoint(f"{address}/honest.ckpt").link == 0
    with path.open("rb") as file, pytest.raises((UserError, pickle.UnpicklingError)):
        Toy.load_from_checkpoint(file)
    assert not mark.exists()
    with contextlib.suppress(TypeError):
        Toy.load_from_checkpoint(path, weights_only=False)  # which says that the file is trusted
    assert mark.exists()


called = []


def call(*args, **kwargs):
    called.append(args)


class Stranger:
    """A class that is not a module of this package."""

    def __init__(self, *args, **kwargs):
        called.append(args)


@pytest.mark.parametrize("name", ["call", "Stranger"])
def test_only_a_cola_module_is_made(tmp_path, name):
    path = fitted(tmp_path, toy(Toy))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["cola"]["module"]["class_path"] = f"{__name__}.{name}"
    checkpoint["hyper_parameters"] = {"_instantiator": f"{__name__}.call", "_class_path": f"{__name__}.{name}"}
    torch.save(checkpoint, path)
    assert type(Toy.load_from_checkpoint(path, rank=2, alpha=4)) is Toy
    with pytest.raises(UserError):
        COLAModule.load_from_checkpoint(path)
    assert main(["export", "--checkpoint", str(path), "--format", "merged", "--output", str(tmp_path / "out")]) == 2
    assert main(["generate", "--checkpoint", str(path), "--prompt", "x"]) == 2
    assert called == []


def test_its_class_is_imported(tmp_path, mark, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_by_name.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")
    path = fitted(tmp_path, toy(Toy))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["cola"]["module"]["class_path"] = "imported_by_name.Own"
    torch.save(checkpoint, path)
    with pytest.raises(UserError):
        COLAModule.load_from_checkpoint(path)
    assert mark.exists()


class Saving(Toy):
    """Its arguments are Lightning's hyperparameters, too."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.save_hyperparameters()


def test_no_stored_argument_names_code(tmp_path):
    path = changed(
        fitted(tmp_path, toy(Saving)),
        optimizer={"class_path": f"{__name__}.Stranger"},
        init_chain=str(tmp_path / "elsewhere"),
        attn_implementation="owner/kernel",
        compile=True,
    )
    module = Saving.load_from_checkpoint(path)
    assert (module.init_chain, module.should_compile) == (None, False)
    trainer(tmp_path, max_epochs=1).fit(module, batches(), batches())
    assert called == []


def test_what_a_checkpoint_names_is_read_by_transformers(tmp_path):
    """A folder, or a repository of the hub: a checkpoint can have it read, without its Python files."""
    path = changed(
        fitted(tmp_path, COLACausalLM(tiny.folder(tmp_path / "one"), target_modules=["q_proj"])), model_name="no/where/at/all"
    )
    with pytest.raises(UserError, match=r"model\.model_name: expected a model that AutoModelForCausalLM can load, received"):
        COLACausalLM.load_from_checkpoint(path)


class Marking(Callback):
    """What a configuration names is called."""

    def __init__(self, mark):
        Path(mark).touch()


def test_a_configuration_is_a_program(tmp_path, mark, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cola"])
    callbacks = [{"class_path": f"{__name__}.Marking", "init_args": {"mark": str(mark)}}]
    parts = {"model": {"class_path": f"{__name__}.Toy"}, "trainer": {"callbacks": callbacks, "accelerator": "no such"}}
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(parts | {"data": {"class_path": "benchmarks.digits_model.DigitsDataModule"}, "seed_everything": 0})
    )
    assert main(["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path)]) == 2
    assert mark.exists()


def test_a_chain_folder_and_an_adapter_hold_no_code(tmp_path, mark):
    path = fitted(tmp_path, COLACausalLM(tiny.folder(tmp_path / "base"), target_modules=["q_proj"]))
    for format_, name in (("chain", "chain.safetensors"), ("peft", "adapter_model.safetensors")):
        folder = tmp_path / format_
        assert main(["export", "--checkpoint", str(path), "--format", format_, "--output", str(folder)]) == 0
        assert len(read_chain(folder)) == 1
        (folder / name).unlink()
        for pickled in (name, "adapter_model.bin"):
            torch.save({"x": Executing(mark)}, folder / pickled)
            with pytest.raises(UserError):
                read_chain(folder)
    assert not mark.exists()
