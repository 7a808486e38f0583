"""How much there is to read, and how wide it is."""

import subprocess

from conftest import ROOT

PATH = "coloring vit mvg objectives data train infer eval"  # what a student reads, in order


def python_files():
    """The tracked .py files that are there; all of them where there is no git."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / line for line in said.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        paths = []
    paths = paths or [p for p in ROOT.rglob("*.py")
                      if not {"runs", ".venv", "store"} & set(p.relative_to(ROOT).parts)]
    return sorted(path for path in paths if path.is_file())


def lines(path):
    return path.read_text().splitlines()


def test_the_students_path_has_at_most_2000_lines():
    count = {name: len(lines(ROOT / f"{name}.py")) for name in PATH.split()}
    assert sum(count.values()) <= 2000, count


def test_no_line_is_wider_than_100_columns():
    files = python_files()
    assert len(files) > 20
    wide = [f"{path.relative_to(ROOT)}:{number} has {len(line)} columns" for path in files
            for number, line in enumerate(lines(path), 1) if len(line) > 100]
    assert wide == []
