"""A resumable comparison: finds the missing runs, executes them, and writes the results."""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from cola_lightning.cli.training import MadeRun, as_words, in_silence, resolve
from cola_lightning.errors import UserError
from cola_lightning.runs.child import execute
from cola_lightning.runs.facts import changes, facts_of
from cola_lightning.runs.folder import LAST, claim, read_record, set_aside, write_record
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.figures import draw_curves, draw_points
from cola_lightning.study.methods import method, model_option
from cola_lightning.study.results import Result, RunKey, at_best_rates, best_rates, read, warning_about, write
from cola_lightning.study.run import LOG, OPTIONS, RESULT
from cola_lightning.study.table import MethodSummary, as_csv, as_markdown, on_screen, summarize
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

CONFIG, RESULTS = "config.yaml", "results.jsonl"
WAIT = 5.0  # seconds between two looks at the runs of other processes


class Study:
    """A comparison, from its first run to its table.

    Args:
        comparison: the options of the command.
        fit_words: options of ``cola fit`` for every run.

    Raises:
        UserError: for an invalid comparison.
    """

    def __init__(self, comparison: Comparison, fit_words: Sequence[str]) -> None:
        self.comparison, self.output = comparison, Path(comparison.output)
        self.words = ["--config", comparison.config, *fit_words]
        self.config = resolve(self.words)
        optimizer, seed = model_option(self.config, "optimizer"), self.config["model"]["init_args"].get("seed")
        for name, value in {"model.seed": seed, "ckpt_path": self.config["ckpt_path"]}.items():
            if value is not None:
                raise UserError(f"{name}: must be null, because a study starts each run from its own seed, got {value!r}")
        rates = comparison.learning_rates or [float(optimizer["init_args"]["lr"])]
        self.rates = rates if isinstance(rates, dict) else dict.fromkeys(comparison.methods, rates)
        self.methods = {name: method(name, self.config) for name in comparison.methods}
        for options in [dict.fromkeys(comparison.also_seeded, 0), *(chosen.options for chosen in self.methods.values())]:
            resolve([*self.words, *as_words(options)])  # what parsing refuses is refused here, before any time is lost
        with in_silence():
            data = MadeRun(self.config).datamodule
        more = {"also_seeded": comparison.also_seeded, "metric": comparison.metric, "mode": comparison.better}
        self.shared = facts_of(self.config | {"seed_everything": None}, data, **more)
        self.failed: set[RunKey] = set()

    def _settle_config(self) -> None:
        """Writes what all runs share, or checks that it is what the study's other runs share."""
        path = self.output / CONFIG
        if path.exists():
            known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            for name, here, there in changes(self.shared, known):
                what = f"{name} has changed since" if name.startswith("what ") else f"{name} is {here!r} here, but {there!r} in"
                raise UserError(f"config: {what} {path}. Use another --output for another study")
        else:
            with atomic_file(path, is_shared=True) as partial:
                partial.write_text(yaml.safe_dump(self.shared, sort_keys=False), encoding="utf-8")

    def run(self) -> int:
        """Executes the missing runs, including those that other processes abandon; returns the exit status."""
        with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True) as self.bar:
            self.task = self.bar.add_task("")
            while missing := self._missing():
                if not any(self._execute(run) for run in missing):  # the first that no other process executes
                    time.sleep(WAIT)
        table, warning = self._write()
        rich.print(on_screen(table, self.comparison.metric))
        if warning:
            log.warning(warning)
        return 0 if self.failed <= self._results().keys() else 1  # another process may have had more success

    def _results(self) -> dict[RunKey, Result]:
        """The study's results; it may contain runs that this command does not want."""
        paths = [self.output / RESULTS, *sorted(self.output.glob(f"runs/*/{RESULT}"))]
        return {result.key: result for path in paths for result in read(path)}

    def _missing(self) -> list[RunKey]:
        """The wanted runs that are neither finished nor failed."""
        self._settle_config()  # each time: while there is no result, another command may have written its own
        results = self._results()
        wanted = self._wanted(results)
        missing = [run for run in wanted if run not in results and run not in self.failed]
        self.bar.update(self.task, total=len(wanted), completed=len(wanted) - len(missing))
        return missing

    def _wanted(self, results: Mapping[RunKey, Result]) -> list[RunKey]:
        """The runs that this command asks for, by seed, so that a study that is stopped has results of each method.

        Once a method's runs for tuning are finished, those of the other seeds follow, at its best rate.
        """
        runs, rate_seeds = [], self.comparison.rate_seeds
        for name, rates in self.rates.items():
            tuning = [RunKey(name, rate, seed) for seed in rate_seeds for rate in rates]
            runs += tuning
            if all(run in results for run in tuning):
                best = best_rates([results[run] for run in tuning], self.comparison.better, rate_seeds)[name]
                runs += [RunKey(name, best, seed) for seed in range(len(rate_seeds), self.comparison.seeds)]
        return sorted(runs, key=lambda run: run.seed)

    def _execute(self, run: RunKey) -> bool:
        """Executes a run, unless it is another process's; returns whether it was this one's."""
        name = f"{run.method}-lr{run.learning_rate}-seed{run.seed}"
        folder = self.output / "runs" / name
        if (claimed := claim(self.output / ".claims" / name)) is None:
            return False
        try:
            if (folder / RESULT).exists():  # since this process has looked for it
                return False
            self.bar.update(self.task, description=name)
            self._prepare(folder, self._run_options(run, folder))
            status, refusal = execute(["compare", "--run", str(folder)], folder / LOG, claimed)
        finally:
            claimed.close()
            if not self._results():  # the next command may have another config
                (self.output / CONFIG).unlink(missing_ok=True)
        if status == 2:  # it is the config, or one of its methods
            raise UserError(refusal or f"a run was refused, see {folder / LOG}")
        is_finished = (folder / RESULT).exists()
        if is_finished:
            log.info("finished: %s: %s %.4f", name, self.comparison.metric, self._results()[run].value(self.comparison.better))
            if not self.comparison.keep_checkpoints:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self._write()
        else:
            self.failed.add(run)
            log.error("failed: %s", folder / LOG)
        return True

    def _prepare(self, folder: Path, options: Mapping[str, Any]) -> None:
        """Makes a run's folder ready: it goes on if it was stopped with the same options, and is kept aside otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        earlier = read_record(folder / OPTIONS)
        facts, before = ({**one.get("config", {}), "contents": one.get("contents", {})} for one in (options, earlier))
        if (folder / LAST).exists() and (change := next(changes(facts, before), None)):
            kept = set_aside(folder)
            log.info("%s: %s has changed. The run that was stopped is kept in %s", folder.name, change[0], kept)
        write_record(folder / OPTIONS, options)

    def _run_options(self, run: RunKey, folder: Path) -> dict[str, Any]:
        """What the run's process has to know."""
        chosen = self.methods[run.method]
        changed = {**chosen.options, "model.optimizer.lr": run.learning_rate, "trainer.default_root_dir": str(folder)}
        changed |= dict.fromkeys(("seed_everything", *self.comparison.also_seeded), run.seed)
        changed |= dict.fromkeys(("trainer.enable_progress_bar", "trainer.enable_model_summary"), False)
        if self.config["trainer"]["logger"] in (None, True):  # metrics.csv and checkpoints in the folder itself
            in_folder = {"save_dir": str(folder), "name": "", "version": ""}
            changed["trainer.logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": in_folder}
        known = run._asdict() | {"rank": chosen.rank, "links": chosen.links}
        config = resolve([*self.words, *as_words(changed)])
        return {"config": config, "contents": self.shared["contents"], "metric": self.comparison.metric, "result": known}

    def _write(self) -> tuple[list[MethodSummary], str]:
        """Writes the results, the tables and the figures; returns the table's rows, and a warning about them or nothing."""
        results, metric = self._results(), self.comparison.metric
        write(results.values(), self.output / RESULTS)
        mine = [results[run] for run in self._wanted(results) if run in results]
        chosen = at_best_rates(mine, self.comparison.better, self.comparison.rate_seeds)
        table, warning = summarize(chosen), warning_about(chosen)
        (self.output / "table.md").write_text(as_markdown(table, metric, warning), encoding="utf-8")
        (self.output / "table.csv").write_text(as_csv(table), encoding="utf-8")
        if mine:
            draw_curves(chosen, metric, self.output / "curves.png")
            draw_points(chosen, metric, self.output / "points.png")
        return table, warning
