"""The rank and alpha of each link of a module, checked against finished links and the run's length."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Chain
from cola_lightning.errors import UserError
from cola_lightning.lora.registry import Init
from cola_lightning.modules.run_state import RunState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkPlan:
    """Rank and alpha of each link: those of the run's schedule, else the module's.

    Attributes:
        max_rank: the module's.
        alpha: the module's.
        run: whose schedule counts.
        dropout: the module's, of all links.
        init: the module's, of all links.
    """

    # As given to the module: a subclass may have attributes of its own with these names.
    max_rank: int
    alpha: float
    run: RunState
    dropout: float
    init: Init

    def of(self, link: int) -> tuple[int, float]:
        """Rank and alpha of a link, as requested."""
        return self.run.schedule.rank(link, self.max_rank), self.run.schedule.alpha(link, self.alpha)

    def begin(self, adapted: AdaptedModel) -> None:
        """Begins the next link of a model with the rank and alpha that it should have."""
        adapted.begin_link(*self.of(adapted.link))

    def apply(self, adapted: AdaptedModel, first_chain: Chain | None) -> bool:
        """Begins the live link again if it is older than the schedule, which requests another rank or alpha.

        Args:
            adapted: the model.
            first_chain: the chain that it started from, whose links have their own ranks and alphas.

        Returns:
            Whether the link was begun again.

        Raises:
            UserError: if the live link, or a finished one, has been trained with another rank or alpha.
        """
        live = adapted.live
        if live is None:
            return False
        self._check_finished(adapted.chain, 0 if first_chain is None else len(first_chain))
        schedule, planned = self.run.schedule, self.of(adapted.link)
        differs = [mine != theirs for mine, theirs in zip(planned, live, strict=True)]
        given = (schedule.ranks, schedule.alphas)
        is_requested = any(other and values is not None for other, values in zip(differs, given, strict=True))
        is_new = not any(layer.has_begun for layer in adapted.layers.values())
        if is_new and (is_requested or (any(differs) and not adapted.link)):
            self.begin(adapted)
            return True
        if is_requested:
            raise UserError(
                f"chain.ranks, chain.alphas: expected rank {live[0]} and alpha {live[1]:g} for link {adapted.link}, which has "
                f"been trained with these and continues, received {planned[0]} and {planned[1]:g}"
            )
        return False

    def _check_finished(self, chain: Chain, n_first: int) -> None:
        schedule = self.run.schedule
        for link in chain.links[n_first:]:
            rank, alpha = self.of(link.index)
            differs = (
                schedule.ranks is not None and rank != link.rank,
                schedule.alphas is not None and alpha != link.alpha,
            )
            if any(differs) and link.rank <= self.max_rank:
                raise UserError(
                    f"chain.ranks, chain.alphas: expected rank {link.rank} and alpha {link.alpha:g} for link {link.index}, "
                    f"which is finished, received {rank} and {alpha:g}"
                )

    def check_resumed(self, planned: Mapping[int, list[float]], live: int) -> None:
        """Refuses to resume with other ranks and alphas than the run of the checkpoint requested.

        Args:
            planned: rank and alpha by link, in the checkpoint.
            live: index of the checkpoint's live link.

        Raises:
            UserError: for a link of another rank or alpha.
        """
        for link, (rank, alpha) in sorted(planned.items(), reverse=True):  # the live one first
            mine = self.of(link)
            if mine != (rank, alpha) and (link == live or self.run.schedule.has_knots):
                where = "in which the checkpoint lies" if link == live else "which is finished"
                raise UserError(
                    f"model.rank, model.alpha, chain.ranks, chain.alphas: expected rank {rank} and alpha {alpha:g} for link "
                    f"{link}, {where}, received {mine[0]} and {mine[1]:g}"
                )

    def warn_of_lengths(self, lengths: list[int], n_finished: int) -> None:
        """Warns of lists of ranks and alphas that are too short, and of lengths that look wrong.

        Args:
            lengths: optimizer steps of each remaining link of a fit, the live one first.
            n_finished: how many links are finished.
        """
        self.warn_of_short_lists(n_finished + len(lengths))
        if len(lengths) < 2:
            if self.run.schedule.has_knots and not n_finished:
                log.warning("the run ends before its first knot: it is one link, plain LoRA")
            return
        shortest = min(lengths[:-1])
        if lengths[-1] < shortest / 2:
            log.warning("the last link has %d optimizer steps, the others at least %d", lengths[-1], shortest)

    def warn_of_short_lists(self, n_links: float) -> None:
        """Warns which rank and alpha links beyond the lists have, in a run of so many links; infinite: not known beforehand."""
        for field, values in (("ranks", self.run.schedule.ranks), ("alphas", self.run.schedule.alphas)):
            if values is not None and len(values) < n_links:
                log.warning("chain.%s: from link %d on its last entry holds, %s", field, len(values) - 1, values[-1])

    def reserve(self, adapted: AdaptedModel, n_links: int) -> None:
        """Allocates the stacks for the finished links of a chain of this length.

        At most a weight's full rank: a chain of a thousand links may well be stopped early.
        """
        for layer in adapted.layers.values():
            if layer.stack is not None:
                ranks = [link.rank for link in adapted.chain.links] + [layer.rank]
                ranks += [self.of(k)[0] for k in range(len(ranks), n_links - 1)]
                layer.stack.reserve(min(sum(ranks[: n_links - 1]), layer.lora_A.shape[1], layer.lora_B.shape[0]))
