"""Where a Hugging Face model comes from: a hub id, a folder, or files inside an installed Python package.

An export also needs to know how transformers and PEFT load that model again.
"""

import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from torch import nn

from cola_lightning import hub
from cola_lightning.constants import Dtype
from cola_lightning.errors import UserError, nearest, nearest_path, one_line
from cola_lightning.lora.quantization import Quantization

PACKAGE_PREFIX = "package:"

# PEFT's names for the tasks of transformers' Auto classes; it has none for pictures.
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}


def package_folder(model_name: str) -> Path:
    """The folder of the installed Python package with the import name after ``package:``.

    Raises:
        UserError: if there is none.
    """
    name = model_name.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.model_name: no package is installed here for {model_name!r}. After {PACKAGE_PREFIX} comes the name by "
            f"which Python imports it{nearest(name, packages_distributions())}"
        )
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Pretrained:
    """The files of a pretrained model.

    Args:
        model_name: a hub id (``facebook/opt-125m``), a folder, or ``package:NAME``: the folder of the installed Python package
            with that import name.
        revision: branch, tag or commit on the hub.
        dtype: of the weights in memory.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; None: transformers' choice.
        trust_remote_code: run the Python files that come with the model.
        gguf_file: name of a GGUF file among the model's files, whose weights transformers de-quantises. A package that holds
            nothing but one GGUF file needs no name.

    Raises:
        UserError: if a package has several GGUF files, and none is named.
    """

    model_name: str
    revision: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        """Finds the GGUF file of a package that has no other model."""
        if self.gguf_file or not self.model_name.startswith(PACKAGE_PREFIX):
            return
        folder = package_folder(self.model_name)
        files = [] if (folder / "config.json").exists() else sorted(path.name for path in folder.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"model.gguf_file: {self.model_name!r} has several files, name one of {', '.join(files)}")
        object.__setattr__(self, "gguf_file", next(iter(files), None))

    @property
    def name(self) -> str:
        """The name, with the revision if one is requested."""
        return self.model_name + (f"@{self.revision}" if self.revision else "")

    def load(self, auto_class: Any, **arguments: Any) -> Any:
        """The result of ``auto_class.from_pretrained`` on the files.

        Args:
            auto_class: one of transformers' Auto classes.
            **arguments: for ``from_pretrained``, besides those that say where the files are.

        Raises:
            UserError: if there is no such package, or no such files, or the class cannot load them.
            HubError: if the files are on the hub, which cannot be reached.
        """
        options = {"trust_remote_code": self.trust_remote_code, "gguf_file": self.gguf_file, "revision": self.revision}
        is_package = self.model_name.startswith(PACKAGE_PREFIX)
        place = str(package_folder(self.model_name)) if is_package else os.path.expanduser(self.model_name)
        try:
            with hub.needed_for(f"model.model_name: {self.model_name!r}"):
                return auto_class.from_pretrained(place, **options, **arguments)
        except (OSError, ValueError) as error:
            what = f"{auto_class.__name__} cannot load a model from {self.model_name!r}"
            is_id = is_package or os.path.isdir(place) or hub.is_repo_id(self.model_name)
            reason = one_line(str(error)) if is_id else f"there is no such folder{nearest_path(place)}"
            raise UserError(f"model.model_name: {what}: {reason}") from error

    def config(self, **fields: Any) -> Any:
        """The model's configuration, with some of its fields given."""
        from transformers import AutoConfig

        return self.load(AutoConfig, **fields)

    def tokenizer(self) -> Any:
        """The model's tokenizer; one without a padding token pads with its end-of-text token, which is masked anyway."""
        from transformers import AutoTokenizer

        tokenizer = self.load(AutoTokenizer)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers' result for a folder without its files
            raise UserError(f"model.model_name: {self.model_name!r} has no tokenizer files")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def model_and_new_weights(self, auto_class: Any, **fields: Any) -> tuple[Any, list[str]]:
        """The model in training mode: ``from_pretrained`` leaves it in evaluation mode, where it would train without dropout.

        Args:
            auto_class: such as ``AutoModelForCausalLM``.
            **fields: of the configuration, such as ``num_labels``.

        Returns:
            The model, and the names of the newly initialised weights, which the files do not contain, or have for another
            number of labels.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        options |= {"ignore_mismatched_sizes": "num_labels" in fields}
        model, info = self.load(auto_class, output_loading_info=True, **options, **fields)
        model.train()
        if self.gguf_file is not None:  # de-quantised: save_pretrained would take it for a quantised model, and refuse
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        return model, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})

    @staticmethod
    def new_modules(model: nn.Module, new_weights: Iterable[str]) -> list[str]:
        """The largest modules that hold new weights and no pretrained one, and single layers that hold both.

        Args:
            model: the model.
            new_weights: the names of its newly initialised weights.
        """
        new, found = set(new_weights), list[str]()
        for name, module in model.named_modules():
            weights = {f"{name}.{key}" for key in module.state_dict()}
            is_new = weights <= new or not any(True for _ in module.children())
            if weights & new and is_new and not any(name.startswith(f"{outer}.") for outer in found):
                found.append(name)
        return found


@dataclass(frozen=True, kw_only=True)
class TransformersBase(Pretrained):
    """A pretrained model and how a module loads it.

    Args:
        auto_class: the name of transformers' Auto class that loads it.
        fields: the fields of its configuration that are passed to the Auto class.
        labels: a classifier's labels; None: it has none, or they are not known.
        new_weights: the names of the weights that the module has initialised, because the files do not contain them.
        quantization: the data type of a base in 4 bits.
        is_changed: whether its values need not be those of the files.
    """

    auto_class: str
    fields: Mapping[str, Any]
    labels: Sequence[str] | None
    new_weights: Sequence[str]
    quantization: Quantization | None
    is_changed: bool = False

    @property
    def is_found_by_name(self) -> bool:
        """Whether transformers and PEFT find the model by its name alone."""
        return not (self.gguf_file or self.model_name.startswith(PACKAGE_PREFIX) or self.is_changed)

    def loading_code(self, dtype: str, *, is_quantized: bool) -> str:
        """The Python code that loads the base; from a folder, if its name is not enough."""
        options = {"dtype": dtype} | dict(self.fields)
        options |= {"revision": self.revision} if self.revision else {}
        if self.labels:  # a pipeline chooses its function by the problem type, and the base may have another
            options |= {"id2label": dict(enumerate(self.labels)), "problem_type": "single_label_classification"}
        options |= {"ignore_mismatched_sizes": True} if "num_labels" in self.fields else {}  # of the head of the files
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        if is_quantized:
            quantization = f"load_in_4bit=True, bnb_4bit_quant_type={self.quantization!r}"
            arguments += f", quantization_config=transformers.BitsAndBytesConfig({quantization})"
        name = os.path.expanduser(self.model_name) if self.is_found_by_name else "path/to/base"
        return f"transformers.{self.auto_class}.from_pretrained({name!r}, {arguments})"
