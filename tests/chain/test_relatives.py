"""The relatives of COLA as rules on its engine: which factor a link trains, and what an optimizer keeps over a knot."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from cola_lightning.chain.schedule import frozen_factor
from cola_lightning.cli.training import as_words
from cola_lightning.lora.config import DRAWS
from cola_lightning.study.methods import method
from tests.helpers.comparing import known_config
from tests.helpers.toy import DIGITS, Watch, adapt_layer, batches, toy, trainer


def factors(module):
    layers = module.adapted.layers.items()
    return {name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for name, layer in layers}


@pytest.mark.parametrize("drawn", ["A", "B"])
@pytest.mark.parametrize("init", DRAWS)
def test_a_link_begins_with_one_factor_drawn_and_the_other_zero(drawn, init):
    layer = adapt_layer(nn.Linear(5, 7), 3, 6, init=init)
    x = torch.randn(4, 5)
    before = layer(x)
    layer.rank = 2
    layer.reset(torch.Generator().manual_seed(1), drawn)
    assert torch.equal(layer(x), before)
    assert not layer.has_begun
    other = layer.lora_B if drawn == "A" else layer.lora_A
    drawn_factor = layer.lora_A if drawn == "A" else layer.lora_B.T
    assert not other.any()
    assert drawn_factor[:2].ne(0).all()
    assert not drawn_factor[2:].any()
    theirs = adapt_layer(nn.Linear(drawn_factor.shape[1], 2), 3, 6, init=init)
    theirs.rank = 2
    theirs.reset(torch.Generator().manual_seed(1))
    assert torch.equal(drawn_factor, theirs.lora_A)  # as the A of the transposed layer would be


@pytest.mark.parametrize("trained", ["both", "B", "random"])
def test_each_link_moves_the_factors_that_it_trains(tmp_path, trained):
    starts, watch = {}, Watch(lambda run, module: starts.setdefault(module.n_finished, factors(module)))
    module = toy(trained_factors=trained, optimizer=lambda p: AdamW(p, lr=1e-2), seed=0)
    trainer(tmp_path, watch, chain={"every_n_train_steps": 2}, max_epochs=2).fit(module, batches())
    frozen = [frozen_factor(trained, 0, link) for link in range(10)]
    assert set(frozen) == {"both": {None}, "B": {"A"}, "random": {"A", "B"}}[trained]
    for link, which in zip(module.full_chain().links, frozen, strict=True):
        for name, (lora_A, lora_B) in link.factors.items():
            was_A, was_B = starts[link.index][name]
            assert torch.equal(lora_A, was_A) == (which == "A")
            assert torch.equal(lora_B, was_B) == (which == "B")
            assert not (was_A if which == "B" else was_B).any()


def test_a_frozen_factor_is_in_no_optimizer_and_gathers_no_gradient(tmp_path):
    def look(run, module):
        for factor in module.adapted.frozen_factors():
            factor.grad = torch.full_like(factor, 1e9)  # what a step before would have left
        return len(run.optimizers[0].param_groups[0]["params"])

    watch, module = Watch(look), toy(trained_factors="B")
    trainer(tmp_path, watch, max_epochs=1, gradient_clip_val=0.1).fit(module, batches())
    assert set(watch.seen) == {2}
    assert all(factor.grad is None for factor in module.adapted.frozen_factors())


@pytest.mark.parametrize(("kept", "ranks"), [(1, [4, 2]), (0.25, [2, 4])])
def test_the_share_is_of_the_entries_that_both_links_use(tmp_path, kept, ranks):
    """Factors have the entries of the largest rank: unused ones neither count, nor move by moments that a knot retains."""

    def look(run, module):
        state, layers = run.optimizers[0].state, module.adapted.layers.values()
        assert {float(one["step"]) for one in state.values()} <= {float(run.global_step)}
        both = [(state[layer.lora_A], state[layer.lora_B]) for layer in layers if layer.lora_A in state]
        moments = [one for of_A, of_B in both for one in (of_A["exp_avg"].clone(), of_B["exp_avg"].T.clone())]
        unused = [one[layer.rank :].detach().clone() for layer in layers for one in (layer.lora_A, layer.lora_B.T)]
        return moments, unused

    used, watch = min(ranks), Watch(look)
    module = toy(rank=4, kept_optimizer_state=kept, optimizer=lambda p: AdamW(p, lr=0.1, weight_decay=0))
    trainer(tmp_path, watch, chain={"every_n_train_steps": 5, "ranks": ranks}, max_epochs=1).fit(module, batches())
    assert len(watch.seen[5][0]) == 4
    for moment in watch.seen[5][0]:
        assert not moment[used:].any()
        assert moment[:used].count_nonzero() == pytest.approx(kept * moment[:used].numel(), abs=1)
    for before, after in zip(watch.seen[5][1], watch.seen[9][1], strict=True):
        assert torch.equal(before, after)


OWN = {"model.trained_factors": "random", "model.kept_optimizer_state": 0.1, "chain.ranks": [1, 1], "chain.every_n_epochs": 5}
LORA = {"model.trained_factors": "both", "model.kept_optimizer_state": 0}
RELORA = {"model.kept_optimizer_state": 0.01, "model.schedule_scope": "run", "model.lr_schedule": "cosine"}
SAME_A = {"chain.knot": "half", "chain.ranks": None}


@pytest.mark.parametrize(
    ("name", "links", "rules"),
    [
        ("lora", 1, LORA),
        ("cola", 10, OWN),
        ("relora", 10, LORA | RELORA | {"model.knot_warmup_steps": 0.1}),
        ("asymmetric", 1, LORA | {"model.trained_factors": "B"}),
        ("same-A", 10, LORA | SAME_A | {"chain.share": 1, "chain.every_n_epochs": 5}),
        ("share-5", 5, LORA | SAME_A | {"chain.share": 0.5, "chain.knots": 4, "chain.every_n_epochs": None}),
    ],
)
def test_a_method_of_a_study_follows_its_own_rules_and_cola_those_of_the_config(name, links, rules):
    found = method(name, known_config("--config", DIGITS, *as_words(OWN)))
    assert (found.links, found.rank) == (links, 1)
    assert rules.items() <= (OWN | found.options).items()
