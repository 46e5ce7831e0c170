"""Option scores, losses and gradients against a plain forward, and what a run does with them."""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cola_lightning import COLACausalLM, PredictionWriter, TextDataModule, UserError
from cola_lightning.chat_template import Conversation, PlainTemplate, assistant_turn, user_turn
from cola_lightning.data.batch import collate_language, labels_of
from cola_lightning.data.examples import Example, collate_options, encode_examples
from cola_lightning.data.reading import load_splits
from cola_lightning.data.render import TurnEncoder
from cola_lightning.data.tasks import TASKS
from tests.helpers import tiny
from tests.helpers.tiny import assert_same_gradients, causal_lm, plain_scores, with_live_link
from tests.helpers.toy import trainer

ARCHITECTURES = ["opt", "llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt_neox"))]
# In which a mask of pairs of tokens does not keep sequences apart:
WINDOWED = ["gpt_neo", "mistral"]
NOT_APART = ["mistral", "gemma3", "bloom", "falcon"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def module(request, tmp_path_factory):
    return with_live_link(causal_lm(tmp_path_factory.mktemp("model"), request.param))


def option_batch(module, examples, loss="options", max_length=64):
    return collate_options(encode_examples(module.tokenizer, examples, max_length), module.tokenizer.pad_token_id, loss)


EXAMPLES = [
    Example("The film was long and the plot was thin. It was", (" terrible", " great"), 0),
    Example("The cat sat. Is that old?\n", ("Yes", "No", "Maybe"), 2),
    Example("The town", (" is the largest of the country", " is old", "!"), 1),
    Example("Is it?", (" Yes",), 0),
]


def test_option_scores_losses_and_gradients_are_those_of_plain_forwards(module):
    batch = option_batch(module, EXAMPLES)
    plain = [plain_scores(module, example) for example in EXAMPLES]
    for mine, theirs in zip(module.option_scores(batch), plain, strict=True):
        assert mine[: len(theirs)].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
        assert torch.isneginf(mine[len(theirs) :]).all()
    losses = [F.cross_entropy(s[None], torch.tensor([e.answer])) for s, e in zip(plain, EXAMPLES, strict=True)]
    loss, output = torch.stack(losses).mean(), module.step(batch)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert output.predictions.tolist() == [int(s.argmax()) for s in plain]
    assert_same_gradients(module, output.loss, loss)
    lengths = [[(ids != -100).sum() for ids in row] for row in batch["option_ids"]]
    right = [(s[e.answer], row[e.answer]) for s, e, row in zip(plain, EXAMPLES, lengths, strict=True)]
    of_answers = -sum(score * n for score, n in right) / sum(n for _, n in right)  # the mean over the right options' tokens
    for examples in (EXAMPLES, [example.right() for example in EXAMPLES]):  # as in validation, and in training
        output = module.step(option_batch(module, examples, "answer"))
        assert output.loss.item() == pytest.approx(of_answers.item(), abs=1e-5)
        assert output.size == sum(n for _, n in right)


MANY = [
    Example("The town is old and the river is long. " * 3, tuple(f" The {k} is the {'old ' * k}town" for k in range(7)), 3),
    Example("A film", (" great", " terrible plot and great actors", "."), 1),
    Example("The capital of the country is the largest town.", (" The town", " The capital", " The country is old"), 2),
]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WINDOWED])
@torch.no_grad()
def test_many_options_have_the_scores_of_one_at_a_time(tmp_path, architecture):
    module = with_live_link(causal_lm(tmp_path, architecture)).eval()
    for mine, example in zip(module.option_scores(option_batch(module, MANY)), MANY, strict=True):
        theirs = plain_scores(module, example)
        assert mine[: len(theirs)].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def smollm2():
    module = COLACausalLM(**tiny.SMOLLM2, target_modules=["q_proj", "v_proj"], seed=0)
    return with_live_link(module).eval()


@tiny.needs_smollm2
@pytest.mark.slow
@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
@pytest.mark.parametrize("task", ["SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "COPA", "ReCoRD"])
@torch.no_grad()
def test_scores_of_real_rows_on_smollm2_are_those_of_one_option_at_a_time(smollm2, task):
    rows = load_splits(str(Path(os.environ["COLA_DATA_DIR"], task.lower())))["validation"]()[:20]
    examples = [TASKS[task].example(row) for row in rows]
    for start in range(0, 20, 8):
        batch = option_batch(smollm2, examples[start : start + 8], max_length=512)
        for mine, example in zip(smollm2.option_scores(batch), examples[start:], strict=False):
            expected = plain_scores(smollm2, example, 512).tolist()
            assert mine[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
            assert int(mine.argmax()) == max(range(len(expected)), key=expected.__getitem__)


def responses(module, pairs):
    """Prompts with their responses, as rows."""
    talks = [Conversation([*user_turn(prompt), assistant_turn(response)], trained=(1,)) for prompt, response in pairs]
    return [row for (row,) in TurnEncoder(PlainTemplate(module.tokenizer), 64, set()).conversations(talks)]


def test_only_positions_with_a_loss_go_through_the_head_and_options_of_one_token_share_them(module):
    seen = []
    head = module.model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[1][0].shape[:2]))
    module.step(option_batch(module, [Example(prompt, (" great", " terrible"), 0) for prompt in ("The film. It was", "A")]))
    rows = responses(module, [("Is the town old? ", "Yes"), ("Is it? ", "Yes")])
    module.step(collate_language(rows, 1))
    head.remove()
    assert seen == [(2, 1), (2, sum(label != -100 for label in labels_of(rows[0])))]


def test_any_option_that_is_accepted_counts_as_right(tmp_path):
    module, options = with_live_link(causal_lm(tmp_path)), (" The mat is old", " The town is old", " No")
    accepted = [(0, 1), (1, 2), (2, 0), (0,), (1,), (2,)]
    output = module.step(option_batch(module, [Example("The mat\n-", options, some[0], accepted=some) for some in accepted]))
    (chosen,) = output.predictions.unique().tolist()
    assert (output.predictions == output.targets).tolist() == [chosen in some for some in accepted]


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_the_language_loss_is_hugging_faces_on_whichever_side_a_batch_is_padded(module, loss_on):
    pairs = [("Is the town old? ", "Yes"), ("Is the river long and is the mat old? ", "No"), ("A", " town")]
    rows = responses(module, pairs)
    if loss_on == "all":  # the first token of a row, too, which follows on padding in a batch
        rows = [row | {"spans": [0, len(row["input_ids"])]} for row in rows]
    ids, labels = ([torch.tensor(one(row)) for row in rows] for one in (lambda row: row["input_ids"], labels_of))
    assert len({len(one) for one in ids}) == 3
    pad = module.tokenizer.pad_token_id
    right = {"input_ids": pad_sequence(ids, True, pad), "labels": pad_sequence(labels, True, -100)}
    right["attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], True)
    theirs = module.model(**right).loss
    for batch in (right, collate_language(rows, pad)):
        output = module.step(batch)
        assert output.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
        assert output.size == int((right["labels"][:, 1:] != -100).sum())
        assert_same_gradients(module, output.loss, module.model(**right).loss)
    nothing = module.step({"input_ids": right["input_ids"], "labels": torch.full_like(right["labels"], -100)})  # without a mask
    assert (nothing.loss.item(), nothing.size) == (0, 0)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("architecture", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_the_training_loss_of_a_mixture_of_experts_has_its_routers_as_hugging_faces(tmp_path, architecture):
    losses = []
    for changes in ({}, {"output_router_logits": True, "router_aux_loss_coef": 0.5}):
        module = with_live_link(causal_lm(tmp_path, architecture, changes=changes, target_modules=".*_proj"))
        pairs = [("The town is old and the river is long and is the mat old? ", "Yes"), ("It", " was")]
        batch = collate_language(responses(module, pairs), module.tokenizer.pad_token_id)
        theirs, mine = module.model(**batch).loss, module.training_step(batch, 0)
        losses.append(mine.item())
        assert mine.item() == pytest.approx(theirs.item(), abs=1e-5)
        assert_same_gradients(module, mine, theirs, 1e-3)
        with torch.no_grad():  # what is evaluated is the tokens' loss
            assert module.step(batch).loss.item() == pytest.approx(losses[0], abs=1e-5)
    assert losses[1] > losses[0] + 0.5  # an even load of one expert a token is 1


def test_a_mask_of_pairs_of_tokens_is_refused(tmp_path):
    module = causal_lm(tmp_path, "llama", target_modules=None)
    ids = torch.arange(5)[None]
    with pytest.raises(UserError, match="batch: attention_mask must be rows x length"):
        module.step({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 1, 5, 5)})


@pytest.mark.parametrize(
    ("architecture", "dtype", "words"),
    [
        ("roberta", "float32", "with that padding"),  # on the left
        ("bert", "float32", "with a later token"),
        ("bert", "float16", "with a later token"),
    ],
)
def test_a_model_whose_logits_depend_on_padding_or_on_later_tokens_is_refused(tmp_path, architecture, dtype, words):
    with pytest.raises(UserError, match=rf"model\.model_name: .* its logits change {words}"):
        causal_lm(tmp_path, architecture, scale=1 if architecture == "bert" else 3, dtype=dtype).configure_model()
    if architecture == "bert":
        causal_lm(tmp_path, architecture, scale=1, dtype=dtype, changes={"is_decoder": True}).configure_model()


def test_validation_means_are_over_rows_and_tokens_whatever_the_batches(tmp_path):
    rows = [{"prompt": "Is it? ", "response": "Yes" + ", it is" * (k % 4)} for k in range(10)]
    source, module = tiny.write_rows(tmp_path / "rows", rows), causal_lm(tmp_path)
    for make in (functools.partial(TextDataModule, source), tiny.reviews):
        ((one,), (other,)) = (
            trainer(tmp_path).validate(module, datamodule=make(eval_batch_size=size), verbose=False) for size in (100, 7)
        )
        assert one == pytest.approx(other, abs=1e-5)


def test_predictions_come_in_the_order_of_the_data_and_are_computed_by_length_where_they_are_written(tmp_path, monkeypatch):
    module, data, lengths = causal_lm(tmp_path, "opt"), tiny.reviews(eval_batch_size=30), []
    batches = trainer(tmp_path).predict(module, datamodule=data)
    prompts = [row.example.prompt for row in data.test]
    assert [prompt for batch in batches for prompt in batch["prompt"]] == prompts

    def predict_step(batch, batch_idx):
        lengths.append(batch["input_ids"].shape[1])
        return {"prompt": batch["prompt"]}

    monkeypatch.setattr(module, "predict_step", predict_step)
    for limit, n_rows in ((1.0, 100), (1, 30)):  # of a limit the first ones, not the longest
        run = trainer(tmp_path, PredictionWriter(), limit_predict_batches=limit)
        run.predict(module, datamodule=data, return_predictions=False)
        written = [(row["index"], row["prompt"]) for row in tiny.read_rows(tmp_path / "predictions.jsonl")]
        assert written == [*enumerate(prompts[:n_rows])]
    assert lengths[:4] == sorted(lengths[:4], reverse=True) != lengths[3::-1]
