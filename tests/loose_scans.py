"""Put the loose real scans of ../shared/data/real into nnU-Net folders, so that eval.py can score a checkpoint on them.

    python tests/loose_scans.py --real ../shared/data/real --out loose

Pictures of several patients: chest X-ray (lungs), prostate MRI. Single patients: organs in CT and in MR, quarter-dose to
full-dose CT, T1c to T2, a voided T1 to the whole one. Of these every other slice makes one volume and the rest another, and
one prompts the other: such scores speak of neighbouring slices (3 mm apart), not of other people.
"""

import argparse
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import readers

ORGANS = {"spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "liver": 5, "stomach": 6}


def start(out, name, channel, labels):
    root = out / name
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({"name": name, "channel_names": {"0": channel}, "labels": labels, "file_ending": ""}))
    return root


def put_picture(root, name, image, mask):
    Image.fromarray(image).save(root / f"imagesTr/{name}_0000.png")
    Image.fromarray(mask.astype(np.uint8)).save(root / f"labelsTr/{name}.png")


def put_volumes(root, name, image, label, affine, step=2):
    """(X, Y, Z) arrays as two volumes, a and b, of every step-th slice along z with something to show, half a step apart."""
    shown = np.flatnonzero((label != 0).mean((0, 1)) > 0.01)
    for case, slices in (("a", shown[::step]), ("b", shown[step // 2::step])):
        for part, volume in ((f"imagesTr/{name}_{case}_0000", image), (f"labelsTr/{name}_{case}", label)):
            nib.save(nib.Nifti1Image(volume[:, :, slices], affine @ np.diag([1, 1, step, 1])), root / f"{part}.nii.gz")


def array(path):
    return np.asarray(nib.load(path).dataobj)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--real", default=Path(__file__).parents[2] / "shared/data/real", type=Path)
    p.add_argument("--out", required=True, type=Path)
    args = p.parse_args()
    loose = args.real / "prompting"
    for folder, name, channel, label in (("chest_xray", "Dataset901_ChestXray", "X-ray", "lung"), ("prostate_t2", "Dataset902_ProstateMr", "MRI", "prostate")):
        root = start(args.out, name, channel, {"background": 0, label: 1})
        for mask in sorted((loose / folder).glob("*_label.png")):
            case = mask.stem[:-len("_label")]
            image = next(f for f in (loose / folder).glob(f"{case}.*"))
            put_picture(root, case, np.array(Image.open(image).convert("L")), np.array(Image.open(mask)) > 127)
    for kind, name in (("ct", "Dataset903_CtOrgans"), ("mr", "Dataset904_MrOrgans")):
        root, image = start(args.out, name, kind.upper(), {"background": 0, **ORGANS}), loose / f"{kind}_3mm/{kind}.nii.gz"
        label = array(loose / f"{kind}_3mm/{kind}_label.nii.gz")
        put_volumes(root, kind, array(image), np.where(label <= 6, label, 0).astype(np.uint8), nib.load(image).affine)
    root = start(args.out, "Dataset905_LowDoseCt", "CT", "image")
    found = readers.ldct(args.real / "LDCT-and-Projection-data")
    for case in found[0] if isinstance(found, tuple) else found:
        pair = case.load()
        put_volumes(root, "dose", pair.image.array, pair.label.array, pair.image.affine)
    gli, local = (next(args.real.glob(f"ASNR*{part}*/BraTS-GLI-00001-000")) for part in ("GLI-Challenge", "Local-Synthesis"))
    brain = lambda folder, kind: folder / f"BraTS-GLI-00001-000-{kind}.nii.gz"
    for name, image, label in (("Dataset906_T1cToT2", brain(gli, "t1c"), brain(gli, "t2w")), ("Dataset907_Inpainting", brain(local, "t1n-voided"), brain(local, "t1n"))):
        root, x, y, affine = start(args.out, name, "MRI", "image"), array(image), array(label), nib.load(image).affine
        if "Inpainting" in name:  # the slices with a hole
            holed = ((x == 0) & (y > 0)).mean((0, 1)) > 0.003
            x, y = x[:, :, holed], y[:, :, holed]
        put_volumes(root, "brain", x, y, affine, 6)


if __name__ == "__main__":
    main()
