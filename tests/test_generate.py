"""``cola generate``: what it prints is what predict writes, of a checkpoint and its exports; each mistake is one line."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cola_lightning import COLACausalLM, COLASequenceClassifier, PredictionWriter, TextClassificationDataModule, TextDataModule
from cola_lightning.cli import main
from cola_lightning.cli.generate import make_streamer
from cola_lightning.decoding import Decoding
from cola_lightning.export.card import PROMPT_FORMAT
from tests import tiny
from tests.toy import trainer

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


@pytest.mark.parametrize("kind", ["checkpoint", "merged", "peft"])
def test_it_prints_what_predict_writes(trained, kind, tmp_path, capfd):
    path, predictions = trained
    if kind != "checkpoint":
        assert main(["export", "--checkpoint", str(path), "--format", kind, "--output", str(tmp_path / kind)]) == 0
        own = tmp_path / kind
        if not (own / "tokenizer.json").is_file():  # an adapter's, which may lie with its base
            tokenizer = COLACausalLM.load_from_checkpoint(path).tokenizer
            tokenizer.init_kwargs[PROMPT_FORMAT] = torch.load(path)["state_dict"]["cola"]["prompt_format"]
            tokenizer.save_pretrained(own)
        path = own
    capfd.readouterr()
    for prompt, prediction in zip(PROMPTS, predictions, strict=True):
        assert printed(capfd, "--checkpoint", path, "--prompt", prompt).strip() == prediction


def test_standard_input_and_links_and_sampling(trained, capfd, monkeypatch):
    path, predictions = trained
    for mark in ("", "\ufeff"):  # a byte order mark, as some editors write it
        monkeypatch.setattr("sys.stdin", io.StringIO(mark + PROMPTS[1] + "\n"))
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
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffIs it?\nThe cat\n\nnever read\n"))
    first, second = printed(capfd, "--checkpoint", path, "--chat").splitlines()
    alone = printed(capfd, "--checkpoint", path, "--prompt", "Is it?", "--chat_template", "true").strip()
    assert first.strip() == alone
    ids = module.tokenizer(f"[user]Is it?</s>[assistant]{alone}</s>[user]The cat</s>[assistant]", add_special_tokens=False)
    batch = {"prompt_ids": torch.tensor([ids["input_ids"]]), "prompt_mask": torch.ones(1, len(ids["input_ids"])).long()}
    assert module.eval().generate(batch | {"decoding": Decoding(8).to_dict()}) == [second.strip()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks each model for it
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_tokenizer_that_does_not_know_the_models_limit_has_it(tmp_path, kind, capfd):
    """OPT's, of learned positions: what another tool than this package saved."""
    name = tiny.folder(tmp_path / "model", "opt")
    if kind == "adapter":
        base = AutoModelForCausalLM.from_pretrained(name)
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / kind)
    assert main(["generate", "--checkpoint", path, "--prompt", "It is " * 12]) == 0
    capfd.readouterr()
    assert main(["generate", "--checkpoint", path, "--prompt", "It is " * 60]) == 2
    assert "error: prompt: expected fewer than 64 tokens, for the model, received" in capfd.readouterr().err


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


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """The checkpoint of a sequence classifier, and its exports."""
    folder = tmp_path_factory.mktemp("classifiers")
    name = tiny.folder(folder / "model", "roberta", "AutoModelForSequenceClassification", num_labels=2)
    rows = [{"sentence": f"It was {k}.", "label": k % 2} for k in range(4)]
    module = COLASequenceClassifier(name, target_modules=["query"], rank=2, seed=0)
    run = trainer(folder, max_steps=1)
    run.fit(module, datamodule=TextClassificationDataModule(write_rows(folder / "rows", rows)))
    run.save_checkpoint(folder / "classifier.ckpt")
    words = ["export", "--checkpoint", str(folder / "classifier.ckpt"), "--output"]
    for kind in ("merged", "peft", "chain"):
        assert main([*words, str(folder / kind), "--format", kind]) == 0
    return folder


REFUSED = [
    (["{c}/classifier.ckpt"], "expected one of a causal language model (COLACausalLM), which generates, received"),
    (["{c}/merged"], "of a RobertaForSequenceClassification"),
    (["{c}/peft"], "an adapter of the task SEQ_CLS"),
    (["{c}/chain"], "a chain folder, whose base is elsewhere"),
    (["{c}/rows"], "checkpoint: expected a checkpoint file, or the folder of a merged model or of a PEFT adapter"),
    (["{c}/merged", "--links", "1"], "links: expected none beside an export"),
    (["{t}", "--links", "9"], "links: expected 0 to 3, the length of the chain, received 9"),
    (["{t}", "--prompt", "It is " * 200], "prompt: expected fewer than 128 tokens, for the model, received"),
    (["{t}", "--promt", "It"], "unrecognized arguments: --promt"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_generate_is_one_line_and_status_2(checkpoint, classifiers, words, message, capfd):
    path, *others = (word.format(c=classifiers, t=checkpoint) for word in words)
    prompt = [] if "--prompt" in others else ["--prompt", "It"]
    assert main(["generate", "--checkpoint", path, *prompt, *others]) == 2
    out, err = capfd.readouterr()
    assert message in err.strip().splitlines()[-1]
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not out


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    assert main(["export", "--checkpoint", str(checkpoint), "--format", "peft", "--output", str(folder / "peft")]) == 0
    return folder / "peft"


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_config.json", cut, "error: adapter: expected adapter_config.json of PEFT in "),
        ("adapter_config.json", lambda path: path.write_text("[]"), "error: adapter: expected adapter_config.json of PEFT in "),
        ("adapter_model.safetensors", cut, "received one that peft cannot load (Error while deserializing"),
        (
            "adapter_model.safetensors",
            Path.unlink,
            "error: adapter: expected adapter_model.safetensors beside adapter_config.json in ",
        ),
        ("tokenizer.json", cut, "error: adapter: expected a tokenizer that AutoTokenizer can load, received "),
        ("tokenizer.json", Path.unlink, "error: adapter: expected a tokenizer that AutoTokenizer can load, received "),
    ],
)
def test_a_damaged_adapter_is_one_line_and_status_2(adapter, tmp_path, name, damage, message, capfd):
    shutil.copytree(adapter, tmp_path / "peft")
    damage(tmp_path / "peft" / name)
    assert main(["generate", "--checkpoint", str(tmp_path / "peft"), "--prompt", "It"]) == 2
    out, err = capfd.readouterr()
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not out


def test_a_cut_adapter_of_the_old_format_is_one_line_and_status_2(adapter, tmp_path, capfd):
    shutil.copytree(adapter, tmp_path / "peft")
    tensors = tmp_path / "peft" / "adapter_model.safetensors"
    torch.save(load_file(tensors), tmp_path / "peft" / "adapter_model.bin")
    tensors.unlink()
    assert main(["generate", "--checkpoint", str(tmp_path / "peft"), "--prompt", "It", "--max_new_tokens", "1"]) == 0
    capfd.readouterr()
    cut(tmp_path / "peft" / "adapter_model.bin")
    assert main(["generate", "--checkpoint", str(tmp_path / "peft"), "--prompt", "It"]) == 2
    out, err = capfd.readouterr()
    assert "received one that peft cannot load (" in err.strip().splitlines()[-1]
    assert not out


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks each model for it
def test_an_adapter_whose_layers_are_not_in_the_model_is_refused(checkpoint, tmp_path, capfd):
    base = COLACausalLM.load_from_checkpoint(checkpoint).merged_model(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    assert main(["generate", "--checkpoint", str(tmp_path / "peft"), "--prompt", "It"]) == 2
    assert "adapter: expected one of layers, such as a LoRA, in " in capfd.readouterr().err


def test_it_is_in_the_help(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    assert main(["generate", "--help"]) == 0
    assert "--max_new_tokens" in capfd.readouterr().out
    assert not Path("runs").exists()
