"""Where models come from, and what is said of names and files that are not there."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cola_lightning import COLACausalLM, UserError
from cola_lightning.errors import HubError
from cola_lightning.pretrained import Pretrained
from tests.helpers import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("models") / "llama")


def test_a_folder_is_loaded_in_training_mode_and_in_the_dtype_asked_for(folder):
    pretrained = Pretrained(folder, dtype="bfloat16", attn_implementation="eager")
    model, _ = pretrained.model_and_new_weights(AutoModelForCausalLM)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_a_tokenizer_pads_with_a_token_that_the_model_knows_and_knows_the_models_longest_sequence(folder, tmp_path):
    tokenizer = COLACausalLM(folder).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 64
    own = shutil.copytree(folder, tmp_path / "own")
    tokenizer.add_tokens([f"[more {n}]" for n in range(400 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(own)
    module = COLACausalLM(str(own), target_modules=["q_proj"])
    assert module.tokenizer.pad_token_id >= 400
    module.configure_model()
    assert module.tokenizer.pad_token == "</s>"


def test_a_package_holds_a_model_or_one_gguf_file_and_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "packed_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError")
    (folder / "small.gguf").touch()
    reader = SimpleNamespace(from_pretrained=lambda place, gguf_file, **_: (place, gguf_file))
    assert Pretrained("package:packed_model").load(reader) == (str(folder), "small.gguf")
    (folder / "large.gguf").touch()
    with pytest.raises(UserError, match=r"^model\.gguf_file: 'package:packed_model' .* large\.gguf, small\.gguf$"):
        COLACausalLM("package:packed_model")
    tiny.folder(folder)
    COLACausalLM("package:packed_model", target_modules=["q_proj"]).configure_model()
    assert "packed_model" not in sys.modules


def test_what_is_not_a_model_is_named_in_one_line(folder, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{")
    silent = Path(tiny.folder(tmp_path / "silent", "opt"))
    for path in silent.glob("tokenizer*"):
        path.unlink()
    for name, words in [("no/such/folder", ""), (tmp_path, ""), (silent, "tokenizer")]:
        with pytest.raises(UserError, match=rf"^model\.model_name: .*{name}.*{words}.*$"):
            COLACausalLM(str(name)).configure_model()
    with pytest.raises(UserError, match=rf"^model\.model_name: .*{folder}.*nonsense.*$"):
        COLACausalLM(folder, attn_implementation="nonsense").configure_model()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the variable of this name does
    with pytest.raises(HubError, match=r"^model\.model_name: 'owner/mispelt' is neither .* and the Hugging Face hub cannot be"):
        COLACausalLM("owner/mispelt").configure_model()


def test_a_weight_that_the_files_lack_and_no_fit_trains_is_told(folder, tmp_path, caplog):
    path = shutil.copytree(folder, tmp_path / "own") / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    COLACausalLM(str(path.parent), target_modules=["q_proj"]).configure_model()
    (line,) = [line for line in caplog.messages if "random" in line]
    assert line.endswith("because model.modules_to_save does not name it: model.layers.1.mlp.up_proj")
