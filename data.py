"""Everything between the files and the model: the dataset table, preprocessing, coloring, the prepared store, sampling.

Preprocessing is one set of functions for training, inference and evaluation. Every case is read once and written to the
*prepared store* as memory-mapped slices; from then on nothing here touches a NIfTI, and training needs torch and numpy only.
What is random about a training sample (which case, crop, colors, hidden patches, drop path) comes from one generator
keyed by (seed, step, number of the sample in the global batch), so that a run can be resumed and split over any ranks.

    found = find("path/to/data")                # {name: Found}: what is there, by its own marks
    store = prepare(found, "store")             # read every case once
    episodes = Episodes(Store("store"), image_size=448, patch=16, depth=24)
    sample = episodes[step, i]
"""

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

import boxes
import readers
from readers import DataError
from synthetic import task as synthetic_task

# ---------------------------------------------------------------------------------------------------------------------
# The datasets (paper, Table 1)


@dataclass(frozen=True)
class Dataset:
    name: str
    title: str
    region: str
    modality: str      # ct | mri | xray | ultrasound
    task: str          # segmentation | synthesis | inpainting | denoising | detection
    labels: tuple = () # names of classes 1, 2, ... for segmentation
    split: str = ""    # the rule
    paper: tuple = ()  # the paper's (training, test) counts
    licence: str = ""
    address: str = ""
    reader: Callable = field(default=None, compare=False)
    cut: tuple = (4, 1)   # training : test where no official split is at hand; the test cases are the last of the sorted ones
    series: bool = False  # each series of ids (the letters before the number) is cut on its own

    @property
    def colored(self):
        """Are the labels masks of classes, to be colored? Otherwise they are images."""
        return self.task == "segmentation"


_AMOS = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "postcava", "pancreas",
         "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
_WORD = ("liver", "spleen", "left kidney", "right kidney", "stomach", "gallbladder", "esophagus", "pancreas", "duodenum", "colon",
         "intestine", "adrenal", "rectum", "bladder", "left femur head", "right femur head")
_BTCV = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta", "inferior vena cava",
         "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland")

_BRATS_TERMS, _FIFTH = "BraTS terms, research only", "last fifth of the sorted cases"

SYNTHETIC = "synthetic"  # the name of the procedural tasks (synthetic.py), which no folder holds

# A split rule that starts with "official" falls back on the cut where the download has no labelled test case.
DATASETS = {d.name: d for d in (
    Dataset("amos_ct", "AMOS22 CT", "abdomen", "ct", "segmentation", _AMOS, "official: imagesTr / imagesVa, ids to 500",
            (240, 120), "see address", "zenodo.org/records/7262581", partial(readers.amos, mri=False)),
    Dataset("amos_mri", "AMOS22 MRI", "abdomen", "mri", "segmentation", _AMOS, "official: imagesTr / imagesVa, ids above 500",
            (60, 50), "see address", "zenodo.org/records/7262581", partial(readers.amos, mri=True)),
    Dataset("word", "WORD", "abdomen", "ct", "segmentation", _WORD, "official: imagesTr / imagesVal", (100, 20), "see address",
            "github.com/HiLab-git/WORD", readers.word),
    Dataset("btcv", "BTCV", "abdomen", "ct", "segmentation", _BTCV, "last 9 of 30 of the sorted cases", (21, 9), "see address",
            "synapse.org (syn3193805)", readers.btcv, cut=(21, 9)),
    Dataset("microsegnet", "MicroSegNet", "pelvis", "ultrasound", "segmentation", ("prostate",), "official: train / test folder",
            (55, 20), "see address", "zenodo.org/records/10475293", readers.microsegnet),
    Dataset("promise12", "PROMISE12", "pelvis", "mri", "segmentation", ("prostate",), "official: training_data / test_data folder",
            (50, 30), "see address", "zenodo.org/records/8026660", readers.promise12),
    Dataset("brats_gli", "BraTS-GLI 2023", "brain", "mri", "synthesis", (), "official: TrainingData / ValidationData folder",
            (1251, 219), _BRATS_TERMS, "synapse.org (BraTS 2023)", readers.brats_gli, cut=(1251, 219)),
    Dataset("brats_local", "BraTS 2023 Local Synthesis", "brain", "mri", "inpainting", (),
            "last 251 of 1251 of the sorted cases, by patient", (1000, 251), _BRATS_TERMS, "synapse.org (BraTS 2023)",
            readers.brats_local, cut=(1000, 251)),
    Dataset("ldct", "LDCT and Projection Data", "chest", "ct", "denoising", (),
            "last 59 of 259 of the sorted patients of each of C, L and N", (200, 59), "sources disagree, see address",
            "cancerimagingarchive.net (LDCT-and-Projection-data)", readers.ldct, cut=(200, 59), series=True),
    Dataset("chest_xray", "Chest X-ray lungs", "chest", "xray", "segmentation", ("lung",),
            "last 6 of 21 of the sorted images of each of MCUCXR and CHNCXR", (15, 6), "see address",
            "Montgomery and Shenzhen sets, Kaggle nikhilpandey360", readers.chest_xray, cut=(15, 6), series=True),
    Dataset("acdc", "ACDC", "chest", "mri", "segmentation", ("right ventricle", "myocardium", "left ventricle"),
            "official: training / testing folder", (100, 50), "CC BY-NC-SA 4.0",
            "humanheart-project.creatis.insa-lyon.fr/database", readers.acdc),
    Dataset("la", "LA 2018", "chest", "mri", "segmentation", ("left atrium",),
            "official: Training Set / Testing Set folder (UA-MT: its lists)", (81, 20), "challenge terms, research only",
            "cardiacatlas.org/atriaseg2018-challenge", readers.la),
    Dataset("deeplesion", "DeepLesion", "whole body", "ct", "detection", (), "official: 1 / 2 and 3 in DL_info.csv, by patient",
            (25000, 7120), "NIH terms", "nihcc.app.box.com/v/DeepLesion", readers.deeplesion),
    # Out of distribution: Medical Segmentation Decathlon
    Dataset("msd_liver", "MSD Task03 Liver", "abdomen", "ct", "segmentation", ("liver", "cancer"), _FIFTH, (), "CC BY-SA 4.0",
            "medicaldecathlon.com", readers.decathlon),
    Dataset("msd_lung", "MSD Task06 Lung", "chest", "ct", "segmentation", ("cancer",), _FIFTH, (), "CC BY-SA 4.0",
            "medicaldecathlon.com", readers.decathlon),
    Dataset("msd_spleen", "MSD Task09 Spleen", "abdomen", "ct", "segmentation", ("spleen",), _FIFTH, (), "CC BY-SA 4.0",
            "medicaldecathlon.com", readers.decathlon),
)}


def table():
    """The datasets as a Markdown table, for the README."""
    lines = ["| name | dataset | region | modality | task | classes | training / test split | paper | licence | from |", "|" + "---|" * 10]
    for d in DATASETS.values():
        lines.append(f"| `{d.name}` | {d.title} | {d.region} | {d.modality} | {d.task} | {len(d.labels) or ''} | {d.split} | "
                     f"{' / '.join(map(str, d.paper))} | {d.licence} | {d.address} |")
    return "\n".join(lines)


@dataclass
class Found:
    dataset: Dataset
    root: Path
    cases: list
    notes: list = field(default_factory=list)  # one line for everything that was passed over or decided
    problems: list = field(default_factory=list)  # one line for every case that lacks something


def datasets_of_folder(folder, brats_pairs=readers.BRATS_PAIRS):
    """The `Found`s of a folder: datasets of the table (AMOS is two), else a Decathlon task or a folder in nnU-Net form."""
    hits = []
    for dataset in DATASETS.values():
        if dataset.reader is not readers.decathlon:
            answer = dataset.reader(folder, brats_pairs) if dataset.name == "brats_gli" else dataset.reader(folder)
            cases, notes = answer if isinstance(answer, tuple) else (answer, [])
            if cases or notes:
                hits.append(Found(dataset, folder, cases, notes))
    for reader in () if hits else (readers.decathlon, readers.nnunet):
        cases = reader(folder)
        if cases:
            return [Found(described_by_json(folder, reader), folder, cases)]
    return hits


def described_by_json(folder, reader):
    """The table row of a folder that describes itself in dataset.json."""
    about = readers.folder_json(folder)
    channels = about.get("channel_names" if reader is readers.nnunet else "modality")
    first = str(channels.get("0", "") if isinstance(channels, dict) else channels).lower()
    modality = "ct" if first.startswith("ct") else "xray" if "x-ray" in first or "xray" in first \
        else "ultrasound" if "ultrasound" in first or first == "us" else "mri"
    labels = about.get("labels")
    if labels == "image":
        names = ()
    elif isinstance(labels, dict) and labels:
        try:  # Decathlon {"1": "spleen"}, nnU-Net {"spleen": 1}
            number = {int(k): str(v) for k, v in labels.items()} if reader is readers.decathlon else \
                {int(v): str(k) for k, v in labels.items()}
        except (TypeError, ValueError):
            raise DataError(f"{folder / 'dataset.json'}: labels {labels} are no plain classes: give every class one number") from None
        names = tuple(number.get(i, f"class {i}") for i in range(1, max(number) + 1))
        if not names:
            raise DataError(f"{folder / 'dataset.json'} names no class above 0: name the classes, or write \"labels\": \"image\"")
    else:
        raise DataError(f"{folder / 'dataset.json'} has no labels: name the classes, or write \"labels\": \"image\"")
    if reader is readers.decathlon:
        name = "msd_" + re.sub("[^a-z0-9]+", "_", str(about.get("name") or folder.name.split("_", 1)[-1]).lower())
        if name in DATASETS:
            return DATASETS[name]
    else:
        name = folder.name
        if name in DATASETS or name == SYNTHETIC:
            raise DataError(f"{folder} has the name of another dataset: rename the folder, for example to Dataset001_{name}")
    split = f"imagesTs if labelled, else the {_FIFTH}" if reader is readers.nnunet else _FIFTH
    return Dataset(name, str(about.get("name", name)), "", modality, "segmentation" if names else "synthesis", names, split,
                   licence=str(about.get("licence", about.get("license", ""))), address=str(about.get("reference", "")), reader=reader)


def find(data_root, names=None, depth=5, brats_pairs=None, say=print):
    """Every dataset below a folder, known by its marks at any nesting: {name: Found}.

    names: which to keep; brats_pairs: what BraTS-GLI translates, "t1c:t2w" and the like (default: the authors', both ways).
    Raises DataError for a missing or empty root, and for names that are unknown or not there.
    """
    root, pairs, problems = Path(data_root).resolve(), brats_pairs or readers.BRATS_PAIRS, []
    readers.check_brats_pairs(pairs)
    if not root.is_dir():
        raise DataError(f"{data_root}: no such folder: pass the folder that holds the datasets")
    found, level = {}, [root]
    for _ in range(depth):
        below = []
        for folder in level:
            try:
                hits = datasets_of_folder(folder, pairs)
            except DataError as error:  # one bad table does not keep the others from being used
                problems.append(error)
                continue
            for hit in hits:
                if hit.dataset.name in found:
                    join(found[hit.dataset.name], hit)
                else:
                    found[hit.dataset.name] = hit
            if not hits:
                below += readers.folders(folder.iterdir())
        level = below
    if problems and (not found or set(names or ()) - set(found)):
        raise problems[0]
    for error in problems:
        say(f"left out: {error}")
    check_names(names, found, root)
    if not found:
        raise DataError(f"{root} holds no dataset that is known here: unpack one into it, for example ACDC, or a folder in nnU-Net form")
    for hit in found.values():
        settle(hit)
    return {n: f for n, f in sorted(found.items()) if not names or n in names}


def join(first, more):
    """Add what another folder holds of a dataset of the table: cases whose names are new, or complete now. A user's own
    dataset is one folder."""
    cases = {c.name: c for c in first.cases}
    own = first.dataset.name not in DATASETS
    new = [] if own else [c for c in more.cases if c.name not in cases or cases[c.name].split == "inference"]
    first.cases = list({**cases, **{c.name: c for c in new}}.values())
    first.notes += more.notes + [f"{len(new)} cases of {more.root} are added to those of {first.root}"] * (len(new) > 0)
    if len(new) < len(more.cases):
        first.notes.append(f"{more.root} is left out, {first.root} has its name" if own else
                           f"{len(more.cases) - len(new)} cases of {more.root} are left out, {first.root} has cases of the same name")


def settle(found):
    """Give every case its final split, by patient: official where the download has labelled test cases, else the cut of the
    dataset's row. A dataset of one patient has no test case."""
    dataset, notes = found.dataset, found.notes
    for case in found.cases:
        if case.split == "inference":
            missing = [p.name for p in case.files if not p.is_file()]
            found.problems.append(f"{case.name}: {', '.join(missing) or 'its label'} is missing, it is neither trained on nor scored")
    cases = [c for c in found.cases if c.split != "inference"]
    if len({c.patient for c in cases}) == 1:
        for case in cases:
            case.split = "train"
    elif cases and all(c.split == "train" for c in cases):
        series = {}
        for case in cases:
            series.setdefault(re.match(r"\D*", case.patient)[0] if dataset.series else "", []).append(case.patient)
        test = set().union(*(readers.held_out(patients, *dataset.cut) for patients in series.values()))
        test = test or readers.held_out([c.patient for c in cases], *dataset.cut)
        for case in cases:
            case.split = "test" if case.patient in test else "train"
        if dataset.split.startswith("official"):
            notes.append(f"no official test case is here: held out are {len(test)} patients, the last {dataset.cut[1]} of "
                         f"{sum(dataset.cut)} of the sorted cases")
    test = {c.patient for c in cases if c.split == "test"}
    clash = [c for c in cases if c.split == "train" and c.patient in test]
    for case in clash:
        case.split = "inference"
    if clash:
        notes.append(f"{len(clash)} training cases are of patients who are in test, too, and are left out: "
                     + ", ".join(c.name for c in clash[:5]) + (" ..." if len(clash) > 5 else ""))


def check_names(names, there, where):
    """Raise DataError for dataset names that nobody knows (the nearest is suggested) or that are not there."""
    for name in names or ():
        if name not in there:
            near = difflib.get_close_matches(name, [*there, *DATASETS], 1, 0.5)
            if name in DATASETS:
                raise DataError(f"dataset {name} is not in {where}: it holds {', '.join(there) or 'none'}")
            raise DataError(f"dataset {name!r} is unknown{f', did you mean {near[0]}?' if near else ''}: {where} holds {', '.join(there) or 'none'}")


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing: any file -> slices in [0, 1], always the same way up


@dataclass
class Slicing:
    """How a volume is cut: turned to LPS, then slices along `axis`, each a picture as radiologists hang it.

    Axial slices have rows anterior to posterior and columns right to left; others have rows superior to inferior.
    """
    to_lps: np.ndarray    # nibabel orientation transforms
    from_lps: np.ndarray
    axis: int             # of LPS: 0 sagittal, 1 coronal, 2 axial
    spacing: tuple        # (slice, row, column) in mm

    _ORDER = {2: (2, 1, 0), 1: (1, 2, 0), 0: (0, 2, 1)}

    def cut(self, array):
        """(X, Y, Z) as stored -> (K, H, W)"""
        from nibabel.orientations import apply_orientation
        stack = apply_orientation(array, self.to_lps).transpose(self._ORDER[self.axis])
        return stack if self.axis == 2 else stack[:, ::-1]

    def restore(self, stack):
        """(K, H, W) -> (X, Y, Z) as stored, the inverse of `cut`"""
        from nibabel.orientations import apply_orientation
        stack = stack if self.axis == 2 else stack[:, ::-1]
        return apply_orientation(stack.transpose(np.argsort(self._ORDER[self.axis])), self.from_lps)


def slicing(volume, axis=None):
    """The `Slicing` of a volume: along the coarsest axis if at least twice as coarse as the next, else axial; a single slice is
    one, whatever its spacing."""
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
    stored, lps = io_orientation(volume.affine), axcodes2ornt(("L", "P", "S"))
    to_lps = ornt_transform(stored, lps)
    mm = np.empty(3)
    mm[stored[:, 0].astype(int)] = np.linalg.norm(volume.affine[:3, :3], axis=0)
    flat = [int(stored[i, 0]) for i in range(3) if volume.array.shape[i] == 1]
    if axis is None and len(flat) == 1:
        axis = flat[0]
    if axis is None:
        order = np.argsort(mm)
        axis = int(order[2]) if volume.kind != "picture" and mm[order[2]] >= 2 * mm[order[1]] else 2
    spacing = tuple(float(mm[i]) for i in Slicing._ORDER[axis])
    return Slicing(to_lps, ornt_transform(lps, stored), axis, spacing)


def guess_modality(volume):
    """ct (Hounsfield units reach air), picture (8-bit), else mri: for files that no dataset describes."""
    if volume.kind == "picture" and volume.eight_bit:
        return "picture"
    return "ct" if volume.array.min() <= -200 else "mri"


def intensity_range(volume, modality):
    """What becomes 0 and 1: CT [-100, 200] HU (paper), 8-bit pictures their 255, else the volume's 0.5/99.5 percentiles."""
    if volume.eight_bit and (volume.kind == "picture" or modality in ("xray", "ultrasound")):
        return 0.0, 255.0
    if modality == "ct":
        return -100.0, 200.0
    low, high = (float(v) for v in np.percentile(volume.array, (0.5, 99.5)))
    if high <= low:  # nearly empty, or constant
        low, high = float(volume.array.min()), float(volume.array.max())
    return low, high if high > low else low + 1.0


def to_unit(array, low_high):
    """Clip to the range and scale to [0, 1], float32."""
    low, high = low_high
    return ((np.clip(array.astype(np.float32), low, high) - low) / (high - low)).astype(np.float32)


def resize_images(x, size):
    """(..., H, W) floats -> (..., h, w), bilinear, antialiased where it shrinks. size: (h, w)"""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    lead = x.shape[:-2]
    return F.interpolate(x.reshape(1, -1, *x.shape[-2:]), size=size, mode="bilinear", antialias=True).reshape(*lead, *size)


def resize_labels(x, size):
    """(..., H, W) classes, floats or integers -> (..., h, w), nearest"""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    lead = x.shape[:-2]
    return F.interpolate(x.reshape(1, -1, *x.shape[-2:]).float(), size=size, mode="nearest-exact").to(x.dtype).reshape(*lead, *size)


# ---------------------------------------------------------------------------------------------------------------------
# Coloring (section 3.2): the class 0 is black, every other class a gray value


def color_gap(n):
    """The least distance of n random colors from each other and from 0 (ours; the paper gives none)."""
    return min(0.2, 0.7 / max(n, 1))


def random_colors(n, rng):
    """n gray values in (0, 1], at least `color_gap(n)` apart and from 0, in random order."""
    gap = color_gap(n)
    room = np.sort(rng.random(n)) * (1 - n * gap)
    return rng.permutation(room + gap * np.arange(1, n + 1))


def spread_colors(n):
    """n gray values as far apart as can be, the surest to tell apart at inference."""
    return np.arange(1, n + 1) / max(n, 1)


def predefined_offsets(datasets):
    """Offset of every segmentation dataset, and the sum: class n of dataset k is painted (offset_k + n) / sum.

    The paper's formula read as a running sum. The table comes first, in its order, then other names in theirs.
    """
    every = [*DATASETS.values(), *sorted((d for d in datasets if d.name not in DATASETS), key=lambda d: d.name)]
    offsets, total = {}, 0
    for dataset in every:
        if dataset.colored:
            offsets[dataset.name], total = total, total + len(dataset.labels)
    return offsets, total


def make_palette(classes, coloring, rng, name=None, predefined=None):
    """The gray value of every class of a sample, a float32 table (256,): 0 for the background and for classes not listed.

    classes: those the prompt shows. coloring: random | predefined | binary (one class, drawn, against the rest).
    name, predefined: the dataset and `predefined_offsets`, for predefined colors.
    """
    palette, classes = np.zeros(256, np.float32), np.asarray(classes, int)
    if len(classes) == 0:
        return palette
    if coloring == "random":
        palette[classes] = random_colors(len(classes), rng)
    elif coloring == "predefined":
        offsets, total = predefined
        palette[classes] = (offsets[name] + classes) / total
    elif coloring == "binary":
        palette[rng.choice(classes)] = 1.0
    else:
        raise ValueError(f"coloring is {coloring!r}: choose random, predefined or binary")
    return palette


def color(labels, palette, colored):
    """Paint integer classes: labels (B, ...) floats, palette (B, 256), colored (B,) bool -> (B, ...). Images pass unchanged."""
    flat = labels.flatten(1)
    painted = palette.gather(1, flat.clamp(0, 255).long())
    return torch.where(colored[:, None], painted, flat).view_as(labels)


def decode(painted, colors):
    """How well every pixel fits the background and each color, summing to 1: (..., H, W), (C,) -> (..., C + 1, H, W).

    Nearest color wins; the fit falls off within a third of the least distance between two colors, so that fits (unlike
    grays) can be averaged over colorings and resized without an edge running through other classes' colors.
    """
    colors = torch.cat([torch.zeros(1), torch.as_tensor(np.asarray(colors), dtype=torch.float32)]).to(painted.device)
    width = (colors.sort().values.diff().min() if len(colors) > 1 else torch.ones(())).clamp(min=1e-3).to(painted.device) / 3
    distance = (painted[..., None, :, :] - colors[:, None, None]) / width
    return torch.softmax(-distance ** 2, dim=-3)


# ---------------------------------------------------------------------------------------------------------------------
# The prepared store: <store>/<dataset>/<case>/{image,label[,valid]}.npy + case.json, and <store>/<dataset>/dataset.json

STORE_VERSION = 3
MAX_SIDE = 512  # the training resolution before the crop; larger slices are reduced to it


def default_store(data_root):
    """Where the store of a data root goes when none is named: ./store/<folder name>-<hash of its path>."""
    root = Path(data_root).resolve()
    return Path("store") / f"{root.name}-{hashlib.sha1(str(root).encode()).hexdigest()[:8]}"


def prepare_case(case, dataset):
    """Read and preprocess one case: (arrays {name: (K, H, W)}, index). Images and image labels are uint16 over [0, 1]."""
    pair = case.load()
    cut = slicing(pair.image)
    scale = intensity_range(pair.image, dataset.modality)
    arrays = {"image": np.rint(to_unit(cut.cut(pair.image.array), scale) * 65535).astype(np.uint16)}
    label = cut.cut(pair.label.array)
    if dataset.colored:
        if label.max() > len(dataset.labels):
            raise DataError(f"{pair.label.path} holds the label {int(label.max())} but {dataset.name} has {len(dataset.labels)} classes: "
                            "correct the label, or name the class")
        arrays["label"] = np.ascontiguousarray(label, np.uint8)
        label_scale = None
    else:
        # A hole is filled in the scale of the picture around it; other labels have their own, and CT may become something else.
        other = dataset.task == "synthesis" and dataset.modality == "ct" and guess_modality(pair.label) != "ct"
        label_scale = scale if dataset.task == "inpainting" else intensity_range(pair.label, "mri" if other else dataset.modality)
        arrays["label"] = np.rint(to_unit(label, label_scale) * 65535).astype(np.uint16)
    if pair.valid is not None:
        arrays["valid"] = np.ascontiguousarray(cut.cut(pair.valid), np.uint8)
    K, H, W = arrays["image"].shape
    size = (min(H, MAX_SIDE), min(W, MAX_SIDE))
    if size != (H, W):
        arrays = {k: shrink(v, size, smooth=v.dtype == np.uint16) for k, v in arrays.items()}
    if dataset.colored:
        classes = [np.unique(s)[np.unique(s) > 0].tolist() for s in arrays["label"]]
        foreground = [k for k in range(K) if classes[k]]
    else:  # image labels: slices that are not empty, and have a truth
        classes = [[] for _ in range(K)]
        foreground = [k for k in range(K) if (arrays["label"][k] > 0.02 * 65535).mean() > 0.01]
        foreground = [k for k in foreground if "valid" not in arrays or arrays["valid"][k].any()]
    found = []
    for x1, y1, x2, y2 in pair.boxes:  # (top, left, bottom, right) in pixels of the stored picture, first to last
        filled = np.zeros(pair.image.array.shape, bool)
        filled[x1:x2 + 1, y1:y2 + 1] = True
        _, rows, columns = np.nonzero(cut.cut(filled))
        found.append([int(rows.min() * size[0] / H), int(columns.min() * size[1] / W), int(rows.max() * size[0] / H), int(columns.max() * size[1] / W)])
    spacing = (cut.spacing[0], cut.spacing[1] * H / size[0], cut.spacing[2] * W / size[1])
    return arrays, {**identity(case), **rules(dataset), "version": STORE_VERSION, "slices": K,
                    "size": list(size), "axis": cut.axis, "spacing": spacing, "scale": scale, "label_scale": label_scale,
                    "foreground": foreground, "classes": classes, "valid": "valid" in arrays, "boxes": found, "problems": pair.problems, "notes": pair.notes, "sources": signature(case)}


def shrink(stack, size, smooth):
    """(K, H, W) -> (K, *size), slice by slice, in the same dtype"""
    resize = resize_images if smooth else resize_labels
    return np.stack([resize(torch.from_numpy(s.astype(np.float32)), size).round().numpy().astype(stack.dtype) for s in stack])


def rules(dataset):
    """What decides how a case is prepared: another answer makes it anew."""
    return {"modality": dataset.modality, "task": dataset.task, "labels": len(dataset.labels)}


def identity(case):
    return {k: getattr(case, k) for k in ("name", "patient", "split", "kind", "height")}


def signature(case):
    """What tells that a source changed: [name, bytes, time of change] of every file."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] if p.is_file() else [p.name, -1, 0] for p in case.files]


def case_folder(root, case):
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in case.name)
    return root / (safe if safe == case.name else f"{safe}-{hashlib.sha1(case.name.encode()).hexdigest()[:6]}")


def write_case(case, dataset, folder):
    """Prepare one case into its folder, whole or not at all, also when another program does the same."""
    arrays, index = prepare_case(case, dataset)
    temporary = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        index["bytes"] = {p.name: p.stat().st_size for p in sorted(temporary.glob("*.npy"))}
        (temporary / "case.json").write_text(json.dumps(index))
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                return os.replace(temporary, folder)
            except OSError as error:  # somebody else's came between: theirs goes, or ours
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        raise OSError(f"{folder} cannot be replaced: is another program writing it over and over?")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_fresh(case, dataset, folder):
    """Does the store hold this case as it would be prepared now? Raises DataError for a newer store."""
    try:
        index = read_index(folder)
    except NewerStore:
        raise
    except DataError:
        return False
    return index.get("sources") == signature(case) and index.items() >= {**identity(case), **rules(dataset)}.items()


def in_processes(function, jobs, workers=None):
    """Yield (number, answer, error) of function(*job) for every job, as they end, from processes of their own.

    error is the DataError or OSError that a job ended with, or says that the process died (a library that crashed, or no
    memory left): then the jobs that were under way are tried again alone, and only the one that kills is given up.
    workers: as many processes as CPU cores by default; 1 works here, without processes.
    """
    workers = min(workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)), len(jobs))
    if workers <= 1:
        for number, job in enumerate(jobs):
            yield number, *attempt(function, job)
        return
    waiting, alone = list(range(len(jobs)))[::-1], []
    while waiting or alone:
        single, running = bool(alone), {}
        pool = ProcessPoolExecutor(1 if single else workers, initializer=start_worker, initargs=(os.getpid(),))
        queue = [alone.pop()] if single else waiting
        try:
            while queue or running:
                while queue and len(running) < 2 * workers:
                    number = queue.pop()
                    running[pool.submit(attempt, function, jobs[number])] = number
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running[future], *future.result()
                    del running[future]
        except BrokenProcessPool:
            if single:
                (number,) = running.values()
                yield number, None, DataError("the process that read it died: its file breaks a library, or memory ran out")
            else:
                alone += sorted(running.values(), reverse=True)
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(parent):
    """One thread a process; Ctrl-C is the parent's to answer; nobody stays when the parent is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempt(function, job):
    """(answer, None), or (None, what was wrong with the data)."""
    try:
        return function(*job), None
    except (DataError, OSError) as error:
        return None, error
    except MemoryError:
        return None, DataError("it does not fit in memory")


def plan(found, root):
    """What the store lacks: [(name, case, folder)]. Also clears away what killed programs of this machine left there."""
    jobs = []
    for name, hit in found.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*.{socket.gethostname()}.*"):
            if not alive(left.name.rsplit(".", 1)[-1]):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        for case in hit.cases:
            target = case_folder(folder, case)
            if case.split in ("train", "test") and not is_fresh(case, hit.dataset, target):
                jobs.append((name, case, target))
    return jobs


def alive(pid):
    """Does a process of this number run here?"""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def prepare(found, root, say=print, workers=None, strict=False):
    """Write every case that the store lacks or whose source changed, several at once. Cases that cannot be read are named and
    left out, those for inference are not stored; the notes of the finding are said.

    The first case of every dataset is prepared first and tells, by the size of the files, how long the rest will take and how
    much disk it will fill. A program that is killed leaves whole cases, and the next one goes on.
    Returns {dataset: [problem, ...]}. Raises DataError where the disk is too small, and with `strict` for any problem.
    """
    from tqdm import tqdm
    root, problems, bad = Path(root), {}, set()
    for name, hit in found.items():
        for line in hit.notes + hit.problems:
            say(f"{name}: {line}")
    root.mkdir(parents=True, exist_ok=True)
    jobs = plan(found, root)
    firsts = {}
    for i, (name, _, _) in enumerate(jobs):
        firsts.setdefault(name, i)
    rest = [i for i in range(len(jobs)) if i not in firsts.values()]
    with tqdm(total=len(jobs), desc="preparing", unit="case", disable=None, leave=False) as progress:
        for part in (list(firsts.values()), rest):
            chosen = [(jobs[i][1], found[jobs[i][0]].dataset, jobs[i][2]) for i in part]
            started = time.perf_counter()
            for k, _, error in in_processes(write_case, chosen, workers):
                name, case, target = jobs[part[k]]
                progress.update()
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                    raise DataError(f"{root} cannot be written ({error.strerror}): free some space, or name another --store")
                if error is not None:
                    problems.setdefault(name, []).append(f"{case.name}: {error}")
                    bad.add((name, case.name))
            if rest and part is not rest:
                say(forecast(root, jobs, firsts, rest, time.perf_counter() - started))
    for name, hit in found.items():
        folder = root / name
        keep = sorted(case_folder(folder, c).name for c in hit.cases if c.split in ("train", "test") and (name, c.name) not in bad)
        about = {k: v for k, v in asdict(hit.dataset).items() if k != "reader"}
        about = json.loads(json.dumps({**about, "root": str(hit.root), "cases": keep}))
        try:
            same = json.loads((folder / "dataset.json").read_text()) == about
        except (OSError, ValueError):
            same = False
        if not same:
            write_json(folder / "dataset.json", about)
    for name, lines in problems.items():
        for line in lines:
            say(f"left out of {name}: {line}")
    every = [f"{n}: {line}" for n, hit in found.items() for line in hit.problems + problems.get(n, [])]
    if strict and every:
        raise DataError(f"{len(every)} problems, the first is {every[0]}: mend them (python data.py names them all), or leave --strict out")
    return problems


def forecast(root, jobs, firsts, rest, seconds):
    """A line: what the remaining cases will take, by their files' sizes. Raises DataError where they do not fit on the disk."""
    size = lambda case: sum(max(b, 0) for _, b, _ in signature(case))
    ratio = {n: sum(p.stat().st_size for p in jobs[i][2].glob("*")) / max(1, size(jobs[i][1])) for n, i in firsts.items()}
    done, left = sum(size(jobs[i][1]) for i in firsts.values()), sum(size(jobs[i][1]) for i in rest)
    needed, free = sum(size(jobs[i][1]) * ratio[jobs[i][0]] for i in rest), shutil.disk_usage(root).free
    if needed > free:
        raise DataError(f"{root} needs about {needed / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free: name another --store, or fewer --datasets")
    return (f"{len(rest)} more cases to prepare: about {needed / 1e9:.2f} GB in {root} ({free / 1e9:.0f} GB free), "
            f"{seconds * left / max(1, done) / 60:.1f} minutes")


class NewerStore(DataError):
    """A store of a later version of this code: not to be read, and not to be overwritten."""


def read_index(folder):
    """The index of a stored case. Raises DataError where it cannot be used, or an array is not as long as it was written."""
    index = readers.read_json(folder / "case.json")
    if isinstance(index, dict) and index.get("version", 0) > STORE_VERSION:
        raise NewerStore(f"{folder} has store version {index['version']}, this code reads {STORE_VERSION}: update the code, or name another --store")
    try:
        whole = index["version"] == STORE_VERSION and all((folder / n).stat().st_size == b for n, b in index["bytes"].items())
    except (OSError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise DataError(f"{folder} is damaged: delete it and pass --data_root, it is made anew")
    return index


def write_json(path, value):
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


@dataclass
class StoredCase:
    folder: Path
    name: str
    patient: str
    split: str
    slices: int
    foreground: list
    classes: list
    index: dict = field(repr=False)
    kind: str = ""
    height: float = None

    def read(self, k):
        """Slice k: image (H, W) float32 in [0, 1], label (H, W) float32 (classes, or [0, 1]), valid (H, W) bool or None."""
        image = np.load(self.folder / "image.npy", mmap_mode="r")[k].astype(np.float32) / 65535
        label = np.load(self.folder / "label.npy", mmap_mode="r")[k]
        label = label.astype(np.float32) / (65535 if label.dtype == np.uint16 else 1)
        valid = np.load(self.folder / "valid.npy", mmap_mode="r")[k] > 0 if self.index["valid"] else None
        return image, label, valid

    def kept(self, slices="foreground"):
        """Numbers of the slices that count: foreground | all."""
        return self.foreground if slices == "foreground" else list(range(self.slices))


class Store:
    """The index of a prepared store. `datasets` {name: Dataset}, `cases` {name: [StoredCase]}.

    Raises DataError for a folder that is no store, a newer store, and for names that are not in it.
    """

    def __init__(self, root, names=None):
        self.root = Path(root)
        there = {p.parent.name: p for p in sorted(self.root.glob("*/dataset.json"))}
        if not there:
            raise DataError(f"{self.root} is no prepared store: pass --data_root once to fill it")
        check_names(names, there, self.root)
        self.datasets, self.cases = {}, {}
        for name in names or there:
            try:
                about = readers.read_json(there[name])
                indices = [(self.root / name / case, read_index(self.root / name / case)) for case in about.pop("cases")]
                about.pop("root")
                self.datasets[name] = Dataset(**{k: tuple(v) if isinstance(v, list) else v for k, v in about.items()})
            except (KeyError, TypeError, AttributeError):
                raise DataError(f"{there[name]} is damaged: delete it and pass --data_root, it is made anew") from None
            self.cases[name] = [StoredCase(folder, *(index[k] for k in ("name", "patient", "split", "slices", "foreground", "classes")),
                                           index, index["kind"], index["height"]) for folder, index in indices]

    def split(self, name, split):
        return [c for c in self.cases[name] if c.split == split]


def open_store(data_root, store, names=None, brats_pairs=None, strict=False):
    """Find, prepare and open in one call; without data_root the store is used as it is. strict: DataError for any bad case."""
    if data_root is None and store is None:
        raise DataError("no data: pass --data_root, the folder that holds the datasets, or --store, a prepared store")
    if data_root is None:
        return Store(store, names)
    found = find(data_root, names, brats_pairs=brats_pairs)
    root = Path(store or default_store(data_root))
    prepare(found, root, strict=strict)
    return Store(root, list(found))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: which objective, which dataset, which slices, which colors

SYNTHETIC_EPOCH = 10_000  # draws that count as an epoch of the procedural tasks (ours)
OBJECTIVE = 2 ** 31 - 1  # stands for "all samples of the step" in a generator's key


def draw_step(seed, step, seg_share=0.5, mim_share=0.9, objective="hybrid", num_prompts=(1, 1)):
    """What a whole step shares: (objective "mim" | "ar", prompt pairs, probability that a sample is segmentation).

    Hybrid (section 4.1): segmentation always AR; the others MIM with probability mim_share, else AR; segmentation is
    seg_share of all samples. A batch has one objective, so it is drawn first; the shares of samples follow (Bayes).
    """
    rng = np.random.default_rng([seed, step, OBJECTIVE])
    p_mim = {"hybrid": (1 - seg_share) * mim_share, "ar": 0.0, "mim": 1.0}[objective]
    mim = rng.random() < p_mim
    prompts = int(rng.integers(num_prompts[0], num_prompts[1] + 1))
    if objective != "hybrid":
        return ("mim" if mim else "ar"), (1 if mim else prompts), seg_share
    return ("mim", 1, 0.0) if mim else ("ar", prompts, seg_share / (1 - p_mim))


def draw_hidden(rng, tokens, mask_ratio, hide_label=0.0):
    """Which patches of the canvas are hidden, (4, N) bool: exactly round(4 N mask_ratio) of all four images' patches,
    anywhere; with probability hide_label instead all of Y and nothing else, as at inference."""
    hidden = np.zeros(4 * tokens, bool)
    if rng.random() < hide_label:
        hidden[3 * tokens:] = True
    else:
        hidden[rng.permutation(4 * tokens)[:round(4 * tokens * mask_ratio)]] = True
    return hidden.reshape(4, tokens)


class Episodes(torch.utils.data.Dataset):
    """Training samples by number: `episodes[step, i]` is sample i of the global batch of a step, always the same one.

    `synthetic` adds the endless procedural tasks (synthetic.py) to both groups, under that name; they need no store.
    filled: the answer of detection is a mask of what is in the boxes, a class, instead of the image with the boxes drawn on it.
    augment: the share of samples from the store that `augment` changes; close_up: the share of those with classes that `close_ups` changes.
    Of every dataset's training cases, those of the last `held_out` patients (at most a fifth of them) are kept in `held`, for validation; of the
    rest `data_fraction` (at least one), or at most `few`, are drawn from, the same ones whatever the seed.
    A sample (S = prompts + 1 pairs, the task pair last):
        images, labels  (S, 1, H, W) float32; labels are classes where `colored`, else [0, 1]
        valid           (S, 1, H, W) uint8
        palette (256,) float32, colored (), first () bool: is the first label asked for too
        hidden (4, N) bool for mim; drop (depth, 2) uniform numbers; dataset, case, slice () integers, for the log
    Raises DataError, which names the cases, where one cannot be read.
    """

    def __init__(self, store, image_size, patch, depth, seed=0, num_prompts=(1, 1), objective="hybrid", seg_share=0.5,
                 mim_share=0.9, mask_ratio=0.75, hide_label=0.1, coloring="random", first_term="auto",
                 dataset_weights="equal", data_fraction=1.0, empty_slices=0.0, synthetic=False, synthetic_share=None, augment=0.0,
                 few=None, held_out=0, close_up=0.0, filled=False):
        self.store, self.image_size, self.patch, self.depth, self.seed = store, image_size, patch, depth, seed
        self.num_prompts, self.objective, self.mim_share = num_prompts, objective, mim_share
        self.mask_ratio, self.hide_label, self.coloring, self.first_term = mask_ratio, hide_label, coloring, first_term
        self.empty_slices, self.synthetic_share, self.augment, self.close_up = empty_slices, synthetic_share, augment, close_up
        self.datasets = store.datasets if store else {}
        self.filled = {n for n, d in self.datasets.items() if filled and d.task == "detection"}
        self.names = sorted(self.datasets) + [SYNTHETIC] * synthetic
        self.predefined = predefined_offsets(self.datasets.values())
        self.cases, self.slices, self.held, self.excluded = {}, {}, {}, []
        for name in self.datasets:
            cases = [c for c in store.split(name, "train") if c.foreground]
            patients = list(dict.fromkeys(c.patient for c in cases))
            away = set(patients[len(patients) - min(held_out, len(patients) // 5):])
            self.held[name], cases = [c for c in cases if c.patient in away], [c for c in cases if c.patient not in away]
            left = min(max(1, round(data_fraction * len(cases))), few or len(cases))
            if left < len(cases):
                order = np.random.default_rng(0).permutation(len(cases))
                cases = [cases[i] for i in sorted(order[:left])]
            if cases:
                self.cases[name] = cases
                self.slices[name] = np.array([(i, k) for i, c in enumerate(cases) for k in c.foreground], np.int32)
            else:
                self.excluded.append(name)
        if not self.cases and not synthetic:
            raise DataError(f"{store.root} has no training slices with foreground: check the labels")
        if synthetic and coloring == "predefined":
            raise DataError("--coloring predefined needs datasets with classes of their own: leave synthetic out")
        if self.filled and coloring == "predefined":
            raise DataError("--coloring predefined has no color for --boxes filled: leave one of them out")
        self.groups = {c: [n for n in self.names if n == SYNTHETIC or n in self.cases and (self.datasets[n].colored or n in self.filled) == c] for c in (True, False)}
        self.weights = {c: self._weights(names, dataset_weights) for c, names in self.groups.items()}
        # A group that is not there leaves its share to the other.
        self.seg_share = 1.0 if not self.groups[False] else 0.0 if not self.groups[True] else seg_share

    def _weights(self, names, rule):
        """How likely each dataset of a group is: equally, by size, or equally times the factors of a rule such as "acdc=2,la=0.5"; the procedural tasks have `synthetic_share` of it, if that is given."""
        try:
            factors = {} if rule in ("equal", "size") else {n: float(f) for n, f in (part.split("=") for part in rule.split(","))}
        except ValueError:
            factors = {rule: 0}
        if wrong := [n for n, f in factors.items() if n not in self.names or not 0 < f < 1e6]:
            raise DataError(f"--dataset_weights has {wrong[0]!r}: write equal, size, or factors above 0 of datasets that are here, such as {self.names[0]}=2")
        size = np.array([self._size(n) if rule == "size" else factors.get(n, 1.0) for n in names])
        if self.synthetic_share is not None and SYNTHETIC in names and len(names) > 1:
            size = np.append(size[:-1] / size[:-1].sum() * (1 - self.synthetic_share), self.synthetic_share)  # it is the last one
        return size / size.sum() if len(names) else size

    def __len__(self):
        """Draws an epoch: the training slices."""
        return sum(self._size(n) for n in self.names if n not in self.excluded)

    def _size(self, name):
        return SYNTHETIC_EPOCH if name == SYNTHETIC else len(self.slices[name])

    def describe(self, dataset, case, k):
        """What a sample's three numbers stand for, as text."""
        name = self.names[dataset]
        return f"{name} {case}" if name == SYNTHETIC else f"{name} {self.cases[name][case].name} slice {k}"

    def step(self, step):
        return draw_step(self.seed, step, self.seg_share, self.mim_share, self.objective, self.num_prompts)

    def draw(self, step, i):
        """Which kind of sample this is: (objective, prompts, dataset name, colored?), and the generator for the rest of it."""
        objective, prompts, p_seg = self.step(step)
        rng = np.random.default_rng([self.seed, step, i])
        group = bool(rng.random() < p_seg)
        name = self.groups[group][rng.choice(len(self.groups[group]), p=self.weights[group])]
        return objective, prompts, name, group, rng

    def __getitem__(self, key):
        objective, prompts, name, group, rng = self.draw(*key)
        if name == SYNTHETIC:
            at, k = key[0], key[1]
            images, labels = (x[:, None] for x in synthetic_task(rng, prompts + 1, self.image_size, group))
            valid = torch.ones(images.shape, dtype=torch.uint8)
        else:
            cases = self.cases[name]
            at, k = (int(v) for v in self.slices[name][rng.integers(len(self.slices[name]))])
            if self.empty_slices and rng.random() < self.empty_slices:
                k = int(rng.integers(cases[at].slices))
            chosen = [self.draw_prompt(cases, at, k, rng) for _ in range(prompts)] + [(cases[at], k)]
            near = group and self.close_up and rng.random() < self.close_up
            try:
                pairs = [case.read(k) for case, k in chosen]
                if name in self.filled:
                    pairs = [(image, boxes.fill(case.index["boxes"], image.shape).astype(np.float32), valid) for (image, _, valid), (case, _) in zip(pairs, chosen)]
                pairs = [self.crop(*pair, group, rng) for pair in (close_ups(pairs, rng) if near else pairs)]
            except Exception as error:  # whatever a damaged store brings about
                raise DataError(f"sample {key[1]} of step {key[0]} cannot be read, {name} {', '.join(f'{c.name} slice {i}' for c, i in chosen)}: "
                                f"{type(error).__name__}: {error}") from error
            images, labels, valid = (torch.stack([p[j] for p in pairs])[:, None] for j in range(3))
            if self.augment and rng.random() < self.augment:
                alone = all(case is cases[at] for case, _ in chosen)
                images, labels, valid = augment(images, labels, valid, group, rng, 4 if alone else 1, near)
        shown = np.unique(labels[:-1].numpy()).astype(int) if group else []
        palette = make_palette([c for c in shown if c], self.coloring, rng, name, self.predefined)
        N = (self.image_size // self.patch) ** 2
        sample = {"images": images, "labels": labels, "valid": valid, "palette": torch.from_numpy(palette),
                  "colored": torch.tensor(group), "first": torch.tensor(self.first_term == "on" or self.first_term == "auto" and not group),
                  "drop": torch.from_numpy(rng.random((self.depth, 2), dtype=np.float32)),
                  "dataset": self.names.index(name), "case": at, "slice": k}
        if objective == "mim":
            sample["hidden"] = torch.from_numpy(draw_hidden(rng, N, self.mask_ratio, self.hide_label))
        return sample

    def draw_prompt(self, cases, at, k, rng, jitter=0.05):
        """A training prompt for slice k of cases[at]: another patient, the slice with foreground nearest to the same
        relative height (plus jitter, ours), among those that share a class if any does. Alone, a case prompts itself."""
        target = cases[at]
        others = prompt_cases(cases, target) or [c for c in cases if c.kind == target.kind and c is not target] or [target]
        case = others[rng.integers(len(others))]
        height = (k + 0.5) / target.slices + rng.uniform(-jitter, jitter)
        wanted = set(target.classes[k])
        slices = [s for s in case.foreground if wanted & set(case.classes[s])] or case.foreground
        if case is target and len(slices) > 1:
            slices = [s for s in slices if s != k]
            return case, int(slices[rng.integers(len(slices))])
        return case, min(slices, key=lambda s: abs((s + 0.5) / case.slices - height))

    def crop(self, image, label, valid, colored, rng):
        """Resize to 512 x 512, crop 448 x 448 at random (paper; the ratio is kept at other sizes): three (H, W) tensors."""
        size = self.image_size
        full = round(size * 512 / 448)
        y, x = rng.integers(0, full - size + 1, 2)
        valid = np.ones(image.shape, np.uint8) if valid is None else valid.astype(np.uint8)
        image, label, valid = torch.from_numpy(image), torch.from_numpy(label), torch.from_numpy(valid)
        image = resize_images(image, (full, full)).clamp(0, 1)  # rounding
        label = resize_labels(label, (full, full)) if colored else resize_images(label, (full, full)).clamp(0, 1)
        valid = resize_labels(valid, (full, full))
        return tuple(t[y:y + size, x:x + size].contiguous() for t in (image, label, valid))


def extent(mask, trim=0.0):
    """Where a mask (H, W) is: (its centre (y, x), its larger side), as shares of the picture; None where it is empty. trim: the share of it that may be left out at every end."""
    ends = []
    for axis in (1, 0):
        upto = mask.sum(axis).cumsum()
        if not upto[-1]:
            return None
        ends.append((np.searchsorted(upto, trim * upto[-1], "right"), np.searchsorted(upto, (1 - trim) * upto[-1]) + 1))
    return tuple((a + b) / 2 / n for (a, b), n in zip(ends, mask.shape)), max((b - a) / n for (a, b), n in zip(ends, mask.shape))


def window(centre, side, shape):
    """The part of a picture (H, W) around a centre (y, x), `side` high and wide, moved inside; both as shares of it: (rows, columns), at least 2 pixels each."""
    spans = []
    for at, n in zip(centre, shape):
        length = min(n, max(2, round(side * n)))
        start = int(np.clip(round(at * n - length / 2), 0, n - length))
        spans.append(slice(start, start + length))
    return tuple(spans)


def close_ups(pairs, rng):
    """One class of a sample and nothing else, seen from near (ours): of pairs (image, label, valid or None), each (H, W), the task last, windows around a
    class that the prompts show, of one size, 1.5 to 2.6 times its largest extent, at least a fifth of the picture. As `infer.py` looks a second time where it has found something."""
    shown = np.unique(np.concatenate([np.unique(label) for _, label, _ in pairs[:-1]]))
    if not (shown > 0).any():
        return pairs
    asked = rng.choice(shown[shown > 0])
    found = [extent(label == asked) for _, label, _ in pairs]
    somewhere = next(f for f in found if f)
    side = float(np.clip(max(f[1] for f in found if f) * rng.uniform(1.5, 2.6), 0.2, 1))
    nearer = []
    for (image, label, valid), place in zip(pairs, found):
        centre = np.add((place or somewhere)[0], rng.normal(0, 0.08 * side, 2))
        rows, columns = window(centre, side, image.shape)
        nearer.append((image[rows, columns], np.where(label == asked, label, 0)[rows, columns], valid if valid is None else valid[rows, columns]))
    return nearer


def augment(images, labels, valid, colored, rng, apart=1, near=False):
    """Another task made of the pairs (S, 1, H, W) of a sample, so that few datasets teach more than themselves (ours; the idea
    is the task augmentation of UniverSeg, Butoi et al. 2023).

    All pairs alike are mirrored and turned by quarters. With classes, all are also zoomed and get the same random curve of
    intensities, which makes other contrasts of the same anatomy; each is turned, moved, zoomed and brightened a little; and
    half of the time only some of the classes are asked for. apart: how much more than a little, so that a case that prompts itself teaches more than copying.
    near: they are close-ups, and zoomed less.
    """
    S = len(images)
    zoom, move, turn, fine = np.ones(S), np.zeros((S, 2)), np.full(S, rng.integers(4) * np.pi / 2), colored
    mirror = rng.choice([-1, 1])
    if fine:
        zoom = np.exp(rng.uniform(-0.15 if near else -0.5, 0.15) + rng.normal(0, 0.08 * apart, S))
        move, turn = rng.uniform(-0.15, 0.15, 2) * (0.5 if near else 1) + rng.normal(0, 0.06 * apart, (S, 2)), turn + rng.normal(0, 0.12 * apart, S)
    c, s = np.cos(turn) * zoom, np.sin(turn) * zoom
    theta = torch.from_numpy(np.stack([np.stack([c * mirror, -s, move[:, 0]], -1), np.stack([s * mirror, c, move[:, 1]], -1)], 1)).float()
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    sample = lambda x, mode: F.grid_sample(x.float(), grid, mode=mode, align_corners=False)
    images, valid = sample(images, "bilinear"), sample(valid, "nearest").to(valid.dtype)
    labels = sample(labels, "nearest" if colored else "bilinear")
    shown = labels[:-1].unique()[1:].numpy() if colored else []
    if len(shown) > 1 and rng.random() < 0.5:
        asked = torch.from_numpy(rng.permutation(shown)[:rng.integers(1, len(shown))])
        labels = labels * torch.isin(labels, asked)
    if fine and rng.random() < 0.7:
        at = np.linspace(0, 1, rng.integers(3, 8))
        curve = rng.random(len(at))
        if rng.random() < 0.5:  # what is black stays black
            curve[0] = 0
        images = torch.stack([torch.from_numpy(np.interp(x.numpy(), at, (curve + rng.normal(0, 0.04, len(at))).clip(0, 1))).float() for x in images])
    if fine:
        gamma, noise = np.exp(rng.normal(0, 0.2, S)), rng.standard_normal(images.shape, dtype=np.float32) * abs(rng.normal(0, 0.04))
        images = (images.clamp(0, 1) ** torch.from_numpy(gamma).float()[:, None, None, None] + torch.from_numpy(noise)).clamp(0, 1)
    return images, labels, valid


class Steps:
    """The batch sampler of one rank: for every step from `start` on, its share of the global batch, in `parts` batches."""

    def __init__(self, start, stop, batch, rank=0, ranks=1, parts=1):
        self.start, self.stop, self.batch, self.parts, self.rank, self.ranks = start, stop, batch, parts, rank, ranks

    def __len__(self):
        return max(0, self.stop - self.start) * self.parts

    def __iter__(self):
        for step in range(self.start, self.stop):
            for part in range(self.rank * self.parts, (self.rank + 1) * self.parts):
                yield [(step, i) for i in range(part * self.batch, (part + 1) * self.batch)]


def prompt_cases(cases, target, nearest=16):
    """The cases that may prompt a case: of its kind, of another patient; for a single slice whose height in the body is known
    the `nearest` in height (ours)."""
    cases = [c for c in cases if c.kind == target.kind and c.patient != target.patient]
    if target.slices > 1 or target.height is None:
        return cases
    return nsmallest(nearest, [c for c in cases if c.height is not None], key=lambda c: abs(c.height - target.height)) or cases


def evaluation_prompt(cases, target, rng, slices="foreground"):
    """The paper's prompt for a case (section 3.3): a random training case, of another patient. cases: the training cases."""
    others = prompt_cases([c for c in cases if c.kept(slices)], target)
    return others[rng.integers(len(others))]


def matching_slice(k, count, prompt_count):
    """The prompt slice for slice k of count: floor(k * N_TR / N_TE) (paper, section 3.3)."""
    return k * prompt_count // count


# ---------------------------------------------------------------------------------------------------------------------
# python data.py --data_root DIR: what is found there

def pyplot():
    """matplotlib.pyplot, without a display unless somebody has imported it before: a notebook keeps its own. Raises ImportError where matplotlib is missing."""
    import matplotlib
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_figure(path, found, columns=4):
    """One training slice of every dataset beside its label, colored at random as in training (images as they are)."""
    plt = pyplot()
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, 2 * columns, figsize=(2 * columns * 1.5, rows * 1.75), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for n, (name, hit) in enumerate(found.items()):
        for case in (c for c in hit.cases if c.split != "inference"):
            with suppress(DataError):
                arrays, index = prepare_case(case, hit.dataset)
                break
        else:
            continue
        k = max(index["foreground"] or [0], key=lambda k: (len(index["classes"][k]), np.count_nonzero(arrays["label"][k])))
        label = arrays["label"][k]
        if hit.dataset.colored:
            label = make_palette(index["classes"][k], "random", np.random.default_rng(0))[label] * 65535
        for axis, picture in zip(axes[n // columns, 2 * (n % columns):], (arrays["image"][k], label)):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=65535)
        axes[n // columns, 2 * (n % columns)].set_title(name, fontsize=8, loc="left")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def examine(case, dataset):
    """What the doctor wants to know of one case: read and prepared as for the store, then forgotten."""
    arrays, index = prepare_case(case, dataset)
    image = arrays["image"]
    return {"slices": index["slices"], "foreground": len(index["foreground"]), "classes": sorted(set().union(*index["classes"])), "spacing": index["spacing"],
            "scale": index["scale"], "mean": float(image.mean()) / 65535, "empty": bool(image.min() == image.max()), "problems": index["problems"],
            "notes": index["notes"]}


def odd_spacing(name, spacing, others):
    """What is odd about a case's voxel spacing in mm (slice, row, column) beside those of its dataset, or None."""
    text = " x ".join(f"{v:g}" for v in spacing)
    usual = np.median(others, 0)
    if min(spacing) < 0.01 or max(spacing) > 50:
        return f"{name}: its spacing is {text} mm"
    if (np.abs(np.log(np.array(spacing) / usual)) > np.log(5)).any():
        return f"{name}: its spacing is {text} mm, that of the dataset is {' x '.join(f'{v:.3g}' for v in usual)}"
    if tuple(spacing) == (1, 1, 1) and tuple(usual) != (1, 1, 1):
        return f"{name}: its spacing is 1 x 1 x 1 mm, which may be a placeholder"
    return None


def diagnose(found, workers=None):
    """The doctor: every case of every dataset read and prepared. {name: {...}}, for the names of the table and those found."""
    from tqdm import tqdm
    report = {n: {"found": False, "root": "", "cases": {"train": 0, "test": 0}, "paper": list(d.paper), "slices": 0, "problems": []} for n, d in DATASETS.items()}
    jobs = [(n, c) for n, hit in found.items() for c in hit.cases if c.split in ("train", "test")]
    seen, broken = {n: {} for n in found}, {n: {} for n in found}
    with tqdm(total=len(jobs), desc="reading", unit="case", disable=None, leave=False) as progress:
        for i, answer, error in in_processes(examine, [(c, found[n].dataset) for n, c in jobs], workers):
            progress.update()
            name, case = jobs[i]
            (seen if error is None else broken)[name][case.name] = answer if error is None else f"{case.name}: {' '.join(str(error).split())}"
    for name, hit in found.items():
        answers, dataset = seen[name], hit.dataset
        order = [c.name for c in hit.cases if c.name in answers]
        spacings = [answers[c]["spacing"] for c in order if answers[c]["slices"] > 1]
        problems = [*hit.problems, *(broken[name][c.name] for c in hit.cases if c.name in broken[name])]
        problems += [f"{c}: {p}" for c in order for p in answers[c]["problems"]]
        every = [n for c in order for n in answers[c]["notes"]]
        notes = [*hit.notes, *(f"{n} ({every.count(n)} of {len(order)} cases)" for n in dict.fromkeys(every))]
        problems += [p for c in order if answers[c]["slices"] > 1 and (p := odd_spacing(c, answers[c]["spacing"], spacings))]
        problems += [f"{c}: its image is constant" for c in order if answers[c]["empty"]]
        problems += [f"{c}: its label is empty" if dataset.colored else f"{c}: no slice has a truth to learn" for c in order if not answers[c]["foreground"]]
        classes = sorted(set().union(*(a["classes"] for a in answers.values())))
        report[name] = {"found": True, "root": str(hit.root), "cases": {s: sum(c.split == s for c in hit.cases if c.name in answers) for s in ("train", "test")},
                        "paper": list(dataset.paper), "slices": sum(a["slices"] for a in answers.values()),
                        "foreground": sum(a["foreground"] for a in answers.values()), "classes": {c: dataset.labels[c - 1] for c in classes},
                        "classes_absent": [l for i, l in enumerate(dataset.labels, 1) if i not in classes],
                        "scaled_from": [min(a["scale"][0] for a in answers.values()), max(a["scale"][1] for a in answers.values())] if answers else None,
                        "mean": float(np.mean([a["mean"] for a in answers.values()])) if answers else None, "notes": notes, "problems": problems}
    return report


def main(argv=None):
    import argparse
    p = argparse.ArgumentParser(description="The data doctor: reads every case below a data root as training would, and says what is there and what is wrong.",
                                epilog="Exit status 1 where a dataset that was found has problems.")
    p.add_argument("--data_root", required=True, help="folder that holds the datasets as they were downloaded")
    p.add_argument("--datasets", nargs="+", metavar="NAME", help="only these (default: every dataset found)")
    p.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    p.add_argument("--figure", metavar="PNG", help="draw one slice of every dataset with its label")
    p.add_argument("--workers", type=int, help="processes (default: one a CPU core)")
    args = p.parse_args(argv)
    left_out = []  # folders whose tables cannot be read
    found = find(args.data_root, args.datasets, say=left_out.append)
    report = diagnose(found, args.workers)
    if args.json:
        print(json.dumps({"datasets": report, "problems": left_out}, indent=1))
    else:
        for line in left_out:
            print(f"PROBLEM: {line}")
        for name, r in report.items():
            print(describe_health(name, r) if r["found"] else f"{name}: not found")
    if args.figure:
        draw_figure(args.figure, found)
        print(f"wrote {args.figure}") if not args.json else None
    return int(bool(left_out) or any(r["problems"] for r in report.values()))


def describe_health(name, r):
    """A dataset's part of the report as text."""
    paper = f" (paper: {r['paper'][0]} / {r['paper'][1]})" if r["paper"] else ""
    lines = [f"{name}: {r['cases']['train']} training / {r['cases']['test']} test cases{paper}, {r['slices']} slices, {r['foreground']} with foreground, {r['root']}"]
    if r["classes"]:
        lines.append("    classes: " + ", ".join(f"{c} {l}" for c, l in r["classes"].items()) + (f"; absent: {', '.join(r['classes_absent'])}" if r["classes_absent"] else ""))
    if r["scaled_from"]:
        lines.append(f"    intensities {r['scaled_from'][0]:g} to {r['scaled_from'][1]:g} become 0 to 1, on average {r['mean']:.2f}")
    return "\n".join(lines + [f"    note: {n}" for n in r["notes"]] + [f"    PROBLEM: {n}" for n in r["problems"]])


def command_line(main):
    """Run a program's main; what a user can mend ends it with one line and exit status 2."""
    try:
        status = main()
        sys.exit(status if isinstance(status, int) else 0)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        if os.environ.get("MVG_DEBUG"):
            raise
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    command_line(main)
