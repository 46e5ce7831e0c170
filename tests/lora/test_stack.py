"""Finished links beside the weights: no weight is written, the chain is the one of a run that merges, and it goes back."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.optim import AdamW

from cola_lightning import LastCheckpoint, UserError
from cola_lightning.lora.stack import Stack
from tests.helpers.resuming import last
from tests.helpers.toy import ValidatedToy, assert_bit_equal, assert_near, batches, toy, trainer, weights

MODES = ["merge", "stack"]


def make(cls=ValidatedToy, **arguments):
    return toy(cls, **{"finished_links": "stack", "optimizer": lambda parameters: AdamW(parameters, lr=1e-2)} | arguments)


def fit(folder, module, *callbacks, ckpt_path=None, **options):
    options = {"enable_checkpointing": bool(callbacks), "max_epochs": 4} | options
    run = trainer(folder, *callbacks, chain={"every_n_epochs": 1}, **options)
    run.fit(module, batches(), batches(2), ckpt_path=ckpt_path)
    return module


def assert_close_chains(mine, theirs, tolerance):
    assert len(mine) == len(theirs)
    for ours, other in zip(mine.links, theirs.links, strict=True):
        for name, pair in ours.factors.items():
            for factor, expected in zip(pair, other.factors[name], strict=True):
                assert_near(factor, expected, tolerance)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A stacking run of four epochs and links, its checkpoint after each, and its base as it was."""
    folder, module = tmp_path_factory.mktemp("trained"), make()
    module.configure_model()
    base = {name: value for name, value in weights(module).items() if ".lora_" not in name}
    paths = [folder / f"{epoch}.ckpt" for epoch in range(4)]
    saving = LambdaCallback(on_train_epoch_end=lambda run, _: run.save_checkpoint(paths[run.current_epoch]))
    fit(folder, module, saving, enable_checkpointing=False)
    return SimpleNamespace(module=module, base=base, paths=paths)


@settings(max_examples=30)
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([0, 1e-6, 1e-3, 1.0]), st.floats(0.1, 10))
def test_in_half_precision_a_link_is_rounded_once_however_small_it_is(dtype, size, scaling):
    """A size of 1e-6 is subnormal in fp16."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 6, generator=generator), size * torch.randn(5, 2, generator=generator)
    stack = Stack(6, 5, dtype, "cpu")
    stack.push(A, B, scaling)
    ours, theirs = stack.factors[1].double() @ stack.factors[0].double(), scaling * B.double() @ A.double()
    assert stack.factors[0].isfinite().all()
    assert (ours - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()


def test_a_chain_goes_back_and_on_without_its_base_being_made_anew(trained, tmp_path):
    made, x = [], torch.randn(5, 8)

    class Counted(ValidatedToy):
        def build_model(self):
            made.append(1)
            return super().build_model()

    module, run = make(Counted), trainer(tmp_path, chain={})
    for epoch in (3, 0, 2, 1):
        run.validate(module, batches(2), ckpt_path=trained.paths[epoch], verbose=False)
        assert (module.n_finished, len(made)) == (epoch, 1)
        assert torch.equal(module.model(x), ValidatedToy.load_from_checkpoint(trained.paths[epoch]).model(x))


def test_no_weight_is_written_and_merged_models_are_those_of_a_run_that_merges_to_the_bit(trained, tmp_path):
    assert_bit_equal({name: value for name, value in weights(trained.module).items() if name in trained.base}, trained.base)
    checkpoint = torch.load(trained.paths[-1], weights_only=True)
    assert all(".lora_" in name for name in checkpoint["state_dict"] if not name.startswith("chain."))
    assert not list(trained.module.buffers())  # which DDP would send at each step
    trained.module.chain.save(tmp_path / "chain")
    merging, stacking = (make(finished_links=mode, init_chain=str(tmp_path / "chain")) for mode in MODES)
    for links in range(5):
        ours, theirs = stacking.merged_model(links), merging.merged_model(links)
        assert type(ours[0]) is nn.Linear
        assert_bit_equal(ours.state_dict(), theirs.state_dict())
    assert (stacking.n_finished, stacking.adapted.layers["0"].stack.rank) == (3, 6)  # as it was


def test_the_other_mode_takes_a_checkpoint_up_and_goes_on(trained, tmp_path):
    merging = fit(tmp_path, make(finished_links="merge"), ckpt_path=trained.paths[1])
    assert merging.adapted.layers["0"].stack is None
    assert_close_chains(merging.chain, trained.module.chain, 1e-5)


def test_a_checkpoint_is_evaluated_in_the_precision_of_its_run(tmp_path):
    losses, run, targets = [], trainer(tmp_path, chain={}), ["0"]
    for precision in ("32-true", "bf16-true"):
        module = fit(tmp_path / precision, make(target_modules=targets), LastCheckpoint(), precision=precision)
        (trained,) = module.trainer.validate(module, batches(2), verbose=False)
        module = make(target_modules=targets)
        (loaded,) = run.validate(module, batches(2), ckpt_path=last(tmp_path / precision), verbose=False)
        assert loaded["val_loss"] == pytest.approx(trained["val_loss"], rel=2**-8)
        losses.append(loaded["val_loss"])
    assert losses[0] != losses[1]
    for mode in MODES:
        with pytest.raises(UserError, match=r"^trainer\.precision, model\.finished_links"):
            fit(tmp_path, make(target_modules=targets, finished_links=mode), ckpt_path=last(tmp_path / "bf16-true"))


def test_fully_trained_parameters_in_half_precision_are_told_of(tmp_path, caplog):
    module = toy(modules_to_save=["2"], target_modules=["0"])
    trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(module, batches())
    assert caplog.text.count("fully trained parameters are in half precision") == 1
