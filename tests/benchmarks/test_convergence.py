"""What is proved of chains, and against them, on problems whose optimum is known: ``benchmarks/convergence.py``."""

import math

import pytest

from benchmarks import convergence


def test_links_reach_the_spectrums_tail_exactly_or_nearly():
    wanted = convergence.target(size=12)
    tail = convergence.tail(wanted, rank=2, links=3)
    assert convergence.exact_links(wanted, rank=2, links=3) == pytest.approx(tail, rel=1e-10)
    assert convergence.trained_links(wanted, rank=2, links=3)[1:] == pytest.approx(tail[1:], rel=0.02)


def test_the_mean_gap_is_within_the_theorems_bound():
    for links in (1, 7, 60):
        gap, bound = convergence.frank_wolfe(convergence.target(size=12), links)
        assert 0 <= gap <= bound


def test_the_counter_example_is_one():
    rules = convergence.RULES.values()
    lora, cola, slow, rac = (convergence.descend(**rule, seed=0, steps=400)[-1] for rule in rules)
    assert lora == pytest.approx(0.58, abs=0.01)  # the best of rank 1
    assert cola == math.inf
    assert rac < 1e-4
    assert slow < 0.1  # what the counter-example does not say: a smaller step is enough


def test_the_benchmark_leaves_lines_and_figures(tmp_path):
    convergence.main(tmp_path, links=1, seeds=1, steps=20, longest=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["counter_example.png", "gap.png", "results.jsonl", "tail.png"]
