"""A batch in several forward passes, each of rows of like length."""

import pytest
import torch
from torch.nn import functional as F

from cola_lightning.data.batch import collate_language
from cola_lightning.data.render import encode_texts
from cola_lightning.hf import logits
from cola_lightning.hf.logits import split_by_length
from tests.helpers import tiny

TEXTS = ["The town is old and the river is long. " * 2, "It was", "The film was great", "A"]


@pytest.fixture(params=["opt", "llama", "gpt2"])
def module(request, tmp_path):
    return tiny.with_live_link(tiny.causal_lm(tmp_path, request.param))


def step(module, batch):
    """The sizes of its passes, its loss and its gradients."""
    sizes = []
    hook = module.model.get_input_embeddings().register_forward_hook(lambda _, given, __: sizes.append(tuple(given[0].shape)))
    loss = module.step(batch).loss
    hook.remove()
    return sizes, loss, torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])


def test_loss_and_gradients_are_those_of_one_pass(module, monkeypatch):
    rows = [row for (row,) in encode_texts(module.tokenizer, TEXTS, 64)]
    batch = collate_language(rows, module.tokenizer.pad_token_id)
    monkeypatch.setattr(logits, "pass_cost", lambda device: 1e9)
    one, expected, theirs = step(module, batch)
    monkeypatch.setattr(logits, "pass_cost", lambda device: 1)
    several, loss, mine = step(module, batch)
    assert len(one) == 1 < len(several)
    assert sum(n * length for n, length in several) < 0.8 * one[0][0] * one[0][1]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    for value, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(module, "should_compile", True)  # for a compiled model each shape costs time
    assert len(step(module, batch)[0]) == 1


def test_a_batch_that_cannot_be_split_is_one_part():
    mask = F.pad(torch.ones(2, 1), (98, 0))
    mask[0] = 1
    batch = {"input_ids": torch.zeros(2, 99, dtype=torch.long), "attention_mask": mask}
    assert len(split_by_length(batch | {"token_type_ids": None})) == 2
    on_the_right, of_pairs = F.pad(torch.ones(2, 3), (0, 96)), torch.ones(2, 1, 99, 99)
    changes = [{"attention_mask": mask} for mask in (None, on_the_right, of_pairs)]
    for change in [*changes, {"position_ids": torch.arange(99)[None]}]:
        ((rows, part),) = split_by_length(batch | change)
        assert part.keys() == (batch | change).keys()
        assert rows == [0, 1]
