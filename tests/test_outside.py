"""Parameters that a module trains outside of ``self.model`` are part of each link, as those in it are."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cola_lightning import Chain, UserError
from tests.toy import Toy, assert_bit_equal, batches, toy, trainer


class Headed(Toy):
    """The toy with a head of its own, which has a buffer that moves and a parameter that is frozen."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        torch.manual_seed(4)
        self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.head[1].bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.head(self.model(x)), y)


ARGUMENTS = {"rank": 2, "alpha": 4}
NAMES = [
    "head.0.weight",
    "head.0.bias",
    "head.0.running_mean",
    "head.0.running_var",
    "head.0.num_batches_tracked",
    "head.1.weight",
]


@pytest.fixture
def trained(tmp_path):
    """After 4 links: the module, and its head as it was before each of them and at the end."""
    heads = []

    class Recorded(Headed):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                heads.append({name: value.clone() for name, value in self.head.state_dict().items()})

    module = toy(Recorded)
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=4)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    heads.append({name: value.clone() for name, value in module.head.state_dict().items()})
    return module, heads


def assert_same_head(module, head):
    for name, value in module.head.state_dict().items():
        assert torch.equal(value, head[name]), name


def test_each_link_records_it(trained):
    module, heads = trained
    for link, head in zip(module.full_chain().links, heads[1:], strict=True):
        assert sorted(link.extras) == sorted(f"self.{name}" for name in NAMES)
        for name in NAMES:
            assert torch.equal(link.extras[f"self.{name}"], head[name.removeprefix("head.")])


@pytest.mark.parametrize("links", [0, 1, 3, 4, None])
def test_a_checkpoint_gives_it_as_it_was_after_any_link(trained, tmp_path, links):
    module, heads = trained
    loaded = Headed.load_from_checkpoint(tmp_path / "run.ckpt", links=links, rank=2, alpha=4)
    assert_same_head(loaded, heads[4 if links is None else links])
    x = next(iter(batches()))[0]
    torch.testing.assert_close(loaded.model(x), module.merged_model(links)(x))


@pytest.mark.parametrize("links", [1, 4])
@pytest.mark.parametrize("source", ["run.ckpt", "chain"])
def test_another_run_begins_with_it(trained, tmp_path, source, links):
    module, heads = trained
    module.full_chain().save(tmp_path / "chain")
    second = toy(Headed, init_chain=str(tmp_path / source), init_links=links)
    second.configure_model()
    assert_same_head(second, heads[links])
    with pytest.raises(UserError, match=r"what is fully trained here .* received .self\.head\.0\."):
        toy(init_chain=str(tmp_path / source)).configure_model()


def test_a_merged_copy_and_an_export_say_that_they_have_it_not(trained, tmp_path, caplog):
    module, _ = trained
    for format_ in ("merged", "peft"):
        told = module.export(tmp_path / format_, format_)[-1]
        assert (
            told
            == "not in it, for it was trained outside of self.model: self.head.0.weight, self.head.0.bias, self.head.1.weight"
        )
    with caplog.at_level(logging.WARNING):
        module.merged_model()
    assert "merged_model: self.head.0.weight and self.head.0.bias" in caplog.text
    assert "trained outside of self.model, and not in the copy" in caplog.text


@pytest.mark.parametrize("place", ["build_model", "configure_model"])
def test_a_second_name_for_a_part_of_the_model_is_no_part_outside(tmp_path, place, caplog):
    class Aliased(Toy):
        def build_model(self):
            model = super().build_model()
            if place == "build_model":
                self.net, self.first = model, model[0]
            return model

        def configure_model(self):
            self.second = self.model[2]

    module = toy(Aliased)
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    module.chain.save(tmp_path / "chain")
    assert len(Chain.load(tmp_path / "chain")) == 2
    assert [link.extras for link in module.chain.links] == [{}, {}]
    x = next(iter(batches()))[0]
    for links in (None, 1):
        loaded = Aliased.load_from_checkpoint(tmp_path / "run.ckpt", links=links, **ARGUMENTS)
        torch.testing.assert_close(loaded.model(x), module.merged_model(links)(x))
    again = toy(Aliased)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.model(x), module.model(x))
    assert "trained outside" not in caplog.text
    assert "outside" not in " ".join(module.export(tmp_path / "merged"))
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=4).fit(again, batches(), ckpt_path=tmp_path / "run.ckpt")


class Constant(Toy):
    """The toy with a weight of its loss, and a projection that is frozen."""

    weight = 1.0
    seed_of_projection = 0

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.register_buffer("loss_weight", torch.tensor([self.weight]))
        torch.manual_seed(self.seed_of_projection)
        self.projection = nn.Linear(6, 6).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.projection(self.model(x)), y) * self.loss_weight.sum()


def test_a_constant_stays_this_runs_own(tmp_path, caplog):
    module = toy(Constant)
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    module.merged_model()
    assert "trained outside" not in caplog.text

    class Weighted(Constant):
        weight = 5.0

    second = toy(Weighted, init_chain=str(tmp_path / "run.ckpt"))
    second.configure_model()
    assert second.loss_weight == 5
    toy(init_chain=str(tmp_path / "run.ckpt")).configure_model()  # of a module that has no such weight

    class Other(Constant):
        seed_of_projection = 1

    for links in (0, 1, None):
        loaded = Other.load_from_checkpoint(tmp_path / "run.ckpt", links=links, **ARGUMENTS)
        assert torch.equal(loaded.projection.weight, module.projection.weight)


def test_a_head_without_a_size_yet_is_recorded_once_it_has_one(tmp_path):
    class Lazy(Headed):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.head = nn.LazyLinear(6)

        def setup(self, stage):
            self.head(torch.zeros(1, 6))

    module = toy(Lazy)
    module.configure_model()
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())
    assert list(module.chain.links[0].extras) == ["self.head.weight", "self.head.bias"]


def test_a_head_that_a_hook_makes_is_recorded_too(tmp_path):
    class Late(Toy):
        def setup(self, stage):
            self.head = nn.Linear(6, 6)

        training_step = Headed.training_step

    module = toy(Late)
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=2).fit(module, batches())
    assert list(module.chain.links[0].extras) == list(module.adapted.first_values) == ["self.head.weight", "self.head.bias"]


def as_version_3(checkpoint):
    """A checkpoint as the version before wrote it: the state beside the values, and what is outside of the model apart."""
    values = dict(checkpoint["state_dict"])
    state = values.pop("cola")
    live = {name: state["live"][name] for name in ("rank", "alpha", "metrics")}
    live |= {"extras": [], "outside": [name.removeprefix("self.") for name in state.pop("trained")]}
    first = {name.removeprefix("self."): value for name, value in state.pop("first_values").items()}
    chain = state["chain"]
    chain["tensors"] = {name.replace("extras.self.", "outside."): value for name, value in chain["tensors"].items()}
    chain["description"]["format_version"] = 3
    del state["position"]
    state["origin"] = state.pop("init_chain_source")
    progress = checkpoint["callbacks"].pop("RunChecks")["progress"]
    old = state | {"format_version": 3, "live": live, "outside": first, "progress": progress}
    return checkpoint | {"state_dict": values, "cola": old}


def test_a_checkpoint_of_the_version_before_resumes_to_the_bit(trained, tmp_path):
    _, heads = trained
    new, old = torch.load(tmp_path / "run.ckpt", weights_only=True), tmp_path / "old.ckpt"
    torch.save(as_version_3(new), old)
    ends = []
    for path in (tmp_path / "run.ckpt", old):
        module = toy(Headed)
        trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=6).fit(module, batches(), ckpt_path=path)
        ends.append({name: value for name, value in module.state_dict().items() if name != "cola"})
        assert_same_head(Headed.load_from_checkpoint(path, links=2, rank=2, alpha=4), heads[2])
    assert_bit_equal(*ends)
