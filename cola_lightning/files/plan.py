"""What a chain does to each tensor of a model's folder: which rows it adds, and which values it replaces."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from cola_lightning.chain.chain import OUTSIDE, Chain
from cola_lightning.chain.names import Names
from cola_lightning.errors import UserError
from cola_lightning.files.stored import CannotStream, ModelFolder, StoredTensor, chunks
from cola_lightning.lora.layer import LinkFactors

HEAD = "lm_head.weight"  # the name of an output layer that shares its weight with the embedding, and is in no file
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in)\.weight")
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

    def rows(self, first: int, last: int) -> Tensor:
        """Some of its rows; of experts, some of the experts."""
        return torch.matmul(self.left[first:last], self.right if self.right.dim() == 2 else self.right[first:last])

    def sizes(self, first: int, last: int) -> Tensor:
        """An upper bound of the sums of absolute products that make up the rows: it bounds their rounding."""
        left, right = self.left[first:last], self.right if self.right.dim() == 2 else self.right[first:last]
        return torch.matmul(left.norm(dim=-1, keepdim=True), right.norm(dim=-2, keepdim=True))

    def product(self, other: "Update") -> Tensor:
        """The inner product of two updates of a tensor, without computing them."""
        return ((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum()

    def times(self, factor: float) -> "Update":
        """The update multiplied by a factor."""
        return replace(self, left=self.left * factor)

    def transposed(self) -> "Update":
        """The update with rows and columns exchanged."""
        return replace(self, left=self.right.mT.contiguous(), right=self.left.mT.contiguous())


@dataclass(frozen=True)
class Planned:
    """A tensor of the merged model.

    Attributes:
        base: the base's tensor; None: the base has none.
        updates: what the links add to it.
        value: what takes its place: a module that was trained whole.
    """

    base: StoredTensor | None
    updates: tuple[Update, ...] = ()
    value: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's."""
        return tuple(self.base_or_value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype, or that of the value if the base has no such tensor."""
        return self.base_or_value.dtype if self.base is None else self.base.dtype

    @property
    def base_or_value(self) -> Any:
        """What has its rows before any link is added."""
        return self.base if self.value is None else self.value

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which links are added."""
        return torch.promote_types(self.dtype, torch.float32)

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the sum of all updates."""
        left = torch.cat([update.left for update in self.updates], dim=-1)
        return left, torch.cat([update.right for update in self.updates], dim=-2)

    def rows(self, first: int, last: int) -> Tensor:
        """Some of its rows before any link is added."""
        if self.value is not None:
            return self.value[first:last] if self.value.dim() else self.value
        assert self.base is not None
        return self.base.rows(first, last)

    def merged(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Some of its rows: all is added in float32 (float64 for a base in it), and rounded once."""
        rows = self.rows(first, last)
        if not rows.is_floating_point():
            return rows
        if self.updates:
            rows = rows.to(self.wide)
            left, right = self._factors
            matrix, left = rows.view(*rows.shape[: left.dim() - 1], -1), left[first:last]
            matrix.addmm_(left, right) if right.dim() == 2 else matrix.baddbmm_(left, right[first:last])
        return rows.to(dtype)


@dataclass(frozen=True)
class Plan:
    """A merged model.

    Attributes:
        folder: the base's.
        tensors: by name.
        config: fields of ``config.json`` that differ from the base's.
    """

    folder: ModelFolder
    tensors: dict[str, Planned]
    config: dict[str, Any]

    @property
    def embedding(self) -> str | None:
        """The name of the input's embedding; None: it has none of the usual names."""
        return embedding_of(self.tensors)


def embedding_of(names: Iterable[str]) -> str | None:
    """The first name that an input's embedding has; None: there is none."""
    return next(filter(EMBEDDING.fullmatch, names), None)


def make_plan(folder: ModelFolder, chain: Chain) -> Plan:
    """What a chain makes of a base.

    Raises:
        CannotStream: for layers or modules that the files store otherwise than the model has them.
        UserError: for factors whose sizes do not fit.
    """
    names, config = Names(folder.tensors), dict[str, Any]()
    planned = {name: Planned(tensor) for name, tensor in folder.tensors.items()}
    embedding = embedding_of(folder.tensors)
    has_head = names.find(HEAD) is not None
    for layer in chain.layers:
        name = next(filter(None, map(names.find, (f"{layer}.weight", layer, f"{layer}_weight"))), None)
        if name is None and f"{layer}.weight".endswith(HEAD) and embedding is not None:  # now it has a weight of its own
            name, planned[HEAD] = HEAD, Planned(folder.tensors[embedding])
        if name is None:
            raise CannotStream(f"base: {str(folder.path)!r} does not store the layer {layer!r} under this name")
        shape, is_conv1d = planned[name].shape, folder.config.get("model_type") in CONV1D and not name.endswith(HEAD)
        updates = _updates(chain, layer, shape, is_conv1d=is_conv1d)
        planned[name] = Planned(planned[name].base, updates)
    extras = {name: value for name, value in (chain[-1].extras if len(chain) else {}).items() if not name.startswith(OUTSIDE)}
    for key, value in extras.items():
        name = names.find(key) or (HEAD if key.endswith(HEAD) and embedding is not None else None)
        if name is None:
            raise CannotStream(f"base: {str(folder.path)!r} has no {key!r}, which the chain replaces")
        planned[name] = Planned(planned[name].base if name in planned else folder.tensors[str(embedding)], value=value)
    if embedding is not None and not has_head and "LM" in str(folder.config.get("architectures")):
        new = planned[embedding].value
        if HEAD not in planned and new is not None:  # only the input's embedding was trained
            planned[HEAD] = Planned(folder.tensors[embedding])
        elif HEAD in planned and (head := planned[HEAD].value) is not None and new is not None and torch.equal(head, new):
            del planned[HEAD]  # they are still one
        config |= {"tie_word_embeddings": False} if HEAD in planned else {}
    if embedding is not None and planned[embedding].shape != folder.tensors[embedding].shape:
        config["vocab_size"] = planned[embedding].shape[0]
    return Plan(folder, planned, config)


def _updates(chain: Chain, layer: str, shape: tuple[int, ...], *, is_conv1d: bool) -> tuple[Update, ...]:
    """The updates of a layer, laid out as its stored weight is.

    Raises:
        CannotStream: for experts whose layout their shape does not show.
        UserError: for factors of other sizes.
    """
    updates = []
    for link in chain.updates:
        if layer in link.factors:
            factors = (*link.factors[layer], link.scaling)
            updates.append(_laid_out(link.index, layer, factors, shape, is_conv1d=is_conv1d))
    return tuple(updates)


def _laid_out(link: int, layer: str, factors: LinkFactors, shape: tuple[int, ...], *, is_conv1d: bool) -> Update:
    lora_A, lora_B, scaling = factors
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    update = Update(link, layer, lora_B.to(wide) * scaling, lora_A.to(wide).contiguous())
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
    norms = {}
    for planned in plan.tensors.values():
        for update in planned.updates[:1]:
            parts = (torch.linalg.vector_norm(planned.rows(*rows), dtype=planned.wide) for rows in chunks(planned.shape))
            norms[update.layer] = float(torch.stack(list(parts)).norm())
    return norms
