"""Merges by peft and our own are proven, and each seeded fault is named. The merges with faults are peft's."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.cli import main
from cola_lightning.files.merge import write_merged
from cola_lightning.files.plan import make_plan
from cola_lightning.files.stored import ModelFolder
from tests.helpers import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
R8 = {"r": 8, "lora_alpha": 24, "target_modules": TARGETS}
PATTERNS = {"rank_pattern": {"v_proj": 5, r".*\.1\..*q_proj": 2}, "alpha_pattern": {"v_proj": 6}}


def load(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def adapter(path, base, *, seed=0, size=0.05, dtype=torch.float32, **fields):
    """An adapter by peft whose B, and what else it trains, are random."""
    model = get_peft_model(load(base, dtype), LoraConfig(**R8 | fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * (0.3 if "lora_A" in name else size)
                parameter.copy_(noise if "lora_" in name else parameter + noise)
    model.save_pretrained(path)
    return str(path)


def merged_by_peft(path, base, adapters, *, dtype=torch.float32, safe=False):
    model = load(base, dtype)
    for one in adapters:
        model = PeftModel.from_pretrained(model, one).merge_and_unload(safe_merge=safe)
    model.save_pretrained(path)
    return str(path)


def proof(capsys, merged, base, *adapters, words=()):
    """The exit status of ``cola verify``, and what it prints."""
    status = main(["verify", str(merged), "--base", str(base), "--adapter", *map(str, adapters), "--json", *words])
    return status, json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------------- what is right

KINDS = {
    "plain": ("llama", {}),
    "rslora and patterns": ("llama", {"use_rslora": True} | PATTERNS),
    "a tied head": ("llama", {"tied": True}),
    "a head that was trained": ("llama", {"modules_to_save": ["lm_head"]}),
    "a head that is tied no more": ("llama", {"modules_to_save": ["lm_head"], "tied": True}),
    "an embedding that is tied no more": ("llama", {"modules_to_save": ["embed_tokens"], "tied": True}),
    "an embedding next to a head of another name": (
        "gpt_neox",
        {"target_modules": ["query_key_value"], "modules_to_save": ["embed_in"]},
    ),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings are no longer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_merges_by_peft_and_our_own_are_proven(tmp_path, capsys, kind, dtype):
    architecture, fields = KINDS[kind]
    changes = {"tie_word_embeddings": True} if fields.get("tied") else {}
    base = tiny.folder(tmp_path / "start", architecture, **changes)
    load(base, dtype).save_pretrained(tmp_path / "base")
    fields = {name: value for name, value in fields.items() if name != "tied"}
    adapters = [adapter(tmp_path / "sft", base, dtype=dtype, **fields)]
    second = {name: value for name, value in fields.items() if name != "modules_to_save"}
    adapters.append(adapter(tmp_path / "dpo", base, seed=1, size=0.001, r=4, **second))
    for safe in (False, True):
        merged = merged_by_peft(tmp_path / f"merged-{safe}", tmp_path / "base", adapters, dtype=dtype, safe=safe)
        status, printed = proof(capsys, merged, tmp_path / "base", *adapters)
        assert (status, printed["proven"]) == (0, True), printed["sentence"]
    plan = make_plan(ModelFolder.open(str(tmp_path / "base")), read_chain(adapters))
    (tmp_path / "ours").mkdir()
    write_merged(plan, tmp_path / "ours")
    status, printed = proof(capsys, tmp_path / "ours", tmp_path / "base", *adapters)
    assert status == 0, printed["sentence"]
    assert {finding["kind"] for finding in printed["tensors"].values()} == {"same bits"}
    theirs = tiny.logits(load(tmp_path / "merged-True", torch.float32))
    assert tiny.relative_difference(tiny.logits(load(tmp_path / "ours")), theirs) <= max(1e-5, 4 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------------- what is wrong


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in bfloat16, two adapters, and their merge by peft, which tests spoil."""
    folder = tmp_path_factory.mktemp("made")
    load(tiny.folder(folder / "start"), torch.bfloat16).save_pretrained(folder / "base")
    load(tiny.folder(folder / "start", scale=2), torch.bfloat16).save_pretrained(folder / "other")
    adapter(folder / "sft", folder / "base")
    adapter(folder / "dpo", folder / "base", seed=1, size=0.02)
    merged_by_peft(folder / "merged", folder / "base", [folder / "sft", folder / "dpo"], dtype=torch.bfloat16)
    return folder


Q = "model.layers.{}.self_attn.q_proj.weight"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def edited(folder, edit):
    tensors = tensors_of(folder)
    save_file(edit(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})


def with_config(folder, name, **fields):
    """A copy of an adapter with other values in its configuration: what a tool would merge that overlooks them."""
    copy = shutil.copytree(folder / name, folder / "edited" / name, dirs_exist_ok=True)
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copy


def remerged(make):
    """Replaces the merged folder by a merge of other adapters, or into another base."""

    def spoil(made, merged):
        base, adapters = make(made)
        merged_by_peft(merged, base, adapters, dtype=torch.bfloat16)

    return spoil


def spoiled(edit):
    return lambda made, merged: edited(merged, lambda tensors: edit(tensors, tensors_of(made / "base")))


def one_element(name, index, by=0.3):
    def edit(tensors, base):
        tensors[name].view(-1)[index] += by

    return edit


def restored(layer):
    return lambda tensors, base: {name: base[name] if name.startswith(layer) else value for name, value in tensors.items()}


def without(name):
    return lambda tensors, base: {other: value for other, value in tensors.items() if other != name}


def transposed(tensors, base):
    for name in [name for name in tensors if "q_proj" in name]:
        update = tensors[name].float() - base[name].float()
        tensors[name] = (base[name].float() + update.T).bfloat16()


def renamed(tensors, base):
    return {name.replace("q_proj.weight", "q_proj.base_layer.weight"): value for name, value in tensors.items()}


FAULTS = {
    "nothing merged": (
        remerged(lambda made: (made / "base", [])),
        r"^refuted: 6 of 21 .*: nothing was merged \(\S+ and 5 more\)$",
    ),
    "the first is missing": (remerged(lambda made: (made / "base", [made / "dpo"])), r"sft was not merged"),
    "the second is missing": (remerged(lambda made: (made / "base", [made / "sft"])), r"dpo was not merged"),
    "merged twice": (
        remerged(lambda made: (made / "base", [made / "sft", made / "dpo", made / "dpo"])),
        r"dpo was scaled by 2 \(merged or scaled twice",
    ),
    "one merged twice, the other not at all": (
        remerged(lambda made: (made / "base", [made / "sft", made / "sft"])),
        r": sft was scaled by 2 \(merged or scaled twice\) and dpo was not merged \(",
    ),
    "rslora overlooked": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", use_rslora=True), made / "dpo"])),
        r"sft was scaled by 2\.8\d* \(alpha / sqrt\(r\) in place of alpha / r",
    ),
    "alpha left out": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", lora_alpha=1), made / "dpo"])),
        r"sft was scaled by 0\.04\d* \(alpha left out",
    ),
    "a small part of it": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", lora_alpha=24 / 32), made / "dpo"])),
        r"^refuted: 6 of 21 (?!.*(other|base)).*sft was scaled by 0\.03",
    ),
    "alpha and rank left out": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", lora_alpha=8), made / "dpo"])),
        r"sft was scaled by 0\.33\d* \(alpha and the rank left out",
    ),
    "the rank left out": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", lora_alpha=8 * 24), made / "dpo"])),
        r"sft was scaled by (8|7\.9\d*|8\.0\d*) \(the rank left out",
    ),
    "another factor": (
        remerged(lambda made: (made / "base", [with_config(made, "sft", lora_alpha=17), made / "dpo"])),
        r"sft was scaled by 0\.7\d* \(",
    ),
    "transposed": (spoiled(transposed), r"transposed \(model\.layers\.\d\.self_attn\.q_proj\.weight and 1 more\)"),
    "another base": (remerged(lambda made: (made / "other", [made / "sft", made / "dpo"])), "it is of another base"),
    "a layer is missing": (
        spoiled(restored("model.layers.1.")),
        r"3 of 21 .*: nothing was merged \(model\.layers\.1\.\S+ and 2 more\)$",
    ),
    "one element of an adapted tensor": (
        spoiled(one_element(Q.format(1), 77)),
        r"1 of 21 .*other values \(\S*1\.self_attn\.q_proj",
    ),
    "one element of another tensor": (spoiled(one_element("model.norm.weight", 3)), r"1 of 21 .*other values \(model\.norm"),
    "one element of another tensor, by one step": (
        spoiled(one_element("model.norm.weight", 3, 2**-7)),
        r"1 of 21 .*other values \(model\.norm",
    ),
    "not a number": (
        spoiled(lambda tensors, base: tensors[Q.format(0)].view(-1)[5:6].fill_(float("nan")) and None),
        r"1 of 21 .*other values \(\S*q_proj",
    ),
    "a tensor is missing": (spoiled(without("model.norm.weight")), r"it is missing \(model\.norm"),
    "a tensor too many": (
        spoiled(lambda tensors, base: tensors | {"model.more.weight": torch.ones(2)}),
        r"the base has no such tensor \(model\.more\.weight\)",
    ),
    "saved with its adapter": (spoiled(renamed), r"saved next to the weights, and not merged"),
    "another shape": (
        spoiled(lambda tensors, base: tensors | {"lm_head.weight": tensors["lm_head.weight"][:-1].clone()}),
        r"its shape is \(399, 32\) and not \(400, 32\) \(lm_head\.weight\)",
    ),
    "integers": (
        spoiled(lambda tensors, base: tensors | {Q.format(0): (tensors[Q.format(0)] * 100).to(torch.int8)}),
        r"1 of 21 .*other values \(\S*q_proj",
    ),
    "rounded on the way": (
        spoiled(lambda tensors, base: {name: value.to(torch.float8_e4m3fn).bfloat16() for name, value in tensors.items()}),
        "rounded to float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(made, tmp_path, capsys, fault):
    spoil, message = FAULTS[fault]
    merged = shutil.copytree(made / "merged", tmp_path / "merged")
    spoil(made, merged)
    status, printed = proof(capsys, merged, made / "base", made / "sft", made / "dpo")
    assert status == 1
    assert re.search(message, printed["sentence"]), printed["sentence"]


def test_an_update_below_the_roundings_is_not_called_proven(made, tmp_path, capsys):
    small = adapter(tmp_path / "small", made / "base", seed=2, size=1e-9)
    for sources, n_small in {(small,): 6, (made / "sft", small): 6, (made / "sft",): 0}.items():
        merged = merged_by_peft(tmp_path / "merged", made / "base", sources, dtype=torch.bfloat16)
        status, printed = proof(capsys, merged, made / "base", *sources)
        assert (status, printed["proven"], len(printed["undecided"])) == (0, not n_small, n_small)
        seen = f"too small to be seen in bfloat16: {n_small} of {6 * len(sources)} updates; " if n_small else ""
        assert printed["sentence"] == f"{seen}proven: {21 - n_small} of 21 tensors are those of the merge"
        assert all(finding["factors"] == [] for finding in printed["tensors"].values() if not finding["n_different"])
        sizes = ["export", *map(str, sources), "--base", str(made / "base"), "--format", "merged"]
        assert main([*sizes, "--output", str(tmp_path / "out"), "--overwrite"]) == 0
        assert ("6 of" in capsys.readouterr().out) == bool(n_small)
    full = merged_by_peft(tmp_path / "full", made / "base", [small])
    assert proof(capsys, full, made / "base", small)[1]["undecided"] == []


def test_an_adapter_that_names_another_base_is_named(made, tmp_path, capsys):
    own = str(made / "base")
    for named, is_same in {own: True, "hub/Base-unsloth-bnb-4bit": True, "hub/other": False, None: True}.items():
        sft = with_config(made, "sft", base_model_name_or_path=named)
        status, printed = proof(capsys, made / "merged", own, f"sft={sft}", made / "dpo")
        assert status == 0
        assert [note for note in printed["notes"] if "names the base" in note] == (
            [] if is_same else [f"sft names the base {named!r}, and not {own!r}: it fits only if both are one model"]
        )


def test_adapters_in_folders_of_the_same_name_or_of_any_are_told_apart(made, tmp_path, capsys, monkeypatch):
    first, second = tmp_path / "sft v1.0" / "checkpoint-5", tmp_path / "dpo" / "checkpoint-5"
    shutil.copytree(made / "sft", first)
    shutil.copytree(made / "dpo", second)
    monkeypatch.chdir(second)
    assert proof(capsys, made / "merged", made / "base", first, ".")[0] == 0
    merged = merged_by_peft(tmp_path / "merged", made / "base", [first], dtype=torch.bfloat16)
    status, printed = proof(capsys, merged, made / "base", first, second)
    assert status == 1
    assert f"{second} was not merged" in printed["sentence"]
