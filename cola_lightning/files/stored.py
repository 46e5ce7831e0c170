"""Tensors in safetensors files: read and written a few rows at a time, so that a small machine is enough for a large model.

Files are read by ``read``, not mapped: mapped pages count as memory, and safetensors has no writer that streams.
"""

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cola_lightning.chain.chain import damage_refused
from cola_lightning.errors import UserError, nearest_path
from cola_lightning.hub import is_repo_id, needed_for

INDEX_NAME, WEIGHTS_NAME, CONFIG_NAME = "model.safetensors.index.json", "model.safetensors", "config.json"
# By their names in safetensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32}
DTYPES |= {"U64": torch.uint64, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 2**22  # elements that are computed at once


class CannotStream(UserError):
    """A model that must be loaded whole, and why."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: the file.
        dtype: its dtype.
        shape: its shape.
        start: where its bytes begin in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def rows_of(tensor: StoredTensor | Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """Some rows of a tensor in a file or in memory, or all, along the first dimension, as a copy; a number is one row."""
    if isinstance(tensor, Tensor):
        return (tensor[first:last] if tensor.dim() else tensor).clone()
    last = (*tensor.shape, 1)[0] if last is None else last
    shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()
    n_bytes = prod(shape) * tensor.dtype.itemsize
    values = np.fromfile(tensor.file, np.uint8, n_bytes, offset=tensor.start + first * n_bytes // max(1, last - first))
    return torch.from_numpy(values).view(tensor.dtype).view(shape)


def chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Iterates over the rows of a tensor of this shape, a few at a time: the first of them, and the one after the last."""
    n_rows, of_row = (shape[0], prod(shape[1:])) if shape else (1, 1)
    step = max(1, CHUNK // max(1, of_row))
    for first in range(0, n_rows, step):
        yield first, min(n_rows, first + step)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with the safetensors files of a model.

    Attributes:
        path: the folder.
        tensors: by name, in the order of the files; of a model that was loaded, those in memory.
        config: its ``config.json``; empty if it has none.
    """

    path: Path
    tensors: Mapping[str, StoredTensor | Tensor]
    config: dict[str, Any]

    @property
    def ties_head(self) -> bool:
        """Whether the output layer shares the embedding's weight: by the configuration, or else by transformers' default."""
        from transformers import AutoConfig

        config = self.config
        if "tie_word_embeddings" in config or "model_type" not in config:
            return bool(config.get("tie_word_embeddings", True))
        try:
            return bool(AutoConfig.for_model(**config).tie_word_embeddings)
        except (KeyError, TypeError, ValueError):  # a model's own code
            return True

    @classmethod
    def open(cls, name: str, what: str = "base") -> "ModelFolder":
        """Reads the headers of a model's files.

        Args:
            name: a folder, or an id of the Hugging Face hub, after which ``@`` and a revision may follow.
            what: the name's in messages.

        Raises:
            CannotStream: for a model without safetensors files, or a quantized one.
            UserError: for a folder without a model, and damaged files.
            HubError: for files that are neither in the cache nor on a hub that answers.
        """
        path = _folder(name, what)
        if (path / "adapter_config.json").is_file() and not (path / CONFIG_NAME).is_file():
            raise UserError(f"{what}: {name!r} is an adapter, and not a model")
        config = _read_json(path / CONFIG_NAME, what) if (path / CONFIG_NAME).is_file() else {}
        if "quantization_config" in config:
            method = config["quantization_config"].get("quant_method", "some method")
            raise CannotStream(f"{what}: {name} is quantized ({method}), so its files do not hold its weights as numbers")
        has_index = (path / INDEX_NAME).is_file()
        files = dict.fromkeys(_read_json(path / INDEX_NAME, what)["weight_map"].values() if has_index else [WEIGHTS_NAME])
        if not has_index and not (path / WEIGHTS_NAME).is_file():
            raise CannotStream(f"{what}: {name} has no {WEIGHTS_NAME}")
        return cls(path, {name: tensor for file in files for name, tensor in read_header(path / file, what).items()}, config)


def _folder(name: str, field: str) -> Path:
    """The folder of a model; of one on the hub, that of its files in the cache."""
    path = Path(os.path.expanduser(name))
    repo_id, _, revision = name.partition("@")
    if path.is_dir():
        return path
    if not is_repo_id(repo_id):
        raise UserError(f"{field}: there is no folder {name!r}{nearest_path(path)}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    with needed_for(f"{field}: {name!r}"):
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns))


def _read_json(path: Path, field: str) -> dict[str, Any]:
    with damage_refused(f"{field}: {str(path)!r}"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def read_header(path: Path, field: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in their order in the file.

    Raises:
        UserError: for a damaged file, or one that is too short.
    """
    with damage_refused(f"{field}: {str(path)!r}"), safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        kinds = {name: (DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}
    sizes = [prod(shape) * dtype.itemsize for dtype, shape in kinds.values()]  # without gaps, up to the end of the file
    starts = itertools.accumulate(sizes, initial=path.stat().st_size - sum(sizes))
    return {name: StoredTensor(path, *kind, start) for (name, kind), start in zip(kinds.items(), starts, strict=False)}


def write_tensors(path: Path, sizes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], rows: Iterable[Tensor]) -> None:
    """Writes a safetensors file from parts of its tensors.

    Args:
        path: the file.
        sizes: dtype and shape of each tensor, in their order in the file.
        rows: their rows, in this order.

    Source: the format is described in the README of https://github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sizes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in rows:
            file.write(part.reshape(-1).view(torch.uint8).numpy().data)
