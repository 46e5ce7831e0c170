"""What an export is made of, whatever has trained it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.chain import Chain
from cola_lightning.pretrained import TransformersBase


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, as an export needs it.

    Attributes:
        adapted: the model on the CPU, with the exported links and no others. The export uses it up.
        chain: the exported links.
        base_name: the base's name.
        named_base: the base, if transformers and PEFT can load it; None: they know no name of it.
        tokenizer: its tokenizer or image processor, which is written next to it; None: it has none.
        example: inputs whose logits are compared, as Lightning's ``example_input_array``; None: they are made up.
        arguments: the class that trained it, and that class' arguments, for the model card.
        prompt_format: how the model was prompted (``EpochDataModule.prompt_format``); empty: it was not.
        data: which data it was trained on (``EpochDataModule.identity``).
        outside: the names of parameters that were trained outside of the model, which no export contains.
    """

    adapted: AdaptedModel
    chain: Chain
    base_name: str
    named_base: TransformersBase | None = None
    tokenizer: Any = None
    example: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompt_format: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    outside: Sequence[str] = ()
