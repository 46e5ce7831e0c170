"""The model card of an export, with the hub's metadata, and the tokenizer next to it."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

from cola_lightning import __version__
from cola_lightning.chat_template import n_appended
from cola_lightning.constants import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding
from cola_lightning.export.model import TrainedFacts
from cola_lightning.hub import is_repo_id

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).parent / "card.md"  # for Jinja
FOLDER = "path/to/this/folder"  # in the code that loads an export


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer or image processor, if there is one that can be written."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


def write_card(folder: Path, model: TrainedFacts, kind: str, loading: str) -> None:
    """Writes the model card of an export.

    Args:
        folder: of the export.
        model: the exported model.
        kind: ``merged model``, ``PEFT adapter``, ...
        loading: Python code that loads the export, for a model that is not prompted.
    """
    from huggingface_hub import ModelCard, ModelCardData

    named_base, tokenizer = model.named_base, model.tokenizer
    base = model.base_name if named_base is None else named_base.model_name
    arguments = {name: value for name, value in {**model.arguments, "data": model.data}.items() if value}
    data = ModelCardData(
        base_model=base if named_base is not None and is_repo_id(base) and not os.path.isdir(base) else None,
        library_name="peft" if kind.startswith("PEFT") else "transformers",
        tags=["lora", "chain-of-lora", "cola_lightning"],
    )
    card = ModelCard.from_template(
        data,
        str(TEMPLATE),
        base=base,
        kind=kind,
        version=__version__,
        loading=loading,
        prompt_format={"chat_template_kwargs": {}, **model.prompt_format},
        n_appended=n_appended(tokenizer) if model.prompt_format else 0,
        max_new_tokens=MAX_NEW_TOKENS if model.prompt_format.get("kind") == "answer" else Decoding.max_new_tokens,
        dumps=lambda value: json.dumps(value, ensure_ascii=False),
        links=model.chain.links,
        metrics=list(dict.fromkeys(name for link in model.chain.links for name in link.metrics)),
        arguments=yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True).strip() if arguments else "",
    )
    card.save(folder / CARD_NAME)
