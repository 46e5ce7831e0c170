"""Sequence classifiers: a pretrained model with a new head."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from typing_extensions import override

from cola_lightning.errors import UserError
from cola_lightning.modules.language import LanguageModule, StepOutput
from cola_lightning.modules.pending import pending_checkpoint
from cola_lightning.modules.pretrained import new_modules


class COLASequenceClassifier(LanguageModule):
    """A sequence classifier that is fine-tuned with a chain of low-rank links; its new head is fully trained.

    Its batches are the usual dict of ``input_ids``, ``attention_mask`` and ``labels``. Where ``modules_to_save`` names nothing,
    it is the head (what the model has beside its pretrained body) and what else is newly initialised, for the pretrained files
    do not hold it: a BERT that was saved as a masked language model has no pooler.

    Args:
        model_name: a hub id (``FacebookAI/roberta-base``), a folder, or ``package:NAME``: the files inside the installed Python
            package with that import name.
        num_labels: how many labels there are.
        metric: what is logged in addition to the loss: ``accuracy``, ``f1`` (of label 1 where there are two, else the mean
            over the labels) or ``matthews_corrcoef``.
        **pretrained: the arguments of :class:`~cola_lightning.modules.COLACausalLM` and
            :class:`~cola_lightning.modules.COLAModule`; ``modules_to_save_lr`` is the head's learning rate.

    Raises:
        UserError: as for :class:`~cola_lightning.modules.COLACausalLM`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    # **pretrained: see LanguageModule.
    def __init__(
        self,
        model_name: str,
        *,
        num_labels: int = 2,
        metric: Literal["accuracy", "f1", "matthews_corrcoef"] = "accuracy",
        **pretrained: Any,
    ) -> None:
        if num_labels < 2:
            raise UserError(f"model.num_labels: expected at least 2, received {num_labels}")
        self.num_labels, self.metric_name = int(num_labels), metric
        super().__init__(model_name, **pretrained)

    @override
    def make_metric(self) -> Metric:
        if self.metric_name == "accuracy":
            return MulticlassAccuracy(self.num_labels, average="micro")
        if self.metric_name == "f1":
            return MulticlassF1Score(self.num_labels, average="macro") if self.num_labels > 2 else BinaryF1Score()
        return MulticlassMatthewsCorrCoef(self.num_labels)

    @override
    def model_fields(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels}

    @override
    def build_model(self) -> Any:
        model: Any = super().build_model()
        model.config.pad_token_id = self.tokenizer.pad_token_id  # where a sequence ends, for heads that read its last token
        return model

    @override
    def choose_modules_to_save(self, model: Any) -> list[str]:
        """The head, and what else the pretrained files do not hold: frozen, it would stay as it was drawn."""
        pending = pending_checkpoint()
        if pending is not None and pending.opened.state.modules_to_save:
            return pending.opened.state.modules_to_save
        children = model.named_children()
        head = [name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())]
        is_earlier = pending is not None and pending.opened.state.modules_to_save is None  # a release that left all else frozen
        new = [] if is_earlier else new_modules(model, self.new_weights)
        return sorted({*head, *(name for name in new if not any(f"{name}.".startswith(f"{one}.") for one in head))})

    @override
    def step(self, batch: Mapping[str, Any]) -> StepOutput:
        labels = batch.get("labels")
        if labels is None or labels.dim() != 1:
            raise UserError(
                "batch: expected one label a row, as TextClassificationDataModule makes them, received others or none"
            )
        logits = self._logits(batch)
        return StepOutput(F.cross_entropy(logits, labels), len(labels), logits.argmax(-1), labels)

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        logits = self._logits(batch)
        return {"prediction": logits.argmax(-1), "target": batch["labels"], "scores": logits.log_softmax(-1)}

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits, in float32: rows x labels."""
        taken = inspect.signature(self.model.forward).parameters.keys() - {"labels"}
        inputs = {name: value for name, value in batch.items() if name in taken}
        logits: Tensor = self.model(**inputs).logits
        return logits.float()
