"""A run that is killed at any moment and resumed is the run that nobody killed."""

import copy
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
        ("rolling", "after a knot", "SIGTERM"),
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
        batch, after = batches[place], run[run.index(batches[place]) + 1]
        following = batches[places[places.index(place) + 1]]
        what = {
            "first batch": place == places[0],
            "before a knot": batch["link"] == 0 and following["link"] == 1,
            "at a knot": batch["link"] == 1 and batches[places[places.index(place) - 1]]["link"] == 0,
            "after a knot": batch["link"] == 1 and batches[places[places.index(place) - 1]]["link"] == 0,
            "mid-epoch": place[1] > 0 and following["epoch"] == place[0],
            "before the optimizer's step": batch["has_stepped"],
            "inside validation": after["event"] == "validation",
            "while a checkpoint is being written": place[0] == 1,  # there has been one before
        }
        assert what.get(kill.moment, not batch["has_stepped"]), (kill, batch)


def changed(run, place, **fields):
    run = copy.deepcopy(run)
    run[place] |= fields
    return run


def test_each_difference_between_records_is_found(whole_run):
    run = records(whole_run("digits"), "whole")
    end, rows = len(run), (run[8]["rows"], run[9]["rows"])
    assert differences_of_records(run, run[:10], run[8:]) == []
    assert differences_of_records(run, [], run) == []
    for killed, resumed, text in [
        (run[:10], run[11:], "never done"),
        (run[:10], run[10:-1], "ends before"),
        (run[:10], [], "never done"),
        (run[:10], [run[10], *run[10:]], "was due"),
        (run[:10], [*run[10:], run[-1]], "the end was due"),
        (run[:10], [*run[10:15], *run[16:]], "was due"),
        (run[1:10], run[10:], "was due"),
        (run[:10], changed(run, 11, loss="0x1.0p+0")[10:], "batch 2 of epoch 1.loss"),
        (changed(run, 9, loss="0x1.0p+0")[:10], run[10:], "loss"),
        (changed(run, 8, rates=["0x0.0p+0"])[:10], run[8:], "rates"),
        (run[:10], changed(changed(run, 8, rows=rows[1]), 9, rows=rows[0])[8:], "batch 6 of epoch 0.rows"),
        (run[:10], changed(run, 3, metrics={"val_loss": "0x0.0p+0"})[3:], "validation at step 1 in epoch 0.metrics"),
        (run[:10], changed(run, end - 1, link=1)[10:], "link"),
    ]:
        assert any(text in found for found in differences_of_records(run, killed, resumed)), text


def test_only_what_was_not_finished_may_be_done_twice(whole_run):
    run = records(whole_run("digits"), "whole")  # the places 0 to 2 are a window, 3 is a validation, 4 and 5 begin a window

    def refused(killed, resumed_at, allowed_steps=0):
        return too_much_done_twice(twice_done(run, run[:killed], run[resumed_at:]), allowed_steps)

    assert [refused(6, 6), refused(6, 4), refused(3, 3), refused(4, 3)] == [[], [], [], []]
    assert all([refused(3, 0), refused(6, 3), refused(6, 0)])
    assert refused(6, 0, allowed_steps=1) == []
    assert refused(8, 0, allowed_steps=1)


def test_each_difference_between_checkpoints_is_found(whole_run, tmp_path):
    whole = last_checkpoint(whole_run("digits"))
    assert differences_of_checkpoints(whole, whole) == []
    assert differences_of_checkpoints(whole, tmp_path / "none.ckpt")

    def found(change):
        state = torch.load(whole, weights_only=True)
        change(state)
        torch.save(state, tmp_path / "changed.ckpt")
        return differences_of_checkpoints(whole, tmp_path / "changed.ckpt")

    assert found(lambda state: state["optimizer_states"][0]["state"].pop(0))
    assert found(lambda state: state["optimizer_states"][0]["state"][1]["step"].add_(1))
    assert found(lambda state: state["state_dict"]["model.0.lora_B"].mul_(1 + 1e-7))
    assert found(lambda state: state["state_dict"]["cola"]["chain"]["tensors"]["links.0.2.lora_A"].neg_())
    assert found(lambda state: state["state_dict"]["cola"]["chain"]["description"]["links"].pop())
    assert found(lambda state: state["state_dict"]["cola"].update(link_start=[0, 0]))
    assert found(lambda state: state["lr_schedulers"][0].update(last_epoch=0))
    assert found(lambda state: state.update(global_step=0))
