"""A chain as one ordinary PEFT LoRA, of rank sum(r), for the base that it names: written, loaded again and compared."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cola_lightning.adapted_model import AdaptedModel
from cola_lightning.chain.chain import core_of_product
from cola_lightning.chain.peft import AdapterBase, concatenate, write_adapter
from cola_lightning.errors import UserError
from cola_lightning.export.card import FOLDER, Card
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.verify import digest, loading_again, reference_logits
from cola_lightning.lora.inject import is_in_matching_modules
from cola_lightning.lora.layer import is_quantized
from cola_lightning.lora.quantization import dequantize
from cola_lightning.merge import cast_floats, free
from cola_lightning.pretrained import TransformersBase
from cola_lightning.seeding import derive_seed, seeded
from cola_lightning.writing import atomic_folder

FUSED_OFF = "torch.backends.mha.set_fastpath_enabled(False)"


def export_adapter(model: TrainedModel, options: ExportOptions) -> list[str]:
    """Writes a chain as one ordinary PEFT LoRA.

    Args:
        model: the model, which is used up.
        options: the folder, the rank, and whether to compare.

    Returns:
        Lines to report: the errors of recompression, the rank, the base, and the comparison.

    Raises:
        UserError: for values that an adapter cannot hold, and a base that peft cannot load by its name, or not this one.
        ExportError: if the adapter that is loaded again gives other logits.
    """
    from peft import PeftModel

    adapted, named_base = model.adapted, model.named_base
    if options.base_folder is None and named_base is not None and not named_base.is_found_by_name:
        raise UserError(f"base_folder must be given: peft cannot load {model.base_name!r} by its name, only from a folder")
    dtype, is_stacked = adapted.cast_dtype, not adapted.merges
    adapted.upcast()  # so that the base without links is the one that was trained on
    reference = reference_logits(adapted.model, model.example) if options.verify else None
    if named_base is not None:
        base, code = _load_base(named_base, adapted, options.base_folder, dtype, model.tokenizer, is_stacked=is_stacked)
    else:
        plain, code = adapted.merged_model(0, in_place=True, is_rounded=True), "module.merged_model(0)"
        base = AdapterBase(plain, model.base_name, adapted.config.modules_to_save)
    chain, lines = model.chain.without_records(), list[str]()
    factors = concatenate(chain)
    total = max(lora_A.shape[-2] for lora_A, _ in factors.values())
    rank = min(total, options.max_rank or total)
    for name, pair in factors.items():
        if pair[0].shape[-2] > rank:
            lora_A, lora_B, error = compress(*pair, rank)
            factors[name] = lora_A, lora_B
            lines.append(f"{name}: relative error {error:.3g}")
    lines += [f"one adapter of rank {rank}", f"its base: {code}"]
    if dtype.itemsize < 4 and not is_stacked and options.base_folder is None:
        half = str(dtype).removeprefix("torch.")
        lines.append(f"in training, this base was rounded to {half}, except the adapted layers; base_folder writes it so")
    if reference is not None:
        reference.round_buffers(base.model)
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        write_adapter(partial, chain, base, factors)
        if (labels := chain.base.labels) is not None:  # no config.json: transformers would take the folder for a whole model
            (partial / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        loading = f'base = {code}\nmodel = PeftModel.from_pretrained(base, "{FOLDER}")'
        loading = f"import transformers\nfrom peft import PeftModel\n\n{loading}"
        if any(isinstance(part, nn.TransformerEncoderLayer) for part in base.model.modules()):
            lines.append(f"before it is used: {FUSED_OFF}, because torch's fused encoder layers ignore PEFT's adapters")
            loading = f"{loading}\n\nimport torch\n\n{FUSED_OFF}  # torch's fused encoder layers ignore PEFT's adapters"
        Card(model, options.license).write(partial, f"PEFT adapter (LoRA of rank {rank})", loading)
        if reference is None:
            return [*lines, "not compared" + (", because no input is known" if options.verify else "")]
        with loading_again():
            loaded = PeftModel.from_pretrained(base.model, str(partial))
        mha = torch.backends.mha
        with ExitStack() as after:
            after.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
            return [*lines, reference.compare(loaded, "loaded again with peft", is_same=rank == total)]


# ---------------------------------------------------------------------- its base


def _load_base(
    named_base: TransformersBase,
    adapted: AdaptedModel,
    folder: Path | None,
    dtype: torch.dtype,
    tokenizer: Any,
    *,
    is_stacked: bool,
) -> tuple[AdapterBase, str]:
    """Loads the base as a user of the adapter does: by its name, or from a folder, to which it is written first.

    Its values are compared with those that were trained on, and get their rounding. The two bases are in memory one after the
    other.

    Args:
        named_base: the base by its name.
        adapted: the module's adapted model, which is used up.
        folder: a folder for the base; None: PEFT finds it by its name.
        dtype: the dtype to which a precision cast the base.
        tokenizer: the module's, which is written to the folder too.
        is_stacked: whether the precision cast the adapted layers too.

    Returns:
        The base, and the code that loads it.

    Raises:
        UserError: if values differ.
    """
    quantized = [f"{name}.weight" for name, part in adapted.model.named_modules() if is_quantized(part)]
    base = adapted.merged_model(0, in_place=True, is_rounded=True)
    modules_to_save = list(adapted.config.modules_to_save)
    new_modules = named_base.new_modules(base, named_base.new_weights)
    not_in_files = [*modules_to_save, *new_modules, *(quantized if folder else ())]
    values, wide = base.state_dict(), next(base.parameters()).dtype
    replacements = {name: value for name, value in values.items() if is_in_matching_modules(name, not_in_files)}
    replacements |= adapted.base_weights or {}
    digests = {name: digest(value) for name, value in values.items()}
    if folder is not None:
        named_base = named_base.write(folder, base, tokenizer)
    del values
    free(base)
    with seeded(derive_seed(adapted.seed, "another")):  # newly initialised weights are not the module's
        loaded, new_weights = named_base.load_again(is_quantized=bool(quantized) and folder is None)
    dequantize(loaded, wide)
    cast_floats(loaded.eval(), wide)
    modules_to_save += named_base.new_modules(loaded, new_weights)
    different = _copy_values(loaded, digests, replacements, dtype)
    if different := [name for name in different if not is_in_matching_modules(name, [*modules_to_save, *quantized])]:
        raise UserError(
            f"format: peft cannot be used. The adapter would name {named_base.model_name!r} as its base, but {different[0]!r} "
            "of the base that was trained on differs from it. Use merged"
        )
    half = str(dtype).removeprefix("torch.") if dtype.itemsize < 4 and is_stacked else None
    code = named_base.loading_code(half or named_base.dtype, is_quantized=bool(quantized))
    return named_base.adapter_base(loaded, modules_to_save), code


def _copy_values(
    loaded: nn.Module, digests: Mapping[str, bytes], replacements: Mapping[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """Gives a base that was loaded by its name the values that were trained on.

    Args:
        loaded: the loaded base.
        digests: of the values that were trained on, by name; the loaded values may equal them once they are rounded.
        replacements: values that were trained on, by name, for loaded values that differ.
        dtype: the dtype to which a precision may have rounded.

    Returns:
        The names of the values that differ.
    """
    state = loaded.state_dict()
    different = sorted(digests.keys() - state.keys())
    for name, value in state.items():
        if digest(value) == digests.get(name):
            continue
        rounded = value.to(dtype).to(value.dtype)
        if is_different := digest(rounded) != digests.get(name):
            different.append(name)
        value.copy_(replacements.get(name, value) if is_different else rounded)
    return different


# ---------------------------------------------------------------------- a smaller rank


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
