"""The runs of a study as Optuna trials: which are waiting, which are running, in which process, and their results.

Optuna's storage is the only state, so any number of processes and machines may share the runs of one study. With a journal file
Optuna has no heartbeat for running trials: the process that runs a trial writes one every minute.
"""

import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from cola_lightning.errors import UserError
from cola_lightning.study.results import Mode, Result, Run
from cola_lightning.study.storage import open_storage

ALIVE_EVERY, DEAD_AFTER = 60.0, 600.0  # seconds
RATES, SEEDS = FloatDistribution(1e-12, 1e6, log=True), IntDistribution(0, 2**32 - 1)


class Trials:
    """The trials of a study.

    Args:
        storage: a journal file, or the URL of a database.
        name: the study's name.
        metric: the validation metric, which is the value of a trial.
        mode: whether a lower or a higher metric is better.

    Raises:
        UserError: for a study of another metric or mode that has begun, and a storage that cannot be opened.
    """

    def __init__(self, storage: str, name: str, metric: str, mode: Mode) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}[mode]
        opened = open_storage(storage)
        self.study = optuna.create_study(storage=opened, study_name=name, direction=direction, load_if_exists=True)
        stored = self.study.user_attrs.get("metric", metric)
        if self.is_begun and (stored, self.study.direction) != (metric, direction):
            expected = f"{stored} and {self.study.direction.name.lower()[:3]}"
            raise UserError(f"metric, mode: expected {expected}, as in the study, received {metric} and {mode}")
        if self.study.direction != direction:  # which Optuna does not change
            with suppress(KeyError):  # another process has deleted it; by its id, as that process may have made its own
                opened.delete_study(self.study._study_id)
            self.study = optuna.create_study(storage=opened, study_name=name, direction=direction, load_if_exists=True)
        self.study.set_user_attr("metric", metric)
        self.mode = mode

    @property
    def is_begun(self) -> bool:
        """Whether any run is finished or being executed. Until then a command may change what the study is about."""
        return self.are_running() or any(self._trials(TrialState.COMPLETE))

    @property
    def config(self) -> str | None:
        """What all runs share, as the study's first command described it; None if no command has."""
        return self.study.user_attrs.get("config")

    @config.setter
    def config(self, text: str) -> None:
        self.study.set_user_attr("config", text)

    def results(self) -> list[Result]:
        """The results of the finished runs, each once, in the order in which they were requested."""
        by_key: dict[Run, Result] = {}
        for run, trial in self._trials(TrialState.COMPLETE):
            by_key.setdefault(run, Result(**trial.user_attrs["result"]))
        return list(by_key.values())

    def add(self, results: Iterable[Result]) -> None:
        """Adds the results of runs that are not in the study."""
        known = {run for run, _ in self._trials(TrialState.COMPLETE)}
        for result in results:
            if (run := result.run) not in known:
                self.study.add_trial(
                    create_trial(
                        value=result.value(self.mode),
                        params={"learning_rate": run.learning_rate, "seed": run.seed},
                        distributions={"learning_rate": RATES, "seed": SEEDS},
                        user_attrs={"method": run.method, "result": asdict(result)},
                    )
                )

    def enqueue(self, runs: Iterable[Run]) -> None:
        """Enqueues runs that are neither finished, running nor waiting; again if the process that ran them is gone."""
        for _, trial in self._trials(TrialState.RUNNING):
            if not _is_alive(trial):
                with suppress(UpdateFinishedTrialError):  # another process was first
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        known = {run for run, _ in self._trials(TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)}
        for run in runs:
            if run not in known:
                params = {"learning_rate": run.learning_rate, "seed": run.seed}
                self.study.enqueue_trial(params, user_attrs={"method": run.method})

    def claim(self, wanted: Collection[Run]) -> tuple[optuna.Trial, Run] | None:
        """Claims the next waiting run for this process; None if none is waiting.

        Args:
            wanted: the runs that this command requests. Other waiting runs were requested by an earlier command: they are
                dropped, and a process that still wants them requests them again.
        """
        while any(self._trials(TrialState.WAITING)):
            trial = self.study.ask()
            if (method := trial.user_attrs.get("method")) is None:  # another process claimed the last: this one is empty
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            self.keep_alive(trial)
            rate = trial.suggest_float("learning_rate", RATES.low, RATES.high, log=True)
            run = Run(method, rate, trial.suggest_int("seed", SEEDS.low, SEEDS.high))
            others = self._trials(TrialState.COMPLETE, TrialState.RUNNING)
            # Two processes may have requested it at once: the first trial is the one that counts.
            is_taken = any(other == run and one.number < trial.number for other, one in others)
            if is_taken or run not in wanted:
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            return trial, run
        return None

    def are_running(self) -> bool:
        """Whether any process is executing a run."""
        return any(_is_alive(trial) for _, trial in self._trials(TrialState.RUNNING))

    def keep_alive(self, trial: optuna.Trial) -> None:
        """Records that the run is still running."""
        with suppress(UpdateFinishedTrialError):  # given up by another process, after DEAD_AFTER seconds of silence
            trial.set_user_attr("alive", [socket.gethostname(), os.getpid(), time.time()])

    def finish(self, trial: optuna.Trial, result: Result) -> None:
        """Records a run's result, also of a trial that another process has given up."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr("result", asdict(result))
            if self.study.tell(trial, result.value(self.mode), skip_if_finished=True).state == TrialState.COMPLETE:
                return
        self.add([result])

    def fail(self, trial: optuna.Trial) -> None:
        """Records that a run failed; it is repeated when it is requested again."""
        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def _trials(self, *states: TrialState) -> Iterator[tuple[Run, FrozenTrial]]:
        for trial in self.study.get_trials(deepcopy=False, states=states):
            # Those of a trial that is being claimed are not all there yet; what was enqueued is.
            params = trial.system_attrs.get("fixed_params", {}) | trial.params
            if "method" in trial.user_attrs and params:
                yield Run(trial.user_attrs["method"], params["learning_rate"], params["seed"]), trial


def _is_alive(trial: FrozenTrial) -> bool:
    host, process, said_at = trial.user_attrs.get("alive", ("", 0, None))
    if said_at is None:
        started = trial.datetime_start
        return started is not None and time.time() - started.timestamp() < DEAD_AFTER
    if host == socket.gethostname() and not _runs(process):
        return False
    return bool(time.time() - said_at < DEAD_AFTER)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True
