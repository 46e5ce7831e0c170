"""A chain merged into a plain model: a Hugging Face folder, or a state dict."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cola_lightning.errors import ExportError
from cola_lightning.export.card import Card
from cola_lightning.export.verify import ExportOptions, ReferenceLogits
from cola_lightning.hub import quiet
from cola_lightning.writing import whole_folder

STATE_DICT_NAME = "model.safetensors"


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is written and loaded by transformers; other libraries' ``save_pretrained`` has arguments of its own."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def export_merged(
    model: Any,
    options: ExportOptions,
    reference: ReferenceLogits | None = None,
    *,
    tokenizer: Any = None,
    card: Card | None = None,
) -> str:
    """Writes a plain model: a Hugging Face folder with its tokenizer, or else the state dict in ``model.safetensors``.

    Args:
        model: the merged model, in the dtype to be written.
        options: the folder, and whether to compare.
        reference: the logits of the chain's module; None: no input is known, and only weights are compared.
        tokenizer: the tokenizer to write, too.
        card: the model card to write, too, in a Hugging Face folder.

    Returns:
        The result of the comparison, as a line.

    Raises:
        UserError: for a folder that is not empty, without ``overwrite``.
        ExportError: if the model that is loaded again differs.
    """
    with whole_folder(options.folder, overwrite=options.overwrite) as partial, quiet():
        if is_of_transformers(model):
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if card is not None:
                name = type(model).__name__
                loading = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")'
                card.write(partial, "merged model", loading)
        else:  # clones: a tied weight is written under each of its names, so that load_state_dict finds them all
            tensors = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
            save_file(tensors, partial / STATE_DICT_NAME)
        return _compare(model, _load_again(model, partial), reference) if options.verify else "not compared"


def _load_again(model: Any, folder: Path) -> nn.Module:
    """The model that a user of the folder gets, without this package."""
    if is_of_transformers(model):
        again: nn.Module = type(model).from_pretrained(folder, dtype=model.dtype)
        return again
    again = copy.deepcopy(model)
    again.load_state_dict(load_file(folder / STATE_DICT_NAME))
    return again


def _compare(written: nn.Module, again: nn.Module, reference: ReferenceLogits | None) -> str:
    """Compares the loaded model with the written one, to the bit, and with the module's logits."""
    ours = again.state_dict()
    for name, value in written.state_dict().items():
        if not torch.equal(ours[name], value):
            raise ExportError(f"{name!r} was loaded again with another value than was written")
    if reference is None:
        return "loaded again, the weights are the same to the bit; no logits were compared, for no input is known"
    return reference.compare(again, "loaded again")
