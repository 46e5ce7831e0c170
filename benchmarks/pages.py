"""What the pages quote of the results: all tables and sentences that are generated from a file of lines.

    python -m benchmarks.pages

writes them anew into README.md, docs/ and benchmarks/README.md. The tests check that there is nothing to write.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    bases,
    digits_splits,
    domain_shift,
    gsm8k,
    knots,
    packing,
    paper_table,
    peft_table,
    scale,
    speed,
    vocabulary,
)
from benchmarks.lines import Lines, Rows
from benchmarks.stages import learnable, tables
from benchmarks.stages.encoder import ENCODER
from benchmarks.stages.language import LANGUAGE
from benchmarks.stages.sequence import TaskSequence

ROOT = Path(__file__).parent.parent
ALL = "benchmarks/README.md"
Quote = Callable[[list[dict[str, Any]]], Rows]


def of(module: Any, rows: Quote) -> Callable[[], Rows]:
    """The rows that a benchmark makes of its lines."""
    return lambda: rows(Lines(module.FILE).results)


def of_stages(table: Callable[[TaskSequence, Lines], Rows], sequence: TaskSequence) -> Callable[[], Rows]:
    """The rows of a sequence of tasks, without their head."""
    return lambda: table(sequence, Lines(sequence.file))[1:]


def stages_in_short(sequence: TaskSequence) -> Rows:
    """Of each arm: how many runs, its loss at the end, and two differences to one LoRA."""
    return [[row[k] for k in (0, 2, 3, 4, 7)] for row in of_stages(tables.table, sequence)()]


def in_short(rows: Rows, methods: Sequence[str]) -> Rows:
    """The differences to LoRA of some methods, a row for each place; of several variants of a method, the last one."""
    table, place = dict[str, list[str]](), ""
    for row in rows:
        place = row[0] or place
        cells = table.setdefault(place, [""] * len(methods))
        for k, method in enumerate(methods):
            if row[1].startswith(method):
                cells[k] = row[-1]
    return [[place, *cells] for place, cells in table.items() if any(cells)]


# Each table: the page, how its first line begins, and its rows.
TABLES: dict[tuple[str, str], Callable[[], Rows]] = {
    (ALL, "| base | links |"): of(bases, bases.rows),
    (ALL, "| rank | 3e-4 |"): of(gsm8k, gsm8k.rows_of_rates),
    (ALL, "| paper's task |"): of(paper_table, paper_table.rows),
    (ALL, "| | method | rate |"): of(digits_splits, digits_splits.rows),
    (ALL, "| domain shift |"): of(domain_shift, domain_shift.rows),
    (ALL, "| a variant |"): of(domain_shift, domain_shift.rows_of_variants),
    (ALL, "| GSM8K, Zig |"): of(gsm8k, gsm8k.rows),
    (ALL, "| small GPT |"): of(knots, knots.rows),
    ("docs/scaling.md", "| model | full"): of(scale, scale.rows),
    ("docs/speed.md", "| what | time / theirs |"): peft_table.rows,
    ("docs/results.md", "| | 4 links |"): lambda: in_short(
        of(domain_shift, domain_shift.rows)(), ["4 links", "16 links", "LoRA, four times the rank", "full fine-tuning"]
    ),
    ("docs/results.md", "| | 4 links of COLA |"): lambda: in_short(
        of(gsm8k, gsm8k.rows)(), ["4 links", "half merged at 4 knots", "LoRA of rank"]
    ),
    (ALL, "| between two stages |"): of_stages(tables.table_of_rates, LANGUAGE),
    (ALL, "| at its best rate |"): of_stages(tables.table, LANGUAGE),
    (ALL, "| candidate |"): of_stages(learnable.table_of_candidates, ENCODER),
    (ALL, "| an encoder |"): of_stages(tables.table, ENCODER),
    ("docs/results.md", "| SmolLM2 |"): lambda: stages_in_short(LANGUAGE),
    ("docs/results.md", "| an encoder |"): lambda: stages_in_short(ENCODER),
}


def sentences() -> Iterator[tuple[str, str, Sequence[str]]]:
    """Each sentence: the page, its words with ``{}`` in the place of each number, and the numbers."""
    compared = peft_table.rows()
    ratios = [[cell.split()[0] for cell in row[1:3]] for row in compared if "command" in row[0]]
    ends = [end(values) for values in zip(*ratios, strict=True) for end in (min, max)]
    yield "README.md", "[{} to {} of the time and {} to {} of the memory](docs/speed.md)", ends
    arms = {row[0]: row for row in of_stages(tables.table, ENCODER)()}
    base = of_stages(tables.table_of_rates, ENCODER)()[0]
    yield ALL, "The accuracy is {} before training", [base[-3]]
    gain = arms["a new link per stage"][4]
    words = "an encoder ended {} more accurate than one LoRA trained through all five"
    yield "README.md", words, [gain.replace("+", "")]
    ends = [
        float(arms[name][3])
        for name in ("a new link per stage", "one LoRA, at the rate of a new link", "one LoRA that goes on")
    ]
    words = "of 5 tasks, {} is the difference at equal rates, and {} if one LoRA has its own best rate"
    yield "docs/results.md", words, [f"{ends[0] - ends[1]:.3f}", f"{ends[0] - ends[2]:.3f}"]
    words = "more accurate at the end than one LoRA ({}); 5 % replay on top adds {}, which is not clear"
    yield "docs/stages.md", words, [gain, arms["a new link, 5 % replay"][5]]
    (dpo,) = (row for row in compared if "DPO" in row[0])
    yield "docs/preferences.md", "takes [{} of the time and {} of the memory]", [cell.split()[0] for cell in dpo[1:3]]

    found = {(line[0], line[3]): line[4] for line in of(speed, speed.rows)() if line[2] == "seconds"}
    steps = [row[4] for row in of(speed, speed.rows)() if row[:1] + row[2:4] == ["step", "seconds", "cola / floor"]]
    yield "docs/speed.md", "shape takes {} to {} times the forward pass of the frozen model", sorted(steps)
    yield "docs/speed.md", "and a run with five links {} times as long as one with one", [found["links", "5 links / 1 link"]]
    packed = {row[0]: row[2] for row in of(packing, packing.rows)()}
    words = "trains {} tokens a second in batches of 8 rows of similar length, and {} in packs of 1,024 tokens"
    yield "docs/speed.md", words, [packed["grouped"], packed["packed, 1,024"]]
    (wide,) = (row for row in of(vocabulary, vocabulary.rows)() if row[:2] == ["152,000", "8 x 1,024"])
    words = "needs {} MiB above the model, and {} with the loss that transformers computes, in {} and {} seconds"
    yield "docs/speed.md", words, [wide[4], wide[2], wide[5], wide[3]]

    errors = {line["mode"]: f"{100 * line['error']:.2g} %" for line in Lines(bases.FILE).results if "mode" in line}
    words = "of the weight's size have an error of {}, so it is refused; `stack` has {}, and"
    yield "docs/scaling.md", words, [errors["bfloat16 merged as it is"], errors["bfloat16 stack"]]
    slower = [cell for row in of(bases, bases.rows)() if row[1] == "stack" for cell in row[-1].split(" / ")]
    yield "docs/scaling.md", "a step with a stack of rank 64 takes {} to {} times as long", [min(slower), max(slower)]

    losses = {row[1]: row for row in of(gsm8k, gsm8k.rows)()[:8]}  # those of rank 8 in 150 steps
    (rank_32,) = (row[5] for name, row in losses.items() if name == "LoRA of rank 32")
    yield "docs/cli.md", "Rank 32 is {} better", [f"{-float(rank_32.split()[0]):.3f}"]
    better = [f"{float(losses['LoRA'][4]) - float(losses[f'LoRA, {name}'][4]):.4f}" for name in ("no clipping", "no warm-up")]
    yield "docs/cli.md", "without clipping ({} better) or warm-up ({} better)", better

    one_base = of(domain_shift, domain_shift.rows_of_one_base)()[-1]
    yield ALL, "From the same weights, {} of rank 8 differ from LoRA by {} in 3,200 steps", [one_base[1], one_base[-1]]
    digits = next(row[-1] for row in of(digits_splits, digits_splits.rows)() if row[1] == "10 links")  # of rank 1, the first
    yield "docs/results.md", "ten links of rank 1 are {} better", [digits.replace("+", "")]
    (sst2,) = (line for line in of(paper_table, paper_table.rows)() if line[0] == "SST2")
    yield "configs/smollm2.yaml", "before training), and {} with the paper's", [sst2[4].split()[0]]


PAGES = sorted({page for page, _ in TABLES} | {page for page, *_ in sentences()})


def written(page: str) -> str:
    """The text of a page, with its tables and sentences as the lines give them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for (of_page, header), rows in TABLES.items():
        if of_page == page:
            (match,) = re.finditer(rf"^{re.escape(header)}.*\n\|[-| ]+\|\n((?:\|.*\|\n)*)", text, re.MULTILINE)
            body = "".join(f"| {' | '.join(row)} |\n" for row in rows())
            text = text[: match.start(1)] + body + text[match.end(1) :]
    for of_page, words, numbers in sentences():
        if of_page == page:
            pattern = r"(\S.{0,40}?)".join(re.escape(part).replace(r"\ ", r"\s+") for part in words.split("{}"))
            (match,) = re.finditer(pattern, text)
            for k in range(len(numbers), 0, -1):
                text = text[: match.start(k)] + numbers[k - 1] + text[match.end(k) :]
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(written(page), encoding="utf-8")
