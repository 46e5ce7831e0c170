"""What a step, a knot and a chain cost, by the benchmark's own functions at a small size and with a quarter's slack.

Seconds are the processor's for this process: other processes lengthen them less than those of the clock.
"""

import functools
import importlib
import time
import timeit
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.forked import SERVER

SLACK = 1.25


@pytest.fixture(scope="module")
def speed():
    """The benchmark; it is imported here because its imports take seconds."""
    module, steps = (importlib.import_module(f"benchmarks.{name}") for name in ("speed", "steps"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "timeit", functools.partial(timeit.timeit, timer=time.process_time))
        patch.setattr(steps, "multiprocessing", SimpleNamespace(get_context=lambda _: SERVER))
        yield module


class Operations(TorchDispatchMode):
    """Counts operations, and the values for which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.n, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        self.waits += function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return function(*args, **(kwargs or {}))


def of_a_step(work):
    """The operations and waits of a step: what four steps have more than two, half of it."""
    counts = []
    for steps in (2, 4):
        with Operations() as operations:
            work(steps)
        counts.append((operations.n, operations.waits))
    return [(four - two) / 2 for two, four in zip(*counts, strict=True)]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_has_few_operations_above_the_models_and_waits_once(speed, accumulation):
    batch = speed.make_batch(speed.SMALL, length=8)

    def fit(steps):
        rows = [{name: value.clone() for name, value in batch.items()} for _ in range(steps * accumulation)]
        module = speed.cola_module(speed.SMALL)
        module.optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)  # AdamW reads its steps on a CPU
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulation, **speed.SILENT}
        speed.Trainer(accelerator="cpu", **options).fit(module, torch.utils.data.DataLoader(rows, batch_size=None))

    def model_alone(steps):
        step = speed.floor_step(speed.SMALL, 8)
        for _ in range(steps * accumulation):
            step()

    (mine, my_waits), (least, least_waits) = of_a_step(fit), of_a_step(model_alone)
    layers = 2 * speed.SMALL.num_hidden_layers
    assert least < mine <= least + 29 * layers * accumulation + 20
    assert my_waits == least_waits + 1


@pytest.mark.timing
def test_a_step_costs_less_than_pefts_and_little_more_than_the_least_and_a_knot_less_than_a_step(speed):
    config = speed.shape(layers=12, width=192, vocabulary=12_500)  # the head's share of the work is OPT-125m's
    seconds = speed.measure_step(config, length=64)["seconds"]
    assert speed.ratio(seconds, "cola", "peft") <= SLACK * 0.72
    assert speed.ratio(seconds, "cola", "floor") <= SLACK * 1.05
    assert speed.ratio(seconds, "knot", "cola") < 1


@pytest.mark.timing
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")  # which is so
def test_five_links_take_as_long_as_one(speed):
    found = speed.measure_links(speed.shape(layers=2, width=128, vocabulary=1000), length=16, repeats=3, steps=25)
    assert speed.ratio(found["seconds"], "5 links", "1 link") <= SLACK * 1.05


@pytest.mark.timing
def test_a_step_needs_less_memory_than_pefts(speed):
    cola, peft = (speed.peak_mib(make_step, speed.SMALL, 256) for make_step in (speed.cola_step, speed.peft_step))
    assert 10 < cola <= SLACK * 0.62 * peft


@pytest.mark.timing
def test_a_step_on_experts_needs_less_memory_than_pefts_and_no_more_time(speed):
    found = speed.measure_experts(speed.mixture(1, 512), 64, repeats=1)
    assert speed.ratio(found["mib"], "cola", "peft") <= SLACK * 0.6
    assert speed.ratio(found["seconds"], "cola", "peft") <= SLACK


@pytest.mark.timing
def test_a_large_vocabulary_needs_a_part_of_the_memory_of_all_its_logits(speed):
    make_step = importlib.import_module("benchmarks.vocabulary").make_step
    of = (32_000, 300, 64)  # tokens, positions, width
    cola, whole = (speed.peak_mib(make_step, name, *of, is_above_model=True) for name in ("cola", "transformers"))
    assert 64 < cola <= SLACK * whole / 3


@pytest.mark.timing
def test_64_finished_ranks_cost_little_and_a_knot_as_much_memory_as_computed(speed):
    bases = importlib.import_module("benchmarks.bases")
    width, layers, targets, mode = 384, 1, 2, ("bfloat16", "stack")
    results = bases.measure_steps(speed.shape(layers, width, 500), speed.TARGETS, 3, [mode], length=8)
    assert speed.ratio(results["seconds"], "bfloat16 stack, 64 ranks", "bfloat16 stack, one link") <= SLACK * 1.1
    computed = layers * targets * bases.RANK * (width + width) * 2 / 1e6
    assert results["sizes"]["bfloat16 stack"]["knot_mb"] == pytest.approx(computed, rel=1e-9)
