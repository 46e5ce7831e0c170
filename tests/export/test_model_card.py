"""An export is complete: a card whose lines give the library's own predictions, its tokenizer, a base that peft finds."""

import contextlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import GenerationConfig, LlamaForCausalLM

from cola_lightning import COLACausalLM, PredictionWriter, PromptDataModule, TemplateDataModule, TextDataModule
from cola_lightning.chain.chain import Chain
from cola_lightning.cli import main
from cola_lightning.export.card import write_card
from cola_lightning.module.exports import trained_model
from tests.helpers import tiny
from tests.helpers.tiny import CHAT
from tests.helpers.toy import assert_bit_equal, batches, saved, toy, trainer, weights

ARGUMENTS = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "seed": 0}


@pytest.fixture
def module(tmp_path):
    return tiny.three_links(COLACausalLM(tiny.folder(tmp_path / "base"), **ARGUMENTS))


def card(folder):
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def block(text, language):
    (code,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return code


@pytest.mark.parametrize(("format_", "library"), [("merged", "transformers"), ("peft", "peft")])
def test_a_card_says_what_was_exported_and_how_it_was_trained(module, tmp_path, format_, library):
    module.export(tmp_path / "out", format_)
    data, text = card(tmp_path / "out")
    assert data["library_name"] == library
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[2] for row in rows[2:]] == ["4", "2", "3"]
    arguments = yaml.safe_load(block(text, "yaml"))
    assert arguments["class_path"] == "cola_lightning.COLACausalLM"
    assert (arguments["init_args"]["rank"], arguments["init_args"]["alpha"]) == (4, 6.0)
    assert "base_model" not in data  # a folder of this machine
    named = replace(module.named_base, model_name="owner/name")
    write_card(tmp_path, replace(trained_model(module, {}, {}), named_base=named, tokenizer=None), "PEFT adapter", "")
    assert card(tmp_path)[0]["base_model"] == "owner/name"


ROWS = [
    {"sentence": f"film {k} with {'great' if k % 2 else 'terrible'} {word} ", "label": k % 2}
    for k, word in enumerate(["actors", "plot", "mat", "river", "town", "cat"])
]


SIZES = {"train_size": 3, "val_size": 3, "test_size": 6}
DATA = {
    "options in the chat template": lambda source: PromptDataModule("SST2", source, apply_chat_template=True, **SIZES),
    "answer": lambda source: TemplateDataModule(source, prompt="A {sentence}\nIs:", answer="sentence"),
    "response to a tokenizer that ends texts": lambda source: TextDataModule(source, max_new_tokens=16),
}


def executed(code, **given):
    """What the code prints and defines, with a row of the data in place of the example's."""
    for names, value in given.items():
        names = names.replace("_and_", ", ")
        code = re.sub(rf"^{names} = .*$", lambda _, line=f"{names} = {value!r}": line, code, flags=re.MULTILINE)
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
    tiny.write_rows(tmp_path, rows)
    module, data = tiny.three_links(COLACausalLM(name, **ARGUMENTS)), DATA[kind](str(tmp_path))
    run = trainer(tmp_path, PredictionWriter(), max_steps=1)
    run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    run.predict(module, datamodule=data, return_predictions=False)
    predictions = tiny.read_rows(tmp_path / "predictions.jsonl")
    checkpoint, seen = str(tmp_path / "last.ckpt"), set()
    for format_, prediction in zip(("merged", "peft"), predictions[:2], strict=True):
        folder = str(tmp_path / format_)
        assert main(["export", checkpoint, "--format", format_, "--output", folder]) == 0
        code = block(Path(folder, "README.md").read_text(), "python").replace("path/to/this/folder", folder)
        code = code.replace("max_new_tokens=256", "max_new_tokens=16")
        if format_ == "merged":
            executed(code)  # as it stands
        if "options" not in prediction:
            printed, _ = executed(code, prompt=prediction["prompt"])
            assert printed.strip() == prediction["prediction"]
            seen.add(printed)
            continue
        printed, names = executed(code, prompt_and_options=(prediction["prompt"], prediction["options"]))
        assert printed == prediction["options"][prediction["option"]] + "\n"
        scores = [names["score"](names["prompt"], option) for option in names["options"]]
        assert scores == pytest.approx(prediction["scores"], abs=1e-5)
        seen |= set(scores)
    assert len(seen) > 1
    capfd.readouterr()
    n_new = "50" if kind == "answer" else "16"
    assert main(["generate", checkpoint, "--max_new_tokens", n_new, "--prompt", predictions[0]["prompt"]]) == 0
    out, err = capfd.readouterr()
    assert ("trained to choose among options" in err) == ("options" in predictions[0])
    assert "options" in predictions[0] or out.strip() == predictions[0]["prediction"]


@pytest.mark.parametrize("kind", ["chat", "text", "no end"])
def test_a_merged_model_ends_its_text_where_its_training_did(tmp_path, kind):
    name = tiny.folder(tmp_path / "model", "llama")
    own = tiny.tokenizer(pad=True)
    own.add_special_tokens({"additional_special_tokens": ["<|end|>"]})  # of a turn; the base's own files end a text elsewhere
    own.chat_template = tiny.CHAT.replace("{{ eos_token }}", "<|end|>") if kind == "chat" else None
    own.eos_token, end = (None, None) if kind == "no end" else ("</s>", 5)
    own.save_pretrained(name)
    for file in ("config.json", "generation_config.json"):
        fields = json.loads(Path(name, file).read_text()) | {"eos_token_id": end}
        Path(name, file).write_text(json.dumps(fields))
    tiny.write_rows(tmp_path, [{"text": "It is old."} if kind == "text" else {"prompt": "Is it old?", "response": "It is."}])
    module = COLACausalLM(name, **ARGUMENTS)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=TextDataModule(str(tmp_path), max_new_tokens=2))
    module.export(tmp_path / "merged")
    expected = {1, 5} | ({own.convert_tokens_to_ids("<|end|>")} if kind == "chat" else set())
    ends = GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    assert ends is None if kind == "no end" else set(ends) == expected
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generate(torch.tensor([[3, 4]]), max_new_tokens=3).shape[1] <= 5


def test_the_card_loads_an_adapter_on_a_base_that_was_written_because_peft_cannot_name_it(tmp_path, monkeypatch):
    tiny.folder(tmp_path / "tiny_package")
    (tmp_path / "tiny_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_package", raising=False)
    packaged = tiny.three_links(COLACausalLM("package:tiny_package", **ARGUMENTS))
    path = str(saved(packaged, tmp_path))
    assert main(["export", path, "--format", "peft", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert main(["export", path, "--format", "merged", "--links", "0", "--output", str(tmp_path / "written")]) == 0
    code = block((tmp_path / "out" / "README.md").read_text(), "python").replace("path/to/this/folder", str(tmp_path / "out"))
    _, names = executed(code.replace("path/to/base", str(tmp_path / "written")))
    assert (tiny.logits(names["model"]) - tiny.logits(packaged.model)).abs().max() <= 1e-5


def test_an_export_changes_nothing_of_a_module_in_training(tmp_path):
    module = toy()
    trainer(tmp_path, max_steps=6, chain={"at_steps": [3]}).fit(module, batches())
    module.example_input_array = torch.ones(3, 8)
    module.model[0].eval()
    before, modes = weights(module), [part.training for part in module.modules()]
    trained = [parameter.requires_grad for parameter in module.parameters()]
    module.export(tmp_path / "merged")
    module.export(tmp_path / "chain", "chain")
    assert_bit_equal(weights(module), before)
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == trained
    assert Chain.load(tmp_path / "chain").is_beginning_of(module.full_chain())


def test_an_export_ends_turns_as_its_fit_did_after_other_data_were_measured_and_from_a_checkpoint(tmp_path):
    base = tiny.folder(tmp_path / "base")
    own = tiny.chat_tokenizer(tiny.CHAT_IN_A_LINE.replace("</s>", "<|end|>"), "<|end|>")
    own.save_pretrained(base)
    (end,) = own("<|end|>", add_special_tokens=False)["input_ids"]
    rows = tiny.write_rows(tmp_path / "rows", [{"prompt": "Old?", "response": "Yes."}])
    module, run = COLACausalLM(base, **ARGUMENTS), trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=TextDataModule(rows))
    run.save_checkpoint(tmp_path / "run.ckpt")
    trainer(tmp_path).test(module, datamodule=TextDataModule(rows, chat_template=False), verbose=False)
    for number, one in enumerate([module, COLACausalLM.load_from_checkpoint(tmp_path / "run.ckpt")]):
        one.export(tmp_path / str(number))
        assert GenerationConfig.from_pretrained(tmp_path / str(number)).eos_token_id == [1, end]
        assert "apply_chat_template" in card(tmp_path / str(number))[1]
