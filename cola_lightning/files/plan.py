"""What a chain does to each tensor of a model's folder: which rows it adds, and which values it replaces."""

import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from cola_lightning.chain.base import BaseIdentity, check_same_norms
from cola_lightning.chain.chain import OUTSIDE, Chain, Link
from cola_lightning.chain.names import matched
from cola_lightning.errors import UserError
from cola_lightning.files.stored import CannotStream, ModelFolder, StoredTensor, chunks, rows_of

HEAD = "lm_head.weight"  # the name of an output layer that shares its weight with the embedding, and is in no file
WITH_HEAD = re.compile(r"LM|ForConditionalGeneration")  # in the names of models with an output layer over the vocabulary
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in)\.weight")
MERGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # the dtypes of weights to which links are added
IN_CACHE = 2**18  # elements of a weight whose norm is computed at once
# transformers' models with layers of Conv1D, whose weights are in x out: a square weight does not show it.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


@dataclass(frozen=True)
class Update:
    """What one link adds to a tensor: the product of two factors, laid out as the tensor is.

    Attributes:
        link: the link's index.
        layer: the layer's name in the link.
        left: rows x rank; of experts, experts x rows x rank. It contains the scaling.
        right: rank x columns; of experts, experts x rank x columns.
    """

    link: int
    layer: str
    left: Tensor
    right: Tensor

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The factors of some of its rows; of experts, of some of the experts."""
        return self.left[first:last], self.right if self.right.dim() == 2 else self.right[first:last]

    def rows(self, first: int, last: int) -> Tensor:
        """Some of its rows; of experts, some of the experts."""
        return torch.matmul(*self.part(first, last))

    def add_to(self, rows: Tensor, first: int, last: int) -> None:
        """Adds some of its rows to those of a tensor, in place."""
        left, right = (factor.to(rows.dtype) for factor in self.part(first, last))
        matrix = rows.view(*rows.shape[: left.dim() - 1], -1)
        matrix.addmm_(left, right) if right.dim() == 2 else matrix.baddbmm_(left, right)

    def sizes(self, first: int, last: int) -> Tensor:
        """An upper bound of the sums of absolute products that make up the rows: it bounds their rounding."""
        left, right = self.part(first, last)
        return torch.matmul(left.norm(dim=-1, keepdim=True), right.norm(dim=-2, keepdim=True))

    def product(self, other: "Update") -> Tensor:
        """The inner product of two updates of a tensor, without computing them."""
        return ((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum()

    def transposed(self) -> "Update":
        """The update with rows and columns exchanged."""
        return replace(self, left=self.right.mT.contiguous(), right=self.left.mT.contiguous())


@dataclass(frozen=True)
class Planned:
    """A tensor of the merged model.

    Attributes:
        start: what has its rows before any link is added: the base, or what takes its place because it was trained whole.
        base: the base's tensor.
        updates: what the links add to it.
    """

    start: StoredTensor | Tensor
    base: StoredTensor | Tensor
    updates: tuple[Update, ...] = ()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which links are added: float32, or float64 for a base or links in it."""
        return functools.reduce(torch.promote_types, (update.left.dtype for update in self.updates), self.base.dtype)

    def norm_of_base(self) -> float:
        """The Frobenius norm of the base's tensor."""
        rows = (rows_of(self.base, *places).flatten() for places in chunks(self.base.shape))
        parts = (part for some in rows for part in torch.split(some, IN_CACHE))
        wide = (part.to(self.compute_dtype) for part in parts)
        return math.sqrt(math.fsum(float(part @ part) for part in wide))

    def merged(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Some of its rows: all is added in :attr:`compute_dtype`, and rounded once."""
        rows = rows_of(self.start, first, last)
        rows = rows.to(self.compute_dtype) if self.updates else rows
        for update in self.updates:
            update.add_to(rows, first, last)
        return rows.to(dtype)


@dataclass(frozen=True)
class Plan:
    """A merged model.

    Attributes:
        folder: the base's.
        chain: the links.
        tensors: by name.
        config: fields of ``config.json`` that differ from the base's.
    """

    folder: ModelFolder
    chain: Chain
    tensors: dict[str, Planned]
    config: dict[str, Any]


def embedding_of(names: Iterable[str]) -> str | None:
    """The name of the input's embedding; None: there is none of the usual names."""
    return next(filter(EMBEDDING.fullmatch, names), None)


def make_plan(folder: ModelFolder, chain: Chain) -> Plan:
    """What a chain makes of a base.

    Raises:
        CannotStream: for layers or modules that the files store otherwise than the model has them.
        UserError: for factors whose sizes do not fit.
    """
    whole = {key: value for key, value in (chain[-1].extras if len(chain) else {}).items() if not key.startswith(OUTSIDE)}
    layers = [f"{layer}{end}" for layer in chain.layers for end in ("", ".weight", "_weight")]
    planned, config = {name: Planned(tensor, tensor) for name, tensor in folder.tensors.items()}, dict[str, Any]()
    embedding, architecture = embedding_of(planned), str(folder.config.get("architectures"))
    is_tied = WITH_HEAD.search(architecture) and folder.ties_head and not matched([HEAD], planned)
    if is_tied and whole and (embedding is None or "MaskedLM" in architecture):
        raise CannotStream(f"base: {str(folder.path)!r} may tie its output layer to a weight that was trained whole")
    if is_tied and embedding is not None:
        planned[HEAD] = planned[embedding]
    names = matched([*whole, *layers], planned)

    def planned_at(*known: str) -> tuple[str, Planned]:
        """The tensor that the chain knows by one of these names."""
        name = next(filter(None, map(names.get, known)), None)
        if name is None:
            raise CannotStream(f"base: {str(folder.path)!r} does not store {known[0]!r} under this name")
        return name, planned[name]

    since = dict[str, int]()
    for key, value in whole.items():
        name, before = planned_at(key)
        planned[name] = replace(before, start=value)
        since[name] = next(k for k in range(len(chain)) if all(link.has_value(key, value) for link in chain.links[k:]))
    for layer in chain.layers:
        name, before = planned_at(layer, f"{layer}.weight", f"{layer}_weight")  # experts have their own names
        if (dtype := before.base.dtype) not in MERGED:
            raise CannotStream(f"base: {str(folder.path)!r} stores the layer {layer!r} in {dtype}".replace("torch.", ""))
        is_conv1d = folder.config.get("model_type") in CONV1D and not name.endswith(HEAD)
        links = [link for link in chain.updates if layer in link.factors and link.index >= since.get(name, 0)]
        updates = [*before.updates, *(_laid_out(link, layer, before.start.shape, is_conv1d) for link in links)]
        if len({update.link for update in updates}) < len(updates):
            raise UserError(f"base: {updates[0].layer!r} and {layer!r} of the chain are one layer of this base: another base")
        planned[name] = replace(before, updates=tuple(sorted(updates, key=lambda update: update.link)))
    if is_tied and embedding is not None:
        starts = [planned[name].start for name in (embedding, HEAD)]
        values = [start for start in starts if isinstance(start, Tensor)]
        if not planned[HEAD].updates and (starts[0] is starts[1] or (len(values) == 2 and torch.equal(*values))):
            del planned[HEAD]
        else:
            config["tie_word_embeddings"] = False
            n_rows = [planned[name].start.shape[0] for name in (embedding, HEAD)]
            if n_rows[0] != n_rows[1]:
                what = f"the model has {n_rows[0]} rows in its embedding, and its output layer {n_rows[1]}"
                raise UserError(f"base: {what}. Train with modules_to_save of both, so that the adapter has both")
    if embedding is not None and planned[embedding].start.shape != planned[embedding].base.shape:
        size = {"vocab_size": planned[embedding].start.shape[0]}
        text = folder.config.get("text_config")  # of a model of texts and images
        config |= {"text_config": text | size} if text is not None and "vocab_size" in text else {}
        config |= size if "vocab_size" in folder.config or "text_config" not in config else {}
    return Plan(folder, chain, planned, config)


def _laid_out(link: Link, layer: str, shape: tuple[int, ...], is_conv1d: bool) -> Update:
    """The update of a layer, laid out as its stored weight is.

    Raises:
        CannotStream: for experts whose layout their shape does not show.
        UserError: for factors of other sizes.
    """
    lora_A, lora_B = link.factors[layer]
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    update = Update(link.index, layer, lora_B.to(dtype) * link.scaling_of(layer), lora_A.to(dtype).contiguous())
    n_out, n_in = lora_B.shape[-2], lora_A.shape[-1]
    if lora_A.dim() > 2 and n_out == n_in:
        raise CannotStream(f"base: the shape of the experts {layer!r} does not show which side is their input")
    sizes = (*shape[: lora_A.dim() - 1], prod(shape[lora_A.dim() - 1 :]))
    if sizes[-2:] == (n_out, n_in) and not (n_out == n_in and is_conv1d):
        return update
    if sizes[-2:] == (n_in, n_out):
        return update.transposed()
    raise UserError(f"base: {layer!r} is {n_out} x {n_in} in the chain, but its weight has the shape {shape}: another base")


def weight_norms(plan: Plan) -> dict[str, float]:
    """The Frobenius norm of each adapted weight of the base, by the layer's name in the chain."""
    return {planned.updates[0].layer: planned.norm_of_base() for planned in plan.tensors.values() if planned.updates}


def check_base(plan: Plan) -> None:
    """Refuses a base on which the chain was not trained, if the chain knows the norms of its base's weights.

    Raises:
        UserError: naming a layer.
    """
    if plan.chain.base.weight_norms:
        check_same_norms(plan.chain.base, BaseIdentity(weight_norms=weight_norms(plan)), plan.chain.sizes())
