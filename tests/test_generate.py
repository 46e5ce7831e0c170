"""``cola generate``: what it prints is what predict writes, of a checkpoint; each mistake is one line."""

import io
import json
import re
from pathlib import Path

import pytest
import torch

from cola_lightning import COLACausalLM, COLASequenceClassifier, PredictionWriter, TextClassificationDataModule, TextDataModule
from cola_lightning.cli import main
from cola_lightning.cli.generate import make_streamer
from cola_lightning.decoding import Decoding
from tests import tiny
from tests.toy import trainer

DOCS = Path(__file__).parent.parent / "docs" / "checkpoints.md"
CHAT = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}</s>{% endfor %}"
CHAT += "{% if add_generation_prompt %}[assistant]{% endif %}"
PROMPTS = ["Is the town old? ", "A film with great actors", "Yes, the river is long\n"]


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def fitted(folder, chat, rows, **how):
    """A checkpoint of two links, and what predict writes with it."""
    name = tiny.folder(folder / "model", "llama", max_position_embeddings=128)
    own = tiny.tokenizer()
    own.chat_template = chat
    own.save_pretrained(name)
    module = tiny.three_links(COLACausalLM(name, target_modules=["q_proj", "v_proj"], rank=4, seed=0))
    data = TextDataModule(write_rows(folder / "rows", rows), max_new_tokens=8, batch_size=2, **how)
    run = trainer(folder, max_steps=1)
    run.fit(module, datamodule=data)
    run.save_checkpoint(folder / "last.ckpt")
    trainer(folder, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return folder / "last.ckpt", [json.loads(line)["prediction"] for line in lines]


ROWS = [{"prompt": prompt, "response": "It is."} for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["chat", "template unused", "no template"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    how = {"chat_template": False} if request.param == "template unused" else {}
    return fitted(folder, None if request.param == "no template" else CHAT, ROWS, **how)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("checkpoint"), CHAT, ROWS)[0]


def printed(capfd, *words):
    assert main(["generate", "--max_new_tokens", "8", *map(str, words)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_it_prints_what_predict_writes(trained, capfd):
    path, predictions = trained
    for prompt, prediction in zip(PROMPTS, predictions, strict=True):
        assert printed(capfd, "--checkpoint", path, "--prompt", prompt).strip() == prediction


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks each model for it
def test_the_docs_lines_for_exports_print_what_it_prints(tmp_path, monkeypatch, capfd):
    path, _ = fitted(tmp_path, None, ROWS)
    monkeypatch.chdir(tmp_path)
    for kind, folder in (("merged", "merged"), ("peft", "adapter")):
        assert main(["export", "--checkpoint", str(path), "--format", kind, "--output", folder]) == 0
    (code,) = re.findall(r"```py\n(.*?)```", DOCS.read_text(), re.DOTALL)
    capfd.readouterr()
    exec(code, names := {})
    merged, adapter = capfd.readouterr().out.splitlines()
    told = printed(capfd, "--checkpoint", path, "--prompt", names["prompt"], "--max_new_tokens", "50")
    assert merged.strip() == adapter.strip() == told.strip()


def test_standard_input_and_links_and_sampling(trained, capfd, monkeypatch):
    path, predictions = trained
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert printed(capfd, "--checkpoint", path).strip() == predictions[1]
    asked = ["--checkpoint", path, "--prompt", PROMPTS[1]]
    assert printed(capfd, *asked, "--links", 3) == printed(capfd, *asked) != printed(capfd, *asked, "--links", 0)
    sampled = [printed(capfd, *asked, "--do_sample", "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stop = predictions[1][2:4]
    assert printed(capfd, *asked, "--stop", "no such text", stop).strip() == predictions[1].partition(stop)[0].strip()


def test_a_prompt_is_the_same_as_an_option_and_on_standard_input(checkpoint, capfd, monkeypatch):
    for prompt in ("# head", "  # It", "null", "~", "[It, is]", "'It is'"):
        monkeypatch.setattr("sys.stdin", io.StringIO(prompt + "\n"))
        expected = printed(capfd, "--checkpoint", checkpoint)
        monkeypatch.setattr("sys.stdin", None)
        assert printed(capfd, "--checkpoint", checkpoint, "--prompt", prompt) == expected


def test_a_conversation_goes_on_up_to_an_empty_line(trained, capfd, monkeypatch):
    path, _ = trained
    module = COLACausalLM.load_from_checkpoint(path)
    if not module.tokenizer.chat_template:
        assert main(["generate", "--checkpoint", str(path), "--chat"]) == 2
        assert "error: chat: expected a tokenizer with a chat template" in capfd.readouterr().err
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it?\nThe cat\n\nnever read\n"))
    first, second = printed(capfd, "--checkpoint", path, "--chat").splitlines()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    alone = printed(capfd, "--checkpoint", path, "--chat", "--prompt", "Is it?").strip()
    assert first.strip() == alone
    ids = module.tokenizer(f"[user]Is it?</s>[assistant]{alone}</s>[user]The cat</s>[assistant]", add_special_tokens=False)
    batch = {"prompt_ids": torch.tensor([ids["input_ids"]]), "prompt_mask": torch.ones(1, len(ids["input_ids"])).long()}
    assert module.eval().generate(batch | {"decoding": Decoding(8).to_dict()}) == [second.strip()]


def test_what_is_printed_of_a_stop_is_nothing(capsys):
    own = tiny.tokenizer("gpt2")
    text = "The cat. #Yes# ##No ## # Human: It is"
    for stops, expected in [
        (("## Human",), text),
        (("##No",), "The cat. #Yes# "),
        (("# H", "cat#"), "The cat. #Yes# ##No ## "),
    ]:
        streamer = make_streamer(own, Decoding(stop=stops))
        streamer.put(torch.tensor([[5, 6]]))  # the prompt
        for token in own(text)["input_ids"]:
            streamer.put(torch.tensor([token]))
            out = capsys.readouterr().out
            streamer.seen = getattr(streamer, "seen", "") + out
            assert expected.startswith(streamer.seen)
        streamer.end()
        assert streamer.seen + capsys.readouterr().out == expected + "\n"


REFUSED = [
    (["{f}/classifier.ckpt"], "expected one of a causal language model (COLACausalLM), which generates, received"),
    (["{f}"], "docs/checkpoints.md"),
    (["{t}", "--links", "9"], "links: expected 0 to 3, the length of the chain, received 9"),
    (["{t}", "--prompt", "It is " * 200], "prompt: expected fewer than 128 tokens, for the model, received"),
    (["{t}", "--promt", "It"], "unrecognized arguments: --promt"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the checkpoint of a sequence classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    name = tiny.folder(folder / "model", "roberta", "AutoModelForSequenceClassification", num_labels=2)
    rows = [{"sentence": f"It was {k}.", "label": k % 2} for k in range(4)]
    run = trainer(folder, max_steps=1)
    data = TextClassificationDataModule(write_rows(folder / "rows", rows))
    run.fit(COLASequenceClassifier(name, target_modules=["query"], rank=2, seed=0), datamodule=data)
    run.save_checkpoint(folder / "classifier.ckpt")
    return folder


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_generate_is_one_line_and_status_2(checkpoint, folder, words, message, capfd):
    path, *others = (word.format(f=folder, t=checkpoint) for word in words)
    prompt = [] if "--prompt" in others else ["--prompt", "It"]
    assert main(["generate", "--checkpoint", path, *prompt, *others]) == 2
    out, err = capfd.readouterr()
    assert message in err.strip().splitlines()[-1]
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not out
