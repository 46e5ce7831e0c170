"""What a checkpoint of a COLA module holds: the chain, not the model.

A checkpoint stores the live link, what is trained whole, and the finished links; loading one replays the links on the base.
That is megabytes where the weights would be gigabytes, and equal to the last bit.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from cola_lightning.adapted_model import AdaptedModel, Placement, is_factor, weight_of
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import CHECKPOINT_KEY
from cola_lightning.chain.codec import CHECKPOINT
from cola_lightning.chain.fingerprint import hash_of
from cola_lightning.chain.packed import EXTRA_STATE, pack
from cola_lightning.chain.schedule import ChainSchedule, Counters
from cola_lightning.errors import UserError
from cola_lightning.lora.registry import FinishedLinks, LoRALayer
from cola_lightning.modules.arguments import RemembersArguments, readable
from cola_lightning.modules.checkpoint_io import check_read_by_other
from cola_lightning.modules.guard import NonFiniteError
from cola_lightning.modules.pending import READING
from cola_lightning.modules.rewind import settled_progress
from cola_lightning.sharded import tensors

log = logging.getLogger(__name__)

AS_IT_IS = torch.empty(0, dtype=torch.uint8)  # an extra state that changes nothing


class CheckpointedChain(RemembersArguments, LightningModule):
    """The part of :class:`~cola_lightning.modules.COLAModule` that is written into checkpoints.

    Attributes:
        model: the adapted model.
        chain: the finished links.
        schedule: when knots fall; one link until ChainOfLoRA gives its own.
        link_start: the counters at which the live link began.
        seed: what every draw comes from.
        is_wrapped_by_fsdp1: whether a strategy has wrapped the module by FSDP1, or is about to.
        is_validating_in_fit: whether a validation of a fit has begun and not ended.
        window_start: epoch and batch at which the accumulation window began.
        window_buffers: the persistent buffers as they were then.
        left_at: the counters of the Trainer when the last fit ended; with the same, the next one continues it.
        first_outside: what is trained outside of the model, as it was before the first link.
    """

    model: nn.Module
    schedule: ChainSchedule
    seed: int | None
    finished_links: FinishedLinks
    modules_to_save: list[str]
    modules_to_save_lr: float | None

    def __init__(self) -> None:
        super().__init__()
        self._adapted: AdaptedModel | None = None
        self.link_start = Counters(0, 0)
        self._given_seed: int | None = None
        self._optimizer_class: str | None = None
        self._is_tying = False
        self._metrics_before: dict[str, float] = {}
        self._logged_before: dict[str, Tensor] = {}
        self._logged_in_checkpoint: dict[str, Tensor] = {}
        self.left_at: Counters | None = None
        self._is_on_meta = torch.empty(0).device.type == "meta"  # made inside torch.device("meta"): to be measured, say
        self.is_wrapped_by_fsdp1 = False
        self.is_validating_in_fit = False
        self.window_start: tuple[int, int] | None = None
        self.window_buffers: dict[str, Tensor] = {}
        self.first_outside: dict[str, Tensor] = {}
        self._is_packing = True
        self._left_out: set[str] = set()  # of checkpoints, as it was told
        self.forget_checkpoint()
        self.register_load_state_dict_pre_hook(_keep_frozen)  # type: ignore[no-untyped-call]

    def forget_checkpoint(self) -> None:
        """A fit begins: what a checkpoint said of its run no longer counts."""
        self._had_knots = False
        self._had_optimizer: str | None = None

    @property
    def adapted(self) -> AdaptedModel:
        """The model with its layers and its chain, apart from Lightning."""
        if self._adapted is None:
            self.configure_model()
        assert self._adapted is not None
        return self._adapted

    @property
    def chain(self) -> Chain:
        """The finished links; none before the model is made."""
        return Chain() if self._adapted is None else self._adapted.chain

    @property
    def link(self) -> int:
        """Index of the live link: how many are finished."""
        return len(self.chain)

    @property
    def is_base_in_checkpoint(self) -> bool:
        """For ``build_model``: whether only the shapes matter: the base's weights come from a checkpoint, or are on meta."""
        reading = READING.get()
        is_kept = self._adapted is not None and self._adapted.base_weights is not None
        return self._is_on_meta or (reading is not None and reading.holds_base) or is_kept

    @property
    def _layers(self) -> dict[str, LoRALayer]:
        return self.adapted.layers

    def _placement(self) -> Placement:
        """Where the model lies: in all that a strategy has wrapped it in, on the device of the training."""
        trainer, model = self._attached_trainer, self.model
        wrapped = trainer.strategy.model if trainer and trainer.strategy.lightning_module is self else None
        device = trainer.strategy.root_device if trainer else self.device
        is_sharded = tensors.is_model_sharded(model) or self.is_wrapped_by_fsdp1
        return Placement(model if wrapped is None else wrapped, device, is_sharded)

    @property
    def _is_in_parts(self) -> bool:
        """Whether FSDP2 or FSDP1 has sharded the model."""
        return self._placement().is_sharded

    def _by_unit(self) -> Iterator[dict[str, LoRALayer]]:
        return self.adapted.by_unit()

    @property
    def _attached_trainer(self) -> Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # Lightning's way of saying that there is none
            return None

    @property
    def _now(self) -> Counters:
        trainer = self._attached_trainer
        return Counters(trainer.current_epoch, trainer.global_step) if trainer else self.link_start

    def _begin_link(self, rank: int | None = None, alpha: float | None = None) -> None:
        raise NotImplementedError

    def restore_chain(self, checkpoint: dict[str, Any]) -> None:
        """Brings the weights to the state of a checkpoint's chain."""
        raise NotImplementedError

    @property
    def _origin(self) -> list[str | int | None]:
        """The path of the chain that the run began from, and how many of its links were asked for."""
        raise NotImplementedError

    def _scheduled(self, link: int) -> list[float]:
        """Rank and alpha of a link, as they were asked for."""
        raise NotImplementedError

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What training changes: links, modules trained whole, buffers, and what else the module holds; no frozen weight.

        The finished links are in it as torch's extra state, so that :meth:`load_state_dict` gives the same outputs.
        """
        prefix, left_out = kwargs.get("prefix", ""), {*self._frozen_names(), *self._aliases()}
        if tensors.has_fsdp1(self):
            state = tensors.state_dict(self, prefix, keep_vars=kwargs.get("keep_vars", False))
        else:
            state = super().state_dict(*args, **kwargs)
        for name in list(state):
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and not left_out.isdisjoint({own, weight_of(own)}):
                del state[name]
        return state

    def _frozen_names(self) -> list[str]:
        return [f"model.{name}" for name in self.adapted.frozen_names()]

    def _aliases(self) -> list[str]:
        """Other names of what is in the model, for a module that holds a part of it a second time."""
        inside = {id(value) for value in (*self.model.parameters(), *self.model.buffers())}
        named = (*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False))
        names = [name for name, value in named if id(value) in inside]
        return [name for name in tensors.plain_names(names) if not name.startswith("model.")]

    def values(self) -> dict[str, Tensor]:
        """The parameters and buffers of :meth:`state_dict` themselves, without the finished links, which take time to pack."""
        self._is_packing = False
        try:
            state = self.state_dict(keep_vars=True)
        finally:
            self._is_packing = True
        return {name: value for name, value in state.items() if isinstance(value, Tensor) and name != EXTRA_STATE}

    @override
    def get_extra_state(self) -> Tensor:
        """The finished links, their base, and the live link's rank, alpha and beginning, as a tensor of bytes."""
        if not self._is_packing:
            return AS_IT_IS
        return pack(self.chain, live=self.adapted.live, link_start=list(self.link_start))

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a :meth:`state_dict`, with its names and shapes checked; finished links are replayed, or taken back.

        Args:
            state_dict: it.
            strict: False leaves what is missing as it is, and what is unknown aside, and returns their names.
            assign: see ``nn.Module.load_state_dict``.

        Raises:
            UserError: if a name is missing or unknown, a shape differs, or the finished links are of another base.
        """
        self.configure_model()
        own = self.state_dict()
        if strict:
            self._check_names(own.keys(), state_dict.keys())
        for name, value in own.items():
            received = None if name == EXTRA_STATE else state_dict.get(name)
            if isinstance(value, Tensor) and isinstance(received, Tensor) and value.shape != received.shape:
                hint = " (is model.rank another?)" if ".lora_" in name else ""
                raise UserError(
                    f"checkpoint: expected shape {tuple(value.shape)} for {name!r}, received {tuple(received.shape)}{hint}"
                )
        laid_out = {
            name: tensors.lay_out(value, own[name]) if isinstance(value, Tensor) and name in own else value
            for name, value in state_dict.items()
        }
        result = super().load_state_dict(laid_out, strict=False, assign=assign)
        result.missing_keys[:] = [name for name in result.missing_keys if name in own]  # what is frozen is not missing
        return result

    def _check_names(self, own: Set[str], received: Set[str]) -> None:
        if EXTRA_STATE not in received:
            raise UserError(
                f"state_dict: expected the finished links, under {EXTRA_STATE!r}, received none: state_dict() gives them, and "
                "load_from_checkpoint loads a checkpoint"
            )
        if missing := [name for name in own if name not in received]:
            is_whole = missing[0].startswith("model.") and not is_factor(missing[0])
            hint = " (is model.modules_to_save another?)" if is_whole else ""
            raise StateDictError(
                f"checkpoint: expected a value for {missing[0]!r}, which this module trains, received none{hint}. "
                f"Missing key(s) in state_dict: {_quoted(missing)}"
            )
        known = {*own, *self._frozen_names(), *self._aliases()}
        if unknown := [name for name in received if name not in known]:
            raise StateDictError(
                f"checkpoint: expected values that this module trains, received {unknown[0]!r}. "
                f"Unexpected key(s) in state_dict: {_quoted(unknown)}"
            )

    def chain_state(self) -> dict[str, Any]:
        """All of ours in a checkpoint: plain types and tensors, read by ``torch.load(weights_only=True)``."""
        trainer, adapted = self._attached_trainer, self.adapted
        logged = trainer.callback_metrics if trainer else {}
        live = adapted.live and {
            "rank": adapted.live[0],
            "alpha": adapted.live[1],
            "scheduled": self._scheduled(self.link),
            "metrics": self._metrics(),
            "extras": list(self._extras()),
            "outside": list(self._outside()),
        }
        return {
            "format_version": CHECKPOINT.version,
            "module": self.recipe(),
            "chain": self.chain.state_dict(),
            "live": live,
            "dtype": str(adapted.kept_dtype).removeprefix("torch.") if live else None,
            "callback_metrics": {name: value.detach().cpu() for name, value in logged.items()},
            "link_start": list(self.link_start),
            "scheduled": [self._scheduled(link) for link in range(self.link + 1)],
            "has_knots": self.schedule.has_knots,
            "seed": self.seed,
            "origin": self._origin,
            "optimizer": self._optimizer_class,
            "modules_to_save": self.modules_to_save,
            "has_rate_of_saved": self.modules_to_save_lr is not None,
            "base_weights": adapted.base_weights,
            "outside": self.first_outside,
        }

    def _metrics(self) -> dict[str, float]:
        """What was logged last since the live link began, in this run of a Trainer or before."""
        trainer = self._attached_trainer
        if trainer is None or (trainer.training and trainer.global_step == self.link_start.global_step):
            return dict(self._metrics_before)  # not one step of this link yet: what is logged is of the link before
        logged = trainer.callback_metrics.items()
        new = {name: float(value) for name, value in logged if value is not self._logged_before.get(name)}
        return self._metrics_before | new

    def keep_metrics(self) -> None:
        """Keeps the live link's metrics beyond this run of a Trainer, which forgets them when the next begins."""
        self._metrics_before = self._metrics()

    def _forget_metrics(self) -> None:
        """A link begins: what was logged so far is not its own."""
        trainer = self._attached_trainer if self.is_made else None  # before it is, nothing was logged
        self._metrics_before, self._logged_before = {}, dict(trainer.callback_metrics) if trainer else {}

    def _outside(self) -> dict[str, Tensor]:
        """CPU copies of what training changes outside of the model, by name in this module.

        Parameters that are trained, and buffers that are no longer what they were.
        """
        values = {name: value for name, value in self.values().items() if not name.startswith("model.") and not is_lazy(value)}
        trained = [name for name, value in values.items() if value.requires_grad]
        buffers = {name: tensors.gather(value) for name, value in values.items() if not isinstance(value, nn.Parameter)}
        first = self.first_outside
        moved = {name: value for name, value in buffers.items() if name not in first or not torch.equal(value, first[name])}
        return {name: tensors.gather(values[name]) for name in trained} | moved

    def _frozen_outside(self) -> dict[str, str]:
        """Hashes of the parameters outside of the model that are not trained."""
        named = {name: value for name, value in self.values().items() if not name.startswith("model.") and not is_lazy(value)}
        return {name: hash_of(p) for name, p in named.items() if isinstance(p, nn.Parameter) and not p.requires_grad}

    def restore_metrics(self, trainer: Trainer) -> None:
        """Gives a Trainer that resumes what the run had logged last, which Lightning forgets and a rule by metrics may read."""
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in self._logged_in_checkpoint.items()})
        self._logged_before = dict(trainer.callback_metrics)

    def _extras(self) -> dict[str, Tensor]:
        return self.adapted.extras()

    def note_outside(self) -> None:
        """Remembers what is trained outside of the model as it is before training; what is remembered already stays."""
        values = {name: value for name, value in self.values().items() if not name.startswith("model.") and not is_lazy(value)}
        is_fixed = {name: isinstance(value, nn.Parameter) and not value.requires_grad for name, value in values.items()}
        first = {name: tensors.gather(value) for name, value in values.items() if not is_fixed[name]}
        self.first_outside = first | self.first_outside

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._is_tying:
            raise RuntimeError(f"the knot after link {self.link} failed halfway: this checkpoint is not written")
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{name!r} is no longer finite, in link {self.link}: this checkpoint is not written")
        checkpoint[CHECKPOINT_KEY] = self.chain_state()
        checkpoint["state_dict"].pop(EXTRA_STATE, None)  # it is in there
        self._store_hyperparameters(checkpoint)
        trainer = self._attached_trainer
        if trainer is None or trainer.state.fn != "fit" or "loops" not in checkpoint:
            return
        counters, batch_idx = settled_progress(checkpoint, trainer, is_validating=self.is_validating_in_fit)
        checkpoint[CHECKPOINT_KEY]["progress"] = counters
        if batch_idx is not None and self.window_start == (trainer.current_epoch, batch_idx):
            checkpoint["state_dict"] |= self.window_buffers

    def _store_hyperparameters(self, checkpoint: dict[str, Any]) -> None:
        """Has what ``save_hyperparameters`` took stored in plain types, and leaves out what has none."""
        checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_TYPE, None)  # a class
        trainer = self._attached_trainer
        for owner in (self, getattr(trainer, "datamodule", None)):
            key = getattr(owner, "CHECKPOINT_HYPER_PARAMS_KEY", "")
            if key not in checkpoint:
                continue
            given, checkpoint[key] = checkpoint[key], {}
            for name, value in given.items():
                try:
                    checkpoint[key][name] = readable(value)
                except TypeError:
                    what = f"{type(owner).__name__}: the hyperparameter {name!r} is of type {type(value).__name__}"
                    if what not in self._left_out:
                        log.warning("%s, which no checkpoint can hold: it is left out", what)
                    self._left_out.add(what)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = self._attached_trainer
        if trainer is not None and trainer.ckpt_path is not None:
            check_read_by_other(trainer.strategy.checkpoint_io, trainer.ckpt_path)
        self.restore_chain(checkpoint)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the chain in the checkpoints of a subclass whose hooks, its own or a mixin's, forget ``super()``.

        Called twice, ours do the same.
        """
        super().__init_subclass__(**kwargs)
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            ours, found = getattr(CheckpointedChain, name), getattr(cls, name)
            if found is not ours and not hasattr(found, "comes_after_ours"):
                setattr(cls, name, _after(ours, found))


def _keep_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Has a module inside another load what is frozen as it is: no state holds it, and there its absence would be an error."""
    assert isinstance(module, CheckpointedChain)
    if prefix:
        for name, parameter in module.model.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state_dict.setdefault(f"{prefix}model.{name}", parameter.detach())


class StateDictError(UserError, RuntimeError):
    """Names that do not fit: a mistake of the user's, and the RuntimeError that torch raises for it, in its words too."""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _after(ours: Callable[..., None], own: Callable[..., None]) -> Callable[..., None]:
    """A hook that does ours first and then a subclass' own."""

    @functools.wraps(own)
    def hook(self: CheckpointedChain, checkpoint: dict[str, Any]) -> None:
        ours(self, checkpoint)
        own(self, checkpoint)

    hook.comes_after_ours = True  # type: ignore[attr-defined]
    return hook
