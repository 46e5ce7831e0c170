"""A run that is stopped anywhere and goes on from its last checkpoint is the run itself, to the bit."""

import itertools
import random
from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from cola_lightning import LastCheckpoint, LoRALayer, UserError
from tests.helpers import tiny
from tests.helpers.resuming import ARGUMENTS, HOOKS, Data, Everywhere, Normed, Outside, first_difference, fit, last, make
from tests.helpers.toy import assert_bit_equal, toy, trainer, weights


class Stateful(LightningDataModule):
    """The same rows by torchdata's loader, whose state Lightning stores."""

    def __init__(self):
        super().__init__()
        seed_everything(5)  # its order comes from the global generator

    setup = Data.setup

    def train_dataloader(self):
        return StatefulDataLoader(self.train, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=4)


class Beside(Data):
    """The rows beside those of a longer loader, which decides when an epoch ends: they come again from their first on."""

    def train_dataloader(self):
        longer = StatefulDataLoader(TensorDataset(torch.zeros(80, 8)), batch_size=4)
        return {"rows": super().train_dataloader(), "longer": longer}

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["rows"] if isinstance(batch, dict) else batch


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle([torch.zeros(8)])


class BesideAnEndlessOne(Beside):
    """The rows beside those of a loader that never ends."""

    def train_dataloader(self):
        return super().train_dataloader() | {"longer": DataLoader(Endless(), batch_size=4)}


class Mixture(Normed):
    """With experts."""

    def build_model(self):
        return tiny.mixture()


class Scheduled(Normed):
    """With a schedule of its own over this package's optimizer."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        return [optimizer], [CosineAnnealingLR(optimizer, 3)]


class Plateau(Normed):
    """With a rate that falls after each epoch but the first."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()["optimizer"]
        schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=10, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


STOPS = [("batch_start", k) for k in (0, 1, 9, 12, 23)]
STOPS += [("forward", k) for k in (0, 4, 11)] + [("backward", k) for k in (1, 5, 7, 13, 16)]
STOPS += [("batch_end", k) for k in (0, 2, 3, 7, 10, 12, 23)]
STOPS += [("validation", k) for k in (0, 1, 4, 5, 11, 17)] + [("validation_end", k) for k in (0, 1, 3)]
STOPS += [("epoch_end", k) for k in (0, 1)] + [("epoch_start", k) for k in (0, 1, 2)]
# Around knot, window, validation and epoch.
MAIN = [("batch_start", 12), ("backward", 13), ("batch_end", 2), ("validation", 1), ("epoch_end", 0), ("epoch_start", 1)]
INSIDE = ("backward", 13)  # an epoch, a link and a window
FEW = [INSIDE, ("batch_end", 7)]


OWN = {"rank_pattern": {"0": 5}, "alpha_pattern": {"0": 7}, "use_rslora": True, "lr_ratio_B": 4}
EXPERTS = {"target_modules": "all-linear", "experts": True, "modules_to_save": ["4"], "kept_optimizer_state": 0.5}
ONE = {"accumulate_grad_batches": 1}

# What a run is like: the options of fit, made anew for each.
RUNS = {
    "windows of three batches": dict,
    "windows of three batches, everywhere": dict,
    "windows of one": lambda: ONE,
    "windows of one, everywhere": lambda: ONE,
    "another window in each epoch": lambda: ONE | {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 3, 2: 2})]},
    "an end in steps, no validation": lambda: {"max_epochs": -1, "max_steps": 8, "limit_val_batches": 0},
    "validation every five batches": lambda: {"check_val_every_n_epoch": None, "val_check_interval": 5},
    "early stopping": lambda: {"callbacks": [EarlyStopping("val_loss", patience=3, min_delta=10.0)]},
    "early stopping, windows of one": lambda: ONE | RUNS["early stopping"](),
    "bf16, stacked": lambda: {"precision": "bf16-true"},  # for the precision, not as an option says
    "experts, bf16, stacked": lambda: {"module": make(Mixture, **EXPERTS, finished_links="stack"), "precision": "bf16-true"},
    "float64, a layer outside": lambda: {"module": make(Outside), "precision": "64-true"},
    "torchdata's loader": lambda: {"data": Stateful()},
    "beside a longer loader": lambda: {"data": Beside(batch_size=4), "max_epochs": 2},
    "a rate that falls by a metric": lambda: {"module": make(Plateau, lr_schedule="linear"), "chain": {"name": "one"}},
    "averaged weights": lambda: {"callbacks": [EMAWeightAveraging(decay=0.8)], "chain": {"name": "one"}},
    "a schedule over ours": lambda: {"module": make(Scheduled, lr_schedule="linear")},
    "ranks, alphas and rates of their own": lambda: {"module": make(**OWN)},
    "a share of the optimizer's state": lambda: {"module": make(kept_optimizer_state=0.1)},
    "the run's schedule": lambda: {"module": make(schedule_scope="run", warmup_steps=2, knot_warmup_steps=3)},
    "patience, and a first epoch without validation": lambda: {
        "module": make(schedule_scope="run"),
        "chain": {"patience": 1, "min_delta": 0.02},
        "check_val_every_n_epoch": 2,
    },
    "knots at a plateau": lambda: {"module": make(schedule_scope="run"), "chain": {"patience": 1, "min_delta": 0.02}},
}
# Where it is stopped, if not only inside; a list is of stops of one run.
PLACES = {
    "windows of three batches": MAIN,
    "windows of one": [("batch_start", 9), *FEW],
    **dict.fromkeys(["windows of three batches, everywhere", "windows of one, everywhere"], STOPS),
    "another window in each epoch": [("backward", 12), ("batch_end", 18)],
    "an end in steps, no validation": FEW,
    "validation every five batches": [*FEW, ("validation", 4), ("batch_end", 4)],
    # In a validation, and in the batch after it was repeated: one that counted it twice would end the run too early.
    "early stopping": [("forward", 4)],
    "early stopping, windows of one": [[("validation", 1), ("batch_start", 0)], [("validation_end", 1), ("batch_start", 0)]],
    "torchdata's loader": [("batch_end", 2), *FEW],  # its order is drawn anew at an epoch's end, and before its first step
    "beside a longer loader": [("batch_end", 32)],
    "a schedule over ours": [("batch_end", 15)],
    "a rate that falls by a metric": MAIN,
    "patience, and a first epoch without validation": [("backward", 4), ("epoch_start", 1)],
    "knots at a plateau": [("validation", 4), ("validation_end", 1)],
}


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("everywhere" in name)) for name in RUNS])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, name):
    options = RUNS[name]
    whole, expected, _ = fit(tmp_path / "whole", **options())
    assert "plateau" not in name or whole.n_finished > 1
    assert "early" not in name or (len(expected.validations), whole.n_finished) == (4, 1)  # it counts on across a knot
    for stop in PLACES.get(name, [INSIDE]):
        check_that_it_goes_on(tmp_path, stop if isinstance(stop, list) else [stop], options, whole, expected)


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_run_whose_links_lack_a_layer_of_earlier_ones_goes_on(tmp_path, finished_links):
    arguments = {"modules_to_save": [], "finished_links": finished_links}
    earlier, _, _ = fit(tmp_path / "earlier", module=make(target_modules=["0", "3"], **arguments))
    earlier.full_chain().save(tmp_path / "chain")

    def options():
        return {"module": make(init_chain=str(tmp_path / "chain"), **arguments)}

    whole, expected, _ = fit(tmp_path / "whole", **options())
    assert [len(link.factors) for link in whole.full_chain().links] == [2, 2, 1, 1]
    assert whole.chain.delta("3").any()
    check_that_it_goes_on(tmp_path, [INSIDE], options, whole, expected)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_averaged_weights_that_a_validation_uses_are_not_written_as_those_of_the_run(tmp_path):
    options = RUNS["averaged weights"]
    whole, _, _ = fit(tmp_path / "whole", **options())
    fit(tmp_path / "stopped", ("validation", 7), **options())
    resumed, _, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path / "stopped"), **options())
    assert_bit_equal(weights(resumed), weights(whole))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
def test_an_epoch_may_have_no_end(tmp_path):
    _, _, run = fit(tmp_path, data=BesideAnEndlessOne(batch_size=4), max_steps=20, val_check_interval=8)
    assert run.global_step == 20


@pytest.mark.parametrize("name", ["windows of three batches", "an end in steps, no validation"])
def test_a_finished_run_stores_the_same_epoch_after_a_resume(tmp_path, name):
    stored, path = [], None
    for part in range(3):
        _, _, run = fit(tmp_path / str(part), ckpt_path=path, **RUNS[name]())
        run.save_checkpoint(path := tmp_path / f"{part}.ckpt")
        stored.append(torch.load(path, weights_only=True)["epoch"])
    assert stored == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows of three batches", "windows of one", "early stopping", "an end in steps"])
def test_any_hook_may_be_the_place_to_stop_once_and_twice(tmp_path, name):
    def options():
        more = {"max_epochs": -1, "max_steps": 8} if "steps" in name else RUNS[name]()
        return {"kind": Everywhere} | more

    whole, expected, _ = fit(tmp_path / "whole", **options())
    stops = [(hook, count) for hook, last_count in expected.counts.items() if hook in HOOKS for count in range(last_count + 1)]
    assert len(stops) > 100
    for stop in stops:
        for twice in ([stop], [stop, (stop[0], 0)]):
            check_that_it_goes_on(tmp_path, twice, options, whole, expected)


def check_that_it_goes_on(tmp_path, stops, options, whole, expected):
    """A run that stops at these moments, in one after the other of its parts, has what the whole run has, and each once."""
    path, done, finished = None, [{} for _ in expected.all], 0
    for k, moment in enumerate([*stops, None]):
        module, recorder, run = fit(folder := tmp_path / f"{stops} {k}", moment, path, **options())
        assert all(expected.steps[place] == finished for place in recorder.rows.keys() & done[2].keys()), stops  # done twice
        finished = run.global_step
        for before, now, all_ in zip(done, recorder.all, expected.all, strict=True):
            assert now == {place: all_[place] for place in now}, stops
            before |= now
        if last(folder).exists():  # else nothing was left to be done, and so to be written
            path = last(folder)
        if moment is not None and recorder.counts.get(moment[0], -1) < moment[1]:
            break  # it has ended before: EarlyStopping's decision is of one run, and a resume would train on
    assert done == list(expected.all), stops
    assert_bit_equal(weights(module), weights(whole))
    assert_same_state(path, last(tmp_path / "whole"))


def assert_same_state(ours, theirs):
    """The two checkpoints hold the same run: weights, chain, optimizer, schedule, counters."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert first_difference(ours[part], theirs[part], part) is None
    for part in ("epoch_progress", "epoch_loop.batch_progress"):
        progress = [one["callbacks"]["FitCallback"]["progress"][part] for one in (ours, theirs)]
        assert first_difference(*progress, part) is None


class Augmented(Data):
    """Its rows get noise from all three global generators, as augmentation draws it."""

    def collate(self, rows):
        x, y = super().collate(rows)
        return x + random.random() + np.random.rand() + torch.rand(1), y


STOPPED = []  # runs with workers: torch waits five seconds for each of them when the run is collected as garbage


def test_workers_prepare_the_same_batches_and_a_validation_starts_over_in_the_same_process_too(tmp_path):
    _, expected, _ = fit(tmp_path / "whole", data=Augmented(batch_size=4))
    module, before, run = fit(tmp_path, ("validation", 4), data=Augmented(batch_size=4, num_workers=2))
    STOPPED.append(run)
    _, after, _ = fit(tmp_path / "on", ckpt_path=last(tmp_path), module=module, data=Augmented(batch_size=4, num_workers=1))
    for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
        assert first | second == all_


def test_an_optimizer_step_that_failed_halfway_is_not_written(tmp_path):
    class Failing(AdamW):
        def step(self, closure=None):
            closure()
            group = self.param_groups[0]
            if self.state and self.state[group["params"][0]]["step"] == 3:
                group["params"][0].detach().fill_(1e3)
                raise RuntimeError("halfway")
            return super().step()

    with pytest.raises(RuntimeError, match="halfway"):
        fit(tmp_path, module=toy(Normed, **ARGUMENTS, optimizer=lambda p: Failing(p, lr=1e-2)))
    written = torch.load(last(tmp_path), weights_only=True)  # at the end of the epoch
    assert written["global_step"] == 3
    assert all(value.abs().max() < 1e3 for name, value in written["state_dict"].items() if not name.startswith("chain."))


def test_a_knot_that_fails_halfway_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch):
    arguments = {"target_modules": ["0", "3"], "modules_to_save": []}
    whole, _, _ = fit(tmp_path / "whole", module=make(**arguments))
    finished, finish = [], LoRALayer.finish

    def fail_on_the_second(layer, *settings):
        finished.append(layer)
        if len(finished) == 2:
            raise RuntimeError("in the knot")
        finish(layer, *settings)

    with monkeypatch.context() as patch:
        patch.setattr(LoRALayer, "finish", fail_on_the_second)
        with pytest.raises(RuntimeError, match="in the knot"):
            fit(tmp_path, module=make(**arguments))
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3
    module, _, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), module=make(**arguments))
    assert_bit_equal(weights(module), weights(whole))


class WrittenSteps(Callback):
    """Notes at each batch the run's step, and that of a checkpoint that is there."""

    def __init__(self, path):
        self.path, self.seen = path, []

    def on_train_batch_start(self, trainer, *_):
        written = torch.load(self.path, weights_only=True)["global_step"] if self.path.exists() else 0
        self.seen.append((trainer.global_step, written))


def test_last_is_the_newest_beside_a_checkpoint_that_keeps_the_best(tmp_path):
    watch = WrittenSteps(last(tmp_path))
    kept = {"monitor": "val_loss", "mode": "max", "save_top_k": 1, "filename": "best"}  # the first is the best
    each = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    _, _, run = fit(tmp_path, callbacks=[watch, ModelCheckpoint(**kept), ModelCheckpoint(**each)])
    assert all(written >= step - 1 for step, written in watch.seen)
    best, newest = (
        torch.load(path, weights_only=True)["global_step"] for path in (run.checkpoint_callback.best_model_path, last(tmp_path))
    )
    assert best < newest == 9
    assert run.checkpoint_callback.monitor == "val_loss"  # which ckpt_path="best" asks


def test_last_is_written_after_the_first_step_and_also_every_n_steps_and_after_a_time(tmp_path):
    for options, expected in [
        ({}, [0, *[1] * 7]),
        ({"every_n_train_steps": 2}, [0, 1, 2, 2, 4, 4, 6, 6]),
        ({"train_time_interval": timedelta(0)}, list(range(8))),
    ]:
        folder = tmp_path / "".join(["run", *options])
        watch, saving = WrittenSteps(last(folder)), LastCheckpoint(**options)
        run = trainer(folder, watch, saving, chain={}, enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
        run.fit(toy(Normed, target_modules=["0"]), datamodule=Data(batch_size=4))
        assert [written for _, written in watch.seen] == expected


# ---------------------------------------------------------------------- what is changed beside a checkpoint


def test_another_learning_rate_or_decay_is_used_from_there_on_and_told(tmp_path, caplog):
    caplog.set_level("INFO")
    fit(tmp_path, ("batch_end", 12))  # in the second epoch, after the knot, at its 6th batch
    stopped = last(tmp_path)
    _, same, _ = fit(tmp_path / "same", ckpt_path=stopped)
    assert "continuing with" not in caplog.text
    _, other, run = fit(tmp_path / "other", ckpt_path=stopped, module=make(lr=2e-2, weight_decay=0.5))
    assert other.rates.keys() == same.rates.keys()
    assert [rate for (rate,) in other.rates.values()] == pytest.approx([2 * rate for (rate,) in same.rates.values()], rel=1e-12)
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    assert "continuing with lr 0.01 -> 0.02, weight_decay 0.01 -> 0.5" in caplog.text
    _, flat, _ = fit(tmp_path / "flat", ckpt_path=stopped, module=make(lr_schedule="constant"))
    assert {rate for (rate,) in flat.rates.values()} == {1e-2}
    _, longer, _ = fit(tmp_path / "longer", ckpt_path=stopped, max_epochs=5)
    assert longer.rates[2, 7] > same.rates[2, 7]
    assert len(longer.rates) == len(same.rates) + 16


def test_a_choice_that_the_checkpoint_would_overrule_is_refused_and_nothing_is_written(tmp_path):
    fit(tmp_path, ("batch_end", 12))
    for field, options in {
        "chain.alphas": {"module": make(alpha=8)},
        "chain.ranks": {"chain": {"at_steps": [4], "ranks": [2, 2]}},
        "chain": {"chain": {"at_steps": []}},
        "trainer.precision": {"precision": "64-true"},
        "model.init": {"module": make(init="gaussian")},
        "data.batch_size": {"data": Data(batch_size=2)},
    }.items():
        with pytest.raises(UserError, match=rf"^[^:]*{field}\b"):
            fit(tmp_path / "other", ckpt_path=last(tmp_path), **options)
    assert not list((tmp_path / "other").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("stop", "change", "n_left", "n_done"),
    [
        (("epoch_end", 0), {"accumulate_grad_batches": 2}, 12, 8),
        (("epoch_end", 2), {"batch_size": 6}, 6, 24),  # 24 steps are also a number of epochs of 6
        (("batch_end", 11), {"limit_train_batches": 6}, 14, 12),
    ],
)
def test_a_run_may_go_on_with_other_batches_and_windows_and_decays_until_its_end(tmp_path, stop, change, n_left, n_done):
    def run(folder, stop, path=None, batch_size=4, **changes):
        options = {"accumulate_grad_batches": 1, "limit_val_batches": 0, "max_epochs": 4, "chain": {"at_epochs": [9]}} | changes
        return fit(folder, stop, path, module=make(lr_schedule="linear"), data=Data(batch_size=batch_size), **options)

    run(tmp_path, stop)
    _, recorder, fitted = run(tmp_path / "other", None, last(tmp_path), **change)
    assert fitted.global_step == n_done + n_left
    rates = [rate / 1e-2 for (rate,) in recorder.rates.values()]
    window = change.get("accumulate_grad_batches", 1)
    assert rates[::window] == pytest.approx([1 - step / (n_done + n_left) for step in range(n_done, n_done + n_left)])
