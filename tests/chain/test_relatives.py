"""The relatives of COLA as rules on its engine: what an optimizer keeps over a knot."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from cola_lightning.cli.command_line import as_words
from cola_lightning.lora.config import DRAWS
from cola_lightning.study.methods import method
from tests.helpers.comparing import known_config
from tests.helpers.toy import DIGITS, Watch, adapt_layer, batches, toy, trainer


@pytest.mark.parametrize("init", DRAWS)
def test_a_link_begins_with_a_drawn_A_and_a_B_of_zeros(init):
    layer = adapt_layer(nn.Linear(5, 7), 3, 6, init=init)
    x = torch.randn(4, 5)
    before = layer(x)
    layer.rank = 2
    layer.reset(torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), before)
    assert not layer.lora_B.any()
    assert layer.lora_A[:2].ne(0).all()
    assert not layer.lora_A[2:].any()


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


OWN = {"model.kept_optimizer_state": 0.1, "chain.ranks": [1, 1], "chain.every_n_epochs": 5}
LORA = {"model.kept_optimizer_state": 0}
RELORA = {"model.kept_optimizer_state": 0.01, "model.schedule_scope": "run", "model.lr_schedule": "cosine"}
SAME_A = {"chain.knot": "half", "chain.ranks": None}


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("lora", LORA),
        ("cola", OWN),
        ("relora", LORA | RELORA | {"model.knot_warmup_steps": 0.1}),
        ("same-A", LORA | SAME_A | {"chain.share": 1, "chain.every_n_epochs": 5}),
        ("share-5", LORA | SAME_A | {"chain.share": 0.5, "chain.knots": 4, "chain.every_n_epochs": None}),
    ],
)
def test_a_method_of_a_study_follows_its_own_rules_and_cola_those_of_the_config(name, rules):
    found = method(name, known_config("--config", DIGITS, *as_words(OWN)))
    assert rules.items() <= (OWN | found).items()
