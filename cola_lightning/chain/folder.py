"""A chain as a folder, without pickle: ``chain.safetensors`` and ``chain.json``, which is human-readable."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cola_lightning.chain.codec import FOLDER, check_version, describe, links_of, named_tensors
from cola_lightning.chain.link import Link
from cola_lightning.errors import UserError
from cola_lightning.writing import whole_folder

JSON_NAME, TENSORS_NAME = "chain.json", "chain.safetensors"
JSON_CHECKSUM = "sha256_of_json"  # checksum of all other fields; absent from an edited one


def write_folder(links: Sequence[Link], base: Mapping[str, Any], folder: Path, *, overwrite: bool = False) -> None:
    """See :meth:`~cola_lightning.chain.Chain.save`."""
    with whole_folder(folder, overwrite=overwrite) as partial:
        write_files(links, base, partial)


def write_files(links: Sequence[Link], base: Mapping[str, Any], folder: Path) -> None:
    """Writes the two files of a chain into a folder."""
    # Clones: safetensors refuses slices of a larger tensor and tensors that share memory.
    save_file({name: value.clone().contiguous() for name, value in named_tensors(links).items()}, folder / TENSORS_NAME)
    description = describe(links, base, FOLDER.version) | {"sha256": _sha256(folder / TENSORS_NAME)}
    description[JSON_CHECKSUM] = _sha256_of_json(description)
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / JSON_NAME).write_text(text, encoding="utf-8")


def read_folder(folder: Path) -> tuple[list[Link], dict[str, Any]]:
    """The links of a chain folder and the description of their base; see :meth:`~cola_lightning.chain.Chain.load`."""
    if not (folder / JSON_NAME).is_file() or not (folder / TENSORS_NAME).is_file():
        raise UserError(f"chain: expected a folder with {JSON_NAME} and {TENSORS_NAME}, received {str(folder)!r}")
    try:
        description = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        check_version(description["format_version"], FOLDER, str(folder / JSON_NAME))
        is_earlier = description["format_version"] == 1  # which has one checksum, of the tensors
        is_same = is_earlier or description.pop(JSON_CHECKSUM) == _sha256_of_json(description)
        if not is_same or description["sha256"] != _sha256(folder / TENSORS_NAME):
            raise ValueError("a checksum differs")
        return links_of(description, load_file(folder / TENSORS_NAME))
    except UserError:
        raise
    except (OSError, AttributeError, LookupError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"chain: expected a whole chain in {str(folder)!r}, received a damaged one ({error!r})") from error


def _sha256_of_json(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
