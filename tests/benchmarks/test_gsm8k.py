"""The study on a real language model, with a tiny one in its place: what it keeps of a run, and its intervals."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from benchmarks import gsm8k, studies
from benchmarks.gsm8k import Setting, difference
from benchmarks.lines import Lines
from cola_lightning.study import study
from tests.helpers import tiny
from tests.helpers.comparing import known_config

pytestmark = pytest.mark.docs


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """The lines of a study with a tiny model and a few rows."""
    config = yaml.safe_load(Path(gsm8k.__file__).with_suffix(".yaml").read_text())
    model = tiny.folder(tmp_path / "model", max_position_embeddings=512)
    tiny.chat_tokenizer(tiny.CHAT).save_pretrained(model)
    rows = [{"question": f"The cat has {k} mats. How many?", "answer": f"It has {k} mats.\n#### {k}"} for k in range(9)]
    (tmp_path / "rows").mkdir()
    tiny.write_rows(tmp_path / "rows" / "gsm8k", rows, ("train", "test"))
    config["model"]["init_args"] |= {"model_name": model, "gguf_file": None}
    config["data"]["init_args"] |= {"max_length": 96, "val_size": 2, "test_size": 3}
    (tmp_path / "gsm8k.yaml").write_text(yaml.safe_dump(config))

    monkeypatch.setattr(studies, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(gsm8k, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(gsm8k, "CONFIG", str(tmp_path / "gsm8k.yaml"))
    monkeypatch.setattr(gsm8k, "TASKS", {"gsm8k": "GSM8K"})
    monkeypatch.setattr(gsm8k, "CALLS", [(Setting("gsm8k", 1, 4), {"lora": [1e-3], "cola-4": [1e-3]}, 1)])
    monkeypatch.setattr(study, "resolve", lambda words: known_config(*words))
    monkeypatch.setattr(sys, "argv", ["cola"])
    return Lines(tmp_path / "gsm8k.jsonl")


def test_a_study_keeps_losses_by_row_and_repeats_no_run_that_has_a_line(lines, monkeypatch):
    gsm8k.run(lines)
    base, *runs = lines.results
    assert base["study"] == "base"
    assert [line["method"] for line in runs] == ["lora", "cola-4"]
    for line in runs:
        total = sum(size for _, size in line["rows"])
        assert len(line["rows"]) == 3
        assert sum(loss * size for loss, size in line["rows"]) / total == pytest.approx(line["test"], rel=1e-5)

    shutil.rmtree(studies.FOLDER)  # as in a clone, which has the lines alone
    monkeypatch.setattr(study, "measured", lambda *_: pytest.fail("run again"))
    again = Lines(lines.path)
    gsm8k.run(again)
    assert again.results == json.loads(json.dumps(lines.results))


def test_rows_weigh_as_many_tokens_as_they_have_and_the_interval_is_over_rows_and_seeds():
    theirs = [(1.0, 10), (2.0, 30)]
    ours = [[(1.2, 10), (2.0, 30)], [(1.0, 10), (1.6, 30)]]
    mean, low, high = difference(ours, [theirs, theirs])
    assert mean == pytest.approx((0.1 * 10 - 0.2 * 30) / 40)
    of_rows = math.sqrt(2 * ((0.25 * (0.1 - mean)) ** 2 + (0.75 * (-0.2 - mean)) ** 2))
    of_seeds = statistics.stdev([0.05, -0.3]) / math.sqrt(2)
    freedom = (of_rows**2 + of_seeds**2) ** 2 / (of_rows**4 + of_seeds**4)
    assert (high - low) / 2 == pytest.approx(math.hypot(of_rows, of_seeds) * stats.t.ppf(0.975, freedom))
    assert difference([theirs], [theirs]) == (0, 0, 0)
