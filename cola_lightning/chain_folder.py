"""A chain as a folder of its own, which needs no pickle.

``chain.safetensors`` holds the tensors under ``links.{k}.{layer}.lora_A``, ``links.{k}.{layer}.lora_B``,
``links.{k}.extras.{name}`` and ``links.{k}.outside.{name}``; ``chain.json`` says the rest, and people can read it.

Version 2 has what is trained outside of the model, and a hash of each value of the base; version 1 is read too.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_lightning.chain import Chain, Link
from cola_lightning.errors import UserError
from cola_lightning.writing import whole_folder

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
JSON_NAME, TENSORS_NAME = "chain.json", "chain.safetensors"
FACTORS = (".lora_A", ".lora_B")
WHOLE = ("extras", "outside")  # what a link holds beside its factors


def write_folder(chain: Chain, folder: Path, *, overwrite: bool = False) -> None:
    """See :meth:`~cola_lightning.chain.Chain.save`."""
    tensors: dict[str, Tensor] = {}
    for link in chain.links:
        for name, (lora_A, lora_B) in link.factors.items():
            tensors |= {f"links.{link.index}.{name}.lora_A": lora_A, f"links.{link.index}.{name}.lora_B": lora_B}
        for kind in WHOLE:
            tensors |= {f"links.{link.index}.{kind}.{name}": value for name, value in getattr(link, kind).items()}
    with whole_folder(Path(folder), overwrite=overwrite) as partial:
        # Clones, for slices of a larger tensor may not be written, nor tensors that share their memory.
        save_file({name: value.clone().contiguous() for name, value in tensors.items()}, partial / TENSORS_NAME)
        description = {
            "format_version": FORMAT_VERSION,
            "base": chain.base,
            "targets": chain.layers,
            "links": [_describe(link) for link in chain.links],
            "sha256": _sha256(partial / TENSORS_NAME),
        }
        (partial / JSON_NAME).write_text(json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_folder(folder: Path) -> Chain:
    """See :meth:`~cola_lightning.chain.Chain.load`."""
    if not (folder / JSON_NAME).is_file() or not (folder / TENSORS_NAME).is_file():
        raise UserError(f"chain: expected a folder with {JSON_NAME} and {TENSORS_NAME}, received {str(folder)!r}")
    try:
        description = json.loads((folder / JSON_NAME).read_text())
        check_version(description["format_version"], str(folder / JSON_NAME))
        is_whole = description["sha256"] == _sha256(folder / TENSORS_NAME)
        links = [{**link, "metrics": _numbers(link["metrics"])} for link in description["links"]]
        if is_whole:
            tensors = load_file(folder / TENSORS_NAME)
            if extra := {int(name.split(".")[1]) for name in tensors} - set(range(len(links))):
                raise ValueError(f"link {min(extra)} is not told of")
            return Chain([_link(k, link, tensors) for k, link in enumerate(links)], dict(description["base"]))
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"chain: expected a whole chain in {str(folder)!r}, received a damaged one ({error!r})") from error
    raise UserError(f"chain: expected the tensors that {JSON_NAME} tells of in {str(folder)!r}, received a damaged file")


def check_version(version: Any, where: str) -> None:
    """Refuses what a newer release wrote.

    Raises:
        UserError: if the format's version is not one that this release knows.
    """
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"chain: expected format version {' or '.join(map(str, READABLE_VERSIONS))}, which this release of cola_lightning "
            f"reads, received {version} in {where}: a newer release is needed"
        )


def _describe(link: Link) -> dict[str, Any]:
    """A link without its tensors; a metric that is not finite is null."""
    facts = {name: value for name, value in vars(link).items() if name not in ("factors", "metrics", *WHOLE)}
    metrics = {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}
    return {**facts, "layers": len(link.factors), "metrics": metrics}


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in metrics.items()}


def _link(place: int, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> Link:
    """One link of a chain folder, with its tensors.

    Raises:
        ValueError: if it is not the next one, or if tensors are missing or of another shape.
    """
    n_layers, rank = facts.pop("layers"), facts["rank"]
    if facts["index"] != place:
        raise ValueError(f"link {place} is missing")
    prefix = f"links.{place}."
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layers = [name.removesuffix(".lora_A") for name in mine if name.endswith(".lora_A")]
    whole = {name: tensor for name, tensor in mine.items() if not name.endswith(FACTORS)}
    extras, outside = (
        {name.removeprefix(f"{kind}."): tensor for name, tensor in whole.items() if name.startswith(f"{kind}.")}
        for kind in WHOLE
    )
    factors = {name: (mine[f"{name}.lora_A"], mine[f"{name}.lora_B"]) for name in layers}
    if len(factors) != n_layers or 2 * len(factors) + len(extras) + len(outside) != len(mine):
        raise ValueError(f"link {place} has {len(factors)} layers in place of {n_layers}")
    if wrong := [name for name, (A, B) in factors.items() if A.shape[0] != rank or B.shape[1] != rank]:
        raise ValueError(f"link {place} is not of rank {rank} in {wrong[0]!r}")
    return Link(**facts, factors=factors, extras=extras, outside=outside)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
