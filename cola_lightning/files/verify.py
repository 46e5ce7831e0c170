"""The proof of a merge that any tool made, tensor by tensor, and what most likely happened where it is wrong.

A cause is found by trying it: the tensor is compared with what the mistake would have made of it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cola_lightning.chain.names import matched
from cola_lightning.chain.peft import value_of_layer
from cola_lightning.files.compare import SMALLEST, Finding, compare
from cola_lightning.files.plan import HEAD, Plan, Update, embedding_of
from cola_lightning.files.stored import ModelFolder, StoredTensor, rows_of

NOTHING, OTHER, OTHER_BASE = "nothing was merged", "it has other values", "it is of another base"
LEFT = "it was left as it is in the base, although it was trained whole (modules_to_save)"
TIED = "the output layer was left tied to the embedding"
UNMERGED = "the adapter was saved next to the weights, and not merged"
FOUR_BITS = re.compile(r"4-?bit|nf4", re.IGNORECASE)
SMALLER = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
NEGLIGIBLE = 0.02  # of an update
Configs = Mapping[str | None, Mapping[str, Any]]


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
    def undecided(self) -> list[Finding]:
        """The findings of tensors with an update that roundings hide."""
        return [finding for finding in self.findings if finding.kind == "undecided"]

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
        n, n_undecided = len(self.findings), len(self.undecided)
        if not self.wrong:
            proven = f"proven: {n - n_undecided} of {n} tensors are those of the merge"
            n_small = sum(len(finding.too_small) for finding in self.undecided)
            n_updates = sum(finding.n_updates for finding in self.findings)
            small = [f"too small to be seen in {one.dtype}: {n_small} of {n_updates} updates" for one in self.undecided[:1]]
            return "; ".join([*small, *([proven] if n > n_undecided else [])])
        groups = [(cause, found[0].tensor, len(found) - 1) for cause, found in self.groups.items() if found[0].cause]
        what = [f"{cause} ({first}{f' and {n_more} more' if n_more else ''})" for cause, first, n_more in groups]
        return f"refuted: {len(self.wrong)} of {len(self.findings)} tensors are wrong. Most likely: {'; '.join(what)}"

    def to_json(self) -> dict[str, Any]:
        """All findings, for strict JSON."""
        tensors = {finding.tensor: asdict(finding) for finding in self.findings}
        judgement = {
            "proven": not self.wrong and not self.undecided,
            "undecided": [finding.tensor for finding in self.undecided],
        }
        return judgement | {"sentence": self.sentence, "notes": self.notes, "tensors": tensors}


def verify(plan: Plan, merged: ModelFolder, configs: Configs) -> Proof:
    """Compares each tensor of a merged model with what a merge makes of it.

    Args:
        plan: what the chain makes of the base.
        merged: the merged model.
        configs: of the links that are PEFT adapters, their configurations, by the link's name.
    """
    theirs, findings = matched(plan.tensors, merged.tensors), list[Finding]()
    for name, planned in plan.tensors.items():
        if name in theirs:
            findings.append(compare(name, planned, merged.tensors[theirs[name]]))
            if findings[-1].kind == "wrong":
                findings[-1].cause = _cause(findings[-1], plan, merged.tensors[theirs[name]], configs)
        elif planned.updates or not _is_tied_head(plan, name, planned.start):
            findings.append(Finding(name, "wrong", "it is missing" if name in plan.folder.tensors else TIED))
    others = [finding for finding in findings if finding.cause == OTHER]
    for finding in others if len(others) > len(findings) / 2 else ():
        finding.cause = OTHER_BASE
    for name in sorted(merged.tensors.keys() - set(theirs.values())):
        if not _is_tied_head(plan, name, merged.tensors[name]):
            is_unmerged = re.search(r"\.(lora_|base_layer\.|modules_to_save\.)", name)
            findings.append(Finding(name, "wrong", UNMERGED if is_unmerged else "the base has no such tensor"))
    if HEAD in theirs and not plan.config.get("tie_word_embeddings", True) and merged.ties_head:
        findings.append(Finding("config.json", "wrong", TIED))
    pairs = {(plan.tensors[mine].base.dtype, merged.tensors[other].dtype) for mine, other in theirs.items()}
    smaller = [pair for pair in pairs if pair[1].itemsize < pair[0].itemsize]
    notes = [f"tensors of the base in {one} are stored in {other}".replace("torch.", "") for one, other in smaller]
    for adapter, config in configs.items():
        if FOUR_BITS.search(base := str(config.get("base_model_name_or_path"))):
            notes.append(f"{adapter} was trained on {base}, in 4 bits: merged into other weights, it gives another model")
    return Proof(findings, notes)


def _is_tied_head(plan: Plan, name: str, tensor: StoredTensor | Tensor) -> bool:
    """Whether a tensor is an output layer that is tied to the embedding: some files store it a second time."""
    embedding = embedding_of(plan.tensors)
    return name.endswith(HEAD) and embedding is not None and compare(HEAD, plan.tensors[embedding], tensor).kind != "wrong"


# ---------------------------------------------------------------------- causes


def _cause(found: Finding, plan: Plan, stored: StoredTensor | Tensor, configs: Configs) -> str:
    """What most likely happened to a tensor."""
    planned, merged = plan.tensors[found.tensor], rows_of(stored)
    tries = [(LEFT, replace(planned, start=planned.base), merged)]
    if all(update.left.shape[-2] == update.right.shape[-1] for update in planned.updates):
        turned = tuple(update.transposed() for update in planned.updates)
        tries.append(("the updates were transposed", replace(planned, updates=turned), merged))
    for dtype in SMALLER:
        if dtype.itemsize < merged.dtype.itemsize and torch.equal(merged.to(dtype).to(merged.dtype), merged):
            tries.append((f"it was rounded to {dtype}".replace("torch.", ""), planned, merged.to(dtype)))
    for cause, tried, values in tries:
        if compare(found.tensor, tried, values).kind != "wrong":
            return cause
    if planned.start.shape != stored.shape:
        return f"its shape is {stored.shape} and not {planned.start.shape}"
    return _scales(found, plan, merged, configs) or OTHER


def _scales(found: Finding, plan: Plan, merged: Tensor, configs: Configs) -> str:
    """How the updates were scaled, if other factors explain a tensor; empty if they do not."""
    planned = plan.tensors[found.tensor]
    factors = [1.0] * len(planned.updates)
    for _ in range(5):  # roundings hide some of an update, so that the first estimate may be off
        factors = [factor * more for factor, more in zip(factors, found.factors, strict=False)]
        if not all(map(math.isfinite, factors)) or all(abs(factor - 1) <= SMALLEST for factor in factors):
            break
        for tried in ([float(round(factor)) for factor in factors], factors):
            pairs = list(zip(planned.updates, tried, strict=True))
            scaled = tuple(replace(update, left=update.left * factor) for update, factor in pairs)
            found = compare(found.tensor, replace(planned, updates=scaled), merged)
            if found.kind != "wrong":
                changed = [(update, factor) for update, factor in pairs if abs(factor - 1) > NEGLIGIBLE]
                is_nothing = max(map(abs, tried)) <= NEGLIGIBLE
                return NOTHING if is_nothing else " and ".join(_scale(plan, *pair, configs) for pair in changed)
    return ""


def _scale(plan: Plan, update: Update, factor: float, configs: Configs) -> str:
    """A factor of an adapter's update, and the mistakes that give it."""
    name = plan.chain[update.link].name or f"link {update.link}"
    if abs(factor) <= NEGLIGIBLE:
        return f"{name} was not merged"
    known = {"merged or scaled twice": 2.0}
    if (config := configs.get(name)) is not None:
        rank = value_of_layer(config, update.layer, "r", "rank_pattern")
        alpha = value_of_layer(config, update.layer, "lora_alpha", "alpha_pattern")
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        known |= {"scaled twice": scaling, "alpha left out": 1 / alpha, "the rank left out": alpha / scaling}
        known |= {"alpha and the rank left out": 1 / scaling, "alpha / r in place of alpha / sqrt(r)": alpha / rank / scaling}
        known |= {"alpha / sqrt(r) in place of alpha / r": alpha / rank**0.5 / scaling}
    reasons = [reason for reason, value in known.items() if abs(factor / value - 1) <= NEGLIGIBLE]
    return f"{name} was scaled by {factor:.3g}" + (f" ({' or '.join(reasons)})" if reasons else "")
