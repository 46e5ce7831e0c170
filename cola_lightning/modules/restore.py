"""How a module becomes what a checkpoint, or another run's chain, says that it is to be."""

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from cola_lightning import distributed
from cola_lightning.chain import Chain
from cola_lightning.chain_files import CHECKPOINT_KEY, chain_of, read_checkpoint
from cola_lightning.chain_folder import EXTRA_STATE, check_version, unpack
from cola_lightning.checkpoint_io import check_source, unreadable_as_user_error
from cola_lightning.errors import UserError
from cola_lightning.fingerprint import check_same_base, check_same_layers
from cola_lightning.layers import LoRALayer
from cola_lightning.modules.checkpoint import AS_IT_IS, CheckpointedChain, base_weights
from cola_lightning.modules.progress import take_progress
from cola_lightning.modules.reading import READING, base_from_checkpoint
from cola_lightning.modules.recipe import as_annotated, find_class
from cola_lightning.modules.sharding import is_sharded
from cola_lightning.quantization import is_quantized
from cola_lightning.schedule import Counters

log = logging.getLogger(__name__)


class RestoredChain(CheckpointedChain):
    """The part of :class:`~cola_lightning.modules.COLAModule` that takes up a chain."""

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        links: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """As in Lightning, on the CPU; the class and its arguments are those that the checkpoint tells of.

        A base that the checkpoint holds is not made first.

        Args:
            checkpoint_path: a file that a fit wrote.
            map_location: see ``LightningModule.load_from_checkpoint``, as for the next one.
            hparams_file: of hyperparameters.
            strict: whether what the module trains and what the checkpoint holds must have the same names; None: as
                ``strict_loading`` says, which is true unless it was set.
            weights_only: False unpickles whatever the file holds, which may run code: for a file that the user trusts.
            links: how many links, the finished ones first and then the live one; None: all. 0 is the base.
            **kwargs: arguments of the class, in place of the checkpoint's; what is not plain, such as an optimizer, is not in
                there.

        Raises:
            UserError: for a path that is no checkpoint, or a damaged one, and for another base.
        """
        how = {"map_location": map_location, "hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
        if not isinstance(checkpoint_path, str | PathLike) or "://" in str(checkpoint_path):
            if links is not None:
                raise UserError("links: expected a checkpoint on this machine to take some links of, received another")
            check_source(checkpoint_path)
            with unreadable_as_user_error(checkpoint_path):
                return super().load_from_checkpoint(checkpoint_path, **how, **kwargs)
        path, is_plain = Path(checkpoint_path), weights_only is not False
        recipe = read_checkpoint(path, weights_only=is_plain)[CHECKPOINT_KEY]["module"]
        made = _class_of(recipe, cls)
        if made is not None and made is not cls and issubclass(made, cls):
            module: Self = made.load_from_checkpoint(path, **how, links=links, **kwargs)
            return module
        if made is not None and issubclass(cls, made):
            kwargs = as_annotated(cls, recipe["init_args"]) | kwargs
            for name in recipe["not_plain"]:
                if name not in kwargs:
                    log.warning("checkpoint: it holds no %r, which was no plain value: give it, or its default holds", name)
        with base_from_checkpoint(path, links, weights_only=is_plain):
            return super().load_from_checkpoint(path, **how, **kwargs)

    def restore_chain(self, checkpoint: dict[str, Any]) -> None:
        """Brings the weights to the state of a checkpoint's chain: replays what they miss, on the base made anew if need be.

        Where fewer links are asked for (``links`` of :func:`base_from_checkpoint`), the checkpoint's weights are changed to
        those of a link that begins after them.

        Raises:
            UserError: if the checkpoint has no chain, its chain was trained on another base, or it is shorter.
        """
        if CHECKPOINT_KEY not in checkpoint:
            raise UserError("checkpoint: expected one that a COLA module wrote, received one without a chain")
        state = checkpoint[CHECKPOINT_KEY]
        self._check_not_on_meta()
        check_version(state.get("format_version"), "the checkpoint")
        chain, reading = Chain.from_state_dict(state["chain"]), READING.get()
        links = None if reading is None or reading.links == len(chain) + 1 else reading.links
        if links is not None:
            check_links(links, len(chain))
            chain = chain_of(checkpoint).truncate(links)
        self._restore_base(chain, state["base_weights"])
        chain = Chain(chain.links, self.chain.base | chain.base)  # an older format says less of the base
        trainer = self._attached_trainer
        is_fit = trainer is not None and trainer.state.fn == "fit"
        if state["dtype"] is not None and links != 0:  # the base itself was not trained in any
            self._take_dtype(getattr(torch, state["dtype"]), is_fit=is_fit)
        self._go_to(chain)
        if is_fit:
            self._check_same_choices(checkpoint)
            take_progress(checkpoint, state.get("progress", {}))  # in format version 1 it is there
        self.link_start, self.seed = Counters(*state["link_start"]), state["seed"]
        self.first_outside = dict(state.get("outside", {}))
        self._had_knots, self._had_optimizer = state["has_knots"], state["optimizer"]
        if links is None:
            self._metrics_before, self._logged_before = dict(state["live"]["metrics"]) if state["live"] else {}, {}
            self._logged_in_checkpoint = dict(state.get("callback_metrics", {}))
            if state["live"] is not None:
                self._resume_link(state["live"]["rank"], state["live"]["alpha"])
            checkpoint["state_dict"][EXTRA_STATE] = AS_IT_IS
            return
        self._begin_link()
        extras = self._extras_after(chain)
        now = {name: value.detach() for name, value in self.values().items() if name.startswith("model.")}
        now |= {f"model.{name}": value for name, value in extras.items()} | self._outside_after(chain)
        checkpoint["state_dict"] = {name: now.get(name, value) for name, value in checkpoint["state_dict"].items()}
        checkpoint["state_dict"][EXTRA_STATE] = AS_IT_IS

    @override
    def set_extra_state(self, state: Tensor) -> None:
        """Brings the weights to the finished links of a :meth:`state_dict`, on the base made anew if need be.

        Raises:
            UserError: if these were trained on another base.
        """
        if isinstance(state, Tensor) and not state.numel():
            return
        self.configure_model()
        self._check_not_on_meta()
        chain, facts = unpack(state)
        check_same_base(chain.base, self.chain.base)
        self._go_to(chain)
        if facts["live"] is not None:
            self._resume_link(*facts["live"])
        self.link_start = Counters(*facts["link_start"])

    def _go_to(self, chain: Chain) -> None:
        """Has the layers hold these links, whichever they hold: replays what is missing, on the base made anew if need be."""
        if not self.chain.is_beginning_of(chain):
            if self.finished_links == "merge":
                self._write_base(self.model)
            self._forget_links(chain.base)
        self._replay(chain)

    def _resume_link(self, rank: int, alpha: float) -> None:
        """Gives the layers the rank and alpha of a live link, whose factors are loaded later."""
        for layer in self._layers.values():
            layer.rank, layer.alpha = int(rank), float(alpha)

    def _restore_base(self, chain: Chain, base: dict[str, Tensor] | None) -> None:
        """Checks that the base is the chain's, or writes the one that the checkpoint holds."""
        if base is None:
            check_same_base(chain.base, self.chain.base)
        elif base is not self._base_weights:
            check_same_layers(chain.base["weight_norms"], self.chain.base["weight_norms"])
            _check_same_shapes(base, base_weights(self.model))
            self._base_weights = base
            self._write_base(self.model)
            self._forget_links(chain.base)

    def _forget_links(self, base: dict[str, Any]) -> None:
        """The weights hold no link any more: neither does the chain, nor a stack."""
        self.chain = Chain(base=base)
        for layer in self._layers.values():
            if layer.stack is not None:
                layer.stack.clear()

    def widen(self) -> None:
        """Casts the model to float32 where it is in half precision, and its finished links to what they are in the chain.

        For computing, not for training on: what was rounded stays so.
        """

        def widened(tensor: Tensor) -> Tensor:
            return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor

        self._apply(widened)  # type: ignore[no-untyped-call]
        quantized: list[Any] = [part for part in self.modules() if is_quantized(part)]
        for layer in quantized:
            layer.compute_dtype = torch.float32
        if self.finished_links == "stack":
            chain = self.chain
            self._forget_links(chain.base)
            self._replay(chain)

    def _replay(self, chain: Chain) -> None:
        """Has the layers take up the links that they do not hold yet, where the training computes: for equal bits."""
        trainer = self._attached_trainer
        device = trainer.strategy.root_device if trainer else self.device
        for layers in self._by_unit():
            for name, layer in layers.items():
                if layer.stack is not None:
                    layer.stack.reserve(chain.total_rank(name))
            chain.replay(layers, device, start=self.link)
        self.chain = chain

    def _check_same_choices(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses to resume a fit with another choice where the checkpoint's would hold in its place."""
        raise NotImplementedError

    def _take_dtype(self, dtype: torch.dtype, *, is_fit: bool) -> None:
        """Casts the adapted layers as the training of a checkpoint did.

        Raises:
            UserError: if a fit that goes on with it would cast them to another dtype.
        """
        if dtype == self._kept_dtype:
            return
        if is_fit:
            told, mine = (str(one).removeprefix("torch.") for one in (dtype, self._kept_dtype))
            raise UserError(
                "trainer.precision, model.finished_links: expected those that cast adapted weights to "
                f"{told}, as in the checkpoint's run, received {self.trainer.precision} and {self.finished_links}, "
                f"which cast them to {mine}"
            )
        if self._kept_dtype.itemsize < 4:  # what was rounded comes back with the base
            made = self._make_base_again()
            for name, part in made.named_modules():
                tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
                wide = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
                if wide is not None:
                    self.model.get_submodule(name).to(part.dtype if isinstance(part, LoRALayer) else wide)
            self._write_base(self.model, made)
            self._forget_links(self.chain.base)
        self._cast_adapted(dtype)

    def _extras_after(self, chain: Chain) -> dict[str, Tensor]:
        """What is trained whole, and buffers, as they were after the last of these links; the base's where it has none."""
        names, extras = self._extras().keys(), chain.links[-1].extras if chain.links else {}
        if names <= extras.keys():  # nothing for which a base would have to be made
            return extras
        weights = base_weights(self._make_base_again()) if self._base_weights is None else self._base_weights
        return {name: weights[name] for name in names} | extras

    def _outside_after(self, chain: Chain) -> dict[str, Tensor]:
        """What is trained outside of the model, as it was after the last of these links; before the first where it has none.

        Raises:
            UserError: if that was not recorded, as by format version 1.
        """
        own = chain.links[-1].outside if chain.links else {}
        trained = {name for name, value in self.values().items() if value.requires_grad}
        outside = {name: value for name, value in self.first_outside.items() if not chain.links or name not in trained} | own
        if missing := sorted(self._outside().keys() - outside.keys()):
            raise UserError(
                f"links: expected null, for the checkpoint does not hold {missing[0]!r}, which is trained outside of the "
                f"model, as it was then; received {len(chain)}"
            )
        return outside

    def _start_from(self, chain: Chain) -> None:
        """Takes up the links of another run's chain, and takes over what it trained whole."""
        if "fingerprint" in chain.base:
            check_same_base(chain.base, self.chain.base)
            self._check_same_outside(chain.base.get("outside", {}))
        elif chain.links:  # of PEFT, whose base is not known
            check_same_layers(dict.fromkeys(chain.layers), self.chain.base["weight_norms"])
        for link in chain.links:
            for name, (lora_A, lora_B) in link.factors.items():
                layer = self._layers[name]
                if (lora_A.shape[1], lora_B.shape[0]) != (layer.lora_A.shape[1], layer.lora_B.shape[0]):
                    raise UserError(
                        f"model.init_chain: expected factors of {layer.lora_A.shape[1]} inputs and {layer.lora_B.shape[0]} "
                        f"outputs for {name!r}, received {lora_A.shape[1]} and {lora_B.shape[0]}"
                    )
        self._replay(Chain(chain.links, self.chain.base))
        if chain.links:
            last, model = chain.links[-1], distributed.state_dict(self.model)
            _load_whole(last.extras, {name: model[name] for name in self._extras()})
            _load_whole(last.outside, {name: value for name, value in self.values().items() if not name.startswith("model.")})

    def _check_same_outside(self, expected: Mapping[str, str]) -> None:
        """Refuses a chain that was trained beside other frozen parameters outside of the model than this module has."""
        own = self._frozen_outside()
        if different := [name for name, value in expected.items() if own.get(name, value) != value]:
            raise UserError(
                f"model.init_chain: expected the values that {different[0]!r}, which is frozen and outside of the model, had "
                "in the chain's run (seed_everything, if they are drawn), received others"
            )

    def _check_not_on_meta(self) -> None:
        if self._is_on_meta:
            raise UserError(
                "model: expected a module that was made outside of torch.device('meta') to take up a chain, received one whose "
                "base has no values"
            )

    def _cast_adapted(self, dtype: torch.dtype) -> None:
        """Casts the adapted layers to the training's dtype as Lightning will: its own cast comes only after the replay.

        It widens to float64 alone; a layer into which links are merged is never narrowed.
        """
        for layer in self._layers.values():
            if dtype == torch.float64 or (layer.stack is not None and dtype.itemsize < 4):
                if layer.dtype != dtype and is_sharded(self.model):
                    told, mine = (str(one).removeprefix("torch.") for one in (layer.dtype, dtype))
                    raise UserError(
                        f"trainer.precision: expected one that leaves adapted layers in {told}, in which they were sharded, "
                        f"received one for {mine}"
                    )
                layer.to(dtype)

    def _write_base(self, model: nn.Module, made: nn.Module | None = None) -> None:
        """Writes the base, without any link, into a model of the same shape: as it was kept, or made anew."""
        weights = self._base_weights
        if weights is None:
            weights = base_weights(self._make_base_again() if made is None else made)
        state = model.state_dict()
        for name, value in weights.items():
            distributed.copy_(state[name], value)


def _class_of(recipe: Mapping[str, Any], asked: type) -> type | None:
    """The class that a checkpoint's module was made of; None if it cannot be found, and is not called as the one asked for."""
    try:
        return find_class(recipe["class_path"])
    except UserError as error:  # it was in a script, say
        if recipe["class_path"].rpartition(".")[2] == asked.__name__:
            return asked
        log.warning("%s; it is loaded as %s", error, asked.__name__)
        return None


def _load_whole(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Writes a chain's values of what is trained whole into those that this module trains."""
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise UserError(
                f"model.init_chain: expected values for what this module trains whole (model.modules_to_save), received "
                f"{name!r} of shape {tuple(value.shape)}"
            )
        distributed.copy_(own[name], value)


def check_links(links: int, n_finished: int) -> None:
    """Refuses a number of links that there are not: the finished ones, and the live one."""
    if not 0 <= links <= n_finished + 1:
        raise UserError(f"links: expected 0 to {n_finished + 1}, {n_finished} finished and the live one, received {links}")


def _check_same_shapes(expected: Mapping[str, Tensor], received: Mapping[str, Tensor]) -> None:
    for name in sorted(expected.keys() | received.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else "none" for part in (expected, received))
        if theirs != ours:
            raise UserError(f"model: expected the checkpoint's base, with {name!r} of shape {theirs}, received {ours}")
