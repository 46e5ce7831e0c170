"""Generated answers: against a plain greedy loop, their measures by hand, and the loss of those that are learned."""

import json
from contextlib import contextmanager

import pytest
import torch
import transformers
from tokenizers import AddedToken

from cola_lightning import COLACausalLM, Example, PredictionWriter, PromptDataModule, TextDataModule, UserError
from cola_lightning.chat_template import ChatTemplate
from cola_lightning.cli.generate import make_streamer
from cola_lightning.data.encoding import PromptRow, collate_prompts
from cola_lightning.data.examples import collate_options, encode_examples
from cola_lightning.decoding import Decoding
from cola_lightning.hf.logits import takes_mask_of_pairs
from cola_lightning.hf.metrics import ANSWER_METRICS
from tests import tiny
from tests.toy import trainer

PROMPTS = ["It", "A film with great actors", "Is the town old?", "The cat sat on the mat.", "Yes, the river is long", "No"]


def written(prompt, *references):
    return Example(prompt, (f" {references[0]}\n",), 0, references=references)


def with_live_link(module):
    """In evaluation, too."""
    return tiny.with_live_link(module).eval()


@pytest.fixture(params=["opt", "llama", "gpt2"])
def module(request, tmp_path):
    name = tiny.folder(tmp_path / "model", request.param)
    return with_live_link(COLACausalLM(name, target_modules=tiny.targets(request.param), rank=2, alpha=4, seed=0))


def batch_of(module, examples, loss="answer", max_length=64):
    return collate_options(encode_examples(module.tokenizer, examples, max_length), module.tokenizer.pad_token_id, loss)


@torch.no_grad()
def plain_answer(module, prompt):
    """Greedy, without a cache and without padding: its text, and how many tokens were written."""
    ids = module.tokenizer(prompt)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + 50:
        ids.append(int(module.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == module.tokenizer.eos_token_id or "\n" in module.tokenizer.decode(ids[-1:]):
            break
    text = module.tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)
    return text.split("\n")[0].strip(), len(ids) - n_prompt


@contextmanager
def ending_by_chance(module, token):
    """Lets a model write a token now and then, by what its hidden state is; tells how often the head was asked."""
    asked = []

    def hook(_, inputs, logits):
        asked.append(len(logits))
        logits[..., token] += 100 * (torch.sin(10 * inputs[0][..., 0]) > 0.8)

    handle = module.model.get_output_embeddings().register_forward_hook(hook)
    yield asked
    handle.remove()


def test_a_batchs_answers_are_those_of_a_plain_greedy_loop(module):
    batch = batch_of(module, [written(prompt, "x") for prompt in PROMPTS])
    assert batch["prompt_mask"].sum(-1).unique().numel() > 3
    plain = [plain_answer(module, prompt) for prompt in PROMPTS]
    assert max(length for _, length in plain) == 50
    assert module.generate(batch) == [text for text, _ in plain]
    assert [module.generate(batch_of(module, [written(prompt, "x")]))[0] for prompt in PROMPTS] == [text for text, _ in plain]


@pytest.mark.parametrize("end", ["\n", "</s>", "town\nhall"])
def test_an_answer_ends_at_a_lines_end_or_the_texts(module, end):
    module.tokenizer.add_tokens(["town\nhall"])
    (token,) = module.tokenizer(end, add_special_tokens=False)["input_ids"]
    batch = batch_of(module, [written(prompt, "x") for prompt in PROMPTS])
    with ending_by_chance(module, token) as asked:
        texts, lengths = zip(*(plain_answer(module, prompt) for prompt in PROMPTS), strict=True)
        assert 1 <= min(lengths) < max(lengths)
        asked.clear()
        assert module.generate(batch) == list(texts)
        assert len(asked) == max(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 4},
        {"repetition_penalty": 9.0},
        {"min_new_tokens": 9},
    ],
    ids=str,
)
def test_a_models_own_settings_of_generation_do_not_count(tmp_path, settings):
    name = tiny.folder(tmp_path / "model", "opt")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    module = with_live_link(COLACausalLM(name, rank=2, seed=0))
    (newline,) = module.tokenizer("\n", add_special_tokens=False)["input_ids"]
    with ending_by_chance(module, newline):
        plain = [plain_answer(module, prompt)[0] for prompt in PROMPTS]
        assert module.generate(batch_of(module, [written(prompt, "x") for prompt in PROMPTS])) == plain


def test_a_compiled_model_is_not_compiled_anew_to_write(module):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    batch = batch_of(module, [written(prompt, "x") for prompt in PROMPTS])
    plain = module.generate(batch)
    module.should_compile = True
    module.model.compile(backend=backend)
    assert module.generate(batch) == plain
    assert not compiled
    module.option_scores(batch)
    assert compiled


def test_a_long_prompt_leaves_room_for_the_answer(module):
    long = "The capital of the country is the largest town. " * 20
    batch = batch_of(module, [written(long, "x"), written("It", "x")])
    assert batch["prompt_ids"].shape == (2, 14)
    ids = module.tokenizer(long.rstrip())["input_ids"]
    bos = ids[:1] if ids[0] == 0 else []
    assert batch["prompt_ids"][0].tolist() == bos + ids[len(ids) - 14 + len(bos) :]
    assert len(module.generate(batch)) == 2


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])  # with a beginning of sentence, which stays, and without
def test_what_is_learned_leaves_that_room_too_as_in_the_protocol(architecture):
    tokenizer = tiny.tokenizer(architecture)
    long = written("The capital of the country is the largest town. " * 20 + "Answer:", "the town", "a town")
    short = written("It", "x")
    whole = tokenizer(long.prompt + long.options[0])["input_ids"]
    bos = whole[:1] if whole[0] == 0 else []
    for is_learned in (True, False):  # in training, and in validation
        cut, other = encode_examples(tokenizer, [long, short], 80, is_learned=is_learned)
        received = cut.prefixes[0] + cut.option_ids[0][-1:]
        assert received == bos + whole[len(whole) - 30 + len(bos) :]
        assert other.prefixes[0] + other.option_ids[0][-1:] == tokenizer("It x\n")["input_ids"]
        assert bool(cut.prompt_ids) is not is_learned
    chosen = Example(long.prompt, long.options, 0)  # nothing is generated: all of the room
    (cut,) = encode_examples(tokenizer, [chosen], 80)
    assert len(cut.prefixes[0]) == 79
    n_option = len(encode_examples(tokenizer, [long], 120)[0].option_ids[0])
    with pytest.raises(UserError, match=rf"fewer than {n_option} tokens \(data.max_length less 50, for an answer is gen"):
        encode_examples(tokenizer, [long], 50 + n_option, is_learned=True)


def prompts_of(module, decoding, ends=(), prompts=PROMPTS):
    rows = [PromptRow(module.tokenizer(prompt)["input_ids"], prompt, None) for prompt in prompts]
    return collate_prompts(rows, module.tokenizer.pad_token_id, decoding, list(ends))


@torch.no_grad()
def plain_text(module, prompt, n_tokens, ends=(), **how):
    """Greedy, without a cache and without padding, over lines' ends."""
    ids = module.tokenizer(prompt, **how)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + n_tokens:
        ids.append(int(module.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in (module.tokenizer.eos_token_id, *ends):
            break
    return module.tokenizer.decode(ids[n_prompt:], skip_special_tokens=True), len(ids) - n_prompt


def test_a_batchs_responses_are_those_of_a_plain_greedy_loop_and_end_before_a_stop(module):
    (newline,) = module.tokenizer("\n", add_special_tokens=False)["input_ids"]
    with ending_by_chance(module, newline) as asked:
        plain = [plain_text(module, prompt, 20)[0] for prompt in PROMPTS]
        assert any("\n" in text.strip() for text in plain)
        assert module.generate(prompts_of(module, Decoding(20))) == [text.strip() for text in plain]
        stops = plain[0][3:6], plain[1][4:6], "no such text"
        stopped = module.generate(prompts_of(module, Decoding(20, stop=stops)))
        assert stopped == [min((text.split(stop)[0] for stop in stops), key=len).strip() for text in plain]
        assert len(set(map(len, stopped))) > 2
        lengths = [plain_text(module, prompt, 20, [newline])[1] for prompt in PROMPTS]
        assert min(lengths) < max(lengths)
        asked.clear()
        module.generate(prompts_of(module, Decoding(20), [newline]))  # a token that ends a turn
        assert len(asked) == max(lengths)


def test_an_end_of_turn_that_is_no_special_token_is_no_part_of_the_response(tmp_path, capsys):
    own = tiny.tokenizer(pad=True)
    own.add_tokens([AddedToken("<|end|>", special=False)])
    own.chat_template = tiny.CHAT.replace("eos_token", "'<|end|>'")
    (end,) = ChatTemplate(own).stop_tokens
    assert end not in own.all_special_ids
    module = with_live_link(COLACausalLM(tiny.folder(tmp_path / "model"), target_modules=["q_proj"], rank=2, seed=0))
    module.tokenizer = own
    with ending_by_chance(module, end):
        plain = [plain_text(module, prompt, 20, [end])[0] for prompt in PROMPTS]
        assert any("<|end|>" in text for text in plain)
        expected = [text.removesuffix("<|end|>").strip() for text in plain]
        assert module.generate(prompts_of(module, Decoding(20), [end])) == expected
        for prompt, text in zip(PROMPTS, expected, strict=True):
            batch = prompts_of(module, Decoding(20), [end], prompts=[prompt])
            module.generate(batch, make_streamer(own, Decoding(20)))
            assert capsys.readouterr().out.strip() == text


def test_samples_follow_from_the_seed_the_temperature_and_top_p(module):
    greedy = module.generate(prompts_of(module, Decoding(8)))

    def sampled(seed, **how):
        torch.manual_seed(seed)
        return module.generate(prompts_of(module, Decoding(8, do_sample=True, **how)))

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1) != greedy
    assert sampled(1, temperature=1e-4) == greedy
    assert sampled(1, top_p=1e-4) == greedy
    torch.manual_seed(0)  # whatever a model's own file says of top_k, and transformers' 50
    with torch.no_grad():
        flat = set(module.generate(prompts_of(module, Decoding(1, True, 1e4), prompts=["It"] * 200)))
    assert len(flat) > 60


MEASURED = [  # what is written, what should be, F1, exact match
    ("The Cat.", ["cat"], 1, 1),
    ("  two   towns ", ["two towns"], 1, 1),
    ("U.S.A", ["usa"], 1, 1),
    ("an apple a day", ["the apple day"], 1, 1),
    ("a cat sat", ["cat sat down"], 4 / 5, 0),  # 2 of 2 words, 2 of 3
    ("no no, no", ["No"], 1 / 2, 0),  # 1 of 3 words, 1 of 1
    ("no no", ["no no yes"], 4 / 5, 0),
    ("blue", ["red sky", "Blue sky", "green"], 2 / 3, 0),
    ("green", ["red sky", "a green!"], 1, 1),
    ("twenty-one", ["twenty one"], 0, 0),  # punctuation goes without a blank in its place
    ("", ["cat"], 0, 0),
    ("cat", [""], 0, 0),
    ("", ["cat", "the"], 1, 1),
    ("naïve", ["naive", "NAÏVE"], 1, 1),
]


@pytest.mark.parametrize(("text", "references", "f1", "exact"), MEASURED)
def test_answers_are_measured_as_by_hand(text, references, f1, exact):
    for name, expected in (("f1", f1), ("exact_match", exact)):
        metric = ANSWER_METRICS[name]()
        metric.update([text], [references])
        assert metric.compute().item() == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [[14], [9, 5], [1] * 14])
def test_measures_are_means_over_rows_whatever_the_batches(sizes):
    metrics, rows = [make() for make in ANSWER_METRICS.values()], iter(MEASURED)
    for size in sizes:
        texts, references, *_ = zip(*(next(rows) for _ in range(size)), strict=True)
        for metric in metrics:
            metric.update(list(texts), list(references))
    means = [(7 + 2 * 4 / 5 + 1 / 2 + 2 / 3) / 14, 7 / 14]
    assert [metric.compute().item() for metric in metrics] == pytest.approx(means)


def test_scores_of_options_whose_number_differs_are_those_of_plain_forwards(module):
    examples = [
        Example("The film was long so ", ("it was terrible.", "I sat."), 1),
        Example("The mat\n-", (" The mat is old", " The town is old", " No", " It is one of the oldest"), 0, accepted=(0, 3)),
        Example("Is it?", (" Yes",), 0),
    ]
    scores = module.option_scores(batch_of(module, examples))
    assert torch.isinf(scores).tolist() == [[False, False, True, True], [False] * 4, [False, True, True, True]]
    for row, example in zip(scores, examples, strict=True):
        expected = tiny.plain_scores(module, example).tolist()
        assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_a_model_of_few_tokens_is_tried_out_within_them():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=5, **tiny.BODY, num_key_value_heads=2))
    assert takes_mask_of_pairs(model)


def test_a_module_that_was_just_fitted_generates_without_dropout(tmp_path):
    name = tiny.folder(tmp_path / "model", "opt", dropout=0.5)
    module = COLACausalLM(name, target_modules=["q_proj"], rank=2, dropout=0.5, seed=0).train()
    batch = {"prompt_ids": torch.tensor([[0, 300, 301, 302]]), "prompt_mask": torch.ones(1, 4, dtype=torch.long)}
    batch["decoding"] = {"max_new_tokens": 8}
    assert len({module.generate(batch)[0] for _ in range(4)}) == 1
    assert module.model.training


def test_any_option_that_is_accepted_counts_as_right(module):
    options = (" The mat is old", " The town is old", " No")
    accepted = [(0, 1), (1, 2), (2, 0), (0,), (1,), (2,)]
    output = module.step(batch_of(module, [Example("The mat\n-", options, some[0], accepted=some) for some in accepted]))
    (chosen,) = output.predictions.unique().tolist()
    assert (output.predictions == output.targets).tolist() == [chosen in some for some in accepted]
    assert module.step(batch_of(module, [Example("The mat\n-", options, 1)])).targets.tolist() == [1]


LEARNED = {
    "chosen": [
        Example("The film was great so ", ("it was terrible.", "the cat sat on the mat."), 1),
        Example("The town is old because ", ("I sat on the long, long mat.", "the country is old."), 0),
        Example("The mat\n-", (" The mat is old", " The town is old", " No"), 2, accepted=(2, 0)),
    ],
    "written": [written("Is the town old?\nAnswer:", "Yes", "It is"), written("What is?\nAnswer:", "the largest river")],
}


@pytest.mark.parametrize("kind", LEARNED)
def test_the_loss_of_an_answer_is_hugging_faces_on_its_tokens(module, kind):
    examples = LEARNED[kind]
    whole = [module.tokenizer(example.prompt + example.options[example.answer])["input_ids"] for example in examples]
    starts = [len(module.tokenizer(example.prompt.rstrip(" "))["input_ids"]) for example in examples]
    length = max(map(len, whole))
    labels = [[-100] * n + ids[n:] + [-100] * (length - len(ids)) for n, ids in zip(starts, whole, strict=True)]
    inputs = torch.tensor([ids + [5] * (length - len(ids)) for ids in whole])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in whole])
    theirs = module.model(input_ids=inputs, attention_mask=mask, labels=torch.tensor(labels)).loss
    for rows in (examples, [example.right() for example in examples]):  # as in validation, and in training
        output = module.step(batch_of(module, rows, max_length=114))  # in room for all, 50 tokens less where they are written
        assert output.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
        assert output.size == sum(len(ids) - n for n, ids in zip(starts, whole, strict=True))


ANSWERS = {f"Who is {k}?": answers for k, answers in enumerate([["Al"], ["Di", "the Di"], ["Bo Ek"], ["Al"], ["Al"]])}
TOLD = {f"Who is {k}?": text for k, text in enumerate(["al.", "Di", "Bo", "", "Di Al"])}


class Told(COLACausalLM):
    """Its answers are known."""

    def generate(self, batch):
        assert len(super().generate(batch)) == len(batch["prompt"])
        return [TOLD[prompt.split("Question: ")[1].removesuffix("\nAnswer:")] for prompt in batch["prompt"]]


@pytest.fixture
def squad(tmp_path):
    rows = [{"title": "T", "context": "C", "question": q, "answers": {"text": some}} for q, some in ANSWERS.items()]
    (tmp_path / "squad").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "squad" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"train_size": 4, "val_size": 1, "test_size": 5, "batch_size": 2}
    return PromptDataModule("SQuAD", str(tmp_path / "squad"), **sizes)


def test_a_fit_computes_the_loss_alone_and_validate_and_test_measure_the_answers(tmp_path, squad):
    module = Told(tiny.folder(tmp_path / "model", "opt"), target_modules=["q_proj"], rank=2, seed=0)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=squad)
    assert set(run.callback_metrics) == {"train_loss", "val_loss"}
    (measured,) = trainer(tmp_path).test(module, datamodule=squad, verbose=False)
    assert set(measured) == {"test_loss", "test_f1", "test_exact_match"}
    assert measured["test_f1"] == pytest.approx((1 + 1 + 2 / 3 + 0 + 2 / 3) / 5)
    assert measured["test_exact_match"] == pytest.approx(2 / 5)
    squad.train_size, squad.val_size = 1, 4
    run = trainer(tmp_path)
    for _ in range(2):  # nothing is left of the first
        (measured,) = run.validate(module, datamodule=squad, verbose=False)
        assert set(measured) == {"val_loss", "val_f1", "val_exact_match"}
        shares = {"Who is 0?": 1, "Who is 1?": 1, "Who is 2?": 2 / 3, "Who is 3?": 0, "Who is 4?": 2 / 3}
        drawn = [row.example.prompt.split("Question: ")[1].removesuffix("\nAnswer:") for row in squad.val]
        assert measured["val_f1"] == pytest.approx(sum(shares[question] for question in drawn) / 4)


def test_predict_writes_the_text_and_what_it_should_have_been(tmp_path, squad):
    module = Told(tiny.folder(tmp_path / "model", "opt"), target_modules=["q_proj"], rank=2, seed=0)
    trainer(tmp_path, PredictionWriter()).predict(module, datamodule=squad)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows:
        assert set(row) == {"index", "prediction", "target", "prompt"}
        question = row["prompt"].removeprefix("Title: T\nContext: C\nQuestion: ").removesuffix("\nAnswer:")
        assert (row["prediction"], row["target"]) == (TOLD[question], ANSWERS[question])


TURNS = "{% for turn in messages %}[{{ turn['role'] }}]{{ turn['content'] }}</s>{% endfor %}"
TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.mark.parametrize("chat", [TURNS, None])
def test_predict_writes_responses_that_follow_from_the_seed(tmp_path, chat):
    rows = [{"prompt": f"Is town {k} old? " * (k + 1), "response": "Yes"} for k in range(3)] + [{"prompt": "Is it?"}]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = tiny.folder(tmp_path / "model", "llama", max_position_embeddings=128)

    def predicted(seed=0, **how):
        module = COLACausalLM(name, target_modules=["q_proj"], rank=2, seed=seed)
        module.tokenizer.chat_template = chat
        data = TextDataModule(str(tmp_path), batch_size=2, max_new_tokens=6, **how)
        run = trainer(tmp_path, PredictionWriter())
        run.predict(module, datamodule=data, return_predictions=False)
        return module, [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]

    module, greedy = predicted()
    assert [list(row) for row in greedy] == [["index", "prediction", "target", "prompt"]] * 4
    assert [(row["index"], row["target"], row["prompt"]) for row in greedy] == [
        (k, row.get("response"), row["prompt"]) for k, row in enumerate(rows)
    ]
    for row in greedy:
        prompt = f"[user]{row['prompt']}</s>[assistant]" if chat else f"<s>{row['prompt'].rstrip()}"
        text, _ = plain_text(module, prompt, 6, add_special_tokens=False)
        assert row["prediction"] == text.strip()
    sampled = predicted(do_sample=True)[1]
    assert sampled == predicted(do_sample=True)[1]
    assert [row["prediction"] for row in sampled] != [row["prediction"] for row in greedy]
    assert sampled != predicted(1, do_sample=True)[1]
