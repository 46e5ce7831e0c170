"""A resumable comparison: finds the remaining runs, executes them, and writes the results."""

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cola_lightning.data.splits import files_identity
from cola_lightning.errors import OutsideError, UserError
from cola_lightning.study import process
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.config import as_text, as_words, check_same, is_of_study, resolved
from cola_lightning.study.figures import draw_curves, draw_points
from cola_lightning.study.methods import Method, method, option_of_model
from cola_lightning.study.results import Result, Run, at_best_rates, best_rates, read, warning_about, write
from cola_lightning.study.storage import answering
from cola_lightning.study.table import Row, as_csv, as_markdown, on_screen, summarize
from cola_lightning.study.trials import ALIVE_EVERY, Trials
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

RESULTS = "results.jsonl"
FINISHED = "finished: %s, learning rate %g, seed %d: %s"
FAILED = "failed: %s, learning rate %g, seed %d: %s"
WAIT = 5.0  # seconds between two checks of other processes' runs


class Study:
    """A comparison, from its first run to its table.

    Args:
        asked: the command's options.
        fit_words: options of ``cola fit`` for every run.

    Raises:
        UserError: for an invalid comparison.
    """

    def __init__(self, asked: Comparison, fit_words: Sequence[str]) -> None:
        self.asked, self.output = asked, Path(asked.output)
        self.words = ["--config", asked.config, *fit_words]
        self.config = resolved(self.words)
        optimizer = option_of_model(self.config, "optimizer")
        if (seed := self.config["model"]["init_args"].get("seed")) is not None:
            raise UserError(f"model.seed: expected null, so that seed_everything decides, received {seed}")
        if (path := self.config.get("ckpt_path")) is not None:
            raise UserError(f"ckpt_path: expected null, as each run of a study begins anew, received {path!r}")
        own_rate = (optimizer.get("init_args") or {}).get("lr") if isinstance(optimizer, dict) else None
        if own_rate in (None, "None"):  # the latter for an argument without a type
            raise UserError("model.optimizer: expected a class and its lr, which a study sets, received none in the config")
        self.methods = {name: self._method(name) for name in asked.methods}
        rates = asked.learning_rates or [float(own_rate)]
        self.rates = rates if isinstance(rates, dict) else dict.fromkeys(self.methods, rates)
        if asked.also_seeded:
            resolved([*self.words, *as_words(dict.fromkeys(asked.also_seeded, 0))])
        storage, name = asked.storage or str(self.output / "study.journal"), asked.study_name or self.output.absolute().name
        self.trials = Trials(storage, name, asked.metric, asked.better)
        self.place = f"the study {name!r}"
        self.shared = self._settle_config()
        self.failed: dict[Run, Path] = {}
        n_tuning = len(asked.tuned_by)
        self.n_runs = sum(len(rates) * n_tuning + asked.seeds - n_tuning for rates in self.rates.values())

    def _method(self, name: str) -> Method:
        found = method(name, self.config)
        resolved([*self.words, *as_words(found.options)])  # what parsing refuses is refused here, before any time is lost
        return found

    def _settle_config(self) -> str:
        """Stores what all runs share in the storage and in the output, once it is that of the finished runs; returns it."""
        asked, path = self.asked, self.output / "config.yaml"
        of_study = {"also_seeded": asked.also_seeded or [], "metric": asked.metric, "mode": asked.better}
        source = ((self.config.get("data") or {}).get("init_args") or {}).get("source")
        of_study |= files_identity(source) if isinstance(source, str) else {}
        mine = as_text({**self.config, **of_study})
        is_begun = self.trials.is_begun
        if is_begun and self.trials.config is not None:
            check_same(mine, self.trials.config, self.place)
        if path.exists() and (is_begun or read(self.output / RESULTS)):
            check_same(mine, path.read_text(encoding="utf-8"), str(path))
        elif path.exists() and not is_of_study(path.read_bytes()):
            raise UserError(
                f"output: expected a folder without a config.yaml of another kind, as a study saves its own there, received "
                f"{asked.output!r}"
            )
        with atomic_file(path, is_shared=True) as partial:
            partial.write_text(mine, encoding="utf-8")
        self.trials.config = mine
        return mine

    def run(self) -> int:
        """Executes the remaining runs, including those that other processes abandon; returns the exit status."""
        self.trials.add(read(self.output / RESULTS))
        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
        left = [TextColumn("left"), TimeRemainingColumn()]
        with Progress(*columns, *left, console=rich.get_console(), transient=True, speed_estimate_period=1e9) as self.bar:
            self.task = self.bar.add_task("", total=self.n_runs)
            while True:
                results = self.results()
                for result in results:  # another process may have had more success
                    self.failed.pop(result.run, None)
                n_done = len(results) + len(self.failed)
                self.bar.update(self.task, completed=n_done, description="")
                wanted = [run for run in self.wanted(results) if run not in self.failed]
                is_missing = len(wanted) > len(results)  # also if another process gives a run up only now
                self.trials.enqueue(wanted)
                if (taken := self.trials.claim(wanted)) is not None:
                    self._do(*taken, n_done)
                elif is_missing or (n_done < self.n_runs and self.trials.are_running()):
                    time.sleep(WAIT)
                else:
                    break
        table, warning = self._write()
        rich.print(on_screen(table, self.asked.metric))
        if warning:
            log.warning(warning)
        for run, path in self.failed.items():
            log.error(FAILED, run.method, run.learning_rate, run.seed, path)
        return 1 if self.failed else 0

    def results(self) -> list[Result]:
        """Results of the runs that this command requests; the study may contain others."""
        found = {result.run: result for result in self.trials.results()}
        return [found[run] for run in self.wanted(found.values()) if run in found]

    def wanted(self, results: Iterable[Result]) -> list[Run]:
        """The runs in order: by seed, so that a study that is stopped has results of each method, then by rate.

        So each method's first run, in which it may be refused, comes early. Runs of seeds that are not used for tuning follow
        once the best rates are known, except for methods with a failed run.
        """
        by_run, tuned_by = {result.run: result for result in results}, self.asked.tuned_by
        of_seed = [
            (name, rate) for rates in zip_longest(*self.rates.values()) for name, rate in zip(self.rates, rates, strict=True)
        ]
        runs = [Run(name, rate, seed) for seed in tuned_by for name, rate in of_seed if rate is not None]
        best: dict[str, float] = {}
        if by_run.keys() | self.failed.keys() >= set(runs):
            lost = {run.method for run in runs if run not in by_run}
            tuning = [by_run[run] for run in runs if run.method not in lost]
            best = best_rates(tuning, self.asked.better, tuned_by)
        rest = range(len(tuned_by), self.asked.seeds)
        return runs + [Run(name, rate, seed) for seed in rest for name, rate in best.items()]

    def _do(self, trial: Any, run: Run, n_done: int) -> None:
        """Executes a run in a separate process, and reports its outcome to Optuna."""
        folder = self.output / "runs" / f"{run.method}-lr{run.learning_rate}-seed{run.seed}"
        what = f"{run.method}, rate {run.learning_rate:g}, seed {run.seed}"
        written_at = time.monotonic()

        def report_progress(done: float) -> None:
            nonlocal written_at
            self.bar.update(self.task, completed=n_done + done, description=what)
            if time.monotonic() - written_at > ALIVE_EVERY:
                written_at = time.monotonic()
                with suppress(OutsideError), answering():  # the run goes on: its result is what counts
                    self.trials.keep_alive(trial)

        try:
            check_same(self.shared, self.trials.config or self.shared, self.place)  # two commands may have begun at once
            chosen = self.methods[run.method] if run.method in self.methods else self._method(run.method)
            changes = {**chosen.options, "model.optimizer.lr": run.learning_rate, "seed_everything": run.seed}
            changes |= dict.fromkeys(self.asked.also_seeded or (), run.seed)
            changes |= {"trainer.default_root_dir": str(folder)}
            changes |= dict.fromkeys(("trainer.enable_progress_bar", "trainer.enable_model_summary"), False)
            facts = process.execute([*self.words, *as_words(changes)], self.asked.metric, folder, report_progress, ALIVE_EVERY)
        except BaseException:
            with suppress(OutsideError), answering():
                self.trials.fail(trial)
            raise
        if facts is None:
            self.trials.fail(trial)
            self.failed[run] = folder / process.LOG
            log.warning(FAILED, run.method, run.learning_rate, run.seed, self.failed[run])  # others may go on for hours
            return
        known = {"rank": chosen.rank, "links": chosen.links}  # for a run that diverged
        result = Result(**asdict(run), **known | facts)
        try:
            self.trials.finish(trial, result)
        except Exception:  # where the storage does not answer, the next command finds the result here
            write([*read(self.output / RESULTS), result], self.output / RESULTS)
            raise
        is_diverged = result.validation is None
        scores = "diverged" if is_diverged else f"{self.asked.metric} {result.validation:.4f}, on test {result.test:.4f}"
        log.info(FINISHED, run.method, run.learning_rate, run.seed, scores)
        if not self.asked.keep_checkpoints:
            for checkpoints in folder.glob("**/checkpoints"):
                shutil.rmtree(checkpoints)
        self._write()

    def _write(self) -> tuple[list[Row], str]:
        """Writes the results, the tables and the figures; returns the table's rows, and a warning about them or nothing."""
        results = self.results()
        write(self.trials.results(), self.output / RESULTS)
        chosen = at_best_rates(results, self.asked.better, self.asked.tuned_by)
        table, warning = summarize(chosen), warning_about(chosen)
        for name, text in {"table.md": as_markdown(table, self.asked.metric, warning), "table.csv": as_csv(table)}.items():
            with atomic_file(self.output / name, is_shared=True) as partial:
                partial.write_text(text, encoding="utf-8")
        if results:
            draw_curves(chosen, self.asked.metric, self.output / "curves.png")
            draw_points(chosen, self.asked.metric, self.output / "points.png")
        return table, warning
