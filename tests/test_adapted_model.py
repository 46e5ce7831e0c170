"""The method in plain torch: the same links and weights as under Lightning, forward, back, and from another chain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from cola_lightning import AdaptedModel, Chain, LoRAConfig, UserError
from tests.helpers.toy import Toy, assert_bit_equal, batches, toy, trainer, weights

ARGUMENTS = {"target_modules": "all-linear", "rank": 2, "alpha": 4}
modes = pytest.mark.parametrize("finished_links", ["merge", "stack"])


def build_toy():
    return Toy.build_model(None)


def adapted(build=build_toy, seed=0, **arguments):
    return AdaptedModel(build, LoRAConfig(**ARGUMENTS | arguments), seed=seed)


def train_link(model, optimizer):
    for x, y in batches():
        optimizer.zero_grad()
        F.mse_loss(model.model(x), y).backward()
        optimizer.step()


def new_optimizer(model):
    return AdamW(model.trained_parameters(), lr=1e-2)


def train(model, links=3):
    """The loop of examples/without_lightning.py, on the toy's batches."""
    for _ in range(links):
        train_link(model, new_optimizer(model))
        model.tie_knot()
    return model


def assert_same_weights(mine, theirs):
    assert_bit_equal(weights(mine), weights(theirs))


@modes
def test_a_loop_in_torch_gives_the_bits_of_a_run_under_lightning(tmp_path, finished_links):
    module = toy(**ARGUMENTS, finished_links=finished_links, lr_schedule="constant", optimizer=lambda p: AdamW(p, lr=1e-2))
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(module, batches())
    module.tie_knot()
    loop = train(adapted(finished_links=finished_links))
    assert loop.chain.is_beginning_of(module.chain)
    assert len(loop.chain) == 3
    assert_same_weights(loop.model, module.model)


@pytest.mark.parametrize(("links", "finished_links"), [(0, "merge"), (1, "stack"), (2, "merge")])
def test_a_loop_goes_on_in_a_new_process_from_its_chain(tmp_path, finished_links, links):
    model = train(adapted(build_normed, finished_links=finished_links, modules_to_save=["1"]), links=links)
    optimizer = new_optimizer(model)
    train_link(model, optimizer)
    model.full_chain().save(tmp_path / "chain")
    of_optimizer = copy.deepcopy(optimizer.state_dict())
    train_link(model, optimizer)
    other = adapted(build_normed, finished_links=finished_links, modules_to_save=["1"])
    other.start_from(Chain.load(tmp_path / "chain"), "record")
    its_optimizer = new_optimizer(other)
    its_optimizer.load_state_dict(of_optimizer)
    train_link(other, its_optimizer)
    assert_bit_equal(weights(other.model), weights(model.model))
    assert len(other.chain) == links + 1  # what the first process trained of its last link is a record


def test_it_goes_back_and_on_and_starts_from_a_chain(tmp_path):
    model = train(adapted())
    model.chain.save(tmp_path / "chain")
    after, given = weights(model.model), model.chain.truncate(1)
    model.go_to(given)
    model.begin_link(ARGUMENTS["rank"], ARGUMENTS["alpha"])
    assert_same_weights(model.model, train(adapted(), links=1).model)
    model.tie_knot()
    assert (len(given), len(model.chain)) == (1, 2)
    other = adapted()
    other.start_from(Chain.load(tmp_path / "chain"))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(weights(other.model)[name], after[name])
    with pytest.raises(UserError, match=r"^base: "):
        adapted(seed=1).start_from(Chain.load(tmp_path / "chain"))


def build_normed():
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))


# ---------------------------------------------------------------------- merged copies


@modes
def test_merged_copies_are_where_the_model_is_and_in_its_mode(finished_links):
    model = train(adapted(finished_links=finished_links), links=2)
    for is_training in (False, True):
        model.model.train(is_training)
        merged = [part for links in range(4) for part in model.merged_model(links).modules()]
        assert all(part.training is is_training for part in merged)
    model = adapted()
    model.model.to("meta")  # for a device that is not the CPU, on any machine
    assert {parameter.device.type for parameter in model.merged_model(0).parameters()} == {"meta"}


@pytest.mark.parametrize(("links", "finished_links"), [(0, "stack"), (2, "merge"), (None, "stack")])
def test_a_merged_copy_in_half_precision_is_rounded_once_and_the_model_stays(finished_links, links):
    model = train(adapted(finished_links=finished_links), links=2)
    before, whole = weights(model.model), model.merged_model(links)
    half = model.merged_model(links, dtype=torch.bfloat16, device="cpu")
    assert_bit_equal(weights(half), {name: value.bfloat16() for name, value in weights(whole).items()})
    assert_bit_equal(weights(model.model), before)
    assert_bit_equal(weights(model.merged_model(links, in_place=True)), weights(whole))


def test_an_impossible_alpha_or_rank_is_refused_and_changes_nothing():
    model = adapted()
    before = weights(model.model)
    for alpha in (0.0, float("nan")):
        with pytest.raises(UserError, match="alpha: must be a number above 0"):
            model.tie_knot(alpha=alpha)
    with pytest.raises(UserError, match=r"rank: must be between 1 and 2 \(model.rank\), got 16"):
        model.tie_knot(rank=16)
    with pytest.raises(UserError, match=r"rank: must be between 1 and 2 \(model.rank\), got 4"):
        model.begin_link(4, 4.0)
    assert_bit_equal(weights(model.model), before)
    assert model.n_finished == 0
