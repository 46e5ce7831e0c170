import math

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from cola_lightning.chain.schedule import START, ChainSchedule, FitPosition, RunLength, lr_factor, warmup_length

TEN_AN_EPOCH = RunLength(lambda epoch: 10, max_epochs=5, max_steps=math.inf)


@pytest.mark.parametrize(
    ("arguments", "links"),
    [
        ({}, [0] * 8),
        ({"every_n_epochs": 3}, [0, 0, 0, 1, 1, 1, 2, 2]),
        ({"every_n_train_steps": 25}, [0, 0, 0, 1, 1, 2, 2, 2]),
        ({"at_epochs": [1, 6]}, [0, 1, 1, 1, 1, 1, 2, 2]),
        ({"at_steps": [20, 21]}, [0, 0, 1, 2, 2, 2, 2, 2]),
    ],
    ids=str,
)
def test_knots_follow_from_the_counters(arguments, links):
    """A knot is due between two epochs of ten steps if there is one or more between them."""
    schedule = ChainSchedule(**arguments)
    for start, link in enumerate(links):
        is_due = [schedule.is_due(FitPosition(start, 10 * start), FitPosition(now, 10 * now)) for now in range(start, 8)]
        assert is_due == [later > link for later in links[start:]]
    assert schedule.has_knots == bool(arguments)


def test_a_knot_is_due_by_the_counters_at_the_links_start():
    schedule = ChainSchedule(every_n_epochs=2)
    assert schedule.is_due(FitPosition(3, 30), FitPosition(4, 40))
    assert not schedule.is_due(FitPosition(4, 40), FitPosition(5, 50))


@pytest.mark.parametrize(
    ("arguments", "run", "lengths"),
    [
        ({}, TEN_AN_EPOCH, [50]),
        ({"every_n_epochs": 2}, TEN_AN_EPOCH, [20, 20, 10]),
        ({"every_n_train_steps": 15}, TEN_AN_EPOCH, [15, 15, 15, 5]),
        ({"at_epochs": [1, 4, 9]}, TEN_AN_EPOCH, [10, 30, 10]),
        ({"at_steps": [7, 49]}, TEN_AN_EPOCH, [7, 42, 1]),
        ({"every_n_epochs": 2}, RunLength(lambda epoch: 10, 5, max_steps=33), [20, 13]),
        ({"every_n_train_steps": 4}, RunLength(lambda epoch: math.inf, math.inf, max_steps=10), [4, 4, 2]),
        ({"every_n_epochs": 1}, RunLength(lambda epoch: epoch + 1, 4, math.inf), [1, 2, 3, 4]),
        ({"every_n_epochs": 2}, RunLength(lambda epoch: 10, 9, math.inf, epoch_start=FitPosition(5, 70)), [10, 20, 10]),
        ({"every_n_epochs": 3}, RunLength(lambda epoch: 10, 9, math.inf, epoch_start=FitPosition(6, 70)), [30]),
    ],
    ids=lambda value: "" if isinstance(value, RunLength) else str(value),
)
def test_the_links_of_a_run_fill_it(arguments, run, lengths):
    schedule = ChainSchedule(**arguments)
    assert schedule.links(run.epoch_start, run) == lengths
    assert schedule.link_steps(run.epoch_start, run) == lengths[0]
    assert sum(lengths) == run.end_step - run.epoch_start.global_step


def test_a_link_that_began_inside_an_epoch_ends_with_its_epoch():
    assert ChainSchedule(every_n_epochs=2).link_steps(FitPosition(2, 24), TEN_AN_EPOCH) == 16
    assert ChainSchedule(every_n_train_steps=15).links(FitPosition(4, 45), TEN_AN_EPOCH) == [5]


def test_no_length_is_made_up():
    endless = RunLength(lambda epoch: 10, math.inf, math.inf)
    assert ChainSchedule().link_steps(FitPosition(0, 0), endless) == math.inf
    assert ChainSchedule(every_n_epochs=1, knots_unknown=True).link_steps(FitPosition(0, 0), TEN_AN_EPOCH) == math.inf


def test_ranks_and_alphas_go_link_by_link_and_the_last_holds_on():
    schedule = ChainSchedule(ranks=[8, 4], alphas=[16, 2])
    assert [schedule.rank(link) for link in range(4)] == [8, 4, 4, 4]
    assert [schedule.alpha(link) for link in range(4)] == [16, 2, 2, 2]
    schedule = ChainSchedule(default_rank=7, default_alpha=5)
    assert (schedule.rank(3), schedule.alpha(3)) == (7, 5)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_learning_rates_are_transformers(name, warmup):
    import transformers

    optimizers = [SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
    if name == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizers[0], warmup)
    else:
        theirs = getattr(transformers, f"get_{name}_schedule_with_warmup")(optimizers[0], warmup, 10)
    ours = LambdaLR(optimizers[1], lambda step: lr_factor(name, step, 10, warmup))
    for _ in range(12):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-12)
        for optimizer, scheduler in zip(optimizers, (theirs, ours), strict=True):
            optimizer.step()
            scheduler.step()


def test_a_warm_up_below_one_is_a_share_and_never_longer_than_the_link():
    assert [warmup_length(w, 25) for w in (0, 0.1, 0.5, 1, 3, 40)] == [0, 3, 13, 1, 3, 25]


def test_a_period_beyond_the_run_costs_no_time():
    run = RunLength(lambda epoch: 10, max_epochs=5, max_steps=math.inf)
    assert ChainSchedule(every_n_epochs=10**12).links(FitPosition(0, 0), run) == [50]
    assert ChainSchedule(at_epochs=[10**12]).link_steps(FitPosition(0, 0), RunLength(lambda epoch: 10, 10**12, 100)) == 100


def test_the_links_of_a_run_of_a_hundred_thousand_epochs_are_known_at_once():
    asked = []
    run = RunLength(lambda epoch: asked.append(epoch) or 10, max_epochs=100_000, max_steps=math.inf)
    assert ChainSchedule(every_n_epochs=1).links(START, run) == [10] * 100_000
    assert len(asked) < 300_000
