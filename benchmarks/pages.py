"""What the pages quote: tables and sentences that are generated from a file of lines, and the list of public names.

    python -m benchmarks.pages

writes them anew into README.md, docs/ and benchmarks/README.md. The tests check that there is nothing to write.
"""

import ast
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
    merges,
    packing,
    paper_table,
    peft_table,
    resumes,
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


SHOWN = {  # what docs/results.md shows of the arms of stages, and whether those of the encoder and of SmolLM2 have it
    "a new link per stage": "a new link per stage",
    "a new link, 5 % replay": "the same with 5 % replay",
    "a new link, a scale per stage": "the same with a scale per stage",
    "half merged after each stage": "half merged after each stage",
    "one LoRA, 5 % replay": "one LoRA with 5 % replay",
    "one LoRA, a scale per stage": "one LoRA with a scale per stage",
    "one LoRA, at the rate of a new link": "one LoRA at the rate of a new link",
    "O-LoRA as released": "O-LoRA as released",
    "O-LoRA as written": "O-LoRA as written",
    "SLAO": "SLAO",
}


def stages_in_short() -> Rows:
    """Of each arm and sequence: how many runs, and the differences to one LoRA at the end and in forgetting."""
    found = [{row[0]: [row[k] for k in (2, 4, 7)] for row in of_stages(tables.table, of)()} for of in (ENCODER, LANGUAGE)]
    return [[words, *(cell for arms in found for cell in arms.get(arm, ["", "", ""]))] for arm, words in SHOWN.items()]


def in_short(rows: Rows, methods: Sequence[str]) -> Rows:
    """The differences to LoRA of some methods, a row for each place; of several variants of a method, the last one.

    The second cell has the numbers of seeds in the order of the methods.
    """
    table, place = dict[str, list[list[str]]](), ""
    for row in rows:
        place = row[0] or place
        cells = table.setdefault(place, [["", ""] for _ in methods])
        for k, method in enumerate(methods):
            if row[1].startswith(method):
                cells[k] = [row[3] or "1", row[-1]]
    shown = {place: cells for place, cells in table.items() if any(cell for _, cell in cells)}
    return [
        [place, ", ".join(seeds for seeds, cell in cells if cell), *(cell for _, cell in cells)]
        for place, cells in shown.items()
    ]


def public_names() -> Rows:
    """Each public name with a link to its source, and the first line of its docstring; what is used most comes first."""
    stub = (ROOT / "cola_lightning" / "__init__.pyi").read_text(encoding="utf-8")
    found = re.findall(r"^from \.([\w.]+) import (\w+) as", stub, re.MULTILINE)
    order = {"hf": 0, "module": 1, "callbacks": 2, "data": 3}
    rows: Rows = []
    for path, name in sorted(found, key=lambda of: order.get(of[0].partition(".")[0], 4)):
        source = f"cola_lightning/{path.replace('.', '/')}.py"
        tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
        (node,) = (node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name)
        line = (ast.get_docstring(node) or "").partition("\n")[0]
        line = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", line).replace("``", "`")
        rows.append([f"[`{name}`](../{source})", line])
    return rows


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
    (ALL, "| 1.1 billion parameters |"): of(merges, merges.rows),
    ("docs/api.md", "| class or function |"): public_names,
    ("docs/compared.md", "| killed and resumed |"): of(resumes, resumes.table),
    ("docs/scaling.md", "| model | full"): of(scale, scale.rows),
    ("docs/speed.md", "| what | time / theirs |"): peft_table.rows,
    ("docs/results.md", "| small GPT |"): lambda: in_short(
        of(domain_shift, domain_shift.rows)(), ["4 links", "LoRA, four times the rank", "full fine-tuning"]
    ),
    ("docs/results.md", "| SmolLM2 |"): lambda: in_short(
        of(gsm8k, gsm8k.rows)(), ["4 links", "half merged at 4 knots", "LoRA of rank"]
    ),
    (ALL, "| between two stages |"): of_stages(tables.table_of_rates, LANGUAGE),
    (ALL, "| at its best rate |"): of_stages(tables.table, LANGUAGE),
    (ALL, "| candidate |"): of_stages(learnable.table_of_candidates, ENCODER),
    (ALL, "| an encoder |"): of_stages(tables.table, ENCODER),
    ("docs/results.md", "| to one LoRA that goes on |"): stages_in_short,
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
    (link,) = (row for row in of_stages(tables.table, LANGUAGE)() if row[0] == "a new link per stage")
    mean, low, high = (-float(number.strip("[],")) for number in link[4].split())
    yield "README.md", "tasks the loss was {} lower ({} runs)", [f"{mean:.3f} [{high:.3f}, {low:.3f}]", link[2]]
    words = "its difference to a new link is {}. At its own best rate the difference is {}."
    yield "docs/results.md", words, [arms[name][5] for name in ("one LoRA, at the rate of a new link", "one LoRA that goes on")]
    words = "encoder this added {} of accuracy to a new link per stage"
    yield "docs/stages.md", words, [arms["a new link, 5 % replay"][5]]
    words = "test accuracy is {} before training, and {} at the end of the baseline. A plus is better"
    yield "docs/results.md", words, [base[-3], arms["one LoRA that goes on"][3]]
    loss = of_stages(tables.table, LANGUAGE)()[0][3]
    yield "docs/results.md", "The mean test loss is {} nats at the end of the baseline", [loss]
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

    merged = {row[0]: row for row in of(merges, merges.rows)()}
    words = "takes {} of the CPU time of peft, which calls `merge_and_unload` twice. It needs {} GiB more than the imports, "
    words += "peft {} GiB. `cola verify` takes {} of peft's time"
    numbers = [merged["export"][2], merged["export"][4], merged["peft"][4], merged["verify"][2]]
    yield "docs/elsewhere.md", words, numbers

    errors = {line["mode"]: f"{100 * line['error']:.2g} %" for line in Lines(bases.FILE).results if "mode" in line}
    words = "of the weight's size have an error of {}, and {} with `stack`"
    yield "docs/scaling.md", words, [errors["bfloat16 merged as it is"], errors["bfloat16 stack"]]

    one_base = of(domain_shift, domain_shift.rows_of_one_base)()[-1]
    yield ALL, "From the same weights, {} of rank 8 differ from LoRA by {} in 3,200 steps", [one_base[1], one_base[-1]]
    digits = next(row[-1] for row in of(digits_splits, digits_splits.rows)() if row[1] == "10 links")  # of rank 1, the first
    yield "docs/results.md", "ten links of rank 1 are {} more accurate", [digits.replace("+", "")]
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
            parts = [re.escape(part).replace(r"\ ", r"\s+") for part in words.split("{}")]
            pattern = r"(\S.{0,40}?)".join(re.sub(r"^\\\.", r"\.(?!\\d)", part) for part in parts)  # no point of a number
            (match,) = re.finditer(pattern, text)
            for k in range(len(numbers), 0, -1):
                text = text[: match.start(k)] + numbers[k - 1] + text[match.end(k) :]
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(written(page), encoding="utf-8")
