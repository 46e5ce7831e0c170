"""Statistics of a chain's links: the size of each update, its effective rank, and its validation metrics.

Source: Roy & Vetterli, "The effective rank" (EUSIPCO 2007), section 2.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_lightning.chain.chain import Chain, Link, core_of_product, factors_of_sum
from cola_lightning.lora.layer import LinkFactors

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LinkReport:
    """One link's update of all its layers; index, name, rank and alpha are the link's.

    Attributes:
        steps: optimizer steps that it was trained for.
        update_norm: Frobenius norm over all layers.
        relative_norm: it divided by that of the base's adapted weights; None if that is unknown or zero.
        max_norm: the largest norm of a layer's update, divided by that of the base's weight; None if none is known.
        effective_rank: see :func:`effective_rank`; the mean of the layers' (of experts, of their mean).
        total_rank: sum of the ranks of this link and those before it that are in the model next to it.
        metrics: validation metrics at its end, or all metrics if there are none.
    """

    index: int
    name: str | None
    rank: int
    alpha: float
    steps: int
    update_norm: float
    relative_norm: float | None
    max_norm: float | None
    effective_rank: float
    total_rank: int
    metrics: dict[str, float]


def singular_values(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The singular values of ``scaling * B A``, largest first, in float64, without computing an out x in matrix.

    Shape:
        ``lora_A``: rank x in; ``lora_B``: out x rank; result: rank. With a pair for each expert, experts x rank.

    Example:
        >>> singular_values(torch.ones(2, 3), torch.eye(4, 2), scaling=0.5)
        tensor([1.2247, 0.0000], dtype=torch.float64)
    """
    rank = lora_A.shape[-2]
    _, core, _ = core_of_product(lora_A, lora_B)
    values = torch.linalg.svdvals(core)
    # Otherwise the zeros of an update of lower rank would come out as about 1e-17.
    size = lora_A.to(core.dtype).norm() * lora_B.to(core.dtype).norm()
    rounding = torch.finfo(torch.float64).eps * max(*lora_A.shape, *lora_B.shape) * size
    values = values * (values > rounding) * abs(scaling)
    return F.pad(values, (0, rank - values.shape[-1]))  # fewer where the layer is smaller than the rank


def effective_rank(values: Tensor) -> float:
    """The exponential of the entropy of the normalised singular values: 1 to their number; 0 if all are zero.

    Example:
        >>> [round(effective_rank(torch.tensor(values)), 2) for values in ([2.0, 2.0], [2.0, 0.1], [2.0, 0.0], [0.0, 0.0])]
        [2.0, 1.21, 1.0, 0.0]
    """
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total else 0.0


def report(chain: Chain) -> list[LinkReport]:
    """Each link's report, in order: of all of its update, also if its knot merged only a share of it.

    Example:
        >>> from cola_lightning.chain.base import BaseIdentity
        >>> factors = {"fc": (torch.eye(2, 4), torch.eye(3, 2))}
        >>> link = Link(0, rank=2, alpha=1.0, start_step=0, end_step=10, factors=factors)
        >>> (first,) = report(Chain([link], base=BaseIdentity(weight_norms={"fc": 5.0})))
        >>> first.steps, round(first.update_norm, 4), round(first.effective_rank, 6)
        (10, 0.7071, 2.0)
    """
    reports, rank = list[LinkReport](), 0
    for link in chain.links:
        reports.append(_report_link(link.at_end(), rank + link.rank, chain.base.weight_norms))
        rank += 0 if link.is_record else link.rank
    return reports


def _report_link(link: Link, total_rank: int, weight_norms: dict[str, float]) -> LinkReport:
    values = {name: singular_values(*factors, link.scaling_of(name)) for name, factors in link.factors.items()}
    norms = {name: float(of_layer.norm()) for name, of_layer in values.items()}
    update_norm, base_norm = math.hypot(*norms.values()), math.hypot(*weight_norms.values())
    per_layer = (of_layer.reshape(-1, link.size_of(name)[0]) for name, of_layer in values.items())
    ranks = [statistics.fmean(map(effective_rank, of_layer)) for of_layer in per_layer]
    return LinkReport(
        index=link.index,
        name=link.name,
        rank=link.rank,
        alpha=link.alpha,
        steps=link.end_step - link.start_step,
        update_norm=update_norm,
        relative_norm=update_norm / base_norm if base_norm else None,
        max_norm=max((norm / weight_norms[name] for name, norm in norms.items() if weight_norms.get(name)), default=None),
        effective_rank=statistics.fmean(ranks),
        total_rank=total_rank,
        metrics={name: value for name, value in link.metrics.items() if name.startswith("val_")} or dict(link.metrics),
    )


@dataclass(frozen=True)
class Overlap:
    """How far the updates of two stages overlap; the numbers are means over the layers that both adapt.

    Attributes:
        stages: their names.
        norms: the Frobenius norms of their updates over these layers.
        angle: the angle between the updates as vectors, in degrees: 0 where they are parallel, 90 where they do not interfere.
        subspace: the share of the smaller update's columns' space that lies in the other's, from 0 to 1.
    """

    stages: tuple[str, str]
    norms: tuple[float, float]
    angle: float
    subspace: float


def overlaps(chain: Chain) -> list[Overlap]:
    """The overlap of each two stages of a chain. A stage after a record counts by how it differs from that record."""
    updates: dict[str, dict[str, list[LinkFactors]]] = {}
    for before, link in zip([None, *chain.links], chain.links, strict=False):
        of_stage = updates.setdefault(link.name or "", {})
        for name, (lora_A, lora_B) in link.factors.items():
            of_stage.setdefault(name, []).append((lora_A, lora_B, link.at_end().scaling_of(name)))
            if before is not None and before.is_record and before.name != link.name and name in before.factors:
                of_stage[name].append((*before.factors[name], -before.at_end().scaling_of(name)))
    found = []
    for (first, mine), (second, theirs) in itertools.combinations(updates.items(), 2):
        if both := [name for name in mine if name in theirs and mine[name][0][0].dim() == 2]:
            parts = [_overlap(factors_of_sum(mine[name]), factors_of_sum(theirs[name])) for name in both]
            product, squares_a, squares_b, subspaces = map(math.fsum, zip(*parts, strict=True))
            norms = math.sqrt(squares_a), math.sqrt(squares_b)
            cosine = product / (norms[0] * norms[1]) if all(norms) else 0.0
            angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
            found.append(Overlap((first, second), norms, angle, subspaces / len(both)))
    return found


def _overlap(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[float, float, float, float]:
    """The inner product of two updates, their squared norms, and the share of the smaller one's columns in the other's."""
    (q, core, p), (other_q, other_core, other_p) = core_of_product(*mine), core_of_product(*theirs)
    product = float((core * (q.mT @ other_q @ other_core @ (other_p.mT @ p))).sum())
    bases = [q @ _columns(core), other_q @ _columns(other_core)]
    smaller = min(base.shape[1] for base in bases)
    shared = float((bases[0].mT @ bases[1]).square().sum()) / smaller if smaller else 0.0
    return product, float(core.square().sum()), float(other_core.square().sum()), shared


def _columns(core: Tensor) -> Tensor:
    """An orthonormal basis of a matrix' columns."""
    u, values, _ = torch.linalg.svd(core, full_matrices=False)
    columns: Tensor = u[:, values > 1e-9 * values.max()]
    return columns


def overlaps_table(found: Sequence[Overlap]) -> "Table":
    """The overlaps as a human-readable table."""
    rows = [
        {"stages": " and ".join(one.stages), "norms": " and ".join(f"{norm:.3g}" for norm in one.norms)}
        | {"angle": f"{one.angle:.1f}°", "shared subspace": f"{one.subspace:.2f}"}
        for one in found
    ]
    return metrics_table(rows)


def table(reports: Sequence[LinkReport]) -> "Table":
    """The reports as a human-readable table, one row per link, without what no link has; :func:`to_json` has every number."""

    def rounded(value: float | None, digits: int) -> float | str:
        return "-" if value is None else float(f"{value:.{digits}g}")

    has_names, has_steps = any(link.name is not None for link in reports), any(link.steps for link in reports)
    has_base, has_metrics = any(link.relative_norm is not None for link in reports), any(link.metrics for link in reports)
    rows = [
        {"link": link.index}
        | ({"stage": link.name or "-"} if has_names else {})
        | {"rank": link.rank, "alpha": link.alpha}
        | ({"steps": link.steps} if has_steps else {})
        | ({"‖ΔW‖/‖W₀‖": rounded(link.relative_norm, 2), "max/layer": rounded(link.max_norm, 2)} if has_base else {})
        | ({} if has_base else {"‖ΔW‖": rounded(link.update_norm, 3)})
        | {"effective/rank": rounded(link.effective_rank, 3), "total/rank": link.total_rank}
        | ({"metrics": ", ".join(f"{name} {value:.3g}" for name, value in link.metrics.items()) or "-"} if has_metrics else {})
        for link in reports
    ]
    return metrics_table(rows)


def metrics_table(rows: Sequence[Mapping[str, Any]]) -> "Table":
    """Metrics by name as a human-readable table; numbers with a fraction have four digits.

    Args:
        rows: each with the same names, such as ``links``, ``stage`` and ``test_loss``.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name, value in rows[-1].items() if rows else ():
        head = name.removeprefix("test_").removeprefix("val_").replace("/", "\n")  # of two lines: rewards/chosen
        table.add_column(escape(head), justify="left" if isinstance(value, str) else "right", overflow="fold")
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else f"{value}" for value in row.values()]
        table.add_row(*map(escape, cells))
    return table


def to_json(reports: Sequence[LinkReport]) -> list[dict[str, Any]]:
    """The reports as plain types for strict JSON: None for NaN and infinity."""
    rows: list[dict[str, Any]] = json.loads(json.dumps([asdict(link) for link in reports]), parse_constant=lambda _: None)
    return rows
