"""A merge that streams: a base and a chain become a plain model, a few rows of a tensor at a time."""

import json
import re
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cola_lightning.errors import UserError
from cola_lightning.files.plan import Plan, Planned
from cola_lightning.files.stored import CONFIG_NAME, INDEX_NAME, StoredTensor, chunks, write_tensors

# What a trainer saves next to its adapter, for which the base has files, too.
TOKENIZER = re.compile(r"tokenizer.*|.*\.jinja|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model")
TEMPLATES = "additional_chat_templates"  # transformers' name of the folder
NOT_COPIED = re.compile(r"README\.md|adapter_config\.json|\..*|.*\.(safetensors|index\.json|bin|pt|pth|gguf|h5|msgpack)")


def write_merged(plan: Plan, folder: Path, *, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> None:
    """Writes a merged model: shards, index, configuration and tokenizer are the base's, unless the chain changes them.

    Args:
        plan: what the chain makes of the base.
        folder: an empty folder.
        dtype: of its floating-point tensors; None: the base's.
        tokenizer: a folder with the tokenizer that the last trainer saved; None: it is the base's.
    """
    base = plan.folder
    for path in base.path.iterdir():
        if path.is_file() and not NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    has_tokenizer = tokenizer is not None and (tokenizer / "tokenizer_config.json").is_file()
    for path in tokenizer.iterdir() if tokenizer is not None and has_tokenizer else ():
        if path.is_file() and TOKENIZER.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    templates = (tokenizer if tokenizer is not None and has_tokenizer else base.path) / TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / TEMPLATES)
    files = {name: planned.base.file.name for name, planned in plan.tensors.items() if isinstance(planned.base, StoredTensor)}
    dtypes = {name: planned.base.dtype for name, planned in plan.tensors.items()}
    dtypes |= {name: dtype for name, stored in dtypes.items() if dtype is not None and stored.is_floating_point}
    for file in dict.fromkeys(files.values()):
        part = {name: planned for name, planned in plan.tensors.items() if files[name] == file}
        sizes = {name: (dtypes[name], planned.start.shape) for name, planned in part.items()}
        write_tensors(folder / file, sizes, _rows(part, dtypes))
    if (base.path / INDEX_NAME).is_file():
        size = sum(prod(planned.start.shape) * dtypes[name].itemsize for name, planned in plan.tensors.items())
        index = json.loads((base.path / INDEX_NAME).read_text(encoding="utf-8"))
        index |= {"metadata": index.get("metadata", {}) | {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = base.config | plan.config
    if dtype is not None:
        config |= {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if name in config}
    if config != base.config:
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rows(part: dict[str, Planned], dtypes: dict[str, torch.dtype]) -> Iterator[Tensor]:
    """The rows of a shard, in order.

    Raises:
        UserError: for a merged weight that is too large for its dtype.
    """
    for name, planned in part.items():
        for first, last in chunks(planned.start.shape):
            rows = planned.merged(first, last, dtypes[name])
            if rows.dtype == torch.float16 and planned.updates and rows.isinf().any():
                raise UserError(f"base: {name!r} is too large for float16 after the merge")
            yield rows
