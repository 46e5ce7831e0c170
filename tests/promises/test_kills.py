"""A run that is killed at any moment and resumed is the run that nobody killed."""

import functools

import pytest

from tests.helpers.kills import KILLS, SETUPS, run_kill, run_whole

ALWAYS = ("digits", "inside an accumulation window: after backward, SIGINT")
CASES = [
    pytest.param(setup, kill, id=f"{setup}, {kill}", marks=[pytest.mark.slow] * ((setup, str(kill)) != ALWAYS))
    for setup in SETUPS
    for kill in KILLS
]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Gives a set-up's run that nobody kills; it is made when it is first asked for."""
    return functools.cache(lambda setup: run_whole(setup, tmp_path_factory.mktemp(setup)))


@pytest.mark.parametrize(("setup", "kill"), CASES)
def test_a_killed_run_resumes_as_the_run_itself(whole_run, setup, kill):
    resumed_from = run_kill(setup, whole_run(setup), kill)
    assert kill.moment != "after the first step" or resumed_from == 1
