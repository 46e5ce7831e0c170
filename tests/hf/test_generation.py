"""Generated answers: against a plain greedy loop, and what a run does with them."""

from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import AddedToken

from cola_lightning import COLACausalLM, PredictionWriter, PromptDataModule, TemplateDataModule, TextDataModule, UserError
from cola_lightning.chat_template import ChatTemplate
from cola_lightning.data.batch import PromptRow, collate_prompts
from cola_lightning.data.examples import Example, collate_options, encode_examples
from cola_lightning.decoding import Decoding
from tests.helpers import tiny
from tests.helpers.tiny import CHAT_IN_A_LINE as CHAT
from tests.helpers.toy import trainer

PROMPTS = ["It", "A film with great actors", "Is the town old?", "The cat sat on the mat.", "Yes, the river is long", "No"]


@pytest.fixture
def llama(tmp_path):
    return tiny.with_live_link(tiny.causal_lm(tmp_path)).eval()


def answers_to(module, prompts=PROMPTS):
    """A batch of prompts, each of which is answered by a line."""
    examples = [Example(prompt, (" x\n",), 0, references=("x",)) for prompt in prompts]
    return collate_options(encode_examples(module.tokenizer, examples, 64), module.tokenizer.pad_token_id, "answer")


def responses_to(module, decoding, ends=(), prompts=PROMPTS):
    """A batch of prompts, each of which is followed by a text."""
    rows = [PromptRow(module.tokenizer(prompt)["input_ids"], prompt, None) for prompt in prompts]
    return collate_prompts(rows, module.tokenizer.pad_token_id, decoding, list(ends))


@torch.no_grad()
def plain(module, prompt, n_tokens=50, ends=(), *, is_line=False, **options):
    """Greedy, without a cache and without padding: the text, and how many tokens were generated."""
    ids = module.tokenizer(prompt, **options)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + n_tokens:
        ids.append(int(module.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in (module.tokenizer.eos_token_id, *ends) or (is_line and "\n" in module.tokenizer.decode(ids[-1:])):
            break
    text = module.tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    return (text.split("\n")[0] if is_line else text).strip(), len(ids) - n_prompt


@contextmanager
def ending_by_chance(module, *tokens):
    """Lets a model write tokens now and then, by what its hidden state is; tells how often the head was asked."""
    requested = []

    def hook(_, inputs, logits):
        requested.append(len(logits))
        logits[..., tokens] += 100 * (torch.sin(10 * inputs[0][..., :1]) > 0.8)

    handle = module.model.get_output_embeddings().register_forward_hook(hook)
    yield requested
    handle.remove()


@pytest.mark.parametrize(("architecture", "end"), [("opt", ""), ("llama", "\n"), ("llama", "</s>"), ("llama", "town\nhall")])
def test_a_batchs_answers_are_those_of_a_plain_greedy_loop_and_end_with_a_line_or_the_text(tmp_path, architecture, end):
    """Whatever the model's own settings."""
    module = tiny.with_live_link(tiny.causal_lm(tmp_path, architecture)).eval()
    own = {"do_sample": True, "temperature": 9.0, "num_beams": 4, "repetition_penalty": 9.0, "min_new_tokens": 9}
    module.model.generation_config.update(**own)
    module.tokenizer.add_tokens(["town\nhall"])
    with ending_by_chance(module, *module.tokenizer(end, add_special_tokens=False)["input_ids"]) as requested:
        texts, lengths = zip(*(plain(module, prompt, is_line=True) for prompt in PROMPTS), strict=True)
        assert min(lengths) < max(lengths) if end else max(lengths) == 50
        requested.clear()
        assert module.generate(answers_to(module)) == list(texts)
        assert len(requested) == max(lengths)
        assert module.generate(answers_to(module, PROMPTS[:1])) == [texts[0]]


def test_a_batchs_responses_are_those_of_a_plain_greedy_loop_and_end_before_a_stop(llama):
    (newline,) = llama.tokenizer("\n", add_special_tokens=False)["input_ids"]
    with ending_by_chance(llama, newline) as requested:
        texts = [plain(llama, prompt, 20)[0] for prompt in PROMPTS]
        assert any("\n" in text for text in texts)
        assert llama.generate(responses_to(llama, Decoding(20))) == texts
        stops = texts[0][3:6], texts[1][4:6], "no such text"
        stopped = llama.generate(responses_to(llama, Decoding(20, stop=stops)))
        assert stopped == [min((text.split(stop)[0] for stop in stops), key=len).strip() for text in texts]
        assert len(set(map(len, stopped))) > 2
        lengths = [plain(llama, prompt, 20, [newline])[1] for prompt in PROMPTS]
        assert min(lengths) < max(lengths)
        requested.clear()
        llama.generate(responses_to(llama, Decoding(20), [newline]))  # a token that ends a turn
        assert len(requested) == max(lengths)


def test_an_end_of_turn_that_is_no_special_token_is_no_part_of_the_response(llama):
    own = tiny.chat_tokenizer(tiny.CHAT.replace("eos_token", "'<|end|>'"))
    own.add_tokens([AddedToken("<|end|>", special=False)])
    (end,) = ChatTemplate(own).stop_tokens
    assert end not in own.all_special_ids
    llama.tokenizer = own
    with ending_by_chance(llama, end):
        texts = [plain(llama, prompt, 20, [end])[0] for prompt in PROMPTS]
        assert any("<|end|>" in text for text in texts)
        expected = [text.removesuffix("<|end|>").strip() for text in texts]
        assert llama.generate(responses_to(llama, Decoding(20), [end])) == expected


def test_samples_follow_from_the_seed_the_temperature_and_top_p(llama):
    greedy = llama.generate(responses_to(llama, Decoding(8)))

    def sampled(seed, **options):
        torch.manual_seed(seed)
        return llama.generate(responses_to(llama, Decoding(8, do_sample=True, **options)))

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1) != greedy
    assert sampled(1, temperature=1e-4) == sampled(1, top_p=1e-4) == greedy
    torch.manual_seed(0)  # whatever a model's own file says of top_k, and transformers' 50
    assert len(set(llama.generate(responses_to(llama, Decoding(1, True, 1e4), prompts=["It"] * 200)))) > 60


def test_a_module_that_was_just_fitted_generates_without_dropout(tmp_path):
    module = tiny.with_live_link(tiny.causal_lm(tmp_path, dropout=0.9)).train()
    assert len({module.generate(responses_to(module, Decoding(8), prompts=["Is the town"]))[0] for _ in range(4)}) == 1
    assert module.model.training


ANSWERS = {"Who is 0?": ["Al"], "Who is 1?": ["Di", "the Di"], "Who is 2?": ["Bo Ek"], "Who is 3?": ["Al"], "Who is 4?": ["Al"]}
TOLD = dict(zip(ANSWERS, ["al.", "Di", "Bo", "", "Di Al"], strict=True))
F1 = dict(zip(ANSWERS, [1, 1, 2 / 3, 0, 2 / 3], strict=True))


def question_of(prompt):
    return prompt.removeprefix("Title: T\nContext: C\nQuestion: ").removesuffix("\nAnswer:")


SQUAD = [{"title": "T", "context": "C", "question": one, "answers": {"text": some}} for one, some in ANSWERS.items()]


class Told(COLACausalLM):
    """Its answers are known."""

    def generate(self, batch):
        requested = batch["prompt"][: len(batch["references"])]
        assert len(super().generate(batch)) == len(requested)
        return [TOLD[question_of(prompt)] for prompt in requested]


def told(path, **options):
    sizes = {"train_size": 1, "val_size": 4, "test_size": 5, "batch_size": 2}
    squad = PromptDataModule("SQuAD", tiny.write_rows(path / "squad", SQUAD), **sizes)
    return Told(tiny.folder(path / "model", "opt"), target_modules=["q_proj"], rank=2, seed=0, **options), squad


def test_a_fit_computes_the_loss_alone_and_what_follows_it_measures_and_writes_the_answers(tmp_path):
    module, squad = told(tmp_path)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=squad)
    assert set(run.callback_metrics) == {"train_loss", "val_loss"}
    for _ in range(2):  # nothing is left of the first
        (measured,) = run.validate(module, datamodule=squad, verbose=False)
        assert set(measured) == {"val_loss", "val_f1", "val_exact_match"}
        assert measured["val_f1"] == pytest.approx(sum(F1[question_of(row.example.prompt)] for row in squad.val) / 4)
    (measured,) = run.test(module, datamodule=squad, verbose=False)
    assert measured["test_f1"] == pytest.approx(sum(F1.values()) / 5)
    assert measured["test_exact_match"] == pytest.approx(2 / 5)
    trainer(tmp_path, PredictionWriter()).predict(module, datamodule=squad)
    found = tiny.read_rows(tmp_path / "predictions.jsonl")
    assert [row["index"] for row in found] == [0, 1, 2, 3, 4]
    for row in found:
        assert set(row) == {"index", "prediction", "target", "prompt", "title", "context", "question", "answers"}
        question = question_of(row["prompt"])
        assert (row["prediction"], row["target"]) == (TOLD[question], ANSWERS[question])


def test_a_fit_generates_answers_by_which_a_checkpoint_can_be_chosen(tmp_path):
    module, squad = told(tmp_path, generate_in_validation=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_f1", mode="max")
    run = trainer(tmp_path, best, max_epochs=1, enable_checkpointing=True)
    run.fit(module, datamodule=squad)
    assert best.best_model_score == pytest.approx(sum(F1[question_of(row.example.prompt)] for row in squad.val) / 4)
    losses = float(run.callback_metrics["val_loss"]), run.validate(module, datamodule=squad, verbose=False)[0]["val_loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_predict_writes_responses_that_follow_from_the_seed(tmp_path):
    rows = [{"prompt": f"Is town {k} old? " * (k + 1), "response": "Yes"} for k in range(3)] + [{"prompt": "Is it?"}]
    tiny.write_rows(tmp_path, rows, ["validation"])
    name = tiny.folder(tmp_path / "model", "llama", max_position_embeddings=128)

    def predicted(chat=None, seed=0, **options):
        module = COLACausalLM(name, target_modules=["q_proj"], rank=2, seed=seed)
        module.tokenizer.chat_template = chat
        data = TextDataModule(str(tmp_path), batch_size=2, max_new_tokens=6, **options)
        trainer(tmp_path, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
        return module, tiny.read_rows(tmp_path / "predictions.jsonl")

    for chat in (CHAT, None):
        module, greedy = predicted(chat)
        for k, (found, row) in enumerate(zip(greedy, rows, strict=True)):
            prompt = f"[user]{row['prompt']}</s>[assistant]" if chat else f"<s>{row['prompt'].rstrip()}"
            text, _ = plain(module, prompt, 6, add_special_tokens=False)
            expected = {"index": k, "prediction": text, "target": row.get("response"), "prompt": row["prompt"]}
            assert found == {**expected, "response": row.get("response")}
    (_, sampled), (_, again), (_, other) = (predicted(seed=seed, do_sample=True) for seed in (0, 0, 1))
    assert sampled == again
    assert sampled not in (greedy, other)


@pytest.mark.parametrize("kind", ["text", "template"])
def test_a_row_without_a_usable_prompt_has_no_prediction_and_says_why(tmp_path, kind):
    rows = [{"prompt": f"Is town {k} old?" * (k + 1), "response": "Yes", "label": k % 2} for k in range(6)]
    rows[0]["prompt"] = rows[4]["prompt"] = None
    for name, some in (("a", rows), ("b", rows[3:])):
        tiny.write_rows(tmp_path / name, some, ["train"])
    sources = [str(tmp_path / name / "train.jsonl") for name in ("a", "b")]
    if kind == "text":
        data = TextDataModule(sources, eval_batch_size=2, max_new_tokens=3)
    else:
        data = TemplateDataModule(sources, prompt="{prompt}", options=["no", "yes"], eval_batch_size=2)
    module, expected = tiny.causal_lm(tmp_path), [*rows, *rows[3:]]
    trainer(tmp_path, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
    written = tiny.read_rows(tmp_path / "predictions.jsonl")
    assert [row["index"] for row in written] == list(range(9))
    assert [(row["prompt"], row["label"]) for row in written] == [(row["prompt"], row["label"]) for row in expected]
    without = {row["index"]: row["reason"] for row in written if row["prediction"] is None}
    assert without == dict.fromkeys((0, 4, 7), "the field 'prompt' is null, not text")
    # Predictions that are returned have no index: one that is missing would shift the others.
    with pytest.raises(UserError, match=r"3 of 9 rows have no prediction \(.*row 0 \(counted from 0\)\)\. .*PredictionWriter"):
        trainer(tmp_path).predict(module, datamodule=data)
