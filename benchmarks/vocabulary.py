"""What the loss over a large vocabulary costs: in chunks of positions, and as transformers computes it.

``python -m benchmarks.vocabulary`` takes training steps of a Llama of one block (random weights, rank 8 on its queries and
values) on one CPU thread, with a loss at each position. Results go to ``vocabulary.jsonl``, one a line, and into a table; a
call measures what no line has. It takes about an hour.

* ``transformers``: the loss that the model itself computes from its labels;
* ``cola``: this package's loss of the same module, which takes chunks by itself where the logits are large.

The two take turns: a ratio of seconds is the median over rounds. A peak of memory is that of two steps in a new process, above
what it holds before them, the model included. Where logits, log-probabilities and the gradients of both, each of four bytes,
need more than ``--memory`` GB, transformers' loss is not run.
"""

import argparse
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.lines import Lines, show
from benchmarks.memory import mib
from benchmarks.random_model import RandomCausalLM, build
from benchmarks.speed import Work, take_turns, training_step

VOCABULARIES, POSITIONS, ROWS = (32_000, 152_000, 256_000), (128, 1024), 8
MEMORY_LIMIT, TIME_LIMIT = 1 / 3, 1.15  # ours over transformers', for 152,000 and 8 x 1,024
COLUMNS = ["vocabulary", "positions", "transformers, MiB", "seconds", "cola, MiB", "seconds"]
Result = dict[str, Any]
torch.set_num_threads(1)  # here, and so in the processes that it starts


def one_block(vocabulary: int, width: int) -> RandomCausalLM:
    """The package's module around a Llama of one block."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_hidden_layers=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 64,
    )
    module = RandomCausalLM(lambda: build(config))
    module.configure_model()
    return module


def steps_of(module: RandomCausalLM, positions: int) -> dict[str, Work]:
    """A training step with each of the losses, on the same rows."""
    model: Any = module.model
    ids = torch.randint(0, model.config.vocab_size, (ROWS, positions + 1), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = {"transformers": lambda: model(**batch).loss, "cola": lambda: module.step(batch).loss}
    return {name: training_step(module, loss) for name, loss in losses.items()}


def peak_mib(name: str, vocabulary: int, positions: int, width: int) -> float:
    """The peak memory of two steps in a new process, above what it holds before them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_above_model, name, vocabulary, positions, width).result()


def peak_above_model(name: str, vocabulary: int, positions: int, width: int) -> float:
    """The same of this process."""
    step = steps_of(one_block(vocabulary, width), positions)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = mib("VmRSS")
    for _ in range(2):
        step()
    return mib("VmHWM") - before


def measure(vocabulary: int, positions: int, width: int, rounds: int, *, with_transformers: bool) -> Result:
    """Peaks in MiB, and seconds of a step in rounds of both losses, by their names."""
    names = ["transformers", "cola"] if with_transformers else ["cola"]
    peaks = {name: peak_mib(name, vocabulary, positions, width) for name in names}
    steps = steps_of(one_block(vocabulary, width), positions)
    return {"peak_mib": peaks, "seconds": take_turns({name: steps[name] for name in names}, rounds, warm_up=1)}


def rows(lines: list[Result]) -> list[list[str]]:
    """The table: medians of transformers' and ours."""
    table = []
    for line in lines:
        peaks, seconds = line["peak_mib"], line["seconds"]
        cells = [f"{line['vocabulary']:,}", f"{ROWS} x {line['positions']:,}"]
        for name in ("transformers", "cola"):
            is_run = name in peaks
            cells += [f"{peaks[name]:,.0f}", f"{statistics.median(seconds[name]):.1f}"] if is_run else ["does not fit", ""]
        table.append(cells)
    return table


def main() -> None:
    """Measures what no line has, writes each result, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--width", type=int, default=512, help="the model's hidden size (default: 512)")
    parser.add_argument("--memory", type=float, default=21, help="GB that there are (default: 21)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # peft's
    lines = Lines(options.output)
    wanted = [{"vocabulary": vocabulary, "positions": n} for n in POSITIONS for vocabulary in VOCABULARIES]
    for one in lines.missing(wanted):
        is_small = 4 * 4e-9 * one["vocabulary"] * one["positions"] * ROWS < options.memory
        rounds = options.rounds if is_small else 1  # alone, there is no ratio
        lines.add(one | measure(**one, width=options.width, rounds=rounds, with_transformers=is_small))
    show(COLUMNS, rows(lines.results))


if __name__ == "__main__":
    main()
