"""What is proved of chains, and against them, on problems whose optimum is known: ``benchmarks/convergence.py``."""

import math

import pytest

from benchmarks import convergence


def test_with_exact_links_the_error_is_the_spectrums_tail():
    wanted = convergence.target(size=12)
    tail = convergence.tail(wanted, rank=2, links=5)
    assert convergence.exact_links(wanted, rank=2, links=5) == pytest.approx(tail, rel=1e-10)


def test_trained_links_come_close_to_the_tail():
    wanted = convergence.target(size=12)
    tail = convergence.tail(wanted, rank=2, links=3)
    errors = convergence.trained_links(wanted, rank=2, links=3)
    assert errors[1:] == pytest.approx(tail[1:], rel=0.02)


@pytest.mark.parametrize("links", [1, 7, 60])
def test_the_mean_gap_is_within_the_theorems_bound(links):
    gap, bound = convergence.frank_wolfe(convergence.target(size=12), links)
    assert 0 <= gap <= bound


def test_the_counter_example_is_one():
    runs = {
        name: [convergence.descend(**rule, seed=seed, steps=400) for seed in range(2)]
        for name, rule in convergence.RULES.items()
    }
    lora, cola, slow, rac = ([losses[-1] for losses in of_rule] for of_rule in runs.values())
    assert lora == pytest.approx([0.58, 0.58], abs=0.01)  # the best of rank 1
    assert cola == [math.inf, math.inf]
    assert max(rac) < 1e-4
    assert max(slow) < 0.1  # what the counter-example does not say: a smaller step is enough


def test_the_benchmark_leaves_lines_and_figures(tmp_path, capsys):
    convergence.main(tmp_path, links=1, seeds=1, steps=20, longest=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_example.png", "gap.png", "results.jsonl", "tail.png"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 4
