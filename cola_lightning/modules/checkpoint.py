"""What a checkpoint of a COLA module holds: the chain, not the model.

A checkpoint stores the live link, what is trained whole, and the finished links; loading one replays the links on the base.
That is megabytes where the weights would be gigabytes, and equal to the last bit.
"""

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from cola_lightning import distributed
from cola_lightning.adapt import lora_layers
from cola_lightning.chain import Chain, check_same_base, check_same_layers
from cola_lightning.errors import UserError
from cola_lightning.layers import LoRALayer
from cola_lightning.modules.keeper import NonFiniteError
from cola_lightning.schedule import ChainSchedule, Counters

log = logging.getLogger(__name__)

CHECKPOINT_KEY = "cola"

_BASE_IN_CHECKPOINT: ContextVar[bool] = ContextVar("base_in_checkpoint", default=False)


@contextmanager
def base_from_checkpoint(path: str | Path) -> Iterator[None]:
    """Tells modules that are made inside the block that a checkpoint is about to be loaded into them.

    If it holds its base (``save_base``), ``build_model`` need not make the base's weights: see
    :attr:`CheckpointedChain.is_base_in_checkpoint`. Lightning tells a module of its checkpoint only after the model is made.
    """
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get(CHECKPOINT_KEY, {})
    token = _BASE_IN_CHECKPOINT.set(state.get("base_weights") is not None)
    try:
        yield
    finally:
        _BASE_IN_CHECKPOINT.reset(token)


def base_weights(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """CPU copies of a model's parameters and persistent buffers by name, without its links and the names in ``without``."""
    state = model.state_dict()
    return {name: distributed.gather(value) for name, value in state.items() if not _is_factor(name) and name not in without}


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


class CheckpointedChain(LightningModule):
    """The part of :class:`~cola_lightning.modules.COLAModule` that writes and reads checkpoints.

    Attributes:
        model: the adapted model.
        chain: the finished links.
        schedule: when knots fall; one link until ChainOfLoRA gives its own.
        link_start: the counters at which the live link began.
        seed: what every draw comes from.
    """

    model: nn.Module
    schedule: ChainSchedule
    seed: int | None

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.link_start = Counters(0, 0)
        self.strict_loading = False  # a checkpoint holds no frozen weights; load_state_dict checks the names itself
        self._base_weights: dict[str, Tensor] | None = None
        self._given_seed: int | None = None
        self._optimizer_class: str | None = None
        self.forget_checkpoint()

    def forget_checkpoint(self) -> None:
        """A fit begins: what an earlier checkpoint's run had is no longer to be met."""
        self._had_knots = False
        self._had_optimizer: str | None = None

    @property
    def link(self) -> int:
        """Index of the live link: how many are finished."""
        return len(self.chain)

    @property
    def is_base_in_checkpoint(self) -> bool:
        """For ``build_model``: whether the base's weights come from a checkpoint, so that only their shapes matter."""
        return _BASE_IN_CHECKPOINT.get() or self._base_weights is not None

    @property
    def _layers(self) -> dict[str, LoRALayer]:
        return lora_layers(self.model)

    @property
    def _attached_trainer(self) -> Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # Lightning's way of saying that there is none
            return None

    def _make_adapted_base(self) -> nn.Module:
        raise NotImplementedError

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in Lightning; a base that the checkpoint holds is not made first.

        Args:
            checkpoint_path: a file that a fit of this class wrote.
            *args: see ``LightningModule.load_from_checkpoint``.
            **kwargs: this class' own arguments, as in training.
        """
        is_local = isinstance(checkpoint_path, str | PathLike) and "://" not in str(checkpoint_path)
        with base_from_checkpoint(checkpoint_path) if is_local else nullcontext():
            module: Self = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return module

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What training changes: links, modules trained whole, buffers, and what else the module holds; no frozen weight."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for name in self._frozen_names():
            state.pop(kwargs.get("prefix", "") + name, None)
        return state

    def _frozen_names(self) -> list[str]:
        if not hasattr(self, "model"):
            return []
        named = self.model.named_parameters(remove_duplicate=False)
        return [f"model.{name}" for name, parameter in named if not parameter.requires_grad]

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a :meth:`state_dict`, with its names and shapes checked.

        Raises:
            UserError: if a name is missing or unknown, or a shape differs.
        """
        own = self.state_dict()
        if missing := sorted(own.keys() - state_dict.keys()):
            raise UserError(f"checkpoint: expected a value for {missing[0]!r}, which this module trains, received none")
        if unknown := sorted(state_dict.keys() - own.keys() - set(self._frozen_names())):
            raise UserError(f"checkpoint: expected values that this module trains, received {unknown[0]!r}")
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape != state_dict[name].shape:
                hint = " (is model.rank another?)" if ".lora_" in name else ""
                raise UserError(
                    f"checkpoint: expected shape {tuple(value.shape)} for {name!r}, "
                    f"received {tuple(state_dict[name].shape)}{hint}"
                )
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys.clear()  # what is frozen is not missing
        return result

    def chain_state(self) -> dict[str, Any]:
        """All of ours in a checkpoint: plain types and tensors, read by ``torch.load(weights_only=True)``."""
        live = next(iter(self._layers.values()), None)
        return {
            "version": 1,
            "chain": self.chain.state_dict(),
            "live": {"rank": live.rank, "alpha": live.alpha} if live else None,
            "dtype": str(live.weight.dtype).removeprefix("torch.") if live else None,
            "link_start": list(self.link_start),
            "has_knots": self.schedule.has_knots,
            "seed": self.seed,
            "optimizer": self._optimizer_class,
            "base_weights": self._base_weights,
        }

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise NonFiniteError(f"{name!r} is no longer finite, in link {self.link}: this checkpoint is not written")
        checkpoint[CHECKPOINT_KEY] = self.chain_state()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.restore_chain(checkpoint)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the chain in the checkpoints of a subclass whose hooks forget ``super()``; called twice, ours do the same."""
        super().__init_subclass__(**kwargs)
        for name in ("on_save_checkpoint", "on_load_checkpoint"):
            if name in vars(cls):
                setattr(cls, name, _after(getattr(CheckpointedChain, name), vars(cls)[name]))

    def restore_chain(self, checkpoint: Mapping[str, Any]) -> None:
        """Brings the weights to the state of a checkpoint's chain: replays what they miss, on the base made anew if need be.

        Raises:
            UserError: if the checkpoint has no chain, or its chain was trained on another base.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError("checkpoint: expected one that a COLA module wrote, received one without a chain")
        state = checkpoint[CHECKPOINT_KEY]
        chain, base = Chain.from_state_dict(state["chain"]), state["base_weights"]
        if base is None:
            check_same_base(chain.base, self.chain.base)
        elif base is not self._base_weights:
            check_same_layers(chain.base, self.chain.base)
            _check_same_shapes(base, base_weights(self.model))
            self._base_weights = base
            self._write_base(self.model)
            self.chain = Chain(base=chain.base)
        if not self.chain.is_beginning_of(chain):
            self._write_base(self.model)
            self.chain = Chain(base=chain.base)
        if state["dtype"] is not None:
            self._cast_adapted(getattr(torch, state["dtype"]))
        trainer = self._attached_trainer
        chain.replay(self._layers, trainer.strategy.root_device if trainer else self.device, start=self.link)
        self.chain = chain
        for layer in self._layers.values():
            layer.rank, layer.alpha = int(state["live"]["rank"]), float(state["live"]["alpha"])
        if self._given_seed not in (None, state["seed"]):
            log.warning("model.seed: the checkpoint's, %s, holds, not %s", state["seed"], self._given_seed)
        self.link_start, self.seed = Counters(*state["link_start"]), state["seed"]
        self._had_knots, self._had_optimizer = state["has_knots"], state["optimizer"]

    def _cast_adapted(self, dtype: torch.dtype) -> None:
        """Casts the adapted layers where the training is in float64: Lightning's own cast comes only after the replay."""
        if dtype == torch.float64:
            for layer in self._layers.values():
                layer.double()

    def _write_base(self, model: nn.Module) -> None:
        """Writes the base, without any link, into a model of the same shape: as it was kept, or made anew."""
        weights = self._base_weights
        state = model.state_dict()
        for name, value in (base_weights(self._make_adapted_base()) if weights is None else weights).items():
            distributed.copy_(state[name], value)


def _check_same_shapes(expected: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | received.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else "none" for part in (expected, received))
        if theirs != ours:
            raise UserError(f"model: expected the checkpoint's base, with {name!r} of shape {theirs}, received {ours}")


def _after(ours: Callable[..., None], own: Callable[..., None]) -> Callable[..., None]:
    """A hook that does ours first and then a subclass' own."""

    @functools.wraps(own)
    def hook(self: CheckpointedChain, checkpoint: dict[str, Any]) -> None:
        ours(self, checkpoint)
        own(self, checkpoint)

    return hook
