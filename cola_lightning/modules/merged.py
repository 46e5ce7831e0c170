"""The live link as a finished one, and the model with its links in its weights."""

import copy
import logging

import torch
from torch import nn

from cola_lightning.adapt import lora_layers, strip_lora, unstack
from cola_lightning.chain import Chain, Link, finish_link
from cola_lightning.modules.restore import RestoredChain, check_links
from cola_lightning.modules.running import keep_activations
from cola_lightning.modules.sharding import is_sharded
from cola_lightning.quantization import dequantize
from cola_lightning.schedule import Counters

log = logging.getLogger(__name__)


class MergedChain(RestoredChain):
    """The part of :class:`~cola_lightning.modules.COLAModule` that makes something of the links as they are."""

    activation_checkpointing: bool

    def live_link(self) -> Link:
        """The live link as it is now: what a knot would record."""
        return finish_link(
            self._layers,
            index=self.link,
            start_step=self.link_start.global_step,
            end_step=self._now.global_step,
            extras=self._extras(),
            metrics=self._metrics(),
            outside=self._outside(),
        )

    @property
    def _is_in_parts(self) -> bool:
        """Whether FSDP2 or FSDP1 has sharded the model."""
        return is_sharded(self.model) or self.is_wrapped_by_fsdp1

    @property
    def _now(self) -> Counters:
        trainer = self._attached_trainer
        return Counters(trainer.current_epoch, trainer.global_step) if trainer else self.link_start

    def merged_model(self, links: int | None = None) -> nn.Module:
        """A plain copy of the model with the chain in its weights: no LoRA layers, nothing left at inference.

        Args:
            links: how many links, the finished ones first and then the live one; None: all. 0 is the base.

        Raises:
            UserError: if there are not as many links.

        What is trained outside of ``self.model`` is not in the copy, and a warning says so.

        Where the model is sharded, the copy is made on the CPU, of the base made anew; nothing is gathered for it. (Where all
        is trained, all is gathered: every process must ask for it.)

        Returns:
            The model in float32, whatever it was trained in (in float64 where that was float64); where ``target_modules`` is
            null, in the dtype that it has.
        """
        self.configure_model()
        total = self.link + 1
        links = total if links is None else links
        check_links(links, self.link)
        self._check_not_on_meta()
        values = self.values()
        if outside := [name for name, p in values.items() if not name.startswith("model.") and p.requires_grad]:
            log.warning("merged_model: %s is trained outside of self.model, and not in the copy", " and ".join(outside))
        chain = self.chain.truncate(min(links, self.link))
        layers = self._layers.values()
        is_stacked = any(layer.stack is not None for layer in layers)
        is_narrowed = any(layer.is_narrowed for layer in layers)  # then the base of a stack is not what it was
        is_copied = not self._is_in_parts and (links == total or (is_stacked and (links > 0 or not is_narrowed)))
        if is_copied:
            model = copy.deepcopy(self.model)
            if links < total:
                for layer in lora_layers(model).values():
                    nn.init.zeros_(layer.lora_B)
                model.load_state_dict(self._extras_after(chain), strict=False)
        else:
            model = self._make_base_again()
            if links == total and layers:
                chain = Chain([*chain.links, self.live_link()])
            extras = chain.links[-1].extras if chain.links else {}
            model.load_state_dict(self._extras() if links == total else extras, strict=False)
            if links and is_narrowed:
                model.to(self._kept_dtype)
        unstack(model)
        dtype = torch.promote_types(self._kept_dtype, torch.float32)
        dequantize(model, dtype)
        if layers:
            model.to(dtype)
        if is_stacked or not is_copied:
            chain.replay(lora_layers(model), self.device)
        strip_lora(model, merge=True, dtype=dtype)
        if self.activation_checkpointing:
            keep_activations(model)
        return model.requires_grad_()
