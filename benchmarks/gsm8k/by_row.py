"""A causal language model that also writes the loss of each test row, so that two models can be compared row by row."""

import json
from pathlib import Path
from typing import Any

from typing_extensions import override

from cola_lightning import COLACausalLM

FILE = "rows.json"


class COLACausalLMByRow(COLACausalLM):
    """Writes ``rows.json`` to the run's folder after a test: each row's mean loss and its number of tokens with loss.

    Rows come in the order of the test, which is the same for all runs of a study. It needs ``data.eval_batch_size: 1``,
    because a batch's loss is a mean over its tokens.
    """

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.rows: list[tuple[float, int]] = []

    @override
    def batch_metrics(self, batch: Any, output: Any) -> Any:
        if self.trainer.testing:
            if len(batch["labels"]) != 1:
                raise ValueError(f"data.eval_batch_size must be 1, got a batch of {len(batch['labels'])} rows")
            self.rows.append((float(output.loss), output.size))
        return super().batch_metrics(batch, output)

    @override
    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        (Path(self.trainer.default_root_dir) / FILE).write_text(json.dumps(self.rows), encoding="utf-8")
