"""What Lightning's users do with any module, done with a COLA module: the model is there when it is asked for."""

import json
import math
import pickle
import sys
from collections import OrderedDict, UserList, UserString
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import omegaconf
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from cola_lightning import ChainOfLoRA, COLACausalLM, COLAModule, LastCheckpoint, PredictionWriter, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.errors import NonFiniteError
from tests import tiny
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


def fitted(tmp_path, module, *callbacks, **arguments):
    trainer(tmp_path, *callbacks, **{"max_epochs": 1} | arguments).fit(module, batches())
    return module


# ---------------------------------------------------------------------- the model is there when it is asked for


def test_a_model_that_is_asked_for_early_is_the_one_that_a_fit_makes(tmp_path):
    class InInit(Toy):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.width = self.model[0].out_features

    class InSetup(Toy):
        def setup(self, stage):
            self.width = self.model[0].out_features

    class Needing(Toy):
        """Needs its ``setup`` before its model can be made."""

        def setup(self, stage):
            self.width = 12

        def build_model(self):
            assert self.width == 12
            return super().build_model()

    expected = weights(fitted(tmp_path, toy()))
    for cls in (InInit, InSetup, Needing):
        module = fitted(tmp_path, toy(cls))
        assert module.width == 12
        assert_bit_equal(weights(module), expected)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_model_that_is_asked_for_early_is_cast_as_any_other(tmp_path, precision):
    modules = [toy(modules_to_save=["2"], finished_links="stack") for _ in range(2)]
    assert list(modules[0].parameters())
    loader = batches(dtype={"64-true": torch.float64, "bf16-true": torch.bfloat16}[precision])
    for module in modules:
        trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=1, precision=precision).fit(module, loader)
    assert_bit_equal(*map(weights, modules))


def test_whatever_goes_through_a_module_finds_its_model(tmp_path):
    names = {name for name, _ in toy(target_modules=["0"]).named_parameters()}
    assert {"model.0.weight", "model.0.lora_A", "model.2.weight"} <= names
    assert sum(p.numel() for p in toy().parameters() if p.requires_grad) == 2 * (8 + 12) + 2 * (12 + 6)
    assert toy().state_dict().keys() == {f"model.{n}.lora_{factor}" for n in (0, 2) for factor in "AB"} | {"cola"}
    assert not toy().eval().model.training
    copied, state = toy(), toy().state_dict()
    copied.load_state_dict(state | {"model.0.lora_B": torch.ones(12, 2)})
    assert copied.model[0].lora_B.all()
    module, run = toy(), trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "before_any_run.ckpt")
    assert_bit_equal(weights(Toy.load_from_checkpoint(tmp_path / "before_any_run.ckpt")), weights(module))


def test_processes_that_drew_seeds_of_their_own_are_refused(tmp_path, monkeypatch):
    module = toy(seed=None)
    assert list(module.parameters())
    monkeypatch.setattr("cola_lightning.layout.gather_objects", lambda value: [value, value + 1])
    with pytest.raises(UserError, match=r"model\.seed: expected a number, .* received null and 2 processes"):
        fitted(tmp_path, module)


class Scaled(Toy):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.scale = nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] * self.scale, batch[1]), batch_idx)


@pytest.mark.parametrize("how", [{"target_modules": ["0"], "modules_to_save": ["2"]}, {"target_modules": None}], ids=str)
def test_what_was_trained_is_stored_also_if_it_is_frozen_since(tmp_path, how):
    module = toy(Scaled, **how)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches())
    names = module.state_dict().keys()
    module.freeze()
    assert module.state_dict().keys() == names
    toy(Scaled, **how).load_state_dict(module.state_dict())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert_bit_equal(weights(Scaled.load_from_checkpoint(tmp_path / "run.ckpt")), weights(module))
    if how["target_modules"] is None:
        return
    link = read_chain(tmp_path / "run.ckpt").links[0]
    for mine in (link, module.live_link()):
        assert torch.equal(mine.extras["2.weight"], module.model[2].weight)
        assert torch.equal(mine.extras["self.scale"], module.scale)


def test_another_model_in_the_place_of_the_one_that_was_adapted_is_refused(tmp_path):
    class Compiling(Toy):
        def configure_model(self):
            self.model = torch.compile(self.model, backend="eager")

    class Wrapping(Toy):
        def setup(self, stage):
            self.model = nn.Sequential(self.model)

    class Assigned(COLAModule):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.model = nn.Linear(8, 6)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    for cls in (Compiling, Wrapping, Assigned):
        with pytest.raises(UserError, match=r"model: expected .*build_model\(\)"):
            fitted(tmp_path, toy(cls), chain={"every_n_epochs": 1})


def test_the_command_line_of_lightning_makes_an_optimizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit.py"])

    class Fed(Toy):
        def __init__(self, rank: int = 2):
            super().__init__(rank=rank, seed=0)

        def train_dataloader(self):
            return batches()

    def run():
        trainer_args = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.logger=false"]
        quiet = [f"--trainer.enable_{what}=false" for what in ("checkpointing", "progress_bar", "model_summary")]
        args = ["fit", "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.001", *trainer_args, *quiet]
        with pytest.warns(UserWarning, match="will be overridden"):
            return LightningCLI(Fed, args=args, seed_everything_default=3, save_config_callback=None).model

    module = run()
    by_hand = toy(rank=2, alpha=16, lr_schedule="constant")
    trainer(tmp_path, max_epochs=2).fit(by_hand, batches())
    assert_bit_equal(weights(module), weights(by_hand))


def test_a_configure_model_of_ones_own_needs_no_super(tmp_path):
    class Own(Toy):
        def configure_model(self):
            self.width = self.model[0].out_features

    class Notes:
        def configure_model(self):
            self.width = 12

    class Mixed(Notes, Toy):
        pass

    class Before(Toy):
        def configure_model(self):
            self.width = 12
            super().configure_model()
            self.model[2].bias.requires_grad_()

    expected = weights(fitted(tmp_path, toy()))
    for cls in (Own, Mixed, Before):
        module = fitted(tmp_path, toy(cls))
        assert module.width == 12
        if cls is Before:
            assert not torch.equal(module.model[2].bias, expected["model.2.bias"])
        else:
            assert_bit_equal(weights(module), expected)


def test_numbers_of_numpy_are_plain_in_a_checkpoint(tmp_path):
    class ByHand(Callback):
        def on_train_epoch_end(self, trainer, module):
            module.tie_knot(rank=np.int64(1), alpha=np.float32(3))

    numbers = {"rank": np.int64(2), "alpha": np.float32(4), "optimizer": lambda p: torch.optim.AdamW(p, lr=np.float64(0.5))}
    module = fitted(tmp_path, toy(**numbers), ByHand(), max_epochs=2)
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    rates = torch.load(tmp_path / "run.ckpt", weights_only=True)["lr_schedulers"][0]["base_lrs"]
    assert [type(rate) for rate in rates] == [float]
    loaded = Toy.load_from_checkpoint(tmp_path / "run.ckpt")
    assert (loaded.link, loaded.adapted.live) == (2, (1, 3))
    assert_bit_equal(weights(loaded), weights(module))


def test_what_build_model_assigns_to_the_module_stays_when_the_base_is_rebuilt(tmp_path):
    class Scaled(Toy):
        def build_model(self):
            self.scale = nn.Parameter(torch.ones(6))
            self.register_buffer("count", torch.zeros(()))
            return super().build_model()

        def training_step(self, batch, batch_idx):
            self.count += 1
            return (self.model(batch[0]) * self.scale - batch[1]).square().mean()

    module = fitted(tmp_path, toy(Scaled), chain={"every_n_train_steps": 5})
    scale, before = module.scale, weights(module)
    module.merged_model(1)
    assert module.scale is scale
    assert before["count"] == 10
    assert_bit_equal(weights(module), before)


# ---------------------------------------------------------------------- what is asked of a checkpoint counts


class WithHead(ValidatedToy):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.head = nn.Linear(6, 2)


class Plain(WithHead):
    """The toy again, of a class that a checkpoint with a head can be loaded as."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        del self.head


def test_strict_counts(tmp_path):
    paths = []
    for cls in (ValidatedToy, WithHead):
        paths.append(tmp_path / f"{cls.__name__}.ckpt")
        run = trainer(tmp_path, chain={"every_n_train_steps": 5}, max_epochs=1)
        run.fit(toy(cls), batches(), batches(1))
        run.save_checkpoint(paths[-1])
    plain, headed = paths
    with pytest.raises(UserError, match=r'Missing key\(s\) in state_dict: "head\.bias", "head\.weight"\.'):
        WithHead.load_from_checkpoint(plain)
    with pytest.warns(UserWarning, match=r"in the model state dict but not in the checkpoint: .*'head\.weight'"):
        loaded = WithHead.load_from_checkpoint(plain, strict=False)
    assert_bit_equal(weights(loaded.model), weights(ValidatedToy.load_from_checkpoint(plain).model))
    assert loaded.link == 1
    with pytest.warns(UserWarning, match=r"in the checkpoint: \['head\.weight', 'head\.bias'\]"):
        Plain.load_from_checkpoint(headed, strict=False)

    module = toy(WithHead)
    with pytest.raises(UserError, match=r"head\.weight"):
        trainer(tmp_path).validate(module, batches(2), ckpt_path=plain, verbose=False)
    module.strict_loading = False
    trainer(tmp_path).validate(module, batches(2), ckpt_path=plain, verbose=False)
    assert_bit_equal(weights(module.model), weights(loaded.model))

    missing, unknown = module.load_state_dict({"model.0.lora_B": torch.zeros(12, 2), "other": torch.zeros(1)}, strict=False)
    assert set(missing) >= {"head.weight", "model.0.lora_A"}
    assert unknown == ["other"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"model.0.lora_B": torch.zeros(12, 3)}, strict=False)


class PlainToy(LightningModule):
    """The toy without links, of Lightning alone."""

    def __init__(self):
        super().__init__()
        self.model = Toy.build_model(self)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_where_all_is_trained_a_checkpoint_needs_no_chain(tmp_path):
    class FrozenBelow(ValidatedToy):
        def configure_model(self):
            self.model[0].requires_grad_(False)

    plain = fitted(tmp_path, PlainToy())
    plain.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    module = toy(ValidatedToy, target_modules=None)
    trainer(tmp_path).validate(module, batches(1), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert_bit_equal(weights(module), weights(plain))
    for other in (toy(ValidatedToy), toy(FrozenBelow, target_modules=None)):
        with pytest.raises(UserError, match="which holds no chain"):
            trainer(tmp_path).validate(other, batches(1), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    states = {"state_dict": plain.state_dict(), "optimizer_states": {}, "lr_schedulers": {}}
    torch.save(states | {"pytorch-lightning_version": "2.0.0"}, tmp_path / "values.ckpt")
    begun, loaded = (toy(target_modules=None) for _ in range(2))
    trainer(tmp_path, max_epochs=1).fit(begun, batches(), ckpt_path=tmp_path / "values.ckpt")
    loaded.load_state_dict(plain.state_dict())
    assert_bit_equal(weights(begun), weights(fitted(tmp_path, loaded)))


def test_weights_only_counts(tmp_path):
    class Pickling(ValidatedToy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["where"] = PurePosixPath("here")

        def on_load_checkpoint(self, checkpoint):
            self.where = checkpoint["where"]

    path, run = tmp_path / "pickled.ckpt", trainer(tmp_path, max_epochs=1)
    module = toy(Pickling)
    run.fit(module, batches(), batches(1))
    run.save_checkpoint(path)
    for how in ({}, {"weights_only": True}):
        with pytest.raises(UserError, match=r"which cannot be read .*; weights_only=False reads one that holds"):
            Pickling.load_from_checkpoint(path, **how)
    loaded = Pickling.load_from_checkpoint(path, "cpu", weights_only=False, rank=2)
    assert_bit_equal(weights(loaded), weights(module))
    assert loaded.where == PurePosixPath("here")
    run.validate(loaded, batches(2), ckpt_path=path, weights_only=False, verbose=False)


# ---------------------------------------------------------------------- hyperparameters


class Saving(Toy):
    def __init__(self, where: Path | None = None, sizes: Any = None, size: Any = None, rank: int = 2):
        super().__init__(rank=rank, seed=0)
        self.save_hyperparameters()
        self.where = where


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["written at once", "written later"])
def test_hyperparameters_are_stored_plain_and_arguments_come_back_by_their_own_record(tmp_path, plugins):
    class Data(LightningDataModule):
        def __init__(self, where):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return batches()

    sizes = OrderedDict(a=UserList([1, UserList([2.5])]), b=torch.ones(2))
    module = Saving(tmp_path, sizes, torch.Size([2]))
    run = trainer(tmp_path, max_epochs=1, plugins=plugins)
    run.fit(module, datamodule=Data(tmp_path))
    run.save_checkpoint(tmp_path / "saved.ckpt")
    run.strategy.teardown()  # which waits for the file
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    stored = checkpoint["hyper_parameters"]
    kinds = {"where": str, "sizes": dict, "size": torch.Size, "rank": int}
    assert {name: type(value) for name, value in stored.items()} == kinds
    assert stored["sizes"]["a"] == [1, [2.5]]
    assert checkpoint["datamodule_hyper_parameters"] == {"where": str(tmp_path)}
    loaded = Saving.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert loaded.where == str(tmp_path)
    assert loaded.hparams.sizes["b"].equal(sizes["b"])
    assert_bit_equal(weights(loaded), weights(module))


@pytest.mark.parametrize("size", [timedelta(1), UserString("one")])  # the second is a sequence of its own kind, without end
def test_hyperparameters_that_cannot_be_stored_are_left_out_with_one_warning(tmp_path, caplog, size):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Saving(size=size), batches())
    assert "hyperparameter" not in caplog.text
    for name in ("first.ckpt", "second.ckpt"):
        run.save_checkpoint(tmp_path / name)
    (warning,) = [record.getMessage() for record in caplog.records if "hyperparameter" in record.getMessage()]
    assert "'size'" in warning
    assert Saving.load_from_checkpoint(tmp_path / "second.ckpt").hparams.size is None


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_a_module_is_pickled_before_and_after_a_fit(tmp_path, mode):
    module = toy(finished_links=mode)
    unbuilt = pickle.loads(pickle.dumps(module))
    assert_bit_equal(weights(unbuilt), weights(toy(finished_links=mode)))
    run = trainer(tmp_path, TQDMProgressBar(), chain={"every_n_epochs": 1}, max_epochs=2, enable_progress_bar=True)
    run.fit(module, batches())
    again = pickle.loads(pickle.dumps(run))
    assert_bit_equal(weights(again.lightning_module), weights(module))
    pickle.loads(pickle.dumps(run.progress_bar_callback))
    torch.save(module, tmp_path / "module.pt")
    assert b"exp_avg" not in (tmp_path / "module.pt").read_bytes()
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert loaded.constructor_arguments == module.constructor_arguments
    assert_bit_equal(weights(loaded), weights(module))
    for each in (module, loaded):
        trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(each, batches())
    assert loaded.link == 2
    assert_bit_equal(weights(loaded), weights(module))


# ---------------------------------------------------------------------- a Trainer's other uses


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_a_trainer_that_is_used_again_is_plain(tmp_path, is_broken_off):
    class Plain(PlainToy):
        def training_step(self, batch, batch_idx):
            self.draws = torch.rand(1)
            return super().training_step(batch, batch_idx)

    class Broken(Toy):
        def on_train_batch_end(self, *_):
            raise ValueError("broken off")

    def draws_of(module, run):
        torch.manual_seed(0)
        run.fit_loop.epoch_progress.reset()
        run.fit(module, batches())
        return module.draws

    run = trainer(tmp_path, max_epochs=1)
    callbacks = list(run.callbacks)
    if is_broken_off:
        with pytest.raises(ValueError, match="broken off"):
            run.fit(toy(Broken), batches())
    else:
        run.fit(toy(), batches())
    assert draws_of(Plain(), run) == draws_of(Plain(), trainer(tmp_path, max_epochs=1))
    assert run.callbacks == callbacks


def test_anomaly_detection_names_the_operation(tmp_path):
    class Dividing(Toy):
        def training_step(self, batch, batch_idx):
            return (self.model(batch[0]) * 0).sqrt().sum() * math.nan

    with pytest.raises(NonFiniteError, match="training loss is nan"):
        fitted(tmp_path, toy(Dividing))
    with pytest.warns(UserWarning, match="Error detected in"), pytest.raises(RuntimeError, match="returned nan values"):
        fitted(tmp_path, toy(Dividing), detect_anomaly=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rule_by_metrics_decides_after_a_resume_as_without_one(tmp_path, dtype):
    class ByLoss(ChainOfLoRA):
        def should_tie(self, epoch, global_step):
            metrics = self.module.trainer.callback_metrics
            seen.append((global_step, {name: (value.item(), value.dtype) for name, value in metrics.items()}))
            return metrics.get("val_loss", math.inf) < 1.5 and global_step % 2 == 0

    def fit(path, **how):
        seen.clear()
        module = toy(ValidatedToy, lr_schedule="constant")
        how = {"max_epochs": 4, "check_val_every_n_epoch": 2} | how
        run = trainer(path, ByLoss(), LastCheckpoint(), num_sanity_val_steps=0, enable_checkpointing=True, **how)
        return module, run

    seen = []
    precision = {"precision": "64-true"} if dtype == torch.float64 else {}
    whole, run = fit(tmp_path / "whole", **precision)
    run.fit(whole, batches(dtype=dtype), batches(1, dtype=dtype))
    assert whole.link > 0
    all_seen = list(seen)

    for n_epochs in (2, 3):
        path = tmp_path / str(n_epochs)
        stopped, run = fit(path, max_epochs=n_epochs, **precision)
        run.fit(stopped, batches(dtype=dtype), batches(1, dtype=dtype))
        resumed, run = fit(path / "resumed", **precision)
        run.fit(resumed, batches(dtype=dtype), batches(1, dtype=dtype), ckpt_path=path / "checkpoints" / "last.ckpt")
        assert seen == [one for one in all_seen if one[0] >= 10 * n_epochs]
        assert_bit_equal(weights(resumed), weights(whole))


def test_an_optimizer_of_ones_own_needs_no_length_for_a_schedule_that_is_not_used(tmp_path):
    class Own(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Stopping(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    with pytest.raises(UserError, match=r"model\.lr_schedule: expected constant"):
        fitted(tmp_path, toy(), Stopping(), max_epochs=-1)
    assert fitted(tmp_path, toy(Own), Stopping(), max_epochs=-1).model[0].lora_B.any()


def test_a_module_inside_another_is_refused_in_a_fit(tmp_path):
    class Around(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner, self.head = toy(), nn.Linear(6, 6)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.head(self.inner.model(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    with pytest.raises(UserError, match="Toy: expected to be the Trainer's own module, received one inside a Around: AdaptedM"):
        trainer(tmp_path, max_epochs=1).fit(Around(), batches())


def test_a_loss_of_each_row_is_trained_and_refused_where_it_is_not_finite(tmp_path):
    class Rows(Toy):
        factor = 1.0

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            losses = (self.model(batch[0]) - batch[1]).square().mean(1) * self.factor
            self.optimizers().zero_grad()
            self.manual_backward(losses, gradient=torch.full_like(losses, 1 / len(losses)))
            self.optimizers().step()

    module = fitted(tmp_path, toy(Rows, lr_schedule="constant"))
    assert_bit_equal(weights(module), weights(fitted(tmp_path, toy(lr_schedule="constant"))))
    module.factor = math.nan
    with pytest.raises(NonFiniteError, match="the training loss is nan at step 0"):
        fitted(tmp_path, module)


def test_a_module_may_have_attributes_that_are_called_as_a_links_numbers(tmp_path):
    class Named(Toy):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.dropout, self.alpha, self.init = nn.Dropout(0.1), 0.0, print

        @property
        def rank(self):
            return self.trainer.global_rank

    chain = {"every_n_epochs": 1, "ranks": [2, 1]}
    runs = [fitted(tmp_path, toy(cls), chain=chain, max_epochs=2) for cls in (Toy, Named)]
    assert (runs[0].rank, runs[1].rank, runs[1].alpha, runs[1].init) == (2, 0, 0.0, print)
    assert_bit_equal(*map(weights, runs))


# ---------------------------------------------------------------------- predictions


def test_predictions_are_json_whatever_they_hold(tmp_path):
    class Predicting(Toy):
        def predict_step(self, batch, batch_idx):
            return {
                "prediction": np.arange(4),
                "target": list(torch.arange(4)),
                "scores": [{"all": torch.ones(2), "best": np.float32(1)}] * 4,
                "undefined": [math.nan, -math.inf, torch.tensor(math.inf), np.float32("nan")],
                "tensor": torch.tensor([[0.0, math.nan]] * 4),
            }

    trainer(tmp_path, PredictionWriter()).predict(toy(Predicting), batches(1))
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    same = {"scores": {"all": [1.0, 1.0], "best": 1.0}, "undefined": None, "tensor": [0.0, None]}
    expected = [{"index": k, "prediction": k, "target": k} | same for k in range(4)]
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == expected


def test_a_predict_that_fails_leaves_the_rows_so_far_beside_where_all_would_be(tmp_path):
    class Failing(Toy):
        fails_at = 2

        def predict_step(self, batch, batch_idx):
            if batch_idx == self.fails_at:
                raise RuntimeError("no memory")
            return {"prediction": batch[0].sum(-1)}

    module, run = toy(Failing), trainer(tmp_path, PredictionWriter())
    with pytest.raises(RuntimeError, match="no memory"):
        run.predict(module, batches(4))
    path = tmp_path / "predictions.partial.jsonl"
    partial = path.read_text()
    assert [json.loads(line)["index"] for line in partial.splitlines()] == list(range(8))
    assert [part.name for part in tmp_path.iterdir()] == [path.name]
    module.fails_at = None
    run.predict(module, batches(4))
    assert (tmp_path / "predictions.jsonl").read_text().startswith(partial)
    module.fails_at = 0  # no row is finished
    path.unlink()
    with pytest.raises(RuntimeError, match="no memory"):
        run.predict(module, batches(4))
    assert [part.name for part in tmp_path.iterdir()] == ["predictions.jsonl"]


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # what this is about
def test_rows_without_indices_are_counted_whatever_was_predicted_before_them(tmp_path, monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(100, 106))

    def predicted(loaders):
        run.predict(module, loaders)
        return [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]

    module, run = toy(), trainer(tmp_path, PredictionWriter())
    monkeypatch.setattr(module, "predict_step", lambda batch, batch_idx, dataloader_idx=0: {"prediction": batch}, raising=False)
    indexed, streamed = DataLoader(range(6), batch_size=2), DataLoader(Stream(), batch_size=2)
    first, second = ([{"index": k, "prediction": begin + k} for k in range(6)] for begin in (0, 100))
    assert predicted([indexed, streamed]) == first + second
    assert predicted(indexed) == first
    assert predicted(streamed) == second


# ---------------------------------------------------------------------- Lightning's tuner, fine-tuning and weights alone


class Sized(LightningDataModule):
    """Rows whose batch size Lightning's batch-size finder may choose."""

    def __init__(self):
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self):
        return DataLoader(batches(40).dataset, batch_size=self.batch_size)


@pytest.mark.parametrize("schedule", [{}, {"schedule_scope": "run"}], ids=str)
def test_the_batch_size_finder_leaves_a_run_as_it_would_be_without(tmp_path, schedule):
    chain = {"every_n_train_steps": 4}
    expected, fixed = toy(**schedule), Sized()
    fixed.batch_size = 4
    trainer(tmp_path, max_epochs=1, chain=chain).fit(expected, datamodule=fixed)
    run, module, data = trainer(tmp_path, max_epochs=1, chain=chain), toy(**schedule), Sized()
    assert Tuner(run).scale_batch_size(module, datamodule=data, max_trials=2) == 4
    run.fit(module, datamodule=data)
    assert_bit_equal(weights(module), weights(expected))
    module, data = toy(**schedule), Sized()
    trainer(tmp_path, BatchSizeFinder(max_trials=2), max_epochs=1, chain=chain).fit(module, datamodule=data)
    assert data.batch_size == 4
    assert_bit_equal(weights(module), weights(expected))


def test_lr_find_works(tmp_path):
    class Rated(Toy):
        def __init__(self, lr=1e-3):
            super().__init__(target_modules="all-linear", rank=2, seed=0, optimizer=lambda p: torch.optim.AdamW(p, lr=self.lr))
            self.lr = lr

    found = Tuner(trainer(tmp_path, max_epochs=1)).lr_find(Rated(), batches(40), num_training=20)
    assert len(found.results["lr"]) > 10


def test_weights_alone_are_saved_inside_an_accumulation_window(tmp_path):
    saving = ModelCheckpoint(tmp_path, "{step}", save_weights_only=True, save_top_k=-1)
    arguments = {"accumulate_grad_batches": 4, "val_check_interval": 3, "max_epochs": 1, "enable_checkpointing": True}
    module = toy(ValidatedToy)
    trainer(tmp_path, saving, **arguments).fit(module, batches(), batches(1))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    assert ValidatedToy.load_from_checkpoint(tmp_path / "step=1.ckpt").model[0].lora_B.any()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_fine_tuning_callbacks_freeze_a_layer_and_add_one_at_a_rate_of_its_own(tmp_path, schedule):
    class HeadBeside(Toy):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.head = nn.Linear(6, 6)

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.head(self.model(batch[0])), batch[1])

    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze([module.head, module.model[0]])

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.head, optimizer, lr=0.5)

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    seen = []
    module = fitted(tmp_path, toy(HeadBeside, lr_schedule=schedule), Unfreezing(), Rates(), max_epochs=3)
    decay = [1 - step / 30 if schedule == "linear" else 1 for step in range(30)]
    assert [rates[0] for rates in seen] == pytest.approx([1e-3 * factor for factor in decay])
    assert [rates[1:] for rates in seen] == [[]] * 10 + [[0.5]] * 20
    assert not module.model[0].lora_B.any()
    assert module.model[2].lora_B.any()
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert_bit_equal(weights(HeadBeside.load_from_checkpoint(tmp_path / "run.ckpt")), weights(module))


# ---------------------------------------------------------------------- arguments


def test_a_configuration_of_omegaconf_comes_back_as_one(tmp_path):
    class Configured(Toy):
        def __init__(self, config, other=None):
            super().__init__(target_modules=list(config.targets), rank=config.size.rank, seed=0)
            self.save_hyperparameters()
            self.config, self.other = config, other

    whole = omegaconf.OmegaConf.create({"n": 2, "model": {"targets": ["0"], "size": {"rank": "${n}"}, "text": "\\${x}"}})
    whole.model.slashes = "\\\\\\${x}"
    module = Configured(whole.model, {"a": 1, "parts": [whole.model.size]})
    fitted(tmp_path, module).trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = Configured.load_from_checkpoint(tmp_path / "run.ckpt")
    assert isinstance(loaded.config, omegaconf.DictConfig)
    assert isinstance(loaded.hparams.config.targets, omegaconf.ListConfig)
    assert (loaded.config.size.rank, loaded.config.text) == (2, "${x}")
    assert loaded.config.slashes == whole.model.slashes == "\\${x}"
    assert (loaded.other["a"], loaded.other["parts"][0].rank) == (1, 2)
    assert_bit_equal(weights(loaded), weights(module))


def test_the_defaults_of_this_package_are_recorded(tmp_path):
    """A later version may have others."""
    for module in (toy(), COLACausalLM(tiny.folder(tmp_path / "lm"), rank=2)):
        recorded = module.constructor_arguments["defaults"]
        assert (recorded["init"], recorded["dropout"], recorded["trained_factors"]) == ("kaiming", 0.0, "both")
        assert not {"optimizer", "compile", "trust_remote_code", "rank", "model_name"} & recorded.keys()
