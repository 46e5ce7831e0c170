"""The notebooks run from a fresh kernel, in under a minute each."""

import time
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PICTURES = {"anatomy_of_a_chain.ipynb": 5, "quickstart.ipynb": 4, "your_own_module.ipynb": 3}


def test_all_notebooks_are_here():
    assert [path.name for path in NOTEBOOKS] == list(PICTURES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jupyter's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path):
    (tmp_path / "data").symlink_to(path.parent / "data")  # the stored runs
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.perf_counter() - start < 1.25 * 60
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == PICTURES[path.name]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_stored_outputs_show_no_paths_and_no_warnings(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [output for output in outputs if "/site-packages/" in output.get("text", "")]
