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

from cola_lightning.chain.names import matched
from cola_lightning.chain.peft import value_of_layer
from cola_lightning.files.compare import SMALLEST, Comparison, Kind, compare
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
class Finding:
    """A tensor and the judgement of it.

    Attributes:
        tensor: its name.
        kind: see :class:`~cola_lightning.files.compare.Comparison`.
        cause: if it is wrong, what most likely happened.
        n_different: elements that differ.
        n: its elements.
        place: the first element that is wrong.
    """

    tensor: str
    kind: Kind
    cause: str = ""
    n_different: int = 0
    n: int = 0
    place: tuple[int, ...] = ()


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
    names, findings, likely = matched(plan.tensors, merged.tensors), list[Finding](), list[str]()
    for name, planned in sorted(plan.tensors.items(), key=lambda item: len(item[1].updates) > 0):  # untouched ones first
        if name in names:
            is_other_base = _is_other_base(findings)
            found = _finding(name, planned, merged.tensors[names[name]], adapters, likely, is_other_base=is_other_base)
            findings.append(found)
            likely[:0] = [found.cause] if found.cause else []
        elif name == HEAD and HEAD not in plan.folder.tensors:
            findings.append(Finding(name, "wrong", TIED))
        elif not _is_copy(plan, name):
            findings.append(Finding(name, "wrong", "it is missing"))
    if _is_other_base(findings):
        findings = [replace(found, cause=OTHER_BASE) if found.cause == OTHER else found for found in findings]
    for name in merged.tensors.keys() - set(names.values()):
        is_unmerged = re.search(r"\.(lora_|base_layer\.|modules_to_save\.)", name)
        embedding = plan.embedding
        if name.endswith(HEAD) and embedding and compare(plan.tensors[embedding], merged.tensors[name]).kind != "wrong":
            continue
        findings.append(Finding(name, "wrong", UNMERGED if is_unmerged else "the base has no such tensor"))
    is_untied = plan.config.get("tie_word_embeddings") is False
    if is_untied and HEAD in names and merged.config.get("tie_word_embeddings") is True:
        findings.append(Finding("config.json", "wrong", TIED))
    return Proof(findings, _notes(plan, merged, adapters), sum(bool(planned.updates) for planned in plan.tensors.values()))


def _is_other_base(findings: Sequence[Finding]) -> bool:
    """Whether most tensors that no link changes have other values."""
    return sum(found.cause == OTHER for found in findings) > len(findings) / 2


def _is_copy(plan: Plan, name: str) -> bool:
    """Whether the base's files store a tied weight a second time, under this name."""
    stored, embedding = plan.tensors[name], plan.embedding
    if not name.endswith(HEAD) or embedding is None or stored.base is None or stored.updates or stored.value is not None:
        return False
    return compare(plan.tensors[embedding], stored.base).kind == "same bits"


def _notes(plan: Plan, merged: ModelFolder, adapters: Mapping[int, Adapter]) -> list[str]:
    notes = []
    for adapter in adapters.values():
        base = str((adapter.config or {}).get("base_model_name_or_path") or "")
        if FOUR_BITS.search(base):
            notes.append(f"{adapter.name} was trained on {base}, in 4 bits: merged into other weights, it gives another model")
    names = matched(plan.tensors, merged.tensors)
    for mine, theirs in {(plan.tensors[name].dtype, merged.tensors[names[name]].dtype) for name in names}:
        if theirs.itemsize < mine.itemsize:
            notes.append(f"tensors of the base in {mine} are stored in {theirs}".replace("torch.", ""))
    return notes


# ---------------------------------------------------------------------- causes


def _finding(
    name: str,
    planned: Planned,
    merged: StoredTensor,
    adapters: Mapping[int, Adapter],
    likely: Sequence[str],
    *,
    is_other_base: bool,
) -> Finding:
    """The judgement of a tensor.

    Args:
        name: the tensor's.
        planned: what it should be.
        merged: what it is.
        adapters: what is known of the links.
        likely: causes of earlier tensors, the last one first; they are tried first.
        is_other_base: whether it is known already that most of the base is another one.
    """
    compared = compare(planned, merged)
    if compared.kind != "wrong":
        return Finding(name, compared.kind, "", compared.n_different, compared.n)
    finding = Finding(name, "wrong", OTHER, compared.n_different, compared.n, compared.place)
    if planned.shape != merged.shape and not (planned.value is not None and planned.base is not None):
        return replace(finding, cause=f"its shape is {merged.shape} and not {tuple(planned.shape)}")
    causes = {cause: (tried, through) for cause, tried, through in _causes(planned, merged, adapters)}
    for cause in sorted(causes, key=lambda cause: likely.index(cause) if cause in likely else len(likely)):
        tried, through = causes[cause]
        if compare(tried, merged, through).kind != "wrong":
            return replace(finding, cause=cause)
    if planned.updates and not is_other_base and (scaled := _scales(planned, merged, compared, adapters)):
        return replace(finding, cause=scaled)
    return finding


def _causes(
    planned: Planned, merged: StoredTensor, adapters: Mapping[int, Adapter]
) -> Iterator[tuple[str, Planned, torch.dtype | None]]:
    """Mistakes, what each would have made of a tensor, and the smaller dtype in which it was made."""
    updates, names = planned.updates, {index: adapter.name for index, adapter in adapters.items()}
    if planned.value is not None:
        yield LEFT, replace(planned, value=None), None
    if updates:
        yield NOTHING, replace(planned, updates=()), None
    for place, update in enumerate(updates):
        before, after, name = updates[:place], updates[place + 1 :], names.get(update.link, f"link {update.link}")
        if before or after:
            yield f"{name} was not merged", replace(planned, updates=before + after), None
        if update.left.shape[-2] == update.right.shape[-1]:
            yield f"{name} was transposed", replace(planned, updates=(*before, update.transposed(), *after)), None
    if len(updates) > 1 and updates[0].left.shape[-2] == updates[0].right.shape[-1]:
        yield "all updates were transposed", replace(planned, updates=tuple(one.transposed() for one in updates)), None
    for dtype in SMALLER if merged.dtype.is_floating_point else ():
        if dtype.itemsize < merged.dtype.itemsize:
            yield f"it was rounded to {dtype}".replace("torch.", ""), planned, dtype


def _scales(planned: Planned, merged: StoredTensor, compared: Comparison, adapters: Mapping[int, Adapter]) -> str:
    """How the updates were scaled, if other factors explain the tensor; empty if they do not."""
    factors = compared.factors
    for _ in range(5):  # roundings hide some of an update, so that the first estimate may be off
        if not all(map(math.isfinite, factors)) or all(abs(factor - 1) <= SMALLEST for factor in factors):
            return ""
        pairs = list(zip(planned.updates, factors, strict=True))
        tried = compare(replace(planned, updates=tuple(one.times(factor) for one, factor in pairs)), merged)
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
