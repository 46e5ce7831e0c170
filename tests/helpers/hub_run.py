"""Commands one after the other in a process of their own, and the texts of the batches that a data module makes.

    python -m tests.helpers.hub_run FILE

The file holds ``{name: [argument, ...]}`` in JSON, and at the end ``{name: exit status}``. Each command runs in a folder of its
name beside the file, and writes to ``log`` there. In the place of a command's arguments may be those of a data module, as an
object: its first batches are then read, which takes a fifth of the time of a fit.
"""

import itertools
import json
import logging
import os
import sys
import traceback
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from cola_lightning import TextDataModule, UserError
from cola_lightning.cli import main


def read(arguments):
    """Writes down the first batches that a fit on these rows would get, and what a command would say of them.

    Each row of a batch is a JSON line in ``texts.jsonl``: ``stage`` is ``train`` or ``validation``; ``text`` is the whole row
    and ``trained`` the part with a loss, both without special tokens.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = TextDataModule(**arguments)
        data.tokenizer = AutoTokenizer.from_pretrained("owner/chat")
        data.setup("fit")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def decoded(ids):
        return data.tokenizer.decode(ids, skip_special_tokens=True)

    with open("texts.jsonl", "w") as file:
        for stage, loader in (("train", data.train_dataloader()), ("validation", data.val_dataloader())):
            for batch in itertools.islice(loader, 2):
                for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                    texts = {"text": decoded(ids[mask.bool()]), "trained": decoded(labels[labels != -100])}
                    file.write(json.dumps({"stage": stage, **texts}) + "\n")
    return 0


if __name__ == "__main__":
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # after each stream it waits 5 s for Arrow's threads
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
            statuses[name] = read(arguments) if isinstance(arguments, dict) else main(arguments)
        except Exception:  # as the interpreter does
            traceback.print_exc()
            statuses[name] = 1
        sys.stdout.flush()
        sys.stderr.flush()
    path.write_text(json.dumps(statuses))
