"""Stages: a run names its links, a stage is found, scaled and measured by that name, and one begins from another."""

import contextlib
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LambdaCallback
from peft import PeftModel
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from cola_lightning import COLACausalLM, COLAModule, UserError
from cola_lightning.chain.chain import Chain
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.peft import AdapterBase, concatenate, write_adapter
from cola_lightning.chain.schedule import ChainSchedule
from cola_lightning.cli import main
from tests.helpers import tiny
from tests.helpers.resuming import Data
from tests.helpers.toy import Toy, ValidatedToy, assert_bit_equal, assert_near, batches, read_csv, saved, toy, trainer, weights

NAMES = ["sft", "sft", "dpo"]
RUN = ["--config", "runs/version_1/config.yaml", "--ckpt_path", "runs/version_1"]


def staged(module):
    """A module with two links of the stage sft, and a live one of dpo."""
    tiny.three_links(module)
    module.chain.links[:] = [replace(link, name="sft") for link in module.chain.links]
    module.run.current.name = "dpo"
    return module


def language_module(folder, **arguments):
    name = tiny.folder(folder / "base", "llama")
    arguments = {"target_modules": ["q_proj", "v_proj"], "rank": 4, "alpha": 6, "seed": 0} | arguments
    return staged(COLACausalLM(name, **arguments))


# ---------------------------------------------------------------------- names


def names(chain):
    return [link.name for link in chain.links]


def test_a_runs_links_have_its_name_in_every_file(tmp_path):
    first = toy()
    run = trainer(tmp_path, chain={"every_n_epochs": 1, "name": "sft"}, max_epochs=2)
    run.fit(first, batches())
    run.save_checkpoint(tmp_path / "sft.ckpt")
    second = toy(init_chain=str(tmp_path / "sft.ckpt"))
    run = trainer(tmp_path, chain={"name": "dpo"}, max_epochs=1)
    run.fit(second, batches())
    run.save_checkpoint(tmp_path / "dpo.ckpt")
    assert names(read_chain(tmp_path / "dpo.ckpt")) == names(second.full_chain()) == NAMES
    loaded = COLAModule.load_from_checkpoint(tmp_path / "dpo.ckpt")
    assert names(loaded.full_chain()) == NAMES
    again = toy()
    again.load_state_dict(loaded.state_dict())
    assert names(again.full_chain()) == NAMES
    loaded.export(tmp_path / "chain", "chain")
    assert names(read_chain(tmp_path / "chain")) == NAMES
    loaded.tie_knot()
    assert names(loaded.full_chain()) == [*NAMES, None]  # outside of a run there is no stage


def test_a_link_that_is_begun_by_hand_after_a_run_has_no_name_until_the_next_one(tmp_path):
    module = toy()
    trainer(tmp_path, chain={"name": "sft"}, max_epochs=1).fit(module, batches())
    module.tie_knot()
    assert module.link_names == ["sft", None]
    module.tie_knot()
    trainer(tmp_path, chain={"name": "dpo"}, max_epochs=1).fit(module, batches())
    assert module.link_names == ["sft", None, "dpo"]


@pytest.mark.parametrize(("name", "is_resumed"), [("dpo", True), (None, False)])
def test_another_name_is_that_of_the_next_link_and_renames_none(tmp_path, name, is_resumed):
    run = trainer(tmp_path, chain={"name": "sft"}, max_epochs=1)
    run.fit(toy(), batches())
    run.save_checkpoint(tmp_path / "run.ckpt")
    module = toy() if is_resumed else Toy.load_from_checkpoint(tmp_path / "run.ckpt")
    run = trainer(tmp_path, chain={"at_epochs": [2], "name": name}, max_epochs=3)
    run.fit(module, batches(), ckpt_path=tmp_path / "run.ckpt" if is_resumed else None)
    assert names(module.full_chain()) == ["sft", name]


@pytest.mark.parametrize("name", ["2", "-1", "all", " ", "start", "link"])
def test_a_name_that_links_would_misread_is_refused(name):
    with pytest.raises(UserError, match=r"^chain\.name: "):
        trainer(Path(), chain={"name": name})


def test_a_stage_is_its_links_and_those_before_them(tmp_path):
    module = staged(toy(rank=4))
    path = saved(module, tmp_path)
    module.export(tmp_path / "chain", "chain")
    for links, n in {"sft": 2, "dpo": 3, "1": 1, 0: 0}.items():
        expected = module.merged_model(n).state_dict()
        assert_bit_equal(module.merged_model(links).state_dict(), expected)
        for source in (path, tmp_path / "chain"):
            assert len(read_chain(source, links)) == n
            begun = toy(init_chain=str(source), init_links=links)
            begun.configure_model()
            assert len(begun.chain) == n
        loaded = COLAModule.load_from_checkpoint(path, links=links).merged_model().state_dict()
        for name, value in loaded.items():
            torch.testing.assert_close(value, expected[name])
    calls = [lambda: read_chain(path, "pdo"), lambda: COLAModule.load_from_checkpoint(path, links="pdo")]
    calls.append(toy(init_chain=str(path), init_links="pdo").configure_model)
    for call in calls:
        with pytest.raises(UserError, match=r"^links: .*'pdo'.* sft, dpo$"):
            call()


# ---------------------------------------------------------------------- factors


OWN_SIZES = {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 2}}


@pytest.mark.parametrize(
    "arguments",
    [{}, OWN_SIZES, {"finished_links": "stack", "quantization": "nf4"} | OWN_SIZES],
    ids=["merge", "own sizes", "stack"],
)
def test_a_scaled_chain_is_pefts_weighted_adapter(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    module = language_module(tmp_path, **arguments)
    path, chain = saved(module, tmp_path), module.full_chain()
    for k, link in enumerate(chain.links):
        alone, folder = Chain([link], chain.base), tmp_path / f"link-{k}"
        folder.mkdir()
        write_adapter(folder, alone, AdapterBase(module.merged_model(0), "base", []), concatenate(alone))
    weighted = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "link-0", "0")
    for k in (1, 2):
        weighted.load_adapter(tmp_path / f"link-{k}", str(k))
    weighted.add_weighted_adapter(["0", "1", "2"], [-1.5, 1.0, 0.5], "weighted", combination_type="cat")
    weighted.set_adapter("weighted")
    expected = tiny.logits(weighted)
    scaled = COLAModule.load_from_checkpoint(path, scale={"dpo": 0.5, "0": -1.5})
    for model in (scaled.model, scaled.merged_model()):
        assert tiny.relative_difference(tiny.logits(model), expected) <= 1e-6
    assert tiny.relative_difference(tiny.logits(module.model), expected) > 1e-2
    without, first = (COLAModule.load_from_checkpoint(path, **one) for one in ({"scale": {"dpo": 0}}, {"links": "sft"}))
    assert len(without.chain) == 2
    assert tiny.relative_difference(tiny.logits(without.model), tiny.logits(first.model)) <= 1e-6


def test_what_is_trained_whole_is_not_scaled(tmp_path):
    module = language_module(tmp_path, modules_to_save=["norm", "input_layernorm"])
    path, whole = saved(module, tmp_path), module.merged_model()
    trained = {name: value for name, value in whole.state_dict().items() if "norm" in name and "post" not in name}
    assert len(trained) == 3
    for scale in ({"dpo": 0.5}, {"dpo": 0}, {"sft": 0, "dpo": 0}):
        loaded = COLAModule.load_from_checkpoint(path, scale=scale)
        values = loaded.merged_model().state_dict()
        assert_bit_equal({name: values[name] for name in trained}, trained)
    assert_bit_equal(values, module.merged_model(0).state_dict() | trained)  # then there is nothing else
    assert_bit_equal(read_chain(path).scaled({"dpo": 0}).links[-1].extras, trained)  # which a chain folder or an adapter gets


def test_an_export_is_the_scaled_model(tmp_path, capsys):
    module = language_module(tmp_path, modules_to_save=["norm"])
    path = saved(module, tmp_path)
    scale = {"dpo": 0.5, "0": 0}
    words = ["export", str(path), "--scale", yaml.safe_dump(scale, default_flow_style=True).strip()]
    expected = tiny.logits(COLAModule.load_from_checkpoint(path, scale=scale).model)
    for kind in ("merged", "peft", "chain"):
        assert main([*words, "--format", kind, "--output", str(tmp_path / kind)]) == 0
    assert "differ from the module's by at most " in capsys.readouterr().out
    assert tiny.relative_difference(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) <= 1e-6
    adapter = PeftModel.from_pretrained(module.merged_model(0), tmp_path / "peft")
    assert adapter.peft_config["default"].r == 2 + 3  # without link 0's
    assert tiny.relative_difference(tiny.logits(adapter), expected) <= 1e-6
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"], "seed": 0}
    begun = COLACausalLM(str(tmp_path / "base"), **options, init_chain=str(tmp_path / "chain"))
    assert tiny.relative_difference(tiny.logits(begun.model), expected) <= 1e-6
    facts = [(link.index, link.name, link.alpha, link.metrics) for link in read_chain(tmp_path / "chain").links]
    assert facts == [(0, "sft", 5.0, {}), (1, "dpo", 3.5, {})]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| 0 (sft) | 0 | 2 | 5 |" in card
    assert "| 1 (dpo) | 0 | 3 | 3.5 |" in card


def test_text_is_generated_with_the_scaled_model(tmp_path, capfd):
    path, printed = saved(language_module(tmp_path), tmp_path), []
    for more in ([], ["--links", "sft"], ["--scale", "{dpo: 0}"]):
        assert main(["generate", str(path), "--prompt", "Is the town old?", "--max_new_tokens", "8", *more]) == 0
        printed.append(capfd.readouterr().out)
    assert printed[1] == printed[2] != printed[0]


def test_metrics_from_the_first_scaled_link_on_are_of_another_model_and_go():
    chain = staged(toy(rank=4)).full_chain()
    for link in chain.links:
        link.metrics["val_loss"] = 1.0
    assert [link.metrics for link in chain.scaled({1: 0.5}).links] == [{"val_loss": 1.0}, {}, {}]
    for scale, message in (({3: 1}, "3.* sft, dpo"), ({"1": math.nan}, "1 must be a finite number, got nan")):
        with pytest.raises(UserError, match=f"^scale: .*{message}"):
            chain.scaled(scale)


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def _two_runs(tmp_path_factory):
    """Two runs of a language model: two links named sft, and on them one named dpo; layer norms are trained whole."""
    folder = tiny.make_language_folder(tmp_path_factory.mktemp("staged"))
    words = ["fit", "--config", "config.yaml", "--model.modules_to_save", "[final_layer_norm]"]
    with contextlib.chdir(folder):
        for name, epochs, more in (("sft", "2", []), ("dpo", "1", ["--model.init_chain", "runs/version_0"])):
            assert main([*words, "--chain.name", name, "--trainer.max_epochs", epochs, *more]) == 0
    return folder


@pytest.fixture
def _folder(_two_runs, tmp_path, monkeypatch):
    shutil.copytree(_two_runs, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")


def measured(*words):
    """The metrics that a test of the second run writes."""
    before = set(Path().rglob("metrics.csv"))
    assert main(["test", *RUN, *words]) == 0
    (path,) = set(Path().rglob("metrics.csv")) - before
    return [{name: row[name] for name in row if name.startswith("test_")} for row in read_csv(path)], path.parent


@pytest.mark.usefixtures("_folder")
def test_a_table_shows_what_each_link_did_to_the_data(capfd):
    rows, folder = measured("--links", "all")
    out = capfd.readouterr().out
    table = read_csv(folder / "links.csv")
    assert [(row["links"], row["stage"]) for row in table] == [("0", "base"), ("1", "sft"), ("2", "sft"), ("3", "dpo")]
    assert [{name: row[name] for name in rows[0]} for row in table] == rows
    assert measured("--links", "sft")[0] == [rows[2]]  # to the last digit
    (halved,), _ = measured("--scale", "{dpo: 0.5}")
    assert len({row["test_loss"] for row in [*rows, halved]}) == 4 + 1
    config = yaml.safe_load(max(Path().rglob("test/*/config.yaml")).read_text())
    assert config["scale"] is config["links"] is None  # else a later command with this file would scale its own checkpoint
    lines = [line.split() for line in out.splitlines()]
    header = lines.index([name.removeprefix("test_") for name in table[0]])
    assert [line[:2] for line in lines[header + 2 : header + 6]] == [["0", "base"], ["1", "sft"], ["2", "sft"], ["3", "dpo"]]
    assert lines[header + 5][2:] == [f"{float(table[3][name]):.4g}" for name in list(table[3])[2:]]


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test", *RUN, "--links", "pdo"], "links: .*'pdo'.* sft, dpo"),
        (["test", *RUN, "--scale", "{pdo: 1}"], "scale: .*'pdo'.* sft, dpo"),
        (["test", *RUN[:2], "--scale", "{dpo: 1}"], "links, scale: .*--ckpt_path"),
    ],
)
def test_a_mistake_is_one_line(words, message, capfd):
    before = sorted(Path().rglob("*"))
    assert main(words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(f"error: {message}", line), line
    assert sorted(Path().rglob("*")) == before


# ---------------------------------------------------------------------- the last link of the stage before

KEPT = {"cola": None, "half": 0.5, "record": 1.0}  # of B


def make(**arguments):
    return toy(ValidatedToy, **{"optimizer": lambda p: AdamW(p, lr=1e-2), "rank": 2} | arguments)


def fit(folder, module, steps, *, at=None, ckpt_path=None, **chain):
    """With checkpoints of every step."""

    def save(run, *_):
        run.save_checkpoint(folder / f"{run.global_step}.ckpt")

    run = trainer(folder, LambdaCallback(on_train_batch_end=save), chain={"at_steps": at, **chain}, max_steps=steps)
    run.fit(module, Data(batch_size=4), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize(("knot", "finished_links"), [("cola", "stack"), ("half", "merge"), ("record", "stack")])
def test_a_stage_begins_with_a_knot_and_resumes(tmp_path, finished_links, knot):
    """Its knots inside are of another kind."""
    options, ((x, _),) = {"finished_links": finished_links}, batches(1)
    first = fit(tmp_path / "sft", make(**options), 7, at=[4], name="sft")
    live = first.live_link()
    options |= {"init_chain": str(tmp_path / "sft" / "7.ckpt"), "init_knot": knot}
    begun = make(**options)
    begun.configure_model()
    assert_near(begun(x), first(x), 1e-6)
    assert [link.share for link in begun.chain.links] == [1.0, 1.0 - (KEPT[knot] or 0.0)]
    assert not begun.run.current.is_trained
    for name, layer in begun.adapted.layers.items():
        lora_A, lora_B = live.factors[name]
        assert torch.equal(layer.lora_A, lora_A) is (knot != "cola")
        assert torch.equal(layer.lora_B, lora_B * (KEPT[knot] or 0))

    inside = {"at": [4], "name": "dpo", "knot": "record"}
    second = fit(tmp_path / "dpo", make(**options), 8, **inside)
    assert second.link_names == ["sft", "sft", "dpo", "dpo"]
    assert second.run.current.is_trained
    assert_bit_equal(weights(second.merged_model("sft")), weights(first.merged_model()))
    with second.at("sft") as model:
        assert_near(model(x), first(x), 1e-6)
    resumed = fit(tmp_path / "resumed", make(**options), 8, **inside, ckpt_path=tmp_path / "dpo" / "4.ckpt")  # at a knot
    assert_bit_equal(weights(resumed), weights(second))
    assert second.chain.is_beginning_of(resumed.chain)
    assert resumed.link_names == second.link_names
    for links in (2, 3):
        loaded = ValidatedToy.load_from_checkpoint(tmp_path / "dpo" / "8.ckpt", links=links)
        assert_bit_equal(weights(loaded.merged_model()), weights(second.merged_model(links)))


def test_a_link_that_began_with_a_rest_is_not_begun_again(tmp_path):
    fit(tmp_path, make(), 2)
    begun, ((x, _),) = make(init_chain=str(tmp_path / "2.ckpt"), init_knot="half"), batches(1)
    begun.configure_model()
    before = begun(x)
    with pytest.raises(UserError, match=r"^restart_link: "):
        begun.restart_link(rank=1)
    begun.run.schedule = ChainSchedule(ranks=[1])
    begun.run.begin_as_scheduled()
    assert torch.equal(begun(x), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 1}, r"^model\.init_knot: with half, .* 2 and 4, got 1 and 4$"),
        ({"alpha_pattern": {"0": 3}}, r"^model\.rank_pattern, model\.alpha_pattern, model\.use_rslora: "),
    ],
)
def test_another_rank_or_alpha_cannot_go_on(tmp_path, arguments, message):
    fit(tmp_path, make(), 2)
    with pytest.raises(UserError, match=message):
        make(init_chain=str(tmp_path / "2.ckpt"), init_knot="half", **arguments).configure_model()


def test_it_is_an_option_of_the_first_chain(tmp_path):
    with pytest.raises(UserError, match=r"^model\.init_knot: needs model\.init_chain$"):
        COLACausalLM("any", init_knot="record")
    fit(tmp_path, make(), 2)
    options = {"init_chain": str(tmp_path / "2.ckpt"), "target_modules": "all-linear"}
    fit(tmp_path / "run", make(**options), 1)
    with pytest.raises(UserError, match=r"^model\.init_chain: must be "):
        fit(tmp_path, make(**options, init_knot="record"), 2, ckpt_path=tmp_path / "run" / "1.ckpt")
