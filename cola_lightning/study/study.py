"""A resumable comparison: finds the missing runs, executes them, and writes the results."""

import gc
import logging
import shutil
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import yaml

from cola_lightning import layout
from cola_lightning.cli.command_line import as_words
from cola_lightning.cli.made_run import MadeRun, in_silence, resolve
from cola_lightning.errors import UserError, refusal
from cola_lightning.runs.facts import changes, facts_of
from cola_lightning.runs.folder import begin
from cola_lightning.runs.processes import by_first, claimed, is_first, join
from cola_lightning.study.comparison import Comparison
from cola_lightning.study.methods import method, model_option
from cola_lightning.study.results import Result, RunKey, at_best_rates, best_rates, read, warning_about, write
from cola_lightning.study.run import measured
from cola_lightning.study.table import MethodSummary, as_markdown, on_screen, summarize
from cola_lightning.writing import atomic_file

log = logging.getLogger(__name__)

CONFIG, TABLE, RESULTS, RESULT = "config.yaml", "table.md", "results.jsonl", "result.json"
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
        for options in [dict.fromkeys(comparison.also_seeded, 0), *self.methods.values()]:
            resolve([*self.words, *as_words(options)])  # what parsing refuses is refused here, before any time is lost
        with in_silence():
            self.first = MadeRun(self.config)
        more = {"also_seeded": comparison.also_seeded, "metric": comparison.metric, "mode": comparison.better}
        self.shared = facts_of(self.config | {"seed_everything": None}, self.first.datamodule, **more)
        self.failed: set[RunKey] = set()

    def run(self) -> int:
        """Executes the missing runs, including those that other processes abandon; returns the exit status."""
        join(self.first.trainer)
        while missing := by_first(self._missing):
            if not any(self._execute(run) for run in missing):  # the first that no other process executes
                time.sleep(WAIT)
        table, warning = by_first(self._write)
        if is_first():
            rich.print(on_screen(table, self.comparison.metric), warning, sep="\n")
        return 0 if self.failed <= by_first(self._results).keys() else 1  # another process may have had more success

    def _results(self) -> dict[RunKey, Result]:
        """The study's results; it may contain runs that this command does not want."""
        paths = [self.output / RESULTS, *sorted(self.output.glob(f"runs/*/{RESULT}"))]
        return {result.key: result for path in paths for result in read(path)}

    def _missing(self) -> list[RunKey]:
        """The wanted runs that are neither finished nor failed."""
        if (path := self.output / CONFIG).exists():
            for name, here, there in changes(self.shared, yaml.safe_load(path.read_text(encoding="utf-8")) or {}):
                what = f"{name} has changed since" if " " in name else f"{name} is {here!r} here, but {there!r} in"
                raise UserError(f"config: {what} {path}. Use another --output for another study")
        results = self._results()
        return [run for run in self._wanted(results) if run not in results and run not in self.failed]

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
        folder = self.output / "runs" / f"{run.method}-lr{run.learning_rate}-seed{run.seed}"
        with claimed(self.output / ".claims" / folder.name) as is_mine:
            if not is_mine or by_first((folder / RESULT).exists):  # since this process has looked for it
                return False
            config = by_first(lambda: self._begin(run, folder))
            try:
                result = measured(config, folder, self.comparison.metric, run)
            except Exception as error:
                if refusal(error) is not None or layout.has_processes():  # the other processes may not get here
                    raise
                self.failed.add(run)
                log.exception("failed: %s", folder.name)
                traceback.clear_frames(error.__traceback__)  # which hold the model
            else:
                by_first(lambda: self._finish(folder, result))
            gc.collect()
        return True

    def _begin(self, run: RunKey, folder: Path) -> dict[str, Any]:
        """Makes a run's folder ready; returns the configuration of its fit."""
        changed = {**self.methods[run.method], "model.optimizer.lr": run.learning_rate}
        changed |= {"trainer.default_root_dir": str(folder)}
        changed |= dict.fromkeys(("seed_everything", *self.comparison.also_seeded), run.seed)
        config = resolve([*self.words, *as_words(changed)])
        last = begin(folder, config | {"contents": self.shared["contents"]}, folder.name)
        return config | {"ckpt_path": last and str(last)}

    def _finish(self, folder: Path, result: Result) -> None:
        """Writes a run's result."""
        write([result], folder / RESULT)
        log.info("finished: %s: %s %.4f", folder.name, self.comparison.metric, result.value(self.comparison.better))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self._write()

    def _write(self) -> tuple[list[MethodSummary], str]:
        """Writes the results and the table; returns the table's rows, and a warning about them or nothing."""
        results, metric = self._results(), self.comparison.metric
        mine = [results[run] for run in self._wanted(results) if run in results]
        chosen = at_best_rates(mine, self.comparison.better, self.comparison.rate_seeds)
        table, warning = summarize(chosen), warning_about(chosen)
        if mine:
            texts = {CONFIG: yaml.safe_dump(self.shared, sort_keys=False), TABLE: as_markdown(table, metric, warning)}
            for name, text in texts.items():
                with atomic_file(self.output / name, is_shared=True) as partial:
                    partial.write_text(text, encoding="utf-8")
            write(results.values(), self.output / RESULTS)
        return table, warning
