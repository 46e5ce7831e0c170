"""Compiled models and models that compute their activations twice train as they do without."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from cola_lightning import LastCheckpoint
from cola_lightning.hf import chunked_loss
from cola_lightning.hf.logits import logits_at
from tests.helpers import tiny
from tests.helpers.toy import ValidatedToy, batches, toy, trainer, weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Whole(ValidatedToy):
    """The toy with a forward of its own: one graph."""

    def build_model(self):
        return Net()


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled, as it is compiled: graphs, run without generating code."""
    torch._dynamo.reset()
    compiled, compile_model = [], nn.Module.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_model(self, backend=backend, **options))
    yield compiled
    torch._dynamo.reset()


def fit(folder, module, chain):
    run = trainer(folder, LastCheckpoint(), chain=chain, max_epochs=3, enable_checkpointing=True, num_sanity_val_steps=0)
    run.fit(module, batches(4), batches(2))
    return module


def make(**arguments):
    return toy(Whole, **{"rank": 4, "optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


@pytest.mark.parametrize(("mode", "n"), [pytest.param("merge", 2, marks=pytest.mark.slow), ("stack", 3)])  # of 0, 2 and 3
def test_each_rank_and_size_of_a_stack_is_compiled_once_in_training_and_in_validation(tmp_path, graphs, mode, n):
    chain, x = {"every_n_epochs": 1, "ranks": [2, 1, 2]}, torch.randn(3, 8)
    module = fit(tmp_path, make(finished_links=mode, compile=True), chain)
    assert 2 * 2 <= len(graphs) <= 2 * n  # dynamo may take a size that has changed for any
    plain = fit(tmp_path / "plain", make(finished_links=mode), chain)
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.merged_model()(x), module.model.eval()(x))
    loaded = Whole.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert not loaded.should_compile
    torch.testing.assert_close(loaded.model(x), module.model(x))
    assert len(graphs) <= 2 * n + 1  # the module's own, in evaluation without a trainer


def language_model(folder, architecture, **arguments):
    return tiny.with_live_link(tiny.causal_lm(folder, architecture, **arguments))


def loss_of(module):
    ids = torch.arange(24).view(3, 8) + 5
    logits = logits_at(module.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(7))
    torch.manual_seed(0)
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def assert_same_gradients(mine, theirs):
    pairs = zip(mine.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, ours), (_, other) in pairs:
        assert ours.grad is None or ours.grad.any(), name
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("architecture", "chunked"), [pytest.param("gpt2", False, marks=pytest.mark.slow), ("gemma2", True)])
def test_a_language_model_is_one_graph(tmp_path, graphs, monkeypatch, architecture, chunked):
    monkeypatch.setattr(chunked_loss, "CHUNK", 4 * 400 * 7)  # seven positions
    ids = torch.arange(24).view(3, 8) + 5
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    changes = {"num_hidden_layers": 1} | ({"layer_types": ["sliding_attention"]} if architecture == "gemma2" else {})
    options = {"finished_links": "stack", "changes": changes}
    module = language_model(tmp_path, architecture, compile=True, chunked_loss=chunked, **options)
    module.step(batch).loss.backward()
    module.zero_grad()
    module.step(batch).loss.backward()
    assert len(graphs) == 1
    plain = language_model(tmp_path, architecture, **options)
    plain.step(batch).loss.backward()
    assert_same_gradients(module, plain)


@pytest.mark.parametrize(("architecture", "mode"), [("llama", "stack"), ("gpt2", "merge")])
def test_activations_that_are_computed_twice_give_the_same_gradients(tmp_path, architecture, mode):
    arguments = {"finished_links": mode, "dropout": 0.3}
    twice = language_model(tmp_path, architecture, activation_checkpointing=True, **arguments)
    once = language_model(tmp_path, architecture, **arguments)
    saved = []
    for module in (once, twice):
        module.tie_knot()
        tiny.with_live_link(module)
        torch.manual_seed(3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            loss = loss_of(module)
        saved.append(sum(sizes))
        loss.backward()
    assert saved[1] < 0.6 * saved[0]
    assert_same_gradients(twice, once)
