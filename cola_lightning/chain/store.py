"""How a chain is stored: a description for JSON, and tensors by name.

The same in a state dict, and so in a checkpoint, in a chain folder, and in the metadata of a PEFT adapter.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.chain.link import Link
from cola_lightning.errors import UserError, one_line

VERSION = 1  # of all that is stored

METADATA = "metadata"  # the name of the tensor that holds the JSON of packed tensors
JSON_NAME, TENSORS_NAME = "chain.json", "chain.safetensors"
JSON_CHECKSUM = "sha256_of_json"  # of all other fields, which contain the tensors'

DESCRIBED = ("index", "rank", "alpha", "start_step", "end_step", "metrics")  # a link's fields beside its tensors

Chained = tuple[list[Link], BaseIdentity]


def check_version(version: Any, where: str) -> None:
    """Refuses a format version that this release cannot read.

    Raises:
        UserError: which says which version it is.
    """
    if version != VERSION or type(version) is not int:
        raise UserError(
            f"chain: this release of cola_lightning reads format version {VERSION}, but {where} has "
            f"{'none' if version is None else repr(version)}"
        )


@contextmanager
def damage_refused(what: str) -> Iterator[None]:
    """Inside the block, what damaged or missing files raise becomes a UserError, which begins with what they hold."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json and safetensors may raise anything for damaged bytes
        raise UserError(f"{what} is damaged or incomplete ({one_line(repr(error))})") from error


# ---------------------------------------------------------------------- the codec


def describe(links: Sequence[Link], base: BaseIdentity) -> dict[str, Any]:
    """A chain without its tensors, for strict JSON."""
    return {
        "format_version": VERSION,
        "base": asdict(base),
        "targets": layers_of(links),
        "links": [describe_link(link) | {"layers": len(link.factors)} for link in links],
    }


def named_tensors(links: Sequence[Link]) -> dict[str, Tensor]:
    """A chain's tensors: ``{k}.{layer}.lora_A`` and ``.lora_B``, ``{k}.extras.{name}``."""
    tensors: dict[str, Tensor] = {}
    for link in links:
        start = f"{link.index}"
        for name, (lora_A, lora_B) in link.factors.items():
            tensors |= {f"{start}.{name}.lora_A": lora_A, f"{start}.{name}.lora_B": lora_B}
        tensors |= {f"{start}.extras.{name}": value for name, value in link.extras.items()}
    return tensors


def decode(description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Chained:
    """The links and their base, from :func:`describe` and :func:`named_tensors`.

    Raises:
        UserError: for an unknown format version.
        KeyError, TypeError: if the description does not match the tensors.
    """
    check_version(description["format_version"], where)
    links = []
    for described in description["links"]:
        fields, start = link_fields(described), f"{described['index']}."
        own = {name.removeprefix(start): tensor.cpu() for name, tensor in tensors.items() if name.startswith(start)}
        targets = [name for name in description["targets"] if f"{name}.lora_A" in own]
        factors = {name: (own.pop(f"{name}.lora_A"), own.pop(f"{name}.lora_B")) for name in targets}
        extras = {name.removeprefix("extras."): value for name, value in own.items()}
        links.append(Link(**fields, factors=factors, extras=extras))
    return links, BaseIdentity(**description["base"])


def describe_link(link: Link) -> dict[str, Any]:
    """A link without its tensors; a non-finite metric is null."""
    metrics = {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}
    own_values = {"own_values": link.own_values} if link.own_values else {}
    return {name: getattr(link, name) for name in DESCRIBED} | {"metrics": metrics} | own_values


def link_fields(described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a link from :func:`describe_link`; a null metric becomes NaN."""
    metrics = {name: math.nan if value is None else value for name, value in described["metrics"].items()}
    own_values = {name: (rank, scaling) for name, (rank, scaling) in described.get("own_values", {}).items()}
    return {name: described[name] for name in DESCRIBED} | {"metrics": metrics, "own_values": own_values}


def layers_of(links: Sequence[Link]) -> list[str]:
    """The names of the layers that the links adapt, in the model's order."""
    return list(dict.fromkeys(name for link in links for name in link.factors))


# ---------------------------------------------------------------------- tensors alone


def pack(links: Sequence[Link], base: BaseIdentity, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """A chain, and facts beside it, as tensors by name: what every reader and writer of state dicts takes.

    The chain's :func:`named_tensors`; a fact that is a dict of tensors as ``{fact}.{name}``; and all else as JSON, whose bytes
    are the tensor ``metadata``.

    Args:
        links: the links.
        base: their base.
        facts: by name, each for JSON, or a dict of tensors.
    """
    groups = {fact: value for fact, value in facts.items() if _is_of_tensors(value)}
    others = {fact: value for fact, value in facts.items() if fact not in groups}
    text = json.dumps(describe(links, base) | {"facts": others})
    grouped = {f"{fact}.{name}": value for fact, values in groups.items() for name, value in values.items()}
    return named_tensors(links) | grouped | {METADATA: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def unpack(tensors: Mapping[str, Tensor], where: str) -> tuple[list[Link], BaseIdentity, dict[str, Any]]:
    """The links, their base, and the facts, from :func:`pack`.

    Raises:
        UserError: for an unknown format version.
    """
    description = json.loads(bytes(tensors[METADATA].tolist()))
    links, base = decode(description, tensors, where)
    facts: dict[str, Any] = description["facts"]
    for name, value in tensors.items():
        fact, _, own = name.partition(".")
        if own and not fact.isdigit():
            facts.setdefault(fact, {})[own] = value.cpu()
    return links, base, facts


def _is_of_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())


# ---------------------------------------------------------------------- a folder


def write_files(links: Sequence[Link], base: BaseIdentity, folder: Path) -> None:
    """Writes a chain's two files, without pickle: ``chain.safetensors``, and ``chain.json``, which is human-readable."""
    # Clones: safetensors refuses slices of a larger tensor and tensors that share memory.
    tensors = {name: value.detach().clone().contiguous() for name, value in named_tensors(links).items()}
    save_file(tensors, folder / TENSORS_NAME)
    description = describe(links, base) | {"sha256": _sha256(folder / TENSORS_NAME)}
    description[JSON_CHECKSUM] = _sha256_of_json(description)
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / JSON_NAME).write_text(text, encoding="utf-8")


def read_files(folder: Path) -> Chained:
    """The links of a chain folder and their base; see :meth:`~cola_lightning.chain.Chain.load`."""
    with damage_refused(f"chain: the chain in {str(folder)!r}"):
        description = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        check_version(description["format_version"], str(folder / JSON_NAME))
        is_same = description.pop(JSON_CHECKSUM) == _sha256_of_json(description)
        if not is_same or description["sha256"] != _sha256(folder / TENSORS_NAME):
            raise ValueError("a checksum differs")
        return decode(description, load_file(folder / TENSORS_NAME), str(folder))


def _sha256_of_json(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
