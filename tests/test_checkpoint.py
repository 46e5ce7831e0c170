"""What a checkpoint holds, and that a run that resumes or replays is the run itself, to the bit."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim import AdamW

from cola_lightning import Chain, ChainOfLoRA, EpochDataModule, LastCheckpoint, UserError, lora_layers
from cola_lightning.errors import DiskError, NonFiniteError
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights

CHAIN = {"every_n_train_steps": 8, "ranks": [4, 2, 6, 3]}


def make(cls=Toy, **arguments):
    return toy(cls, rank=6, dropout=0.2, lr_schedule="cosine", optimizer=lambda p: AdamW(p, lr=1e-2), **arguments)


class SaveEachStep(Callback):
    """Writes ``step=N.ckpt`` after each batch, when ModelCheckpoint would, and nothing about itself."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt", weights_only=False)


def run(path, module, ckpt_path=None, chain=CHAIN, loader=None, **arguments):
    fit = trainer(path, SaveEachStep(path / "resumed" if ckpt_path else path), chain=chain, **{"max_epochs": 3} | arguments)
    val = batches(2) if isinstance(module, ValidatedToy) else None
    fit.fit(module, batches() if loader is None else loader, val, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("step", [10, 20])
def test_a_resumed_run_is_the_run_itself(tmp_path, step, precision):
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    loader = batches(dtype=dtype)

    whole = run(tmp_path, make(), loader=loader, precision=precision)
    resumed = run(tmp_path, make(), tmp_path / f"step={step}.ckpt", loader=loader, precision=precision)
    assert_bit_equal(weights(resumed), weights(whole))
    assert resumed.chain.is_beginning_of(whole.chain)
    assert resumed.link == whole.link == 3


def test_a_checkpoint_is_the_chain_and_not_the_model(tmp_path):
    run(tmp_path, make(modules_to_save=[]))
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    assert sorted(checkpoint["state_dict"]) == ["cola"] + [f"model.{n}.lora_{f}" for n in (0, 2) for f in "AB"]
    chain = Chain.from_state_dict(checkpoint["state_dict"]["cola"]["chain"])
    assert [(link.rank, link.start_step, link.end_step) for link in chain.links] == [(4, 0, 8), (2, 8, 16)]
    live = checkpoint["state_dict"]["cola"]["live"]
    assert (live["rank"], live["alpha"], list(live["metrics"])) == (6, 4.0, ["train_loss"])


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback", "ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_averages_the_weights_of_its_link_resumes_as_any_other(tmp_path):
    class Described(LightningDataModule):
        prompt_format = {"kind": "response", "chat_template": True}  # noqa: RUF012
        identity = {"source": "here"}  # noqa: RUF012

        def train_dataloader(self):
            return batches()

    def averaged(path, module, **arguments):
        callbacks = EMAWeightAveraging(decay=0.5), SaveEachStep(path)
        trainer(path, *callbacks, max_epochs=3).fit(module, datamodule=Described(), **arguments)
        return module

    whole = averaged(tmp_path, make())
    resumed = averaged(tmp_path / "resumed", make(), ckpt_path=tmp_path / "step=10.ckpt")
    assert_bit_equal(weights(resumed), weights(whole))
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]["cola"]  # of the run and not of the copy
    assert (state["prompt_format"], state["data"]) == (Described.prompt_format, Described.identity)
    assert (state["position"], state["live"]["end_step"]) == ([0, 5], 5)


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_checkpoint_holds_values_that_are_not_finite(tmp_path, weights_only):
    class Poisoning(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 10:
                module.model[0].lora_B.detach().fill_(torch.nan)
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt", weights_only=weights_only)

    with pytest.raises(NonFiniteError, match=r"'model\.0\.lora_B' is no longer finite, in link 1"):
        trainer(tmp_path, Poisoning(), chain=CHAIN, max_epochs=3).fit(make(), batches())
    assert (tmp_path / "9.ckpt").exists()
    assert not (tmp_path / "10.ckpt").exists()


def test_the_last_checkpoint_stays_where_its_folder_is_spelled_with_a_dot(tmp_path, monkeypatch):
    class There(Callback):
        def on_train_batch_start(self, *_):
            seen.append(Path("checkpoints/last.ckpt").exists())

    seen = []
    monkeypatch.chdir(tmp_path)
    options = {"max_epochs": 2, "enable_checkpointing": True, "val_check_interval": 3}
    trainer(".", There(), LastCheckpoint(every_n_train_steps=2), **options).fit(toy(ValidatedToy), batches(), batches(1))
    assert all(seen[seen.index(True) :])


def test_a_module_goes_back_and_forth_between_checkpoints_of_its_run(tmp_path):
    module = run(tmp_path, make(ValidatedToy))
    expected, loaded = weights(module), [ValidatedToy.load_from_checkpoint(tmp_path / f"step={n}.ckpt") for n in (10, 30)]
    assert_bit_equal(weights(loaded[1]), expected)
    assert {(layer.rank, layer.scaling) for layer in lora_layers(loaded[1].model).values()} == {(3, 4 / 3)}
    for step, other in ((10, weights(loaded[0])), (30, expected), (30, expected)):
        trainer(tmp_path).validate(module, batches(2), ckpt_path=tmp_path / f"step={step}.ckpt", verbose=False)
        assert_bit_equal(weights(module), other)


def test_a_subclass_or_a_mixin_that_forgets_super_keeps_the_chain(tmp_path):
    class Own(Callback):
        used = False

        def on_train_start(self, *_):
            type(self).used = True

    class Notes:
        def on_save_checkpoint(self, checkpoint):
            checkpoint["notes"] = 1

        def on_load_checkpoint(self, checkpoint):
            self.notes = checkpoint["notes"]

    class Forgetful(Notes, ValidatedToy):
        def on_train_start(self):
            pass

        def configure_callbacks(self):
            return Own()

    for cls in (Forgetful, type("Further", (Forgetful,), {})):
        module = run(tmp_path, make(cls))
        assert Own.used
        arguments = {"target_modules": "all-linear", "rank": 6, "alpha": 4, "seed": 0}  # for a class that is not importable
        again, loaded = cls.load_from_checkpoint(tmp_path / "step=30.ckpt", **arguments), make(cls)
        trainer(tmp_path).validate(loaded, batches(2), ckpt_path=tmp_path / "step=30.ckpt", verbose=False)
        for other in (again, loaded):
            assert other.notes == 1
            assert_bit_equal(weights(other), weights(module))
        module.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        written = torch.load(tmp_path / "weights.ckpt", weights_only=True)
        assert written["notes"] == 1
        assert "cola" in written["state_dict"]


def test_another_base_another_dtype_or_no_chain_is_refused(tmp_path):
    run(tmp_path, make())
    path = tmp_path / "step=20.ckpt"
    with pytest.raises(UserError, match=r"expected the one on which the chain was trained, .* received another"):
        run(tmp_path, make(seed=1), ckpt_path=path)

    class Double(Toy):
        def build_model(self):
            return super().build_model().double()

    with pytest.raises(UserError, match=r"in float64 and not in float32"):
        run(tmp_path, make(Double), ckpt_path=path)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.0\.lora_A"):
        toy(rank=2).load_from_checkpoint(path, target_modules="all-linear", rank=2, alpha=4, seed=0)
    with pytest.raises(UserError, match=r"model\.target_modules: expected the chain's layers, received others, without '0'"):
        toy().load_from_checkpoint(path, target_modules=["2"], rank=6, seed=0)
    with pytest.raises(UserError, match="expected a chain with knots"):
        run(tmp_path, make(), ckpt_path=path, chain={})
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["cola"]
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="which holds no chain"):
        run(tmp_path, make(), ckpt_path=tmp_path / "plain.ckpt")


def test_a_saved_base_is_not_made_again(tmp_path):
    class Costly(Toy):
        made = 0

        def build_model(self):
            if not self.is_base_in_checkpoint:
                type(self).made += 1
                torch.manual_seed(self.made)  # as if it could not be made again
                return super().build_model()
            return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))

    whole = run(tmp_path, make(Costly, save_base=True))
    path = tmp_path / "step=20.ckpt"
    optimizer = {"optimizer": lambda parameters: AdamW(parameters, lr=1e-2)}
    loaded = Costly.load_from_checkpoint(path, **optimizer)
    assert Costly.made == 1
    resumed = run(tmp_path, loaded, ckpt_path=path)
    assert Costly.made == 1
    assert_bit_equal(weights(resumed), weights(whole))
    base = dict(whole.merged_model(links=0).named_parameters())
    assert_bit_equal(dict(resumed.merged_model(links=0).named_parameters()), base)
    assert_bit_equal(weights(run(tmp_path, make(Costly), ckpt_path=path)), weights(whole))
    assert Costly.made == 2  # without being told, it is made, and then replaced by what the checkpoint holds


def test_modules_trained_whole_and_buffers_come_along(tmp_path):
    class WithHead(Toy):
        def build_model(self):
            return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))

    arguments = {"target_modules": ["0"], "modules_to_save": ["3"], "rank": 6, "seed": 0}
    whole = run(tmp_path, toy(WithHead, **arguments))
    loaded = WithHead.load_from_checkpoint(tmp_path / "step=30.ckpt", **arguments, alpha=4)
    assert_bit_equal(weights(loaded), weights(whole))
    buffers = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert set(whole.chain.links[0].extras) == {"3.weight", "3.bias"} | buffers - {"1.weight", "1.bias"}
    x = next(iter(batches()))[0]
    for links in range(5):
        merged = whole.merged_model(links).eval()
        assert not lora_layers(merged)
        if links == 4:
            torch.testing.assert_close(merged(x), whole.eval().model(x))
    heads = [whole.merged_model(links)[3].weight for links in range(5)]
    assert len({head.detach().numpy().tobytes() for head in heads}) == 5
    with pytest.raises(UserError, match=r"links: expected 0 to [34], .* received 5"):
        whole.merged_model(5)


def test_full_fine_tuning_is_checkpointed_whole(tmp_path):
    whole = run(tmp_path, toy(target_modules=None), chain={})
    loaded = Toy.load_from_checkpoint(tmp_path / "step=30.ckpt", target_modules=None, seed=0)
    assert_bit_equal(weights(loaded), weights(whole))
    assert not torch.equal(whole.merged_model(0)[0].weight, whole.model[0].weight)
    with pytest.raises(UserError, match="received null"):
        whole.tie_knot()


def test_checkpoints_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    class Own(TorchCheckpointIO):
        pass

    fit = trainer(tmp_path, ChainOfLoRA(), plugins=[Own()], max_epochs=1)
    fit.fit(toy(), batches())
    assert type(fit.strategy.checkpoint_io) is Own  # a user's own stays
    fit = trainer(tmp_path, chain={}, max_epochs=1)
    fit.fit(toy(), batches())
    path = tmp_path / "a" / "x.ckpt"
    fit.save_checkpoint(path)
    before = path.read_bytes()

    def fail(checkpoint, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DiskError, match="disk full"):
        fit.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("target_modules", ["all-linear", None])
def test_a_saved_base_is_whole(tmp_path, target_modules):
    class Trained(Toy):
        def build_model(self):
            model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 6))
            if not self.is_base_in_checkpoint:
                model.train()(torch.randn(32, 8))  # moves the buffers
            return model

    module = toy(Trained, target_modules=target_modules, save_base=True)
    module.configure_model()
    x = next(iter(batches()))[0]
    base = module.merged_model().eval()(x)
    run(tmp_path, module, chain={"every_n_epochs": 1} if target_modules else {})
    assert not torch.equal(module.model[1].running_mean, module.merged_model(0)[1].running_mean)
    assert torch.equal(module.merged_model(0).eval()(x), base)
    loaded = Trained.load_from_checkpoint(tmp_path / "step=30.ckpt", target_modules=target_modules, rank=2, alpha=4, seed=0)
    assert torch.equal(loaded.merged_model(0).eval()(x), base)
    if target_modules is None:
        with pytest.raises(UserError, match=r"model\.target_modules: .* received others, with '0'"):
            run(tmp_path, toy(Trained), ckpt_path=tmp_path / "step=30.ckpt", chain={})


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_a_merged_model_is_of_one_dtype(tmp_path, precision, dtype):
    data = torch.float64 if precision == "64-true" else torch.bfloat16
    module = run(
        tmp_path, toy(target_modules=["0"]), loader=batches(dtype=data), precision=precision, chain={"every_n_epochs": 1}
    )
    x = next(iter(batches(dtype=dtype)))[0]
    for links in range(4):
        merged = module.merged_model(links)
        assert {p.dtype for p in merged.parameters()} == {dtype}
        assert merged(x).dtype == dtype
    tolerance = 1e-12 if precision == "64-true" else 2e-2
    torch.testing.assert_close(merged(x), module.model(x.to(data)).to(dtype), rtol=tolerance, atol=tolerance)


def test_what_is_trained_outside_of_the_model_resumes_to_the_bit_in_double_precision(tmp_path):
    def fit(epochs, path=None):
        torch.manual_seed(0)
        module, double = toy(Outside, lr_schedule="constant"), trainer(tmp_path, max_epochs=epochs, precision="64-true")
        double.fit(module, batches(dtype=torch.float64), ckpt_path=path)
        return module, double

    fit(1)[1].save_checkpoint(tmp_path / "one.ckpt")
    resumed, (whole, double) = fit(2, tmp_path / "one.ckpt")[0], fit(2)
    assert weights(resumed)["outside.weight"].dtype == torch.float64
    assert_bit_equal(weights(resumed), weights(whole))
    double.save_checkpoint(tmp_path / "two.ckpt")
    assert_bit_equal(weights(Outside.load_from_checkpoint(tmp_path / "two.ckpt")), weights(whole))


class Outside(Toy):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.outside = nn.Linear(6, 6)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.outside(self.model(x)), y)


def test_a_saved_base_of_another_shape_and_other_choices_on_resume_are_refused(tmp_path):
    run(tmp_path, make(save_base=True))
    path = tmp_path / "step=20.ckpt"

    class Wider(Toy):
        def build_model(self):
            return nn.Sequential(nn.Linear(8, 14), nn.Tanh(), nn.Linear(14, 6))

    with pytest.raises(UserError, match=r"with '0\.bias' of shape \(12,\), received \(14,\)"):
        run(tmp_path, make(Wider), ckpt_path=path)
    with pytest.raises(UserError, match=r"target_modules: expected the chain's layers, received others, without '0'"):
        run(tmp_path, make(target_modules=["2"]), ckpt_path=path)
    with pytest.raises(UserError, match=r"model\.seed, or seed_everything: expected 0, the checkpoint's, received 7"):
        run(tmp_path, make(seed=7), ckpt_path=path)


def test_a_run_that_resumes_with_shorter_epochs_ends_its_schedule_with_them(tmp_path):
    first = run(tmp_path, toy(), chain={"every_n_epochs": 1}, max_epochs=2)
    first.trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    rates = []

    class Rates(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    resumed = toy(Rates, optimizer=lambda p: AdamW(p, lr=1.0))
    run(tmp_path, resumed, ckpt_path=tmp_path / "end.ckpt", chain={"every_n_epochs": 1}, max_epochs=4, loader=batches(5))
    assert rates == pytest.approx([1 - step % 5 / 5 for step in range(10)])


def test_a_loaded_module_may_be_trained_on_in_another_way(tmp_path):
    run(tmp_path, make())
    arguments = {"target_modules": "all-linear", "rank": 6, "alpha": 4, "seed": 0}
    loaded = Toy.load_from_checkpoint(
        tmp_path / "step=20.ckpt", **arguments, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), lr_schedule="constant"
    )
    assert type(loaded.configure_optimizers()["optimizer"]) is torch.optim.SGD  # as a loop of one's own calls it
    trainer(tmp_path, chain={}, max_epochs=1).fit(loaded, batches())
    assert loaded.link == 2
    assert loaded.live_link().end_step == 10


class Steps(EpochDataModule):
    """Ten batches, whose order resumes."""

    def __init__(self):
        super().__init__(batch_size=4)

    def setup(self, stage):
        self.train = self.val = batches().dataset


class Evaluated(ValidatedToy):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("is_loaded", [False, True])
def test_an_evaluation_by_another_trainer_leaves_the_links_steps(tmp_path, is_loaded):
    module = toy(Evaluated)
    run = trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=1)
    run.fit(module, batches(), batches(1))
    run.save_checkpoint(tmp_path / "run.ckpt")
    if is_loaded:
        module = Evaluated.load_from_checkpoint(tmp_path / "run.ckpt")
        assert module.live_link().end_step == 10
    trainer(tmp_path).test(module, batches(1), verbose=False)
    steps = [(link.start_step, link.end_step) for link in module.full_chain().links]
    assert steps == [(0, 4), (4, 8), (8, 10)]
    module.full_chain().save(tmp_path / "chain")
    assert [link.end_step for link in Chain.load(tmp_path / "chain").links] == [4, 8, 10]
    module.tie_knot()
    toy(Evaluated).load_state_dict(module.state_dict())


@pytest.mark.parametrize("is_by_another", [False, True])
def test_a_checkpoint_that_is_written_after_a_test_resumes_inside_the_epoch(tmp_path, is_by_another):
    def run(steps):
        return trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=2, max_steps=steps, limit_val_batches=0)

    whole, module = toy(Evaluated, lr_schedule="constant"), toy(Evaluated, lr_schedule="constant")
    run(-1).fit(whole, datamodule=Steps())
    stopped = run(5)
    stopped.fit(module, datamodule=Steps())
    (trainer(tmp_path) if is_by_another else stopped).test(module, batches(1), verbose=False)
    stopped.save_checkpoint(tmp_path / "run.ckpt")
    resumed = toy(Evaluated, lr_schedule="constant")
    run(-1).fit(resumed, datamodule=Steps(), ckpt_path=tmp_path / "run.ckpt")
    assert_bit_equal(weights(resumed), weights(whole))
