"""The loss of an optimizer step is the mean over all of its tokens, however they are spread over batches and processes."""

import pytest
import torch
import transformers
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, SequentialSampler

from cola_lightning import COLACausalLM
from cola_lightning.data.batch import collate_language
from cola_lightning.data.examples import Example, collate_options, encode_examples
from tests.helpers import tiny
from tests.helpers.tiny import LENGTHS, batches_of, rows_of
from tests.helpers.toy import assert_near, trainer


class Noted(COLACausalLM):
    """Notes the gradients of each step before they are clipped."""

    def on_before_optimizer_step(self, optimizer):
        found = {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}
        self.gradients = [*getattr(self, "gradients", []), found]


class Losses(Callback):
    """Notes the logged loss of each step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.losses) < trainer.global_step:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


def fit(path, batches, window=1, *, arguments=None, **options):
    given = {"target_modules": "all-linear", "rank": 4, "seed": 0} | (arguments or {})
    module, noted = Noted(tiny.folder(path / "model"), **given), Losses()
    options = {"max_epochs": 1, "accumulate_grad_batches": window, "limit_val_batches": 0} | options
    trainer(path, noted, **options).fit(module, DataLoader(batches, batch_size=None), [1])
    return module, noted.losses


def assert_same_step(module, losses, whole, expected, relative):
    assert losses == pytest.approx(expected, rel=relative)
    ((mine,), (theirs,)) = module.gradients, whole.gradients
    for name, gradient in theirs.items():
        assert_near(mine[name], gradient, relative) if gradient.any() else None  # A's is 0, since B is


def test_a_window_of_unequal_batches_is_one_batch_of_all_its_rows(tmp_path):
    rows = rows_of(LENGTHS)
    whole = fit(tmp_path, batches_of(rows, 8))
    for sizes in [(1, 4, 2, 1), (5, 3)]:  # the second is the rest of an epoch, shorter than the window
        assert_same_step(*fit(tmp_path, batches_of(rows, *sizes), 4), *whole, 1e-6)
    _, alike = fit(tmp_path, batches_of(rows, 1, 7), 2, arguments={"loss_average": "batch"})
    assert alike != pytest.approx(whole[1], rel=1e-3)


def test_rows_of_options_weigh_alike(tmp_path):
    tokenizer = tiny.tokenizer()
    made = [Example(f"The town {k}", (" is old", " long", "!"), k % 3) for k in range(4)]
    encoded = encode_examples(tokenizer, made, 64)
    batches = [collate_options(encoded[a:b], 0) for a, b in ((0, 1), (1, 4), (0, 4))]
    assert_same_step(*fit(tmp_path, batches[:2], 2), *fit(tmp_path, batches[2:]), 1e-5)


class Ordered(transformers.Trainer):
    """Transformers' own, with the rows in their order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def test_a_run_is_that_of_transformers_trainer(tmp_path):
    """Eight steps of full fine-tuning with accumulation, of which clipping changes some: the same losses and weights."""
    rows = rows_of([LENGTHS[k % 8] + k % 3 for k in range(64)])
    arguments = {"target_modules": None, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    module, losses = fit(tmp_path, batches_of(rows, 2), 4, arguments=arguments, gradient_clip_val=1.3)
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=0.1, optim="sgd",
        max_grad_norm=1.3, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        max_steps=8, use_cpu=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = Ordered(model, settings, lambda some: collate_language(some, 0), rows)
    theirs.train()
    assert losses == pytest.approx([line["loss"] for line in theirs.state.log_history if "loss" in line], abs=1e-5)
    assert len(losses) == 8
    for name, value in model.named_parameters():
        torch.testing.assert_close(module.model.get_parameter(name), value, rtol=0, atol=1e-5)
