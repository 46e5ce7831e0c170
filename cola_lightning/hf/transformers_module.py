"""What the modules for Hugging Face models share: the model, its tokenizer, and the steps with their metrics."""

import functools
import importlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.constants import Dtype
from cola_lightning.errors import UserError, check_name
from cola_lightning.hf.host_values import HostValues
from cola_lightning.hf.metrics import Accuracy, Mean
from cola_lightning.lora.inject import is_in_matching_modules
from cola_lightning.lora.quantization import Quantization, quantize
from cola_lightning.module.module import COLAModule
from cola_lightning.module.run import trainer_of
from cola_lightning.pretrained import Pretrained, TransformersBase

log = logging.getLogger(__name__)
LossAverage = Literal["step", "batch"]


class RowValues(NamedTuple):
    """What each row of a batch adds to a mean over rows or tokens: the mean is the sum of ``values`` over that of ``weights``.

    A ``test_step`` that returns them by metric (``{"loss": ..., "accuracy": ...}``) has intervals in ``cola stages``.

    Attributes:
        values: of a row, the sum over its tokens.
        weights: how many tokens each row has, or ones.

    Shape:
        ``values``, ``weights``: rows.
    """

    values: Tensor
    weights: Tensor


@dataclass(frozen=True)
class StepOutput:
    """The result of a batch.

    Attributes:
        loss: a scalar to be minimised; a mean over ``size``.
        size: the number of rows or tokens that the mean is over.
        predictions: for the metric, one for each row; None if there is no metric to compute.
        targets: the correct predictions, in the same shape.
        scores: the scores of all labels, for metrics that need more than the predictions: rows x labels.
        logged: more values by name, one for each row; their means are logged under the name, in evaluation after ``val_``.
        row_losses: what each row adds to ``loss``, in evaluation; None if the loss is no mean over rows or tokens.
    """

    loss: Tensor
    size: int
    predictions: Tensor | None = None
    targets: Tensor | None = None
    scores: Tensor | None = None
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    row_losses: RowValues | None = None


# By a metric's name: a function that creates it, and the arguments of its ``update``.
BatchMetrics = dict[str, tuple[Callable[[], Metric], tuple[Any, ...]]]


class TransformersModule(COLAModule, ABC):
    """A Hugging Face model that is fine-tuned with a chain of low-rank links.

    A subclass defines :meth:`step` and the class that loads its model.

    Args:
        model_name: A hub id (``facebook/opt-1.3b``), a folder, or ``package:NAME``: the files inside the installed Python
            package with that import name.
        revision: Branch, tag or commit of the model on the hub.
        dtype: Type of the weights in memory. With ``finished_links: merge`` the adapted weights are stored in float32
            nevertheless. By default finished links are stacked on a base in half precision.
        quantization: ``nf4`` stores the weights of the pretrained linear layers in 4 bits, by bitsandbytes. They compute in
            ``dtype``, and links are stacked on them. It needs the extra ``nf4``. ``null`` does not quantize.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2`` and so on. ``null`` is transformers' choice.
        trust_remote_code: Run the Python files that come with the model.
        gguf_file: Name of a GGUF file among the model's files, which is then dequantized. It needs the extra ``gguf``. ``null``
            uses the GGUF file of a package that contains no other model.
        loss_average: ``step`` averages the training loss over all rows of an optimizer step (or tokens, if the loss is of
            tokens), with its accumulated batches and all processes. ``batch`` averages over those of a batch, and weighs all
            batches and processes alike.
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
        loss_average: LossAverage = "step",
        **chain: Any,
    ) -> None:
        super().__init__(**chain)
        check_name("model.loss_average", loss_average, get_args(LossAverage))
        self.loss_average = loss_average
        self.pretrained = Pretrained(model_name, revision, dtype, attn_implementation, trust_remote_code, gguf_file)
        self.quantization = quantization
        if quantization is not None:
            importlib.import_module("bitsandbytes")  # an error now, not once the base has been read
            if self.run.config.target_modules is None:
                raise UserError("model.target_modules: must not be null with model.quantization, whose weights are not trained")
        self.new_weights: list[str] = []  # newly initialised weights of the base, once it is made
        self.evaluation_metrics = nn.ModuleDict()  # by stage, name and dataloader, made when needed
        self.trained_template: str | None = None  # a checkpoint's chat template, which was that of data.chat_template
        self.host_values = HostValues()  # of the batch that was moved to the device last

    # ------------------------------------------------------------------ defined or overridden by a subclass

    @abstractmethod
    def step(self, batch: Any) -> StepOutput:
        """The loss of a batch, and the inputs of its metric: override it to define your own loss."""

    def auxiliary_loss(self) -> Tensor | float:
        """What training adds to the loss of the last :meth:`step`."""
        return 0.0

    def batch_metrics(self, batch: Any, output: StepOutput) -> BatchMetrics:
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

    @property
    @override
    def named_base(self) -> TransformersBase:
        fields = {name: value for name, value in self.model_fields().items() if name == "num_labels"}
        if fields and (pad := getattr(self.model.config, "pad_token_id", None)) is not None:  # where a classifier's text ends
            fields["pad_token_id"] = pad
        builders = (getattr(type(self), name).__module__ for name in ("build_model", "model_fields"))
        is_own_base = not all(name.startswith("cola_lightning.") for name in builders)
        return TransformersBase(
            **vars(self.pretrained),
            auto_class=self.auto_class,
            fields=fields,
            labels=self.labels_of_base,
            new_weights=self.new_weights,
            quantization=self.quantization,
            is_changed=is_own_base,
        )

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with the length of the model's longest sequence. Data modules use it.

        It is None for a model whose inputs are not text.
        """
        tokenizer = self.pretrained.tokenizer()
        if self.trained_template is not None:
            tokenizer.chat_template = self.trained_template
        if self.pretrained.gguf_file is None:  # its configuration takes seconds; most use rotary positions, without a limit
            positions = getattr(self.pretrained.config(), "max_position_embeddings", None)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
        return tokenizer

    @override
    def build_model(self) -> nn.Module:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        model, self.new_weights = self.pretrained.model_and_new_weights(auto_class, **self.model_fields())
        if not self.run.config.modules_to_save:
            self.run.config = replace(self.run.config, modules_to_save=self.choose_modules_to_save(model))
        if self.new_weights and self.run.made is None:
            names, saved = self.pretrained.new_modules(model, self.new_weights), self.run.config.modules_to_save
            frozen = [name for name in names if not is_in_matching_modules(name, saved)]
            if frozen and self.run.config.target_modules is not None:  # else all is trained
                what = "model: not in the files of %r, so it stays random, because model.modules_to_save does not name it: %s"
                log.warning(what, self.pretrained.name, ", ".join(frozen))
        tokenizer = self.tokenizer
        if tokenizer is not None and tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
            tokenizer.pad_token = tokenizer.eos_token  # that of padding was added to the tokenizer alone
        if self.quantization is not None:
            self.quantize_base(model)
        return cast(nn.Module, model)

    @override
    def expect_state(self, state: StoredState, **requested: Any) -> None:
        super().expect_state(state, **requested)
        self.trained_template = state.facts.prompt_format.get("template")

    def quantize_base(self, model: Any) -> None:
        """Quantises the pretrained body: no head, be it new or the language model's, and no fully trained module.

        Nor those that transformers keeps in float32: a model may read such a weight's dtype.
        """
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        body, head = names[model.base_model], model.get_output_embeddings()  # the body is "" where it is the model itself
        unquantized = [*self.run.config.modules_to_save, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
        skip = [name for module, name in names.items() if module is head or is_in_matching_modules(name, unquantized)]
        skip += [name for name in names.values() if not f"{name}.".startswith(body and f"{body}.")]
        quantize(model, getattr(torch, self.pretrained.dtype), skip, self.quantization or "nf4")

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
        loss = output.loss + self.auxiliary_loss()
        for name, values in output.logged.items():
            self.log(name, values.mean(), batch_size=output.size)
        if trainer_of(self) is None:  # without one, a window has no end
            self.log("train_loss", loss, batch_size=output.size, prog_bar=True)
            return loss
        return self.step_loss.weigh(loss, output.size if self.loss_average == "step" else None)

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, RowValues]:
        output = self._evaluate(batch, "test", batch_idx, dataloader_idx)
        rows = {"loss": output.row_losses}
        if output.predictions is not None and output.targets is not None:
            is_right = (output.predictions == output.targets).float()
            rows["accuracy"] = RowValues(is_right, torch.ones_like(is_right))
        return {name: values for name, values in rows.items() if values is not None}

    def _evaluate(self, batch: Any, stage: str, batch_idx: int, dataloader_idx: int) -> StepOutput:
        output = self.step(batch)
        self.log(f"{stage}_loss", output.loss, batch_size=output.size, prog_bar=True, sync_dist=True)
        means = {name: (Mean, (values,)) for name, values in output.logged.items()}
        for name, (make, values) in {**means, **self.batch_metrics(batch, output)}.items():
            key = f"{stage}_{name}_{dataloader_idx}"
            if key not in self.evaluation_metrics:
                self.evaluation_metrics[key] = make().to(self.device)
            metric = cast(Metric, self.evaluation_metrics[key])
            if batch_idx == 0:  # an evaluation that was interrupted has left values
                metric.reset()
            metric.update(*values)
            where = f"evaluation_metrics.{key}"
            self.log(f"{stage}_{name}", metric, batch_size=output.size, prog_bar=True, metric_attribute=where)
        return output
