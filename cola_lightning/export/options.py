"""The options of an export, checked before anything is loaded."""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cola_lightning.constants import Dtype
from cola_lightning.errors import UserError
from cola_lightning.writing import check_free

Format = Literal["merged", "peft", "chain"]


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, see :meth:`~cola_lightning.COLAModule.export`.

    Attributes:
        folder: the output folder.
        format: the format.
        dtype: for merged.
        verify: load the export, and compare.
        overwrite: replace a folder that is not empty.
    """

    folder: Path
    format: Format
    dtype: Dtype | None = None
    verify: bool = True
    overwrite: bool = False

    def check(self, source: str | Path = "") -> None:
        """Refuses incompatible options, and an output that would replace what must stay.

        Args:
            source: the checkpoint, or the base's name, which may be a folder; it must not be in the output folder.

        Raises:
            UserError: naming the option.
        """
        if self.dtype is not None and self.format != "merged":
            raise UserError(f"dtype: works with --format merged only, got {self.format}")
        if self.format == "peft":
            importlib.import_module("peft")  # an error now, not once the model is loaded
        check_free(self.folder, overwrite=self.overwrite)
        path = Path(os.path.expanduser(source))
        if str(source) and path.exists() and path.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"output: {str(self.folder)!r} contains the base or the checkpoint. Choose another folder")
