"""What an export needs from a module, and from a base that other libraries load by a name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.chain import Chain
from cola_lightning.chain.peft import AdapterBase
from cola_lightning.constants import Dtype


class NamedBase(Protocol):
    """A base that transformers and PEFT load by a name: :class:`~cola_lightning.hf.named_base.TransformersBase` is one."""

    @property
    def model_name(self) -> str:
        """The hub id or the folder of its files."""

    @property
    def dtype(self) -> Dtype:
        """The dtype in which the module loads its weights."""

    @property
    def is_found_by_name(self) -> bool:
        """Whether PEFT finds the base by its name alone."""

    @property
    def new_weights(self) -> Sequence[str]:
        """The names of the weights that the module has initialised, because the files do not contain them."""

    def new_modules(self, model: nn.Module, new_weights: Sequence[str]) -> list[str]:
        """The names of the model's modules that consist of new weights."""

    def load_again(self, *, is_quantized: bool) -> tuple[nn.Module, list[str]]:
        """Loads the base as the user of an adapter does; returns it, and the names of its new weights.

        Args:
            is_quantized: store the weights in 4 bits, as the module does.
        """

    def write(self, folder: Path, base: nn.Module, tokenizer: Any) -> "NamedBase":
        """Writes the module's base, in the dtype of its files, and its tokenizer; a folder with files is left as it is.

        Returns:
            The base with the folder as its name.
        """

    def adapter_base(self, model: nn.Module, modules_to_save: Sequence[str]) -> AdapterBase:
        """The base as an adapter names it, around the loaded model."""

    def loading_code(self, dtype: str, *, is_quantized: bool) -> str:
        """The Python code that loads the base.

        Args:
            dtype: of its weights.
            is_quantized: load it in 4 bits, as the module does.
        """


class ExportableModule(Protocol):
    """A module with a chain: :class:`~cola_lightning.COLAModule` is one.

    It may have a ``tokenizer`` or an ``image_processor``, which is written too.
    """

    constructor_arguments: dict[str, Any]

    @property
    def named_base(self) -> NamedBase | None:
        """The base by its name; None: transformers and PEFT cannot load it by a name."""

    @property
    def base_name(self) -> str:
        """The base's name, in messages and on the model card."""

    @property
    def adapted(self) -> AdaptedModel:
        """The adapted model and its chain."""

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over processes."""

    @property
    def example_input_array(self) -> Any:
        """Lightning's: an input for the model, whose logits are compared; None: a few tokens are the input."""

    def make_model(self) -> None:
        """Makes the model, if it is not made yet."""

    def full_chain(self) -> Chain:
        """The finished links and the current one."""
