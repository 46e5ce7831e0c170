"""The model card of an export: its ``README.md``, with the metadata that the Hugging Face hub reads."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cola_lightning import __version__, hub
from cola_lightning.chain import Chain
from cola_lightning.conventions import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding

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


# ---------------------------------------------------------------------- how a language model is used

PROMPT_FORMAT = "prompt_format"  # in an exported tokenizer's configuration: the checkpoint's prompt format

LOAD = """import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {folder}
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
"""
SCORE = """

def score(prompt, option):  # the mean log-probability of the option's tokens after the prompt
    {texts}
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0, :-1].float().log_softmax(-1)
    return sum(logs[k - 1, whole[k]].item() for k in range(len(before), len(whole))) / (len(whole) - len(before))


prompt, options = "...", ["...", "..."]  # as in training
print(max(options, key=lambda option: score(prompt, option)))
"""
PLAIN_TEXTS = 'before, whole = (tokenizer(text.lstrip().rstrip(" "))["input_ids"]{cut} for text in (prompt, prompt + option))'
CHAT_TEXTS = """turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (text, text + option))"""
GENERATE = """
prompt = "..."  # as in training
{inputs}
output = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True){cut})
"""
PLAIN_INPUTS = 'inputs = tokenizer(prompt.rstrip(" "), return_tensors="pt", return_token_type_ids=False)'
CUT_INPUTS = "\ninputs = {{name: ids[:, :-{n}] for name, ids in inputs.items()}}  # without what the tokenizer appends"
CHAT_INPUTS = """turn = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True{kwargs})"""

WHAT = {
    "options": "The model was trained to choose among options, by the mean log-probability of each option's tokens after its "
    "prompt. It was not trained to generate them: score the options.",
    "answer": "The model was trained to generate a short answer, up to the end of a line.",
    "response": "The model was trained to respond to prompts, {how}.",
    "text": "The model was trained to continue text.",
}


def usage_section(
    prompt_format: Mapping[str, Any], *, folder: str = "path/to/this/folder", is_adapter: bool = False, n_appended: int = 0
) -> str:
    """The section of a model card that shows how the model is used, in plain transformers code.

    Args:
        prompt_format: of the checkpoint: see :attr:`~cola_lightning.EpochDataModule.prompt_format`.
        folder: the name of the export's folder in the code.
        is_adapter: whether it contains a PEFT adapter, and not a full model.
        n_appended: how many tokens the tokenizer appends to a text, which are no part of a prompt or an option.

    Returns:
        Markdown; empty for a model that is not prompted.
    """
    if prompt_format.get("kind") not in WHAT:
        return ""
    kind, is_chat = prompt_format["kind"], prompt_format["chat_template"]
    plain = "without a chat template: the response directly follows the prompt"
    what = WHAT[kind].format(how="written in the tokenizer's chat template" if is_chat else plain)
    for name in ("prompt", "options"):  # templates of a row's fields
        if prompt_format.get(name) is not None:
            what += f" The {name} in training: `{json.dumps(prompt_format[name], ensure_ascii=False)}`."
    load = LOAD.format(folder=json.dumps(folder, ensure_ascii=False))
    if is_adapter:
        load = load.replace("AutoModelForCausalLM.from", "AutoPeftModelForCausalLM.from")
        load = load.replace(
            "from transformers import AutoModelForCausalLM, Auto",
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import Auto",
        )
    texts = PLAIN_TEXTS.format(cut=f"[:-{n_appended}]" if n_appended else "")
    variables = prompt_format.get("chat_template_kwargs", {}).items()
    kwargs = "".join(f", {name}={value!r}" for name, value in variables if name.isidentifier())
    inputs = PLAIN_INPUTS + (CUT_INPUTS.format(n=n_appended) if n_appended else "")
    if kind == "options":
        code = load + SCORE.format(texts=CHAT_TEXTS if is_chat else texts)
    else:
        is_answer = kind == "answer"
        how = {
            "max_new_tokens": MAX_NEW_TOKENS if is_answer else Decoding.max_new_tokens,
            "cut": r'.partition("\n")[0].strip()' if is_answer else "",
        }
        code = load.removeprefix("import torch\n") + GENERATE.format(
            inputs=CHAT_INPUTS.replace("{kwargs}", kwargs) if is_chat else inputs, **how
        )
    return (
        f"## How to use it\n\n{what}\n\n```python\n{code.strip()}\n```\n\n"
        "Many rows, with the checkpoint and the run's configuration: `cola predict --config config.yaml --ckpt_path FILE "
        "--data.source FOLDER` writes `predictions.jsonl`.\n"
    )
