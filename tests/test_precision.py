"""Every precision of Lightning's with links merged and stacked: what is kept in which dtype, and what a knot changes."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from cola_lightning import COLACausalLM, LastCheckpoint, UserError
from cola_lightning.export.verify import logits_of
from tests import tiny
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights

MODES = ["merge", "stack"]
# precision, the dtype of a stacked-upon weight, of A, B and a merged-into weight, and the relative step of what is computed
PRECISIONS = [
    ("32-true", torch.float32, torch.float32, 1e-6),
    ("64-true", torch.float64, torch.float64, 1e-12),
    ("bf16-mixed", torch.float32, torch.float32, 2**-8),
    ("16-mixed", torch.float32, torch.float32, 2**-11),
    ("bf16-true", torch.bfloat16, torch.float32, 2**-8),
    ("16-true", torch.float16, torch.float32, 2**-11),
]


def options(precision):
    """Lightning makes bf16-mixed of 16-mixed on a CPU, but for its plugin, with its gradient scaler, given by hand."""
    return {"plugins": [MixedPrecision(precision, "cpu")]} if precision == "16-mixed" else {"precision": precision}


def make(mode, cls=ValidatedToy, **arguments):
    return toy(cls, finished_links=mode, **{"dropout": 0.1, "optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


def fit(folder, module, precision, epochs=3, ckpt_path=None):
    dtype = {"64-true": torch.float64}.get(precision, torch.float32)
    chain = {"every_n_epochs": 1, "ranks": [2, 1, 2]}
    run = trainer(folder, LastCheckpoint(), chain=chain, max_epochs=epochs, enable_checkpointing=True, **options(precision))
    run.fit(module, batches(dtype=dtype), batches(2, dtype=dtype), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("precision", "base", "wide", "step"), PRECISIONS, ids=lambda value: str(value))
def test_a_chain_trains_and_resumes_to_the_bit_and_keeps_its_dtypes(tmp_path, precision, base, wide, step, mode):
    module = fit(tmp_path / "whole", make(mode), precision)
    for layer in module.adapted.layers.values():
        adapted = wide if mode == "merge" else base
        assert {layer.weight.dtype, layer.bias.dtype, layer.dtype} == {adapted}
        assert {layer.lora_A.dtype, layer.lora_B.dtype} == {wide}
        assert (layer.stack is None) == (mode == "merge")
        assert mode == "merge" or {layer.stack.A.dtype, layer.stack.B.dtype} == {base}
    assert {factor.dtype for link in module.chain.links for pair in link.factors.values() for factor in pair} == {wide}
    assert {parameter.dtype for parameter in module.merged_model().parameters()} == {wide}

    fit(tmp_path, make(mode), precision, epochs=2)
    resumed = fit(tmp_path / "resumed", make(mode), precision, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert_bit_equal(weights(resumed), weights(module))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("precision", "base", "wide", "step"), PRECISIONS, ids=lambda value: str(value))
def test_a_knot_changes_a_loss_by_no_more_than_the_precisions_step(tmp_path, precision, base, wide, step, mode):
    class Knotted(Toy):
        def on_train_epoch_end(self):
            x, y = (part.to(self.trainer.precision_plugin.convert_input(part).dtype) for part in next(iter(batches(1, 32))))
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                before = mse_loss(self.model(x).to(wide), y.to(wide)).item()
                self.tie_knot()
                changes.append(abs(mse_loss(self.model(x).to(wide), y.to(wide)).item() - before) / before)

    changes = []
    run = trainer(tmp_path, max_epochs=3, **options(precision))
    run.fit(make(mode, Knotted, dropout=0.0, lr_schedule="constant"), batches(dtype=wide))
    assert len(changes) == 3
    assert max(changes) <= step


@pytest.mark.parametrize("mode", MODES)
def test_a_language_model_in_bf16_trains_and_its_merged_copy_gives_its_logits(tmp_path, mode):
    module = COLACausalLM(tiny.folder(tmp_path, "llama"), dtype="bfloat16", finished_links=mode, rank=2, alpha=4, seed=0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 300, (6, 2, 8)).unbind()]
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3)
    run.fit(module, *(torch.utils.data.DataLoader(rows, batch_size=None) for _ in range(2)))
    probe = {"input_ids": rows[0]["input_ids"]}
    ours, half = logits_of(module.merged_model(), probe), logits_of(module.model, probe)
    assert (ours - half).abs().max() <= 2**-5 * ours.abs().max()
    module.upcast()
    torch.testing.assert_close(ours, logits_of(module.model, probe), rtol=0, atol=1e-5 * ours.abs().max().item())


def test_half_of_a_weight_into_which_links_are_merged_is_refused_on_resume(tmp_path):
    fit(tmp_path, make("stack"), "bf16-true", epochs=1)
    with pytest.raises(UserError, match=r"trainer\.precision, model\.finished_links: expected those .* to bfloat16"):
        fit(tmp_path / "2", make("merge"), "bf16-true", ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_a_model_with_half_its_layers_in_half_precision_is_merged_into_layer_by_layer():
    class Mixed(ValidatedToy):
        def build_model(self):
            model = super().build_model()
            model[2].bfloat16()
            return model

    module = make("merge", Mixed, target_modules=["2"])
    module.configure_model()
    assert module.chain.base.dtypes == ["bfloat16"]
    assert module.model[2].weight.dtype == torch.float32
