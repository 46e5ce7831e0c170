"""Causal language models: prompted classification, the language-model loss, and generation."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning.chat_template import end_tokens
from cola_lightning.constants import IGNORE_INDEX, MAX_NEW_TOKENS
from cola_lightning.contexts import evaluating, with_attribute
from cola_lightning.decoding import Decoding
from cola_lightning.errors import UserError
from cola_lightning.hf.chunked_loss import CHUNKED_ABOVE, chunked_token_losses, n_bytes
from cola_lightning.hf.host_values import SHAPE_FIELDS, Array, Arrays, Batch, to_device
from cola_lightning.hf.logits import (
    TOKEN_FIELDS,
    check_decoder,
    check_fields,
    has_router_loss,
    logits_at,
    split_by_length,
)
from cola_lightning.hf.metrics import ANSWER_METRICS, METRICS
from cola_lightning.hf.packed import Separation, find_separation, is_packed, separate
from cola_lightning.hf.transformers_module import BatchMetrics, RowValues, StepOutput, TransformersModule
from cola_lightning.seeding import derive_seed, seeded

# What the module itself reads of a language-model batch, besides its tokens.
MODULE_FIELDS = {"references", "metric", "prompt_ids", "prompt_mask", "decoding", "end_tokens"}
ANSWER = Decoding(max_new_tokens=MAX_NEW_TOKENS, stop=("\n",))  # of an answer that is compared with references


class COLACausalLM(TransformersModule):
    """A causal language model that is fine-tuned with a chain of low-rank links.

    It accepts two kinds of batches:

    * **option batches** (prompted tasks; :class:`~cola_lightning.data.PromptDataModule` makes them): the prediction is the
      option with the largest mean log-probability; the loss is the cross-entropy over these (``loss: options``), or the
      language model's on the correct option's tokens (``loss: answer``). With ``references``, an answer is generated, in a
      fit's validations only with ``generate_in_validation``; ``val_f1`` and ``val_exact_match`` compare it with them.
      A batch may request another ``metric``: ``f1`` or ``matthews_corrcoef`` of options, one of the two of answers;
    * **language-model batches**, the usual dict of ``input_ids``, ``attention_mask`` and ``labels``, -100 for tokens without
      loss: the loss is the mean over the other tokens, by default over those of all batches of an optimizer step
      (``loss_average``). Any Hugging Face collator makes them. Several sequences may share a row if ``position_ids`` start
      again with each (transformers' flattening collator). Whether the model keeps them apart is tried out at the first such
      batch; a model that does not (a state-space or convolution layer, OPT, Bloom) is refused. Other values that the model's
      forward pass takes (``pixel_values``, ``inputs_embeds``) are passed on, and values that it does not take are refused.
      Predict takes prompts (``prompt_ids``, ``prompt_mask``, ``prompt``, ``target``) instead, and generates: see
      :meth:`generate`.

    Only the positions that carry the loss go through the language-model head. Options that differ in their last token alone
    share the tokens before it. Rows with a ``labels`` loss that are much shorter than others have their own forward pass.

    If the configuration of a mixture of experts has ``output_router_logits``, training adds the auxiliary loss of the routers
    times ``router_aux_loss_coef``, as in TRL. The logged losses of validation and test do not contain it.

    Args:
        chunked_loss: ``true`` computes the language-model loss and its gradients over chunks of the tokens, so that the logits
            of all of them never exist together. ``null`` does so if these would take more than 256 MB in float32.
        generate_in_validation: Generate answers in a fit's validations too. A checkpoint can then be chosen by ``val_f1`` or
            ``val_exact_match``.
        **pretrained: the arguments of ``TransformersModule`` (``revision``, ``dtype``, ``quantization``, ...) and of
            :class:`~cola_lightning.COLAModule` (``target_modules``, ``rank``, ``alpha``, ``optimizer``, ...). ``help()``
            lists them all with their defaults, and ``cola fit --model.help COLACausalLM`` says what each does.

    Source: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes" (arXiv 2305.17333), appendix; the loss and
        the scores are those of its code (princeton-nlp/MeZO, large_models).
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    # **pretrained: see TransformersModule.
    def __init__(
        self,
        model_name: str,
        *,
        chunked_loss: bool | None = None,
        generate_in_validation: bool = False,
        **pretrained: Any,
    ) -> None:
        super().__init__(model_name, **pretrained)
        self.chunked_loss, self.generate_in_validation = chunked_loss, generate_in_validation

    @override
    def build_model(self) -> nn.Module:
        model = super().build_model()
        if self.run.made is None:  # else it is a rebuild of one that was checked
            check_decoder(model)
        return model

    @override
    def compile_model(self, **options: Any) -> None:
        cast(Any, self.model).get_decoder().compile(**options)  # without the head, which a chunked loss calls by itself

    @override
    def auxiliary_loss(self) -> Tensor | float:
        loss: Tensor | float = vars(self.model).pop("router_loss", 0.0)
        return loss

    @override
    def step(self, batch: Batch) -> StepOutput:
        if "option_ids" not in batch:
            return self._language_step(batch)
        scores = self.option_scores(batch)
        answer = batch["answer"]
        if batch.get("loss", "options") == "options":
            loss, size = F.cross_entropy(scores, answer), len(answer)
            losses = F.cross_entropy(scores.detach(), answer, reduction="none")
            row_losses = RowValues(losses, torch.ones_like(losses))
        else:  # over the right options' tokens
            right = answer.unsqueeze(1)
            lengths = (batch["option_ids"] != IGNORE_INDEX).sum(-1).gather(1, right)
            ids, rights = (self.host_values.get(batch[name]).numpy() for name in ("option_ids", "answer"))
            size = int((ids[range(len(ids)), rights] != IGNORE_INDEX).sum())
            losses = -scores.gather(1, right) * lengths
            loss, row_losses = losses.sum() / size, RowValues(losses.detach().squeeze(1), lengths.squeeze(1))
        if "references" in batch:
            return StepOutput(loss, size, row_losses=row_losses)
        chosen = scores.argmax(-1)
        if "accepted" in batch:
            answer = torch.where(batch["accepted"].gather(1, chosen.unsqueeze(1)).squeeze(1), chosen, answer)
        return StepOutput(loss, size, chosen, answer, row_losses=row_losses)

    @override
    def batch_metrics(self, batch: Any, output: StepOutput) -> BatchMetrics:
        named: Batch = batch if isinstance(batch, Mapping) else {}
        requested = named.get("metric")
        if "references" in named:
            if not named["references"] or (self.trainer.state.fn == "fit" and not self.generate_in_validation):
                return {}
            values = self.generate(batch), batch["references"]
            return {name: (ANSWER_METRICS[name], values) for name in ([requested] if requested else ANSWER_METRICS)}
        if requested is None or output.predictions is None:
            return super().batch_metrics(batch, output)
        make = functools.partial(METRICS[requested], named["option_ids"].shape[1])
        return {requested: (make, (output.predictions, output.targets))}

    @torch.no_grad()
    def generate(self, batch: Batch, streamer: Any = None) -> list[str]:
        """The text that the model generates after each prompt of a batch.

        Args:
            batch: ``prompt_ids`` and ``prompt_mask`` (rows x length), padded on the left. ``decoding``: the fields of
                :class:`~cola_lightning.decoding.Decoding`; without it, greedy, at most 50 tokens, up to a line's end.
                ``end_tokens``: tokens at which it ends, besides the end of text.
            streamer: receives the tokens of a single row as they are generated: transformers' ``TextStreamer``.

        Returns:
            The text of each row, without surrounding white space, special tokens, and an end token that was added to the
            tokenizer.
        """
        from transformers import GenerationConfig

        model, tokenizer = cast(Any, self.model), self.tokenizer
        decoding = Decoding(**batch["decoding"]) if "decoding" in batch else ANSWER
        of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = {*end_tokens(of_model, tokenizer), *batch.get("end_tokens", ())}
        options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "do_sample": decoding.do_sample}
        if decoding.do_sample:  # top_k: transformers' own default is 50
            options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        if decoding.stop:
            options["stop_strings"] = list(decoding.stop)
        options |= {"eos_token_id": sorted(ends) or None, "pad_token_id": tokenizer.pad_token_id}
        hidden = ends & set(tokenizer.added_tokens_decoder)  # special or not
        config = GenerationConfig(**options)  # type: ignore[no-untyped-call]
        # Without dropout, also after a fit, which leaves the training mode. The configuration is the model's own, too:
        # transformers would fill in values of that, a penalty for example.
        with self._uncompiled(), evaluating(model), with_attribute(model, "generation_config", config):
            generated = model.generate(
                input_ids=batch["prompt_ids"],
                attention_mask=batch["prompt_mask"],
                generation_config=config,
                tokenizer=tokenizer,  # which stop strings need
                synced_gpus=self.run.is_sharded,  # then weights are gathered at each token: all processes go on to the end
                streamer=streamer,
            )
        new = [[token for token in row if token not in hidden] for row in generated[:, batch["prompt_ids"].shape[1] :].tolist()]
        return [decoding.cut(text, is_open=False)[0].strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]

    def option_scores(self, batch: Batch) -> Tensor:
        """The mean log-probability of each option's tokens after its prompt.

        Args:
            batch: ``input_ids`` and ``attention_mask`` (sequences x length, padded on the left): the tokens before each
                option's last one, once for all options that share them; ``option_rows`` (rows x options): the index of each
                option's sequence; ``option_ids`` (rows x options x tokens, -100 before an option's first token): the option's
                tokens.

        Shape:
            result: rows x options, in float32; -inf where a row has fewer options.
        """
        self._check_mask(batch)
        return _mean_log_probabilities(logits_at(self.model, batch, batch["option_ids"].shape[-1]), batch)

    def _check_mask(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UserError(
                f"batch: attention_mask must be rows x length, got {tuple(mask.shape)}. Sequences that share a row need "
                "position_ids that start again with each"
            )

    @functools.cached_property
    def _separation(self) -> Separation:
        with self._uncompiled():
            return find_separation(self.model)

    def _separate(self, batch: Batch, host: Batch) -> tuple[Batch, Batch]:
        """A batch, and its values on the host, in which the model keeps sequences apart that share a row, if any do.

        Raises:
            UserError: if they do, and the model cannot.
        """
        if batch.get("attention_mask") is not None and not is_packed(host):  # padding, with its positions
            return batch, host
        if (separation := self._separation) != "none":
            return separate(batch, separation), separate(host, separation)
        if is_packed(host):
            raise UserError(
                f"batch: position_ids start again inside a row, but {type(self.model).__name__} does not keep sequences apart "
                "that share a row. Give each sequence its own row (data.packing false, a collator that pads)."
            )
        return batch, host

    def _uncompiled(self) -> Any:
        """Inside the block, a compiled model runs as it is: new shapes would have it compiled again, for each token."""
        return torch.compiler.set_stance("force_eager") if self.should_compile else nullcontext()

    def language_parts(self, batch: Batch) -> Iterator[tuple[list[int], Batch, Array, Array]]:
        """A language-model batch, split into forward passes of rows of similar length, where that saves time.

        Yields:
            The indices of the rows; their batch; the positions with a loss in any of them; and the next tokens there (rows x
            positions), -100 without a loss.
        """
        check_fields(self.model, batch, MODULE_FIELDS)
        self._check_mask(batch)
        host: Batch = self.host_values.get_batch(batch)
        if (positions := batch.get("position_ids")) is not None and positions.dim() == 2:  # several sequences may share a row
            batch, host = self._separate(batch, host)
        arrays = {name: host[name].numpy() for name in SHAPE_FIELDS & host.keys()}  # what reads them is no work of a device
        # Not if new shapes are compiled, all processes must take part, or routers have a loss, which is no sum over rows.
        is_whole = self.should_compile or self.run.is_sharded or has_router_loss(self.model)
        may_split = batch.keys() <= TOKEN_FIELDS and not is_whole
        parts = split_by_length(batch, arrays) if may_split else [(list(range(len(batch["labels"]))), batch)]
        for rows, part in parts:
            places, labels, counted = _next_tokens(arrays, rows, part["labels"].shape[1])
            if counted is not None and part.keys() <= TOKEN_FIELDS:  # else an image's tokens may have more than one
                part = {"position_ids": to_device(torch.from_numpy(counted), part["labels"].device), **part}
            yield rows, part, places, labels

    def _language_step(self, batch: Batch) -> StepOutput:
        if torch.is_grad_enabled():
            totals, sizes = list[Tensor](), 0
            for _, part, places, labels in self.language_parts(batch):
                totals.append(self._token_losses(part, places, labels).sum())
                sizes += int((labels != IGNORE_INDEX).sum())
            return StepOutput((totals[0] if len(totals) == 1 else torch.stack(totals).sum()) / max(sizes, 1), sizes)
        row_losses, n_tokens = self.row_losses(batch)
        size = int(n_tokens.sum())
        return StepOutput(row_losses.sum() / max(size, 1), size, row_losses=RowValues(row_losses, torch.from_numpy(n_tokens)))

    def row_losses(self, batch: Batch) -> tuple[Tensor, Array]:
        """The loss of each row of a language-model batch.

        Args:
            batch: the batch.

        Returns:
            The sums over a row's tokens with a loss (rows), and the numbers of these tokens (rows, on the host).
        """
        order, sums, n_tokens = list[int](), list[Tensor](), list[Array]()
        for rows, part, places, labels in self.language_parts(batch):
            order += rows
            sums.append(self._token_losses(part, places, labels).view(labels.shape).sum(-1))
            n_tokens.append((labels != IGNORE_INDEX).sum(-1))
        if len(sums) == 1:
            return sums[0], n_tokens[0]
        index = torch.tensor(order).argsort()
        return torch.cat(sums)[to_device(index, sums[0].device)], np.concatenate(n_tokens)[index.numpy()]

    def _token_losses(self, batch: Batch, places: Array, labels: Array) -> Tensor:
        """The loss of each token, 0 without one."""

        def move(values: Array) -> Tensor:
            return to_device(torch.from_numpy(values), batch["labels"].device)

        indices, positions, targets = np.flatnonzero(labels != IGNORE_INDEX), move(places), move(labels.ravel())
        if len(indices) and self.is_chunked(len(targets)):
            moved = move(indices)
            losses = chunked_token_losses(self.model, batch, positions, targets, moved)
            return losses.new_zeros(len(targets)).index_copy(0, moved, losses)
        logits = logits_at(self.model, batch, positions)
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="none")

    def is_chunked(self, n_positions: int) -> bool:
        """Whether the loss at these positions is computed in chunks, so that their logits never exist together."""
        if self.chunked_loss is None and not self.run.is_wrapped_by_fsdp1:  # which has its weights in the forward pass alone
            return n_bytes(self.model, n_positions) > CHUNKED_ABOVE
        return bool(self.chunked_loss)

    @override
    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if "references" in batch or "option_ids" not in batch:
            targets = [answers or None for answers in batch["references"]] if "references" in batch else batch["target"]
            with seeded(derive_seed(self.seed, "predict", self.global_rank, dataloader_idx, batch_idx)):  # for sampling
                return {"prediction": self.generate(batch), "target": targets, "prompt": batch["prompt"]}
        scores = self.option_scores(batch)
        answers = [None if answer == IGNORE_INDEX else answer for answer in batch["answer"].tolist()]
        if "accepted" in batch:  # several correct options
            answers = [row.nonzero().flatten().tolist() or None for row in batch["accepted"]]
        chosen = scores.argmax(-1).tolist()
        columns = {"prediction": chosen, "target": answers}
        if "options" in batch:
            texts = [[option.strip() for option in options] for options in batch["options"]]
            columns = {name: list(map(_option_texts, texts, places)) for name, places in columns.items()}
            columns["option"] = chosen
        columns |= {name: batch[name] for name in ("prompt", "options") if name in batch}
        counts = (batch["option_ids"] != IGNORE_INDEX).any(-1).sum(-1).tolist()
        return columns | {"scores": [row[:n] for row, n in zip(scores.tolist(), counts, strict=True)]}


def _option_texts(options: list[str], places: int | list[int] | None) -> Any:
    """The text of an option, or of several, by index."""
    if isinstance(places, list):
        return [options[place] for place in places]
    return None if places is None else options[places]


def _next_tokens(batch: Arrays, rows: list[int], length: int) -> tuple[Array, Array, Array | None]:
    """The next tokens that the model learns to predict in some rows of a language-model batch, on the host.

    Args:
        batch: ``labels`` and, if there is one of rows x length, ``attention_mask``, on the host.
        rows: indices of the rows.
        length: number of their last positions.

    Returns:
        The positions with a loss in any row, which alone go through the head (at least one); the next tokens there (rows x
        places), ``IGNORE_INDEX`` without a loss; and the tokens' positions in their rows, which begin at 0 after padding, None
        without a mask of rows x length.
    """
    tokens, positions = batch["labels"][rows, -length:], None
    labels = np.full_like(tokens, IGNORE_INDEX)
    labels[:, :-1] = tokens[:, 1:]  # each position predicts the next token
    if "attention_mask" in batch:
        mask = batch["attention_mask"][rows, -length:] != 0
        labels[~mask] = IGNORE_INDEX  # a row's first token follows on padding, which predicts nothing
        positions = (mask.cumsum(-1) - 1).clip(min=0)
    places = np.flatnonzero((labels != IGNORE_INDEX).any(0))
    places = places if len(places) else np.zeros(1, dtype=places.dtype)
    return places, labels[:, places], positions


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
