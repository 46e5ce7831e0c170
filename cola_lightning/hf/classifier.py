"""Classifiers: a pretrained model with a new head, and its labels; those of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning.chain.checkpoint import StoredState
from cola_lightning.constants import IGNORE_INDEX, WHOLE_NUMBER
from cola_lightning.errors import UserError
from cola_lightning.hf.logits import check_fields, forward_parameters
from cola_lightning.hf.metrics import METRICS
from cola_lightning.hf.transformers_module import BatchMetrics, RowValues, StepOutput, TransformersModule


class Classifier(TransformersModule):
    """A classifier that is fine-tuned with a chain of low-rank links; its new head is fully trained.

    Its labels are the given ones, a checkpoint's, or the data's, which a data module with labels sets before the model is made.
    Model, chain and exports store their names, and predictions are names; labels that are whole numbers stay numbers.

    If ``modules_to_save`` is empty, it is the head (all but the pretrained body) and what else is newly initialised, as the
    pretrained files do not contain it, or have it for another number of labels.

    Args:
        model_name: A hub id, a folder, or ``package:NAME``: the files inside the installed Python package with that import
            name.
        num_labels: Number of labels. ``null`` counts ``label_names``, or the labels of the data. Without either it is that of
            the model's configuration, which has 2 for a model without a head.
        label_names: Labels in the order of the model's outputs; a whole number in the data is an index into this list. ``null``
            uses the data's class names in their order, otherwise its labels, sorted.
        metric: What is logged in addition to the loss: ``accuracy``, ``f1`` (of label 1 if there are two labels, otherwise the
            mean over the labels) or ``matthews_corrcoef``.
        **pretrained: the arguments of ``TransformersModule`` and :class:`~cola_lightning.COLAModule`; ``modules_to_save_lr`` is
            the head's learning rate.

    Raises:
        UserError: as for :class:`~cola_lightning.COLACausalLM`.
    """

    # **pretrained: see TransformersModule.
    def __init__(
        self,
        model_name: str,
        *,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        metric: Literal["accuracy", "f1", "matthews_corrcoef"] = "accuracy",
        **pretrained: Any,
    ) -> None:
        counts = set() if num_labels is None else {num_labels}
        counts |= set() if label_names is None else {len(label_names), len(set(label_names))}
        if len(counts) > 1 or min(counts, default=2) < 2:
            raise UserError(
                "model.num_labels, model.label_names: there must be at least 2 labels, and as many different names as labels, "
                f"got {num_labels} and {label_names}"
            )
        self.num_labels, self.metric = int(max(counts, default=2)), metric
        self._has_num_labels, self.are_names_given = num_labels is not None, label_names is not None
        self.labels_of_base = None if label_names is None else [str(name) for name in label_names]
        super().__init__(model_name, **pretrained)

    # ------------------------------------------------------------------ labels

    @property
    def label_names(self) -> list[str] | None:
        """The labels in the order of the model's outputs; None while they are not known."""
        if self.labels_of_base is not None:
            return self.labels_of_base
        if self.run.made is not None:
            return self.chain.base.labels
        return None if self.run.first_chain is None else self.run.first_chain.base.labels

    def settle_labels(self, found: Sequence[str]) -> None:
        """Sets the model's labels to the data's, unless they are known already.

        Args:
            found: the data's labels, in its order; whole numbers as text.

        Raises:
            UserError: if the module was given another number of labels, or the model was made with one.
        """
        if self.label_names is not None:
            self._set_labels(self.label_names)
            return
        places = [str(place) for place in range(self.num_labels)]
        if self._has_num_labels and set(found) <= set(places):
            found = places
        if len(found) < 2 or ((self._has_num_labels or self.run.made is not None) and len(found) != self.num_labels):
            raise UserError(f"model.num_labels: is {self.num_labels}, but the data has {len(found)}: {', '.join(found)}")
        names = [name for _, name in sorted(self.pretrained.config().id2label.items())]  # a pretrained head may have them
        self._set_labels(names if sorted(names) == sorted(found) else found)

    def _set_labels(self, names: Sequence[str]) -> None:
        self.labels_of_base, self.num_labels = list(names), len(names)
        if self.run.made is not None:
            self.describe_labels(self.model.config)
            self.adapted.chain.base = replace(self.adapted.chain.base, labels=self.labels_of_base)

    def describe_labels(self, config: Any) -> None:
        """Writes the labels into the configuration of a model."""
        config.id2label = dict(enumerate(self.labels_of_base or ()))
        config.label2id = {name: place for place, name in config.id2label.items()}
        config.problem_type = "single_label_classification"  # by which a pipeline chooses its function

    @override
    def expect_state(self, state: StoredState, **requested: Any) -> None:
        super().expect_state(state, **requested)
        if self.labels_of_base is None and state.chain.base.labels is not None:
            self._set_labels(state.chain.base.labels)
        if not self.run.config.modules_to_save:  # what was chosen when the chain began
            self.run.config = replace(self.run.config, modules_to_save=state.facts.modules_to_save)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state_dict, strict, assign)
        if self.label_names is not None:
            self._set_labels(self.label_names)
        return result

    # ------------------------------------------------------------------ model and steps

    @override
    def batch_metrics(self, batch: Any, output: StepOutput) -> BatchMetrics:
        return {self.metric: (partial(METRICS[self.metric], self.num_labels), (output.predictions, output.targets))}

    @override
    def model_fields(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels} if self._has_num_labels or self.labels_of_base is not None else {}

    @override
    def build_model(self) -> Any:
        if self.run.made is None and self.label_names is not None:
            self._set_labels(self.label_names)
        model: Any = super().build_model()
        if self.labels_of_base is not None:
            self.describe_labels(model.config)
        self.num_labels = int(model.config.num_labels)
        return model

    @override
    def choose_modules_to_save(self, model: Any) -> list[str]:
        """The head, and other modules that the pretrained files do not contain: frozen, they would keep their random values."""
        children = model.named_children()
        head = [name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())]
        new = self.pretrained.new_modules(model, self.new_weights)
        return sorted({*head, *(name for name in new if not any(f"{name}.".startswith(f"{module}.") for module in head))})

    @override
    def step(self, batch: Mapping[str, Any]) -> StepOutput:
        labels, logits = batch["labels"], self._logits(batch)
        loss, scores = F.cross_entropy(logits, labels), logits.detach()
        losses = F.cross_entropy(scores, labels, reduction="none")
        rows = RowValues(losses, torch.ones_like(losses))
        return StepOutput(loss, len(labels), logits.argmax(-1), labels, scores=scores, row_losses=rows)

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        logits = self._logits(batch)
        predicted = logits.argmax(-1)
        targets = batch.get("labels", torch.full_like(predicted, IGNORE_INDEX))
        return {"prediction": self._as_labels(predicted), "target": self._as_labels(targets), "scores": logits.log_softmax(-1)}

    def _as_labels(self, places: Tensor) -> list[Any]:
        """Labels by index, as numbers if all are whole numbers; the indices if labels are not known, None for a missing one."""
        names = self.label_names or [str(place) for place in range(self.num_labels)]
        values: list[Any] = [int(name) for name in names] if all(map(WHOLE_NUMBER.fullmatch, names)) else names
        return [None if place == IGNORE_INDEX else values[place] for place in places.tolist()]

    def _logits(self, batch: Mapping[str, Any]) -> Tensor:
        """The logits, in float32: rows x labels."""
        check_fields(self.model, batch)
        parameters = forward_parameters(self.model) - {"labels"}
        inputs = {name: value for name, value in batch.items() if name in parameters}
        logits: Tensor = self.model(**inputs).logits
        return logits.float()


class COLASequenceClassifier(Classifier):
    """A classifier of texts that is fine-tuned with a chain of low-rank links; its new head is fully trained.

    Its labels are the given ones, a checkpoint's, or the data's, which ``TextClassificationDataModule`` sets before the model
    is made. Model, chain and exports store their names, and predictions are names; labels that are whole numbers stay numbers.

    Its batches are the usual dict of ``input_ids``, ``attention_mask`` and ``labels``. If ``modules_to_save`` is empty, it is
    the head (all but the pretrained body) and what else is newly initialised, as the pretrained files do not contain it: a BERT
    that was saved as a masked language model has no pooler.

    Its arguments are those of :class:`~cola_lightning.hf.classifier.Classifier`; ``cola fit --model.help
    COLASequenceClassifier`` says what each does.

    Raises:
        UserError: as for :class:`~cola_lightning.COLACausalLM`.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"

    @override
    def build_model(self) -> Any:
        model: Any = super().build_model()
        model.config.pad_token_id = self.tokenizer.pad_token_id  # where a sequence ends, for heads that read its last token
        return model
