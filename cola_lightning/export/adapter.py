"""A chain as one ordinary PEFT LoRA, of rank sum(r), for the base that it names."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.chain import Chain
from cola_lightning.chain.link import core_of_product
from cola_lightning.chain.peft import LINKS_KEY, PREFIX, TENSORS_NAME
from cola_lightning.chain.store import describe
from cola_lightning.errors import UserError
from cola_lightning.export.card import Card
from cola_lightning.export.verify import ExportOptions, ReferenceLogits
from cola_lightning.hub import quiet
from cola_lightning.lora.registry import is_linear
from cola_lightning.writing import whole_folder

LABELS_NAME = "labels.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}  # by the class' name


@dataclass(frozen=True)
class AdapterBase:
    """The base of an adapter.

    Attributes:
        model: the plain model without any link; for the comparison, the adapter is loaded into it.
        name: where PEFT finds it.
        where: its description in the comparison.
        saved: names, or dotted name endings, of modules that were fully trained, or are not in the named base.
        hints: for the user of the adapter, who loads the base.
        revision: on the hub.
        tokenizer: the tokenizer to write, too.
        labels: a classifier's labels, for which the adapter's own configuration has no place.
    """

    model: Any
    name: str
    where: str = ""
    saved: Sequence[str] = ()
    hints: Sequence[str] = ()
    revision: str | None = None
    tokenizer: Any = None
    labels: Sequence[str] | None = None


def export_adapter(
    chain: Chain,
    base: AdapterBase,
    options: ExportOptions,
    reference: ReferenceLogits | None = None,
    *,
    card: Card | None = None,
) -> list[str]:
    """Writes a chain as one ordinary PEFT LoRA.

    Args:
        chain: the chain, the live link included.
        base: the base on which it is used.
        options: the folder, the rank, and whether to compare.
        reference: the logits of the chain's module; None: no input is known, and nothing is compared.
        card: the model card to write, too.

    Returns:
        Lines to report: the rank, the errors of recompression, the comparison, and how the base is loaded.

    Raises:
        UserError: for an empty chain, values that an adapter cannot hold, and a folder that is not empty (no ``overwrite``).
        ExportError: if the adapter that is loaded again gives other logits.
    """
    if not len(chain):
        raise UserError("links: expected at least 1 for an adapter, received 0")
    factors, lines = concatenate(chain), []
    rank = total = sum(link.rank for link in chain.links)
    if options.max_rank is not None and options.max_rank < total:
        rank = options.max_rank
        for name, pair in factors.items():
            *smaller, error = compress(*pair, rank)
            factors[name] = (smaller[0], smaller[1])
            lines.append(f"{name}: relative error {error:.3g}")
    saved = saved_by_peft(base.model, base.saved)
    config = peft_config(base, list(factors), rank, saved)
    tensors = _values_saved(chain, base.model, saved)
    for name, pair in as_peft_weights(base.model, factors).items():
        tensors |= {f"{name}.lora_{factor}.weight": value for factor, value in zip("AB", pair, strict=True)}
    metadata = {LINKS_KEY: json.dumps(describe(chain.links, chain.base))} if rank == total else {}
    needed = next((str(offered) for offered in VLLM_RANKS if offered >= rank), f"more than it offers, {VLLM_RANKS[-1]}")
    lines.append(f"one adapter of rank {rank}: vLLM needs max_lora_rank {needed}")
    lines += [f"its base: {'; '.join(base.hints)}"] if base.hints else []
    with whole_folder(options.folder, overwrite=options.overwrite) as partial, quiet():
        config.save_pretrained(str(partial))
        written = {f"{PREFIX}{name}": value.clone().contiguous() for name, value in tensors.items()}
        save_file(written, partial / TENSORS_NAME, {"format": "pt"} | metadata)
        if base.labels is not None:  # no config.json: transformers would take the folder for a whole model
            (partial / LABELS_NAME).write_text(json.dumps(list(base.labels), ensure_ascii=False) + "\n", encoding="utf-8")
            lines.append(f"its labels are in {LABELS_NAME}, a list: give from_pretrained id2label=dict(enumerate(labels))")
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(partial)
        if card is not None:
            card.write(partial, f"PEFT adapter (LoRA of rank {rank})", _loading(config.task_type, base))
        if options.verify and reference is not None:
            from peft import PeftModel

            loaded = PeftModel.from_pretrained(base.model, str(partial))
            lines.append(reference.compare(loaded, "loaded again with peft", where=base.where, is_same=rank == total))
        else:
            lines.append("not compared" + (", for no input is known" if options.verify else ""))
    return lines


def _loading(task: str | None, base: AdapterBase) -> str:
    """How the user of a folder loads an adapter, in Python."""
    if task == "CAUSAL_LM":
        return 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("FOLDER")'
    if task == "SEQ_CLS":  # the base's own configuration may have others
        labels = base.labels or [f"LABEL_{k}" for k in range(base.model.config.num_labels)]
        auto = "AutoPeftModelForSequenceClassification"
        model = f'model = {auto}.from_pretrained("FOLDER", id2label=dict(enumerate(labels)))'
        return f"from peft import {auto}\n\nlabels = {list(labels)!r}\n{model}"
    return 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "FOLDER")  # base: the model without links'


# ---------------------------------------------------------------------- its factors


def concatenate(chain: Chain) -> dict[str, tuple[Tensor, Tensor]]:
    """The whole chain as one pair of factors per layer: A's rows and the scaled B's columns, link after link.

    Shape:
        A: sum(r) x in; B: out x sum(r), in float32.
    """
    factors = {}
    for name in chain.layers:
        lora_A = torch.cat([link.factors[name][0] for link in chain.links])
        lora_B = torch.cat([link.factors[name][1] * link.scaling for link in chain.links], dim=1)
        factors[name] = lora_A.float(), lora_B.float()
    return factors


def compress(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A by a smaller rank, and its relative error in the Frobenius norm.

    Shape:
        A: rank x in; B: out x rank.

    Source: Eckart and Young (1936).
    """
    q, core, p = core_of_product(lora_A, lora_B)
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    total = float(torch.linalg.vector_norm(values))
    error = float(torch.linalg.vector_norm(values[rank:])) / total if total else 0.0
    root = values[:rank].sqrt()
    missing = rank - len(root)  # a layer's side may be smaller than the rank
    smaller_A, smaller_B = (root[:, None] * (v[:rank] @ p.T)).float(), (q @ u[:, :rank] * root).float()
    return F.pad(smaller_A, (0, 0, 0, missing)), F.pad(smaller_B, (0, missing)), error


def as_peft_weights(base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in PEFT's shapes: a convolution's are kernels, of rank x in x kernel and out x rank x 1.

    Args:
        base: the plain model.
        factors: A and B by layer, as matrices.

    Raises:
        UserError: for a layer that PEFT does not adapt, or adapts differently.

    Source: ``peft.tuners.lora.layer``, ``_ConvNd.update_layer`` (0.21: it makes A without the layer's dilation).
    """
    weights, modules = dict(factors), dict(base.named_modules())
    for name, (lora_A, lora_B) in factors.items():
        layer = modules[name]
        is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
        if (is_convolution and set(layer.dilation) != {1}) or not (is_convolution or is_linear(layer)):
            raise UserError(
                f"format: expected merged, for PEFT has no LoRA, or another, for {name!r}, a {type(layer).__name__}"
                f"({layer.extra_repr()}); received peft"
            )
        if is_convolution:
            size = layer.kernel_size
            weights[name] = lora_A.reshape(-1, layer.in_channels, *size), lora_B[(..., *[None] * len(size))]
    return weights


# ---------------------------------------------------------------------- its configuration, and other values


def peft_config(base: AdapterBase, layers: list[str], rank: int, modules_to_save: list[str]) -> Any:
    """The ``LoraConfig`` of an adapter whose scaling is 1."""
    from peft import LoraConfig

    modules = dict(base.model.named_modules())
    return LoraConfig(
        task_type=_task(base.model),
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=rank,
        lora_alpha=rank,
        target_modules=_target_modules(layers, list(modules)),
        modules_to_save=modules_to_save or None,
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in layers),
        inference_mode=True,
    )


def _task(base: nn.Module) -> str | None:
    return next((task for ending, task in TASKS.items() if type(base).__name__.endswith(ending)), None)


def _target_modules(layers: list[str], modules: list[str]) -> list[str] | str:
    """``target_modules`` that match exactly these layers in PEFT: last parts of their names, else full names, else a regex."""
    for names in (sorted({name.rpartition(".")[2] for name in layers}), layers):
        endings = tuple(f".{name}" for name in names)
        if {name for name in modules if name in names or name.endswith(endings)} == set(layers):
            return names
    return "|".join(map(re.escape, layers))


def saved_by_peft(base: nn.Module, modules_to_save: Iterable[str]) -> list[str]:
    """The modules that PEFT loads whole from an adapter with these ``modules_to_save``: it matches the ends of names.

    Args:
        base: the plain model.
        modules_to_save: names or dotted name endings.

    Source: ``peft.utils.other._set_trainable``, and ``PeftModelForSequenceClassification``, which adds two endings.
    """
    requested = tuple(modules_to_save)
    names = [name for name, _ in base.named_modules() if name]
    wanted = tuple(name for name in names if name in requested or name.endswith(tuple(f".{one}" for one in requested)))
    return [name for name in names if name.endswith((*wanted, *(("classifier", "score") if _task(base) == "SEQ_CLS" else ())))]


def _values_saved(chain: Chain, base: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
    """The values of an adapter's saved modules: the trained ones, or else the base's.

    Raises:
        UserError: for a value elsewhere that training has changed: PEFT has no place for it.
    """
    state, trained = base.state_dict(), chain.links[-1].extras
    starts = tuple(f"{name}." for name in saved)
    values = {name: trained.get(name, value) for name, value in state.items() if name.startswith(starts)}
    if changed := [
        name for name, value in trained.items() if name in state.keys() - values.keys() and not torch.equal(state[name], value)
    ]:
        raise UserError(
            f"format: expected merged, for training has changed {changed[0]!r}, which an adapter cannot hold; received peft"
        )
    return values
