"""``cola stages`` with adapters that were trained elsewhere: their stages are measured as those that it trains."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cola_lightning import TextDataModule
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.stages.matrix import Column, Difference
from tests.helpers import tiny
from tests.helpers.toy import read_csv

SIZES = {"val_size": 4, "test_size": 6}


def load():
    return AutoModelForCausalLM.from_pretrained("base")


def trained(model, folder, seed, **fields):
    """An adapter after some steps of a loop as people have it, and the model with it."""
    model = get_peft_model(model, LoraConfig(**fields)) if fields else model
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        ids = torch.randint(2, 400, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters one after the other, one that went on with the first, and rows of three tasks."""
    folder = tmp_path_factory.mktemp("given")
    with contextlib.chdir(folder):
        tiny.folder("base")
        for name in ("sft", "dpo", "new"):
            tiny.write_rows(folder / f"rows-{name}", [{"text": f"{name} {k} " * (2 + k % 5)} for k in range(24)], ["train"])
        first = trained(load(), "sft", 0, r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
        trained(first, "went-on", 2)
        merged = PeftModel.from_pretrained(load(), "sft").merge_and_unload()
        trained(merged, "dpo", 1, r=5, lora_alpha=7, target_modules=["up_proj", "q_proj"])
    return folder


def stages(config, *words):
    base = {"init_args": {"model_name": "base", "target_modules": ["q_proj", "v_proj", "up_proj"], "rank": 2, "alpha": 4}}
    trainer = {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False}
    given = {
        name: part | {"data": {"init_args": {"source": f"rows-{name}"} | part.get("data", {}).get("init_args", {})}}
        for name, part in config.items()
    }
    whole = {"seed_everything": 0, "model": base, "data": {"init_args": SIZES}, "trainer": trainer, "stages": given}
    Path("stages.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return main(["stages", "--config", "stages.yaml", "--output", "out", *words])


@torch.no_grad()
def loss(model, name, **options):
    """The mean loss over the tokens of a task's test rows, by transformers alone."""
    data = TextDataModule(f"rows-{name}", **SIZES, **options)
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.pad_token = tokenizer.eos_token
    tiny.set_up(data, tokenizer, "test")
    total, n_tokens = 0.0, 0
    for batch in data.test_dataloader():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        n_tokens += int((labels != -100).sum())
    return total / n_tokens


def merge(*adapters):
    model = load()
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model


def assert_matrix(models):
    rows = read_csv("out/matrix.csv")
    assert [row["stage"] for row in rows] == [*models]
    for row, model in zip(rows, models.values(), strict=True):
        for name in [*models][1:]:
            assert float(row[f"{name} loss"]) == pytest.approx(loss(model, name), abs=1e-5), (row["stage"], name)
    assert [int(row["links"]) for row in rows] == [*range(len(models))]


def test_a_matrix_of_two_given_stages_and_one_trained_is_that_of_transformers_and_peft(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    config = {"sft": {"adapter": "sft"}, "dpo": {"adapter": "dpo"}, "new": {}}
    assert stages(config, "--replay", "0.5", "--fit_scales", "true") == 0
    assert [link.name for link in read_chain("out/new").links] == ["sft", "dpo", "new"]
    assert "replay: 7 of 14 training rows of dpo" in capfd.readouterr().out
    assert main(["export", "out/new", "--output", "merged"]) == 0
    models = {"base": load(), "sft": merge("sft"), "dpo": merge("sft", "dpo")}
    assert_matrix(models | {"new": AutoModelForCausalLM.from_pretrained("merged")})
    assert stages(config, "--replay", "0.5") == 0
    assert capfd.readouterr().out.count(": finished") == 3
    trained(load(), "sft", 3, r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    assert stages(config | {"new": {"trainer": {"max_steps": 1}}}) == 0  # another adapter is another stage
    assert "finished" not in capfd.readouterr().out


def test_the_last_stage_may_be_given_and_may_continue_the_one_before(folder, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(folder)
    if Path("out").exists():
        Path("out").rename(tmp_path / "other")
    trained(load(), "sft", 0, r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    assert stages({"sft": {"adapter": "sft"}, "dpo": {"adapter": "sft"}}) == 2
    assert "error: stages.dpo: adapter: " in capfd.readouterr().err
    config = {"sft": {"adapter": "sft"}, "dpo": {"adapter": "went-on", "continues": True}}
    assert stages(config, "--fit_scales", "true") == 2
    assert "error: stages.dpo: --fit_scales " in capfd.readouterr().err
    assert stages(config, "--max_forgetting", "99") == 0
    assert_matrix({"base": load(), "sft": merge("sft"), "dpo": merge("went-on")})
    assert stages({"sft": {"adapter": "nosuch"}}) == 2
    assert "error: stages.sft: adapter: " in capfd.readouterr().err


def test_a_stage_is_measured_with_its_own_chat_template_and_not_with_that_of_another(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sft", "dpo"):
        Path(name).symlink_to(folder / name)
    templates = {"sft": None, "dpo": "ask.jinja"}
    Path("ask.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}")
    for name in templates:
        tiny.write_rows(
            Path(f"rows-{name}"), [{"prompt": f"{name} {k}?", "response": f"{k} {name}"} for k in range(12)], ["train"]
        )
    config = {name: {"adapter": name, "data": {"init_args": {"chat_template": one}}} for name, one in templates.items()}
    for order in (config, dict(reversed(config.items()))):
        assert stages(order) == 0
        rows, base = read_csv("out/matrix.csv"), load()
        for name, template in templates.items():
            assert float(rows[0][f"{name} loss"]) == pytest.approx(loss(base, name, chat_template=template), abs=1e-5)


def test_a_first_stage_on_an_adapter_that_went_on_is_measured_and_nan_is_no_pass(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        Path(path.name).symlink_to(path)
    Path("out").unlink(missing_ok=True)
    trained(trained(load(), "a", 0, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), "b", 2)
    config = {"new": {"model": {"init_args": {"init_chain": ["a=a", "b=b"], "init_continues": ["b"]}}}}
    assert stages(config, "--max_forgetting", "99") == 0
    rows = read_csv("out/matrix.csv")
    assert [row["links"] for row in rows] == ["0", "3"]
    assert float(rows[0]["new loss"]) == pytest.approx(loss(load(), "new"), abs=1e-5)
    monkeypatch.setattr(Column, "forgetting", Difference(math.nan))
    assert [stages(config), stages(config, "--max_forgetting", "99")] == [0, 3]
