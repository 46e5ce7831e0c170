"""A chain as one ordinary PEFT LoRA, of rank sum(r), for the base that it names: written, loaded again and compared."""

import json
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_lightning.chain.chain import core_of_product
from cola_lightning.chain.peft import AdapterBase, concatenate, write_adapter
from cola_lightning.export.card import FOLDER, save_tokenizer, write_card
from cola_lightning.export.model import TrainedModel
from cola_lightning.export.options import ExportOptions
from cola_lightning.export.verify import loading_again, reference_logits
from cola_lightning.lora.inject import is_in_matching_modules
from cola_lightning.lora.layer import is_quantized_model
from cola_lightning.pretrained import TASKS
from cola_lightning.writing import atomic_folder


def export_adapter(model: TrainedModel, options: ExportOptions) -> list[str]:
    """Writes a chain as one ordinary PEFT LoRA.

    Args:
        model: the model, which is used up.
        options: the folder, the rank, and whether to compare.

    Returns:
        Lines to report: the errors of recompression, the rank, the base, and the comparison.

    Raises:
        UserError: for values that an adapter cannot hold.
        ExportError: if the adapter that is loaded again gives other logits.
    """
    from peft import PeftModel

    adapted = model.adapted
    dtype, is_stacked = adapted.cast_dtype, not adapted.merges
    adapted.upcast()  # so that the base without links is the one that was trained on
    reference = reference_logits(adapted.model, model.example) if options.verify else None
    base, code = _base_of(model, dtype if is_stacked else torch.float32)
    chain = model.chain
    factors = concatenate(chain)
    total, lines = max(lora_A.shape[-2] for lora_A, _ in factors.values()), list[str]()
    rank = min(total, options.max_rank or total)
    for name, (lora_A, lora_B) in factors.items():
        if lora_A.shape[-2] > rank:
            smaller_A, smaller_B, error = compress(lora_A, lora_B, rank)
            factors[name] = smaller_A, smaller_B
            lines.append(f"{name}: relative error {error:.3g}")
    lines += [f"one adapter of rank {rank}", f"its base: {code}"]
    if base.name is None:
        lines.append(f"peft cannot load {model.base_name!r} by its name: export the same run with --links 0 --format merged")
    if dtype.itemsize < 4 and not is_stacked:
        half = str(dtype).removeprefix("torch.")
        lines.append(f"in training, this base was rounded to {half}, except the adapted layers")
    with atomic_folder(options.folder, overwrite=options.overwrite) as partial:
        write_adapter(partial, chain, base, factors)
        if (labels := chain.base.labels) is not None:  # no config.json: transformers would take the folder for a whole model
            (partial / "labels.json").write_text(json.dumps(labels, ensure_ascii=False) + "\n", encoding="utf-8")
        loading = f'base = {code}\nmodel = PeftModel.from_pretrained(base, "{FOLDER}")'
        loading = f"import transformers\nfrom peft import PeftModel\n\n{loading}"
        write_card(partial, model, f"PEFT adapter (LoRA of rank {rank})", loading)
        save_tokenizer(model.tokenizer, partial)
        if reference is None:
            return [*lines, "not compared" + (", because no input is known" if options.verify else "")]
        with loading_again():
            loaded = PeftModel.from_pretrained(base.model, str(partial))
        return [*lines, reference.compare(loaded, "loaded again with peft", is_same=rank == total)]


def _base_of(model: TrainedModel, half: torch.dtype) -> tuple[AdapterBase, str]:
    """The base that was trained on, without links, as the adapter names it.

    Args:
        model: the model, which is used up.
        half: the half precision to which all of the base was rounded, if any.

    Returns:
        The base, and the code that loads it.
    """
    adapted, named_base = model.adapted, model.named_base
    is_quantized, saved = is_quantized_model(adapted.model), list(adapted.config.modules_to_save)
    base: Any = adapted.merged_model(0, in_place=True, is_rounded=True)
    if named_base is None:
        return AdapterBase(base, model.base_name, saved), "module.merged_model(0)"
    new = named_base.new_modules(base, named_base.new_weights)
    saved += [name for name in new if not is_in_matching_modules(name, saved)]
    dtype = str(half).removeprefix("torch.") if half.itemsize < 4 else named_base.dtype
    name = os.path.expanduser(named_base.model_name) if named_base.is_found_by_name else None
    found = AdapterBase(base, name, saved, named_base.revision, TASKS.get(named_base.auto_class))
    return found, named_base.loading_code(dtype, is_quantized=is_quantized)


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
