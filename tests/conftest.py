import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "real"
FIVE = ["acdc", "la", "msd_hippocampus", "Dataset801_NerveUltrasound", "Dataset802_MsT1ToFlair"]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not keep others from working; before torch

import torch

import data
import mvg
import phantom


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A data root with stand-ins of five datasets: three kinds of MRI, ultrasound pictures, image-to-image."""
    root = tmp_path_factory.mktemp("stand_ins")
    phantom.write(root, 0, FIVE)
    return root


@pytest.fixture(scope="session")
def sixteen(tmp_path_factory):
    """A data root with all sixteen stand-ins, written by two processes."""
    out = tmp_path_factory.mktemp("sixteen")
    slow = ["chest_xray", "deeplesion", "brats_gli", "promise12", "btcv", "microsegnet"]
    parts = [slow, [n for n in data.DATASETS if n not in slow]]
    runs = [subprocess.Popen([sys.executable, "phantom.py", "--out", str(out), "--datasets", *part], cwd=ROOT, stdout=subprocess.DEVNULL) for part in parts]
    assert [run.wait() for run in runs] == [0, 0]
    return out


@pytest.fixture(scope="session")
def store(stand_ins, tmp_path_factory):
    """The prepared store of those stand-ins."""
    root = tmp_path_factory.mktemp("store")
    data.prepare(data.find(stand_ins), root)
    return data.Store(root)


@pytest.fixture(scope="session")
def real():
    if not REAL.is_dir():
        pytest.skip(f"real scans are not here ({REAL})")
    return REAL


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small model with fresh weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "m.pt"
    mvg.save(path, mvg.build("demo", 32))
    return path
