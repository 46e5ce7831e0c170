"""An export is complete: a model card, its tokenizer, a base that peft finds; Python writes it as the command does."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from cola_lightning import Chain, COLACausalLM, UserError
from cola_lightning.cli import main
from cola_lightning.export.card import Card
from tests import tiny
from tests.toy import batches, toy, trainer

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
    assert str(tmp_path / "base") in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[2] for row in rows[2:]] == ["4", "2", "3"]
    arguments = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert arguments["class_path"] == "cola_lightning.COLACausalLM"
    assert (arguments["init_args"]["rank"], arguments["init_args"]["alpha"]) == (4, 6.0)


def test_the_hubs_name_of_a_base_is_in_the_cards_metadata_and_no_other(module, tmp_path, monkeypatch):
    Card(COLACausalLM("owner/name"), module.full_chain(), None, None, {}, {}).write(tmp_path, "PEFT adapter", "")
    data, text = fields(tmp_path)
    assert data["base_model"] == "owner/name"
    assert "license" not in data
    monkeypatch.chdir(tmp_path)
    of_folder = COLACausalLM("base", target_modules=tiny.targets("llama"), rank=4, seed=0)
    for exported in (of_folder, toy()):
        exported.export("out", "peft", overwrite=True)
        data, text = fields(tmp_path / "out")
        assert "base_model" not in data
        assert f"`{exported.base_name}`" in text


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
    assert "peft cannot load its base by that name: base_folder" in packaged.export(tmp_path / "alone", "peft")[-2]
    written = tmp_path / "written"
    assert str(written) in packaged.export(tmp_path / "out", "peft", base_folder=written)[-2]
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (tiny.logits(model) - tiny.logits(packaged.model)).abs().max() <= 1e-5
    base = AutoModelForCausalLM.from_pretrained(written)
    assert torch.equal(tiny.logits(base), tiny.logits(packaged.merged_model(0)))
    before = {path: path.read_bytes() for path in written.iterdir()}
    packaged.export(tmp_path / "again", "peft", base_folder=written)  # the same base serves many adapters
    assert {path: path.read_bytes() for path in written.iterdir()} == before
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(written)
    tiny.folder(tmp_path / "other", scale=1)
    with pytest.raises(UserError, match=r"for the base of COLACausalLM is not '.*other'"):
        packaged.export(tmp_path / "refused", "peft", base_folder=tmp_path / "other")
    with pytest.raises(UserError, match="base_folder: expected none for a Toy"):
        toy().export(tmp_path / "refused", "peft", base_folder=tmp_path / "base")
    assert not (tmp_path / "refused").exists()


def test_a_class_of_a_script_is_exported_from_python_and_training_goes_on(tmp_path):
    module = toy()
    trainer(tmp_path, max_steps=6, chain={"at_steps": [3]}).fit(module, batches())
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    module.model[0].eval()
    modes = [part.training for part in module.modules()]
    module.export(tmp_path / "merged")
    module.export(tmp_path / "chain", "chain")
    assert [part.training for part in module.modules()] == modes
    after = module.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.requires_grad for name, parameter in module.model.named_parameters() if "lora" in name)
    again = Chain.load(tmp_path / "chain")
    assert again.is_beginning_of(module.full_chain())
    assert len(again) == len(module.chain) + 1 == 2
    assert torch.equal(again.links[1].factors["0"][1], module.model[0].lora_B.detach())  # the current link is the last
    module.train()
    trainer(tmp_path, max_steps=3).fit(module, batches())


def test_an_export_is_uploaded_where_that_is_asked_for(module, tmp_path, monkeypatch, capsys):
    seen = {}

    class Api:
        def create_repo(self, repo_id, exist_ok):
            if repo_id == "me/refused":
                raise OSError("401 Unauthorized")
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path):
            seen[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    def export(*words):
        return main(["export", "--checkpoint", str(tmp_path / "end.ckpt"), "--output", str(tmp_path / "out"), *words])

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    run = trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert export("--format", "chain", "--license", "mit") == 2
    assert "error: license: " in capsys.readouterr().err
    assert export("--format", "merged", "--license", "mit", "--push_to_hub", "me/tuned") == 0
    assert {"README.md", "config.json", "model.safetensors"} <= seen["me/tuned"]
    assert "https://huggingface.co/me/tuned" in capsys.readouterr().out.splitlines()[-1]
    assert fields(tmp_path / "out")[0]["license"] == "mit"
    with pytest.raises(OSError, match="401 Unauthorized"):
        export("--format", "peft", "--push_to_hub", "me/refused", "--overwrite")
    assert (tmp_path / "out" / "adapter_config.json").is_file()
