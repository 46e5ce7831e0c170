"""What a run tells its loggers and its reader: its configuration, and its links."""

from argparse import Namespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from cola_lightning import COLACausalLM
from tests.helpers import forked, tiny
from tests.helpers.tiny import LENGTHS, Shuffled, batches_of, rows_of
from tests.helpers.toy import trainer

OPTIONS = {
    "model/rank": 4,
    "chain/every_n_train_steps": 2,
    "optimizer/class_path": "torch.optim.adamw.AdamW",
}


class Secretive(COLACausalLM):
    """With an argument that no file may hold, and one that JSON has no type for."""

    def __init__(self, model_name, hub_token=None, sizes=None, **others):
        super().__init__(model_name, **others)


def test_loggers_get_the_configuration_of_a_fit_without_secrets(tmp_path):
    given = {"hub_token": "hf_secret", "sizes": Namespace(hidden=[8])}
    module = Secretive(tiny.folder(tmp_path / "model"), rank=4, seed=0, **given)
    data = Shuffled(batches_of(rows_of(LENGTHS[:4]), 1))
    options = {"max_epochs": 1, "limit_val_batches": 0, "chain": {"every_n_train_steps": 2}}
    trainer(tmp_path, logger=CSVLogger(tmp_path, name="run"), **options).fit(module, data)
    text = (tmp_path / "run" / "version_0" / "hparams.yaml").read_text()
    assert "secret" not in text
    messages = yaml.safe_load(text)
    assert {name: messages[name.split("/")[0]][name.split("/")[1]] for name in OPTIONS} == OPTIONS
    assert messages["optimizer"]["lr"] == 1e-3


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
