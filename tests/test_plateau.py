"""Knots where a link has stopped: ``ChainOfLoRA(patience=...)``."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD, AdamW

from cola_lightning import ChainOfLoRA, LastCheckpoint, UserError
from cola_lightning.callbacks.plateau import Plateau
from tests.test_resume import ARGUMENTS, FEW, STOPS, Data, Normed, Recorder, Stopped, last
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer, weights

FALLING = {"lr_schedule": "constant", "optimizer": lambda p: SGD(p, lr=0.1)}


class Told(Toy):
    """Its validation losses are given."""

    losses = (5.0, 4.0, 4.0, 3.9, 6.0, 6.0, 5.0, 5.0, 5.0, 1.0)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.losses[self.trainer.current_epoch])


def knots(tmp_path, module, **chain):
    run = trainer(tmp_path, chain=chain, max_epochs=10, num_sanity_val_steps=1)
    run.fit(module, batches(3), batches(1))
    return [link.start_step // 3 for link in [*module.chain.links, module.live_link()]]


@pytest.mark.parametrize(
    ("chain", "epochs"),
    [
        ({"patience": 1}, [0, 3, 5, 8]),
        ({"patience": 2}, [0, 6, 9]),
        ({"patience": 1, "min_delta": 1.5}, [0, 2, 4, 6, 8]),
        ({"patience": 9}, [0]),
    ],
)
def test_a_knot_follows_the_values_in_a_row_that_are_no_lower_than_the_links_own(tmp_path, chain, epochs):
    assert knots(tmp_path, toy(Told, **FALLING), **chain) == epochs


def test_a_loss_of_training_can_be_watched(tmp_path):
    class Seen(Told):
        def training_step(self, batch, batch_idx):
            self.log("seen", 1.0)
            return super().training_step(batch, batch_idx)

    assert knots(tmp_path, toy(Seen, **FALLING), patience=3, monitor="seen") == [0, 4, 8]


def test_a_new_run_of_the_same_callback_begins_anew(tmp_path):
    chain = ChainOfLoRA(patience=2)
    found = []
    for _ in range(2):
        module = toy(Told, **FALLING)
        trainer(tmp_path, chain, max_epochs=8).fit(module, batches(3), batches(1))
        found.append([link.end_step for link in module.chain.links])
    assert found[0] == found[1] != []


class Flat(Normed):
    """Every second validation finds that its link has stopped."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("flat", 1.0)


def fit(folder, stop=None, ckpt_path=None, max_epochs=3, **options):
    """A fit whose knots follow from validations, some of which lie inside of an accumulation window."""
    module = toy(Flat, **ARGUMENTS | {"lr_schedule": "constant"}, optimizer=lambda p: AdamW(p, lr=1e-2))
    recorder = Recorder(stop)
    options = {"accumulate_grad_batches": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 0} | options
    callbacks = [recorder, LastCheckpoint(), ChainOfLoRA(patience=1, monitor="flat")]
    run = trainer(folder, *callbacks, max_epochs=max_epochs, enable_checkpointing=True, **options)
    try:
        run.fit(module, datamodule=Data(batch_size=4), ckpt_path=ckpt_path)
    except Stopped:
        assert stop
    return module, recorder


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, STOPS),
        ({"accumulate_grad_batches": 1}, FEW),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, [*FEW, ("validation_end", 1)]),
    ],
    ids=["inside windows", "", "over epochs"],
)
def test_a_run_that_was_stopped_ties_the_knots_that_it_would_have_tied(tmp_path, options, stops):
    whole, expected = fit(tmp_path / "whole", **options)
    assert whole.link >= 2
    for stop in stops:
        folder = tmp_path / f"{stop}"
        _, before = fit(folder, stop, **options)
        module, after = fit(folder / "resumed", ckpt_path=last(folder), **options)
        assert [x.start_step for x in module.chain.links] == [x.start_step for x in whole.chain.links], stop
        assert_bit_equal(weights(module), weights(whole))
        for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
            assert first | second == all_, stop


def test_the_checkpoint_holds_the_values_in_plain_types(tmp_path):
    fit(tmp_path, max_epochs=1)
    state = torch.load(last(tmp_path), weights_only=True)["cola_plateau"]
    plateau = Plateau(patience=1)
    plateau.load_state_dict(state)
    assert plateau.state_dict() == state
    assert state["values"]


def test_values_that_come_again_take_the_place_of_the_first():
    plateau = Plateau(patience=1)
    for batch, value in enumerate([3.0, 2.0, 2.0]):
        plateau.watch(value, 0, batch)
    assert not plateau.is_reached(0, batch=2)  # gone back to: what was measured after it is not known yet
    plateau.watch(2.0, 0, batch=2)
    assert plateau.values == [(0, 3.0), (1, 2.0), (2, 2.0)]
    assert plateau.is_reached(0, batch=3)
    assert not plateau.is_reached(1, batch=3)


def rates(tmp_path, **arguments):
    module = toy(Told, optimizer=lambda p: SGD(p, lr=1.0), **arguments)
    recorder = Recorder()
    trainer(tmp_path, recorder, chain={"patience": 2}, max_epochs=10).fit(module, batches(2), batches(1))
    return [rate for (rate,) in recorder.rates.values()]


def test_a_schedule_over_the_run_needs_no_link_s_length(tmp_path):
    seen = rates(tmp_path, schedule_scope="run", lr_schedule="linear", knot_warmup_steps=2)
    line = [1 - k / 20 for k in range(20)]
    assert seen == pytest.approx([*line[:12], 0, line[13] / 2, *line[14:18], 0, line[19] / 2])


@pytest.mark.parametrize(
    "arguments", [{"lr_schedule": "linear"}, {"schedule_scope": "run", "lr_schedule": "linear", "knot_warmup_steps": 0.1}]
)
def test_a_schedule_that_needs_a_links_length_is_refused(tmp_path, arguments):
    with pytest.raises(UserError, match=r"model\.lr_schedule: expected constant where a link's length is not known"):
        rates(tmp_path, **arguments)


def test_a_metric_that_is_not_logged_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"chain\.monitor: expected a metric that is logged by then .*val_loss.*, received 'f1'"
    ):
        knots(tmp_path, toy(Told, **FALLING), patience=1, monitor="f1")


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"patience": 0}, r"chain\.patience: expected a whole number of at least 1, received 0"),
        ({"patience": 1, "min_delta": -1.0}, r"chain\.min_delta: expected a number of at least 0, received -1"),
        ({"patience": 1, "min_delta": math.nan}, r"chain\.min_delta: expected a number of at least 0, received nan"),
        ({"patience": 1, "at_steps": [3]}, r"chain: expected at most one of .*, patience, received patience and at_steps"),
    ],
)
def test_what_cannot_be_is_refused(chain, message):
    with pytest.raises(UserError, match=message):
        ChainOfLoRA(**chain)


def test_evaluation_outside_of_a_fit_is_not_watched(tmp_path):
    chain, module = ChainOfLoRA(patience=1), toy(Told, **FALLING)
    run = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[chain], enable_progress_bar=False)
    run.validate(module, batches(1), verbose=False)
    assert chain.plateau.values == []
