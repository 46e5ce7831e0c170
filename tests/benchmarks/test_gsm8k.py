"""The study on a real language model, with a tiny one in its place: what it keeps of a run, right answers, its intervals."""

import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from benchmarks.gsm8k import study
from benchmarks.gsm8k.study import Stage, difference_of, is_right
from cola_lightning.study import study as studies
from cola_lightning.study.run import run
from tests.helpers import tiny

CONFIG = Path(study.__file__).with_name("config.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The study's folder, with its config for a tiny model and a few rows; runs are executed in this process."""
    here = tmp_path / "gsm8k"
    here.mkdir()
    config = yaml.safe_load(CONFIG.read_text())
    model = tiny.folder(here / "model", max_position_embeddings=512)
    tiny.chat_tokenizer(tiny.CHAT).save_pretrained(model)
    rows = [{"question": f"The cat has {k} mats. How many?", "answer": f"It has {k} mats.\n#### {k}"} for k in range(9)]
    config["model"]["init_args"] |= {"model_name": model, "gguf_file": None}
    sizes = {"max_length": 96, "val_size": 2, "test_size": 3, "max_new_tokens": 4}
    config["data"]["init_args"] |= {"source": tiny.write_rows(here / "rows", rows, ("train", "test")), **sizes}
    (here / "config.yaml").write_text(yaml.safe_dump(config))

    def execute(claim, requested):
        (claim.parent / "run.json").write_text(json.dumps(requested))
        return run(str(claim.parent)) == 0

    monkeypatch.setattr(study, "HERE", here)
    monkeypatch.setattr(study, "CONFIG", here / "config.yaml")
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "ANSWERED", 2)
    monkeypatch.setattr(studies, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["cola"])
    return here


def test_a_study_keeps_losses_by_row_and_right_answers_and_repeats_no_run_that_has_a_line(here, monkeypatch):
    stage = Stage("gsm8k", 1, 4, {"lora": [1e-3], "cola-4": [1e-3]})
    study.measure_base("gsm8k")
    study.run(stage.words)
    study.collect_losses(stage)
    study.answer(stage)
    losses = {tuple(line["run"]): line["rows"] for line in tiny.read_rows(stage.folder / "rows.jsonl")}
    assert len(stage.results) == len(losses) == 2
    for line in stage.results:
        rows = losses[line.key]
        total = sum(size for _, size in rows)
        assert len(rows) == 3
        assert sum(loss * size for loss, size in rows) / total == pytest.approx(line.test, rel=1e-5)
    assert [line["rows"] for line in tiny.read_rows(stage.folder / "answers.jsonl")] == [2, 2]

    kept = {path.name: path.read_text() for path in stage.folder.glob("*.jsonl")}
    for folder in (stage.folder / "runs", here / "runs"):  # as in a clone, which has the lines alone
        shutil.rmtree(folder)
    monkeypatch.setattr(studies, "execute", lambda *_: pytest.fail("run again"))
    study.measure_base("gsm8k")
    study.run(stage.words)
    study.collect_losses(stage)
    study.answer(stage)
    assert not (here / "runs").exists()
    assert {path.name: path.read_text() for path in stage.folder.glob("*.jsonl")} == kept

    head, *rows = study.table()
    assert "seeds" not in head  # there is one
    base, lora, chain = (dict(zip(head, row, strict=True)) for row in rows)
    assert base["method"] == "before training"
    of_lora, of_chain = (row["test loss"].split("; ") for row in (lora, chain))
    assert float(base["test loss"]) != float(of_lora[0])
    assert [lora["method"], lora["rate"], lora["to LoRA"]] == ["LoRA", "0.001", ""]
    difference = float(of_chain[0]) - float(of_lora[0])
    assert float(chain["to LoRA"].split()[0]) == pytest.approx(difference, abs=1.5e-4)
    assert of_lora[1].endswith("/2 right")
    assert [one.folder for one in study.studies()] == [stage.folder]
    study.draw(here / "differences.png")
    assert (here / "differences.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("2 + 2 = 4\n#### 4", True),
        ("#### 1,004", False),
        ("#### 4.", True),
        ("#### 4\n\n#### 5", True),
        ("The answer is 4", False),
        ("#### 44", False),
        ("#### -4", False),
    ],
)
def test_an_answer_is_right_if_it_states_the_number(prediction, expected):
    assert is_right(prediction, "2 * 2 = <<2*2=4>>4\n#### 4", prompt="2 * 2?") is expected
    assert is_right("#### 1004", "#### 1,004")


def test_over_rows_of_one_length_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [1.0, 1.4, 0.7, 2.0], [1.1, 1.3, 0.9, 2.4]
    rows = [[(loss, 5) for loss in losses] for losses in (ours, theirs)]
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    assert difference_of(rows[:1], rows[1:]) == pytest.approx((mean, interval.low, interval.high))


def test_rows_weigh_as_many_tokens_as_they_have_and_the_interval_is_over_rows_and_seeds():
    theirs = [(1.0, 10), (2.0, 30)]
    ours = [[(1.2, 10), (2.0, 30)], [(1.0, 10), (1.6, 30)]]
    mean, low, high = difference_of(ours, [theirs, theirs])
    assert mean == pytest.approx((0.1 * 10 - 0.2 * 30) / 40)
    of_rows = math.sqrt(2 * ((0.25 * (0.1 - mean)) ** 2 + (0.75 * (-0.2 - mean)) ** 2))
    of_seeds = statistics.stdev([0.05, -0.3]) / math.sqrt(2)
    freedom = (of_rows**2 + of_seeds**2) ** 2 / (of_rows**4 + of_seeds**4)
    assert (high - low) / 2 == pytest.approx(math.hypot(of_rows, of_seeds) * stats.t.ppf(0.975, freedom))
    assert difference_of([theirs], [theirs]) == (0, 0, 0)
