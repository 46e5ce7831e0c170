"""Preference tuning of causal language models: DPO and its relatives, whose reference is the chain itself."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from cola_lightning.chain.chain import number_of_links
from cola_lightning.errors import UserError
from cola_lightning.hf.causal_lm import COLACausalLM
from cola_lightning.hf.host_values import Batch, to_device
from cola_lightning.hf.transformers_module import RowValues, StepOutput

log = logging.getLogger(__name__)

PreferenceLoss = Literal["sigmoid", "ipo", "simpo", "orpo"]
WITH_REFERENCE = ("sigmoid", "ipo")
SMOOTHED = ("sigmoid", "simpo")


@dataclass(frozen=True)
class Responses:
    """The log-probabilities of responses to the same prompts, one for each pair.

    Attributes:
        log_probabilities: of the responses, given their prompts.
        sizes: how many tokens they have.
        reference: ``start`` is the model that the run began from: the base and ``init_chain``. ``link`` is the model that the
            current link began from, so that each knot moves the reference. A number of links, or the name of a stage, is the
            model after these links.
    """

    log_probabilities: Tensor
    sizes: Tensor
    reference: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        """The log-probabilities relative to the reference's; without one, per token."""
        if self.reference is None:
            return self.log_probabilities / self.sizes
        return self.log_probabilities - self.reference


class COLAPreferenceLM(COLACausalLM):
    """A causal language model that is tuned on pairs of a chosen and a rejected response, with a chain of low-rank links.

    The reference model of DPO is the chain without its last links, so it takes no second model, whatever the base: see
    :meth:`~cola_lightning.COLAModule.at`. With ``reference: link`` a knot moves the reference.

    A batch is the usual language-model dict with an even number of rows, and ``n_pairs``: first the chosen responses, then the
    rejected ones in the same order, with ``labels`` of -100 in the prompts. :class:`~cola_lightning.PreferenceDataModule`
    makes such batches. Pairs are not packed.

    It logs ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen`` and
    ``logps/rejected``, in validation and test with ``val_`` and ``test_``.

    Args:
        loss: ``sigmoid`` (DPO) and ``ipo`` have a reference model; ``simpo`` and ``orpo`` have none.
        beta: How strongly the loss holds the model to its reference. With ``simpo`` it is the scale of the rewards, with
            ``orpo`` the weight of the odds ratio.
        label_smoothing: Assumed probability that a preference is wrong, for ``sigmoid`` and ``simpo``.
        simpo_gamma: Margin by which ``simpo`` wants the chosen response's reward to be larger.
        sft_weight: Weight of the chosen responses' loss per token, which is added. (``orpo`` always contains it once.)
        reference: ``start`` is the model that the run began from: the base and ``init_chain``, or all that a module contains
            when you fit it. ``link`` is the model that the current link began from, so each knot moves the reference. You can
            also give a number of links, from the first, or the name of a finished stage.
        **causal: the arguments of :class:`~cola_lightning.COLACausalLM`.

    Raises:
        UserError: for invalid values.

    Source: ``sigmoid``: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), equation 7, with label smoothing
        as in its code; ``ipo``: Azar et al., "A General Theoretical Paradigm" (arXiv 2310.12036), equation 17, with the mean
        over a response's tokens, as in TRL; ``simpo``: Meng et al., "SimPO" (arXiv 2405.14734), equation 6; ``orpo``: Hong et
        al., "ORPO" (arXiv 2403.07691), equations 6 and 7; ``link``: Gorbatovski et al., "Learn Your Reference Model" (arXiv
        2404.09656). Names and defaults are TRL's.
    """

    trains_pairs = True  # which PreferenceDataModule asks

    # **causal: see TransformersModule.
    def __init__(
        self,
        model_name: str,
        *,
        loss: PreferenceLoss = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        simpo_gamma: float = 0.5,
        sft_weight: float = 0.0,
        reference: int | str = "start",
        **causal: Any,
    ) -> None:
        super().__init__(model_name, **causal)
        for name, is_valid, valid in (
            ("loss", loss in get_args(PreferenceLoss), " or ".join(get_args(PreferenceLoss))),
            ("beta", beta > 0, "above 0"),
            ("label_smoothing", 0 <= label_smoothing < 0.5, "at least 0 and below 0.5"),
            ("label_smoothing", not label_smoothing or loss in SMOOTHED, f"0 unless the loss is {' or '.join(SMOOTHED)}"),
            ("sft_weight", sft_weight >= 0, "at least 0"),
            ("reference", isinstance(reference, str) or reference >= 0, "start, link, a number of links, or a stage"),
        ):
            if not is_valid:
                raise UserError(f"model.{name}: must be {valid}, got {locals()[name]!r}")
        if self.run.config.target_modules is None and loss in WITH_REFERENCE:
            raise UserError(f"model.target_modules: {loss} needs links, because its reference is the model without them")
        self.preference_loss, self.beta, self.label_smoothing = loss, beta, label_smoothing
        self.simpo_gamma, self.sft_weight, self.reference = simpo_gamma, sft_weight, reference

    @property
    def reference_links(self) -> int | str:
        """How many links the reference model has, or the last stage in it."""
        start = min(self.run.first_link, self.n_finished)  # fewer after a roll back
        named = {"start": start, "link": self.n_finished}
        return named.get(self.reference, self.reference) if isinstance(self.reference, str) else self.reference

    @override
    def step(self, batch: Batch) -> StepOutput:
        if not isinstance(batch, Mapping) or "n_pairs" not in batch:
            raise UserError("batch: pairs of a chosen and a rejected response are needed, with their n_pairs")
        n, batch = batch["n_pairs"], {name: value for name, value in batch.items() if name != "n_pairs"}
        reference = None
        if self.preference_loss in WITH_REFERENCE:
            with self.at(self.reference_links):
                reference, _ = self.log_probabilities(batch)
        values, sizes = self.log_probabilities(batch)
        chosen, rejected = (
            Responses(values[part], sizes[part], None if reference is None else reference[part])
            for part in (slice(None, n), slice(n, None))
        )
        losses = self.loss_of_pairs(chosen, rejected)
        loss, row_losses = losses.mean(), RowValues(losses.detach(), torch.ones_like(losses))
        if weight := self.sft_weight + (self.preference_loss == "orpo"):
            loss = loss - weight * chosen.log_probabilities.sum() / chosen.sizes.sum()
        rewards = [self.beta * responses.log_ratios.detach() for responses in (chosen, rejected)]
        logged = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen.log_probabilities.detach(),
            "logps/rejected": rejected.log_probabilities.detach(),
        }
        return StepOutput(loss, n, logged=logged, row_losses=None if weight else row_losses)

    def loss_of_pairs(self, chosen: Responses, rejected: Responses) -> Tensor:
        """Each pair's loss; override it for one of your own.

        Args:
            chosen: the responses that are preferred.
            rejected: the responses of the same pairs that are not.

        Shape:
            result: pairs.
        """
        margin, beta = chosen.log_ratios - rejected.log_ratios, self.beta
        if self.preference_loss == "ipo":
            margin = chosen.log_ratios / chosen.sizes - rejected.log_ratios / rejected.sizes
            return (margin - 1 / (2 * beta)) ** 2
        if self.preference_loss == "orpo":
            means = (chosen.log_ratios, rejected.log_ratios)
            chosen_odds, rejected_odds = (mean - torch.log1p(-mean.exp()) for mean in means)
            return -beta * F.logsigmoid(chosen_odds - rejected_odds)
        logits = beta * margin - (self.simpo_gamma if self.preference_loss == "simpo" else 0)
        smoothing = self.label_smoothing
        return -F.logsigmoid(logits) * (1 - smoothing) - F.logsigmoid(-logits) * smoothing

    def log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The log-probability of each row's tokens with a loss, given those before them.

        Args:
            batch: a language-model batch.

        Returns:
            The sums of a row's log-probabilities (rows), and the numbers of tokens (rows).
        """
        losses, n_tokens = self.row_losses(batch)
        return -losses, to_device(torch.from_numpy(n_tokens), losses.device)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.preference_loss not in WITH_REFERENCE:
            return
        if self.reference == "start" and self.trainer.ckpt_path is None:
            self.run.finish_first_link()
        if number_of_links(self.reference_links, self.link_names) > self.n_finished:
            raise UserError(f"model.reference: {self.reference!r} is being trained. Use start, link or links that are finished")
        if self.global_rank == 0:
            moves = ", and each knot moves it" if self.reference == "link" else ""
            log.info("the reference is the model after %s of %d links%s", self.reference_links, self.n_finished + 1, moves)
