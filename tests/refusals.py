"""What users write wrong, and the line with which each is refused: the table that ``tests/test_refusals.py`` runs.

A section is one way of writing something wrong. A row is what is given there, and the whole message; ``...`` in it stands for
what another library says, or for what depends on the machine. Every row runs in an empty folder. What needs a longer run or a
checkpoint is refused in the test file of its subject.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

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
    inject_lora,
)
from cola_lightning.callbacks.chain_of_lora import check_strategy
from cola_lightning.chain.checkpoint import OpenedCheckpoint, read_chain
from cola_lightning.chain.report import plot
from cola_lightning.cli.configs import configs
from cola_lightning.cli.generate import generate
from cola_lightning.data.rows import Row
from cola_lightning.data.tasks import TASKS
from cola_lightning.export.verify import ExportOptions
from cola_lightning.study.command import compare
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.methods import method
from cola_lightning.writing import atomic_folder
from tests import tiny
from tests.toy import Toy, batches, toy, trainer

SECTIONS: dict[Callable[..., object], list[tuple[Any, str]]] = {}


class Refusal(NamedTuple):
    """A row of the table."""

    do: Callable[..., object]
    given: Any
    message: str

    @property
    def field(self) -> str:
        return self.message.partition(":")[0]

    def provoke(self) -> object:
        """Does what is refused; keyword arguments are given as a dict, several others as a tuple."""
        if isinstance(self.given, dict):
            return self.do(**self.given)
        return self.do(*self.given) if isinstance(self.given, tuple) else self.do(self.given)


def refused(*rows: tuple[Any, str]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Adds a section to the table: the decorated function does what is given."""

    def add(do: Callable[..., object]) -> Callable[..., object]:
        SECTIONS[do] = list(rows)
        return do

    return add


# ---------------------------------------------------------------------- the chain


@refused(
    (
        {"every_n_epochs": 1, "at_steps": [2]},
        "chain: expected at most one of every_n_epochs, every_n_train_steps, at_epochs, at_steps, knots, patience, "
        "received every_n_epochs and at_steps",
    ),
    ({"every_n_epochs": 0}, "chain.every_n_epochs: expected a whole number of at least 1, received 0"),
    ({"every_n_train_steps": -3}, "chain.every_n_train_steps: expected a whole number of at least 1, received -3"),
    ({"at_epochs": [3, 3]}, "chain.at_epochs: expected an increasing list of whole numbers from 1, received [3, 3]"),
    ({"at_steps": [0, 3]}, "chain.at_steps: expected an increasing list of whole numbers from 1, received [0, 3]"),
    ({"ranks": [4, 0]}, "chain.ranks: expected numbers above 0, received [4, 0]"),
    ({"alphas": [1, -1]}, "chain.alphas: expected numbers above 0, received [1, -1]"),
)
def schedule(**chain):
    ChainSchedule(**chain)


@refused(
    ({"patience": 0}, "chain.patience: expected a whole number of at least 1, received 0"),
    (
        {"monitor": "val_accuracy"},
        "chain.monitor, chain.min_delta, chain.mode: expected chain.patience beside them, received none",
    ),
)
def rule(**chain):
    ChainOfLoRA(**chain)


@refused(
    ({"rank": 0}, "model.rank: expected a whole number of at least 1, received 0"),
    ({"alpha": 0}, "model.alpha: expected a number above 0, received 0"),
    ({"alpha": float("inf")}, "model.alpha: expected a number above 0, received inf"),
    ({"dropout": 1.0}, "model.dropout: expected a probability from 0 to below 1, received 1.0"),
    ({"seed": -1}, "model.seed: expected a whole number from 0 to 2**32 - 1, received -1"),
    ({"seed": 2**32}, "model.seed: expected a whole number from 0 to 2**32 - 1, received 4294967296"),
    ({"finished_links": "merged"}, "model.finished_links: expected merge or stack, received 'merged'"),
    ({"kept_optimizer_state": 2}, "model.kept_optimizer_state: expected a share from 0 to 1, received 2"),
    ({"init": "kaimin"}, "model.init: expected kaiming, gaussian, received 'kaimin'"),
    ({"init_links": 2}, "model.init_links: expected null, or model.init_chain beside it, received 2 alone"),
    (
        {"init_chain": "nowhere"},
        "model.init_chain: expected a checkpoint, a chain folder or a PEFT adapter, received 'nowhere', which does not exist",
    ),
    (
        {"init_chain": "."},
        "model.init_chain: expected a checkpoint, a chain folder or a PEFT adapter, received '.', which holds none of these",
    ),
)
def module(**arguments):
    toy(**arguments).configure_model()


@refused(
    ({"finished_links": "merged"}, "model.finished_links: expected merge or stack, received 'merged'"),
    ({"init": "kaimin", "target_modules": None}, "model.init: expected kaiming, gaussian, received 'kaimin'"),
    ({"seed": -1}, "model.seed: expected a whole number from 0 to 2**32 - 1, received -1"),
)
def adapted_model(**arguments):
    AdaptedModel.of(lambda: nn.Sequential(nn.Linear(8, 4)), **{"rank": 2, "alpha": 4} | arguments)


@refused(({"finished_links": "merged"}, "model.finished_links: expected merge or stack, received 'merged'"))
def injected(**arguments):
    inject_lora(nn.Sequential(nn.Linear(8, 4)), ["0"], rank=2, alpha=4, **arguments)


@refused(
    (
        {"target_modules": ["22"]},
        "model.target_modules: expected the name of a module of the model, received '22'; the nearest that exist: 2",
    ),
    (
        {"activation_checkpointing": True},
        "model.activation_checkpointing: expected a Hugging Face model, or a module that overrides "
        "checkpoint_activations, received a Sequential",
    ),
    (
        {"cls": type("NoBase", (Toy,), {"build_model": Toy.__base__.build_model})},
        "model: expected a class with a build_model() that returns its base, received NoBase",
    ),
)
def make(**arguments):
    toy(**arguments).configure_model()


@refused(
    ({"rank": 3}, "rank: expected 1 to 2, the largest rank of a link (model.rank), received 3"),
    ({"rank": 0}, "rank: expected 1 to 2, the largest rank of a link (model.rank), received 0"),
    (
        {"module": {"target_modules": None}},
        "model.target_modules: expected layers to adapt for a link, received null",
    ),
)
def tie_knot(module=(), **arguments):
    made = toy(**dict(module))
    made.configure_model()
    try:
        made.tie_knot(**arguments)
    finally:
        assert made.link == 0


def in_torch(**arguments):
    return AdaptedModel.of(lambda: Toy.build_model(None), **{"rank": 2, "alpha": 4} | arguments)


@refused(
    ({"rank": 3}, "rank: expected 1 to 2, the largest rank of a link (model.rank), received 3"),
    ({"rank": 0}, "rank: expected 1 to 2, the largest rank of a link (model.rank), received 0"),
)
def tie_knot_in_torch(**arguments):
    made = in_torch()
    before = [layer.weight.clone() for layer in made.layers.values()]
    with torch.no_grad():
        for layer in made.layers.values():
            layer.lora_B.fill_(1)
    try:
        made.tie_knot(**arguments)
    finally:
        assert (made.link, made.live) == (0, (2, 4))
        assert all(map(torch.equal, before, [layer.weight for layer in made.layers.values()]))


@refused(
    (toy, "model.target_modules: expected layers to adapt for a link, received null"),
    (in_torch, "model.target_modules: expected layers to adapt for a link, received null"),
)
def live_link(make):
    make(target_modules=None).live_link()


@refused(
    ("3", "name: expected a layer of the chain, received '3'; the nearest that exist: 0, 2"),
)
def delta(name):
    toy().full_chain().delta(name)


@refused(
    ({"chain": {"ranks": [2, 3]}}, "chain.ranks: expected at most 2, which is model.rank, received 3"),
    (
        {"module": {"warmup_steps": 11}, "chain": {"every_n_epochs": 1}},
        "model.warmup_steps: expected at most 10, the shortest link's steps, received 11",
    ),
    (
        {"module": {"schedule_scope": "run", "knot_warmup_steps": 7}, "chain": {"every_n_train_steps": 6}},
        "model.knot_warmup_steps: expected at most 6, the shortest link's steps, received 7",
    ),
    (
        {"max_epochs": -1, "max_time": {"minutes": 1}},
        "model.lr_schedule: expected constant, or model.schedule_scope run with max_epochs or max_steps, and warm-ups in "
        "steps, where a link's length is not known beforehand (chain.patience, an overridden should_tie, endless data), "
        "received linear, warm-ups of 0 and, after knots, 0",
    ),
    (
        {"module": {"modules_to_save_lr": 0.1}},
        "model.modules_to_save_lr: expected modules_to_save beside it, received none",
    ),
    (
        {"module": {"cls": type("Manual", (Toy,), {"automatic_optimization": False})}},
        "model: expected automatic optimization, received automatic_optimization = False",
    ),
    (
        {"module": {"target_modules": None}, "chain": {"every_n_epochs": 1}},
        "model.target_modules: expected layers to adapt for a chain with knots, received null",
    ),
)
def fit(module=(), chain=(), **arguments):
    trainer(Path(), chain=dict(chain), **{"max_epochs": 3} | arguments).fit(toy(**dict(module)), batches())


@refused(
    *(
        (
            name,
            "trainer.strategy: expected ddp, fsdp or ModelParallelStrategy (FSDP2: configs/overlays/fsdp2.yaml), received "
            "DDPStrategy: DeepSpeed's engine owns the optimizer that a knot must replace, and from processes that are forked "
            "or spawned the chain does not return",
        )
        for name in ("ddp_fork", "ddp_spawn")
    )
)
def strategy(name):
    check_strategy(trainer(Path(), strategy=name, devices=1).strategy)


# ---------------------------------------------------------------------- what is adapted


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 3)


def shared_module():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    return model


def shared_weight():
    model = Model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    return model


def adapted():
    model = Model()
    inject_lora(model, ["q_proj"], rank=2, alpha=4)
    return model


def not_quantised():
    linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit
    return nn.ModuleDict({"q_proj": linear4bit(8, 8, compute_dtype=torch.float32)})


def normalised():
    model = Model()
    parametrizations.weight_norm(model.layers[0].q_proj)
    return model


@refused(
    (
        {"target_modules": ["q_porj"]},
        "model.target_modules: expected the name of a module of the model, received 'q_porj'; the nearest that "
        "exist: q_proj, v_proj, k_proj",
    ),
    (
        {"target_modules": ["q_proj", "value"]},
        "model.target_modules: expected the name of a module of the model, received 'value'; the nearest that exist: "
        "q_proj, k_proj, v_proj",
    ),
    (
        {"target_modules": r".*\.qproj"},
        "model.target_modules: expected the name of a module of the model, received '.*\\\\.qproj'; the nearest that "
        "exist: q_proj",
    ),
    (
        {"target_modules": ["norm"]},
        "model.target_modules: expected layers of type ..., received 'layers.0.norm', which is a LayerNorm",
    ),
    (
        {"target_modules": "all-linear", "make": lambda: nn.Sequential(nn.ReLU())},
        "model.target_modules: expected linear layers for all-linear, received none",
    ),
    (
        {"modules_to_save": ["haed"]},
        "model.modules_to_save: expected the name of a module of the model, received 'haed'; the nearest that exist: head",
    ),
    (
        {"modules_to_save": ["layers"]},
        "model.modules_to_save: expected modules that hold no target, received the target 'layers.0.q_proj'",
    ),
    (
        {"make": shared_module},
        "model.target_modules: expected modules with weights of their own, received 'layers.0.q_proj', whose weight "
        "is shared (layers.0.q_proj.weight = layers.1.q_proj.weight)",
    ),
    (
        {"make": shared_weight},
        "model.target_modules: expected modules with weights of their own, received 'layers.0.q_proj', whose weight "
        "is shared (layers.0.q_proj.weight = layers.1.q_proj.weight)",
    ),
    ({"make": adapted}, "model: expected a model without LoRA layers, received one that is adapted already"),
    (
        {"make": normalised},
        "model.target_modules: expected layers to which a link can be added, received 'layers.0.q_proj', "
        "whose weight is computed at each forward pass: torch.nn.utils (parametrize.remove_parametrizations, "
        "remove_weight_norm, prune.remove, ...) makes it a parameter",
    ),
    (
        {"make": not_quantised},
        "model.finished_links: expected stack for the quantised weight of 'q_proj', received merge",
    ),
)
def inject(make=Model, **arguments):
    model = make()
    before = [type(module) for module in model.modules()]
    try:
        inject_lora(model, **{"target_modules": ["q_proj"], "rank": 2, "alpha": 4} | arguments)
    finally:
        assert [type(module) for module in model.modules()] == before


# ---------------------------------------------------------------------- models


@refused(
    (
        {"model_name": "package:no_such_package"},
        "model.model_name: expected the import name of an installed package after package:, received "
        "'package:no_such_package': is it installed in this environment?",
    ),
    (
        {"model_name": "package:sys"},
        "model.model_name: expected the import name of an installed package after package:, received 'package:sys': "
        "is it installed in this environment?",
    ),
    ({"quantization": "int8", "finished_links": "stack"}, "model.quantization: expected null or nf4, received 'int8'"),
    (
        {"quantization": "nf4", "finished_links": "stack", "target_modules": None},
        "model.target_modules: expected layers to adapt beside model.quantization, for 4-bit weights cannot be "
        "trained, received null",
    ),
)
def language_model(model_name="a/b", **arguments):
    module = COLACausalLM(model_name, **{"target_modules": ["q_proj"]} | arguments)
    _ = module.tokenizer


@refused(
    *(
        (
            given,
            "model.num_labels, model.label_names: expected at least 2 labels that differ, their number or as many of both, "
            f"received {given.get('num_labels')} and {given.get('label_names')}",
        )
        for given in (
            {"num_labels": 1},
            {"label_names": ["a"]},
            {"label_names": ["a", "a"]},
            {"label_names": ["a", "b"], "num_labels": 3},
        )
    ),
)
def classifier(**arguments):
    COLASequenceClassifier("a/b", target_modules=["query"], **arguments)


@refused(
    ({"context": 0}, "data.context: expected a whole number of at least 1, received 0"),
    ({"eval_size": 10**6}, "data.eval_size: expected at most ... windows of this length, received 1000000"),
)
def python_source(**arguments):
    PythonSourceDataModule(**arguments).setup("fit")


# ---------------------------------------------------------------------- arguments of data modules


@refused(
    ({"max_length": 1}, "data.max_length: expected at least 2 tokens, received 1"),
    ({"eval_batch_size": 0}, "data.eval_batch_size: expected a whole number of at least 1, received 0"),
    ({"batch_size": 0}, "data.batch_size: expected a whole number of at least 1, received 0"),
    ({"split_seed": -1}, "data.split_seed: expected a whole number from 0 to 2**32 - 1, received -1"),
)
def reviews(**arguments):
    tiny.reviews(**arguments)


@refused(
    ({"train_size": 0}, "data.train_size: expected a whole number of rows, or a share up to 1.0, received 0"),
    ({"val_size": 1.5}, "data.val_size: expected a whole number of rows, or a share up to 1.0, received 1.5"),
    ({"test_size": -0.1}, "data.test_size: expected a whole number of rows, or a share up to 1.0, received -0.1"),
    ({"source": ".", "subset": "sst2"}, "data.subset: expected null for files on this machine, '.', received 'sst2'"),
    ({"do_sample": True, "top_p": 1.5}, "data.top_p: expected a probability above 0, 1 at most, received 1.5"),
    (
        {"temperature": 0.7},
        "data.temperature: expected data.do_sample true beside it, for the most probable token is taken without it, "
        "received 0.7 alone",
    ),
    (
        {"top_p": 0.7},
        "data.top_p: expected data.do_sample true beside it, for the most probable token is taken without it, "
        "received 0.7 alone",
    ),
    ({"stop": ""}, "data.stop: expected texts of at least one character, received an empty one"),
    ({"stop": ["\n", ""]}, "data.stop: expected texts of at least one character, received an empty one"),
)
def text_data(source="a/b", **arguments):
    TextDataModule(source, **arguments)


@refused(
    (
        {"task": "BoolG"},
        "data.task: expected SST2, RTE, CB, BoolQ, WSC, WIC, MultiRC, COPA, ReCoRD, SQuAD, DROP, received 'BoolG'; "
        "the nearest that exist: BoolQ",
    ),
    (
        {"task": "SST2", "train_size": 0},
        "data.train_size: expected a whole number of rows, or a share up to 1.0, received 0",
    ),
    (
        {"task": "SST2", "source": "rows.csv", "subset": "sst2"},
        "data.subset: expected null for files on this machine, 'rows.csv', received 'sst2'",
    ),
)
def prompt_data(**arguments):
    Path("rows.csv").touch()
    PromptDataModule(**arguments)


FIXED = {"options": [" no", " yes"]}


@refused(
    ({"prompt": "{text", **FIXED}, "data.prompt: expected text with fields in braces ({{ for a brace), received '{text'"),
    ({"prompt": "text}", **FIXED}, "data.prompt: expected text with fields in braces ({{ for a brace), received 'text}'"),
    (
        {"prompt": "Is\nit?", "options": ["{", "a"]},
        "data.options: expected text with fields in braces ({{ for a brace), received '{'",
    ),
    ({}, "data.options, data.answer: expected one of the two, received neither"),
    (
        {"answer": "gold", **FIXED},
        "data.options, data.answer: expected one of the two, received both",
    ),
    (
        {"answer": "gold", "loss": "options"},
        "data.loss: expected null or answer where the answer is generated, received options",
    ),
    (
        {"metric": "bleu", **FIXED},
        "data.metric: expected accuracy, f1, matthews_corrcoef or null for this task, received 'bleu'",
    ),
    (
        {"answer": "gold", "metric": "accuracy"},
        "data.metric: expected f1, exact_match or null for this task, received 'accuracy'",
    ),
    (
        {"options": "all", "metric": "f1"},
        "data.metric: expected accuracy or null for this task, received 'f1'",
    ),
)
def template_data(prompt="Is it?", **arguments):
    TemplateDataModule("a/b", prompt=prompt, **arguments)


# ---------------------------------------------------------------------- rows

RECORD = {"passage": "A.", "query": "@placeholder left", "entities": ["Al", "Di"], "answers": ["Di"]}
SQUAD = {"title": "T", "context": "C", "question": "Q"}


@refused(
    (("SST2", {"label": 1}), "train.jsonl, line 7: expected the field 'sentence', received 'label'"),
    (("SST2", {}), "train.jsonl, line 7: expected the field 'sentence', received no field"),
    (
        ("SST2", {"sentence": "Fine.", "label": 2}),
        "train.jsonl, line 7: expected a label from 0 to 1 in the field 'label', received 2",
    ),
    (
        ("CB", {"premise": "A.", "hypothesis": "B.", "label": -1}),
        "train.jsonl, line 7: expected a label from 0 to 2 in the field 'label', received -1",
    ),
    (
        ("BoolQ", {"passage": "A.", "question": "Is it"}),
        "train.jsonl, line 7: expected the field 'label', received 'passage', 'question'",
    ),
    (
        ("BoolQ", {"passage": "A.", "question": "Is it", "answer": "yes"}),
        "train.jsonl, line 7: expected a label from 0 to 1 in the field 'answer', received 'yes'",
    ),
    (
        ("WSC", {"text": "A.", "span1_text": "A", "label": 1}),
        "train.jsonl, line 7: expected the field 'span2_text', received 'text', 'span1_text', 'label'",
    ),
    (
        ("MultiRC", {"paragraph": "A.", "question": "B?", "answer": None}),
        "train.jsonl, line 7: expected text in the field 'answer', received None",
    ),
    (
        ("COPA", {"premise": "A.", "question": "reason"}),
        "train.jsonl, line 7: expected cause or effect in the field 'question', received 'reason'",
    ),
    (
        ("COPA", {"premise": "A.", "question": "cause", "choice1": "It was.", "choice2": "it was.", "label": 0}),
        "train.jsonl, line 7: expected options that differ, received ('it was.', 'it was.')",
    ),
    (("ReCoRD", RECORD | {"answers": ["Bo"]}), "train.jsonl, line 7: expected answers among the entities, received ('Bo',)"),
    (("ReCoRD", RECORD | {"answers": []}), "train.jsonl, line 7: expected a list of texts in the field 'answers', received []"),
    (
        ("ReCoRD", RECORD | {"entities": []}),
        "train.jsonl, line 7: expected a list of texts in the field 'entities', received []",
    ),
    (
        ("ReCoRD", RECORD | {"entities": "Di"}),
        "train.jsonl, line 7: expected a list of texts in the field 'entities', received 'Di'",
    ),
    (
        ("ReCoRD", RECORD | {"query": "She left"}),
        "train.jsonl, line 7: expected options that differ, received (' She left', ' She left')",
    ),
    (
        ("SQuAD", SQUAD | {"answers": {"text": []}}),
        "train.jsonl, line 7: expected a list of texts in the field 'text', received []",
    ),
    (("SQuAD", SQUAD | {"answers": ["A"]}), "train.jsonl, line 7: expected an object in the field 'answers', received ['A']"),
    (
        ("DROP", {"passage": "P", "question": "Q", "answers_spans": {"spans": [3]}}),
        "train.jsonl, line 7: expected text in the field 'spans', received 3",
    ),
    (
        ("DROP", {"context": "P", "question": "Q"}),
        "train.jsonl, line 7: expected the field 'passage', received 'context', 'question'",
    ),
)
def row_of_a_task(task, row):
    TASKS[task].example(Row(row, "train.jsonl, line 7"))


def set_up(data, row, stage="fit", chat=None, n_rows=20, **module):
    """A data module with a file of equal rows, and a module whose tokenizer adds no token of its own."""
    Path(data.source).write_text((json.dumps(row) + "\n") * n_rows)
    tokenizer = tiny.tokenizer("gpt2", pad=True)
    tokenizer.chat_template, tokenizer.model_max_length = chat, 64
    module = SimpleNamespace(**{"tokenizer": tokenizer, "seed": 3} | module)
    data.trainer = SimpleNamespace(lightning_module=module, training=False, world_size=1, global_rank=0)
    data.setup(stage)


ROW = {"text": "It was {old}.", "size": 3, "share": 0.5, "label": 1, "by": {"name": "Al", "town": {"name": "Oslo"}}}
ROW |= {"all": ["red", "blue"], "answers": {"text": ["blue", "navy"]}, "gold": "blue", "empty": "", "none": None}


@refused(
    (
        {"prompt": "{txt}", **FIXED},
        "rows.jsonl, row 16: expected the field 'txt', received 'text', 'size', 'share', 'label', 'by', 'all', "
        "'answers', 'gold', 'empty', 'none'",
    ),
    ({"prompt": "{by.nme}", **FIXED}, "rows.jsonl, row 16: expected the field 'nme', received 'name', 'town'"),
    (
        {"prompt": "{text.old}", **FIXED},
        "rows.jsonl, row 16: expected an object in the field 'text', received 'It was {old}.'",
    ),
    (
        {"prompt": "{none}", **FIXED},
        "rows.jsonl, row 16: expected text in the field 'none', received None (2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"prompt": "{by}", **FIXED},
        "rows.jsonl, row 16: expected text in the field 'by', received {'name': 'Al', 'town': {'name': 'Oslo'}}",
    ),
    (
        {"options": ["no", "{txt}"]},
        "rows.jsonl, row 16: expected the field 'txt', received 'text', 'size', 'share', 'label', 'by', 'all', "
        "'answers', 'gold', 'empty', 'none'",
    ),
    (
        {"options": "al"},
        "rows.jsonl, row 16: expected the field 'al', received 'text', 'size', 'share', 'label', 'by', 'all', "
        "'answers', 'gold', 'empty', 'none'",
    ),
    ({"options": "text"}, "rows.jsonl, row 16: expected a list of texts in the field 'text', received 'It was {old}.'"),
    (
        {"label": "lbl", **FIXED},
        "rows.jsonl, row 16: expected the field 'lbl', received 'text', 'size', 'share', 'label', 'by', 'all', "
        "'answers', 'gold', 'empty', 'none'",
    ),
    ({"answer": "answers.txt"}, "rows.jsonl, row 16: expected the field 'txt', received 'text'"),
    (
        {"answer": "none"},
        "rows.jsonl, row 16: expected a list of texts in the field 'none', received None "
        "(2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"options": [""], "label": "empty"},
        "rows.jsonl, row 16: expected options that add tokens to the prompt, received ('',) "
        "(2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"options": ["a", "a "]},
        "rows.jsonl, row 16: expected options that differ in more than spaces, received ('a', 'a ') "
        "(2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"options": ["a", "b"], "label": "gold"},
        "rows.jsonl, row 16: expected one of the options ['a', 'b'] in the field 'gold', received 'blue'",
    ),
    (
        {"options": ["a", "b"], "label": "size"},
        "rows.jsonl, row 16: expected a label from 0 to 1 in the field 'size', received 3",
    ),
    (
        {"options": [" 1", " 2", " 3", " 4"], "label": "size"},
        "rows.jsonl, row 16: expected text, for the option '3' has the index 2, in the field 'size', received 3",
    ),
    (
        {"options": ["a", "b"], "label": "share"},
        "rows.jsonl, row 16: expected a label from 0 to 1 in the field 'share', received 0.5",
    ),
    (
        {"options": ["{gold}", "blue"]},
        "rows.jsonl, row 16: expected options that differ, received ('blue', 'blue') "
        "(2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"prompt": "{empty}", **FIXED},
        "rows.jsonl, row 16: expected a prompt of at least one token, received '' (2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"options": ["It was the largest town. " * 3, "b"], "max_length": 9},
        "rows.jsonl, row 16: expected options of fewer than 9 tokens (data.max_length), received one of 19 "
        "(2 of 2 rows cannot be used, more than 1 %)",
    ),
    (
        {"answer": "gold", "max_length": 51},
        "data.max_length: expected over 51 with generated answers, received 51",
    ),
    (
        {"apply_chat_template": True, **FIXED},
        "data: expected a tokenizer with a chat template (model.model_name), received one without",
    ),
    (
        {"train_size": 19, **FIXED},
        "data.train_size + data.val_size + data.test_size, of rows.jsonl: expected at least 23 rows, received 20",
    ),
    (
        {"test_split": "test", **FIXED},
        "data.test_split: expected one of the splits train, received 'test'",
    ),
)
def row_of_a_template(prompt="Is it?", **arguments):
    set_up(TemplateDataModule("rows.jsonl", prompt=prompt, **arguments), ROW)


CHAT = tiny.CHAT
WORDLESS = CHAT.replace("{{ turn['content'] }}", "{{ turn['content'] if turn['content'] != 'No' }}")
ALTERNATING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('A user comes first') }}{% endif %}" + CHAT
SYSTEM, USER, ASSISTANT = (
    {"role": role, "content": content} for role, content in (("system", "Be brief."), ("user", "Old?"), ("assistant", "No"))
)
LONG = "The capital of the country is the largest town. " * 9


@refused(
    ([USER, ASSISTANT], "data: expected a tokenizer with a chat template (model.model_name), received one without"),
    (
        ([USER, ASSISTANT, USER], CHAT),
        "rows.jsonl, row 16: expected the assistant's turn as the last one, for a loss, received the user's",
    ),
    (
        ([USER, ASSISTANT], WORDLESS),
        "rows.jsonl, row 16: expected a chat template that renders the assistant's words, 'No' among them",
    ),
    (([], CHAT), "rows.jsonl, row 16: expected a list of turns with role and content in the field 'messages', received []"),
    (([USER, {"role": "assistant"}], CHAT), "rows.jsonl, row 16: expected the field 'content', received 'role'"),
    (
        ([USER, {"role": "assistant", "content": None}], CHAT),
        "rows.jsonl, row 16: expected the field 'content', received 'role'",
    ),
    (
        ([ASSISTANT, USER], CHAT),
        "rows.jsonl, row 16: expected a first turn of another role than assistant, received the assistant's",
    ),
    (
        ([SYSTEM, USER, ASSISTANT], ALTERNATING),
        "rows.jsonl, row 16: expected turns that the chat template can render, received: A user comes first",
    ),
)
def conversation(messages, chat=None, stage="fit"):
    set_up(TextDataModule("rows.jsonl"), {"messages": messages}, stage, chat)


@refused(
    (
        ({"prompt": "Old?"},),
        "data.columns: expected a conversation (messages), a prompt with its response, or text among the columns prompt, "
        "received none: name them by --data.columns '{prompt: prompt, response: prompt}'",
    ),
    (({"prompt": "Old?", "response": None},), "rows.jsonl, row 16: expected text in the field 'response', received None"),
    (
        ({"prompt": "Old?", "response": ""},),
        "rows.jsonl, row 16: expected a response that adds tokens to its prompt, received ''",
    ),
    (
        ({"prompt": "Old?", "response": ""}, "fit", CHAT),
        "rows.jsonl, row 16: expected a response that adds tokens to its prompt, received ''",
    ),
    (
        ({"prompt": "It", "response": LONG},),
        "rows.jsonl, row 16: expected a response of fewer than 30 tokens (data.max_length), received 100",
    ),
    (
        ({"prompt": "It", "response": LONG}, "fit", CHAT),
        "rows.jsonl, row 16: expected a response of fewer than 30 tokens (data.max_length), received 101",
    ),
    (
        ({"prompt": "", "response": "No"}, "predict"),
        "rows.jsonl, row 1: expected a prompt of at least one token, received {'prompt': '', 'response': 'No'}",
    ),
    (({"text": ""},), "data.source: expected rows of at least two tokens, received none in 'rows.jsonl'"),
    (
        ({"prompt": "Old?", "response": "No"}, "fit", None, True),
        "data: expected a tokenizer with a chat template (model.model_name), received one without",
    ),
    (
        ({"messages": [USER, ASSISTANT]}, "fit", CHAT, False),
        "data.chat_template: expected null or true for conversations, received false",
    ),
)
def text_or_instruction(row, stage="fit", chat=None, chat_template=None, max_new_tokens=8):
    data = TextDataModule("rows.jsonl", max_length=30, chat_template=chat_template, max_new_tokens=max_new_tokens)
    set_up(data, row, stage, chat)


@refused(
    ({"label": 1}, "data.text_fields: expected one or two of the columns label, received text"),
    ({"text": "fine"}, "data.label_field: expected one of the columns text, received none"),
    ({"text": "fine", "label": None}, "rows.jsonl, row 16: expected a label in the field 'label', received None"),
    (
        {"text": "fine", "label": ["x"]},
        "rows.jsonl, row 1: expected a label, text or a whole number, in the field 'label', received ['x']",
    ),
    (
        {"text": "fine", "label": "odd"},
        "rows.jsonl, row 16: expected one of the labels neg, pos in the field 'label', received 'odd'",
    ),
    ({"text": 3, "label": "pos"}, "rows.jsonl, row 16: expected text in the field 'text', received 3"),
    ({"text": "", "label": "pos"}, "rows.jsonl, row 16: expected at least one token of text in text, received none"),
)
def labelled_row(**row):
    set_up(TextClassificationDataModule("rows.jsonl", text_fields="text"), row, label_names=["neg", "pos"])


# ---------------------------------------------------------------------- files of chains


@refused(
    ("nowhere", "checkpoint: expected a checkpoint file, received 'nowhere', which cannot be read (No such file or directory)"),
    (".", "checkpoint: expected a checkpoint file, received '.', which cannot be read (Is a directory)"),
)
def checkpoint(path):
    OpenedCheckpoint.open(path)


@refused(
    (
        "nowhere",
        "checkpoint: expected a checkpoint, a chain folder or a PEFT adapter, received 'nowhere', which does not exist",
    ),
    (".", "checkpoint: expected a checkpoint, a chain folder or a PEFT adapter, received '.', which holds none of these"),
    ("file", "checkpoint: expected a checkpoint file, received 'file', which cannot be read (...)"),
    (
        "~nobody.ckpt",
        "checkpoint: expected a checkpoint, a chain folder or a PEFT adapter, received '~nobody.ckpt', which does not exist",
    ),
)
def chain_of(path):
    Path("file").write_text("no checkpoint")
    read_chain(path)


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@refused(
    (("{",), "adapter: expected adapter_config.json of PEFT in '.', received a file that cannot be read (...)"),
    (("[]",), "adapter: expected adapter_config.json of PEFT in '.', received a file that cannot be read (...)"),
    ((json.dumps({"peft_type": "IA3"}),), "adapter: expected an ordinary LoRA in '.', received one with peft_type 'IA3'"),
    ((json.dumps(LORA | {"bias": "all"}),), "adapter: expected an ordinary LoRA in '.', received one with bias 'all'"),
    (
        (json.dumps(LORA | {"init_lora_weights": "pissa"}),),
        "adapter: expected an ordinary LoRA in '.', received one with init_lora_weights 'pissa'",
    ),
    ((json.dumps(LORA | {"use_dora": True}),), "adapter: expected an ordinary LoRA in '.', received one with use_dora True"),
    ((json.dumps(LORA),), "adapter: expected the factors of linear layers and convolutions in ., received 'none'"),
    (
        (json.dumps(LORA), "0.lora_A.weight"),
        "adapter: expected a whole LoRA of PEFT in '.', received a damaged one (KeyError('0.lora_B.weight'))",
    ),
    (
        (json.dumps({"peft_type": "LORA"}), "0.lora_A.weight", "0.lora_B.weight"),
        "adapter: expected a whole LoRA of PEFT in '.', received a damaged one (ValueError(\"rank of '0' is 2, and not 8\"))",
    ),
)
def adapter(config, *names):
    from safetensors.torch import save_file

    Path("adapter_config.json").write_text(config)
    save_file({f"base_model.model.{name}": torch.ones(2, 2) for name in names}, "adapter_model.safetensors")
    read_chain(".")


@refused(
    ({}, "chain: expected a folder with chain.json and chain.safetensors, received '.'"),
    (
        {"chain.json": "{", "chain.safetensors": ""},
        "chain: expected a whole chain in '.', received a damaged one (JSONDecodeError(...))",
    ),
    (
        {"chain.json": '{"format_version": 9}', "chain.safetensors": ""},
        "chain: expected format version 2 to 4, which this release of cola_lightning reads, received 9 in "
        "chain.json: a newer release is needed",
    ),
    (
        {"chain.json": '{"format_version": 0}', "chain.safetensors": ""},
        "chain: expected format version 2 to 4, which this release of cola_lightning reads, received 0 in "
        "chain.json: it is damaged, or another program's",
    ),
    (
        {"chain.json": '{"format_version": null}', "chain.safetensors": ""},
        "chain: expected format version 2 to 4, which this release of cola_lightning reads, received none in "
        "chain.json: it is damaged, or another program's",
    ),
    (
        {"chain.json": '{"format_version": "1"}', "chain.safetensors": ""},
        "chain: expected format version 2 to 4, which this release of cola_lightning reads, received '1' in "
        "chain.json: it is damaged, or another program's",
    ),
    (
        {"chain.json": '{"format_version": true}', "chain.safetensors": ""},
        "chain: expected format version 2 to 4, which this release of cola_lightning reads, received True in "
        "chain.json: it is damaged, or another program's",
    ),
)
def chain_folder(**files):
    for name, content in files.items():
        Path(name).write_text(content)
    Chain.load(Path())


@refused(
    (("out.png",), "plot: expected a .png file, and at least one link, received 'out.png' and 0 links"),
    (("out.pdf", None), "plot: expected a .png file, and at least one link, received 'out.pdf' and 1 links"),
)
def plotted(path, *reports):
    plot(reports, Path(path))


@refused(
    (("truncate", -1), "links: expected 0 to 0, the length of the chain, received -1"),
    (("truncate", 1), "links: expected 0 to 0, the length of the chain, received 1"),
)
def empty_chain(name, *arguments):
    getattr(Chain(), name)(*arguments)


# ---------------------------------------------------------------------- commands

NOT_FREE = "output: expected a folder that does not exist or is empty (with overwrite: one without folders in it), received"


@refused(
    (("merged", "out", None, 2, None), "max_rank: expected --format peft beside it, received merged"),
    (("peft", "out", "bfloat16", None, None), "dtype: expected --format merged beside it, received peft"),
    (("merged", "out", None, None, Path("base")), "base_folder: expected --format peft beside it, received merged"),
    (("peft", "out", None, 0, None), "max_rank: expected at least 1, received 0"),
    (
        ("merged", "used", None, None, None),
        f"{NOT_FREE} 'used'",
    ),
    (
        ("merged", "used/file", None, None, None),
        f"{NOT_FREE} 'used/file'",
    ),
)
def export(format_, folder, *options):
    Path("used").mkdir()
    Path("used", "file").touch()
    ExportOptions(Path(folder), format_, *options).check()


@refused(
    ("peft", "format: expected merged without links (model.target_modules: null, or links: 0), received peft"),
    ("chain", "format: expected merged without links (model.target_modules: null, or links: 0), received chain"),
)
def export_without_links(format_):
    toy(target_modules=None).export("out", format_)


@refused(
    (["--prompt", " "], "prompt: expected text, by --prompt or on standard input, received none"),
    (
        ["--temperature", "2"],
        "temperature: expected do_sample true beside it, for the most probable token is taken without it, received 2.0 alone",
    ),
    ([], "checkpoint: expected a checkpoint file, received 'nowhere', which cannot be read (No such file or directory)"),
)
def generated(words):
    generate(["--checkpoint", "nowhere", "--prompt", "It", *words])


@refused(
    ("folders", f"{NOT_FREE} 'folders'"),
)
def overwrite(path):
    Path("folders", "inside").mkdir(parents=True)
    with atomic_folder(Path(path), overwrite=True):
        raise AssertionError


@refused(
    (["smolm2"], "names: expected llama-2-7b, ..., received 'smolm2'; the nearest that exist: smollm2, ..."),
    (
        ["smollm2", "--output", "."],
        "output: expected no file of that name, received 'smollm2.yaml', which --overwrite replaces",
    ),
)
def copied(words):
    Path("smollm2.yaml").touch()
    configs(words)


@refused(
    ({"methods": []}, "methods: expected a list of names, each once, received []"),
    ({"methods": ["lora", "lora"]}, "methods: expected a list of names, each once, received ['lora', 'lora']"),
    ({"seeds": 0}, "seeds: expected a whole number of at least 1, received 0"),
    ({"config": "nowhere.yaml"}, "config: expected a file, received 'nowhere.yaml'"),
    ({"metric": "accuracy"}, "metric: expected a name that begins with val_, received 'accuracy'"),
    (
        {"metric": "val_mse"},
        "mode: expected min or max beside a metric that is none of val_loss, val_perplexity, val_accuracy, val_auroc, "
        "val_exact_match, val_f1, val_matthews_corrcoef, val_precision, val_recall, received none for val_mse",
    ),
    ({"tuning_seeds": 4}, "tuning_seeds: expected 1 to 3, which is seeds, received 4"),
    ({"learning_rates": [0.0]}, "learning_rates: expected numbers above 0, each once, received [0.0]"),
    ({"learning_rates": {"lora": [0.01]}}, "learning_rates: expected a list for each of lora, cola, received lora"),
)
def comparison(config="some.yaml", methods=("lora", "cola"), **options):
    Path("some.yaml").touch()
    Comparison(config, "out", list(methods), **options)


@refused(
    (
        ("lore",),
        "methods: expected lora, lora-sum-rank, cola, roll, full, rac, relora, asymmetric, received 'lore'; the "
        "nearest that exist: lora, relora",
    ),
    (
        ("lora-3",),
        "methods: expected lora, lora-sum-rank, cola, roll, full, rac, relora, asymmetric, received 'lora-3'; the "
        "nearest that exist: lora, relora",
    ),
    (
        ("cola-0",),
        "methods: expected lora, lora-sum-rank, cola, roll, full, rac, relora, asymmetric, received 'cola-0'; the "
        "nearest that exist: cola",
    ),
    (
        ("cola", {}, {"max_epochs": 3}),
        "methods: expected a config whose chain has knots, or a number of links, as in cola-4, received 'cola' and none",
    ),
    (
        ("lora-sum-rank", {"every_n_epochs": 1}, {"max_steps": 20}),
        "methods: expected a number of links, as in lora-sum-rank-4, for a chain that counts epochs in a run with another "
        "limit than trainer.max_epochs, received 'lora-sum-rank'",
    ),
    (
        ("lora-sum-rank", {"every_n_train_steps": 1}, {"max_epochs": 2}),
        "methods: expected a number of links, as in lora-sum-rank-4, for a chain that counts steps in a run with another "
        "limit than trainer.max_steps, received 'lora-sum-rank'",
    ),
    (
        ("lora-sum-rank", {"patience": 2}, {"max_epochs": 2}),
        "methods: expected a number of links, as in lora-sum-rank-4, for a chain with a patience, received 'lora-sum-rank'",
    ),
    (("cola-9", {}, {"max_epochs": 3}), "methods: expected at most 3 links, one per epoch or step of a run, received 9"),
    (
        ("relora", {"patience": 2}, {"max_epochs": 3}),
        "methods: expected model.knot_warmup_steps as a number of steps for relora and chain.patience, where a link's "
        "length is not known beforehand, received 0.1 of it",
    ),
    (("cola-2",), "trainer: expected max_steps or max_epochs, so that a run can be divided into links, received neither"),
    ({"name": "lora", "model": {}}, "model: expected a class that takes rank, which a study sets, received 'own.Module'"),
    (
        {"name": "lora-sum-rank-2", "trainer": {"max_steps": 20}, "model": {"rank": 4}},
        "model: expected a class that takes alpha, which a study sets, received 'own.Module'",
    ),
)
def method_of(name, chain=(), trainer=(), model=(("rank", 4), ("alpha", 8.0))):
    whens = dict.fromkeys(("every_n_epochs", "every_n_train_steps", "at_epochs", "at_steps", "ranks", "alphas"))
    config = {"model": {"class_path": "own.Module", "init_args": dict(model)}, "chain": whens | dict(chain)}
    method(name, config | {"trainer": {"max_epochs": None, "max_steps": -1} | dict(trainer)})


# ---------------------------------------------------------------------- what is not installed


def study():
    Path("some.yaml").touch()
    compare(["--config", "some.yaml", "--output", "out", "--methods", "[lora]"])


@refused(
    (
        lambda: ExportOptions(Path("out"), "peft").check(),
        "format: expected the package peft, received none: pip install peft",
    ),
    (study, "cola compare: expected optuna and scipy, received none: pip install optuna scipy"),
)
def without_packages(do):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
        do()


REFUSALS = [Refusal(do, given, message) for do, rows in SECTIONS.items() for given, message in rows]
