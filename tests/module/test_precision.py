"""Every precision of Lightning's with links merged and stacked: what is kept in which dtype, and what a knot changes."""

import math

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from cola_lightning import AdaptedModel, LastCheckpoint, LoRAConfig
from cola_lightning.errors import NonFiniteError
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights

# precision, the dtype of a stacked-upon weight, of A, B and a merged-into weight, the relative step of what is computed, mode
PRECISIONS = [
    ("32-true", torch.float32, torch.float32, 1e-6, "merge"),
    ("64-true", torch.float64, torch.float64, 1e-12, "stack"),
    ("bf16-mixed", torch.float32, torch.float32, 2**-8, "stack"),
    ("16-mixed", torch.float32, torch.float32, 2**-11, "merge"),
    ("bf16-true", torch.bfloat16, torch.float32, 2**-8, "merge"),
    ("16-true", torch.float16, torch.float32, 2**-11, "stack"),
]


def options(precision):
    """Lightning makes bf16-mixed of 16-mixed on a CPU, but for its plugin, with its gradient scaler, given by hand."""
    return {"plugins": [MixedPrecision(precision, "cpu")]} if precision == "16-mixed" else {"precision": precision}


class Watched(ValidatedToy):
    """Remembers by how much of the loss each knot has changed it."""

    changes = ()

    @torch.no_grad()
    def loss(self):
        plugin, was_training = self.trainer.precision_plugin, self.model.training
        x, y = (part.to(plugin.convert_input(part).dtype) for part in next(iter(batches(1, 32))))
        with plugin.forward_context():
            loss = mse_loss(self.model.eval()(x).double(), y.double()).item()
        self.model.train(was_training)
        return loss

    def tie_knot(self, *settings, **named):
        before = self.loss()
        link = super().tie_knot(*settings, **named)
        self.changes = (*self.changes, abs(self.loss() - before) / before)
        return link


def make(mode, **arguments):
    return toy(Watched, finished_links=mode, dropout=0.1, optimizer=lambda p: AdamW(p, lr=1e-2), **arguments)


def fit(folder, module, precision):
    dtype = {"64-true": torch.float64}.get(precision, torch.float32)
    chain = {"every_n_epochs": 1, "ranks": [2, 1, 2]}
    run = trainer(folder, LastCheckpoint(), chain=chain, max_epochs=3, enable_checkpointing=True, **options(precision))
    run.fit(module, batches(4, dtype=dtype), batches(2, dtype=dtype))
    return module


@pytest.mark.parametrize(("precision", "base", "wide", "step", "mode"), PRECISIONS)
def test_a_chain_keeps_its_dtypes_and_its_loss_at_knots_and_its_bits(tmp_path, precision, base, wide, step, mode):
    module = fit(tmp_path, make(mode, target_modules=["0"]), precision)
    for layer in module.adapted.layers.values():
        adapted = wide if mode == "merge" else base
        assert {layer.weight.dtype, layer.bias.dtype, layer.dtype} == {adapted}
        assert {layer.lora_A.dtype, layer.lora_B.dtype} == {wide}
        assert (layer.stack is None) == (mode == "merge")
        assert mode == "merge" or {layer.stack.A.dtype, layer.stack.B.dtype} == {base}
    assert {factor.dtype for link in module.chain.links for pair in link.factors.values() for factor in pair} == {wide}
    assert {parameter.dtype for parameter in module.merged_model().parameters()} == {wide}
    assert len(module.changes) == 2
    assert max(module.changes) <= step
    loaded = Watched.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert_bit_equal(weights(loaded.model[0]), weights(module.model[0]))
    for links in (0, 1, None):  # the first is the base, which is not rounded
        assert_bit_equal(loaded.merged_model(links).state_dict(), module.merged_model(links).state_dict())


class Clipped(Toy):
    """Remembers the norm of the gradients with which the optimizer stepped."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.norm = nn.utils.get_total_norm([parameter.grad for _, parameter in self.named_trained_parameters()])


def test_gradients_of_the_default_optimizer_are_clipped_under_16_mixed(tmp_path):
    """Torch's GradScaler has a fused optimizer unscale its gradients in its step, and Lightning then refuses to clip them."""
    module = toy(Clipped)
    trainer(tmp_path, max_steps=2, gradient_clip_val=1e-3, **options("16-mixed")).fit(module, batches(2))
    assert module.trainer.optimizers[0].param_groups[0]["fused"]
    assert module.norm == pytest.approx(1e-3, rel=1e-3)


class Overflowing(Toy):
    """Has no finite loss in the batches from ``first`` to ``last``."""

    first, last = 2, 3

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (float("inf") if self.first <= batch_idx <= self.last else 1)


def test_the_gradient_scaler_of_16_mixed_skips_a_step_without_a_finite_loss_and_only_where_all_are_so_the_fit_ends(tmp_path):
    module = toy(Overflowing)
    trainer(tmp_path, max_steps=6, **options("16-mixed")).fit(module, batches())
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert module.step_loss.check() == pytest.approx(float(module.trainer.callback_metrics["train_loss"]))  # not the scaled one
    module = toy(Overflowing)
    module.last = math.inf
    with pytest.raises(NonFiniteError, match="loss is inf at step"):
        trainer(tmp_path, max_epochs=3, **options("16-mixed")).fit(module, batches())


@pytest.mark.parametrize(("precision", "is_read_early"), [("bf16-mixed", True), ("bf16-true", True), ("16-true", False)])
def test_by_default_links_are_merged_into_float32_and_stacked_on_half_precision(tmp_path, precision, is_read_early):
    expected = fit(tmp_path / "expected", make("stack" if precision.endswith("6-true") else "merge"), precision)
    module = make("auto")
    if is_read_early:
        assert len(list(module.parameters())) == 8
    fit(tmp_path, module, precision)
    assert_bit_equal(weights(module), weights(expected))
    loaded = Watched.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert_bit_equal(weights(loaded), weights(expected))
    x = next(iter(batches()))[0].to(loaded.model[0].weight.dtype)
    assert torch.equal(loaded.eval()(x), expected.eval()(x))
    assert_bit_equal(loaded.merged_model().state_dict(), expected.merged_model().state_dict())


@pytest.mark.parametrize(("dtype", "is_stacked"), [(torch.float32, False), (torch.bfloat16, True), (torch.float64, False)])
def test_by_default_the_dtype_of_the_base_decides(dtype, is_stacked):
    adapted = AdaptedModel(lambda: nn.Sequential(nn.Linear(4, 3, dtype=dtype)), LoRAConfig(rank=2, alpha=4))
    assert (adapted.model[0].stack is not None) == is_stacked
    assert adapted.model[0].weight.dtype == dtype


def test_a_module_keeps_its_finished_links_where_a_later_trainer_casts_it(tmp_path):
    module, data = toy(ValidatedToy, optimizer=lambda parameters: AdamW(parameters, lr=5e-2)), batches()
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=4).fit(module, data, data)
    without = module.merged_model(0)
    (wide,) = trainer(tmp_path).validate(module, data, verbose=False)
    (narrow,) = trainer(tmp_path, precision="bf16-true").validate(module, data, verbose=False)
    assert not module.adapted.merges
    assert narrow["val_loss"] == pytest.approx(wide["val_loss"], rel=1e-2)
    x, y = data.dataset.tensors
    assert mse_loss(without(x), y).item() > 1.1 * wide["val_loss"]  # the links matter
