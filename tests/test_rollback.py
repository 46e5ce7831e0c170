"""A chain goes back, goes on, and starts from another one: in one process as in a fresh one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import AdamW

from cola_lightning import COLAModule, UserError, lora_layers
from tests.toy import Toy, ValidatedToy, assert_bit_equal, batches, trainer, weights

ARGUMENTS = {"target_modules": "all-linear", "rank": 3, "alpha": 4, "seed": 0}


def make(cls=ValidatedToy, **arguments):
    return cls(**ARGUMENTS | arguments, optimizer=lambda p: AdamW(p, lr=1e-2))


def fit(folder, module, *callbacks, epochs=4, **options):
    run = trainer(folder, *callbacks, chain={"every_n_epochs": 1}, max_epochs=epochs, **options)
    run.fit(module, batches(), batches(2))
    return run


def test_back_to_the_best_and_on_in_one_process_equals_fresh_ones(tmp_path):
    class Best(ValidatedToy):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", abs(self.current_epoch - 1.0))  # the best is in link 1

    module = make(Best)
    run = fit(tmp_path, module, ModelCheckpoint(tmp_path, "best", monitor="val_loss"), enable_checkpointing=True)
    assert module.link == 3
    run.validate(module, batches(2), ckpt_path="best", verbose=False)
    fresh = make(Best)
    fresh_run = trainer(tmp_path, ModelCheckpoint(tmp_path, "best", monitor="val_loss"), chain={}, enable_checkpointing=True)
    fresh_run.validate(fresh, batches(2), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert module.link == fresh.link == 1
    assert_bit_equal(weights(module), weights(fresh))

    fit(tmp_path / "again", module, epochs=3)
    loaded = Best.load_from_checkpoint(tmp_path / "best.ckpt", optimizer=lambda p: AdamW(p, lr=1e-2))
    fit(tmp_path / "again", loaded, epochs=3)
    assert module.link == loaded.link == 3
    assert_bit_equal(weights(module), weights(loaded))
    assert [link.start_step for link in module.chain.links] == [0, 0, 10]


@pytest.mark.parametrize("how", ["second fit", "init_chain", "by hand"])
def test_a_chain_that_goes_on_has_the_knots_and_rates_of_a_run_of_its_own(tmp_path, how):
    rates, knots = [], []

    class Watched(ValidatedToy):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            knots.append(self.link)

    first = make(Watched)
    fit(tmp_path, first, epochs=2)
    if how == "by hand":
        first.tie_knot(rank=2)
    if how == "init_chain":
        first.full_chain().save(tmp_path / "chain")
        second = make(Watched, init_chain=str(tmp_path / "chain"))
    else:
        second = first
    rates.clear(), knots.clear()
    fit(tmp_path / "more", second, epochs=2)
    base = 1 if how == "second fit" else 2
    assert knots == [base] * 10 + [base + 1] * 10
    assert rates == pytest.approx([1e-2 * (1 - step % 10 / 10) for step in range(20)])
    steps = [(link.start_step, link.end_step) for link in second.chain.links[base:]]
    assert steps == [(0, 10)]
    moved = lora_layers(second.model)["0"].weight - make(Toy).merged_model(0)[0].weight
    torch.testing.assert_close(moved, second.chain.delta("0"))


def test_init_chain_merges_what_the_chain_holds(tmp_path):
    first = make(Toy)
    trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=3).fit(first, batches())
    path = tmp_path / "run.ckpt"
    first.trainer.save_checkpoint(path)
    x = next(iter(batches()))[0]
    for links, expected in ((None, 3), (3, 3), (1, 1), (0, 0)):
        module = make(Toy, init_chain=str(path), init_links=links)
        module.configure_model()
        assert len(module.chain) == expected
        torch.testing.assert_close(module.model(x), first.merged_model(expected)(x))
        assert torch.equal(module.merged_model(0)[0].weight, first.merged_model(0)[0].weight)
    with pytest.raises(UserError, match="links: expected 0 to 3, the length of the chain, received 4"):
        make(init_chain=str(path), init_links=4).configure_model()


def test_a_run_from_a_chain_is_checkpointed_and_needs_the_chain_no_more(tmp_path):
    first = make()
    fit(tmp_path, first, epochs=2)
    first.chain.save(tmp_path / "chain")
    second = make(init_chain=str(tmp_path / "chain"))
    run = fit(tmp_path / "more", second, epochs=2)
    path = tmp_path / "more.ckpt"
    run.save_checkpoint(path)
    (tmp_path / "chain").rename(tmp_path / "elsewhere")
    loaded = COLAModule.load_from_checkpoint(path)
    assert loaded.init_chain is None
    assert_bit_equal(weights(loaded), weights(second))


@pytest.mark.parametrize("links", [0, 1, 2, 3, 4])
def test_a_checkpoint_is_loaded_with_any_number_of_its_links(tmp_path, links):
    class WithHead(Toy):
        def build_model(self):
            return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 6))

    module = make(WithHead, target_modules=["0"], modules_to_save=["3"])
    run = trainer(tmp_path, chain={"every_n_epochs": 1}, max_epochs=4)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = WithHead.load_from_checkpoint(tmp_path / "run.ckpt", links=links)
    expected, merged = (m.eval() for m in (module.merged_model(links), loaded.merged_model()))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, msg=name)
    assert loaded.link == min(links, 3)
    if links < 4:
        assert all(not layer.lora_B.any() and layer.lora_A.any() for layer in lora_layers(loaded.model).values())
    with pytest.raises(UserError, match=r"links: expected 0 to [34], .* received 5"):
        WithHead.load_from_checkpoint(tmp_path / "run.ckpt", links=5)


def test_the_class_and_its_arguments_come_from_the_checkpoint(tmp_path):
    class Wide(Toy):
        def __init__(self, width, **chain):
            super().__init__(**chain)
            self.width = width

        def build_model(self):
            return nn.Sequential(nn.Linear(8, self.width), nn.Tanh(), nn.Linear(self.width, 6))

    for cls, arguments in ((Toy, {}), (Wide, {"width": 20})):
        module = make(cls, **arguments)
        run = trainer(tmp_path, max_epochs=1)
        run.fit(module, batches())
        run.save_checkpoint(tmp_path / "run.ckpt")
        loaded = (COLAModule if cls is Toy else cls).load_from_checkpoint(tmp_path / "run.ckpt")
        assert type(loaded) is cls
        assert_bit_equal(weights(loaded), weights(module))
    with pytest.raises(UserError, match="expected a class with a build_model"):
        COLAModule.load_from_checkpoint(tmp_path / "run.ckpt")  # Wide is inside a function: nobody can import it


def test_a_seed_that_was_drawn_is_the_checkpoints(tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    module = make(Toy, seed=None)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = COLAModule.load_from_checkpoint(tmp_path / "run.ckpt")
    assert loaded.seed == module.seed
    assert_bit_equal(weights(loaded), weights(module))


class Many(Toy):
    """Takes its arguments in every way that there is."""

    def __init__(self, first, /, *sizes, cls="x", shape=(8, 12), function=len, **chain):
        super().__init__(**chain)
        self.first, self.sizes, self.cls, self.shape, self.function = first, sizes, cls, shape, function
        shape_of_chain = chain["target_modules"]
        if isinstance(shape_of_chain, list):
            shape_of_chain.append("2")  # what a careless class may do


def test_a_recipe_holds_the_arguments_as_they_were_given():
    given = {"target_modules": ["0"], "rank": 2, "seed": 0}
    module = Many(1, 2, 3, cls="y", shape=(1, 2), function=max, optimizer=lambda p: None, **given)
    recipe = module.constructor_arguments
    assert recipe["class_path"] == f"{Many.__module__}.Many"
    assert recipe["init_args"] == {"cls": "y", "shape": (1, 2), "target_modules": ["0"], "rank": 2, "seed": 0}
    assert sorted(recipe["not_plain"]) == ["first", "function", "sizes"]


def test_what_is_not_plain_is_told_when_it_is_not_given(tmp_path, caplog):
    class Function(Toy):
        def __init__(self, function=len, **chain):
            super().__init__(**chain)
            self.function = function

    module = Function(max, **ARGUMENTS)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert Function.load_from_checkpoint(tmp_path / "run.ckpt").function is len
    assert "it has no 'function', which was not a plain value" in caplog.text
    caplog.clear()
    assert Function.load_from_checkpoint(tmp_path / "run.ckpt", function=max).function is max
    assert not caplog.text


def test_full_fine_tuning_is_one_link_to_go_back_from(tmp_path):
    module = make(Toy, target_modules=None)
    run = trainer(tmp_path, chain={}, max_epochs=1)
    run.fit(module, batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    for links in (0, 1):
        loaded = COLAModule.load_from_checkpoint(tmp_path / "run.ckpt", links=links)
        assert torch.equal(loaded.model[0].weight, module.merged_model(links)[0].weight)
    with pytest.raises(UserError, match=r"links: expected 0 to [01], .* received 2"):
        COLAModule.load_from_checkpoint(tmp_path / "run.ckpt", links=2)
