"""The study on a real language model, with a tiny one in its place: its order, what it keeps of a run, its intervals."""

import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from benchmarks.gsm8k import study
from benchmarks.gsm8k.study import Stage, difference_over_rows, is_right
from cola_lightning.study import study as studies
from cola_lightning.study.config import resolved
from cola_lightning.study.results import Result, write
from cola_lightning.study.run import run
from tests import tiny

CONFIG = Path(study.__file__).with_name("config.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The studies' folder, empty."""
    monkeypatch.setattr(study, "HERE", tmp_path / "gsm8k")
    (tmp_path / "gsm8k").mkdir()
    return tmp_path / "gsm8k"


@pytest.fixture
def small(here, monkeypatch):
    """The study's config with a tiny model, on a few rows; runs are executed in this process."""
    config = yaml.safe_load(CONFIG.read_text())
    model = tiny.folder(here / "model", max_position_embeddings=512)
    tiny.chat_tokenizer(tiny.CHAT).save_pretrained(model)
    rows = [{"question": f"The cat has {k} mats. How many?", "answer": f"It has {k} mats.\n#### {k}"} for k in range(9)]
    config["model"]["init_args"] |= {"model_name": model, "gguf_file": None}
    sizes = {"max_length": 96, "val_size": 2, "test_size": 3, "max_new_tokens": 4}
    config["data"]["init_args"] |= {"source": tiny.write_rows(here / "rows", rows, ("train", "test")), **sizes}
    (here / "config.yaml").write_text(yaml.safe_dump(config))

    def execute(claim, asked):
        (claim.parent / "run.json").write_text(json.dumps(asked))
        return run(str(claim.parent)) == 0

    monkeypatch.setattr(study, "CONFIG", here / "config.yaml")
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "ANSWERED", 2)
    monkeypatch.setattr(studies, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["cola"])
    return here


def result(method="lora", rate=1e-3, seed=0, validation=1.0):
    facts = {"rank": 8, "links": 1, "steps": 150, "seconds": 1.0, "peak_memory": 9.0, "trainable_parameters": 5}
    return Result(method, seed, rate, validation=validation, test=validation, **facts)


# ---------------------------------------------------------------------- the order of the runs


def test_the_rates_of_a_call_come_from_the_lines_of_those_before(here):
    calls = study.stages()
    assert next(calls).rates == {"lora": [1e-3, 3e-3, 3e-4]}
    folder = here / "rank-8-steps-150"
    folder.mkdir()
    lines = [result(rate=1e-3, validation=1.2), result(rate=3e-3, validation=1.1), result(rate=3e-4, validation=1.3)]
    write(lines, folder / "results.jsonl")
    assert next(calls).rates["cola-4"] == [3e-3, 1.5e-3]
    write([*lines, result("cola-4", 3e-3, 0, 1.3), result("cola-4", 1.5e-3)], folder / "results.jsonl")
    assert next(calls).rates == {"lora": [3e-3], "cola-4": [1.5e-3]}


def test_a_calls_options_are_those_of_its_study(here):
    for rank in (8, 1):
        (here / f"rank-{rank}-steps-150").mkdir()
        write([result()], here / f"rank-{rank}-steps-150" / "results.jsonl")
    calls = {(call.folder.name, len(call.rates)): call for call in study.stages()}
    assert len({folder for folder, _ in calls}) == 11
    first, chains = fit_of(calls["rank-8-steps-150", 3]), fit_of(calls["rank-1-steps-1200", 2])
    assert (first["trainer"]["max_steps"], first["chain"]["at_steps"], first["model"]["init_args"]["rank"]) == (150, [38], 8)
    assert (chains["trainer"]["max_steps"], chains["model"]["init_args"]["alpha"]) == (1200, 2)
    without = [fit_of(calls[f"rank-8-steps-150-{variant}", 1]) for variant in ("no-clipping", "no-warm-up")]
    assert [one["trainer"]["gradient_clip_val"] for one in without] == [None, 1.0]
    assert [one["model"]["init_args"]["warmup_steps"] for one in without] == [0.03, 0]
    zig = fit_of(calls["zig-rank-1-steps-300", 3])["data"]["init_args"]
    assert (zig["columns"], Path(zig["source"]).name) == ({"text": "text"}, "zig")


def fit_of(call):
    """The config of a call's runs."""
    return resolved(["--config", str(CONFIG), *call.words[call.words.index("--") + 1 :]])


# ---------------------------------------------------------------------- what is kept of a run


def test_a_study_keeps_losses_by_row_and_right_answers_and_repeats_no_run_that_has_a_line(small, monkeypatch):
    stage = Stage("gsm8k", 1, 4, {"lora": [1e-3], "cola-4": [1e-3]})
    study.measure_base("gsm8k")
    study.run(stage.words)
    study.collect_losses(stage)
    study.answer(stage)
    losses = {tuple(line["run"]): line["rows"] for line in tiny.read_rows(stage.folder / "rows.jsonl")}
    assert len(stage.results) == len(losses) == 2
    for line in stage.results:
        rows = losses[line.run]
        total = sum(size for _, size in rows)
        assert len(rows) == 3
        assert sum(loss * size for loss, size in rows) / total == pytest.approx(line.test, rel=1e-5)
    assert [line["rows"] for line in tiny.read_rows(stage.folder / "answers.jsonl")] == [2, 2]

    kept = {path.name: path.read_text() for path in stage.folder.glob("*.jsonl")}
    for folder in (stage.folder / "runs", small / "runs"):  # as in a clone, which has the lines alone
        shutil.rmtree(folder)
    monkeypatch.setattr(studies, "execute", lambda *_: pytest.fail("run again"))
    study.measure_base("gsm8k")
    study.run(stage.words)
    study.collect_losses(stage)
    study.answer(stage)
    assert not (small / "runs").exists()
    assert {path.name: path.read_text() for path in stage.folder.glob("*.jsonl")} == kept

    base, lora, chain = study.rows()
    assert base[1] == "before training"
    assert float(base[5]) != float(lora[5])
    assert [lora[1], lora[2], lora[3], lora[6]] == ["LoRA", "0.001", "1", ""]
    assert float(chain[6].split()[0]) == pytest.approx(float(chain[5]) - float(lora[5]), abs=1.5e-4)
    assert lora[8].endswith("/2")
    assert [one.folder for one in study.studies()] == [stage.folder]


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


def test_thousands_may_have_commas():
    assert is_right("#### 1004", "#### 1,004")


# ---------------------------------------------------------------------- intervals


def test_over_rows_of_one_length_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = [1.0, 1.4, 0.7, 2.0], [1.1, 1.3, 0.9, 2.4]
    rows = [[(loss, 5) for loss in losses] for losses in (ours, theirs)]
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    assert difference_over_rows(rows[:1], rows[1:]) == pytest.approx((mean, interval.low, interval.high))


def test_rows_weigh_as_many_tokens_as_they_have_and_seeds_are_averaged_first():
    theirs = [(1.0, 10), (2.0, 30)]
    ours = [[(1.2, 10), (2.0, 30)], [(1.0, 10), (1.6, 30)]]
    mean, low, high = difference_over_rows(ours, [theirs, theirs])
    assert mean == pytest.approx((0.1 * 10 - 0.2 * 30) / 40)
    assert low < mean < high
    assert difference_over_rows([theirs], [theirs]) == (0, 0, 0)


def test_models_that_scored_other_rows_are_not_compared():
    with pytest.raises(ValueError, match="different rows"):
        difference_over_rows([[(1.0, 10), (2.0, 30)]], [[(1.0, 10), (2.0, 31)]])


# ---------------------------------------------------------------------- Zig


def test_zigs_rows_are_pieces_of_whole_lines_and_no_file_is_in_both_splits(tmp_path):
    (tmp_path / "std").mkdir()
    for place in range(20):
        (tmp_path / "std" / f"{place:02}.zig").write_text(f"// file {place:02}\n" + "const a = 1;\n" * 100)
    study.write_zig(tmp_path / "std", tmp_path / "zig")
    train, test = ([row["text"] for row in tiny.read_rows(tmp_path / "zig" / f"{split}.jsonl")] for split in ("train", "test"))
    assert (len(train), len(test)) == (18, 2)
    assert [text.splitlines()[0] for text in test] == ["// file 09", "// file 19"]
    assert all(len(text) >= study.PIECE and text.endswith("\n") for text in train + test)
