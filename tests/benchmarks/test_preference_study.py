"""The study of preferences: its pairs, its measures, and a run of each method."""

import json
import re
from itertools import islice

import pytest
import torch

from benchmarks.preference import study
from benchmarks.preference.rows import STEP, evaluate, shown, with_wrong_step
from tests.helpers import tiny

SOLUTION = (
    "She bakes 3*12 = <<3*12=36>>36 rolls and sells 36/2 = <<36/2=18>>18 of them.\n"
    "At $2 each, that is $2*18 = $<<2*18=36>>36, of which 25% is 36*25% = $<<36*25%=9>>9.\n#### 9"
)


@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_solution_has_one_wrong_step_and_what_follows_from_it(seed):
    wrong = with_wrong_step(SOLUTION, seed)
    steps = [(evaluate(left), right) for left, right in STEP.findall(wrong)]
    assert sum(shown(value) != result for value, result in steps) == 1
    assert wrong.endswith(f"#### {steps[-1][1]}")
    assert not wrong.endswith("#### 9")
    assert re.sub(r"[\d.]+", "n", wrong) == re.sub(r"[\d.]+", "n", SOLUTION)
    assert wrong == with_wrong_step(SOLUTION, seed)


@pytest.mark.parametrize(
    "solution", ["It is 4.\n#### 4", "1+1 = <<1+1=3>>3\n#### 3", "<<1/0=1>>1\n#### 1", "<<a+1=2>>2\n#### 2"]
)
def test_a_solution_whose_steps_cannot_be_followed_is_left_out(solution):
    assert with_wrong_step(solution, 0) is None


def test_the_measures_are_those_of_plain_log_probabilities():
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.tensor([[1, -100, 2, 3], [0, 0, -100, -100], [-100, 4, 4, 4]])
    values, old_values, kl = study.compare(new, old, labels)
    for k, row in enumerate(labels):
        places = [place for place, label in enumerate(row) if label >= 0]
        logs, old_logs = new[k].log_softmax(-1), old[k].log_softmax(-1)
        assert values[k] == pytest.approx(sum(logs[place, row[place]].item() for place in places), abs=1e-5)
        assert old_values[k] == pytest.approx(sum(old_logs[place, row[place]].item() for place in places), abs=1e-5)
        expected = sum(torch.nn.functional.kl_div(old_logs[p], logs[p], reduction="sum", log_target=True) for p in places)
        assert kl[k] == pytest.approx(expected.item(), abs=1e-5)


def test_each_method_runs_and_a_second_call_does_what_is_missing(tmp_path, monkeypatch):
    pairs = [{"prompt": f"{k} rolls?", "chosen": SOLUTION, "rejected": with_wrong_step(SOLUTION, k)} for k in range(12)]
    for split in ("train", "test"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.setattr(study, "MODEL", {"model_name": tiny.folder(tmp_path / "model", max_position_embeddings=512)})
    for name, value in {
        "TARGETS": ["q_proj"],
        "RATE": 1e-2,
        "STEPS": 4,
        "VALIDATED": 2,
        "TESTED": 4,
        "PAIRS": tmp_path / "pairs",
    }.items():
        monkeypatch.setattr(study, name, value)
    start = study.COLAPreferenceLM(**study.MODEL, target_modules=["q_proj"], rank=2, seed=0)
    tiny.with_live_link(start).full_chain().save(tmp_path / "chain")
    lines = study.Lines(tmp_path / "lines.jsonl")
    wanted = list(islice(study.missing_runs(lines), len(study.METHODS)))
    for wanted_run in wanted:
        lines.add(study.run(*wanted_run, tmp_path / "chain"))
    assert {line["method"] for line in lines.results} == set(study.METHODS)
    assert all(0 < line["test"]["kl"] < 1 for line in lines.results)
    assert not {*wanted} & {*islice(study.missing_runs(lines), len(wanted))}
