"""Several sequences in a row, by positions that start again: what a model makes of them, and rows that are packed."""

import functools
import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from cola_lightning import TextDataModule, UserError
from cola_lightning.data.batch import best_fit, collate_language, collate_packs
from cola_lightning.data.render import encode_texts
from tests.helpers import tiny
from tests.helpers.tiny import assert_same_gradients, with_live_link
from tests.helpers.toy import assert_bit_equal, trainer, weights

# Positions that are learned or rotated, windows of two kinds, no positions at all, and experts.
APART = [(name, "eager") for name in ("gpt2", "llama", "gpt_neo", "gemma3", "falcon", "mixtral")]
APART += [("gpt2", "sdpa"), ("mistral", "sdpa")]
MORE_APART = ["qwen3", "gpt_neox", "phi3", "mistral", "gemma2", "qwen3_moe", "olmoe", "deepseek_v3"]
APART += [pytest.param(name, "eager", marks=pytest.mark.slow) for name in MORE_APART]
APART += [pytest.param("gemma3", "sdpa", marks=pytest.mark.slow)]
NOT_APART = ["opt", "bloom", "gpt_oss", "mamba", "lfm2_moe"]
NOT_APART += [pytest.param(name, marks=pytest.mark.slow) for name in ("nemotron_h", "qwen3_next")]
TEXTS = [["The town is old and the river is long.", "It was", "A film with great actors"], ["The cat sat on it", "Is it old?"]]


causal_lm = functools.partial(tiny.causal_lm, target_modules="all-linear")


def rows_of(module, texts):
    return [row for (row,) in encode_texts(module.tokenizer, texts, 64)]


def flattened(module, texts):
    """What transformers' flattening collator makes of texts: one row, and positions that start again."""
    features = [{"input_ids": row["input_ids"]} for row in rows_of(module, texts)]
    return transformers.DataCollatorWithFlattening()(features)


@pytest.mark.parametrize(("architecture", "attention"), APART)
def test_sequences_whose_positions_start_again_have_the_loss_and_gradients_of_separate_ones(tmp_path, architecture, attention):
    module = with_live_link(causal_lm(tmp_path, architecture, attn_implementation=attention))
    separate = module.step(collate_language(rows_of(module, TEXTS[0]), 1))
    batch = flattened(module, TEXTS[0])
    runs_on = batch["input_ids"]  # a collator that does not mark where a sequence begins
    for labels in (batch["labels"], runs_on):
        output = module.step(batch | {"labels": labels})
        assert output.size == separate.size
        assert output.loss.item() == pytest.approx(separate.loss.item(), abs=1e-5)
    assert_same_gradients(module, output.loss, separate.loss, 1e-5)
    batch = collate_packs([rows_of(module, texts) for texts in TEXTS], 1)
    masked = batch | {"attention_mask": batch["labels"].ne(-100) | batch["position_ids"].ne(0) | batch["input_ids"].ne(1)}
    assert not masked["attention_mask"].all()
    expected = module.step(collate_language(rows_of(module, TEXTS[0] + TEXTS[1]), 1))
    for several in (masked, batch):  # in two rows, padded with a mask and without one
        output = module.step(several)
        assert output.size == expected.size
        assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert_same_gradients(module, output.loss, expected.loss, 1e-5)


@pytest.mark.parametrize("architecture", NOT_APART)
def test_they_are_refused_by_name_where_they_would_not_be_apart(tmp_path, architecture):
    module = causal_lm(tmp_path, architecture, scale=1, target_modules=None)
    module.configure_model()
    batch = flattened(module, TEXTS[0])
    for _ in range(2):
        with pytest.raises(UserError, match=f"batch: .* {type(module.model).__name__}"):
            module.step(batch)
    for mask in ({}, {"attention_mask": torch.ones(1, 5)}):  # one sequence, whose positions are given
        one = {name: batch[name][:, :5] for name in ("input_ids", "labels", "position_ids")} | mask
        assert torch.isfinite(module.step(one).loss)


@pytest.fixture
def of_one_row():
    """The name of an attention that keeps sequences apart as flash attention does: in a batch of a single row."""

    def attention(layer, query, key, value, mask, scaling, position_ids=None, **_):
        key, value = (some.repeat_interleave(layer.num_key_value_groups, 1) for some in (key, value))
        n = query.shape[2]
        allowed = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None].bool() | torch.eye(n, dtype=torch.bool)
        elif len(query) == 1:
            own = (position_ids == 0).cumsum(-1)
            allowed = allowed & (own[:, :, None] == own[:, None])[:, None]
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling)
        return attended.transpose(1, 2), None

    transformers.AttentionInterface.register("of_one_row", attention)
    of_flash = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    transformers.AttentionMaskInterface.register("of_one_row", of_flash)
    return "of_one_row"


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_an_attention_that_separates_sequences_of_one_row_gets_one(tmp_path, architecture, of_one_row):
    """A stand-in for flash attention, which needs a GPU."""
    one, other = (with_live_link(causal_lm(tmp_path, architecture, attn_implementation=way)) for way in ("eager", of_one_row))
    batch, rows = collate_packs([rows_of(one, texts) for texts in TEXTS], 1), []
    other.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    for is_half, tolerance in ((False, 1e-5), (True, 0.05)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            expected, output = one.step(batch), other.step(batch)
        assert output.size == expected.size
        assert output.loss.item() == pytest.approx(expected.loss.item(), abs=tolerance)
    assert rows[-2:] == [1, 1]


def test_what_a_models_forward_pass_takes_is_passed_on_and_other_values_are_named(tmp_path):
    module = with_live_link(causal_lm(tmp_path))
    batch = collate_language(rows_of(module, ["It was", TEXTS[0][0] * 3]), 1)
    expected, inner, seen = module.step(batch).loss.item(), module.model.forward, {}

    def forward(input_ids=None, attention_mask=None, position_ids=None, pixel_values=None, **others):
        seen.update(position_ids=position_ids, pixel_values=pixel_values, **others)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)

    module.model.forward = forward
    index, positions = torch.zeros_like(batch["input_ids"]), (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for more in ({"pixel_values": torch.ones(2, 3)}, {"seq_idx": index, "position_ids": positions}):
        assert module.step(batch | more).loss.item() == pytest.approx(expected, abs=1e-5)
        assert all(seen[name] is value for name, value in more.items())
        assert "position_ids" in more or seen["position_ids"] is None  # an image's tokens may have several
    module.model.forward = inner
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded["inputs_embeds"] = module.model.get_input_embeddings()(batch["input_ids"])
    for same in (embedded, batch | {"token_type_ids": index}):  # zeros, which tokenizers make by themselves
        assert module.step(same).loss.item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="batch: LlamaForCausalLM does not take length, weights"):
        module.step(batch | {"weights": index, "length": [3, 5], "num_items_in_batch": 8})


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_each_row_is_in_one_pack_and_no_two_packs_fit_into_one(lengths, max_length):
    packs = best_fit(lengths, max_length)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    full = sorted(sum(lengths[row] for row in pack) for pack in packs)
    assert not full or full[-1] <= max_length
    assert len(full) < 2 or full[0] + full[1] > max_length


ROWS = [{"prompt": f"Is town {k} old?", "response": "Yes" + ", it is old" * (k % 5)} for k in range(40)]


def data_of(path, **arguments):
    return TextDataModule(tiny.write_rows(path / "rows", ROWS), **{"chat_template": False, "max_length": 64} | arguments)


def test_an_optimizer_step_over_packs_is_that_over_their_rows(tmp_path):
    """The tokens of all packs weigh alike, and evaluation is not packed."""

    def fit(**options):
        module = causal_lm(tmp_path, target_modules=["q_proj", "v_proj"], optimizer=lambda p: SGD(p, lr=0.5))
        data, run = data_of(tmp_path, **options), trainer(tmp_path, max_epochs=1, accumulate_grad_batches=100)
        run.fit(module, datamodule=data)
        assert run.global_step == 1
        return [run.callback_metrics[name].item() for name in ("train_loss", "val_loss")], weights(module), len(data.train)

    (values, own, n_packs), (expected, theirs, _) = fit(packing=True, batch_size=1), fit(batch_size=40)
    assert 5 < n_packs < 20
    assert values == pytest.approx(expected, abs=1e-5)
    for name, value in own.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)


def fit(path, steps, ckpt_path=None, max_length=64, **options):
    """The module, the Trainer, and the order of the rows of a fit on the data module with these options."""
    data = data_of(path, max_length=max_length, **options)
    module = causal_lm(path, "llama", target_modules=["q_proj", "v_proj"], dropout=0.2)
    run = trainer(path, chain={"every_n_train_steps": 4}, max_steps=steps, accumulate_grad_batches=2)
    run.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module, run, list(data.train_dataloader().sampler)


def test_a_run_over_packs_resumed_inside_an_epoch_is_the_run_itself(tmp_path):
    packs, path = {"packing": True, "batch_size": 2}, tmp_path / "part.ckpt"
    (whole, *_), (_, part, _) = fit(tmp_path, 6, **packs), fit(tmp_path, 5, **packs)
    part.save_checkpoint(path)
    assert_bit_equal(weights(fit(tmp_path, 6, path, **packs)[0]), weights(whole))
    for change, words in [({"packing": False}, "packing must be True"), ({"max_length": 60}, "max_length must be 64")]:
        with pytest.raises(UserError, match=rf"data\.{words} as in the run that is resumed inside an epoch"):
            fit(tmp_path, 6, path, **packs | change)


def test_a_length_that_changes_the_order_of_rows_is_refused_inside_an_epoch(tmp_path):
    path = tmp_path / "part.ckpt"
    _, part, order = fit(tmp_path, 1, batch_size=4)
    part.save_checkpoint(path)
    assert fit(tmp_path, 2, path, max_length=60, batch_size=4)[2] == order  # no row is so long
    with pytest.raises(UserError, match=r"the tokens of all training rows \(data\.max_length\) must be \d+ as in the run"):
        fit(tmp_path, 2, path, max_length=16, batch_size=4)


def test_processes_have_equally_many_packs_and_each_row_is_trained(tmp_path):
    own, seen = tiny.tokenizer(pad=True), []
    for rank in range(3):
        data = tiny.set_up(data_of(tmp_path, packing=True, batch_size=2), own, "fit")
        data.trainer = tiny.process(rank, 3)
        packs = [zip(b["input_ids"], b["position_ids"], strict=True) for b in data.train_dataloader()]
        seen.append([*itertools.chain.from_iterable(packs)])
    assert {len(packs) for packs in seen} == {math.ceil(len(data.train) / 3)}
    trained = set()
    for ids, positions in itertools.chain.from_iterable(seen):
        starts = positions.eq(0).nonzero().flatten().tolist()
        rows = [tuple(ids[start:end].tolist()) for start, end in itertools.pairwise([*starts, len(ids)])]
        trained |= {row for row in rows if len(row) > 1}  # the others are padding
    assert trained == {tuple(row["input_ids"]) for pack in data.train for row in pack}
    assert len(trained) == len(ROWS)
