"""Links, low-rank updates from their initialisation to their knot, and chains of them: in memory and in files.

A checkpoint stores the chain instead of weights. Replay passes each link through the same function as its knot did, so the
weights, or the factors stacked next to them, are equal bit for bit.

A stored chain is a description for JSON, and tensors by name. State dicts and chain folders have both.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cola_lightning.chain.base import BaseIdentity
from cola_lightning.errors import UserError, one_line
from cola_lightning.lora.layer import LinkFactors, low_rank_delta
from cola_lightning.writing import atomic_folder

VERSION = 3  # of all that is stored

METADATA = "metadata"  # the name of the tensor that holds the JSON of packed tensors
JSON_NAME, TENSORS_NAME = "chain.json", "chain.safetensors"
JSON_CHECKSUM = "sha256_of_json"  # of all other fields, which contain the tensors'

DESCRIBED = ("index", "rank", "alpha", "start_step", "end_step", "metrics")  # a link's fields, except its tensors
OUTSIDE = "self."  # begins a name among a link's extras that is no name in the model, but in the Lightning module around it


@dataclass(frozen=True, repr=False)
class Link:
    """One finished link: the update ``share * alpha / rank * B A`` for each adapted layer.

    A layer may have a rank and a scaling of its own (``rank_pattern``, ``alpha_pattern``, ``use_rslora``).

    Attributes:
        index: its place in the chain, from 0.
        rank: rank of its factors.
        alpha: the update is scaled by ``alpha / rank``.
        start_step: global step (optimizer steps of the run) at its initialisation.
        end_step: global step at its knot.
        factors: A (rank x in) and B (out x rank) by the layer's name in the model; of experts, a pair for each, stacked.
        extras: what else training changes, with the values at the knot: fully trained parameters, and buffers, by name in the
            model. Names in a Lightning module, outside of its model, begin with ``self.``.
        metrics: the metrics last logged before the knot.
        own_sizes: rank and scaling of the layers that have others than ``rank`` and ``alpha / rank``, by name.
        name: the stage that it belongs to, such as ``sft``; None: its run had no name.
        share: the share of B A that its knot merged. The rest stayed in B, where the next link began with it. 0 for a record:
            its knot only wrote down what the link was.
    """

    index: int
    rank: int
    alpha: float
    start_step: int
    end_step: int
    factors: dict[str, tuple[Tensor, Tensor]]
    extras: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    own_sizes: dict[str, tuple[int, float]] = field(default_factory=dict)
    name: str | None = None
    share: float = 1.0

    def __repr__(self) -> str:
        """One line; tensors are not shown."""
        steps = f"steps {self.start_step} to {self.end_step}"
        metrics = "".join(f", {name} {value:.4g}" for name, value in self.metrics.items() if name.startswith("val_"))
        name = "" if self.name is None else f" ({self.name})"
        return f"Link {self.index}{name}: rank {self.rank}, alpha {self.alpha:g}, {len(self.factors)} layers, {steps}{metrics}"

    @property
    def scaling(self) -> float:
        """The factor in front of B A of layers without a size of their own, which includes the link's share."""
        return self.alpha / self.rank * self.share

    def size_of(self, name: str) -> tuple[int, float]:
        """The rank and the scaling of one layer, without the link's share."""
        return self.own_sizes.get(name, (self.rank, self.alpha / self.rank))

    def scaling_of(self, name: str) -> float:
        """The factor in front of a layer's B A, which includes the link's share."""
        return self.size_of(name)[1] * self.share

    def has_usable_factors(self, name: str) -> bool:
        """Whether one layer's A and B are numbers of one type, of the link's rank in this layer."""
        (A, B), (rank, _) = self.factors[name], self.size_of(name)
        if not (A.dim() == B.dim() >= 2 and A.shape[:-2] == B.shape[:-2] and A.shape[-2] == B.shape[-1] == rank):
            return False
        return A.dtype == B.dtype and (A.is_floating_point() or A.is_complex())

    @property
    def is_record(self) -> bool:
        """Whether its knot only recorded it, so that it adds nothing to a layer: the next link contains it."""
        return self.share == 0

    def has_value(self, key: str, value: Tensor) -> bool:
        """Whether it records this value, by its name in :attr:`extras`."""
        return key in self.extras and (self.extras[key] is value or torch.equal(self.extras[key], value))

    def is_replaced(self, name: str, extras: Mapping[str, Tensor]) -> bool:
        """Whether one layer was trained whole after this link, with its value among a later link's extras."""
        keys = extras.keys() & {name, f"{name}.weight", f"{name}_weight"}
        return not all(self.has_value(key, extras[key]) for key in keys)

    def at_end(self) -> "Link":
        """The link with all of its B A, as the model had it at its end, whatever share of it the knot merged."""
        return replace(self, share=1.0)

    def rest(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of one layer as the link's knot left them to the next link, if that knot merged only a share of B A."""
        lora_A, lora_B = self.factors[name]
        return lora_A, lora_B * (1 - self.share)

    def delta(self, name: str) -> Tensor:
        """The link's update of one layer: out x in."""
        return low_rank_delta(*self.factors[name], self.scaling_of(name))

    def is_same_update(self, other: "Link") -> bool:
        """Whether both links add the same update to the same layers, bit for bit."""
        return self.factors.keys() == other.factors.keys() and all(
            self.scaling_of(name) == other.scaling_of(name) and all(map(torch.equal, pair, other.factors[name]))
            for name, pair in self.factors.items()
        )

    def norm(self) -> float:
        """Frobenius norm of the link's update over all layers."""
        # ||BA||^2 = tr(B'B AA'): two rank x rank matrices instead of one out x in.
        squares = sum(
            float(((B.mH @ B) * (A @ A.mH).conj()).sum().real) * self.scaling_of(name) ** 2
            for name, (A, B) in self.factors.items()
        )
        return math.sqrt(max(squares, 0.0))  # in this order NaN stays NaN


def is_of_experts(lora_A: Tensor) -> bool:
    """Whether a factor holds one matrix for each expert."""
    return lora_A.dim() > 2


def factors_of_sum(links: Sequence[LinkFactors]) -> tuple[Tensor, Tensor]:
    """Factors of the sum of links: A's rows and the scaled B's columns, link after link."""
    lora_A = torch.cat([lora_A for lora_A, _, _ in links], dim=-2)
    return lora_A, torch.cat([lora_B * scaling for _, lora_B, scaling in links], dim=-1)


def core_of_product(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q, C and P with B A = Q C P^T, where Q and P have orthonormal columns: the SVD of the small C gives that of B A.

    Shape:
        ``lora_A``: rank x in; ``lora_B``: out x rank; Q: out x k; C: k x l; P: in x l, in float64 (complex128 for complex
        factors), where k and l are rank, or out and in where these are smaller.
    """
    compute_dtype = torch.promote_types(lora_A.dtype, torch.float64)
    q, r = torch.linalg.qr(lora_B.to(compute_dtype))
    p, s = torch.linalg.qr(lora_A.to(compute_dtype).mT)
    return q, r @ s.mT, p


@dataclass(repr=False)
class Chain:
    """Finished links in order.

    Attributes:
        links: the links, ``links[k].index == k``.
        base: identifies the base; without a fingerprint if it is unknown.

    Example:
        >>> factors = {"fc": (torch.ones(1, 3), torch.ones(2, 1))}
        >>> chain = Chain([Link(0, rank=1, alpha=1.0, start_step=0, end_step=10, factors=factors)])
        >>> chain.delta("fc").shape, chain.total_rank("fc"), chain[-1]
        (torch.Size([2, 3]), 1, Link 0: rank 1, alpha 1, 1 layers, steps 0 to 10)
    """

    links: list[Link] = field(default_factory=list)
    base: BaseIdentity = field(default_factory=BaseIdentity)

    def __len__(self) -> int:
        return len(self.links)

    def __getitem__(self, index: int) -> Link:
        """A link, by its index; -1 is the last."""
        return self.links[index]

    def __repr__(self) -> str:
        """The base's name and a line for each link; tensors are not shown."""
        lines = [f"Chain of {len(self)} link{'' if len(self) == 1 else 's'} on {self.base.name or 'an unknown base'}"]
        return "\n  ".join([*lines, *map(repr, self.links)])

    @property
    def updates(self) -> list[Link]:
        """The links that add something to a layer: all but records."""
        return [link for link in self.links if not link.is_record]

    def trained(self) -> "Chain":
        """The chain without a last link that was never trained: its B is zero, and all else is as after the link before it."""
        if len(self) < 2 or any(lora_B.any() for _, lora_B in self[-1].factors.values()):
            return self
        before, after = self[-2].extras, self[-1].extras
        is_same = before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
        return Chain(self.links[:-1], self.base) if is_same else self

    def renamed(self, names: Mapping[str, str]) -> "Chain":
        """The chain for a model whose layers have other names."""

        def rename(values: Mapping[str, Any]) -> dict[str, Any]:
            return {names.get(name, name): value for name, value in values.items()}

        links = [replace(link, factors=rename(link.factors), own_sizes=rename(link.own_sizes)) for link in self.links]
        return Chain(links, self.base)

    def append(self, link: Link) -> None:
        """Adds the next finished link, whose index is the chain's length."""
        assert link.index == len(self.links), "links are appended in order"
        self.links.append(link)

    def delta(self, name: str) -> Tensor:
        """The whole chain's update of one layer: the sum of its links' updates (out x in)."""
        return torch.stack([link.delta(name) for link in self.links if name in link.factors]).sum(0)

    def link_factors(self, name: str) -> list[LinkFactors]:
        """A, B and the scaling of each link that adds something to a layer, in order."""
        return [(*link.factors[name], link.scaling_of(name)) for link in self.updates if name in link.factors]

    def total_rank(self, name: str) -> int:
        """The sum of the ranks of its :attr:`updates` for one layer: an upper bound of the rank of :meth:`delta`."""
        return sum(lora_A.shape[-2] for lora_A, _, _ in self.link_factors(name))

    def truncate(self, n: int | str) -> "Chain":
        """The chain as it was after its first n links, or after the last link of a stage; the tensors are not copied.

        The last of these links is whole, also if its knot merged only a share of it: the rest was in the model, too.

        Raises:
            UserError: if n is negative or the chain has fewer links, or no such stage.
        """
        links = self.links[: number_of_links(n, [link.name for link in self.links])]
        return Chain([*links[:-1], *(link.at_end() for link in links[-1:])], self.base)

    def scaled(self, scale: Mapping[int | str, float]) -> "Chain":
        """A chain of the same links, with their updates multiplied by factors. A factor of 0 leaves a link out.

        The update of a link is what its knot merged: with ``share``, the rest belongs to the next link. After a record, it is
        the difference to that record. What the last link records besides its factors (``extras``) is not scaled: the new
        chain's last link has it, and no earlier link has an update of a layer that was trained whole after it. From the first
        scaled link on the links have no metrics, because those were the metrics of another model.

        Args:
            scale: the factors, by a stage's name or a link's index, which goes before the name.

        Raises:
            UserError: for a stage or an index that no link has.

        Source: Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT, arXiv 2109.01903), section 3.
        """
        if not scale:
            return self
        # In YAML, 1.5 and true are no texts, and int() would take them for 1.
        factors = {as_number(key) if isinstance(key, str) else key: factor for key, factor in scale.items()}
        links, is_scaled, last = list[Link](), False, self.links[-1].extras if self.links else {}
        names = [link.name for link in self.links]
        for key, factor in factors.items():
            if key not in names and (isinstance(key, bool) or key not in range(len(names))):
                raise unknown_stage("scale", key, names)
            if not math.isfinite(factor):
                raise UserError(f"scale: the factor of {key!r} must be a finite number, got {factor}")
        each = [factors.get(link.index, 1.0 if link.name is None else factors.get(link.name, 1.0)) for link in self.links]
        for link, factor, after in zip(self.links, each, [*each[1:], 1.0], strict=False):
            is_scaled |= factor != 1
            if link.is_record and factor != after:  # the next link's change is its difference to this one
                link, factor = link.at_end(), factor - after
            if factor != 0:
                metrics = {} if is_scaled else link.metrics
                factors_left = {name: pair for name, pair in link.factors.items() if not link.is_replaced(name, last)}
                sizes = {name: (rank, factor * scaling) for name, (rank, scaling) in link.own_sizes.items()}
                link = replace(link, alpha=factor * link.alpha, own_sizes=sizes)
                links.append(replace(link, index=len(links), factors=factors_left, metrics=metrics))
        if links:
            links[-1] = replace(links[-1], extras=last)
        return Chain(links, self.base)

    def sizes(self) -> dict[str, int]:
        """The number of values of each adapted weight, by the layer's name."""
        pairs = ((name, pair) for link in self.links for name, pair in link.factors.items())
        return {name: prod(lora_B.shape[:-1]) * lora_A.shape[-1] for name, (lora_A, lora_B) in pairs}

    @property
    def layers(self) -> list[str]:
        """The names of the layers that the links adapt, in the model's order."""
        return list(dict.fromkeys(name for link in self.links for name in link.factors))

    def is_beginning_of(self, other: "Chain") -> bool:
        """Whether the other chain starts with this one's links: the same factors, to the bit."""
        if len(self) > len(other):
            return False
        return all(mine.is_same_update(theirs) for mine, theirs in zip(self.links, other.links, strict=False))

    # ------------------------------------------------------------------ how it is stored

    def describe(self) -> dict[str, Any]:
        """The chain without its tensors, for strict JSON."""
        return {
            "format_version": VERSION,
            "base": asdict(self.base),
            "targets": self.layers,
            "links": [describe_link(link) | {"layers": len(link.factors)} for link in self.links],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors: ``{k}.{layer}.lora_A`` and ``.lora_B``, ``{k}.extras.{name}``."""
        tensors: dict[str, Tensor] = {}
        for link in self.links:
            for name, (lora_A, lora_B) in link.factors.items():
                tensors |= {f"{link.index}.{name}.lora_A": lora_A, f"{link.index}.{name}.lora_B": lora_B}
            tensors |= {f"{link.index}.extras.{name}": value for name, value in link.extras.items()}
        return tensors

    @classmethod
    def of(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Self:
        """The chain of a :meth:`describe` and its :meth:`tensors`.

        Raises:
            UserError: for an unknown format version, and for factors that are missing or that no link can have.
            KeyError, TypeError: if the description does not match the tensors otherwise.
        """
        check_version(description["format_version"], where)
        chain = cls(base=BaseIdentity(**description["base"]))
        for described in description["links"]:
            start = f"{described['index']}."
            values = {name.removeprefix(start): tensor.cpu() for name, tensor in tensors.items() if name.startswith(start)}
            pairs = {name: [values.pop(f"{name}.lora_{factor}", None) for factor in "AB"] for name in description["targets"]}
            factors = {name: (A, B) for name, (A, B) in pairs.items() if A is not None and B is not None}
            extras = {name.removeprefix("extras."): value for name, value in values.items()}
            link = Link(**link_fields(described), factors=factors, extras=extras)
            if len(factors) != described["layers"]:
                without = next((repr(name) for name in pairs if name not in factors), "a layer")
                raise UserError(f"chain: {where!r} has no factors of {without} in link {link.index}")
            if wrong := [name for name in factors if not link.has_usable_factors(name)]:
                raise UserError(
                    f"chain: in {where!r}, link {link.index} has factors of {wrong[0]!r} with NaN, or of another rank"
                )
            chain.links.append(link)
        return chain

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the chain as a folder, atomically.

        Args:
            folder: the folder, which is created.
            overwrite: replace a folder that is not empty.

        Raises:
            UserError: for a folder that is not empty, without ``overwrite``.
            DiskError: if it cannot be written.
        """
        with atomic_folder(Path(folder), overwrite=overwrite) as partial:
            self.write(partial)

    def write(self, folder: Path) -> None:
        """Writes its two files, without pickle: ``chain.safetensors``, and ``chain.json``, which is human-readable."""
        # Clones: safetensors refuses slices of a larger tensor and tensors that share memory.
        tensors = {name: value.detach().clone().contiguous() for name, value in self.tensors().items()}
        save_file(tensors, folder / TENSORS_NAME)
        description = self.describe() | {"sha256": _sha256(folder / TENSORS_NAME)}
        description[JSON_CHECKSUM] = _sha256_of_json(description)
        text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / JSON_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads a chain that :meth:`save` wrote.

        Raises:
            UserError: if the folder holds no chain, a damaged one, or one of an unknown format version.
        """
        folder = Path(folder)
        with damage_refused(f"chain: the chain in {str(folder)!r}"):
            description = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
            check_version(description["format_version"], str(folder / JSON_NAME))
            is_same = description.pop(JSON_CHECKSUM) == _sha256_of_json(description)
            if not is_same or description["sha256"] != _sha256(folder / TENSORS_NAME):
                raise ValueError("a checksum differs")
            return cls.of(description, load_file(folder / TENSORS_NAME), str(folder))


def check_version(version: Any, where: str) -> None:
    """Refuses a format version that this release cannot read.

    Raises:
        UserError: which says which version it is.
    """
    if version != VERSION or type(version) is not int:
        raise UserError(f"chain: this release reads format version {VERSION}, but {where} has {version!r}")


@contextmanager
def damage_refused(what: str) -> Iterator[None]:
    """Inside the block, what damaged or missing files raise becomes a UserError, which begins with what they hold."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # json and safetensors may raise anything for damaged bytes
        raise UserError(f"{what} is damaged or incomplete ({one_line(repr(error))})") from error


def check_links(links: int, total: int) -> None:
    """Refuses a number of links that a chain of ``total`` links does not have."""
    if not 0 <= links <= total:
        raise UserError(f"links: must be between 0 and {total}, the length of the chain, got {links}")


def number_of_links(links: int | str | None, names: Sequence[str | None]) -> int:
    """How many links are meant, from the first.

    Args:
        links: their number; the name of a stage, whose last link is the last one that is meant; or None: all.
        names: the names of the chain's links.

    Raises:
        UserError: if the chain has fewer links, or no such stage.

    Example:
        >>> [number_of_links(links, ["sft", "sft", "dpo"]) for links in ("sft", "dpo", 1, "1", None)]
        [2, 3, 1, 1, 3]
    """
    links = len(names) if links is None else as_number(links)
    if isinstance(links, str):
        if links not in names:
            raise unknown_stage("links", links, names)
        return max(index for index, name in enumerate(names) if name == links) + 1
    check_links(links, len(names))
    return links


def as_number(links: int | str) -> int | str:
    """A number that was typed as text, as a number; the name of a stage as it is."""
    with suppress(ValueError):
        return int(links)
    return links


def unknown_stage(option: str, stage: int | str, names: Sequence[str | None]) -> UserError:
    """The error for an option that names a stage, or a link by its index, which a chain with links of these names lacks."""
    stages = ", ".join(dict.fromkeys(name for name in names if name is not None))
    known = f"The stages are: {stages}" if stages else "No link of this chain has a name"
    return UserError(f"{option}: there is no stage or link {stage!r} among {len(names)} links. {known}")


def _sha256_of_json(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_link(link: Link) -> dict[str, Any]:
    """A link without its tensors; a non-finite metric is null."""
    metrics = {name: value if math.isfinite(value) else None for name, value in link.metrics.items()}
    optional = {name: value for name in ("own_sizes", "name") if (value := getattr(link, name))}
    optional |= {} if link.share == 1 else {"share": link.share}
    return {name: getattr(link, name) for name in DESCRIBED} | {"metrics": metrics} | optional


def link_fields(described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a link from :func:`describe_link`; a null metric becomes NaN."""
    metrics = {name: math.nan if value is None else value for name, value in described["metrics"].items()}
    own_sizes = {name: (rank, scaling) for name, (rank, scaling) in described.get("own_sizes", {}).items()}
    fields = {name: described[name] for name in DESCRIBED} | {"metrics": metrics, "own_sizes": own_sizes}
    return fields | {"name": described.get("name"), "share": described.get("share", 1.0)}


# ---------------------------------------------------------------------- tensors alone


def pack(chain: Chain, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """A chain, and facts about its run, as tensors by name: what every reader and writer of state dicts takes.

    The chain's :meth:`~Chain.tensors`; a fact that is a dict of tensors as ``{fact}.{name}``; and all else as JSON, whose bytes
    are the tensor ``metadata``.

    Args:
        chain: the chain.
        facts: by name, each for JSON, or a dict of tensors.
    """
    groups = {fact: value for fact, value in facts.items() if _is_of_tensors(value)}
    others = {fact: value for fact, value in facts.items() if fact not in groups}
    text = json.dumps(chain.describe() | {"facts": others})
    grouped = {f"{fact}.{name}": value for fact, values in groups.items() for name, value in values.items()}
    return chain.tensors() | grouped | {METADATA: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def unpack(tensors: Mapping[str, Tensor], where: str) -> tuple[Chain, dict[str, Any]]:
    """The chain and the facts, from :func:`pack`.

    Raises:
        UserError: for an unknown format version.
    """
    description = json.loads(bytes(tensors[METADATA].tolist()))
    facts: dict[str, Any] = description["facts"]
    for name, value in tensors.items():
        fact, _, value_name = name.partition(".")
        if value_name and not fact.isdigit():
            facts.setdefault(fact, {})[value_name] = value.cpu()
    return Chain.of(description, tensors, where), facts


def _is_of_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(part, Tensor) for part in value.values())
