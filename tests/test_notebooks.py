"""The notebooks run from top to bottom, quickly, and are stored without output."""

import time
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def test_the_readme_lists_all_notebooks():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == "quickstart" else pytest.mark.slow, id=path.stem)
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = read(path)
    started = time.monotonic()
    client = nbclient.NotebookClient(
        notebook, timeout=90, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert time.monotonic() - started < 90
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not any("Warning" in output.get("text", "") for output in outputs)
    if path.stem == "adapting_a_training_loop":
        printed = "".join(output.get("text", "") for output in outputs)
        assert "bit-identical: True" in printed and "does not control the step size" in printed
        assert "float32[10] saved, float32[50] expected" in printed
    else:
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == (1 if path.stem == "training_on_every_chip" else 2)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_output(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None
