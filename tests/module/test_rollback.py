"""A chain goes back, goes on, and starts from another one: in one process as in a fresh one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import AdamW

from cola_lightning import ChainOfLoRA, COLAModule, UserError, lora_layers
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli.export import export
from tests.helpers.resuming import Data, Normed
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, batches, saved, toy, trainer, weights


class Watched(ValidatedToy):
    """Writes down link and rate of each step."""

    def on_train_batch_start(self, batch, batch_idx):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.__dict__.setdefault("steps", []).append((self.trainer.global_step, self.n_finished, float(rate)))


class WatchedNormed(Watched, Normed):
    pass


def make(cls=ValidatedToy, **arguments):
    return toy(cls, rank=3, optimizer=lambda p: AdamW(p, lr=1e-2), **arguments)


def fit(folder, module, *callbacks, epochs=4, **options):
    run = trainer(folder, *callbacks, chain={"every_n_epochs": 1}, max_epochs=epochs, **options)
    run.fit(module, batches(), batches(2))
    return run


def test_back_to_the_best_and_on_in_one_process_equals_fresh_ones(tmp_path):
    class Best(ValidatedToy):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", abs(self.current_epoch - 1.0))  # the best is in link 1

    module = make(Best)
    run = fit(tmp_path, module, ModelCheckpoint(tmp_path, "best", monitor="val_loss"), enable_checkpointing=True)
    assert module.n_finished == 3
    run.validate(module, batches(2), ckpt_path="best", verbose=False)
    fresh = make(Best)
    fresh_run = trainer(tmp_path, ModelCheckpoint(tmp_path, "best", monitor="val_loss"), chain={}, enable_checkpointing=True)
    fresh_run.validate(fresh, batches(2), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert module.n_finished == fresh.n_finished == 1
    assert_bit_equal(weights(module), weights(fresh))

    fit(tmp_path / "again", module, epochs=3)
    loaded = Best.load_from_checkpoint(tmp_path / "best.ckpt", optimizer=lambda p: AdamW(p, lr=1e-2))
    fit(tmp_path / "again", loaded, epochs=3)
    assert module.n_finished == loaded.n_finished == 3
    assert_bit_equal(weights(module), weights(loaded))
    assert [link.start_step for link in module.chain.links] == [0, 0, 10]


@pytest.mark.parametrize("settings", ["second fit", "init_chain", "by hand"])
def test_a_chain_that_goes_on_has_the_knots_and_rates_of_a_run_of_its_own(tmp_path, settings):
    first = second = make(Watched)
    fit(tmp_path, first, epochs=2)
    if settings == "by hand":
        first.tie_knot(rank=2)
    if settings == "init_chain":
        first.full_chain().save(tmp_path / "chain")
        second = make(Watched, init_chain=str(tmp_path / "chain"))
    run = fit(tmp_path / "more", second, epochs=2)
    base = 1 if settings == "second fit" else 2
    _, links, rates = zip(*second.steps[-20:], strict=True)
    assert list(links) == [base] * 10 + [base + 1] * 10
    assert rates == pytest.approx([1e-2 * (1 - step % 10 / 10) for step in range(20)])
    assert [(link.start_step, link.end_step) for link in second.chain.links[base:]] == [(0, 10)]
    if settings == "init_chain":  # which its checkpoint needs no more
        run.save_checkpoint(tmp_path / "more.ckpt")
        (tmp_path / "chain").rename(tmp_path / "elsewhere")
        loaded = Watched.load_from_checkpoint(tmp_path / "more.ckpt")
        assert loaded.run.start.sources is None
        assert_bit_equal(weights(loaded), weights(second))


@pytest.mark.parametrize("kind", ["chain", "peft"])
def test_a_link_that_was_never_trained_is_not_exported(tmp_path, kind):
    module = make(Toy, modules_to_save=["2"], target_modules=["0"])
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    module.tie_knot()
    for one, ends in ((module, [10, 20, 30]), (Toy.load_from_checkpoint(tmp_path / "run.ckpt", links=1), [10])):
        one.export(tmp_path / "by_module", kind, overwrite=True)
        export([str(saved(one, tmp_path)), "--format", kind, "--output", str(tmp_path / "by_command"), "--overwrite"])
        for folder in ("by_module", "by_command"):
            written = read_chain(tmp_path / folder)
            steps, ranks = [link.end_step for link in written.links], [link.rank for link in one.chain.links]
            assert (steps == ends) if kind == "chain" else (written[0].rank == sum(ranks))
            assert written[-1].extras.keys() == {"2.weight", "2.bias"}
            assert_bit_equal(written[-1].extras, one.chain[-1].extras)
        assert one.live_link().start_step == one.live_link().end_step


def test_a_checkpoint_stores_a_module_once_for_all_links_that_left_it_as_it_was(tmp_path):
    module = make(modules_to_save=["2"], target_modules=["0"])
    fit(tmp_path, module, epochs=2)
    module.model[2].requires_grad_(False)
    fit(tmp_path, module, epochs=4).save_checkpoint(tmp_path / "run.ckpt")
    values = [link.extras["2.weight"] for link in read_chain(tmp_path / "run.ckpt").links[:-1]]
    assert len(values) == 4
    assert len({value.data_ptr() for value in values}) == 2  # of the first link, and of the others
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize(("targets", "finished_links"), [(["0"], "merge"), (["0"], "stack"), (None, "auto")])
def test_a_checkpoint_is_loaded_with_any_number_of_its_links_and_a_module_goes_back(tmp_path, targets, finished_links):
    options = {"target_modules": targets, "modules_to_save": ["3"] if targets else [], "finished_links": finished_links}
    module, path = make(Normed, **options), tmp_path / "run.ckpt"
    run = trainer(tmp_path, chain={"every_n_epochs": 1} if targets else {}, max_epochs=4)
    run.fit(module, batches(), batches(2))
    run.save_checkpoint(path)
    most = 4 if targets else 1  # full fine-tuning is one link to go back from
    for links in range(most + 1):
        loaded = Normed.load_from_checkpoint(path, links=links)
        expected = module.merged_model(links).eval().state_dict()
        for name, value in loaded.merged_model().eval().state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)
        if targets:
            recorded = module.full_chain()[links - 1].extras if links else {}
            assert_bit_equal({name: expected[name] for name in recorded}, recorded)
            assert loaded.n_finished == min(links, 3)
            for layer in lora_layers(loaded.model).values():
                assert layer.lora_A.any()
                assert bool(layer.lora_B.any()) == (links == 4)
    if targets:
        first = module.chain.truncate(1)
        module.adapted.go_to(first)
        state = module.model.state_dict()
        assert_bit_equal({name: state[name] for name in first[0].extras}, first[0].extras)
    with pytest.raises(UserError, match=r"^links: .* got 5"):
        Normed.load_from_checkpoint(path, links=5)


class Seedless(Toy):
    """Its layers' width is an argument, and its seed is drawn."""

    def __init__(self, width, function=len, **chain):
        super().__init__(**chain, seed=None)
        self.width, self.function = width, function

    def build_model(self):
        return nn.Sequential(nn.Linear(8, self.width), nn.Tanh(), nn.Linear(self.width, 6))


def test_class_arguments_and_seed_come_from_the_checkpoint(tmp_path, caplog):
    module = Seedless(20, max, target_modules="all-linear", rank=2)
    path = saved(module, tmp_path)
    loaded = COLAModule.load_from_checkpoint(path)
    assert (type(loaded), loaded.seed) == (Seedless, module.seed)
    assert_bit_equal(weights(loaded), weights(module))
    assert loaded.function is len
    assert "'function'" in caplog.text  # which was no plain value, and is not given
    caplog.clear()
    assert Seedless.load_from_checkpoint(path, function=max).function is max
    assert not caplog.text


def test_where_all_is_trained_the_values_are_enough():
    class PartlyFrozen(Toy):
        def configure_model(self):
            self.model[0].requires_grad_(False)
            super().configure_model()

    state = toy(target_modules=None).state_dict()
    changed = {name: value + 1 for name, value in state.items() if name != "chain.metadata"}
    for received in (changed, state | changed):
        fresh = toy(target_modules=None)
        fresh.load_state_dict(received)
        assert_bit_equal(weights(fresh), changed)
    for other in (toy(), toy(PartlyFrozen, target_modules=None)):
        with pytest.raises(RuntimeError, match=r"chain\.metadata"):
            other.load_state_dict(changed)


# ---------------------------------------------------------------------- a Trainer that fits once more goes on with its own run


def fitted(folder, module, every, *epochs):
    """Fits the module to these epochs, one after the other, by one Trainer."""
    run = trainer(folder, chain={"every_n_epochs": every}, max_epochs=0)
    for max_epochs in epochs:
        run.fit_loop.max_epochs = max_epochs
        run.fit(module, Data(batch_size=4))


def test_a_fit_that_continues_at_a_knot_is_one_fit(tmp_path):
    whole, module = (make(WatchedNormed, target_modules=["0"], dropout=0.2) for _ in range(2))
    fitted(tmp_path, whole, 2, 6)
    fitted(tmp_path, module, 2, 4, 6)
    assert module.steps == whole.steps
    places = [[(link.start_step, link.end_step) for link in one.chain.links] for one in (module, whole)]
    assert places[0] == places[1]
    assert_bit_equal(weights(module), weights(whole))


@pytest.mark.parametrize(("lr_schedule", "kept"), [("linear", 0.5), ("constant", 0)])
def test_a_knot_between_two_fits_is_in_the_checkpoint_that_follows_it(tmp_path, lr_schedule, kept):
    module, resumed = (make(Watched, lr_schedule=lr_schedule, kept_optimizer_state=kept) for _ in range(2))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, Data(batch_size=4))
    module.tie_knot()
    run.save_checkpoint(tmp_path / "knot.ckpt")
    trainer(tmp_path, max_epochs=4).fit(resumed, Data(batch_size=4), ckpt_path=tmp_path / "knot.ckpt")
    run.fit_loop.max_epochs = 4
    run.fit(module, Data(batch_size=4))
    assert resumed.steps == module.steps[16:]
    assert_bit_equal(weights(resumed), weights(module))


@pytest.mark.parametrize("scope", ["link", "run"])
def test_inside_a_link_the_rate_goes_on_where_it_stood(tmp_path, scope):
    whole, module = (make(Watched, schedule_scope=scope, warmup_steps=3) for _ in range(2))
    fitted(tmp_path, whole, 2, 4)
    fitted(tmp_path, module, 2, 3, 4)
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
    for other in (run, trainer(tmp_path)):  # whose rows may be other ones
        other.validate(module, batches(2), verbose=False)
        assert module.live_link().metrics == live
    trainer(tmp_path, ChainOfLoRA(), max_steps=2).fit(module, batches(), batches(2))
    assert module.live_link().metrics.keys() == {"train_loss"}
    kept = trainer(tmp_path, ChainOfLoRA(), max_steps=20)
    kept.fit(module, batches(), batches(2))
    assert module.live_link().metrics["val_step"] == 20
    trainer(tmp_path, ChainOfLoRA(), max_steps=2, limit_val_batches=0).fit(module, batches(), batches(2))
    assert module.live_link().metrics["val_step"] == 20  # which it keeps in a next fit
    module.tie_knot()
    assert module.chain.links[-1].metrics["val_step"] == 20
    assert module.live_link().metrics == {}
