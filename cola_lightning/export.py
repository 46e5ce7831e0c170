"""Exports of a chain: merged into a plain model, or as one PEFT adapter; each is loaded again and compared."""

import copy
import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cola_lightning.chain import Chain
from cola_lightning.chain.peft import (
    as_peft_weights,
    compress,
    concatenate,
    peft_config,
    saved_by_peft,
    write_adapter,
)
from cola_lightning.chain.store import describe, write_files
from cola_lightning.errors import ExportError, OutsideError, UserError, one_line
from cola_lightning.hub import quiet
from cola_lightning.lora.inject import lies_in
from cola_lightning.model_card import Card
from cola_lightning.probe import Probe
from cola_lightning.writing import check_free, check_writable, whole_folder

STATE_DICT_NAME, LABELS_NAME = "model.safetensors", "labels.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

Format = Literal["merged", "peft", "chain"]


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, see :meth:`~cola_lightning.COLAModule.export`.

    Attributes:
        folder: the output folder.
        format: the format.
        dtype: for merged.
        max_rank: for peft.
        base_folder: for peft: the folder for its base.
        license: for the model card.
        verify: load the export, and compare.
        overwrite: replace a folder that is not empty.
    """

    folder: Path
    format: Format
    dtype: str | None = None
    max_rank: int | None = None
    base_folder: Path | None = None
    license: str | None = None
    verify: bool = True
    overwrite: bool = False

    def check(self) -> None:
        """Refuses incompatible options, and folders that cannot be written, before anything is loaded.

        Raises:
            UserError: naming the option.
        """
        for option, its in (("dtype", "merged"), ("max_rank", "peft"), ("base_folder", "peft")):
            if getattr(self, option) is not None and self.format != its:
                raise UserError(f"{option}: expected --format {its} beside it, received {self.format}")
        if self.max_rank is not None and self.max_rank < 1:
            raise UserError(f"max_rank: expected at least 1, received {self.max_rank}")
        if self.format == "peft" and importlib.util.find_spec("peft") is None:
            raise UserError("format: expected the package peft, received none: pip install peft")
        check_free(self.folder, overwrite=self.overwrite)
        check_writable("output", self.folder, is_replaced=True)
        if (base := self.base_folder) is not None and not _holds_files(base):
            check_free(base, field="base_folder")
            check_writable("base_folder", base, is_replaced=True)
        places = [place.resolve() for place in (self.folder, self.base_folder or self.folder)]
        if self.base_folder is not None and any(one.is_relative_to(other) for one, other in (places, places[::-1])):
            raise UserError(f"base_folder: expected a folder apart from the output, received {str(self.base_folder)!r}")


def _holds_files(folder: Path) -> bool:
    with suppress(OSError):  # which check_free reports
        return folder.is_dir() and any(folder.iterdir())
    return False


def check_no_base(folder: Path, name: str) -> None:
    """Refuses an output in which the files of the base lie: without them, no checkpoint of it could be loaded again.

    Raises:
        UserError: naming the option.
    """
    base = Path(os.path.expanduser(name))
    if name and os.path.isdir(base) and base.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"output: expected a folder that does not hold the base, received {str(folder)!r}")


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is written and loaded by transformers; other libraries' ``save_pretrained`` has arguments of its own."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


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
    """

    model: Any
    name: str
    where: str = ""
    saved: Sequence[str] = ()
    hints: Sequence[str] = ()
    revision: str | None = None
    tokenizer: Any = None


def export_merged(
    model: Any, options: ExportOptions, probe: Probe | None = None, *, tokenizer: Any = None, card: Card | None = None
) -> str:
    """Writes a plain model: a Hugging Face folder with its tokenizer, or else the state dict in ``model.safetensors``.

    Args:
        model: the merged model, in the dtype to be written.
        options: the folder, and whether to compare.
        probe: inputs and the logits of the chain's module; None: no input is known, and only weights are compared.
        tokenizer: the tokenizer to write, too.
        card: the model card to write, too, in a Hugging Face folder.

    Returns:
        The result of the comparison, as a line.

    Raises:
        UserError: for a folder that is not empty, without ``overwrite``, and for a model whose state is not of tensors alone.
        ExportError: if the model that is loaded again differs.
    """
    if other := [(name, type(value)) for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise UserError(
            "format: expected chain for a model whose state is not of tensors alone, received merged, and "
            f"{other[0][0]!r}, a {other[0][1].__name__}"
        )
    with whole_folder(options.folder, overwrite=options.overwrite) as partial, quiet():
        if is_of_transformers(model):
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if card is not None:
                name = type(model).__name__
                card.write(
                    partial, "merged model", f'from transformers import {name}\n\nmodel = {name}.from_pretrained("FOLDER")'
                )
        else:  # clones: a tied weight is written under each of its names, so that load_state_dict finds them all
            tensors = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
            save_file(tensors, partial / STATE_DICT_NAME)
        return _compare(model, _load_again(model, partial), probe) if options.verify else "not compared"


def _load_again(model: Any, folder: Path) -> nn.Module:
    """The model that a user of the folder gets, without this package."""
    if is_of_transformers(model):
        again: nn.Module = type(model).from_pretrained(folder, dtype=model.dtype)
        return again
    again = copy.deepcopy(model)
    again.load_state_dict(load_file(folder / STATE_DICT_NAME))
    return again


def _compare(written: nn.Module, again: nn.Module, probe: Probe | None) -> str:
    """Compares the loaded model with the written one, to the bit, and with the module's logits."""
    ours = again.state_dict()
    for name, value in written.state_dict().items():
        if not torch.equal(ours[name], value):
            raise ExportError(f"{name!r} was loaded again with another value than was written")
    if probe is None:
        return "loaded again, the weights are the same to the bit; no logits were compared, for no input is known"
    return probe.compare(again, "loaded again")


def export_adapter(
    chain: Chain,
    base: AdapterBase,
    options: ExportOptions,
    probe: Probe | None = None,
    *,
    card: Card | None = None,
    labels: Sequence[str] | None = None,
) -> list[str]:
    """Writes a chain as one ordinary PEFT LoRA, of rank sum(r).

    Args:
        chain: the chain, the live link included.
        base: the base on which it is used.
        options: the folder, the rank, and whether to compare.
        probe: inputs and the logits of the chain's module; None: no input is known, and nothing is compared.
        card: the model card to write, too.
        labels: a classifier's labels, written beside the adapter, whose own configuration has no place for them.

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
            lora_A, lora_B, error = compress(*pair, rank)
            factors[name] = lora_A, lora_B
            lines.append(f"{name}: relative error {error:.3g}")
    weights = as_peft_weights(base.model, factors)
    saved = saved_by_peft(base.model, factors, base.saved)
    values = _values_saved(chain, base.model, saved)
    config = peft_config(base.model, list(factors), rank, saved, base.name, base.revision)
    lines.append(f"one adapter of rank {rank}: vLLM needs max_lora_rank {_vllm_rank(rank)}")
    lines += [f"its base: {'; '.join(base.hints)}"] if base.hints else []
    with whole_folder(options.folder, overwrite=options.overwrite) as partial, quiet():
        write_adapter(partial, weights, values, config, describe(chain.links, chain.base) if rank == total else None)
        if labels is not None:  # no config.json: transformers would take the folder for a whole model
            (partial / LABELS_NAME).write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", encoding="utf-8")
            lines.append(f"its labels are in {LABELS_NAME}, a list: give from_pretrained id2label=dict(enumerate(labels))")
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(partial)
        if card is not None:
            loading = _loading_of_adapter(config.task_type, base.model, labels)
            card.write(partial, f"PEFT adapter (LoRA of rank {rank})", loading)
        if not options.verify or probe is None:
            lines.append("not compared" + (", for no input is known" if options.verify else ""))
        else:
            loaded = _with_adapter(base.model, partial)
            lines.append(probe.compare(loaded, "loaded again with peft", where=base.where, is_same=rank == total))
    return lines


def _loading_of_adapter(task: str | None, base: Any, labels: Sequence[str] | None) -> str:
    """How the user of a folder loads an adapter, in Python."""
    if task == "CAUSAL_LM":
        return 'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("FOLDER")'
    if task == "SEQ_CLS":  # the base's own configuration may have others
        auto = "AutoPeftModelForSequenceClassification"
        known = "" if labels is None else f"labels = {list(labels)!r}\n"
        given = f"num_labels={base.config.num_labels}" if labels is None else "id2label=dict(enumerate(labels))"
        return f'from peft import {auto}\n\n{known}model = {auto}.from_pretrained("FOLDER", {given})'
    return 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, "FOLDER")  # base: the model without links'


def export_chain(chain: Chain, options: ExportOptions) -> list[str]:
    """Writes a chain folder; the errors are those of :func:`export_merged`."""
    with whole_folder(options.folder, overwrite=options.overwrite) as partial:
        write_files(chain.links, chain.base, partial)
        if not options.verify:
            return ["not compared"]
        again = Chain.load(partial)
        if len(again) != len(chain) or not again.is_beginning_of(chain):
            raise ExportError("the chain was loaded again with other factors than were written: it is not kept")
        return [f"{len(chain)} links; loaded again, their factors are the same to the bit"]


def _with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    try:
        loaded: nn.Module = PeftModel.from_pretrained(base, str(folder))
    except Exception as error:  # a name that it interprets otherwise, say
        raise ExportError(f"peft cannot load it ({error!r}): it is not kept") from error
    return loaded


def _values_saved(chain: Chain, base: nn.Module, saved: Sequence[str]) -> dict[str, Tensor]:
    """The values of an adapter's saved modules: the trained ones, or else the base's.

    Raises:
        UserError: for a buffer elsewhere that training has changed: PEFT has no place for it.
    """
    state, trained = base.state_dict(), chain.links[-1].extras
    values = {
        name: trained.get(name, value) for name, value in state.items() if name.startswith(tuple(f"{one}." for one in saved))
    }
    if changed := [name for name, value in trained.items() if name not in values and not torch.equal(state[name], value)]:
        raise UserError(
            f"format: expected merged, for training has changed {changed[0]!r}, which an adapter cannot hold; received peft"
        )
    return values


def check_named_base(
    named: nn.Module, base: nn.Module, module_name: str, base_name: str, saved: Sequence[str], rounded: Sequence[torch.dtype]
) -> None:
    """Refuses an adapter whose base is not the one that its name loads.

    Args:
        named: the model loaded by the name.
        base: the plain base on which the chain was trained.
        module_name: the class that built it, for messages.
        base_name: the name.
        saved: names or dotted name endings of modules that are in the adapter, and names of weights not to be compared.
        rounded: the dtypes to which the training has rounded the base.

    Raises:
        UserError: naming a weight of another shape or value.
    """
    mine, theirs = base.state_dict(), named.state_dict()
    for name in mine | theirs:
        value, other = mine.get(name), theirs.get(name)
        if value is None or other is None:
            what = "is in one of them alone"
        elif value.shape != other.shape:
            what = "has another shape"
        elif lies_in(name, saved) or _is_rounded(value, other, rounded):
            continue
        else:
            what = "has other values"
        raise UserError(
            f"format: expected merged, for the base of {module_name} is not {base_name!r}: {name!r} {what}, and an adapter is "
            "put on the base that it names; received peft"
        )


def _is_rounded(value: Tensor, other: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether a value is the other one, or that rounded to one of the dtypes."""
    return any(torch.equal(value, other.to(dtype).to(value.dtype)) for dtype in (value.dtype, *dtypes))


def _vllm_rank(rank: int) -> str:
    return next((str(offered) for offered in VLLM_RANKS if offered >= rank), f"more than it offers, {VLLM_RANKS[-1]}")


def upload(folder: Path, repo_id: str) -> str:
    """Uploads a folder to a model repository, which is created if necessary; returns its URL.

    Raises:
        OutsideError: if the hub cannot be reached, or refuses (``hf auth login`` stores a token).
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repo_id, exist_ok=True))
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    except Exception as error:  # of the network, of the hub, of a token
        message = f"push_to_hub: {repo_id!r} could not be uploaded ({one_line(str(error))}); {folder} is kept"
        raise OutsideError(message) from error
    return address
