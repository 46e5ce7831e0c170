"""Parameters that a module trains outside of ``self.model`` are part of each link, as those in it are."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cola_lightning import UserError
from tests.helpers.toy import Toy, assert_bit_equal, batches, toy, trainer


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


ARGUMENTS = {"rank": 2, "alpha": 4}
BUFFERS = ["head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"]
NAMES = ["head.0.weight", "head.0.bias", *BUFFERS, "head.1.weight"]


def fit(folder, module, epochs, ckpt_path=None):
    run = trainer(folder, chain={"every_n_epochs": 1}, max_epochs=epochs)
    run.fit(module, batches(), ckpt_path=ckpt_path)
    run.save_checkpoint(folder / "run.ckpt")
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """After 4 links: the module, and its head as it was before each of them and at the end."""
    folder = tmp_path_factory.mktemp("trained")
    module = fit(folder, toy(Headed), epochs=4)
    module.full_chain().save(folder / "chain")
    return SimpleNamespace(module=module, heads=[*module.heads, module.head.state_dict()], folder=folder)


def test_each_link_records_it(trained):
    for link, head in zip(trained.module.full_chain().links, trained.heads[1:], strict=True):
        assert_bit_equal(link.extras, {f"self.{name}": head[name.removeprefix("head.")] for name in NAMES})


@pytest.mark.parametrize("links", [0, 1, 3, 4, None])
def test_a_checkpoint_gives_it_as_it_was_after_any_link(trained, links):
    loaded = Headed.load_from_checkpoint(trained.folder / "run.ckpt", links=links, **ARGUMENTS)
    assert_bit_equal(loaded.head.state_dict(), trained.heads[4 if links is None else links])
    x = next(iter(batches()))[0]
    torch.testing.assert_close(loaded.model(x), trained.module.merged_model(links)(x))


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
