"""The model card of an export: its ``README.md``, with the metadata that the Hugging Face hub reads."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cola_lightning import __version__, hub
from cola_lightning.chain import Chain

CARD_NAME = "README.md"
BIBTEX = """@article{xia2024chain,
  title = {Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning},
  author = {Xia, Wenhan and Qin, Chengwei and Hazan, Elad},
  journal = {arXiv preprint arXiv:2401.04151},
  year = {2024}
}"""


@dataclass(frozen=True)
class Card:
    """The contents of a model card.

    Args:
        base_name: name of the base: a hub id, a folder, or the module's name for it.
        chain: the exported links.
        arguments: ``class_path`` and ``init_args`` of the module, and its ``data``.
        license: the hub's identifier, such as ``apache-2.0``; None: not stated.
        usage: a section in Markdown on how to use the model, instead of how to load it.
    """

    base_name: str
    chain: Chain
    arguments: Mapping[str, Any]
    license: str | None = None
    usage: str | None = None

    def write(self, folder: Path, kind: str, loading: str) -> None:
        """Writes the card.

        Args:
            folder: of the export.
            kind: ``merged model``, ``PEFT adapter``, ...
            loading: Python code that loads the export.
        """
        from huggingface_hub import ModelCardData

        data = ModelCardData(
            base_model=self.base_name if self._is_on_hub() else None,
            library_name="peft" if kind.startswith("PEFT") else "transformers",
            license=self.license,
            tags=["lora", "chain-of-lora", "cola_lightning"],
        )
        links = f"{len(self.chain)} LoRA link{'' if len(self.chain) == 1 else 's'}"
        name = self.base_name.rstrip("/").rpartition("/")[2].removeprefix("package:")
        usage = self.usage or f"## Use\n\n```python\n{loading.strip()}\n```"
        text = [
            f"---\n{data.to_yaml()}\n---",
            f"# {name}, fine-tuned by a chain of LoRA links",
            f"A {kind} of `{self.base_name}` with {links}, written by cola_lightning {__version__}."
            + ("" if self.license else " No license is stated; that of the base applies to its weights."),
            usage,
            f"## Links\n\n{self._table()}" if len(self.chain) else "",
            f"## Training\n\n```yaml\n{self._arguments()}```",
            f"## Citation\n\n```bibtex\n{BIBTEX}\n```",
        ]
        (folder / CARD_NAME).write_text("\n\n".join(part.strip() for part in text if part) + "\n", encoding="utf-8")

    def _is_on_hub(self) -> bool:
        """Whether the base's name is one of the hub, and not a folder of this machine, or the class that builds the base."""
        builder = str(self.arguments.get("class_path", "")).rpartition(".")[2]
        is_other = os.path.isdir(os.path.expanduser(self.base_name)) or self.base_name.rpartition(".")[2] == builder
        return hub.is_repo_id(self.base_name) and not is_other

    def _table(self) -> str:
        metrics = list(dict.fromkeys(name for link in self.chain.links for name in link.metrics))
        rows = [["link", "steps", "rank", "alpha", *metrics], ["---"] * (4 + len(metrics))]
        for link in self.chain.links:
            values = [f"{link.metrics[name]:.4g}" if name in link.metrics else "" for name in metrics]
            rows.append([str(link.index), str(link.end_step - link.start_step), str(link.rank), f"{link.alpha:g}", *values])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _arguments(self) -> str:
        shown = {name: self.arguments[name] for name in ("class_path", "init_args") if name in self.arguments}
        shown |= {"data": self.arguments["data"]} if self.arguments.get("data") else {}
        text: str = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
        return text
