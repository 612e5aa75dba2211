"""The notebooks run from top to bottom, install the library if need be, and are stored without output."""

import json
import shutil
import subprocess
import sysconfig
import time
import venv
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def test_the_readme_lists_all_notebooks():
    readme = (ROOT / "README.md").read_text()
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in readme


@pytest.mark.parametrize(
    "path",
    # The documentation executes all notebooks, too.
    [pytest.param(path, marks=pytest.mark.slow, id=path.stem) for path in NOTEBOOKS],
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


def test_all_notebooks_have_the_same_install_cell():
    cells = {read(path).cells[1].source for path in NOTEBOOKS}
    assert len(cells) == 1 and "greedylr_jax" in cells.pop()


def environment_without_the_library(folder):
    """A virtual environment that sees the packages of this one, but not the library; returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    # .pth files in a folder that a .pth file names are not read, so an editable install is not seen.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.mark.slow
def test_notebook_installs_the_library_from_the_checkout_it_is_in(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = environment_without_the_library(tmp_path / "environment")
    install = read(NOTEBOOKS[0]).cells[1].source

    empty = tmp_path / "empty" / "a" / "b"
    empty.mkdir(parents=True)
    command = [python, "-c", install]
    failed = subprocess.run(command, check=False, cwd=empty, text=True, capture_output=True)
    assert failed.returncode and "pip found no greedylr-jax at SOURCE='..'. Set SOURCE" in failed.stderr

    checkout = tmp_path / "checkout"  # a copy, since pip writes files of the build into it
    for folder in ("greedylr_jax", "notebooks"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    kernel = tmp_path / "jupyter" / "kernels" / "bare"
    kernel.mkdir(parents=True)
    arguments = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": arguments, "display_name": "bare", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = read(checkout / "notebooks" / "quickstart.ipynb")
    where = "import greedylr_jax; print(greedylr_jax.__file__)"
    notebook.cells.append(nbformat.v4.new_code_cell(where))
    resources = {"metadata": {"path": str(checkout / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="bare", resources=resources).execute()
    assert str(tmp_path / "environment") in notebook.cells[-1].outputs[0]["text"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_output(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert cells
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None
