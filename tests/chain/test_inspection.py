"""The numbers, the table and the picture of a chain's links."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.chain import Chain, Link
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.report import effective_rank, report, singular_values, table, to_json
from cola_lightning.cli import main
from tests.helpers import tiny

SHAPES = {"wide": (5, 9), "high": (12, 4), "square": (6, 6), "small": (2, 3)}  # out, in


def factors(rank, *names):
    return {name: (torch.randn(rank, SHAPES[name][1]), torch.randn(SHAPES[name][0], rank)) for name in names}


def link(index, rank, *names, **facts):
    steps = {"start_step": 10 * index, "end_step": 10 * index + 7}
    return Link(index, rank, alpha=3.0, **steps, factors=factors(rank, *names), **facts)


@pytest.fixture
def chain():
    """Three links of falling rank that adapt different layers; the last one's update is zero."""
    torch.manual_seed(0)
    links = [link(0, 4, "wide", "high", "small"), link(1, 2, "wide", "high", "square"), link(2, 1, "square")]
    links[2].factors["square"][1].zero_()
    links[0].metrics.update(train_loss=1.0, val_loss=0.38912)
    links[1].metrics["val_[red]x"] = math.nan
    return Chain(links, BaseIdentity(weight_norms={"wide": 20.0, "high": 10.0, "square": 5.0, "small": 2.0}))


def test_a_report_is_what_the_full_updates_say(chain):
    reports = report(chain)
    assert [one.total_rank for one in reports] == [4, 6, 7]
    for one, finished in zip(reports, chain.links, strict=True):
        assert (one.index, one.rank, one.alpha, one.steps) == (finished.index, finished.rank, 3.0, 7)
        updates = {name: finished.scaling_of(name) * B.double() @ A.double() for name, (A, B) in finished.factors.items()}
        norms = {name: float(update.norm()) for name, update in updates.items()}
        for name, update in updates.items():
            expected = torch.linalg.svdvals(update)[: finished.rank]
            found = singular_values(*finished.factors[name], finished.scaling_of(name))
            unused = [0.0] * (finished.rank - len(expected))  # of a matrix with fewer rows than the rank
            assert found.tolist() == pytest.approx([*expected.tolist(), *unused], rel=1e-10, abs=1e-12)
        assert one.update_norm == pytest.approx(math.hypot(*norms.values()))
        of_base = math.hypot(*chain.base.weight_norms.values())
        assert one.relative_norm == pytest.approx(math.hypot(*norms.values()) / of_base)
        assert one.max_norm == pytest.approx(max(norm / chain.base.weight_norms[name] for name, norm in norms.items()))
        ranks = [effective_rank(torch.linalg.svdvals(update)[: finished.rank]) for update in updates.values()]
        assert one.effective_rank == pytest.approx(sum(ranks) / len(ranks))
    assert reports[0].metrics == {"val_loss": 0.38912}  # of validation, if there is one


def test_a_table_shows_every_number_whole_and_json_is_strict(chain):
    rows = to_json(report(chain))
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[1]["metrics"] == {"val_[red]x": None}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table(report(chain)))
    text = capture.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "val_loss 0.389" in text
    assert "val_[red]x nan" in text  # no markup
    assert text.splitlines()[-1].split()[:4] == ["2", "1", "3", "7"]
    assert table(report(Chain())).row_count == 0


def test_adapters_are_shown_with_their_own_names_and_numbers_and_relative_to_a_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tiny.folder(tmp_path / "base")
    for name, fields in {"sft": {"r": 4, "lora_alpha": 8}, "dpo": {"r": 2, "lora_alpha": 3, "use_rslora": True}}.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **fields)
        get_peft_model(model, config).save_pretrained(tmp_path / "out" / name)
    adapters = ["out/sft", "out/dpo"]
    assert main(["inspect", *adapters, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["rank"], row["alpha"]) for row in rows] == [("sft", 4, 8.0), ("dpo", 2, 3.0)]
    assert main(["inspect", *adapters]) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith("effective total link stage rank alpha ‖ΔW‖ rank rank ─")
    assert main(["inspect", *adapters, "--base", base]) == 0
    assert "‖W₀‖" in capsys.readouterr().out
    assert main(["inspect", *adapters, "--base", base, "--json"]) == 0
    weight = AutoModelForCausalLM.from_pretrained(base).state_dict()["model.layers.0.self_attn.q_proj.weight"]
    chain = read_chain(adapters[:1])
    of_layer = chain.delta("model.layers.0.self_attn.q_proj").norm() / weight.norm()
    assert json.loads(capsys.readouterr().out)[0]["max_norm"] >= float(of_layer) * 0.999
