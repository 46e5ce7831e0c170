"""Adapters that peft trained one after the other, as the links of one chain: the model is theirs after each stage."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cola_lightning import COLACausalLM, UserError
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.report import overlaps
from cola_lightning.chain.sources import Source
from cola_lightning.cli import main
from tests.helpers import tiny
from tests.helpers.toy import assert_bit_equal, batches, saved, toy, trainer, weights

ATTENTION, MLP = ["q_proj", "v_proj"], ["up_proj", "q_proj"]


def train(model, steps=3, seed=0):
    """A few steps of AdamW on random tokens: a loop as people have it."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        ids = torch.randint(2, 400, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(model, folder, seed=0, **fields):
    model = train(get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 7} | fields)), seed=seed)
    model.save_pretrained(folder)
    return model


def load(path):
    return AutoModelForCausalLM.from_pretrained(path)


def module(base, sources, links=None, **arguments):
    layers = [*ATTENTION, "up_proj"]
    return COLACausalLM(base, target_modules=layers, rank=2, seed=0, init_chain=sources, init_links=links, **arguments)


def assert_same_logits(mine, theirs):
    assert tiny.relative_difference(tiny.logits(mine), theirs) <= 1e-5


@pytest.mark.parametrize("way", ["on the merge", "beside the first"])
def test_two_adapters_of_other_layers_and_ranks_are_two_stages(tmp_path, way):
    base = tiny.folder(tmp_path / "base")
    first = trained(load(base), tmp_path / "sft", target_modules=ATTENTION, modules_to_save=["lm_head"])
    expected = [tiny.logits(load(base)), tiny.logits(first)]
    if way == "on the merge":
        trained(first.merge_and_unload(), tmp_path / "dpo", seed=1, target_modules=MLP, r=5, use_rslora=True)
    else:
        first.add_adapter("second", LoraConfig(r=5, lora_alpha=7, target_modules=MLP))
        first.base_model.set_adapter(["default", "second"])
        train(first, seed=1)
        first.save_pretrained(tmp_path / "both", selected_adapters=["second"])
        (tmp_path / "both" / "second").rename(tmp_path / "dpo")
    merged = PeftModel.from_pretrained(load(base), tmp_path / "sft").merge_and_unload()
    expected.append(tiny.logits(PeftModel.from_pretrained(merged, tmp_path / "dpo")))
    sources = [f"sft={tmp_path}/sft", f"dpo={tmp_path}/dpo"]
    saved = {"modules_to_save": ["lm_head"]}
    for links, name in enumerate([0, "sft", "dpo"]):
        assert_same_logits(module(base, sources, name, **saved).model, expected[links])
    whole = module(base, sources, **saved)
    whole.configure_model()
    assert [link.name for link in whole.chain.links] == ["sft", "dpo"]
    for links, logits in enumerate(expected):  # from the whole chain, too
        with whole.adapted.at(links) as model:
            assert_same_logits(model, logits)
    assert_same_logits(whole.merged_model(1), expected[1])


@pytest.mark.parametrize("finished_links", ["merge", "stack"])
def test_a_link_may_lack_layers_of_earlier_ones_whose_updates_stay(tmp_path, finished_links):
    base = tiny.folder(tmp_path / "base")
    model = trained(load(base), tmp_path / "sft", target_modules=ATTENTION)
    expected = [tiny.logits(load(base)), tiny.logits(model)]
    model = trained(model.merge_and_unload(), tmp_path / "dpo", seed=1, target_modules=["q_proj", "down_proj"], r=5)
    expected.append(tiny.logits(model))
    assert tiny.relative_difference(expected[2], expected[1]) > 1e-3

    sources = [f"sft={tmp_path}/sft", f"dpo={tmp_path}/dpo"]
    arguments = {"target_modules": ATTENTION, "rank": 2, "alpha": 4, "finished_links": finished_links}
    with pytest.raises(UserError, match=r"^model\.init_knot: the last link goes on"):
        COLACausalLM(base, init_chain=sources, **arguments | {"init_knot": "record", "rank": 5, "alpha": 7}).configure_model()
    begun = COLACausalLM(base, init_chain=sources, seed=0, **arguments)
    assert_same_logits(begun.model, expected[2])
    assert len(begun.adapted.trained_parameters()) == 2 * len(begun.adapted.live_layers) == 8
    theirs = get_peft_model(model.merge_and_unload(), LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION))
    with torch.no_grad():
        for name, layer in begun.adapted.live_layers.items():
            theirs.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.lora_A)
    for mine, other in tiny.losses_of_both(begun.model, theirs, 8):
        assert mine == pytest.approx(other, rel=1e-4)
    expected.append(tiny.logits(theirs))
    assert_same_logits(begun.model, expected[3])
    assert sorted(begun.live_link().factors) == sorted(name for name in begun.chain.layers if "down_proj" not in name)
    for links, logits in enumerate(expected):
        assert_same_logits(begun.merged_model(links), logits)
        with begun.at(links) as earlier:
            assert_same_logits(earlier, logits)
    begun.tie_knot()
    assert_same_logits(begun.model, expected[3])

    path = saved(begun, tmp_path)
    again = COLACausalLM.load_from_checkpoint(path)
    assert torch.equal(tiny.logits(again.model), tiny.logits(begun.model))
    assert_bit_equal(weights(again), weights(begun))
    for links, logits in enumerate(expected):
        (tmp_path / str(links)).mkdir()
        earlier = COLACausalLM.load_from_checkpoint(path, links=links)
        assert_same_logits(earlier.model, logits)
        again = COLACausalLM.load_from_checkpoint(saved(earlier, tmp_path / str(links)))  # also if no link has down_proj
        assert_bit_equal(weights(again), weights(earlier))
    for output in ("merged", "peft", "chain"):
        assert not main(["export", str(path), "--format", output, "--output", str(tmp_path / output)])
    assert not main(["verify", str(tmp_path / "merged"), "--base", base, "--adapter", str(path)])
    assert_same_logits(load(tmp_path / "merged"), expected[3])
    assert_same_logits(PeftModel.from_pretrained(load(base), tmp_path / "peft"), expected[3])
    assert_same_logits(COLACausalLM(base, init_chain=str(tmp_path / "chain"), **arguments).model, expected[3])


def test_an_adapter_that_went_on_is_a_link_after_a_record(tmp_path):
    base = tiny.folder(tmp_path / "base")
    model = trained(load(base), tmp_path / "sft", target_modules=ATTENTION)
    expected = [tiny.logits(model)]
    train(model, seed=1).save_pretrained(tmp_path / "dpo")
    expected.append(tiny.logits(model))
    sources = [f"sft={tmp_path}/sft", f"dpo={tmp_path}/dpo"]
    for links, logits in enumerate(expected, 1):
        arguments = {"target_modules": ATTENTION, "rank": 2, "seed": 0, "init_continues": ["dpo"]}
        assert_same_logits(COLACausalLM(base, init_chain=sources, init_links=links, **arguments).model, logits)
    chain = read_chain(sources, continues=["dpo"])
    assert [link.is_record for link in chain.links] == [True, False]
    assert chain.total_rank(chain.layers[0]) == 3
    (overlap,) = overlaps(chain)  # of what dpo changed, and not of what it contains
    differences = [read_chain(tmp_path / name) for name in ("sft", "dpo")]
    expected_norm = sum(float((differences[1].delta(n) - differences[0].delta(n)).square().sum()) for n in chain.layers) ** 0.5
    assert overlap.norms[1] == pytest.approx(expected_norm, rel=1e-4)
    name, (sft, dpo) = chain.layers[0], (one.delta(chain.layers[0]) for one in differences)
    for scale, expected_delta in (
        ({"dpo": 0.5}, sft + 0.5 * (dpo - sft)),
        ({"dpo": 0}, sft),
        ({"sft": 0.5}, dpo - 0.5 * sft),
        ({"sft": 0.5, "dpo": 0.5}, 0.5 * dpo),
    ):
        torch.testing.assert_close(chain.scaled(scale).delta(name), expected_delta, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"^continues: there is no source 'kto'"):
        read_chain(sources, continues=["kto"])
    trained(load(base), tmp_path / "kto", target_modules=MLP)
    with pytest.raises(UserError, match=r"^continues: .*kto' has not the layers"):
        read_chain([*sources, f"kto={tmp_path}/kto"], continues=["kto"])


def test_a_module_goes_on_from_several_adapters_and_its_checkpoint_has_all_stages(tmp_path):
    base = tiny.folder(tmp_path / "base")
    trained(load(base), tmp_path / "sft", target_modules=ATTENTION)
    trained(load(base), tmp_path / "dpo", seed=1, target_modules=MLP)
    begun = module(base, [f"sft={tmp_path}/sft", str(tmp_path / "dpo")])
    ids = torch.randint(2, 400, (2, 6))
    data = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 2, batch_size=None)
    run = trainer(tmp_path, chain={"every_n_train_steps": 1, "name": "own"}, max_steps=2, limit_val_batches=0)
    run.fit(begun, data, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = COLACausalLM.load_from_checkpoint(tmp_path / "run.ckpt")
    assert [link.name for link in again.full_chain().links] == ["sft", None, "own", "own"]
    assert torch.equal(tiny.logits(again.model), tiny.logits(begun.model))
    expected = tiny.logits(module(base, [f"sft={tmp_path}/sft"]).model)
    assert torch.equal(tiny.logits(COLACausalLM.load_from_checkpoint(tmp_path / "run.ckpt", links="sft").model), expected)


@pytest.mark.parametrize("knot", ["cola", "record"])
def test_a_beginning_that_two_checkpoints_share_is_there_once(tmp_path, knot):
    paths = []
    for name, steps in (("sft", 4), ("dpo", 2)):
        run = toy(target_modules=["0", "2"], init_chain=paths[-1] if paths else None, init_knot=knot if paths else "cola")
        run_of_stage = trainer(tmp_path / name, chain={"every_n_train_steps": 2, "name": name}, max_steps=steps)
        run_of_stage.fit(run, batches())
        paths.append(str(tmp_path / f"{name}.ckpt"))
        run_of_stage.save_checkpoint(paths[-1])
    alone = read_chain(paths[1])
    for sources in (paths, paths[::-1], [f"first={paths[0]}", paths[1]]):
        chain = read_chain(sources)
        assert len(chain) == len(alone)
        assert chain.is_beginning_of(alone)
    assert [link.name for link in chain.links] == ["first", "first", "dpo"]
    cut = read_chain(paths[0], 1)
    cut.save(tmp_path / "cut")
    read_chain([str(tmp_path / "cut"), paths[1]])
    other = toy(target_modules=["0", "2"], init_chain=str(tmp_path / "cut"))
    run = trainer(tmp_path / "kto", chain={"name": "kto"}, max_steps=1)
    run.fit(other, batches())
    run.save_checkpoint(tmp_path / "kto.ckpt")
    with pytest.raises(UserError, match="the same 1 links, and then others"):
        read_chain([paths[1], str(tmp_path / "kto.ckpt")])


def test_a_path_may_have_an_equals_sign_and_a_source_its_name(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert Source.of(f"{tmp_path}/a=b").name is None
    assert Source.of("checkpoints/epoch=3.ckpt").name is None
    assert Source.of("sft=checkpoints/epoch=3.ckpt") == ("checkpoints/epoch=3.ckpt", "sft")


def test_each_source_that_cannot_be_read_is_named(tmp_path):
    base = tiny.folder(tmp_path / "base")
    trained(load(base), tmp_path / "out" / "checkpoint-3", target_modules=ATTENTION)
    good = str(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'out'}' is no run's folder") + ".*but '.*checkpoint-3' is"):
        read_chain([good, str(tmp_path / "out")])
    trained(load(base), tmp_path / "bin", target_modules=ATTENTION)
    (tmp_path / "bin" / "adapter_model.safetensors").rename(tmp_path / "bin" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"^adapter: .*bin' has a pickle"):
        read_chain([good, str(tmp_path / "bin")])


def test_an_adapter_of_a_compiled_model_and_one_with_another_prefix_fit(tmp_path):
    base = tiny.folder(tmp_path / "base")
    model = trained(load(base), tmp_path / "sft", target_modules=ATTENTION)
    chain = read_chain(tmp_path / "sft")
    for old, new in (("model.layers", "language_model.model.layers"), ("model.layers", "layers")):
        renamed = chain.renamed({name: name.replace(old, new) for name in chain.layers})
        renamed.base = type(chain.base)(weight_norms={"unknown": 1.0})
        renamed.save(tmp_path / new)
        for targets in (ATTENTION, ["q_proj"]):
            begun = COLACausalLM(base, target_modules=targets, seed=0, init_chain=str(tmp_path / new))
            assert_same_logits(begun.model, tiny.logits(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", ["merged first", "it went on"])
def test_trls_sft_and_then_its_dpo_are_two_stages(tmp_path, way):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = tiny.folder(tmp_path / "base")
    tokenizer = tiny.tokenizer(pad=True)
    options = {
        "max_steps": 3,
        "learning_rate": 0.02,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    rows = [{"prompt": "Is the town old?", "completion": " Yes", "chosen": " Yes", "rejected": " No"}] * 24
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=ATTENTION, task_type="CAUSAL_LM")
    data = datasets.Dataset.from_list(rows)
    sft = trl.SFTTrainer(
        load(base),
        args=trl.SFTConfig(str(tmp_path / "sft"), **options),
        train_dataset=data.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    sft.train()
    sft.save_model(str(tmp_path / "sft"))
    expected = [tiny.logits(load(base)), tiny.logits(sft.model)]
    if way == "merged first":
        sft.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        model, peft_config, continues = load(tmp_path / "merged"), lora, []
    else:
        model, peft_config = PeftModel.from_pretrained(load(base), tmp_path / "sft", is_trainable=True), None
        continues = ["dpo"]
    dpo = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path / "dpo"), **options),
        train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    dpo.train()
    dpo.save_model(str(tmp_path / "dpo"))
    expected.append(tiny.logits(dpo.model))
    assert tiny.relative_difference(expected[2], expected[1]) > 1e-3
    sources = [f"sft={tmp_path}/sft", f"dpo={tmp_path}/dpo"]
    arguments = {"target_modules": ATTENTION, "seed": 0, "init_chain": sources, "init_continues": continues}
    for links, logits in zip([0, "sft", "dpo"], expected, strict=True):
        assert_same_logits(COLACausalLM(base, init_links=links, **arguments).model, logits)
