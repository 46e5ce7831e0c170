"""The proof of a merge that any tool made, tensor by tensor, and what most likely happened where it is wrong.

A cause is found by trying it: the tensor is compared with what the mistake would have made of it.
"""

import math
import re
from collections import Counter
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
class Adapter:
    """What is known of a link besides its factors.

    Attributes:
        name: for messages.
        config: of its PEFT adapter; None: it is none.
    """

    name: str
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Proof:
    """The findings for a merged model.

    Attributes:
        findings: of each tensor.
        notes: what a user should know besides.
        n_adapted: tensors that should have an update.
    """

    findings: list[Finding]
    notes: list[str]
    n_adapted: int

    @property
    def wrong(self) -> list[Finding]:
        """The findings of tensors that are wrong."""
        return [finding for finding in self.findings if finding.kind == "wrong"]

    @property
    def causes(self) -> dict[str, list[Finding]]:
        """The wrong tensors by their cause, the most frequent one first."""
        counts = Counter(finding.cause for finding in self.wrong)
        return {cause: [finding for finding in self.wrong if finding.cause == cause] for cause, _ in counts.most_common()}

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        if not self.wrong:
            return f"proven: {len(self.findings)} of {len(self.findings)} tensors are those of the merge"
        what = []
        for cause, found in self.causes.items():
            where = found[0].tensor + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            what.append(cause if cause == NOTHING and len(found) == self.n_adapted else f"{cause} ({where})")
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
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.cause or finding.kind, []).append(finding)
        for what, found in groups.items():
            n_different, n = (sum(getattr(finding, name) for finding in found) for name in ("n_different", "n"))
            place = f" {list(found[0].place)}" if found[0].place else ""
            table.add_row(escape(what), f"{len(found)}", f"{n_different} of {n}", escape(found[0].tensor + place))
        return table


def verify(plan: Plan, merged: ModelFolder, adapters: Mapping[int, Adapter]) -> Proof:
    """Compares each tensor of a merged model with what a merge makes of it.

    Args:
        plan: what the chain makes of the base.
        merged: the merged model.
        adapters: what is known of the links, by their index.
    """
    names, findings = matched(plan.tensors, merged.tensors), list[Finding]()
    for name, planned in sorted(plan.tensors.items(), key=lambda item: len(item[1].updates) > 0):  # untouched ones first
        if name in names:
            findings.append(compare(name, planned, merged.tensors[names[name]]))
            if findings[-1].kind == "wrong":
                findings[-1].cause = _cause(findings, planned, merged.tensors[names[name]], adapters)
        elif name == HEAD and HEAD not in plan.folder.tensors:
            findings.append(Finding(name, "wrong", TIED))
        elif not (name.endswith(HEAD) and planned.start is planned.base and _is_embedding(plan, planned.start)):
            findings.append(Finding(name, "wrong", "it is missing"))
    if _is_other_base(findings):
        for finding in findings:
            finding.cause = OTHER_BASE if finding.cause == OTHER else finding.cause
    for name in sorted(merged.tensors.keys() - set(names.values())):
        if not (name.endswith(HEAD) and _is_embedding(plan, merged.tensors[name])):
            is_unmerged = re.search(r"\.(lora_|base_layer\.|modules_to_save\.)", name)
            findings.append(Finding(name, "wrong", UNMERGED if is_unmerged else "the base has no such tensor"))
    is_untied = plan.config.get("tie_word_embeddings") is False
    if is_untied and HEAD in names and merged.config.get("tie_word_embeddings") is True:
        findings.append(Finding("config.json", "wrong", TIED))
    pairs = {(plan.tensors[mine].dtype, merged.tensors[theirs].dtype) for mine, theirs in names.items()}
    notes = [
        f"tensors of the base in {one} are stored in {other}".replace("torch.", "")
        for one, other in pairs
        if other.itemsize < one.itemsize
    ]
    for adapter in adapters.values():
        base = str((adapter.config or {}).get("base_model_name_or_path") or "")
        if FOUR_BITS.search(base):
            notes.append(f"{adapter.name} was trained on {base}, in 4 bits: merged into other weights, it gives another model")
    return Proof(findings, notes, sum(bool(planned.updates) for planned in plan.tensors.values()))


def _is_other_base(findings: Sequence[Finding]) -> bool:
    """Whether most tensors have values that no known mistake explains."""
    return sum(finding.cause == OTHER for finding in findings) > len(findings) / 2


def _is_embedding(plan: Plan, tensor: StoredTensor | Tensor) -> bool:
    """Whether a tensor is the embedding, to which an output layer was tied: some files store it a second time."""
    return plan.embedding is not None and compare(HEAD, plan.tensors[plan.embedding], tensor).kind != "wrong"


# ---------------------------------------------------------------------- causes


def _cause(
    findings: Sequence[Finding], planned: Planned, merged: StoredTensor | Tensor, adapters: Mapping[int, Adapter]
) -> str:
    """What most likely happened to the last tensor of these findings; the causes of those before are tried first."""
    found, likely = findings[-1], [finding.cause for finding in reversed(findings[:-1])]
    causes = {cause: (tried, through) for cause, tried, through in _causes(planned, merged.dtype, adapters)}
    for cause in sorted(causes, key=lambda cause: likely.index(cause) if cause in likely else len(likely)):
        tried, through = causes[cause]
        if compare(found.tensor, tried, merged, through).kind != "wrong":
            return cause
    if planned.start.shape != merged.shape:
        return f"its shape is {merged.shape} and not {planned.start.shape}"
    return (not _is_other_base(findings) and _scales(planned, merged, found, adapters)) or OTHER


def _causes(
    planned: Planned, dtype: torch.dtype, adapters: Mapping[int, Adapter]
) -> Iterator[tuple[str, Planned, torch.dtype | None]]:
    """Mistakes, what each would have made of a tensor, and the smaller dtype in which it was made."""
    updates, names = planned.updates, {index: adapter.name for index, adapter in adapters.items()}
    if planned.base is not None and planned.start is not planned.base:
        yield LEFT, replace(planned, start=planned.base), None
    if updates:
        yield NOTHING, replace(planned, updates=()), None
    for place, update in enumerate(updates):
        before, after, name = updates[:place], updates[place + 1 :], names.get(update.link, f"link {update.link}")
        if before or after:
            yield f"{name} was not merged", replace(planned, updates=before + after), None
        if update.is_square:
            yield f"{name} was transposed", replace(planned, updates=(*before, update.transposed(), *after)), None
    if len(updates) > 1 and updates[0].is_square:
        yield "all updates were transposed", replace(planned, updates=tuple(one.transposed() for one in updates)), None
    for smaller in SMALLER if dtype.is_floating_point else ():
        if smaller.itemsize < dtype.itemsize:
            yield f"it was rounded to {smaller}".replace("torch.", ""), planned, smaller


def _scales(planned: Planned, merged: StoredTensor | Tensor, found: Finding, adapters: Mapping[int, Adapter]) -> str:
    """How the updates were scaled, if other factors explain the tensor; empty if they do not."""
    factors = found.factors
    for _ in range(5):  # roundings hide some of an update, so that the first estimate may be off
        if not all(map(math.isfinite, factors)) or all(abs(factor - 1) <= SMALLEST for factor in factors):
            return ""
        pairs = list(zip(planned.updates, factors, strict=True))
        tried = compare(found.tensor, replace(planned, updates=tuple(one.times(factor) for one, factor in pairs)), merged)
        if tried.kind != "wrong":
            return " and ".join(_scale(one, factor, adapters) for one, factor in pairs if abs(factor - 1) > 0.02)
        factors = [factor * more for factor, more in zip(factors, tried.factors, strict=True)]
    return ""


def _scale(update: Update, factor: float, adapters: Mapping[int, Adapter]) -> str:
    """A factor of an adapter's update, and the mistakes that give it."""
    adapter, known = adapters.get(update.link, Adapter(f"link {update.link}")), {"merged or scaled twice": 2.0}
    if adapter.config is not None:
        rank = value_of_layer(adapter.config, update.layer, "r", "rank_pattern")
        alpha = value_of_layer(adapter.config, update.layer, "lora_alpha", "alpha_pattern")
        usual, stabilized = alpha / rank, alpha / rank**0.5
        right, other = (stabilized, usual) if adapter.config.get("use_rslora") else (usual, stabilized)
        what = ("alpha / r", "alpha / sqrt(r)") if right == stabilized else ("alpha / sqrt(r)", "alpha / r")
        known |= {f"{what[0]} in place of {what[1]}": other / right, "alpha and the rank left out": 1 / right}
        known |= {"the rank left out": alpha / right, "alpha left out": 1 / alpha, "scaled twice": right}
    reasons = [reason for reason, value in known.items() if abs(factor / value - 1) < 0.03]
    return f"{adapter.name} was scaled by {factor:.3g}" + (f" ({' or '.join(reasons)})" if reasons else "")
