"""One chain on many processes: the same as on one."""

import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cola_lightning import Chain
from cola_lightning.chain.checkpoint import read_chain
from cola_lightning.module.fsdp import repeated_blocks, without_trained
from tests import distributed_run as run
from tests import forked, tiny
from tests.toy import assert_bit_equal

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def on_two_processes(folder, *jobs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [run.__file__, str(folder), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr


def forked_pair(folder, *jobs, **environment):
    """Starts the same without torchrun, each process forked."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, **environment}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    return [forked.Command(run.__file__, folder, *jobs, env=shared | rank) for rank in ranks]


def forked_torchrun(folder, *jobs):
    """The same to its end, and as Lightning sees it under torchrun."""
    as_torchrun = {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for process in forked_pair(folder, *jobs, **as_torchrun):
        done = process.finish(timeout=240)
        assert done.returncode == 0, done.stderr


def distance(mine, theirs):
    """The largest relative distance of two tensors of a name."""
    assert mine.keys() == theirs.keys()
    pairs = [(mine[name].double(), theirs[name].double()) for name in mine]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two processes leave: four links by every strategy, what was sent, and merges shard by shard."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.folder(folder / "model", "opt")
    rows = [{"name": "so " * (k % 4), "answers": ["long", "very long"]} for k in range(9)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forked_torchrun(folder, "same", "predicted", "written", "counted", "merges", "fsdp1", "plateau")
    return folder


@pytest.mark.parametrize("rule", ["plateau", "own rule"])
def test_processes_tie_the_same_knots_by_a_metric_of_which_each_has_its_own_value(trained, rule):
    first, second = (torch.load(trained / f"{rule}.rank{rank}.pt") for rank in range(2))
    assert first["knots"] == second["knots"] != []
    assert first["own"] != second["own"]
    assert_bit_equal(first["weights"], second["weights"])


SAME = {
    "mlp-ddp": (1e-12, {"precision": "64-true"}),
    "mlp-stack-ddp": (1e-12, {"precision": "64-true", "arguments": {"finished_links": "stack"}}),
    "llama-ddp": (1e-12, {"model": "llama", "precision": "64-true"}),
    "rolling-ddp": (1e-12, run.ROLLING | {"precision": "64-true"}),
    "rolling-fsdp2": (1e-5, run.ROLLING | {"arguments": {"finished_links": "stack"}}),
    "rolling-fsdp1": (1e-5, run.ROLLING | {"gradient_clip_val": None}),
    "kept-fsdp1": (1e-5, {"arguments": {"kept_optimizer_state": 0.5}, "gradient_clip_val": None}),
    "kept-fsdp2": (1e-5, {"arguments": {"kept_optimizer_state": 0.5}, "gradient_clip_val": None}),
    "whole-fsdp2": (1e-5, run.WHOLE),
    "cnn-ddp": (1e-12, {"model": "cnn", "precision": "64-true"}),
    "cnn-fsdp1": (1e-5, {"model": "cnn", "gradient_clip_val": None}),
    "idle-fsdp2": (1e-5, {"model": "idle", "arguments": {"modules_to_save": ["3"]}}),
    "mlp-fsdp1": (1e-5, {"gradient_clip_val": None}),
    "llama-fsdp1": (1e-5, {"model": "llama", "gradient_clip_val": None}),
    "outside-fsdp1": (1e-5, {"model": "outside", "gradient_clip_val": None}),
}
SAME |= {
    f"{model}-{mode}-fsdp2": (1e-5, {"model": model, "arguments": {"finished_links": mode}})
    for model in ("mlp", "cnn", "opt", "llama", "gpt2")
    for mode in ("merge", "stack")
}


@pytest.mark.parametrize("name", SAME)
def test_processes_are_equal_to_the_bit_and_the_single_process_to_rounding(trained, tmp_path, name):
    tolerance, how = SAME[name]
    run.fit(tmp_path, "single", **how)
    single = torch.load(tmp_path / "single.rank0.pt")
    first, second = (torch.load(trained / f"{name}.rank{rank}.pt") for rank in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert distance(first, single) < tolerance
    links = torch.load(trained / f"{name}.ckpt", weights_only=True)["state_dict"]["cola"]["chain"]["description"]["links"]
    ranks = [link["rank"] for link in links]
    assert ranks == {"whole": [], "rolling": [2, 2, 2]}.get(name.partition("-")[0], [4, 2, 6])


@pytest.fixture(scope="module")
def went_on(trained):
    """That folder, once one process has gone on from what two left, two from what one left, and two have used modules again."""
    double = {"precision": "64-true"}
    run.fit(trained, "stayed-64", "llama", **double)
    run.fit(trained, "ddp-single", "llama", ckpt_path=trained / "llama-ddp.step6.ckpt", **double)
    run.fit(trained, "single", "llama")
    run.fit(trained, "fsdp2-single", "llama", ckpt_path=trained / "llama-merge-fsdp2.step6.ckpt")
    run.fit(trained, "unclipped", "llama", gradient_clip_val=None)
    run.fit(trained, "whole-single", **run.WHOLE)
    run.fit(trained, "whole-fsdp2-single", ckpt_path=trained / "whole-fsdp2.step6.ckpt", **run.WHOLE)
    forked_torchrun(trained, "resumed", "refused", "used_again")
    return trained


def test_a_run_moves_to_other_numbers_of_processes_and_other_strategies(went_on):
    """From inside a link and an epoch; float64 between DDP and one process, float32 elsewhere."""

    def what(name, rank=0):
        found = torch.load(went_on / f"{name}.rank{rank}.pt")
        losses = found.pop("losses")
        return found | {"last losses": losses[-5:]}  # those since a resume

    dropped, resumed = what("dropped"), what("dropped-resumed")
    assert [name for name in dropped if not torch.equal(dropped[name], resumed[name])] == []

    moved = {"ddp-single": "stayed-64", "ddp-single-ddp": "stayed-64", "fsdp2-single": "single", "single-fsdp2": "single"}
    moved |= {"single-fsdp1": "unclipped", "fsdp2-ddp": "single"}
    moved |= {"whole-fsdp2-single": "whole-single", "whole-single-fsdp2": "whole-single"}
    distances = {name: distance(what(name), what(stayed)) for name, stayed in moved.items()}
    assert {name: d for name, d in distances.items() if d > (1e-12 if "64" in moved[name] else 1e-5)} == {}
    assert all(d > 0 for name, d in distances.items() if name != "fsdp2-single")


def test_checkpoints_of_all_strategies_are_the_same_one_file(trained, tmp_path):
    """Small, of plain tensors, without the base; the optimizer's state by number, as one process writes it."""

    def shapes(part):
        if isinstance(part, torch.Tensor):
            assert type(part) is torch.Tensor
            return tuple(part.shape), part.dtype
        if isinstance(part, dict):
            return {key: shapes(value) for key, value in part.items()}
        return [shapes(value) for value in part] if isinstance(part, list | tuple) else type(part)

    run.fit(tmp_path, "single", "llama")
    single = torch.load(tmp_path / "single.step6.ckpt", weights_only=True)
    del single["state_dict"]["cola"]["module"]
    for name in ("llama-merge-fsdp2", "llama-fsdp1"):
        path = trained / f"{name}.step6.ckpt"
        assert path.is_file()
        other = torch.load(path, weights_only=True)
        del other["state_dict"]["cola"]["module"]
        for key in ("state_dict", "optimizer_states", "loops", "lr_schedulers"):
            assert shapes(other[key]) == shapes(single[key]), key
        base = sum(parameter.nbytes for parameter in run.make("llama").build_model().parameters())
        assert path.stat().st_size < base
    assert [name for name in single["state_dict"] if ".lora_" not in name] == ["cola"]


def test_a_merge_shard_by_shard_is_the_whole_merge_to_the_bit_and_sends_nothing(trained):
    first, second = (torch.load(trained / f"merges.rank{rank}.pt") for rank in range(2))
    for found in (first, second):
        assert {name: facts[:3] for name, facts in found.items()} == dict.fromkeys(found, (True, True, []))
    rows = {name: (first[name][3], second[name][3]) for name in first}
    assert rows["LoRALinear 8 x 13"] == (7, 6)
    assert rows["LoRALinear 5 x 1"] == rows["LoRAConv1D 1 x 5"] == (1, 0)
    assert rows["LoRAConv1D 8 x 13"] == (4, 4)
    assert rows["LoRAConv2d 8 x 13"] == (7, 6)


def test_fsdp1_without_lightning(trained):
    alone = run.by_hand(lambda model: model)
    first, second = (torch.load(trained / f"fsdp1.rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert distance(first, alone) < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_predictions_are_one_a_row_in_order_and_those_of_the_checkpoint_alone(trained, strategy):
    folder = trained / strategy
    first, second = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []  # with a seed that one of them drew
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(9))
    alone = run.MLP.load_from_checkpoint(folder / "predicted.ckpt").eval()
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(64, size, generator=generator)[:9] for size in (8, 6))
    assert [row["target"] for row in rows] == pytest.approx(y.sum(-1).tolist(), abs=1e-5)
    assert [row["prediction"] for row in rows] == pytest.approx(alone.model(x).sum(-1).tolist(), abs=1e-5)


def test_answers_written_on_two_processes_are_those_of_one(trained):
    run.written(trained)
    found = {}
    for strategy in ("single", "ddp", "fsdp2"):
        folder = trained / f"written-{strategy}"
        rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        found[strategy] = [row["prediction"] for row in rows], torch.load(folder / "rank0.pt")
        assert [row["index"] for row in rows] == list(range(9))
    answers, metrics = found.pop("single")
    assert len(set(answers)) > 1
    for other_answers, other_metrics in found.values():
        assert other_answers == answers
        assert other_metrics.keys() == metrics.keys() == {"val_loss", "val_f1", "val_exact_match"}


@pytest.mark.slow
@tiny.needs_smollm2
@pytest.mark.skipif("COLA_DATA_DIR" not in os.environ, reason="needs real task data: COLA_DATA_DIR")
def test_smollm2_learns_sst2_on_two_processes_as_on_one(tmp_path):
    """A tiny model does so in test_cli_language.py, always."""
    sizes = {"train_size": 64, "val_size": 80, "test_size": 41, "eval_batch_size": 20}
    found = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        changes = sizes | {"batch_size": 8 // n}
        arguments = [f"--data.{name}={value}" for name, value in changes.items()]
        arguments += [f"--trainer.strategy={'ddp' if n == 2 else 'auto'}", f"--trainer.devices={n}"]
        config = str(ROOT / "configs" / "sst2_smollm2.yaml")
        last = ["--ckpt_path", "last"]
        for command in (["fit", "--config", config, *arguments], ["predict", "--config", config, *arguments, *last]):
            command = [sys.executable, "-m", "cola_lightning", *command]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=ENVIRONMENT)
            assert done.returncode == 0, done.stderr
        (path,) = folder.rglob("predictions.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(41))
        live = torch.load(folder / "runs/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]["cola"]["live"][
            "metrics"
        ]
        found.append((live["val_loss"], live["val_accuracy"], [row["prediction"] for row in rows]))
    (loss, accuracy, predictions), (other_loss, other_accuracy, other_predictions) = found
    assert other_loss == pytest.approx(loss, rel=1e-3)
    assert other_accuracy == pytest.approx(accuracy, abs=1 / 80)
    assert sum(map(int.__eq__, predictions, other_predictions)) >= 40


@pytest.mark.parametrize("model", ["mlp", "gpt2"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_knot_sends_nothing_and_a_step_the_trained_gradients(trained, strategy, model):
    """And, under FSDP2, what it gathers of the base: its blocks twice, what is around them once."""
    steps = torch.load(trained / f"counted-{model}-{strategy}.sent")
    assert [what for what, _ in steps] == ["step"] * 4 + ["knot"] + ["step"] * 2
    assert steps[4] == ("knot", [])
    module = run.make(model)
    module.configure_model()
    trained = [parameter.nbytes for parameter in module.parameters() if parameter.requires_grad]
    flags = len(trained) * 4 if strategy == "fsdp2" else 0  # which of them have a gradient
    gradients = sum(trained) + flags
    blocks = [module.model[0]] if model == "mlp" else repeated_blocks(module.model)
    frozen = [sum(2 * size(part) for part in block.parameters() if not part.requires_grad) for block in blocks]
    inside = {id(part) for block in blocks for part in block.parameters()}
    around = sum(2 * size(part) for part in module.model.parameters() if not part.requires_grad and id(part) not in inside)
    for what, messages in steps:
        if what == "step":
            assert {kind for kind, _ in messages} <= {"barrier", "allreduce_", "broadcast_", "_allgather_base_"}
            reduced, gathered = ([n for kind, n in messages if kind == k] for k in ("allreduce_", "_allgather_base_"))
            assert reduced == [4, gradients]  # the logged loss comes first
            assert sorted(gathered) == (sorted([around, *frozen, *frozen]) if strategy == "fsdp2" else [])
            assert sum(n for kind, n in messages if kind == "broadcast_") < 100  # DDP's buckets


@pytest.mark.parametrize(("strategy", "layout"), [("ddp", "DDP"), ("fsdp2", "FSDP2")])
def test_what_a_step_sends_is_what_the_benchmark_of_scale_computes(trained, strategy, layout):
    scale = importlib.import_module("scale")
    module = run.make("gpt2")
    module.configure_model()
    messages = torch.load(trained / f"counted-gpt2-{strategy}.sent")[-1][1]
    # Of a gathered message one of two processes receives half; of a sum that both are to have, as much as it holds.
    received = sum(n / 2 if kind == "_allgather_base_" else n for kind, n in messages if n > 4)
    flags = sum(parameter.requires_grad for parameter in module.parameters()) * 4 if strategy == "fsdp2" else 0
    assert scale.bytes_a_step(scale.sizes(module.model), layout, 2) + flags == received


def size(parameter):
    """The bytes of one of two processes' part, padded."""
    return math.ceil(len(parameter) / 2) * parameter[0].nbytes


def test_a_sharded_module_writes_its_chain_and_refuses_the_rest_in_one_line(tmp_path):
    on_two_processes(tmp_path, "exported")
    for rank in range(2):
        found = torch.load(tmp_path / f"exported.rank{rank}.pt")
        for kind in ("merged", "peft"):
            assert found[kind].startswith(f"format: expected chain for a sharded model, received {kind}: `cola export`")
            assert not (tmp_path / kind).exists()
    written, of_checkpoint = Chain.load(tmp_path / "chain"), read_chain(tmp_path / "exported.ckpt")
    assert written.is_beginning_of(of_checkpoint)
    assert len(written) == len(of_checkpoint) == 2


def test_a_module_is_used_again_after_a_fit(went_on):
    """FSDP2: validated, merged, taken back to an earlier checkpoint; what it is then is what a process alone makes of those."""
    first, second = (torch.load(went_on / f"again.rank{rank}.pt") for rank in range(2))
    for name, cls in {"merge": run.MLP, "cast": run.Cast}.items():
        last, back = went_on / f"again-{name}.ckpt", went_on / f"again-{name}.step6.ckpt"
        expected = {
            f"{name}, all": cls.load_from_checkpoint(last).merged_model(),
            f"{name}, 1 link": cls.load_from_checkpoint(last).merged_model(links=1),
            f"{name}, back": cls.load_from_checkpoint(back).merged_model(),
        }
        for what, model in expected.items():
            assert_bit_equal(first[what], model.state_dict())
            assert_bit_equal(second[what], model.state_dict())
    for what in ("fsdp again", "another strategy"):
        assert first[what].startswith("trainer.strategy: expected a new module, for FSDP's wrappers are not made twice")
    assert first["another precision"].startswith("trainer.precision: expected one that leaves adapted layers in float32")


def test_what_does_not_go_together_is_refused_in_one_line(went_on):
    for rank in range(2):
        found = torch.load(went_on / f"refused.rank{rank}.pt")
        assert {name: text.partition(", ")[0] for name, text in found.items()} == {
            "tensor parallelism": "trainer.strategy: expected data_parallel_size: 2 and tensor_parallel_size: 1",
            "4 bits": "trainer.strategy: expected ddp",
            "fsdp, all trained": "trainer.strategy: expected ModelParallelStrategy (FSDP2) or ddp for full fine-tuning "
            "(model.target_modules is null)",
            "no index": "predict: expected a loader that batches rows with indices (no IterableDataset) where 2 processes "
            "share its rows",
        }


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_where_one_process_is_killed_the_other_ends_with_an_error_and_the_last_checkpoint_loads(tmp_path, strategy):
    folder = tmp_path / strategy
    folder.mkdir()
    first, second = forked_pair(folder, "killed")
    first, second = first.finish(timeout=run.TIMEOUT.total_seconds() + 60), second.finish()
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "RuntimeError" in first.stderr
    (last,) = folder.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    run.fit(tmp_path, "resumed", ckpt_path=last)
    run.fit(tmp_path, "single")
    resumed, single = (torch.load(tmp_path / f"{name}.rank0.pt") for name in ("resumed", "single"))
    assert distance(resumed | {"losses": resumed["losses"][-11:]}, single | {"losses": single["losses"][-11:]}) < 1e-5


def test_what_is_repeated_and_what_is_hidden():
    model = run.make("gpt2").build_model()
    assert repeated_blocks(model) == list(model.transformer.h)
    assert repeated_blocks(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))) == []
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    with without_trained(model):
        assert [name for name, _ in model.named_parameters()] == ["0.weight"]
        model[0].weight = nn.Parameter(torch.zeros(3, 2))
    assert [name for name, _ in model.named_parameters()] == names
    assert not model[0].weight.any()
