"""An export finds each seeded mistake of the plan, the merge and the writer by itself, and calls only what is right proven."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cola_lightning.cli import main
from tests.helpers import tiny

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapter(base, folder, seed=0, *, size=0.1, **fields):
    """An adapter by peft with random values."""
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(folder)


def make(case, dtype=torch.float32):
    """A base, and two adapters on it, in folders."""
    architecture, changes, first, second = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(tiny.folder(Path("start"), architecture, **changes), dtype=dtype)
    model.save_pretrained("base", max_shard_size="30KB")
    for seed, (name, fields) in enumerate({"sft": first, "dpo": second}.items()):
        adapter(AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32), name, seed, **fields)


CASES = {
    "two adapters": ("llama", {}, {}, {"target_modules": ["q_proj", "v_proj"]}),
    "rslora and patterns": (
        "llama",
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {},
    ),
    "a head that was trained whole after a link": (
        "llama",
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ),
    "a link on a head that was trained whole": (
        "llama",
        {},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ),
    "a tied head with a link": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}, {}),
    "in x out": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"target_modules": ["c_fc"], "fan_in_fan_out": True},
    ),
    "names of the files": ("gpt_neox", {}, {"target_modules": ["query_key_value"]}, {"target_modules": ["dense"]}),
    "next to experts that transformers fuses": (
        "mixtral",
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"]},
    ),
    "experts": ("gpt_oss", {}, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, {"target_modules": ["v_proj"]}),
}


def export(capsys, *words):
    status = main(["export", "sft", "dpo", "--base", "base", "--format", "merged", "--output", "out", *words])
    return status, "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_is_right_is_proven(tmp_path, monkeypatch, capsys, case, dtype):
    monkeypatch.chdir(tmp_path)
    make(case, dtype)
    for name, words in {"all": [], "scaled": ["--scale", "{0: 0.5, 1: -2}"], "first": ["--links", "1"]}.items():
        status, printed = export(capsys, "--output", name, *words)
        assert status == 0, printed
        assert re.search(r"^proven: (\d+) of \1 tensors are those of the merge$", printed, re.MULTILINE), printed
        assert "loaded again, its logits differ" in printed


# A mistake is a change of the source: the file, the function, what it says, and what it would say.
PLAN, MERGE, STORED, PEFT = (f"cola_lightning.{name}" for name in ("files.plan", "files.merge", "files.stored", "chain.peft"))
WHOLE_LAST, WHOLE_FIRST = "a head that was trained whole after a link", "a link on a head that was trained whole"
MUTATIONS = {
    "scaled": (PLAN, "_laid_out", "* link.scaling_of(", "* 3 * link.scaling_of(", "two adapters"),
    "transposed": (
        PLAN,
        "_laid_out",
        "        return update\n",
        "        return update.transposed() if n_out == n_in else update\n",
        "two adapters",
    ),
    "two layers exchanged": (
        PLAN,
        "make_plan",
        "layer, before.start.shape",
        "layer.translate({48: 49, 49: 48}), before.start.shape",
        "two adapters",
    ),
    "a link left out": (PLAN, "make_plan", "in chain.updates if", "in chain.updates[:-1] if", "two adapters"),
    "a link twice": (
        PLAN,
        "make_plan",
        "planned[name] = replace(before, updates=tuple(",
        "planned[name] = replace(before, updates=tuple(updates[-1:]) + tuple(",
        "two adapters",
    ),
    "an earlier link kept under a module trained whole": (PLAN, "make_plan", "since.get(name, 0)", "0", WHOLE_LAST),
    "since off by one": (PLAN, "make_plan", "since.get(name, 0)", "since.get(name, -1) + 2", WHOLE_FIRST),
    "a tied head left": (
        PLAN,
        "make_plan",
        "if not planned[HEAD].updates",
        "if True or planned[HEAD].updates",
        "a tied head with a link",
    ),
    "a head that the config ties": (
        PLAN,
        "make_plan",
        '["tie_word_embeddings"] = False',
        '["tied"] = 0',
        "a tied head with a link",
    ),
    "experts exchanged": (
        PLAN,
        "_laid_out",
        "lora_B.to(dtype) *",
        "lora_B.to(dtype).flip(0 if lora_B.dim() > 2 else ()) *",
        "experts",
    ),
    "a wrong shard's offset": (
        STORED,
        "rows_of",
        "offset=tensor.start +",
        "offset=tensor.start - 128 * tensor.file.name.startswith('model-00002') +",
        "two adapters",
    ),
    "a row chunk shifted by one": (
        PLAN,
        "Planned",
        "update.add_to(rows, first, last)",
        "update.add_to(rows[1:], first, last - 1)",
        "two adapters",
    ),
    "alpha / r for alpha / sqrt(r)": (
        PEFT,
        "_as_link",
        'rank**0.5 if config.get("use_rslora") else rank',
        "rank",
        "rslora and patterns",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_found_by_the_export_itself(tmp_path, monkeypatch, capsys, mutation, dtype):
    file, function, right, wrong, case = MUTATIONS[mutation]
    module = importlib.import_module(file)
    source = inspect.getsource(getattr(module, function))
    assert right in source
    monkeypatch.chdir(tmp_path)
    make(case, dtype)
    changed = dict[str, object]()
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(module) | {}, changed)
    replaced = changed[function]
    if inspect.isclass(replaced):
        monkeypatch.setattr(getattr(module, function), "merged", replaced.merged)
    else:
        monkeypatch.setattr(getattr(module, function), "__code__", replaced.__code__)
    status, printed = export(capsys)
    assert (status, "proven" in printed) == (1, False), printed
    assert "error: the export was deleted: refuted: " in printed
    assert not Path("out").exists()
