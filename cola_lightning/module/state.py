"""The state dict of a COLA module: what training changes, and with it the chain and all else that restores the module.

Lightning's checkpoint contains the state dict, and so everything that a resume needs but the trainer's own state.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.serialization import config
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.chain.base import check_same_base, weight_of
from cola_lightning.chain.chain import METADATA, describe_link, number_of_links, pack
from cola_lightning.chain.checkpoint import STATE_PREFIX, OpenedCheckpoint, StoredState, read_archive
from cola_lightning.chain.facts import StoredFacts
from cola_lightning.chain.schedule import START
from cola_lightning.errors import NonFiniteError, UserError, causes
from cola_lightning.module.arguments import to_plain
from cola_lightning.module.run import ExpectedState, Run, trainer_of
from cola_lightning.trained_values import is_frozen
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

# ---------------------------------------------------------------------- what is stored


def state_of(run: Run, prefix: str = "") -> dict[str, Tensor]:
    """A run's state besides the trained values: its finished links, and its :func:`facts_of`.

    Args:
        run: the run.
        prefix: begins the names.
    """
    packed = pack(run.adapted.chain, facts_of(run).to_store())
    return {f"{prefix}{STATE_PREFIX}{name}": value for name, value in packed.items()}


def facts_of(run: Run) -> StoredFacts:
    """What is stored of a run besides its trained values and its finished links; :func:`restore` reads it."""
    adapted, current = run.adapted, run.current
    run.note_progress()
    live = describe_link(adapted.live_link(has_tensors=False)) if adapted.layers else None
    return StoredFacts(
        module=run.arguments,
        seed=adapted.seed,
        live=live and {name: value for name, value in live.items() if name not in ("start_step", "end_step")},
        extras=list(adapted.trained.recorded()) if live else [],
        is_trained=current.is_trained,
        start=current.start,
        position=current.end,
        dtype=str(adapted.cast_dtype).removeprefix("torch.") if live else None,
        init_chain=run.start.describe(),
        first_link=run.first_link,
        n_earlier_fits=run.n_earlier_fits,
        has_knots=run.schedule.has_knots,
        knot=run.schedule.knot,
        share=run.schedule.merged_share,
        sizes=[list(run.size_of(link)) for link in range(adapted.n_finished + 1)],
        init=run.config.init,
        modules_to_save=list(run.config.modules_to_save),
        prompt_format=described_data(run, "prompt_format"),
        data=described_data(run, "identity"),
        held_out=run.held_out,
        initial=adapted.trained.initial,
    )


def described_data(run: Run, name: str) -> dict[str, Any]:
    """The ``prompt_format`` or ``identity`` of the data of a run's last fit, if they have one that JSON can hold; else empty.

    Args:
        run: the run.
        name: which of the two; data modules of this package have both.
    """
    trainer: Any = trainer_of(run.module)
    if trainer is None or trainer.state.fn != "fit":  # an evaluation has data of its own
        return dict(run.fitted_data.get(name, {}))
    value = getattr(getattr(trainer, "datamodule", None), name, None)
    with contextlib.suppress(TypeError):  # another attribute of that name
        return dict(to_plain(value)) if isinstance(value, dict) else {}
    return {}


# ---------------------------------------------------------------------- the file


def prepare_checkpoint(run: Run, checkpoint: dict[str, Any]) -> None:
    """Completes a checkpoint, and refuses one from which no run could go on.

    Raises:
        NonFiniteError: for a loss or a trained value that is not finite, after a knot that failed halfway, and inside a
            validation of averaged weights.
    """
    run.step_loss.check()
    named = run.module.named_parameters()
    values = ((name, value) for name, value in named if value.requires_grad and not is_lazy(value))
    reason = next((f"{name!r} is no longer finite" for name, value in values if not torch.isfinite(value).all()), None)
    if run.is_tying_knot:
        reason = "a knot failed halfway"
    trainer = run.trainer
    is_interrupted = trainer is not None and trainer.validating and trainer.state.status == "interrupted"
    if is_interrupted and "current_model_state" in checkpoint:  # the averaged weights may be in the place of the run's
        reason = "a validation of averaged weights was interrupted"
    if reason is not None:
        raise NonFiniteError(f"{reason}, in link {run.adapted.n_finished}: this checkpoint is not written")
    current = checkpoint.get("current_model_state", {}).items()  # weight averaging has put a copy's state in the place of it
    checkpoint["state_dict"] |= {name: value for name, value in current if name.startswith(STATE_PREFIX)}
    for owner in (LightningModule, LightningDataModule):  # the run's own record makes the module again, without secrets
        checkpoint.pop(owner.CHECKPOINT_HYPER_PARAMS_KEY, None)
        checkpoint.pop(owner.CHECKPOINT_HYPER_PARAMS_TYPE, None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint to disk next to its destination, then renames it in one step; refuses to read damaged ones.

    Lightning writes to the system's temporary folder first, which is often another file system, so that its move is a copy.

    Args:
        opened: a checkpoint that was read already, for its path.
    """

    def __init__(self, opened: OpenedCheckpoint | None = None) -> None:
        super().__init__()
        self.opened = opened

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        # Without checksums, which a user may have turned off, it would be refused when read.
        with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]  # of torch's config modules
            if storage_options is not None or "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with atomic_file(Path(path)) as partial, partial.open("wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # torch's own, for a full disk, too
                    raise next((cause for cause in causes(error) if isinstance(cause, OSError)), error) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if self.opened is not None and self.opened.path == str(path) and (contents := self.opened.take()):
            return contents
        # Lightning's default unpickles what is at a URL
        checkpoint: dict[str, Any] = read_archive(path, weights_only=weights_only is not False)
        return checkpoint


# ---------------------------------------------------------------------- loading


def prepare_loading(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Restores a module from a state dict before torch loads its values, also for a module inside another one.

    A hook of torch's, which may change the state dict. It takes our own entries from it, and adds what no state dict of ours
    contains: the frozen values, the module's own.

    Raises:
        UserError: if the chain was trained on another base, or is shorter than requested.
    """
    module.make_model()
    adapted = module.run.adapted
    _, _, missing_keys, *_ = args
    has_current = True
    packed = [name for name in state_dict if name.startswith(prefix + STATE_PREFIX)]
    if packed:
        has_current = restore(module.run, StoredState.of(state_dict, prefix=prefix))
        for name in packed:
            del state_dict[name]
    elif adapted.layers or adapted.trained.frozen_names():  # else the values are all
        missing_keys.append(f"{prefix}{STATE_PREFIX}{METADATA}")
    values, trained = nn.Module.state_dict(module, prefix=prefix, keep_vars=True), adapted.trained.state(prefix)
    model_names = adapted.trained.aliases()
    if not has_current:  # the values of what is trained are of a later link
        state_dict.update({name: value for name, value in trained.items() if not is_frozen(value)})
    for name in trained.keys() & state_dict.keys():
        state_dict[name] = layout.lay_out(state_dict[name], trained[name])
    for name, value in values.items():
        name_in_module = name.removeprefix(prefix)
        if name not in trained and weight_of(name_in_module) == name_in_module:  # frozen, or another name for a value
            state_dict.setdefault(name, state_dict.get(prefix + model_names.get(name_in_module, name_in_module), value))


def restore(run: Run, state: StoredState) -> bool:
    """Brings a run to a state: its base, its finished links, and where the current link began.

    If fewer links are requested, a link begins after them, and what else is trained gets
    the values after the last of them. With a ``scale`` a link begins after all of them, because the current link is scaled too.

    Returns:
        Whether the trained values that are stored with the state belong to it.

    Raises:
        UserError: for a state of another base, or with fewer links than requested; to resume a fit also with other options.
    """
    trainer, adapted, facts, current = trainer_of(run.module), run.adapted, state.facts, run.current
    requested, scale = run.expected.links, run.expected.scale
    run.expected = ExpectedState(seed=run.expected.seed)
    links = number_of_links(requested, state.names)
    has_all = links == len(state.names)
    has_current = has_all and not scale
    unscaled = state.chain if has_current else state.all_links(None if has_all else links)
    chain = unscaled.scaled(scale)
    check_same_base(chain.base, adapted.chain.base)
    if is_resumed := trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None:
        _check_same_choices(run, state)
    dtype = _dtype_of(run, state) if has_current or chain.links else adapted.cast_dtype  # the base alone has none
    if dtype != adapted.cast_dtype:
        adapted.cast(dtype)
    adapted.go_to(chain)
    if adapted.cast_dtype == torch.float64 and not run.is_sharded:  # what is trained outside of the model, too
        run.module.double()
    adapted.seed, adapted.trained.initial = facts.seed, dict(facts.initial)
    run.restore_held_out(facts.held_out, is_resumed=is_resumed)
    run.fitted_data = {"prompt_format": facts.prompt_format, "identity": facts.data}
    _warn_of_template(run, facts.prompt_format.get("template"))
    run.n_earlier_fits, run.first_link = facts.n_earlier_fits, facts.first_link
    run.end = facts.position if has_current else None
    run.count_from(facts.start if has_current else START)
    current.name, current.metrics, current.is_trained = None, {}, False
    if not has_current:
        adapted.trained.write(adapted.extras_after(unscaled))
        if adapted.layers:
            adapted.begin_link(*run.size_of(adapted.n_finished))
        return False
    if state.live is not None:
        adapted.resume_link(state.live)
        current.name, current.metrics, current.is_trained = state.live.name, dict(state.live.metrics), facts.is_trained
    return True


def _warn_of_template(run: Run, trained: str | None) -> None:
    """Warns of data that were rendered by another chat template than that of the state's run, which is known only now."""
    tokenizer: Any = getattr(run.module, "tokenizer", None)
    data = getattr(trainer_of(run.module), "datamodule", None)
    if trained is not None and getattr(data, "template", "") is None and tokenizer.chat_template != trained:
        log.warning("data.chat_template: the checkpoint's run had one, and this data has none. Set it, or load_from_checkpoint")


def _dtype_of(run: Run, state: StoredState) -> torch.dtype:
    """The dtype to which the state's run cast adapted weights; without links, the module's own."""
    dtype: torch.dtype = getattr(torch, state.facts.dtype) if state.facts.dtype else run.adapted.cast_dtype
    return dtype


def _check_same_choices(run: Run, state: StoredState) -> None:
    """Refuses to resume a fit with options that the checkpoint's would override.

    Raises:
        UserError: for the first that differs.
    """
    facts, schedule = state.facts, run.schedule
    has_knots = facts.has_knots and schedule.has_knots
    sizes = [list(run.size_of(link)) for link in range(len(facts.sizes))]
    choices = {  # by the options: what the checkpoint's run had, and what this one has
        "trainer.precision, model.finished_links": (_dtype_of(run, state), run.adapted.cast_dtype),
        "model.seed, or seed_everything": (facts.seed, run.user_seed),
        "model.init_chain": (facts.init_chain, run.start.sources and run.start.describe()),
        "chain (has knots)": (facts.has_knots, has_knots),
        "chain.knot, chain.share": ([facts.knot, facts.share], [schedule.knot, schedule.merged_share] if has_knots else None),
        "model.rank, model.alpha, chain.ranks, chain.alphas": (facts.sizes, sizes if state.live else None),
        "model.init": (facts.init, run.config.init if state.live else None),
    }
    for options, (before, now) in choices.items():
        if now not in (None, before):
            raise UserError(f"{options}: must be {before}, as in the run that wrote the checkpoint, got {now}")
