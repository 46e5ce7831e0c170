"""Two processes hold one chain."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cola_lightning import UserError, distributed
from tests.toy import Toy, batches

ROOT = Path(__file__).parent.parent


def test_two_processes_stay_equal_through_knots_and_predict_in_order(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ddp_run.py"), str(tmp_path)],
        capture_output=True, text=True, check=False, env=environment, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == "3"

    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(15))
    seed = int(ranks[0][2])
    alone = Toy.load_from_checkpoint(tmp_path / "ddp.ckpt", target_modules="all-linear", rank=3, alpha=4, seed=seed).eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(5, batch_size=3), strict=True))
    assert [row["target"] for row in rows] == pytest.approx(targets.sum(-1).tolist(), abs=1e-5)
    assert [row["prediction"] for row in rows] == pytest.approx(alone.model(inputs).sum(-1).tolist(), abs=1e-5)


def test_a_sharded_parameter_is_refused_by_everything_that_writes_or_reads_it():
    class Shard(nn.Parameter):
        pass

    shard = Shard(torch.zeros(2))
    for touch in (
        lambda: distributed.copy_(shard, torch.ones(2)),
        lambda: distributed.add_(shard, torch.ones(2)),
        lambda: distributed.gather(shard),
    ):
        with pytest.raises(UserError, match=r"trainer\.strategy: .* sharded parameter of type Shard"):
            touch()
    assert not shard.any()
