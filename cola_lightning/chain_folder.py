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
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from cola_lightning.chain import Chain, Link
from cola_lightning.errors import UserError
from cola_lightning.writing import whole_folder

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, FORMAT_VERSION)
JSON_NAME, TENSORS_NAME = "chain.json", "chain.safetensors"
FACTORS = (".lora_A", ".lora_B")
WHOLE = ("extras", "outside")  # what a link holds beside its factors
EXTRA_STATE = "_extra_state"  # torch's name of what is packed in a state dict
ALIGNMENT = 16  # bytes, of what is packed
JSON_CHECKSUM = "sha256_of_json"  # of all other fields; version 1 has none
BASE_FACTS = {"fingerprint", "dtypes", "weight_norms"}


def write_folder(chain: Chain, folder: Path, *, overwrite: bool = False) -> None:
    """See :meth:`~cola_lightning.chain.Chain.save`."""
    with whole_folder(Path(folder), overwrite=overwrite) as partial:
        # Clones, for slices of a larger tensor may not be written, nor tensors that share their memory.
        save_file({name: value.clone().contiguous() for name, value in _tensors(chain).items()}, partial / TENSORS_NAME)
        description = _describe(chain) | {"sha256": _sha256(partial / TENSORS_NAME)}
        description[JSON_CHECKSUM] = _sha256_of_json(description)
        (partial / JSON_NAME).write_text(json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _tensors(chain: Chain) -> dict[str, Tensor]:
    """A chain's tensors by the names under which they are written."""
    tensors: dict[str, Tensor] = {}
    for link in chain.links:
        for name, (lora_A, lora_B) in link.factors.items():
            tensors |= {f"links.{link.index}.{name}.lora_A": lora_A, f"links.{link.index}.{name}.lora_B": lora_B}
        for kind in WHOLE:
            tensors |= {f"links.{link.index}.{kind}.{name}": value for name, value in getattr(link, kind).items()}
    return tensors


def _describe(chain: Chain) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "base": chain.base,
        "targets": chain.layers,
        "links": [describe_link(link) | {"layers": len(link.factors)} for link in chain.links],
    }


def pack(chain: Chain, **facts: Any) -> Tensor:
    """A chain, and plain facts beside it, as one tensor of bytes: the length of a JSON header, the header, and all values.

    A state dict of tensors alone is what averages of weights, ``safetensors`` and loops over its values expect.
    """
    tensors = _tensors(chain)
    kinds = [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()]
    header = json.dumps(_describe(chain) | {"facts": facts, "tensors": kinds}).encode()
    begin = len(header).to_bytes(ALIGNMENT, "little"), header
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in begin]
    parts += [_bytes(value) for value in tensors.values()]
    return torch.cat([F.pad(part, (0, -len(part) % ALIGNMENT)) for part in parts])


def unpack(packed: Any) -> tuple[Chain, dict[str, Any]]:
    """The chain and the facts of :func:`pack`.

    Raises:
        UserError: if it was cast or otherwise changed.
    """
    try:
        packed = packed.cpu()
        end = ALIGNMENT + int.from_bytes(packed[:ALIGNMENT].numpy().tobytes(), "little")
        description = json.loads(packed[ALIGNMENT:end].numpy().tobytes())
        facts, kinds = description.pop("facts"), description.pop("tensors")
        check_version(description["format_version"], "the state dict")
        tensors, start = {}, end + -end % ALIGNMENT
        for name, kind, shape in kinds:
            dtype: torch.dtype = getattr(torch, kind)
            size = math.prod(shape) * dtype.itemsize
            tensors[name] = packed[start : start + size].clone().view(dtype).reshape(shape)
            start += size + -size % ALIGNMENT
        return _chain(description, tensors), facts
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"state_dict: expected a chain as state_dict() gives it, received a changed one ({error!r})") from error


def _bytes(value: Tensor) -> Tensor:
    plain = value.detach().cpu().contiguous().flatten()
    return (torch.view_as_real(plain).flatten() if plain.is_complex() else plain).view(torch.uint8)


def read_folder(folder: Path) -> Chain:
    """See :meth:`~cola_lightning.chain.Chain.load`."""
    if not (folder / JSON_NAME).is_file() or not (folder / TENSORS_NAME).is_file():
        raise UserError(f"chain: expected a folder with {JSON_NAME} and {TENSORS_NAME}, received {str(folder)!r}")
    try:
        description = parse_json((folder / JSON_NAME).read_text())
        check_version(description["format_version"], str(folder / JSON_NAME))
        if description["sha256"] == _sha256(folder / TENSORS_NAME):
            return _chain(description, load_file(folder / TENSORS_NAME))
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"chain: expected a whole chain in {str(folder)!r}, received a damaged one ({error!r})") from error
    raise UserError(f"chain: expected the tensors that {JSON_NAME} tells of in {str(folder)!r}, received a damaged file")


def _chain(description: dict[str, Any], tensors: Mapping[str, Tensor]) -> Chain:
    """The chain of a description.

    Raises:
        ValueError: if it is not that of these tensors, or not as it was written.
    """
    if extra := {int(name.split(".")[1]) for name in tensors} - set(range(len(description["links"]))):
        raise ValueError(f"link {min(extra)} is not told of")
    links = [_link(place, facts, tensors) for place, facts in enumerate(description["links"])]
    chain = Chain(links, base_facts(description["base"]))
    if (checksum := description.pop(JSON_CHECKSUM, None)) is not None and checksum != _sha256_of_json(description):
        raise ValueError(f"{JSON_NAME} holds other values than were written; if it was edited, take {JSON_CHECKSUM} out")
    return chain


def check_version(version: Any, where: str) -> None:
    """Refuses a format that this release does not know.

    Raises:
        UserError: that tells a newer release's, an older one's, and what is no version apart.
    """
    if version in READABLE_VERSIONS and type(version) is int:
        return
    if type(version) is not int or version < 1:
        what = "it is damaged, or another program's"
    else:
        what = f"{'a newer' if version > FORMAT_VERSION else 'an older'} release is needed"
    raise UserError(
        f"chain: expected format version {' or '.join(map(str, READABLE_VERSIONS))}, which this release of cola_lightning "
        f"reads, received {'none' if version is None else repr(version)} in {where}: {what}"
    )


def parse_json(text: str) -> Any:
    """The value of strict JSON.

    Raises:
        ValueError: if it is none: Python's own parser takes ``NaN`` and ``Infinity`` for numbers.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def link_facts(facts: Any) -> dict[str, Any]:
    """What JSON says of a link beside its tensors, each value of its own type; a metric that is null is NaN.

    Raises:
        KeyError, TypeError, ValueError: if something is missing, unknown, or of another type.
    """
    if unknown := facts.keys() - {"index", "rank", "alpha", "start_step", "end_step", "metrics"}:
        raise ValueError(f"a link has no {min(unknown)!r}")
    metrics = {name: math.nan if value is None else _number(value, name) for name, value in facts["metrics"].items()}
    counts = {name: _whole_number(facts[name], name) for name in ("index", "rank", "start_step", "end_step")}
    alpha = _number(facts["alpha"], "alpha")
    if counts["rank"] < 1 or not 0 < alpha < math.inf or counts["end_step"] < counts["start_step"]:
        raise ValueError(f"link {counts['index']} cannot be one of rank {counts['rank']} and alpha {alpha:g}, or of its steps")
    return {**counts, "alpha": alpha, "metrics": metrics}


def base_facts(base: Any) -> dict[str, Any]:
    """What JSON says of a chain's base (see :attr:`~cola_lightning.chain.Chain.base`), each value of its own type.

    Raises:
        KeyError, TypeError, ValueError: if something is of another type, or a part of what identifies a base is missing.
    """
    if not isinstance(base, dict) or not isinstance(base.get("name", ""), str):
        raise TypeError(f"base is {base!r}"[:80])
    if not base.keys() & BASE_FACTS:  # it is not known
        return dict(base)
    dtypes, norms = base["dtypes"], {name: _number(norm, name) for name, norm in base["weight_norms"].items()}
    texts = [base["fingerprint"], *dtypes]
    if not isinstance(dtypes, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"fingerprint and dtypes of base are {texts!r}"[:160])
    hashes = [*base.get("values", {}).values(), *base.get("outside", {}).values()]
    if wrong := [value for value in hashes if not isinstance(value, str | None)]:
        raise TypeError(f"a hash of base is {wrong[0]!r}"[:80])
    return {**base, "weight_norms": norms}


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}"[:80])
    return float(value)


def _whole_number(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{name} is {value!r}"[:80])
    return value


def describe_link(link: Link) -> dict[str, Any]:
    """A link without its tensors, for strict JSON: a metric that is not finite is null."""
    facts = {name: value for name, value in vars(link).items() if name not in ("factors", "metrics", *WHOLE)}
    return facts | {"metrics": {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}}


def _link(place: int, facts: dict[str, Any], tensors: Mapping[str, Tensor]) -> Link:
    """One link of a chain folder, with its tensors.

    Raises:
        ValueError: if it is not the next one, or if tensors are missing or of another shape.
    """
    n_layers = _whole_number(facts["layers"], "layers")
    facts = link_facts({name: value for name, value in facts.items() if name != "layers"})
    rank = facts["rank"]
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
    if wrong := [name for name, (A, B) in factors.items() if (*A.shape[:-1], *B.shape[1:]) != (rank, rank)]:
        raise ValueError(f"link {place} is not of rank {rank} in {wrong[0]!r}")
    return Link(**facts, factors=factors, extras=extras, outside=outside)


def _sha256_of_json(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
