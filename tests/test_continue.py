"""A Trainer that fits once more goes on with its own run; its knots, starts, rates and ranks are those of one fit."""

import logging
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from torch.optim import AdamW

from cola_lightning import ChainOfLoRA, UserError
from tests.test_resume import Data, Normed
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


class Watched(Toy):
    """Writes down link and rate of each step."""

    def on_train_batch_start(self, batch, batch_idx):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.__dict__.setdefault("steps", []).append((self.trainer.global_step, self.link, float(rate)))


def make(cls=Watched, **arguments):
    return toy(cls, **{"optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


@pytest.mark.parametrize("at_once", [4, 6])
@pytest.mark.parametrize("data", ["a loader", "an EpochDataModule"])
def test_a_fit_that_continues_at_a_knot_is_one_fit(tmp_path, at_once, data):
    given = {"train_dataloaders": batches()} if data == "a loader" else {"datamodule": Data(batch_size=4)}
    cls = Watched if data == "a loader" else type("WatchedNormed", (Watched, Normed), {})
    arguments = {"target_modules": ["0"], "dropout": 0.2}
    whole = make(cls, **arguments)
    trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=8).fit(whole, **given)
    module = make(cls, **arguments)
    run = trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=at_once)
    run.fit(module, **given)
    run.fit_loop.max_epochs = 8
    run.fit(module, **given)
    assert module.steps == whole.steps
    assert [(link.start_step, link.end_step) for link in module.chain.links] == [
        (link.start_step, link.end_step) for link in whole.chain.links
    ]
    assert_bit_equal(weights(module), weights(whole))


@pytest.mark.parametrize("lr_schedule", ["linear", "constant"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_knot_between_two_fits_is_in_the_checkpoint_that_follows_it(tmp_path, lr_schedule, kept):
    arguments = {"lr_schedule": lr_schedule, "kept_optimizer_state": kept}
    module, run = make(**arguments), trainer(tmp_path, max_epochs=2)
    run.fit(module, batches())
    module.tie_knot()
    run.save_checkpoint(tmp_path / "knot.ckpt")
    resumed = make(**arguments)
    trainer(tmp_path, max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "knot.ckpt")
    run.fit_loop.max_epochs = 4
    run.fit(module, batches())
    assert resumed.steps == module.steps[20:]
    assert_bit_equal(weights(resumed), weights(module))


@pytest.mark.parametrize("scope", ["link", "run"])
def test_inside_a_link_the_rate_goes_on_where_it_stood(tmp_path, scope):
    whole = make(schedule_scope=scope, warmup_steps=3)
    trainer(tmp_path, chain={"every_n_epochs": 4}, max_epochs=8).fit(whole, batches())
    module = make(schedule_scope=scope, warmup_steps=3)
    run = trainer(tmp_path, chain={"every_n_epochs": 4}, max_epochs=6)
    run.fit(module, batches())
    n_first = len(module.steps)
    run.fit_loop.max_epochs = 8
    run.fit(module, batches())
    assert [step[:2] for step in module.steps] == [step[:2] for step in whole.steps]
    assert [step[2] for step in module.steps[n_first:]] == pytest.approx([step[2] for step in whole.steps[n_first:]])
    assert module.live_link().start_step == 40


def test_another_module_on_the_same_trainer_begins_where_that_stands(tmp_path):
    run = trainer(tmp_path, chain={"every_n_epochs": 2}, max_epochs=3)
    run.fit(make(), batches())
    run.fit_loop.max_epochs = 5
    second = make()
    run.fit(second, batches())
    assert second.link_start == (4, 40)
    assert [(link.start_step, link.end_step) for link in second.chain.links] == [(30, 40)]


@pytest.mark.parametrize(("chain", "received"), [({"ranks": [1]}, r"\(1, 4"), ({"alphas": [8]}, r"\(2, 8")])
def test_another_rank_or_alpha_of_a_link_that_has_been_trained_is_refused(tmp_path, chain, received):
    module = make()
    trainer(tmp_path, chain={}, max_epochs=1).fit(module, batches())
    with pytest.raises(UserError, match=rf"model.rank, model.alpha, chain.ranks.* has been trained.* received {received}"):
        trainer(tmp_path, chain=chain, max_epochs=1).fit(module, batches())


def test_a_link_that_is_new_begins_as_the_schedule_says(tmp_path):
    first = make()
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(first, batches())
    first.chain.save(tmp_path / "chain")
    module = make(init_chain=str(tmp_path / "chain"))
    module.configure_model()  # before there is a schedule
    trainer(tmp_path, chain={"ranks": [2, 2, 1], "alphas": [4, 4, 9]}, max_epochs=1).fit(module, batches())
    assert (module.live_link().rank, module.live_link().alpha) == (1, 9)


def test_another_rank_of_a_finished_link_beside_a_checkpoint_is_refused(tmp_path):
    run = trainer(tmp_path, chain={"every_n_epochs": 1, "ranks": [2, 1, 2]}, max_epochs=3)
    run.fit(make(), batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    for ranks, refused in (([1, 1, 2], True), ([2, 1, 2], False)):
        again = trainer(tmp_path, chain={"every_n_epochs": 1, "ranks": [*ranks, 2]}, max_epochs=4)
        with pytest.raises(UserError, match="the ranks and alphas of the checkpoint") if refused else nullcontext():
            again.fit(make(), batches(), ckpt_path=tmp_path / "run.ckpt")


# ---------------------------------------------------------------------- a link's metrics


def test_a_links_metrics_are_of_its_own_validations(tmp_path, caplog):
    class Stepped(ValidatedToy):
        def validation_step(self, batch, batch_idx):
            self.log("val_step", float(self.trainer.global_step))

    module = make(Stepped)
    run = trainer(tmp_path, chain={"at_steps": [12, 24]}, max_steps=27)
    with caplog.at_level(logging.INFO):
        run.fit(module, batches(), batches(2))
    assert [link.metrics.get("val_step") for link in module.chain.links] == [10, 20]
    live = module.live_link().metrics
    assert "val_step" not in live
    assert "train_loss" in live
    assert "val_step" not in next(line for line in caplog.messages if "live at the end" in line)
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Stepped.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.live_link().metrics == live
    run.validate(module, batches(2), verbose=False)
    assert module.live_link().metrics["val_step"] == 27


def test_a_link_keeps_its_metrics_in_a_next_fit(tmp_path):
    module = make(ValidatedToy)
    run = trainer(tmp_path, chain={}, max_epochs=1)
    run.fit(module, batches(), batches(2))
    value = module.live_link().metrics["val_loss"]
    trainer(tmp_path, ChainOfLoRA(), max_steps=2, limit_val_batches=0).fit(module, batches(), batches(2))
    assert module.live_link().metrics["val_loss"] == value
    module.tie_knot()
    assert module.chain.links[0].metrics["val_loss"] == value
    assert module.live_link().metrics == {}


# ---------------------------------------------------------------------- rates


def test_a_rate_may_be_a_tensor_and_an_optimizer_may_have_rates_of_its_own(tmp_path):
    def optimizer(kind):
        return partial(AdamW, lr=kind(1e-2), foreach=False)  # one tensor for all links

    resumed = {}
    for kind in (float, torch.tensor):
        run = trainer(tmp_path, chain={"at_steps": [3]}, max_epochs=1)
        run.fit(make(optimizer=optimizer(kind)), batches(4))
        run.save_checkpoint(tmp_path / "run.ckpt")
        resumed[kind] = make(optimizer=optimizer(kind))
        trainer(tmp_path, chain={"at_steps": [3]}, max_epochs=3).fit(resumed[kind], batches(4), ckpt_path=tmp_path / "run.ckpt")
    first, second = resumed.values()
    assert [step[:2] for step in second.steps] == [step[:2] for step in first.steps]
    assert [step[2] for step in second.steps] == pytest.approx([step[2] for step in first.steps])
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value)
    own = toy(optimizer=transformers.Adafactor, lr_schedule="constant")
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(own, batches())
    assert own.link == 1
