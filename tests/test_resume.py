"""A run that is stopped anywhere and goes on from its last checkpoint is the run itself, to the bit."""

import contextlib
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from cola_lightning import EpochDataModule, LastCheckpoint, LoRALayer, UserError
from tests.toy import Toy, assert_bit_equal, toy, trainer, weights

N_BATCHES = 8


class Data(EpochDataModule):
    """32 rows in 8 batches, shuffled, and 3 batches of validation."""

    def setup(self, stage):
        generator = torch.Generator().manual_seed(3)
        x, y = (torch.randn(44, size, generator=generator) for size in (8, 6))
        self.train, self.val = TensorDataset(x[:32], y[:32]), TensorDataset(x[32:], y[32:])
        self.test = self.val


class Stateful(LightningDataModule):
    """The same rows by torchdata's loader, whose state Lightning stores."""

    def __init__(self, *, shuffle):
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        (data := Data(batch_size=4)).setup("fit")
        return StatefulDataLoader(data.train, batch_size=4, shuffle=self.shuffle)

    def val_dataloader(self):
        (data := Data(batch_size=4)).setup("fit")
        return DataLoader(data.val, batch_size=4)


class Normed(Toy):
    """The toy with dropout, a head that is trained whole, and running statistics that move in training."""

    def build_model(self):
        return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.mse_loss(self.model(x), y), batch_size=len(x))


class Stopped(Exception):
    pass


class Recorder(Callback):
    """Writes down what happens, and stops the run at one moment of it: a hook's name, and how often it was called before."""

    def __init__(self, stop=None):
        self.stop, self.counts = stop, {}
        self.losses, self.validations, self.rows, self.rates = {}, {}, {}, {}

    def _count(self, hook):
        count = self.counts[hook] = self.counts.get(hook, -1) + 1
        if self.stop == (hook, count):
            raise Stopped

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        place = trainer.current_epoch, batch_idx
        self.rows[place] = batch[0].float().numpy().tobytes()
        self.rates[place] = [group["lr"] for group in trainer.optimizers[0].param_groups]
        self._count("batch_start")

    def on_before_backward(self, *_):
        self._count("forward")

    def on_after_backward(self, *_):
        self._count("backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()
        self._count("batch_end")

    def on_validation_batch_end(self, trainer, *_):
        self._count("validation")

    def on_validation_end(self, trainer, module):
        self.validations[trainer.fit_loop.total_batch_idx] = trainer.callback_metrics["val_loss"].item()
        self._count("validation_end")

    def on_train_epoch_start(self, *_):
        self._count("epoch_start")

    def on_train_epoch_end(self, *_):
        self._count("epoch_end")

    @property
    def all(self):
        return self.losses, self.validations, self.rows, self.rates


ARGUMENTS = {"target_modules": ["0"], "modules_to_save": ["3"], "rank": 3, "dropout": 0.2, "lr_schedule": "cosine"}


def fit(folder, stop=None, ckpt_path=None, module=None, data=None, callbacks=(), chain=None, **options):
    """A fit of three epochs with a knot in the middle of the second; gives its module, recorder and trainer."""
    module = module or toy(Normed, **ARGUMENTS, optimizer=lambda p: AdamW(p, lr=1e-2))
    recorder = Recorder(stop)
    options = {"max_epochs": 3, "accumulate_grad_batches": 3, "val_check_interval": 0.5, "num_sanity_val_steps": 0} | options
    run = trainer(
        folder,
        *[recorder, LastCheckpoint(), *callbacks],
        chain=chain or {"at_steps": [4], "ranks": [3, 2]},
        enable_checkpointing=True,
        **options,
    )
    try:
        run.fit(module, datamodule=data or Data(batch_size=4), ckpt_path=ckpt_path)
    except Stopped:
        assert stop
    else:
        assert not stop
    return module, recorder, run


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def assert_same_state(ours, theirs):
    """The two checkpoints hold the same run: weights, chain, optimizer, schedule, counters."""
    ours, theirs = (torch.load(path, weights_only=True) for path in (ours, theirs))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(ours[part], theirs[part], part)
    for part in ("epoch_progress", "epoch_loop.batch_progress"):
        assert_same(*(one["callbacks"]["RunChecks"]["progress"][part] for one in (ours, theirs)), part)


def assert_same(ours, theirs, where):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for place, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{place}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


STOPS = [("batch_start", k) for k in (0, 1, 9, 12, 23)]
STOPS += [("forward", k) for k in (0, 4, 11)] + [("backward", k) for k in (1, 5, 7, 13, 16)]
STOPS += [("batch_end", k) for k in (0, 2, 3, 7, 10, 12, 23)]
STOPS += [("validation", k) for k in (0, 1, 4, 5, 11, 17)] + [("validation_end", k) for k in (0, 1, 3)]
STOPS += [("epoch_end", k) for k in (0, 1)] + [("epoch_start", k) for k in (0, 1, 2)]
FEW = [("batch_start", 9), ("backward", 13), ("batch_end", 2), ("batch_end", 7), ("batch_end", 15)]
FEW += [("epoch_end", 1), ("epoch_start", 2)]


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({}, STOPS),
        ({"accumulate_grad_batches": 1}, FEW),
        pytest.param({"accumulate_grad_batches": 1}, STOPS, marks=pytest.mark.slow),
        ({"max_epochs": -1, "max_steps": 8}, FEW),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, [*FEW, ("validation", 4), ("batch_end", 4)]),
        ({"limit_val_batches": 0}, [*FEW, ("batch_end", 23)]),
        ({"limit_val_batches": 0, "max_epochs": -1, "max_steps": 9}, FEW),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, options, stops):
    whole, expected, _ = fit(tmp_path / "whole", **options)
    for stop in stops:
        folder = tmp_path / f"{stop}"
        _, before, _ = fit(folder, stop, **options)
        module, after, _ = fit(folder / "resumed", ckpt_path=last(folder), **options)
        assert_bit_equal(weights(module), weights(whole))
        for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
            assert first | second == all_, stop
            assert first == {place: all_[place] for place in first}, stop
        was_left = stop != ("batch_end", 23) or "limit_val_batches" not in options
        assert_same_state(last(folder / "resumed" if was_left else folder), last(tmp_path / "whole"))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_with_torchdatas_loader_goes_on_too(tmp_path, shuffle, accumulated):
    def run(folder, **options):
        seed_everything(5)
        return fit(folder, data=Stateful(shuffle=shuffle), accumulate_grad_batches=accumulated, **options)

    whole, expected, _ = run(tmp_path / "whole")
    # An order that is shuffled anew comes from the global generator: at an epoch's end, and before its first optimizer step.
    shuffled = FEW[1:-2] if accumulated == 3 else FEW[:-2]
    for stop in shuffled if shuffle else [("batch_start", 8), *FEW]:
        folder = tmp_path / f"{stop}"
        run(folder, stop=stop)
        module, after, _ = run(folder / "resumed", ckpt_path=last(folder))
        assert_bit_equal(weights(module), weights(whole))
        for second, all_ in zip(after.all, expected.all, strict=True):
            assert second == {place: all_[place] for place in second}, stop


def test_a_run_that_stacks_its_links_in_half_precision_goes_on_too(tmp_path):
    def stacking():
        return toy(Normed, **ARGUMENTS, finished_links="stack", optimizer=lambda p: AdamW(p, lr=1e-2))

    options = {"precision": "bf16-true"}
    whole, expected, _ = fit(tmp_path / "whole", module=stacking(), **options)
    assert whole.adapted.layers["0"].stack.A.dtype == torch.bfloat16
    for stop in FEW:
        folder = tmp_path / f"{stop}"
        _, before, _ = fit(folder, stop, module=stacking(), **options)
        module, after, _ = fit(folder / "resumed", ckpt_path=last(folder), module=stacking(), **options)
        assert_bit_equal(weights(module), weights(whole))
        assert all(map(torch.equal, module.adapted.layers["0"].stack.factors, whole.adapted.layers["0"].stack.factors))
        for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
            assert first | second == all_, stop


@pytest.mark.parametrize(
    ("window", "stop", "again"),
    [
        (3, ("backward", 10), [(1, 0), (1, 1), (1, 2)]),
        (3, ("batch_end", 10), []),
        (3, ("validation", 4), []),  # at the end of the first epoch, whose last window is shorter
        (6, ("validation", 1), [(0, 0), (0, 1), (0, 2), (0, 3)]),  # inside a window
    ],
)
def test_only_what_was_done_since_the_last_window_is_done_again(tmp_path, window, stop, again):
    _, before, _ = fit(tmp_path, stop, accumulate_grad_batches=window)
    _, after, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), accumulate_grad_batches=window)
    assert sorted(before.rows.keys() & after.rows.keys()) == again


def test_an_optimizer_step_that_failed_halfway_is_not_written(tmp_path):
    steps = iter(range(10))

    class Failing(AdamW):
        def step(self, closure=None):
            closure()
            if next(steps) == 3:
                self.param_groups[0]["params"][0].detach().fill_(1e3)
                raise RuntimeError("halfway")
            return super().step()

    module = toy(Normed, **ARGUMENTS, optimizer=lambda p: Failing(p, lr=1e-2))
    with pytest.raises(RuntimeError, match="halfway"):
        fit(tmp_path, module=module)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3  # written at the end of the epoch


def test_weights_that_are_not_finite_leave_the_last_checkpoint_as_it_was(tmp_path):
    class Exploding(Normed):
        def on_after_backward(self):
            if self.trainer.global_step == 4:
                self.model[0].lora_B.grad.fill_(torch.nan)

    module = toy(Exploding, **ARGUMENTS, optimizer=lambda p: AdamW(p, lr=1e-2))
    with pytest.raises(RuntimeError, match="no longer finite"):
        fit(tmp_path, module=module)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 4


def test_last_is_the_newest_beside_a_checkpoint_that_keeps_the_best(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            path = last(tmp_path)
            seen.append((trainer.global_step, torch.load(path, weights_only=True)["global_step"] if path.exists() else 0))

    kept = {"monitor": "val_loss", "mode": "max", "save_top_k": 1, "filename": "best"}  # the first is the best
    each = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    _, _, run = fit(tmp_path, callbacks=[Watch(), ModelCheckpoint(**kept), ModelCheckpoint(**each)])
    assert all(written >= step - 1 for step, written in seen)
    best, newest = (
        torch.load(path, weights_only=True)["global_step"] for path in (run.checkpoint_callback.best_model_path, last(tmp_path))
    )
    assert best < newest == 9
    assert run.checkpoint_callback.monitor == "val_loss"  # which ckpt_path="best" asks


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (LastCheckpoint(every_n_train_steps=2), {0, 2, 4, 6}),
        (LastCheckpoint(train_time_interval=timedelta(0)), set(range(8))),
    ],
    ids=["steps", "time"],
)
def test_last_is_also_written_every_n_steps_and_after_a_time(tmp_path, callback, expected):
    seen = set()

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            seen.add(torch.load(last(tmp_path), weights_only=True)["global_step"] if last(tmp_path).exists() else 0)

    run = trainer(tmp_path, Watch(), callback, chain={}, enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
    run.fit(toy(Normed, target_modules=["0"]), datamodule=Data(batch_size=4))
    assert seen == expected


def test_a_validation_that_was_interrupted_starts_over_in_the_same_process_too(tmp_path):
    expected = fit(tmp_path / "whole")[1].validations
    module, before, _ = fit(tmp_path, ("validation", 4))
    _, after, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), module=module)
    assert before.validations | after.validations == expected


def test_workers_prepare_the_same_batches(tmp_path):
    _, expected, _ = fit(tmp_path / "whole")
    _, before, _ = fit(tmp_path, ("batch_end", 12), data=Data(batch_size=4, num_workers=2))
    _, after, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), data=Data(batch_size=4, num_workers=1))
    for first, second, all_ in zip(before.all, after.all, expected.all, strict=True):
        assert first | second == all_


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
def test_rows_beside_a_longer_loader_come_again_from_their_first_on(tmp_path):
    class Beside(Data):
        def train_dataloader(self):
            longer = StatefulDataLoader(TensorDataset(torch.zeros(80, 8)), batch_size=4)
            return {"rows": super().train_dataloader(), "longer": longer}

    class First(Normed):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["rows"], batch_idx)

    class Rows(Recorder):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            super().on_train_batch_start(trainer, module, batch["rows"], batch_idx)

    def run(folder, stop=None, ckpt_path=None):
        rows, module = Rows(stop), toy(First, **ARGUMENTS, optimizer=lambda p: AdamW(p, lr=1e-2))
        how = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": True}
        fitting = trainer(folder, rows, LastCheckpoint(), chain={"at_epochs": [1]}, **how)
        with contextlib.suppress(Stopped):
            fitting.fit(module, datamodule=Beside(batch_size=4), ckpt_path=ckpt_path)
        return module, rows.rows

    whole, expected = run(tmp_path / "whole")
    assert len(expected) == 2 * 20
    assert all(expected[epoch, place] == expected[epoch, place % 8] for epoch, place in expected)
    _, before = run(tmp_path, ("batch_end", 32))
    module, after = run(tmp_path / "on", ckpt_path=last(tmp_path))
    assert before | after == expected
    assert_bit_equal(weights(module), weights(whole))


def test_another_window_in_each_epoch_is_kept_on_resume(tmp_path):
    options = {"accumulate_grad_batches": 1}
    windows = {0: 1, 1: 3, 2: 2}
    whole, _, _ = fit(tmp_path / "whole", callbacks=[GradientAccumulationScheduler(windows)], **options)
    for stop in (("backward", 12), ("batch_end", 18)):
        fit(tmp_path / stop[0], stop, callbacks=[GradientAccumulationScheduler(windows)], **options)
        resumed = [tmp_path / stop[0] / "resumed", None, last(tmp_path / stop[0])]
        module, _, _ = fit(*resumed, callbacks=[GradientAccumulationScheduler(windows)], **options)
        assert_bit_equal(weights(module), weights(whole))


# ---------------------------------------------------------------------- what is changed beside a checkpoint


@pytest.fixture
def stopped(tmp_path):
    fit(tmp_path, ("batch_end", 12))  # in the second epoch, after the knot, at its 6th batch
    return last(tmp_path)


def optimizers(module, **hyperparameters):
    return toy(Normed, **ARGUMENTS | module, optimizer=lambda p: AdamW(p, **{"lr": 1e-2} | hyperparameters))


def test_another_learning_rate_or_decay_is_used_from_there_on_and_told(tmp_path, stopped, caplog):
    caplog.set_level("INFO")
    _, same, _ = fit(tmp_path / "same", ckpt_path=stopped)
    assert "from here on" not in caplog.text
    _, other, run = fit(tmp_path / "other", ckpt_path=stopped, module=optimizers({}, lr=2e-2, weight_decay=0.5))
    assert other.rates.keys() == same.rates.keys()
    assert [rate for (rate,) in other.rates.values()] == pytest.approx([2 * rate for (rate,) in same.rates.values()], rel=1e-12)
    assert run.optimizers[0].param_groups[0]["weight_decay"] == 0.5
    assert "model.optimizer: from here on lr 0.01 -> 0.02, weight_decay 0.01 -> 0.5" in caplog.text
    _, flat, _ = fit(tmp_path / "flat", ckpt_path=stopped, module=optimizers({"lr_schedule": "constant"}))
    assert {rate for (rate,) in flat.rates.values()} == {1e-2}
    _, longer, _ = fit(tmp_path / "longer", ckpt_path=stopped, max_epochs=5)
    assert longer.rates[2, 7] > same.rates[2, 7]
    assert len(longer.rates) == len(same.rates) + 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": {"alpha": 8}}, r"chain\.alphas: expected the ranks and alphas of the checkpoint.s run, .* received"),
        ({"module": {"rank": 4}}, r"size mismatch for model\.0\.lora_A"),
        ({"module": {"modules_to_save_lr": 1e-3}}, r"different number of parameter groups"),
        ({"batch_size": 2}, r"data\.batch_size x processes: expected 4, .* was written inside an epoch, received 2"),
        ({"accumulate_grad_batches": 4}, r"trainer\.accumulate_grad_batches: expected a divisor of 3, .* received 4"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_choice_that_the_checkpoint_would_overrule_is_refused(tmp_path, stopped, change, message):
    change = dict(change)
    module, data = optimizers(change.pop("module", {})), Data(batch_size=change.pop("batch_size", 4))
    with pytest.raises((UserError, RuntimeError, ValueError), match=message):
        fit(tmp_path / "other", ckpt_path=stopped, module=module, data=data, **change)


def test_from_the_end_of_an_epoch_batches_and_windows_may_be_others(tmp_path):
    fit(tmp_path, ("batch_start", 8))
    _, recorder, run = fit(tmp_path / "other", ckpt_path=last(tmp_path), data=Data(batch_size=2), accumulate_grad_batches=5)
    assert len(recorder.rows) == 2 * 16
    assert run.global_step == 3 + 2 * 4


@pytest.mark.parametrize(
    ("stop", "change", "n_left", "n_done"),
    [
        (("epoch_end", 0), {"batch_size": 8}, 12, 8),
        (("epoch_end", 0), {"accumulate_grad_batches": 2}, 12, 8),
        (("epoch_end", 2), {"batch_size": 6}, 6, 24),  # 24 steps are also a number of epochs of 6
        (("batch_end", 11), {"accumulate_grad_batches": 2}, 10, 12),
        (("batch_end", 11), {"limit_train_batches": 6}, 14, 12),
    ],
)
def test_a_run_that_goes_on_with_other_epochs_decays_until_its_end(tmp_path, stop, change, n_left, n_done):
    options = {"accumulate_grad_batches": 1, "limit_val_batches": 0, "max_epochs": 4, "chain": {"at_epochs": [9]}}
    options["module"] = toy(Normed, **ARGUMENTS | {"lr_schedule": "linear"}, optimizer=lambda p: AdamW(p, lr=1e-2))
    fit(tmp_path, stop, **options)
    options["module"] = toy(Normed, **ARGUMENTS | {"lr_schedule": "linear"}, optimizer=lambda p: AdamW(p, lr=1e-2))
    data = Data(batch_size=change.pop("batch_size", 4))
    _, recorder, run = fit(tmp_path / "other", ckpt_path=last(tmp_path), data=data, **options | change)
    assert run.global_step == n_done + n_left
    rates = [rate / 1e-2 for (rate,) in recorder.rates.values()]
    window = change.get("accumulate_grad_batches", 1)
    assert rates[::window] == pytest.approx([1 - step / (n_done + n_left) for step in range(n_done, n_done + n_left)])


@pytest.mark.parametrize(
    ("window", "stops"),
    [
        (3, [("forward", 4)]),  # after a validation inside a window
        (1, [("validation", 1), ("batch_start", 0)]),  # in a validation, and in the batch after it was repeated
        (1, [("validation", 1), ("forward", 0)]),
        (2, [("validation_end", 1), ("batch_start", 0)]),
    ],
)
def test_early_stopping_counts_a_validation_once(tmp_path, window, stops):
    def outcome(name, stop, path):
        callbacks = [EarlyStopping("val_loss", patience=3, min_delta=10.0)]
        _, recorder, run = fit(tmp_path / name, stop, path, callbacks=callbacks, accumulate_grad_batches=window)
        return run.global_step, recorder

    whole, recorder = outcome("whole", None, None)
    assert len(recorder.validations) == 4
    path, validated = None, 0
    for k, stop in enumerate([*stops, None]):
        steps, recorder = outcome(f"{k}", stop, path)
        path, validated = last(tmp_path / f"{k}"), validated + len(recorder.validations)
    assert steps == whole
    assert validated == 4 + (window > 1)


# ---------------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_knot_that_fails_halfway_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch, error):
    arguments = ARGUMENTS | {"target_modules": ["0", "3"], "modules_to_save": []}
    whole, _, _ = fit(tmp_path / "whole", module=optimizers(arguments))
    merged, merge = [], LoRALayer.finish

    def fail_on_the_second(layer, *how):
        merged.append(layer)
        if len(merged) == 2:
            raise error("in the knot")
        merge(layer, *how)

    with monkeypatch.context() as patch:
        patch.setattr(LoRALayer, "finish", fail_on_the_second)
        with pytest.raises((error, SystemExit)):
            fit(tmp_path, module=optimizers(arguments))
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 3
    module, _, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), module=optimizers(arguments))
    assert_bit_equal(weights(module), weights(whole))


def one_optimizer(module):
    return AdamW([parameter for parameter in module.parameters() if parameter.requires_grad], lr=1e-2)


def two_groups(module):
    factors, head = module.model[0], module.model[3]
    return AdamW([{"params": [factors.lora_A, factors.lora_B]}, {"params": list(head.parameters()), "lr": 1e-3}], lr=1e-2)


OWN = {
    "an optimizer alone": one_optimizer,
    "two groups": two_groups,
    "a scheduler of its own": lambda module: (lambda o: ([o], [StepLR(o, 1, 0.5)]))(one_optimizer(module)),
    "a schedule over ours": lambda module: (lambda o: ([o], [CosineAnnealingLR(o, 3)]))(
        super(Normed, module).configure_optimizers()["optimizer"]
    ),
    "ours without its schedule": lambda module: super(Normed, module).configure_optimizers()["optimizer"],
}


@pytest.mark.parametrize("how", OWN)
def test_a_modules_own_optimizers_go_on_too(tmp_path, how):
    class Own(Normed):
        configure_optimizers = staticmethod(lambda: None)

    Own.configure_optimizers = lambda module: OWN[how](module)
    make = lambda: toy(Own, **ARGUMENTS)  # noqa: E731
    whole, expected, _ = fit(tmp_path / "whole", module=make())
    fit(tmp_path, ("batch_end", 12), module=make())
    module, after, _ = fit(tmp_path / "resumed", ckpt_path=last(tmp_path), module=make())
    assert after.rates == {place: expected.rates[place] for place in after.rates}
    assert_bit_equal(weights(module), weights(whole))


def test_what_a_refused_resume_finds_on_disk_stays_alone(tmp_path, stopped):
    changes = [
        ({"data": Data(batch_size=2)}, r"data\.batch_size x processes: expected 4"),
        ({"accumulate_grad_batches": 4}, r"trainer\.accumulate_grad_batches: expected a divisor of 3"),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            fit(tmp_path / "other", ckpt_path=stopped, **change)
    assert not list((tmp_path / "other").rglob("*.ckpt"))


def test_weights_alone_are_no_fit_to_go_on_with(tmp_path):
    _, _, run = fit(tmp_path)
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):  # as Lightning has it
        fit(tmp_path / "other", ckpt_path=tmp_path / "weights.ckpt")
