"""What holds of every layer type with a link, merged or stacked: the formula, the way back, dtypes, copies, a chain."""

import copy
import pickle
from inspect import signature

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from cola_lightning import AdaptedModel, Chain, LoRAConfig, LoRALayer, register_lora_layer
from cola_lightning.lora import inject
from cola_lightning.lora.attention import InputProjection
from cola_lightning.lora.experts import ExpertsProjection, LoRAExpertsProjection
from tests.helpers.toy import (
    Grid,
    LoRAGrid,
    adapt_layer,
    assert_bit_equal,
    assert_near,
    quantized_linear,
    weights,
    with_trained_link,
)


class Scaled(nn.Linear):
    """A user's layer: gives twice what its parent would, and its input has another name."""

    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class LoRAScaled(LoRALayer, Scaled):
    def project_up(self, hidden, lora_B):
        return 2 * super().project_up(hidden, lora_B)


class Experts(ExpertsProjection):
    """A projection of three experts, of whose rows the first has a quarter, the second none, and the third the rest."""

    def __init__(self, *sizes, transposed=False):
        super().__init__(nn.Parameter(torch.randn(3, *sizes)), weight_is_transposed=transposed)

    def forward(self, x):
        return super().forward(x, offsets(x))


class LoRAExperts(LoRAExpertsProjection, Experts):
    def project_down(self, x, lora_A):
        return super().project_down(x, lora_A, offsets(x))

    def project_up(self, hidden, lora_B):
        return super().project_up(hidden, lora_B, offsets(hidden))


def offsets(x):
    return torch.tensor([len(x) // 4, len(x) // 4, len(x)], dtype=torch.int32)


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (4, 7, 6)),
    "transformers' Conv1D": (lambda: Conv1D(5, 6), (4, 7, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=3, padding=2, dilation=2, bias=False), (3, 4, 11)),
    "attention's": (lambda: InputProjection(nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12))), (4, 7, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 11, 11)),
    "dilated": (lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=2), (3, 4, 11, 11)),
    "registered": (lambda: Scaled(6, 5), (4, 7, 6)),
    "of its own": (Grid, (4, 7, 6)),
    "experts": (lambda: Experts(5, 6), (28, 6)),
    "experts, transposed": (lambda: Experts(8, 16, transposed=True), (28, 8)),  # of sizes for which there is a kernel
    "4-bit": (quantized_linear, (4, 7, 64)),
}
MERGE_AND_STACK = [(kind, mode) for kind in LAYERS for mode in ("merge", "stack") if (kind, mode) != ("4-bit", "merge")]
variants = pytest.mark.parametrize(("kind", "mode"), MERGE_AND_STACK)


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(inject, "_entries", dict(inject._entries))
    register_lora_layer(Scaled)(LoRAScaled)
    register_lora_layer(Grid)(LoRAGrid)
    register_lora_layer(Experts)(LoRAExperts)


def make(kind):
    torch.manual_seed(0)
    return LAYERS[kind][0]()


def inputs(kind, dtype=torch.float32):
    return torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_weight(layer):
    """The weight that a layer computes with; one in 4 bits, by bitsandbytes' product in float32."""
    if not hasattr(layer.weight, "quant_state"):
        return layer.weight.detach().clone()
    from bitsandbytes import matmul_4bit

    state = layer.weight.quant_state
    return matmul_4bit(torch.eye(state.shape[1]), layer.weight.detach(), state).T.contiguous()


def is_transposed(layer):
    return isinstance(layer, Conv1D | Grid) or getattr(layer, "weight_is_transposed", False)


def laid_out(matrix, layer):
    """An update, out x in, in the layout of the layer's weight."""
    matrix = matrix.mT if is_transposed(layer) else matrix
    return matrix.reshape(layer.weight.shape if layer.weight.is_floating_point() else matrix.shape)


def with_update(base, matrix, x):
    """What a plain layer computes if its weight is the base's plus this matrix (out x in)."""
    weight = dense_weight(base).to(x.dtype) + laid_out(matrix, base)
    if not base.weight.is_floating_point():
        return F.linear(x, weight, base.bias.to(x.dtype))
    return torch.func.functional_call(base, {"weight": weight}, x)


@variants
def test_a_new_link_leaves_the_function_and_the_parameters_alone(kind, mode):
    base, x = make(kind), inputs(kind)
    expected, parameters = base(x), dict(base.named_parameters())
    layer = adapt_layer(base, 3, 4, finished_links=mode)
    assert torch.equal(layer(x), expected)
    assert isinstance(layer, type(base))
    assert all(getattr(layer, name) is parameter for name, parameter in parameters.items())
    weight = dense_weight(base).mT if is_transposed(base) else dense_weight(base)
    *matrices, n_out, n_in = weight.shape if isinstance(base, Experts) else weight.flatten(1).shape
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((*matrices, 3, n_in), (*matrices, n_out, 3))
    assert layer.lora_A.all()
    assert not layer.lora_B.any()
    with_trained_link(layer)
    assert torch.equal(layer(**{next(iter(signature(base.forward).parameters)): x}), layer(x))  # the base's name for it
    if not isinstance(base, Experts):
        torch.testing.assert_close(layer(x[0]), layer(x)[0])  # a single example, without a batch


@variants
@pytest.mark.parametrize("rank", [4, 2])
def test_outputs_and_gradients_are_those_of_the_formula(kind, mode, rank):
    """After a finished link, also of a link of lower rank, which uses slices of the same parameters."""
    base, x = make(kind).double(), inputs(kind, torch.float64).requires_grad_()
    layer = with_trained_link(adapt_layer(copy.deepcopy(base), 4, 6, finished_links=mode).double())
    finished = 6 / 4 * layer.lora_B.detach() @ layer.lora_A.detach()
    layer.finish()
    layer.requires_grad_(False)
    parameters = layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()
    layer.rank, layer.scaling = rank, 3 / rank
    layer.reset(torch.Generator().manual_seed(1))
    with_trained_link(layer, seed=3)
    assert (layer.lora_A, layer.lora_B) == parameters
    A, B = (factor.detach().clone().requires_grad_() for factor in layer.factors)
    mine, theirs = layer(x), with_update(base, finished + 3 / rank * B @ A, x)
    tolerance = 1e-5 if kind == "4-bit" else 1e-12  # its product has no float64
    assert_near(mine, theirs, tolerance)
    upstream = torch.randn(mine.shape, dtype=torch.float64)
    of_x, of_A, of_B = torch.autograd.grad(mine, [x, layer.lora_A, layer.lora_B], upstream)
    expected = torch.autograd.grad(theirs, [x, A, B], upstream)
    for gradient, other in zip((of_x, of_A[..., :rank, :], of_B[..., :rank]), expected, strict=True):
        assert_near(gradient, other, tolerance)
    assert not layer.lora_A[..., rank:, :].any()
    assert not of_A[..., rank:, :].any()
    assert not of_B[..., rank:].any()


@variants
def test_a_finished_link_is_in_the_weight_or_beside_it_to_the_bit(kind, mode):
    layer, x = with_trained_link(adapt_layer(make(kind), 2, 4, finished_links=mode)), inputs(kind)
    before, delta, expected = dense_weight(layer), layer.delta_weight(), layer(x)
    layer.finish()
    assert not layer.lora_B.any()
    assert_near(layer(x), expected, 1e-6)
    assert torch.equal(dense_weight(layer), before + delta if mode == "merge" else before)
    assert mode == "merge" or layer.stack.rank == 2


@variants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_narrows_no_factor_and_no_weight_that_is_merged_into(kind, mode, dtype):
    """Where links are stacked, the weight and the finished links are in the precision of the base."""
    layer, x = with_trained_link(adapt_layer(make(kind), 2, 1, finished_links=mode)), inputs(kind)
    layer.finish()
    expected = with_trained_link(layer, seed=3)(x)
    expected.backward(torch.ones_like(expected))
    before = weights(layer)
    nn.Sequential(layer).to(dtype)
    factors = [layer.lora_A, layer.lora_B]
    assert {value.dtype for factor in factors for value in (factor, factor.grad)} == {torch.float32}
    base = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None and parameter.is_floating_point()]
    if mode == "merge":
        assert_bit_equal(weights(layer), before)
    else:
        assert {value.dtype for value in (*base, layer.stack.A, layer.stack.B)} == {layer.dtype} == {dtype}
    assert layer(x.to(dtype)).dtype == dtype
    assert layer(x).dtype == torch.float32
    assert_near(layer(x.to(dtype)), expected, 2e-2)
    nn.Sequential(layer).double()
    assert {value.dtype for value in (*base, *factors)} == {layer.dtype} == {torch.float64}


@variants
def test_under_autocast_a_layer_computes_in_autocasts_dtype_and_its_update_does_not(kind, mode):
    layer, x = with_trained_link(adapt_layer(make(kind), 2, 1, finished_links=mode)), inputs(kind)
    layer.finish()
    expected = with_trained_link(layer, seed=3)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, delta = layer(x), layer.delta_weight()
    assert y.dtype == torch.bfloat16
    assert_near(y, expected, 1e-2)
    assert torch.equal(delta, layer.delta_weight())


@variants
def test_dropout_acts_on_the_link_alone_and_only_in_training(kind, mode):
    base, x = make(kind), inputs(kind)
    layer = adapt_layer(base, 2, 1, dropout=0.5, finished_links=mode)
    assert torch.equal(layer(x), base(x))
    with_trained_link(layer)
    assert not torch.equal(layer(x), layer(x))
    assert_near(layer.eval()(x), with_update(base, layer.scaling * layer.lora_B @ layer.lora_A, x), 1e-6)


@pytest.mark.parametrize(("init", "std"), [("kaiming", (3 * 400) ** -0.5), ("gaussian", 1 / 50)])
@pytest.mark.parametrize("base", [lambda: nn.Linear(400, 100), lambda: nn.Conv2d(16, 100, 5), lambda: Experts(100, 400)])
def test_A_is_drawn_as_peft_draws_it(base, init, std):
    layer = adapt_layer(base(), rank=100, alpha=1, init=init)
    layer.rank = 50
    layer.reset(torch.Generator().manual_seed(0))
    assert layer.factors[0].std().item() == pytest.approx(std, rel=0.02)


@variants
def test_a_chain_is_copied_kept_replayed_to_the_bit_and_gone_back_in(kind, mode, tmp_path):
    def adapted_model():
        options = {"target_modules": ["0"], "rank": 4, "alpha": 6, "finished_links": mode}
        return AdaptedModel(lambda: nn.Sequential(LAYERS[kind][0](), nn.Tanh()), LoRAConfig(**options), seed=1)

    model, x = adapted_model(), inputs(kind)
    outputs = [model.model(x)]
    for link, rank in enumerate((3, 1, 2)):
        with_trained_link(model.layers["0"], seed=link)
        outputs.append(model.model(x))
        model.tie_knot(rank=rank)
        torch.testing.assert_close(model.model(x), outputs[-1], rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))):
        assert torch.equal(twin(x), model.model(x))
        with_trained_link(twin[0]).finish()  # a weight and a stack of its own
        torch.testing.assert_close(model.model(x), outputs[-1], rtol=1e-5, atol=1e-5)

    model.chain.save(tmp_path / "chain")
    chain, again = Chain.load(tmp_path / "chain"), adapted_model()
    again.go_to(chain)
    again.begin_link(2, 6)
    assert_bit_equal(weights(again.model), weights(model.model))
    assert torch.equal(again.model(x), model.model(x))

    plain_class = nn.Linear if kind == "4-bit" else type(make(kind))
    for links, expected in enumerate(outputs):
        merged = model.merged_model(links)
        assert type(merged[0]) is plain_class
        torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)
    change = merged[0].weight - model.merged_model(0)[0].weight
    torch.testing.assert_close(change, laid_out(chain.delta("0"), merged[0]), rtol=1e-5, atol=1e-5)
    model.go_to(chain.truncate(1))
    torch.testing.assert_close(model.model(x), outputs[1], rtol=1e-5, atol=1e-5)
