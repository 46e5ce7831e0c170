"""How an exported language model is used with transformers alone: a section for its model card."""

import json
from collections.abc import Mapping
from typing import Any

from cola_lightning.conventions import MAX_NEW_TOKENS
from cola_lightning.decoding import Decoding

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


def is_prompt_format(given: Any) -> bool:
    """Whether it is as :attr:`~cola_lightning.EpochDataModule.prompt_format` of a model that is prompted, not another value."""
    return isinstance(given, Mapping) and given.get("kind") in list(WHAT) and "chat_template" in given


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
    if not is_prompt_format(prompt_format):
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
