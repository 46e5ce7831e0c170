"""An export finds each seeded mistake of the plan, the merge and the writer by itself, and calls only what is right proven."""

import functools
import importlib
import inspect
import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cola_lightning.cli import main
from cola_lightning.export.proof import Comparison, Expected, _compare_products
from tests.helpers import tiny

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def adapter(base, folder, seed=0, *, size=0.1, **fields):
    """An adapter by peft with random values, and its model."""
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    model.save_pretrained(folder)
    return model


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


def test_a_base_in_float64_and_one_whose_configuration_names_another_dtype_are_proven(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make("two adapters", torch.float64)
    assert export(capsys)[0] == 0
    make("two adapters", torch.bfloat16)
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    status, printed = export(capsys, "--overwrite")
    assert (status, "proven: 21 of 21" in printed) == (0, True), printed


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # which peft does apply
def test_patterns_of_experts_and_of_parameters_by_their_names_count_as_in_peft(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    patterns = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 5}}
    of_experts = {"target_modules": ["q_proj"], "target_parameters": EXPERTS} | patterns
    weights = {"target_modules": [], "target_parameters": ["q_proj.weight"], "alpha_pattern": {"q_proj.weight": 64}}
    for place, (architecture, fields) in enumerate({"gpt_oss": of_experts, "llama": weights}.items()):
        base, name = tiny.folder(Path(f"base {place}"), architecture), f"adapter {place}"
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        expected = tiny.logits(adapter(model, name, **fields).merge_and_unload())
        words = ["export", name, "--base", base, "--format", "merged", "--output", f"out {place}"]
        assert main(words) == 0
        assert re.search(r"proven: (\d+) of \1 tensors", capsys.readouterr().out)
        merged = AutoModelForCausalLM.from_pretrained(f"out {place}")
        assert tiny.relative_difference(tiny.logits(merged), expected) <= 1e-5


def test_a_single_element_is_seen_in_a_wide_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(64, 4096, generator=generator) * 0.02).bfloat16()
    lora_A, lora_B = torch.randn(4, 4096, generator=generator) * 0.02, torch.randn(64, 4, generator=generator) * 0.02
    right = (base.float() + 2 * lora_B @ lora_A).bfloat16()
    folders, shape = {}, lambda key: (64, 4096)
    for name, tensor in {"base": base, "right": right}.items():
        folders[name] = mock.Mock(
            shape=shape, rows=lambda key, first, last, dtype=None, tensor=tensor: tensor[first:last].to(dtype or tensor.dtype)
        )
    expected = Expected("key", terms=[(lora_A, lora_B, 2.0)])
    compare = functools.partial(_compare_products, folders["base"], expected, key="key", factors=[(2 * lora_B, lora_A)])
    assert compare(after=folders["right"]) == Comparison("", [], torch.bfloat16)
    for place in range(50):
        wrong = right.clone()
        wrong[place, 37 * place] += 0.5 * 0.02 * (-1) ** place
        folders["wrong"] = mock.Mock(
            shape=shape, rows=lambda key, first, last, dtype=None, wrong=wrong: wrong[first:last].to(dtype or wrong.dtype)
        )
        assert compare(after=folders["wrong"]).wrong


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
