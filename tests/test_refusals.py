"""What people mistype is refused in one line that begins with the field; ``tests/test_cli.py`` holds what a user sees of it.

Refusals that need a longer run, a checkpoint or a command line are in the test files of their subjects.
"""

import errno
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks.byte_gpt import PythonSourceDataModule
from cola_lightning import (
    AdaptedModel,
    Chain,
    ChainOfLoRA,
    ChainSchedule,
    COLACausalLM,
    COLASequenceClassifier,
    PromptDataModule,
    TemplateDataModule,
    TextClassificationDataModule,
    TextDataModule,
    UserError,
    inject_lora,
)
from cola_lightning.callbacks.chain_of_lora import check_strategy
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.chain.report import plot
from cola_lightning.cli import main
from cola_lightning.cli.configs import configs
from cola_lightning.cli.generate import generate
from cola_lightning.data.rows import Row
from cola_lightning.data.tasks import TASKS
from cola_lightning.export.verify import ExportOptions
from cola_lightning.study.command import Comparison
from cola_lightning.study.methods import method
from cola_lightning.writing import atomic_folder
from tests import tiny
from tests.toy import Toy, batches, toy, trainer

# ---------------------------------------------------------------------- what is done with the arguments of a row


def module(**arguments):
    toy(**arguments).configure_model()


def adapted_model(**arguments):
    return AdaptedModel.of(lambda: Toy.build_model(None), **{"rank": 2, "alpha": 4} | arguments)


def knot(rank):
    """A knot that is refused leaves the chain and the weights as they are."""
    made = adapted_model()
    before = [layer.weight.clone() for layer in made.layers.values()]
    with torch.no_grad():
        for layer in made.layers.values():
            layer.lora_B.fill_(1)
    try:
        made.tie_knot(rank=rank)
    finally:
        assert made.link == 0
        assert all(map(torch.equal, before, [layer.weight for layer in made.layers.values()]))


def fit(chain=(), trainer_arguments=(), **arguments):
    trainer(Path(), chain=dict(chain), **{"max_epochs": 3} | dict(trainer_arguments)).fit(toy(**arguments), batches())


def strategy(name):
    check_strategy(trainer(Path(), strategy=name, devices=1).strategy)


def network():
    body = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    return nn.ModuleDict({"body": body, "head": nn.Linear(8, 3)})


def adapted():
    model = network()
    inject_lora(model, ["q_proj"], rank=2, alpha=4)
    return model


def not_stacked():
    linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    return nn.ModuleDict({"q_proj": linear4bit(8, 8, compute_dtype=torch.float32)})


def inject(make=network, **arguments):
    """An injection that is refused leaves the model as it is."""
    model = make()
    before = [type(part) for part in model.modules()]
    try:
        inject_lora(model, **{"target_modules": ["q_proj"], "rank": 2, "alpha": 4} | arguments)
    finally:
        assert [type(part) for part in model.modules()] == before


def language_model(model_name="a/b", **arguments):
    _ = COLACausalLM(model_name, **{"target_modules": ["q_proj"]} | arguments).tokenizer


def template(prompt="Is it?", **arguments):
    TemplateDataModule("a/b", prompt=prompt, **arguments)


def task_row(task, **row):
    TASKS[task].example(Row(row, "train.jsonl, line 7"))


def set_up(data, row, chat=None, stage="fit", **module):
    """Sets up a data module for 20 equal rows and a tokenizer that adds no token of its own."""
    Path(data.source).write_text((json.dumps(row) + "\n") * 20)
    tokenizer = tiny.tokenizer("gpt2", pad=True)
    tokenizer.chat_template, tokenizer.model_max_length = chat, 64
    data.trainer = SimpleNamespace(training=False, world_size=1, global_rank=0)
    data.trainer.lightning_module = SimpleNamespace(**{"tokenizer": tokenizer, "seed": 3} | module)
    data.setup(stage)


def template_row(prompt="Is it?", **arguments):
    row = {"label": 1, "text": "It was {old}.", "size": 3, "gold": "blue", "empty": "", "none": None}
    set_up(TemplateDataModule("rows.jsonl", prompt=prompt, **arguments), row)


def text_row(chat=None, stage="fit", chat_template=None, **row):
    set_up(TextDataModule("rows.jsonl", max_length=30, chat_template=chat_template, max_new_tokens=8), row, chat, stage)


def labelled_row(**row):
    set_up(TextClassificationDataModule("rows.jsonl", text_fields="text"), row, label_names=["neg", "pos"])


def chain_folder(content):
    Path("chain.json").write_text(content)
    Path("chain.safetensors").touch()
    Chain.load(Path())


def export(folder="out", format_="merged", **arguments):
    Path("used").mkdir()
    Path("used", "file").touch()
    ExportOptions(Path(folder), format_, **arguments).check()


def overwrite():
    Path("folders", "inside").mkdir(parents=True)
    with atomic_folder(Path("folders"), overwrite=True):
        raise AssertionError


def generated(*words):
    generate(["--checkpoint", "nowhere", "--prompt", "It", *words])


def copied(*words):
    Path("smollm2.yaml").touch()
    configs(words)


def comparison(config="some.yaml", methods=("lora", "cola"), **options):
    Path("some.yaml").touch()
    Comparison(config, "out", list(methods), **options)


def method_of(name, chain=(), run=(), arguments=("rank", "alpha")):
    whens = dict.fromkeys(("every_n_epochs", "every_n_train_steps", "at_epochs", "at_steps", "ranks", "alphas"))
    config = {"model": {"class_path": "own.Module", "init_args": dict.fromkeys(arguments, 4)}, "chain": whens | dict(chain)}
    method(name, config | {"trainer": {"max_epochs": None, "max_steps": -1} | dict(run)})


def without_packages(do):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        do()


# ---------------------------------------------------------------------- the table

FIXED = {"options": [" no", " yes"]}
RECORD = {"passage": "A.", "query": "@placeholder left", "entities": ["Al", "Di"], "answers": ["Di"]}
CHAT = tiny.CHAT
USER, ASSISTANT = {"role": "user", "content": "Old?"}, {"role": "assistant", "content": "No"}
LONG = "The capital of the country is the largest town. " * 9

# What is given, the field with which the message begins, and, where others begin so, what it names; as a pattern.
REFUSALS = {
    ChainSchedule: [
        ({"every_n_epochs": 1, "at_steps": [2]}, "chain: every_n_epochs and at_steps"),
        ({"every_n_train_steps": -3}, r"chain\.every_n_train_steps"),
        ({"at_steps": [0, 3]}, r"chain\.at_steps"),
        ({"ranks": [4, 0]}, r"chain\.ranks"),
        ({"alphas": [1, -1]}, r"chain\.alphas"),
    ],
    ChainOfLoRA: [
        ({"patience": 0}, r"chain\.patience"),
        ({"monitor": "val_accuracy"}, r"chain\.monitor, chain\.min_delta, chain\.mode"),
    ],
    module: [
        ({"rank": 0}, r"model\.rank"),
        ({"alpha": float("inf")}, r"model\.alpha"),
        ({"dropout": 1.0}, r"model\.dropout"),
        ({"seed": 2**32}, r"model\.seed"),
        ({"finished_links": "merged"}, r"model\.finished_links"),
        ({"kept_optimizer_state": 2}, r"model\.kept_optimizer_state"),
        ({"init": "kaimin"}, r"model\.init"),
        ({"init_links": 2}, r"model\.init_links"),
        ({"init_chain": "nowhere"}, r"model\.init_chain: 'nowhere', which does not exist"),
        ({"init_chain": "."}, r"model\.init_chain: holds none of these"),
        ({"target_modules": ["22"]}, r"model\.target_modules: the nearest that exist: 2$"),
        ({"activation_checkpointing": True}, r"model\.activation_checkpointing"),
        ({"cls": type("NoBase", (Toy,), {"build_model": Toy.__base__.build_model})}, "model: NoBase"),
    ],
    knot: [({"rank": 3}, "rank"), ({"rank": 0}, "rank")],
    (lambda: adapted_model(target_modules=None).live_link()): [((), r"model\.target_modules")],
    (lambda: toy().full_chain().delta("3")): [((), "name: '3'; the nearest that exist: 0, 2")],
    fit: [
        ({"chain": {"ranks": [2, 3]}}, r"chain\.ranks"),
        ({"warmup_steps": 11, "chain": {"every_n_epochs": 1}}, r"model\.warmup_steps"),
        (
            {"schedule_scope": "run", "knot_warmup_steps": 7, "chain": {"every_n_train_steps": 6}},
            r"model\.knot_warmup_steps",
        ),
        ({"trainer_arguments": {"max_epochs": -1, "max_time": {"minutes": 1}}}, r"model\.lr_schedule"),
        ({"modules_to_save_lr": 0.1}, r"model\.modules_to_save_lr"),
        ({"cls": type("Manual", (Toy,), {"automatic_optimization": False})}, "model: automatic_optimization"),
        ({"target_modules": None, "chain": {"every_n_epochs": 1}}, r"model\.target_modules"),
    ],
    strategy: [(("ddp_spawn",), r"trainer\.strategy")],
    inject: [
        ({"finished_links": "merged"}, r"model\.finished_links"),
        ({"target_modules": ["q_porj"]}, r"model\.target_modules: the nearest that exist: q_proj"),
        ({"target_modules": ["norm"]}, r"model\.target_modules: 'body\.norm', which is a LayerNorm"),
        ({"target_modules": "all-linear", "make": nn.ModuleDict}, r"model\.target_modules: all-linear"),
        ({"modules_to_save": ["haed"]}, r"model\.modules_to_save: the nearest that exist: head"),
        ({"modules_to_save": ["body"]}, r"model\.modules_to_save: 'body\.q_proj'"),
        ({"make": adapted}, "model: adapted already"),
        ({"make": not_stacked}, r"model\.finished_links: 'q_proj'"),
    ],
    language_model: [
        ({"model_name": "package:no_such_package"}, r"model\.model_name"),
        ({"quantization": "nf4", "finished_links": "stack", "target_modules": None}, r"model\.target_modules"),
    ],
    (lambda **labels: COLASequenceClassifier("a/b", target_modules=["query"], **labels)): [
        ({"label_names": ["a", "a"]}, r"model\.num_labels, model\.label_names"),
        ({"label_names": ["a", "b"], "num_labels": 3}, r"model\.num_labels, model\.label_names"),
    ],
    (lambda **sizes: PythonSourceDataModule(**sizes).setup("fit")): [
        ({"eval_size": 10**6}, r"data\.eval_size"),
    ],
    tiny.reviews: [
        ({"max_length": 1}, r"data\.max_length"),
        ({"batch_size": 0}, r"data\.batch_size"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size"),
        ({"split_seed": -1}, r"data\.split_seed"),
    ],
    TextDataModule: [
        ({"source": "a/b", "train_size": 0}, r"data\.train_size"),
        ({"source": ".", "subset": "sst2"}, r"data\.subset"),
        ({"source": "a/b", "do_sample": True, "top_p": 1.5}, r"data\.top_p"),
        ({"source": "a/b", "temperature": 0.7}, r"data\.temperature"),
        ({"source": "a/b", "stop": ["\n", ""]}, r"data\.stop"),
    ],
    PromptDataModule: [
        ({"task": "BoolG"}, r"data\.task: the nearest that exist: BoolQ"),
    ],
    template: [
        ({"prompt": "{text", **FIXED}, r"data\.prompt"),
        ({"options": ["{", "a"]}, r"data\.options: '\{'"),
        ({}, r"data\.options, data\.answer: neither"),
        ({"answer": "gold", **FIXED}, r"data\.options, data\.answer: both"),
        ({"answer": "gold", "loss": "options"}, r"data\.loss"),
        ({"metric": "bleu", **FIXED}, r"data\.metric: accuracy, f1, matthews_corrcoef"),
    ],
    (lambda task, row: task_row(task, **row)): [
        (("SST2", {"label": 1}), "train.jsonl, line 7: 'sentence', received 'label'"),
        (("SST2", {"sentence": "Fine.", "label": 2}), "train.jsonl, line 7: 'label', received 2"),
        (("MultiRC", {"paragraph": "A.", "question": "B?", "answer": None}), "train.jsonl, line 7: 'answer'"),
        (("COPA", {"premise": "A.", "question": "reason"}), "train.jsonl, line 7: 'question'"),
        (("ReCoRD", RECORD | {"answers": ["Bo"]}), r"train.jsonl, line 7: \('Bo',\)"),
        (("ReCoRD", RECORD | {"query": "She left"}), "train.jsonl, line 7: differ"),
        (("SQuAD", {"title": "T", "context": "C", "question": "Q", "answers": ["A"]}), "train.jsonl, line 7: 'answers'"),
    ],
    template_row: [
        ({"prompt": "{txt}", **FIXED}, "rows.jsonl, row 16: 'txt', received 'label', 'text'"),
        ({"prompt": "{text.old}", **FIXED}, "rows.jsonl, row 16: an object in the field 'text'"),
        ({"prompt": "{none}", **FIXED}, r"rows.jsonl, row 16: 'none', received None \(2 of 2 rows"),
        ({"options": "text"}, "rows.jsonl, row 16: a list of texts in the field 'text'"),
        ({"options": [""], "label": "empty"}, r"rows.jsonl, row 16: received \('',\)"),
        ({"options": ["a", "a "]}, "rows.jsonl, row 16: differ"),
        ({"options": ["a", "b"], "label": "gold"}, "rows.jsonl, row 16: 'gold', received 'blue'"),
        (
            {"options": [" 1", " 2", " 3", " 4"], "label": "size"},
            "rows.jsonl, row 16: text, for the option '3' has the index 2",
        ),
        ({"prompt": "{empty}", **FIXED}, "rows.jsonl, row 16: a prompt"),
        ({"options": [LONG, "b"], "max_length": 9}, r"rows.jsonl, row 16: \(data\.max_length\)"),
        ({"answer": "gold", "max_length": 51}, r"data\.max_length"),
        ({"apply_chat_template": True, **FIXED}, "data: chat template"),
        ({"train_size": 19, **FIXED}, r"data\.train_size \+ data\.val_size \+ data\.test_size, of rows\.jsonl"),
        ({"test_split": "test", **FIXED}, r"data\.test_split"),
    ],
    text_row: [
        ({"messages": [USER, ASSISTANT]}, "data: chat template"),
        ({"messages": [USER, ASSISTANT, USER], "chat": CHAT}, "rows.jsonl, row 16: the user's"),
        ({"messages": [], "chat": CHAT}, "rows.jsonl, row 16: 'messages'"),
        ({"messages": [ASSISTANT, USER], "chat": CHAT}, "rows.jsonl, row 16: the assistant's"),
        ({"messages": [USER, ASSISTANT], "chat": CHAT, "chat_template": False}, r"data\.chat_template"),
        ({"prompt": "Old?"}, r"data\.columns"),
        ({"prompt": "Old?", "response": None}, "rows.jsonl, row 16: 'response', received None"),
        ({"prompt": "Old?", "response": ""}, "rows.jsonl, row 16: a response"),
        ({"prompt": "It", "response": LONG}, r"rows.jsonl, row 16: \(data\.max_length\), received 100"),
        ({"prompt": "", "response": "No", "stage": "predict"}, "rows.jsonl, row 1: a prompt"),
        ({"text": ""}, r"data\.source"),
        ({"prompt": "Old?", "response": "No", "chat_template": True}, "data: chat template"),
    ],
    labelled_row: [
        ({"label": 1}, r"data\.text_fields"),
        ({"text": "fine"}, r"data\.label_field"),
        ({"text": "fine", "label": None}, "rows.jsonl, row 16: 'label', received None"),
        ({"text": "fine", "label": ["x"]}, r"rows.jsonl, row 1: 'label', received \['x'\]"),
        ({"text": "fine", "label": "odd"}, "rows.jsonl, row 16: neg, pos .* 'odd'"),
    ],
    read_chain: [(("nowhere",), "checkpoint: not exist"), ((".",), "checkpoint: none")],
    chain_folder: [
        (("{",), "chain: damaged"),
        (('{"format_version": 9}',), "chain: 2 to 4, .* a newer release is needed"),
        (('{"format_version": true}',), "chain: 2 to 4, .* another program's"),
    ],
    (lambda path, *reports: plot(reports, Path(path))): [(("out.png",), "plot: 0 links")],
    export: [
        ({"max_rank": 2}, "max_rank"),
        ({"format_": "peft", "max_rank": 0}, "max_rank"),
        ({"base_folder": Path("base")}, "base_folder"),
        ({"folder": "used"}, "output: 'used'"),
        ({"folder": "used/file"}, "output: 'used/file'"),
    ],
    overwrite: [((), "output: 'folders'")],
    generated: [
        (("--prompt", " "), "prompt"),
        ((), "checkpoint"),
    ],
    copied: [(("smolm2",), "names: the nearest that exist: smollm2"), (("smollm2", "--output", "."), "output")],
    comparison: [
        ({"metric": "val_mse"}, "mode"),
        ({"learning_rates": {"lora": [0.01]}}, "learning_rates"),
    ],
    method_of: [
        (("lore",), "methods: the nearest that exist: lora"),
        (("cola-0",), "methods: 'cola-0'"),
        (("cola", {}, {"max_epochs": 3}), "methods: knots"),
        (("lora-sum-rank", {"every_n_epochs": 1}, {"max_steps": 20}), "methods: known only after a run"),
        (("cola-9", {}, {"max_epochs": 3}), "methods: at most 3 links"),
        (("cola-2",), "trainer: max_steps or max_epochs"),
        (("lora", (), (), ()), r"model: rank, .* 'own\.Module'"),
        (("lora-sum-rank-2", {}, {"max_steps": 20}, ["rank"]), r"model: alpha, .* 'own\.Module'"),
    ],
    without_packages: [
        ((lambda: ExportOptions(Path("out"), "peft").check(),), "format: pip install peft"),
    ],
}


@pytest.mark.parametrize(
    ("do", "given", "message"), [pytest.param(do, *row, id=f"{row[1]}") for do, rows in REFUSALS.items() for row in rows]
)
def test_what_is_mistyped_is_refused_in_one_line_that_names_it(do, given, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "cola_lightning")  # and back, after a command that sets it
    with pytest.raises(UserError) as caught:
        do(**given) if isinstance(given, dict) else do(*given)
    field, _, words = message.partition(": ")
    assert re.fullmatch(f"{field}: expected .*{words}.*", str(caught.value)), str(caught.value)


def test_a_path_without_permission_is_refused_in_one_line(monkeypatch, capsys):
    refuse = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied", "of_another"))
    monkeypatch.setattr(Path, "is_dir", refuse)  # an administrator, as in a container, may read anything
    assert main(["generate", "--checkpoint", "of_another", "--prompt", "Is it?"]) == 2
    assert capsys.readouterr().err.startswith("error: cola: expected a file or folder that may be used, received 'of_another'")
