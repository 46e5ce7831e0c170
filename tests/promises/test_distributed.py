"""One chain on many processes: the same as on one."""

import functools
import signal
import subprocess
import sys

import pytest
import torch

from cola_lightning import Chain
from cola_lightning.chain.checkpoint import StoredState, read_chain
from tests.helpers import distributed_run as run
from tests.helpers import forked, tiny
from tests.helpers.forked import as_torchrun, environments
from tests.helpers.toy import assert_bit_equal


def forked_torchrun(folder, *jobs, n=2):
    """Runs jobs to their end on n processes, and as Lightning sees it under torchrun."""
    for process in [forked.Command(run.__file__, folder, *jobs, env=own) for own in as_torchrun(n)]:
        done = process.finish(timeout=240)
        assert done.returncode == 0, done.stderr


def torchrun_on_gpus(folder, *jobs, n):
    """The same under NCCL, and in new processes: CUDA does not outlive a fork."""
    started = []
    for rank, own in enumerate(as_torchrun(n)):
        with (folder / f"rank{rank}.log").open("w") as log:
            command = [sys.executable, run.__file__, str(folder), *jobs]
            started.append(subprocess.Popen(command, env=own | {"TEST_DEVICE": "cuda"}, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), [path.read_text()[-3000:] for path in sorted(folder.glob("rank*.log"))]


def left_by(folder, name, n=2):
    """What the n processes left."""
    return [torch.load(folder / f"{name}.rank{rank}.pt") for rank in range(n)]


def distance(mine, theirs):
    """The largest relative distance of two tensors of a name."""
    assert mine.keys() == theirs.keys()
    pairs = [(mine[name].double(), theirs[name].double()) for name in mine]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what two processes leave: three links by every strategy, and what was sent."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.folder(folder / "model", "opt")
    tiny.folder(folder / "llama")
    rows = [{"name": "so " * (k % 4), "answers": ["long", "very long"]} for k in range(9)]
    tiny.write_rows(folder, rows)
    forked_torchrun(folder, "same", "predicted", "written", "counted", "plateau", "weighed", "preferred")
    return folder


@pytest.fixture(scope="module")
def went_on(trained):
    """That folder, once one process has gone on from what two left, two from what one left, and two have used modules again."""
    for name, options in run.STAYED.items():
        run.fit(trained, name, **options)
    run.moved(trained, "single")
    forked_torchrun(trained, "resumed", "refused", "used_again")
    return trained


@pytest.fixture(scope="module")
def n_processes(device):
    """Two, but on a single GPU one."""
    return 2 if device == "cpu" else min(2, torch.cuda.device_count())


@pytest.fixture(scope="module")
def same(device, n_processes, request, tmp_path_factory):
    """Gives the folder with what these processes leave of a job: three links by strategies, under gloo or NCCL."""

    @functools.cache
    def folder_of(job):
        if device == "cpu" and job == "same":
            return request.getfixturevalue("trained")
        folder = tmp_path_factory.mktemp(job)
        if device == "cpu":
            forked_torchrun(folder, job, n=n_processes)
        else:
            torchrun_on_gpus(folder, job, n=n_processes)
        return folder

    return folder_of


@pytest.mark.parametrize("name", [*run.SAME, *(pytest.param(name, marks=pytest.mark.slow) for name in run.SLOW)])
def test_processes_are_equal_to_the_bit_and_the_single_process_to_rounding(same, device, n_processes, tmp_path, name):
    options, same = (run.SAME | run.SLOW)[name], same("same" if name in run.SAME else "same_slow")
    run.fit(tmp_path, "single", **options)
    first, *others = left_by(same, name, n_processes)
    for other in others:
        assert_bit_equal(first, other)
    tolerance = 1e-12 if "precision" in options else 1e-5
    if device == "cuda":  # the single process is on the CPU
        tolerance *= 1e3
    assert distance(first, torch.load(tmp_path / "single.rank0.pt")) < tolerance
    state = StoredState.of(torch.load(same / f"{name}.ckpt", weights_only=True)["state_dict"])
    ranks = [link.rank for link in state.chain.links]
    assert ranks == {"whole": [], "share": [6, 6]}.get(name.partition("-")[0], [4, 2])


def test_strategies_work_on_one_process(trained, tmp_path):
    forked_torchrun(tmp_path, "alone", n=1)
    for name in run.ALONE:
        (found,), (expected, _) = left_by(tmp_path, name, 1), left_by(trained, name)
        assert distance(found, expected) < 1e-5


def test_tokens_weigh_alike_over_the_batches_of_all_processes(trained):
    """Also in chunks, and with full fine-tuning."""
    run.weighed(trained)
    for name in run.WEIGHED:
        expected = torch.load(trained / f"weighed-{name}-single.rank0.pt")
        for strategy in ("ddp", "fsdp2"):
            first, second = left_by(trained, f"weighed-{name}-{strategy}")
            assert_bit_equal(first, second)
            assert distance(first, expected) < 1e-5


def test_preferences_with_a_moving_reference_are_those_of_one_process(trained):
    run.preferred(trained)
    expected = torch.load(trained / "preferred-single.rank0.pt")
    for strategy in ("ddp", "fsdp2"):
        first, second = left_by(trained, f"preferred-{strategy}")
        assert_bit_equal(first, second)
        assert distance(first, expected) < 1e-5


def test_a_run_moves_to_other_numbers_of_processes_and_other_strategies(went_on):
    """From inside a link and an epoch; float64 between DDP and one process, float32 elsewhere."""

    def what(name):
        found = torch.load(went_on / f"{name}.rank0.pt")
        return found | {"losses": found["losses"][-3:]}  # those since a resume

    assert_bit_equal(what("dropped-resumed"), what("dropped"))
    for name, (_, stayed) in run.MOVED.items():
        assert distance(what(name), what(stayed)) < (1e-12 if stayed == "stayed-64" else 1e-5), name


def test_checkpoints_of_all_strategies_are_one_small_file_of_plain_tensors(went_on):
    """Without the base; that of the optimizer's state is by number, as one process writes it, a run that moves shows."""
    base = sum(parameter.nbytes for parameter in run.make("llama").build_model().parameters())
    names = torch.load(went_on / "stayed.step6.ckpt", weights_only=True)["state_dict"].keys()
    for name in ("llama-fsdp2", "llama-fsdp1"):
        path = went_on / f"{name}.step6.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state.keys() == names
        assert set(map(type, state.values())) == {torch.Tensor}
        assert path.stat().st_size < base


@pytest.mark.parametrize("rule", ["plateau", "own rule"])
def test_processes_tie_the_same_knots_by_a_metric_of_which_each_has_its_own_value(trained, rule):
    assert_bit_equal(*left_by(trained, rule))
    assert len(read_chain(trained / f"{rule}.ckpt")) > 1


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_knot_sends_nothing_and_a_step_what_the_sizes_say(trained, strategy):
    """The trained gradients, and, under FSDP2, of the base its blocks twice, and what is around them once."""
    steps = torch.load(trained / f"counted-{strategy}.sent")
    assert len(steps) == 6
    assert steps[4] == steps[3]  # with the knot between them
    module = run.make("gpt2")
    module.configure_model()
    trained = [parameter.nbytes for parameter in module.parameters() if parameter.requires_grad]
    flags = len(trained) * 4 if strategy == "fsdp2" else 0  # which of them have a gradient
    for messages in steps:
        assert {kind for kind, _ in messages} <= {"barrier", "allreduce_", "broadcast_", "_allgather_base_"}
        assert [n for kind, n in messages if kind == "allreduce_"] == [4, sum(trained) + flags]  # the logged loss comes first
        assert sum(n for kind, n in messages if kind == "broadcast_") < 100  # DDP's buckets
    # Of a gathered message one of two processes receives half; of a sum that both are to have, as much as it holds.
    received = sum(n / 2 if kind == "_allgather_base_" else n for kind, n in messages if n > 8)  # of tensors
    base = {name: p.nbytes for name, p in module.model.named_parameters() if "lora_" not in name}
    in_blocks = sum(n for name, n in base.items() if ".h." in name)
    gathered = sum(base.values()) + in_blocks if strategy == "fsdp2" else 0
    assert gathered / 2 + sum(trained) + flags == received


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_predictions_are_one_a_row_in_order_and_those_of_the_checkpoint_alone(trained, strategy):
    folder = trained / strategy
    assert_bit_equal(*left_by(folder, "predicted"))  # with a seed that one of them drew
    rows = tiny.read_rows(folder / "predictions.jsonl")
    assert [row["index"] for row in rows] == list(range(9))
    alone = run.MLP.load_from_checkpoint(folder / "predicted.ckpt").eval()
    (data := run.Data()).setup("test")
    x, y = (torch.stack([row[name] for row in data.test]) for name in "xy")
    assert [row["target"] for row in rows] == pytest.approx(y.sum(-1).tolist(), abs=1e-5)
    assert [row["prediction"] for row in rows] == pytest.approx(alone.model(x).sum(-1).tolist(), abs=1e-5)


def test_answers_written_on_two_processes_are_those_of_one(trained):
    run.written(trained)
    answers = []
    for strategy in ("single", "ddp", "fsdp2"):
        rows = tiny.read_rows(trained / f"written-{strategy}" / "predictions.jsonl")
        assert [row["index"] for row in rows] == list(range(9))
        answers.append([row["prediction"] for row in rows])
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 1


def test_a_module_is_used_again_after_a_fit(went_on):
    """FSDP2: validated, merged, taken back to an earlier checkpoint; what it is then is what a process alone makes of those."""
    for name in ("merge", "stack"):
        last, back = (went_on / f"again-{name}{step}.ckpt" for step in ("", ".step6"))
        expected = {
            f"{name}, all": run.MLP.load_from_checkpoint(last).merged_model(),
            f"{name}, 1 link": run.MLP.load_from_checkpoint(last).merged_model(links=1),
            f"{name}, back": run.MLP.load_from_checkpoint(back).merged_model(),
        }
        for found in left_by(went_on, "again"):
            for what, model in expected.items():
                assert_bit_equal(found[what], model.state_dict())
        exported, of_checkpoint = Chain.load(went_on / f"again-{name}"), read_chain(last)
        assert exported.is_beginning_of(of_checkpoint)
        assert len(exported) == len(of_checkpoint) == 3


def test_what_does_not_go_together_is_refused(went_on):
    of_strategy = ["4 bits", "fsdp1 again", "another strategy"]
    fields = dict.fromkeys(of_strategy, "trainer.strategy") | {"another precision": "trainer.precision"}
    fields |= {"merged": "format", "peft": "format"}
    assert left_by(went_on, "refused") == [fields, fields]
    assert not (went_on / "merged").exists()


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_where_one_process_is_killed_the_other_ends_with_an_error_and_the_last_checkpoint_loads(tmp_path, strategy):
    folder = tmp_path / strategy
    folder.mkdir()
    first, second = (forked.Command(run.__file__, folder, "killed", env=own) for own in environments(2))
    first, second = first.finish(timeout=run.TIMEOUT.total_seconds() + 60), second.finish()
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "RuntimeError" in first.stderr
    (last,) = folder.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    run.fit(tmp_path, "resumed", ckpt_path=last)
    run.fit(tmp_path, "single")
    resumed, single = (torch.load(tmp_path / f"{name}.rank0.pt") for name in ("resumed", "single"))
    assert distance(resumed | {"losses": resumed["losses"][-7:]}, single | {"losses": single["losses"][-7:]}) < 1e-5
