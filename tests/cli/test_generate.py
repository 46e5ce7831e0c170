"""``cola generate``: what it prints is what predict writes, of a checkpoint; each mistake is one line."""

import functools
import io
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_lightning import COLACausalLM, PredictionWriter, TextDataModule
from cola_lightning.cli import main
from cola_lightning.cli.generate import make_streamer
from cola_lightning.decoding import Decoding
from tests.helpers import tiny
from tests.helpers.tiny import CHAT_IN_A_LINE as CHAT
from tests.helpers.toy import trainer

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
PROMPTS = ["Is the town old? ", "A film with great actors", "Yes, the river is long\n"]
KINDS = {"chat": (CHAT, None), "template unused": (CHAT, False), "no template": (None, None)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a checkpoint of two links, and what predict writes with it; each kind once."""

    @functools.cache
    def make(kind):
        folder, (chat, chat_template) = tmp_path_factory.mktemp("trained"), KINDS[kind]
        name = tiny.folder(folder / "model", "llama", max_position_embeddings=128)
        tiny.chat_tokenizer(chat).save_pretrained(name)
        module = tiny.three_links(COLACausalLM(name, target_modules=["q_proj", "v_proj"], rank=4, seed=0))
        source = tiny.write_rows(folder / "rows", [{"prompt": prompt, "response": "It is."} for prompt in PROMPTS])
        data = TextDataModule(source, max_new_tokens=8, batch_size=2, chat_template=chat_template)
        run = trainer(folder, max_steps=1)
        run.fit(module, datamodule=data)
        run.save_checkpoint(folder / "last.ckpt")
        trainer(folder, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
        return folder / "last.ckpt", [row["prediction"] for row in tiny.read_rows(folder / "predictions.jsonl")]

    return make


def printed(capfd, *words):
    assert main(["generate", "--max_new_tokens", "8", *map(str, words)]) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def test_a_torch_for_a_gpu_that_is_not_there_generates_on_the_cpu(trained, capfd, monkeypatch):
    """The default torch of PyPI on Linux, which names its accelerator whether or not there is one."""
    path, predictions = trained("no template")

    def accelerator(*, check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    assert printed(capfd, path, "--prompt", PROMPTS[0]).strip() == predictions[0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_prints_what_predict_writes(trained, capfd, monkeypatch, kind):
    path, predictions = trained(kind)
    for prompt, prediction in zip(PROMPTS, predictions, strict=True):
        assert printed(capfd, path, "--prompt", prompt).strip() == prediction
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[1] + "\n"))
    assert printed(capfd, path).strip() == predictions[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks each model for it
def test_the_docs_lines_for_exports_print_what_it_prints(trained, tmp_path, monkeypatch, capfd):
    path, _ = trained("no template")
    monkeypatch.chdir(tmp_path)
    for kind, folder in (("merged", "merged"), ("peft", "adapter")):
        assert main(["export", str(path), "--format", kind, "--output", folder]) == 0
    (code,) = re.findall(r"```py\n(.*?)```", DOCS.read_text(), re.DOTALL)
    capfd.readouterr()
    exec(code, names := {})
    merged, adapter = capfd.readouterr().out.splitlines()
    messages = printed(capfd, path, "--prompt", names["prompt"], "--max_new_tokens", "50")
    assert merged.strip() == adapter.strip() == messages.strip()


@pytest.mark.parametrize("links", [5, "jsn"])
def test_links_that_do_not_exist_are_refused_before_the_model_is_loaded(trained, capfd, links):
    path, _ = trained("chat")
    model = path.parent / "model"
    model.rename(path.parent / "elsewhere")
    try:
        assert main(["generate", str(path), "--prompt", "It", "--links", str(links)]) == 2
    finally:
        (path.parent / "elsewhere").rename(model)
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: links: ")


def test_links_sampling_and_stops(trained, capfd):
    path, predictions = trained("chat")
    requested = [path, "--prompt", PROMPTS[1]]
    assert printed(capfd, *requested, "--links", 3) == printed(capfd, *requested) != printed(capfd, *requested, "--links", 0)
    sampled = [printed(capfd, *requested, "--do_sample", "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    stop = predictions[1][2:4]
    assert printed(capfd, *requested, "--stop", "no such text", stop).strip() == predictions[1].partition(stop)[0].strip()


@pytest.mark.parametrize("kind", ["chat", "template unused"])
def test_a_conversation_goes_on_up_to_an_empty_line(trained, capfd, monkeypatch, kind):
    path, _ = trained(kind)
    module = COLACausalLM.load_from_checkpoint(path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is it?\nThe cat\n\nnever read\n"))
    first, second = printed(capfd, path, "--chat").splitlines()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    alone = printed(capfd, path, "--chat", "--prompt", "Is it?").strip()
    assert first.strip() == alone
    ids = module.tokenizer(f"[user]Is it?</s>[assistant]{alone}</s>[user]The cat</s>[assistant]", add_special_tokens=False)
    batch = {"prompt_ids": torch.tensor([ids["input_ids"]]), "prompt_mask": torch.ones(1, len(ids["input_ids"])).long()}
    assert module.eval().generate(batch | {"decoding": vars(Decoding(8))}) == [second.strip()]


def test_a_conversation_that_is_longer_than_the_context_ends_in_one_line(trained, capfd, monkeypatch):
    path, _ = trained("chat")
    messages = [f"{name} is the largest town of the country, and the town is old." for name in "abcdef"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(messages)))
    assert main(["generate", str(path), "--chat", "--max_new_tokens", "8"]) == 2
    out, err = capfd.readouterr()
    assert 0 < len(out.splitlines()) < len(messages)
    assert err.strip().splitlines()[-1].startswith("error: prompt: must have fewer than 128 tokens")


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(text=st.text("ab #", max_size=12), stops=st.lists(st.text("ab #", min_size=1, max_size=4), max_size=2))
def test_what_is_printed_of_a_stop_is_nothing(text, stops):
    printed, own = [], tiny.tokenizer("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, end, flush: printed.append(text + end))
        streamer = make_streamer(own, Decoding(stop=tuple(stops)))
        streamer.put(torch.tensor([[5, 6]]))  # the prompt
        for token in own(text)["input_ids"]:
            streamer.put(torch.tensor([token]))
        streamer.end()
    text = text.lstrip()
    assert "".join(printed) == min([text, *(text.partition(stop)[0] for stop in stops)], key=len) + "\n"


def test_a_prompt_without_room_and_a_chat_without_a_template_are_one_line_and_status_2(trained, capfd):
    path, _ = trained("no template")
    for words, message in [
        (["--prompt", "It is " * 200], "prompt: must have fewer than 128 tokens"),
        (["--chat"], "chat: the model's tokenizer has no chat template"),
    ]:
        assert main(["generate", str(path), *words]) == 2
        out, err = capfd.readouterr()
        assert err.strip().splitlines()[-1].startswith(f"error: {message}")
        assert not out
