"""The options of an export."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
        max_rank: for peft.
        base_folder: for peft: the folder for its base.
        license: for the model card.
        verify: load the export, and compare.
        overwrite: replace a folder that is not empty.
    """

    folder: Path
    format: Format
    dtype: str | None = None
    max_rank: int | None = None
    base_folder: Path | None = None
    license: str | None = None
    verify: bool = True
    overwrite: bool = False

    def check(self, base: str = "") -> None:
        """Refuses incompatible options, and a folder that holds files, before anything is loaded.

        Args:
            base: a name that may be the folder of the base, which must not be replaced: no checkpoint could be loaded again.

        Raises:
            UserError: naming the option.
        """
        for option, its in (("dtype", "merged"), ("max_rank", "peft"), ("base_folder", "peft")):
            if getattr(self, option) is not None and self.format != its:
                raise UserError(f"{option}: expected --format {its} beside it, received {self.format}")
        if self.max_rank is not None and self.max_rank < 1:
            raise UserError(f"max_rank: expected at least 1, received {self.max_rank}")
        if self.format == "peft" and importlib.util.find_spec("peft") is None:
            raise UserError("format: expected the package peft, received none: pip install peft")
        check_free(self.folder, overwrite=self.overwrite)
        if self.base_folder is not None and self.base_folder.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"base_folder: expected a folder apart from the output, received {str(self.base_folder)!r}")
        path = Path(os.path.expanduser(base))
        if base and path.is_dir() and path.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"output: expected a folder that does not hold the base, received {str(self.folder)!r}")
