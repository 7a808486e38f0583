"""Put loose real scans into nnU-Net folders, for eval.py to score.

    python -m lab.loose_scans --real DIR --out loose

Pictures of several patients: chest X-rays (lungs), prostate MRI.
Single patients: organs in CT and in MR, quarter-dose to full-dose CT, T1c to T2, a T1 with a hole
to the whole T1. Every other slice of such a patient makes one volume and the rest another, and one
prompts the other. These scores speak of neighbouring slices (3 mm apart), not of other people.
"""

import argparse
import json
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from scans.datasets import ldct
from scans.volumes import DataError, command_line

ORGANS = {"spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "liver": 5,
          "stomach": 6}


# -------------------------------------------------------------------------------------------------
# A folder in nnU-Net's form

def start(out, name, channel, labels):
    """Make the folder of a dataset and say in its dataset.json what it holds."""
    root = out / name
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    about = {"name": name, "channel_names": {"0": channel}, "labels": labels, "file_ending": ""}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def put_picture(root, name, image, mask):
    """One picture (H, W) uint8 with its mask."""
    Image.fromarray(image).save(root / f"imagesTr/{name}_0000.png")
    Image.fromarray(mask.astype(np.uint8)).save(root / f"labelsTr/{name}.png")


def put_volumes(root, name, volumes, affine, step=2):
    """One patient as two cases, a and b, of alternating slices.

    volumes: image and label, (X, Y, Z) each. Of the slices along z whose label shows something
    every step-th makes case a. Those of case b lie half a step further.
    """
    image, label = volumes
    shown = np.flatnonzero((label != 0).mean((0, 1)) > 0.01)
    affine = affine @ np.diag([1, 1, step, 1])
    for case, slices in (("a", shown[::step]), ("b", shown[step // 2::step])):
        save(root / f"imagesTr/{name}_{case}_0000.nii.gz", image[:, :, slices], affine)
        save(root / f"labelsTr/{name}_{case}.nii.gz", label[:, :, slices], affine)


def save(path, volume, affine):
    nib.save(nib.Nifti1Image(volume, affine), path)


def array(path):
    return np.asarray(nib.load(path).dataobj)


def find(folder, pattern):
    """The path of that pattern below the folder. Raises DataError where there is none."""
    for path in folder.glob(pattern):
        return path
    raise DataError(f"{folder} has no {pattern}: pass the folder with the scans as --real")


# -------------------------------------------------------------------------------------------------
# The scans

def pictures(folder, out, name, channel, label):
    """Pictures with a <name>_label.png beside each."""
    root = start(out, name, channel, {"background": 0, label: 1})
    for mask in sorted(folder.glob("*_label.png")):
        case = mask.stem[:-len("_label")]
        image = find(folder, f"{case}.*")
        put_picture(root, case, np.array(Image.open(image).convert("L")),
                    np.array(Image.open(mask)) > 127)


def organs(folder, out, name, kind):
    """Six abdominal organs of one patient in CT or MR."""
    root = start(out, name, kind.upper(), {"background": 0, **ORGANS})
    image, label = folder / f"{kind}.nii.gz", array(folder / f"{kind}_label.nii.gz")
    label = np.where(label <= 6, label, 0).astype(np.uint8)
    put_volumes(root, kind, (array(image), label), nib.load(image).affine)


def doses(folder, out, name):
    """Quarter-dose CT to full-dose CT."""
    root = start(out, name, "CT", "image")
    found = ldct(folder)
    if not found:
        raise DataError(f"{folder} holds no patient: pass the folder with the scans as --real")
    for case in found[0]:
        pair = case.load()
        put_volumes(root, "dose", (pair.image.array, pair.label.array), pair.image.affine)


def brains(image, label, out, name, holes=False):
    """One brain to another; with `holes` only the slices in which the image has a hole."""
    root = start(out, name, "MRI", "image")
    x, y = array(image), array(label)
    if holes:
        shown = ((x == 0) & (y > 0)).mean((0, 1)) > 0.003
        x, y = x[:, :, shown], y[:, :, shown]
    put_volumes(root, "brain", (x, y), nib.load(image).affine, step=6)


def write(real: Path, out: Path) -> None:
    """All seven datasets. Raises DataError or OSError where a scan is not there."""
    loose = real / "prompting"
    pictures(loose / "chest_xray", out, "Dataset901_ChestXray", "X-ray", "lung")
    pictures(loose / "prostate_t2", out, "Dataset902_ProstateMr", "MRI", "prostate")
    organs(loose / "ct_3mm", out, "Dataset903_CtOrgans", "ct")
    organs(loose / "mr_3mm", out, "Dataset904_MrOrgans", "mr")
    doses(real / "LDCT-and-Projection-data", out, "Dataset905_LowDoseCt")
    brain = "BraTS-GLI-00001-000"
    synthesis = find(real, f"ASNR*GLI-Challenge*/{brain}") / brain
    brains(f"{synthesis}-t1c.nii.gz", f"{synthesis}-t2w.nii.gz", out, "Dataset906_T1cToT2")
    inpainting = find(real, f"ASNR*Local-Synthesis*/{brain}") / brain
    brains(f"{inpainting}-t1n-voided.nii.gz", f"{inpainting}-t1n.nii.gz", out,
           "Dataset907_Inpainting", holes=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--real", required=True, type=Path, help="folder with the scans, see above")
    p.add_argument("--out", required=True, type=Path, help="folder to write the datasets to")
    args = p.parse_args(argv)
    write(args.real, args.out)


if __name__ == "__main__":
    command_line(main)
