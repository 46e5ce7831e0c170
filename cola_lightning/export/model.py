"""What an export is made of, whatever has trained it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.chain import Chain
from cola_lightning.chat_template import ChatTemplate, end_tokens
from cola_lightning.pretrained import TransformersBase


@dataclass(frozen=True, kw_only=True)
class TrainedFacts:
    """What a model card says of a trained model.

    Attributes:
        chain: the exported links.
        base_name: the base's name.
        named_base: the base, if transformers and PEFT can load it; None: they know no name of it.
        tokenizer: its tokenizer or image processor; None: it has none.
        arguments: the class that trained it, and that class' arguments.
        prompt_format: how the model was prompted (``EpochDataModule.prompt_format``); empty: it was not, or it is unknown.
        data: which data it was trained on (``EpochDataModule.identity``).
    """

    chain: Chain
    base_name: str
    named_base: TransformersBase | None = None
    tokenizer: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompt_format: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)

    def stop_tokens(self, ends: int | Sequence[int] | None) -> list[int]:
        """The tokens at which its generation stops: at the end of text, and as `cola generate` does, at a turn's.

        Args:
            ends: those of the base's generation config.
        """
        template = ChatTemplate(self.tokenizer, self.prompt_format.get("chat_template_kwargs", {}))
        of_turn = template.stop_tokens if self.prompt_format.get("chat_template") else ()
        return sorted({*end_tokens(ends, self.tokenizer), *of_turn})


@dataclass(frozen=True, kw_only=True)
class TrainedModel(TrainedFacts):
    """A trained model, as an export needs it.

    Attributes:
        adapted: the model on the CPU, with the exported links and no others. The export uses it up.
        example: inputs whose logits are compared, as Lightning's ``example_input_array``; None: they are made up.
        outside: the names of parameters that were trained outside of the model, which no export contains.
    """

    adapted: AdaptedModel
    example: Any = None
    outside: Sequence[str] = ()
