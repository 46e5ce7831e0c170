"""Causal language models: prompted classification, and the language-model loss."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from typing_extensions import override

from cola_lightning.errors import UserError
from cola_lightning.modules.language import LanguageModule, StepOutput

Batch = Mapping[str, Any]

IGNORED = -100  # where a batch has no token, or no loss is wanted: Hugging Face's value


class Accuracy(MeanMetric):
    """The share of predictions that equal their targets."""

    @override
    def update(self, predictions: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update((predictions == targets).float())


class COLACausalLM(LanguageModule):
    """A causal language model that is tuned by a chain of low-rank links.

    It takes two kinds of batches:

    * **option batches** (prompted classification; :class:`~cola_lightning.data.PromptDataModule` makes them): the loss is the
      cross-entropy over the options' mean log-probabilities, the prediction the option with the largest;
    * **language-model batches**, the usual dict of ``input_ids``, ``attention_mask`` and ``labels``, -100 where no loss is
      wanted: the loss is the mean over all other tokens of the batch, so that with accumulated gradients each batch, and not
      each token, counts alike. Any Hugging Face collator makes them.

    Only the positions that carry the loss go through the language-model head, and options that differ in their last token
    alone share one forward pass.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), appendix; the loss and
        the scores are those of its code (princeton-nlp/MeZO, large_models).
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    @override
    def make_metric(self) -> Metric:
        return Accuracy()

    @override
    def build_model(self) -> nn.Module:
        model = super().build_model()
        check_left_padding(model)
        return model

    @override
    def step(self, batch: Batch) -> StepOutput:
        if "option_ids" not in batch:
            return self._language_step(batch)
        scores, answer = self.option_scores(batch), batch["answer"]
        return StepOutput(F.cross_entropy(scores, answer), len(answer), scores.argmax(-1), answer)

    def option_scores(self, batch: Batch) -> Tensor:
        """The mean log-probability of each option's tokens after its prompt.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (sequences x length, padded on the left): what precedes each option's
                last token, once for all options that share it; ``option_rows`` (rows x options): which sequence that is;
                ``option_ids`` (rows x options x tokens, -100 before an option's first token): the option's tokens.

        Shape:
            result: rows x options, in float32; -inf where a row has fewer options.
        """
        ids = batch["option_ids"]
        n_tokens = ids.shape[-1]
        logits = logits_of(self.model, batch, n_tokens)  # sequences x tokens x vocabulary
        rows, places = batch["option_rows"].unsqueeze(-1), torch.arange(n_tokens, device=ids.device)
        is_token = ids != IGNORED
        chosen = logits[rows, places, ids.clamp(min=0)]  # rows x options x tokens
        log_probabilities = (chosen - logits.logsumexp(-1)[rows, places]) * is_token
        lengths = is_token.sum(-1)
        means = log_probabilities.sum(-1) / lengths.clamp(min=1)
        scores: Tensor = means.masked_fill(lengths == 0, -torch.inf)
        return scores

    def _language_step(self, batch: Batch) -> StepOutput:
        if missing := {"input_ids", "labels"} - set(batch):
            raise UserError(
                f"batch: expected input_ids and labels, or an option batch, received none of {', '.join(sorted(missing))}"
            )
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)  # each position predicts the next token
        if (mask := batch.get("attention_mask")) is not None:  # a row's first token follows on padding, which predicts nothing
            labels = labels.masked_fill(mask == 0, IGNORED)
        (places,) = (labels != IGNORED).any(0).nonzero(as_tuple=True)
        places = places if len(places) else places.new_zeros(1)
        labels = labels[:, places]
        n_tokens = int((labels != IGNORED).sum())
        logits = logits_of(self.model, batch, places)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return StepOutput(total / max(n_tokens, 1), n_tokens)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        if "option_ids" not in batch:
            raise UserError("predict: expected rows with options to choose from, received rows with a language-model loss")
        scores = self.option_scores(batch)
        columns = {"prediction": scores.argmax(-1), "target": batch["answer"]}
        columns |= {name: batch[name] for name in ("prompt", "options") if name in batch}
        counts = (batch["option_ids"] != IGNORED).any(-1).sum(-1).tolist()
        return columns | {"scores": [row[:n] for row, n in zip(scores.tolist(), counts, strict=True)]}


def logits_of(model: nn.Module, batch: Batch, keep: int | Tensor) -> Tensor:
    """The logits of a causal language model, in float32, at the positions that are asked for.

    Args:
        model: a Hugging Face model.
        batch: ``input_ids`` and ``attention_mask`` (rows x length), padded on either side.
        keep: how many positions at the end, or which.

    Shape:
        result: rows x positions x vocabulary.
    """
    taken_by_name = inspect.signature(model.forward).parameters
    mask = batch.get("attention_mask")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
    if mask is not None and mask.dim() == 2:  # behind padding on the left, too, a row begins at position 0
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs |= {name: batch[name] for name in ("position_ids", "token_type_ids") if name in batch}
    taken = {name: value for name, value in inputs.items() if name in taken_by_name}
    logits: Tensor = model(**taken).logits
    if "logits_to_keep" not in taken:  # an older architecture: its head has seen all positions
        logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
    return logits.float()


@torch.no_grad()
def check_left_padding(model: nn.Module) -> None:
    """Refuses a model for which padding on the left changes what a sequence means.

    Such are encoders, encoder-decoders, and models that count positions without asking for them.

    Raises:
        UserError: if the logits of a few tokens with padding before them are not those without.
    """
    config: Any = model.config
    tokens = torch.arange(3).unsqueeze(0) + config.get_text_config().vocab_size // 2
    is_training = model.training
    model.eval()
    mask = torch.ones_like(tokens)
    alone = model(input_ids=tokens, attention_mask=mask).logits[:, -1:].float()  # as the model itself counts positions
    padded = logits_of(model, {"input_ids": F.pad(tokens, (4, 0)), "attention_mask": F.pad(mask, (4, 0))}, 1)
    model.train(is_training)
    tolerance = 1e-2 if model.dtype.itemsize >= 4 else 1e-1  # type: ignore[operator]
    if not (alone - padded).abs().max() <= tolerance * alone.abs().max():
        raise UserError(
            "model.model_name: expected a decoder that can be padded on the left, received "
            f"{type(model).__name__}, which then gives other logits"
        )
