"""Finished links beside the weights: what is added is their sum, no weight is written, and the chain is the same."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from cola_lightning import LastCheckpoint, UserError, inject_lora, lora_layers, strip_lora
from cola_lightning.chain.checkpoint import OpenedCheckpoint
from cola_lightning.lora.layer import low_rank_delta
from cola_lightning.lora.stack import Stack
from tests.toy import ValidatedToy, adapt_layer, assert_bit_equal, batches, toy, trainer, weights


def factors(rank, n_in=6, n_out=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)


def trained(layer, seed=0):
    """The layer with a link that does something."""
    with torch.no_grad():
        layer.lora_B[:, : layer.rank] = factors(layer.rank, seed=seed)[1]
    return layer


def optimizer(parameters):
    return AdamW(parameters, lr=1e-2)


def fit(folder, module=None, *callbacks, epochs=4, ckpt_path=None, data=None, chain=None, **options):
    module = module or toy(ValidatedToy, finished_links="stack", optimizer=optimizer)
    chain = chain or {"every_n_epochs": 1}
    options = {"enable_checkpointing": bool(callbacks), "max_epochs": epochs} | options
    run = trainer(folder, *callbacks, chain=chain, **options)
    data = data or [batches(), batches(2)]
    run.fit(module, *data, ckpt_path=ckpt_path)
    return module


def assert_close_chains(mine, theirs, tolerance):
    assert len(mine) == len(theirs)
    for ours, other in zip(mine.links, theirs.links, strict=True):
        for name, pair in ours.factors.items():
            for factor, expected in zip(pair, other.factors[name], strict=True):
                assert (factor - expected).norm() <= tolerance * expected.norm()


# ---------------------------------------------------------------------- the stack and the layer


def test_a_stack_adds_the_sum_of_its_links():
    stack, x, y = Stack(6, 5, torch.float64, "cpu"), torch.randn(2, 3, 6).double(), torch.randn(2, 3, 5).double()
    assert stack.add_to(y, x) is y
    links = [(*factors(rank, seed=rank), scaling) for rank, scaling in ((2, 0.5), (1, 3.0), (4, 1 / 3))]
    for link in links:
        stack.push(*link)
    delta = sum(scaling * B.double() @ A.double() for A, B, scaling in links)
    torch.testing.assert_close(stack.add_to(y, x), y + x @ delta.T, rtol=1e-12, atol=1e-12)
    A, B = stack.factors
    assert (A.shape, B.shape) == ((7, 6), (5, 7))
    torch.testing.assert_close(B @ A, delta)
    stack.clear()
    assert stack.add_to(y, x) is y
    assert not stack.A.any()


def test_a_stack_grows_by_its_links_alone_and_not_at_all_where_room_is_reserved():
    growing, reserved = (Stack(6, 5, torch.float32, "cpu") for _ in range(2))
    reserved.reserve(5)
    places, room = (reserved.A.data_ptr(), reserved.B.data_ptr()), 5 * (6 + 5) * 4
    for rank in (2, 3):
        before = growing.nbytes
        growing.push(*factors(rank), 1.0)
        reserved.push(*factors(rank), 1.0)
        assert growing.nbytes - before == rank * (6 + 5) * 4
        assert (reserved.A.data_ptr(), reserved.B.data_ptr()) == places
        assert reserved.nbytes == room
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(growing.factors, reserved.factors, strict=True))


def test_in_half_precision_a_link_is_rounded_once_however_small_it_is():
    A, B = factors(2)
    for dtype, size in ((torch.bfloat16, 1e-6), (torch.float16, 1e-6)):  # 1e-6 is subnormal in fp16
        stack = Stack(6, 5, dtype, "cpu")
        stack.push(A, B * size, 2.0)
        ours, theirs = stack.factors[1].double() @ stack.factors[0].double(), 2 * size * B.double() @ A.double()
        assert (ours - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()


def test_a_link_of_zeros_is_stacked_as_zeros():
    stack = Stack(6, 5, torch.bfloat16, "cpu")
    stack.push(factors(2)[0], torch.zeros(5, 2), 2.0)
    assert not stack.factors[1].any()
    assert stack.factors[0].isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_finished_link_leaves_the_function_and_the_weight_alone(kind):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.Linear(6, 5) if kind == "linear" else Conv1D(5, 6)
    before, x, expected = base.weight.detach().clone(), torch.randn(3, 6), base(torch.randn(3, 6))
    layer = adapt_layer(base, rank=2, alpha=3, finished_links="stack")
    assert layer.weight is base.weight
    for seed in range(3):
        layer.reset(torch.Generator().manual_seed(seed), rank=1 + seed % 2)
        expected = trained(layer, seed)(x)
        layer.finish()
        assert not layer.lora_B.any()
        torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.weight, before)
    assert layer.stack.rank == 4


def test_gradients_go_through_the_stack_to_the_input_and_to_the_live_link_alone():
    layer = trained(adapt_layer(nn.Linear(6, 5).requires_grad_(False), rank=2, alpha=2, finished_links="stack"))
    layer.finish()
    x = torch.randn(4, 6, requires_grad=True)
    trained(layer, seed=3)(x).sum().backward()
    W = layer.weight + layer.delta_weight() + layer.stack.factors[1] @ layer.stack.factors[0]
    torch.testing.assert_close(x.grad, W.sum(0).expand(4, 6).detach())
    assert layer.lora_A.grad.any()
    assert (layer.stack.A.grad, layer.weight.grad) == (None, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_narrows_the_base_and_the_stack_but_never_the_live_link(dtype):
    layer = trained(adapt_layer(nn.Linear(6, 5), rank=2, alpha=1, finished_links="stack"))
    layer.finish()
    trained(layer, seed=1)
    layer(torch.randn(2, 6)).sum().backward()
    live = layer.lora_A.detach().clone()
    layer.to(dtype)
    assert {layer.weight.dtype, layer.bias.dtype, layer.stack.A.dtype, layer.stack.B.dtype, layer.dtype} == {dtype}
    assert {layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_B.grad.dtype} == {torch.float32}
    assert torch.equal(layer.lora_A, live)
    assert layer(torch.randn(2, 6, dtype=dtype)).dtype == dtype
    assert layer(torch.randn(2, 6)).dtype == torch.float32
    layer.double()
    assert {layer.lora_A.dtype, layer.stack.A.dtype, layer.weight.dtype} == {torch.float64}


def test_a_copy_has_a_stack_of_its_own():
    layer = trained(adapt_layer(nn.Linear(6, 5), rank=2, alpha=1, finished_links="stack"))
    twin = copy.deepcopy(layer)
    layer.finish()
    assert (layer.stack.rank, twin.stack.rank) == (2, 0)


def test_merge_casts_half_precision_targets_to_float32_and_keeps_their_parameters():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).bfloat16()
    weight, values = model[1].weight, model[1].weight.detach().clone()
    inject_lora(model, ["1"], rank=2, alpha=1)
    assert model[1].weight is weight
    assert (model[0].weight.dtype, weight.dtype, model[1].bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(weight, values.float())
    assert model(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strip_merges_what_is_stacked_or_refuses_to_lose_it(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    W, weight = model[0].weight.detach().clone(), model[0].weight
    inject_lora(model, "all-linear", rank=2, alpha=2, finished_links="stack")
    trained(model[0])
    model[0].finish()
    with pytest.raises(UserError, match="links that would be lost"):
        strip_lora(model)
    trained(model[0], seed=1)
    A, B = model[0].stack.factors
    exact = W.double() + B.double() @ A.double() + model[0].delta_weight().double()
    strip_lora(model, merge=True)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)  # rounded once


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-5), ("64-true", 1e-12)])
def test_four_links_are_those_of_a_run_that_merges(tmp_path, precision, tolerance):
    dtype = torch.float64 if precision == "64-true" else torch.float32
    chain = {"every_n_epochs": 1, "ranks": [4, 2, 6, 3]}
    merged, stacked = (
        fit(
            tmp_path,
            toy(finished_links=mode, optimizer=optimizer, rank=6),
            chain=chain,
            data=[batches(dtype=dtype)],
            precision=precision,
            accumulate_grad_batches=3,
        )
        for mode in ("merge", "stack")
    )
    assert_close_chains(stacked.chain, merged.chain, tolerance)
    for mine, theirs in zip(stacked.merged_model().parameters(), merged.merged_model().parameters(), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * theirs.norm().item())


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_a_knot_leaves_the_loss_as_it_was(mode):
    module, (x, y) = toy(finished_links=mode), next(iter(batches(1, 64)))
    module.configure_model()
    for seed in range(3):
        for layer in lora_layers(module.model).values():
            nn.init.normal_(layer.lora_B, std=0.5, generator=torch.Generator().manual_seed(seed))
        before = mse_loss(module.model(x), y).item()
        module.tie_knot()
        assert mse_loss(module.model(x), y).item() == pytest.approx(before, rel=1e-6)
    assert module.chain.total_rank("0") == 6


def test_no_weight_is_written_and_none_is_in_a_checkpoint(tmp_path):
    module = toy(ValidatedToy, finished_links="stack", optimizer=optimizer)
    module.configure_model()
    before = {name: value for name, value in weights(module).items() if ".lora_" not in name}
    fit(tmp_path, module, LastCheckpoint())
    assert_bit_equal({name: value for name, value in weights(module).items() if name in before}, before)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"] if name != "cola")
    assert not list(module.buffers())  # which DDP would send at each step


def test_room_for_the_chain_is_made_once_where_its_length_is_known(tmp_path):
    places = []

    class Watched(ValidatedToy):
        def on_train_batch_start(self, batch, batch_idx):
            places.append([(layer.stack.A.data_ptr(), len(layer.stack.A)) for layer in self.adapted.layers.values()])

    chain = {"every_n_epochs": 1, "ranks": [2, 1, 2, 1]}
    module = fit(tmp_path, toy(Watched, finished_links="stack"), chain=chain)
    assert [rank for _, rank in places[0]] == [2 + 1 + 2] * 2
    assert places == [places[0]] * 40
    assert module.adapted.layers["0"].stack.rank == 5


def test_room_for_a_resumed_chain_holds_what_it_has_and_what_it_will_have(tmp_path):
    fit(tmp_path, None, LastCheckpoint(), epochs=2)
    module = fit(
        tmp_path, toy(ValidatedToy, finished_links="stack"), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", epochs=5
    )
    assert [(layer.stack.rank, len(layer.stack.A)) for layer in module.adapted.layers.values()] == [(8, 8)] * 2


def test_without_a_known_length_the_stack_grows_at_each_knot(tmp_path):
    sizes = []

    class Watched(ValidatedToy):
        def on_train_batch_start(self, batch, batch_idx):
            sizes.append(self.adapted.layers["0"].stack.nbytes)

    module = toy(Watched, finished_links="stack", lr_schedule="constant")
    fit(tmp_path, module, epochs=-1, max_time={"seconds": 1}, limit_train_batches=2)
    assert sorted(set(sizes))[:3] == [k * 2 * (8 + 12) * 4 for k in range(3)]


@pytest.mark.parametrize("stop", [10, 20])
def test_a_resumed_run_is_the_run_to_the_bit(tmp_path, stop):
    chain = {"at_steps": [6, 10, 17, 22], "ranks": [2, 1, 2, 2, 1]}
    whole, half, module = (
        toy(ValidatedToy, finished_links="stack", optimizer=optimizer, lr_schedule="constant") for _ in range(3)
    )
    fit(tmp_path / "whole", whole, chain=chain, epochs=3)
    fit(tmp_path, half, LastCheckpoint(), chain=chain, epochs=3, max_steps=stop)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path / "resumed", module, LastCheckpoint(), ckpt_path=last, chain=chain, epochs=3)
    assert_bit_equal(weights(module), weights(whole))
    for mine, theirs in zip(module.adapted.layers.values(), whole.adapted.layers.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.stack.factors, theirs.stack.factors, strict=True))


def test_a_chain_goes_back_and_on_without_its_base_being_made_anew(tmp_path):
    made = []

    class Counted(ValidatedToy):
        def build_model(self):
            made.append(1)
            return super().build_model()

    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module = fit(tmp_path, toy(Counted, finished_links="stack", optimizer=optimizer), save)
    outputs, x = [], torch.randn(5, 8)
    run = trainer(tmp_path, save, chain={}, enable_checkpointing=True)
    for epoch in (3, 0, 2, 1):
        run.validate(module, batches(2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert module.link == epoch
        outputs.append(module.model(x))
    assert made == [1]
    for epoch, output in zip((3, 0, 2, 1), outputs, strict=True):
        fresh = Counted.load_from_checkpoint(tmp_path / f"epoch={epoch}.ckpt")
        assert torch.equal(fresh.model(x), output)


def test_merged_models_are_those_of_a_run_that_merges_to_the_bit(tmp_path):
    module = fit(tmp_path)
    module.chain.save(tmp_path / "chain")
    merging, stacking = (
        toy(ValidatedToy, finished_links=mode, init_chain=str(tmp_path / "chain")) for mode in ("merge", "stack")
    )
    for links in range(5):
        ours, theirs = stacking.merged_model(links), merging.merged_model(links)
        assert type(ours[0]) is nn.Linear
        assert_bit_equal(ours.state_dict(), theirs.state_dict())
    assert (stacking.link, stacking.adapted.layers["0"].stack.rank) == (3, 6)  # as it was


def test_trained_modules_and_buffers_are_rolled_back_too(tmp_path):
    class Normed(ValidatedToy):
        def build_model(self):
            return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))

    arguments = {"target_modules": ["0"], "modules_to_save": ["3"], "finished_links": "stack", "optimizer": optimizer}
    module = fit(tmp_path, toy(Normed, **arguments), epochs=3)
    base = toy(Normed, **arguments)
    assert_bit_equal(module.merged_model(0).state_dict(), base.merged_model(0).state_dict())
    for k in (1, 2):
        extras = module.chain.links[k - 1].extras
        state = module.merged_model(k).state_dict()
        assert_bit_equal({name: state[name] for name in extras}, extras)
    assert not torch.equal(module.merged_model(1)[3].weight, module.merged_model()[3].weight)


def test_the_other_mode_takes_a_checkpoint_up_and_goes_on(tmp_path):
    whole = fit(tmp_path / "whole")
    fit(tmp_path, None, LastCheckpoint(), epochs=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    merging = fit(tmp_path / "other", toy(ValidatedToy, finished_links="merge", optimizer=optimizer), ckpt_path=last)
    assert merging.adapted.layers["0"].stack is None
    assert_close_chains(merging.chain, whole.chain, 1e-5)


def test_a_base_that_is_kept_is_stacked_on_as_it_is(tmp_path):
    module = toy(ValidatedToy, finished_links="stack", save_base=True, optimizer=optimizer)
    fit(tmp_path, module, LastCheckpoint(), epochs=3)

    class Elsewhere(ValidatedToy):
        def build_model(self):
            model = super().build_model()
            nn.init.zeros_(model[0].weight)
            return model

    last = tmp_path / "checkpoints" / "last.ckpt"
    other = toy(Elsewhere, finished_links="stack", save_base=True)
    trainer(tmp_path, chain={}).validate(other, batches(2), ckpt_path=last, verbose=False)
    x = torch.randn(3, 8)
    assert torch.equal(other.model(x), module.model(x))


def test_norms_and_reports_are_of_the_chain(tmp_path, caplog):
    caplog.set_level("INFO")
    module = fit(tmp_path)
    told = [record.args[5] for record in caplog.records if "update norm" in record.msg]
    assert told == [pytest.approx(link.norm()) for link in module.full_chain().links]
    deltas = [low_rank_delta(*module.chain.links[0].factors[name], 2.0) for name in ("0", "2")]
    assert told[0] == pytest.approx(math.hypot(*(float(delta.norm()) for delta in deltas)), rel=1e-5)


# ---------------------------------------------------------------------- where it could go wrong


def test_each_layer_comes_back_in_its_own_dtype(tmp_path):
    class Mixed(ValidatedToy):
        def build_model(self):
            model = super().build_model()
            model[0].bfloat16()
            return model

    module = toy(Mixed, finished_links="stack", optimizer=optimizer)
    fit(tmp_path, module, LastCheckpoint())
    loaded = Mixed.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    for each in (module, loaded):
        assert [layer.weight.dtype for layer in each.adapted.layers.values()] == [torch.bfloat16, torch.float32]
    x = torch.randn(3, 8)
    assert torch.equal(loaded.model(x), module.model(x))


@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_a_checkpoint_is_evaluated_in_the_precision_of_its_run(tmp_path, targets):
    losses, paths = [], []
    for precision in ("32-true", "bf16-true"):
        folder = tmp_path / precision
        fit(folder, toy(ValidatedToy, finished_links="stack", target_modules=targets), LastCheckpoint(), precision=precision)
        paths.append(folder / "checkpoints" / "last.ckpt")
    run = trainer(tmp_path, chain={})
    for path in paths:
        module = toy(ValidatedToy, finished_links="stack", target_modules=targets)
        (metrics,) = run.validate(module, batches(2), ckpt_path=path, verbose=False)
        losses.append(metrics["val_loss"])
    assert losses[0] != losses[1]
    module = toy(ValidatedToy, finished_links="stack", target_modules=targets)
    with pytest.raises(UserError, match="which cast them to float32"):
        fit(tmp_path / "refused", module, ckpt_path=paths[1])
    (metrics,) = run.validate(module, batches(2), ckpt_path=paths[0], verbose=False)
    assert metrics["val_loss"] == losses[0]


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_the_base_is_what_it_was_before_it_was_cast(tmp_path, mode):
    module = toy(ValidatedToy, finished_links=mode, save_base=True)
    fit(tmp_path, module, LastCheckpoint(), precision="bf16-true")
    base = toy().merged_model(0).state_dict()
    assert_bit_equal(module.merged_model(0).state_dict(), base)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["cola"]
    assert_bit_equal(state["base_weights"], base)


@pytest.mark.parametrize("mode", ["merge", "stack"])
def test_links_that_tell_nothing_of_a_head_leave_it_as_it_was(tmp_path, mode):
    plain = fit(tmp_path, toy(ValidatedToy, finished_links=mode, target_modules=["0"]), epochs=2)
    plain.chain.save(tmp_path / "chain")
    how = {"finished_links": mode, "target_modules": ["0"], "modules_to_save": ["2"], "optimizer": optimizer}
    module = toy(ValidatedToy, init_chain=str(tmp_path / "chain"), **how)
    fit(tmp_path / "on", module, LastCheckpoint(), epochs=2)
    base = toy(ValidatedToy).merged_model(0)[2].weight
    assert not torch.equal(module.model[2].weight, base)
    assert torch.equal(module.merged_model(1)[2].weight, base)
    last = tmp_path / "on" / "checkpoints" / "last.ckpt"
    module.pending = replace(OpenedCheckpoint.open(last), links=1)
    trainer(tmp_path, chain={}).validate(module, batches(2), ckpt_path=last, verbose=False)
    assert torch.equal(module.model[2].weight, base)


def test_a_knot_in_inference_mode_is_trained_on(tmp_path):
    class Tying(ValidatedToy):
        def on_validation_epoch_end(self):
            if self.trainer.state.fn == "validate":
                nn.init.ones_(self.adapted.layers["0"].lora_B)
                self.tie_knot()

    module = toy(Tying, finished_links="stack")
    trainer(tmp_path, chain={}).validate(module, batches(2), verbose=False)
    fit(tmp_path, module, epochs=1, chain={"at_epochs": [5]})
    assert module.adapted.layers["0"].stack.rank == 2


def test_room_is_made_for_a_weight_of_full_rank_at_most(tmp_path):
    module = toy(ValidatedToy, finished_links="stack", lr_schedule="constant")
    fit(tmp_path, module, epochs=1000, max_steps=8, chain={"every_n_train_steps": 1})
    assert [layer.stack.rank for layer in module.adapted.layers.values()] == [14, 14]
    assert len(module.adapted.layers["0"].stack.A) == 14
    fit(tmp_path, toy(ValidatedToy, finished_links="stack"), epochs=100, limit_train_batches=1, limit_val_batches=0)


def test_a_stripped_model_computes_in_the_dtype_of_its_base():
    for merge in (False, True):
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).bfloat16()
        x, weight = torch.randn(3, 6).bfloat16(), model[1].weight
        expected = model(x)
        inject_lora(model, ["1"], rank=2, alpha=1)
        assert weight.dtype == torch.float32
        strip_lora(model, merge=merge)
        assert torch.equal(model(x), expected)
        assert model[1].weight is weight


def test_a_module_that_could_not_be_made_is_not_taken_for_ready():
    module = toy(activation_checkpointing=True, finished_links="stack")
    for _ in range(2):
        with pytest.raises(UserError, match=r"model\.activation_checkpointing"):
            module.configure_model()


@pytest.mark.parametrize("how", [{"modules_to_save": ["2"], "target_modules": ["0"]}, {"target_modules": None}])
def test_what_an_optimizer_trains_badly_is_told(tmp_path, caplog, how):
    trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(toy(**how), batches())
    assert caplog.text.count("fully trained parameters are in half precision") == 1


def test_a_run_in_float64_with_a_head_resumes_to_the_bit(tmp_path):
    def make():
        return toy(ValidatedToy, target_modules=["0"], modules_to_save=["2"], finished_links="stack", optimizer=optimizer)

    how = {"precision": "64-true", "data": [batches(dtype=torch.float64), batches(2, dtype=torch.float64)]}
    whole = fit(tmp_path / "whole", make(), **how)
    fit(tmp_path, make(), LastCheckpoint(), epochs=2, **how)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert_bit_equal(weights(fit(tmp_path / "on", make(), LastCheckpoint(), ckpt_path=last, **how)), weights(whole))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("64-true", "float64")])
@pytest.mark.parametrize("before", ["made", "fitted"])
def test_a_module_that_was_made_before_its_trainer_tells_what_that_cast_it_to(tmp_path, precision, dtype, before):
    kept = getattr(torch, dtype)
    data = [batches(dtype=kept), batches(2, dtype=kept)]
    module = toy(ValidatedToy, finished_links="stack", optimizer=optimizer)
    if before == "made":
        module.configure_model()
    else:
        fit(tmp_path / "before", module, epochs=1)
    base = toy().merged_model(0)
    fit(tmp_path, module, LastCheckpoint(), epochs=2, precision=precision, data=data)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["state_dict"]["cola"]["dtype"] == dtype
    assert_bit_equal(module.merged_model(0).state_dict(), base.to(module.merged_model(0)[0].weight.dtype).state_dict())
    fit(tmp_path / "on", None, LastCheckpoint(), ckpt_path=last, epochs=3, precision=precision, data=data)
    with pytest.raises(UserError, match=f"cast adapted weights to {dtype}, as in the checkpoint's run, received 32-true"):
        fit(tmp_path / "refused", None, LastCheckpoint(), ckpt_path=last)


def test_a_module_that_failed_when_it_was_made_begins_from_nothing(tmp_path):
    fit(tmp_path).chain.save(tmp_path / "chain")
    module = toy(init_chain=str(tmp_path / "chain"), finished_links="stack", save_base=True, activation_checkpointing=True)
    with pytest.raises(UserError, match="activation_checkpointing"):
        module.configure_model()
    assert (len(module.chain), module.is_base_in_checkpoint) == (0, False)
