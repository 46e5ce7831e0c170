"""The numbers, the table and the picture of a chain's links."""

import json
import math
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from cola_lightning.chain import BaseIdentity, Chain, Link
from cola_lightning.chain.report import effective_rank, plot, report, singular_values, table, to_json
from cola_lightning.errors import DiskError

SHAPES = {"wide": (5, 9), "high": (12, 4), "square": (6, 6), "small": (2, 3)}  # out, in


def factors(rank, *names):
    return {name: (torch.randn(rank, SHAPES[name][1]), torch.randn(SHAPES[name][0], rank)) for name in names}


def link(index, rank, *names, **facts):
    steps = {"start_step": 10 * index, "end_step": 10 * index + 7}
    return Link(index, rank, alpha=3.0, **steps, factors=factors(rank, *names), **facts)


def full_update(one, name):
    lora_A, lora_B = one.factors[name]
    return one.scaling * lora_B.double() @ lora_A.double()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def chain():
    """Three links of falling rank that adapt different layers; the last one's update is zero."""
    links = [link(0, 4, "wide", "high"), link(1, 2, "wide", "high", "square"), link(2, 1, "square")]
    links[2].factors["square"][1].zero_()
    return Chain(links, BaseIdentity(weight_norms={"wide": 20.0, "high": 10.0, "square": 5.0}))


def text_of(reports, width=120):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(reports))
    return capture.get()


@pytest.mark.parametrize("scaling", [1.0, -2.5])
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_singular_values_are_those_of_the_full_update(name, rank, scaling):
    lora_A, lora_B = factors(rank, name)[name]
    expected = torch.linalg.svdvals(scaling * lora_B.double() @ lora_A.double())
    values = singular_values(lora_A, lora_B, scaling)
    assert (values.shape, values.dtype) == ((rank,), torch.float64)
    shared = min(rank, len(expected))
    torch.testing.assert_close(values[:shared], expected[:shared], rtol=1e-10, atol=1e-12)
    assert not values[shared:].any()


def test_the_directions_that_an_update_does_not_use_have_exactly_zero():
    lora_A, lora_B = factors(3, "wide")["wide"]
    lora_A[2] = lora_A[0]
    values = singular_values(lora_A, lora_B, 1.0)
    torch.testing.assert_close(values, torch.linalg.svdvals(lora_B.double() @ lora_A.double())[:3], rtol=1e-10, atol=1e-12)
    assert (values > 0).tolist() == [True, True, False]
    cancelled = singular_values(torch.ones(2, 3), torch.tensor([[1.0, -1.0]]), 1.0)
    assert cancelled.tolist() == [0.0, 0.0]


def test_effective_rank_counts_equal_values_and_is_zero_without_any():
    assert effective_rank(torch.full((5,), 0.3)) == pytest.approx(5)
    assert effective_rank(torch.tensor([7.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert effective_rank(values) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(1e-9 * values) == pytest.approx(effective_rank(values))


def test_a_report_is_what_the_full_updates_say(chain):
    reports = report(chain)
    assert [one.total_rank for one in reports] == [4, 6, 7]
    for one, finished in zip(reports, chain.links, strict=True):
        assert (one.index, one.rank, one.alpha, one.steps) == (finished.index, finished.rank, 3.0, 7)
        assert one.layers.keys() == finished.factors.keys()
        assert one.update_norm == pytest.approx(finished.norm(), rel=1e-5)
        norms = {name: float(full_update(finished, name).norm()) for name in finished.factors}
        relative = {name: norm / chain.base.weight_norms[name] for name, norm in norms.items()}
        for name, layer in one.layers.items():
            assert (layer.norm, layer.relative_norm) == pytest.approx((norms[name], relative[name]))
            assert len(layer.singular_values) == finished.rank
            assert layer.effective_rank == pytest.approx(effective_rank(torch.linalg.svdvals(full_update(finished, name))))
        assert one.mean_norm == pytest.approx(sum(relative.values()) / len(relative))
        assert one.max_norm == pytest.approx(max(relative.values()))
        ranks = [layer.effective_rank for layer in one.layers.values()]
        assert one.effective_rank == pytest.approx(sum(ranks) / len(ranks))


def test_a_zero_update_has_zero_norms_and_effective_rank(chain):
    zero = report(chain)[2]
    assert (zero.mean_norm, zero.max_norm, zero.update_norm, zero.effective_rank) == (0, 0, 0, 0)
    assert zero.layers["square"].singular_values == [0.0]


@pytest.mark.parametrize("base", [BaseIdentity(), BaseIdentity(weight_norms={"wide": 0.0})])
def test_norms_are_none_where_the_bases_are_unknown_or_zero(base):
    (one,) = report(Chain([link(0, 2, "wide")], base))
    assert (one.mean_norm, one.max_norm, one.layers["wide"].relative_norm) == (None, None, None)
    assert one.update_norm > 0
    assert text_of([one]).splitlines()[-1].split()[4:6] == ["-", "-"]


def test_metrics_are_validations_or_else_all():
    validated = link(0, 1, "wide", metrics={"train_loss": 1.0, "val_loss": 0.5})
    trained = link(1, 1, "wide", metrics={"train_loss": 0.25})
    reports = report(Chain([validated, trained, link(2, 1, "wide")]))
    assert [one.metrics for one in reports] == [{"val_loss": 0.5}, {"train_loss": 0.25}, {}]


def test_a_metric_that_is_nan_is_null_in_json(chain):
    chain.links[1].metrics["val_loss"] = math.nan
    reports = report(chain)
    assert to_json(reports)[1]["metrics"] == {"val_loss": None}
    assert "val_loss nan" in text_of(reports)


def test_json_is_strict_and_holds_everything(chain):
    reports = report(chain)
    rows = to_json(reports)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0].keys() == vars(reports[0]).keys()
    assert rows[0]["layers"]["wide"] == vars(reports[0].layers["wide"])


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_shows_every_number_whole(width):
    metrics = {"val_loss": 0.38912, "val_accuracy": 0.84123}
    chain = Chain(
        [link(k, 4, "wide", "high", metrics=metrics) for k in range(25)], BaseIdentity(weight_norms={"wide": 1e6, "high": 1e6})
    )
    text = text_of(report(chain), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("val_loss 0.389,") == text.count("val_accuracy 0.841") == 25
    assert text.splitlines()[-1 if width == 120 else -2].split()[:4] == ["24", "4", "3", "7"]


def test_a_metrics_name_is_not_markup():
    assert "val_[red]x 1" in text_of(report(Chain([link(0, 1, "wide", metrics={"val_[red]x": 1.0})])))


def test_an_empty_chain_is_a_header_alone():
    assert report(Chain()) == to_json([]) == []
    text = text_of([])
    assert "metrics" in text
    assert table([]).row_count == 0


@pytest.mark.parametrize("base", [BaseIdentity(), BaseIdentity(weight_norms={"wide": 3.0, "high": 4.0})])
@pytest.mark.parametrize("n", [1, 3, 25])
def test_a_picture_of_any_length_is_a_png_and_nothing_is_left_beside_it(n, base, tmp_path):
    plot(report(Chain([link(k, 1 + k % 4, "wide", "high") for k in range(n)], base)), tmp_path / "links.png")
    assert [path.name for path in tmp_path.iterdir()] == ["links.png"]
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("zeros", [{"wide"}, {"wide", "high"}])
def test_zero_updates_can_be_drawn(zeros, tmp_path):
    links = [link(k, 2, "wide", "high") for k in range(2)]
    for one in links:
        for name in zeros:
            one.factors[name][1].zero_()
    plot(report(Chain(links)), tmp_path / "links.png")


def test_a_picture_that_fails_leaves_the_former_one(chain, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def half(self, path, **kwargs):
        path.write_bytes(b"\x89PNG")
        raise OSError("no space left on device")

    path = tmp_path / "links.png"
    path.write_text("former")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(DiskError, match="no space left"):
        plot(report(chain), path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("links.png", "former")]


def test_importing_it_loads_neither_lightning_nor_anything_that_draws():
    code = "import sys, cola_lightning.chain.report; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded
    assert not {"lightning", "transformers", "matplotlib", "rich"} & set(loaded)
