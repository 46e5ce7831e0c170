"""The state dict of a COLA module: what training changes, and with it the chain and all else that restores the module.

Lightning's checkpoint contains the state dict, and so everything that a resume needs but the trainer's own state.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cola_lightning import layout
from cola_lightning.chain.chain import Chain, check_links
from cola_lightning.chain.checkpoint import STATE_KEY, CheckpointState
from cola_lightning.chain.link import Link
from cola_lightning.chain.store import describe_link, link_fields
from cola_lightning.errors import NonFiniteError, UserError
from cola_lightning.module.base import AdaptedModule
from cola_lightning.module.checkpoint import plain
from cola_lightning.module.run import run_of, trainer_of
from cola_lightning.module.values import aliases, frozen_names, is_frozen, values_of


class StateDictError(UserError, RuntimeError):
    """Names that do not fit: a mistake of the user's, and the RuntimeError that torch raises for it, with its message."""


# ---------------------------------------------------------------------- the rest of the state


def state_of(module: AdaptedModule) -> CheckpointState:
    """The state of a module besides its trained values."""
    adapted, run, trainer = module.adapted, run_of(module), trainer_of(module)
    live = None
    if adapted.live is not None:
        rank, alpha = adapted.live
        live = describe_link(Link(module.link, rank, alpha, factors={}, **run.metadata(trainer)))
    return CheckpointState(
        module=module.constructor_arguments,
        trained=list(adapted.recorded_values()) if live else [],
        chain=adapted.chain,
        live=live,
        dtype=str(adapted.cast_dtype).removeprefix("torch.") if live else None,
        link_start=run.link_start,
        position=run.position(trainer),
        n_before=run.n_before,
        has_knots=run.schedule.has_knots,
        seed=adapted.seed,
        init_chain_source=module.init_chain_source,
        base_weights=adapted.base_weights,
        first_values=adapted.first_values,
        callback_metrics={name: value.detach().cpu() for name, value in trainer.callback_metrics.items()} if trainer else {},
        scheduled=[[run.schedule.rank(link), run.schedule.alpha(link)] for link in range(module.link + 1)],
        modules_to_save=list(module.lora_config.modules_to_save),
        prompt_format=prompt_format_of(trainer),
        data=data_of(trainer),
    )


def check_writable_state(module: AdaptedModule) -> None:
    """Refuses a state from which no run could go on.

    Raises:
        NonFiniteError: for a loss or a trained value that is not finite, and after a knot that failed halfway.
    """
    module.step_loss.check()
    values = ((name, value) for name, value in module.named_parameters() if value.requires_grad)
    reason = next((f"{name!r} is no longer finite" for name, value in values if not torch.isfinite(value).all()), None)
    if run_of(module).is_tying:
        reason = "a knot failed halfway"
    if reason is not None:
        raise NonFiniteError(f"{reason}, in link {module.link}: this checkpoint is not written")


def prompt_format_of(trainer: Any) -> dict[str, Any]:
    """The ``prompt_format`` of the trainer's data module, of this package or with the same attribute; else an empty dict."""
    given = _of_data_module(trainer, "prompt_format")
    return given if {"kind", "chat_template"} <= given.keys() else {}


def data_of(trainer: Any) -> dict[str, Any]:
    """The ``identity`` of the trainer's data module, of this package or with the same attribute; else an empty dict."""
    return _of_data_module(trainer, "identity")


def _of_data_module(trainer: Any, name: str) -> dict[str, Any]:
    given = getattr(getattr(trainer, "datamodule", None), name, None)
    with contextlib.suppress(TypeError):  # another attribute of that name
        return dict(plain(given)) if isinstance(given, dict) else {}
    return {}


# ---------------------------------------------------------------------- loading


def load_state(
    module: AdaptedModule, load: Callable[..., Any], received: Mapping[str, Any], *, strict: bool, assign: bool
) -> Any:
    """Loads a state dict of a module: restores the chain, then loads the values.

    Args:
        module: the module.
        load: torch's ``load_state_dict`` of the module.
        received: the state dict.
        strict: whether it must have exactly the module's names.
        assign: see ``nn.Module.load_state_dict``.

    Raises:
        StateDictError: if a name is missing or unknown.
        UserError: if the chain was trained on another base, or is shorter than requested.
    """
    own, state = values_of(module, module.adapted), None
    is_all_in_values = module.adapted.live is None and not module.adapted.frozen_names()
    if STATE_KEY in received or (strict and not is_all_in_values):
        state = CheckpointState.from_dict(received.get(STATE_KEY))
        check_restorable(module, state)
    missing = [name for name in own if name not in received]
    unexpected = received.keys() - {STATE_KEY, *own, *frozen_names(module.adapted), *aliases(module, module.adapted)}
    if strict and (missing or unexpected):
        raise StateDictError(
            f"checkpoint: expected values for all that this module trains, and for nothing else. Missing key(s) in "
            f"state_dict: {_quoted(missing)}. Unexpected key(s) in state_dict: {_quoted(unexpected)}"
        )
    values = {name: _laid_out(value, own.get(name)) for name, value in received.items() if name != STATE_KEY}
    if state is not None and not restore(module, state):
        values = {name: value for name, value in values.items() if is_frozen(own.get(name))}  # the others are of a later link
    result = load(values, strict=False, assign=assign)
    result.missing_keys[:] = missing  # what is frozen is not missing
    return result


def _requested_links(module: AdaptedModule, state: CheckpointState) -> tuple[Chain, bool]:
    """The finished links to restore, and whether the current one of the state is to follow them."""
    pending = run_of(module).pending
    total, links = len(state.chain) + 1, None if pending is None else pending.links
    if links in (None, total):
        return state.chain, True
    check_links(links, total)
    return state.chain.truncate(links), False


def check_restorable(module: AdaptedModule, state: CheckpointState) -> None:
    """Refuses a state of another base, or with fewer links than requested; to resume a fit also one with other options.

    Raises:
        UserError: for the first that differs.
    """
    chain, _ = _requested_links(module, state)
    module.adapted.check_base(chain, state.base_weights)
    trainer = trainer_of(module)
    if trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None:
        _check_same_choices(module, state)


def restore(module: AdaptedModule, state: CheckpointState) -> bool:
    """Brings a module to a state: its base, its finished links, and where the current link began.

    If fewer links are requested (``links`` of the pending checkpoint), a link begins after them, and what else is trained gets
    the values after the last of them. Call :func:`check_restorable` first.

    Returns:
        Whether the trained values that are stored with the state belong to it.
    """
    trainer, adapted, run = trainer_of(module), module.adapted, run_of(module)
    chain, has_current = _requested_links(module, state)
    dtype = _dtype_of(module, state) if has_current or chain.links else adapted.cast_dtype  # the base alone has none
    adapted.take_base(chain, state.base_weights)
    if dtype != adapted.cast_dtype:
        adapted.cast(dtype)
    adapted.go_to(chain)
    if adapted.cast_dtype == torch.float64 and not module.is_sharded:  # what is trained outside of the model, too
        module.double()
    run.seed = adapted.seed = state.seed
    run.link_start, adapted.first_values = state.link_start, dict(state.first_values)
    run.n_before = state.n_before
    if not has_current:
        adapted.write_extras(adapted.extras_after(chain))
        run.left_at = None
        run.begin_metrics(trainer)
        adapted.begin_link(run.schedule.rank(adapted.link), run.schedule.alpha(adapted.link))
        return False
    run.left_at = state.position
    if state.live is not None:
        adapted.resume_link(state.live["rank"], state.live["alpha"])
    run.load_metrics(link_fields(state.live)["metrics"] if state.live else {}, state.callback_metrics)
    return True


def restore_nested(module: AdaptedModule, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Restores a module inside another one, such as Lightning's weight averaging, before its values are loaded.

    Adds the frozen values, which no state dict contains: their absence would be an error there.
    """
    if prefix:
        if (given := state_dict.pop(prefix + STATE_KEY, None)) is not None:
            state = CheckpointState.from_dict(given)
            check_restorable(module, state)
            restore(module, state)
        for name, parameter in module.model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state_dict.setdefault(f"{prefix}model.{name}", parameter.detach())


def _dtype_of(module: AdaptedModule, state: CheckpointState) -> torch.dtype:
    """The dtype to which the state's run cast adapted weights; without links, the module's own."""
    dtype: torch.dtype = module.adapted.cast_dtype if state.dtype is None else getattr(torch, state.dtype)
    return dtype


def _check_same_choices(module: AdaptedModule, state: CheckpointState) -> None:
    """Refuses to resume a fit with options that the checkpoint's would override.

    Raises:
        UserError: for the first that differs.
    """
    mine, schedule = module.adapted.cast_dtype, run_of(module).schedule
    if _dtype_of(module, state) != mine:
        choices = f"{module.trainer.precision} and {module.lora_config.finished_links}"
        raise UserError(
            f"trainer.precision, model.finished_links: expected those that cast adapted weights to {state.dtype}, as in the "
            f"checkpoint's run, received {choices}, which cast them to {str(mine).removeprefix('torch.')}"
        )
    if (seed := run_of(module).given_seed) not in (None, state.seed):
        raise UserError(f"model.seed, or seed_everything: expected {state.seed}, the checkpoint's, received {seed}")
    if module.init_chain is not None and module.init_chain_source != state.init_chain_source:
        raise UserError(
            "model.init_chain: expected null or what the checkpoint's run began from, with as many links, "
            f"{state.init_chain_source}, received {module.init_chain_source}"
        )
    if state.has_knots and not schedule.has_knots:
        raise UserError("chain: expected a chain with knots, as the run that wrote the checkpoint had, received none")
    planned = [[schedule.rank(link), schedule.alpha(link)] for link in range(len(state.scheduled))]
    if state.live is not None and planned != state.scheduled:
        raise UserError(
            "model.rank, model.alpha, chain.ranks, chain.alphas: expected the ranks and alphas of the checkpoint's run, "
            f"{state.scheduled}, one pair for each link, received {planned}"
        )


def _laid_out(value: Any, own: Any) -> Any:
    """A value in the layout of the module's own."""
    return layout.lay_out(value, own) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names)) or "none"
