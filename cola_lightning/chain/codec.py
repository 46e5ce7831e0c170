"""Serialisation of links: the codec shared by chain folders, PEFT adapters, state dicts and checkpoints.

A link is serialised as a JSON description and named tensors. Each format has its own version.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
        KeyError, TypeError: if the description does not match the tensors.
    """
    targets = [str(name) for name in description["targets"]]
    links = [_link(link_facts(facts), targets, tensors) for facts in description["links"]]
    return links, dict(description["base"])


def _link(facts: dict[str, Any], targets: Sequence[str], tensors: Mapping[str, Tensor]) -> Link:
    prefix = f"links.{facts['index']}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    factors = {name: (mine.pop(f"{name}.lora_A"), mine.pop(f"{name}.lora_B")) for name in targets if f"{name}.lora_A" in mine}
    extras, outside = (
        {name.removeprefix(f"{kind}."): tensor for name, tensor in mine.items() if name.startswith(f"{kind}.")}
        for kind in WHOLE
    )
    return Link(**facts, factors=factors, extras=extras, outside=outside)


def layers_of(links: Sequence[Link]) -> list[str]:
    """The names of the layers that the links adapt, in the model's order."""
    return list(dict.fromkeys(name for link in links for name in link.factors))


# ---------------------------------------------------------------------- one link


def describe_link(link: Link) -> dict[str, Any]:
    """A link without its tensors, for strict JSON: a non-finite metric is null."""
    facts = {name: getattr(link, name) for name in FACTS}
    return facts | {"metrics": {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}}


def link_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a link from JSON; a null metric becomes NaN.

    Raises:
        KeyError: if a field is missing.
    """
    metrics = {name: math.nan if value is None else value for name, value in facts["metrics"].items()}
    return {name: facts[name] for name in FACTS} | {"metrics": metrics}


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
