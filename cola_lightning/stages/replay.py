"""Replay: in a later stage, a share of the rows of the stages before it is trained again."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import ConcatDataset, Subset
from typing_extensions import override

from cola_lightning.data.base import EpochDataModule
from cola_lightning.data.examples import OptionRows
from cola_lightning.data.source import SourceDataModule, joined
from cola_lightning.data.split import as_count, draw
from cola_lightning.errors import UserError

log = logging.getLogger(__name__)


class Replay(Callback):
    """Adds a share of the training rows of other data to those of a fit.

    ``cola stages --replay 0.05`` adds it to the stages' configs. The rows are the data's own training rows, without what it
    holds out for validation and test. They are drawn by its ``split_seed``, so a run that resumes has the same.

    Args:
        share: The share of each data's training rows, above 0 and at most 1.
        data: The other data, by name. Its rows must be of the kind that the fit's data module collates.

    Raises:
        UserError: for data modules of other classes, and options that are trained with another loss.
    """

    def __init__(self, share: float, data: dict[str, LightningDataModule]) -> None:
        self.share, self.data = float(share), data

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Adds the rows, once the fit's own data is set up."""
        if stage != "fit":
            return
        own: Any = trainer.datamodule  # type: ignore[attr-defined]
        parts = [own.train]
        for name, of_name in self.data.items():
            data: Any = of_name
            data.trainer = trainer
            data.setup("fit")
            is_same = isinstance(data, EpochDataModule) and type(data) is type(own)
            options = getattr(data, "preprocessor", None)
            if not is_same or (isinstance(options, OptionRows) and options.loss != own.preprocessor.loss):
                raise UserError(
                    f"replay: {name} and this stage must have one class of data, an EpochDataModule, and options must have one "
                    "loss"
                )
            n_rows = len(data.train)
            places = sorted(draw(n_rows, [as_count(self.share, n_rows)], data.split_seed, name)[0].tolist())
            parts.append(rows_at(data.train, places))
            if isinstance(own, SourceDataModule):
                own.rows_hash += data.rows_hash
            log.info("replay: %d of %d training rows of %s", len(places), n_rows, name)
        has_columns = all(isinstance(part, list) or hasattr(part, "select") for part in parts)
        own.train = joined(parts) if has_columns else ConcatDataset(parts)
        if hasattr(parts[0], "collate"):  # packs make their batches themselves
            own.train.collate = parts[0].collate


def rows_at(rows: Any, places: list[int]) -> Any:
    """The rows at these places: a list, a data set of ``datasets``, or another sequence."""
    if isinstance(rows, list):
        return [rows[place] for place in places]
    return rows.select(places) if hasattr(rows, "select") else Subset(rows, places)


def add_replay(configs: Mapping[str, dict[str, Any]], share: float) -> None:
    """Has each stage's config replay the stages before it, and says which of them it cannot replay.

    Args:
        configs: the complete config of each stage's fit, by its name, in order.
        share: of the rows of each earlier stage.
    """
    names = list(configs)
    for index, (name, config) in enumerate(configs.items()):
        same = [earlier for earlier in names[:index] if _kind(configs[earlier]) == _kind(config)]
        if others := [earlier for earlier in names[:index] if earlier not in same]:
            what = "the classes of model and data, data.chat_template, or data.packing, are others"
            log.info("stage %s: replays no rows of %s (%s)", name, ", ".join(others), what)
        if same:
            init_args = {"share": share, "data": {earlier: configs[earlier]["data"] for earlier in same}}
            own = config["trainer"]["callbacks"] or []
            replay = {"class_path": f"{Replay.__module__}.{Replay.__name__}", "init_args": init_args}
            config["trainer"]["callbacks"] = [*(own if isinstance(own, list) else [own]), replay]


def _kind(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two stages have in common if one can replay the other's rows."""
    options = config["data"].get("init_args", {})
    return config["model"]["class_path"], config["data"]["class_path"], options.get("chat_template"), options.get("packing")
