"""What a module's training is: its adapted model, where it stands, the schedule of its links, and their optimization."""

import copy
import functools
import logging
import math
import os
import secrets
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning import layout
from cola_lightning.adapted_model import AdaptedModel, Placement
from cola_lightning.chain.chain import Chain, Link, as_number
from cola_lightning.chain.checkpoint import read_chain_and_held_out
from cola_lightning.chain.current import CurrentLink
from cola_lightning.chain.facts import ModuleArguments, Records
from cola_lightning.chain.schedule import START, ChainSchedule, FitPosition, Knot, RunLength
from cola_lightning.chain.sources import sources_of
from cola_lightning.errors import UserError
from cola_lightning.module.optimization import (
    OF_SCHEDULES,
    LinkConfig,
    LinkLR,
    OptimizerCallable,
    add_groups_of,
    copy_state,
    is_default_optimizer,
    lr_factor,
    parameter_groups,
    phase_length,
    used_entries,
)
from cola_lightning.module.step_loss import StepLoss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InitChain:
    """The chain that a run begins from.

    Attributes:
        sources: the path of a chain folder, a checkpoint, or a PEFT LoRA's folder, or a list of them; None: the base.
        links: how many of its links, or the name of the last stage; None: all.
        continues: names of sources that are no new adapters.
        knot: what happens to the last of these links.
    """

    sources: str | list[str] | None = None
    links: int | str | None = None
    continues: Sequence[str] = ()
    knot: Knot = "cola"

    @classmethod
    def of(cls, sources: Any, links: int | str | None, continues: Sequence[str], knot: Knot) -> Self:
        """The chain that a module's arguments name.

        Raises:
            UserError: for arguments of a chain without one.
        """
        for name, is_set in {"links": links is not None, "knot": knot != "cola", "continues": continues}.items():
            if is_set and sources is None:
                raise UserError(f"model.init_{name}: needs model.init_chain")
        paths = list(map(str, sources)) if isinstance(sources, list | tuple) else sources and str(sources)
        return cls(paths, None if links is None else as_number(links), list(continues), knot)

    def read(self) -> tuple[Chain | None, Records]:
        """Reads the chain, and which rows its runs held out; no chain if the run begins from the base.

        Raises:
            UserError: if there is no such chain.
        """
        if self.sources is None:
            return None, ()
        chain, held_out = read_chain_and_held_out(self.sources, self.links, "model.init_chain", self.continues)
        if not chain.links and self.links != 0:
            raise UserError(
                f"model.init_chain: {self.sources!r} has no links, because its model was trained without any. Export it "
                "(cola export --format merged), and use the folder as the model"
            )
        return chain, held_out

    def describe(self) -> list[Any]:
        """The absolute path or paths, how many links were requested, the knot, and what continues: for checkpoints."""
        sources = [] if self.sources is None else sources_of(self.sources)
        paths = [str(source._replace(path=str(Path(os.path.expanduser(source.path)).absolute()))) for source in sources]
        found = paths if isinstance(self.sources, list) else next(iter(paths), None)
        return [found, self.links, self.knot, list(self.continues)]


@dataclass(frozen=True)
class ExpectedState:
    """What is known, before a module's model is made, of the state that it will load.

    Attributes:
        links: how many of its links are loaded, or the name of the last stage; None: all.
        scale: factors of the links' updates.
        seed: the state's seed; None: no state is expected.
        layers: names of the adapted layers that its current link lacks.
    """

    links: int | str | None = None
    scale: Mapping[int | str, float] = field(default_factory=dict)
    seed: int | None = None
    layers: Collection[str] = ()


class Run:
    """What a module's training is, over all of its fits.

    Args:
        module: the module.
        arguments: how the module is made again.
        config: what links are like, and how they are optimized.
        make_optimizer: makes an optimizer from parameters, or from parameter groups.
        seed: of all random draws; None: that of ``seed_everything`` or of the expected state, or a random one.
        start: the chain that the run begins from.

    Attributes:
        current: what is known of the current link besides its factors.
        schedule: when knots fall, and each link's rank and alpha: that of the fit's ChainOfLoRA, else one link.
        length: length of the present fit; None while it is not known.
        end: the position at which the last fit ended, or at which the checkpoint was written that the module was loaded from; a
            next fit at the same position continues it. None before the first fit.
        first_link: index of the run's first link: how many links the model had when the run began.
        is_continued: whether the fit continues the Trainer's last one, so that it is no new run.
        fitted_data: what the data of the last fit say of themselves, by name.
        n_earlier_fits: how many fits have trained the module before this one, which draws other numbers than they did.
        expected: what is known of the state that will be loaded.
        step_loss: weighs the losses of an optimizer step's batches.
        is_tying_knot: whether a knot has begun and not ended, also because it failed.
        is_wrapped_by_fsdp1: whether FSDP1 wraps the module.
    """

    def __init__(
        self,
        module: LightningModule,
        arguments: ModuleArguments,
        config: LinkConfig,
        make_optimizer: OptimizerCallable,
        seed: int | None,
        start: InitChain,
    ) -> None:
        self.module, self.arguments, self.config = module, arguments, config
        self.make_optimizer, self.user_seed, self.start = make_optimizer, seed, start
        self.current, self.step_loss, self.expected = CurrentLink(), StepLoss(), ExpectedState()
        self.made: AdaptedModel | None = None
        self.schedule = ChainSchedule()
        self.length: RunLength | None = None
        self.end: FitPosition | None = None
        self.first_link = self.n_earlier_fits = 0
        self.is_continued = self.is_tying_knot = self.is_wrapped_by_fsdp1 = False
        self._before_knot: list[Optimizer] = []  # the last link's optimizers, until the current link's first step
        self._held_out = list[Mapping[str, Any] | None]()
        self.fitted_data: Mapping[str, Mapping[str, Any]] = {}
        self._trainer: weakref.ref[Trainer] | None = None  # of the last fit; an evaluation by another may have followed
        self._not_of_the_link: dict[str, Tensor] = {}  # what had been logged when the current link began
        self._optimizer: Optimizer | None = None
        self._scheduler: LinkLR | None = None
        self._horizon: tuple[float, float] | None = None
        self._groups: Sequence[dict[str, Any]] = ()  # hyperparameters, as requested

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to a fit, and cannot be pickled."""
        return vars(self) | {"length": None, "_trainer": None, "_optimizer": None, "_scheduler": None}

    # ------------------------------------------------------------------ the model

    @property
    def adapted(self) -> AdaptedModel:
        """The adapted model and its chain, once it is made."""
        assert self.made is not None
        return self.made

    @functools.cached_property
    def first_chain(self) -> Chain | None:
        """The chain that the run begins from; None if it begins from the base, or a state is expected."""
        chain, held_out = self.start.read()
        self.restore_held_out(held_out)
        return chain

    @property
    def seed(self) -> int | None:
        """The seed of every random draw; if none was given, None until the model is made."""
        return self.user_seed if self.made is None else self.made.seed

    def choose_seed(self) -> int:
        """The seed that was given, that of the expected state, or a random one."""
        if self.user_seed is not None:
            return self.user_seed
        text = os.environ.get("PL_GLOBAL_SEED")  # what seed_everything was given
        self.user_seed = None if text is None else int(text)
        seed = self.user_seed if self.expected.seed is None else self.expected.seed
        if seed is None:
            seed = layout.gather_objects(secrets.randbits(31))[0]  # from no generator of torch's
            log.info("No seed given (model.seed); using %d", seed)
        return seed

    def placement(self) -> Placement:
        """The placement of the model: in all of a strategy's wrappers, on the training device."""
        trainer, module = trainer_of(self.module), self.module
        root, device = None, module.device
        if trainer is not None:
            root = trainer.strategy.model if trainer.strategy.lightning_module is module else None
            device = trainer.strategy.root_device
        model: Any = module.model
        is_sharded = layout.is_model_sharded(model) or self.is_wrapped_by_fsdp1
        return Placement(model if root is None else root, device, is_sharded)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 or FSDP1 has sharded the model."""
        return self.placement().is_sharded

    # ------------------------------------------------------------------ where it stands

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer of the last fit, if it still exists."""
        return None if self._trainer is None else self._trainer()

    @property
    def position(self) -> FitPosition:
        """The epoch and optimizer step that the fit has reached, or had reached at its end."""
        trainer, start, end = trainer_of(self.module), self.current.start, self.end
        if trainer is not None and trainer.state.fn == "fit":
            return FitPosition(trainer.current_epoch, trainer.global_step)
        return start if end is None or end.global_step < start.global_step else end

    def begin_fit(self, trainer: Trainer, schedule: ChainSchedule) -> None:
        """Begins a fit, or continues the Trainer's last one."""
        self.schedule, self.length = schedule, None  # which is set when training starts
        self._trainer = weakref.ref(trainer)
        now = FitPosition(trainer.current_epoch, trainer.global_step)
        self.is_continued = now.global_step > 0 and now == self.end
        if not self.is_continued:
            self.count_from(now)
            self.n_earlier_fits += self.end is not None and self.end.global_step > 0
        if not hasattr(getattr(trainer, "datamodule", None), "held_out") and None not in self.held_out:
            self.held_out.append(None)

    @property
    def held_out(self) -> list[Mapping[str, Any] | None]:
        """Which rows the runs that trained the module held out. The data module of a fit adds its own."""
        _ = self.first_chain  # which knows it of earlier runs
        return self._held_out

    def restore_held_out(self, earlier: Records, *, is_resumed: bool = False) -> None:
        """Restores which rows earlier runs held out. What the present fit added stays if it is of other data.

        Args:
            earlier: of these runs, as :attr:`held_out` has it.
            is_resumed: whether the last of these runs goes on.

        Raises:
            UserError: if a run that goes on has held out other rows than the present fit does.
        """
        known = {name for run in earlier if run is not None for name in run["contents"]}
        # Records of earlier versions have fewer fields.
        restored = [run for run in self._held_out if run and any(one and one.items() <= run.items() for one in earlier)]
        own = [run for run in self._held_out if run not in [*earlier, *restored]]
        of_other_data = [run for run in own if run is None or known.isdisjoint(run["contents"])]
        if is_resumed and len(of_other_data) < len(own):
            raise UserError("data: the resumed run has held out other rows of data.source. Use its data.split_seed and sizes")
        self._held_out = [*earlier, *of_other_data]

    def begin_links(self) -> None:
        """Begins the links of a fit that resumes no checkpoint; its model is made."""
        if not self.is_continued:
            self.first_link = self.adapted.n_finished
        if not self.current.is_trained:
            self.current.name = self.schedule.name or self.current.name

    def finish_first_link(self) -> None:
        """Finishes the link that was trained before a new run, so that the run begins from the model as it is now."""
        if self.current.is_trained and not self.is_continued:
            log.info("the current link is finished, because the model as it is now is the reference")
            self.tie_knot()
            self.first_link = self.adapted.n_finished

    def count_from(self, position: FitPosition) -> None:
        """Counts the current link's steps and epochs from this position."""
        self.current.start = self.current.end = position

    def known_length(self) -> RunLength | None:
        """The length of the fit; None if there is none, or its data is not set up.

        Lightning's batch-size finder removes the callbacks, one of which sets the length.
        """
        trainer = self.trainer
        if self.length is not None or trainer is None or trainer.train_dataloader is None:
            return self.length
        return run_length(trainer, START)

    def link_steps(self) -> float:
        """Optimizer steps of the current link's optimizer in the present fit, see :attr:`COLAModule.link_steps`."""
        trainer = trainer_of(self.module)
        if trainer is not None and trainer.state.fn == "fit" and trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        length = self.known_length()
        steps = math.inf if length is None else self.steps_in(length)
        return steps if steps == math.inf else int(steps)

    # ------------------------------------------------------------------ links

    def size_of(self, link: int) -> tuple[int, float]:
        """The rank and alpha that the schedule has for a link, by its index."""
        return self.schedule.rank_and_alpha(link, self.config)

    def note_step(self) -> None:
        """Notes that the current link has been trained."""
        self.current.is_trained, self._before_knot = True, []

    def note_progress(self) -> None:
        """Notes in the current link how far it has come, and the metrics that a fit has logged for it."""
        self.current.end = self.position
        trainer = trainer_of(self.module)
        is_fit = trainer is not None and trainer.state.fn == "fit"
        if trainer is None or not is_fit or (trainer.training and trainer.global_step == self.current.start.global_step):
            return  # before the link's first step the metrics are the last link's
        logged = trainer.callback_metrics.items()
        self.current.metrics |= {n: float(value) for n, value in logged if value is not self._not_of_the_link.get(n)}

    def forget_logged(self) -> None:
        """Notes which metrics have been logged before the current link, and are not its own."""
        trainer = trainer_of(self.module)
        self._not_of_the_link = {} if trainer is None else dict(trainer.callback_metrics)

    def tie_knot(self, rank: int | None = None, alpha: float | None = None) -> Link:
        """Finishes the current link and begins the next, see :meth:`COLAModule.tie_knot`."""
        self.step_loss.check()  # before the link is recorded
        check_no_averaging(self.module)
        schedule, adapted = self.schedule, self.adapted
        planned = self.current.size if schedule.continues_link else self.size_of(adapted.n_finished + 1)
        rank, alpha = planned[0] if rank is None else rank, planned[1] if alpha is None else alpha
        following = adapted.checked_link(rank, alpha, schedule.knot)
        self.is_tying_knot = True
        self.note_progress()
        link = adapted.tie_knot(*following, knot=schedule.knot, share=schedule.share)
        self.forget_logged()
        self.current.name = schedule.name if fitting_trainer(self.module) else None  # outside of a fit there is no stage
        self.renew()
        self.is_tying_knot = False  # not in a finally: after a knot that failed halfway nothing may be written
        return link

    @property
    def is_fresh(self) -> bool:
        """Whether the current link adds nothing: it was not trained, and no knot left it a rest of the link before it."""
        links = self.adapted.chain.links
        return not self.current.is_trained and (not links or links[-1].share == 1)

    def restart_link(self, rank: int | None = None, alpha: float | None = None) -> None:
        """Starts the current link again, before its first step, see :meth:`COLAModule.restart_link`."""
        if not self.is_fresh:
            raise UserError("restart_link: the current link adds to the model already. Tie a knot to begin another one")
        old_rank, old_alpha = self.current.size
        self.adapted.begin_link(old_rank if rank is None else rank, old_alpha if alpha is None else alpha)
        self.renew()

    def begin_as_scheduled(self) -> None:
        """Begins the current link again if it is older than the schedule, which requests another rank or alpha.

        A link that has been trained stays as it is.
        """
        adapted, schedule = self.adapted, self.schedule
        is_requested = schedule.ranks or schedule.alphas or not adapted.n_finished
        planned = self.size_of(adapted.n_finished)
        if adapted.layers and is_requested and self.current.size != planned and self.is_fresh:
            adapted.begin_link(*planned)

    # ------------------------------------------------------------------ the current link's optimization

    def configure(self, trained: Sequence[tuple[str, nn.Parameter]]) -> OptimizerLRScheduler:
        """A new optimizer and learning-rate schedule for these parameters, which have their names in the module.

        Raises:
            UserError: for a learning rate of fully trained modules where there are none.
        """
        config, groups = self.config, parameter_groups(trained, self.config)
        try:
            optimizer = self.make_optimizer(groups)
        except ValueError as error:  # an optimizer's own message for a mistyped value
            raise UserError(f"model.optimizer: {error}") from error
        # Torch's GradScaler has a fused optimizer unscale the gradients in its step, and Lightning then refuses to clip them
        # (16-mixed). Without this mark they are unscaled before, as for any other optimizer.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        optimizer.register_step_post_hook(lambda *_: self.note_step())  # also in a loop without a Trainer
        self._optimizer, self._scheduler, self._horizon = optimizer, None, None
        for group in optimizer.param_groups:
            # numpy's numbers, of np.logspace for example, would make a checkpoint unreadable for torch.load(weights_only=True)
            group |= {name: value.item() for name, value in group.items() if isinstance(value, np.generic)}
            group["lr"] = copy.deepcopy(group["lr"])  # a copy: a schedule modifies a rate that is a tensor in place
        if config.lr_ratio_B != 1:
            optimizer.param_groups[1]["lr"] *= config.lr_ratio_B
        groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        self._groups = copy.deepcopy(groups)
        if config.lr_schedule == "constant" and any(group["lr"] is None for group in groups):  # it sets its own rates
            return optimizer
        for group in optimizer.param_groups:
            group["initial_lr"] = copy.deepcopy(group["lr"])
        done = max(0, self.position.global_step - self._links()[1].global_step)  # by an earlier fit of the same Trainer
        self._scheduler = LinkLR(optimizer, self._lr_factor, last_epoch=done - 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _links(self) -> tuple[ChainSchedule, FitPosition]:
        """The links that have an optimizer each, and where the present one begins: one link, if it goes on over knots."""
        return (ChainSchedule(), START) if self.schedule.continues_link else (self.schedule, self.current.start)

    @property
    def _is_over_run(self) -> bool:
        """Whether one schedule of the learning rate lasts over the run."""
        return self.config.schedule_scope == "run" or self.schedule.continues_link

    def steps_in(self, length: RunLength) -> float:
        """Optimizer steps of the present optimizer in a fit of this length: the link's or, if it goes on, the run's."""
        schedule, start = self._links()
        return schedule.in_run(length, self.stable_share(length)).link_steps(start, length)

    def _lr_factor(self, step: int) -> float:
        """The learning-rate factor at the optimizer's k-th step.

        The horizon is determined when it is first needed: before a fit the length of its data is not known, and in a loop
        without a Trainer never.
        """
        config, horizon, length = self.config, self._horizon, self.known_length()
        if horizon is None and length is not None:
            horizon = self._horizon_in(length)
            self._horizon = horizon if length is self.length else None
        if horizon is None and step == 0:  # whatever the length is
            return 0.0 if config.warmup_steps else 1.0
        if horizon is None and 0 < config.warmup_steps < 1:
            raise UserError(f"model.warmup_steps: must be a number of steps without a Trainer, got {config.warmup_steps:g}")
        end, rise = horizon or (math.inf, 0)
        place = self._links()[1].global_step + step if self._is_over_run else step
        value = lr_factor(config.lr_schedule, place, end, config.warmup_steps, config.decay_steps)
        return value * step / rise if step < rise else value

    def _horizon_in(self, length: RunLength) -> tuple[float, float]:
        """The end of the schedule, and the steps of the warm-up after a knot; the run's first link has the run's warm-up."""
        steps, (_, start) = self.steps_in(length), self._links()
        rise = phase_length(self.config.knot_warmup_steps, steps) if start.global_step else 0
        return length.end_step if self._is_over_run else steps, rise

    def stable_share(self, length: RunLength) -> float | None:
        """The share of a run before its rate decays, if the schedule is a stable one over a run of known length; else None."""
        if self.config.lr_schedule != "stable" or not self._is_over_run or length.end_step == math.inf:
            return None
        return 1 - phase_length(self.config.decay_steps, length.end_step) / length.end_step

    def check_schedule(self, length: RunLength) -> None:
        """Refuses a learning-rate schedule that does not fit the links of the fit.

        That is one that needs a length which is not known beforehand, a link's or the run's, and a warm-up that is longer than
        a link which is not the last.
        """
        config, (schedule, start) = self.config, self._links()
        is_endless, warmup_steps = length.end_step == math.inf, config.warmup_steps
        if self.schedule.has_unknown_lengths(length) or is_endless:
            is_known = self._is_over_run and not is_endless
            needs_length = not is_known and (config.lr_schedule != "constant" or 0 < warmup_steps < 1)
            if self._scheduler and (needs_length or (schedule.has_knots and 0 < config.knot_warmup_steps < 1)):
                raise UserError(
                    "model.lr_schedule: the length of the run or of its links is unknown. Use trainer.max_steps with "
                    "model.schedule_scope run, or constant with warm-ups in steps"
                )
            return
        warmup = max(config.knot_warmup_steps, 0 if self._is_over_run else warmup_steps)
        shortest = min(schedule.link_lengths(start, length)[:-1], default=math.inf)
        if shortest < warmup:
            raise UserError(f"model.warmup_steps, model.knot_warmup_steps: {warmup:g} steps are more than a link's {shortest}")

    def check_used(self, trainer: Trainer) -> None:
        """Refuses options without an effect, because a ``configure_optimizers`` makes an optimizer or a schedule of its own.

        Raises:
            UserError: which names them.
        """
        schedulers, unused = [config.scheduler for config in trainer.lr_scheduler_configs], list[str]()
        if self._optimizer not in trainer.optimizers:
            unused = ["lr_ratio_B", "modules_to_save_lr", *OF_SCHEDULES]
        elif self._scheduler is not None and self._scheduler not in schedulers:
            unused = list(OF_SCHEDULES)
        defaults = {field.name: field.default for field in fields(LinkConfig)}
        given = [f"model.{name}" for name in unused if getattr(self.config, name) != defaults[name]]
        if self._optimizer not in trainer.optimizers and not is_default_optimizer(self.make_optimizer):
            given.insert(0, "model.optimizer")
        if given:
            name = type(self.module).__name__
            raise UserError(
                f"{', '.join(given)}: no effect, because configure_optimizers of {name} sets this itself. Set it there"
            )

    def renew(self) -> None:
        """Makes new optimizers and learning-rate schedules for a link that begins, in a fit or after it.

        In a fit they get the retained share of the factors' state, and all of the other parameters' state. After a fit they are
        those of the checkpoint that its Trainer may write, without state, as in a next fit. None is made for an optimizer that
        goes on over knots.

        Raises:
            UserError: if a subclass' ``configure_optimizers`` returns the same optimizer again.
        """
        if self.schedule.continues_link:
            return
        is_fitting = (trainer := fitting_trainer(self.module)) is not None
        trainer = trainer or self.trainer  # also in a validation of the fit
        if trainer is None or trainer.lightning_module is not self.module or not (is_fitting or trainer.optimizers):
            return
        before = trainer.optimizers
        trainer.strategy.setup_optimizers(trainer)
        if any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            for old, new in zip(before, trainer.optimizers, strict=True):
                add_groups_of(old, new)
        if is_fitting and any(new is old for new in trainer.optimizers for old in before):  # its moments would outlive the link
            raise UserError(
                "configure_optimizers: must return a new optimizer for each link, but returned the same one twice. On the "
                "command line, use model.optimizer and not LightningCLI's optimizer"
            )
        if is_fitting and self.config.kept_optimizer_state:
            if not self._before_knot:
                self._before_knot = before
            for old, new in zip(self._before_knot, trainer.optimizers, strict=True):
                copy_state(old, new, self.config.kept_optimizer_state, used_entries(self.adapted))

    def resume_optimizer(self, trainer: Trainer) -> None:
        """Applies the present hyperparameters to a resumed link's optimizer, where they differ from the checkpoint's.

        Its state does not change. With the same hyperparameters, and as many remaining steps, nothing changes. Optimizers of a
        subclass' ``configure_optimizers`` are not modified.
        """
        scheduler, schedulers = self._scheduler, [config.scheduler for config in trainer.lr_scheduler_configs]
        if trainer.optimizers != [self._optimizer] or schedulers != ([scheduler] if scheduler else []):
            return
        groups = zip(trainer.optimizers[0].param_groups, self._groups, strict=False)  # a callback may have added others
        for k, (group, wanted) in enumerate(groups):
            before = group | {"lr": group.get("initial_lr", group["lr"])}
            if changed := {name: value for name, value in wanted.items() if before.get(name) != value}:
                changes = ", ".join(f"{name} {before.get(name)} -> {value}" for name, value in changed.items())
                log.info("model.optimizer: continuing with %s", changes)
            group |= wanted
            if scheduler is not None:
                rate = scheduler.base_lrs[k] = group["initial_lr"] = wanted["lr"]
                group["lr"] = rate * self._lr_factor(scheduler.last_epoch)


def run_length(trainer: Trainer, epoch_start: FitPosition) -> RunLength:
    """The length of the trainer's fit; known once its data is set up.

    Args:
        trainer: the Trainer of the fit.
        epoch_start: the beginning of an epoch, from which the lengths of epochs are counted.
    """
    schedulers = accumulation_schedulers(trainer)

    def steps_in_epoch(epoch: int) -> float:
        window = schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
        batches = trainer.num_training_batches
        return batches if batches == math.inf else math.ceil(batches / window)

    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    return RunLength(
        steps_in_epoch,
        max_epochs=math.inf if max_epochs is None or max_epochs < 0 else max_epochs,
        max_steps=math.inf if max_steps < 0 else max_steps,
        epoch_start=epoch_start,
    )


def fitting_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer that fits a module now; None if there is none."""
    trainer = trainer_of(module)
    return trainer if trainer is not None and trainer.state.fn == "fit" and trainer.state.status == "running" else None


def check_no_averaging(module: LightningModule) -> None:
    """Refuses a knot in a fit that averages weights: those before a merge and after it.

    Raises:
        UserError: which names the callback.
    """
    for callback in getattr(fitting_trainer(module), "callbacks", ()):
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UserError(
                f"trainer.callbacks: {type(callback).__name__} cannot be combined with knots. (You can average merged models "
                "of several runs.)"
            )


def accumulation_schedulers(trainer: Trainer) -> list[GradientAccumulationScheduler]:
    """The callbacks by which the number of accumulated batches depends on the epoch."""
    return [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]


def trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer that a module is attached to; None if there is none."""
    try:
        trainer = module.trainer
    except RuntimeError:  # Lightning's way to report none
        return None
    return trainer if isinstance(trainer, Trainer) else None  # Fabric's stand-in for one has no counters
