"""What a checkpoint holds, and which module it makes again."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW

from cola_lightning import ChainOfLoRA, UserError
from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.errors import DiskError, NonFiniteError
from tests.helpers.resuming import Data
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, batches, toy, trainer, weights

CHAIN = {"every_n_train_steps": 8, "ranks": [4, 2, 6, 3]}


def make(cls=Toy, **arguments):
    return toy(cls, rank=6, dropout=0.2, lr_schedule="cosine", optimizer=lambda p: AdamW(p, lr=1e-2), **arguments)


class SaveSteps(Callback):
    """Writes ``step=N.ckpt`` after every tenth batch, when ModelCheckpoint would, and nothing about itself."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % 10 == 0:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt", weights_only=False)


def run(path, module, ckpt_path=None, chain=CHAIN, **arguments):
    fit = trainer(path, SaveSteps(path / "resumed" if ckpt_path else path), chain=chain, **{"max_epochs": 3} | arguments)
    val = batches(2) if isinstance(module, ValidatedToy) else None
    fit.fit(module, batches(), val, ckpt_path=ckpt_path)
    return module


def test_a_checkpoint_is_the_chain_and_not_the_model(tmp_path):
    whole = run(tmp_path, make())
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    factors = [f"{part}.{n}.lora_{f}" for part in ("chain.0", "chain.1", "model") for n in (0, 2) for f in "AB"]
    assert sorted(checkpoint["state_dict"]) == sorted([*factors, "chain.metadata"])
    state = StoredState.of(checkpoint["state_dict"])
    assert [(link.rank, link.start_step, link.end_step) for link in state.chain.links] == [(4, 0, 8), (2, 8, 16)]
    live = state.live
    assert (live.rank, live.alpha, list(live.metrics)) == (6, 4.0, ["train_loss"])
    resumed = run(tmp_path, make(), tmp_path / "step=20.ckpt")
    assert_bit_equal(weights(resumed), weights(whole))
    assert resumed.chain.is_beginning_of(whole.chain)
    assert resumed.n_finished == whole.n_finished == 3


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_checkpoint_holds_values_that_are_not_finite(tmp_path, weights_only):
    class Poisoning(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 10:
                module.model[0].lora_B.detach().fill_(torch.nan)
            trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)

    with pytest.raises(NonFiniteError, match=r"model\.0\.lora_B.* in link 1"):
        trainer(tmp_path, Poisoning(), chain=CHAIN, max_epochs=3).fit(make(), batches())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 9


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    own = type("Own", (TorchCheckpointIO,), {})()
    fit = trainer(tmp_path, ChainOfLoRA(), plugins=[own], max_epochs=1)
    fit.fit(toy(), batches())
    assert fit.strategy.checkpoint_io is own  # a user's own stays
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


# ---------------------------------------------------------------------- modules that are made again


def test_a_subclass_or_a_mixin_that_forgets_super_keeps_the_chain(tmp_path):
    class Notes:
        def on_save_checkpoint(self, checkpoint):
            checkpoint["notes"] = 1

        def on_load_checkpoint(self, checkpoint):
            self.notes = checkpoint["notes"]

    class Forgetful(Notes, ValidatedToy):
        def on_train_start(self):
            pass

        def configure_callbacks(self):
            return Callback()

    module, loaded = run(tmp_path, make(Forgetful)), make(Forgetful)
    trainer(tmp_path).validate(loaded, batches(2), ckpt_path=tmp_path / "step=30.ckpt", verbose=False)
    for other in (Forgetful.load_from_checkpoint(tmp_path / "step=30.ckpt", rank=6), loaded):
        assert other.notes == 1
        assert_bit_equal(weights(other), weights(module))
    resumed = run(tmp_path, make(Forgetful), tmp_path / "step=20.ckpt")
    assert_bit_equal(weights(resumed), weights(module))
    module.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    written = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert (written["notes"], "chain.metadata" in written["state_dict"]) == (1, True)


def test_another_base_is_refused_and_so_are_other_layers_and_no_chain(tmp_path):
    run(tmp_path, make(), max_epochs=1, chain={"every_n_train_steps": 4})
    path = tmp_path / "step=10.ckpt"
    for other, field in (({"target_modules": ["2"]}, r"model\.target_modules"), ({"seed": 7}, "base")):
        with pytest.raises(UserError, match=rf"^{field}\b.*: "):
            run(tmp_path, make(**other), ckpt_path=path)
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.0\.lora_A"):
        Toy.load_from_checkpoint(path, rank=8)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["chain.metadata"]
    torch.save(checkpoint, tmp_path / "plain.ckpt")
    with pytest.raises(UserError, match="contains no chain"):
        run(tmp_path, make(), ckpt_path=tmp_path / "plain.ckpt")


class Evaluated(ValidatedToy):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))


def test_a_test_between_leaves_the_links_steps_and_a_checkpoint_after_it_resumes_inside_the_epoch(tmp_path):
    def run(steps):
        return trainer(tmp_path, chain={"every_n_train_steps": 4}, max_epochs=2, max_steps=steps, limit_val_batches=0)

    whole, module, resumed = (toy(Evaluated, lr_schedule="constant") for _ in range(3))
    run(-1).fit(whole, datamodule=Data(batch_size=4))
    stopped = run(5)
    stopped.fit(module, datamodule=Data(batch_size=4))
    stopped.test(module, batches(1), verbose=False)
    stopped.save_checkpoint(tmp_path / "run.ckpt")
    for one in (module, Evaluated.load_from_checkpoint(tmp_path / "run.ckpt")):
        trainer(tmp_path).test(one, batches(1), verbose=False)
        assert [(link.start_step, link.end_step) for link in one.full_chain().links] == [(0, 4), (4, 5)]
    run(-1).fit(resumed, datamodule=Data(batch_size=4), ckpt_path=tmp_path / "run.ckpt")
    assert_bit_equal(weights(resumed), weights(whole))


# ---------------------------------------------------------------------- what is trained outside of self.model


class Headed(Toy):
    """The toy with a head of its own, which has a buffer that moves and a parameter that is frozen."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        torch.manual_seed(4)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.head[1].bias.requires_grad_(False)
        self.heads = []  # as it was when each epoch began

    def on_train_epoch_start(self):
        self.heads.append({name: value.clone() for name, value in self.head.state_dict().items()})

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.head(self.model(x)), y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """After 4 links: the module, and its head as it was before each of them and at the end."""
    folder, module = tmp_path_factory.mktemp("trained"), toy(Headed)
    run = trainer(folder, chain={"every_n_epochs": 1}, max_epochs=4)
    run.fit(module, batches())
    run.save_checkpoint(folder / "run.ckpt")
    module.full_chain().save(folder / "chain")
    return SimpleNamespace(module=module, heads=[*module.heads, module.head.state_dict()], folder=folder)


@pytest.mark.parametrize("links", range(5))
def test_each_link_records_it_and_a_checkpoint_and_an_earlier_state_give_it_as_it_was(trained, links):
    module, head = trained.module, trained.heads[links]
    if links:
        recorded = {f"self.head.{name}": value for name, value in head.items() if name != "1.bias"}  # which is frozen
        assert_bit_equal(module.full_chain()[links - 1].extras, recorded)
    loaded = Headed.load_from_checkpoint(trained.folder / "run.ckpt", links=links, rank=2, alpha=4)
    assert_bit_equal(loaded.head.state_dict(), head)
    x = next(iter(batches()))[0]
    torch.testing.assert_close(loaded.model(x), module.merged_model(links)(x))
    with module.at(links):
        assert_bit_equal(module.head.state_dict(), head)


@pytest.mark.parametrize(("source", "links"), [("run.ckpt", 4), ("chain", 1)])
def test_another_run_begins_with_it(trained, source, links):
    second = toy(Headed, init_chain=str(trained.folder / source), init_links=links)
    second.configure_model()
    assert_bit_equal(second.head.state_dict(), trained.heads[links])
    with pytest.raises(UserError, match=r"^model\.init_chain: .* 'self\.head\.0\."):
        toy(init_chain=str(trained.folder / source)).configure_model()


def test_a_merged_copy_and_an_export_say_that_they_have_it_not(trained, tmp_path, caplog):
    names = ["self.head.0.weight", "self.head.0.bias", "self.head.1.weight"]
    for format_ in ("merged", "peft"):
        messages = trained.module.export(tmp_path / format_, format_)[-1]
        assert messages.partition("self.model: ")[2].split(", ") == names
    trained.module.merged_model()
    assert all(name in caplog.text for name in names)
