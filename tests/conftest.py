import atexit
import collections
import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.helpers.standin_hub import HUB

# The only hub is the tests' own, and what is cached of it, and of prepared rows, is there for as long as they run. Read by
# huggingface_hub and datasets, and by commands that tests start.
os.environ |= HUB.environment(tempfile.mkdtemp(prefix="cola_lightning_hub_"))
# Class paths of configs begin in the clone's folder. Read by commands that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
# Sums in one order, whatever the machine; and processes that tests start do not wait for each other's threads. Read by torch.
os.environ["OMP_NUM_THREADS"] = "1"
# The same on a GPU, where resumes are compared to the bit. Read by cuBLAS.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Lightning 2.6's own call of jsonargparse's add_instantiator; jsonargparse reads this when it is imported.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import pytest
from hypothesis import settings

collect_ignore = ["helpers"]  # no examples in docstrings; one of them is not to be imported here
settings.register_profile("same", derandomize=True, deadline=None, database=None)  # the same inputs on each machine
settings.load_profile("same")
gc.disable()  # until all is imported
sys.argv[:] = ["cola"]  # LightningCLI warns of arguments that are given twice
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Their tests are few and long: begun first, for at the end a worker would wait for them alone.
LONG = ["kills", "stages_command", "given_stages", "notebooks", "cli_language", "distributed", "compare", "cli", "speed"]
LONG += ["scale", "layering", "running", "wheel"]


def pytest_collection_modifyitems(items):
    """Puts files in the order in which xdist hands them out: the long ones, then those of many tests."""
    n_tests = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path.stem.removeprefix("test_") not in LONG, -n_tests[item.path]))


def pytest_collection_finish():
    import lightning.pytorch  # noqa: F401  # its log handler keeps the stderr of its first import: not that of a test
    from lightning.fabric.utilities import registry

    registry.entry_points = functools.cache(registry.entry_points)  # else each Trainer reads the metadata of all packages
    gc.freeze()  # what is imported stays: the collector goes through a million objects less each time
    gc.enable()
    if forked := sys.modules.get("tests.helpers.forked"):  # a test needs it
        forked.start_server()


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test runs: on the CPU, and on a GPU by ``pytest -m gpu``."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return request.param


@pytest.fixture(autouse=True)
def _no_seed_from_elsewhere(monkeypatch):
    """seed_everything leaves its seed in the environment, where the next test's module would find it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
