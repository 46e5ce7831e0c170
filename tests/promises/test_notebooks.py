"""The notebooks run from a fresh kernel, in under a minute each."""

from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.docs
FOLDER = Path(__file__).parents[2] / "notebooks"
PICTURES = {"anatomy_of_a_chain": 5, "digits": 4, "pictures": 1, "research": 1, "stages": 2, "your_own_module": 3}
SLOW = ["digits", "pictures", "your_own_module"]  # test_digits.py and test_domain_shift.py train the same in small


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own packages
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PICTURES])
def test_a_notebook_runs(name, tmp_path):
    assert len(list(FOLDER.glob("*.ipynb"))) == len(PICTURES)
    (tmp_path / "data").symlink_to(FOLDER / "data")  # the stored runs
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert stored
    assert not [output for output in stored if output.get("name") == "stderr"]
    own = {"resources": {"metadata": {"path": str(tmp_path)}}, "extra_arguments": ["--matplotlib=inline"]}  # it is imported
    nbclient.NotebookClient(notebook, timeout=240, **own).execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[name]
