"""What a step, a knot and a chain cost, by the benchmark's own functions at a small size and with a quarter's slack.

Seconds are the processor's for this process: other processes lengthen them less than those of the clock.
"""

import functools
import importlib
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest

from tests.helpers.forked import SERVER

SLACK = 1.25


@pytest.fixture(scope="module")
def speed():
    """The benchmark; it is imported here because its imports take seconds."""
    module = importlib.import_module("benchmarks.speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "timeit", functools.partial(timeit.timeit, timer=time.process_time))
        patch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda _: SERVER))
        yield module


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_has_few_operations_above_the_models_and_waits_once(accumulation):
    launches = importlib.import_module("benchmarks.launches")
    cola, model = (launches.a_step(side, accumulation) for side in ("cola", "model"))
    assert model["operations"] < cola["operations"] <= launches.budget(model, accumulation)
    assert cola["waits"] == model["waits"] + 1, cola["where"]


@pytest.fixture(scope="module")
def bases(speed):
    return importlib.import_module("benchmarks.bases")


@pytest.mark.timing
def test_a_step_costs_less_than_pefts_and_little_more_than_the_least_and_a_knot_less_than_a_step(speed):
    config = speed.shape(layers=12, width=192, vocabulary=12_500)  # the head's share of the work is OPT-125m's
    seconds = speed.step_seconds(config, length=64, repeats=7)
    assert speed.ratio(seconds, "cola", "peft") <= SLACK * speed.TIME_LIMITS[64]
    assert speed.ratio(seconds, "cola", "floor") <= SLACK * speed.FLOOR_LIMIT
    assert speed.ratio(seconds, "knot", "cola") < speed.KNOT_LIMIT


@pytest.mark.timing
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
def test_five_links_take_as_long_as_one(speed):
    seconds = speed.chain_seconds(speed.shape(layers=2, width=128, vocabulary=1000), length=16, repeats=3, steps=25)
    assert speed.ratio(seconds, "5 links", "1 link") <= SLACK * speed.LINKS_LIMIT


@pytest.mark.timing
def test_a_step_needs_less_memory_than_pefts(speed):
    cola, peft = (speed.peak_mib(name, speed.SMALL, length=256) for name in ("cola", "peft"))
    assert 10 < cola <= SLACK * speed.MEMORY_LIMITS[256] * peft


@pytest.mark.timing
def test_a_step_on_experts_needs_less_memory_than_pefts_and_no_more_time(speed):
    for _, mine, other, _, limit, values in speed.measure_experts(speed.mixture(1, 512), [64], 1):
        assert speed.ratio(values, mine, other) <= SLACK * limit


@pytest.mark.timing
def test_a_large_vocabulary_needs_a_part_of_the_memory_of_all_its_logits(speed):
    vocabulary = importlib.import_module("benchmarks.vocabulary")
    with ProcessPoolExecutor(1, mp_context=SERVER) as pool:  # one new process for both
        cola, whole = (
            pool.submit(vocabulary.peak_above_model, name, 32_000, 300, 64).result() for name in ("cola", "transformers")
        )
    assert 64 < cola <= SLACK * vocabulary.MEMORY_LIMIT * whole


@pytest.mark.timing
def test_64_finished_ranks_cost_little_and_a_knot_as_much_memory_as_computed(bases, speed):
    width, layers, targets, mode = 384, 1, 2, ("bfloat16", "stack")
    results = bases.measure_steps(speed.shape(layers, width, 500), speed.TARGETS, 3, [mode], length=8)
    assert speed.ratio(results["seconds"], "bfloat16 stack, 64 ranks", "bfloat16 stack, one link") <= SLACK * bases.STEP_LIMIT
    computed = layers * targets * bases.RANK * (width + width) * 2 / 1e6
    assert results["sizes"]["bfloat16 stack"]["knot_mb"] == pytest.approx(computed, rel=1e-9)
