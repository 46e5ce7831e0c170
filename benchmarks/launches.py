"""What an optimizer step asks of a device: operations, and results that the host waits for. It counts, and does not time.

``python -m benchmarks.launches`` trains a Llama of two blocks on the CPU (random weights, rank 8 on all linear layers,
batches of 4 rows of 24 to 32 tokens, AdamW, no clipping) and counts, by a ``TorchDispatchMode``, what each side does for an
optimizer step. It takes seconds. Results go to ``launches.jsonl``, one a line, and into a table.

* ``cola``: this package under Lightning's Trainer;
* ``peft``: peft's LoRA under transformers' Trainer, on the same batches;
* ``model``: one forward and backward pass of the frozen model alone, times the batches of a step.

*Operations* are all that PyTorch dispatches; *kernels* are those that are not views, which a GPU would launch. A *wait* is a
value of a tensor that the host needs before it can go on: on a GPU the host then waits for all that was launched before. Waits
inside ``torch.optim`` are not counted, because on a GPU its step counts are on the host. Copies between host and GPU cannot be
seen here.

``--where`` lists the lines of code that wait.
"""

import argparse
import collections
import logging
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from benchmarks.lines import Lines, show
from benchmarks.random_model import SILENT, RandomCausalLM, build

CONFIG = LlamaConfig(
    vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIDES, ACCUMULATIONS, ROWS, LENGTHS = ("cola", "peft", "model"), (1, 4), 4, (32, 30, 27, 24)
OF_A_LINK, OF_A_STEP = 29, 20  # operations at most, above the frozen model's own: of a layer's link for a batch, and the rest
STEPS = 2  # whose operations are counted, after as many that are not

# Operations whose result, or its size, is read by the host.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}  # with a mask: its true values are counted first
READ_BY_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.cpu}  # not dispatched on a CPU


class Counts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and waits by where they are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.kernels, self.where = 0, 0, collections.Counter[str]()
        self._results: dict[int, weakref.ref[Tensor]] = {}  # tensors that would be on a device: what an operation has made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.kernels += not function.is_view and "empty" not in str(function)
        name = function.overloadpacket.__name__
        by_mask = name in BY_MASK and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        if name in READS or by_mask:
            self.wait()
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._results[id(result)] = weakref.ref(result)
        return result

    def is_result(self, tensor: Tensor) -> bool:
        """Whether an operation has made the tensor."""
        reference = self._results.get(id(tensor))
        return reference is not None and reference() is tensor

    def wait(self) -> None:
        """Counts a wait, unless it is the optimizer's."""
        frame = sys._getframe(1)
        while frame.f_back and ((path := frame.f_code.co_filename) == __file__ or "/torch/" in path):
            if "/torch/optim/" in path:
                return
            frame = frame.f_back
        self.where["/".join(frame.f_code.co_filename.split("/")[-3:]) + f":{frame.f_lineno}"] += 1


class PythonReads(TorchFunctionMode):
    """Counts waits of methods that are not dispatched on a CPU."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READ_BY_PYTHON and self.counts.is_result(args[0]):
            self.counts.wait()
        return function(*args, **(kwargs or {}))


class Moved(dict[str, Tensor]):
    """A batch that is copied where a GPU's would be moved to it."""

    def to(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A copy, as if on another device."""
        return {name: value.clone() for name, value in self.items()}


def make_batch(seed: int) -> Moved:
    """Rows of different lengths, padded on the right; the first half of each is a prompt, without a loss."""
    ids = torch.randint(3, CONFIG.vocab_size, (ROWS, max(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    place, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    labels = ids.masked_fill((place < lengths // 2) | (place >= lengths), -100)
    return Moved(input_ids=ids, attention_mask=(place < lengths).long(), labels=labels)


def cola(accumulation: int, n_steps: int) -> Counts:
    """Counts this package's fit."""
    batches: DataLoader[Moved] = DataLoader([make_batch(seed) for seed in range(accumulation * n_steps)], batch_size=None)  # type: ignore[arg-type]
    trainer = Trainer(accelerator="cpu", max_steps=n_steps, max_epochs=1, accumulate_grad_batches=accumulation, **SILENT)
    module = RandomCausalLM(lambda: build(CONFIG), target_modules=TARGETS)
    return counted(lambda: trainer.fit(module, batches))


def peft(accumulation: int, n_steps: int) -> Counts:
    """Counts the training of peft's LoRA by transformers' Trainer."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer as TransformersTrainer
    from transformers import TrainingArguments

    lora = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):  # peft's, of transformers 5
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=1,  # an item is a batch
            gradient_accumulation_steps=accumulation,
            max_steps=n_steps,
            learning_rate=1e-3,
            weight_decay=1e-2,  # torch's default, as ours
            max_grad_norm=0.0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        items = [make_batch(seed) for seed in range(accumulation * n_steps)]
        trainer = TransformersTrainer(
            get_peft_model(build(CONFIG), lora), arguments, train_dataset=items, data_collator=lambda some: some[0]
        )
        return counted(trainer.train)


def model(accumulation: int, n_steps: int) -> Counts:
    """Counts forward and backward passes of the frozen model."""
    frozen = build(CONFIG).requires_grad_(False)
    inputs = [frozen.get_input_embeddings()(make_batch(0)["input_ids"]).requires_grad_() for _ in range(accumulation * n_steps)]
    batches = [make_batch(seed).to() for seed in range(accumulation * n_steps)]

    def work() -> None:
        for embedded, batch in zip(inputs, batches, strict=True):
            frozen(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()

    return counted(work)


def counted(work: Callable[[], object]) -> Counts:
    """What some work has dispatched."""
    counts = Counts()
    with counts, PythonReads(counts):
        work()
    return counts


def a_step(side: str, accumulation: int) -> dict[str, Any]:
    """Operations, kernels and waits of an optimizer step, and where it waits: what more steps have more."""
    few, many = (globals()[side](accumulation, n_steps) for n_steps in (STEPS, 2 * STEPS))
    where = {place: n / STEPS for place, n in (many.where - few.where).items()}
    both = {name: (getattr(many, name) - getattr(few, name)) / STEPS for name in ("operations", "kernels")}
    return both | {"waits": sum(where.values()), "where": where}


def budget(model: dict[str, Any], accumulation: int) -> int:
    """The most operations of a step: the frozen model's, which are transformers', and this package's own."""
    n_layers: int = CONFIG.num_hidden_layers * len(TARGETS)
    return int(model["operations"]) + OF_A_LINK * n_layers * accumulation + OF_A_STEP


NAMES = {"cola": "`cola`", "peft": "peft, transformers' Trainer", "model": "the frozen model alone"}
COLUMNS = ["accumulated batches", "side", "operations", "of these kernels, not views", "waits of the host"]


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's rows."""
    return [
        [str(one["accumulation"]), NAMES[one["side"]], *(f"{one[name]:,.0f}" for name in ("operations", "kernels", "waits"))]
        for one in results
    ]


def main() -> None:
    """Counts, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="also the lines of code that wait")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # advice
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lines, places = Lines(options.output, is_new=True), []
    for accumulation in ACCUMULATIONS:
        for side in SIDES:
            found = a_step(side, accumulation)
            places += [[str(accumulation), side, place, f"{n:g}"] for place, n in found.pop("where").items()]
            lines.add({"accumulation": accumulation, "side": side, **found})
    show(COLUMNS, rows(lines.results))
    if options.where:
        show(["accumulation", "side", "where", "waits"], places)


if __name__ == "__main__":
    main()
