"""The proof of a streamed merge, which shares nothing with the plan that wrote it.

The sources are read again, transformers says which stored tensor is a layer's weight, and safetensors' own reader reads the
files. A product with vectors x then shows whether a stored weight W' is W plus the updates: W' x is compared with
W x + the sum of s B (A x). A random x of a few columns shows an error in any of them that is larger than the roundings. With an
x in the span of A's rows, the product contains so much of the update that it is seen below the roundings of half precision.

Source: Freivalds, "Probabilistic machines can use less running time" (IFIP 1977).
"""

import functools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cola_lightning.chain.chain import OUTSIDE, Link, as_number, number_of_links
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.peft import (
    BASE_LAYER,
    CONFIG_NAME,
    FACTORS,
    PREFIX,
    TENSORS_NAME,
    experts_from_peft,
    projection_of,
    read_config,
    value_of_layer,
)
from cola_lightning.chain.sources import Source
from cola_lightning.errors import ExportError
from cola_lightning.export.verify import loading_again, reference_logits
from cola_lightning.files.stored import INDEX_NAME, WEIGHTS_NAME
from cola_lightning.hub import quiet

STANDARD_ERRORS, SMALLEST = 6.0, 0.005  # how far an update's share may be from 1
SMALL = 2**28  # parameters of a model whose logits are compared, too
CHUNK = 2**18  # elements that are multiplied at once: they fit in a cache


class NotProvable(Exception):
    """What transformers does not know of a model, so that its files can only be read back."""


# ---------------------------------------------------------------------- what the sources say

Term = tuple[Tensor, Tensor, float]  # A: rank x in; B: out x rank; and the factor in front of B A. As the source stores them


def links_of(source: Source) -> list[Link]:
    """The links of one source, read from its files; of an adapter, with the scaling of each layer as its configuration says."""
    folder = Path(source.path).expanduser()
    if not (folder / CONFIG_NAME).is_file():
        return [replace(link, name=source.name or link.name) for link in read_chain(source.path).links]
    config = read_config(folder)
    with safe_open(folder / TENSORS_NAME, "pt") as file:
        stored = {key.replace("_orig_mod.", "").removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    link = Link(0, rank=1, alpha=1.0, start_step=0, end_step=0, factors={}, name=source.name)
    for key, value in stored.items():
        wrapper = key.removesuffix(FACTORS[0])
        if wrapper != key:
            projection, lora_B = projection_of(config, wrapper), stored[wrapper + FACTORS[1]]
            layer = projection or wrapper
            alpha = value_of_layer(config, layer, "lora_alpha", "alpha_pattern")
            rank = value_of_layer(config, layer, "r", "rank_pattern")
            link.factors[layer] = (value, lora_B) if projection is None else experts_from_peft(value, lora_B, rank)
            link.own_sizes[layer] = rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
        elif not key.endswith(FACTORS[1]) and ".original_module." not in key:
            name = key.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            link.extras[name.replace(BASE_LAYER, "")] = value
    return [link]


@dataclass(frozen=True)
class Selection:
    """Which links of the sources are merged, and how much of them: the options of ``cola export``.

    Attributes:
        sources: where the links come from, in the order of their training.
        continues: the names of sources in which the adapter before went on.
        links: how many links; None: all.
        scale: factors by a stage's name or a link's index.
    """

    sources: Sequence[Source]
    continues: Collection[str] = ()
    links: int | str | None = None
    scale: Mapping[int | str, float] = field(default_factory=dict)

    def read(self) -> list[tuple[Link, float]]:
        """The links, in order, each with the factor of its update in the merged model."""
        links = list[Link]()
        for source in self.sources:
            theirs = links_of(source)
            pairs = [one.at_end().is_same_update(other.at_end()) for one, other in zip(links, theirs, strict=False)]
            n_shared = (*pairs, False).index(False)
            if links and source.name in self.continues:
                links[-1] = replace(links[-1], share=0.0)
            if n_shared == len(links):  # the longer one knows what became of them
                links = [replace(other, name=one.name) for one, other in zip(links, theirs, strict=False)]
            links += theirs[n_shared:]
        links = links[: number_of_links(self.links, [link.name for link in links])]
        links[-1:] = [last.at_end() for last in links[-1:]]
        scale = {as_number(key) if isinstance(key, str) else key: factor for key, factor in self.scale.items()}
        factors = [scale.get(place, scale.get(link.name or place, 1.0)) for place, link in enumerate(links)]
        # The update after a record is what differs from that record, which the next link contains.
        after = [*factors[1:], 1.0]
        return [(link, f - g if link.is_record else f * link.share) for link, f, g in zip(links, factors, after, strict=False)]


# ---------------------------------------------------------------------- what the files hold


class Files:
    """A model's folder as transformers reads it.

    Args:
        folder: the folder.

    Attributes:
        files: the file of each stored tensor, by its name there.
        model: the model on the meta device.
        stored: the name in the files, by the name in the model.
        tied: the names of parameters that are one, by the configuration; files may hold it once.

    Raises:
        NotProvable: for a model that transformers does not know.
    """

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.files = dict[str, Path]()
        index = folder / INDEX_NAME
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else [WEIGHTS_NAME]
        for path in (folder / name for name in dict.fromkeys(names)):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(list(file.keys()), path)
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device("meta"):
                self.model: Any = getattr(transformers, config.architectures[0])(config)
            mapping = get_model_conversion_mapping(self.model)
        except Exception as error:  # of a model with code of its own, or a configuration that transformers does not read
            raise NotProvable(f"transformers does not know the model in {str(folder)!r}") from error
        self._renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._names: dict[str, Tensor] = self.model.state_dict()
        self.stored = dict[str, str]()
        for key in self.files:
            name, converter = self._rename(key)
            if name in self._names and converter is None:
                self.stored[name] = key
        same = defaultdict[int, list[str]](list)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            same[id(parameter)].append(name)
        self.tied = [names for names in same.values() if len(names) > 1]
        for names in self.tied:
            keys = [self.stored[name] for name in names if name in self.stored]
            self.stored |= {name: keys[0] for name in names if keys and name not in self.stored}

    def _rename(self, key: str) -> tuple[str, str | None]:
        """The model's name of a stored tensor, and what transformers makes of the tensor besides."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(key, self._renamings, self._converters, self.model.base_model_prefix, self._names)

    def name_of(self, name: str) -> str:
        """The model's name of a value, or of the weight of a layer, which the source may know by an earlier one.

        Raises:
            NotProvable: if transformers knows none.
        """
        for key in (name, f"{name}.weight", f"{name}_weight"):
            if (found := self._rename(key)[0]) in self._names:
                return found
        raise NotProvable(f"transformers does not know {name!r} in a {type(self.model).__name__}")

    def module_of(self, name: str) -> nn.Module:
        """The module that has a parameter."""
        module: nn.Module = self.model.get_submodule(name.rpartition(".")[0])
        return module

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        with safe_open(self.files[key], "pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def rows(self, key: str, first: int, last: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """Some rows of a stored tensor, as a copy. Its file is opened for them, because mapped pages count as memory."""
        with safe_open(self.files[key], "pt") as file:
            part = file.get_slice(key)
            rows: Tensor = part[first:last] if part.get_shape() else file.get_tensor(key)
            return rows.to(rows.dtype if dtype is None else dtype, copy=True)


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    n_rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, prod(shape[1:])))
    return ((first, min(first + step, n_rows)) for first in range(0, n_rows, step))


# ---------------------------------------------------------------------- the proof


@dataclass
class Expected:
    """What a tensor of the merged model should be.

    Attributes:
        key: the base's tensor, by its name in the files; empty if a value takes its place.
        value: what was trained whole, in place of the base's tensor.
        terms: what is added to it.
    """

    key: str
    value: Tensor | None = None
    terms: list[Term] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """Whether it is another tensor than the base's."""
        return bool(self.terms) or self.value is not None

    def shape(self, base: Files) -> tuple[int, ...]:
        """Its shape."""
        return base.shape(self.key) if self.value is None else tuple(self.value.shape)

    def start(self, base: Files, first: int = 0, last: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Some of its rows, before anything is added."""
        if self.value is None:
            return base.rows(self.key, first, last, dtype)
        rows = self.value[first:last] if self.value.dim() else self.value
        return rows if dtype is None else rows.to(dtype)


def expected_tensors(base: Files, links: Sequence[tuple[Link, float]]) -> dict[str, Expected]:
    """What the tensors of the merged model should be, by their names in the model."""
    expected = {name: Expected(key) for name, key in base.stored.items()}
    for link, factor in links:
        for key, value in link.extras.items():
            if key.startswith(OUTSIDE):
                continue
            one = expected.setdefault(base.name_of(key), Expected(""))
            if one.value is None or not torch.equal(one.value, value):
                one.value, one.terms = value, []
        for layer, factors in link.factors.items():
            name = base.name_of(layer)
            if name not in expected:
                raise NotProvable(f"the base has no tensor of its own for {layer!r}")
            if factor:
                expected[name].terms.append((*factors, link.size_of(layer)[1] * factor))
    return expected


def _laid_out(base: Files, name: str, term: Term) -> tuple[Tensor, Tensor]:
    """Two factors whose product is an update as the tensor stores it.

    Shape:
        rows x rank, and rank x columns; of experts, a pair for each.
    """
    lora_A, lora_B, factor = term
    shape = base.model.get_parameter(name).shape
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype) * factor
    if len(shape) != 3 or type(base.module_of(name)).__name__.startswith("Conv1d"):
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        is_turned = type(base.module_of(name)).__name__ == "Conv1D"  # transformers' stores in x out
    else:
        is_turned = lora_B.shape[-2] != shape[1]
    return (lora_A.mT, lora_B.mT) if is_turned else (lora_B, lora_A)


def prove(base: Path, merged: Path, selection: Selection) -> list[str]:
    """Proves that a folder holds a base and the updates of some sources, and compares the logits of a small model.

    Args:
        base: the base's folder.
        merged: the merged model's folder.
        selection: the sources, and what of them is merged.

    Returns:
        The lines to report.

    Raises:
        ExportError: naming a tensor that is not what it should be, or for other logits.
        NotProvable: for a model, or a layer, that transformers does not know.
    """
    before, after = Files(base), Files(merged)
    expected = expected_tensors(before, selection.read())
    is_small = sum(parameter.numel() for parameter in after.model.parameters()) <= SMALL
    return [_prove_tensors(before, after, expected), *(_compare_logits(before, after, expected, merged) if is_small else ())]


def _prove_tensors(before: Files, after: Files, expected: Mapping[str, Expected]) -> str:
    """Compares all tensors; returns the result as a sentence."""
    found = dict[str, Comparison]()
    for name, one in expected.items():
        key = after.stored.get(name)
        found[name] = Comparison("is missing") if key is None else _compare(before, name, one, after, key)
    for first, *names in after.tied:
        for name in names:
            is_changed = any(one in expected and expected[one].is_changed for one in (first, name))
            if is_changed and _compare(after, first, Expected(after.stored[first]), after, after.stored[name]).wrong:
                found[name] = Comparison(f"is tied to {first} by config.json")
    others, of_base = (files.files.keys() - set(files.stored.values()) for files in (after, before))
    for key in sorted(others | of_base):  # what transformers fuses, or does not read
        if key in others and key in before.files:
            found[key] = _compare(before, key, Expected(key), after, key)
        else:
            found[key] = Comparison("is not in the base" if key in others else "is missing")
    if wrong := [f"{name} {one.wrong}" for name, one in found.items() if one.wrong]:
        more = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
        raise ExportError(f"the export was deleted: refuted: {wrong[0]}{more}")
    n, small = len(after.files), [one for one in found.values() if one.too_small]
    sentence = f"proven: {n - len(small)} of {n} tensors are those of the merge"
    if small:
        n_small, n_updates = sum(len(one.too_small) for one in small), sum(len(one.terms) for one in expected.values())
        dtype = str(small[0].dtype).removeprefix("torch.")
        sentence = f"too small to be seen in {dtype}: {n_small} of {n_updates} updates; {sentence}"
    return sentence


@dataclass(frozen=True)
class Comparison:
    """What is known of a stored tensor.

    Attributes:
        wrong: what is wrong; empty: nothing.
        too_small: the places of the updates that roundings hide.
        dtype: of the tensor.
    """

    wrong: str = ""
    too_small: Sequence[int] = ()
    dtype: torch.dtype | None = None


def _compare(before: Files, name: str, one: Expected, after: Files, key: str) -> Comparison:
    """Compares a stored tensor with what it should be.

    Args:
        before: the base's files.
        name: the tensor's name in the model.
        one: what it should be.
        after: the merged model's files.
        key: the tensor's name in them.
    """
    shape, expected_shape = after.shape(key), one.shape(before)
    if shape != expected_shape:
        return Comparison(f"has the shape {shape} and not {expected_shape}")
    if one.terms:
        factors = [_laid_out(before, name, term) for term in one.terms]
        dtype = functools.reduce(torch.promote_types, (left.dtype for left, _ in factors), after.rows(key, 0, 1).dtype)
        return _compare_products(before, one, after, key, [(left.to(dtype), right.to(dtype)) for left, right in factors])
    for first, last in _chunks(shape):
        stored, start = after.rows(key, first, last), one.start(before, first, last)
        same = start.to(stored.dtype).contiguous()
        if not torch.equal(same.view(-1).view(torch.uint8), stored.view(-1).view(torch.uint8)):
            return Comparison("has other values than " + ("the base" if one.value is None else "its source"))
    return Comparison()


def _compare_products(
    before: Files, one: Expected, after: Files, key: str, factors: Sequence[tuple[Tensor, Tensor]]
) -> Comparison:
    """Compares W' x with W x + the sum of s B (A x), for two kinds of x.

    Each block of a few columns has an x of random signs that is zero elsewhere. Each update has an x in the span of A's rows.
    Roundings of a row are a random vector, so a product with them has a standard deviation, which a difference may exceed a few
    times. Along an update, the differences of all rows must also cancel out.
    """
    dtype = after.rows(key, 0, 1).dtype
    precision, eps = torch.finfo(dtype), torch.finfo(factors[0][1].dtype).eps
    generator, n_columns = torch.Generator().manual_seed(0), factors[0][1].shape[-1]
    block = next(size for size in (16, 8, 4, 2, 1) if n_columns % size == 0)
    signs = torch.randint(2, (n_columns,), generator=generator).mul(2).sub(1).to(factors[0][1].dtype)
    x = torch.cat([_in_span(right, generator) for _, right in factors], -1)
    of_blocks = [_sums(right * signs, block) for _, right in factors]
    # A x, for the x of all blocks and of all updates; their lengths; and those of A x.
    images_of_all = [torch.cat([blocks, right @ x], -1) for blocks, (_, right) in zip(of_blocks, factors, strict=True)]
    lengths = torch.cat([x.new_full((*x.shape[:-2], 1, n_columns // block), block**0.5), x.norm(dim=-2, keepdim=True)], -1)
    sizes = torch.stack([image.square().sum(-2, keepdim=True) for image in images_of_all]).sum(0).sqrt()
    along = torch.zeros(3, len(factors), dtype=torch.float64)  # for each update: products with what is left, variances, squares
    for first, last in _chunks(after.shape(key)):
        stored, start = after.rows(key, first, last, x.dtype), one.start(before, first, last, x.dtype)
        mine, length, size, *images = (
            part[first:last] if part.dim() > 2 else part for part in (x, lengths, sizes, *images_of_all)
        )
        lefts = [left[first:last] for left, _ in factors]
        updates = [left @ image for left, image in zip(lefts, images, strict=True)]
        stored, start = (rows.view(*updates[0].shape[:-1], -1) for rows in (stored, start))
        change, squares = stored - start, stored.square()
        rest, noise = (
            torch.cat([_sums(blocked, block), whole], -1)
            for blocked, whole in ((change * signs, change @ mine), (squares, squares @ mine.square()))
        )
        rest -= torch.stack(updates).sum(0)
        unit = precision.eps / 2 + (1 + len(factors)) * eps  # of the rounding of W', and of the sums before
        noise = unit * noise.sqrt() + precision.smallest_normal * precision.eps * length
        noise += 64 * eps * torch.stack([left.square().sum(-1, keepdim=True) for left in lefts]).sum(0).sqrt() * size
        if not bool((rest.abs() <= STANDARD_ERRORS * noise).all()):  # also NaN
            return Comparison("is not W + the sum of s B A")
        for place, update in enumerate(updates):
            ours, left_over, error = (part[..., place - len(factors)].double() for part in (update, rest, noise))
            along[:, place] += torch.stack([(left_over * ours).sum(), (error * ours).square().sum(), ours.square().sum()])
    with_update, variances, squares = along
    errors = STANDARD_ERRORS * variances.sqrt()
    if bool((with_update.abs() > errors + SMALLEST * squares).any()):
        return Comparison("is not W + the sum of s B A")
    return Comparison("", [place for place in range(len(factors)) if 0 < squares[place] <= errors[place]], dtype)


def _sums(rows: Tensor, block: int) -> Tensor:
    """The sums of blocks of columns, which are far from each other: so many numbers are added at once."""
    return rows.view(*rows.shape[:-1], block, -1).sum(-2)


def _in_span(right: Tensor, generator: torch.Generator) -> Tensor:
    """A random vector in the span of a factor's rows, as a column; of experts, one for each."""
    weights = torch.randn(*right.shape[:-2], right.shape[-2], 1, generator=generator).to(right.dtype)
    column = right.mT @ weights
    return column / column.square().mean(-2, keepdim=True).sqrt().clamp(min=1e-30)


def _compare_logits(before: Files, after: Files, expected: Mapping[str, Expected], merged: Path) -> list[str]:
    """Compares the logits of the merged model, loaded by transformers, with those of the base plus the updates.

    Returns:
        A line to report; none if no inputs of the model are known.
    """
    state = dict[str, Tensor]()
    for name, one in expected.items():
        value = one.start(before)
        state[name] = value.float() if value.is_floating_point() else value
        for term in one.terms:
            left, right = _laid_out(before, name, term)
            state[name] = state[name] + (left @ right).view(value.shape)
    kind: Any = type(after.model)
    with quiet(), loading_again():
        model = kind.from_pretrained(merged, dtype=torch.float32)  # with what transformers makes of several tensors
        model.load_state_dict(state, strict=False)
        reference = reference_logits(model)
        if reference is None:
            return []
        dtypes = {after.rows(key, 0, 1).dtype for key in after.stored.values()}
        is_rounded = any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes)
        return [reference.compare(kind.from_pretrained(merged, dtype="auto"), "loaded again", is_same=not is_rounded)]
