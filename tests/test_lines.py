"""What the benchmarks write: a call goes on where the one before it stopped, and the lines of earlier releases are read."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark():
    yield importlib.import_module
    for name in ("lines", "digits", "sst2", "tasks"):
        sys.modules.pop(name, None)


def test_what_has_its_line_is_not_missing_and_the_file_is_whole_after_each(benchmark, tmp_path):
    path, wanted = tmp_path / "found.jsonl", [{"method": name, "seed": seed} for name in ("a", "b") for seed in (0, 1)]
    for k in range(3):
        lines = benchmark("lines").Lines(path)
        assert lines.missing(wanted) == wanted[k:]
        lines.add(wanted[k] | {"curve": [0.5, k]})
        assert [json.loads(line) for line in path.read_text().splitlines()] == lines.results
    assert len(lines.results) == 3
    benchmark("lines").Lines(path, is_new=True).add(wanted[3])
    assert path.read_text() == '{"method": "b", "seed": 1}\n'
    assert [part.name for part in tmp_path.iterdir()] == ["found.jsonl"]


@pytest.mark.parametrize(("name", "n_lines"), [("digits", 35), ("sst2", 6), ("tasks", 11)])
def test_nothing_is_run_again_that_a_committed_line_holds(benchmark, name, n_lines, tmp_path, monkeypatch, capsys):
    module = benchmark(name)
    committed = (BENCHMARKS / f"{name}.jsonl").read_text()
    (tmp_path / f"{name}.jsonl").write_text(committed)
    output = tmp_path if name == "digits" else tmp_path / f"{name}.jsonl"
    monkeypatch.setattr(module, "run", None)
    monkeypatch.setattr(sys, "argv", [name, "--output", str(output)])
    module.main()
    assert len(committed.splitlines()) == n_lines
    assert (tmp_path / f"{name}.jsonl").read_text() == committed
    assert "seconds" in capsys.readouterr().out or name == "digits"
