import os

# Lightning 2.6's own call of jsonargparse's add_instantiator; jsonargparse reads this when it is imported.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

import lightning.pytorch  # noqa: F401  # its log handler keeps the stderr of its first import: not that of a test
import pytest
import torch

torch.set_num_threads(1)  # sums in one order, whatever the machine


@pytest.fixture(autouse=True)
def _no_seed_from_elsewhere(monkeypatch):
    """seed_everything leaves its seed in the environment, where the next test's module would find it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
