"""What a run tells its loggers: its configuration, and for each logged step its rate, gradient norm, speed and link."""

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from transformers import Adafactor

from cola_lightning import COLACausalLM
from tests.helpers import forked, tiny
from tests.helpers.tiny import LENGTHS, Shuffled, batches_of, rows_of
from tests.helpers.toy import batches, read_csv, toy, trainer

OPTIONS = {
    "model/rank": 4,
    "data/batch_size": 1,
    "chain/every_n_train_steps": 2,
    "optimizer/class_path": "torch.optim.adamw.AdamW",
}


class Norms(Callback):
    """Notes the norm of all gradients at each step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.found.append(float(torch.cat(gradients).norm()))


class Secretive(COLACausalLM):
    """With an argument that no file may hold, and two that JSON has no type for."""

    def __init__(self, model_name, hub_token=None, sizes=None, kind=None, **others):
        super().__init__(model_name, **others)


def rows_of_csv(folder):
    rows = read_csv(Path(folder, "metrics.csv"))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_a_step_is_logged_with_its_rate_norm_and_speed_and_links_do_not_store_them(tmp_path):
    """Four steps with a knot and clipping, of which every second is logged."""
    given = {"hub_token": "hf_secret", "sizes": Namespace(hidden=[8]), "kind": torch.half}
    module, norms = Secretive(tiny.folder(tmp_path / "model"), rank=4, seed=0, **given), Norms()
    data = Shuffled(batches_of(rows_of(LENGTHS[:4]), 1))
    options = {"max_epochs": 1, "log_every_n_steps": 2, "gradient_clip_val": 1e-3, "limit_val_batches": 0}
    run = trainer(tmp_path, norms, logger=CSVLogger(tmp_path, name="run"), chain={"every_n_train_steps": 2}, **options)
    start = time.perf_counter()
    run.fit(module, data)
    seconds = time.perf_counter() - start
    folder = tmp_path / "run" / "version_0"
    logged = {row["step"]: row for row in rows_of_csv(folder) if "grad_norm" in row}
    assert logged.keys() == {1, 3}
    assert [row["grad_norm"] for row in logged.values()] == pytest.approx(norms.found[1::2], rel=1e-4)  # not clipped
    assert [row["link"] for row in logged.values()] == [0, 1]
    assert [row["lr"] for row in logged.values()] == pytest.approx([5e-4, 5e-4])  # linear, over two steps
    assert all(row["tokens_per_second"] > sum(LENGTHS[2:4]) / seconds for row in logged.values())
    assert not {"lr", "grad_norm", "tokens_per_second", "link"} & module.chain[0].metrics.keys()
    text = (folder / "hparams.yaml").read_text()
    assert "secret" not in text
    messages = yaml.safe_load(text)
    assert {name: messages[name.split("/")[0]][name.split("/")[1]] for name in OPTIONS} == OPTIONS
    assert messages["optimizer"]["lr"] == 1e-3
    assert (messages["model"]["sizes"], messages["model"]["kind"]) == ({"hidden": [8]}, "torch.float16")


def test_a_module_of_ones_own_is_logged_without_tokens_and_an_optimizer_without_a_rate_without_one(tmp_path):
    for version, (module, rate) in enumerate([(toy(), ["lr"]), (toy(optimizer=Adafactor, lr_schedule="constant"), [])]):
        logger = CSVLogger(tmp_path, name="run", version=version)
        trainer(tmp_path, logger=logger, max_steps=3, log_every_n_steps=2).fit(module, batches())
        (logged,) = [row for row in rows_of_csv(logger.log_dir) if "link" in row]
        assert sorted(logged) == sorted(["grad_norm", "link", *rate, "step"])


PROGRAM = """
import logging

from tests.helpers.toy import batches, toy, trainer

trainer(".", chain={"every_n_epochs": 1}, max_epochs=2).fit(toy(), batches())
logging.getLogger("cola_lightning").info("after the fit")
"""


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_fit_in_a_plain_script_shows_its_links_where_nobody_has_configured_logging(tmp_path, is_configured):
    program = PROGRAM.replace("import logging\n", "import logging\nlogging.basicConfig()\n") if is_configured else PROGRAM
    done = forked.run("-c", program, cwd=tmp_path, check=True)
    lines = [line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("link ") or "after" in line]
    assert lines == ([] if is_configured else ["link 0 finished", "link 1 live at the end"])
    assert "link 0 finished" not in done.stderr
