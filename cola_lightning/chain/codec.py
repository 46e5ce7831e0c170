"""Serialisation of links: the codec shared by chain folders, PEFT adapters, state dicts and checkpoints.

A link is serialised as a JSON description and named tensors. Each format has its own version.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from cola_lightning.chain.link import Link
from cola_lightning.errors import UserError


class Format(NamedTuple):
    """A file format of this package.

    Attributes:
        version: the version that is written.
        readable: the versions that can be read.
    """

    version: int
    readable: tuple[int, ...]


CHECKPOINT = Format(2, (2,))
FOLDER = Format(2, (2,))
ADAPTER = Format(2, (2,))
STATE_DICT = Format(2, (2,))

FACTS = ("index", "rank", "alpha", "start_step", "end_step", "metrics")  # a link's fields in JSON
WHOLE = ("extras", "outside")  # a link's tensors beside its factors
BASE_FACTS = {"fingerprint", "dtypes", "weight_norms"}


def check_version(version: Any, known: Format, where: str) -> None:
    """Refuses a format version that this release cannot read.

    Raises:
        UserError: which says whether the version is newer, older, or invalid.
    """
    if version in known.readable and type(version) is int:
        return
    if type(version) is not int or version < 1:
        what = "it is damaged, or another program's"
    else:
        what = f"{'a newer' if version > known.version else 'an older'} release is needed"
    raise UserError(
        f"chain: expected format version {' or '.join(map(str, known.readable))}, which this release of cola_lightning "
        f"reads, received {'none' if version is None else repr(version)} in {where}: {what}"
    )


# ---------------------------------------------------------------------- a description and named tensors


def describe(links: Sequence[Link], base: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A chain without its tensors, for strict JSON."""
    return {
        "format_version": version,
        "base": base,
        "targets": layers_of(links),
        "links": [describe_link(link) | {"layers": len(link.factors)} for link in links],
    }


def named_tensors(links: Sequence[Link]) -> dict[str, Tensor]:
    """A chain's tensors: ``links.{k}.{layer}.lora_A`` and ``.lora_B``, ``links.{k}.extras.{name}``, the same of ``outside``."""
    tensors: dict[str, Tensor] = {}
    for link in links:
        for name, (lora_A, lora_B) in link.factors.items():
            tensors |= {f"links.{link.index}.{name}.lora_A": lora_A, f"links.{link.index}.{name}.lora_B": lora_B}
        for kind, values in zip(WHOLE, (link.extras, link.outside), strict=True):
            tensors |= {f"links.{link.index}.{kind}.{name}": value for name, value in values.items()}
    return tensors


def links_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[list[Link], dict[str, Any]]:
    """The links and the description of their base, from :func:`describe` and :func:`named_tensors`.

    Raises:
        KeyError, TypeError, ValueError: if the description does not match the tensors.
    """
    if extra := {int(name.split(".")[1]) for name in tensors} - set(range(len(description["links"]))):
        raise ValueError(f"link {min(extra)} is not described")
    targets = [str(name) for name in description["targets"]]
    links = [_link(place, facts, targets, tensors) for place, facts in enumerate(description["links"])]
    return links, base_facts(description["base"])


def _link(place: int, facts: Mapping[str, Any], targets: Sequence[str], tensors: Mapping[str, Tensor]) -> Link:
    """One link, with its tensors.

    Raises:
        ValueError: if its index is not ``place``, or if tensors are missing or have a wrong shape.
    """
    n_layers = _whole_number(facts["layers"], "layers")
    facts = link_facts({name: value for name, value in facts.items() if name != "layers"})
    rank = facts["rank"]
    if facts["index"] != place:
        raise ValueError(f"link {place} is missing")
    prefix = f"links.{place}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    factors = {name: (mine.pop(f"{name}.lora_A"), mine.pop(f"{name}.lora_B")) for name in targets if f"{name}.lora_A" in mine}
    extras, outside = (
        {name.removeprefix(f"{kind}."): tensor for name, tensor in mine.items() if name.startswith(f"{kind}.")}
        for kind in WHOLE
    )
    if len(factors) != n_layers or len(extras) + len(outside) != len(mine):
        raise ValueError(f"link {place} has {len(factors)} layers in place of {n_layers}")
    if wrong := [name for name, (A, B) in factors.items() if (*A.shape[:-1], *B.shape[1:]) != (rank, rank)]:
        raise ValueError(f"link {place} is not of rank {rank} in {wrong[0]!r}")
    return Link(**facts, factors=factors, extras=extras, outside=outside)


def layers_of(links: Sequence[Link]) -> list[str]:
    """The names of the layers that the links adapt, in the model's order."""
    return list(dict.fromkeys(name for link in links for name in link.factors))


# ---------------------------------------------------------------------- one link


def describe_link(link: Link) -> dict[str, Any]:
    """A link without its tensors, for strict JSON: a non-finite metric is null."""
    facts = {name: getattr(link, name) for name in FACTS}
    return facts | {"metrics": {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}}


def link_facts(facts: Any) -> dict[str, Any]:
    """The fields of a link from JSON, checked for type; a null metric becomes NaN.

    Raises:
        KeyError, TypeError, ValueError: if a field is missing, unknown, or of a wrong type.
    """
    if unknown := facts.keys() - set(FACTS):
        raise ValueError(f"a link has no {min(unknown)!r}")
    metrics = {name: math.nan if value is None else _number(value, name) for name, value in facts["metrics"].items()}
    counts = {name: _whole_number(facts[name], name) for name in ("index", "rank", "start_step", "end_step")}
    alpha = _number(facts["alpha"], "alpha")
    if counts["rank"] < 1 or not 0 < alpha < math.inf or counts["end_step"] < counts["start_step"]:
        raise ValueError(f"link {counts['index']} cannot be one of rank {counts['rank']} and alpha {alpha:g}, or of its steps")
    return {**counts, "alpha": alpha, "metrics": metrics}


def link_state(link: Link) -> dict[str, Any]:
    """A link as plain types and tensors, for a checkpoint that ``torch.load(weights_only=True)`` reads."""
    facts = {name: getattr(link, name) for name in FACTS}
    return facts | {"factors": link.factors, "extras": link.extras, "outside": link.outside}


def link_of_state(state: Mapping[str, Any]) -> Link:
    """The link from its :func:`link_state`.

    Raises:
        KeyError: if a field is missing.
    """
    facts = {name: state[name] for name in FACTS}
    return Link(**facts, factors=state["factors"], extras=state["extras"], outside=state["outside"])


# ---------------------------------------------------------------------- JSON


def base_facts(base: Any) -> dict[str, Any]:
    """The description of a chain's base (see :attr:`~cola_lightning.chain.Chain.base`) from JSON, checked for type.

    Raises:
        KeyError, TypeError, ValueError: if a value has a wrong type, or a field that identifies the base is missing.
    """
    if not isinstance(base, dict) or not isinstance(base.get("name", ""), str):
        raise TypeError(f"base is {base!r}"[:80])
    if not base.keys() & BASE_FACTS:  # the base is unknown
        return dict(base)
    dtypes, norms = base["dtypes"], {name: _number(norm, name) for name, norm in base["weight_norms"].items()}
    texts = [base["fingerprint"], *dtypes]
    if not isinstance(dtypes, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"fingerprint and dtypes of base are {texts!r}"[:160])
    hashes = [*base.get("values", {}).values(), *base.get("outside", {}).values()]
    if wrong := [value for value in hashes if not isinstance(value, str | None)]:
        raise TypeError(f"a hash of base is {wrong[0]!r}"[:80])
    return {**base, "weight_norms": norms}


def parse_json(text: str) -> Any:
    """Parses strict JSON.

    Raises:
        ValueError: if the text is not JSON; also for ``NaN`` and ``Infinity``, which Python's parser accepts.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}"[:80])
    return float(value)


def _whole_number(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{name} is {value!r}"[:80])
    return value
