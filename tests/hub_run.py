"""Commands one after the other in a process of their own, and a callback that writes down the texts that they train on.

    python -m tests.hub_run FILE

The file holds ``{name: [argument, ...]}`` in JSON, and at the end ``{name: exit status}``. Each command runs in a folder of its
name beside the file, and writes to ``log`` there.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from lightning.pytorch import Callback


class Texts(Callback):
    """Appends a JSON line for each row of each batch to ``texts.jsonl``.

    ``stage`` is ``train`` or ``validation``; ``text`` is the whole row and ``trained`` the part with a loss, both without
    special tokens. Of a labelled row, ``trained`` is its label's name.
    """

    def on_train_batch_start(self, trainer, module, batch, *_):
        self._write("train", module, batch)

    def on_validation_batch_start(self, trainer, module, batch, *_):
        self._write("validation", module, batch)

    def _write(self, stage, module, batch):
        def decoded(ids):
            return module.tokenizer.decode(ids, skip_special_tokens=True)

        with open("texts.jsonl", "a") as file:
            for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                trained = decoded(labels[labels != -100]) if labels.dim() else module.label_names[labels]
                file.write(json.dumps({"stage": stage, "text": decoded(ids[mask.bool()]), "trained": trained}) + "\n")


if __name__ == "__main__":
    from cola_lightning.cli import main

    path = Path(sys.argv[1]).absolute()
    sys.argv[1:] = []  # LightningCLI warns of arguments that are given twice
    statuses = {}
    for name, arguments in json.loads(path.read_text()).items():
        folder = path.parent / name
        folder.mkdir()
        os.chdir(folder)
        with open("log", "w") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        try:
            statuses[name] = main(arguments)
        except Exception:  # as the interpreter does
            traceback.print_exc()
            statuses[name] = 1
        sys.stdout.flush()
        sys.stderr.flush()
    path.write_text(json.dumps(statuses))
