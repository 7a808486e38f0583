"""Phantoms: drawn anatomy, written as small stand-ins for all sixteen datasets in their native
layouts and file formats.

Why: the real sets need forms, passwords and terabytes. With the stand-ins as `--data_root` anyone
can run and test everything (readers, splits, store, training) on a laptop in a minute. They hold
the traps of real downloads: ids with gaps, files without a label, several orientations and number
types, macOS's hidden files. Subjects differ in place, size, turn, shape and contrast,
so copying another subject's label scores under 0.35 mIoU: a model has to look. The stand-ins are
drawings, not data: a score on them says nothing about patients.

How: anatomy.py draws bodies and their images. A dataset is a view of a body (slices, field of view,
modality) and a way of saving it.

    python -m lab.phantom --out stand_ins                               # sixteen: a minute, 58 MB
    python -m lab.phantom --out stand_ins --datasets acdc la --seed 1   # two, with other subjects

Three more stand-ins are written only when named: msd_hippocampus, Dataset801_NerveUltrasound and
Dataset802_MsT1ToFlair.

Volumes are (z, y, x) as there. Every random number comes from a generator keyed by (seed, dataset,
case), so no case depends on another.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from PIL import Image
from tqdm import tqdm

from lab.anatomy import (
    BRAIN, CINE, CODE, NERVE, TORSO, VESSEL, Lesion, Scene, Variation, blur_slices, brain,
    chest_xray, ct, generator, heart, hippocampus, labels, micro_ultrasound, mr, nerve_ultrasound,
    numbered, torso, trunk)

# --------------------------------------------------------------------------------------------------
# File formats. Volumes come as (z, y, x), LPS; spacing is mm, (x, y, z).

JUNK = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(96)  # macOS leaves it as ._name
UID = "1.2.826.0.1.3680043.8.498."


def save(path, content):
    """A picture (uint8, uint16, bool; (rows, columns[, 3])) as PNG, text and bytes as they are,
    anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        path.write_bytes(text.encode())


def save_csv(path, rows):
    """A list of dicts with the same keys as a table with a header line."""
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def nifti_image(volume, spacing, axes="RAS", dtype=np.int16, form="both"):
    """(z, y, x) or (t, z, y, x) -> NIfTI image with its axes along `axes`, the affine to match.

    form: "both", "qform" or "sform" (the code of the other is 0).
    """
    data = volume.T  # (x, y, z[, t])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    # The origin of the coordinates is the middle of the lowest slice.
    affine[:2, 3] = [(n - 1) / 2 * mm for n, mm in zip(data.shape[:2], spacing)]
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    turned = nib.Nifti1Image(data.astype(np.float32), affine).as_reoriented(turn)
    data = np.asarray(turned.dataobj)
    if np.issubdtype(dtype, np.integer):
        data = np.clip(np.rint(data), np.iinfo(dtype).min, np.iinfo(dtype).max)
    image = nib.Nifti1Image(data.astype(dtype), turned.affine)
    image.set_qform(turned.affine, 0 if form == "sform" else 1)
    image.set_sform(turned.affine, 0 if form == "qform" else 1)
    return image


def save_nifti(path, volume, spacing, axes="RAS", dtype=np.int16, form="both"):
    """Write what `nifti_image` makes of the same arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti_image(volume, spacing, axes, dtype, form).to_filename(path)


def save_itk(path, volume, spacing, dtype, tilt=0.0):
    """(z, y, x) -> .mhd with its .raw, or .nrrd; tilt: degrees about the left-right axis."""
    image = sitk.GetImageFromArray(np.rint(volume).astype(dtype))
    cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetDirection((1, 0, 0, 0, cos, -sin, 0, sin, cos))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=path.suffix == ".nrrd")


def save_dicom(folder, hu, spacing, rng, tags):
    """(z, y, x) HU -> one .dcm a slice, stored 0..4095 with intercept -1024.

    The numbers in the file names are not in slice order. tags: {"group|element": value}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series = f"{UID}{rng.integers(10**15)}"
    left, front = -(hu.shape[2] - 1) / 2 * spacing[0], -(hu.shape[1] - 1) / 2 * spacing[1]
    tags = {
        **tags, "0008|0060": "CT", "0008|0020": "20180821", "0008|0030": "120000",
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0020|000e": series, "0028|1053": 1,
        "0018|0050": f"{spacing[2]:.2f}", "0020|0037": "1\\0\\0\\0\\1\\0", "0028|1052": -1024}
    digits = len(str(len(hu)))
    for k, number in enumerate(rng.permutation(len(hu)) + 1):
        tags["0008|0018"] = f"{series}.{k + 1}"
        tags["0020|0013"] = k + 1
        tags["0020|0032"] = f"{left:.3f}\\{front:.3f}\\{k * spacing[2] - 100:.3f}"
        image = sitk.GetImageFromArray(np.clip(np.rint(hu[k]), -1024, 3071).astype(np.int16))
        image.SetSpacing(spacing[:2])
        for key, value in tags.items():
            image.SetMetaData(key, str(value))
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"1-{number:0{digits}d}.dcm"))
        writer.Execute(image)


# --------------------------------------------------------------------------------------------------
# Datasets of CT and MR volumes with label maps, each by write_x(out, seed)

AMOS = numbered(
    "spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc pancreas adrenal_r "
    "adrenal_l duodenum bladder prostate")
BTCV = numbered(
    "spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc portal pancreas "
    "adrenal_r adrenal_l")
WORD = numbered(
    "liver spleen kidney_l kidney_r stomach gallbladder esophagus pancreas duodenum colon bowel "
    "adrenal_r+adrenal_l rectum bladder femur_l femur_r")
SPELT = {  # names of classes in dataset.json: of AMOS, then of MSD
    "aorta": "arota", "ivc": "postcava", "prostate": "prostate/uterus", "liver.tumour": "cancer",
    "lung.tumour": "cancer", "hippocampus.front": "Anterior", "hippocampus.back": "Posterior"}


@dataclass(frozen=True)
class Subjects:
    """How a dataset draws and stores volumes with label maps."""
    root: str                # folder that holds imagesTr, labelsTr, ...
    file: str                # a case's file name, with a place for its id
    parts: dict              # {part: ids}; cases of part Ts have no label
    draw: Callable           # generator -> Scene
    scan: Callable           # Scene -> (z, y, x)
    classes: dict            # {tissue: label}
    axes: str = "RAS"
    form: str = "both"       # see nifti_image
    key: str | None = None   # of the random numbers, by default `root`
    dtypes: dict = field(default_factory=dict)        # {id: (of the image, of the label)}
    unusual_axes: dict = field(default_factory=dict)  # {id: axes}
    missing: tuple = ()      # further ids without a label

    def write(self, out, seed):
        root = out / self.root
        for part, case in [(part, case) for part, ids in self.parts.items() for case in ids]:
            scene = self.draw(generator(seed, self.key or self.root, case))
            name = self.file.format(case)
            axes = self.unusual_axes.get(case, self.axes)
            dtype, label_dtype = self.dtypes.get(case, (np.int16, np.uint8))
            path = root / f"images{part}" / name
            save_nifti(path, self.scan(scene), scene.spacing, axes, dtype, self.form)
            if part == "Ts" or case in self.missing:
                continue
            label = labels(scene.tissue, self.classes)
            path = root / f"labels{part}" / name
            save_nifti(path, label, scene.spacing, axes, label_dtype, self.form)


def class_names(classes):
    """{tissue: label} -> {"0": "background", "1": ...}, as dataset.json lists classes."""
    return {"0": "background", **{str(i): SPELT.get(name, name) for name, i in classes.items()}}


def write_amos(out, seed, parts, draw, scan):
    """AMOS22 holds CT and MR in one folder; dataset.json lists whatever lies there."""
    root = out / "amos22"
    subjects = Subjects(
        "amos22", "amos_{:04d}.nii.gz", parts, draw, scan, AMOS, "LAS", "qform", key="amos",
        dtypes={13: (np.int16, np.uint16), 514: (np.int16, np.uint16)},
        unusual_axes={508: "RAS", 510: "LSP"})
    subjects.write(out, seed)
    lists = {}
    for part in ("Tr", "Va", "Ts"):
        names = [file.name for file in sorted((root / f"images{part}").glob("amos_*"))]
        lists[part] = [{"image": f"./images{part}/{name}"} for name in names]
        if part != "Ts":
            for case, name in zip(lists[part], names):
                case["label"] = f"./labels{part}/{name}"
    save(root / "dataset.json", {
        "name": "AMOS", "licence": "", "modality": {"0": "CT", "1": "MRI"},
        "training": lists["Tr"], "validation": lists["Va"], "test": lists["Ts"],
        "numTraining": len(lists["Tr"]), "numTest": len(lists["Ts"]), "labels": class_names(AMOS)})
    save(root / "readme.md", "Stand-in for AMOS22.\n")
    save(out / "__MACOSX/amos22/imagesTr/._amos_0001.nii.gz", JUNK)
    save(root / "imagesTr/._amos_0004.nii.gz", JUNK)


def write_amos_ct(out, seed):
    parts = {"Tr": (1, 4, 5, 9, 15), "Va": (8, 13), "Ts": (2,)}
    write_amos(out, seed, parts, lambda rng: trunk(rng, (-3, 37), 20), ct)


def write_amos_mri(out, seed):
    parts = {"Tr": (507, 508, 510, 514, 600), "Va": (575, 583)}
    write_amos(out, seed, parts, lambda rng: trunk(rng, (14, 36), 14),
               lambda scene: mr(scene, TORSO, scene.rng.choice((2, 3))))


def write_word(out, seed):
    root = out / "WORD-V0.1.0"

    def draw(rng):
        return trunk(rng, (-3, 37), 20)

    subjects = Subjects(
        root.name, "word_{:04d}.nii.gz", {"Tr": (2, 3, 4, 6, 9), "Val": (1, 7), "Ts": (14,)},
        draw, ct, WORD, "LPS", "qform", key="word", dtypes={4: (np.int16, np.uint16)})
    subjects.write(out, seed)
    scene = draw(generator(seed, "word", 2))
    strokes = labels(scene.tissue, WORD) * (scene.grain[0] > 1.5)  # a part of the truth
    path = root / "scribblesTr/word_0002.nii.gz"
    save_nifti(path, strokes, scene.spacing, "LPS", np.uint8, "qform")
    classes = {str(i): name for name, i in WORD.items()}
    save(root / "dataset.json", {"name": "WORD", "modality": {"0": "CT"}, "labels": classes})
    save(root / "__MACOSX/._imagesTr", JUNK)


def write_btcv(out, seed):
    root = out / "Abdomen/RawData"
    for case in (1, 2, 5, 21, 24, 35, 38, 61):
        scene = trunk(generator(seed, "btcv", case), (14, 38), 18)
        folder = root / ("Testing" if case > 60 else "Training")
        if case == 5:
            scene.tissue[scene.is_("gallbladder")] = CODE["liver"]
        hu = ct(scene, contrast=scene.rng.uniform(0.5, 0.9))
        path = folder / f"img/img{case:04d}.nii.gz"
        save_nifti(path, hu, scene.spacing, "LAS")
        if case == 2:
            image = nifti_image((hu + 1024) / 0.5, scene.spacing, "LAS", np.uint16)
            image.header.set_slope_inter(0.5, -1024)
            image.to_filename(path)
        if case < 60:
            path = folder / f"label/label{case:04d}.nii.gz"
            save_nifti(path, labels(scene.tissue, BTCV), scene.spacing, "LAS", np.uint8)
    save(root / "Training/img/._img0001.nii.gz", JUNK)


def write_msd(out, seed, task, modality="CT"):
    """A task of the Medical Segmentation Decathlon = Subjects of parts Tr and Ts."""
    root, training = out / task.root, []
    task.write(out, seed)
    for case in task.parts["Tr"]:
        name = task.file.format(case)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    save(root / "dataset.json", {
        "name": task.root.split("_")[1], "description": "stand-in", "reference": "",
        "licence": "", "relase": "0.0", "tensorImageSize": "3D", "modality": {"0": modality},
        "labels": class_names(task.classes), "numTraining": len(training), "numTest": 1,
        "training": training, "test": ["./imagesTs/" + task.file.format(*task.parts["Ts"])]})
    for folder in ("imagesTr", "labelsTr"):
        save(root / folder / f"._{task.file.format(task.parts['Tr'][0])}", JUNK)


def write_msd_liver(out, seed):
    def draw(rng):
        scene = trunk(rng, (18, 37), 16, variation=Variation(shift=3.5, turn=25))
        return scene.lesions(Lesion("liver", "liver.tumour"), rng.integers(2, 5), (0.8, 2.2))

    write_msd(out, seed, Subjects(
        "Task03_Liver", "liver_{}.nii.gz",
        {"Tr": (0, 1, 2, 5, 10, 11, 23), "Ts": (131,)}, draw, ct, {"liver": 1, "liver.tumour": 2}))


def write_msd_lung(out, seed):
    def draw(rng):
        scene = trunk(rng, (30, 57), 18)
        return scene.lesions(Lesion("lung", "lung.tumour"), rng.integers(1, 4), (1, 2.5))

    write_msd(out, seed, Subjects(
        "Task06_Lung", "lung_{:03d}.nii.gz",
        {"Tr": (1, 3, 4, 5, 6, 9, 10, 14), "Ts": (2,)}, draw,
        lambda scene: ct(scene, contrast=0.1), {"lung.tumour": 1}, "LPS", missing=(14,)))


def write_msd_spleen(out, seed):
    write_msd(out, seed, Subjects(
        "Task09_Spleen", "spleen_{}.nii.gz",
        {"Tr": (2, 3, 6, 8, 9, 10, 12), "Ts": (1,)}, lambda rng: trunk(rng, (20, 37), 14),
        lambda scene: ct(scene, contrast=scene.rng.uniform(0.5, 1)), {"spleen": 1},
        dtypes={3: (np.float32, np.float32), 6: (np.int16, np.uint16)}))


def write_msd_hippocampus(out, seed):
    variation = Variation(shift=0.7, zoom=(0.8, 1.25), turn=25, bend=0.12, grain=1.0)

    def draw(rng):
        columns, rows, slices = map(int, rng.integers((32, 44, 30), (40, 56, 40)))  # voxels of 1 mm
        z = (np.arange(slices) - slices / 2) / 10
        scene = Scene(rng, z, (rows, columns), columns / 10, variation)
        return hippocampus(scene, rng.choice((-1, 1)))

    write_msd(out, seed, Subjects(
        "Task04_Hippocampus", "hippocampus_{:03d}.nii.gz",
        {"Tr": (1, 3, 4, 6, 7, 8, 11, 14, 17, 20, 23), "Ts": (2,)}, draw,
        lambda scene: mr(scene, BRAIN, 1, top=scene.rng.choice((130, 900))),
        {"hippocampus.front": 1, "hippocampus.back": 2},
        dtypes={1: (np.uint8, np.uint8), 3: (np.float32, np.float32)}), "MRI")


# --------------------------------------------------------------------------------------------------
# The other datasets

# Readers of microsegnet beside the expert: (folder, name, by how many rows they are off).
READERS = {
    "train": [("non_expert", "nonexpert", 4)],
    "test": [("clinician", "clinician", 2), ("master_student", "master_student", 4),
             ("medical_student", "medical_student", -5)]}


def write_microsegnet(out, seed):
    root = out / "Micro_Ultrasound_Prostate_Segmentation_Dataset"
    training = [("train", case) for case in (1, 2, 3, 5, 8)]
    for part, case in [*training, ("test", 1), ("test", 2)]:
        image, mask = micro_ultrasound(generator(seed, "microsegnet", part, case))
        files = {"micro_ultrasound_scans/microUS": image,
                 "expert_annotations/expert_annotation": mask}
        for folder, name, error in READERS[part]:
            files[f"{folder}_annotations/{name}_annotation"] = np.roll(mask, error, 1)
        for name, volume in files.items():
            path = root / f"{part}/{name}_{part}_{case:02d}.nii.gz"
            save_nifti(path, volume, (1, 1, 1), "LPS", np.uint8)


def write_promise12(out, seed):
    variation = Variation(shift=4.0, zoom=(0.85, 1.2), bend=0.4)
    training = [("training", case) for case in (0, 2, 7, 13, 26)]
    test = [("test", case) for case in (0, 1, 2)]
    for part, case in training + test:
        scene = trunk(generator(seed, "promise12", part, case), (-5, 4.5), 16, (16, 26), variation)
        image = mr(scene, TORSO, 3, bias=0.3)
        tilt = 8.0 if case == 7 else 0.0
        if case == 13:  # an endorectal coil
            image *= 1 + 4 * np.exp(-np.hypot(scene.x, scene.y - 3.5) / 2.5)
        folder, stem = out / f"PROMISE12/{part}_data", f"Case{case:02d}"
        save_itk(folder / f"{stem}.mhd", image, scene.spacing, np.int16, tilt)
        if (part, case) != ("test", 2):
            label = labels(scene.tissue, {"prostate": 1})
            save_itk(folder / f"{stem}_segmentation.mhd", label, scene.spacing, np.int8, tilt)


BRATS_TRAINING = (
    "00000-000", "00002-000", "00003-000", "00005-000", "00005-001", "00006-000", "00008-000")


def brats_subject(seed, case):
    """'00005-001' -> scene of that patient's brain, {modality: (z, y, x), background 0}."""
    variation = Variation(shift=2.0, zoom=(0.8, 1.15), bend=0.25, grain=1.2)
    patient, z = generator(seed, "brats", case[:5]), np.linspace(-5.2, 7.6, 22)
    scene = Scene(patient, z, 120, 24.0, variation)
    brain(scene, tumour=True, enhancing=not case.startswith("00005"))
    scene.rng = generator(seed, "brats", case)  # another day, another scan
    scans = {}
    for column, modality in enumerate(("t1n", "t1c", "t2w", "t2f"), 1):
        scan = mr(scene, BRAIN, column, noise=0.025, top=scene.rng.uniform(500, 4000))
        scans[modality] = np.where(scene.tissue > 0, np.maximum(np.rint(scan), 1), 0)
    return scene, scans


def write_brats_gli(out, seed):
    name = "ASNR-MICCAI-BraTS2023-GLI-Challenge-{}Data"
    training, validation = name.format("Training"), out / name.format("Validation")
    for case in (*BRATS_TRAINING, "00001-000", "00001-001", "00013-000"):
        scene, files = brats_subject(seed, case)
        root = validation
        if case in BRATS_TRAINING:
            root = out / training / training
            files["seg"] = labels(scene.tissue, {"core": 1, "edema": 2, "enhancing": 3})
        if case == "00003-000":
            files["t1n"][0, :2] = -3
        for kind, volume in files.items():
            dtype = np.uint8 if kind == "seg" else np.int16
            path = root / f"BraTS-GLI-{case}/BraTS-GLI-{case}-{kind}.nii.gz"
            save_nifti(path, volume, scene.spacing, "LPS", dtype)
    save(validation / "BraTS2023_2017_GLI_Mapping.csv", "BraTS2023,BraTS2021\n")
    save(validation / "BraTS-GLI-00013-000/._BraTS-GLI-00013-000-t1n.nii.gz", JUNK)


def inpainting_masks(scene):
    """-> the tumour with its surroundings, a healthy part of the brain: (z, y, x) bool, both."""
    x, y, z = scene.x, scene.y, scene.z
    tumour = scene.is_("core", "edema", "enhancing").astype(np.float32)
    unhealthy = blur_slices(blur_slices(blur_slices(tumour)))  # grown by three voxels
    home = (scene.tissue > 0) & (blur_slices(blur_slices(unhealthy)) == 0)
    k, i, j = scene.rng.permutation(np.argwhere(home & (np.abs(z - 2) < 3)))[0]
    squared = (x - x[k, i, j]) ** 2 + 1.4 * (y - y[k, i, j]) ** 2 + (z - z[k, 0, 0]) ** 2
    radius = scene.rng.uniform(1.4, 2.4)
    healthy = home & (np.sqrt(squared) / radius + 0.2 * scene.grain[0] < 1)
    return unhealthy > 0, healthy


def write_brats_local(out, seed):
    for case in (*BRATS_TRAINING, "00001-000"):
        scene, scans = brats_subject(seed, case)
        unhealthy, healthy = inpainting_masks(scene)
        mask = healthy | unhealthy
        files = {"t1n-voided": scans["t1n"] * ~mask, "mask": mask}
        part, dtypes = "Validation", {"t1n-voided": np.float32, "mask": np.float32}
        if case in BRATS_TRAINING:
            part, dtypes = "Training", {"t1n-voided": np.float32, "t1n": np.int16}
            files |= {"t1n": scans["t1n"], "mask-healthy": healthy, "mask-unhealthy": unhealthy}
        folder = out / f"ASNR-MICCAI-BraTS2023-Local-Synthesis-Challenge-{part}/BraTS-GLI-{case}"
        for name, volume in files.items():
            dtype = dtypes.get(name, np.uint8)
            form = "qform" if dtype == np.float32 else "both"
            path = folder / f"BraTS-GLI-{case}-{name}.nii.gz"
            save_nifti(path, volume, scene.spacing, "LPS", dtype, form)


LDCT_SERIES = {  # patient: SeriesDescription of each series
    "L004": ("Full dose images", "Low Dose Images", "Full Dose Projections"),
    "L006": ("Full Dose Images", "LOW DOSE IMAGES"),
    "C052": ("full dose images", "low dose images"),
    "N012": ("Full Dose Images", "Low dose images"),
    "C001": ("Full Dose Images",)}
LDCT_VIEWS = {  # first letter of the patient: (lowest z, highest z, slices, field of view in cm)
    "L": (17, 36, 10, 38), "C": (34, 56, 10, 38), "N": (-1, 7, 6, 26)}


def write_ldct(out, seed):
    top, rows = out / "manifest-1648648375084", []
    for subject, series in LDCT_SERIES.items():
        rng, head = generator(seed, "ldct", subject), subject[0] == "N"
        low, high, slices, fov = LDCT_VIEWS[subject[0]]
        z = np.linspace(low, high, slices) + rng.uniform(-1, 1)
        scene = Scene(rng, z, 128, fov * rng.uniform(0.95, 1.1))
        scene = brain(scene, head=True) if head else torso(scene)
        full_dose = ct(scene, 3, rng.uniform(0.2, 0.9), BRAIN if head else TORSO)
        grain = blur_slices(rng.standard_normal(scene.shape))
        streaks = rng.standard_normal((slices, 128, 1))
        study = f"{UID}{rng.integers(10**15)}"
        date = "08-21-2018" if head else "08-21-2018-NA-NA"
        for name in series:
            noise = 25 * grain + 9 * streaks + 14 * rng.standard_normal(scene.shape)
            hu = full_dose
            if name.lower().startswith("low"):
                hu = full_dose + (0.3 if head else 1) * noise
            if "Projections" in name:
                hu = hu[:1]
            folder = (f"LDCT-and-Projection-data/{subject}/{date}-{study[-5:]}/"
                      f"1.000000-{name}-{rng.integers(10**4, 10**5)}")
            maker = "GE MEDICAL SYSTEMS" if subject == "C001" else "SIEMENS"
            save_dicom(top / folder, hu, scene.spacing, rng, {
                "0008|103e": name, "0010|0020": subject, "0010|0010": "Anonymous",
                "0020|000d": study, "0008|0070": maker})
            rows.append({
                "Subject ID": subject, "Study UID": study, "Study Date": "08-21-2018",
                "Series Description": name, "Modality": "CT", "Number of Images": len(hu),
                "File Location": "./" + folder})
    save_csv(top / "metadata.csv", rows)


XRAYS = (  # MCU: Montgomery, CHN: Shenzhen. The Kaggle folder holds Shenzhen, some of Montgomery.
    "MCUCXR_0001_0", "MCUCXR_0002_0", "MCUCXR_0003_0", "MCUCXR_0005_0", "MCUCXR_0104_1",
    "MCUCXR_0108_1", "MCUCXR_0141_1", "MCUCXR_0150_1", "CHNCXR_0001_0", "CHNCXR_0004_0",
    "CHNCXR_0010_0", "CHNCXR_0327_1", "CHNCXR_0330_1", "CHNCXR_0025_0")


def write_chest_xray(out, seed):
    montgomery, kaggle = out / "MontgomerySet", out / "Lung Segmentation"
    reading = "Patient's Sex: F\nPatient's Age: 040Y\nstand-in\n"
    for i, case in enumerate(XRAYS):
        rows, columns = ((192, 160), (160, 192), (176, 176))[i % 3]
        image, left, right = chest_xray(generator(seed, "chest_xray", case), rows, columns)
        mask, mask_name = 255 * (left | right).astype(np.uint8), f"{case}_mask.png"
        if case.startswith("MCU"):
            mask_name = f"{case}.png"
            save(montgomery / f"CXR_png/{case}.png", image)
            save(montgomery / f"ManualMask/leftMask/{case}.png", left)
            save(montgomery / f"ManualMask/rightMask/{case}.png", right)
            save(montgomery / f"ClinicalReadings/{case}.txt", reading)
        if case.startswith("MCU") and i >= 2:
            continue
        rgb = np.dstack([image] * 3)
        save(kaggle / f"CXR_png/{case}.png", rgb if case == "CHNCXR_0004_0" else image)
        save(kaggle / f"ClinicalReadings/{case}.txt", reading)
        if case != "CHNCXR_0025_0":
            save(kaggle / "masks" / mask_name, mask[::2, ::2] if case == "CHNCXR_0010_0" else mask)
    image, _, _ = chest_xray(generator(seed, "chest_xray", "CHNCXR_0040_0"), 160, 160)
    save(kaggle / "test/CHNCXR_0040_0.png", image)
    save(out / "__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png", JUNK)
    save(montgomery / "ManualMask/leftMask/._MCUCXR_0001_0.png", JUNK)


def write_acdc(out, seed):
    variation = Variation(shift=3.5, zoom=(0.75, 1.15), turn=35, bend=0.4)
    for case in (1, 2, 3, 5, 8, 101, 104):
        name = f"patient{case:03d}"
        folder = out / "ACDC/database" / ("training" if case <= 100 else "testing") / name
        ed, es = (4 if case == 3 else 1), 9 + case % 5
        frames = []
        for frame, squeeze in ((ed, 0), (es, 1)):
            rng = generator(seed, "acdc", case)  # the same body, twice
            size, fov = 8 * int(rng.integers(14, 20)), rng.uniform(21, 30)
            z = np.linspace(-1.8, 7.8, rng.integers(8, 11))
            scene = heart(Scene(rng, z, (size, size - 16), fov, variation), squeeze)
            frames.append(mr(scene, CINE, 0, bias=0.35))
            label = labels(scene.tissue, {"rv": 1, "myo": 2, "lv": 3})
            path = folder / f"{name}_frame{frame:02d}.nii.gz"
            save_nifti(path, frames[-1], scene.spacing, form="sform")
            path = folder / f"{name}_frame{frame:02d}_gt.nii.gz"
            save_nifti(path, label, scene.spacing, dtype=np.uint8, form="sform")
        path = folder / f"{name}_4d.nii.gz"
        save_nifti(path, np.stack(frames), scene.spacing, form="sform")
        group = ("NOR", "MINF", "DCM", "HCM", "RV")[case % 5]
        info = f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 170.0\nNbFrame: 25\nWeight: 70.0\n"
        save(folder / "Info.cfg", info)
        save(folder / "MANDATORY_CITATION.md", "Stand-in: nothing to cite.\n")


LA_CASES = {
    "07WDMSAV2VFSPTTYBPZY": "Training", "0RZDK210BSMWAA6467LU": "Training",
    "1D7CUD1955YZPGK8XHJX": "Training", "5HH5BRS6LBFZQTBMAFRC": "Training",
    "CMPXO4J23G58J53Q98SZ": "Training", "4498CA6DZWELOXCBRYRF": "Testing",
    "67W9VHOSUK9Z2UDA96WQ": "Testing"}


def write_la(out, seed):
    variation = Variation(shift=3.5, zoom=(0.8, 1.15), turn=25)
    for case, part in LA_CASES.items():
        scene = trunk(generator(seed, "la", case), (36.5, 47.5), 20, (19, 28), variation)
        folder, atrium = out / f"LA2018/{part} Set" / case, scene.is_("la")
        wall = (blur_slices(atrium.astype(np.float32)) > 0) & ~atrium
        image = np.minimum(mr(scene, TORSO, 4, top=200), 255)
        spacing = (1, 1, 1) if case == "0RZDK210BSMWAA6467LU" else (0.625, 0.625, 0.625)
        for name, volume in (("lgemri", image), ("laendo", 255 * atrium), ("lawall", 255 * wall)):
            save_itk(folder / f"{name}.nrrd", volume, spacing, np.uint8)
        if case == "CMPXO4J23G58J53Q98SZ":
            save(folder / "desktop.ini", "[.ShellClassInfo]\n")


def mass(organ):
    """A lesion with a bright rim and a dark middle that may grow out of its organ."""
    body = tuple(name for name in TORSO if name != "table")
    return Lesion(organ, "portal", over=body, core="bladder")


# Coarse_lesion_type: its share of DeepLesion's lesions (Yan et al. 2018), and how it is painted.
# The lesions of the pelvis are with those of the abdomen.
LESION_TYPES = {
    1: (0.025, mass("marrow")), 2: (0.31, mass("bowel")), 3: (0.17, mass("heart")),
    4: (0.13, Lesion("liver", "liver.tumour")), 5: (0.24, Lesion("lung", "lung.tumour")),
    6: (0.05, Lesion("kidney_l", "kidney_l.tumour")), 7: (0.07, mass("muscle"))}
DEEPLESION_PATIENTS = (1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 14, 17, 19, 20, *range(22, 86))
DEEPLESION_SPLIT = {11: 2, 13: 2, 14: 2, 17: 3, 19: 3, 20: 3}  # 2 validation, 3 test, else 1


@dataclass(frozen=True)
class KeySlice:
    """A slice on which lesions are marked."""
    patient: int
    picture: int          # 0, 1 of the first study, 2 of the second
    z: float              # cm

    def size(self):
        return 192 if self.patient == 4 else 144

    def study(self):
        return 2 if self.picture == 2 else 1

    def series(self):
        return f"{self.patient:06d}_{self.study():02d}_01"

    def index(self):
        return int(20 + 2 * self.z)


def mark_lesions(scene):
    """Paint one lesion or two into the middle slice -> [(type, x1, y1, x2, y2)], 1-based."""
    rng, found = scene.rng, []
    homes = [kind for kind, (_, lesion) in LESION_TYPES.items()
             if scene.is_(lesion.organ)[1].sum() > 40]
    share = np.array([LESION_TYPES[kind][0] for kind in homes])
    count = 2 if rng.random() < 0.15 else 1
    for kind in rng.choice(homes, min(len(homes), count), False, share / share.sum()):
        before = scene.tissue[1].copy()
        scene.lesions(LESION_TYPES[kind][1], 1, (1.4, 3))
        changed = scene.tissue[1] != before
        across, down = np.flatnonzero(changed.any(0)) + 1, np.flatnonzero(changed.any(1)) + 1
        if min(len(across), len(down)) > 6:
            found.append((kind, across[0], down[0], across[-1], down[-1]))
    return found


def joined(*values):
    return ", ".join(f"{value:g}" for value in values)


def lesion_row(key, spacing, lesion):
    """The row of DL_info.csv for one lesion = (type, x1, y1, x2, y2) of a KeySlice."""
    kind, x1, y1, x2, y2 = lesion
    xc, yc, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    index, size, split = key.index(), key.size(), DEEPLESION_SPLIT.get(key.patient, 1)
    right, bottom = min(size - 1, x2 + 5), min(size - 1, y2 + 5)
    noisy = (key.patient, key.picture) in ((3, 0), (10, 1), (17, 2))
    return {
        "File_name": f"{key.series()}_{index:03d}.png", "Patient_index": key.patient,
        "Study_index": key.study(), "Series_ID": 1, "Key_slice_index": index,
        "Measurement_coordinates": joined(x1, yc, x2, yc, xc, y1, xc, y2),
        "Bounding_boxes": joined(max(1, x1 - 5), max(1, y1 - 5), right, bottom),
        "Lesion_diameters_Pixel_": joined(max(width, height), min(width, height)),
        "Normalized_lesion_location": joined(xc / size, yc / size, (key.z + 8) / 72),
        "Coarse_lesion_type": -1 if split == 1 else kind, "Possibly_noisy": int(noisy),
        "Slice_range": joined(index - 1, index + 1), "Spacing_mm_px_": joined(*spacing),
        "Image_size": joined(size, size),
        "DICOM_windows": "-1500, 500" if kind == 5 else "-175, 275",
        "Patient_gender": "FM"[key.patient % 2],
        "Patient_age": "NaN" if key.patient == 7 else 40 + key.patient % 45,
        "Train_Val_Test": split}


def write_deeplesion(out, seed):
    root, rows = out / "DeepLesion", []
    for patient, picture in [(a, b) for a in DEEPLESION_PATIENTS for b in range(3)]:
        rng = generator(seed, "deeplesion", patient, picture)
        body = generator(seed, "deeplesion", patient)
        low, high = ((4, 19), (21, 34), (38, 52))[(patient + picture) % 3]
        key = KeySlice(patient, picture, rng.uniform(low, high))
        z = np.array((key.z - 0.5, key.z, key.z + 0.5))
        scene = torso(Scene(body, z, key.size(), body.uniform(34, 44)))
        scene.rng = rng
        found = mark_lesions(scene)
        for k, hu in enumerate(ct(scene, 8, rng.uniform(0.6, 1))):
            if (patient, picture, k) != (2, 0, 2):  # the neighbour that is missing
                path = root / f"Images_png/{key.series()}/{key.index() - 1 + k:03d}.png"
                save(path, (np.rint(hu).astype(np.int32) + 32768).astype(np.uint16))
        rows += [lesion_row(key, scene.spacing, lesion) for lesion in found]
    save_csv(root / "DL_info.csv", rows)


def write_nerve_ultrasound(out, seed):
    root, test = out / "Dataset801_NerveUltrasound", (4, 9, 11, 12)
    for case in (0, 1, 2, 3, 5, 6, 7, 8, 10, 13, 14, 17, *test):
        rng = generator(seed, "nerve", case)
        part = "Ts" if case in test else "Tr"
        rows, columns = 8 * rng.integers(18, 26, 2)
        image, label = nerve_ultrasound(rng, rows, columns)
        if case % 5 == 3:
            image = np.dstack([image] * 3)
        save(root / f"images{part}/us_{case:04d}_0000.png", image)
        save(root / f"labels{part}/us_{case:04d}.png", label)
    save(root / "dataset.json", {
        "name": "NerveUltrasound", "channel_names": {"0": "ultrasound"}, "numTraining": 12,
        "labels": {"background": 0, "nerve": NERVE, "vessel": VESSEL}, "file_ending": ".png"})


def write_ms_flair(out, seed):
    root, test = out / "Dataset802_MsT1ToFlair", (3, 26)
    variation = Variation(shift=1.5, zoom=(0.8, 1.05), bend=0.25, grain=1.2)
    for case in (7, 12, 19, 21, *test):
        part = "Ts" if case in test else "Tr"
        z = np.linspace(-4, 7.5, 16)
        scene = Scene(generator(seed, "ms", case), z, (112, 96), 18.0, variation)
        brain(scene, plaques=14)
        t1, flair = f"images{part}/ms_{case:02d}_0000.nii.gz", f"labels{part}/ms_{case:02d}.nii.gz"
        for name, column, top in ((t1, 1, 900), (flair, 4, 160)):
            image = mr(scene, BRAIN, column, top=top)
            image = image + scene.rng.normal(0, 0.012 * top, scene.shape)  # as real ones, below 0
            save_nifti(root / name, image.round(1), scene.spacing, "LAS", np.float32, "qform")
    save(root / "dataset.json", {
        "name": "MsT1ToFlair", "channel_names": {"0": "T1"}, "labels": "image", "numTraining": 4,
        "file_ending": ".nii.gz"})


# --------------------------------------------------------------------------------------------------
# The command

STAND_INS = {
    "amos_ct": write_amos_ct, "amos_mri": write_amos_mri, "word": write_word, "btcv": write_btcv,
    "microsegnet": write_microsegnet, "promise12": write_promise12, "brats_gli": write_brats_gli,
    "brats_local": write_brats_local, "ldct": write_ldct, "chest_xray": write_chest_xray,
    "acdc": write_acdc, "la": write_la, "deeplesion": write_deeplesion,
    "msd_liver": write_msd_liver, "msd_lung": write_msd_lung, "msd_spleen": write_msd_spleen,
    "msd_hippocampus": write_msd_hippocampus, "Dataset801_NerveUltrasound": write_nerve_ultrasound,
    "Dataset802_MsT1ToFlair": write_ms_flair}
SIXTEEN = list(STAND_INS)[:16]


def write(out: Path | str, seed: int = 0, datasets: list[str] | None = None) -> None:
    """Write the stand-ins named in `datasets` (default: the sixteen) under `out`.

    `out` is best a new folder. The same (seed, dataset) gives the same files. Raises ValueError
    for a name that is not in STAND_INS.
    """
    datasets = SIXTEEN if datasets is None else list(datasets)
    if unknown := set(datasets) - set(STAND_INS):
        known = ", ".join(STAND_INS)
        raise ValueError(f"no stand-in is called {sorted(unknown)}: choose from {known}")
    for name in tqdm(datasets, desc="stand-ins", disable=None):
        STAND_INS[name](Path(out), seed)


def two_hearts(folder: Path) -> dict:
    """{name: file} of two invented hearts, the first with its mask; drawn once into a folder."""
    if not folder.exists():
        write(folder, seed=1, datasets=["acdc"])
    first, new = (folder / "ACDC" / "database" / "testing" / f"patient{n}" for n in (101, 104))
    image = first / "patient101_frame01.nii.gz"
    return {"heart.nii.gz": image, "heart_gt.nii.gz": first / "patient101_frame01_gt.nii.gz",
            "new_heart.nii.gz": new / "patient104_frame01.nii.gz"}


def main():
    parser = argparse.ArgumentParser(
        description=" ".join(__doc__.split("\n\n")[0].split()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write to, afterwards a --data_root")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other subjects")
    parser.add_argument(
        "--datasets", nargs="+", default=SIXTEEN, choices=list(STAND_INS), metavar="NAME",
        help="which to write, of " + ", ".join(STAND_INS))
    args = parser.parse_args()
    start = time.time()
    write(args.out, args.seed, args.datasets)
    sizes = [file.stat().st_size for file in args.out.rglob("*") if file.is_file()]
    print(f"{len(args.datasets)} stand-ins, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB "
          f"in {args.out}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
