"""Boosting: a link's training rows are drawn in proportion to the error of the model before it."""

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import ConcatDataset, DataLoader

from cola_lightning import (
    COLACausalLM,
    COLASequenceClassifier,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
    UserError,
)
from cola_lightning.callbacks.boosting import check_boosting
from cola_lightning.data.digits import DigitsDataModule
from cola_lightning.data.sampling import EpochSampler, draw
from cola_lightning.errors import NonFiniteError
from cola_lightning.examples.domain_shift import COLAByteGPT, PythonSourceDataModule
from cola_lightning.modules.digits import COLADigits
from tests import forked, tiny
from tests.test_resume import ARGUMENTS, STOPS, Data, Normed, Recorder, Stopped, assert_same_state, fit, last
from tests.toy import assert_bit_equal, toy, trainer, weights


class Scored(Normed):
    """The toy, with the loss of each row."""

    def row_losses(self, batch):
        x, y = batch
        return (self.model(x) - y).square().mean(1)


def scored(**arguments):
    return toy(Scored, **{**ARGUMENTS, "optimizer": lambda p: AdamW(p, lr=1e-2)} | arguments)


DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"
BOOSTED = {"every_n_epochs": 1, "boosting": True}


# ---------------------------------------------------------------------- which rows are drawn


def test_rows_are_drawn_as_often_as_their_share_rounded():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(1000, generator=generator) ** 4
    weights[:100] = 0
    counts = torch.bincount(draw(weights, generator), minlength=1000)
    expected = 1000 * weights.double() / weights.double().sum()
    assert counts.sum() == 1000
    assert not counts[:100].any()
    assert (counts - expected).abs().max() < 1
    assert counts.max() > 2
    means = sum(torch.bincount(draw(weights, generator), minlength=1000) for _ in range(400)) / 400
    assert (means - expected).abs().max() < 0.12  # 4 standard deviations of a rounded one's mean are at most 0.1


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_weights_give_each_row_once(value):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 7, 1003):
        assert draw(torch.full((n,), value), generator).tolist() == list(range(n))


def test_the_order_of_drawn_rows_follows_from_seed_and_epoch_and_is_shared_by_processes():
    weights = torch.tensor([1.0, 5.0, 0.0, 2.0, 1.0])

    def sampler(**arguments):
        return EpochSampler(range(5), 3, weights=lambda is_new: weights, **arguments)

    first = list(sampler())
    assert first == list(sampler()) != sorted(first)
    assert list(sampler(rows_done=lambda: 2)) == first[2:]
    parts = [list(sampler(n_processes=2, rank=rank)) for rank in range(2)]
    assert [row for pair in zip(*parts, strict=True) for row in pair] == [*first, first[0]]
    assert [list(EpochSampler(range(2), 0, n_processes=5, rank=rank)) for rank in range(5)] == [[1], [0], [1], [0], [1]]


# ---------------------------------------------------------------------- the loss of each row


@pytest.mark.parametrize("kind", ["digits", "bytes", "labels", "options", "option tokens", "answer", "text"])
def test_the_losses_of_rows_are_those_of_batches_of_one(tmp_path, kind):
    rows = [
        {"town": "very " * (k % 4) + "old", "label": k % 2, "said": ["yes it is", "no"][k % 2], "text": "so " * k}
        for k in range(12)
    ]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, options = str(tmp_path), {"batch_size": 4}
    if kind == "digits":
        module, data = COLADigits(target_modules="all-linear", rank=1, seed=0), DigitsDataModule(batch_size=64)
    elif kind == "bytes":
        module = COLAByteGPT(1, 8, 2, 16, pretrain_steps=0, target_modules=["qkv"], rank=1, seed=0)
        data = PythonSourceDataModule(context=16, eval_size=8, train_size=12)
    elif kind == "labels":
        model = tiny.folder(tmp_path / "model", "llama", "AutoModelForSequenceClassification")
        module = COLASequenceClassifier(model, target_modules=["q_proj"], rank=1, seed=0)
        data = TextClassificationDataModule(folder, text_fields="town", label_field="label", **options)
    else:
        module = COLACausalLM(tiny.folder(tmp_path / "model", "llama"), target_modules=["q_proj"], rank=1, seed=0)
        options |= {} if kind == "text" else {"prompt": "Is a {town} town old?"}
        if kind == "text":
            data = TextDataModule(folder, **options)
        elif kind == "answer":
            data = TemplateDataModule(folder, answer="said", **options)
        else:
            loss = "options" if kind == "options" else "answer"
            data = TemplateDataModule(folder, options=[" Yes", " Not at all"], loss=loss, **options)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, chain={}, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    module.eval()
    chosen = [data.train[k] for k in range(6)]

    def loss(batch):
        if hasattr(module, "step"):
            return module.step(batch).loss
        if kind == "digits":
            return F.cross_entropy(module.model(batch[0]), batch[1])
        windows = batch.long()
        return F.cross_entropy(module.model(windows[:, :-1])[0], windows[0, 1:])

    with torch.no_grad():
        alone = torch.stack([loss(data.collate([row])) for row in chosen])
        together = module.row_losses(data.collate(chosen))
    torch.testing.assert_close(together, alone, rtol=2e-5, atol=1e-6)
    assert together.unique().numel() > 1
    batches = pickle.loads(pickle.dumps(run.train_dataloader.dataset))  # as a worker gets it that is not forked
    with torch.no_grad():
        torch.testing.assert_close(module.row_losses(batches.collate(chosen)), together, rtol=0, atol=0)


# ---------------------------------------------------------------------- in a run


def counts_of(recorder, epoch):
    """How often each row came in an epoch: by its input."""
    rows = [row for (of, _), batch in recorder.rows.items() if of == epoch for row in rows_in(batch)]
    return Counter(rows)


def rows_in(batch):
    return [batch[start : start + 32] for start in range(0, len(batch), 32)]  # eight floats each


def assert_drawn_by(model, counts):
    """The rows of an epoch are those of the model's errors on them."""
    (data := Data(batch_size=4)).setup("fit")
    x, y = data.train.tensors
    with torch.no_grad():
        errors = 1 - torch.exp(-(model.eval()(x) - y).square().mean(1).double())
    for row, expected in zip(x, 32 * errors / errors.sum(), strict=True):
        assert abs(counts[row.numpy().tobytes()] - expected) < 1.001


def test_each_link_sees_rows_by_the_error_of_the_model_before_it(tmp_path):
    module, recorder, _ = fit(tmp_path, module=scored(optimizer=lambda p: AdamW(p, lr=0.1)), chain=BOOSTED)
    counts = [counts_of(recorder, epoch) for epoch in range(3)]
    for epoch in range(3):
        assert counts[epoch].total() == 32
        before = module.merged_model(links=epoch)
        assert_drawn_by(before, counts[epoch])
    assert counts[0] != counts[1] != counts[2]
    assert all(len(of_epoch) < 32 for of_epoch in counts)  # some rows are left out, others come twice


def test_a_link_keeps_its_rows_and_one_that_begins_inside_an_epoch_has_its_own_from_the_next(tmp_path):
    options = {"max_epochs": 4, "accumulate_grad_batches": 1, "chain": {"at_steps": [12], "boosting": True}}
    found = []

    class Watched(Scored):
        def row_losses(self, batch):
            found.append(self.trainer.global_step)
            return super().row_losses(batch)

    module, recorder, _ = fit(tmp_path, module=toy(Watched, **ARGUMENTS), **options)
    assert Counter(found) == {0: 8, 16: 8}  # batches
    base = module.merged_model(links=0)
    for epoch in (0, 1):
        assert_drawn_by(base, counts_of(recorder, epoch))


@pytest.mark.parametrize(
    "chain", [BOOSTED, {"at_steps": [4], "boosting": True}, {"patience": 1, "min_delta": 100, "boosting": True}]
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_boosted_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, chain, accumulated):
    options = {"chain": chain, "accumulate_grad_batches": accumulated}
    arguments = {"lr_schedule": "constant"}  # as a link's length may not be known
    whole, expected, _ = fit(tmp_path / "whole", module=scored(**arguments), **options)
    assert len(whole.chain.links) >= 1
    for stop in STOPS[::6]:
        folder = tmp_path / f"{stop}"
        fit(folder, stop, module=scored(**arguments), **options)
        module, after, _ = fit(folder / "resumed", ckpt_path=last(folder), module=scored(**arguments), **options)
        assert_bit_equal(weights(module), weights(whole))
        assert after.rows.items() <= expected.rows.items(), stop
        assert_same_state(last(folder / "resumed"), last(tmp_path / "whole"))


def test_scoring_rows_changes_neither_modes_nor_random_numbers(tmp_path):
    seen = []

    class Watched(Scored):
        def training_step(self, batch, batch_idx):
            seen.append((self.training, self.model[1].training, torch.get_rng_state().sum().item()))
            return super().training_step(batch, batch_idx)

        def on_train_start(self):
            self.model[1].eval()

    seeds = []
    for chain in (BOOSTED, {"every_n_epochs": 1}):
        seen.clear()
        torch.manual_seed(7)
        fit(tmp_path / str(len(seeds)), module=toy(Watched, **ARGUMENTS), chain=chain, max_epochs=1, limit_val_batches=0)
        seeds.append(list(seen))
    assert seeds[0] == seeds[1]
    assert {(mode, of_norm) for mode, of_norm, _ in seen} == {(True, False)}


def test_random_numbers_in_the_scores_of_rows_are_those_of_an_uninterrupted_run(tmp_path):
    class Noisy(Scored):
        """Of a denoising loss."""

        def row_losses(self, batch):
            x, y = batch
            return super().row_losses((x + torch.randn_like(x), y))

    def module():
        return toy(Noisy, **ARGUMENTS, optimizer=lambda p: AdamW(p, lr=1e-2))

    whole, expected, _ = fit(tmp_path / "whole", module=module(), chain=BOOSTED)
    _, before, _ = fit(tmp_path, ("epoch_end", 0), module=module(), chain=BOOSTED)
    torch.manual_seed(5)
    resumed, after, _ = fit(tmp_path / "on", ckpt_path=last(tmp_path), module=module(), chain=BOOSTED)
    assert before.rows | after.rows == expected.rows
    assert_bit_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("stop", [None, ("batch_end", 5)])
@pytest.mark.parametrize("chain", [{}, None])
def test_a_data_module_draws_all_rows_alike_again_under_a_trainer_without_boosting(tmp_path, chain, stop):
    data, recorder = Data(batch_size=4), Recorder()
    fit(tmp_path / "boosted", stop, module=scored(), chain=BOOSTED, data=data)
    plain = trainer(tmp_path / "plain", recorder, chain=chain, max_epochs=2, limit_val_batches=0)
    plain.fit(scored(lr_schedule="constant"), datamodule=data)
    assert set(counts_of(recorder, 1).values()) == {1}


def test_rows_are_scored_as_lightning_prepares_batches(tmp_path):
    class Scaled(Data):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 10, batch[1]]

    seen = []

    class Watched(Scored):
        def row_losses(self, batch):
            seen.append(batch[0].std().item())
            return super().row_losses(batch)

    fit(tmp_path, module=toy(Watched, **ARGUMENTS), chain=BOOSTED, data=Scaled(batch_size=4), max_epochs=1)
    assert min(seen) > 5


def test_rows_of_another_number_are_measured_anew_in_a_run_that_goes_on_at_an_epochs_end(tmp_path):
    chain, module = {"at_epochs": [4], "boosting": True}, scored()
    fit(tmp_path, module=module, chain=chain, max_epochs=1)

    class More(Data):
        def setup(self, stage):
            super().setup(stage)
            self.train = ConcatDataset([self.train, self.val])

    _, recorder, _ = fit(tmp_path / "more", ckpt_path=last(tmp_path), module=scored(), chain=chain, data=More(batch_size=4))
    assert counts_of(recorder, 1).total() == 44


def test_a_link_without_the_beginning_of_an_epoch_is_said_to_have_no_rows_of_its_own(tmp_path, caplog):
    options = {"max_epochs": 2, "accumulate_grad_batches": 1, "chain": {"at_steps": [2, 5], "boosting": True}}
    fit(tmp_path, module=scored(), **options)
    (found,) = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and "boost" in record.name + record.msg
    ]
    assert found.startswith("chain.boosting: link 1 ends before an epoch begins in it")
    caplog.clear()
    fit(tmp_path / "last", module=scored(), **options | {"max_epochs": 1, "chain": {"at_steps": [2], "boosting": True}})
    assert "chain.boosting: link 1 ends before an epoch begins in it" in caplog.text  # with the run
    caplog.clear()
    fit(tmp_path / "epochs", module=scored(), chain=BOOSTED)
    assert "ends before an epoch" not in caplog.text


def test_a_failure_while_rows_are_scored_leaves_the_modes_as_they_were(tmp_path):
    class Failing(Scored):
        def row_losses(self, batch):
            raise Stopped

    module = toy(Failing, **ARGUMENTS)
    with pytest.raises(AssertionError):  # of fit, which expects no stop
        fit(tmp_path, module=module, chain=BOOSTED)
    assert all(part.training for part in module.modules())


def test_the_command_line_boosts(tmp_path):
    words = ["--config", DIGITS, "--trainer.max_epochs", "2", "--chain.every_n_epochs", "1", "--chain.boosting", "true"]
    done = forked.run("-m", "cola_lightning", "fit", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "link 1: mean error of the model before it on" in done.stdout


# ---------------------------------------------------------------------- refused


def test_what_cannot_be_boosted_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"chain\.boosting: expected a module with row_losses\(batch\).* received Normed"):
        fit(tmp_path, module=toy(Normed, **ARGUMENTS), chain=BOOSTED)
    (data := Data(batch_size=4)).setup("fit")
    run = trainer(tmp_path, chain=BOOSTED, max_epochs=1)
    message = "chain.boosting: expected a data module that is an EpochDataModule, received loaders alone"
    with pytest.raises(UserError, match=message):
        run.fit(scored(), DataLoader(data.train, batch_size=4), DataLoader(data.val, batch_size=4))
    message = r"chain.boosting: expected one process, or trainer.strategy ddp, received a strategy that shards the model"
    run.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(UserError, match=message):
        check_boosting(run, scored())


def test_a_run_resumed_inside_an_epoch_is_boosted_as_it_was(tmp_path):
    plain = {"every_n_epochs": 1}
    for before, after in [(BOOSTED, plain), (plain, BOOSTED)]:
        expected, received = "boosting" in before, "boosting" in after
        folder = tmp_path / str(expected)
        fit(folder, ("batch_end", 10), module=scored(), chain=before)
        message = f"chain.boosting: expected {expected}, for the checkpoint was written inside an epoch, received {received}"
        with pytest.raises(UserError, match=message):
            fit(folder / "resumed", ckpt_path=last(folder), module=scored(), chain=after)


def test_a_checkpoint_that_is_written_after_the_fit_says_how_its_rows_were_drawn(tmp_path):
    options = {"chain": BOOSTED, "max_epochs": -1, "limit_val_batches": 0, "accumulate_grad_batches": 1}
    _, expected, _ = fit(tmp_path / "whole", module=scored(), max_steps=12, **options)
    _, before, run = fit(tmp_path, module=scored(), max_steps=5, **options)
    run.save_checkpoint(tmp_path / "own.ckpt")
    _, after, _ = fit(tmp_path / "on", ckpt_path=tmp_path / "own.ckpt", module=scored(), max_steps=12, **options)
    assert before.rows | after.rows == expected.rows


def test_a_plain_fit_on_the_data_of_a_boosted_one_that_failed_says_that_its_rows_were_drawn_alike(tmp_path):
    options = {"accumulate_grad_batches": 1, "limit_val_batches": 0, "max_epochs": 1}
    data = Data(batch_size=4)
    fit(tmp_path / "boosted", ("batch_end", 2), module=scored(), chain=BOOSTED, data=data, **options)
    run = trainer(tmp_path / "plain", max_steps=5, limit_val_batches=0)  # without a ChainOfLoRA
    run.fit(scored(lr_schedule="constant"), datamodule=data)
    run.save_checkpoint(tmp_path / "own.ckpt")
    chain, module = {"at_epochs": [9]}, scored(lr_schedule="constant")
    _, recorder, _ = fit(tmp_path / "on", ckpt_path=tmp_path / "own.ckpt", module=module, chain=chain, **options)
    assert len(recorder.rows) == 3


def test_a_module_must_give_a_loss_a_row(tmp_path):
    class Mean(Scored):
        def row_losses(self, batch):
            return super().row_losses(batch).mean()

    with pytest.raises(UserError, match="row_losses: expected 32 losses, one for each training row, received 8"):
        fit(tmp_path, module=toy(Mean, **ARGUMENTS), chain=BOOSTED)


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_another_loader_than_the_data_modules_own_is_refused(tmp_path):
    class Own(Data):
        def train_dataloader(self):
            return DataLoader(self.train, batch_size=4)

    message = (
        "chain.boosting: expected the data module's own loader of training rows, which draws them by their weights, received"
    )
    for options in ({"data": Own(batch_size=4)}, {"overfit_batches": 2}):
        with pytest.raises(UserError, match=message):
            fit(tmp_path, module=scored(), chain=BOOSTED, **options)


def test_a_row_whose_loss_is_not_finite_stops_the_run(tmp_path):
    class Broken(Scored):
        def row_losses(self, batch):
            return super().row_losses(batch).log().mul(0).log()

    with pytest.raises(NonFiniteError, match="the loss of training row 0 is not finite"):
        fit(tmp_path, module=toy(Broken, **ARGUMENTS), chain=BOOSTED)
