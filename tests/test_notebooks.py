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


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def clean(notebook):
    """No traceback, no warning, nothing on the error stream."""
    for o in outputs(notebook):
        text = o.get("text", "")
        assert o.output_type != "error" and o.get("name") != "stderr" and "Traceback" not in text and "Warning" not in text, text or o


def test_six_of_them():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed(path):
    assert path.stat().st_size < 1e6
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # in order, none left out
    clean(notebook)
    for cell in cells:
        shows = re.search(r"^(plt\.)?show\(", cell.source, re.M)
        assert not shows or any("image/png" in o.get("data", {}) for o in cell.outputs), f"no picture came of\n{cell.source}"
    pictures = [Image.open(io.BytesIO(base64.b64decode(o.data["image/png"]))) for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert pictures and all(p.width <= 900 for p in pictures)  # GitHub shows no more
    assert str(ROOT.parent) not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    import nbclient
    for source in ROOT.iterdir():
        if source.suffix == ".py" or source.name == "README.md":
            shutil.copy(source, tmp_path)
    for folder in ("checkpoints", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    notebook = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    clean(notebook)
    assert sum("image/png" in o.get("data", {}) for o in outputs(notebook)) == sum("image/png" in o.get("data", {}) for o in outputs(nbformat.read(path, 4)))
