"""The notebooks run from top to bottom, and what is committed of them is what such a run shows."""

import base64
import io
import re
import shutil

import nbformat
import pytest
from PIL import Image

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDERS = ("checkpoints", "docs", "lab", "notebooks", "running", "scans")  # what they need


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [o for cell in code_cells(notebook) for o in cell.outputs]


def pictures(notebook):
    return [o.data["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]


def clean(notebook):
    """No traceback, no warning, nothing on the error stream; every command says something."""
    for o in outputs(notebook):
        text = o.get("text", "")
        assert o.output_type != "error" and o.get("name") != "stderr", o
        assert "Traceback" not in text and "Warning" not in text, text
        assert not re.search(r"^(error|usage): ", text, re.M), text  # of a command
    for cell in code_cells(notebook):
        commands = re.findall(r"^ *!python ", cell.source, re.M)
        printed = "".join(o.get("text", "") for o in cell.outputs)
        assert len(printed.splitlines()) >= len(commands), f"a command is silent\n{cell.source}"


def test_six_of_them():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    assert path.stat().st_size < 1e6
    notebook = nbformat.read(path, 4)
    cells = code_cells(notebook)
    in_order = list(range(1, len(cells) + 1))  # none is left out
    assert [cell.execution_count for cell in cells] == in_order
    clean(notebook)
    for cell in cells:
        if re.search(r"^(plt\.)?show\(", cell.source, re.M):
            shown = any("image/png" in o.get("data", {}) for o in cell.outputs)
            assert shown, f"no picture came of\n{cell.source}"
    images = [Image.open(io.BytesIO(base64.b64decode(p))) for p in pictures(notebook)]
    assert images and all(image.width <= 900 for image in images)  # GitHub shows no more
    assert str(ROOT.parent) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    import nbclient
    for source in ROOT.glob("*.py"):
        shutil.copy(source, tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    notebook = nbformat.read(path, 4)
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    clean(notebook)
    assert len(pictures(notebook)) == len(pictures(nbformat.read(path, 4)))
