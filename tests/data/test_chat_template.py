"""A chat template of the user's choice for a model that has none: in training, generation, checkpoints and exports."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import transformers

from cola_lightning import COLAModule, TextDataModule, UserError
from cola_lightning.chat_template import CHATML, find_chat_template, unknown_tokens
from cola_lightning.cli import main
from cola_lightning.data.batch import labels_of
from cola_lightning.stages.replay import Replay
from tests.helpers import tiny
from tests.helpers.toy import trainer

SAID = [("user", "Who?"), ("assistant", "Al."), ("user", "Old?"), ("assistant", "Yes.")]
TALK = [{"role": role, "content": content} for role, content in SAID]
CHATML_TALK = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in SAID)


def encoded(folder, own, **options):
    """The row of the conversation, and what is trained of it."""
    data = TextDataModule(tiny.write_rows(folder, [{"messages": TALK}]), **options)
    own.model_max_length = 1024
    tiny.set_up(data, own, "fit")
    (row,) = data.train
    trained = "".join(own.decode([one]) for one in labels_of(row) if one >= 0)
    return own.decode(row["input_ids"]), trained, data


def test_the_last_turn_ends_with_the_end_of_text_where_the_vocabulary_has_no_token_of_the_template(tmp_path, caplog):
    caplog.set_level("INFO")
    text, trained, data = encoded(tmp_path, tiny.tokenizer(pad=True), chat_template="chatml")
    assert text == f"<s>{CHATML_TALK}</s>"  # as this tokenizer begins all texts
    assert trained == "Al.<|im_end|>\nYes.<|im_end|>\n</s>"
    assert "spelled in pieces: <|im_start|>, <|im_end|>" in caplog.text
    assert data.prompt_format == {"kind": "response", "chat_template": True, "template": "{{- bos_token }}" + CHATML}
    caplog.clear()
    own = tiny.tokenizer("gpt2", pad=True)
    assert encoded(tmp_path, own, chat_template="chatml")[0] == f"{CHATML_TALK}</s>"
    own.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    text, trained, _ = encoded(tmp_path, own, chat_template="chatml")
    assert (text, trained) == (CHATML_TALK, "Al.<|im_end|>Yes.<|im_end|>")


def test_a_template_comes_from_a_file_or_another_model_and_replaces_the_tokenizers_own(tmp_path):
    own = tiny.tokenizer()
    (tmp_path / "own.jinja").write_text(tiny.CHAT)
    tiny.chat_tokenizer(tiny.CHAT).save_pretrained(tmp_path / "other")
    for name in (tmp_path / "own.jinja", tmp_path / "other"):
        assert find_chat_template(str(name), own) == tiny.CHAT
    text, *_ = encoded(tmp_path / "rows", tiny.chat_tokenizer(CHATML), chat_template=str(tmp_path / "own.jinja"))
    assert text.startswith("<s>[user]\nWho?</s>\n")
    own.save_pretrained(tmp_path / "none")
    for name, message in [("no.jinja", "cannot be read"), (tmp_path / "none", "has no chat template"), ("/no/such", "cannot")]:
        with pytest.raises(UserError, match=rf"^data\.chat_template: .*{message}"):
            find_chat_template(str(name), own)
    assert unknown_tokens(own, "{{ '<|user|>' }} <think> {{ '<tool>' }} <s>") == ["<|user|>", "<think>", "<tool>"]


def test_a_template_is_that_of_its_data_alone_until_a_model_is_trained_with_it(tmp_path, caplog):
    def loss(data):
        (measured,) = trainer(tmp_path).test(module, datamodule=data, verbose=False)
        return measured["test_loss"]

    source = tiny.write_rows(tmp_path / "rows", [{"prompt": "Old?", "response": "Yes."}])
    module = tiny.causal_lm(tmp_path)
    plain, chat = TextDataModule(source), TextDataModule(source, chat_template="chatml")
    before, of_chat = loss(plain), loss(chat)
    assert loss(plain) == before != of_chat
    assert module.tokenizer.chat_template is None
    other = Replay(1.0, {"other": TextDataModule(source, chat_template=str(tmp_path / "own.jinja"))})
    (tmp_path / "own.jinja").write_text(tiny.CHAT)
    fit = trainer(tmp_path, other, max_steps=0)
    fit.fit(module, datamodule=chat)
    assert module.tokenizer.chat_template == "{{- bos_token }}" + CHATML
    assert loss(plain) == loss(chat) == pytest.approx(of_chat, rel=1e-6)
    fit.save_checkpoint(tmp_path / "chat.ckpt")
    for data in (chat, plain):  # whose rows are read before the checkpoint
        assert "data.chat_template" not in caplog.text
        trainer(tmp_path).test(tiny.causal_lm(tmp_path), datamodule=data, ckpt_path=tmp_path / "chat.ckpt", verbose=False)
    assert "data.chat_template: the checkpoint's run had one" in caplog.text


CONFIG = """
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args:
    model_name: model
    target_modules: null
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 2.0e-2}}
data:
  init_args:
    {source: talks.jsonl, chat_template: own.jinja, chat_template_kwargs: {enable_thinking: false}, val_size: 0, batch_size: 4}
trainer: {max_epochs: 8, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_base_model_learns_to_answer_with_the_templates_variables_and_its_export_renders_the_same(
    tmp_path, monkeypatch, capfd
):
    """The template renders nothing without its variable."""
    monkeypatch.chdir(tmp_path)
    tiny.folder(Path("model"), max_position_embeddings=256)
    own = "{{- raise_exception('It has no thoughts') if enable_thinking is not false }}" + CHATML
    Path("own.jinja").write_text(own)
    Path("talks.jsonl").write_text((json.dumps({"messages": TALK[:2]}) + "\n") * 16)
    Path("config.yaml").write_text(CONFIG)
    assert main(["fit", "--config", "config.yaml"]) == 0
    out = capfd.readouterr().out
    (try_,) = [line.removeprefix("try it: cola ") for line in out.splitlines() if line.startswith("try it: cola ")]
    checkpoint = "runs/version_0/checkpoints/last.ckpt"
    assert main(shlex.split(try_.replace("TEXT", "Who?"))) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n"))
    assert main(["generate", checkpoint, "--chat"]) == 0
    assert capfd.readouterr().out == "Al.\nAl.\n"
    assert main(["predict", "--config", "runs/version_0/config.yaml", "--ckpt_path", checkpoint]) == 0
    Path("own.jinja").unlink()  # the checkpoint has it
    (path,) = Path("runs").rglob("predictions.jsonl")
    assert {row["prediction"] for row in tiny.read_rows(path)} == {"Al."}
    assert main(["export", checkpoint, "--format", "merged", "--output", "merged"]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", Path("merged/README.md").read_text(), re.DOTALL)
    assert "add_generation_prompt=True, enable_thinking=False)" in code
    exec(code.replace("path/to/this/folder", "merged"), {})
    exported = transformers.AutoTokenizer.from_pretrained("merged")
    assert exported.apply_chat_template(TALK, tokenize=False, enable_thinking=False) == CHATML_TALK
    assert COLAModule.load_from_checkpoint(checkpoint).tokenizer.chat_template == exported.chat_template == own
