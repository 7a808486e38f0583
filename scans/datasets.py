"""The datasets of the paper (Table 1): what there is, how it is read, how its cases are split.

A dataset is one block in this file: its row of the table, `@dataset(...)`, above its reader.

A reader is given a folder. It returns the folder's cases, or None where the folder is not its
dataset. It knows the dataset by marks of its own, whatever the folder is called: data are used as
they were downloaded, nothing is renamed or converted. A reader lists files. No image is read until
a case's `load()` is called. A reader that passes something over returns (cases, notes). A note is
one line that says what was passed over and how much of it.

Splits: a reader says "train" or "test" as the dataset's own folders or tables do, and "train" where
they say nothing; `settle` then cuts by the rule of the row. A case that lacks a file is for
"inference": it has no truth, so it is neither trained on nor scored.

To add a dataset, write one such block after the others. A folder in nnU-Net form, or in the form
of the Medical Segmentation Decathlon, describes itself in dataset.json and needs none.

    found = find("path/to/data")    # {name: Found}: every dataset below a folder
    pair = found["acdc"].cases[0].load()
    pair.image.array, pair.label.array    # (X, Y, Z) both, in the file's own axis order

The layouts are those of the datasets' own pages (`address` in the table).
"""

import csv
import difflib
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from scans.dicom import read_files, read_header
from scans.volumes import (
    DICOM, LPS_TO_RAS, DataError, Volume, check_values, clean, extension, folders, guarded,
    integer_labels, lay_on, natural, read_json, read_volume, shape_text, spacing_text, stem)

SYNTHETIC = "synthetic"  # the name of the procedural tasks, which no folder holds


@dataclass
class Pair:
    """An image and its label as they are stored."""
    image: Volume
    label: Volume
    valid: np.ndarray = None  # same shape: 1 where the label has a truth, 0 where it has none, 2
    #                           where it is the input's and not scored; None: 1 everywhere
    problems: list = field(default_factory=list)  # what was wrong with the files and is mended
    notes: list = field(default_factory=list)     # what else was decided
    boxes: tuple = ()  # drawn into a picture (X, Y): (first x, first y, last x, last y) of each


@dataclass
class Case:
    """One image with its label, not read yet."""
    name: str      # unique in its dataset
    patient: str   # cases of a patient are all training or all test, and never prompt each other
    split: str     # train | test | inference (a file is missing: neither trained on nor scored)
    files: tuple   # what `load` reads, to notice when it changes
    load: Callable[[], Pair] = field(repr=False)  # raises DataError
    kind: str = ""         # which of several tasks ("t1c->t2w"); prompts are of the same kind
    height: float = None   # of a single slice in the body, 0..1; prompts are of the nearest heights


@dataclass(frozen=True)
class Dataset:
    """A row of the table."""
    name: str
    title: str
    region: str
    modality: str        # ct | mri | xray | ultrasound
    task: str            # segmentation | synthesis | inpainting | denoising | detection
    labels: tuple = ()   # names of the classes 1, 2, ... for segmentation
    split: str = ""      # the rule in words; "official ...": `cut` where no test case has a label
    paper: tuple = ()    # the paper's (training, test) counts
    licence: str = ""
    address: str = ""
    reader: Callable = field(default=None, compare=False)
    cut: tuple = (4, 1)   # training : test without official split; the last sorted cases are test
    series: bool = False  # each series of ids (the letters before the number) is cut on its own

    @property
    def colored(self) -> bool:
        """Are the labels masks of classes, to be colored? Otherwise they are images."""
        return self.task == "segmentation"


@dataclass
class Found:
    """A dataset of which a folder holds something."""
    dataset: Dataset
    root: Path
    cases: list
    notes: list = field(default_factory=list)     # a line for everything passed over or decided
    problems: list = field(default_factory=list)  # a line for every case that lacks a file


DATASETS = {}  # name: Dataset, in the order of this file, on which the pre-defined colors depend


def dataset(name: str = "", **row) -> Callable:
    """Decorator of a reader: adds its row to `DATASETS`, by default under the reader's name."""
    def add(reader):
        key = name or reader.__name__
        DATASETS[key] = Dataset(name=key, reader=reader, **row)
        return reader
    return add


def table() -> str:
    """The datasets as a Markdown table, for docs/datasets.md."""
    columns = ("name", "dataset", "region", "modality", "task", "classes", "training / test split",
               "paper", "licence", "from")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for d in DATASETS.values():
        counts = " / ".join(str(n) for n in d.paper)
        cells = (f"`{d.name}`", d.title, d.region, d.modality, d.task, str(len(d.labels) or ""),
                 d.split, counts, d.licence, d.address)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# What readers share

def make_case(name: str, patient: str, split: str, files, load: Callable | None = None,
              **more) -> Case:
    """A case that is read by load(*files), by default `load_pair`.

    The case is for inference if a file is missing. more: `kind` or `height` of the `Case`.
    """
    complete = all(f.is_file() for f in files)
    load = partial(load or load_pair, *files)
    return Case(name, patient, split if complete else "inference", tuple(files), load, **more)


def load_pair(image: Path, label: Path, task: str = "segmentation", positive: bool = False,
              spacing: tuple | None = None, channel: int | None = None) -> Pair:
    """Read an image and its label from two paths.

    task: labels are classes (uint8) for "segmentation", otherwise images. positive: every value
    above 0 is class 1. spacing: replaces an unreliable header's voxel size, three numbers in mm.
    channel: which volume of a 4-D image. The image's geometry is used for both; a header that says
    nothing of its place is a problem.
    Raises DataError for a file that cannot be read, a label of another shape or place, and classes
    that are no integers from 0 to 255.
    """
    segmentation = task == "segmentation"
    image = read_volume(image, channel)
    label = read_volume(label, mask=segmentation)
    pair = Pair(image, label, notes=[v.note for v in (image, label) if v.note],
                problems=[text for text in (lay_on(label, image),) if text])
    label.affine = image.affine
    if segmentation:
        label.array = class_numbers(label, positive)
    if spacing is not None:
        correct_spacing(pair, spacing)
    return pair


def class_numbers(label, positive):
    """The classes of a label volume as uint8. Raises DataError for classes above 255."""
    if positive:
        return (label.array > 0).astype(np.uint8)
    if label.colors:
        raise DataError(f"{label.path} is a mask in color: save its classes as grays 1, 2, 3, ...")
    numbers = integer_labels(label.array, label.path)
    if numbers.max() > 255:
        raise DataError(f"{label.path} holds the label {numbers.max()}: classes above 255 are not "
                        "supported, renumber them")
    return numbers


def correct_spacing(pair, spacing):
    """Give both volumes of a pair this voxel size in mm. A header that is far off is a problem."""
    scale = np.array(spacing) / np.linalg.norm(pair.image.affine[:3, :3], axis=0)
    if np.abs(np.log(scale)).max() > 0.1:
        true = " x ".join(f"{v:g}" for v in spacing)
        pair.problems.append(f"its header says voxels of {spacing_text(pair.image)}, "
                             f"they are {true}")
    pair.image.affine = pair.label.affine = pair.image.affine @ np.diag([*scale, 1.0])


def counted(*counts):
    """Notes: (how often, what) -> "3 lesions ...", without what never happened."""
    return [f"{count} {text}" for count, text in counts if count]


def cases_of_same_names(folder, start, test):
    """Cases of imagesTr (train) and images<test> whose labels have the same names in labels*."""
    cases = []
    for part, split in (("Tr", "train"), (test, "test")):
        for image in clean((folder / f"images{part}").glob(f"{start}_*.nii*")):
            if re.fullmatch(start + r"_\d+", stem(image)):
                label = folder / f"labels{part}" / image.name
                cases.append(make_case(stem(image), stem(image), split, (image, label)))
    return cases


# ------------------------------------------------------------------------------------------------
# Abdomen

AMOS_LABELS = (
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
    "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum",
    "bladder", "prostate/uterus")


@dataset(title="AMOS22 CT", region="abdomen", modality="ct", task="segmentation",
         labels=AMOS_LABELS, paper=(240, 120), split="official: imagesTr / imagesVa, ids to 500",
         licence="see address", address="zenodo.org/records/7262581")
def amos_ct(folder):
    """The CT scans of AMOS22."""
    return amos(folder, mri=False)


@dataset(title="AMOS22 MRI", region="abdomen", modality="mri", task="segmentation",
         labels=AMOS_LABELS, paper=(60, 50), split="official: imagesTr / imagesVa, ids above 500",
         licence="see address", address="zenodo.org/records/7262581")
def amos_mri(folder):
    """The MRI scans of AMOS22."""
    return amos(folder, mri=True)


def amos(folder, mri):
    """imagesTr|imagesVa/amos_0001.nii.gz, and the label of the same name in labelsTr|labelsVa.

    CT and MRI lie in one folder: ids up to 500 are CT, later ones MRI. The labels of imagesTs are
    not public.
    """
    cases = cases_of_same_names(folder, "amos", "Va")
    return [c for c in cases if (int(re.search(r"\d+", c.name)[0]) > 500) == mri]


@dataset(title="WORD", region="abdomen", modality="ct", task="segmentation",
         labels=("liver", "spleen", "left kidney", "right kidney", "stomach", "gallbladder",
                 "esophagus", "pancreas", "duodenum", "colon", "intestine", "adrenal", "rectum",
                 "bladder", "left femur head", "right femur head"),
         paper=(100, 20), split="official: imagesTr / imagesVal",
         licence="see address", address="github.com/HiLab-git/WORD")
def word(folder):
    """imagesTr|imagesVal/word_0002.nii.gz, and the label of the same name in labelsTr|labelsVal.

    Test is imagesVal, as in the paper, not the 30 cases of imagesTs.
    """
    return cases_of_same_names(folder, "word", "Val")


@dataset(title="BTCV", region="abdomen", modality="ct", task="segmentation",
         labels=("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver",
                 "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
                 "right adrenal gland", "left adrenal gland"),
         paper=(21, 9), split="last 9 of 30 of the sorted cases", cut=(21, 9),
         licence="see address", address="synapse.org (syn3193805)")
def btcv(folder):
    """RawData/Training/img/img0001.nii.gz + label/label0001.nii.gz.

    No list of the paper's 21 / 9 cases is public.
    """
    cases = []
    for image in clean((folder / "Training/img").glob("img*.nii*")):
        label = image.parents[1] / "label" / image.name.replace("img", "label", 1)
        cases.append(make_case(stem(image), stem(image), "train", (image, label)))
    return cases


# ------------------------------------------------------------------------------------------------
# Pelvis

@dataset(title="MicroSegNet", region="pelvis", modality="ultrasound", task="segmentation",
         labels=("prostate",), paper=(55, 20), split="official: train / test folder",
         licence="see address", address="zenodo.org/records/10475293")
def microsegnet(folder):
    """train|test/micro_ultrasound_scans/microUS_train_01.nii.gz + expert_annotations/...

    The annotation is called expert_annotation_train_01.nii.gz. Annotations of students and
    clinicians are left alone.
    """
    cases = []
    for part in ("train", "test"):
        for image in clean((folder / part / "micro_ultrasound_scans").glob("microUS_*.nii*")):
            name = image.name.replace("microUS", "expert_annotation", 1)
            label = folder / part / "expert_annotations" / name
            cases.append(make_case(stem(image), stem(image), part, (image, label), load_frames))
    return cases


def load_frames(image, label):
    """An ultrasound sweep: its slices are its frames, along the third stored axis.

    The header's geometry is a placeholder. 0.033586 mm a pixel is what every public reader writes;
    1 mm between frames is ours (the probe turns, so that frames are not parallel).
    """
    pair = load_pair(image, label, positive=True)
    pair.notes.append(f"its header's voxels of {spacing_text(pair.image)} are a placeholder")
    affine = LPS_TO_RAS @ np.diag([0.033586, 0.033586, 1.0, 1.0])
    pair.image.affine = pair.label.affine = affine
    return pair


@dataset(title="PROMISE12", region="pelvis", modality="mri", task="segmentation",
         labels=("prostate",), paper=(50, 30), split="official: training_data / test_data folder",
         licence="see address", address="zenodo.org/records/8026660")
def promise12(folder):
    """training_data|test_data/Case00.mhd + Case00_segmentation.mhd.

    Numbers start anew in test_data, so the folder is a part of the patient's name. Some downloads
    lack the test masks.
    """
    name = folder.name.lower()
    if "live" in name:
        part, split = "livechallenge", "test"
    elif "test" in name:
        part, split = "test", "test"
    else:
        part, split = "training", "train"
    cases = []
    for image in clean(folder.glob("Case[0-9][0-9].mhd")):
        case = f"{part}_{stem(image)}"
        label = image.with_name(stem(image) + "_segmentation.mhd")
        cases.append(make_case(case, case, split, (image, label)))
    return cases


# ------------------------------------------------------------------------------------------------
# Brain

BRATS_PAIRS = ("t1c:t2w", "t2w:t1c")  # authors' code
BRATS_TERMS = "BraTS terms, research only"


def check_brats_pairs(pairs):
    """Texts such as "t1c:t2w" -> [("t1c", "t2w")]. Raises DataError for any other text."""
    known = {"t1n", "t1c", "t2w", "t2f"}
    for text in pairs:
        if len(set(text.split(":")) & known) != 2 or text.count(":") != 1:
            raise DataError(f"brats_pairs {text}: write from:to, two of t1n t1c t2w t2f, "
                            "for example t1c:t2w")
    return [tuple(text.split(":")) for text in dict.fromkeys(pairs)]


def brats_folders(folder):
    """The case folders BraTS-GLI-00001-000; the last three digits are a patient's time point."""
    name = re.compile(r"BraTS-GLI-\d{5}-\d{3}")
    return [f for f in folders(folder.glob("BraTS-GLI-*")) if name.fullmatch(f.name)]


def brats_file(case, part):
    """The file that ends in exactly this part: "t1n" is not "t1n-voided"."""
    path = case / f"{case.name}-{part}.nii"
    return path if path.is_file() else case / f"{case.name}-{part}.nii.gz"


@dataset(title="BraTS-GLI 2023", region="brain", modality="mri", task="synthesis",
         paper=(1251, 219), split="official: TrainingData / ValidationData folder",
         cut=(1251, 219), licence=BRATS_TERMS, address="synapse.org (BraTS 2023)")
def brats_gli(folder, pairs=BRATS_PAIRS):
    """BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1c.nii.gz and -t2w: one modality to another.

    pairs: what is translated, from:to; each pair of a scan is a case. The folder's name says the
    split: ...ValidationData is test.
    """
    scans = brats_folders(folder)
    marks = (brats_file(scan, part) for scan in scans for part in ("t1c", "t2w", "t2f"))
    if not any(mark.is_file() for mark in marks):  # BraTS Local Synthesis has t1n only
        return None
    split = "test" if "validation" in folder.name.lower() else "train"
    load = partial(load_pair, task="synthesis")
    cases = []
    for scan in scans:
        for source, target in check_brats_pairs(pairs):
            name, patient = f"{scan.name}-{source}-{target}", scan.name[:-4]
            files = (brats_file(scan, source), brats_file(scan, target))
            kind = f"{source}->{target}"
            cases.append(make_case(name, patient, split, files, load, kind=kind))
    return cases


@dataset(title="BraTS 2023 Local Synthesis", region="brain", modality="mri", task="inpainting",
         paper=(1000, 251), split="last 251 of 1251 of the sorted cases, by patient",
         cut=(1000, 251), licence=BRATS_TERMS, address="synapse.org (BraTS 2023)")
def brats_local(folder):
    """...-t1n-voided.nii.gz + ...-t1n + ...-mask-healthy: fill a hole in healthy brain.

    The validation cases have no t1n, so the training cases are cut as in the paper. Without
    mask-healthy nothing is known to be healthy: such a case is for inference.
    """
    cases = []
    for scan in brats_folders(folder):
        files = [brats_file(scan, part) for part in ("t1n-voided", "t1n", "mask-healthy")]
        if files[0].is_file():
            cases.append(make_case(scan.name, scan.name[:-4], "train", files, load_inpainting))
    return cases


def load_inpainting(voided, whole, healthy):
    """The label is the whole image: every hole of the input is filled in a prompt.

    Scored are healthy voxels (1 of `valid`). Outside of the holes the truth is the input, which
    training teaches to keep (2). Over the tumour no healthy truth is known: no loss there (0).
    """
    pair = load_pair(voided, whole, task="inpainting")
    mask = read_volume(healthy)
    lay_on(mask, pair.image)
    kept = pair.label.array == pair.image.array
    pair.valid = np.where(mask.array > 0.5, 1, np.where(kept, 2, 0)).astype(np.uint8)
    return pair


# ------------------------------------------------------------------------------------------------
# Chest

@dataset(title="LDCT and Projection Data", region="chest", modality="ct", task="denoising",
         paper=(200, 59), split="last 59 of 259 of the sorted patients of each of C, L and N",
         cut=(200, 59), series=True, licence="sources disagree, see address",
         address="cancerimagingarchive.net (LDCT-and-Projection-data)")
def ldct(folder):
    """L004/<study>/<series>/1-001.dcm: quarter or tenth dose CT to full dose.

    Series numbers, dates and file names do not tell the dose (see `dose`). The GE half of the
    patients has no low dose images. Also read: AAPM Mayo 2016, L067/full_1mm|quarter_1mm/*.IMA.
    """
    cases, lone, several = [], 0, 0
    for subject in folders(folder.glob("[CLN][0-9][0-9][0-9]")):
        low, full = series_by_dose(subject)
        if low and full:
            load = partial(load_series, low[0], full[0])
            files = (*low[0], *full[0])
            cases.append(Case(subject.name, subject.name, "train", files, load))
        elif low or full:
            lone += 1
        if len(low) > 1 or len(full) > 1:
            several += 1
    notes = counted(
        (lone, "patients have one dose only (GE scanners have no low dose images) "
               "and are left out"),
        (several, "patients have several series of a dose, the first is used"))
    return (cases, notes) if cases or lone else None


def series_by_dose(subject):
    """The series of low and of full dose of a patient: two lists of lists of files."""
    series = {"low": [], "full": []}
    for place in folders([*subject.glob("*"), *subject.glob("*/*")]):
        files = [f for f in clean(place.iterdir()) if f.suffix.lower() in DICOM]
        kind = dose(place, files[0]) if files else None
        if kind:
            series[kind].append(files)
    return series["low"], series["full"]


def dose(folder, file):
    """low | full | None of a DICOM series. Projections are no images: None.

    The series' description tells it, in any case; in Mayo 2016 the folder's name does.
    """
    name = folder.name.lower()
    if "projection" in name:
        return None
    if re.fullmatch(r"(full|quarter)_\dmm.*", name):
        return "full" if name.startswith("full") else "low"
    text = series_description(file)
    if text is None:
        text = name  # the folder bears the description, too
    if "projection" in text:
        return None
    if "low dose" in text:
        return "low"
    if "full dose" in text:
        return "full"
    return None


def series_description(file):
    """The series description of a DICOM file in lower case; None where it has none."""
    text = guarded(read_header, file, False).get("SeriesDescription")
    return None if text is None else str(text).lower()


def load_series(low, full):
    """Low and full dose of one patient from two lists of DICOM files, in HU.

    Raises DataError where the slices of the two series lie at different heights.
    """
    image, low_heights = read_files(low, low[0].parent, even=False)
    label, full_heights = read_files(full, full[0].parent, even=False)
    same_shape = image.array.shape == label.array.shape
    if not same_shape or not np.allclose(low_heights, full_heights, atol=0.01):
        raise DataError(f"{image.path} is {shape_text(image.array.shape)} but its full dose is "
                        f"{shape_text(label.array.shape)}, or their slices lie at other heights: "
                        "fetch both series again")
    return Pair(image, label)


@dataset(title="Chest X-ray lungs", region="chest", modality="xray", task="segmentation",
         labels=("lung",), paper=(15, 6), cut=(15, 6), series=True,
         split="last 6 of 21 of the sorted images of each of MCUCXR and CHNCXR",
         licence="see address", address="Montgomery and Shenzhen sets, Kaggle nikhilpandey360")
def chest_xray(folder):
    """CXR_png/<name>.png, with the lungs in one of three places:

    ManualMask/leftMask + rightMask (Montgomery), masks/<name>_mask.png (Shenzhen), or
    masks/<name>.png (Montgomery in the Kaggle union "Lung Segmentation").
    """
    sides = [folder / "ManualMask" / side for side in ("leftMask", "rightMask")]
    places = [p for p in (folder / "masks", folder / "mask/mask", folder / "mask") if p.is_dir()]
    if not places and not sides[0].is_dir():
        return None
    cases = []
    for image in clean((folder / "CXR_png").glob("*.png")):
        name = stem(image)
        if sides[0].is_dir():
            masks = [side / image.name for side in sides]
        else:
            masks = [places[0] / f"{name}_mask.png"]
        if places and not masks[0].is_file():
            masks = [places[0] / image.name]
        cases.append(make_case(name, name, "train", (image, *masks), load_masks))
    return cases


def load_masks(image, *masks):
    """A picture and the union of its masks, in which every value above 0 counts.

    A mask of another size takes on the picture's, by nearest neighbor, and is a problem.
    """
    image = read_volume(image)
    union = np.zeros(image.array.shape, np.uint8)  # (X, Y, 1)
    pair = Pair(image, Volume(union, image.affine, masks[0], "picture"))
    for path in masks:
        mask = read_volume(path).array > 0
        if mask.shape != union.shape:
            pair.problems.append(f"{path.name} is {shape_text(mask.shape[:2])}, its picture "
                                 f"{shape_text(union.shape[:2])}: the mask is resized")
        x, y = (nearest_pixels(n, m) for n, m in zip(union.shape[:2], mask.shape))
        union |= mask[x][:, y]
    if image.note:
        pair.notes.append(image.note)
    return pair


def nearest_pixels(n, m):
    """For each of n pixels the nearest of m over the same length: (n,) integers."""
    return ((np.arange(n) + 0.5) * m / n).astype(int)


@dataset(title="ACDC", region="chest", modality="mri", task="segmentation",
         labels=("right ventricle", "myocardium", "left ventricle"),
         paper=(100, 50), split="official: training / testing folder",
         licence="CC BY-NC-SA 4.0", address="humanheart-project.creatis.insa-lyon.fr/database")
def acdc(folder):
    """training|testing/patient001/patient001_frame01.nii.gz + _gt: two frames a patient.

    Frame numbers are read from the file names: the first one is not always frame 01. The 4-D cine
    is left alone.
    """
    cases = []
    for part, split in (("training", "train"), ("testing", "test")):
        for patient in folders((folder / part).glob("patient*")):
            for image in clean(patient.glob("patient*_frame*.nii*")):
                if re.fullmatch(r"patient\d+_frame\d+", stem(image)):
                    label = image.with_name(image.name.replace(".nii", "_gt.nii", 1))
                    cases.append(make_case(stem(image), patient.name, split, (image, label)))
    return cases


@dataset(title="LA 2018", region="chest", modality="mri", task="segmentation",
         labels=("left atrium",), paper=(81, 20),
         split="official: Training Set / Testing Set folder (UA-MT: its lists)",
         licence="challenge terms, research only",
         address="cardiacatlas.org/atriaseg2018-challenge")
def la(folder):
    """"Training Set"|"Testing Set"/<id>/lgemri.nrrd + laendo.nrrd (0 and 255).

    Voxels are 0.625 mm, whatever the header says. Two ids are one scan under two names: cases whose
    masks are equal byte by byte count as one patient. Also read: the UA-MT form.
    """
    cases = []
    load = partial(load_pair, positive=True, spacing=(0.625,) * 3)
    for part, split in (("Training Set", "train"), ("Testing Set", "test")):
        for image in clean((folder / part).glob("*/lgemri.nrrd")):
            patient = name = image.parent.name
            label = image.with_name("laendo.nrrd")
            if label.is_file():
                patient = hashlib.sha1(label.read_bytes()).hexdigest()[:12]
            cases.append(make_case(name, patient, split, (image, label), load))
    return cases + la_of_uamt(folder)


def la_of_uamt(folder):
    """The UA-MT form: <id>/mri_norm2.h5, cropped around the atrium. test.list has the test ids."""
    lists = [p / "test.list" for p in (folder, folder.parent) if (p / "test.list").is_file()]
    test = set(lists[0].read_text().split()) if lists else set()
    cases = []
    for scan in clean(folder.glob("*/mri_norm2.h5")):
        name = scan.parent.name
        split = "test" if name in test else "train"
        cases.append(make_case(name, name, split, (scan,), load_h5))
    return cases


def load_h5(path):
    """UA-MT's file: image (X, Y, Z), z-scored; label 0 and 1. Raises DataError without h5py."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path} needs h5py: pip install h5py") from None
    try:
        with h5py.File(path) as scan:
            image, label = scan["image"][()], scan["label"][()]
    except (OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({str(error)[:100]}): the file is damaged, "
                        "fetch it again") from None
    affine = LPS_TO_RAS @ np.diag([0.625, 0.625, 0.625, 1.0])
    image = check_values(Volume(image.astype(np.float32), affine, path, "h5"))
    label = check_values(Volume(label, affine, path, "h5"))
    label.array = (label.array > 0).astype(np.uint8)
    lay_on(label, image)
    return Pair(image, label)


# ------------------------------------------------------------------------------------------------
# Whole body

class Lesion(NamedTuple):
    """A row of DL_info.csv."""
    file: str        # 000001_01_01_109.png: patient, study, series, slice
    part: str        # Train_Val_Test: "1" is train, "2" and "3" are test, or ""
    noisy: bool      # marked Possibly_noisy: nothing of what follows is read
    box: tuple = ()      # x1, y1, x2, y2 in pixels, 1-based
    heights: tuple = ()  # in the body, 0..1: one, or none where the table has none
    spacing: tuple = ()  # of a pixel, (x, y) in mm


@dataset(title="DeepLesion", region="whole body", modality="ct", task="detection",
         paper=(25000, 7120), split="official: 1 / 2 and 3 in DL_info.csv, by patient",
         licence="NIH terms", address="nihcc.app.box.com/v/DeepLesion")
def deeplesion(folder):
    """DL_info.csv + Images_png/000001_01_01/109.png, or Key_slices/000001_01_01_109.png.

    A row of the table is a lesion. A case is a key slice with the boxes of all of its lesions.
    Lesions marked Possibly_noisy are dropped. A patient who has rows of training and test is test.
    Of patients without a value, those whose number is a multiple of 5 are test.
    """
    table = folder / "DL_info.csv"
    if not table.is_file():
        return None
    parts, slices = {}, {}  # patient: {parts}; file name: [its lesions]
    noisy = missing = 0
    for lesion in read_lesions(table):
        parts.setdefault(lesion.file[:6], set()).update({lesion.part} - {""})
        if lesion.noisy:
            noisy += 1
        else:
            slices.setdefault(lesion.file, []).append(lesion)
    cases = []
    for name in sorted(slices):
        case = key_slice(folder, name, slices[name], parts[name[:6]])
        if case is None:
            missing += 1
        else:
            cases.append(case)
    mixed = sum("1" in p and len(p) > 1 for p in parts.values())
    return cases, counted(
        (noisy, "lesions marked Possibly_noisy are dropped"),
        (missing, "key slices have no picture here and are left out"),
        (mixed, "patients have slices of both train and test in the table and count as test"))


def read_lesions(table):
    """The rows of DL_info.csv as `Lesion`s. Raises DataError that names a line that is broken."""
    lesions = []
    with open(table, newline="", encoding="utf-8-sig") as handle:
        for line, row in enumerate(csv.DictReader(handle), start=2):
            place = f"{table} line {line}"
            try:
                lesions.append(read_lesion(row, place))
            except DataError:
                raise
            except (KeyError, AttributeError, TypeError, ValueError) as error:
                raise DataError(f"{place} cannot be read ({error}): "
                                "fetch the table again") from None
    return lesions


def read_lesion(row, place):
    """A row of the table as a `Lesion`. Raises DataError for a name that could leave the folder."""
    name, part = row["File_name"], row["Train_Val_Test"].strip()
    if not re.fullmatch(r"\d{6}_\d\d_\d\d_\d+\.png", name):
        raise DataError(f"{place} names {name!r}: names are like 000001_01_01_109.png, "
                        "correct the entry")
    if row["Possibly_noisy"].strip() == "1":
        return Lesion(name, part, noisy=True)
    box = numbers(row["Bounding_boxes"])
    heights = numbers(row["Normalized_lesion_location"])[2:]  # x, y, z
    if len(box) != 4 or part not in ("", "1", "2", "3"):
        raise ValueError(f"{len(box)} numbers for a box, part {part!r}")
    return Lesion(name, part, False, box, heights, numbers(row["Spacing_mm_px_"])[:2])


def numbers(text):
    """The numbers of a cell: "512, 512" -> (512.0, 512.0); () where it is empty or has a NaN."""
    values = tuple(float(v) for v in (text or "").split(",") if v.strip())
    return values if np.isfinite(values).all() else ()


def key_slice(folder, name, lesions, parts):
    """The case of a key slice, or None where its picture is not there. parts: of its patient."""
    picture = folder / "Images_png" / name[:12] / name[13:]
    if not picture.is_file():
        picture = folder / "Key_slices" / name
    if not picture.is_file():
        return None
    patient = name[:6]
    test = parts != {"1"} if parts else int(patient) % 5 == 0
    heights = [h for lesion in lesions for h in lesion.heights]
    load = partial(load_boxes, boxes=tuple(lesion.box for lesion in lesions),
                   spacing=lesions[0].spacing)
    return make_case(name[:-4], patient, "test" if test else "train",
                     (picture, folder / "DL_info.csv"), load,
                     height=float(np.mean(heights)) if heights else None)


def load_boxes(picture, table, boxes, spacing):
    """A key slice in HU. The label is the same picture with a box around every lesion.

    The lines of a box are 2 pixels wide and as bright as the window gets. Raises DataError for an
    8-bit picture.
    """
    image = read_volume(picture)
    if image.eight_bit:
        raise DataError(f"{picture} has 8 bits, DeepLesion has 16: fetch it again, "
                        "without converting it")
    image.array = (image.array.astype(np.int32) - 32768).astype(np.int16)
    if len(spacing) == 2:
        image.affine = image.affine @ np.diag([*spacing, 1.0, 1.0])
    label = Volume(image.array.copy(), image.affine, table, "picture")
    drawn = tuple(draw_box(label.array[:, :, 0], box) for box in boxes)
    return Pair(image, label, boxes=drawn)


def draw_box(array, box, value=200):
    """Paint the outline of a box into a picture (X, Y), where it is inside, in place.

    Of each line the two nearest pixels are painted. box: x1, y1, x2, y2, 1-based as in the table.
    value: 200 HU, the top of the CT window.
    Returns (first x, first y, last x, last y) of what is painted, 0-based.
    """
    x1, y1, x2, y2 = (int(np.floor(v - 1)) for v in box)
    across = slice(max(x1, 0), max(x2 + 2, 0))
    along = slice(max(y1, 0), max(y2 + 2, 0))
    for x in (x1, x2):
        array[max(x, 0):max(x + 2, 0), along] = value
    for y in (y1, y2):
        array[across, max(y, 0):max(y + 2, 0)] = value
    width, height = array.shape
    return max(x1, 0), max(y1, 0), min(x2 + 1, width - 1), min(y2 + 1, height - 1)


# ------------------------------------------------------------------------------------------------
# Folders that describe themselves in dataset.json. Three tasks of the Decathlon are the paper's
# out-of-distribution sets and have rows of their own.

LAST_FIFTH = "last fifth of the sorted cases"
DECATHLON = {"modality": "ct", "task": "segmentation", "split": LAST_FIFTH,
             "licence": "CC BY-SA 4.0", "address": "medicaldecathlon.com"}


# Python applies decorators from the last to the first: the liver comes first in the table.
@dataset("msd_spleen", title="MSD Task09 Spleen", region="abdomen", labels=("spleen",), **DECATHLON)
@dataset("msd_lung", title="MSD Task06 Lung", region="chest", labels=("cancer",), **DECATHLON)
@dataset("msd_liver", title="MSD Task03 Liver", region="abdomen", labels=("liver", "cancer"),
         **DECATHLON)
def decathlon(folder):
    """A task of the Medical Segmentation Decathlon: dataset.json lists `training` pairs.

    Test labels are not public. Of a 4-D image the first channel is used. nnU-Net 1 lists x.nii.gz
    where the first channel is x_0000.nii.gz.
    """
    about = folder_json(folder)
    if about is None or not isinstance(about.get("training"), list) or "modality" not in about:
        return None
    entries = about["training"]
    if not all(isinstance(entry, dict) and {"image", "label"} <= set(entry) for entry in entries):
        raise DataError(f"{folder}/dataset.json: every entry of training needs an image and a "
                        "label: correct it")
    pairs = [(inside(folder, entry["image"]), inside(folder, entry["label"])) for entry in entries]
    pairs.sort(key=lambda pair: natural(pair[0].name))
    load = partial(load_pair, channel=0)
    return [make_case(stem(image), stem(image), "train", (first_channel(image), label), load)
            for image, label in pairs]


def first_channel(image):
    """x.nii.gz, or x_0000.nii.gz where only that is there."""
    numbered = image.with_name(stem(image) + "_0000" + extension(image))
    return numbered if numbered.is_file() and not image.is_file() else image


def nnunet(folder):
    """An nnU-Net raw folder: imagesTr/x_0000.EXT + labelsTr/x.EXT, of any known extension.

    imagesTs + labelsTs are test if they are there. `"labels": "image"` in dataset.json: labels are
    images. Of several channels the first (_0000) is used. Where a label is "ignore" nothing is
    learned or scored. Every case is a patient of its own, unless `"patient"` (ours) has a regular
    expression that finds the patient, its first group, in a case's name.
    """
    about = folder_json(folder)
    if about is None or "channel_names" not in about:
        return None
    labels = about.get("labels")
    task = "synthesis" if labels == "image" else "segmentation"
    load = partial(load_pair, task=task)
    if isinstance(labels, dict) and "ignore" in labels:
        load = partial(load_annotated, ignore=labels["ignore"])
    pattern, notes, cases = about.get("patient"), [], []
    if pattern is None:
        notes.append('every case counts as a patient of its own, as dataset.json has no "patient"')
    for part, split in (("Tr", "train"), ("Ts", "test")):
        place = folder / f"labels{part}"
        files = {stem(p): p for p in clean(place.glob("*")) if extension(p)}
        if split == "test" and not files:
            continue
        for image in clean((folder / f"images{part}").glob("*_0000.*")):
            name = stem(image).removesuffix("_0000")
            label = files.get(name, place / (name + extension(image)))
            patient = find_patient(folder, pattern, name) if pattern else name
            cases.append(make_case(name, patient, split, (image, label), load))
    return cases, notes


def find_patient(folder, pattern, name):
    """The patient in a case's name. Raises DataError for a pattern that finds none."""
    try:
        match = re.search(pattern, name)
        patient = match and match[1]
    except (re.error, TypeError, IndexError):
        patient = None
    if not patient:
        raise DataError(f"{folder}/dataset.json: \"patient\" {pattern!r} finds no patient in "
                        f"{name!r}: write a regular expression with one group")
    return patient


def load_annotated(image, label, ignore):
    """A pair of which voxels with the label `ignore` have no truth."""
    try:
        ignored = class_number(ignore)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"dataset.json: the label \"ignore\" is {ignore}: give it one number") \
            from None
    pair = load_pair(image, label)
    pair.valid = pair.label.array != ignored
    pair.label.array = pair.label.array * pair.valid
    return pair


def folder_json(folder: Path) -> dict | None:
    """The dataset.json of a folder with imagesTr, or None. Raises DataError where it is no JSON."""
    path = folder / "dataset.json"
    if not path.is_file() or not (folder / "imagesTr").is_dir():
        return None
    about = read_json(path)
    return about if isinstance(about, dict) else None


def inside(folder, name):
    """The file `name` of a folder. Raises DataError where the name leads out of the folder."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{folder}/dataset.json names {name!r}, which is outside its folder: "
                        "correct the entry")
    return folder / name


def described_by_json(folder: Path, reader: Callable) -> Dataset:
    """The row of a folder that describes itself. reader: `decathlon` or `nnunet`.

    Raises DataError for labels that are no classes, and for the name of another dataset.
    """
    about = folder_json(folder)
    labels = named_classes(folder, about, reader)
    if reader is decathlon:
        title = str(about.get("name") or folder.name.split("_", 1)[-1]).lower()
        name = "msd_" + re.sub("[^a-z0-9]+", "_", title)
        if name in DATASETS:
            return DATASETS[name]
        modality, split = about.get("modality"), LAST_FIFTH
    else:
        name = folder.name
        if name in DATASETS or name == SYNTHETIC:
            raise DataError(f"{folder} has the name of another dataset: rename the folder, "
                            f"for example to Dataset001_{name}")
        modality, split = about.get("channel_names"), f"imagesTs if labelled, else the {LAST_FIFTH}"
    modality = named_modality(modality, folder / "dataset.json")
    return Dataset(name=name, title=str(about.get("name", name)), region="", modality=modality,
                   labels=labels, split=split, reader=reader,
                   task="segmentation" if labels else "synthesis",
                   licence=str(about.get("licence", about.get("license", ""))),
                   address=str(about.get("reference", "")))


def named_modality(channels, place):
    """The modality of the first channel of dataset.json, {"0": "CT"} or plain text; else mri.

    place: what messages call it. Raises DataError for another form.
    """
    if isinstance(channels, list):
        channels = dict(zip("0", channels))
    first = channels.get("0") if isinstance(channels, dict) else channels
    if not isinstance(first, str):
        raise DataError(f"{place}: the channels {channels} do not name the first one: "
                        'write {"0": "CT"} or the like')
    first = first.strip().lower()
    if first.startswith(("ct", "computed tomography")):
        return "ct"
    if "x-ray" in first or "xray" in first:
        return "xray"
    if "ultrasound" in first or first == "us":
        return "ultrasound"
    return "mri"


def class_number(value):
    """The number of a class in dataset.json, 1 or "1". Raises ValueError or TypeError."""
    number = int(value)
    if float(value) != number or not 0 <= number <= 255:
        raise ValueError(value)
    return number


def named_classes(folder, about, reader):
    """The names of classes 1, 2, ... of dataset.json; () where its labels are images."""
    labels, place = about.get("labels"), folder / "dataset.json"
    if labels == "image":
        return ()
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{place} has no labels: name the classes, or write \"labels\": \"image\"")
    try:
        if reader is decathlon:  # {"1": "spleen"}
            pairs = [(class_number(number), str(name)) for number, name in labels.items()]
        else:                    # {"spleen": 1}
            pairs = [(class_number(number), str(name)) for name, number in labels.items()
                     if name != "ignore"]
    except (TypeError, ValueError, OverflowError):
        pairs = None
    names = dict(pairs or ())
    if pairs is None or len(names) < len(pairs):
        raise DataError(f"{place}: labels {str(labels)[:200]} are no plain classes: "
                        "give every class one number, from 0 to 255")
    if max(names, default=0) < 1:
        raise DataError(f"{place} names no class above 0: name the classes, "
                        "or write \"labels\": \"image\"")
    return tuple(names.get(i, f"class {i}") for i in range(1, max(names) + 1))


# ------------------------------------------------------------------------------------------------
# Finding: which datasets are below a folder

def find(data_root: str | Path, names: list | None = None, depth: int = 5,
         brats_pairs: list | None = None, say: Callable = print) -> dict:
    """Every dataset below a folder, known by its marks at any nesting: {name: Found}.

    names: which to keep (default: all). depth: how many levels of folders are searched.
    brats_pairs: what BraTS-GLI translates, "t1c:t2w" and the like (default: the authors' two).
    say: is given a line for every folder that is left out because its table cannot be read.
    Raises DataError for a missing or empty root, and for names that are unknown or not there.
    """
    if not str(data_root).strip():
        raise DataError("the name of the data root is empty: is a variable not set?")
    root, pairs = Path(data_root).resolve(), brats_pairs or BRATS_PAIRS
    check_brats_pairs(pairs)
    if not root.is_dir():
        raise DataError(f"{data_root}: no such folder: pass the folder that holds the datasets")
    found, errors = search(root, depth, pairs)
    if errors and (not found or set(names or ()) - set(found)):
        raise errors[0]
    for error in errors:
        say(f"left out: {error}")
    check_names(names, found, root)
    if not found:
        raise DataError(f"{root} holds no dataset that is known here: unpack one into it, "
                        "for example ACDC, or a folder in nnU-Net form")
    for hit in found.values():
        settle(hit)
    return {n: hit for n, hit in sorted(found.items()) if not names or n in names}


def search(root, depth, brats_pairs):
    """The datasets of a folder and of those below it, level by level: ({name: Found}, errors).

    A folder with a dataset is not searched any deeper. An error (a DataError, such as a broken
    table) does not keep the other folders from being used.
    """
    found, errors, level = {}, [], [root]
    for _ in range(depth):
        below = []
        for folder in level:
            try:
                hits = datasets_of_folder(folder, brats_pairs)
                inner = folders(folder.iterdir())
            except DataError as error:
                errors.append(error)
                continue
            except OSError as error:
                errors.append(DataError(f"{folder} cannot be searched ({error.strerror})"))
                continue
            for hit in hits:
                if hit.dataset.name in found:
                    join(found[hit.dataset.name], hit)
                else:
                    found[hit.dataset.name] = hit
            if not hits:
                below += inner
        level = below
    return found, errors


def datasets_of_folder(folder, brats_pairs=BRATS_PAIRS):
    """The `Found`s of a folder: datasets of the table (AMOS is two), else that of dataset.json."""
    options = {"brats_gli": {"pairs": brats_pairs}}
    hits = []
    for row in DATASETS.values():
        if row.reader is not decathlon:
            answer = row.reader(folder, **options.get(row.name, {}))
            cases, notes = answer if isinstance(answer, tuple) else (answer, [])
            if cases or notes:
                hits.append(Found(row, folder, cases, notes))
    if hits:
        return hits
    cases, notes = decathlon(folder), []
    reader = decathlon if cases else nnunet
    if not cases:
        cases, notes = nnunet(folder) or ([], [])
    if cases:
        return [Found(described_by_json(folder, reader), folder, cases, notes)]
    if (folder / "imagesTr").is_dir() and not (folder / "dataset.json").exists():
        raise DataError(f"{folder} has imagesTr but no dataset.json: write one "
                        "(docs/datasets.md, Your own data)")
    return []


def join(first: Found, more: Found) -> None:
    """Add to a `Found` what another folder holds of the same dataset.

    A case is added if its name is new, or if the case of that name lacked a file. Nothing is added
    to a user's own dataset: it is one folder.
    """
    if first.dataset.name not in DATASETS:
        first.notes += more.notes
        if more.cases:
            first.notes.append(f"{more.root} is left out, {first.root} has its name")
        return
    cases = {c.name: c for c in first.cases}
    new = [c for c in more.cases if c.name not in cases or cases[c.name].split == "inference"]
    cases.update({c.name: c for c in new})
    first.cases = list(cases.values())
    first.notes += more.notes + counted(
        (len(new), f"cases of {more.root} are added to those of {first.root}"),
        (len(more.cases) - len(new),
         f"cases of {more.root} are left out, {first.root} has cases of the same name"))


def check_names(names: list | None, there: dict, where: Path) -> None:
    """Raise DataError for dataset names that nobody knows or that are not there.

    names: as asked for, or None. there: what `where` holds, by name. The error suggests the nearest
    name.
    """
    for name in names or ():
        if name in there:
            continue
        holds = f"holds {', '.join(there) or 'none'}"
        if name in DATASETS:
            raise DataError(f"dataset {name} is not in {where}: it {holds}")
        near = difflib.get_close_matches(name, [*there, *DATASETS], 1, 0.5)
        guess = f", did you mean {near[0]}?" if near else ""
        raise DataError(f"dataset {name!r} is unknown{guess}: {where} {holds}")


# ------------------------------------------------------------------------------------------------
# Splitting: by patient, the same on every machine

def settle(found: Found) -> None:
    """Give every case of a `Found` its final split.

    Official where the download has labelled test cases, else the cut of the dataset's row. A
    dataset of one patient has no test case. Training cases of patients who are in test, too, are
    left out.
    """
    for case in found.cases:
        if case.split == "inference":
            missing = ", ".join(p.name for p in case.files if not p.is_file()) or "its label"
            found.problems.append(f"{case.name}: {missing} is missing, it is neither trained on "
                                  "nor scored")
    for name, count in Counter(c.name for c in found.cases).items():
        if count > 1:
            kept = next((c for c in found.cases if c.name == name and c.split != "inference"),
                        next(c for c in found.cases if c.name == name))
            found.problems.append(f"{name} is the name of {count} cases: {kept.files[0]} is kept; "
                                  "rename the others")
            found.cases = [c for c in found.cases if c.name != name or c is kept]
    cases = [c for c in found.cases if c.split != "inference"]
    if len({c.patient for c in cases}) == 1:
        for case in cases:
            case.split = "train"
    elif cases and all(c.split == "train" for c in cases):
        cut(cases, found)
    leave_out_mixed(cases, found)


def cut(cases, found):
    """Hold out cases of a `Found` that has no test case, by the rule of its row."""
    row = found.dataset
    series = {}
    for case in cases:
        letters = re.match(r"\D*", case.patient)[0] if row.series else ""
        series.setdefault(letters, []).append(case.patient)
    test = set()
    for patients in series.values():
        test |= held_out(patients, *row.cut)
    if not test:  # every series is a single patient
        test = held_out([c.patient for c in cases], *row.cut)
    for case in cases:
        case.split = "test" if case.patient in test else "train"
    if row.split.startswith("official"):
        found.notes.append(f"no official test case is here: held out are {len(test)} patients, "
                           f"the last {row.cut[1]} of {sum(row.cut)} of the sorted cases")


def held_out(patients: list, train: int = 4, test: int = 1) -> set:
    """The test patients where no official split exists.

    patients: that of every case. Test are the last test / (train + test) of the sorted cases, at
    least one patient of two. A patient on the border is a training patient.
    """
    patients = sorted(patients, key=natural)
    for count in range(max(1, len(patients) * test // (train + test)), len(patients)):
        chosen = set(patients[-count:]) - set(patients[:-count])
        if chosen:
            return chosen
    return set()


def leave_out_mixed(cases, found):
    """Training cases of patients who are in test, too, become cases for inference, with a note."""
    test = {c.patient for c in cases if c.split == "test"}
    mixed = [c for c in cases if c.split == "train" and c.patient in test]
    for case in mixed:
        case.split = "inference"
    if mixed:
        names = ", ".join(c.name for c in mixed[:5]) + (" ..." if len(mixed) > 5 else "")
        found.notes.append(f"{len(mixed)} training cases are of patients who are in test, too, "
                           f"and are left out: {names}")
