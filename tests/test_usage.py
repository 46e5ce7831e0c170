"""The model card's section on use: its lines, executed on an exported folder, give the library's own predictions."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from cola_lightning import COLACausalLM, PredictionWriter, PromptDataModule, TemplateDataModule, TextDataModule
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.cli import main
from tests import tiny
from tests.test_templates import CHAT
from tests.toy import trainer

ROWS = [
    {"sentence": f"film {k} with {'great' if k % 2 else 'terrible'} {word} ", "label": k % 2, "all": [" old", f" {word}"]}
    for k, word in enumerate(["actors", "plot", "mat", "river", "town", "cat"])
]
FILLED = {"options": [" {sentence}bad", " {sentence}good"]}
DATA = {
    "options": lambda source: PromptDataModule("SST2", source, train_size=3, val_size=3, test_size=6),
    "options in the chat template": lambda source: PromptDataModule(
        "SST2", source, train_size=3, val_size=3, test_size=6, apply_chat_template=True
    ),
    "options with fields": lambda source: TemplateDataModule(source, prompt="{sentence}Is it {{a}}? ", **FILLED),
    "options in a field": lambda source: TemplateDataModule(source, prompt="A {sentence}is", options="all"),
    "fixed": lambda source: TemplateDataModule(source, prompt="Is it {{old}}?", options=[" {{no}}", " yes"]),
    "answer": lambda source: TemplateDataModule(source, prompt="A {sentence}\nIs:", answer="sentence"),
    "response": lambda source: TextDataModule(source, max_new_tokens=16),
    "response to a tokenizer that ends texts": lambda source: TextDataModule(source, max_new_tokens=16),
    "options to a tokenizer that ends texts": lambda source: PromptDataModule(
        "SST2", source, train_size=3, val_size=3, test_size=6
    ),
    "response in the chat template": lambda source: TextDataModule(source, max_new_tokens=16),
    "text": lambda source: TextDataModule(source, max_new_tokens=16),
}


def code_of(section):
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


def executed(code, **replaced):
    """What the code prints, with a row of the data in place of the example's, and what it defines."""
    for line, value in replaced.items():
        name = line.replace("_and_", ", ")
        code = re.sub(rf"^{name} = .*$", lambda _, name=name, value=value: f"{name} = {value!r}", code, flags=re.MULTILINE)
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), names)
    return out.getvalue(), names


@pytest.mark.parametrize("kind", DATA)
def test_the_cards_lines_give_the_librarys_own_predictions(tmp_path, kind, capfd):
    architecture = "qwen3" if "ends" in kind else "llama"  # transformers gives Llama's tokenizers an end of their own
    name = tiny.folder(tmp_path / "model", architecture, max_position_embeddings=512)
    own = tiny.tokenizer(architecture, eos="ends" in kind)
    own.chat_template = CHAT if "chat" in kind else None
    own.save_pretrained(name)
    rows = [{"prompt": row["sentence"], "response": "It is."} if kind.startswith("response") else row for row in ROWS]
    rows = [{"text": row["sentence"]} for row in ROWS] if kind == "text" else rows
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = tiny.three_links(COLACausalLM(name, target_modules=["q_proj", "v_proj"], rank=4, seed=0))
    run, data = trainer(tmp_path, max_steps=1), DATA[kind](str(tmp_path))
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    merged = str(tmp_path / "merged")
    assert main(["export", "--checkpoint", str(tmp_path / "last.ckpt"), "--format", "merged", "--output", merged]) == 0
    format_ = OpenedCheckpoint.open(tmp_path / "last.ckpt").state.prompt_format
    assert format_["kind"] == kind.split()[0].replace("fixed", "options")
    card = (Path(merged) / "README.md").read_text()
    assert all(f"`{json.dumps(format_[name])}`" in card for name in ("prompt", "options") if format_.get(name))
    code = code_of(card).replace("path/to/this/folder", merged)
    capfd.readouterr()
    checkpoint, n_new = str(tmp_path / "last.ckpt"), "50" if kind == "answer" else "16"
    assert main(["generate", "--checkpoint", checkpoint, "--max_new_tokens", n_new, "--prompt", predictions[0]["prompt"]]) == 0
    out, err = capfd.readouterr()
    assert ("trained to choose among options" in err) is ("options" in predictions[0])
    assert "options" in predictions[0] or out.strip() == predictions[0]["prediction"]
    assert len([line for line in code.splitlines() if line]) <= 16
    code = code.replace("max_new_tokens=256", "max_new_tokens=16")
    executed(code)  # as it stands
    seen = set()
    for prediction in predictions[:3]:
        given = {"prompt": prediction["prompt"]}
        if "options" in prediction:
            given = {"prompt_and_options": (prediction["prompt"], prediction["options"])}
        printed, names = executed(code, **given)
        if "options" not in prediction:
            assert printed.strip() == prediction["prediction"]
            seen.add(printed)
            continue
        assert printed == prediction["options"][prediction["prediction"]] + "\n"
        scores = [names["score"](names["prompt"], option) for option in names["options"]]
        assert scores == pytest.approx(prediction["scores"], abs=1e-5)
        seen |= set(scores)
    assert len(seen) > 1


def trained_on(row, base, folder):
    """A module after one step on one row, its data and its Trainer."""
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    module = COLACausalLM(base, target_modules=["q_proj"], rank=4, seed=0)
    data, run = TextDataModule(str(folder), max_new_tokens=2), trainer(folder, max_steps=1)
    run.fit(module, datamodule=data)
    return module, data, run


@pytest.mark.parametrize("kind", ["chat", "response", "text"])
def test_a_merged_model_ends_its_text_where_its_training_did(tmp_path, kind):
    name = tiny.folder(tmp_path / "model", "llama")
    own = tiny.tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<|end|>"]})  # of a turn; the base's own files end a text elsewhere
    own.chat_template = tiny.CHAT.replace("{{ eos_token }}", "<|end|>") if kind == "chat" else None
    own.save_pretrained(name)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 5}')
    row = {"text": "It is old."} if kind == "text" else {"prompt": "Is it old?", "response": "It is."}
    module, *_ = trained_on(row, name, tmp_path)
    module.export(tmp_path / "merged")
    ends = {own.eos_token_id, 5} | ({own.convert_tokens_to_ids("<|end|>")} if kind == "chat" else set())
    assert set(GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id) == ends


def test_a_merged_model_without_an_end_of_text_generates(tmp_path):
    name = tiny.folder(tmp_path / "model", "llama")
    own = tiny.tokenizer(pad=True)
    own.eos_token = None
    own.save_pretrained(name)
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "model" / file).read_text()) | {"eos_token_id": None}
        (tmp_path / "model" / file).write_text(json.dumps(fields))
    module, *_ = trained_on({"prompt": "Is it old?", "response": "It is."}, name, tmp_path)
    module.export(tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generate(torch.tensor([[3, 4]]), max_new_tokens=3).shape == (1, 5)


def test_a_template_that_asks_for_a_system_turn_is_predicted_with_and_exported(tmp_path):
    name = tiny.folder(tmp_path / "model", "llama")
    own = tiny.tokenizer()
    own.chat_template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system turn comes first') }}{% endif %}"
    own.chat_template += CHAT
    own.save_pretrained(name)
    turns = [("system", "Be brief."), ("user", "Is it old?"), ("assistant", "It is.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    module, data, run = trained_on(row, name, tmp_path)
    module.export(tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [own.eos_token_id]
    assert run.predict(module, datamodule=data)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks each model for it
def test_the_lines_of_an_adapter_give_the_librarys_own_scores(tmp_path):
    name = tiny.folder(tmp_path / "model", "llama")
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    module = tiny.three_links(COLACausalLM(name, target_modules=["q_proj"], rank=4, seed=0))
    run, data = trainer(tmp_path, PredictionWriter(), max_steps=1), DATA["options"](str(tmp_path))
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    run.predict(module, datamodule=data, return_predictions=False)
    adapter = str(tmp_path / "adapter")
    assert main(["export", "--checkpoint", str(tmp_path / "last.ckpt"), "--format", "peft", "--output", adapter]) == 0
    card = Path(adapter, "README.md").read_text()
    assert "not trained to generate them: score the options" in card
    _, names = executed(code_of(card).replace("path/to/this/folder", adapter))
    prediction = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    scores = [names["score"](prediction["prompt"], option) for option in prediction["options"]]
    assert scores == pytest.approx(prediction["scores"], abs=1e-5)
