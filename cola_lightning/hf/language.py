"""What the modules for Hugging Face models share: the model, its tokenizer, and the steps with their metrics.

The model's files come from the hub, from a folder, or from an installed Python package.
"""

import functools
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryF1Score, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.text import SQuAD
from typing_extensions import override

from cola_lightning.errors import UserError, one_line
from cola_lightning.export.verify import Dtype
from cola_lightning.hf.logits import HostValues
from cola_lightning.lora.inject import is_within
from cola_lightning.lora.linear4bit import Quantization, check_quantization, quantize
from cola_lightning.module.module import COLAModule
from cola_lightning.module.run import run_of, trainer_of

PACKAGE_PREFIX = "package:"


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
            "which Python imports it"
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
        """The name, and the revision if one is requested."""
        return self.model_name + (f"@{self.revision}" if self.revision else "")

    @property
    def is_found_by_name(self) -> bool:
        """Whether transformers and PEFT find the model by its name alone."""
        return not self.gguf_file and not self.model_name.startswith(PACKAGE_PREFIX)

    def load(self, auto_class: Any, **arguments: Any) -> Any:
        """The result of ``auto_class.from_pretrained`` on the files.

        Args:
            auto_class: one of transformers' Auto classes.
            **arguments: for ``from_pretrained``, besides those that say where the files are.

        Raises:
            UserError: if there is no such package, or no such files, or the class cannot load them.
        """
        options = {"trust_remote_code": self.trust_remote_code, "gguf_file": self.gguf_file, "revision": self.revision}
        is_package = self.model_name.startswith(PACKAGE_PREFIX)
        place = str(package_folder(self.model_name)) if is_package else os.path.expanduser(self.model_name)
        try:
            return auto_class.from_pretrained(place, **options, **arguments)
        except (OSError, ValueError) as error:
            what = f"{auto_class.__name__} cannot load a model from {self.model_name!r}"
            raise UserError(f"model.model_name: {what}: {one_line(str(error))}") from error

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

    def model_and_new_weights(self, auto_class: Any, *, is_empty: bool = False, **fields: Any) -> tuple[Any, list[str]]:
        """The model in training mode: ``from_pretrained`` leaves it in evaluation mode, where it would train without dropout.

        Args:
            auto_class: such as ``AutoModelForCausalLM``.
            is_empty: only the shapes matter: the weights are not read.
            **fields: of the configuration, such as ``num_labels``.

        Returns:
            The model, and the names of the newly initialised weights, which the files do not contain; none if ``is_empty``.
        """
        options: dict[str, Any] = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        if is_empty:
            options["trust_remote_code"] = self.trust_remote_code
            return auto_class.from_config(self.config(**fields), **options).train(), []
        model, info = self.load(auto_class, output_loading_info=True, **options, **fields)
        model.train()
        if self.gguf_file is not None:  # de-quantised: save_pretrained would take it for a quantised model, and refuse
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        return model, sorted(info["missing_keys"])

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


# ---------------------------------------------------------------------- metrics of labels, options and answers


class Accuracy(MeanMetric):
    """The share of predictions that equal their targets."""

    @override
    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update((predictions == targets).float())


class MatthewsCorrCoef(MulticlassMatthewsCorrCoef):
    """Matthews' correlation coefficient, from -1 to 1; 0 where all predictions or all targets are equal, as in scikit-learn."""

    @override
    def compute(self) -> Tensor:
        is_constant = any((self.confmat.sum(dim) > 0).sum() < 2 for dim in (0, 1))
        return torch.zeros((), device=self.confmat.device) if is_constant else super().compute()


class OfAnswers(SQuAD):
    """One of SQuAD's two metrics of answers, from 0 to 1.

    ``f1`` is the mean over rows of an answer's F1 in words, without case, punctuation and articles; ``exact_match`` the share
    of answers that are right except for these and blanks. If neither an answer nor a reference has a word left ("the" and
    "A"), both are 1, as in SQuAD's evaluation since version 2; the protocol's code, like version 1, has an F1 of 0 there.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @override
    def update(self, texts: list[str], references: list[list[str]]) -> None:  # type: ignore[override]
        """Takes answers, and the references of each; the best match counts."""
        predictions = [{"prediction_text": text, "id": str(k)} for k, text in enumerate(texts)]
        answers = ({"text": some, "answer_start": [0] * len(some)} for some in references)
        targets: list[Any] = [{"answers": some, "id": str(k)} for k, some in enumerate(answers)]
        super().update(predictions, targets)

    @override
    def compute(self) -> torch.Tensor:  # type: ignore[override]
        return super().compute()[self.name] / 100


# By their names: of the number of options, a metric of predictions and targets; and one of generated answers and references.
METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda n_options: Accuracy(),
    "f1": lambda n_options: BinaryF1Score() if n_options == 2 else MulticlassF1Score(n_options, average="macro"),
    "matthews_corrcoef": MatthewsCorrCoef,
}
ANSWER_METRICS = {name: functools.partial(OfAnswers, name) for name in ("f1", "exact_match")}


# ---------------------------------------------------------------------- the module


@dataclass(frozen=True)
class StepOutput:
    """The result of a batch.

    Attributes:
        loss: a scalar to be minimised; a mean over ``size``.
        size: the number of rows or tokens that the mean is over.
        predictions: for the metric, one for each row; None if there is no metric to compute.
        targets: the correct predictions, in the same shape.
    """

    loss: Tensor
    size: int
    predictions: Tensor | None = None
    targets: Tensor | None = None


# By its name: how a metric is made, and what its ``update`` takes.
Measured = dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]]


class LanguageModule(COLAModule, ABC):
    """A Hugging Face model that is fine-tuned with a chain of low-rank links.

    A subclass defines :meth:`step` and the class that loads its model.

    Args:
        model_name: a hub id (``facebook/opt-1.3b``), a folder, or ``package:NAME``: the files inside the installed Python
            package with that import name.
        revision: branch, tag or commit on the hub.
        dtype: of the weights in memory. With ``finished_links: merge`` the adapted weights are stored in float32 nevertheless;
            by default finished links are stacked on a base in half precision.
        quantization: ``nf4`` stores the weights of the pretrained linear layers in 4 bits, by bitsandbytes; they compute in
            ``dtype``. It needs the extra ``nf4``, and cannot be merged into. ``null``: none.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; ``null``: transformers' choice.
        trust_remote_code: run the Python files that come with the model.
        gguf_file: name of a GGUF file among the model's files, to be dequantized; needs the extra ``gguf``. ``null``: that of a
            package which holds no other model.
        loss_average: the training loss is the mean over all rows (or tokens, if the loss is of tokens) of an optimizer
            ``step``, with its accumulated batches and all processes, or over those of a ``batch``, with each batch and process
            alike.
        **chain: the other arguments of :class:`~cola_lightning.COLAModule`.

    Raises:
        UserError: for a model that cannot be found, missing files, and invalid values.
    """

    auto_class: ClassVar[str]

    # **chain, against our rule for constructors: jsonargparse and --help follow it into COLAModule, where each argument is
    # defined, typed and documented once.
    def __init__(
        self,
        model_name: str,
        *,
        revision: str | None = None,
        dtype: Dtype = "float32",
        quantization: Quantization | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        loss_average: Literal["step", "batch"] = "step",
        **chain: Any,
    ) -> None:
        super().__init__(**chain)
        self.loss_average = loss_average
        self.pretrained = Pretrained(model_name, revision, dtype, attn_implementation, trust_remote_code, gguf_file)
        self.named_base = self.pretrained
        self.quantization = quantization
        if quantization is not None:
            check_quantization(quantization)
            if self.lora_config.target_modules is None:
                raise UserError(
                    "model.target_modules: must not be null with model.quantization: 4-bit weights cannot be trained"
                )
        self.new_weights: list[str] = []  # newly initialised weights of the base, once it is made
        self.evaluation_metrics = nn.ModuleDict()  # by stage, name and dataloader, made when needed
        self.has_trained_template = False  # whether the tokenizer's chat template is a checkpoint's, of data.chat_template
        self.host_values = HostValues()  # of the batch that was moved to the device last

    # ------------------------------------------------------------------ defined or overridden by a subclass

    @abstractmethod
    def step(self, batch: Any) -> StepOutput:
        """The loss of a batch, and the inputs of its metric: override it to define your own loss."""

    def measured(self, batch: Any, output: StepOutput) -> Measured:
        """The metrics of a batch, logged as ``val_...`` and ``test_...``: the accuracy of its predictions, if any."""
        return {} if output.predictions is None else {"accuracy": (Accuracy, (output.predictions, output.targets))}

    def model_fields(self) -> dict[str, Any]:
        """More fields of the model's configuration, such as ``num_labels``."""
        return {}

    def choose_modules_to_save(self, model: Any) -> list[str]:
        """The fully trained modules if ``modules_to_save`` is empty; ``new_weights`` is known by then."""
        return []

    # ------------------------------------------------------------------ the model

    @property
    @override
    def base_name(self) -> str:
        return self.pretrained.name

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the length of the model's longest sequence. Data modules use it."""
        tokenizer = self.pretrained.tokenizer()
        pending = run_of(self).pending
        if pending is not None and "template" in pending.state.facts["prompt_format"]:  # of data.chat_template
            tokenizer.chat_template = pending.state.facts["prompt_format"]["template"]
            self.has_trained_template = True
        if self.pretrained.gguf_file is None:  # its configuration takes seconds; most use rotary positions, without a limit
            positions = getattr(self.pretrained.config(), "max_position_embeddings", None)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        return tokenizer

    @override
    def build_model(self) -> nn.Module:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        is_empty = self.is_base_in_checkpoint
        model, new_weights = self.pretrained.model_and_new_weights(auto_class, is_empty=is_empty, **self.model_fields())
        if not is_empty:
            self.new_weights = new_weights
        if not self.lora_config.modules_to_save:
            self.lora_config = replace(self.lora_config, modules_to_save=self.choose_modules_to_save(model))
        if self.tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:  # added to the tokenizer alone
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.quantization is not None:
            self.quantize_base(model)
        return cast(nn.Module, model)

    def quantize_base(self, model: Any) -> None:
        """Quantises the pretrained body: no head, be it new or the language model's, and no fully trained module.

        Nor those that transformers keeps in float32: a model may read such a weight's dtype.
        """
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        body, head = names[model.base_model], model.get_output_embeddings()  # the body is "" where it is the model itself
        wide = [*self.lora_config.modules_to_save, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
        skip = [name for module, name in names.items() if module is head or is_within(name, wide)]
        skip += [name for name in names.values() if not f"{name}.".startswith(body and f"{body}.")]
        quantize(model, getattr(torch, self.pretrained.dtype), skip)

    # ------------------------------------------------------------------ the steps

    # Not an override to Lightning, which would warn of one all who use a data module.
    @functools.wraps(COLAModule.transfer_batch_to_device)
    def transfer_batch_to_device(  # type: ignore[override]
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch as Lightning does, and stores the values that it had on the host."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        self.host_values.remember(batch, moved)
        return moved

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.step(batch)
        trainer = trainer_of(self)
        if trainer is None:  # without one, a window has no end
            self.log("train_loss", output.loss, batch_size=output.size, prog_bar=True)
            return output.loss
        if trainer.loggers:
            self.step_loss.n_tokens += self._n_tokens(batch)
        return self.step_loss.weigh(output.loss, output.size if self.loss_average == "step" else None)

    def _n_tokens(self, batch: Any) -> int:
        """How many tokens a batch has, without padding; 0 if that is not known."""
        named = batch if isinstance(batch, Mapping) else {}
        mask, ids, options = (named.get(name) for name in ("attention_mask", "input_ids", "option_ids"))
        n_tokens = 0 if ids is None else ids.numel()
        if mask is not None and mask.dim() == 2:
            n_tokens = int(self.host_values.of(mask).numpy().sum())
        return n_tokens + (0 if options is None else int((self.host_values.of(options).numpy() >= 0).sum()))

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", batch_idx, dataloader_idx)

    def _evaluate(self, batch: Any, stage: str, batch_idx: int, dataloader_idx: int) -> None:
        output = self.step(batch)
        self.log(f"{stage}_loss", output.loss, batch_size=output.size, prog_bar=True, sync_dist=True)
        for name, (make, values) in self.measured(batch, output).items():
            key = f"{stage}_{name}_{dataloader_idx}"
            if key not in self.evaluation_metrics:
                self.evaluation_metrics[key] = make().to(self.device)
            metric = cast(Metric, self.evaluation_metrics[key])
            if batch_idx == 0:  # an evaluation that was interrupted has left values
                metric.reset()
            metric.update(*values)
            where = f"evaluation_metrics.{key}"
            self.log(f"{stage}_{name}", metric, batch_size=output.size, prog_bar=True, metric_attribute=where)
