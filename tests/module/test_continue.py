"""A Trainer that fits once more goes on with its own run; its knots, starts, rates and ranks are those of one fit."""

import pytest
from torch.optim import AdamW

from cola_lightning import ChainOfLoRA
from tests.helpers.resuming import Data, Normed
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


class Watched(Toy):
    """Writes down link and rate of each step."""

    def on_train_batch_start(self, batch, batch_idx):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.__dict__.setdefault("steps", []).append((self.trainer.global_step, self.n_finished, float(rate)))


class WatchedNormed(Watched, Normed):
    pass


def make(cls=Watched, **arguments):
    return toy(cls, **{"optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


def fitted(folder, module, every, *epochs, **data):
    """Fits the module to these epochs, one after the other, by one Trainer; gives that."""
    run = trainer(folder, chain={"every_n_epochs": every}, max_epochs=0)
    for max_epochs in epochs:
        run.fit_loop.max_epochs = max_epochs
        run.fit(module, **data)
    return run


@pytest.mark.parametrize(("cls", "at_once"), [(Watched, 2), (WatchedNormed, 4)])
def test_a_fit_that_continues_at_a_knot_is_one_fit(tmp_path, cls, at_once):
    data = {"datamodule": Data(batch_size=4)} if cls is WatchedNormed else {"train_dataloaders": batches(4)}
    whole, module = (make(cls, target_modules=["0"], dropout=0.2) for _ in range(2))
    fitted(tmp_path, whole, 2, 6, **data)
    fitted(tmp_path, module, 2, at_once, 6, **data)
    assert module.steps == whole.steps
    places = [[(link.start_step, link.end_step) for link in one.chain.links] for one in (module, whole)]
    assert places[0] == places[1]
    assert_bit_equal(weights(module), weights(whole))


@pytest.mark.parametrize(("lr_schedule", "kept"), [("linear", 0.5), ("constant", 0)])
def test_a_knot_between_two_fits_is_in_the_checkpoint_that_follows_it(tmp_path, lr_schedule, kept):
    module, resumed = (make(lr_schedule=lr_schedule, kept_optimizer_state=kept) for _ in range(2))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, batches(4))
    module.tie_knot()
    run.save_checkpoint(tmp_path / "knot.ckpt")
    trainer(tmp_path, max_epochs=4).fit(resumed, batches(4), ckpt_path=tmp_path / "knot.ckpt")
    run.fit_loop.max_epochs = 4
    run.fit(module, batches(4))
    assert resumed.steps == module.steps[8:]
    assert_bit_equal(weights(resumed), weights(module))


@pytest.mark.parametrize("scope", ["link", "run"])
def test_inside_a_link_the_rate_goes_on_where_it_stood(tmp_path, scope):
    whole, module = (make(schedule_scope=scope, warmup_steps=3) for _ in range(2))
    data = {"train_dataloaders": batches(4)}
    fitted(tmp_path, whole, 4, 8, **data)
    fitted(tmp_path, module, 4, 6, 8, **data)
    assert [step[:2] for step in module.steps] == [step[:2] for step in whole.steps]
    assert [step[2] for step in module.steps[24:]] == pytest.approx([step[2] for step in whole.steps[24:]])
    assert module.live_link().start_step == 16


def test_a_links_metrics_are_of_its_own_validations(tmp_path):
    class Stepped(ValidatedToy):
        def validation_step(self, batch, batch_idx):
            self.log("val_step", float(self.trainer.global_step))

    module = make(Stepped)
    run = trainer(tmp_path, chain={"at_steps": [12, 24]}, max_steps=27)
    run.fit(module, batches(), batches(2))
    assert [link.metrics.get("val_step") for link in module.chain.links] == [10, 20]
    live = module.live_link().metrics
    assert live.keys() == {"train_loss"}
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert Stepped.load_from_checkpoint(tmp_path / "run.ckpt").live_link().metrics == live
    run.validate(module, batches(2), verbose=False)
    assert module.live_link().metrics["val_step"] == 27
    trainer(tmp_path, ChainOfLoRA(), max_steps=2, limit_val_batches=0).fit(module, batches(), batches(2))
    assert module.live_link().metrics["val_step"] == 27  # which it keeps in a next fit
    module.tie_knot()
    assert module.chain.links[-1].metrics["val_step"] == 27
    assert module.live_link().metrics == {}
