"""Scores of real rows of the tasks with options, on tiny models and on a real one, SmolLM2."""

import os
from pathlib import Path

import pytest
import torch

from cola_lightning import COLACausalLM
from cola_lightning.data.examples import collate_options, encode_examples
from cola_lightning.data.splits import load_splits
from cola_lightning.data.tasks import TASKS
from tests.helpers import tiny

pytestmark = pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="COLA_DATA_DIR is not set")
CHOICES = ["SST2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "COPA", "ReCoRD"]


@torch.no_grad()
def check_scores(module, task, n_rows, max_length=512):
    rows = load_splits(str(Path(os.environ["COLA_DATA_DIR"], task.lower())))["validation"]()[:n_rows]
    examples = [TASKS[task].example(row) for row in rows]
    encoded = encode_examples(module.tokenizer, examples, max_length)
    for start in range(0, n_rows, 8):
        batch = collate_options(encoded[start : start + 8], module.tokenizer.pad_token_id)
        for mine, example in zip(module.option_scores(batch), examples[start:], strict=False):
            expected = tiny.plain_scores(module, example, max_length).tolist()
            assert mine[: len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
            assert int(mine.argmax()) == max(range(len(expected)), key=expected.__getitem__)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With a beginning of sentence, which stays, and without."""
    folder, changes = tmp_path_factory.mktemp("models"), {"max_position_embeddings": 520}
    return {name: tiny.with_live_link(tiny.causal_lm(folder, name, changes=changes)).eval() for name in ("opt", "gpt2")}


@pytest.mark.parametrize(("architecture", "task"), [("opt", "SST2"), ("opt", "COPA"), ("opt", "ReCoRD"), ("gpt2", "MultiRC")])
def test_scores_on_tiny_models_are_those_of_one_option_at_a_time(models, architecture, task):
    check_scores(models[architecture], task, 2)


@pytest.fixture(scope="module")
def smollm2():
    module = COLACausalLM(**tiny.SMOLLM2, target_modules=["q_proj", "v_proj"], seed=0)
    return tiny.with_live_link(module).eval()


@tiny.needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("task", CHOICES)
def test_scores_on_smollm2_are_those_of_one_option_at_a_time(smollm2, task):
    check_scores(smollm2, task, 20)
