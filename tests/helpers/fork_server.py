"""What the process that forks the commands of ``forked.py`` imports and learns; afterwards it still has one thread."""

import gc
import sys

import coverage  # noqa: F401
import datasets  # noqa: F401  # most commands import it, which takes them a second
import omegaconf  # noqa: F401

import cola_lightning.cli.training  # noqa: F401
import tests.helpers.distributed_run  # and with it transformers
import tests.helpers.forked  # noqa: F401
from cola_lightning.cli.made_run import resolve
from examples.digits import COLADigits

PATH = list(sys.path)  # of a new process; the first is its script's folder

COLADigits(seed=0).configure_model()  # whose base is trained, and then known
resolve(["--model.model_name=x", "--data.source=x"])  # jsonargparse keeps what it reads of each class
gc.freeze()  # else each process would go through all of that: for a second
