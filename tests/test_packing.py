"""Several sequences in a row, by positions that start again: what a model makes of them, and rows that are packed."""

import pytest
import torch
import transformers

from cola_lightning import COLACausalLM, UserError
from cola_lightning.data.encoding import collate_language, encode_texts
from tests import tiny
from tests.test_causal_lm import MORE_CONFIGS, assert_same_gradients
from tests.tiny import with_live_link

GROUPED = {**tiny.SIZES, **tiny.BODY, "num_key_value_heads": 2}
CONFIGS = MORE_CONFIGS | {
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6),
    "starcoder2": lambda: transformers.Starcoder2Config(**GROUPED),
    "deepseek_v3": tiny._mixture("DeepseekV3", tiny.MIXTURES["deepseek_v3"][1] | {"num_key_value_heads": 4}),
    "mamba": lambda: transformers.MambaConfig(vocab_size=400, hidden_size=32, state_size=8, num_hidden_layers=2),
}
APART = ["opt", "llama", "gpt2", "qwen3", "gpt_neox", "phi3", "gpt_neo", "mistral", "gemma2", "gemma3", "starcoder2", "falcon"]
APART += ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"]
WITHOUT_SDPA = ["gpt_neo", "gemma2"]
NOT_APART = ["bloom", "gpt_oss", "mamba", "lfm2_moe", "nemotron_h", "qwen3_next"]
TEXTS = [["The town is old and the river is long.", "It was", "A film with great actors"], ["The cat sat on it", "Is it old?"]]


@pytest.fixture(autouse=True, scope="module")
def _configs():
    with pytest.MonkeyPatch.context() as patch:
        for name, make in CONFIGS.items():
            patch.setitem(tiny.CONFIGS, name, make)
        yield


def causal_lm(path, architecture="llama", *, scale=3, **arguments):
    name = tiny.folder(path / architecture, architecture, scale=scale)
    return COLACausalLM(name, **{"target_modules": "all-linear", "rank": 2, "alpha": 4, "seed": 0} | arguments)


def rows_of(module, texts):
    return [row for (row,) in encode_texts(module.tokenizer, texts, 64)]


def flattened(module, texts):
    """What transformers' flattening collator makes of texts: one row, and positions that start again."""
    features = [{"input_ids": row["input_ids"]} for row in rows_of(module, texts)]
    return transformers.DataCollatorWithFlattening()(features)


def padded(batches):
    """Rows of several sequences, padded on the right with tokens that have no loss; each of these is a sequence of its own."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 1, "labels": -100, "position_ids": 0}
    pad = torch.nn.functional.pad
    return {
        name: torch.cat([pad(batch[name], (0, length - batch[name].shape[1]), value=value) for batch in batches])
        for name, value in fill.items()
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", APART)
def test_sequences_whose_positions_start_again_have_the_loss_and_gradients_of_separate_ones(tmp_path, architecture, attention):
    if attention == "sdpa" and architecture in WITHOUT_SDPA:
        pytest.skip("transformers has none")
    module = with_live_link(causal_lm(tmp_path, architecture, attn_implementation=attention))
    separate = module.step(collate_language(rows_of(module, TEXTS[0]), 1))
    batch = flattened(module, TEXTS[0])
    runs_on = batch["input_ids"]  # a collator that does not mark where a sequence begins
    for labels in (batch["labels"], runs_on):
        output = module.step(batch | {"labels": labels})
        assert output.size == separate.size
        assert output.loss.item() == pytest.approx(separate.loss.item(), abs=1e-5)
    assert_same_gradients(module, output.loss, separate.loss, 1e-5)
    both = padded([flattened(module, texts) for texts in TEXTS])
    masked = both | {"attention_mask": both["labels"].ne(-100) | both["position_ids"].ne(0) | both["input_ids"].ne(1)}
    expected = module.step(collate_language(rows_of(module, TEXTS[0] + TEXTS[1]), 1))
    for several in (both, masked):  # in two rows, padded without a mask and with one
        output = module.step(several)
        assert output.size == expected.size
        assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


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


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
def test_an_attention_that_separates_sequences_of_one_row_gets_one(tmp_path, architecture, of_one_row):
    """A stand-in for flash attention, which needs a GPU."""
    modules = [with_live_link(causal_lm(tmp_path, architecture, attn_implementation=how)) for how in ("eager", of_one_row)]
    (output, expected), rows = [None, None], []
    modules[1].model.get_input_embeddings().register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            batch = padded([flattened(modules[0], texts) for texts in TEXTS])
            expected, output = (module.step(batch) for module in modules)
        assert output.size == expected.size
        assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5 if dtype is None else 0.05)
    assert rows[-2:] == [1, 1]


# ---------------------------------------------------------------------- other values of a batch


def test_what_a_models_forward_pass_takes_is_passed_on_and_other_values_are_named(tmp_path):
    module = with_live_link(causal_lm(tmp_path))
    batch = collate_language(rows_of(module, ["It was", TEXTS[0][0] * 3]), 1)
    expected, inner, seen = module.step(batch), module.model.forward, {}

    def forward(input_ids=None, attention_mask=None, position_ids=None, pixel_values=None, **others):
        seen.update(position_ids=position_ids, pixel_values=pixel_values, **others)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **others)

    module.model.forward = forward
    index, positions = torch.zeros_like(batch["input_ids"]), (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for more in ({"pixel_values": torch.ones(2, 3)}, {"seq_idx": index, "position_ids": positions}):
        output = module.step(batch | more)
        assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
        assert all(seen[name] is value for name, value in more.items())
        assert "position_ids" in more or seen["position_ids"] is None  # an image's tokens may have several
    module.model.forward = inner
    embedded = {name: value for name, value in batch.items() if name != "input_ids"}
    embedded["inputs_embeds"] = module.model.get_input_embeddings()(batch["input_ids"])
    assert module.step(embedded).loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    no_types = torch.zeros_like(index)  # which tokenizers make by themselves
    assert module.step(batch | {"token_type_ids": no_types}).loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    with pytest.raises(UserError, match="batch: LlamaForCausalLM does not take length, weights"):
        module.step(batch | {"weights": index, "length": [3, 5], "num_items_in_batch": 8})
    with pytest.raises(UserError, match="batch: seq_idx without position_ids"):
        module.step({name: batch[name] for name in ("input_ids", "labels")} | {"seq_idx": index})
