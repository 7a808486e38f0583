"""Phantoms: drawn anatomy, written as small stand-ins for all sixteen datasets in their native layouts and file formats.

Why: the real sets need forms, passwords and terabytes. These let anyone run and test everything (readers, splits, store,
training) on a laptop in a minute, straight off `--data_root`, with the accidents of real downloads planted (`PLANTED`).
Subjects differ in place, size, turn, shape and contrast, so that copying another subject's label scores under 0.35 mIoU:
a model has to look. They are drawings, not data: a score on them says nothing about patients.

How: one body in centimetres, x to the patient's left, y to the back, z up (LPS). Organs are rows of a table, ellipsoids and
tubes painted one over another; a dataset is a view of a body (slices, field of view, modality) and a way of saving it. CT
of chest and abdomen, MR of the same, left atrium, prostate and chest X-ray all view one torso.

    python phantom.py --out stand_ins                               # all sixteen: under a minute, 58 MB
    python phantom.py --out stand_ins --datasets acdc la --seed 1   # some, other subjects

Three more mirror sets at hand and are written when named: msd_hippocampus, Dataset801_NerveUltrasound, Dataset802_MsT1ToFlair.

Volumes here are (z, y, x): a slice is a picture, rows front to back, columns patient's right to left. Lengths are cm unless
a name says mm. Every random number comes from a generator keyed by (seed, dataset, case): no case depends on another.
"""

import argparse
import csv
import json
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from PIL import Image
from tqdm import tqdm

# Traps of real downloads that the stand-ins hold, for tests to walk through. Missing labels: msd_lung, chest_xray, promise12.
PLANTED = {
    "amos_ct": [
        "ids have gaps and CT shares amos22/ with MR: modality by id (< 500)", "LAS, qform only (sform code 0)",
        "label of amos_0013 is uint16, the others uint8", "dataset.json lists dicts, `test` too",
        "amos_0002 (imagesTs) has no label", "__MACOSX/amos22/ beside the set, ._amos_0004.nii.gz inside imagesTr"],
    "amos_mri": [
        "amos_0510 is stored L, S, P: the slice axis is the second, not the last", "amos_0508 is RAS among LAS", "qform only",
        "label of amos_0514 is uint16", "id 600 is a training case"],
    "word": [
        "LPS, qform only", "label of word_0004 is uint16", "id gaps", "the folder is imagesVal, not imagesVa",
        "word_0014 (imagesTs) has no label", "scribblesTr/word_0002.nii.gz looks like a label", "__MACOSX/ inside the set",
        "12 is both adrenals"],
    "btcv": [
        "Abdomen/RawData/Training: nested", "img0001 pairs with label0001",
        "img0002 is uint16 with slope 0.5 and intercept -1024", "img0005 has no gallbladder",
        "Testing/img/img0061 has no label", "._img0001.nii.gz", "ids 0011-0020 do not exist"],
    "microsegnet": [
        "case numbers restart in test/", "spacing in the header is 1, 1, 1",
        "folder non_expert_annotations, file nonexpert_annotation", "three more readers' masks in test/", "pixels end at 254"],
    "promise12": [
        "MHD + raw, signed int8 masks", "Case00 and Case02 in both splits", "test Case02 has no segmentation",
        "Case07 is tilted by 8 degrees", "Case13: endorectal coil", "id gaps", "end slices are empty"],
    "brats_gli": [
        "Training folder nested in itself", "BraTS-GLI-00005-001 repeats a patient", "00005-000 and -001 lack label 3",
        "00003-000 t1n has minimum -3", "no seg in Validation", "stray csv and ._ file", "LPS"],
    "brats_local": [
        "five files catch *t1n* and *mask*", "t1n-voided float32 and qform only, masks uint8 with both forms",
        "Validation: float32, voided and mask only", "BraTS-GLI-00005-001 repeats a patient", "the same patients as brats_gli"],
    "ldct": [
        "SeriesDescription in several spellings", "file names not in slice order",
        "C001 (GE) has no low dose, yet shares the prefix", "Full Dose Projections in L004", "two styles of date folder",
        "both doses have series number 1", "stored 0..4095 with intercept -1024"],
    "chest_xray": [
        "Montgomery: left and right masks of 1 bit", "Kaggle: masks of 0/255, CHNCXR_*_mask.png",
        "CHNCXR_0025_0 and test/ have no mask", "mask of CHNCXR_0010_0 has half the size", "CHNCXR_0004_0 is RGB",
        "MCUCXR_0001_0 and 0002_0 lie in both folders", "sizes vary", "__MACOSX/ and ._ files"],
    "acdc": [
        "_4d.nii.gz and _gt.nii.gz beside the frames", "patient003 has ED 4", "ES frame differs, see Info.cfg", "sform only",
        "empty slices at the tip", "id gaps"],
    "la": [
        "NRRD masks of 0/255", "lawall.nrrd beside laendo.nrrd", "header spacing 1, 1, 1 in one case", "desktop.ini",
        "20-character ids", "empty end slices"],
    "deeplesion": [
        "16-bit PNG, HU + 32768", "several lesions (rows) an image", "Possibly_noisy = 1 in three series", "boxes are 1-based",
        "a missing neighbour slice", "two far sub-volumes in one series", "Coarse_lesion_type -1 in training", "patient gaps",
        "an age NaN", "not every lesion is marked", "patient 4 has 192 x 192 images"],
    "msd_liver": [
        "ids without padding, with gaps", "`test` is plain strings", "`relase` for release", "._ files", "RAS",
        "test case has no label"],
    "msd_lung": [
        "lung_014 is listed in dataset.json, its label is missing", "ids padded to three", "LPS", "most slices are empty",
        "._ files"],
    "msd_spleen": [
        "spleen_3: float32 image and label", "label of spleen_6 is uint16", "ids without padding, with gaps", "._ files"],
    "msd_hippocampus": [
        "hippocampus_001: uint8 image", "hippocampus_003: float32 image and label", "every volume has its own size",
        "left and right sides mixed"],
    "Dataset801_NerveUltrasound": ["some images are RGB", "sizes vary", "label names lack _0000", "id gaps"],
    "Dataset802_MsT1ToFlair": ['"labels": "image"', "values below 0", "LAS, qform only", "float32"]}

# ----------------------------------------------------------------------------------------------------------------------
# Tissues. A name's part after the dot is a detail that keeps its organ's label: kidney_r.sinus counts as kidney_r.

TORSO = {  # name: (HU, gain in HU at full contrast, T1, T2 with bright fat, late gadolinium)
    "skin": (20, 0, .5, .3, .4), "fat": (-105, 0, .85, .55, .55), "muscle": (50, 8, .4, .2, .35),
    "bone": (700, 0, .08, .06, .1), "marrow": (230, 0, .6, .5, .45), "disc": (85, 0, .35, .6, .4), "cord": (35, 0, .35, .8, .4),
    "rib": (480, 0, .2, .2, .2), "table": (-350, 0, 0, 0, 0), "lung": (-850, 0, .05, .06, .05),
    "lung.vessel": (-250, 200, .3, .2, .3), "lung.tumour": (35, 20, .4, .55, .4), "airway": (-990, 0, 0, 0, 0),
    "vessel": (42, 150, .55, .15, .7), "heart": (-70, 0, .75, .65, .45), "myocardium": (60, 45, .4, .35, .15),
    "lv": (42, 190, .55, .3, .72), "rv": (42, 190, .55, .3, .68), "ra": (42, 170, .55, .3, .7), "la": (42, 190, .55, .3, .82),
    "pa": (42, 200, .5, .2, .72), "aorta": (42, 210, .6, .1, .75), "ivc": (42, 110, .55, .12, .65),
    "portal": (42, 130, .58, .14, .6), "liver": (58, 50, .55, .35, .45), "liver.vessel": (45, 95, .65, .2, .5),
    "liver.tumour": (30, 25, .3, .62, .5), "gallbladder": (8, 0, .2, .95, .2), "spleen": (48, 70, .42, .6, .4),
    "spleen.vessel": (48, 85, .5, .5, .4), "kidney_r": (32, 130, .45, .65, .4), "kidney_r.sinus": (-60, 30, .75, .8, .6),
    "kidney_l": (32, 130, .45, .65, .4), "kidney_l.sinus": (-60, 30, .75, .8, .6), "kidney_l.tumour": (20, 40, .35, .6, .4),
    "pancreas": (38, 55, .65, .45, .4), "esophagus": (35, 20, .4, .4, .4), "adrenal_r": (30, 45, .5, .4, .4),
    "adrenal_l": (30, 45, .5, .4, .4), "duodenum": (28, 35, .45, .55, .4), "stomach": (25, 15, .3, .75, .3),
    "stomach.gas": (-950, 0, .02, .02, 0), "colon": (30, 20, .5, .45, .4), "colon.gas": (-850, 0, .03, .03, 0),
    "bowel": (28, 35, .4, .6, .4), "rectum": (40, 20, .4, .35, .4), "rectum.gas": (-800, 0, .03, .03, 0),
    "bladder": (8, 0, .2, 1, .2), "seminal": (25, 10, .4, .85, .4), "prostate": (42, 25, .42, .36, .4),
    "prostate.zone": (36, 20, .4, .88, .4), "femur_r": (320, 0, .6, .5, .5), "femur_l": (320, 0, .6, .5, .5),
    "node": (35, 35, .4, .5, .4)}
BRAIN = {  # name: (HU, t1n, t1c, t2w, t2f)
    "scalp": (-20, .8, .8, .6, .5), "skull": (1000, .05, .05, .05, .05), "csf": (6, .14, .14, 1, .12),
    "gray": (39, .5, .5, .62, .62), "white": (30, .72, .72, .45, .47), "deep": (37, .57, .58, .52, .57),
    "edema": (22, .48, .48, .85, 1), "core": (14, .25, .22, .9, .5), "enhancing": (45, .45, 1, .72, .85),
    "plaque": (24, .42, .45, .85, 1), "hippocampus.front": (38, .47, .48, .62, .65), "hippocampus.back": (38, .5, .5, .62, .65)}
CINE = {"lung": (.06,), "fat": (.65,), "muscle": (.3,), "bone": (.12,), "heart": (.6,), "wall": (.35,), "rv": (.9,),     # bSSFP
        "lv": (.95,), "myo": (.32,), "lv.papillary": (.38,), "liver": (.42,), "aorta": (.9,), "stomach": (.5,), "stomach.gas": (.03,)}
NAMES = ["air", *dict.fromkeys([*TORSO, *BRAIN, *CINE])]
CODE = {name: code for code, name in enumerate(NAMES)}


def labels(tissue, ids):
    """Tissue codes -> uint8 label map of that shape; ids: {tissue: label}; a detail without an id takes its organ's."""
    return np.array([ids.get(n, ids.get(n.split(".")[0], 0)) for n in NAMES], np.uint8)[tissue]


def numbered(names):
    """'spleen liver' -> {"spleen": 1, "liver": 2}; names joined by + share a number."""
    return {n: i + 1 for i, group in enumerate(names.split()) for n in group.split("+")}


def generator(seed, *key):
    """The generator of one case: depends on nothing but (seed, key)."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, key)).encode())])


def smooth(rng, shape, cells):
    """Smooth noise of unit variance, float32 of `shape`, with about `cells` bumps along each axis."""
    out = rng.standard_normal([c + 3 for c in cells], np.float32)
    for axis, (n, c) in enumerate(zip(shape, cells)):
        basis = np.exp(-2 * (np.linspace(1, c + 1, n)[:, None] - np.arange(c + 3)) ** 2)
        basis = (basis / np.sqrt((basis ** 2).sum(1, keepdims=True))).astype(np.float32)
        out = np.moveaxis(np.tensordot(basis, out, (1, axis)), 0, axis)
    return out


def blur(a):
    """[1 2 1] / 4 along rows and columns (the last two axes), edges repeated."""
    for axis in (-1, -2):
        n, pad = a.shape[axis], np.pad(a, [(1, 1) if i == a.ndim + axis else (0, 0) for i in range(a.ndim)], "edge")
        a = sum(w * np.take(pad, range(i, i + n), axis) for i, w in enumerate((.25, .5, .25)))
    return a


class Scene:
    """A volume being painted. x, y: (z, y, x), z: (z, 1, 1), body coordinates of every voxel in cm; tissue: (z, y, x) uint8.

    z: slice heights, evenly spaced; size: rows and columns; fov: cm across. The body is moved by up to `shift` cm, scaled by
    something in `zoom`, turned by up to `turn` degrees, bent smoothly by about `bend` cm; every organ is moved by up to `jitter`
    of its smallest radius, its outline uneven by about `rough` of its radius; `grain`: size of the texture's bumps, cm.
    """

    def __init__(self, rng, z, size, fov, shift=2.5, zoom=(.85, 1.1), turn=18., bend=.6, jitter=.4, rough=.1, grain=1.6):
        rows, columns = (size, size) if np.isscalar(size) else size
        pixel, scale, angle = fov / columns, rng.uniform(*zoom), np.deg2rad(rng.uniform(-turn, turn))
        du, dv = rng.uniform(-shift, shift, 2)
        u = (np.arange(columns) - (columns - 1) / 2)[None, None] * pixel - du
        v = (np.arange(rows) - (rows - 1) / 2)[None, :, None] * pixel - dv
        self.rng, self.jitter, self.rough, self.margin, self.free = rng, jitter, rough, 4 * bend, None
        self.spacing = (10 * pixel, 10 * pixel, 10 * float(z[1] - z[0]))                                # mm, (x, y, z)
        self.shape = shape = (len(z), rows, columns)
        self.x, self.y = (bend * smooth(rng, shape, (2, 4, 4)) + (part / scale).astype(np.float32)
                          for part in (u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)))
        self.z = np.asarray(z, np.float32)[:, None, None]
        cells = [max(int(n * pixel / grain / scale), 3) for n in (rows, columns)]
        self.grain = [smooth(rng, shape, (max(len(z) // 3, 1), *cells)) for _ in range(2)]
        self.tissue = np.zeros(shape, np.uint8)

    def is_(self, *names):
        """Where the volume holds one of these tissues: (z, y, x) bool."""
        return np.isin(self.tissue, [CODE[n] for n in names])

    def fill(self, name, where):
        """Paint `where`: bool, broadcast to the volume."""
        self.tissue[np.broadcast_to(where, self.shape)] = CODE[name]

    def box(self, low, high):
        """The part of the volume, as slices, that holds all voxels between two body points, and perhaps some more."""
        x, y, m = self.x[len(self.x) // 2], self.y[len(self.y) // 2], self.margin
        near = (x > low[0] - m) & (x < high[0] + m) & (y > low[1] - m) & (y < high[1] + m)
        spans = (self.z.ravel() >= low[2]) & (self.z.ravel() <= high[2]), near.any(1), near.any(0)
        return tuple(slice(at[0], at[-1] + 1) if len(at) else slice(0) for at in map(np.flatnonzero, spans))

    def paint(self, *rows):
        """Paint rows (name, where, size[, turn]): a centre and three radii, or a line of points and one radius; only inside
        `free` where that is set. Bone gets a core of marrow. turn: degrees from +x (left) towards +y (back)."""
        for name, where, size, *turn in rows:
            rng, core = self.rng, min(np.atleast_1d(size))
            where = (np.array(where) + rng.uniform(-1, 1, 3) * self.jitter * min(core, 3)).astype(np.float32)
            size = (np.array(size) * np.exp(rng.normal(0, .08))).astype(np.float32)
            texture, rough = self.grain[rng.integers(2)], float(rng.choice((-1, 1)) * self.rough * min(1, 3 / core))
            reach = 1.3 * (size if where.ndim == 2 else np.array((*[size[:2].max()] * 2, size[2])))
            box = self.box(where.reshape(-1, 3).min(0) - reach, where.reshape(-1, 3).max(0) + reach)
            at = self.x[box], self.y[box], self.z[box[0]]
            if where.ndim == 1:
                (x, y, z), a = (p - c for p, c in zip(at, where)), np.deg2rad(turn[0] if turn else 0)
                c, s = float(np.cos(a)), float(np.sin(a))
                level = np.sqrt(((c * x + s * y) / size[0]) ** 2 + ((c * y - s * x) / size[1]) ** 2 + (z / size[2]) ** 2)
            else:
                level = np.inf
                for p, d in zip(where[:-1], np.diff(where, axis=0)):
                    t = np.clip(sum((a - b) * c for a, b, c in zip(at, p, d)) / (d @ d), 0, 1)
                    level = np.minimum(level, sum((a - b - t * c) ** 2 for a, b, c in zip(at, p, d)))
                level = np.sqrt(level) / size
            level, inside = level + rough * texture[box], True if self.free is None else self.free[box]
            self.tissue[box][(level < 1) & inside] = CODE[name]
            if name == "bone":
                self.tissue[box][(level < 1 - .45 / core) & inside] = CODE["marrow"]

    def lesions(self, organ, name, count, radius, over=(), core=None):
        """Paint `count` balls of `radius` = (low, high) cm inside `organ`, never outside it and tissues `over`, where it is present; core: what they
        are of inside, to half of their radius; -> self."""
        home = labels(self.tissue, {organ: 1}) > 0
        free = home | self.is_(*over)
        for k, i, j in self.rng.permutation(np.argwhere(home))[:count]:
            size = self.rng.uniform(*radius) * np.exp(self.rng.normal(0, .2, 3))
            where, size = (self.x[k, i, j], self.y[k, i, j], self.z[k, 0, 0]), np.maximum(size, (0, 0, .06 * self.spacing[2]))
            self.free = free
            self.paint((name, where, size))
            if core:
                self.free = free & self.is_(name)
                self.paint((core, where, size / 2))
        self.free = None
        return self


def both(name, where, size, turn=0, sides=("", "")):
    """A row for the patient's right and one for the left (where, turn: as on the left, x > 0)."""
    where = np.array(where, float)
    return (name + sides[0], where * (-1, 1, 1), size, -turn), (name + sides[1], where, size, turn)


# ----------------------------------------------------------------------------------------------------------------------
# Anatomy. z: hip joints 1, navel 16, diaphragm 35, heart 40, lung tips 57 cm.

SIDES = ("_r", "_l")
SKELETON = [
    *both("muscle", [(3.6, 4.6, 26), (4.4, 4.6, 14), (7, -1.5, 4), (9, -2, -3)], 1.8),
    *both("muscle", (3.9, 9, 30), (3.2, 1.9, 30)), *both("bone", (9.3, 2.3, 11), (6.6, .95, 6.5), 120),
    ("bone", (0, 7.8, 3.5), (4.8, 1.9, 6)), *both("bone", (8.6, .5, 1.6), (3.4, 3.7, 3.6)),
    *both("bone", [(9.5, .5, 1), (13, 1.5, -1)], 1.4), *both("bone", (13, 2, -3), (2.1, 2.4, 3.5)),
    *both("bone", [(7, 3, 0), (6.3, 4.5, -6)], 1.4), *both("bone", [(7, -2, .5), (4, -5, -.5), (.7, -5.9, -2)], 1.),
    *both("femur", (9.5, .4, 1.3), (2.4, 2.4, 2.4), 0, SIDES), *both("bone", (11, 7.3, 49), (4.3, .6, 6.5), -25),
    *both("bone", [(1.6, -7, 54.5), (8, -6, 57), (15, -1, 57)], .75), *both("bone", (16, .5, 56), (2.4, 2.4, 2.6))]
HIPS = [side for row in (
    ((8, 7.6, 1), (5.4, 2.2, 8), 28), ((13, 2.8, 7), (5.8, 1.9, 6), 112), ((9.2, -.5, 9), (4.4, 1.5, 6), 120),
    ((10.5, -6.3, -1), (2.7, 1.9, 7), 15), ((14.3, -3, -1), (1.5, 2.6, 6), -20), ((6, -5.8, -5), (2.8, 2.4, 4)),
    ((5.8, -1, -3.2), (3, 1.6, 1.8), 20), ((10.5, 4.6, -2), (3.2, 1.6, 4), 10), ((4, 9.6, 12), (3.4, 1.6, 8)))
    for side in both("muscle", *row)]
PELVIS = [
    ("rectum", [(0, 6, -5), (0, 4.6, 0), (0, 5.2, 5), (.5, 6, 9)], 1.8),
    ("rectum.gas", [(0, 5.2, -5), (0, 4.2, 0), (0, 4.8, 5), (.5, 5.6, 9)], .9), *both("muscle", (5.3, .5, -.5), (1.1, 4, 3.8)),
    *both("muscle", (2.6, 3, -4), (.6, 3, 3), -20), ("bladder", (0, -3.2, 3.8), (4.2, 3, 3.2)),
    *both("seminal", (2, 1.2, 1.8), (2, .8, .8), -15), ("prostate.zone", (0, 0, -1), (3, 2.3, 2.8)),
    ("prostate", (0, -.8, -.8), (2.1, 1.6, 2.3))]
ABDOMEN = [
    ("colon", [(-11.3, 1.5, 6), (-11.3, 2, 20)], 2.2), ("colon", [(11.5, 1.5, 24), (11.6, 3, 8)], 1.6),
    ("colon", [(-11, -1, 20), (-6, -7, 18), (0, -8, 16), (7, -7, 19), (10.5, -1, 24)], 1.9),
    ("colon", [(11.5, 1, 8), (7, -3, 6), (2, -1, 9), (0, 5.5, 9)], 1.5), ("stomach", (6.5, .8, 32), (4.2, 4.3, 4.3)),
    ("stomach", [(8, -1, 31), (7.3, -5, 27), (3, -7, 23.5), (-2, -5.5, 23)], 2.6),
    ("spleen", (10.2, 4.2, 28.5), (5.3, 3.1, 5.5), 119), ("liver", (-7.5, .5, 28.5), (8.3, 8.6, 9.5)),
    ("liver", (0, -5.5, 30.5), (8, 4, 4)), *both("kidney", (6.2, 4.9, 21.3), (2.9, 2.6, 5.4), 35, SIDES),
    *both("adrenal", [(2.9, 2.8, 28.8), (4.4, 4.8, 27)], .55, 0, SIDES),
    ("duodenum", [(-2, -4, 23.5), (-5, -2.5, 23), (-5.2, 0, 20), (-3, 1.2, 17.5), (2, .3, 18.5)], 1.25),
    ("pancreas", [(-3, -1.2, 20.5), (-2.6, -1.8, 22.5), (0, -2.8, 24), (4, -.6, 25.5), (8.8, 2.2, 27)], 1.35),
    ("portal", [(8.5, 1.2, 26.2), (2, -1, 24.8), (-1.5, -.8, 23.5), (-4, -1.5, 28), (-7, -2.5, 29)], .75),
    ("gallbladder", (-5.6, -4.6, 22.3), (1.8, 2.5, 3))]
CHEST = [
    ("heart", (2, -3, 39.5), (7, 6.6, 7)), ("myocardium", (4.6, -3, 38.5), (4.2, 3.7, 4.6), -40),
    ("rv", (-.2, -6, 38.5), (4.2, 2.1, 4.3), -15), ("ra", (-3.6, -2.6, 40), (2.4, 3, 3.6)),
    ("lv", (4.4, -2.8, 38.7), (3, 2.3, 3.6), -40), ("pa", [(1, -5, 43), (1.6, -2.6, 46.5), (-4.5, 1, 47.5)], 1.3),
    ("pa", [(1.6, -2.6, 46.5), (5.5, 1, 48)], 1.2), ("la", (.6, .3, 42), (4.3, 2.6, 3.6)),
    ("la", (4.4, -.8, 43.5), (1.8, 1, 1.3), -60), *both("la", [(2.5, 1, 43), (5, 1.6, 43.6), (8, 2.6, 44)], .85),
    *both("la", [(2.5, 1.6, 41), (5.5, 3, 40.6), (8, 4.2, 40)], .85)]
PIPES = [
    ("ivc", [(-2, 2, 12), (-2.4, 2, 24), (-3, .8, 33), (-3, -.6, 38)], 1.25), ("vessel", [(-3.4, -2, 42), (-3, -1.5, 55)], 1.),
    *both("vessel", [(.9, 2.3, 14), (3.5, 2.6, 10), (6.5, -2, 3), (7, -5, -4)], .75),
    ("airway", [(0, 1, 63), (.2, 2, 49.5)], .9), *both("airway", [(.2, 2, 49.5), (5, 2.6, 46)], .65),
    ("esophagus", [(.3, 3.2, 61), (.6, 3.9, 46), (1.5, 2.8, 36), (3.5, 1.6, 33)], .85),
    ("aorta", [(-.8, -2.4, 41.5), (-1.8, -2.8, 49), (0, -.2, 52.3), (2.3, 3.6, 50.5), (2.6, 4.2, 48), (2.3, 4.2, 36), (.9, 2.6, 26),
               (.7, 2.2, 14)], 1.25)]


def torso(s):
    """Paint the trunk from hips to neck into a scene: wall, skeleton, lungs above the diaphragm, organs below it, vessels."""
    x, y, z = s.x, s.y, s.z
    at = lambda heights, values: np.interp(z, heights, values).astype(np.float32)
    a = at((-8, 2, 16, 40, 50, 57, 60, 62), (17.5, 18, 15.3, 16.5, 17.5, 18.5, 10, 7))                # half width, half depth
    b = at((-8, 2, 16, 40, 50, 56, 62), (11, 11.5, 10.5, 11.8, 11.3, 9, 7))
    u, v = (x / a) ** 2, (y / b) ** 2
    depth = (1 - .5 * (np.sqrt(u + v) + np.sqrt(np.sqrt(u * u + v * v)))) * (a + b) / 2               # cm under the skin, about
    fat = s.rng.uniform(.7, 2.2) * (1 + .25 * s.grain[0] * (z < 20) - .3 * (z > 44))
    wall = fat + at((20, 30, 44, 50, 54, 58), (1.1, 1.4, 1.5, 2.6, 4.6, 8))                           # thick at the shoulders
    s.fill("table", (depth < -.4) & (np.abs(y - 13.2 + .012 * x * x) < .45) & (np.abs(x) < 21))
    s.fill("skin", depth > 0)
    s.fill("fat", depth > .2)
    s.fill("muscle", (depth > fat) & ((z > 9) | (y < -3) & (depth < wall)))
    s.free = (depth > fat) & (z < 12)
    s.paint(*HIPS)
    s.free = None
    funnel = np.hypot(x / at((-3, 3, 15), (4.3, 6.3, 17)), (y + .5) / at((-3, 3, 15), (5, 6.8, 14)))   # the pelvis narrows
    cavity = (depth > wall) & (funnel < 1) & (z < 57.5)
    s.fill("fat", cavity)
    shell = (depth > wall - .9) & (depth < wall) & (z > 22)
    along = (z + .55 * (6 - y) - .1 * np.abs(x)) % 3.2 / 3.2                                          # ribs slope down to the front
    s.fill("rib", shell & (along < .42) & (np.abs(x) > 2.2) & (z < 57) & (y > -9 + (z < 36) * 6))
    s.fill("bone", shell & (np.abs(x) < 1.9) & (y < 0) & (z > 37) & (z < 53))                         # breastbone
    s.paint(*SKELETON)
    back, spine = y - at((0, 8, 16, 40, 62), (9, 6.6, 5.2, 6.4, 4.4)), (z > 7) & (depth > .6)         # behind the spine's curve
    column, canal = np.hypot(x / 1.15, back), np.hypot(x, back - 3)
    s.fill("bone", spine & ((column < 2) | (canal < 1.7) | (np.abs(x) < .45) & (back > 0) & (back < 5.5)))
    s.fill("bone", spine & (np.abs(x) < 4.2) & (np.abs(back - 2.6) < .55) & (z % 3 > 1.5))            # transverse processes
    s.fill("marrow", spine & (column < 1.55))
    s.fill("disc", spine & (column < 1.9) & (z % 3 < .6))
    s.fill("cord", spine & (canal < .95))
    cavity &= ~s.is_("bone", "marrow", "disc", "cord", "muscle")
    chest = cavity & (z > 36.5 - .1 * ((np.abs(x) - 7.5) ** 2 + (y + 1) ** 2) - (x > 0))              # above two domes
    between = at((36, 48, 55), (2.2, 2.4, 2.8)) * (.45 + .6 * np.exp(-((y - 1) / 4.5) ** 2))          # half width of the mediastinum
    s.fill("lung", chest & (np.abs(x + .3 * s.grain[0]) > between))
    s.fill("lung.vessel", s.is_("lung") & (np.abs(s.grain[0]) < .16) & (np.abs(s.grain[1]) < .5))
    s.free = chest
    s.paint(*CHEST)
    s.free = cavity & ~chest
    loops = np.cos(np.pi * (x / 3 + .45 * s.grain[0])) * np.cos(np.pi * (y / 3 + .45 * s.grain[1]))
    s.fill("bowel", s.free & (z > 4) & (z < 21) & (np.hypot(x / 10, (y + 2) / 7) < 1) & (np.abs(loops) > .12))
    s.paint(*ABDOMEN)
    for side, sign in zip(SIDES, (-1, 1)):
        s.fill(f"kidney{side}.sinus", s.is_(f"kidney{side}") & (np.hypot(x - 5.1 * sign, y - 4) < 1.5) & (np.abs(z - 21.3) < 3))
    s.fill("stomach.gas", s.is_("stomach") & (y < s.rng.uniform(-6.5, -4)))                           # patients lie on their back
    s.fill("colon.gas", s.is_("colon") & (s.grain[1] > .5))
    for organ in ("liver", "spleen"):
        s.fill(organ + ".vessel", s.is_(organ) & (np.abs(s.grain[0]) < .1) & (np.abs(s.grain[1]) < .5))
    s.free = None
    s.paint(*PELVIS, *PIPES)
    return s


def trunk(rng, low, high, slices, fov=(34, 42), size=(112, 144), **view):
    """A torso seen from about z = low to high in `slices` slices, each time with another field of view (cm) and matrix."""
    z = np.linspace(low + rng.uniform(-2, 2), high + rng.uniform(-2, 2), slices)
    return torso(Scene(rng, z, 8 * int(rng.integers(size[0] // 8, size[1] // 8 + 1)), rng.uniform(*fov), **view))


def brain(s, tumour=False, enhancing=True, plaques=0, head=False):
    """Paint a brain, z 0 under the ventricles; tumour: edema, enhancing rim, dead core; plaques: how many; head: with skull."""
    x, y, z = s.x, s.y, s.z
    for name, grow in (("scalp", 1.3), ("skull", .9), ("csf", .3)) if head else ():
        s.fill(name, (x / (6.7 + grow)) ** 2 + (y / (8.5 + grow)) ** 2 + (np.maximum(z - 1, 0) / (6.8 + grow)) ** 2 < 1)
    fold = .8 * s.grain[0] + .25 * s.grain[1]
    level = np.sqrt((x / 6.7) ** 2 + (y / 8.5) ** 2 + (np.where(z > 1, z - 1, (1 - z) * .8) / 6.8) ** 2) + .012 * s.grain[1]
    depth = 6.8 * (1 - level)                                                                         # cm under the surface
    s.fill("white", level < 1)
    s.fill("gray", (level < 1) & ((depth < .45) | (np.abs(fold) < .42) & (depth < 2.4)))
    s.fill("csf", (level < 1) & (np.abs(fold) < .13) & (depth < 1.9) & (depth > .15))                 # furrows
    s.fill("csf", (level < 1) & (np.abs(x + .1 * s.grain[1]) < .16) & (np.abs(y) > 3.4) & (z > -2))   # between the halves
    s.free = level < 1
    s.paint(*both("deep", (1.6, -1.6, 2.2), (.75, 2.2, 1.8), -20), *both("deep", (1.3, 1.2, 1.3), (1.1, 1.6, 1.3), 20),
            *both("deep", (2.9, -.3, 1), (.85, 2.1, 1.5), 12), ("csf", (0, .8, .8), (.28, 1.5, 1.2)),
            *both("csf", [(.9, -3.4, 2.6), (.8, -1, 3.4), (1.2, 1.6, 3.2), (2.3, 3.8, 1.6)], .62),
            *both("csf", [(2.3, 3.8, 1.6), (3, 2, -1)], .5))
    s.free = (level < 1) & (z < -2)                                                                   # cerebellum, brain stem
    s.paint(*both("csf", (2.5, 4.4, -3.9), (3.7, 3.4, 2.9)), *both("gray", (2.5, 4.6, -3.9), (3.1, 2.7, 2.4)),
            *both("white", (2.3, 4.4, -3.9), (1.7, 1.3, 1.7)), ("white", (0, 1.7, -4), (1.5, 1.4, 3.5)))
    s.free = level < 1
    if tumour:
        site, radius = s.rng.uniform((2.2, -4.5, 1), (4.2, 4.5, 4)) * (s.rng.choice((-1, 1)), 1, 1), s.rng.uniform(1.3, 3)
        s.jitter, s.rough = 0, .22
        for name, r in (("edema", radius), ("enhancing", .6 * radius), ("core", .42 * radius)):
            if enhancing or name != "enhancing":
                s.paint((name, site, (r, r * s.rng.uniform(.8, 1.3), r)))
    s.free = None
    if plaques:
        s.lesions("white", "plaque", plaques, (.2, .6))
    return s


def heart(s, squeeze=0.):
    """Paint a heart in short axis and the chest around it, z 0 at the tip, 7 at the base; squeeze: 0 filled (ED) .. 1 (ES)."""
    s.paint(("fat", (0, 3, 4), (15, 12.6, 99)), ("muscle", (0, 3, 4), (13.6, 11.2, 99)), ("lung", (0, 3, 4), (12.4, 10, 99)))
    s.fill("bone", s.is_("muscle") & ((np.arctan2(s.y - 3, s.x) * 3.5 + .4 * s.z) % 1.6 < .6))        # ribs, cut across
    s.paint(("muscle", (2.5, 12, 4), (6, 3.2, 99)), ("bone", (3, 10.8, 4), (2.1, 1.9, 99)), ("aorta", (5.2, 8.4, 4), (1.2, 1.2, 99)),
            ("liver", (-6.5, 9, 1.5), (8.5, 5.5, 3.6)), ("stomach", (8, 9, .5), (4, 3.5, 3)),
            ("stomach.gas", (8.4, 8, .5), (2.5, 2, 2.4)), ("fat", (-3, -6.5, 4), (5.5, 2.4, 99)))
    s.jitter, w, r, m = .35 * s.jitter, 2.3 - .7 * squeeze, 1 - .18 * squeeze, 3.3 - .15 * squeeze
    s.paint(("heart", (-.6, .2, 3.4), (6.3, 5, 6.4), 20), ("wall", (-2.5, -.9, 4.2), (4 * r, 3.3 * r, 5.2), 25),
            ("rv", (-2.5, -.9, 4.3), (3.6 * r, 2.9 * r, 4.8), 25), ("myo", (.8, .5, 4.4), (m, m, 5)),
            ("lv", (.8, .5, 4.7), (w, w, 4.2)))
    s.free = s.is_("lv")
    s.paint(("lv.papillary", (-.3, 1.6, 3.5), (.55, .5, 2)), ("lv.papillary", (1.9, 1.5, 3.5), (.5, .55, 2)))
    return s


def hippocampus(s, side):
    """Paint the temporal lobe around one hippocampus (side: -1 right, 1 left): front (head) and back (body, tail)."""
    s.fill("white", True)
    s.fill("gray", np.abs(s.grain[0]) < .35)
    s.fill("csf", (np.abs(s.grain[1]) < .12) | (s.x * side < -1.3))
    path, s.jitter = np.array([(-.2, -1.5, -.2), (.25, -.7, -.3), (.35, .4, 0), (-.2, 1.5, .6)]) * (side, 1, 1), 0
    s.paint(("csf", path + (.35 * side, 0, .25), .35), ("hippocampus.back", path, .42), ("hippocampus.front", path[:2], .62))
    s.fill("hippocampus.back", s.is_("hippocampus.front") & (s.y > s.rng.uniform(-.7, -.2)))
    return s


# ----------------------------------------------------------------------------------------------------------------------
# Modalities


def ct(s, noise=12., contrast=None, table=TORSO):
    """Scene -> HU, float32 (z, y, x); noise: HU; contrast: phase 0..1, by default any."""
    phase, hu = s.rng.uniform(.1, 1) if contrast is None else contrast, np.full(len(NAMES), -1000, np.float32)
    for name, row in table.items():
        hu[CODE[name]] = row[0] + (row[1] * phase if table is TORSO else 0) + s.rng.normal(0, 4)
    return blur(hu[s.tissue] + 6 * s.grain[0] * (s.tissue > 0) + 2 * noise * s.rng.standard_normal(s.shape, np.float32))


def mr(s, table, column, bias=.25, noise=.03, top=1000):
    """Scene -> MR, float32 (z, y, x), about 0..top, of one column of a tissue table: jittered contrast, bias field, Rician noise."""
    value = np.zeros(len(NAMES), np.float32)
    for name, row in table.items():
        value[CODE[name]] = max(row[column] * (1 + s.rng.normal(0, .06)), 0)
    image = blur(value[s.tissue] * (1 + .06 * s.grain[1])) * np.exp(bias * smooth(s.rng, s.shape, (1, 2, 2)))
    a, b = noise * s.rng.standard_normal((2, *s.shape), np.float32)
    return top * np.hypot(image + a, b)


def speckle(rng, echo):
    """Echo strength (rows, columns) -> log-compressed ultrasound 0..1 with multiplicative speckle."""
    wave = blur(rng.standard_normal((2, *echo.shape), np.float32))
    return np.clip(.62 + .2 * np.log(echo * (np.hypot(*wave / wave.std()) + .15)), 0, 1)


def micro_ultrasound(rng, frames=12, rows=160, columns=224):
    """-> image uint8 0..254, prostate bool, both (frames, rows, columns): a probe below, swept through the gland."""
    v, u = (np.mgrid[:rows, :columns] - np.array((rows, columns))[:, None, None] / 2) / rows          # -.5 .. .5 of the height
    foot = rng.uniform(.75, .95)
    near, r = foot - .45, np.hypot(u, v - foot)
    fan = (r > near) & (r < near + .9) & (np.abs(np.arctan2(u, foot - v)) < .75)
    (cu, cv), (a, b) = rng.uniform((-.36, -.2), (.36, .17)), rng.uniform(.13, .3) * np.array((rng.uniform(1.1, 1.6), 1))
    turn, lumps, images, masks = rng.uniform(-.5, .5), smooth(rng, (frames, rows, columns), (2, 5, 5)), [], []
    for at, lump in zip(np.linspace(-1, 1, frames), lumps):
        du, dv = u - cu - .05 * at, v - cv
        du, dv = (du * np.cos(turn) + dv * np.sin(turn)) / a, (dv * np.cos(turn) - du * np.sin(turn)) / b
        level = np.hypot(du, dv) / np.sqrt(1.05 - at ** 2) + .09 * lump
        echo = .5 * np.exp(.35 * lump) * (1 + .3 * np.sin(45 * (v - foot) + 2 * lump) ** 8)
        inner, urethra = np.hypot(du, dv + .25) < .55, np.hypot(a * du, b * (dv + .2)) < .02
        for where, value in ((level < 1.12, 1.5), (level < 1, .33), (inner & (level < .95), .17), (urethra & (level < .9), .03)):
            echo[where] = value                                                                       # capsule, gland, its parts
        images.append(speckle(rng, echo * np.exp(-1.3 * (r - near)) + 2 * np.exp(-((r - near) / .02) ** 2)) * fan)
        masks.append((level < 1) & fan)
    return (254 * np.array(images)).astype(np.uint8), np.array(masks)


def nerve_ultrasound(rng, rows, columns):
    """-> image uint8, label uint8 (1 nerve, 2 vessel), both (rows, columns): layers of muscle, fascia, vessels, nerves."""
    v, u = (np.mgrid[:rows, :columns] / np.array((rows, columns))[:, None, None]).astype(np.float32)
    noise = lambda *cells: smooth(rng, (rows, columns), cells)
    bend, echo = .03 * noise(2, 3) + rng.uniform(-.12, .12) * u, .25 * np.exp(.5 * noise(14, 5))
    label = np.zeros((rows, columns), np.uint8)
    for depth in rng.uniform(.08, .9, 9):
        echo += rng.uniform(.5, 2.5) * np.exp(-((v - depth - bend) / .006) ** 2) * (noise(2, 4) > -.6)
    for kind in rng.permutation([1, 2] + [1] * rng.integers(2) + [2] * rng.integers(3)):
        (cv, cu), tilt, b = rng.uniform((.18, .1), (.75, .9)), rng.uniform(-.5, .5), rng.uniform(.05, .11)
        a, du, dv = b * rng.uniform(1, 1.8), u - cu, v - cv
        level = np.hypot((du + tilt * dv) / a, (dv - tilt * du) / b) + .07 * noise(5, 5)
        if label[level < 1.15].any():
            continue
        if kind == 1:                                                                                 # honeycomb in a bright sheath
            comb = .12 + .9 * (np.cos(2 * np.pi * du / .022) * np.cos(2 * np.pi * dv / .022) > .1)
            echo = np.where(level < 1, comb, np.where(level < 1.15, 1.6, echo))
        else:                                                                                         # black, bright wall, echo below
            echo = np.where((np.abs(du) < .8 * a) & (dv > 0), echo * 1.9, echo)
            echo = np.where(level < 1, .012, np.where(level < 1.12, 1.2, echo))
        label[level < 1] = kind
    return (255 * speckle(rng, echo * np.exp(-1.6 * v)) * ((v > .04) & (v < .95))).astype(np.uint8), label


def chest_xray(rng, rows, columns):
    """-> image uint8, left lung bool, right lung bool, all (rows, columns): a torso projected front to back, then placed."""
    s = torso(Scene(rng, np.linspace(19, 64, 150), (36, 140), 44., shift=0, zoom=(.95, 1.05), turn=4, jitter=.25))
    s.tissue[s.is_("table")] = 0
    ray = lambda a: s.spacing[1] / 10 * a.sum(1)[::-1]                                                # (z, y, x) -> (z, x), head up
    path = ray(np.clip(ct(s, 0, .1) + 1000, 0, 2000) / 1000 + 2.2 * s.is_("rib", "bone"))
    field = (ray(s.is_("lung", "lung.vessel")) > 3) & (blur(ray(s.is_(*[row[0] for row in CHEST + ABDOMEN]))) < 5)
    left, image = s.x.mean((0, 1)) > 0, np.clip(path / np.percentile(path, 97), 0, 1) ** rng.uniform(.65, 1.1)
    angle, zoom, move = np.deg2rad(rng.uniform(-22, 22)), rng.uniform(.7, 1.3), rng.uniform(-.2, .2, 2)
    v, u = ((np.mgrid[:rows, :columns] - np.array((rows, columns))[:, None, None] / 2) / rows - move[:, None, None]) / zoom
    v, u = v * np.cos(angle) - u * np.sin(angle), u * np.cos(angle) + v * np.sin(angle)
    at = np.clip(np.rint(150 * v + 75).astype(int), 0, 149), np.clip(np.rint(150 * u + 70).astype(int), 0, 139)
    image = blur(image[at]) * rng.uniform(.8, 1) + .02 * rng.standard_normal((rows, columns))
    return (255 * np.clip(image, 0, 1)).astype(np.uint8), (field & left)[at], (field & ~left)[at]


# ----------------------------------------------------------------------------------------------------------------------
# File formats. Volumes come as (z, y, x), LPS; spacing is mm, (x, y, z).


def save(path, content):
    """A picture (uint8, uint16, bool; (rows, columns[, 3])) as PNG, text and bytes as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        text = content if isinstance(content, (str, bytes)) else json.dumps(content, indent=1)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def save_csv(path, rows):
    """A list of dicts with the same keys as a table with a header line."""
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def save_nifti(path, volume, spacing, codes="RAS", dtype=np.int16, form="both", scale=None):
    """(z, y, x) or (t, z, y, x) -> NIfTI with its axes along `codes` and the affine to match.

    form: "both", "qform" or "sform" (the code of the other is 0); scale: (slope, intercept) kept in the header.
    """
    to, data, affine = nib.orientations, volume.T, np.diag([-spacing[0], -spacing[1], spacing[2], 1.])  # data: (x, y, z[, t])
    affine[:2, 3] = [(n - 1) / 2 * mm for n, mm in zip(data.shape[:2], spacing)]                      # 0 0 0: middle, lowest slice
    turn = to.ornt_transform(to.io_orientation(affine), to.axcodes2ornt(codes))
    image = nib.Nifti1Image(data.astype(np.float32), affine).as_reoriented(turn)
    data = np.asarray(image.dataobj) if scale is None else (np.asarray(image.dataobj) - scale[1]) / scale[0]
    if np.issubdtype(dtype, np.integer):
        data = np.clip(np.rint(data), np.iinfo(dtype).min, np.iinfo(dtype).max)
    out = nib.Nifti1Image(data.astype(dtype), image.affine)
    out.set_qform(image.affine, 0 if form == "sform" else 1)
    out.set_sform(image.affine, 0 if form == "qform" else 1)
    if scale:
        out.header.set_slope_inter(*scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.to_filename(path)


def save_itk(path, volume, spacing, dtype, tilt=0.):
    """(z, y, x) -> .mhd with its .raw, or .nrrd; tilt: degrees about the left-right axis."""
    image, c, s = sitk.GetImageFromArray(np.rint(volume).astype(dtype)), np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=path.suffix == ".nrrd")


def save_dicom(folder, hu, spacing, rng, tags):
    """(z, y, x) HU -> one .dcm a slice, stored 0..4095 with intercept -1024; the numbers in file names are not in slice order."""
    folder.mkdir(parents=True, exist_ok=True)
    series = f"1.2.826.0.1.3680043.8.498.{rng.integers(10**15)}"
    corner = [-(n - 1) / 2 * mm for n, mm in zip(hu.shape[:0:-1], spacing)]
    for k, number in enumerate(rng.permutation(len(hu)) + 1):
        image, writer = sitk.GetImageFromArray(np.clip(np.rint(hu[k]), -1024, 3071).astype(np.int16)), sitk.ImageFileWriter()
        image.SetSpacing(spacing[:2])
        for key, value in {
                **tags, "0008|0060": "CT", "0008|0020": "20180821", "0008|0030": "120000", "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
                "0020|000e": series, "0008|0018": f"{series}.{k + 1}", "0020|0013": k + 1, "0018|0050": f"{spacing[2]:.2f}",
                "0020|0032": "{:.3f}\\{:.3f}\\{:.3f}".format(*corner, k * spacing[2] - 100), "0020|0037": "1\\0\\0\\0\\1\\0",
                "0028|1052": -1024, "0028|1053": 1}.items():
            image.SetMetaData(key, str(value))
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"1-{number:0{len(str(len(hu)))}d}.dcm"))
        writer.Execute(image)


JUNK = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(96)                                # what macOS leaves as ._name

# ----------------------------------------------------------------------------------------------------------------------
# Datasets, each write_x(out, seed)

AMOS = numbered("spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc pancreas adrenal_r adrenal_l duodenum "
                "bladder prostate")
BTCV = numbered("spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc portal pancreas adrenal_r adrenal_l")
WORD = numbered("liver spleen kidney_l kidney_r stomach gallbladder esophagus pancreas duodenum colon bowel adrenal_r+adrenal_l "
                "rectum bladder femur_l femur_r")


def write_amos(out, seed, cases, scene, image):
    """AMOS22 holds CT and MR in one folder; dataset.json lists whatever lies there. scene(rng) -> Scene, image(Scene) -> volume."""
    root = out / "amos22"
    for part, case in [(part, case) for part, ids in cases.items() for case in ids]:
        s, name = scene(generator(seed, "amos", case)), f"amos_{case:04d}.nii.gz"
        codes = {508: "RAS", 510: "LSP"}.get(case, "LAS")
        save_nifti(root / f"images{part}" / name, image(s), s.spacing, codes, form="qform")
        dtype = np.uint16 if case in (13, 514) else np.uint8
        if part != "Ts":
            save_nifti(root / f"labels{part}" / name, labels(s.tissue, AMOS), s.spacing, codes, dtype, "qform")
    lists = {}
    for key, part in (("training", "Tr"), ("validation", "Va"), ("test", "Ts")):
        names = [f.name for f in sorted((root / f"images{part}").glob("amos_*"))]
        lists[key] = [{"image": f"./images{part}/{n}", **({"label": f"./labels{part}/{n}"} if part != "Ts" else {})} for n in names]
    spelt = {"aorta": "arota", "ivc": "postcava", "prostate": "prostate/uterus"}
    save(root / "dataset.json", {
        "name": "AMOS", "licence": "", "modality": {"0": "CT", "1": "MRI"}, **lists, "numTraining": len(lists["training"]),
        "numTest": len(lists["test"]), "labels": {"0": "background", **{str(i): spelt.get(n, n) for n, i in AMOS.items()}}})
    save(root / "readme.md", "Stand-in for AMOS22.\n")
    save(out / "__MACOSX/amos22/imagesTr/._amos_0001.nii.gz", JUNK)
    save(root / "imagesTr/._amos_0004.nii.gz", JUNK)


def write_amos_ct(out, seed):
    write_amos(out, seed, {"Tr": (1, 4, 5, 9, 15), "Va": (8, 13), "Ts": (2,)}, lambda rng: trunk(rng, -3, 37, 20), ct)


def write_amos_mri(out, seed):
    write_amos(out, seed, {"Tr": (507, 508, 510, 514, 600), "Va": (575, 583)}, lambda rng: trunk(rng, 14, 36, 14),
               lambda s: mr(s, TORSO, s.rng.choice((2, 3))))


def write_word(out, seed):
    root = out / "WORD-V0.1.0"
    for part, case in [*[("Tr", c) for c in (2, 3, 4, 6, 9)], ("Val", 1), ("Val", 7), ("Ts", 14)]:
        s, name = trunk(generator(seed, "word", case), -3, 37, 20), f"word_{case:04d}.nii.gz"
        save_nifti(root / f"images{part}" / name, ct(s), s.spacing, "LPS", form="qform")
        label, dtype = labels(s.tissue, WORD), np.uint16 if case == 4 else np.uint8
        if part != "Ts":
            save_nifti(root / f"labels{part}" / name, label, s.spacing, "LPS", dtype, "qform")
        if case == 2:                                                                                 # a few strokes, not the truth
            save_nifti(root / "scribblesTr" / name, label * (s.grain[0] > 1.5), s.spacing, "LPS", np.uint8, "qform")
    save(root / "dataset.json", {"name": "WORD", "modality": {"0": "CT"}, "labels": {str(i): n for n, i in WORD.items()}})
    save(root / "__MACOSX/._imagesTr", JUNK)


def write_btcv(out, seed):
    root = out / "Abdomen/RawData"
    for case in (1, 2, 5, 21, 24, 35, 38, 61):
        s, part = trunk(generator(seed, "btcv", case), 14, 38, 18), "Testing" if case > 60 else "Training"
        if case == 5:
            s.tissue[s.is_("gallbladder")] = CODE["liver"]
        stored = dict(dtype=np.uint16, scale=(.5, -1024.)) if case == 2 else {}
        save_nifti(root / part / f"img/img{case:04d}.nii.gz", ct(s, contrast=s.rng.uniform(.5, .9)), s.spacing, "LAS", **stored)
        if case < 60:
            save_nifti(root / part / f"label/label{case:04d}.nii.gz", labels(s.tissue, BTCV), s.spacing, "LAS", np.uint8)
    save(root / "Training/img/._img0001.nii.gz", JUNK)


def write_microsegnet(out, seed):
    root = out / "Micro_Ultrasound_Prostate_Segmentation_Dataset"
    for part, case in [*[("train", c) for c in (1, 2, 3, 5, 8)], ("test", 1), ("test", 2)]:
        image, mask = micro_ultrasound(generator(seed, "microsegnet", part, case))
        files = {"micro_ultrasound_scans/microUS": image, "expert_annotations/expert_annotation": mask}
        for folder, name, shift in [("non_expert", "nonexpert", 4)] if part == "train" else [
                ("clinician", "clinician", 2), ("master_student", "master_student", 4), ("medical_student", "medical_student", -5)]:
            files[f"{folder}_annotations/{name}_annotation"] = np.roll(mask, shift, 1)
        for name, volume in files.items():
            save_nifti(root / f"{part}/{name}_{part}_{case:02d}.nii.gz", volume, (1, 1, 1), "LPS", np.uint8)


def write_promise12(out, seed):
    for part, case in [*[("training", c) for c in (0, 2, 7, 13, 26)], *[("test", c) for c in (0, 1, 2)]]:
        s = trunk(generator(seed, "promise12", part, case), -5, 4.5, 16, (16, 26), (112, 144), shift=4., zoom=(.85, 1.2), bend=.4)
        image, folder, tilt = mr(s, TORSO, 3, bias=.3), out / f"PROMISE12/{part}_data", 8. if case == 7 else 0.
        if case == 13:
            image *= 1 + 4 * np.exp(-np.hypot(s.x, s.y - 3.5) / 2.5)                                  # endorectal coil
        save_itk(folder / f"Case{case:02d}.mhd", image, s.spacing, np.int16, tilt)
        if (part, case) != ("test", 2):
            save_itk(folder / f"Case{case:02d}_segmentation.mhd", labels(s.tissue, {"prostate": 1}), s.spacing, np.int8, tilt)


BRATS_TRAINING = ("00000-000", "00002-000", "00003-000", "00005-000", "00005-001", "00006-000", "00008-000")


def brats_subject(seed, case):
    """'00005-001' -> scene of that patient's brain, {modality: (z, y, x) int, background exactly 0}."""
    s = Scene(generator(seed, "brats", case[:5]), np.linspace(-5.2, 7.6, 22), 120, 24., 2., (.8, 1.15), bend=.25, grain=1.2)
    brain(s, tumour=True, enhancing=not case.startswith("00005"))
    s.rng = generator(seed, "brats", case)                                                            # another day, another scan
    scans = {m: mr(s, BRAIN, i + 1, noise=.025, top=s.rng.uniform(500, 4000)) for i, m in enumerate(("t1n", "t1c", "t2w", "t2f"))}
    return s, {m: np.where(s.tissue > 0, np.maximum(np.rint(scan), 1), 0) for m, scan in scans.items()}


def write_brats_gli(out, seed):
    top = "ASNR-MICCAI-BraTS2023-GLI-Challenge-{}Data"
    for part, cases in (("Training", BRATS_TRAINING), ("Validation", ("00001-000", "00001-001", "00013-000"))):
        for case in cases:
            root, (s, files) = out / top.format(part) / (top.format(part) if part == "Training" else ""), brats_subject(seed, case)
            if case == "00003-000":
                files["t1n"][0, :2] = -3
            if part == "Training":
                files["seg"] = labels(s.tissue, {"core": 1, "edema": 2, "enhancing": 3})
            for kind, volume in files.items():
                dtype = np.uint8 if kind == "seg" else np.int16
                save_nifti(root / f"BraTS-GLI-{case}/BraTS-GLI-{case}-{kind}.nii.gz", volume, s.spacing, "LPS", dtype)
    save(root / "BraTS2023_2017_GLI_Mapping.csv", "BraTS2023,BraTS2021\n")
    save(root / f"BraTS-GLI-{case}/._BraTS-GLI-{case}-t1n.nii.gz", JUNK)


def write_brats_local(out, seed):
    top = "ASNR-MICCAI-BraTS2023-Local-Synthesis-Challenge-"
    for part, cases in (("Training", BRATS_TRAINING), ("Validation", ("00001-000",))):
        for case in cases:
            s, scans = brats_subject(seed, case)
            grow = blur(blur(blur(s.is_("core", "edema", "enhancing").astype(np.float32))))           # by three voxels
            unhealthy, home = grow > 0, (s.tissue > 0) & (blur(blur(grow)) == 0)
            k, i, j = s.rng.permutation(np.argwhere(home & (np.abs(s.z - 2) < 3)))[0]
            level = np.sqrt((s.x - s.x[k, i, j]) ** 2 + 1.4 * (s.y - s.y[k, i, j]) ** 2 + (s.z - s.z[k, 0, 0]) ** 2)
            healthy = home & (level / s.rng.uniform(1.4, 2.4) + .2 * s.grain[0] < 1)
            files = {"t1n-voided": scans["t1n"] * ~(healthy | unhealthy), "mask": healthy | unhealthy}
            if part == "Training":
                files.update({"t1n": scans["t1n"], "mask-healthy": healthy, "mask-unhealthy": unhealthy})
            for kind, volume in files.items():
                dtype = np.float32 if part == "Validation" or kind == "t1n-voided" else np.int16 if kind == "t1n" else np.uint8
                form, folder = "qform" if dtype == np.float32 else "both", f"{top}{part}/BraTS-GLI-{case}"
                save_nifti(out / folder / f"BraTS-GLI-{case}-{kind}.nii.gz", volume, s.spacing, "LPS", dtype, form)


def write_ldct(out, seed):
    top, rows = out / "manifest-1648648375084", []
    for subject, *series in (
            ("L004", "Full dose images", "Low Dose Images", "Full Dose Projections"), ("L006", "Full Dose Images", "LOW DOSE IMAGES"),
            ("C052", "full dose images", "low dose images"), ("N012", "Full Dose Images", "Low dose images"),
            ("C001", "Full Dose Images")):
        rng, region, table = generator(seed, "ldct", subject), subject[0], BRAIN if subject[0] == "N" else TORSO
        low, high, slices, fov = {"L": (17, 36, 10, 38), "C": (34, 56, 10, 38), "N": (-1, 7, 6, 26)}[region]
        s = Scene(rng, np.linspace(low, high, slices) + rng.uniform(-1, 1), 128, fov * rng.uniform(.95, 1.1))
        s = brain(s, head=True) if region == "N" else torso(s)
        full = ct(s, 3, rng.uniform(.2, .9), table)
        grain, streaks = blur(rng.standard_normal(s.shape)), rng.standard_normal((slices, 128, 1))
        study, date = f"1.2.826.0.1.3680043.8.498.{rng.integers(10**15)}", "08-21-2018" if region == "N" else "08-21-2018-NA-NA"
        for name in series:
            dirt = (.3 if region == "N" else 1) * name.lower().startswith("low")
            hu = full + dirt * (25 * grain + 9 * streaks + 14 * rng.standard_normal(s.shape))
            hu = hu[:1] if "Projections" in name else hu
            folder = f"LDCT-and-Projection-data/{subject}/{date}-{study[-5:]}/1.000000-{name}-{rng.integers(10**4, 10**5)}"
            save_dicom(top / folder, hu, s.spacing, rng, {
                "0008|103e": name, "0010|0020": subject, "0010|0010": "Anonymous", "0020|000d": study,
                "0008|0070": "GE MEDICAL SYSTEMS" if subject == "C001" else "SIEMENS"})
            rows.append({"Subject ID": subject, "Study UID": study, "Study Date": "08-21-2018", "Series Description": name,
                         "Modality": "CT", "Number of Images": len(hu), "File Location": "./" + folder})
    save_csv(top / "metadata.csv", rows)


def write_chest_xray(out, seed):
    montgomery, kaggle = out / "MontgomerySet", out / "Lung Segmentation"
    for i, case in enumerate((
            "MCUCXR_0001_0", "MCUCXR_0002_0", "MCUCXR_0003_0", "MCUCXR_0005_0", "MCUCXR_0104_1", "MCUCXR_0108_1", "MCUCXR_0141_1",
            "MCUCXR_0150_1", "CHNCXR_0001_0", "CHNCXR_0004_0", "CHNCXR_0010_0", "CHNCXR_0327_1", "CHNCXR_0330_1", "CHNCXR_0025_0")):
        image, left, right = chest_xray(generator(seed, "chest_xray", case), *((192, 160), (160, 192), (176, 176))[i % 3])
        reading, file, chinese = "Patient's Sex: F\nPatient's Age: 040Y\nstand-in\n", f"{case}.png", case.startswith("CHN")
        if not chinese:
            for folder, content in (("CXR_png", image), ("ManualMask/leftMask", left), ("ManualMask/rightMask", right)):
                save(montgomery / folder / file, content)
            save(montgomery / f"ClinicalReadings/{case}.txt", reading)
        if chinese or i < 2:
            mask = 255 * (left | right).astype(np.uint8)
            save(kaggle / "CXR_png" / file, np.dstack([image] * 3) if case == "CHNCXR_0004_0" else image)
            save(kaggle / f"ClinicalReadings/{case}.txt", reading)
            if case != "CHNCXR_0025_0":
                half = slice(None, None, 2 if case == "CHNCXR_0010_0" else 1)
                save(kaggle / "masks" / (f"{case}_mask.png" if chinese else file), mask[half, half])
    save(kaggle / "test/CHNCXR_0040_0.png", chest_xray(generator(seed, "chest_xray", "CHNCXR_0040_0"), 160, 160)[0])
    save(out / "__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png", JUNK)
    save(montgomery / "ManualMask/leftMask/._MCUCXR_0001_0.png", JUNK)


def write_acdc(out, seed):
    for case in (1, 2, 3, 5, 8, 101, 104):
        name, ed, es, frames = f"patient{case:03d}", 4 if case == 3 else 1, 9 + case % 5, []
        folder = out / "ACDC/database" / ("training" if case <= 100 else "testing") / name
        for frame, squeeze in ((ed, 0), (es, 1)):
            rng = generator(seed, "acdc", case)                                                       # the same body, twice
            size, fov, slices = 8 * int(rng.integers(14, 20)), rng.uniform(21, 30), rng.integers(8, 11)
            s = heart(Scene(rng, np.linspace(-1.8, 7.8, slices), (size, size - 16), fov, 3.5, (.75, 1.15), 35, .4), squeeze)
            frames.append(mr(s, CINE, 0, bias=.35))
            save_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", frames[-1], s.spacing, form="sform")
            label = labels(s.tissue, {"rv": 1, "myo": 2, "lv": 3})
            save_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", label, s.spacing, "RAS", np.uint8, "sform")
        save_nifti(folder / f"{name}_4d.nii.gz", np.stack(frames), s.spacing, form="sform")
        group = ("NOR", "MINF", "DCM", "HCM", "RV")[case % 5]
        save(folder / "Info.cfg", f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 170.0\nNbFrame: 25\nWeight: 70.0\n")
        save(folder / "MANDATORY_CITATION.md", "Stand-in: nothing to cite.\n")


def write_la(out, seed):
    for i, case in enumerate((
            "07WDMSAV2VFSPTTYBPZY", "0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX", "5HH5BRS6LBFZQTBMAFRC", "CMPXO4J23G58J53Q98SZ",
            "4498CA6DZWELOXCBRYRF", "67W9VHOSUK9Z2UDA96WQ")):
        s = trunk(generator(seed, "la", case), 36.5, 47.5, 20, (19, 28), (112, 144), shift=3.5, zoom=(.8, 1.15), turn=25)
        folder, atrium = out / "LA2018" / ("Training Set" if i < 5 else "Testing Set") / case, s.is_("la")
        wall = (blur(atrium.astype(np.float32)) > 0) & ~atrium
        for name, volume in (("lgemri", np.minimum(mr(s, TORSO, 4, top=200), 255)), ("laendo", 255 * atrium), ("lawall", 255 * wall)):
            save_itk(folder / f"{name}.nrrd", volume, (1, 1, 1) if i == 1 else (.625,) * 3, np.uint8)
        if case == "CMPXO4J23G58J53Q98SZ":
            save(folder / "desktop.ini", "[.ShellClassInfo]\n")


MASS = dict(name="portal", core="bladder", over=[n for n in TORSO if n != "table"])  # with a bright rim and a dark middle, and as large as it likes
LESION_HOMES = {  # Coarse_lesion_type: its share of DeepLesion's lesions (Yan et al. 2018; the pelvis' are with the abdomen's), and how it is painted
    1: (.025, dict(organ="marrow", **MASS)), 2: (.31, dict(organ="bowel", **MASS)), 3: (.17, dict(organ="heart", **MASS)),
    4: (.13, dict(organ="liver", name="liver.tumour")), 5: (.24, dict(organ="lung", name="lung.tumour")),
    6: (.05, dict(organ="kidney_l", name="kidney_l.tumour")), 7: (.07, dict(organ="muscle", **MASS))}


def write_deeplesion(out, seed):
    root, rows, join = out / "DeepLesion", [], lambda *values: ", ".join(f"{v:g}" for v in values)
    for patient in (1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 14, 17, 19, 20, *range(22, 86)):
        part, size = 1 if patient < 11 or patient > 20 else 2 if patient < 17 else 3, 192 if patient == 4 else 144
        for picture, study in enumerate((1, 1, 2)):                                                   # three key slices a patient
            rng, body, found = generator(seed, "deeplesion", patient, picture), generator(seed, "deeplesion", patient), []
            z = rng.uniform(*((4, 19), (21, 34), (38, 52))[(patient + picture) % 3])
            s = torso(Scene(body, np.array((z - .5, z, z + .5)), size, body.uniform(34, 44)))
            s.rng, stem, key = rng, f"{patient:06d}_{study:02d}_01", int(20 + 2 * z)
            homes = [kind for kind, (_, how) in LESION_HOMES.items() if s.is_(how["organ"])[1].sum() > 40]
            often = np.array([LESION_HOMES[kind][0] for kind in homes])
            for kind in rng.choice(homes, min(len(homes), 1 + (rng.random() < .15)), False, often / often.sum()):
                before = s.tissue[1].copy()
                s.lesions(count=1, radius=(1.4, 3), **LESION_HOMES[kind][1])
                across, down = (np.flatnonzero((s.tissue[1] != before).any(axis)) + 1 for axis in (0, 1))   # 1-based
                if min(len(across), len(down)) > 6:
                    found.append((kind, across[0], down[0], across[-1], down[-1]))
            for k, hu in enumerate(ct(s, 8, rng.uniform(.6, 1))):
                if (patient, picture, k) != (2, 0, 2):                                                # that neighbour is missing
                    save(root / f"Images_png/{stem}/{key - 1 + k:03d}.png", (np.rint(hu).astype(np.int32) + 32768).astype(np.uint16))
            for kind, x1, y1, x2, y2 in found:
                xc, yc = (x1 + x2) / 2, (y1 + y2) / 2
                rows.append(dict(
                    File_name=f"{stem}_{key:03d}.png", Patient_index=patient, Study_index=study, Series_ID=1, Key_slice_index=key,
                    Measurement_coordinates=join(x1, yc, x2, yc, xc, y1, xc, y2),
                    Bounding_boxes=join(max(1, x1 - 5), max(1, y1 - 5), min(size - 1, x2 + 5), min(size - 1, y2 + 5)),
                    Lesion_diameters_Pixel_=join(max(x2 - x1, y2 - y1), min(x2 - x1, y2 - y1)),
                    Normalized_lesion_location=join(xc / size, yc / size, (z + 8) / 72), Coarse_lesion_type=-1 if part == 1 else kind,
                    Possibly_noisy=int((patient, picture) in ((3, 0), (10, 1), (17, 2))), Slice_range=join(key - 1, key + 1),
                    Spacing_mm_px_=join(*s.spacing), Image_size=join(size, size),
                    DICOM_windows="-1500, 500" if kind == 5 else "-175, 275", Patient_gender="FM"[patient % 2],
                    Patient_age="NaN" if patient == 7 else 40 + patient % 45, Train_Val_Test=part))
    save_csv(root / "DL_info.csv", rows)


def write_msd(out, seed, task, pattern, ids, scene, image, classes, modality="CT", codes="RAS", missing=(), dtypes={}):
    """An MSD task; the last of `ids` is the test case, without label. scene(rng) -> Scene, image(Scene) -> volume; classes: {tissue:
    label}; missing: ids listed without a label file; dtypes: {id: (of the image, of the label)}."""
    root, training = out / task, []
    for case in ids:
        s, name, part = scene(generator(seed, task, case)), pattern.format(case) + ".nii.gz", "Ts" if case == ids[-1] else "Tr"
        dtype, label_dtype = dtypes.get(case, (np.int16, np.uint8))
        save_nifti(root / f"images{part}" / name, image(s), s.spacing, codes, dtype)
        if part == "Tr":
            training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        if part == "Tr" and case not in missing:
            save_nifti(root / "labelsTr" / name, labels(s.tissue, classes), s.spacing, codes, label_dtype)
    spelt = {"liver.tumour": "cancer", "lung.tumour": "cancer", "hippocampus.front": "Anterior", "hippocampus.back": "Posterior"}
    save(root / "dataset.json", {
        "name": task.split("_")[1], "description": "stand-in", "reference": "", "licence": "", "relase": "0.0",
        "tensorImageSize": "3D", "modality": {"0": modality},
        "labels": {"0": "background", **{str(i): spelt.get(n, n) for n, i in classes.items()}},
        "numTraining": len(training), "numTest": 1, "training": training, "test": [f"./imagesTs/{name}"]})
    for folder in ("imagesTr", "labelsTr"):
        save(root / folder / f"._{pattern.format(ids[0])}.nii.gz", JUNK)


def write_msd_liver(out, seed):
    def scene(rng):
        return trunk(rng, 18, 37, 16, shift=3.5, turn=25).lesions("liver", "liver.tumour", rng.integers(2, 5), (.8, 2.2))
    write_msd(out, seed, "Task03_Liver", "liver_{}", (0, 1, 2, 5, 10, 11, 23, 131), scene, ct, {"liver": 1, "liver.tumour": 2})


def write_msd_lung(out, seed):
    def scene(rng):
        return trunk(rng, 30, 57, 18).lesions("lung", "lung.tumour", rng.integers(1, 4), (1, 2.5))
    write_msd(out, seed, "Task06_Lung", "lung_{:03d}", (1, 3, 4, 5, 6, 9, 10, 14, 2), scene, lambda s: ct(s, contrast=.1),
              {"lung.tumour": 1}, codes="LPS", missing=(14,))


def write_msd_spleen(out, seed):
    write_msd(out, seed, "Task09_Spleen", "spleen_{}", (2, 3, 6, 8, 9, 10, 12, 1), lambda rng: trunk(rng, 20, 37, 14),
              lambda s: ct(s, contrast=s.rng.uniform(.5, 1)), {"spleen": 1},
              dtypes={3: (np.float32, np.float32), 6: (np.int16, np.uint16)})


def write_msd_hippocampus(out, seed):
    def scene(rng):
        nx, ny, nz = map(int, rng.integers((32, 44, 30), (40, 56, 40)))                               # 1 mm voxels
        s = Scene(rng, (np.arange(nz) - nz / 2) / 10, (ny, nx), nx / 10, .7, (.8, 1.25), 25, .12, grain=1.)
        return hippocampus(s, rng.choice((-1, 1)))
    write_msd(out, seed, "Task04_Hippocampus", "hippocampus_{:03d}", (1, 3, 4, 6, 7, 8, 11, 14, 17, 20, 23, 2), scene,
              lambda s: mr(s, BRAIN, 1, top=s.rng.choice((130, 900))), {"hippocampus.front": 1, "hippocampus.back": 2}, "MRI",
              dtypes={1: (np.uint8, np.uint8), 3: (np.float32, np.float32)})


def write_nerve_ultrasound(out, seed):
    root = out / "Dataset801_NerveUltrasound"
    for case in (0, 1, 2, 3, 5, 6, 7, 8, 10, 13, 14, 17, 4, 9, 11, 12):
        rng, part = generator(seed, "nerve", case), "Ts" if case in (4, 9, 11, 12) else "Tr"
        image, label = nerve_ultrasound(rng, *8 * rng.integers(18, 26, 2))
        save(root / f"images{part}/us_{case:04d}_0000.png", np.dstack([image] * 3) if case % 5 == 3 else image)
        save(root / f"labels{part}/us_{case:04d}.png", label)
    save(root / "dataset.json", {"name": "NerveUltrasound", "channel_names": {"0": "ultrasound"}, "numTraining": 12,
                                 "labels": {"background": 0, "nerve": 1, "vessel": 2}, "file_ending": ".png"})


def write_ms_flair(out, seed):
    root = out / "Dataset802_MsT1ToFlair"
    for case in (7, 12, 19, 21, 3, 26):
        s = Scene(generator(seed, "ms", case), np.linspace(-4, 7.5, 16), (112, 96), 18., 1.5, (.8, 1.05), bend=.25, grain=1.2)
        brain(s, plaques=14)
        for folder, column, top, suffix in (("images", 1, 900, "_0000"), ("labels", 4, 160, "")):
            file = root / f"{folder}{'Ts' if case in (3, 26) else 'Tr'}/ms_{case:02d}{suffix}.nii.gz"
            scan = mr(s, BRAIN, column, top=top) + s.rng.normal(0, .012 * top, s.shape)               # dips below 0, as real ones
            save_nifti(file, scan.round(1), s.spacing, "LAS", np.float32, "qform")
    save(root / "dataset.json", {"name": "MsT1ToFlair", "channel_names": {"0": "T1"}, "labels": "image", "numTraining": 4,
                                 "file_ending": ".nii.gz"})


STAND_INS = {
    "amos_ct": write_amos_ct, "amos_mri": write_amos_mri, "word": write_word, "btcv": write_btcv,
    "microsegnet": write_microsegnet, "promise12": write_promise12, "brats_gli": write_brats_gli,
    "brats_local": write_brats_local, "ldct": write_ldct, "chest_xray": write_chest_xray, "acdc": write_acdc, "la": write_la,
    "deeplesion": write_deeplesion, "msd_liver": write_msd_liver, "msd_lung": write_msd_lung, "msd_spleen": write_msd_spleen,
    "msd_hippocampus": write_msd_hippocampus, "Dataset801_NerveUltrasound": write_nerve_ultrasound,
    "Dataset802_MsT1ToFlair": write_ms_flair}
SIXTEEN = list(STAND_INS)[:16]


def write(out, seed=0, datasets=None):
    """Write the stand-ins named in `datasets` (default: the sixteen) under `out`, best a new folder; the same (seed, dataset) gives
    the same files. Raises ValueError for a name that is not in STAND_INS."""
    datasets = SIXTEEN if datasets is None else list(datasets)
    if unknown := set(datasets) - set(STAND_INS):
        raise ValueError(f"no stand-in is called {sorted(unknown)}: choose from {', '.join(STAND_INS)}")
    for name in tqdm(datasets, desc="stand-ins", disable=None):
        STAND_INS[name](Path(out), seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, afterwards a --data_root")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other subjects")
    parser.add_argument("--datasets", nargs="+", default=SIXTEEN, choices=list(STAND_INS), metavar="NAME",
                        help="which to write, of " + ", ".join(STAND_INS))
    args, start = parser.parse_args(), time.time()
    write(args.out, args.seed, args.datasets)
    sizes = [f.stat().st_size for f in args.out.rglob("*") if f.is_file()]
    print(f"{len(args.datasets)} stand-ins, {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB in {args.out}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
