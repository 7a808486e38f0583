import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "real"
FIVE = ["acdc", "la", "msd_hippocampus", "Dataset801_NerveUltrasound", "Dataset802_MsT1ToFlair"]
sys.path.insert(0, str(ROOT))
# Threads that wait must not keep others from working; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import mvg
from lab import phantom
from scans.datasets import DATASETS, find
from scans.store import Store, prepare


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests of all sixteen stand-ins go to one process, so that these are drawn once."""
    for item in items:
        if "sixteen" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("sixteen"))


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A data root with stand-ins of five datasets: MRI, ultrasound pictures, image-to-image."""
    root = tmp_path_factory.mktemp("stand_ins")
    phantom.write(root, 0, FIVE)
    return root


@pytest.fixture(scope="session")
def sixteen(tmp_path_factory):
    """A data root with all sixteen stand-ins, written by two processes."""
    out = tmp_path_factory.mktemp("sixteen")
    slow = ["chest_xray", "deeplesion", "brats_gli", "promise12", "btcv", "microsegnet"]
    command = [sys.executable, "-m", "lab.phantom", "--out", str(out), "--datasets"]
    runs = [subprocess.Popen([*command, *part], cwd=ROOT, stdout=subprocess.DEVNULL)
            for part in (slow, [n for n in DATASETS if n not in slow])]
    assert [run.wait() for run in runs] == [0, 0]
    return out


@pytest.fixture(scope="session")
def store(stand_ins, tmp_path_factory):
    """The prepared store of the five stand-ins."""
    root = tmp_path_factory.mktemp("store")
    prepare(find(stand_ins), root)
    return Store(root)


@pytest.fixture(scope="session")
def real():
    if not REAL.is_dir():
        pytest.skip(f"real scans are not here ({REAL})")
    return REAL


@pytest.fixture(scope="session")
def hearts(tmp_path_factory):
    """[(image, mask)] of three invented hearts, NIfTI."""
    root = tmp_path_factory.mktemp("hearts")
    phantom.write(root, 3, ["acdc"])
    masks = sorted(root.rglob("patient*_frame*_gt.nii.gz"))
    patients = {mask.parent: mask for mask in masks}
    return [(mask.with_name(mask.name.replace("_gt", "")), mask)
            for mask in list(patients.values())[:3]]


@pytest.fixture(scope="session")
def nerves(tmp_path_factory):
    """[(image, mask)] of two invented ultrasound pictures, PNG."""
    root = tmp_path_factory.mktemp("nerves")
    phantom.write(root, 3, ["Dataset801_NerveUltrasound"])
    images = sorted(root.rglob("imagesTr/*.png"))
    masks = sorted(root.rglob("labelsTr/*.png"))
    return list(zip(images, masks))[:2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of a small model with fresh weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "m.pt"
    mvg.save(path, mvg.build("demo", 32))
    return path
