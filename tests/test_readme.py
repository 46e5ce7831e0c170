"""What README and the pages of docs/ say is true: examples run, commands parse, tables and figures are the benchmarks'."""

import importlib
import json
import re
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

import cola_lightning
from benchmarks import domain_shift, paper_table
from cola_lightning import Chain
from cola_lightning.cli import main
from tests import tiny
from tests.test_configs import at_tiny_size

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def all_blocks(language):
    """Page and block, of all pages."""
    return [(page, block) for page in PAGES for block in blocks(page, language)]


def table(page, start):
    """Rows, as they stand, of the one table whose header begins so."""
    tables = re.findall(r"^(\|.*\|)\n\|[ -|]+\|\n((?:\|.*\|\n)+)", PAGES[page], re.MULTILINE)
    (rows,) = [body.splitlines() for header, body in tables if header.startswith(start)]
    return rows


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def lines_of(name):
    return [json.loads(line) for line in (ROOT / "benchmarks" / f"{name}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- examples


@pytest.fixture
def model_and_rows(tmp_path, monkeypatch):
    """A folder ``my_rows`` for each kind of task, and a tiny model's place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])
    (tmp_path / "my_rows").mkdir()
    row = {"prompt": "Is it old? ", "response": "Yes", "review": "It was old.", "verdict": "bad"}
    lines = [json.dumps(row | {"verdict": ("bad", "good")[k % 2]}) for k in range(8)]
    for split in ("train", "validation", "test"):
        (tmp_path / "my_rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"It was old.,{('bad', 'good')[k % 2]}" for k in range(20)]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,verdict", *rows]) + "\n")
    return tiny.folder(tmp_path / "model", "opt")


N_LINKS = {("README.md", 0): 2, ("README.md", 1): 2, ("docs/from_peft.md", 0): 2}
N_LINKS |= {("docs/python.md", 0): 1, ("docs/python.md", 1): 3}


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("place", N_LINKS, ids=str)
def test_an_example_runs(place, model_and_rows, capsys):
    examples = {(page, k): block for page in PAGES for k, block in enumerate(blocks(page, "python"))}
    assert examples.keys() == N_LINKS.keys()
    names = {"__name__": "example"}
    exec(compile(examples[place].replace("facebook/opt-125m", model_and_rows), place[0], "exec"), names)
    assert len(names["module" if "module" in names else "adapted"].chain) == N_LINKS[place]
    out = capsys.readouterr().out
    if place == ("README.md", 0):
        assert type(AutoModelForCausalLM.from_pretrained("merged")) is OPTForCausalLM
        assert AutoTokenizer.from_pretrained("merged")("It")["input_ids"]
    if place == ("README.md", 1):  # learns, link by link, about as it says; the order of the rows is by chance
        _, stated = blocks("README.md", "text")
        said, found = ([float(x) for x in re.findall(r"links: test accuracy (\S+)", text)] for text in (stated, out))
        assert len(said) == len(found) == 4
        assert found == pytest.approx(said, abs=0.12)
        assert found == sorted(found)
    if place == ("docs/python.md", 1):
        losses = [float(x) for x in re.findall(r"loss (\S+),", out)]
        assert losses[2] < losses[1] < losses[0] < 1.5
        assert "rank 3\nSequential(" in out


def test_the_task_of_ones_own_runs(model_and_rows, tmp_path, capsys):
    (block,) = blocks("README.md", "yaml")
    config = yaml.safe_load(block)
    config["model"]["init_args"] |= {"model_name": model_and_rows, "gguf_file": None}
    (tmp_path / "my_task.yaml").write_text(yaml.safe_dump(config))
    assert main(shlex.split(re.search(r"`cola (fit --config my_task\.yaml)`", README)[1])) == 0
    out = capsys.readouterr().out
    assert "reviews.csv: 16 rows for training, 2 for validation, 2 for test" in out  # 80, 10 and 10 %
    assert "link 2 live at the end: steps 4 to 6" in out


@pytest.mark.parametrize(("page", "block"), all_blocks("yaml"))
def test_a_config_parses(page, block, tmp_path, monkeypatch, capsys):
    """A part of one with the quickstart's other parts."""
    monkeypatch.setattr(sys, "argv", ["cola"])
    config = yaml.safe_load(block)
    rest = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: part for name, part in rest.items() if name not in config}))
    (tmp_path / "block.yaml").write_text(block)
    words = ["fit", "--config", str(tmp_path / "config.yaml"), "--config", str(tmp_path / "block.yaml"), "--print_config"]
    assert main(words) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    for part in config.keys() & {"model", "data"}:
        assert parsed[part]["class_path"].split(".")[-1] == config[part]["class_path"]
        assert config[part]["init_args"].items() <= parsed[part]["init_args"].items()


# ---------------------------------------------------------------------- commands


def commands(block):
    """The words after each ``cola`` in a block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("cola ", 1)[1]) for line in lines if line.startswith("cola ")]


def test_the_commands_parse(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cola_lightning.study.study.Study", lambda asked, words: SimpleNamespace(run=lambda: 0))
    found = [words for _, block in all_blocks("bash") for words in commands(block)]
    assert len(found) >= 20
    for words in found:
        if words[0] in ("inspect", "export", "generate"):  # which are run below
            continue
        words = [word.replace("runs/version_0/config.yaml", "configs/digits.yaml") for word in words]  # which a fit writes
        words = [word for word in words if word not in ("--model.init_chain", "runs/version_0/checkpoints/last.ckpt")]
        words = [word for word in words if word != "--ckpt_path"]
        assert main(words if words[0] == "compare" else [*words, "--print_config"]) == 0, words
        assert not capsys.readouterr().err


def test_resume_roll_back_and_export_work_line_by_line(tmp_path, monkeypatch, capsys):
    """On a tiny model in place of the quickstart's, and with fewer steps; README's lines are among them."""
    monkeypatch.setattr(sys, "argv", ["cola"])
    monkeypatch.chdir(tmp_path)
    (lines,) = [commands(block) for block in blocks("docs/checkpoints.md", "bash")]
    of_readme = [words for block in blocks("README.md", "bash") for words in commands(block) if words[0] != "fit"]
    lines += [words for words in of_readme if words not in lines]
    small = ["--trainer.max_steps", "6", "--chain.every_n_train_steps", "2", "--trainer.val_check_interval", "2"]
    small += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false"]
    quickstart = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *at_tiny_size("quickstart", tmp_path), *small]
    assert main(["fit", *quickstart]) == 0
    capsys.readouterr()
    for words in lines:
        words = ["8" if word == "100" else word for word in words]
        place = words.index("--config") if "configs/quickstart.yaml" in words else None
        words = words if place is None else [*words[:place], *quickstart, *words[place + 2 :]]
        assert main(words) == 0, words
        assert ("loaded again" in capsys.readouterr().out) is (words[0] == "export"), words
    resumed, rolled_back = (torch.load(f"runs/version_{n}/checkpoints/last.ckpt", weights_only=True) for n in (1, 3))
    assert resumed["global_step"] == 8
    assert len(rolled_back["state_dict"]["cola"]["chain"]["description"]["links"]) == 2 + 2
    assert all(Path(path).exists() for path in ("chain.png", "merged/tokenizer.json", "adapter/adapter_config.json"))
    assert len(Chain.load("chain")) == 2


@pytest.fixture(scope="module")
def options():
    """All options of ``cola``, as its help names them."""
    helps = [[name, "--help"] for name in ("fit", "compare", "inspect", "export", "generate", "configs")]
    helps += [["fit", f"--model.help={name}"] for name in ("COLACausalLM", "COLASequenceClassifier")]
    helps += [["fit", f"--data.help={name}"] for name in ("TemplateDataModule", "PromptDataModule", "TextDataModule")]
    found = {"--print_config", "--help", "--model.optimizer.lr"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cola"])
        for words in helps:
            with pytest.MonkeyPatch.context() as inner:
                text = []
                inner.setattr(sys, "stdout", SimpleNamespace(write=text.append, flush=lambda: None, isatty=lambda: False))
                assert main(words) == 0
            found |= {name.replace(".init_args", "") for name in re.findall(r"--[a-z][\w.]*", "".join(text))}
    return found


def test_every_option_that_is_named_exists(options):
    named = {}
    for page, text in PAGES.items():
        spans = re.findall(r"`((?:--|cola )[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for span in [*spans, *(line for block in blocks(page, "bash") for line in block.splitlines() if line[:5] == "cola ")]:
            for name in re.findall(r"(?<!\S)--[a-z][\w.]*", span.split(" -- ")[0]):
                named[name] = page
    assert len(named) >= 30
    assert {name: page for name, page in named.items() if name not in options} == {}


# ---------------------------------------------------------------------- tables


def test_the_table_of_digits_is_the_benchmarks():
    results = lines_of("digits")
    methods = list(dict.fromkeys(result["method"] for result in results))
    (row,) = table("docs/results.md", f"| | {' | '.join(methods)} |")
    accuracy = [[r["test_accuracy"] for r in results if r["method"] == method] for method in methods]
    assert {len(values) for values in accuracy} == {5}
    expected = [f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" for values in accuracy]
    assert cells(row) == ["accuracy", *expected]


def test_the_table_of_sst2_is_the_benchmarks():
    results = lines_of("sst2")
    methods = list(dict.fromkeys(result["method"] for result in results))
    rows = table("docs/results.md", f"| SST-2 | {' | '.join(methods)} |")
    expected = []
    for part in ("val", "test"):
        values = [[r[f"{part}_accuracy"] for r in results if r["method"] == method] for method in methods]
        assert len({len(value) for value in values}) == 1
        expected.append([f"{part}_accuracy", *(" ".join(f"{x:.3f}" for x in value) for value in values)])
    assert [cells(row) for row in rows] == expected


def test_the_kills_are_the_benchmarks():
    kills = lines_of("kills")
    n_equal = sum(not kill["wrong"] for kill in kills)
    assert f"{n_equal} of {len(kills)} by `python benchmarks/kills.py`" in PAGES["docs/guarantees.md"]
    assert {kill["setup"] for kill in kills} == {"digits", "rolling", "llama"}


def test_the_table_of_speed_is_the_benchmarks():
    results = {(line["what"], line["length"]): line["ratio"] for line in lines_of("speed")}
    columns = ["seconds: cola / peft", "seconds: cola / floor", "peak_mib: cola / peft", "seconds: knot / cola"]
    expected = [[f"{length} tokens a row", *(f"{results[column, length]:.2f}" for column in columns)] for length in (64, 256)]
    assert [cells(row) for row in table("docs/speed.md", "| | time / peft's |")] == expected
    assert f"{results['seconds: 5 links / 1 link', 32]:.2f} times" in PAGES["docs/speed.md"]


def rows_of(name):
    return lambda: importlib.import_module(name).rows(lines_of(name))


# Those of domain_shift are printed by `python benchmarks/domain_shift.py --figure`.
PRODUCED = {
    ("docs/precision.md", "| base | links |"): rows_of("bases"),
    ("docs/speed.md", "| task | command |"): rows_of("commands"),
    ("docs/speed.md", "| | task |"): rows_of("prompts"),
    ("docs/speed.md", "| | start |"): rows_of("rows"),
    ("docs/results.md", "| task | training loss |"): rows_of("tasks"),
    ("docs/results.md", "| paper's task |"): paper_table.rows,
    ("docs/results.md", "| | method | rate |"): lambda: importlib.import_module("benchmarks.digits_splits.table").rows(),
    ("docs/results.md", "| | method | seeds |"): domain_shift.rows_of_scopes,
    ("docs/results.md", "| one knot |"): domain_shift.rows_of_one_knot,
    ("docs/results.md", "| one base |"): domain_shift.rows_of_one_base,
    ("docs/results.md", "| rolling |"): domain_shift.rows_of_rolling,
    ("docs/results.md", "| domain shift |"): domain_shift.rows,
}


@pytest.mark.parametrize("place", PRODUCED, ids=str)
def test_a_table_is_its_benchmarks(place):
    expected = [f"| {' | '.join(row)} |" for row in PRODUCED[place]()]
    assert len(expected) >= 2
    assert table(*place) == expected


def test_the_predictions_in_half_precision_are_the_benchmarks():
    lines = lines_of("half")
    same = {line["model"]: line["same"] for line in lines}
    rows = [cells(row) for row in table("docs/precision.md", "| computed |")]
    models = ("module", "merged", "adapter")
    assert rows == [[f"in {dtype}", *(str(same[f"{model}, {dtype}"]) for model in models)] for dtype in ("float32", "bfloat16")]
    assert max(line["largest_margin"] for line in lines) <= 0.125


# ---------------------------------------------------------------------- links, names, citation


def anchors(path):
    """What headings are called in links, as GitHub and mkdocs make it."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    pages = [ROOT / page for page in (*PAGES, "CONTRIBUTING.md", "CHANGELOG.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", page.read_text())]
    assert len(links) >= 40
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), (page, link)
        assert not anchor or anchor in anchors(target), (page, link)
    for page in PAGES:
        for path in re.findall(r"`(?:python|sh) (benchmarks/\S+)`", PAGES[page]):
            assert (ROOT / path).exists(), path


def test_the_api_reference_is_of_all_public_names():
    named = re.findall(r"^::: cola_lightning\.([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(name.split(".")[-1] for name in named) == sorted(cola_lightning.__all__)
    for name in named:
        place, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(f"cola_lightning.{place}"), attribute)
        assert found is getattr(cola_lightning, attribute)
        assert found.__module__ == f"cola_lightning.{place}"  # where the docstring is
