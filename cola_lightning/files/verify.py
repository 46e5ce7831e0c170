"""The proof of a merge that any tool made, tensor by tensor, and what most likely happened where it is wrong.

A cause is found by trying it: the tensor is compared with what the mistake would have made of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cola_lightning.chain.names import matched
from cola_lightning.chain.peft import value_of_layer
from cola_lightning.files.compare import SMALLEST, Finding, compare
from cola_lightning.files.plan import HEAD, Plan, Planned, Update
from cola_lightning.files.stored import ModelFolder, StoredTensor

if TYPE_CHECKING:
    from rich.table import Table

NOTHING, OTHER, OTHER_BASE = "nothing was merged", "it has other values", "it is of another base"
LEFT = "it was left as it is in the base, although it was trained whole (modules_to_save)"
TIED = "the output layer was left tied to the embedding"
UNMERGED = "the adapter was saved next to the weights, and not merged"
FOUR_BITS = re.compile(r"4-?bit|nf4", re.IGNORECASE)
SMALLER = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Proof:
    """The findings for a merged model.

    Attributes:
        findings: of each tensor.
        notes: what a user should know besides.
    """

    findings: list[Finding]
    notes: list[str]

    @property
    def wrong(self) -> list[Finding]:
        """The findings of tensors that are wrong."""
        return [finding for finding in self.findings if finding.kind == "wrong"]

    @property
    def groups(self) -> dict[str, list[Finding]]:
        """The findings by cause, or by kind where nothing is wrong, the largest group first."""
        groups = defaultdict[str, list[Finding]](list)
        for finding in self.findings:
            groups[finding.cause or finding.kind].append(finding)
        return dict(sorted(groups.items(), key=lambda group: -len(group[1])))

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        if not self.wrong:
            return f"proven: {len(self.findings)} of {len(self.findings)} tensors are those of the merge"
        groups = [(cause, found[0].tensor, len(found) - 1) for cause, found in self.groups.items() if found[0].cause]
        what = [f"{cause} ({first}{f' and {n_more} more' if n_more else ''})" for cause, first, n_more in groups]
        return f"refuted: {len(self.wrong)} of {len(self.findings)} tensors are wrong. Most likely: {'; '.join(what)}"

    def to_json(self) -> dict[str, Any]:
        """All findings, for strict JSON."""
        tensors = {finding.tensor: asdict(finding) for finding in self.findings}
        return {"proven": not self.wrong, "sentence": self.sentence, "notes": self.notes, "tensors": tensors}

    def table(self) -> "Table":
        """The numbers of tensors by judgement and cause."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table("judgement", "tensors", "elements that differ", "such as", box=box.SIMPLE_HEAD, show_edge=False)
        for what, found in self.groups.items():
            n_different, n = (sum(getattr(finding, name) for finding in found) for name in ("n_different", "n"))
            place = f" {list(found[0].place)}" if found[0].place else ""
            table.add_row(escape(what), f"{len(found)}", f"{n_different} of {n}", escape(found[0].tensor + place))
        return table


def verify(plan: Plan, merged: ModelFolder, configs: Mapping[int, Mapping[str, Any]]) -> Proof:
    """Compares each tensor of a merged model with what a merge makes of it.

    Args:
        plan: what the chain makes of the base.
        merged: the merged model.
        configs: of the links that are PEFT adapters, their configurations, by the link's index.
    """
    theirs, findings = matched(plan.tensors, merged.tensors), list[Finding]()
    for name, planned in sorted(plan.tensors.items(), key=lambda item: len(item[1].updates) > 0):  # untouched ones first
        if name in theirs:
            findings.append(compare(name, planned, merged.tensors[theirs[name]]))
            if findings[-1].kind == "wrong":
                findings[-1].cause = _cause(findings, plan, merged.tensors[theirs[name]], configs)
        elif planned.updates or not _is_tied_head(plan, name, planned.start):
            findings.append(Finding(name, "wrong", "it is missing" if name in plan.folder.tensors else TIED))
    if _is_other_base(findings):
        for finding in findings:
            finding.cause = OTHER_BASE if finding.cause == OTHER else finding.cause
    for name in sorted(merged.tensors.keys() - set(theirs.values())):
        if not _is_tied_head(plan, name, merged.tensors[name]):
            is_unmerged = re.search(r"\.(lora_|base_layer\.|modules_to_save\.)", name)
            findings.append(Finding(name, "wrong", UNMERGED if is_unmerged else "the base has no such tensor"))
    is_untied = plan.config.get("tie_word_embeddings") is False
    if is_untied and HEAD in theirs and merged.config.get("tie_word_embeddings") is True:
        findings.append(Finding("config.json", "wrong", TIED))
    pairs = {(plan.tensors[mine].base.dtype, merged.tensors[other].dtype) for mine, other in theirs.items()}
    smaller = [pair for pair in pairs if pair[1].itemsize < pair[0].itemsize]
    notes = [f"tensors of the base in {one} are stored in {other}".replace("torch.", "") for one, other in smaller]
    for index, config in configs.items():
        if FOUR_BITS.search(base := str(config.get("base_model_name_or_path"))):
            name = _name(plan, index)
            notes.append(f"{name} was trained on {base}, in 4 bits: merged into other weights, it gives another model")
    return Proof(findings, notes)


def _name(plan: Plan, index: int) -> str:
    return plan.chain[index].name or f"link {index}"


def _is_other_base(findings: Sequence[Finding]) -> bool:
    """Whether most tensors have values that no known mistake explains."""
    return sum(finding.cause == OTHER for finding in findings) > len(findings) / 2


def _is_tied_head(plan: Plan, name: str, tensor: StoredTensor | Tensor) -> bool:
    """Whether a tensor is an output layer that is tied to the embedding: some files store it a second time."""
    embedding = plan.embedding
    return name.endswith(HEAD) and embedding is not None and compare(HEAD, plan.tensors[embedding], tensor).kind != "wrong"


# ---------------------------------------------------------------------- causes


def _cause(
    findings: Sequence[Finding], plan: Plan, merged: StoredTensor | Tensor, configs: Mapping[int, Mapping[str, Any]]
) -> str:
    """What most likely happened to the last tensor of these findings; the causes of those before are tried first."""
    found, likely = findings[-1], [finding.cause for finding in reversed(findings[:-1])]
    planned = plan.tensors[found.tensor]
    causes = {cause: (tried, through) for cause, tried, through in _causes(plan, planned, merged.dtype)}
    for cause in sorted(causes, key=lambda cause: likely.index(cause) if cause in likely else len(likely)):
        tried, through = causes[cause]
        if compare(found.tensor, tried, merged, through).kind != "wrong":
            return cause
    if planned.start.shape != merged.shape:
        return f"its shape is {merged.shape} and not {planned.start.shape}"
    return (not _is_other_base(findings) and _scales(plan, merged, found, configs)) or OTHER


def _causes(plan: Plan, planned: Planned, dtype: torch.dtype) -> Iterator[tuple[str, Planned, torch.dtype | None]]:
    """Mistakes, what each would have made of a tensor, and the smaller dtype in which it was made."""
    updates = planned.updates
    is_square = bool(updates) and updates[0].left.shape[-2] == updates[0].right.shape[-1]
    if planned.start is not planned.base:
        yield LEFT, replace(planned, start=planned.base), None
    if updates:
        yield NOTHING, replace(planned, updates=()), None
    if is_square:
        yield "the updates were transposed", replace(planned, updates=tuple(one.transposed() for one in updates)), None
    for update in updates if len(updates) > 1 else ():
        name = _name(plan, update.link)
        yield f"{name} was not merged", replace(planned, updates=tuple(one for one in updates if one is not update)), None
        if is_square:
            some = tuple(one.transposed() if one is update else one for one in updates)
            yield f"{name} was transposed", replace(planned, updates=some), None
    for smaller in SMALLER if dtype.is_floating_point else ():
        if smaller.itemsize < dtype.itemsize:
            yield f"it was rounded to {smaller}".replace("torch.", ""), planned, smaller


def _scales(plan: Plan, merged: StoredTensor | Tensor, found: Finding, configs: Mapping[int, Mapping[str, Any]]) -> str:
    """How the updates were scaled, if other factors explain the tensor; empty if they do not."""
    planned, factors = plan.tensors[found.tensor], found.factors
    for _ in range(5):  # roundings hide some of an update, so that the first estimate may be off
        if not all(map(math.isfinite, factors)) or all(abs(factor - 1) <= SMALLEST for factor in factors):
            return ""
        pairs = list(zip(planned.updates, factors, strict=True))
        scaled = tuple(replace(update, left=update.left * factor) for update, factor in pairs)
        tried = compare(found.tensor, replace(planned, updates=scaled), merged)
        if tried.kind != "wrong":
            changed = [(update, factor) for update, factor in pairs if abs(factor - 1) > 0.02]
            return " and ".join(_scale(_name(plan, one.link), one, factor, configs.get(one.link)) for one, factor in changed)
        factors = [factor * more for factor, more in zip(factors, tried.factors, strict=True)]
    return ""


def _scale(name: str, update: Update, factor: float, config: Mapping[str, Any] | None) -> str:
    """A factor of an adapter's update, and the mistakes that give it."""
    known = {"merged or scaled twice": 2.0}
    if config is not None:
        rank = value_of_layer(config, update.layer, "r", "rank_pattern")
        alpha = value_of_layer(config, update.layer, "lora_alpha", "alpha_pattern")
        ways = {"alpha / r": alpha / rank, "alpha / sqrt(r)": alpha / rank**0.5}
        right = "alpha / sqrt(r)" if config.get("use_rslora") else "alpha / r"
        known |= {f"{way} in place of {right}": value / ways[right] for way, value in ways.items() if way != right}
        known |= {"alpha and the rank left out": 1 / ways[right], "the rank left out": alpha / ways[right]}
        known |= {"alpha left out": 1 / alpha, "scaled twice": ways[right]}
    reasons = [reason for reason, value in known.items() if abs(factor / value - 1) < 0.03]
    return f"{name} was scaled by {factor:.3g}" + (f" ({' or '.join(reasons)})" if reasons else "")
