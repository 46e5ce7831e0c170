"""Knots at a plateau: a link is finished once a metric of validation has stopped improving."""

import contextlib
import math

import pytest
import torch
from torch.optim import SGD, AdamW

from cola_lightning import ChainOfLoRA, LastCheckpoint, UserError
from cola_lightning.chain.schedule import Plateau
from cola_lightning.study.config import as_words, resolved
from cola_lightning.study.methods import method
from tests.test_chain_of_lora import Watch
from tests.test_compare import DIGITS
from tests.test_resume import ARGUMENTS, Data, Normed, Recorder, Stopped, last
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


class Scripted(Toy):
    """Its validation loss is a function of the optimizer steps taken."""

    curve = staticmethod(lambda step: 1.0)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.curve(self.trainer.global_step))


def knots(tmp_path, curve, chain, **how):
    """The steps before which a run of 20 steps, validated after every second, ties its knots."""
    module = toy(Scripted, lr_schedule="constant")
    module.curve = curve
    options = {"max_epochs": 2, "val_check_interval": 2} | how
    trainer(tmp_path, chain=chain, **options).fit(module, batches(), batches(1))
    return [link.end_step for link in module.chain.links]


@pytest.mark.parametrize(
    ("values", "rule", "is_reached"),
    [
        ([], {}, False),
        ([1, 1], {}, False),
        ([1, 1, 1], {}, True),
        ([1, 2, 0.9], {}, False),
        ([1, 2, 0.9, 0.9, 3], {}, True),
        ([1, 0.95, 0.91], {"min_delta": 0.1}, True),
        ([1, 0.95, 0.89], {"min_delta": 0.1}, False),
        ([1, 2, 3], {"mode": "max"}, False),
        ([3, 2, 1], {"mode": "max"}, True),
        ([math.nan, 1, 1], {}, False),
        ([1, math.nan, math.nan], {}, True),
    ],
    ids=str,
)
def test_a_plateau_is_patience_without_an_improvement(values, rule, is_reached):
    assert Plateau(patience=2, **rule).is_reached(values) is is_reached


def test_a_knot_is_tied_where_the_loss_stands_still_and_nowhere_else(tmp_path):
    assert knots(tmp_path, lambda step: -step, {"patience": 2}) == []
    assert knots(tmp_path, lambda step: -min(step, 10), {"patience": 2}) == [14]
    assert knots(tmp_path, lambda step: -min(step, 10), {"patience": 2, "min_delta": 5}) == [6, 12, 18]
    assert knots(tmp_path, lambda step: step, {"patience": 2, "mode": "max"}) == []


def test_each_link_has_the_whole_patience_and_the_last_stays_live(tmp_path):
    assert knots(tmp_path, lambda step: 1.0, {"patience": 3}) == [8, 16]
    assert knots(tmp_path, lambda step: 1.0, {"patience": 4}) == [10]  # and not at step 20, after which there is none


def test_the_validation_before_training_does_not_count(tmp_path):
    for steps in (0, 2, -1):
        assert knots(tmp_path, lambda step: 1.0, {"patience": 3}, num_sanity_val_steps=steps) == [8, 16]


def test_a_validation_inside_an_accumulation_window_counts_at_the_next_step(tmp_path):
    """Batches 2, 4, ... are followed by validations; after every third a step is taken."""
    assert knots(tmp_path, lambda step: 1.0, {"patience": 1}, accumulate_grad_batches=3) == [2, 4, 6]


def test_a_second_fit_of_a_trainer_goes_on_counting(tmp_path):
    module = toy(Scripted, lr_schedule="constant")
    run = trainer(tmp_path, chain={"patience": 2}, max_epochs=2)
    run.fit(module, batches(), batches(1))
    assert module.link == 0
    run.fit_loop.max_epochs = 4
    run.fit(module, batches(), batches(1))
    assert [link.end_step for link in module.chain.links] == [30]
    run = trainer(tmp_path, next(c for c in run.callbacks if isinstance(c, ChainOfLoRA)), max_epochs=3)
    other = toy(Scripted, lr_schedule="constant")
    run.fit(other, batches(), batches(1))
    assert other.link == 0


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, [("batch_end", 7), ("validation", 4), ("validation_end", 1)]),
        ({"accumulate_grad_batches": 1}, [("validation_end", 3), ("batch_end", 15)]),
        ({"val_check_interval": 0.25}, [("backward", 13), ("batch_end", 2), ("validation_end", 5), ("epoch_end", 1)]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_run_that_was_stopped_ties_the_same_knots(tmp_path, options, stops):
    def fit(folder, stop=None, ckpt_path=None):
        module = toy(Normed, **ARGUMENTS | {"schedule_scope": "run"}, optimizer=lambda p: AdamW(p, lr=1e-2))
        recorder = Recorder(stop)
        how = {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 0} | options
        chain = {"patience": 1, "min_delta": 0.02}
        run = trainer(folder, recorder, LastCheckpoint(), chain=chain, enable_checkpointing=True, **how)
        with contextlib.suppress(Stopped):
            run.fit(module, datamodule=Data(batch_size=4), ckpt_path=ckpt_path)
        return module, recorder

    whole, expected = fit(tmp_path / "whole")
    assert whole.link > 1
    for stop in stops:
        folder = tmp_path / f"{stop}"
        _, before = fit(folder, stop)
        module, after = fit(folder / "resumed", ckpt_path=last(folder))
        assert [link.end_step for link in module.chain.links] == [link.end_step for link in whole.chain.links], stop
        assert_bit_equal(weights(module), weights(whole))
        for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
            assert first | second == all_, stop


def test_a_run_that_goes_on_with_another_metric_waits_for_its_values(tmp_path):
    class Two(Toy):
        def validation_step(self, batch, batch_idx):
            step = self.trainer.global_step
            self.log_dict({"val_loss": 5.0 - step / 100, "val_accuracy": step / 100})

    def fit(epochs, chain, ckpt_path=None):
        module = toy(Two, lr_schedule="constant")
        run = trainer(tmp_path, chain=chain, max_epochs=epochs)
        run.fit(module, batches(), batches(1), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "own.ckpt")
        return [link.end_step for link in module.chain.links]

    assert fit(2, {"patience": 3}) == []
    assert fit(6, {"patience": 3, "monitor": "val_accuracy", "mode": "max"}, tmp_path / "own.ckpt") == []
    assert fit(7, {"at_steps": [99]}, tmp_path / "own.ckpt") == []
    assert fit(9, {"patience": 3, "monitor": "val_accuracy"}, tmp_path / "own.ckpt") == []  # values before: none
    assert fit(12, {"patience": 3, "monitor": "val_accuracy"}, tmp_path / "own.ckpt") == [110]


def test_a_checkpoint_holds_the_values_of_the_live_link_alone(tmp_path):
    module = toy(Scripted, lr_schedule="constant")
    run = trainer(tmp_path, chain={"patience": 3}, max_epochs=1, val_check_interval=2)
    run.fit(module, batches(), batches(1))
    run.save_checkpoint(tmp_path / "live.ckpt")
    callbacks = torch.load(tmp_path / "live.ckpt", weights_only=True)["callbacks"]
    assert callbacks["ChainOfLoRA"] == {"values": {10: 1.0}, "monitor": "val_loss"}  # the knot was tied before step 8


def test_a_schedule_over_the_run_needs_no_length_of_a_link(tmp_path):
    def rates(**arguments):
        watch = Watch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"])
        module = toy(Scripted, optimizer=lambda p: SGD(p, lr=1.0), **arguments)
        trainer(tmp_path, watch, chain={"patience": 2}, max_epochs=2, val_check_interval=2).fit(module, batches(), batches(1))
        assert module.link == 3
        return watch.seen

    run = [step / 5 if step < 5 else 1 - (step - 5) / 15 for step in range(20)]
    assert rates(schedule_scope="run", warmup_steps=0.25) == pytest.approx(run)
    rise = [1 if k < 6 else min(1, k % 6 / 3) for k in range(20)]
    seen = rates(schedule_scope="run", warmup_steps=5, knot_warmup_steps=3)
    assert seen == pytest.approx([a * b for a, b in zip(run, rise, strict=True)])


@pytest.mark.parametrize(
    ("arguments", "how", "message"),
    [
        ({}, {}, r"model\.lr_schedule: expected constant, or model\.schedule_scope run .* received linear"),
        ({"lr_schedule": "constant", "warmup_steps": 0.1}, {}, r"model\.lr_schedule: .* received constant, warm-ups of 0\.1"),
        ({"schedule_scope": "run"}, {"max_epochs": -1}, r"model\.lr_schedule: expected constant, .* received linear"),
        (
            {"schedule_scope": "run", "knot_warmup_steps": 0.5},
            {},
            r"model\.lr_schedule: .* warm-ups in steps, .* after knots, 0\.5",
        ),
    ],
    ids=str,
)
def test_a_schedule_of_an_unknown_length_is_refused(tmp_path, arguments, how, message):
    module = toy(ValidatedToy, **arguments)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, chain={"patience": 2}, **{"max_epochs": 2} | how).fit(module, batches(), batches(1))
    assert module.trainer.global_step == 0


def test_a_metric_of_one_of_several_loaders_can_be_watched(tmp_path):
    class Several(Scripted):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    module = toy(Several, lr_schedule="constant")
    chain = {"patience": 2, "monitor": "val_loss/dataloader_idx_1"}
    trainer(tmp_path, chain=chain, max_epochs=4).fit(module, batches(), [batches(1), batches(1)])
    assert [link.end_step for link in module.chain.links] == [30]
    chain["monitor"] = "val_loss"
    with pytest.raises(UserError, match=r"chain\.monitor: expected one of .*val_loss/dataloader_idx_0, .* received val_loss$"):
        trainer(tmp_path, chain=chain, max_epochs=1).fit(toy(Several, lr_schedule="constant"), batches(), [batches(1)] * 2)


def test_a_metric_that_is_not_there_is_refused_before_training(tmp_path):
    module = toy(ValidatedToy, lr_schedule="constant")
    with pytest.raises(UserError, match=r"chain\.monitor: expected one of val_loss, received val_los"):
        trainer(tmp_path, chain={"patience": 2, "monitor": "val_los"}, max_epochs=1).fit(module, batches(), batches(1))
    assert module.trainer.global_step == 0
    for cls, how in ((Toy, {}), (ValidatedToy, {"limit_val_batches": 0})):
        module, loaders = toy(cls, lr_schedule="constant"), [batches()] if cls is Toy else [batches(), batches(1)]
        with pytest.raises(UserError, match=r"chain\.patience: expected a run with validation .* received one without"):
            trainer(tmp_path, chain={"patience": 2}, max_epochs=1, **how).fit(module, *loaders)


def test_a_study_leaves_the_number_of_links_to_its_runs():
    words = ["--config", DIGITS, "--chain.every_n_epochs", "null", "--chain.patience", "3", "--chain.min_delta", "0.01"]
    config = resolved(words)
    assert method("cola", config).options == {}
    for name in ("lora", "cola-5", "full"):
        changed = resolved([*words, *as_words(method(name, config).options)])["chain"]
        assert (changed["patience"], changed["min_delta"]) == (None, 0)
    with pytest.raises(
        UserError, match=r"methods: expected a number of links, as in lora-sum-rank-4, .* received 'lora-sum-rank'"
    ):
        method("lora-sum-rank", config)
