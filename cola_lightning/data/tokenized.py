"""Base class of data modules whose rows are tokenized."""

from typing import Any, get_args

from typing_extensions import override

from cola_lightning.data.base import from_module
from cola_lightning.data.reading import TextUnit
from cola_lightning.data.render import TooLong
from cola_lightning.data.source import Source, SourceDataModule
from cola_lightning.errors import UserError, check_name


class TokenizedDataModule(SourceDataModule):
    """Rows that the trained module's tokenizer tokenizes.

    Args:
        source: A file, a folder, or the id of a data set on the hub.
        subset: Name of a configuration of a data set on the hub.
        text_unit: What a row of a ``.txt`` file is: the whole ``file``, a ``line``, or a ``paragraph``, the text between empty
            lines.
        max_length: Maximum length of a sequence, in tokens. The model's own limit also applies.
        length_grouped: ``true`` puts rows of similar length into a training batch, to reduce padding, and shuffles the batches.
            ``false`` shuffles the rows, as in the paper's runs.
        too_long: ``shorten`` a row that is longer than ``max_length``, or ``skip`` and count it. Plain text is always split.
        **rows: the other arguments of ``SourceDataModule``: how rows are split and batched.

    Attributes:
        tokenizer: the trained module's. To use the rows without a Trainer, set it before ``setup``.
    """

    tokenizer: Any = from_module("tokenizer")

    def __init__(
        self,
        source: tuple[str | Source, ...] | str,
        subset: str | None = None,
        *,
        text_unit: TextUnit = "paragraph",
        max_length: int = 1024,
        length_grouped: bool = True,
        too_long: TooLong = "shorten",
        **rows: Any,
    ) -> None:
        super().__init__(source, subset, **rows)
        if max_length < 1:
            raise UserError(f"data.max_length must be at least 1, got {max_length}")
        check_name("data.text_unit", text_unit, get_args(TextUnit))
        check_name("data.too_long", too_long, get_args(TooLong))
        self.text_unit, self.length_grouped, self.too_long = text_unit, length_grouped, too_long
        self._max_length = max_length

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens: the smaller of the requested length and the model's limit."""
        return int(min(self._max_length, self.tokenizer.model_max_length))

    @override
    def setup(self, stage: str) -> None:
        if self.max_length < self._max_length:
            self._log(f"data.max_length: {self.max_length}, the model's longest sequence, and not {self._max_length}")
        super().setup(stage)
