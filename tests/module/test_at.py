"""The model as it was after its first links, inside a block: no second model, and nothing that training needs changes."""

import contextlib

import pytest
import torch

from cola_lightning import UserError, lora_layers
from tests.helpers.tiny import causal_lm, logits, three_links
from tests.helpers.toy import assert_bit_equal, weights


def state(module):
    """All that training needs: values and gradients with their bits, modes, and what the layers have."""
    gradients = {f"{name}.grad": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    modes = [part.training for part in module.modules()]
    earlier = [layer.replacement for layer in lora_layers(module.model).values()]
    return weights(module) | gradients, (modes, earlier, torch.is_grad_enabled())


def assert_same(before, after):
    assert_bit_equal(before[0], after[0])
    assert before[1] == after[1]


HEAD = {"rank": 4, "modules_to_save": ["lm_head"], "changes": {"tie_word_embeddings": False}}
OPTIONS = {
    "merged": {},
    "stacked": {"finished_links": "stack", "dropout": 0.5},
    "head": HEAD | {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_earlier_state_has_the_outputs_of_the_merged_model_and_leaves_nothing_behind(tmp_path, case):
    module = three_links(causal_lm(tmp_path, **{"rank": 4} | OPTIONS[case]))
    module.train()
    logits(module.model)
    loss = module.model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    before = state(module)
    for links in range(4):
        with module.at(links) as model:
            assert model is module.model
            assert not model.training
            assert not torch.is_grad_enabled()
            mine = logits(model)
        expected = logits(module.merged_model(links))
        assert (mine - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1), links
        assert_same(before, state(module))
    with pytest.raises(KeyError), module.at(1):
        raise KeyError("of the user's")
    assert_same(before, state(module))


def test_a_fully_trained_module_is_another_under_autocast_too(tmp_path):
    """Autocast keeps what it has cast for as long as the tensor lives, whatever is written into it."""
    module, ids = three_links(causal_lm(tmp_path, **HEAD)), torch.arange(10)[None]

    def output(k):
        with module.at(1) if k else contextlib.nullcontext(module.model) as model:
            return model(input_ids=ids).logits

    expected = []
    for k in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(output(k))
    assert not torch.equal(*expected)
    for order in ((0, 1), (1, 0)):
        with torch.autocast("cpu", torch.bfloat16):
            assert all(torch.equal(output(k), expected[k]) for k in order)


def test_blocks_can_be_nested_and_a_stored_state_is_that_of_the_present_chain(tmp_path):
    module = three_links(causal_lm(tmp_path, rank=4))
    with module.at(1) as model:
        first = logits(model)
        with module.at(0) as inner:
            base = logits(inner)
        assert torch.equal(logits(model), first)
    assert not torch.equal(base, first)
    module.tie_knot(rank=4)
    for links, expected in ((0, base), (3, logits(module.merged_model(3)))):
        with module.at(links) as model:
            assert torch.allclose(logits(model), expected, atol=1e-5)
    whole = causal_lm(tmp_path, target_modules=None)
    with pytest.raises(UserError, match="target_modules null"), whole.at(0):
        pass
    with pytest.raises(UserError, match="got null"):
        whole.tie_knot()


@pytest.mark.parametrize("base", [{"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_of_stacked_links_the_first_are_used_to_the_bit(tmp_path, base):
    options = {"rank": 4, "finished_links": "stack"} | base
    module = three_links(causal_lm(tmp_path, **options))
    links = module.chain.truncate(1)
    with module.at(1) as model:
        mine = logits(model)
    other = causal_lm(tmp_path / "other", **options)
    other.configure_model()
    other.adapted.replay(links)
    assert torch.equal(mine, logits(other.model))
