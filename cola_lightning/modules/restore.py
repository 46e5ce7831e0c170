"""How a module becomes what a checkpoint, or another run's chain, says that it is to be."""

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from cola_lightning.adapted_model import check_links, load_whole
from cola_lightning.chain import Chain
from cola_lightning.chain.checkpoint import CHECKPOINT_KEY, chain_of, read_checkpoint
from cola_lightning.chain.codec import CHECKPOINT, check_version
from cola_lightning.chain.fingerprint import check_same_base
from cola_lightning.chain.packed import EXTRA_STATE, unpack
from cola_lightning.chain.schedule import Counters
from cola_lightning.errors import UserError
from cola_lightning.lora.linear4bit import is_quantized
from cola_lightning.modules.arguments import as_annotated, find_class
from cola_lightning.modules.checkpoint import AS_IT_IS, CheckpointedChain
from cola_lightning.modules.checkpoint_io import check_source, unreadable_as_user_error
from cola_lightning.modules.pending import READING, base_from_checkpoint
from cola_lightning.modules.rewind import take_progress

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
        check_version(state.get("format_version"), CHECKPOINT, "the checkpoint")
        chain, reading = Chain.from_state_dict(state["chain"]), READING.get()
        links = None if reading is None or reading.links == len(chain) + 1 else reading.links
        if links is not None:
            check_links(links, len(chain))
            chain = chain_of(checkpoint, links)
        self.adapted.restore_base(chain, state["base_weights"])
        chain = Chain(chain.links, self.chain.base | chain.base)  # an older format says less of the base
        trainer = self._attached_trainer
        is_fit = trainer is not None and trainer.state.fn == "fit"
        if state["dtype"] is not None and links != 0:  # the base itself was not trained in any
            self._take_dtype(getattr(torch, state["dtype"]), is_fit=is_fit)
        self.adapted.go_to(chain)
        if is_fit:
            self._check_same_choices(checkpoint)
            take_progress(checkpoint, state.get("progress", {}))  # in format version 1 it is there
        self.link_start, self.seed = Counters(*state["link_start"]), state["seed"]
        self.adapted.seed = state["seed"]
        self.first_outside = dict(state.get("outside", {}))
        self._had_knots, self._had_optimizer = state["has_knots"], state["optimizer"]
        if links is None:
            self._metrics_before, self._logged_before = dict(state["live"]["metrics"]) if state["live"] else {}, {}
            self._logged_in_checkpoint = dict(state.get("callback_metrics", {}))
            if state["live"] is not None:
                self.adapted.resume_link(state["live"]["rank"], state["live"]["alpha"])
            checkpoint["state_dict"][EXTRA_STATE] = AS_IT_IS
            return
        self._begin_link()
        extras = self.adapted.extras_after(chain)
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
        self.adapted.go_to(chain)
        if facts["live"] is not None:
            self.adapted.resume_link(*facts["live"])
        self.link_start = Counters(*facts["link_start"])

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
        self.adapted.restack()

    def _check_same_choices(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuses to resume a fit with another choice where the checkpoint's would hold in its place."""
        raise NotImplementedError

    def _take_dtype(self, dtype: torch.dtype, *, is_fit: bool) -> None:
        """Casts the adapted layers as the training of a checkpoint did.

        Raises:
            UserError: if a fit that goes on with it would cast them to another dtype.
        """
        if dtype == self.adapted.kept_dtype:
            return
        if is_fit:
            told, mine = (str(one).removeprefix("torch.") for one in (dtype, self.adapted.kept_dtype))
            raise UserError(
                "trainer.precision, model.finished_links: expected those that cast adapted weights to "
                f"{told}, as in the checkpoint's run, received {self.trainer.precision} and {self.finished_links}, "
                f"which cast them to {mine}"
            )
        self.adapted.recast(dtype)

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
        self._check_same_outside(chain.base.get("outside", {}))
        self.adapted.start_from(chain)
        if chain.links:
            outside = {name: value for name, value in self.values().items() if not name.startswith("model.")}
            load_whole(chain.links[-1].outside, outside)

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


def _class_of(recipe: Mapping[str, Any], asked: type) -> type | None:
    """The class that a checkpoint's module was made of; None if it cannot be found, and is not called as the one asked for."""
    try:
        return find_class(recipe["class_path"])
    except UserError as error:  # it was in a script, say
        if recipe["class_path"].rpartition(".")[2] == asked.__name__:
            return asked
        log.warning("%s; it is loaded as %s", error, asked.__name__)
        return None
