"""Restores a module from a checkpoint: decode, plan, apply.

:class:`~cola_lightning.chain.checkpoint.CheckpointState` is the decoded checkpoint. :func:`plan_restore` compares it with the
model, and refuses what cannot be restored; nothing is changed until :func:`apply_restore`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cola_lightning.adapted_model import AdaptedModel, check_links
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import (
    CHECKPOINT_KEY,
    CheckpointState,
    OpenedCheckpoint,
    chain_of,
)
from cola_lightning.chain.fingerprint import check_same_base
from cola_lightning.chain.packed import EXTRA_STATE, unpack
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.errors import UserError
from cola_lightning.modules.arguments import accepted, find_class, stored_arguments
from cola_lightning.modules.checkpoint_io import opened_file
from cola_lightning.modules.rewind import resume_from
from cola_lightning.modules.run import trainer_of
from cola_lightning.modules.trained_state import UNCHANGED, TrainedState

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestorePlan:
    """The changes that restore a module.

    Attributes:
        chain: its finished links afterwards; the missing ones are replayed, on a rebuilt base if necessary.
        base_weights: the base's weights, if the checkpoint contains them.
        dtype: to which adapted layers are cast; None: unchanged.
        live: rank and alpha of a live link whose factors are about to be loaded; None: there is none.
        begins_link: whether a new link begins after the finished ones, in place of the checkpoint's live one.
    """

    chain: Chain
    base_weights: dict[str, Tensor] | None
    dtype: torch.dtype | None
    live: tuple[int, float] | None
    begins_link: bool


class WeightsAloneError(UserError, KeyError):
    """No state to resume from: a mistake of the user's, and the KeyError that Lightning raises for it, with its message."""

    __str__ = UserError.__str__  # a KeyError's would put it in quotes


def restore(module: "COLAModule", checkpoint: dict[str, Any]) -> None:
    """Restores a checkpoint's chain in a module, and prepares the next load of its values.

    If fewer links are requested (``links`` of the pending checkpoint), a link begins after them. With
    full fine-tuning, a checkpoint of values alone is enough; for a fit, only if it has no loops or optimizer states.

    Raises:
        UserError: if the checkpoint has no chain and needs one, its chain was trained on another base, or it is shorter; in a
            fit also for options that differ from the checkpoint's.
    """
    trainer, pending = trainer_of(module), module.pending
    adapted, trained, run = module.adapted, module.trained_state, module.run
    is_fit = trainer is not None and trainer.state.fn == "fit"
    has_progress = bool(checkpoint.get("optimizer_states") or checkpoint.get("loops"))
    if CHECKPOINT_KEY not in checkpoint and trained.is_all_in_values and not (is_fit and has_progress):
        run.load_metrics({}, {})
        return
    state = CheckpointState.of(checkpoint)
    choices = f"{trainer.precision} and {module.finished_links}" if trainer is not None and is_fit else None
    plan = plan_restore(checkpoint, state, adapted, None if pending is None else pending.links, choices)
    if is_fit:
        _check_same_choices(module, checkpoint, state)
        resume_from(checkpoint, state.progress)
    apply_restore(plan, adapted)
    if adapted.cast_dtype == torch.float64 and not module.is_sharded:  # what is trained outside of the model, too
        module.double()
    run.seed = adapted.seed = state.seed
    run.link_start = state.link_start
    run.left_at = None if plan.begins_link else FitPosition(checkpoint["epoch"], checkpoint["global_step"])
    trained.first_outside = dict(state.outside)
    if plan.begins_link:
        adapted.begin_link(run.schedule.rank(adapted.link), run.schedule.alpha(adapted.link))
        run.begin_metrics(trainer)
    else:
        run.load_metrics(state.live.metrics if state.live else {}, state.callback_metrics)
    trained.values_to_load = values_after(plan, adapted, trained)


def plan_restore(
    checkpoint: Mapping[str, Any], state: CheckpointState, adapted: AdaptedModel, links: int | None, choices_of_fit: str | None
) -> RestorePlan:
    """The changes that restore a checkpoint's chain, or its first links, in a model.

    Args:
        checkpoint: Lightning's checkpoint.
        state: our state in it, decoded.
        adapted: the model.
        links: how many links, the finished ones first and then the live one; None: all.
        choices_of_fit: precision and finished_links of a fit that resumes, which must cast weights as the checkpoint's run did;
            None: not a fit.

    Raises:
        UserError: if the chain was trained on another base, is shorter, or would be cast to another dtype by the fit.
    """
    n_finished = len(state.chain)
    chain, begins_link = state.chain, links not in (None, n_finished + 1)
    if links is not None and begins_link:
        check_links(links, n_finished)
        chain = chain_of(checkpoint, links)
    adapted.check_base(chain, state.base_weights)
    dtype = None if state.dtype is None or links == 0 else getattr(torch, state.dtype)  # the base alone has none
    if dtype == adapted.cast_dtype:
        dtype = None
    if dtype is not None and choices_of_fit is not None:
        theirs, mine = (str(one).removeprefix("torch.") for one in (dtype, adapted.cast_dtype))
        raise UserError(
            "trainer.precision, model.finished_links: expected those that cast adapted weights to "
            f"{theirs}, as in the checkpoint's run, received {choices_of_fit}, which cast them to {mine}"
        )
    live = None if state.live is None or begins_link else (state.live.rank, state.live.alpha)
    return RestorePlan(chain, state.base_weights, dtype, live, begins_link)


def apply_restore(plan: RestorePlan, adapted: AdaptedModel) -> None:
    """Applies a plan to the weights of a model; the live link's factors are still to be loaded."""
    adapted.take_base(plan.chain, plan.base_weights)
    if plan.dtype is not None:
        adapted.cast(plan.dtype)
    adapted.go_to(plan.chain)
    if plan.live is not None:
        adapted.resume_link(*plan.live)


def values_after(plan: RestorePlan, adapted: AdaptedModel, trained: TrainedState) -> dict[str, Tensor]:
    """The values that replace a checkpoint's, by name in the module, once a plan is applied.

    If the live link is the checkpoint's, nothing is replaced. A link that begins after fewer links has its own factors, and the
    other trained values are as they were after those links.
    """
    values: dict[str, Tensor] = {EXTRA_STATE: UNCHANGED}
    if not plan.begins_link:
        return values
    values |= {name: value.detach() for name, value in trained.values().items() if name.startswith("model.")}
    values |= {f"model.{name}": value for name, value in adapted.extras_after(plan.chain).items()}
    return values | trained.outside_after(plan.chain)


def restore_packed(module: "COLAModule", packed: Tensor) -> None:
    """Brings a module to the finished links of a state dict, on a rebuilt base if necessary.

    Raises:
        UserError: if the links were trained on another base.
    """
    chain, facts = unpack(packed)
    check_same_base(chain.base, module.adapted.chain.base)
    module.adapted.go_to(chain)
    if facts["live"] is not None:
        module.adapted.resume_link(*facts["live"])
    module.run.link_start = FitPosition(*facts["link_start"])


def _check_same_choices(module: "COLAModule", checkpoint: Mapping[str, Any], state: CheckpointState) -> None:
    """Refuses to resume a fit with options that the checkpoint's would override.

    Raises:
        UserError: for the first that differs.
    """
    if "optimizer_states" not in checkpoint:
        raise WeightsAloneError(
            "ckpt_path: expected a checkpoint with the optimizer's state, received one of weights alone: the checkpoint "
            "contains only the model, as save_weights_only writes it"
        )
    callbacks = module.trainer.callbacks  # type: ignore[attr-defined]
    if state.chain.links and any(isinstance(c, WeightAveraging) for c in callbacks):  # whose copy would get no finished link
        raise UserError(
            "ckpt_path: expected a run without finished links to resume with averaged weights, received one with "
            f"{len(state.chain)} of them"
        )
    if (seed := module.run.given_seed) not in (None, state.seed):
        raise UserError(f"model.seed, or seed_everything: expected {state.seed}, the checkpoint's, received {seed}")
    schedule = module.run.schedule
    if state.has_knots and not schedule.has_knots:
        raise UserError("chain: expected a chain with knots, as the run that wrote the checkpoint had, received none")
    planned = [[schedule.rank(link), schedule.alpha(link)] for link in range(len(state.scheduled))]
    if state.live is not None and planned != state.scheduled:
        raise UserError(
            "model.rank, model.alpha, chain.ranks, chain.alphas: expected the ranks and alphas of the checkpoint's run, "
            f"{state.scheduled}, one pair for each link, received {planned}"
        )
    if (origin := module.origin)[0] is not None and origin != state.origin:
        (had, had_links), (mine, my_links) = state.origin, origin
        raise UserError(
            f"model.init_chain: expected null or what the checkpoint's run began from, {had or 'its base'} "
            f"(links: {had_links}), received {mine} (links: {my_links})"
        )
    if (had_factors := state.trained_factors) not in (None, module.trained_factors):
        raise UserError(f"model.trained_factors: expected {had_factors}, the checkpoint's, received {module.trained_factors}")
    if state.has_rate_of_saved is ((rate := module.optimization.modules_to_save_lr) is None):
        expected = "a number" if state.has_rate_of_saved else "null"
        raise UserError(f"model.modules_to_save_lr: expected {expected}, as in the checkpoint's run, received {rate}")


# ---------------------------------------------------------------------- a module from a file


def load_module(
    cls: Any,
    source: Any,
    links: int | None,
    given: dict[str, Any],
    *,
    hparams_file: Any = None,
    weights_only: bool = True,
    strict: bool | None = None,
) -> Any:
    """A module, on the CPU; see :meth:`~cola_lightning.modules.COLAModule.load_from_checkpoint`.

    Not by Lightning's method, which unpickles what is at a URL, and calls what the hyperparameters name.

    Args:
        cls: the requested class; the module is of the checkpoint's class if that is a subclass.
        source: a path, a URL, or an open file.
        links: how many links.
        given: arguments of the class.
        hparams_file: see Lightning's method.
        weights_only: False unpickles any object.
        strict: of the module's ``load_state_dict``; None: its ``strict_loading``.
    """
    opened = replace(_opened(source, weights_only=weights_only), links=links)
    checkpoint, recorded = {**opened.contents}, opened.state.module
    if hparams_file is not None:
        is_csv = str(hparams_file).endswith(".csv")
        read = load_hparams_from_tags_csv if is_csv else load_hparams_from_yaml
        checkpoint[cls.CHECKPOINT_HYPER_PARAMS_KEY] = read(hparams_file)
    made = _class_of(recorded["class_path"], cls)
    if made is not None and issubclass(made, cls):
        cls = made
    if made is None or not issubclass(cls, made):
        recorded = {}
    elif cls is not made:  # which may give them itself
        recorded = recorded | {"defaults": {}}
    for name in recorded.get("not_plain", ()):
        if name not in given:
            log.warning("checkpoint: it has no %r, which was not a plain value: pass it, or its default applies", name)
    module = cls(**accepted(cls, stored_arguments(cls, checkpoint, recorded) | given))
    module.pending = opened
    module.configure_model()
    module.on_load_checkpoint(checkpoint)
    strict = module.strict_loading if strict is None else strict
    keys = module.load_state_dict(checkpoint["state_dict"], strict=strict)  # which refuses, if it is strict
    module.pending = None
    if keys.missing_keys:
        rank_zero_warn(f"Found keys that are in the model state dict but not in the checkpoint: {keys.missing_keys}")
    if keys.unexpected_keys:
        rank_zero_warn(f"Found keys that are not in the model state dict but in the checkpoint: {keys.unexpected_keys}")
    return module


def _opened(source: Any, *, weights_only: bool) -> OpenedCheckpoint:
    """The checkpoint at a path, at a URL or in an open file; one that was opened."""
    if isinstance(source, OpenedCheckpoint):
        return source
    if isinstance(source, str | PathLike) and "://" in str(source):
        with opened_file(str(source)) as file:
            return OpenedCheckpoint.open(file, name=str(source), weights_only=weights_only)
    path = Path(source) if isinstance(source, PathLike) else source
    return OpenedCheckpoint.open(path, weights_only=weights_only)


def _class_of(path: str, requested: type) -> type | None:
    """The class of a checkpoint's module; None if it cannot be found, and has another name than the requested class."""
    try:
        return find_class(path)
    except UserError as error:  # it was in a script, say
        if path.rpartition(".")[2] == requested.__name__:
            return requested
        log.warning("%s; it is loaded as %s", error, requested.__name__)
        return None
