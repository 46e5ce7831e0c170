"""A base model with its LoRA layers and its chain of finished links: the method in plain torch, without Lightning.

:class:`~cola_lightning.COLAModule` is a Lightning module around one; a custom training loop needs nothing more.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cola_lightning import layout
from cola_lightning.chain.base import (
    base_values,
    check_layers,
    check_same_base,
    check_same_norms,
    describe_base,
)
from cola_lightning.chain.chain import Chain, Link, check_links
from cola_lightning.chain.current import CurrentLink
from cola_lightning.chain.names import matched
from cola_lightning.chain.schedule import Knot, merged_share
from cola_lightning.contexts import evaluating, with_attribute
from cola_lightning.errors import UserError
from cola_lightning.lora.config import LoRAConfig
from cola_lightning.lora.inject import inject_lora
from cola_lightning.lora.layer import LoRALayer, initialize_link, is_quantized, lora_layers
from cola_lightning.lora.stack import Stack
from cola_lightning.merge import add_links, cast_floats, deep_copy, free, merge, round_floats
from cola_lightning.seeding import seeded_build
from cola_lightning.trained_values import TrainedValues


class Placement(NamedTuple):
    """The placement of a model in use.

    Attributes:
        root: the model, or a strategy's wrapper around it.
        device: where finished links are computed.
        is_sharded: whether the weights are sharded over processes.
    """

    root: nn.Module
    device: torch.device
    is_sharded: bool


class AdaptedModel:
    """A model, adapted in place, and its chain. Not an ``nn.Module`` itself: the training code holds the model.

    The current link is trained in ``model``; :meth:`tie_knot` finishes it and begins the next.

    Args:
        build_model: makes the base, the same each time; it may draw from the global generators of Python, numpy and torch,
            which are seeded.
        config: the layers to adapt, and what their links are like; or a function that returns it, once the base is built.
        seed: of all random draws: each link's A is drawn from it, the link's index and the layer's name.
        name: the base's name.
        placement: returns the model's placement; None: the model is used as it is, where it is.
        outer_module: the module that has the model as its ``model``, such as a LightningModule. Each link records what is
            trained in it, as it does for the model's fully trained modules. None: there is none.
        current: what is known of the current link besides its factors; None: a new one.
        earlier_layers: names of the layers of a chain that the model will start from. Those that the config does not choose get
            no current link, and keep the updates of the chain.

    Raises:
        UserError: for an invalid model or values.

    Attributes:
        model: the model.
        chain: the finished links.
        trained: what training changes besides the links.
        current: the current link's rank, alpha, start, stage and metrics.

    Example:
        >>> def build_model():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> adapted = AdaptedModel(build_model, LoRAConfig(["0", "2"], rank=2, alpha=4), seed=0)
        >>> link = adapted.tie_knot()
        >>> link.index, adapted.n_finished, len(adapted.chain)
        (0, 1, 1)

    Source: Xia et al., "Chain of LoRA" (arXiv 2401.04151), section 3 and algorithm 1.
    """

    def __init__(
        self,
        build_model: Callable[[], nn.Module],
        config: LoRAConfig | Callable[[], LoRAConfig],
        *,
        seed: int = 0,
        name: str = "",
        placement: Callable[[], Placement] | None = None,
        outer_module: nn.Module | None = None,
        current: CurrentLink | None = None,
        earlier_layers: Collection[str] = (),
    ) -> None:
        self.build_model, self._config, self.seed, self.earlier_layers = build_model, config, seed, earlier_layers
        self.placement = self._placement_of_model if placement is None else placement
        self.model = self.make_base()
        self.trained = TrainedValues(self.model, outer_module)
        self.chain = Chain(base=describe_base(self.model, name))
        self.current = CurrentLink() if current is None else current
        self._rounded_to = torch.float32  # what a precision has rounded the values to into which no link is merged
        self._stored_state: tuple[Any, list[Link], tuple[list[Stack], dict[str, Tensor]]] | None = None  # see _state_after
        if self.layers:
            self.begin_link(self.config.rank, self.config.alpha)

    # ------------------------------------------------------------------ its parts

    @property
    def config(self) -> LoRAConfig:
        """The layers that are adapted, and what their links are like."""
        return self._config() if callable(self._config) else self._config

    @property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers by name, in the model's order."""
        layout.reshard(self.model)  # a gathered weight may be in another dtype
        return lora_layers(self.model)

    @property
    def live_layers(self) -> dict[str, LoRALayer]:
        """The adapted layers that the current link has: all but those that only earlier links have."""
        return {name: layer for name, layer in self.layers.items() if layer.has_link}

    @property
    def n_finished(self) -> int:
        """How many links are finished, which is also the index of the current one."""
        return len(self.chain)

    @property
    def cast_dtype(self) -> torch.dtype:
        """The dtype to which a precision has cast the model, except weights that links are merged into; float32: to none."""
        layers = self.layers.values()
        return next((layer.dtype for layer in layers if layer.is_narrowed or layer.dtype == torch.float64), self._rounded_to)

    @property
    def merges(self) -> bool:
        """Whether finished links are merged into the weights, and not stacked next to them."""
        return any(layer.stack is None for layer in self.layers.values())

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer, a new one for each link: the current link's factors and fully trained modules."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def by_unit(self) -> Iterator[dict[str, LoRALayer]]:
        """Iterates over the adapted layers by name, in groups; a group's weights may be read and written during its turn."""
        names = {id(layer): name for name, layer in self.layers.items()}
        for modules in layout.units(self.placement().root):
            found = [module for module in modules if isinstance(module, LoRALayer) and id(module) in names]  # none of a copy
            yield {names[id(module)]: module for module in found}

    def _placement_of_model(self) -> Placement:
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        return Placement(self.model, device, layout.is_model_sharded(self.model))

    # ------------------------------------------------------------------ links

    def begin_link(self, rank: int, alpha: float) -> None:
        """Begins the next link: draws A from (seed, link, layer) and zeroes B; the function does not change.

        Raises:
            UserError: for a model without links, or values that no link of it can have.
        """
        self.current.begin(*self.checked_link(rank, alpha))
        initialize_link(self.live_layers, self.seed, self.n_finished, *self.current.size)

    def checked_link(self, rank: int, alpha: float, knot: Knot = "cola") -> tuple[int, float]:
        """A link's rank and alpha as plain numbers: numpy's would be in checkpoints and chain folders.

        Raises:
            UserError: for a model without links, or values that no link can have, or none that goes on with the current one.
        """
        if not self.layers:
            raise UserError("model.target_modules: a link needs layers to adapt, got null")
        largest = self.config.rank
        if rank not in range(1, largest + 1):
            raise UserError(f"rank: must be between 1 and {largest} (model.rank), got {rank}")
        if not 0 < alpha < math.inf:
            raise UserError(f"alpha: must be a number above 0, got {alpha}")
        if knot != "cola" and (rank, alpha) != self.current.size:
            raise UserError(f"chain.knot: with {knot}, a link has the rank and alpha of the link before it")
        return int(rank), float(alpha)

    def resume_link(self, link: Link) -> None:
        """Makes a link the current one, whose factors the layers have or get after this.

        Raises:
            UserError: if the rank is above the layers', or a layer would have another rank or scaling in it.
        """
        self.current.rank, self.current.alpha = self.checked_link(link.rank, link.alpha)
        for name, layer in self.live_layers.items():
            layer.rank, layer.scaling = self.config.size_of(name, *self.current.size)
        if self._own_sizes() != link.own_sizes:
            raise UserError("model.rank_pattern, model.alpha_pattern, model.use_rslora: must be those of the chain")

    def live_link(self, *, has_tensors: bool = True) -> Link:
        """The current link as it is now: what a knot would record.

        Args:
            has_tensors: False leaves out its factors and what else is trained.

        Raises:
            UserError: for a model without links.
        """
        if not self.layers:
            raise UserError("model.target_modules: this model has no links, because it is null")
        layers, current = self.live_layers, self.current
        factors, extras = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
        if has_tensors:
            for name, layer in layers.items():
                lora_A, lora_B = layer.factors
                factors[name] = layout.gather(lora_A), layout.gather(lora_B)
            extras = self.trained.copies(self.chain.links[-1].extras if self.chain.links else {})
        return Link(
            self.n_finished,
            *current.size,
            start_step=current.start.global_step,
            end_step=current.end.global_step,
            factors=factors,
            extras=extras,
            metrics=dict(current.metrics),
            own_sizes=self._own_sizes(),
            name=current.name,
        )

    def _own_sizes(self) -> dict[str, tuple[int, float]]:
        """Rank and scaling of the layers that have others than the current link's rank and ``alpha / rank``, by name."""
        rank, alpha = self.current.size
        sizes = {name: (layer.rank, layer.scaling) for name, layer in self.live_layers.items()}
        return {name: size for name, size in sizes.items() if size != (rank, alpha / rank)}

    def full_chain(self) -> Chain:
        """The finished links and, in a model with links, the current one as it is now."""
        return Chain([*self.chain.links, *([self.live_link()] if self.layers else [])], self.chain.base)

    def tie_knot(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        *,
        knot: Knot = "cola",
        share: float | None = None,
    ) -> Link:
        """Finishes the current link and begins the next. A knot of ``cola`` needs a new optimizer.

        Args:
            rank: the next link's, at most the rank that the layers were made with; None: as before.
            alpha: the next link's; None: as before.
            knot: ``cola`` merges the link, draws a new A and sets B to zero. ``half`` merges a share of the link; A and the
                rest of B go on. ``record`` only records the link.
            share: the share that ``half`` merges; None: 0.5.

        Returns:
            The finished link.

        Raises:
            UserError: for a model without links, or values that no link can have.

        Source: Xia et al., arXiv 2401.04151, section 3, "Tie a knot" and "Extend the chain".
        """
        link = self.live_link()
        following = self.checked_link(link.rank if rank is None else rank, link.alpha if alpha is None else alpha, knot)
        link = replace(link, share=merged_share(knot, share))
        if not link.is_record:
            for layers in self.by_unit():
                for layer in layers.values():
                    if layer.has_link:
                        layer.finish(link.share)
        self.chain.append(link)
        if knot == "cola":
            self.begin_link(*following)
        else:
            self.current.begin(*following)
        return link

    # ------------------------------------------------------------------ from one chain to another

    def go_to(self, chain: Chain) -> None:
        """Brings the layers to these finished links: replays the missing ones, on a rebuilt base if necessary.

        Where it goes back, fully trained modules and buffers also get their values after the last of these links. The live
        link's factors stay as they are: call :meth:`begin_link` for a new one.

        Raises:
            UserError: if the base must be rebuilt, and differs.
        """
        if not self.chain.is_beginning_of(chain):
            extras = self.extras_after(chain)
            if self.merges:
                self._write_base()
                round_floats(self.model, self._rounded_to)
            self.forget_links(chain)
            self.trained.write(extras)
        self.replay(chain)

    def replay(self, chain: Chain) -> None:
        """Replays the links of a chain that the layers do not hold yet, bit for bit as at its knots.

        Raises:
            UserError: for factors of another size than a layer's, which torch may broadcast, and for NaN or infinite ones.
        """
        device = self.placement().device
        for name, layer in self.layers.items():
            expected = *layer.batch_shape(layer), *layer.matrix_sizes(layer)
            for lora_A, lora_B, _ in chain.link_factors(name):
                if (sizes := (*lora_A.shape[:-2], lora_A.shape[-1], lora_B.shape[-2])) != expected:
                    raise UserError(f"chain: the links of layer {name!r} must be for sizes {expected}, got {sizes}")
                if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
                    raise UserError(f"chain: a link of layer {name!r} has NaN or infinite values")
        for layers in self.by_unit():
            for name, layer in layers.items():
                add_links(name, layer, chain.links[self.n_finished :], device)
        self.chain = Chain(list(chain.links), chain.base)

    def forget_links(self, chain: Chain) -> None:
        """Begins an empty chain on the base of another, and clears the stacks: the weights hold no link any more."""
        self.chain = Chain(base=chain.base)
        for layer in self.layers.values():
            if layer.stack is not None:
                layer.stack.clear()

    def start_from(self, chain: Chain, knot: Knot = "cola") -> None:
        """Replays another run's chain on a base without links, and loads its fully trained modules.

        Args:
            chain: the other run's chain.
            knot: what happens to its last link. ``cola`` finishes it; :meth:`begin_link` then begins the next one. After
                ``half`` and ``record`` the next link has begun, with A and the rest of B. See :meth:`tie_knot`.

        Raises:
            UserError: for a chain of another base, or of other layers.
        """
        base = self.chain.base
        if not set(chain.layers) <= base.weight_norms.keys():  # of another release, or saved after torch.compile
            chain = chain.renamed(matched(chain.layers, base.weight_norms))
        check_layers(chain.layers, base.weight_norms)
        if chain.base.fingerprint:
            check_same_base(replace(chain.base, weight_norms=base.weight_norms), base)
        else:  # of adapters: not all of its values are known, or none
            check_same_norms(chain.base, base, chain.sizes())
        if chain.links and knot != "cola" and chain[-1].factors.keys() != self.live_layers.keys():
            raise UserError("model.init_knot: the last link goes on, so its layers must be those of model.target_modules")
        links, state, trained = list(chain.links), layout.state_dict(self.model), self.trained.values()
        if links:  # peft writes embeddings and heads with an adapter that has them as targets: the base's own values
            frozen = {name: value for name, value in links[-1].extras.items() if name in state and name not in trained}
            mine = {name: layout.gather(state[name]) for name in frozen}
            unchanged = {name for name, value in frozen.items() if torch.equal(mine[name], value.to(mine[name].dtype))}
            extras = {name: value for name, value in links[-1].extras.items() if name not in unchanged}
            links[-1] = replace(links[-1], extras=extras, share=merged_share(knot))
        self.replay(Chain(links, self.chain.base))
        if links:
            self.trained.load(links[-1].extras)
        if links and knot != "cola":
            last = links[-1]
            self.begin_link(last.rank, last.alpha)
            self.resume_link(last)
            for name, layer in self.live_layers.items():
                for factor, value in zip(layer.factors, last.rest(name), strict=True):
                    layout.copy_(factor, value)

    def extras_after(self, chain: Chain) -> dict[str, Tensor]:
        """Fully trained parameters, and buffers, as they were after the last of these links; without links, the base's."""
        names, extras = self.trained.values().keys(), self.trained.initial | (chain.links[-1].extras if chain.links else {})
        if names <= extras.keys():  # nothing for which to rebuild the base
            return extras
        weights = base_values(self.rebuild_base())
        return {name: weights[name] for name in names & weights.keys()} | extras

    # ------------------------------------------------------------------ an earlier state

    @contextmanager
    def at(self, links: int) -> Iterator[nn.Module]:
        """Inside the block, the model is as it was after its first links, in evaluation mode and without gradients.

        It is no second model. The current link is left out. Finished links that are merged are subtracted in the forward pass,
        which is exact within rounding; of stacked links the first ones are used. Fully trained modules and buffers have the
        values that they had then. After the block, also if it raises, everything is as it was before.

        Args:
            links: how many links, the finished ones first and then the current one. 0 is the base.

        Yields:
            The model.

        Raises:
            UserError: if there are fewer links, or the model is trained without links.
        """
        check_links(links, self.n_finished + 1)
        if not self.layers:
            raise UserError("links: a model that is trained without links (target_modules null) has no earlier state")
        stacks, values = self._state_after(links) if links <= self.n_finished else ([], {})
        with ExitStack() as block:
            block.enter_context(evaluating(self.model))
            block.enter_context(torch.no_grad())
            block.enter_context(self.trained.replaced(values))
            for layer, stack in zip(self.layers.values(), stacks, strict=False):
                block.enter_context(with_attribute(layer, "replacement", stack))
            yield self.model

    def _state_after(self, links: int) -> tuple[list[Stack], dict[str, Tensor]]:
        """Each layer's finished links and the other trained values after the first links; stored for the next call."""
        # Links are compared by their ids, because == would compare their tensors. They are stored too, or else one could be
        # freed and another get its id.
        place = links, self.placement().device, self.cast_dtype, list(map(id, self.chain.links))
        if self._stored_state is None or self._stored_state[0] != place:
            chain, stacks = self.chain.truncate(links), []
            for name, layer in self.layers.items():
                stacks.append(layer.replacement_by(chain.link_factors(name), self.chain.link_factors(name)))
            self._stored_state = place, list(self.chain.links), (stacks, self.extras_after(chain))
        return self._stored_state[2]

    # ------------------------------------------------------------------ the base

    def make_base(self) -> nn.Module:
        """Builds the base and adapts it: the same one each time."""
        with seeded_build(self.seed):
            model = self.build_model()
            known = matched(self.earlier_layers, dict(model.named_modules()))
            inject_lora(model, self.config, [known.get(name, name) for name in self.earlier_layers])
        return model

    def rebuild_base(self) -> nn.Module:
        """The adapted base without any link, rebuilt and checked.

        Raises:
            UserError: if the rebuilt base differs.
        """
        model = self.make_base()
        check_same_base(self.chain.base, describe_base(model, self.chain.base.name))
        return model

    def _write_base(self) -> None:
        """Writes the base, without any link, into the model."""
        weights = base_values(self.rebuild_base())
        for name, value in base_values(self.model).items():
            layout.copy_(value, weights[name])

    # ------------------------------------------------------------------ dtypes

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the adapted layers as a precision of this dtype will cast the model, before links are replayed on them.

        It upcasts only to float64, and then the whole model; a layer into which links are merged is never downcast, but with
        ``finished_links: auto`` they are stacked from here on, and the layer is cast. Other values are rounded to half
        precision, and keep their dtype: the model has the weights of a training in it, and computes in float32 without one.

        Raises:
            UserError: if sharded layers would have to be cast.
        """
        is_sharded = layout.is_model_sharded(self.model)
        if self.config.finished_links == "auto" and dtype.itemsize < 4 and self.merges:
            chain = self.chain
            if len(chain):
                self._write_base()
                self.forget_links(chain)
            for layer in self.layers.values():
                layer.begin_stack()
            self.replay(chain)
        for layer in self.layers.values():
            if dtype == torch.float64 or (layer.stack is not None and dtype.itemsize < 4):
                if layer.dtype != dtype and is_sharded:
                    expected, received = (str(one).removeprefix("torch.") for one in (layer.dtype, dtype))
                    raise UserError(
                        f"trainer.precision: the adapted layers were sharded in {expected}, and cannot be cast to {received}"
                    )
                cast_floats(layer, dtype)
        if dtype == torch.float64 and not is_sharded:
            self.model.double()
        if dtype.itemsize < 4 and not is_sharded:
            self._rounded_to = dtype
            round_floats(self.model, dtype)

    def upcast(self) -> None:
        """Casts half-precision tensors to float32, has 4-bit layers compute in it, and restores stacked links from the chain.

        What training has rounded stays rounded; finished links have the precision that they have in the chain.
        """
        cast_floats(self.model, torch.float32, half_only=True)
        quantized: list[Any] = [part for part in self.model.modules() if is_quantized(part)]
        for layer in quantized:
            layer.compute_dtype = torch.float32
        if not self.merges:
            chain = self.chain
            self.forget_links(chain)
            self.replay(chain)

    # ------------------------------------------------------------------ copies

    def copy_on_cpu(self) -> "AdaptedModel":
        """A copy on the CPU, with nothing around it, that can be changed while this one is trained."""
        other = copy.copy(self)
        other.model = deep_copy(self.model, device="cpu").cpu()
        other.trained, other.placement = copy.copy(self.trained), other._placement_of_model
        other.trained.model, other.trained.outer_module = other.model, None
        return other

    def merged_model(
        self,
        links: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        in_place: bool = False,
        is_rounded: bool = False,
    ) -> nn.Module:
        """A plain copy of the model with the chain merged into its weights: no LoRA layers, no cost at inference.

        If the model is sharded, the copy is made on the CPU, from the rebuilt base, and nothing is gathered. (With full
        fine-tuning the parameters are gathered: every process must call this.)

        Args:
            links: how many links, the finished ones first and then the current one; None: all. 0 is the base.
            dtype: to which each weight is rounded once its links are added; None: float32, whatever the model was trained in
                (float64 where that was float64); without links, the model's own.
            device: where the copy is; None: where the model is.
            in_place: this model is not needed any more: its memory is used, and it must not be used again.
            is_rounded: whether the base without links (0) is as a precision has rounded it for the training.

        Raises:
            UserError: if there are fewer links.
        """
        total = self.n_finished + 1
        links = total if links is None else links
        check_links(links, total)
        layers, placement, is_training = self.layers.values(), self.placement(), self.model.training
        added = self.full_chain().links if links == total else self.chain.truncate(links).links
        is_narrowed = any(layer.is_narrowed for layer in layers)  # then the base of a stack was rounded
        is_stacked = bool(layers) and not self.merges
        is_usable = not placement.is_sharded and (links == total or (is_stacked and (links > 0 or not is_narrowed)))
        compute_dtype = torch.promote_types(self.cast_dtype, torch.float32)
        devices = {parameter.device for parameter in self.model.parameters()}
        if is_usable:  # the model itself, and no rebuilt base
            model, extras = self.model, {} if links == total else self.extras_after(self.chain.truncate(links))
            added = added[-1:] if self.merges else added  # the others are in the weights
        else:
            extras = self.trained.copies() if links == total else added[-1].extras if added else {}
            if in_place:
                free(self.model)
            model = self.rebuild_base().train(is_training)
            if (links or is_rounded) and self.cast_dtype.itemsize < 4:
                cast_floats(model, self.cast_dtype)
            if device is None and not placement.is_sharded and len(devices) == 1:  # a rebuilt one is on the CPU
                device = devices.pop()
        dtype, in_place = compute_dtype if dtype is None and layers else dtype, in_place or not is_usable
        model = merge(
            model, added, compute_dtype, compute_device=placement.device, dtype=dtype, device=device, in_place=in_place
        )
        model.load_state_dict(extras, strict=False)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        return model
