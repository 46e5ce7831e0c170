"""Restores a module from a checkpoint, whose decoded state is :class:`~cola_lightning.chain.checkpoint.CheckpointState`."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.saving import load_hparams_from_tags_csv, load_hparams_from_yaml
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain import Chain
from cola_lightning.chain.base import check_same_base
from cola_lightning.chain.checkpoint import (
    CHECKPOINT_KEY,
    CheckpointState,
    OpenedCheckpoint,
    chain_of,
)
from cola_lightning.chain.schedule import FitPosition
from cola_lightning.chain.store import EXTRA_STATE, unpack
from cola_lightning.errors import UserError
from cola_lightning.modules.arguments import accepted, find_class, stored_arguments
from cola_lightning.modules.rewind import resume_from
from cola_lightning.modules.run import trainer_of
from cola_lightning.modules.trained_state import UNCHANGED, TrainedState

if TYPE_CHECKING:
    from cola_lightning.modules.base import COLAModule

log = logging.getLogger(__name__)


def restore(module: "COLAModule", checkpoint: dict[str, Any]) -> None:
    """Restores a checkpoint's chain in a module, and prepares the next load of its values.

    If fewer links are requested (``links`` of the pending checkpoint), a link begins after them. With full fine-tuning, a
    checkpoint of values alone is enough; for a fit, only if it has no loops or optimizer states. What cannot be restored is
    refused before anything is changed.

    Raises:
        UserError: if the checkpoint has no chain and needs one, its chain was trained on another base, or it is shorter; in a
            fit also for options that the checkpoint's would override.
    """
    trainer, adapted, trained, run = trainer_of(module), module.adapted, module.trained_state, module.run
    is_fit = trainer is not None and trainer.state.fn == "fit"
    has_progress = bool(checkpoint.get("optimizer_states") or checkpoint.get("loops"))
    if CHECKPOINT_KEY not in checkpoint and trained.is_all_in_values and not (is_fit and has_progress):
        run.load_metrics({}, {})
        return
    state, links = CheckpointState.of(checkpoint), None if module.pending is None else module.pending.links
    begins_link = links not in (None, len(state.chain) + 1)
    chain = chain_of(checkpoint, links) if begins_link else state.chain
    adapted.check_base(chain, state.base_weights)
    has_dtype = state.dtype is not None and links != 0  # the base alone has none
    dtype = getattr(torch, str(state.dtype)) if has_dtype else adapted.cast_dtype
    if is_fit:
        _check_same_choices(module, state, dtype)
        resume_from(checkpoint, state.progress)

    adapted.take_base(chain, state.base_weights)
    if dtype != adapted.cast_dtype:
        adapted.cast(dtype)
    adapted.go_to(chain)
    if adapted.cast_dtype == torch.float64 and not module.is_sharded:  # what is trained outside of the model, too
        module.double()
    run.seed = adapted.seed = state.seed
    run.link_start, trained.first_outside = state.link_start, dict(state.outside)
    trained.values_to_load = {EXTRA_STATE: UNCHANGED}
    if begins_link:
        run.left_at = None
        run.begin_metrics(trainer)
        adapted.begin_link(run.schedule.rank(adapted.link), run.schedule.alpha(adapted.link))
        trained.values_to_load |= _values_after(chain, adapted, trained)
        return
    run.left_at = FitPosition(checkpoint["epoch"], checkpoint["global_step"])
    if state.live is not None:
        adapted.resume_link(state.live.rank, state.live.alpha)
    run.load_metrics(state.live.metrics if state.live else {}, state.callback_metrics)


def _values_after(chain: Chain, adapted: AdaptedModel, trained: TrainedState) -> dict[str, Tensor]:
    """The values that replace a checkpoint's, by name in the module, where a link begins after the first of its links.

    The new link has its own factors, and the other trained values are as they were after the last of these links.
    """
    values = {name: value.detach() for name, value in trained.values().items() if name.startswith("model.")}
    values |= {f"model.{name}": value for name, value in adapted.extras_after(chain).items()}
    return values | trained.outside_after(chain)


def restore_packed(module: "COLAModule", packed: Tensor) -> None:
    """Brings a module to the finished links of a state dict, on a rebuilt base if necessary.

    Raises:
        UserError: if the links were trained on another base.
    """
    finished, given = unpack(packed)
    chain = Chain(*finished)
    check_same_base(chain.base, module.adapted.chain.base)
    module.adapted.go_to(chain)
    if given["live"] is not None:
        module.adapted.resume_link(*given["live"])
    module.run.link_start = FitPosition(*given["link_start"])


def _check_same_choices(module: "COLAModule", state: CheckpointState, dtype: torch.dtype) -> None:
    """Refuses to resume a fit with options that the checkpoint's would override.

    Args:
        module: the module of the fit.
        state: of the checkpoint.
        dtype: to which the checkpoint's run cast adapted weights.

    Raises:
        UserError: for the first that differs.
    """
    mine, schedule = module.adapted.cast_dtype, module.run.schedule
    if dtype != mine:
        choices = f"{module.trainer.precision} and {module.finished_links}"
        raise UserError(
            f"trainer.precision, model.finished_links: expected those that cast adapted weights to {state.dtype}, as in the "
            f"checkpoint's run, received {choices}, which cast them to {str(mine).removeprefix('torch.')}"
        )
    if (seed := module.run.given_seed) not in (None, state.seed):
        raise UserError(f"model.seed, or seed_everything: expected {state.seed}, the checkpoint's, received {seed}")
    if module.init_chain is not None and module.init_chain_source != state.origin:
        raise UserError(
            "model.init_chain: expected null or what the checkpoint's run began from, with as many links, "
            f"{state.origin}, received {module.init_chain_source}"
        )
    if state.has_knots and not schedule.has_knots:
        raise UserError("chain: expected a chain with knots, as the run that wrote the checkpoint had, received none")
    planned = [[schedule.rank(link), schedule.alpha(link)] for link in range(len(state.scheduled))]
    if state.live is not None and planned != state.scheduled:
        raise UserError(
            "model.rank, model.alpha, chain.ranks, chain.alphas: expected the ranks and alphas of the checkpoint's run, "
            f"{state.scheduled}, one pair for each link, received {planned}"
        )


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
    opened = source if isinstance(source, OpenedCheckpoint) else OpenedCheckpoint.open(source, weights_only=weights_only)
    opened = replace(opened, links=links)
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


def _class_of(path: str, requested: type) -> type | None:
    """The class of a checkpoint's module; None if it cannot be found, and has another name than the requested class."""
    try:
        return find_class(path)
    except UserError as error:  # it was in a script, say
        if path.rpartition(".")[2] == requested.__name__:
            return requested
        log.warning("%s; it is loaded as %s", error, requested.__name__)
        return None
