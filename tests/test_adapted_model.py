"""The method in plain torch: the same links and weights as under Lightning, forward, back, and from another chain."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm
from torch.optim import AdamW

from cola_lightning import AdaptedModel, Chain, LoRALinear, UserError
from cola_lightning.adapted_model import base_weights, load_extras
from cola_lightning.chain.report import report
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer

ARGUMENTS = {"target_modules": "all-linear", "rank": 2, "alpha": 4, "seed": 0}


def adapted(**arguments):
    return AdaptedModel.of(lambda: Toy.build_model(None), **ARGUMENTS | arguments)


def train(model, links=3, **of_knots):
    """The loop of docs/python.md, on the toy's batches."""
    for _ in range(links):
        optimizer = AdamW(model.trained_parameters(), lr=1e-2)
        for x, y in batches():
            loss = F.mse_loss(model.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.tie_knot(**of_knots)
    return model


def state(model):
    return {name: value.detach().clone() for name, value in model.model.state_dict().items()}


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_loop_in_torch_gives_the_bits_of_a_run_under_lightning(tmp_path, finished_links):
    module = toy(**ARGUMENTS, finished_links=finished_links, lr_schedule="constant", optimizer=lambda p: AdamW(p, lr=1e-2))
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches())
    module.tie_knot()
    loop = train(adapted(finished_links=finished_links))
    assert loop.chain.is_beginning_of(module.chain)
    assert len(loop.chain) == 3
    assert_bit_equal(state(loop), {name: value.clone() for name, value in module.model.state_dict().items()})


def build_toy():
    return Toy.build_model(None)


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_loop_that_stops_inside_a_link_goes_on_from_what_torch_saves(tmp_path, finished_links):
    def steps(model, optimizer):
        for x, y in batches():
            optimizer.zero_grad()
            F.mse_loss(model.model(x), y).backward()
            optimizer.step()

    model = train(AdaptedModel.of(build_toy, **ARGUMENTS, finished_links=finished_links), links=1)
    optimizer = AdamW(model.trained_parameters(), lr=1e-2)
    steps(model, optimizer)
    torch.save((model, optimizer), tmp_path / "run.pt")
    resumed, its_optimizer = torch.load(tmp_path / "run.pt", weights_only=False)
    steps(model, optimizer)
    steps(resumed, its_optimizer)
    for one in (model, resumed):
        one.tie_knot()
    assert_bit_equal(state(resumed), state(model))
    assert_bit_equal(*({n: v.detach() for n, v in one.merged_model(1).state_dict().items()} for one in (resumed, model)))


def test_a_knot_keeps_the_function_and_merged_copies_have_any_number_of_links():
    model, x = adapted(), next(iter(batches()))[0]
    base = model.merged_model(0)(x)
    train(model, links=2)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.lora_B.fill_(0.1)
    before = model.model(x)
    torch.testing.assert_close(model.merged_model()(x), before)
    model.tie_knot(rank=1, alpha=3)
    torch.testing.assert_close(model.model(x), before)
    assert (model.link, model.live) == (3, (1, 3))
    assert torch.equal(model.merged_model(0)(x), base)
    assert not any(isinstance(part, LoRALinear) for part in model.merged_model(1).modules())
    with pytest.raises(UserError, match="links: expected 0 to 4"):
        model.merged_model(5)


def test_a_merged_model_of_fewer_links_is_where_the_model_is():
    model = adapted()
    model.model.to("meta")  # for a device that is not the CPU, on any machine
    assert {parameter.device.type for parameter in model.merged_model(0).parameters()} == {"meta"}


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_merged_copies_have_the_mode_of_the_model(finished_links):
    model = train(adapted(finished_links=finished_links), links=2)
    for is_training in (False, True):
        model.model.train(is_training)
        merged = [part for links in range(4) for part in model.merged_model(links).modules()]
        assert all(part.training is is_training for part in merged)


@pytest.mark.parametrize("target_modules", ["all-linear", None])
def test_merged_copies_may_have_parameters_of_integers(target_modules):
    def build_model():
        model = Toy.build_model(None)
        model.order = nn.Parameter(torch.arange(3), requires_grad=False)
        return model

    merged = AdaptedModel.of(build_model, **ARGUMENTS | {"target_modules": target_modules}).merged_model()
    trainable = {name for name, parameter in merged.named_parameters() if parameter.requires_grad}
    assert trainable == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(merged.order, torch.arange(3))


def test_it_goes_back_and_on_and_starts_from_a_chain(tmp_path):
    model = train(adapted())
    model.chain.save(tmp_path / "chain")
    after = state(model)
    model.go_to(model.chain.truncate(1))
    assert_bit_equal(
        {name: value for name, value in state(model).items() if "lora" not in name},
        {name: value for name, value in state(train(adapted(), links=1)).items() if "lora" not in name},
    )
    other = adapted()
    other.start_from(Chain.load(tmp_path / "chain"))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(other.model.state_dict()[name], after[name])
    with pytest.raises(UserError, match="base: expected the one on which the chain was trained"):
        adapted(seed=1).start_from(Chain.load(tmp_path / "chain"))


def test_a_chain_that_it_went_to_is_not_changed_by_a_knot(tmp_path):
    model = train(adapted())
    given = model.chain.truncate(1)
    model.go_to(given)
    model.tie_knot()
    assert (len(given), len(model.chain)) == (1, 2)


def test_what_is_trained_whole_is_part_of_each_link():
    model = train(adapted(target_modules=["0"], modules_to_save=["2"]))
    assert [list(link.extras) for link in model.chain.links] == [["2.weight", "2.bias"]] * 3
    assert torch.equal(model.merged_model(1)[2].weight, model.chain.links[0].extras["2.weight"])


@pytest.mark.parametrize("links", [0, 1, 2])
@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_it_goes_back_with_what_is_trained_whole(finished_links, links):
    model = train(adapted(target_modules=["0"], modules_to_save=["2"], finished_links=finished_links))
    x, expected = next(iter(batches()))[0], model.merged_model(links)
    model.go_to(model.chain.truncate(links))
    torch.testing.assert_close(model.model(x), expected(x))
    assert_bit_equal(model.model[2].state_dict(), expected[2].state_dict())


class Mixing(nn.Module):
    """With a parameter that has a factor's name."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.lora_A


def test_a_parameter_of_the_base_may_have_a_factors_name(tmp_path):
    def build_model():
        return nn.Sequential(*Toy.build_model(None), Mixing())

    model = train(AdaptedModel.of(build_model, **ARGUMENTS, modules_to_save=["3"]), links=2)
    first, last = (link.extras["3.lora_A"] for link in model.chain.links)
    assert not torch.equal(first, last)
    assert torch.equal(model.merged_model(1)[3].lora_A, first)
    model.chain.save(tmp_path / "chain")
    other = AdaptedModel.of(build_model, **ARGUMENTS, modules_to_save=["3"])
    other.start_from(Chain.load(tmp_path / "chain"))
    assert torch.equal(other.model[3].lora_A, last)
    assert "3.lora_A" in base_weights(other.model)


class Remembering(nn.Module):
    """Keeps what a forward pass computed, as for an auxiliary loss, and an old-style weight norm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), weight_norm(nn.Linear(12, 6))
        self.losses, self.seen = {}, []

    def forward(self, x):
        hidden = self.first(x).tanh()
        self.losses["size"] = hidden.square().mean()
        self.seen = [hidden]
        return self.last(hidden)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_a_model_may_keep_what_it_computed():
    model, x = AdaptedModel.of(Remembering, **ARGUMENTS | {"target_modules": ["first"]}), next(iter(batches()))[0]
    train(model, links=2)
    expected = model.model(x)
    merged = model.merged_model()
    assert merged.losses["size"].item() == model.model.losses["size"].item()
    torch.testing.assert_close(merged(x), expected)
    assert model.model.seen[0].requires_grad


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 12, dtype=torch.complex64), nn.Linear(12, 6)

    def forward(self, x):
        return self.last(self.first(x.to(torch.complex64)).abs())


def test_complex_weights_are_adapted():
    model = train(AdaptedModel.of(Complex, **ARGUMENTS))
    link, x = model.chain.links[1], next(iter(batches()))[0]
    torch.testing.assert_close(model.merged_model()(x), model.model(x))
    first = torch.linalg.svdvals(link.delta("first").to(torch.complex128))
    torch.testing.assert_close(torch.tensor(report(model.chain)[1].layers["first"].singular_values), first[:2].float())
    norm = math.hypot(first.norm(), link.delta("last").norm())
    assert link.norm() == pytest.approx(norm)
    assert report(model.chain)[1].update_norm == pytest.approx(norm)
    model.cast(torch.float64)
    assert [layer.dtype for layer in model.layers.values()] == [torch.complex64, torch.float64]


class Counting(nn.Module):
    """With a state that is no tensor."""

    def forward(self, x):
        return x

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        assert state == {"calls": 3}


def test_a_state_that_is_no_tensor_is_left_alone():
    model = train(AdaptedModel.of(lambda: nn.Sequential(*Toy.build_model(None), Counting()), **ARGUMENTS), links=1)
    model.go_to(model.chain.truncate(0))
    assert model.merged_model().state_dict()["3._extra_state"] == {"calls": 3}


def test_a_model_without_links_has_no_knots():
    model = adapted(target_modules=None)
    assert isinstance(model.model[0], nn.Linear)
    assert model.live is None
    with pytest.raises(UserError, match=r"model\.target_modules: expected layers to adapt"):
        model.tie_knot()


def test_a_chains_buffers_may_be_nan():
    own = {"last_loss": torch.zeros(())}
    load_extras({"last_loss": torch.tensor(torch.nan)}, own)
    assert own["last_loss"].isnan()
