"""The loss over chunks of positions against the logits of all of them."""

import pytest
import torch

from cola_lightning import COLACausalLM
from cola_lightning.hf import chunked_loss
from tests.helpers import tiny
from tests.helpers.tiny import batches_of, rows_of, with_live_link
from tests.helpers.toy import assert_near

HOW = {
    "links": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "all": {"target_modules": None},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK", 4 * 400 * 7)  # seven positions


def loss_and_gradients(module, batch):
    module.zero_grad()
    output = module.step(batch)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# Experts, and logits that are capped, scaled or divided; the others have none of it, as llama.
CASES = [(name, "links") for name in ("mixtral", "gemma2", "cohere", "granite")]
CASES += [("llama", options) for options in HOW] + [("gemma2", "head")]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_loss_and_gradients_are_those_of_all_logits(tmp_path, architecture, options):
    name = tiny.folder(tmp_path, architecture)
    module = COLACausalLM(name, rank=2, seed=0, **HOW[options])
    with_live_link(module) if options != "all" else module.configure_model()
    (batch,) = batches_of(rows_of([30, 9, 14, 2, 21]), 5)
    module.chunked_loss = False
    whole, expected = loss_and_gradients(module, batch)
    module.chunked_loss = True
    output, gradients = loss_and_gradients(module, batch)
    assert output.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(gradients[name], gradient, 1e-6)
    with torch.no_grad():
        assert module.eval().step(batch).loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
