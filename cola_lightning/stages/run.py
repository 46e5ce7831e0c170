"""The process of one stage, and that of a task's tests."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from cola_lightning import layout
from cola_lightning.chain.chain import number_of_links
from cola_lightning.cli.training import COLACLI, TestedState
from cola_lightning.hf.transformers_module import RowValues
from cola_lightning.module import COLAModule
from cola_lightning.study.run import OPTIONS, RESULT, ChildWatch
from cola_lightning.writing import atomic_file

CONFIG, LAST = "config.yaml", Path("checkpoints", "last.ckpt")


class TestWatch(ChildWatch):
    """A :class:`ChildWatch` of the tests of a task.

    Attributes:
        first_link: how many links the reference of preferences has, whatever the checkpoint's last run began from.
        row_values: for each state that was tested, by metric, what each test row adds: values and weights.
    """

    first_link = 0

    def __init__(self) -> None:
        super().__init__()
        self.row_values: list[dict[str, list[list[float]]]] = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, COLAModule)
        pl_module.run.first_link = self.first_link

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)
        self.row_values.append({})

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collects the values of the batch's rows, of a ``test_step`` that returns them."""
        suffix = f"/dataloader_idx_{dataloader_idx}" * (len(trainer.num_test_batches) > 1)
        for name, rows in outputs.items() if isinstance(outputs, Mapping) else ():
            if isinstance(rows, RowValues):
                collected = self.row_values[-1].setdefault(f"test_{name}{suffix}", [[], []])
                for numbers, of_batch in zip(collected, rows, strict=True):
                    numbers += of_batch.tolist()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Joins the rows of all processes."""
        parts = layout.gather_objects(self.row_values[-1])
        self.row_values[-1] = {
            name: [[number for part in parts for number in part[name][place]] for place in (0, 1)] for name in parts[0]
        }


class StageTests(COLACLI):
    """``cola test --links all`` (or ``cola validate``), but of some states of the model.

    Args:
        words: the arguments of ``cola``.
        watch: handles signals.
        folder: the tests'.
        states: by their names, factors of the stages' updates. A state whose name is ``base`` or a stage's is the model without
            the later stages, and another one has all stages.
        reference: of preferences, as a number of links or a stage.
    """

    def __init__(
        self,
        words: list[str],
        watch: TestWatch,
        folder: Path,
        states: Mapping[str, Mapping[int | str, float]],
        reference: int | str,
    ) -> None:
        self.states, self.reference = states, reference
        super().__init__(words, watch, folder)

    @override
    def tested_states(self) -> Sequence[TestedState]:
        assert self.opened is not None
        assert isinstance(self.watch, TestWatch)
        names = self.opened.state.names
        self.watch.first_link = number_of_links(self.reference, names)
        links = {"base": 0} | {name: number_of_links(name, names) for name in names if name}
        return [TestedState(links.get(name, len(names)), name, scale) for name, scale in self.states.items()]


def run(folder: str) -> int:
    """Trains or resumes a stage, or tests states of the model on a task, and writes the result.

    The result of a stage has a hash of its last checkpoint, that of tests their rows.

    Args:
        folder: the run's. It has its ``config.yaml``, and ``run.json``, which for tests has the ``checkpoint``, the ``command``
            (``test`` or ``validate``), the ``states`` and the ``reference``.

    Returns:
        The exit status.
    """
    place = Path(folder)
    options = json.loads((place / OPTIONS).read_text(encoding="utf-8"))
    warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")  # the log is in it
    config, result = ["--config", str(place / CONFIG)], dict[str, Any]()
    if "checkpoint" in options:
        words = [options["command"], *config, "--ckpt_path", options["checkpoint"], "--links", "all"]
        watch = TestWatch()
        with watch.listening():
            tested = StageTests(words, watch, place, options["states"], options["reference"]).tested
        of_rows = watch.row_values or [{}] * len(tested)  # a validation has none
        result["rows"] = [row | {"row_values": values} for row, values in zip(tested, of_rows, strict=True)]
    else:
        fit_watch, last = ChildWatch(), place / LAST
        words = ["fit", *config, *(["--ckpt_path", str(last)] if last.exists() else [])]
        with fit_watch.listening():
            COLACLI(words, fit_watch, place)
        result["checkpoint"] = last
    _write(place, result)
    return 0


@rank_zero_only
def _write(folder: Path, result: dict[str, Any]) -> None:
    """Writes a result, with a hash of the checkpoint in place of its path."""
    if "checkpoint" in result:
        with result["checkpoint"].open("rb") as file:
            result["checkpoint"] = hashlib.file_digest(file, "sha256").hexdigest()
    with atomic_file(folder / RESULT) as partial:
        partial.write_text(json.dumps(result), encoding="utf-8")
