"""Causal language models: prompted classification, and the language-model loss."""

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from cola_lightning.conventions import IGNORE_INDEX
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError
from cola_lightning.modes import evaluating
from cola_lightning.modules.generation import ANSWER, generate, stop_tokens
from cola_lightning.modules.language import LanguageModule, StepOutput
from cola_lightning.modules.logits import (
    Batch,
    can_share,
    check_decoder,
    has_router_loss,
    is_free_of_length,
    logits_and_router_loss,
    logits_of,
    shared_logits,
    split_by_length,
    takes_mask_of_pairs,
)
from cola_lightning.modules.metrics import Accuracy, ExactMatch, MatthewsCorrCoef, OptionF1, TokenF1
from cola_lightning.seeding import derive_seed, seeded
from cola_lightning.turns import end_tokens

# What a batch may request as its ``metric``, besides accuracy: of chosen options, and of generated answers.
OPTION_METRICS: dict[str, type[Metric]] = {"f1": OptionF1, "matthews_corrcoef": MatthewsCorrCoef}
ANSWER_METRICS: dict[str, type[Metric]] = {"f1": TokenF1, "exact_match": ExactMatch}


def _for_each_stage(kinds: dict[str, type[Metric]]) -> nn.ModuleDict:
    return nn.ModuleDict({f"{stage}_{name}": kind() for stage in ("val", "test") for name, kind in kinds.items()})


class COLACausalLM(LanguageModule):
    """A causal language model that is fine-tuned with a chain of low-rank links.

    It accepts two kinds of batches:

    * **option batches** (prompted tasks; :class:`~cola_lightning.data.PromptDataModule` makes them): the prediction is the
      option with the largest mean log-probability; the loss is the cross-entropy over these (``loss: options``), or the
      language model's on the correct option's tokens (``loss: answer``). With ``references``, an answer is generated, except
      in a fit's validations, which compute the loss alone; ``val_f1`` and ``val_exact_match`` compare it with them.
      A batch may request another ``metric``: ``f1`` or ``matthews_corrcoef`` of options, one of the two of answers;
    * **language-model batches**, the usual dict of ``input_ids``, ``attention_mask`` and ``labels``, -100 for tokens without
      loss: the loss is the mean over the other tokens of the batch, so that with accumulated gradients each batch, and not
      each token, has the same weight. Any Hugging Face collator makes them. An ``attention_mask`` of four dimensions, as for
      packed sequences, masks pairs of tokens; ``position_ids`` go with it. A model in which it does not separate sequences
      (a sliding window, a state-space or convolution layer, Bloom) is refused at the first such batch. Predict takes prompts
      (``prompt_ids``, ``prompt_mask``) instead, and generates: see :meth:`generate`.

    Only the positions that carry the loss go through the language-model head, options that differ in their last token
    alone share one forward pass, and rows much shorter than others have their own forward pass, without padding.

    A mixture of experts whose configuration has ``output_router_logits`` adds its router's auxiliary loss, times
    ``router_aux_loss_coef``, to the loss of either kind, in validation and test as in training, as Hugging Face does.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), appendix; the loss and
        the scores are those of its code (princeton-nlp/MeZO, large_models).
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def __init__(self, model_name: str, **arguments: Any) -> None:
        super().__init__(model_name, **arguments)
        self.option_metrics, self.answer_metrics = _for_each_stage(OPTION_METRICS), _for_each_stage(ANSWER_METRICS)

    @override
    def make_metric(self) -> Metric:
        return Accuracy()

    @override
    def build_model(self) -> nn.Module:
        model = super().build_model()
        check_decoder(model)
        return model

    @override
    def step(self, batch: Batch) -> StepOutput:
        self._check_mask(batch)
        if "option_ids" not in batch:
            return self._language_step(batch)
        router_loss = None
        if has_router_loss(self.model):  # in one forward pass: this loss is not a sum over rows
            logits, router_loss = logits_and_router_loss(self.model, batch, batch["option_ids"].shape[-1])
            scores = _mean_log_probabilities(logits, batch)
        else:
            scores = self.option_scores(batch)
        answer = batch["answer"]
        if batch.get("loss", "options") == "options":
            loss, size = F.cross_entropy(scores, answer), len(answer)
        else:  # over the right options' tokens
            right = answer.unsqueeze(1)
            lengths = (batch["option_ids"] != IGNORE_INDEX).sum(-1).gather(1, right)
            size = int(lengths.sum())
            loss = -(scores.gather(1, right) * lengths).sum() / size
        loss = loss if router_loss is None else loss + router_loss
        if "references" in batch:
            return StepOutput(loss, size)
        chosen = scores.argmax(-1)
        if "accepted" in batch:
            answer = torch.where(batch["accepted"].gather(1, chosen.unsqueeze(1)).squeeze(1), chosen, answer)
        return StepOutput(loss, size, chosen, answer)

    @functools.cached_property
    def _stop_tokens(self) -> list[int]:
        return stop_tokens(self.tokenizer)

    def generate(self, batch: Batch, streamer: Any = None) -> list[str]:
        """The text that the model generates after each prompt of a batch, without surrounding white space.

        Args:
            batch: ``prompt_ids`` and ``prompt_mask`` (rows x length), padded on the left. ``decoding``: the fields of
                :class:`~cola_lightning.decoding.Decoding`; without it, greedy, at most 50 tokens, up to a line's end.
                ``end_tokens``: tokens at which it ends, besides the end of text.
            streamer: receives the tokens of a single row as they are generated: transformers' ``TextStreamer``.
        """
        if "decoding" in batch:
            decoding = Decoding(**batch["decoding"])
            ends = sorted({*end_tokens(self.model, self.tokenizer), *batch.get("end_tokens", ())})
        else:
            decoding, ends = ANSWER, self._stop_tokens
        # Each token has another shape: a compiled model would be recompiled for each.
        stance = torch.compiler.set_stance("force_eager") if self.should_compile else nullcontext()
        with stance, evaluating(self.model):  # without dropout, also after a fit, which leaves the training mode
            how = {"is_sharded": self.is_sharded, "streamer": streamer}
            texts = generate(self.model, self.tokenizer, batch, ends, decoding, **how)
        return [(text if "decoding" in batch else text.partition("\n")[0]).strip() for text in texts]

    @override
    def metrics_of(self, stage: str) -> list[Metric]:
        own = (*self.option_metrics.items(), *self.answer_metrics.items())
        return [*super().metrics_of(stage), *(cast(Metric, metric) for name, metric in own if name.startswith(stage))]

    @override
    def measure(self, batch: Any, output: StepOutput, stage: str, metric: Metric) -> None:
        requested = batch.get("metric") if isinstance(batch, Mapping) else None
        is_generated = "references" in batch
        known = [*ANSWER_METRICS] if is_generated else ["accuracy", *OPTION_METRICS]
        if requested is not None and requested not in known:
            raise UserError(f"data.metric: expected {', '.join(known)} or null, received {requested!r}")
        if is_generated:
            if self.trainer.state.fn != "fit":
                texts = self.generate(batch)
                for name in [f"{stage}_{requested}"] if requested else [f"{stage}_{name}" for name in ANSWER_METRICS]:
                    self.update_metric(name, cast(Metric, self.answer_metrics[name]), len(texts), texts, batch["references"])
        elif requested in OPTION_METRICS and output.predictions is not None:
            name, n_options = f"{stage}_{requested}", batch["option_ids"].shape[1]
            own = cast(Metric, self.option_metrics[name])
            self.update_metric(name, own, output.size, output.predictions, output.targets, n_options)
        else:
            super().measure(batch, output, stage, metric)

    def option_scores(self, batch: Batch) -> Tensor:
        """The mean log-probability of each option's tokens after its prompt.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (sequences x length, padded on the left): the tokens before each
                option's last one, once for all options that share them; ``option_rows`` (rows x options): the index of each
                option's sequence; ``option_ids`` (rows x options x tokens, -100 before an option's first token): the option's
                tokens. Where options of several tokens share a prompt, ``n_sequences`` and ``n_shared`` (rows), see
                :func:`~cola_lightning.modules.logits.shared_logits`: without gradients the prompt is then computed once.
                ``sequence_lengths``: the lengths of the sequences, in a list, to avoid waiting for the device.

        Shape:
            result: rows x options, in float32; -inf where a row has fewer options.
        """
        self._check_mask(batch)
        return _mean_log_probabilities(self._last_logits(batch, batch["option_ids"].shape[-1]), batch)

    def _last_logits(self, batch: Batch, n_positions: int) -> Tensor:
        """The logits at the last positions, sequences x positions x vocabulary, computed in the cheapest forward passes."""
        if not self._may_split:
            return logits_of(self.model, batch, n_positions)
        if "n_shared" in batch and not torch.is_grad_enabled() and self._can_share:
            return shared_logits(self.model, batch, n_positions)
        parts = split_by_length(batch, batch.get("sequence_lengths"))
        if len(parts) == 1:
            return logits_of(self.model, batch, n_positions)
        logits: Tensor | None = None
        for rows, part in parts:
            some = logits_of(self.model, part, n_positions)
            if logits is None:
                logits = some.new_zeros(len(batch["input_ids"]), n_positions, some.shape[-1])
            logits[rows, n_positions - some.shape[1] :] = some  # a part's own sequences may be shorter
        return cast(Tensor, logits)

    @functools.cached_property
    def _can_share(self) -> bool:
        return can_share(self.model)

    def _check_mask(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 4 and not self._takes_mask_of_pairs:
            raise UserError(
                f"batch: expected attention_mask of rows x length for {type(self.model).__name__}, in which a mask of pairs of "
                f"tokens does not keep packed sequences apart, received one of shape {tuple(mask.shape)}"
            )

    @functools.cached_property
    def _takes_mask_of_pairs(self) -> bool:
        with torch.compiler.set_stance("force_eager") if self.should_compile else nullcontext():
            return takes_mask_of_pairs(self.model)

    @property
    def _may_split(self) -> bool:
        """Whether a batch may take several forward passes: not if new shapes are compiled, or all processes must take part."""
        return not (self.should_compile or self.is_sharded) and is_free_of_length(self.model)

    def _language_step(self, batch: Batch) -> StepOutput:
        may_split = self._may_split and not has_router_loss(self.model)
        parts = [part for _, part in split_by_length(batch)] if may_split else [batch]
        totals, counts, router_losses = zip(*map(self._language_loss, parts), strict=True)
        loss = torch.stack(totals).sum() / max(sum(counts), 1)
        return StepOutput(loss if router_losses[0] is None else loss + router_losses[0], sum(counts))

    def _language_loss(self, batch: Batch) -> tuple[Tensor, int, Tensor | None]:
        """The sum of the losses of a batch's tokens, their number, and the router's loss of a mixture of experts."""
        logits, labels, router_loss = self._language_logits(batch)
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total, int((labels != IGNORE_INDEX).sum()), router_loss

    def _language_logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits and next tokens at the positions that carry the loss, and the router's loss of a mixture of experts."""
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)  # each position predicts the next token
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:  # a row's first token follows on padding, which predicts nothing
            labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
        (places,) = (labels != IGNORE_INDEX).any(0).nonzero(as_tuple=True)
        places = places if len(places) else places.new_zeros(1)
        logits, router_loss = logits_and_router_loss(self.model, batch, places)
        return logits, labels[:, places], router_loss

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if "references" in batch:
            targets = [answers or None for answers in batch["references"]]
            return {"prediction": self.generate(batch), "target": targets, "prompt": batch["prompt"]}
        if "option_ids" not in batch and "prompt_ids" in batch:
            with seeded(derive_seed(self.seed, "predict", self.global_rank, dataloader_idx, batch_idx)):  # for sampling
                return {"prediction": self.generate(batch), "target": batch["target"], "prompt": batch["prompt"]}
        if "option_ids" not in batch:
            raise UserError(
                "predict: expected rows with options to choose from, or with a prompt to continue, received rows with a "
                "language-model loss"
            )
        scores = self.option_scores(batch)
        answers = [None if answer == IGNORE_INDEX else answer for answer in batch["answer"].tolist()]
        columns = {"prediction": scores.argmax(-1), "target": answers}
        columns |= {name: batch[name] for name in ("prompt", "options") if name in batch}
        if "accepted" in batch:  # several correct options
            columns["target"] = [row.nonzero().flatten().tolist() or None for row in batch["accepted"]]
        counts = (batch["option_ids"] != IGNORE_INDEX).any(-1).sum(-1).tolist()
        return columns | {"scores": [row[:n] for row, n in zip(scores.tolist(), counts, strict=True)]}


def _mean_log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """The mean log-probability of each option's tokens, rows x options, by the logits at the sequences' last positions."""
    ids = batch["option_ids"]
    rows, places = batch["option_rows"].unsqueeze(-1), torch.arange(ids.shape[-1], device=ids.device)
    is_token = ids != IGNORE_INDEX
    chosen = logits[rows, places, ids.clamp(min=0)]  # rows x options x tokens
    log_probabilities = (chosen - logits.logsumexp(-1)[rows, places]) * is_token
    lengths = is_token.sum(-1)
    means = log_probabilities.sum(-1) / lengths.clamp(min=1)
    scores: Tensor = means.masked_fill(lengths == 0, -torch.inf)
    return scores
