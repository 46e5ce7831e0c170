"""What a step, a knot and a chain cost, by the benchmark's own functions at a small size and with a quarter's slack."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SLACK = 1.25


@pytest.fixture(scope="module")
def speed():
    """The benchmark, under its own name: so a process that it starts finds it, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("speed")
        del sys.modules["speed"]


def test_a_step_costs_less_than_pefts_and_little_more_than_the_least_and_a_knot_less_than_a_step(speed):
    config = speed.shape(layers=12, width=128, vocabulary=8000)  # the head's share of the work is OPT-125m's
    seconds = speed.step_seconds(config, length=64, repeats=7)
    assert speed.ratio(seconds, "cola", "peft") <= SLACK * speed.TIME_LIMITS[64]
    assert speed.ratio(seconds, "cola", "floor") <= SLACK * speed.FLOOR_LIMIT
    assert speed.ratio(seconds, "knot", "cola") < speed.KNOT_LIMIT


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
def test_five_links_take_as_long_as_one(speed):
    seconds = speed.chain_seconds(speed.shape(layers=2, width=128, vocabulary=1000), length=16, repeats=5, steps=50)
    assert speed.ratio(seconds, "5 links", "1 link") <= SLACK * speed.LINKS_LIMIT


def test_a_step_needs_less_memory_than_pefts(speed):
    cola, peft = (speed.peak_mib(name, speed.SMALL, length=256) for name in ("cola", "peft"))
    assert 10 < cola <= SLACK * speed.MEMORY_LIMITS[256] * peft
