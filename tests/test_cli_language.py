"""Language models from the command line: a run and what follows it, and every mistake in one line."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cola_lightning.cli import main
from tests import forked, tiny

CONFIG = """
seed_everything: 0
model:
  class_path: COLACausalLM
  init_args:
    model_name: model
    target_modules: [q_proj, v_proj]
    rank: 2
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: PromptDataModule
  init_args: {task: SST2, source: rows, batch_size: 4, train_size: 24, val_size: 16, test_size: 10}
chain: {every_n_epochs: 1}
trainer:
  max_epochs: 2
  accelerator: cpu
  num_sanity_val_steps: -1
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cola"])  # LightningCLI warns of arguments that are given twice
    tiny.folder("model", "opt")
    words = [("great", 1), ("terrible", 0)]
    rows = [{"sentence": f"film {k} with {words[k % 2][0]} actors ", "label": words[k % 2][1]} for k in range(40)]
    for folder, label in (("rows", "label"), ("renamed", "gold")):
        Path(folder).mkdir()
        lines = [json.dumps({"sentence": row["sentence"], label: row["label"]}) + "\n" for row in rows]
        Path(folder, "train.jsonl").write_text("".join(lines))
        Path(folder, "validation.jsonl").write_text("".join(lines[::-1]))
    Path("config.yaml").write_text(CONFIG)


def fit(*arguments):
    return main(["fit", "--config", "config.yaml", *arguments])


# Lightning's advice about folders that are used again.
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_fit_tells_where_it_began_and_each_link_and_predict_writes_scores(capfd):
    assert fit() == 0
    out = capfd.readouterr().out
    (before,) = [line for line in out.splitlines() if line.startswith("before training: ")]
    assert "val_accuracy 0.5" in before
    links = [line for line in out.splitlines() if line.startswith("link ")]
    assert [line.partition(":")[0] for line in links] == ["link 0 finished", "link 1 live at the end"]
    assert all("val_accuracy" in line and "val_loss" in line for line in links)
    (command,) = [line for line in out.splitlines() if line.startswith("use it: ")]
    arguments = command.removeprefix("use it: cola test ").partition(" (")[0].split()
    for subcommand in ("validate", "test", "predict"):
        assert main([subcommand, *arguments]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(10))
    assert set(rows[0]) == {"index", "prediction", "target", "prompt", "options", "scores"}
    for row in rows:
        assert row["prompt"].startswith("film ")
        assert row["target"] == int("great" in row["prompt"])
        assert row["options"] == [" terrible", " great"]
        assert row["scores"][row["prediction"]] == max(row["scores"])
        assert all(score < 0 for score in row["scores"])


def fit_responses(capfd, splits, chat=None, **how):
    """Fits instructions, and tries them by the command that its last line names; the arguments of further commands."""
    Path("own").mkdir()
    rows = [{"prompt": f"Is town {k} old? ", "response": "Yes"} for k in range(8)]
    for split in splits:
        Path("own", f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tiny.tokenizer("opt")
    own.chat_template = chat
    own.save_pretrained("model")
    data = {"class_path": "TextDataModule", "init_args": {"source": "own", "max_new_tokens": 4} | how}
    Path("text.yaml").write_text(CONFIG.partition("data:")[0] + f"data: {json.dumps(data)}\n")
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "text.yaml", *trainer]) == 0
    (checkpoint,) = map(str, Path("runs").rglob("last.ckpt"))
    (try_,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("try it: ")]
    assert try_ == f"try it: cola generate --checkpoint {Path(checkpoint).absolute()} --prompt TEXT"
    assert main(shlex.split(try_.removeprefix("try it: cola ").replace("TEXT", "Old?"))) == 0
    return ["--config", "runs/version_0/config.yaml", "--ckpt_path", checkpoint]


def test_instructions_are_trained_and_a_fits_last_line_names_a_command_that_works(capfd):
    arguments = fit_responses(capfd, ["train", "validation", "test"])
    metrics = Path("runs/version_0/metrics.csv").read_text()
    assert "val_loss" in metrics
    assert "accuracy" not in metrics
    for subcommand in ("predict", "test", "validate"):
        assert main([subcommand, *arguments]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["index"], row["target"]) for row in rows] == [(k, "Yes") for k in range(8)]


def test_rows_to_test_on_are_drawn_where_there_are_none_and_predict_takes_prompts_alone(capfd):
    arguments = fit_responses(capfd, ["train"], chat=tiny.CHAT, val_size=2)
    assert [main([subcommand, *arguments]) for subcommand in ("validate", "test")] == [0, 0]
    Path("new").mkdir()
    Path("new", "asked.jsonl").write_text('{"prompt": "Is it?"}\n{"prompt": "Old?"}\n')
    for new in (["--data.source", "new", "--data.test_split", "asked"], ["--data.source", "new/asked.jsonl"]):
        assert main(["predict", *arguments, *new]) == 0
        (path,) = Path("runs").rglob("predictions.jsonl")
        assert [json.loads(line)["target"] for line in path.read_text().splitlines()] == [None, None]
        path.unlink()


def test_one_command_without_a_config_is_a_run(capfd):
    Path("own.jsonl").write_text("".join(f'{{"prompt": "Town {k}? ", "response": "Yes"}}\n' for k in range(20)))
    few = [
        "--data.max_new_tokens=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.limit_train_batches=1",
    ]
    assert main(["fit", "--model.model_name", "model", "--data.source", "own.jsonl", "--chain.every_n_epochs", "1", *few]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("link ")]) == 3
    (try_,) = [line.removeprefix("try it: cola ") for line in lines if line.startswith("try it: ")]
    assert main(shlex.split(try_)) == 0


OWN = """
from cola_lightning import Example, OptionDataModule


class Parity(OptionDataModule):
    source = "of no option"

    def __init__(self):
        super().__init__(4)

    def setup(self, stage):
        examples = [Example(f"The number {n} is", (" even", " odd"), n % 2) for n in range(8)]
        self.train = self.val = self.test = self.encode(examples)


class Sourced(Parity):
    prompt_format = {"system": "Be brief."}

    def __init__(self, source: str = "rows"):
        super().__init__()
        self.source = source


class Prompted(Parity):
    prompt_format = "The number {n} is"
"""


@pytest.mark.parametrize("name", ["Parity", "Sourced", "Prompted"])
def test_a_fit_on_data_of_ones_own_is_tested_and_exported(monkeypatch, capfd, name):
    Path("own_parity.py").write_text(OWN)
    monkeypatch.syspath_prepend(".")
    Path("own.yaml").write_text(CONFIG.partition("data:")[0] + f"data: {{class_path: own_parity.{name}}}\n")
    words = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", "own.yaml", *words]) == 0
    (use,) = [line.removeprefix("use it: cola ") for line in capfd.readouterr().out.splitlines() if line.startswith("use it: ")]
    assert main(shlex.split(use)) == 0
    checkpoint = "runs/version_0/checkpoints/last.ckpt"
    assert main(["export", "--checkpoint", checkpoint, "--format", "merged", "--output", "merged"]) == 0


def test_two_processes_are_one():
    """With batches of half the size; what they predict comes back once a row, in order."""
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    checkpoint = ["--config", "runs/version_0/config.yaml", "--ckpt_path", "runs/version_0/checkpoints/last.ckpt"]
    for arguments in (["fit", "--config", "config.yaml", *two, "--data.batch_size", "2"], ["predict", *checkpoint]):
        forked.run("-m", "cola_lightning", *arguments, check=True)  # it starts the second
    (path,) = Path("runs").rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()

    assert fit() == 0
    assert main(["predict", *checkpoint, "--trainer.strategy", "auto", "--trainer.devices", "1"]) == 0
    (path,) = Path("runs").rglob("predictions.jsonl")
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(10))
    for row, alone in zip(rows, expected, strict=True):
        assert row.pop("scores") == pytest.approx(alone.pop("scores"), abs=1e-5)
        assert row == alone
    losses = []
    for path in sorted(Path("runs").rglob("metrics.csv")):
        lines = csv.DictReader(path.read_text().splitlines())
        losses.append([float(line["val_loss"]) for line in lines if line["val_loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


BAD = [
    (["--data.source", "nowhere/at/all"], "data.source: expected a file, a folder or a data set on the hub"),
    (["--data.source", "renamed"], "expected the field 'label', received 'sentence', 'gold'"),
    (
        ["--data.train_size", "30"],
        "data.train_size + data.val_size, of rows, train: expected at least 46",
    ),
    (["--data.task", "SST"], "DROP, received 'SST'; the nearest that exist: SST2"),
    (["--data.tsak", "SST2"], "Option 'tsak' is not accepted"),
    (["--data.max_length", "1"], "data.max_length: expected at least 2 tokens, received 1"),
    (["--data.batch_size", "0"], "data.batch_size: expected a whole number of at least 1, received 0"),
    (
        ["--model.model_name", "./nowhere"],
        "model.model_name: expected a model that AutoTokenizer can load, received './nowhere': ",
    ),
    (["--model.model_name", "package:nothing_such"], "expected the import name of an installed package after package:"),
    (["--model.model_name", "rows"], "model.model_name: expected a model that AutoTokenizer can load, received 'rows': "),
    (["--model.gguf_file", "x.gguf"], "model.model_name: expected a model that AutoTokenizer can load, received 'model': "),
    (["--model.finished_links", "stak"], "model.finished_links: expected Literal['merge', 'stack'], received 'stak'"),
    (["--model.quantization", "int8"], "model.quantization: expected Literal['nf4'], received 'int8'"),
    (
        ["--model.quantization", "nf4"],
        "model.finished_links: expected stack for the quantised weight of",
    ),
    (["--trainer.precision", "16-mixed"], "where Lightning replaces 16-mixed by bf16-mixed"),
    (["--trainer.precision", "bf17"], "trainer.precision: "),
    (["--model.dtype", "float31"], "model.dtype: expected Literal['float32', 'bfloat16', 'float16'], received 'float31'"),
    (["--model.target_modules", "[lm_head]"], "'lm_head', whose weight is shared"),
    (["--model.target_modules", "[q_porj]"], "received 'q_porj'; the nearest that exist: q_proj"),
    (["--model.rnak", "2"], "Option 'rnak' is not accepted"),
    (["--model.attn_implementation", "none_such"], "none_such"),
    (["--model", "COLASequenceClassifer"], "COLASequenceClassifer"),
]


@pytest.mark.filterwarnings("ignore:You passed `Trainer.accelerator='cpu', precision='16-mixed'")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(arguments, message, capfd):
    before = sorted(Path().rglob("*"))
    assert fit(*arguments) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert sorted(Path().rglob("*")) == before


def test_a_hub_that_is_needed_and_not_reached_is_one_line():
    fields = ["model.model_name", "data.source"]
    program = "import os; os.environ['HF_HUB_OFFLINE'] = '1'; os.environ['HF_HOME'] = 'cache'"
    program += "; from cola_lightning.cli import main; given = '=no-such-owner/no-such-name'"
    program += f"; print([main(['fit', '--config', 'config.yaml', '--' + field + given]) for field in {fields}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[2, 1]", done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert [" ".join(line.split()[:2]) for line in errors] == [f"error: {field}:" for field in fields], done.stderr
    assert "We couldn't connect to" in errors[0]  # transformers' own words
    assert "the Hugging Face hub cannot be reached" in errors[1]
    assert "Traceback" not in done.stderr
    assert not Path("runs").exists()


QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.yaml")


@tiny.needs_smollm2
def test_the_quickstart_trains_and_validates_in_small(capfd):
    small = ["--trainer.max_steps", "2", "--chain.every_n_train_steps", "1", "--trainer.limit_val_batches", "1"]
    small += [
        "--trainer.val_check_interval",
        "1",
        "--trainer.callbacks",
        "null",
        "--data.batch_size",
        "2",
        "--data.eval_batch_size",
        "4",
    ]
    assert main(["fit", "--config", QUICKSTART, "--data.source", str(tiny.REVIEWS), *small]) == 0
    out = capfd.readouterr().out
    assert "before training: val_loss" in out
    assert "link 0 finished: steps 0 to 1" in out


@tiny.needs_smollm2
@pytest.mark.slow
def test_the_quickstart_gets_from_chance_to_90_percent(capfd):
    assert main(["fit", "--config", QUICKSTART, "--data.source", str(tiny.REVIEWS)]) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "val_accuracy" in line and "Epoch" not in line]
    accuracies = [float(line.rpartition("val_accuracy ")[2]) for line in told if line.startswith(("before", "link"))]
    assert len(accuracies) == 4
    assert accuracies[0] < 0.7
    assert accuracies[-1] >= 0.9
