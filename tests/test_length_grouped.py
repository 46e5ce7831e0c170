"""Training batches of rows of like length: the same rows, in an order that the seed gives, with less padding."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cola_lightning import (
    ChainOfLoRA,
    COLACausalLM,
    PromptDataModule,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
)
from cola_lightning.data.base import EpochSampler
from tests import tiny
from tests.toy import assert_bit_equal, trainer

LENGTHS = torch.randint(1, 300, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def sampler(**arguments):
    return EpochSampler(LENGTHS, 3, **{"lengths": LENGTHS, "batch_size": 8} | arguments)


def padding(batches):
    """The share of padding in batches of these lengths."""
    filled, room = sum(map(sum, batches)), sum(len(batch) * max(batch) for batch in batches)
    return 1 - filled / room


def test_every_row_comes_once_and_the_order_follows_from_seed_and_epoch():
    first = list(sampler())
    assert sorted(first) == list(range(1003))
    assert list(sampler()) == first
    again = sampler()
    again.set_epoch(1)
    assert list(again) != first
    assert list(sampler(rows_done=lambda: 16)) == first[16:]
    batches = [first[start : start + 8] for start in range(0, 1003, 8)]
    longest = [max(LENGTHS[row] for row in batch) for batch in batches]
    assert longest != sorted(longest, reverse=True)  # batches come by chance
    lengths = [[LENGTHS[row] for row in batch] for batch in batches]
    by_chance = list(EpochSampler(LENGTHS, 3))
    assert padding(lengths) < 0.1 < padding([[LENGTHS[row] for row in by_chance[k : k + 8]] for k in range(0, 1003, 8)])


def test_two_processes_share_batches_of_like_length():
    parts = [list(sampler(n_processes=2, rank=rank)) for rank in range(2)]
    alone = list(sampler())
    assert [row for pair in zip(*parts, strict=True) for row in pair] == [*alone, alone[0]]


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_run_resumed_inside_an_epoch_is_the_run_itself(tmp_path):
    model = tiny.folder(tmp_path / "model", "llama")
    rows = [{"town": " ".join(["long"] * (k % 7)), "label": k % 2} for k in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, ckpt_path=None):
        module = COLACausalLM(model, target_modules=["q_proj"], rank=2, seed=0, dropout=0.1)
        data = TemplateDataModule(
            str(tmp_path), prompt="Is a {town} town old?", options=[" Yes", " No"], batch_size=4, length_grouped=True
        )
        saver = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False)
        options = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        made = trainer(tmp_path, saver, ChainOfLoRA(every_n_train_steps=8), **options)
        made.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return {name: value for name, value in module.state_dict().items() if name != "cola"}

    whole = run("whole")
    assert_bit_equal(run("resumed", str(tmp_path / "whole" / "step=13.ckpt")), whole)


def test_it_is_the_default_but_for_the_papers_tasks():
    assert TextDataModule("rows").length_grouped
    assert TextClassificationDataModule("rows").length_grouped
    assert TemplateDataModule("rows", prompt="{a}", answer="b").length_grouped
    assert not PromptDataModule("RTE", "rows").length_grouped
