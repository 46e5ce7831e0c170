"""What the modules for Hugging Face models share: the model, its tokenizer, and the steps with their metrics."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from cola_lightning.errors import UserError
from cola_lightning.lora.inject import lies_in
from cola_lightning.lora.linear4bit import Quantization, check_quantization, quantize
from cola_lightning.modules.base import COLAModule
from cola_lightning.modules.pretrained import Dtype, Pretrained, with_limit


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


class LanguageModule(COLAModule, ABC):
    """A Hugging Face model that is fine-tuned with a chain of low-rank links.

    A subclass defines :meth:`step` and the class that loads its model.

    Args:
        model_name: a hub id (``facebook/opt-1.3b``), a folder, or ``package:NAME``: the files inside the installed Python
            package with that import name.
        revision: branch, tag or commit on the hub.
        dtype: of the weights in memory. With ``finished_links: merge`` the adapted weights are stored in float32 nevertheless.
        quantization: ``nf4`` stores the weights of the pretrained linear layers in 4 bits, by bitsandbytes; they compute in
            ``dtype``. It needs ``finished_links: stack`` and the extra ``nf4``. ``null``: none.
        attn_implementation: ``eager``, ``sdpa``, ``flash_attention_2``, ...; ``null``: transformers' choice.
        trust_remote_code: run the Python files that come with the model.
        gguf_file: name of a GGUF file among the model's files, to be dequantized; needs the extra ``gguf``.
        **chain: the other arguments of :class:`~cola_lightning.modules.COLAModule`.

    Raises:
        UserError: for a model that cannot be found, missing files, and invalid values.
    """

    auto_class: ClassVar[str]
    metric_name: str = "accuracy"

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
        **chain: Any,
    ) -> None:
        super().__init__(**chain)
        self.pretrained = Pretrained(model_name, revision, dtype, attn_implementation, trust_remote_code, gguf_file)
        self.quantization = quantization
        if quantization is not None:
            self._check_quantization(quantization)
        self.new_weights: list[str] = []  # newly initialised weights of the base, once it is made
        self.val_metric, self.test_metric = self.make_metric(), self.make_metric()
        self.metrics_of_loaders = nn.ModuleDict()  # of dataloaders after the first, made when needed
        self._dataloader_idx = 0  # of the batch that is evaluated

    def _check_quantization(self, quantization: str) -> None:
        if self.finished_links == "merge":
            raise UserError(
                "model.finished_links: expected stack beside model.quantization, for links cannot be merged into 4-bit weights "
                "(or model.quantization null), received merge"
            )
        if self.target_modules is None:
            raise UserError(
                "model.target_modules: expected layers to adapt beside model.quantization, for 4-bit weights cannot be "
                "trained, received null"
            )
        check_quantization(quantization)

    # ------------------------------------------------------------------ defined or overridden by a subclass

    @abstractmethod
    def step(self, batch: Any) -> StepOutput:
        """The loss of a batch, and the inputs of its metric: override it to define your own loss."""

    @abstractmethod
    def make_metric(self) -> Metric:
        """A metric that takes the predictions and targets of a :class:`StepOutput`; logged as ``val_{metric_name}``."""

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
        if self.pretrained.gguf_file is not None:  # its configuration takes seconds; most use rotary positions, without a limit
            return tokenizer
        return with_limit(tokenizer, self.pretrained.config())

    @override
    def build_model(self) -> nn.Module:
        import transformers

        auto_class = getattr(transformers, self.auto_class)
        is_empty = self.is_base_in_checkpoint
        model, new_weights = self.pretrained.model_and_new_weights(auto_class, is_empty=is_empty, **self.model_fields())
        if not is_empty:
            self.new_weights = new_weights
        if not self.modules_to_save:
            self.modules_to_save = self.choose_modules_to_save(model)
        n_embeddings, tokenizer = model.get_input_embeddings().num_embeddings, self.tokenizer
        if tokenizer.vocab_size > n_embeddings:
            raise UserError(
                f"model.model_name: expected a tokenizer of at most {n_embeddings} tokens, which the model knows, "
                f"received {tokenizer.vocab_size}"
            )
        if tokenizer.pad_token_id >= n_embeddings:  # added to the tokenizer alone
            tokenizer.pad_token = tokenizer.eos_token
        if self.quantization is not None:
            self._quantize(model)
        return cast(nn.Module, model)

    def _quantize(self, model: Any) -> None:
        """Quantises pretrained layers: no head, be it new or the language model's, and no fully trained module.

        Nor those that transformers keeps in float32: a model may read such a weight's dtype.
        """
        names: dict[Any, str] = {module: name for name, module in model.named_modules()}
        body, head = names[model.base_model], model.get_output_embeddings()
        wide = [*self.modules_to_save, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
        skip = [names[head]] if head is not None else []
        skip += [name for name in names.values() if lies_in(name, wide)]
        skip += [name for name in names.values() if not f"{name}.".startswith(body and f"{body}.")]
        quantize(model, getattr(torch, self.pretrained.dtype), skip)

    # ------------------------------------------------------------------ the steps

    def metrics_of(self, stage: str) -> list[Metric]:
        """The metrics of ``val`` or ``test``, to be reset before each evaluation: an interrupted one leaves values in them."""
        others = [cast(Metric, metric) for name, metric in self.metrics_of_loaders.items() if name.startswith(stage)]
        return [self.val_metric if stage == "val" else self.test_metric, *others]

    @override
    def on_validation_start(self) -> None:
        for metric in self.metrics_of("val"):
            metric.reset()

    @override
    def on_test_start(self) -> None:
        for metric in self.metrics_of("test"):
            metric.reset()

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.step(batch)
        self.log("train_loss", output.loss, batch_size=output.size, prog_bar=True)
        return output.loss

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", self.val_metric, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", self.test_metric, dataloader_idx)

    def _evaluate(self, batch: Any, stage: str, metric: Metric, dataloader_idx: int) -> None:
        self._dataloader_idx = dataloader_idx
        output = self.step(batch)
        self.log(f"{stage}_loss", output.loss, batch_size=output.size, prog_bar=True, sync_dist=True)
        self.measure(batch, output, stage, metric)

    def measure(self, batch: Any, output: StepOutput, stage: str, metric: Metric) -> None:
        """Updates the metric of the ``stage`` (``val``, ``test``) with a batch's predictions, if any, and logs it."""
        if output.predictions is not None:
            self.update_metric(f"{stage}_{self.metric_name}", metric, output.size, output.predictions, output.targets)

    def update_metric(self, name: str, metric: Metric, size: int, *values: Any) -> None:
        """Updates a metric with a batch's values, and logs it; each of several loaders has its own metric.

        Args:
            name: the metric's name in the log.
            metric: the first loader's.
            size: size of the batch.
            *values: what the metric's ``update`` takes.
        """
        attribute = None  # Lightning finds the first loader's by itself
        if self._dataloader_idx:
            key = f"{name}_{self._dataloader_idx}"
            if key not in self.metrics_of_loaders:
                self.metrics_of_loaders[key] = copy = metric.clone().train()  # as all else is when training begins
                copy.reset()
            metric, attribute = cast(Metric, self.metrics_of_loaders[key]), f"metrics_of_loaders.{key}"
        metric.update(*values)
        self.log(name, metric, batch_size=size, prog_bar=True, metric_attribute=attribute)
