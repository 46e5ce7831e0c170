"""Scores of real rows of the tasks with options on a real model, SmolLM2."""

import os
from pathlib import Path

import pytest
import torch

from cola_lightning import COLACausalLM
from cola_lightning.data.examples import collate_options, encode_examples
from cola_lightning.data.splits import load_splits
from cola_lightning.data.tasks import TASKS
from tests.helpers import tiny

pytestmark = [tiny.needs_smollm2, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm2():
    module = COLACausalLM(**tiny.SMOLLM2, target_modules=["q_proj", "v_proj"], seed=0)
    return tiny.with_live_link(module).eval()


@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
@pytest.mark.parametrize("task", ["SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "COPA", "ReCoRD"])
@torch.no_grad()
def test_scores_are_those_of_one_option_at_a_time(smollm2, task):
    rows = load_splits(str(Path(os.environ["COLA_DATA_DIR"], task.lower())))["validation"]()[:20]
    examples = [TASKS[task].example(row) for row in rows]
    encoded = encode_examples(smollm2.tokenizer, examples, 512)
    for start in range(0, 20, 8):
        batch = collate_options(encoded[start : start + 8], smollm2.tokenizer.pad_token_id)
        for mine, example in zip(smollm2.option_scores(batch), examples[start:], strict=False):
            expected = tiny.plain_scores(smollm2, example, 512).tolist()
            assert mine[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
            assert int(mine.argmax()) == max(range(len(expected)), key=expected.__getitem__)
