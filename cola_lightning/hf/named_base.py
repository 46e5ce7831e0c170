"""A language module's base as transformers and PEFT load it, for exports."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola_lightning.chain.peft import AdapterBase
from cola_lightning.hf.pretrained import Pretrained
from cola_lightning.lora.quantization import Quantization
from cola_lightning.merge import cast_floats
from cola_lightning.writing import atomic_folder

# PEFT's names for the tasks of transformers' Auto classes; it has none for pictures.
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}


@dataclass(frozen=True, kw_only=True)
class TransformersBase(Pretrained):
    """A pretrained model and how a module loads it.

    Args:
        auto_class: the name of transformers' Auto class that loads it.
        fields: the fields of its configuration that are passed to the Auto class.
        labels: a classifier's labels; None: it has none, or they are not known.
        new_weights: the names of the weights that the module has initialised, because the files do not contain them.
        quantization: the data type of a base in 4 bits.
        quantize: quantises a model in place, as the module does.
    """

    auto_class: str
    fields: Mapping[str, Any]
    labels: Sequence[str] | None
    new_weights: Sequence[str]
    quantization: Quantization | None
    quantize: Callable[[Any], None]

    def load_again(self, *, is_quantized: bool) -> tuple[nn.Module, list[str]]:
        """Loads the base as the user of an adapter does; returns it, and the names of its new weights."""
        import transformers

        model, new_weights = self.model_and_new_weights(getattr(transformers, self.auto_class), **self.fields)
        if is_quantized:
            self.quantize(model)
        return model, new_weights

    def write(self, folder: Path, base: Any, tokenizer: Any) -> "TransformersBase":
        """Writes the module's base, in the dtype of its files, and its tokenizer; a folder with files is left as it is."""
        if not folder.is_dir() or not any(folder.iterdir()):
            with atomic_folder(folder) as partial:
                cast_floats(base, getattr(torch, self.dtype))
                base.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
        return replace(self, model_name=str(folder.absolute()), revision=None, gguf_file=None, weights=None)

    def adapter_base(self, model: nn.Module, modules_to_save: Sequence[str]) -> AdapterBase:
        """The base as an adapter names it, around the loaded model."""
        name = os.path.expanduser(self.model_name)
        return AdapterBase(model, name, modules_to_save, self.revision, TASKS.get(self.auto_class))

    def loading_code(self, dtype: str, *, is_quantized: bool) -> str:
        """The Python code that loads the base."""
        options = {"dtype": dtype} | dict(self.fields)
        options |= {"revision": self.revision} if self.revision else {}
        options |= {"id2label": dict(enumerate(self.labels))} if self.labels else {}
        options |= {"ignore_mismatched_sizes": True} if "num_labels" in self.fields else {}  # of the head of the files
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        if is_quantized:
            quantization = f"load_in_4bit=True, bnb_4bit_quant_type={self.quantization!r}"
            arguments += f", quantization_config=transformers.BitsAndBytesConfig({quantization})"
        return f"transformers.{self.auto_class}.from_pretrained({os.path.expanduser(self.model_name)!r}, {arguments})"
