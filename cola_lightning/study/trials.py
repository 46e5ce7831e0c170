"""The runs of a study as Optuna's trials: which are to be done, which are being done, by whom, and what came of them.

Optuna's storage is the only state, so any number of processes and machines may take runs of one study. What Optuna does not
know of a journal file is whether a trial that runs is still being run: whoever runs it says so every minute.
"""

import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from cola_lightning.errors import UserError, one_line
from cola_lightning.study.results import Mode, Result, Run

ALIVE_EVERY, DEAD_AFTER = 60.0, 600.0  # seconds
RATES, SEEDS = FloatDistribution(1e-12, 1e6, log=True), IntDistribution(0, 2**32 - 1)


class Trials:
    """The trials of a study.

    Args:
        storage: a file for a journal, or the URL of a database.
        name: of the study.
        metric: on the rows of validation; the value of a trial.
        mode: whether a lower or a higher one is better.

    Raises:
        UserError: for a study of another metric, and a storage that cannot be opened.
    """

    def __init__(self, storage: str, name: str, metric: str, mode: Mode) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}[mode]
        self.study = optuna.create_study(storage=_open(storage), study_name=name, direction=direction, load_if_exists=True)
        had = self.study.user_attrs.get("metric", metric)
        if (had, self.study.direction) != (metric, direction):
            was = f"{had} and {self.study.direction.name.lower()[:3]}"
            raise UserError(f"metric, mode: expected {was}, as in the study, received {metric} and {mode}")
        self.study.set_user_attr("metric", metric)
        self.mode = mode

    def results(self) -> list[Result]:
        """What came of the runs that are done, each once, in the order in which they were asked for."""
        by_key: dict[Run, Result] = {}
        for run, trial in self._trials(TrialState.COMPLETE):
            by_key.setdefault(run, Result(**trial.user_attrs["result"]))
        return list(by_key.values())

    def take_up(self, results: Iterable[Result]) -> None:
        """Adds results of runs that the study does not know."""
        known = {run for run, _ in self._trials(TrialState.COMPLETE)}
        for result in results:
            if (run := result.run) not in known:
                self.study.add_trial(
                    create_trial(
                        value=self._value(result),
                        params={"learning_rate": run.learning_rate, "seed": run.seed},
                        distributions={"learning_rate": RATES, "seed": SEEDS},
                        user_attrs={"method": run.method, "result": asdict(result)},
                    )
                )

    def ask_for(self, runs: Iterable[Run]) -> None:
        """Has runs done that are neither done, nor being done, nor waiting; those whose process is gone, again."""
        for _, trial in self._trials(TrialState.RUNNING):
            if not _is_alive(trial):
                with suppress(UpdateFinishedTrialError):  # another process was first
                    self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        known = {run for run, _ in self._trials(TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)}
        for run in runs:
            if run not in known:
                params = {"learning_rate": run.learning_rate, "seed": run.seed}
                self.study.enqueue_trial(params, user_attrs={"method": run.method})

    def take(self, wanted: Collection[Run]) -> tuple[optuna.Trial, Run] | None:
        """The next waiting run, which is now this process' to do; None where none waits.

        Args:
            wanted: the runs that this command asks for. What else waits, an earlier command had asked for: it is dropped, and
                a process that still wants it asks for it again.
        """
        while any(self._trials(TrialState.WAITING)):
            trial = self.study.ask()
            if (method := trial.user_attrs.get("method")) is None:  # another process took the last: Optuna made one up
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            rate = trial.suggest_float("learning_rate", RATES.low, RATES.high, log=True)
            run = Run(method, rate, trial.suggest_int("seed", SEEDS.low, SEEDS.high))
            others = self._trials(TrialState.COMPLETE, TrialState.RUNNING)
            is_taken = any(other == run and one.number < trial.number for other, one in others)  # asked for by two at once
            if is_taken or run not in wanted:
                self.study.tell(trial, state=TrialState.PRUNED)
                continue
            self.keep_alive(trial)
            return trial, run
        return None

    def are_running(self) -> bool:
        """Whether any run is being done, by whichever process."""
        return any(_is_alive(trial) for _, trial in self._trials(TrialState.RUNNING))

    def keep_alive(self, trial: optuna.Trial) -> None:
        """Says that the run is being done."""
        trial.set_user_attr("alive", [socket.gethostname(), os.getpid(), time.time()])

    def finish(self, trial: optuna.Trial, result: Result) -> None:
        """Takes note of what came of a run."""
        trial.set_user_attr("result", asdict(result))
        self.study.tell(trial, self._value(result))

    def fail(self, trial: optuna.Trial) -> None:
        """Takes note that a run came to nothing; it will be done again when it is asked for."""
        self.study.tell(trial, state=TrialState.FAIL)

    def _value(self, result: Result) -> float:
        worst = float("inf") if self.mode == "min" else -float("inf")
        return worst if result.validation is None else result.validation

    def _trials(self, *states: TrialState) -> Iterator[tuple[Run, FrozenTrial]]:
        for trial in self.study.get_trials(deepcopy=False, states=states):
            params = trial.params or trial.system_attrs.get("fixed_params", {})
            if "method" in trial.user_attrs and params:
                yield Run(trial.user_attrs["method"], params["learning_rate"], params["seed"]), trial


def _open(storage: str) -> BaseStorage:
    try:
        if "://" in storage:
            return RDBStorage(storage)
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(storage))
    except Exception as error:  # of the database's own kind, or the disk's
        raise UserError(
            f"storage: expected a file, or the URL of a database that answers, received {storage!r} ({one_line(str(error))})"
        ) from error


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
