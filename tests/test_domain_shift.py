"""The example of a module of one's own: a GPT on bytes that is pre-trained on English and adapted to Python."""

import doctest
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import byte_gpt
from benchmarks import domain_shift as benchmark
from benchmarks.byte_gpt import (
    ByteGPT,
    COLAByteGPT,
    PythonSourceDataModule,
    english_passages,
    next_byte_loss,
    pretrained,
    python_sources,
    windows,
)
from cola_lightning import COLAModule, UserError
from cola_lightning.study.config import resolved
from cola_lightning.study.methods import method
from cola_lightning.study.results import Result, write
from tests import tiny
from tests.toy import assert_bit_equal, trainer, weights

ROOT = Path(__file__).parent.parent
SIZES = {"depth": 1, "width": 16, "heads": 2, "context": 8}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """English of a few sentences, and an empty cache folder."""
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "english")))
    monkeypatch.setenv("COLA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_docstrings_examples_are_right():
    assert doctest.testmod(byte_gpt) == (0, 3)


def test_no_logit_sees_a_later_byte():
    model = ByteGPT(**SIZES)
    tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(tokens)[:, 5:], model(changed)[:, 5:])


def test_pretraining_learns_english(cache):
    text = windows(english_passages(), 8)
    before, after = (next_byte_loss(pretrained(steps, **SIZES), text).item() for steps in (1, 60))
    assert before > 5.3
    assert after < 4


def test_a_cache_that_cannot_be_written_is_refused_before_pretraining(cache, monkeypatch):
    cache.touch()
    monkeypatch.setattr(byte_gpt, "_pretrain", None)
    with pytest.raises(UserError, match=r"COLA_CACHE_DIR: expected a folder that can be written, .* is a file"):
        pretrained(3, **SIZES)


def test_the_base_is_trained_once_and_then_read(cache, monkeypatch):
    first = pretrained(3, **SIZES)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(byte_gpt, "_pretrain", lambda *_: pytest.fail("trained again"))
    torch.manual_seed(5)
    assert_bit_equal(weights(pretrained(3, **SIZES)), weights(first))


@pytest.mark.parametrize("other", [{"steps": 4}, {"width": 32}])
def test_another_recipe_is_another_file(cache, other):
    pretrained(**{"steps": 3} | SIZES)
    pretrained(**{"steps": 3} | SIZES | other)
    assert len(list(cache.iterdir())) == 2


def test_another_corpus_is_another_file(cache, tmp_path, monkeypatch):
    pretrained(3, **SIZES)
    monkeypatch.setenv("COLA_DATA_DIR", str(tiny.english(tmp_path / "other", "Another passage, of its own.")))
    pretrained(3, **SIZES)
    assert len(list(cache.iterdir())) == 2


def test_a_pretraining_that_stops_leaves_no_file(cache, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(byte_gpt, "save_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        pretrained(3, **SIZES)
    assert list(cache.iterdir()) == []


def test_every_seed_has_the_same_base(cache):
    modules = [COLAByteGPT(**SIZES, pretrain_steps=2, rank=1, seed=seed) for seed in (0, 1)]
    assert_bit_equal(*(weights(module.merged_model(0)) for module in modules))


def test_a_chain_of_the_example_trains_and_is_loaded_again(cache, tmp_path):
    module = COLAByteGPT(**SIZES, pretrain_steps=2, target_modules=["qkv", "up"], rank=1, seed=0)
    data = PythonSourceDataModule(context=8, batch_size=4, eval_size=16, train_size=32)
    run = trainer(tmp_path, chain={"every_n_train_steps": 2}, max_epochs=1)
    run.fit(module, data)
    assert module.link == 3
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = COLAModule.load_from_checkpoint(tmp_path / "run.ckpt")
    (tested,) = run.test(again, data, verbose=False)
    (expected,) = run.test(module, data, verbose=False)
    assert tested == expected
    assert run.predict(again, data)[0].keys() == {"prediction", "target"}


def test_training_validation_and_test_share_no_window():
    data = PythonSourceDataModule(context=64, eval_size=128)
    data.setup("fit")
    assert len(data.train) == (len(python_sources()) * 9 // 10 - 1) // 64
    text = python_sources()
    places = [[int(windows(text, 64)[k, 0]) for k in (0, 1)], data.train[:2, 0].tolist()]
    assert places[0] == places[1]
    val, test = ({bytes(row.tolist()) for row in part} for part in (data.val, data.test))
    assert len(data.val) == len(data.test) == 128
    assert len(val & test) < 3  # a row of dashes may come twice


def test_the_studies_commands_ask_for_what_there_is():
    for stage in benchmark.STAGES:
        words = stage.words[1:]
        cut = words.index("--")
        given = dict(zip(words[:cut:2], words[1:cut:2], strict=True))
        methods = given["--methods"].strip("[]").split(", ")
        config = resolved(["--config", str(ROOT / "configs" / "domain_shift.yaml"), *words[cut + 1 :]])
        assert config["trainer"]["max_steps"] == stage.steps
        assert config["model"]["init_args"]["alpha"] == 2 * stage.rank
        assert [method(name, config).name for name in methods] == methods == list(stage.rates)
        assert set(methods) <= benchmark.NAMES.keys()


def test_the_studies_run_anew_in_another_folder(tmp_path, monkeypatch, capsys):
    def run(words):
        (folder,) = {Path(after) for word, after in pairwise(words) if word == "--output"}
        folders.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = words[words.index("--methods") + 1].strip("[]").split(", ")
        facts = {"steps": 800, "seconds": 1.0, "peak_memory": 1.0, "trainable_parameters": 1, "curve": [[400, 2.0], [800, 1.5]]}
        write([Result(name, 0, 0.02, 1, 1, 1.5, 1.5, **facts) for name in names], folder / "results.jsonl")

    folders = []
    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark, "FOLDER", benchmark.FOLDER)
    committed = {stage.folder for stage in benchmark.STAGES}
    monkeypatch.setattr("sys.argv", ["domain_shift.py", "--output", str(tmp_path / "anew")])
    benchmark.main()
    assert {folder.parent for folder in folders} == {tmp_path / "anew"}
    assert {folder.name for folder in folders} == {folder.name for folder in committed}
    assert "1.500" in capsys.readouterr().out
    assert (tmp_path / "anew.png").exists()


def test_the_studies_table_and_figure_are_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)
    facts = {"steps": 800, "seconds": 1.0, "peak_memory": 1.0, "trainable_parameters": 1, "curve": [[400, 2.0], [800, 1.5]]}
    values = {("lora", 0): 1.5, ("lora", 1): 1.6, ("cola-4", 0): 1.4, ("cola-4", 1): 1.45}
    results = [
        Result(name, seed, 0.02, 1, 4 if "4" in name else 1, value, value, knots=[600], **facts)
        for (name, seed), value in values.items()
    ]
    write(results, tmp_path / "rank-1-steps-800" / "results.jsonl")
    assert benchmark.rows() == [
        ["rank 1, 800 steps", "LoRA", "0.02", "2", "1.550 ± 0.071", ""],
        ["rank 1, 800 steps", "4 links", "0.02", "2", "1.425 ± 0.035", "-0.125 [-0.443, +0.193]"],
    ]
    benchmark.draw(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
