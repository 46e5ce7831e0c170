"""What Lightning's users do with any module, done with a COLA module."""

import json
import math
from collections import OrderedDict
from datetime import timedelta
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from cola_lightning import PredictionWriter, UserError
from cola_lightning.chain.checkpoint import StoredState, read_chain
from tests.helpers.resuming import Normed, Outside
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights


def fitted(tmp_path, module, *callbacks, **arguments):
    run = trainer(tmp_path, *callbacks, **{"max_epochs": 1} | arguments)
    run.fit(module, batches(), batches(1) if isinstance(module, ValidatedToy) else None)
    run.save_checkpoint(tmp_path / "run.ckpt")
    return module


# ---------------------------------------------------------------------- the model is there when it is asked for


class InInit(Toy):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.width = self.model[0].out_features


class Late(Toy):
    """Needs its ``setup`` before its model can be made, and reads that before it is configured."""

    def setup(self, stage):
        self.width = 12

    def build_model(self):
        assert self.width == 12
        return super().build_model()

    def configure_model(self):
        self.width = self.model[0].out_features
        super().configure_model()


@pytest.mark.parametrize("cls", [InInit, Late])
def test_a_model_that_is_asked_for_early_or_late_is_the_one_that_a_fit_makes(tmp_path, cls):
    module = fitted(tmp_path, toy(cls))
    assert module.width == 12
    assert_bit_equal(weights(module), weights(fitted(tmp_path, toy())))


def test_a_configure_model_that_forgets_super_is_refused_in_one_line(tmp_path):
    class Forgetful(Toy):
        def configure_model(self):
            self.width = self.model[0].out_features

    for make_use in (lambda module: fitted(tmp_path, module), Toy.merged_model, Toy.state_dict):
        with pytest.raises(UserError, match=r"^Forgetful\.configure_model must call super\(\)\.configure_model\(\)"):
            make_use(toy(Forgetful))


def test_whoever_needs_the_parameters_of_a_module_finds_its_model(tmp_path):
    names = {name for name, _ in toy(target_modules=["0"]).named_parameters()}
    assert {"model.0.weight", "model.0.lora_A", "model.2.weight"} <= names
    assert sum(p.numel() for p in toy().parameters() if p.requires_grad) == 2 * (8 + 12) + 2 * (12 + 6)
    assert toy().state_dict().keys() == {f"model.{n}.lora_{factor}" for n in (0, 2) for factor in "AB"} | {"chain.metadata"}
    assert not toy().eval().model.training
    module = toy()
    module.load_state_dict(toy().state_dict() | {"model.0.lora_B": torch.ones(12, 2)})
    assert module.model[0].lora_B.all()
    module.example_input_array = torch.ones(3, 8)
    fitted(tmp_path, module, enable_model_summary=True)


def test_a_module_inside_another_is_refused_in_a_fit(tmp_path):
    class Around(Toy):
        def __init__(self):
            super().__init__()
            self.inner = toy()

        def training_step(self, batch, batch_idx):
            return mse_loss(self.inner.model(batch[0]), batch[1])

    with pytest.raises(UserError, match=r"^Toy: .*inside another"):
        trainer(tmp_path, max_epochs=1).fit(Around(), batches())


def test_processes_that_drew_seeds_of_their_own_are_refused(tmp_path, monkeypatch):
    module = toy(seed=None)
    assert list(module.parameters())
    monkeypatch.setattr("cola_lightning.layout.gather_objects", lambda value: [value, value + 1])
    with pytest.raises(UserError, match=r"^model\.seed"):
        fitted(tmp_path, module)


class Scaled(Toy):
    """Has a scale of its own, and counts its batches; both are made with the base."""

    def build_model(self):
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("count", torch.zeros(()))
        return super().build_model()

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step((batch[0] * self.scale, batch[1]), batch_idx)


@pytest.mark.parametrize("options", [{"target_modules": ["0"], "modules_to_save": ["2"]}, {"target_modules": None}], ids=str)
def test_what_was_trained_is_stored_also_if_it_is_frozen_since(tmp_path, options):
    module = fitted(tmp_path, toy(Scaled, **options))
    names = module.state_dict().keys()
    module.freeze()
    assert module.state_dict().keys() == names
    module.trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert_bit_equal(weights(Scaled.load_from_checkpoint(tmp_path / "run.ckpt")), weights(module))
    if options["target_modules"] is not None:
        (link,) = read_chain(tmp_path / "run.ckpt").links
        assert torch.equal(link.extras["2.weight"], module.model[2].weight)
        assert torch.equal(module.live_link().extras["self.scale"], module.scale)


def test_what_build_model_or_configure_model_assigns_to_the_module_is_made_once(tmp_path):
    class MadeLate(Scaled):
        def configure_model(self):
            super().configure_model()
            self.head = nn.Linear(6, 6)

    module = fitted(tmp_path, toy(MadeLate), chain={"every_n_train_steps": 5})
    scale, head, before = module.scale, module.head, weights(module)
    module.merged_model(1)
    module.load_state_dict(module.state_dict())
    assert (module.scale is scale, module.head is head) == (True, True)
    assert before["count"] == 10
    assert_bit_equal(weights(module), before)


def test_a_state_dict_is_tensors_that_other_tools_take_as_they_are(tmp_path):
    module = fitted(tmp_path, toy(), chain={"every_n_train_steps": 4})
    save_file(module.state_dict(), tmp_path / "state.safetensors")
    averaged, again = AveragedModel(module), AveragedModel(toy())
    averaged.update_parameters(module)
    again.load_state_dict(averaged.state_dict())
    assert_bit_equal(weights(again.module), weights(module))
    loaded = toy()
    loaded.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert_bit_equal(weights(loaded), weights(module))
    assert (loaded.n_finished, loaded.run.current.start, len(loaded.chain)) == (2, module.run.current.start, 2)


# ---------------------------------------------------------------------- what is asked of a checkpoint counts


def test_strict_counts(tmp_path):
    expected, path = fitted(tmp_path, toy(Normed), chain={"every_n_train_steps": 5}), tmp_path / "run.ckpt"
    with pytest.raises(RuntimeError, match=r"outside\.weight.*outside\.bias"):
        Outside.load_from_checkpoint(path)
    with pytest.warns(UserWarning, match=r"outside\.weight"):
        loaded = Outside.load_from_checkpoint(path, strict=False)
    assert_bit_equal(weights(loaded.model), weights(expected.model))
    assert loaded.n_finished == 1
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | {"state_dict": checkpoint["state_dict"] | {"other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match="'other'"):
        Normed.load_from_checkpoint(tmp_path / "other.ckpt", strict=False)
    module = toy(Outside)
    module.strict_loading = False
    trainer(tmp_path).validate(module, batches(2), ckpt_path=path, verbose=False)
    assert_bit_equal(weights(module.model), weights(expected.model))
    missing, unknown = module.load_state_dict({"model.0.lora_B": torch.zeros(12, 2), "other": torch.zeros(1)}, strict=False)
    assert set(missing) >= {"outside.weight", "model.0.lora_A"}
    assert unknown == ["other"]


def test_a_checkpoint_is_loaded_to_where_map_location_says(tmp_path):
    module = fitted(tmp_path, toy())
    for where in ("cpu", torch.device("cpu")):
        assert_bit_equal(weights(Toy.load_from_checkpoint(tmp_path / "run.ckpt", where)), weights(module))


def test_weights_only_counts(tmp_path):
    class Pickling(ValidatedToy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["where"] = PurePosixPath("here")

        def on_load_checkpoint(self, checkpoint):
            self.where = checkpoint["where"]

    module, path = fitted(tmp_path, toy(Pickling)), tmp_path / "run.ckpt"
    for options in ({}, {"weights_only": True}):
        with pytest.raises(UserError, match="weights_only=False"):
            Pickling.load_from_checkpoint(path, **options)
    loaded = Pickling.load_from_checkpoint(path, "cpu", weights_only=False, rank=2)
    assert_bit_equal(weights(loaded), weights(module))
    assert loaded.where == PurePosixPath("here")
    trainer(tmp_path).validate(loaded, batches(2), ckpt_path=path, weights_only=False, verbose=False)


# ---------------------------------------------------------------------- arguments and hyperparameters


def test_a_secret_is_in_no_file_and_hyperparameters_come_back_with_the_arguments(tmp_path):
    class Saving(Toy):
        def __init__(self, where, sizes, since, rank=2, token=None, pad_token="<pad>", hub=None):
            super().__init__(rank=rank, seed=0)
            self.save_hyperparameters()
            self.where = where

    sizes = OrderedDict(a=[1, (2.5,)])
    given = {"token": "hf_1234", "pad_token": "<end>", "hub": {"name": "a/b", "token": "hf_1234"}}
    module = fitted(tmp_path, Saving(tmp_path, sizes, timedelta(1), **given), plugins=[AsyncCheckpointIO()])
    module.trainer.save_checkpoint(tmp_path / "again.ckpt")
    module.trainer.strategy.teardown()  # which waits for the file
    stored = StoredState.of(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]).facts.module.init_args
    plain = {"where": str(tmp_path), "sizes": {"a": [1, [2.5]]}, "pad_token": "<end>", "hub": {"name": "a/b"}}
    assert stored == plain
    assert type(stored["sizes"]) is dict
    assert b"hf_1234" not in (tmp_path / "again.ckpt").read_bytes()
    assert "hf_1234" not in str(module.constructor_arguments)
    loaded = Saving.load_from_checkpoint(tmp_path / "again.ckpt", since=None)
    assert (loaded.where, loaded.hparams.pad_token) == (str(tmp_path), "<end>")
    assert_bit_equal(weights(loaded), weights(module))


# ---------------------------------------------------------------------- a Trainer's uses


def test_a_search_for_a_batch_size_or_a_rate_leaves_a_run_as_it_would_be_with_what_was_found(tmp_path):
    class Tuned(Toy):
        def train_dataloader(self):
            return DataLoader(batches(20).dataset, batch_size=self.batch_size)

        def configure_optimizers(self):
            return AdamW([p for _, p in self.named_trained_parameters()], lr=self.lr)

    def fit(batch_size, rate, *callbacks, is_tuned=False):
        module, run = toy(Tuned, dropout=0.3), trainer(tmp_path, *callbacks, max_epochs=1, chain={"every_n_train_steps": 8})
        module.batch_size, module.lr = batch_size, rate
        if is_tuned:
            Tuner(run).lr_find(module, num_training=15)
        run.fit(module)
        assert [link.end_step for link in module.chain.links] == [8, 16]
        return weights(module), module.batch_size, module.lr

    searches = [fit(4, 1e-5, is_tuned=True), fit(4, 1e-5, LearningRateFinder(num_training_steps=15))]
    searches.append(fit(2, 0.01, BatchSizeFinder(max_trials=2)))
    for found, batch_size, rate in searches:
        assert batch_size == 4
        assert rate != 1e-5
        assert_bit_equal(found, fit(4, rate)[0])


def test_a_knot_keeps_a_parameter_group_that_was_added(tmp_path):
    class Freezing(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.outside)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.outside, optimizer, lr=0.05)

    module = toy(Outside, lr_schedule="constant")
    run = trainer(tmp_path, Freezing(), chain={"every_n_epochs": 2}, max_epochs=4)
    run.fit(module, batches(), batches(1))
    assert module.n_finished == 1
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [4, 2]
    assert run.optimizers[0].param_groups[1]["lr"] == 0.05
    assert module.outside.weight in run.optimizers[0].state


def test_a_second_fit_draws_another_dropout_also_of_a_module_from_a_checkpoint(tmp_path):
    class Drawing(Toy):
        def training_step(self, batch, batch_idx):
            draws.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    def fit(module):
        draws.clear()
        fitted(tmp_path, module)
        return list(draws)

    draws, module = [], toy(Drawing)
    first, loaded = fit(module), Drawing.load_from_checkpoint(tmp_path / "run.ckpt")
    second = fit(module)
    assert set(first).isdisjoint(second)
    assert second == fit(loaded)
    assert set(second).isdisjoint(fit(loaded))
    assert fit(toy(Drawing)) == first


# ---------------------------------------------------------------------- predictions


def lines_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_predictions_are_json_whatever_they_hold(tmp_path):
    class Predicting(Toy):
        def predict_step(self, batch, batch_idx):
            return {
                "prediction": np.arange(4),
                "scores": [{"all": torch.ones(2), "best": np.float32(1)}] * 4,
                "undefined": [math.nan, -math.inf, torch.tensor(math.inf), np.float32("nan")],
                "tensor": torch.tensor([[0.0, math.nan]] * 4),
            }

    trainer(tmp_path, PredictionWriter()).predict(toy(Predicting), batches(1))
    same = {"scores": {"all": [1.0, 1.0], "best": 1.0}, "undefined": None, "tensor": [0.0, None]}
    assert lines_of(tmp_path / "predictions.jsonl") == [{"index": k, "prediction": k} | same for k in range(4)]


class Streamed(IterableDataset):
    """Rows that have no indices."""

    def __iter__(self):
        return iter(batches(3).dataset)


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_rows_without_indices_are_refused_also_after_a_loader_whose_rows_have_some(tmp_path):
    class Predicting(Toy):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return {"prediction": batch[0].sum(-1)}

    with_indices, without = batches(2), DataLoader(Streamed(), batch_size=4)
    trainer(tmp_path, PredictionWriter()).predict(toy(Predicting), [with_indices, with_indices])
    assert [line["index"] for line in lines_of(tmp_path / "predictions.jsonl")] == [*range(8), *range(8)]
    for loaders in (without, [with_indices, without]):
        with pytest.raises(UserError, match=r"^predict: .* have no indices"):
            trainer(tmp_path, PredictionWriter()).predict(toy(Predicting), loaders)


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
    partial = lines_of(tmp_path / "predictions.partial.jsonl")
    assert [line["index"] for line in partial] == list(range(8))
    assert not (tmp_path / "predictions.jsonl").exists()
    module.fails_at = None
    run.predict(module, batches(4))
    assert lines_of(tmp_path / "predictions.jsonl")[:8] == partial
    module.fails_at = 0  # no row is finished: those of before stay
    with pytest.raises(RuntimeError, match="no memory"):
        run.predict(module, batches(4))
    assert lines_of(tmp_path / "predictions.partial.jsonl") == partial


def test_weights_that_are_loaded_after_the_base_was_built_are_refused_before_the_first_step(tmp_path):
    class Loading(Toy):
        def setup(self, stage):
            torch.nn.init.ones_(self.model[0].weight)

    module = toy(Loading)
    with pytest.raises(UserError, match=r"'0\.weight' has other values .* load them in build_model\(\)"):
        trainer(tmp_path, max_epochs=1).fit(module, batches())
