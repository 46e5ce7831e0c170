"""When knots are tied, and the learning rate of each step, under the Trainer."""

import itertools
import math

import pytest
import torch
import transformers
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset

from cola_lightning import ChainOfLoRA, LoRAConfig, UserError
from cola_lightning.chain.schedule import ChainSchedule, FitPosition, RunLength
from cola_lightning.module.optimization import DECAY, LinkConfig, lr_factor, phase_length
from tests.helpers.toy import Toy, ValidatedToy, Watch, batches, toy, trainer


class Scripted(Toy):
    """Its validation loss is a function of the optimizer steps taken."""

    curve = staticmethod(lambda step: 1.0)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.curve(self.trainer.global_step))


class Rows(IterableDataset):
    """The rows of ten batches, without a length, once or for ever."""

    def __init__(self, *, is_endless):
        self.is_endless = is_endless

    def __iter__(self):
        rows = [(x, y) for batch in batches() for x, y in zip(*batch, strict=True)]
        return itertools.cycle(rows) if self.is_endless else iter(rows)


ONCE, ENDLESS = (DataLoader(Rows(is_endless=is_endless), batch_size=4) for is_endless in (False, True))


def ends(module):
    """The steps before which its knots were tied."""
    return [link.end_step for link in module.chain.links]


# ---------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ({"every_n_epochs": 2}, [8, 16]),
        ({"every_n_train_steps": 6}, [6, 12, 18]),
        ({"at_epochs": [1, 4]}, [4, 16]),
        ({"at_steps": [3, 17]}, [3, 17]),
        ({"knots": 3, "until": 0.6}, [4, 8, 12]),
        ({"knots": 1, "until": 0.01}, []),  # a run too short for it
    ],
    ids=str,
)
def test_knots_fall_where_the_schedule_says(tmp_path, chain, expected):
    module = toy(lr_schedule="cosine")
    trainer(tmp_path, chain=chain, max_epochs=5).fit(module, batches(4))
    assert [link.start_step for link in module.full_chain().links] == [0, *expected]
    assert ends(module) == expected


def test_the_last_rank_and_alpha_of_short_lists_hold_on():
    schedule = ChainSchedule(ranks=[2, 1], alphas=[4, 3])
    assert [schedule.rank_and_alpha(link, LoRAConfig()) for link in range(3)] == [(2, 4), (1, 3), (1, 3)]


def test_a_rule_of_ones_own_decides_the_knots(tmp_path):
    class AtOddSteps(ChainOfLoRA):
        requested = ()

        def should_tie(self, epoch, global_step):
            self.requested = (*self.requested, global_step)
            return global_step in (3, 7)

    rule, module = AtOddSteps(), toy(lr_schedule="constant")
    trainer(tmp_path, rule, max_epochs=2, accumulate_grad_batches=2).fit(module, batches())
    assert rule.requested == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert ends(module) == [3, 7]
    with pytest.raises(UserError, match=r"model\.lr_schedule"):
        trainer(tmp_path, AtOddSteps(), max_epochs=2).fit(toy(), batches())


@pytest.mark.parametrize(
    ("every", "run", "start", "lengths"),
    [
        (2, RunLength(lambda epoch: 10, 9, math.inf, epoch_start=FitPosition(5, 70)), FitPosition(5, 70), [10, 20, 10]),
        (2, RunLength(lambda epoch: 10, 5, math.inf), FitPosition(2, 24), [16, 10]),  # a link that began inside an epoch
        (1, RunLength(lambda epoch: 10, 20_000, math.inf), FitPosition(0, 0), [10] * 20_000),  # known at once
    ],
    ids=["after epochs of another length", "inside an epoch", "many epochs"],
)
def test_the_links_of_a_run_fill_it(every, run, start, lengths):
    """``test_properties.py`` has the runs that start at their beginning."""
    schedule = ChainSchedule(every_n_epochs=every)
    assert schedule.link_lengths(start, run) == lengths
    assert schedule.link_steps(start, run) == lengths[0]


# ---------------------------------------------------------------------- a plateau


@pytest.mark.parametrize(
    ("curve", "chain", "expected"),
    [
        (lambda step: -min(step, 10), {"patience": 2}, [14]),
        (lambda step: -min(step, 10), {"patience": 2, "min_delta": 5}, [6, 12, 18]),
        (lambda step: step, {"patience": 2, "mode": "max"}, []),
        (lambda step: 1.0, {"patience": 3}, [8, 16]),  # each link has the whole patience
        (lambda step: 1.0, {"patience": 4}, [10]),  # and not at step 20, after which there is none
        (lambda step: math.nan if step < 5 else 1.0, {"patience": 3}, [12]),  # NaN is no improvement
    ],
    ids=["stands", "stands within delta", "rises, max", "patience 3", "patience 4", "nan"],
)
def test_a_link_ends_where_its_loss_stands_still_and_nowhere_else(tmp_path, curve, chain, expected):
    module = toy(Scripted, lr_schedule="constant")
    module.curve = curve
    options = {"max_epochs": 2, "val_check_interval": 2}
    options["num_sanity_val_steps"] = -1  # what is validated before training does not count
    trainer(tmp_path, chain=chain, **options).fit(module, batches(), batches(1))
    assert ends(module) == expected


def test_a_validation_inside_an_accumulation_window_counts_at_the_next_step(tmp_path):
    """Batches 2, 4, ... are followed by validations; after every third a step is taken."""
    module = toy(Scripted, lr_schedule="constant")
    options = {"max_epochs": 2, "val_check_interval": 2, "accumulate_grad_batches": 3}
    trainer(tmp_path, chain={"patience": 1}, **options).fit(module, batches(), batches(1))
    assert ends(module) == [2, 4, 6]


def test_a_plateau_of_nothing_is_refused(tmp_path):
    module = toy(ValidatedToy, lr_schedule="constant")
    with pytest.raises(UserError, match=r"chain\.monitor: val_los is not logged .* val_loss"):
        trainer(tmp_path, chain={"patience": 2, "monitor": "val_los"}, max_epochs=1).fit(module, batches(), batches(1))
    with pytest.raises(UserError, match=r"chain\.patience: this run has no validation"):
        trainer(tmp_path, chain={"patience": 2}, max_epochs=1).fit(toy(lr_schedule="constant"), batches())


# ---------------------------------------------------------------------- rates


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "stable"])
def test_the_learning_rates_are_transformers(name, warmup):
    optimizers = [SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2)]
    if name == "stable":
        options = {"num_decay_steps": 4, "num_training_steps": 10, "warmup_type": "linear", "decay_type": "linear"}
        theirs = transformers.get_wsd_schedule(optimizers[0], warmup, **options)
    else:
        length = [] if name == "constant" else [10]
        theirs = getattr(transformers, f"get_{name}_schedule_with_warmup")(optimizers[0], warmup, *length)
    ours = LambdaLR(optimizers[1], lambda step: lr_factor(name, step, 10, warmup, 0.4))
    for _ in range(12):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), abs=1e-12)
        for optimizer, scheduler in zip(optimizers, (theirs, ours), strict=True):
            optimizer.step()
            scheduler.step()


def test_in_a_loop_without_a_trainer_a_schedule_never_decays_and_needs_a_warm_up_in_steps():
    """No length is known there."""
    rates = []
    for arguments in ({}, {"lr_schedule": "stable"}, {"lr_schedule": "stable", "decay_steps": 3, "warmup_steps": 2}):
        configured = toy(**arguments).configure_optimizers()
        for _ in range(3):
            configured["optimizer"].step()
            configured["lr_scheduler"]["scheduler"].step()
        rates.append(configured["optimizer"].param_groups[0]["lr"])
    assert rates == [1e-3] * 3
    configured = toy(warmup_steps=0.1).configure_optimizers()
    configured["optimizer"].step()
    with pytest.raises(UserError, match=r"model\.warmup_steps: .* 0\.1"):
        configured["lr_scheduler"]["scheduler"].step()


def test_knots_of_a_run_with_a_stable_schedule_fall_before_its_decay(tmp_path):
    stable = {"lr_schedule": "stable", "schedule_scope": "run", "decay_steps": 0.4}
    for arguments, last in ((stable, 6), (stable | {"decay_steps": 6}, 4), ({}, 8)):
        module = toy(**arguments)
        trainer(tmp_path, chain={"knots": 2}, max_epochs=1).fit(module, batches())
        assert [link.end_step for link in module.chain.links][-1] == last


def test_a_warm_up_below_one_is_a_share_and_never_longer_than_the_link():
    assert [phase_length(w, 25) for w in (0, 0.1, 0.5, 1, 3, 40)] == [0, 3, 13, 1, 3, 25]


def rates(tmp_path, chain, *callbacks, loaders=None, fit=(), cls=Scripted, **arguments):
    """The learning rate of each batch, as a share of the highest."""
    watch = Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
    module = toy(cls, optimizer=lambda p: SGD(p, lr=0.01), **arguments)
    run = trainer(tmp_path, watch, *callbacks, chain=chain, **{"max_epochs": 2} | dict(fit))
    run.fit(module, *(loaders or [batches(), batches(1)]))
    return [100 * rate for rate in watch.seen]


JAGGED = [k / 5 if k < 5 else 1 - (k - 5) / 15 for k in range(20)]  # ReLoRA's, but for the warm-ups after knots
RISE = [min(1, k % 6 / 3) if k >= 6 else 1 for k in range(18)]
EVERY_6 = {"every_n_train_steps": 6}
OF_THE_RUN = {"schedule_scope": "run", "warmup_steps": 5}

RATES = {
    "the run's": (EVERY_6, {"schedule_scope": "run", "warmup_steps": 0.25}, JAGGED),
    "the run's, warmed up after knots; the last link has two steps": (
        EVERY_6,
        OF_THE_RUN | {"knot_warmup_steps": 3},
        [a * b for a, b in zip(JAGGED, [*RISE, 0, 1 / 2], strict=True)],
    ),
    "a share of links of other lengths": (
        {"at_steps": [4, 14]},
        {"lr_schedule": "constant", "knot_warmup_steps": 0.2},
        [1] * 4 + [0, 0.5] + [1] * 8 + [0, 0.5] + [1] * 4,
    ),
    "a short last link's": (
        {"every_n_train_steps": 12},
        {"lr_schedule": "constant", "warmup_steps": 10},
        [*(k / 10 for k in range(10)), 1, 1, *(k / 8 for k in range(8))],
    ),
    "the run's, of links that nobody knows": (
        {"patience": 2},
        OF_THE_RUN | {"knot_warmup_steps": 3},
        [a * b for a, b in zip(JAGGED, [*RISE, 0, 1 / 3], strict=True)],
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_the_rate_of_each_step(tmp_path, name):
    chain, arguments, expected = RATES[name]
    assert rates(tmp_path, chain, fit={"val_check_interval": 2}, **arguments) == pytest.approx(expected)


def test_the_trainers_own_limits_are_the_length_of_a_run(tmp_path):
    assert rates(tmp_path, {}, fit={"limit_train_batches": 3}) == pytest.approx([1 - step / 6 for step in range(6)])


def test_links_of_epochs_without_a_length_have_the_schedule_of_the_run(tmp_path):
    options = {"fit": {"max_steps": 30, "max_epochs": None}, "schedule_scope": "run"}
    seen = rates(tmp_path, {"every_n_epochs": 1, "ranks": [2, 1]}, knot_warmup_steps=2, loaders=[ONCE, batches(1)], **options)
    after_knot = {10: 0, 11: 0.5, 20: 0, 21: 0.5}
    assert seen == pytest.approx([(1 - step / 30) * after_knot.get(step, 1) for step in range(30)])
    seen = rates(tmp_path, {"every_n_train_steps": 3}, loaders=[ENDLESS, batches(1)], **options)
    assert seen == pytest.approx([1 - step / 30 for step in range(30)])


@pytest.mark.parametrize(
    ("chain", "arguments", "loader", "advice"),
    [
        ({"patience": 2}, {}, batches(), {"schedule_scope": "run"}),
        ({"patience": 2}, {"lr_schedule": "constant", "warmup_steps": 0.1}, batches(), {"schedule_scope": "run"}),
        ({"every_n_epochs": 1}, {}, ONCE, {"max_steps": 12, "schedule_scope": "run"}),
        ({"every_n_train_steps": 3}, {"schedule_scope": "run"}, ENDLESS, {"max_steps": 12}),
        ({"knots": 3}, {"lr_schedule": "constant"}, ENDLESS, {"max_steps": 12}),
    ],
    ids=["decay", "share of a link", "epochs without a length", "endless data", "share of endless data"],
)
def test_a_schedule_of_an_unknown_length_is_refused_with_advice_that_works(tmp_path, chain, arguments, loader, advice):
    with pytest.raises(UserError, match=".*".join(advice)):
        rates(tmp_path, chain, loaders=[loader, batches(1)], fit={"max_epochs": 2}, **arguments)
    fit = {"max_epochs": 2} | {name: advice.pop(name) for name in list(advice) if name == "max_steps"}
    assert rates(tmp_path, chain, loaders=[loader, batches(1)], fit=fit, **arguments | advice)


def test_a_link_from_a_knot_by_hand_at_the_end_of_an_epoch_has_a_schedule_of_its_length(tmp_path):
    class ByHand(ValidatedToy):
        def on_train_epoch_end(self):
            if self.n_finished == 0:
                self.tie_knot()

    seen = rates(tmp_path, {"every_n_epochs": 1}, fit={"max_epochs": 3}, cls=ByHand, warmup_steps=0.2)
    assert seen == pytest.approx([0, 0.5, *(1 - step / 8 for step in range(8))] * 3)


def test_a_schedule_that_a_user_adds_by_its_name_may_be_used(monkeypatch):
    monkeypatch.setitem(DECAY, "square", lambda progress: (1 - progress) ** 2)
    LinkConfig(lr_schedule="square")
    assert [lr_factor("square", step, 4, 0) for step in (0, 2)] == [1, 0.25]
