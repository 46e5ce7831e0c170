"""What people mistype is refused in one line that begins with the field: on the command line with status 2, and in Python.

Of each kind of mistake there is one here.
"""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentError
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from cola_lightning import ChainOfLoRA, ChainSchedule, COLACausalLM, LoRAConfig, UserError, inject_lora
from cola_lightning.cli import main
from cola_lightning.cli.command_line import completed
from cola_lightning.cli.help import ELSEWHERE
from cola_lightning.cli.made_run import resolve
from cola_lightning.data import TemplateDataModule, TextDataModule
from cola_lightning.errors import JSONARGPARSE
from cola_lightning.module.arguments import find_class
from cola_lightning.module.module import COLAModule
from cola_lightning.study.methods import method
from tests.helpers import tiny
from tests.helpers.comparing import config
from tests.helpers.tiny import make_language_folder
from tests.helpers.toy import DIGITS, FAST, LAST, Toy, batches, toy, trainer

# ---------------------------------------------------------------------- on the command line

FILES = {
    "a_file": "",
    "rank.yaml": "model: {class_path: COLACausalLM, rank: 3}",
    "depth.yaml": "model: {class_path: COLACausalLM, rank: 3, init_args: {model_name: x}}",
    "steps.yaml": "chain: {every_n_steps: 5}",
    "indent.yaml": "model:\n  init_args:\n    alpha: 3\n   rank: 3\n",
    "rnak.yaml": "model: {init_args: {rnak: 3}}",
    "beside.yaml": "model: {init_args: {optimizer: {class_path: torch.optim.Adam, lr: 0.1}}}",
    "no.yaml": "data: {class_path: TemplateDataModule, init_args: {source: x, prompt: '{a}', options: [no, yes]}}",
}
FIT, LANGUAGE = f"fit --config {DIGITS} ", "fit --config config.yaml "
RESUME, BEGIN = f"{FIT} --ckpt_path {LAST} ", f"{FIT} --model.init_chain chain "
COMPARE = f"compare --config {DIGITS} --output study --methods [lora] "
# A command, and how its message begins.
MISTAKES = [
    ("fti", "cola: .*the nearest that exist: fit"),
    ("fit", ".*the following arguments are required: model_name"),
    ("fit --config no.yaml", "data.options: must be str, got 'False'"),
    (FIT + "--chain.every_n_epoch 5", "unrecognized arguments: --chain.every_n_epoch 5; .*every_n_epochs"),
    (FIT + "--chain.every_n_steps 5", r"unrecognized .*; the nearest that exist: chain\.every_n_(train_steps|epochs), chain\."),
    (FIT + "--trainer.rank 5", "unrecognized .*; the nearest that exist: model.rank"),
    (FIT + "--config steps.yaml", r".*every_n_steps.*; the nearest that exist: chain\.every_n_(train_steps|epochs), chain\."),
    (f"test --ckpt_path {LAST}", ".*: model_name"),
    ("fit config.yaml", "unrecognized arguments: config.yaml"),
    ("fit --config confg.yaml", r".*confg\.yaml'; the nearest that exist: .*/config\.yaml"),
    (FIT + "--config indent.yaml", r"config: .*\"indent\.yaml\", line 4"),
    (FIT + "--config rank.yaml", r"config: rank\.yaml: 'rank' belongs under model\.init_args"),
    (FIT + "--config depth.yaml", r"config: depth\.yaml: 'rank' belongs under model\.init_args"),
    (FIT + "--config rnak.yaml", ".*'rnak' is not accepted; the nearest that exist: model.rank"),
    (FIT + "--model.alhpa 3", ".*'alhpa' is not accepted; the nearest that exist: model.alpha"),
    (FIT + "--model.optimizer.lr -1", "model.optimizer: Invalid learning rate"),
    (FIT + "--model.rank", r"model\.rank: "),
    ("fit --model.model_name package:transfromers --data.source x", ".*nearest that exist: transformers"),
    ("stages --config config.yaml --output x --max_forgeting 1", ".*--max_forgetting"),
    ("generate x --promt y", ".*--prompt"),
    ("inspect x --jsno", ".*--json"),
    ("inspect x --plt", "unrecognized arguments: --plt$"),
    ("export x --format mergd --output y", "format: must be one of 'merged'"),
    (FIT + "--chain.every_n_epochs 1 --chain.patience 3", "chain: .*every_n_epochs and patience"),
    (FIT + "--trainer.strategy ddp_spawn", "trainer.strategy: "),
    (FIT + "--trainer.val_check_interval 1000", ".*val_check_interval"),
    (FIT + "--trainer.default_root_dir a_file/sub", "cola: cannot use .*a_file"),
    (FIT + "--config beside.yaml", "model.optimizer: .*inside its init_args"),
    (FIT + "--links 2", "model.init_links: "),
    (FIT + "--ckpt_path last --trainer.default_root_dir rows", "ckpt_path: "),
    (FIT + "--ckpt_path last --model.rank 2", r"ckpt_path: .*version_0.*last\.ckpt, the newest, differs in model\.rank"),
    (f"test --config {DIGITS} --ckpt_path runs/versoin_1", "ckpt_path: .*; the nearest that exist: runs/version_"),
    (f"test --config {DIGITS} --ckpt_path {LAST} --links -1", "links: "),
    (RESUME + "--links 1", "links: fit resumes the whole chain"),
    (RESUME + "--seed_everything 5", "model.seed, or seed_everything: "),
    (RESUME + "--model.init_chain chain", "model.init_chain: "),
    (BEGIN + "--model.target_modules null", "model.target_modules: "),
    (LANGUAGE + "--data.source rows/trian.jsonl", r"data\.source: .*; the nearest that exist: rows/train\.jsonl"),
    (LANGUAGE + "--data.source renamed", ".*: there is no field 'label'"),
    (LANGUAGE + "--data.task SST", "data.task: .*the nearest that exist: SST2"),
    (LANGUAGE + "--data.batch_size 0", "data.batch_size must be"),
    (LANGUAGE + "--data.path rows", ".*'path' is not accepted; here it is --data.source NAME"),
    (f"inspect {DIGITS}", "checkpoint: "),
    ("generate rows --prompt It", r"checkpoint: 'rows' has no checkpoints/last\.ckpt"),
    (f"generate {LAST} --prompt It", ".*COLACausalLM"),
    (f"generate {LAST} --prompt It --max_new_tokens 0", "max_new_tokens: must be at least 1"),
    (f"export {LAST} --format peft --dtype float16 --output out", "dtype: "),
    (f"export {LAST} --format chain --output runs --overwrite", "output: "),
    (f"export {LAST} --format chain --output runs/version_0/checkpoints --overwrite", "output: .*the base"),
    (COMPARE + "--methods [lore]", "methods: .*the nearest that exist: lora"),
    (COMPARE + '--learning_rates {"cola":[0.1]}', "learning_rates: each of lora needs a list"),
    (COMPARE + "--metric val_acuracy", "metric: .*val_acuracy.* --mode.*; the nearest that exist: val_accuracy"),
    (COMPARE + "-- --model.seed 3", "model.seed: "),
    (f"test --config {DIGITS} --ckpt_path cut_off.ckpt", "ckpt_path: "),
    (f"test --config {DIGITS} --ckpt_path newer.ckpt", "chain: .*reads format version"),
    (f"{FIT} --ckpt_path other_base.ckpt", "base: "),
    ("inspect cut_off", "chain: "),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three links on the digits and its chain, a language model with its rows, and files with mistakes in them."""
    place = make_language_folder(tmp_path_factory.mktemp("given"))
    for name, text in FILES.items():
        (place / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--config", DIGITS, *FAST]) == 0
        assert main(["export", LAST, "--format", "chain", "--output", "chain"]) == 0
        Path("cut_off.ckpt").write_bytes(Path(LAST).read_bytes()[:-200])
        write_checkpoint("newer.ckpt", {"format_version": 5})
        write_checkpoint("other_base.ckpt", {"base": {"values": {}}})
        shutil.copytree("chain", "cut_off")
        Path("cut_off/chain.json").write_bytes(Path("chain/chain.json").read_bytes()[:-200])
    return place


def write_checkpoint(path, changes):
    """The run's checkpoint with other metadata of its chain."""
    checkpoint = torch.load(LAST, weights_only=True)
    state = checkpoint["state_dict"]
    metadata = json.loads(bytes(state["chain.metadata"].tolist()))
    metadata |= {name: metadata[name] | new if isinstance(new, dict) else new for name, new in changes.items()}
    state["chain.metadata"] = torch.tensor(list(json.dumps(metadata).encode()), dtype=torch.uint8)
    torch.save(checkpoint | {"state_dict": state}, path)


def test_what_is_typed_here_exists():
    words = [word for here in {*ELSEWHERE.values()} for word in shlex.split(here)]
    assert resolve(words)["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0


NAMED = "--model.model_name x --data.source y "
PROVOKED = {  # what provokes each message of jsonargparse that is read
    "missing file": "--config confg.yaml",
    "unknown option": NAMED + "--chain.every 5",
    "key": NAMED + "--model.alhpa 3",
    "class": NAMED + "--model.alhpa 3",
    "names": NAMED + "--model.dtype flaot32",
    "expected value": NAMED + "--model.rank two",
    "type": NAMED + "--model.rank two",
    "tried": NAMED + "--model.warmup_steps two",
}


def test_jsonargparse_words_its_messages_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PROVOKED.keys() == JSONARGPARSE.keys()
    for name, words in PROVOKED.items():
        with pytest.raises(ArgumentError) as caught:
            resolve(words.split())
        assert JSONARGPARSE[name].search(str(caught.value)), name


def test_knots_and_the_class_of_data_follow_from_a_file_wherever_it_is_typed(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: {class_path: COLAImageClassifier}\nchain: {at_epochs: [1]}")
    for words in (["--print_config", "--config", file], [f"--config={file}", "--print_config"], ["--config", file]):
        found = completed(["fit", *map(str, words), "--chain.knots", "4"])
        assert "--data=cola_lightning.ImageDataModule" in found
        assert found.index("--chain.at_epochs=null") < found.index("--chain.knots")


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words.replace(DIGITS, "digits.yaml") for words, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_one_line_and_status_2_and_nothing_is_written(
    words, message, folder, monkeypatch, capfd
):
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    assert main(words.split()) == 2
    output = capfd.readouterr().err
    assert re.match(f"error: {message}", output.strip().splitlines()[-1]), output
    assert "Traceback" not in output
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("peft", f"export {LAST} --format peft --output out"),
        ("bitsandbytes", LANGUAGE + "--model.quantization nf4"),
    ],
)
def test_a_package_that_is_not_installed_is_named_before_a_model_is_loaded(package, words, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(COLAModule, "load_from_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    assert main(words.split()) == 2
    output = capfd.readouterr().err
    assert re.match(rf"error: .*{package}.*\[\w+\]", output.strip().splitlines()[-1]), output
    assert "Traceback" not in output


# ---------------------------------------------------------------------- in Python: what is done with the arguments of a row


def module(**arguments):
    toy(**arguments).configure_model()


UNKNOWN_LENGTH = {"trainer_arguments": {"max_epochs": -1, "max_time": {"minutes": 1}}}
ROUGH = {"lr_schedule": "constant", "knot_warmup_steps": 0.5, "chain": {"every_n_train_steps": 6}}


def fit(chain=(), trainer_arguments=(), **arguments):
    module = toy(**arguments)
    trainer(Path(), chain=dict(chain), **{"max_epochs": 3} | dict(trainer_arguments)).fit(module, batches())


def inject(**arguments):
    """An injection that is refused leaves the model as it is."""
    body = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    model = nn.ModuleDict({"body": body, "head": nn.Linear(8, 3)})
    settings = {"target_modules": ["q_proj"], "rank": 2, "alpha": 4}
    before = [type(part) for part in model.modules()]
    try:
        inject_lora(model, LoRAConfig(**settings | arguments))
    finally:
        assert [type(part) for part in model.modules()] == before


def template_row(prompt):
    Path("rows.jsonl").write_text('{"label": 1, "text": "It was old."}\n' * 20)
    data = TemplateDataModule("rows.jsonl", prompt=prompt, options=[" no", " yes"])
    tiny.set_up(data, tiny.tokenizer("gpt2", pad=True), "fit")


def method_of(name, chain=(), run=(), arguments=("rank", "alpha")):
    model = {"class_path": "own.Module", "init_args": dict.fromkeys(arguments, 4)}
    method(name, config(chain, **dict(run)) | {"model": model})


# What is given, the field with which the message begins, and, where others begin so, what it names; as a pattern.
REFUSALS = {
    ChainSchedule: [
        ({"at_steps": [0, 3]}, r"chain\.at_steps"),
        ({"ranks": [4, 0]}, r"chain\.ranks"),
        ({"ranks": [0.5]}, r"chain\.ranks"),
        ({"share": 0.5}, r"chain\.share: 0\.5 with cola"),
        ({"knot": "half", "share": 1.5}, r"chain\.share: must be above 0 and at most 1"),
        ({"knot": "New"}, r"chain\.knot: must be cola or half or record"),
        ({"knot": "record", "ranks": [2]}, r"chain\.ranks"),
        ({"mode": "mix", "patience": 1}, r"chain\.mode"),
        ({"knots": 1.5}, r"chain\.knots"),
        ({"at_steps": [1.5]}, r"chain\.at_steps"),
    ],
    ChainOfLoRA: [
        ({"patience": 0}, r"chain\.patience"),
        ({"monitor": "val_accuracy"}, r"chain\.monitor, chain\.min_delta, chain\.mode"),
    ],
    module: [
        ({"alpha": float("inf")}, r"model\.alpha"),
        ({"rank": 2.5}, r"model\.rank"),
        ({"dropout": 1.0}, r"model\.dropout"),
        ({"finished_links": "merged"}, r"model\.finished_links"),
        ({"kept_optimizer_state": 2}, r"model\.kept_optimizer_state"),
        ({"lr_ratio_B": 0}, r"model\.lr_ratio_B"),
        ({"decay_steps": 0}, r"model\.decay_steps"),
        ({"lr_schedule": "cosinus"}, r"model\.lr_schedule"),
        ({"schedule_scope": "runs"}, r"model\.schedule_scope"),
        ({"warmup_steps": -5}, r"model\.warmup_steps"),
        ({"knot_warmup_steps": float("nan")}, r"model\.knot_warmup_steps"),
        ({"modules_to_save_lr": -1e-3}, r"model\.modules_to_save_lr"),
        ({"init_links": 2}, r"model\.init_links"),
        ({"init_chain": "nowhere"}, r"model\.init_chain: 'nowhere' does not exist"),
        ({"cls": type("NoBase", (Toy,), {"build_model": Toy.__base__.build_model})}, "model: NoBase"),
    ],
    fit: [
        ({"chain": {"ranks": [2, 3]}}, r"chain\.ranks"),
        ({"warmup_steps": 11, "chain": {"every_n_epochs": 1}}, r"model\.warmup_steps.*"),
        ({"schedule_scope": "run", "knot_warmup_steps": 7, "chain": {"every_n_train_steps": 6}}, r".*model\.knot_warmup_steps"),
        (UNKNOWN_LENGTH, r"model\.lr_schedule: trainer\.max_steps"),
        (UNKNOWN_LENGTH | ROUGH, r"model\.lr_schedule: warm-ups in steps"),
        ({"cls": lambda **_: BoringModel()}, "model: COLAModule"),
        ({"modules_to_save_lr": 0.1}, r"model\.modules_to_save_lr"),
        ({"target_modules": None, "chain": {"every_n_epochs": 1}}, r"model\.target_modules"),
    ],
    inject: [
        ({"target_modules": ["q_porj"]}, r"model\.target_modules: the nearest that exist: q_proj"),
        ({"target_modules": ["norm"]}, r"model\.target_modules: 'body\.norm', which is a LayerNorm"),
    ],
    TextDataModule: [
        ({"source": ".", "subset": "sst2"}, r"data\.subset"),
        ({"source": "a/b", "temperature": 0.7}, r"data\.temperature"),
        ({"source": "a/b", "stop": ["\n", ""]}, r"data\.stop"),
        ({"source": []}, r"data\.source: at least one"),
        ({"source": ["a/b"], "subset": "main"}, "data.source: subset and revision"),
        ({"source": "a/b", "loss": "lst"}, r"data\.loss"),
        ({"source": "a/b", "too_long": "skp"}, r"data\.too_long"),
        ({"source": "a/b", "text_unit": "lines"}, r"data\.text_unit"),
    ],
    COLACausalLM: [({"model_name": "a/b", "loss_average": "steps"}, r"model\.loss_average")],
    find_class: [(("__main__.Shapes",), "checkpoint: script")],
    template_row: [({"prompt": "{txt}"}, r"rows.jsonl, row 1 \(counted from 0\): 'txt' among 'label', 'text'")],
    method_of: [
        (("cola", {}, {"max_epochs": 3}), "methods: knots"),
        (("cola-9", {}, {"max_epochs": 3}), "methods: 3 epochs .* cannot have 9 links"),
        (("lora-sum-rank-2", {}, {}, ("rank", "alpha", "rank_pattern")), r"methods: lora-sum-rank .*model\.rank_pattern"),
        (("lora-sum-rank-2", (), (), ()), r"model: rank must be set, but own\.Module"),
    ],
}


@pytest.mark.parametrize(
    ("do", "given", "message"), [pytest.param(do, *row, id=f"{row[1]}") for do, rows in REFUSALS.items() for row in rows]
)
def test_what_is_mistyped_in_python_is_refused_in_one_line_that_names_it(do, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        do(**given) if isinstance(given, dict) else do(*given)
    field, _, words = message.partition(": ")
    assert re.fullmatch(f"{field}:? .*{words}.*", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("keyword", "near"), [("rnk", "rank"), ("model_nme", "model_name"), ("chunked_los", "chunked_loss")])
def test_an_unknown_keyword_names_the_class_that_was_called(keyword, near):
    message = rf"COLACausalLM\(\) got an unexpected keyword argument '{keyword}'; the nearest that exist: {near}"
    with pytest.raises(TypeError, match=message):
        COLACausalLM("x", **{keyword: 4})


def test_a_checkpoint_of_full_fine_tuning_is_no_chain_to_begin_from(tmp_path):
    """It has no links, so the run would begin from the base."""
    run = trainer(tmp_path, max_epochs=1)
    run.fit(toy(target_modules=None), batches())
    run.save_checkpoint(tmp_path / "full.ckpt")
    begun = toy(init_chain=str(tmp_path / "full.ckpt"))
    with pytest.raises(UserError, match=r"^model\.init_chain: .*full\.ckpt' has no links, .*xport"):
        begun.configure_model()
