"""Option scores, losses and gradients against a plain forward, and what a run does with them."""

import copy
import functools
import json

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling

from cola_lightning import COLACausalLM, PredictionWriter, TextDataModule, UserError, lora_layers
from cola_lightning.data.encoding import collate_language, encode_responses, encode_texts, labels_of
from cola_lightning.data.examples import Example, collate_options, encode_examples
from tests import tiny
from tests.tiny import plain_scores, with_live_link
from tests.toy import assert_bit_equal, trainer, weights

ARCHITECTURES = ["opt", "llama", "gpt2", "qwen3", "gpt_neox"]

EXAMPLES = [
    Example("The film was long and the plot was thin. It was", (" terrible", " great"), 0),
    Example("The cat sat. Is that old?\n", ("Yes", "No", "Maybe"), 2),
    Example("The town", (" is the largest of the country", " is old", "!"), 1),
]


@pytest.fixture(params=ARCHITECTURES)
def module(request, tmp_path):
    name = tiny.folder(tmp_path / "model", request.param)
    return with_live_link(COLACausalLM(name, target_modules=tiny.targets(request.param), rank=2, alpha=4, seed=0))


def gradients(module, loss):
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def assert_close(mine, theirs, relative):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.linalg.vector_norm(value) > 0
        assert torch.linalg.vector_norm(value - theirs[name]) <= relative * torch.linalg.vector_norm(theirs[name]), name


def test_option_scores_losses_and_gradients_are_those_of_plain_forwards(module):
    encoded = encode_examples(module.tokenizer, EXAMPLES, max_length=64)
    batch = collate_options(encoded, module.tokenizer.pad_token_id)
    scores = module.option_scores(batch)
    plain = [plain_scores(module, example) for example in EXAMPLES]
    for mine, theirs in zip(scores, plain, strict=True):
        assert mine[: len(theirs)].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
        assert not torch.isfinite(mine[len(theirs) :]).any()
        assert mine.argmax() == theirs.argmax()
    losses = [F.cross_entropy(s[None], torch.tensor([e.answer])) for s, e in zip(plain, EXAMPLES, strict=True)]
    loss, output = torch.stack(losses).mean(), module.step(batch)
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert output.predictions.tolist() == [int(s.argmax()) for s in plain]
    assert_close(gradients(module, output.loss), gradients(module, loss), 1e-4)


MANY = [
    Example(
        "The town is old and the river is long. Is the town old? " * 2,
        tuple(f" The {k} is the {'old ' * k}town" for k in range(7)),
        3,
    ),
    Example("A film", (" great", " terrible plot and great actors", "."), 1),
    Example("The capital of the country is the largest town.", (" The town", " The capital", " The country is old"), 2),
]


def test_options_share_the_computation_of_a_long_prompt(module, monkeypatch):
    """Without gradients: in fewer tokens, and with the scores of one option at a time."""
    encoded = encode_examples(module.tokenizer, MANY, max_length=64)
    batch = collate_options(encoded, module.tokenizer.pad_token_id)
    module.model.eval()
    with torch.no_grad():
        module.option_scores(batch)  # whether the model takes a mask of pairs is tried out once
    tokens = []
    forward = module.model.forward
    monkeypatch.setattr(
        module.model,
        "forward",
        functools.wraps(forward)(lambda **given: tokens.append(given["input_ids"].numel()) or forward(**given)),
    )
    with torch.no_grad():
        scores = module.option_scores(batch)
    n_shared = sum(tokens)
    assert batch["n_shared"][0] > 20
    assert n_shared < batch["input_ids"].numel() / 2
    for mine, example in zip(scores, MANY, strict=True):
        theirs = plain_scores(module, example)
        assert mine[: len(theirs)].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)
        assert not torch.isfinite(mine[len(theirs) :]).any()
    torch.testing.assert_close(scores, module.option_scores(batch), rtol=0, atol=1e-5)  # with gradients, the plain way


WINDOWED = {
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **tiny.SIZES, hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=4
    ),
    "mistral": lambda: transformers.MistralConfig(**tiny.SIZES, **tiny.BODY, num_key_value_heads=2, sliding_window=4),
}


@pytest.mark.parametrize("architecture", WINDOWED)
@torch.no_grad()
def test_scores_are_plain_ones_where_attention_depends_on_how_far_a_token_lies_back(tmp_path, monkeypatch, architecture):
    monkeypatch.setitem(tiny.CONFIGS, architecture, WINDOWED[architecture])
    module = COLACausalLM(tiny.folder(tmp_path / "model", architecture), rank=2, alpha=4, seed=0)
    with_live_link(module).eval()
    batch = collate_options(encode_examples(module.tokenizer, MANY, max_length=64), module.tokenizer.pad_token_id)
    for mine, example in zip(module.option_scores(batch), MANY, strict=True):
        theirs = plain_scores(module, example)
        assert mine[: len(theirs)].tolist() == pytest.approx(theirs.tolist(), abs=1e-4)


def test_options_of_one_token_share_one_forward(module):
    one_token = encode_examples(module.tokenizer, [Example("The film. It was", (" great", " terrible", "."), 0)], 64)
    batch = collate_options(one_token, module.tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (1, len(module.tokenizer("The film. It was")["input_ids"]))
    assert batch["option_ids"].shape == (1, 3, 1)


def test_only_positions_with_a_loss_go_through_the_head(module):
    seen = []
    module.model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    examples = [Example("The film. It was", (" great", " terrible"), 0), Example("A", (" great", " terrible"), 1)]
    module.step(collate_options(encode_examples(module.tokenizer, examples, 64), 1))
    rows = encode_responses(module.tokenizer, [("Is the town old? ", "Yes"), ("Is it? ", "Yes")], 64, ["here", "there"])
    module.step(collate_language(rows, 1))
    n_response = sum(label != -100 for label in labels_of(rows[0]))
    assert seen == [(2, 1), (2, n_response)]


@pytest.mark.parametrize("loss_on", ["all", "response"])
def test_the_language_loss_is_hugging_faces_on_whichever_side_a_batch_is_padded(module, loss_on):
    pairs = [("Is the town old? ", "Yes"), ("Is the river long and is the mat old? ", "No"), ("A", " town")]
    rows = encode_responses(module.tokenizer, pairs, 64, ["here"] * 3)
    if loss_on == "all":  # the first token of a row, too, which follows on padding in a batch
        rows = [row | {"spans": [0, len(row["input_ids"])]} for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) == 3
    pad, length = module.tokenizer.pad_token_id, max(len(row["input_ids"]) for row in rows)

    def on_the_right(values, value):
        return torch.tensor([one + [value] * (length - len(one)) for one in values])

    ids, labels = [row["input_ids"] for row in rows], [labels_of(row) for row in rows]
    right = {"input_ids": on_the_right(ids, pad), "labels": on_the_right(labels, -100)}
    right["attention_mask"] = on_the_right([[1] * len(one) for one in ids], 0)
    theirs = module.model(**right).loss
    for batch in (right, collate_language(rows, pad)):
        output = module.step(batch)
        assert output.loss.item() == pytest.approx(theirs.item(), abs=1e-5)
        assert output.size == int((right["labels"][:, 1:] != -100).sum())
        assert_close(gradients(module, output.loss), gradients(module, module.model(**right).loss), 1e-4)


def packed_texts(module):
    """Texts in one row, with a mask of pairs, and the ids of each."""
    texts = ["The town is old and the river is long.", "It was", "A film with great actors"]
    rows = [row["input_ids"] for (row,) in encode_texts(module.tokenizer, texts, 64)]
    lengths = torch.tensor([len(ids) for ids in rows])
    own = torch.repeat_interleave(torch.arange(3), lengths)
    mask = ((own[:, None] == own) & torch.ones(len(own), len(own)).tril().bool())[None, None]
    packed = {"input_ids": torch.tensor([[token for ids in rows for token in ids]]), "attention_mask": mask}
    packed["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    packed["labels"] = torch.tensor([[label for ids in rows for label in [-100, *ids[1:]]]])
    return packed, rows


@pytest.mark.parametrize("kind", ["bool", "int", "additive", "additive in another dtype"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["opt", "llama", "gpt2"])
def test_packed_sequences_with_a_mask_of_pairs_have_the_loss_of_separate_ones(tmp_path, architecture, attention, kind):
    name = tiny.folder(tmp_path / "model", architecture)
    arguments = {"target_modules": tiny.targets(architecture), "attn_implementation": attention}
    module = with_live_link(COLACausalLM(name, rank=2, alpha=4, seed=0, **arguments))
    packed, rows = packed_texts(module)
    lengths, mask = torch.tensor([len(ids) for ids in rows]), packed["attention_mask"]
    if kind == "int":
        mask = mask.long()
    elif kind != "bool":
        dtype = torch.float32 if kind == "additive" else torch.float64
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    packed["attention_mask"] = mask
    output = module.step(packed)
    separate = module.step(collate_language([{"input_ids": ids, "spans": [1, len(ids)]} for ids in rows], 1))
    assert output.size == separate.size == sum(lengths) - 3
    assert output.loss.item() == pytest.approx(separate.loss.item(), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.step(packed).loss.item() == pytest.approx(separate.loss.item(), abs=0.05)
    if kind == "additive" or (kind == "bool" and attention == "sdpa"):
        assert output.loss.item() == pytest.approx(module.model(**packed).loss.item(), abs=1e-5)


GROUPED = {**tiny.SIZES, **tiny.BODY, "num_key_value_heads": 2}
MAMBA = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
NOT_FOR_PAIRS = {
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=6),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=6, max_window_layers=0),
    "cohere2": lambda: transformers.Cohere2Config(**GROUPED, sliding_window=6),
    "mamba": lambda: transformers.MambaConfig(**MAMBA),
    "mamba2": lambda: transformers.Mamba2Config(**MAMBA, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "bamba": lambda: transformers.BambaConfig(
        **GROUPED, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, attn_layer_indices=[1]
    ),
    "lfm2": lambda: transformers.Lfm2Config(**GROUPED, full_attn_idxs=[1]),
    "bloom": lambda: transformers.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=400, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(vocab_size=400, n_positions=64, n_embd=32, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("architecture", NOT_FOR_PAIRS)
def test_packed_sequences_are_refused_where_they_would_not_be_apart(tmp_path, monkeypatch, architecture, scale):
    monkeypatch.setitem(tiny.CONFIGS, architecture, NOT_FOR_PAIRS[architecture])
    module = COLACausalLM(tiny.folder(tmp_path / "model", architecture, scale=scale), target_modules=None, seed=0)
    module.configure_model()
    packed, _ = packed_texts(module)
    message = r"batch: expected attention_mask of rows x length for \w+, .* received torch.bool of shape \(1, 1, \d+, \d+\)"
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            module.step(packed)
        assert "\n" not in str(caught.value)


def test_whether_a_model_keeps_packed_sequences_apart_is_tried_once_whatever_the_precision(module, monkeypatch):
    packed, _ = packed_texts(module)
    calls = []
    module.model.register_forward_hook(lambda model, *_: calls.append(model.training))
    with torch.autocast("cpu", torch.bfloat16):
        module.step(packed)
    assert calls[-1]
    assert not any(calls[:-1])
    n_calls = len(calls)
    module.step(packed)
    assert len(calls) == n_calls + 1
    assert module.model.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "opt", "gpt2", "gpt_neox"])
def test_packed_sequences_are_taken_in_half_precision(tmp_path, monkeypatch, architecture, dtype):
    monkeypatch.setitem(tiny.CONFIGS, architecture, EXPERTS.get(architecture) or tiny.CONFIGS[architecture])
    module = COLACausalLM(tiny.folder(tmp_path / "model", architecture), target_modules=None, seed=0, dtype=dtype)
    module.configure_model()
    packed, _ = packed_texts(module)
    assert torch.isfinite(module.step(packed).loss)


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 9, 9), torch.ones(1, 9, 9)], ids=["numbers to be added", "no heads"])
def test_a_mask_that_could_mean_anything_is_refused(module, mask):
    ids = torch.full((1, 9), 5)
    with pytest.raises(UserError, match=r"batch: expected attention_mask of rows x length .* received torch.float32 of shape"):
        module.step({"input_ids": ids, "labels": ids, "attention_mask": mask})


EXPERTS = {
    "mixtral": lambda: transformers.MixtralConfig(**tiny.SIZES, **tiny.BODY, num_key_value_heads=2, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **tiny.SIZES, **tiny.BODY, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
}


def with_experts(tmp_path, monkeypatch, architecture, **changes):
    monkeypatch.setitem(tiny.CONFIGS, architecture, EXPERTS[architecture])
    name = tiny.folder(tmp_path / "model", architecture, **changes)
    return with_live_link(COLACausalLM(name, target_modules=".*_proj", rank=2, alpha=4, seed=0))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("architecture", EXPERTS)
def test_the_loss_of_a_mixture_of_experts_has_its_routers_as_hugging_faces(tmp_path, monkeypatch, architecture, is_training):
    coef = "router_aux_loss_coef"
    losses = []
    for changes in ({}, {"output_router_logits": True, coef: 0.5}, {"output_router_logits": True, coef: 0.0}):
        module = with_experts(tmp_path, monkeypatch, architecture, **changes).train(is_training)
        texts = ["The town is old and the river is long. " * 2, "It was"]
        rows = [row for (row,) in encode_texts(module.tokenizer, texts, 64)]
        batch = collate_language(rows, module.tokenizer.pad_token_id)
        theirs = module.model(**batch).loss
        losses.append(module.step(batch).loss)
        assert losses[-1].item() == pytest.approx(theirs.item(), abs=1e-5)
        if is_training and changes:
            assert_close(gradients(module, losses[-1]), gradients(module, theirs), 1e-3)
    assert losses[1] > losses[0] + 0.5  # an even load of one expert a token is 1
    assert losses[2].item() == pytest.approx(losses[0].item(), abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_without_experts_has_no_routers_loss_whatever_its_configuration(tmp_path, architecture):
    losses = []
    for changes in ({}, {"output_router_logits": True}):
        name = tiny.folder(tmp_path / "model", architecture, **changes)
        module = with_live_link(COLACausalLM(name, target_modules=tiny.targets(architecture), rank=2, seed=0))
        batch = collate_language([row for (row,) in encode_texts(module.tokenizer, ["The town is old.", "It was"], 64)], 1)
        losses.append(module.step(batch).loss)
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


@pytest.mark.parametrize("loss", ["options", "answer"])
def test_so_has_that_of_options(tmp_path, monkeypatch, loss):
    losses = []
    for changes in ({}, {"output_router_logits": True, "router_aux_loss_coef": 0.5}):
        module = with_experts(tmp_path, monkeypatch, "mixtral", **changes).eval()
        batch = collate_options(encode_examples(module.tokenizer, MANY, max_length=64), module.tokenizer.pad_token_id, loss)
        losses += [module.step(batch).loss]
        router_loss = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    assert losses[1].item() == pytest.approx((losses[0] + 0.5 * router_loss).item(), abs=1e-4)


def test_a_hugging_face_collators_batch_works_as_it_is(module):
    collate = DataCollatorForLanguageModeling(module.tokenizer, mlm=False)
    batch = collate([{"input_ids": module.tokenizer(text)["input_ids"]} for text in tiny.TEXT[:3]])
    # Its labels leave out the padding token, which is the end of text here, as so often.
    assert module.step(batch).loss.item() == pytest.approx(module.model(**batch).loss.item(), abs=1e-5)


def test_a_batch_without_any_loss(module):
    ids = torch.tensor([module.tokenizer(tiny.TEXT[0])["input_ids"]])
    output = module.step({"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert (output.loss.item(), output.size) == (0, 0)


def test_an_architecture_without_logits_to_keep_or_position_ids_gets_neither(module):
    batch = collate_options(encode_examples(module.tokenizer, EXAMPLES[:1], 64), 1)
    expected = module.option_scores(batch)
    inner = module.model.forward
    calls = []

    def forward(input_ids, attention_mask):
        calls.append(input_ids.shape)
        return inner(input_ids=input_ids, attention_mask=attention_mask)

    module.model.forward = forward
    assert module.option_scores(batch).tolist()[0] == pytest.approx(expected.tolist()[0], abs=1e-4)
    assert calls


def test_the_model_trains_with_its_dropout_and_its_merged_copy_is_a_plain_hugging_face_model(tmp_path):
    module = with_live_link(COLACausalLM(tiny.folder(tmp_path / "base", "llama"), seed=0, rank=2, dropout=0.5))
    assert module.model.training
    assert all(layer.lora_dropout.training for layer in lora_layers(module.model).values())
    module.eval()
    ids = torch.tensor([module.tokenizer(tiny.TEXT[0])["input_ids"]])
    expected = module.model(ids).logits
    merged = copy.deepcopy(module).merged_model()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_resumed_inside_an_epoch_is_the_run_itself(tmp_path, accumulate):
    name = tiny.folder(tmp_path / "model", "opt")

    def fit(*callbacks, ckpt_path=None):
        module = COLACausalLM(name, target_modules=["q_proj", "v_proj"], rank=2, seed=0, dropout=0.2)
        run = trainer(tmp_path, *callbacks, chain={"every_n_train_steps": 4}, max_steps=14, accumulate_grad_batches=accumulate)
        run.fit(module, datamodule=tiny.reviews(batch_size=32, eval_batch_size=100), ckpt_path=ckpt_path)
        return module

    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            path = tmp_path / f"{trainer.global_step}.ckpt"
            if trainer.global_step in (3, 4, 9) and not path.exists():
                trainer.save_checkpoint(path, weights_only=False)

    whole = fit(Save())
    assert whole.link == 3
    for step in (3, 4, 9):
        resumed = fit(ckpt_path=tmp_path / f"{step}.ckpt")
        assert_bit_equal(weights(resumed), weights(whole))


def test_the_order_of_training_follows_from_the_modules_seed(tmp_path):
    name = tiny.folder(tmp_path / "model")

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.extend(batch["prompt"])

    orders = []
    for seed in (0, 0, 1):
        seen = []
        module = COLACausalLM(name, rank=2, seed=seed)
        trainer(tmp_path, Watch(), chain={}, max_steps=3).fit(module, datamodule=tiny.reviews(batch_size=16))
        orders.append(seen)
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) == 48


def test_a_checkpoint_of_a_model_with_a_tied_head_holds_the_links_alone(tmp_path):
    module = COLACausalLM(tiny.folder(tmp_path / "model", "opt"), target_modules=["q_proj"], rank=2, seed=0)
    run = trainer(tmp_path, chain={"every_n_train_steps": 1}, max_steps=3)
    run.fit(module, datamodule=tiny.reviews(eval_batch_size=100))
    assert module.model.lm_head.weight is module.model.get_input_embeddings().weight
    assert [link.extras for link in module.chain.links] == [{}, {}]
    run.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    values = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    state = values.pop("cola")
    assert {name.rpartition(".")[2] for name in values} == {"lora_A", "lora_B"}
    n_layers, factors = 2, 2 * 2 * 32  # A and B of 32 x 32 layers, rank 2
    assert sum(value.numel() for value in values.values()) == n_layers * factors
    assert sum(value.numel() for value in state["chain"]["tensors"].values()) == 2 * n_layers * factors


@pytest.mark.parametrize("architecture", ["roberta", "bart"])
def test_a_model_for_which_padding_on_the_left_changes_the_meaning_is_refused(tmp_path, architecture):
    with pytest.raises(UserError, match=r"model\.model_name: expected a decoder that .* whose logits change with that padding"):
        COLACausalLM(tiny.folder(tmp_path / "model", architecture), seed=0).configure_model()


ENCODERS = {
    "electra": lambda: transformers.ElectraConfig(**tiny.SIZES, **tiny.BODY, embedding_size=32),
    "megatron": lambda: transformers.MegatronBertConfig(**tiny.SIZES, **tiny.BODY),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("architecture", ["bert", *ENCODERS])
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, monkeypatch, architecture, scale, dtype):
    monkeypatch.setitem(tiny.CONFIGS, architecture, ENCODERS.get(architecture, tiny.CONFIGS["bert"]))
    name = tiny.folder(tmp_path / "model", architecture, scale=scale)
    with pytest.raises(
        UserError, match=r"model\.model_name: expected a decoder that .* whose logits change with a later token"
    ):
        COLACausalLM(name, seed=0, dtype=dtype).configure_model()
    name = tiny.folder(tmp_path / "decoder", architecture, scale=scale, is_decoder=True)
    COLACausalLM(name, seed=0, dtype=dtype).configure_model()


def test_a_batchs_own_position_ids_are_used(module):
    batch = collate_options(encode_examples(module.tokenizer, EXAMPLES[:1], 64), 1)
    shifted = batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).unsqueeze(0).repeat(1, 1) * 2}
    assert not torch.allclose(module.option_scores(batch), module.option_scores(shifted), atol=1e-3)


def test_validation_means_are_over_rows_and_tokens_whatever_the_batches(tmp_path):
    """Batches of 3 rows out of 10: the last has one."""
    (tmp_path / "rows").mkdir()
    rows = [{"prompt": "Is it? ", "response": "Yes" + ", it is" * (k % 4)} for k in range(10)]
    for split in ("train", "validation", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = COLACausalLM(tiny.folder(tmp_path / "model"), rank=2, seed=0)

    def metrics(data):
        (told,) = trainer(tmp_path).validate(module, datamodule=data, verbose=False)
        return told

    for make in (lambda **sizes: TextDataModule(str(tmp_path / "rows"), **sizes), lambda **sizes: tiny.reviews(**sizes)):
        one, many = metrics(make(eval_batch_size=100)), metrics(make(batch_size=50, eval_batch_size=7))
        assert one == pytest.approx(many, abs=1e-5)


def test_predictions_come_in_the_order_of_the_data(tmp_path):
    module = COLACausalLM(tiny.folder(tmp_path / "model"), rank=2, seed=0)
    data = tiny.reviews(eval_batch_size=30)
    batches = trainer(tmp_path).predict(module, datamodule=data)
    assert [len(batch["prompt"]) for batch in batches] == [30, 30, 30, 10]
    prompts = [row.example.prompt for row in data.test]
    assert [prompt for batch in batches for prompt in batch["prompt"]] == prompts


def test_predictions_that_are_written_are_computed_by_length_and_come_in_the_same_order(tmp_path, monkeypatch):
    module = COLACausalLM(tiny.folder(tmp_path / "model", "opt"), rank=2, seed=0)
    data, lengths = tiny.reviews(eval_batch_size=30), []
    monkeypatch.setattr(
        module,
        "predict_step",
        lambda batch, batch_idx: lengths.append(batch["input_ids"].shape[1]) or {"prompt": batch["prompt"]},
    )
    path = tmp_path / "predictions.jsonl"
    trainer(tmp_path, PredictionWriter()).predict(module, datamodule=data, return_predictions=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"index": k, "prompt": row.example.prompt} for k, row in enumerate(data.test)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    first = trainer(tmp_path, PredictionWriter(), limit_predict_batches=1)  # the first ones, not the longest
    first.predict(module, datamodule=data, return_predictions=False)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows[:30]
    assert list(data.predict_dataloader().sampler) == list(range(100))  # who asks for it between two runs


def test_a_data_module_goes_with_the_tokenizer_of_the_module_that_is_trained(tmp_path):
    data = tiny.reviews(batch_size=100, eval_batch_size=100)
    firsts = []
    for architecture in ("opt", "gpt2"):  # with a beginning of sentence and without
        module = COLACausalLM(tiny.folder(tmp_path / architecture, architecture), rank=2, seed=0)
        trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        firsts.append({row.prefixes[0][0] for row in data.train})
    assert firsts[0] == {0}
    assert 0 not in firsts[1]
