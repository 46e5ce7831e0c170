"""How links are trained: an optimizer and a learning-rate schedule for each, and the checks before a fit begins."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from cola_lightning.adapted_model import is_factor
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import CHECKPOINT_KEY
from cola_lightning.chain.schedule import Counters, LRSchedule, RunLength, lr_factor
from cola_lightning.errors import UserError
from cola_lightning.modules.restore import RestoredChain

log = logging.getLogger(__name__)

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]


class LinkTraining(RestoredChain):
    """The part of :class:`~cola_lightning.modules.COLAModule` that trains the live link.

    Attributes:
        optimizer: makes an optimizer of the trainable parameters.
        modules_to_save: names of what is trained whole.
        modules_to_save_lr: the first learning rate of what is trained whole, where it has one of its own.
        lr_schedule: see :class:`~cola_lightning.modules.COLAModule`, as for the next two.
        warmup_steps: a number of steps, or a share below 1.
        schedule_scope: ``link`` or ``run``.
        run_length: how far the fit goes; None while that is not known.
    """

    optimizer: OptimizerCallable
    modules_to_save: list[str]
    modules_to_save_lr: float | None
    lr_schedule: LRSchedule
    warmup_steps: float
    schedule_scope: Literal["link", "run"]
    target_modules: str | list[str] | None
    rank: int
    alpha: float
    run_length: RunLength | None
    _first_chain: Chain | None
    _own_optimizer: Optimizer | None = None
    _own_scheduler: LambdaLR | None = None
    _wanted_groups: Sequence[dict[str, Any]] = ()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "_own_scheduler": None,
            "run_length": None,
        }  # they are of a fit, and cannot be pickled

    @override
    def _check_same_choices(self, checkpoint: Mapping[str, Any]) -> None:
        state, live = checkpoint[CHECKPOINT_KEY], checkpoint[CHECKPOINT_KEY]["live"]
        if "optimizer_states" not in checkpoint:
            raise UserError("ckpt_path: expected a checkpoint with the optimizer's state, received one of weights alone")
        if self._given_seed not in (None, state["seed"]):
            raise UserError(
                f"model.seed, or seed_everything: expected {state['seed']}, the checkpoint's, received {self._given_seed}"
            )
        if live is not None:  # format version 1 knows the live link's alone
            known = dict(enumerate(state.get("scheduled", []))) | {self.link: live["scheduled"]}
            self._check_same_ranks(known)
        if self._origin[0] is not None and self._origin != state["origin"]:
            (had, had_links), (mine, my_links) = state["origin"], self._origin
            raise UserError(
                f"model.init_chain: expected null or what the checkpoint's run began from, {had or 'its base'} "
                f"(links: {had_links}), received {mine} (links: {my_links})"
            )
        if state["has_rate_of_saved"] is (self.modules_to_save_lr is None):
            expected = "a number" if state["has_rate_of_saved"] else "null"
            raise UserError(
                f"model.modules_to_save_lr: expected {expected}, as in the checkpoint's run, received {self.modules_to_save_lr}"
            )

    def _check_same_ranks(self, known: Mapping[int, list[float]]) -> None:
        for link, (rank, alpha) in sorted(known.items(), reverse=True):  # the live one first
            mine = self._scheduled(link)
            if mine != [rank, alpha] and (link == self.link or self.schedule.has_knots):
                what = "in which the checkpoint lies" if link == self.link else "which is finished"
                raise UserError(
                    f"model.rank, model.alpha, chain.ranks, chain.alphas: expected rank {rank} and alpha {alpha:g} for link "
                    f"{link}, {what}, received {mine[0]} and {mine[1]:g}"
                )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule for the live link; called again at each knot."""
        try:
            optimizer = self.optimizer(self._parameter_groups())
        except (TypeError, ValueError) as error:  # an optimizer's own words for a value that it cannot take
            raise UserError(f"model.optimizer: expected values that it takes, received: {error}") from error
        for group in optimizer.param_groups:  # a schedule writes a rate that is a tensor in place: of the next link's, too
            group["lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        self._wanted_groups = [_without_parameters(group) for group in optimizer.param_groups]
        self._own_optimizer, self._own_scheduler = optimizer, self._scheduler(optimizer)
        self._optimizer_class = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        if self._had_optimizer not in (None, self._optimizer_class) and self.run_length is None:
            raise UserError(
                f"model.optimizer: expected {self._had_optimizer}, whose state the checkpoint holds, "
                f"received {self._optimizer_class}"
            )
        if self._own_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._own_scheduler, "interval": "step"},
        }

    def _scheduler(self, optimizer: Optimizer) -> LambdaLR | None:
        """The learning-rate schedule of the live link, from where it stands; None for an optimizer with rates of its own."""
        if any(group["lr"] is None or group.get("relative_step") for group in optimizer.param_groups):
            if self.modules_to_save_lr is not None:
                raise UserError(
                    "model.modules_to_save_lr: expected null for an optimizer with rates of its own, received "
                    f"{self.modules_to_save_lr} and {type(optimizer).__name__}"
                )
            if self._needs_horizon or self.warmup_steps:
                raise UserError(
                    "model.optimizer: expected a learning rate, for model.lr_schedule and model.warmup_steps to scale, "
                    f"received {type(optimizer).__name__} with none, which has rates of its own: that goes with "
                    "model.lr_schedule constant and model.warmup_steps 0"
                )
            return None
        for group in optimizer.param_groups:
            rate = group["lr"]
            group["initial_lr"] = rate.clone() if isinstance(rate, Tensor) else rate
        done = max(0, self._now.global_step - self.link_start.global_step)  # by an earlier fit of the same Trainer
        return LambdaLR(optimizer, self._lr_lambda(), last_epoch=done - 1)

    def _parameter_groups(self) -> list[Any]:
        """What is trained: in one group, or in two where what is trained whole has a learning rate of its own."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        if self.modules_to_save_lr is None:
            return [p for _, p in trained]
        is_saved = {name: any(f".{module}." in f".{name}" for module in self.modules_to_save) for name, _ in trained}
        others, saved = ([p for name, p in trained if is_saved[name] is whole] for whole in (False, True))
        if not others or not saved:
            raise UserError("model.modules_to_save_lr: expected modules_to_save beside what else is trained, received none")
        return [{"params": others}, {"params": saved, "lr": self.modules_to_save_lr}]

    def _lr_lambda(self) -> Callable[[int], float]:
        """The learning-rate factor at the link's k-th step. It asks for its horizon when that is first needed.

        At step 0 of a run the data is not set up yet, and asking Lightning for its length there would make a resumed loader
        start over. (A function and not an object: LambdaLR would store an object's attributes.)
        """
        start = self.link_start
        offset = start.global_step if self.schedule_scope == "run" else 0
        horizon: float | None = None

        def factor(step: int) -> float:
            nonlocal horizon
            if horizon is None and self.run_length is not None:
                is_run = self.schedule_scope == "run"
                horizon = self.run_length.end_step if is_run else self.schedule.link_steps(start, self.run_length)
            if horizon is None:  # before training: the first value, or one that a resume replaces
                return 0.0 if self.warmup_steps else 1.0
            return lr_factor(self.lr_schedule, offset + step, horizon, self.warmup_steps)

        return factor

    @property
    def _needs_horizon(self) -> bool:
        return self.lr_schedule != "constant" or 0 < self.warmup_steps < 1

    def start_run(self, run_length: RunLength, now: Counters, *, is_resumed: bool) -> None:
        """Takes note of a fit that begins, and refuses what cannot go well; called once the data's length is known.

        Args:
            run_length: how far the fit goes.
            now: its counters.
            is_resumed: whether it goes on from a checkpoint.

        Raises:
            UserError: if the learning-rate schedule needs a length that is not known, if ``ranks`` or ``alphas`` are
                too short, or if a link is shorter than its warm-up.
        """
        self.run_length = run_length
        if self.schedule.has_knots or self.schedule.is_open:
            self._check_new_optimizers()
        if is_resumed and self._had_knots and not self.schedule.has_knots:
            raise UserError("chain: expected a chain with knots, as the run that wrote the checkpoint had, received none")
        if is_resumed:
            self._take_up_optimizer()
        else:
            self._apply_schedule()
            if now.global_step:  # the first rate was set before the run's length was known
                self.trainer.strategy.setup_optimizers(self.trainer)
        if not self.schedule.is_open and run_length.end_step < math.inf:
            lengths = self.schedule.links(self.link_start, run_length)
            self._check_links(lengths)
            self._reserve(self.link + len(lengths))
            return
        for field, values in (("ranks", self.schedule.ranks), ("alphas", self.schedule.alphas)):
            if values is not None:
                log.warning("chain.%s: from link %d on its last entry holds, %s", field, len(values) - 1, values[-1])
        if self._needs_horizon and self._own_scheduler is not None:  # an overridden configure_optimizers may have none
            received = self.lr_schedule if self.lr_schedule != "constant" else f"a warm-up of {self.warmup_steps:g} of it"
            raise UserError(
                "model.lr_schedule: expected constant where a link's length is not known beforehand (no max_epochs or "
                f"max_steps, endless data, or a should_tie of one's own), received {received}"
            )

    def _check_new_optimizers(self) -> None:
        """Refuses an overridden ``configure_optimizers`` that returns the same optimizer twice: a link begins with a new one.

        LightningCLI's ``--optimizer`` overrides it so.
        """
        if getattr(self.configure_optimizers, "__func__", None) is LinkTraining.configure_optimizers:
            return
        ours = self._own_optimizer, self._own_scheduler, self._wanted_groups
        again = [id(optimizer) for optimizer in _optimizers_in(self.configure_optimizers())]
        self._own_optimizer, self._own_scheduler, self._wanted_groups = ours
        if any(id(optimizer) in again for optimizer in self.trainer.strategy.optimizers):
            raise UserError(
                "configure_optimizers: expected a new optimizer from each call, one for each link, received the same twice (of "
                "LightningCLI's --optimizer there is one: --model.optimizer makes as many as there are links)"
            )

    def _reserve(self, n_links: int) -> None:
        """Allocates what the finished links of a chain of this length will take beside the weights.

        At most as much as a weight of full rank: a chain of a thousand links may well be stopped early.
        """
        for layer in self._layers.values():
            if layer.stack is not None:
                ranks = [link.rank for link in self.chain.links] + [layer.rank]
                ranks += [self.schedule.rank(k, self.rank) for k in range(len(ranks), n_links - 1)]
                layer.stack.reserve(min(sum(ranks[: n_links - 1]), layer.lora_A.shape[1], layer.lora_B.shape[0]))

    def check_trained_whole(self) -> None:
        """Refuses or warns of half precision where an optimizer writes into it."""
        dtypes = {p.dtype for name, p in self.model.named_parameters() if p.requires_grad and not is_factor(name)}
        if torch.float16 in dtypes:
            raise UserError(
                "model.dtype, trainer.precision: expected another than float16 for what is trained whole "
                "(model.modules_to_save, or all where model.target_modules is null), in which optimizers fail; received float16"
            )
        if torch.bfloat16 in dtypes:
            log.warning(
                "what is trained whole is in bfloat16, which rounds small steps away: model.dtype float32 with "
                "trainer.precision bf16-mixed keeps it in float32"
            )

    def _take_up_optimizer(self) -> None:
        """Gives a resumed link's optimizer the hyperparameters of now, where they are others than the checkpoint's.

        Its state stays. With the same hyperparameters, and as many steps to go, nothing changes. What a subclass'
        ``configure_optimizers`` makes is left to it.
        """
        scheduler, schedulers = self._own_scheduler, [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if self.trainer.optimizers != [self._own_optimizer] or schedulers != ([scheduler] if scheduler else []):
            return
        for k, (group, wanted) in enumerate(zip(self.trainer.optimizers[0].param_groups, self._wanted_groups, strict=True)):
            before = group | {"lr": group.get("initial_lr", group["lr"])}
            if changed := {name: value for name, value in wanted.items() if not _is_same(before.get(name), value)}:
                told = ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())
                log.info("model.optimizer: from here on %s", told)
            if scheduler is None:
                group |= wanted
                continue
            rate = wanted["lr"]
            group |= wanted | {"initial_lr": rate, "lr": rate * scheduler.lr_lambdas[k](scheduler.last_epoch)}
            scheduler.base_lrs[k] = rate

    def _apply_schedule(self) -> None:
        """Begins the live link again if it is older than the schedule, which asks for another rank or alpha.

        Raises:
            UserError: if it has been trained already.
        """
        layers = list(self._layers.values())
        if not layers:
            return
        self._check_finished_ranks()
        (rank, alpha), asked = self._scheduled(self.link), (self.schedule.ranks, self.schedule.alphas)
        mine = layers[0].rank, layers[0].alpha
        differs = [one != other for one, other in zip((rank, alpha), mine, strict=True)]
        is_asked = any(other and values is not None for other, values in zip(differs, asked, strict=True))
        is_new = not any(layer.lora_B.any() for layer in layers)
        if is_new and (is_asked or (any(differs) and not self.link)):
            self._begin_link()
        elif is_asked:
            raise UserError(
                f"chain.ranks, chain.alphas: expected rank {mine[0]} and alpha {mine[1]:g} for link {self.link}, which has "
                f"been trained with these and goes on, received {rank} and {alpha:g}"
            )

    def _check_finished_ranks(self) -> None:
        """Refuses ranks and alphas that finished links of this module's do not have; those of ``init_chain`` have their own."""
        n_taken = len(self._first_chain) if self._first_chain is not None else 0
        for link in self.chain.links[n_taken:]:
            rank, alpha = self._scheduled(link.index)
            asked = (
                self.schedule.ranks is not None and rank != link.rank,
                self.schedule.alphas is not None and alpha != link.alpha,
            )
            if any(asked) and link.rank <= self.rank:
                raise UserError(
                    f"chain.ranks, chain.alphas: expected rank {link.rank} and alpha {link.alpha:g} for link {link.index}, "
                    f"which is finished, received {rank} and {alpha:g}"
                )

    def _check_links(self, lengths: list[int]) -> None:
        """Refuses or warns of what does not fit this fit's links: their lengths in optimizer steps, the live one first."""
        total = self.link + len(lengths)
        for field, values in (("ranks", self.schedule.ranks), ("alphas", self.schedule.alphas)):
            if values is not None and len(values) < total:
                raise UserError(
                    f"chain.{field}: expected {total} entries, one for each link of this run, received {len(values)}"
                )
        if len(lengths) < 2:
            if self.schedule.has_knots and not self.link:
                log.warning("the run ends before its first knot: it is one link, plain LoRA")
            return
        shortest = min(lengths[:-1])
        if self.schedule_scope == "link" and shortest < self.warmup_steps:
            raise UserError(
                f"model.warmup_steps: expected at most {shortest}, the steps of the shortest link, "
                f"received {self.warmup_steps:g}"
            )
        if lengths[-1] < shortest / 2:
            log.warning("the last link has %d optimizer steps, the others at least %d", lengths[-1], shortest)


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's hyperparameters; a rate that is a tensor is written in place later."""
    copies = ((name, value.clone() if isinstance(value, Tensor) else value) for name, value in group.items())
    return {name: value for name, value in copies if name != "params"}


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """The optimizers in what ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping | list | tuple):
        for part in configured.values() if isinstance(configured, Mapping) else configured:
            yield from _optimizers_in(part)


def _is_same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(mine, theirs)
    return bool(mine == theirs)
