"""Convolutions in a model: chosen by name, refused where a link would be another, peft's LoRA step for step, resumed."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import COLAModule, UserError, inject_lora, lora_layers
from tests.toy import assert_bit_equal, trainer, weights, with_trained_link


def network():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, (3, 2)), nn.Flatten(1), nn.Linear(24, 5)
    )


def row_network():
    return nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.Flatten(1), nn.Linear(54, 5))


TARGETS = ["0", "2", "4"]


def images(n=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 2, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


@pytest.mark.parametrize(("target_modules", "expected"), [("all-linear", ["4"]), (r"[024]", TARGETS), (["2", "4"], ["2", "4"])])
def test_all_linear_leaves_convolutions_which_are_adapted_by_name(target_modules, expected):
    assert inject_lora(network(), target_modules, rank=2, alpha=4) == expected


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "padding_mode"),
        (Standardised(2, 4, 3), "Standardised"),
        (nn.ConvTranspose2d(2, 4, 3), "ConvTranspose2d"),
    ],
    ids=str,
)
def test_a_convolution_of_which_a_link_would_be_another_is_refused_and_nothing_changed(layer, named):
    model, kind = nn.Sequential(layer), type(layer)
    with pytest.raises(UserError, match=rf"^model\.target_modules: .*'0'.*{named}"):
        inject_lora(model, "0", rank=2, alpha=1)
    assert type(model[0]) is kind


@pytest.mark.parametrize(("build", "shape"), [(network, (4, 2, 8, 8)), (row_network, (4, 3, 9))], ids=["2d", "1d"])
def test_one_link_equals_pefts_lora_for_50_steps(build, shape):
    torch.manual_seed(0)
    ours = build()
    targets = [name for name, module in ours.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear)]
    theirs = get_peft_model(copy.deepcopy(ours), LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0))
    inject_lora(ours, targets, rank=4, alpha=8)
    peft_modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            layer.lora_A.copy_(peft_modules[name].lora_A["default"].weight.flatten(1))
    optimizers = [AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (ours, theirs)]
    for _ in range(50):
        x, y = torch.randn(shape), torch.randint(5, shape[:1])
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    merged = theirs.merge_and_unload()
    for name, layer in lora_layers(ours).items():
        assert layer.lora_B.any()
        layer.finish()
        torch.testing.assert_close(layer.weight, merged.get_submodule(name).weight, rtol=1e-4, atol=1e-5)


class Images(COLAModule):
    def build_model(self):
        return network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class SaveInsideALink(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.global_step == 5:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "inside.ckpt")


def fit(folder, *callbacks, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    made = Images(target_modules=TARGETS, rank=4, alpha=6, seed=0, lr_schedule="constant", dropout=0.3, **arguments)
    run = trainer(folder, *callbacks, chain={"every_n_train_steps": 4, "ranks": [4, 2, 3]}, max_steps=12)
    run.fit(made, DataLoader(TensorDataset(*images()), batch_size=8), ckpt_path=ckpt_path)
    return made, run


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_a_checkpoint_resumes_loads_and_rolls_back_to_the_bit(tmp_path, mode):
    stayed, run = fit(tmp_path, SaveInsideALink(), finished_links=mode)
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed, _ = fit(tmp_path, ckpt_path=tmp_path / "inside.ckpt", finished_links=mode)
    assert_bit_equal(weights(resumed), weights(stayed))
    loaded = Images.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_bit_equal(weights(loaded), weights(stayed))
    x = images()[0]
    assert torch.equal(loaded.eval().model(x), stayed.eval().model(x))
    back = Images.load_from_checkpoint(tmp_path / "end.ckpt", links=1)
    assert torch.equal(back.merged_model(1)(x), stayed.merged_model(1)(x))


def test_a_compiled_module_computes_the_same():
    torch.manual_seed(0)
    model = network()
    inject_lora(model, TARGETS, rank=2, alpha=4, finished_links="stack")
    for layer in lora_layers(model).values():
        layer.stack.reserve(4)
        with_trained_link(layer).finish()
        with_trained_link(layer)
    x = images()[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
