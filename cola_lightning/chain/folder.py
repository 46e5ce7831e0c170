"""A chain as a folder, without pickle: ``chain.safetensors`` and ``chain.json``, which is human-readable."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cola_lightning.chain.codec import FOLDER, check_version, describe, links_of, named_tensors, parse_json
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
    try:
        if not (folder / JSON_NAME).is_file() or not (folder / TENSORS_NAME).is_file():
            raise UserError(f"chain: expected a folder with {JSON_NAME} and {TENSORS_NAME}, received {str(folder)!r}")
        description = parse_json((folder / JSON_NAME).read_text(encoding="utf-8"))
        check_version(description["format_version"], FOLDER, str(folder / JSON_NAME))
        if description["sha256"] == _sha256(folder / TENSORS_NAME):
            chain = links_of(description, load_file(folder / TENSORS_NAME))
            checksum = description.pop(JSON_CHECKSUM, None)
            if checksum not in (None, _sha256_of_json(description)):
                raise ValueError(f"{JSON_NAME} was changed after it was written; if that was an edit, remove {JSON_CHECKSUM}")
            return chain
    except OSError as error:
        raise UserError(
            f"chain: expected a chain folder that can be read, received {str(folder)!r} ({error.strerror or error})"
        ) from error
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"chain: expected a whole chain in {str(folder)!r}, received a damaged one ({error!r})") from error
    raise UserError(f"chain: expected the tensors that {JSON_NAME} describes in {str(folder)!r}, received a damaged file")


def _sha256_of_json(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
