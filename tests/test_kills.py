"""A run that is killed at any moment and resumed is the run that nobody killed."""

import functools

import pytest
import torch

from tests.kills import KILLS, SETUPS, last_checkpoint, records, run_kill, run_whole
from tests.run_comparison import differences_of_checkpoints, differences_of_records, too_much_done_twice, twice_done


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Gives a set-up's run that nobody kills; it is made when it is first asked for."""
    return functools.cache(lambda setup: run_whole(setup, tmp_path_factory.mktemp(setup)))


@pytest.mark.parametrize(
    ("setup", "moment", "signal"),
    [
        ("digits", "inside an accumulation window: after backward", "SIGINT"),
        ("llama", "inside validation", "SIGTERM"),
    ],
)
def test_a_killed_run_resumes_as_the_run_itself(whole_run, setup, moment, signal):
    (kill,) = [kill for kill in KILLS if (kill.moment, kill.signal) == (moment, signal)]
    assert run_kill(setup, whole_run(setup), kill).wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=str)
@pytest.mark.parametrize("setup", SETUPS)
def test_every_killed_run_resumes_as_the_run_itself(whole_run, setup, kill):
    assert run_kill(setup, whole_run(setup), kill).wrong == []


@pytest.mark.parametrize("setup", SETUPS)
def test_the_moments_are_what_they_are_called(whole_run, setup):
    run = records(whole_run(setup), "whole")
    batches = {(record["epoch"], record["batch"]): record for record in run if record["event"] == "batch"}
    places = list(batches)
    assert len(KILLS) == 12
    for kill in KILLS:
        place = getattr(kill, setup)
        number = places.index(place)
        batch, following = batches[place], batches[places[number + 1]]
        begins_link = number > 0 and batch["link"] == batches[places[number - 1]]["link"] + 1 == 1
        what = {
            "first batch": number == 0,
            "before a knot": batch["link"] == 0 and following["link"] == 1,
            "at a knot": begins_link,
            "after a knot": begins_link,
            "mid-epoch": place[1] > 0 and following["epoch"] == place[0],
            "before the optimizer's step": batch["has_stepped"],
            "inside validation": run[run.index(batch) + 1]["event"] == "validation",
            "while a checkpoint is being written": place[0] == 1,  # there has been one before
        }
        assert what.get(kill.moment, not batch["has_stepped"]), (kill, batch)


def test_each_difference_between_records_is_found(whole_run):
    run = records(whole_run("digits"), "whole")  # the places 0 to 2 are a window, 3 is a validation, 4 and 5 begin a window
    assert differences_of_records(run, run[:10], run[8:]) == differences_of_records(run, [], run) == []
    assert all(
        differences_of_records(run, run[:10], resumed) for resumed in (run[11:], run[10:-1], [*run[8:15], *run[16:]], [])
    )
    assert differences_of_records(run, run[1:10], run[10:])
    for place, name in [(k, name) for k in (3, 8, len(run) - 1) for name in run[k]]:
        changed = [record | ({name: "another"} if k == place else {}) for k, record in enumerate(run)]
        assert differences_of_records(run, changed, []), name
        assert differences_of_records(run, [], changed), name
    twice = [twice_done(run, run[:killed], run[resumed:]) for killed, resumed in [(6, 4), (4, 3), (3, 0), (6, 3), (8, 0)]]
    assert [len(too_much_done_twice(records, 0)) for records in twice] == [0, 0, 1, 1, 1]
    assert [len(too_much_done_twice(records, 1)) for records in twice] == [0, 0, 0, 0, 1]


def test_each_difference_between_checkpoints_is_found(whole_run, tmp_path):
    whole = last_checkpoint(whole_run("digits"))
    assert differences_of_checkpoints(whole, whole) == []
    assert differences_of_checkpoints(whole, tmp_path / "none.ckpt")
    for part, name in (("state_dict", "model.0.lora_B"), ("state_dict", "cola"), ("optimizer_states", 0)):
        state = torch.load(whole, weights_only=True)
        state[part][name] = None
        torch.save(state, tmp_path / "changed.ckpt")
        assert differences_of_checkpoints(whole, tmp_path / "changed.ckpt")
