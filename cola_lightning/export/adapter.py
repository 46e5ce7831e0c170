"""A chain as one ordinary PEFT LoRA, of rank sum(r), for the base that it names."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.chain import Chain, core_of_product, is_of_experts
from cola_lightning.chain.peft import LINKS_KEY, PREFIX, TENSORS_NAME
from cola_lightning.errors import UserError
from cola_lightning.export.verify import ExportOptions, digest_of, loading_again, reference_logits
from cola_lightning.lora.experts import is_experts
from cola_lightning.lora.inject import is_in_matching_modules, is_linear
from cola_lightning.lora.layer import is_quantized
from cola_lightning.lora.quantization import dequantize
from cola_lightning.merge import cast_floats, free
from cola_lightning.seeding import derive_seed, seeded
from cola_lightning.writing import atomic_folder

# Names of layers that PEFT, in addition to experts, takes for those that transformers 4 had for each expert.
# Source: ``peft.utils.transformers_weight_conversion`` (0.21).
RENAMED = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
FOLDER = "path/to/this/folder"  # in the code that loads an export, on its card
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}  # PEFT's names


@dataclass
class AdapterBase:
    """The base of an adapter.

    Attributes:
        model: the plain model without any link; for the comparison, the adapter is loaded into it.
        name: where PEFT finds it.
        saved: names, or dotted name endings, of modules that were fully trained, or are not in the named base.
        code: Python code that makes it.
        revision: on the hub.
        task: PEFT's name for its task; None: another.
    """

    model: Any
    name: str
    saved: Sequence[str]
    code: str
    revision: str | None = None
    task: str | None = None


def export_adapter(
    module: Any, adapted: AdaptedModel, chain: Chain, options: ExportOptions, write_card: Callable[[Path, str, str], None]
) -> list[str]:
    """Writes a chain as one ordinary PEFT LoRA.

    Args:
        module: the exported module.
        adapted: its adapted model, which is upcast in place.
        chain: the chain, the current link included.
        options: the folder, the rank, and whether to compare.
        write_card: writes the model card: of a folder, a kind of export, and code that loads it.

    Returns:
        Lines to report: the errors of recompression, the rank, the base, and the comparison.

    Raises:
        UserError: for values that an adapter cannot hold, and a base that peft cannot load by its name, or not this one.
        ExportError: if the adapter that is loaded again gives other logits.
    """
    from peft import PeftModel

    if options.base_folder is None and module.named_base is not None and not module.named_base.is_found_by_name:
        raise UserError(f"base_folder must be given: peft cannot load {module.base_name!r} by its name, only from a folder")
    dtype = adapted.cast_dtype
    adapted.upcast()  # so that the base without links is the one that was trained on
    reference = reference_logits(adapted.model, module.example_input_array) if options.verify else None
    if module.named_base is not None:
        base = _named_base(module, adapted, options.base_folder, dtype)
    else:
        model = adapted.merged_model(0, in_place=True)
        base = AdapterBase(model, module.base_name, module.lora_config.modules_to_save, "module.merged_model(0)")
    factors, lines = concatenate(chain), []
    total = max(lora_A.shape[-2] for lora_A, _ in factors.values())
    rank = min(total, options.max_rank or total)
    for name, pair in factors.items():
        if pair[0].shape[-2] > rank:
            lora_A, lora_B, error = compress(*pair, rank)
            factors[name] = lora_A, lora_B
            lines.append(f"{name}: relative error {error:.3g}")
    experts = [name for name, (lora_A, _) in factors.items() if is_of_experts(lora_A)]
    ranks = {f"^{re.escape(name)}": A.shape[-2] for name, (A, _) in factors.items() if A.shape[-2] != rank}
    config = peft_config(base, [name for name in factors if name not in experts], experts, rank, ranks)
    tensors = _values_saved(chain, base.model, config.modules_to_save or ())
    for name, (lora_A, lora_B) in as_peft_weights(base.model, factors).items():
        tensors |= {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}
    metadata = {LINKS_KEY: json.dumps(chain.describe())} if rank == total else {}
    lines += [f"one adapter of rank {rank}", f"its base: {base.code}"]
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        config.save_pretrained(str(partial))
        written = {f"{PREFIX}{name}": value.clone().contiguous() for name, value in tensors.items()}
        save_file(written, partial / TENSORS_NAME, {"format": "pt"} | metadata)
        if module.labels_of_base is not None:  # no config.json: transformers would take the folder for a whole model
            labels = json.dumps(module.labels_of_base, ensure_ascii=False)
            (partial / "labels.json").write_text(f"{labels}\n", encoding="utf-8")
        loading = f'base = {base.code}\nmodel = PeftModel.from_pretrained(base, "{FOLDER}")'
        loading = f"import transformers\nfrom peft import PeftModel\n\n{loading}"
        write_card(partial, f"PEFT adapter (LoRA of rank {rank})", loading)
        if reference is None:
            return [*lines, "not compared" + (", because no input is known" if options.verify else "")]
        with loading_again():
            loaded = PeftModel.from_pretrained(base.model, str(partial))
        return [*lines, reference.compare(loaded, "loaded again with peft", is_same=rank == total)]


# ---------------------------------------------------------------------- its base


def _named_base(module: Any, adapted: AdaptedModel, folder: Path | None, dtype: torch.dtype) -> AdapterBase:
    """The base as a user of the adapter loads it, by its name; if a folder for it is given, it is written there.

    Its values are compared with those that were trained on, and get their rounding. The two bases are in memory one after the
    other.

    Raises:
        UserError: if values differ.
    """
    import transformers

    in_4_bits = [f"{name}.weight" for name, part in adapted.model.named_modules() if is_quantized(part)]
    base: Any = adapted.merged_model(0, in_place=True)
    pretrained, fields = module.named_base, _fields_of(module, base)
    whole = module.lora_config.modules_to_save
    saved = [*whole, *pretrained.new_modules(base, module.new_weights), *(in_4_bits if folder else ())]
    trained, wide = base.state_dict(), next(base.parameters()).dtype
    known = {name: value for name, value in trained.items() if is_in_matching_modules(name, saved)} | (
        adapted.base_weights or {}
    )
    digests = {name: digest_of(value) for name, value in trained.items()}
    if folder is not None:
        pretrained = _in_folder(folder, base, module, pretrained)
    del trained
    free(base)
    with seeded(derive_seed(module.seed, "another")):  # newly initialised weights are not the module's
        named, new_weights = pretrained.model_and_new_weights(getattr(transformers, module.auto_class), **fields)
    saved = [*whole, *pretrained.new_modules(named, new_weights)]
    if in_4_bits and folder is None:
        module.quantize_base(named)
        dequantize(named, wide)
    cast_floats(named.eval(), wide)
    different = sorted(digests.keys() - named.state_dict().keys())
    for name, value in named.state_dict().items():
        rounded = (value, value.to(dtype).to(value.dtype))  # the second: as a precision may have cast it
        found = next((one for one in rounded if digest_of(one) == digests.get(name)), None)
        different += [name] if found is None else []
        value.copy_(known.get(name, value) if found is None else found)
    if different := [name for name in different if not is_in_matching_modules(name, [*saved, *in_4_bits])]:
        raise UserError(
            f"format: peft cannot be used. The adapter would name {pretrained.name!r} as its base, but {different[0]!r} "
            f"of this {type(module).__name__}'s base differs from it. Use merged"
        )
    loaded_in = str(dtype).removeprefix("torch.") if dtype.itemsize < 4 else pretrained.dtype
    code = _code_of(module, pretrained, {"dtype": loaded_in} | fields, is_in_4_bits=bool(in_4_bits))
    name = os.path.expanduser(pretrained.model_name)
    return AdapterBase(named, name, saved, code, pretrained.revision, TASKS.get(module.auto_class))


def _fields_of(module: Any, base: Any) -> dict[str, Any]:
    """The fields of a classifier's configuration with which it is loaded: how many labels, and where a text ends."""
    fields = {name: value for name, value in module.model_fields().items() if name == "num_labels"}
    if fields and base.config.pad_token_id is not None:
        fields["pad_token_id"] = base.config.pad_token_id
    return fields


def _in_folder(folder: Path, base: Any, module: Any, pretrained: Any) -> Any:
    """Writes the base to a folder, and returns where it is then; a folder that is not empty must hold it already."""
    if not folder.is_dir() or not any(folder.iterdir()):
        with atomic_folder(folder) as partial:
            cast_floats(base, getattr(torch, pretrained.dtype))
            base.save_pretrained(partial)
            module.tokenizer.save_pretrained(partial)
    return replace(pretrained, model_name=str(folder.absolute()), revision=None, gguf_file=None)


def _code_of(module: Any, pretrained: Any, fields: dict[str, Any], *, is_in_4_bits: bool) -> str:
    """The code that loads the base."""
    given = fields | ({"revision": pretrained.revision} if pretrained.revision else {})
    given |= {"id2label": dict(enumerate(module.labels_of_base))} if module.labels_of_base else {}
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    if is_in_4_bits:  # de-quantised to compare
        quantization = f"load_in_4bit=True, bnb_4bit_quant_type={module.quantization!r}"
        arguments += f", quantization_config=transformers.BitsAndBytesConfig({quantization})"
    return f"transformers.{module.auto_class}.from_pretrained({os.path.expanduser(pretrained.model_name)!r}, {arguments})"


# ---------------------------------------------------------------------- its factors


def concatenate(chain: Chain) -> dict[str, tuple[Tensor, Tensor]]:
    """The whole chain as one pair of factors per layer: A's rows and the scaled B's columns, link after link.

    Shape:
        A: sum(r) x in; B: out x sum(r), in float32.
    """
    factors = {}
    for name in chain.layers:
        lora_A = torch.cat([link.factors[name][0] for link in chain.links], dim=-2)
        lora_B = torch.cat([link.factors[name][1] * link.scaling(name) for link in chain.links], dim=-1)
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
    error = float(torch.linalg.vector_norm(values[..., rank:])) / total if total else 0.0
    root = values[..., :rank].sqrt()
    missing = rank - root.shape[-1]  # a layer's side may be smaller than the rank
    smaller_A = (root[..., None] * (v[..., :rank, :] @ p.mT)).float()
    smaller_B = (q @ u[..., :rank] * root[..., None, :]).float()
    return F.pad(smaller_A, (0, 0, 0, missing)), F.pad(smaller_B, (0, missing)), error


def as_peft_weights(base: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors by PEFT's names and in its shapes.

    A convolution's are kernels, of rank x in x kernel and out x rank x 1. Those of experts are matrices: in A the rows of an
    expert come one after the other, in B the columns of a rank; they belong to wrappers of the experts module, one around the
    other, the last parameter's outside.

    Args:
        base: the plain model.
        factors: A and B by layer, as matrices.

    Raises:
        UserError: for a layer that PEFT does not adapt, or adapts differently.

    Source: ``peft.tuners.lora.layer``, ``_ConvNd.update_layer`` (0.21: it makes A without the layer's dilation) and
    ``ParamWrapper``.
    """
    weights = dict(factors)
    for name, (lora_A, lora_B) in factors.items():
        if is_of_experts(lora_A):
            del weights[name]
            parent, _, own = name.rpartition(".")
            parameters = dict(base.get_submodule(parent).named_parameters(recurse=False))
            wrapped = [key for key in parameters if f"{parent}.{key}" in factors]
            wrapper = parent + ".base_layer" * (len(wrapped) - 1 - wrapped.index(own))
            weights[wrapper] = lora_A.flatten(end_dim=1), lora_B.permute(1, 2, 0).flatten(start_dim=1)
            continue
        layer: Any = base.get_submodule(name)
        is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d)
        if (is_convolution and set(layer.dilation) != {1}) or not (is_convolution or is_linear(layer)):
            what = f"PEFT has no LoRA, or another, for {name!r}, a {layer}"
            raise UserError(f"format: {what}. Use merged")
        if is_convolution:
            size = layer.kernel_size
            weights[name] = lora_A.reshape(-1, layer.in_channels, *size), lora_B[(..., *[None] * len(size))]
    return weights


# ---------------------------------------------------------------------- its configuration, and other values


def peft_config(base: AdapterBase, layers: list[str], experts: list[str], rank: int, ranks: dict[str, int]) -> Any:
    """The ``LoraConfig`` of an adapter whose scaling is 1; ``ranks`` are those of the layers that have others, by pattern.

    ``target_modules`` are the last parts of the layers' names, if these match no other layer, else an expression for the full
    names; ``target_parameters`` are the names of the experts' projections, and the weights of layers that PEFT would take for
    experts by their names, in addition to any (``RENAMED``).
    """
    from peft import LoraConfig

    modules = dict(base.model.named_modules())
    has_experts = any(map(is_experts, modules.values()))
    renamed = [name for name in layers if has_experts and name.rpartition(".")[2] in RENAMED]
    layers = [name for name in layers if name not in renamed]
    endings = sorted({name.rpartition(".")[2] for name in layers})
    found = {name for name in modules if name.rpartition(".")[2] in endings}
    return LoraConfig(
        task_type=base.task,
        base_model_name_or_path=base.name,
        revision=base.revision,
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=endings if found == set(layers) else "|".join(map(re.escape, layers)),
        target_parameters=[*experts, *(f"{name}.weight" for name in renamed)] or None,
        modules_to_save=saved_by_peft(base) or None,
        fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in layers),
        inference_mode=True,
    )


def saved_by_peft(base: AdapterBase) -> list[str]:
    """The modules that PEFT loads whole from an adapter of this base: it matches the ends of names.

    Source: ``peft.utils.other._set_trainable``, and ``PeftModelForSequenceClassification``, which adds two endings.
    """
    names = [name for name, _ in base.model.named_modules() if name]
    wanted = [name for name in names if f".{name}".endswith(tuple(f".{one}" for one in base.saved))]
    added = ("classifier", "score") if base.task == "SEQ_CLS" else ()
    return [name for name in names if name.endswith((*wanted, *added))]


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
        raise UserError(f"format: training has changed {changed[0]!r}, which an adapter cannot store. Use merged")
    return values
