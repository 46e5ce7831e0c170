"""An export is complete: a model card, its tokenizer, a base that peft finds; Python writes it as the command does."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from cola_lightning import Chain, COLACausalLM, UserError
from cola_lightning.cli import main
from cola_lightning.export.card import Card
from tests import tiny
from tests.toy import Toy, batches, toy, trainer

# peft 0.21 asks each transformers model for it; transformers 5.24 deprecates it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture
def module(tmp_path):
    arguments = {"target_modules": tiny.targets("llama"), "rank": 4, "alpha": 6, "seed": 0}
    return tiny.three_links(COLACausalLM(tiny.folder(tmp_path / "base"), **arguments))


def fields(folder):
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


@pytest.mark.parametrize(("format_", "library"), [("merged", "transformers"), ("peft", "peft")])
def test_a_card_says_what_was_exported_and_how_it_was_trained(module, tmp_path, format_, library):
    module.export(tmp_path / "out", format_, license="apache-2.0")
    data, text = fields(tmp_path / "out")
    assert (data["library_name"], data["license"]) == (library, "apache-2.0")
    assert {"lora", "chain-of-lora"} <= set(data["tags"])
    assert "base_model" not in data  # a folder of this machine is none of the hub's
    assert f"`{tmp_path / 'base'}` with 3 LoRA links" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[2] for row in rows[2:]] == ["4", "2", "3"]
    arguments = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert arguments["class_path"] == "cola_lightning.COLACausalLM"
    assert (arguments["init_args"]["rank"], arguments["init_args"]["alpha"]) == (4, 6.0)
    code = text.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(tmp_path / "out"))
    names: dict = {}
    exec(code, names)
    expected = tiny.logits(module.model)
    assert (tiny.logits(names["model"]) - expected).abs().max() <= 1e-5


def test_the_hubs_name_of_a_base_is_in_the_cards_metadata(module, tmp_path):
    named = COLACausalLM("owner/name")
    Card(named, module.full_chain(), None, None, {}, {}).write(tmp_path, "PEFT adapter", "")
    data, text = fields(tmp_path)
    assert data["base_model"] == "owner/name"
    assert "license" not in data
    assert "No license is stated" in text


def test_a_folder_in_the_current_one_and_a_class_are_no_bases_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.folder("base")
    of_folder = COLACausalLM("base", target_modules=tiny.targets("llama"), rank=4, seed=0)
    for module in (of_folder, toy()):
        module.export("out", "peft", overwrite=True)
        data, text = fields(tmp_path / "out")
        assert "base_model" not in data
        assert f"`{module.base_name}`" in text


@pytest.mark.parametrize("format_", ["merged", "peft"])
def test_the_tokenizer_comes_along(module, tmp_path, format_):
    module.export(tmp_path / "out", format_)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a few words")["input_ids"] == module.tokenizer("a few words")["input_ids"]


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A module whose base lies in an installed package."""
    tiny.folder(tmp_path / "tiny_package")
    (tmp_path / "tiny_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    arguments = {"target_modules": tiny.targets("llama"), "rank": 4, "seed": 0}
    yield tiny.three_links(COLACausalLM("package:tiny_package", **arguments))
    sys.modules.pop("tiny_package", None)


def test_a_base_that_peft_cannot_name_is_written_where_it_can(packaged, tmp_path):
    lines = packaged.export(tmp_path / "out", "peft", base_folder=tmp_path / "written")
    assert [line for line in lines if line.startswith("its base: ") and str(tmp_path / "written") in line]
    assert not [line for line in lines if "cannot load" in line]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tiny.logits(model) - tiny.logits(packaged.model)).abs().max() <= 1e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert torch.equal(tiny.logits(base), tiny.logits(packaged.merged_model(0)))
    before = {path: path.read_bytes() for path in (tmp_path / "written").iterdir()}
    packaged.export(tmp_path / "again", "peft", base_folder=tmp_path / "written")  # the same base serves many adapters
    assert {path: path.read_bytes() for path in (tmp_path / "written").iterdir()} == before
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "written"
    )


def test_without_a_folder_it_is_said_that_peft_needs_one(packaged, tmp_path):
    lines = packaged.export(tmp_path / "out", "peft")
    assert "peft cannot load its base by that name: base_folder" in lines[-2]


def test_another_base_in_the_folder_is_refused(packaged, tmp_path):
    tiny.folder(tmp_path / "other", scale=1)
    with pytest.raises(UserError, match=r"for the base of COLACausalLM is not '.*other'"):
        packaged.export(tmp_path / "out", "peft", base_folder=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_base_that_no_files_hold_has_no_folder(tmp_path):
    with pytest.raises(UserError, match="base_folder: expected none for a Toy, whose base is not loaded by transformers"):
        tiny_trained(tmp_path).export(tmp_path / "out", "peft", base_folder=tmp_path / "base")


def tiny_trained(tmp_path):
    module = toy(Toy)
    trainer(tmp_path, max_steps=6, chain={"at_steps": [3]}).fit(module, batches())
    return module


def test_a_class_of_a_script_is_exported_from_python_and_training_goes_on(tmp_path):
    module = tiny_trained(tmp_path)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.model[0].eval()
    modes = [part.training for part in module.modules()]
    module.export(tmp_path / "merged")
    module.export(tmp_path / "chain", "chain")
    assert [part.training for part in module.modules()] == modes
    module.train()
    after = module.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.requires_grad for name, parameter in module.model.named_parameters() if "lora" in name)
    again = Chain.load(tmp_path / "chain")
    assert again.is_beginning_of(module.full_chain())
    assert len(again) == len(module.chain) + 1 == 2
    trainer(tmp_path, max_steps=3).fit(module, batches())


def test_the_full_chain_ends_with_the_live_link(tmp_path):
    module = tiny_trained(tmp_path)
    *finished, live = module.full_chain().links
    assert finished == module.chain.links
    assert live.index == 1
    assert torch.equal(live.factors["0"][1], module.model[0].lora_B.detach())


@pytest.fixture
def hub(monkeypatch):
    """What was uploaded to a hub that answers."""
    seen = {}

    class Api:
        def create_repo(self, repo_id, exist_ok):
            seen["made"] = repo_id, exist_ok
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path):
            seen["files"] = sorted(os.listdir(folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return seen


@pytest.fixture
def checkpoint(tmp_path):
    module = tiny.three_links(COLACausalLM(tiny.folder(tmp_path / "base"), rank=4, seed=0, target_modules=["q_proj"]))
    run = trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    return tmp_path / "end.ckpt"


def export(checkpoint, *words):
    return main(["export", "--checkpoint", str(checkpoint), "--output", str(checkpoint.parent / "out"), *words])


def test_an_export_is_uploaded_where_that_is_asked_for(checkpoint, hub, capsys):
    assert export(checkpoint, "--format", "merged", "--license", "mit", "--push_to_hub", "me/tuned") == 0
    assert hub["made"] == ("me/tuned", True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(hub["files"])
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded: https://huggingface.co/me/tuned"
    assert fields(checkpoint.parent / "out")[0]["license"] == "mit"


def test_a_hub_that_refuses_leaves_the_export(checkpoint, hub, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(OSError, match="401 Unauthorized"):
        export(checkpoint, "--format", "peft", "--push_to_hub", "me/tuned")
    assert (checkpoint.parent / "out" / "adapter_config.json").is_file()


def test_a_chain_folder_has_no_license(checkpoint, capsys):
    assert export(checkpoint, "--format", "chain", "--license", "mit") == 2
    assert "license: expected --format merged or peft beside it, received chain" in capsys.readouterr().err
    assert not Path(checkpoint.parent / "out").exists()
