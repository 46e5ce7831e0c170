"""What the loss over a large vocabulary costs: in chunks of positions, and as transformers computes it.

    python -m benchmarks.vocabulary

takes training steps of a Llama of one block (random weights, rank 8 on its queries and values) on one CPU thread, with a loss
at each position of 8 rows. It takes about an hour.

* ``transformers``: the loss that the model itself computes from its labels;
* ``cola``: this package's loss of the same module, which takes chunks by itself where the logits are large.

The two take turns: a ratio of seconds is the median over rounds. A peak of memory is that of a new process, above what it holds
before its steps, the model included. Where logits, log-probabilities and the gradients of both, each of four bytes, need more
than 21 GB, transformers' loss is not run.
"""

import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import RandomCausalLM, Work, build, peak_mib, take_turns, training_step

FILE = Path(__file__).with_suffix(".jsonl")
VOCABULARIES, POSITIONS, BATCH_SIZE, MEMORY_GB = (32_000, 152_000, 256_000), (128, 1024), 8, 21
COLUMNS = ("vocabulary", "positions", "transformers, MiB", "seconds", "cola, MiB", "seconds")


def make_step(name: str, vocabulary: int, positions: int, width: int = 512) -> Work:
    """A training step with one of the losses, of the package's module around a Llama of one block."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=1, **sizes)
    module = RandomCausalLM(lambda: build(config))
    module.configure_model()
    model: Any = module.model
    ids = torch.randint(0, vocabulary, (BATCH_SIZE, positions + 1), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = {"transformers": lambda: model(**batch).loss, "cola": lambda: module.step(batch).loss}
    return training_step(module, losses[name])


def run(lines: Lines) -> None:
    """Measures what no line has."""
    warnings.simplefilter("ignore")  # peft's
    for one in lines.missing({"vocabulary": vocabulary, "positions": n} for n in POSITIONS for vocabulary in VOCABULARIES):
        of = one["vocabulary"], one["positions"]
        fits = 4 * 4e-9 * BATCH_SIZE * one["vocabulary"] * one["positions"] < MEMORY_GB
        names = ["transformers", "cola"] if fits else ["cola"]
        peaks = {name: peak_mib(make_step, name, *of, is_above_model=True) for name in names}
        steps = {name: make_step(name, *of) for name in names}
        lines.add({**one, "peak_mib": peaks, "seconds": take_turns(steps, 7 if fits else 1, warm_up=1)})


def rows(results: list[dict[str, Any]]) -> Rows:
    """Medians of transformers' and ours."""
    table = []
    for line in results:
        peaks, seconds = line["peak_mib"], line["seconds"]
        cells = [f"{line['vocabulary']:,}", f"{BATCH_SIZE} x {line['positions']:,}"]
        for name in ("transformers", "cola"):
            is_run = name in peaks
            cells += [f"{peaks[name]:,.0f}", f"{statistics.median(seconds[name]):.1f}"] if is_run else ["does not fit", ""]
        table.append(cells)
    return table


if __name__ == "__main__":
    main(__doc__, FILE, run, [(COLUMNS, rows)])
