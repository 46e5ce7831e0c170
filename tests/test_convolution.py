"""Convolutions with a link: what holds of linear layers, against closed forms, plain torch and peft."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cola_lightning import AdaptedModel, Chain, COLAModule, UserError, inject_lora, lora_layers, strip_lora
from cola_lightning.chain.report import report
from tests.toy import adapt_layer, assert_bit_equal, plain_layer, trainer, weights

LAYERS = {
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=2),
    "1x1": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "1d": lambda: nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2),
}


@pytest.fixture(params=LAYERS)
def base(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def trained(layer):
    """The layer with a link that does something."""
    with torch.no_grad():
        layer.lora_B[:, : layer.rank].normal_()
    return layer


def inputs(layer, dtype=torch.float32):
    return torch.randn(3, 4, *[11] * len(layer.kernel_size), dtype=dtype)


def convolve(layer, weight, x):
    """What a plain layer with another weight would give."""
    twin = copy.deepcopy(plain_layer(layer))
    twin.weight = nn.Parameter(weight)
    return twin(x)


def test_a_new_link_leaves_the_function_and_the_parameters_alone(base):
    x = inputs(base)
    expected = base(x)
    layer = adapt_layer(base, rank=2, alpha=4)
    assert torch.equal(layer(x), expected)
    assert (layer.weight is base.weight, layer.bias is base.bias) == (True, True)
    assert isinstance(layer, type(base))
    assert layer.lora_A.shape == (2, base.weight[0].numel())
    assert layer.lora_B.shape == (6, 2)


def test_the_forward_is_a_convolution_with_the_updated_weight(base):
    layer = trained(adapt_layer(base, rank=3, alpha=2)).double()
    delta = (2 / 3 * layer.lora_B @ layer.lora_A).view_as(layer.weight).detach()
    x = inputs(layer, torch.float64)
    torch.testing.assert_close(layer(x), convolve(layer, layer.weight + delta, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=1e-12, atol=1e-12)  # a single example, without a batch


@pytest.mark.parametrize("rank", [4, 2])
def test_the_gradients_are_those_of_the_formula(base, rank):
    layer = adapt_layer(base, rank=4, alpha=3).double()
    layer.reset(torch.Generator().manual_seed(1), rank=rank)
    trained(layer)
    x = inputs(layer, torch.float64)
    layer(x).square().sum().backward()
    A, B = (factor.detach().clone().requires_grad_() for factor in layer.factors)
    convolve_with = copy.deepcopy(plain_layer(layer)).requires_grad_(False)
    weight = convolve_with.weight + (3 / rank * B @ A).view_as(layer.weight)
    torch.func.functional_call(convolve_with, {"weight": weight}, x).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad[:rank], A.grad)
    torch.testing.assert_close(layer.lora_B.grad[:, :rank], B.grad)
    assert not layer.lora_A.grad[rank:].any()
    assert not layer.lora_B.grad[:, rank:].any()


def test_merge_keeps_the_function_and_adds_the_delta(base):
    before = base.weight.detach().clone()
    layer = trained(adapt_layer(base, rank=2, alpha=4))
    x = inputs(layer)
    expected, delta = layer(x), layer.delta_weight()
    assert delta.shape == before.shape
    layer.finish()
    assert torch.equal(layer.weight, before + delta)
    assert not layer.lora_B.any()
    torch.testing.assert_close(layer(x), expected)


def test_links_of_several_ranks_are_the_same_stacked_and_merged(base):
    stacked, merged = (adapt_layer(copy.deepcopy(base).double(), 4, 6, 0.0, "kaiming", mode) for mode in ("stack", "merge"))
    before, x = base.weight.detach().clone(), inputs(base, torch.float64)
    for index, rank in enumerate((4, 1, 3)):
        for layer in (stacked, merged):
            layer.reset(torch.Generator().manual_seed(index), rank=rank)
            torch.manual_seed(index)
            trained(layer)
        expected = stacked(x)
        for layer in (stacked, merged):
            layer.finish()
            torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(stacked.weight.float(), before)
    assert stacked.stack.rank == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_narrows_no_weight_that_is_merged_into_and_no_factor(base, dtype):
    layer = trained(adapt_layer(base, rank=2, alpha=1))
    before = layer.weight.detach().clone()
    model = nn.Sequential(layer, copy.deepcopy(plain_layer(layer))).to(dtype)
    assert torch.equal(layer.weight, before)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert layer(inputs(layer, dtype)).dtype == model[1].weight.dtype == dtype
    stacked = trained(adapt_layer(copy.deepcopy(model[1]), 2, 1, 0.0, "kaiming", "stack"))
    assert (stacked.weight.dtype, stacked.lora_A.dtype, stacked.stack.A.dtype) == (dtype, torch.float32, dtype)
    x = inputs(stacked, dtype)
    expected = stacked(x)
    stacked.finish()
    torch.testing.assert_close(stacked(x), expected, rtol=2e-2, atol=2e-2)


def test_under_autocast_the_layer_computes_in_autocasts_dtype(base):
    layer = trained(adapt_layer(base, rank=2, alpha=1))
    with torch.autocast("cpu", torch.bfloat16):
        y, delta = layer(inputs(layer)), layer.delta_weight()
    assert y.dtype == torch.bfloat16
    assert torch.equal(delta, layer.delta_weight())


def test_dropout_acts_on_the_link_alone_and_only_in_training(base):
    layer = trained(adapt_layer(base, rank=2, alpha=1, dropout=0.5))
    x = inputs(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), convolve(layer, (layer.weight + layer.delta_weight()).detach(), x))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_and_the_plain_layer_compute_the_same(base, twin):
    layer = trained(adapt_layer(base, rank=2, alpha=4))
    x = inputs(layer)
    assert torch.equal(twin(layer)(x), layer(x))
    assert type(plain_layer(layer)) is type(base)
    assert torch.equal(plain_layer(layer)(x), base(x))
    assert "rank=2, alpha=4" in repr(layer)


# ---------------------------------------------------------------------- in a model


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


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [("all-linear", ["4"]), (["0"], ["0"]), (r"[024]", TARGETS), (["2", "4"], ["2", "4"])],
)
def test_all_linear_leaves_convolutions_which_are_adapted_by_name(target_modules, expected):
    model = network()
    assert inject_lora(model, target_modules, rank=2, alpha=4) == expected
    x = images()[0]
    before = model(x)
    strip_lora(model)
    assert torch.equal(model(x), before)
    assert [type(module) for module in model] == [type(module) for module in network()]


def computed_anew(layer):
    return nn.utils.parametrizations.weight_norm(layer)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


@pytest.mark.parametrize(
    ("layer", "rank", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), 2, r"'0', which convolves 2 groups of channels apart: one with groups 1 can be adapted"),
        (
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
            2,
            r"'0', whose padding_mode is 'reflect': one with 'zeros' can",
        ),
        (computed_anew(nn.Conv2d(2, 4, 3)), 2, "'0', whose weight is computed at each forward pass"),
        (
            Standardised(2, 4, 3),
            2,
            "expected layers of type Linear, .*Conv1d or Conv2d .*, received '0', which is a Standardised$",
        ),
        (nn.ConvTranspose2d(2, 4, 3), 2, "received '0', which is a ConvTranspose2d$"),
    ],
    ids=["groups", "padding", "weight_norm", "subclass", "transposed"],
)
def test_what_cannot_be_adapted_is_refused_in_one_line_and_nothing_changed(layer, rank, message):
    model, kind = nn.Sequential(layer), type(layer)
    with pytest.raises(UserError, match=message) as caught:
        inject_lora(model, "0", rank=rank, alpha=1)
    assert "\n" not in str(caught.value)
    assert type(model[0]) is kind


@pytest.mark.parametrize(
    ("build", "shape"),
    [(network, (4, 2, 8, 8)), (row_network, (4, 3, 9))],
    ids=["2d", "1d"],
)  # fmt: skip
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


@pytest.mark.parametrize(("init", "std"), [("kaiming", (3 * 400) ** -0.5), ("gaussian", 1 / 50)])
def test_A_is_drawn_as_peft_draws_it(init, std):
    layer = adapt_layer(nn.Conv2d(16, 100, 5), rank=50, alpha=1, init=init)
    assert layer.lora_A.std().item() == pytest.approx(std, rel=0.02)


# ---------------------------------------------------------------------- in a chain


def train(adapted, knots, steps=5):
    x, y = images()
    for knot in range(knots):
        optimizer = AdamW(adapted.trained_parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(adapted.model(x), y).backward()
            optimizer.step()
        before = adapted.model(x)
        adapted.tie_knot(rank=[3, 1, 2][knot % 3])
        torch.testing.assert_close(adapted.model(x), before, rtol=1e-5, atol=1e-5)
    return adapted


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_chain_is_replayed_to_the_bit_and_goes_back_and_into_a_folder(tmp_path, finished_links):
    def make():
        options = {"rank": 4, "alpha": 6, "seed": 1, "finished_links": finished_links}
        return AdaptedModel.of(network, target_modules=TARGETS, **options)

    adapted, x = train(make(), knots=3), images()[0]
    adapted.chain.save(tmp_path / "chain")
    chain = Chain.load(tmp_path / "chain")
    again = make()
    again.go_to(chain)
    again.begin_link(adapted.layers["0"].rank, 6)
    assert_bit_equal(weights(again.model), weights(adapted.model))
    assert torch.equal(again.model(x), adapted.model(x))
    merged = adapted.merged_model()
    assert not lora_layers(merged)
    torch.testing.assert_close(merged(x), adapted.model(x), rtol=1e-5, atol=1e-5)
    base = adapted.merged_model(0)
    for name in TARGETS:
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(change.flatten(1), chain.delta(name), rtol=1e-5, atol=1e-5)
    back = make()
    train(back, knots=1)
    expected = back.model(x)
    adapted.go_to(chain.truncate(1))
    torch.testing.assert_close(adapted.merged_model(1)(x), expected, rtol=1e-5, atol=1e-5)
    kept = report(chain)
    assert kept[0].layers["0"].norm == pytest.approx(chain.links[0].delta("0").norm().item(), rel=1e-5)
    assert 0 < kept[0].layers["0"].relative_norm < 10


class Images(COLAModule):
    def build_model(self):
        return network()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss


class SaveInsideALink(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.global_step == 5:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "inside.ckpt")


def loader():
    return DataLoader(TensorDataset(*images()), batch_size=8)


def fit(folder, *callbacks, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    made = Images(**{"target_modules": TARGETS, "rank": 4, "alpha": 6, "seed": 0, "lr_schedule": "constant"} | arguments)
    run = trainer(folder, *callbacks, chain={"every_n_train_steps": 4, "ranks": [4, 2, 3]}, max_steps=12)
    run.fit(made, loader(), ckpt_path=ckpt_path)
    return made, run


@pytest.mark.parametrize("arguments", [{}, {"finished_links": "stack"}, {"dropout": 0.3}], ids=["merge", "stack", "dropout"])
def test_a_checkpoint_resumes_loads_and_rolls_back_to_the_bit(tmp_path, arguments):
    stayed, run = fit(tmp_path, SaveInsideALink(), **arguments)
    run.save_checkpoint(tmp_path / "end.ckpt")
    resumed, _ = fit(tmp_path, ckpt_path=tmp_path / "inside.ckpt", **arguments)
    assert_bit_equal(weights(resumed), weights(stayed))
    loaded = Images.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_bit_equal(weights(loaded), weights(stayed))
    assert len(loaded.chain) == 2
    x = images()[0]
    assert torch.equal(loaded.eval().model(x), stayed.eval().model(x))
    back = Images.load_from_checkpoint(tmp_path / "end.ckpt", links=1)
    torch.testing.assert_close(back.merged_model(1)(x), stayed.merged_model(1)(x), rtol=0, atol=0)
    assert (tmp_path / "end.ckpt").stat().st_size < 60e3


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_precisions_train_it(tmp_path, finished_links):
    for precision in ("bf16-true", "bf16-mixed"):
        made = Images(target_modules=TARGETS, rank=3, alpha=6, seed=0, finished_links=finished_links)
        run = trainer(tmp_path, chain={"every_n_train_steps": 3}, max_steps=9, precision=precision)
        x, y = images()
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        run.fit(made, DataLoader(TensorDataset(x.to(dtype), y), batch_size=8))
        assert len(made.chain) == 2
        assert run.callback_metrics["train_loss"].isfinite()


def test_a_compiled_module_computes_the_same():
    torch.manual_seed(0)
    model = network()
    inject_lora(model, TARGETS, rank=2, alpha=4, finished_links="stack")
    for layer in lora_layers(model).values():
        layer.stack.reserve(4)
        trained(layer).finish()
        trained(layer)
    x = images()[0]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
