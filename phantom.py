"""Phantoms: drawn anatomy, written as small stand-ins for all sixteen datasets in their native layouts and file formats.

Why: the real sets need forms, passwords and terabytes. These let anyone run and test everything (readers, splits, store,
training) on a laptop in a minute, straight off `--data_root`, with the accidents of real downloads planted (`PLANTED`).
Subjects differ in place, size, turn, shape and contrast, so that copying another subject's label scores under 0.35 mIoU:
a model has to look. They are drawings, not data: no score on them says anything about patients.

How: one body, in centimetres, x to the patient's left, y to the back, z up (LPS). Organs are rows of a table, ellipsoids
and tubes painted one over another; a dataset is a view of a body (which slices, field of view, modality) plus a way of
saving it. CT chest, abdomen and pelvis, MR of the same, left atrium, prostate and chest X-ray all view one torso.

    python phantom.py --out stand_ins                          # all, about half a minute, 40 MB
    python phantom.py --out stand_ins --datasets acdc la --seed 1

Arrays here are (z, y, x): a slice is a picture, rows front to back, columns patient's right to left. Lengths are cm unless
a name says mm. Everything random comes from a generator keyed by (seed, dataset, case): a case never depends on others.
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
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Tissues. A name's part after the dot is a detail that keeps its organ's label: kidney_r.sinus is kidney_r.

TORSO = {  # name: (HU, gain in HU at full contrast, T1, T2 with fat bright, late gadolinium)
    "skin": (20, 0, .5, .3, .4), "fat": (-105, 0, .85, .55, .85), "muscle": (50, 8, .4, .2, .35),
    "bone": (700, 0, .08, .06, .1), "marrow": (230, 0, .6, .5, .6), "disc": (85, 0, .35, .6, .4),
    "cord": (35, 0, .35, .8, .4), "rib": (480, 0, .2, .2, .2), "table": (-350, 0, 0, 0, 0),
    "lung": (-850, 0, .05, .06, .05), "lung.vessel": (-250, 200, .3, .2, .3), "lung.tumour": (35, 20, .4, .55, .4),
    "airway": (-990, 0, 0, 0, 0), "vessel": (42, 150, .55, .15, .7), "heart": (-70, 0, .75, .65, .75),
    "myocardium": (60, 45, .4, .35, .15), "lv": (42, 190, .55, .3, .72), "rv": (42, 190, .55, .3, .68),
    "ra": (42, 170, .55, .3, .7), "la": (42, 190, .55, .3, .82), "pa": (42, 200, .5, .2, .72),
    "aorta": (42, 210, .6, .1, .75), "ivc": (42, 110, .55, .12, .65), "portal": (42, 130, .58, .14, .6),
    "liver": (58, 50, .55, .35, .45), "liver.vessel": (45, 95, .65, .2, .5), "liver.tumour": (30, 25, .3, .62, .5),
    "gallbladder": (8, 0, .2, .95, .2), "spleen": (48, 70, .42, .6, .4), "spleen.vessel": (48, 85, .5, .5, .4),
    "kidney_r": (32, 130, .45, .65, .4), "kidney_r.sinus": (-60, 30, .75, .8, .6), "pancreas": (38, 55, .65, .45, .4),
    "kidney_l": (32, 130, .45, .65, .4), "kidney_l.sinus": (-60, 30, .75, .8, .6), "esophagus": (35, 20, .4, .4, .4),
    "adrenal_r": (30, 45, .5, .4, .4), "adrenal_l": (30, 45, .5, .4, .4), "duodenum": (28, 35, .45, .55, .4),
    "stomach": (25, 15, .3, .75, .3), "stomach.gas": (-950, 0, .02, .02, 0), "colon": (30, 20, .5, .45, .4),
    "colon.gas": (-850, 0, .03, .03, 0), "bowel": (28, 35, .4, .6, .4), "rectum": (40, 20, .4, .35, .4),
    "rectum.gas": (-800, 0, .03, .03, 0), "bladder": (8, 0, .2, 1, .2), "seminal": (25, 10, .4, .85, .4),
    "prostate": (42, 25, .42, .36, .4), "prostate.zone": (36, 20, .4, .88, .4), "femur_r": (320, 0, .6, .5, .5),
    "femur_l": (320, 0, .6, .5, .5), "kidney.tumour": (20, 40, .35, .6, .4), "node": (35, 35, .4, .5, .4)}

BRAIN = {  # name: (HU, t1n, t1c, t2w, t2f)
    "scalp": (-20, .8, .8, .6, .5), "skull": (1000, .05, .05, .05, .05), "csf": (6, .14, .14, 1, .12),
    "gray": (39, .5, .5, .62, .62), "white": (30, .72, .72, .45, .47), "deep": (37, .57, .58, .52, .57),
    "edema": (22, .48, .48, .85, 1), "core": (14, .25, .22, .9, .5), "enhancing": (45, .45, 1, .72, .85),
    "plaque": (24, .42, .45, .85, 1), "hippocampus.front": (38, .47, .48, .62, .65),
    "hippocampus.back": (38, .5, .5, .62, .65)}

CINE = {"lung": .06, "fat": .65, "muscle": .3, "bone": .12, "heart": .6, "wall": .35, "rv": .9, "lv": .95, "myo": .32,
        "lv.papillary": .38, "liver": .42, "aorta": .9, "stomach": .5, "stomach.gas": .03}       # bSSFP short axis

NAMES = ["air", *dict.fromkeys([*TORSO, *BRAIN, *CINE])]
CODE = {name: code for code, name in enumerate(NAMES)}


def labels(tissue, ids):
    """(z, y, x) tissue codes -> uint8 label map; `ids` = {tissue name: label}; a detail without an id takes its organ's."""
    return np.array([ids.get(n, ids.get(n.split(".")[0], 0)) for n in NAMES], np.uint8)[tissue]


def generator(seed, *key):
    """The generator of one case: depends on nothing but (seed, key)."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, key)).encode())])


def smooth(rng, shape, cells):
    """Smooth noise of unit variance, float32 of `shape`, with about `cells` bumps along each axis."""
    out = rng.standard_normal([c + 3 for c in cells])
    for axis, (n, c) in enumerate(zip(shape, cells)):
        basis = np.exp(-2 * (np.linspace(1, c + 1, n)[:, None] - np.arange(c + 3)) ** 2)
        basis /= np.sqrt((basis ** 2).sum(1, keepdims=True))
        out = np.moveaxis(np.tensordot(basis, out, (1, axis)), 0, axis)
    return out.astype(np.float32)


def blur(a):
    """[1 2 1] / 4 along rows and columns (the last two axes), edges repeated."""
    for axis in (-1, -2):
        pad = np.pad(a, [(1, 1) if i == a.ndim + axis else (0, 0) for i in range(a.ndim)], "edge")
        n = a.shape[axis]
        a = sum(w * np.take(pad, range(i, i + n), axis) for i, w in enumerate((.25, .5, .25)))
    return a


class Scene:
    """A volume being painted. x, y: (z, y, x) float32, z: (z, 1, 1), body coordinates in cm of every voxel; tissue: uint8.

    z: slice heights (evenly spaced); size: rows and columns; fov: cm across; the body is moved by up to `shift` cm, scaled
    by one of `zoom` = (low, high), turned by up to `turn` degrees, bent smoothly by about `bend` cm; every organ is moved
    by up to `jitter` of its smallest radius and its outline is uneven by about `rough` of its radius; `grain`: size of the
    bumps of the texture, cm.
    """

    def __init__(self, rng, z, size, fov, shift=3., zoom=(.8, 1.1), turn=20., bend=.6, jitter=.4, rough=.1, grain=1.6):
        rows, columns = (size, size) if np.isscalar(size) else size
        self.rng, self.jitter, self.rough, pixel = rng, jitter, rough, fov / columns
        self.spacing = (10 * pixel, 10 * pixel, 10 * float(z[1] - z[0]))                         # mm, (x, y, z)
        self.scale, angle = rng.uniform(*zoom), np.deg2rad(rng.uniform(-turn, turn))
        du, dv = rng.uniform(-shift, shift, 2)
        u = (np.arange(columns) - (columns - 1) / 2)[None, None] * pixel - du
        v = (np.arange(rows) - (rows - 1) / 2)[None, :, None] * pixel - dv
        shape = self.shape = (len(z), rows, columns)
        self.x, self.y = ((bend * smooth(rng, shape, (2, 4, 4)) + part / self.scale).astype(np.float32)
                          for part in (u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)))
        self.z = np.asarray(z, np.float32)[:, None, None]
        cells = [max(int(n * pixel / grain / self.scale), 3) for n in (rows, columns)]
        self.grain = [smooth(rng, shape, (max(len(z) // 3, 1), *cells)) for _ in range(2)]       # bumps of about `grain` cm
        self.tissue, self.free = np.zeros(shape, np.uint8), None

    def is_(self, *names):
        return np.isin(self.tissue, [CODE[n] for n in names])

    def fill(self, name, where):
        """Paint `where` (bool, broadcast to the volume)."""
        self.tissue[np.broadcast_to(where, self.shape)] = CODE[name]

    def paint(self, *rows):
        """Paint rows (name, where, size, turn): a centre and three radii, or a line of points and one radius; only in
        `free` if that is set. Bone gets a core of marrow. turn: degrees from +x (left) towards +y (back)."""
        for name, where, size, *turn in rows:
            rng, where, core = self.rng, np.array(where, float), min(np.atleast_1d(size))
            where = where + rng.uniform(-1, 1, 3) * self.jitter * min(core, 3)
            grow, grain = np.exp(rng.normal(0, .08)), self.grain[rng.integers(2)] * (rng.choice((-1, 1)) * self.rough * min(1, 3 / core))
            size = np.array(size) * grow
            reach = size * 1.3 if where.ndim == 2 else size[2] * 1.3
            low, high = where[..., 2].min() - reach, where[..., 2].max() + reach
            at = np.flatnonzero((self.z.ravel() >= low) & (self.z.ravel() <= high))
            if not len(at):
                continue
            k = slice(at[0], at[-1] + 1)
            x, y, z = self.x[k], self.y[k], self.z[k]
            if where.ndim == 1:
                c, s = np.cos(np.deg2rad(turn[0] if turn else 0)), np.sin(np.deg2rad(turn[0] if turn else 0))
                x, y, z = x - where[0], y - where[1], z - where[2]
                level = np.sqrt(((c * x + s * y) / size[0]) ** 2 + ((c * y - s * x) / size[1]) ** 2 + (z / size[2]) ** 2)
            else:
                level = np.inf
                for p, q in zip(where[:-1], where[1:]):
                    dx, dy, dz = d = (q - p).astype(np.float32)
                    t = np.clip(((x - p[0]) * dx + (y - p[1]) * dy + (z - p[2]) * dz) / (d @ d), 0, 1)
                    level = np.minimum(level, (x - p[0] - t * dx) ** 2 + (y - p[1] - t * dy) ** 2
                                       + (z - p[2] - t * dz) ** 2)
                level = np.sqrt(level) / size
            level = level + grain[k]
            inside = True if self.free is None else self.free[k]
            self.tissue[k][(level < 1) & inside] = CODE[name]
            if name == "bone":
                self.tissue[k][(level < 1 - .45 / core) & inside] = CODE["marrow"]

    def lesions(self, organ, name, count, radius):
        """Paint `count` balls of `radius` = (low, high) cm inside `organ` (never outside it), where it is present."""
        home = self.is_(organ)
        for place in self.rng.permutation(np.argwhere(home))[:count]:
            k, i, j = place
            size = self.rng.uniform(*radius) * np.exp(self.rng.normal(0, .2, 3))
            self.free, centre = home, (self.x[k, i, j], self.y[k, i, j], self.z[k, 0, 0])
            self.paint((name, centre, np.maximum(size, (0, 0, .06 * self.spacing[2]))))
        self.free = None


def both(name, where, size, turn=0, sides=("", "")):
    """A row for the patient's right and its mirror image on the left (where is given for the left: x > 0)."""
    where = np.array(where, float)
    return (name + sides[0], where * (-1, 1, 1), size, -turn), (name + sides[1], where, size, turn)


# ----------------------------------------------------------------------------------------------------------------------
# Anatomy, cm. z: hip joints 1, navel 16, diaphragm 35, heart 40, lung tips 57.

SIDES = ("_r", "_l")
SKELETON = [
    *both("muscle", [(3.6, 4.6, 26), (4.4, 4.6, 14), (7, -1.5, 4), (9, -2, -3)], 1.8), *both("muscle", (3.9, 9, 30), (3.2, 1.9, 30)),
    *both("bone", (9.3, 2.3, 11), (6.6, .95, 6.5), 120), ("bone", (0, 7.8, 3.5), (4.8, 1.9, 6)),
    *both("bone", (8.6, .5, 1.6), (3.4, 3.7, 3.6)), *both("bone", [(9.5, .5, 1), (13, 1.5, -1)], 1.4),
    *both("bone", (13, 2, -3), (2.1, 2.4, 3.5)), *both("bone", [(7, -2, .5), (4, -5, -.5), (.7, -5.9, -2)], 1.),
    *both("bone", [(7, 3, 0), (6.3, 4.5, -6)], 1.4), *both("femur", (9.5, .4, 1.3), (2.4, 2.4, 2.4), 0, SIDES),
    *both("bone", (11, 7.3, 49), (4.3, .6, 6.5), -25), *both("bone", [(1.6, -7, 54.5), (8, -6, 57), (15, -1, 57)], .75),
    *both("bone", (16, .5, 56), (2.4, 2.4, 2.6))]
HIPS = [("muscle", where, size, turn) for row in (
    ((8, 7.6, 1), (5.4, 2.2, 8), 28), ((13, 2.8, 7), (5.8, 1.9, 6), 112), ((9.2, -.5, 9), (4.4, 1.5, 6), 120),
    ((10.5, -6.3, -1), (2.7, 1.9, 7), 15), ((14.3, -3, -1), (1.5, 2.6, 6), -20), ((6, -5.8, -5), (2.8, 2.4, 4)),
    ((5.8, -1, -3.2), (3, 1.6, 1.8), 20), ((10.5, 4.6, -2), (3.2, 1.6, 4), 10), ((4, 9.6, 12), (3.4, 1.6, 8)))
    for _, where, size, turn in both("", *row)]
PELVIS = [
    ("rectum", [(0, 6, -5), (0, 4.6, 0), (0, 5.2, 5), (.5, 6, 9)], 1.8), ("rectum.gas", [(0, 5.2, -5), (0, 4.2, 0), (0, 4.8, 5), (.5, 5.6, 9)], .9),
    *both("muscle", (5.3, .5, -.5), (1.1, 4, 3.8)), *both("muscle", (2.6, 3, -4), (.6, 3, 3), -20),
    ("bladder", (0, -3.2, 3.8), (4.2, 3, 3.2)), *both("seminal", (2, 1.2, 1.8), (2, .8, .8), -15),
    ("prostate.zone", (0, 0, -1), (3, 2.3, 2.8)), ("prostate", (0, -.8, -.8), (2.1, 1.6, 2.3))]
ABDOMEN = [
    ("colon", [(-11.3, 1.5, 6), (-11.3, 2, 20)], 2.2), ("colon", [(11.5, 1.5, 24), (11.6, 3, 8)], 1.6),
    ("colon", [(-11, -1, 20), (-6, -7, 18), (0, -8, 16), (7, -7, 19), (10.5, -1, 24)], 1.9),
    ("colon", [(11.5, 1, 8), (7, -3, 6), (2, -1, 9), (0, 5.5, 9)], 1.5),
    ("stomach", (7, 1.5, 32), (4.3, 4.5, 4.3)), ("stomach", [(8, -1, 31), (7.3, -5, 27), (3, -7, 23.5), (-2, -5.5, 23)], 2.6),
    ("spleen", (11, 4, 29.5), (5.3, 2.7, 5.5), 119), ("liver", (-7.5, .5, 28.5), (8.3, 8.6, 9.5)), ("liver", (0, -5.5, 30.5), (8, 4, 4)),
    *both("kidney", (6.2, 4.9, 21.3), (2.9, 2.6, 5.4), 35, SIDES), *both("adrenal", [(2.9, 2.8, 28.8), (4.4, 4.8, 27)], .55, 0, SIDES),
    ("duodenum", [(-2, -4, 23.5), (-5, -2.5, 23), (-5.2, 0, 20), (-3, 1.2, 17.5), (2, .3, 18.5)], 1.25),
    ("pancreas", [(-3, -1.2, 20.5), (-2.6, -1.8, 22.5), (0, -2.8, 24), (4, -.6, 25.5), (8.8, 2.2, 27)], 1.35),
    ("portal", [(8.5, 1.2, 26.2), (2, -1, 24.8), (-1.5, -.8, 23.5), (-4, -1.5, 28), (-7, -2.5, 29)], .75),
    ("gallbladder", (-5.6, -4.6, 22.3), (1.8, 2.5, 3))]
CHEST = [
    ("heart", (2, -3, 39.5), (7, 6.6, 7)), ("myocardium", (4.6, -3, 38.5), (4.2, 3.7, 4.6), -40), ("rv", (-.2, -6, 38.5), (4.2, 2.1, 4.3), -15),
    ("ra", (-3.6, -2.6, 40), (2.4, 3, 3.6)), ("lv", (4.4, -2.8, 38.7), (3, 2.3, 3.6), -40), ("pa", [(1, -5, 43), (1.6, -2.6, 46.5), (-4.5, 1, 47.5)], 1.3),
    ("pa", [(1.6, -2.6, 46.5), (5.5, 1, 48)], 1.2), ("la", (.6, 1, 42), (4, 2.2, 3.4)), ("la", (4.4, -.8, 43.5), (1.8, 1, 1.3), -60),
    *both("la", [(2.5, 1, 43), (5, 1.6, 43.6), (8, 2.6, 44)], .85), *both("la", [(2.5, 1.6, 41), (5.5, 3, 40.6), (8, 4.2, 40)], .85)]
PIPES = [
    ("ivc", [(-2, 2, 12), (-2.4, 2, 24), (-3, .8, 33), (-3, -.6, 38)], 1.25), ("vessel", [(-3.4, -2, 42), (-3, -1.5, 55)], 1.),
    *both("vessel", [(.9, 2.3, 14), (3.5, 2.6, 10), (6.5, -2, 3), (7, -5, -4)], .75), ("airway", [(0, 1, 63), (.2, 2, 49.5)], .9),
    *both("airway", [(.2, 2, 49.5), (5, 2.6, 46)], .65), ("esophagus", [(.3, 3.2, 61), (.6, 3.9, 46), (1.5, 2.8, 36), (3.5, 1.6, 33)], .85),
    ("aorta", [(-.8, -2.4, 41.5), (-1.8, -2.8, 49), (0, -.2, 52.3), (2.3, 3.6, 50.5), (2.6, 4.2, 48), (2.3, 4.2, 36), (.9, 2.6, 26), (.7, 2.2, 14)], 1.25)]


def torso(s):
    """Paint the trunk from hips to neck: wall, skeleton, lungs above the diaphragm, organs below it, vessels."""
    rng, x, y, z = s.rng, s.x, s.y, s.z
    a = np.interp(z, (-8, 2, 16, 40, 50, 57, 60, 62), (17.5, 18, 15.3, 16.5, 17.5, 18.5, 10, 7)).astype(np.float32)
    b = np.interp(z, (-8, 2, 16, 40, 50, 56, 62), (11, 11.5, 10.5, 11.8, 11.3, 9, 7)).astype(np.float32)
    depth = (1 - (np.abs(x / a) ** 2.4 + np.abs(y / b) ** 2.4) ** (1 / 2.4)) * (a + b) / 2       # cm under the skin, about
    fat = rng.uniform(.7, 2.2) * (1 + .25 * s.grain[0] * (z < 20) - .3 * (z > 44))
    s.fill("table", (depth < -.4) & (np.abs(y - 13.2 + .012 * x * x) < .45) & (np.abs(x) < 21))
    inner = fat + np.interp(z, (20, 30, 44, 50, 54, 58), (1.1, 1.4, 1.5, 2.6, 4.6, 8)).astype(np.float32)  # wall, shoulders
    for name, over in (("skin", 0), ("fat", .2)):
        s.fill(name, depth > over)
    s.fill("muscle", (depth > fat) & ((z > 9) | (y < -3) & (depth < inner)))
    s.free = (depth > fat) & (z < 12)
    s.paint(*HIPS)
    s.free = None
    e, f = np.interp(z, (-3, 3, 15), (4.3, 6.3, 17)), np.interp(z, (-3, 3, 15), (5, 6.8, 14))
    cavity = (depth > inner) & ((x / e) ** 2 + ((y + .5) / f) ** 2 < 1) & (z < 57.5)
    s.fill("fat", cavity)
    along = (z + .55 * (6 - y) - .1 * np.abs(x)) % 3.2 / 3.2                                     # ribs slope down to the front
    shell = (depth > inner - .9) & (depth < inner) & (z > 22)
    s.fill("rib", shell & (along < .42) & (np.abs(x) > 2.2) & (z < 57) & (y > -9 + (z < 36) * 6))
    s.fill("bone", shell & (np.abs(x) < 1.9) & (y < 0) & (z > 37) & (z < 53))                    # breastbone
    s.paint(*SKELETON)
    back = np.interp(z, (0, 8, 16, 40, 62), (9, 6.6, 5.2, 6.4, 4.4)).astype(np.float32)         # the spine's curve
    column, canal = np.hypot(x / 1.15, y - back), np.hypot(x, y - back - 3)
    spine = (z > 7) & (depth > .6)
    s.fill("bone", spine & ((column < 2) | (canal < 1.7) | (np.abs(x) < .45) & (y > back) & (y < back + 5.5)))
    s.fill("bone", spine & (np.abs(x) < 4.2) & (np.abs(y - back - 2.6) < .55) & (z % 3 > 1.5))   # transverse processes
    s.fill("marrow", spine & (column < 1.55))
    s.fill("disc", spine & (column < 1.9) & (z % 3 < .6))
    s.fill("cord", spine & (canal < .95))
    cavity &= ~s.is_("bone", "marrow", "disc", "cord", "muscle")
    dome = 36.5 - .1 * ((np.abs(x) - 7.5) ** 2 + (y + 1) ** 2) - (x > 0)
    chest = cavity & (z > dome)
    s.fill("lung", chest & (np.abs(x + .3 * s.grain[0]) > np.interp(z, (36, 48, 55), (2.2, 2.4, 2.8)) * (.45 + .6 * np.exp(-((y - 1) / 4.5) ** 2))))
    s.fill("lung.vessel", s.is_("lung") & (np.abs(s.grain[0]) < .16) & (np.abs(s.grain[1]) < .5))
    s.free = chest
    s.paint(*CHEST)
    s.free = cavity & ~chest
    warp = [np.pi * (p / 3 + .45 * g) for p, g in ((x, s.grain[0]), (y, s.grain[1]))]
    s.fill("bowel", s.free & (z > 4) & (z < 21) & (np.hypot(x / 10, (y + 2) / 7) < 1)
           & (np.abs(np.cos(warp[0]) * np.cos(warp[1])) > .22))
    s.paint(*ABDOMEN)
    for side, sign in zip(SIDES, (-1, 1)):
        s.fill(f"kidney{side}.sinus", s.is_(f"kidney{side}") & (np.hypot(x - 5.1 * sign, y - 4) < 1.5)
               & (np.abs(z - 21.3) < 3))
    s.fill("stomach.gas", s.is_("stomach") & (y < rng.uniform(-6.5, -4)))                        # patients lie on their back
    s.fill("colon.gas", s.is_("colon") & (s.grain[1] > .5))
    for organ in ("liver", "spleen"):
        s.fill(organ + ".vessel", s.is_(organ) & (np.abs(s.grain[0]) < .1) & (np.abs(s.grain[1]) < .5))
    s.free = None
    s.paint(*PELVIS, *PIPES)
    return s


def brain(s, tumour=False, plaques=0, head=False, enhancing=True):
    """Paint a brain, z 0 at the base of the ventricles; tumour: edema, enhancing rim, necrotic core; head: skull, scalp."""
    x, y, z = s.x, s.y, s.z
    if head:
        for name, grow in (("scalp", 1.3), ("skull", .9), ("csf", .3)):
            s.fill(name, (x / (6.7 + grow)) ** 2 + (y / (8.5 + grow)) ** 2 + (np.maximum(z - 1, 0) / (6.8 + grow)) ** 2 < 1)
    fold = .8 * s.grain[0] + .25 * s.grain[1]
    level = np.sqrt((x / 6.7) ** 2 + (y / 8.5) ** 2 + (np.where(z > 1, z - 1, (1 - z) * .8) / 6.8) ** 2) + .012 * s.grain[1]
    depth = 6.8 * (1 - level)                                                                    # cm under the surface
    s.fill("white", level < 1)
    s.fill("gray", (level < 1) & ((depth < .45) | (np.abs(fold) < .42) & (depth < 2.4)))
    s.fill("csf", (level < 1) & (np.abs(fold) < .13) & (depth < 1.9) & (depth > .15))            # furrows
    s.fill("csf", (level < 1) & (np.abs(x + .1 * s.grain[1]) < .16) & (np.abs(y) > 3.4) & (z > -2))
    s.free = level < 1
    s.paint(*both("deep", (1.6, -1.6, 2.2), (.75, 2.2, 1.8), -20), *both("deep", (1.3, 1.2, 1.3), (1.1, 1.6, 1.3), 20),
            *both("deep", (2.9, -.3, 1), (.85, 2.1, 1.5), 12), *both("csf", [(.9, -3.4, 2.6), (.8, -1, 3.4), (1.2, 1.6, 3.2), (2.3, 3.8, 1.6)], .62),
            *both("csf", [(2.3, 3.8, 1.6), (3, 2, -1)], .5), ("csf", (0, .8, .8), (.28, 1.5, 1.2)))
    s.free &= z < -2                                                                             # cerebellum, brain stem
    s.paint(*both("csf", (2.5, 4.4, -3.9), (3.7, 3.4, 2.9)), *both("gray", (2.5, 4.6, -3.9), (3.1, 2.7, 2.4)), *both("white", (2.3, 4.4, -3.9), (1.7, 1.3, 1.7)), ("white", (0, 1.7, -4), (1.5, 1.4, 3.5)))
    s.free = level < 1
    if tumour:
        site = s.rng.uniform((2.2, -4.5, 1), (4.2, 4.5, 4)) * (s.rng.choice((-1, 1)), 1, 1)
        radius, rough = s.rng.uniform(1.3, 3), s.rough
        s.jitter, s.rough = 0, .22
        rows = [("edema", site, radius), ("enhancing", site, .6 * radius), ("core", site, .42 * radius)]
        s.paint(*[(name, site, (r, r * s.rng.uniform(.8, 1.3), r)) for name, site, r in rows if enhancing or name != "enhancing"])
    s.free = None
    if plaques:
        s.lesions("white", "plaque", plaques, (.2, .6))
    return s


def heart(s, squeeze=0.):
    """Paint a short-axis heart, z 0 at the tip, 7 at the base; squeeze: 0 filled (ED) .. 1 contracted (ES)."""
    s.paint(("fat", (0, 3, 4), (15, 12.6, 99)), ("muscle", (0, 3, 4), (13.6, 11.2, 99)), ("lung", (0, 3, 4), (12.4, 10, 99)))
    s.fill("bone", s.is_("muscle") & ((np.arctan2(s.y - 3, s.x) * 3.5 + .4 * s.z) % 1.6 < .6))   # ribs, cut across
    s.paint(("muscle", (2.5, 12, 4), (6, 3.2, 99)), ("bone", (3, 10.8, 4), (2.1, 1.9, 99)), ("aorta", (5.2, 8.4, 4), (1.2, 1.2, 99)),
            ("liver", (-6.5, 9, 1.5), (8.5, 5.5, 3.6)), ("stomach", (8, 9, .5), (4, 3.5, 3)), ("stomach.gas", (8.4, 8, .5), (2.5, 2, 2.4)),
            ("fat", (-3, -6.5, 4), (5.5, 2.4, 99)))
    s.jitter *= .35
    w, r = 1 - .3 * squeeze, 1 - .18 * squeeze
    s.paint(("heart", (-.6, .2, 3.4), (6.3, 5, 6.4), 20), ("wall", (-2.5, -.9, 4.2), (4 * r, 3.3 * r, 5.2), 25),
            ("rv", (-2.5, -.9, 4.3), (3.6 * r, 2.9 * r, 4.8), 25), ("myo", (.8, .5, 4.4), (3.3 - .15 * squeeze,) * 2 + (5,)), ("lv", (.8, .5, 4.7), (2.3 * w, 2.3 * w, 4.2)))
    s.free = s.is_("lv")
    s.paint(("lv.papillary", (-.3, 1.6, 3.5), (.55, .5, 2)), ("lv.papillary", (1.9, 1.5, 3.5), (.5, .55, 2)))
    return s


def hippocampus(s, side):
    """Paint the temporal lobe around one hippocampus (side -1 right, 1 left): front (head) and back (body, tail)."""
    s.fill("white", True)
    s.fill("gray", (np.abs(s.grain[0]) < .35))
    s.fill("csf", (np.abs(s.grain[1]) < .12) | (s.x * side < -1.3))
    s.jitter = 0
    path = [(-.2 * side, -1.5, -.2), (.25 * side, -.7, -.3), (.35 * side, .4, 0), (-.2 * side, 1.5, .6)]
    s.paint(("csf", [(p[0] + .35 * side, p[1], p[2] + .25) for p in path], .35), ("hippocampus.back", path, .42), ("hippocampus.front", path[:2], .62))
    s.fill("hippocampus.back", s.is_("hippocampus.front") & (s.y > s.rng.uniform(-.7, -.2)))
    return s


# ----------------------------------------------------------------------------------------------------------------------
# Modalities


def ct(s, noise=12., contrast=None, table=TORSO):
    """Tissue -> HU, float32 (z, y, x): contrast phase, texture, partial volume, noise of `noise` HU."""
    rng, phase = s.rng, s.rng.uniform(.1, 1) if contrast is None else contrast
    hu = np.full(len(NAMES), -1000.)
    for name, row in table.items():
        hu[CODE[name]] = row[0] + (row[1] * phase if table is TORSO else 0) + rng.normal(0, 4)
    image = hu[s.tissue] + 6 * s.grain[0] * (s.tissue > 0)
    return blur(image.astype(np.float32) + 2 * noise * rng.standard_normal(s.shape, np.float32))


def mr(s, table, column, bias=.25, noise=.03, jitter=.06, top=1000):
    """Tissue -> MR of arbitrary units, float32 (z, y, x): contrast jitter, bias field, partial volume, Rician noise."""
    rng, value = s.rng, np.zeros(len(NAMES))
    for name, row in table.items():
        value[CODE[name]] = max((row[column] if column is not None else row) * (1 + rng.normal(0, jitter)), 0)
    image = (value[s.tissue] * (1 + .06 * s.grain[1])).astype(np.float32)
    image = blur(image) * np.exp(bias * smooth(rng, s.shape, (1, 2, 2)))
    a, b = noise * rng.standard_normal((2, *s.shape), np.float32)
    return top * np.hypot(image + a, b)


def speckle(rng, echo):
    """Echo strength (..., rows, columns) -> log-compressed ultrasound 0..1 with multiplicative speckle."""
    wave = rng.standard_normal((2, *echo.shape), np.float32)
    wave = blur(wave)
    wave = np.hypot(*(wave / wave.std()))
    return np.clip(.62 + .2 * np.log(echo * (wave + .15)), 0, 1)


def micro_ultrasound(rng, frames=12, rows=160, columns=224):
    """-> image uint8 0..254, prostate bool, both (frames, rows, columns): a probe below, swept through the gland."""
    v, u = (np.mgrid[:rows, :columns] - np.array((rows, columns))[:, None, None] / 2) / rows     # -.5 .. .5 of the height
    foot = rng.uniform(.75, .95)
    r, angle = np.hypot(u, v - foot), np.arctan2(u, foot - v)
    near = foot - .45
    fan = (r > near) & (r < near + .9) & (np.abs(angle) < .75)
    centre, size = rng.uniform((-.36, -.2), (.36, .17)), rng.uniform(.13, .3) * np.array((rng.uniform(1.1, 1.6), 1))
    turn, lumps = rng.uniform(-.5, .5), smooth(rng, (frames, rows, columns), (2, 5, 5))
    images, masks = np.zeros((2, frames, rows, columns), np.float32)
    for k, at in enumerate(np.linspace(-1, 1, frames)):
        du, dv = u - centre[0] - .05 * at, v - centre[1]
        du, dv = du * np.cos(turn) + dv * np.sin(turn), dv * np.cos(turn) - du * np.sin(turn)
        level = np.hypot(du / size[0], dv / size[1]) / np.sqrt(1.05 - at ** 2) + .09 * lumps[k]
        echo = .5 * np.exp(.35 * lumps[k]) * (1 + .3 * np.sin(45 * (v - foot) + 2 * lumps[k]) ** 8)
        echo = np.where(level < 1.12, 1.5, echo)                                                 # capsule
        echo = np.where(level < 1, .33, echo)
        echo = np.where((np.hypot(du / size[0], (dv + .25 * size[1]) / size[1]) < .55) & (level < .95), .17, echo)  # inner gland
        echo = np.where((np.hypot(du, dv + .2 * size[1]) < .02) & (level < .9), .03, echo)                        # urethra
        images[k] = speckle(rng, (echo * np.exp(-1.3 * (r - near)) + 2 * np.exp(-((r - near) / .02) ** 2))) * fan
        masks[k] = (level < 1) & fan
    return (254 * images).astype(np.uint8), masks > 0


def nerve_ultrasound(rng, rows, columns):
    """-> image uint8, label uint8 (1 nerve, 2 vessel), both (rows, columns): layers of muscle, fascia, vessels, nerves."""
    v, u = (np.mgrid[:rows, :columns] / np.array((rows, columns))[:, None, None]).astype(np.float32)
    bend = .03 * smooth(rng, (rows, columns), (2, 3)) + rng.uniform(-.12, .12) * u
    echo = .25 * np.exp(.5 * smooth(rng, (rows, columns), (14, 5)))
    for depth in np.sort(rng.uniform(.08, .9, 9)):
        echo += rng.uniform(.5, 2.5) * np.exp(-((v - depth - bend) / .006) ** 2) * (smooth(rng, (rows, columns), (2, 4)) > -.6)
    label = np.zeros((rows, columns), np.uint8)
    for kind in rng.permutation([1, 2] + [1] * rng.integers(2) + [2] * rng.integers(3)):
        (cv, cu), tilt = rng.uniform((.18, .1), (.75, .9)), rng.uniform(-.5, .5)
        a, b = rng.uniform(.05, .11) * np.array((rng.uniform(1, 1.8), 1))
        du, dv = u - cu, v - cv
        level = np.hypot((du + tilt * dv) / a, (dv - tilt * du) / b) + .07 * smooth(rng, (rows, columns), (5, 5))
        inside = (echo > 1e9) if np.any(label[level < 1.15]) else level < 1
        if kind == 1:                                                                            # honeycomb in a bright sheath
            comb = .12 + .9 * (np.cos(2 * np.pi * du / .022) * np.cos(2 * np.pi * dv / .022) > .1)
            echo = np.where(inside, comb, np.where((level < 1.15) & inside.any(), 1.6, echo))
        else:                                                                                    # black, bright wall and echo below
            echo = np.where((np.abs(du) < .8 * a) & (dv > 0) & inside.any(), echo * 1.9, echo)
            echo = np.where(inside, .012, np.where((level < 1.12) & inside.any(), 1.2, echo))
        label[inside] = kind
    image = speckle(rng, echo * np.exp(-1.6 * v)) * ((v > .04) & (v < .95))
    return (255 * image).astype(np.uint8), label


def chest_xray(rng, rows, columns):
    """-> image uint8, left lung bool, right lung bool, all (rows, columns): a torso projected front to back, then placed."""
    s = torso(Scene(rng, np.linspace(19, 64, 150), (36, 140), 44., shift=0, zoom=(.95, 1.05), turn=4, jitter=.25))
    s.tissue[s.is_("table")] = 0
    density = np.clip(ct(s, 0, .1) + 1000, 0, 2000) / 1000 + 2.2 * s.is_("rib", "bone")
    dy = s.spacing[1] / 10
    path = density.sum(1)[::-1] * dy                                                             # (z, x), head up
    lung, dense = (part.sum(1)[::-1] * dy for part in (s.is_("lung", "lung.vessel"), s.is_(*[r[0] for r in CHEST + ABDOMEN])))
    field = (lung > 3) & (blur(dense) < 5)
    mid = (s.x.mean((0, 1)) > 0)[None]
    image = (path / np.percentile(path, 97)) ** .8
    angle, zoom, move = np.deg2rad(rng.uniform(-22, 22)), rng.uniform(.7, 1.3), rng.uniform(-.2, .2, 2)
    v, u = np.mgrid[:rows, :columns] / rows - .5 - np.array((0, (columns / rows - 1) / 2))[:, None, None]
    v, u = (v - move[0]) / zoom, (u - move[1]) / zoom
    v, u = v * np.cos(angle) - u * np.sin(angle), u * np.cos(angle) + v * np.sin(angle)
    i = np.clip(((v + .5) * 150).round().astype(int), 0, 149)
    j = np.clip((u * 150 + 70).round().astype(int), 0, 139)
    image = blur(image[i, j])
    image = np.clip(image, 0, 1) ** rng.uniform(.8, 1.4) * rng.uniform(.8, 1) + .02 * rng.standard_normal(image.shape)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8), (field & mid)[i, j], (field & ~mid)[i, j]


# ----------------------------------------------------------------------------------------------------------------------
# File formats. Volumes come as (z, y, x), LPS; each saver turns them into what the format keeps.


def save_nifti(path, volume, spacing, codes="RAS", dtype=np.int16, form="both", scale=None):
    """(z, y, x) or (t, z, y, x) -> NIfTI with axes along `codes` and the affine to match.

    spacing: mm, (x, y, z); form: "both", "qform" or "sform" (the other's code is 0); scale: (slope, intercept) of the file.
    """
    data = volume.T                                                                              # (x, y, z[, t])
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.])
    affine[:2, 3] = [(n - 1) / 2 * mm for n, mm in zip(data.shape[:2], spacing)]                 # 0 0 0: middle, lowest slice
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(codes)))
    data = np.asarray(image.dataobj)
    if scale:
        data = (data - scale[1]) / scale[0]
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
    """(z, y, x) -> .mhd with its .raw, or .nrrd; spacing: mm, (x, y, z); tilt: degrees about the left-right axis."""
    image = sitk.GetImageFromArray(np.rint(volume).astype(dtype))
    image.SetSpacing([float(mm) for mm in spacing])
    c, s = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
    image.SetDirection((1, 0, 0, 0, c, -s, 0, s, c))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=path.suffix == ".nrrd")


def save_dicom(folder, hu, spacing, rng, tags):
    """(z, y, x) HU -> one .dcm a slice, stored 0..4095 with intercept -1024; file numbers are not in slice order."""
    folder.mkdir(parents=True)
    digits, series = len(str(len(hu))), f"1.2.826.0.1.3680043.8.498.{rng.integers(10**15)}"
    for k, number in enumerate(rng.permutation(len(hu)) + 1):
        image = sitk.GetImageFromArray(np.clip(np.rint(hu[k]), -1024, 3071).astype(np.int16))
        image.SetSpacing(spacing[:2])
        corner = [-(n - 1) / 2 * mm for n, mm in zip(hu.shape[:0:-1], spacing)]
        for key, value in {**tags, "0008|0060": "CT", "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0018": f"{series}.{k + 1}",
                           "0020|000e": series, "0020|0013": k + 1, "0020|0032": "{:.3f}\\{:.3f}\\{:.3f}".format(*corner, k * spacing[2] - 100),
                           "0020|0037": "1\\0\\0\\0\\1\\0", "0028|1052": -1024, "0028|1053": 1, "0018|0050": f"{spacing[2]:.2f}"}.items():
            image.SetMetaData(key, str(value))
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"1-{number:0{digits}d}.dcm"))
        writer.Execute(image)


def save_png(path, array):
    """(rows, columns[, 3]) uint8 or uint16, or bool (1 bit) -> PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_text(path, content):
    """A string as it is, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def junk(*paths):
    """What macOS leaves beside real files: AppleDouble headers under the name of an image."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(96))


# ----------------------------------------------------------------------------------------------------------------------
# Datasets: the traps first, then one writer each, write_x(out, seed).

PLANTED = {}


def trunk(rng, low, high, slices, fov=(36, 48), size=(112, 144), **view):
    """A torso seen from about z = low to high in `slices` slices, another field of view and matrix each time."""
    z = np.linspace(low + rng.uniform(-2, 2), high + rng.uniform(-2, 2), slices)
    return torso(Scene(rng, z, 8 * int(rng.integers(size[0] // 8, size[1] // 8 + 1)), rng.uniform(*fov), **view))


AMOS = {n: i + 1 for i, n in enumerate(
    "spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc pancreas adrenal_r adrenal_l duodenum bladder prostate".split())}
BTCV = {n: i + 1 for i, n in enumerate(
    "spleen kidney_r kidney_l gallbladder esophagus liver stomach aorta ivc portal pancreas adrenal_r adrenal_l".split())}
WORD = {n: i + 1 for i, n in enumerate(
    "liver spleen kidney_l kidney_r stomach gallbladder esophagus pancreas duodenum colon bowel adrenal_r rectum bladder femur_l femur_r".split())}
WORD["adrenal_l"] = WORD["adrenal_r"]


def write_amos(out, seed, modality):
    """AMOS22: CT and MR in one folder, told apart by id; dataset.json lists whatever cases lie there."""
    root = out / "amos22"
    cases = {"ct": {"Tr": (1, 4, 5, 9, 15), "Va": (8, 13), "Ts": (2,)}, "mr": {"Tr": (507, 508, 510, 514, 600), "Va": (575, 583)}}[modality]
    for part, case in [(part, case) for part, ids in cases.items() for case in ids]:
        rng, name = generator(seed, "amos", case), f"amos_{case:04d}.nii.gz"
        s = trunk(rng, -3, 37, 20) if modality == "ct" else trunk(rng, 14, 36, 14)
        image = ct(s) if modality == "ct" else mr(s, TORSO, rng.choice((2, 3)))
        codes = {508: "RAS", 510: "LSP"}.get(case, "LAS")
        save_nifti(root / f"images{part}" / name, image, s.spacing, codes, form="qform")
        if part != "Ts":
            save_nifti(root / f"labels{part}" / name, labels(s.tissue, AMOS), s.spacing, codes, np.uint16 if case in (13, 514) else np.uint8, "qform")
    lists = {key: [{"image": f"./images{part}/{f.name}", **({} if part == "Ts" else {"label": f"./labels{part}/{f.name}"})}
                   for f in sorted((root / f"images{part}").glob("amos_*"))]
             for key, part in (("training", "Tr"), ("validation", "Va"), ("test", "Ts"))}
    names = {"0": "background", **{str(i): {"aorta": "arota", "ivc": "postcava", "prostate": "prostate/uterus"}.get(n, n) for n, i in AMOS.items()}}
    save_text(root / "dataset.json", {"name": "AMOS", "licence": "stand-in", "modality": {"0": "CT", "1": "MRI"}, "labels": names,
                                      "numTraining": len(lists["training"]), "numTest": len(lists["test"]), **lists})
    save_text(root / "readme.md", "Stand-in for AMOS22.\n")
    junk(out / "__MACOSX/amos22/imagesTr/._amos_0001.nii.gz", root / "imagesTr/._amos_0004.nii.gz")


def write_amos_ct(out, seed):
    write_amos(out, seed, "ct")


def write_amos_mri(out, seed):
    write_amos(out, seed, "mr")


def write_word(out, seed):
    root = out / "WORD-V0.1.0"
    for part, case in [("Tr", c) for c in (2, 3, 4, 6, 9)] + [("Val", 1), ("Val", 7), ("Ts", 14)]:
        s, name = trunk(generator(seed, "word", case), -3, 37, 20), f"word_{case:04d}.nii.gz"
        save_nifti(root / f"images{part}" / name, ct(s), s.spacing, "LPS", form="qform")
        if part != "Ts":
            label = labels(s.tissue, WORD)
            save_nifti(root / f"labels{part}" / name, label, s.spacing, "LPS", np.uint16 if case == 4 else np.uint8, "qform")
        if case == 2:                                                                            # a few strokes, no truth
            save_nifti(root / "scribblesTr" / name, label * (s.grain[0] > 1.5), s.spacing, "LPS", np.uint8, "qform")
    save_text(root / "dataset.json", {"name": "WORD", "modality": {"0": "CT"}, "labels": {str(i): n for n, i in WORD.items()}})
    junk(root / "__MACOSX/._imagesTr")


def write_btcv(out, seed):
    root = out / "Abdomen/RawData"
    for case in (1, 2, 5, 21, 24, 35, 38, 61):
        s = trunk(generator(seed, "btcv", case), 14, 38, 18)
        if case == 5:
            s.tissue[s.is_("gallbladder")] = CODE["liver"]                                       # taken out
        part = "Testing" if case > 60 else "Training"
        stored = dict(dtype=np.uint16, scale=(.5, -1024.)) if case == 2 else {}
        save_nifti(root / part / f"img/img{case:04d}.nii.gz", ct(s, contrast=s.rng.uniform(.5, .9)), s.spacing, "LAS", **stored)
        if case < 60:
            save_nifti(root / part / f"label/label{case:04d}.nii.gz", labels(s.tissue, BTCV), s.spacing, "LAS", np.uint8)
    junk(root / "Training/img/._img0001.nii.gz")


def write_microsegnet(out, seed):
    root = out / "Micro_Ultrasound_Prostate_Segmentation_Dataset"
    for part, case in [("train", c) for c in (1, 2, 3, 5, 8)] + [("test", 1), ("test", 2)]:
        image, mask = micro_ultrasound(generator(seed, "microsegnet", part, case))
        masks = {"expert": ("expert", mask), "non_expert": ("nonexpert", np.roll(mask, 4, 2))} if part == "train" else {
            "expert": ("expert", mask), **{who: (who, np.roll(mask, shift, 1)) for who, shift in (
                ("clinician", 2), ("master_student", 4), ("medical_student", -5))}}
        save = lambda folder, name, a: save_nifti(root / part / folder / f"{name}_{part}_{case:02d}.nii.gz", a, (1, 1, 1), "LPS", np.uint8)
        save("micro_ultrasound_scans", "microUS", image)
        for folder, (name, a) in masks.items():
            save(f"{folder}_annotations", f"{name}_annotation", a)


def write_promise12(out, seed):
    for part, case in [("training", c) for c in (0, 2, 7, 13, 26)] + [("test", c) for c in (0, 1, 2)]:
        rng = generator(seed, "promise12", part, case)
        s = trunk(rng, -5, 4.5, 16, (16, 26), (112, 160), shift=4., zoom=(.85, 1.2), bend=.4)
        image = mr(s, TORSO, 3, bias=.3)
        if case == 13:                                                                           # endorectal coil
            image *= 1 + 4 * np.exp(-np.hypot(s.x, s.y - 3.5) / 2.5)
        tilt, stem = 8. if case == 7 else 0., out / f"PROMISE12/{part}_data/Case{case:02d}"
        save_itk(stem.with_suffix(".mhd"), image, s.spacing, np.int16, tilt)
        if (part, case) != ("test", 2):
            save_itk(stem.with_name(stem.name + "_segmentation.mhd"), labels(s.tissue, {"prostate": 1}), s.spacing, np.int8, tilt)


def brats_subject(seed, case):
    """'BraTS-GLI-00005-001' -> scene of that patient's brain, {modality: (z, y, x) with background exactly 0}."""
    s = Scene(generator(seed, "brats", case[:15]), np.linspace(-5.2, 7.6, 22), 120, 24., shift=2., zoom=(.75, 1.1), bend=.25, grain=1.2)
    brain(s, tumour=True, enhancing="00005" not in case)
    s.rng = generator(seed, "brats", case)                                                       # another day, another scan
    scans = {m: mr(s, BRAIN, i + 1, noise=.025, top=s.rng.uniform(500, 4000)) for i, m in enumerate(("t1n", "t1c", "t2w", "t2f"))}
    return s, {m: np.where(s.tissue > 0, np.maximum(np.rint(a), 1), 0) for m, a in scans.items()}


def write_brats_gli(out, seed):
    top = "ASNR-MICCAI-BraTS2023-GLI-Challenge-"
    for part, cases in (("Training", ("00000-000", "00002-000", "00003-000", "00005-000", "00005-001", "00006-000")),
                        ("Validation", ("00001-000", "00001-001", "00013-000"))):
        for case in ("BraTS-GLI-" + c for c in cases):
            folder = out / f"{top}{part}Data" / (f"{top}{part}Data" if part == "Training" else "") / case
            s, scans = brats_subject(seed, case)
            if "00003" in case:
                scans["t1n"][0, :2] = -3                                                         # min is not 0
            for modality, scan in scans.items():
                save_nifti(folder / f"{case}-{modality}.nii.gz", scan, s.spacing, "LPS")
            if part == "Training":
                seg = labels(s.tissue, {"core": 1, "edema": 2, "enhancing": 3})
                save_nifti(folder / f"{case}-seg.nii.gz", seg, s.spacing, "LPS", np.uint8)
    save_text(folder.parent / "BraTS2023_mapping.csv", "BraTS2023,BraTS2021\n")
    junk(folder / f"._{case}-t1n.nii.gz")


def write_brats_local(out, seed):
    top = "ASNR-MICCAI-BraTS2023-Local-Synthesis-Challenge-"
    for part, cases in (("Training", ("00000-000", "00002-000", "00003-000", "00005-000", "00005-001", "00006-000", "00008-000")), ("Validation", ("00001-000",))):
        for case in ("BraTS-GLI-" + c for c in cases):
            s, scans = brats_subject(seed, case)
            grow = blur(blur(blur(s.is_("core", "edema", "enhancing").astype(np.float32))))      # by three voxels
            unhealthy, home = grow > 0, (s.tissue > 0) & (blur(blur(grow)) == 0)
            k, i, j = s.rng.permutation(np.argwhere(home & (np.abs(s.z - 2) < 3)))[0]
            level = np.sqrt((s.x - s.x[k, i, j]) ** 2 + 1.4 * (s.y - s.y[k, i, j]) ** 2 + (s.z - s.z[k, 0, 0]) ** 2)
            healthy = home & (level / s.rng.uniform(1.4, 2.4) + .2 * s.grain[0] < 1)
            mask = healthy | unhealthy
            parts = {"t1n-voided": scans["t1n"] * ~mask, "mask": mask}
            if part == "Training":
                parts.update({"t1n": scans["t1n"], "mask-healthy": healthy, "mask-unhealthy": unhealthy})
            for name, a in parts.items():                                                        # floats, as measured
                kind = dict(dtype=np.float32, form="qform") if part == "Validation" or name == "t1n-voided" else dict(
                    dtype=np.int16 if name == "t1n" else np.uint8)
                save_nifti(out / (top + part) / case / f"{case}-{name}.nii.gz", a, s.spacing, "LPS", **kind)


def write_ldct(out, seed):
    top, rows = out / "manifest-1648648375084", []
    spell = {"L004": ("Full dose images", "Low Dose Images"), "L006": ("Full Dose Images", "LOW DOSE IMAGES"),
             "C052": ("full dose images", "low dose images"), "N012": ("Full Dose Images", "Low dose images"), "C001": ("Full Dose Images",)}
    for subject, names in spell.items():
        rng = generator(seed, "ldct", subject)
        z = np.linspace(*{"L": (17, 36), "C": (34, 56), "N": (-1, 7)}[subject[0]], {"N": 6}.get(subject[0], 10)) + rng.uniform(-1, 1)
        s = Scene(rng, z, 128, rng.uniform(25, 29) if subject[0] == "N" else rng.uniform(36, 44))
        s = brain(s, head=True) if subject[0] == "N" else torso(s)
        study, table = f"1.2.826.0.1.3680043.8.498.{rng.integers(10**15)}", BRAIN if subject[0] == "N" else TORSO
        contrast, scan = rng.uniform(.2, .9), rng.bit_generator.state
        for order, name in enumerate(rng.permutation([*names, "Full Dose Projections"] if subject == "L004" else names)):
            low = name.lower().startswith("low")
            s.rng.bit_generator.state = scan                                                     # the same tissue values
            hu = ct(s, 3, contrast, table)
            if low:                                                                              # streaks and grain
                hu += 14 * rng.standard_normal(s.shape) + 9 * rng.standard_normal((len(z), 128, 1)) + 9 * blur(rng.standard_normal(s.shape))
            day, tail = f"0{rng.integers(1, 9)}-21-2018", f"{rng.integers(10**5):05d}"
            folder = f"LDCT-and-Projection-data/{subject}/08-21-2018-NA-NA-{study[-5:]}/1.{order:06d}-{name}-{tail}"
            save_dicom(top / folder, hu[:1] if "Proj" in name else hu, s.spacing, rng, {
                "0008|103e": name, "0010|0020": subject, "0010|0010": "Anonymous", "0020|000d": study, "0008|0020": "20180821",
                "0008|0030": "120000", "0008|0070": "GE MEDICAL SYSTEMS" if subject == "C001" else "SIEMENS"})
            rows.append({"Subject ID": subject, "Study UID": study, "Study Date": day, "Series Description": name, "Modality": "CT",
                         "Number of Images": len(hu), "File Location": "./" + folder})
    with open(top / "metadata.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_chest_xray(out, seed):
    montgomery, kaggle = out / "MontgomerySet", out / "Lung Segmentation"
    for i, name in enumerate(("MCUCXR_0001_0", "MCUCXR_0002_0", "MCUCXR_0003_0", "MCUCXR_0005_0", "MCUCXR_0104_1", "MCUCXR_0108_1", "MCUCXR_0141_1", "MCUCXR_0150_1",
                              "CHNCXR_0001_0", "CHNCXR_0004_0", "CHNCXR_0010_0", "CHNCXR_0327_1", "CHNCXR_0330_1", "CHNCXR_0025_0")):
        image, left, right = chest_xray(generator(seed, "chest_xray", name), *((192, 160), (160, 192), (176, 176))[i % 3])
        reading = "Patient's Sex: F\nPatient's Age: 040Y\n" + ("normal\n" if name.endswith("0") else "tuberculosis\n")
        if name.startswith("MCU"):
            save_png(montgomery / f"CXR_png/{name}.png", image)
            save_png(montgomery / f"ManualMask/leftMask/{name}.png", left)                       # 1 bit
            save_png(montgomery / f"ManualMask/rightMask/{name}.png", right)
            save_text(montgomery / f"ClinicalReadings/{name}.txt", reading)
        if name.startswith("CHN") or i < 2:
            mask = 255 * (left | right).astype(np.uint8)
            save_png(kaggle / f"CXR_png/{name}.png", np.dstack([image] * 3) if name == "CHNCXR_0004_0" else image)
            save_text(kaggle / f"ClinicalReadings/{name}.txt", reading)
            if name != "CHNCXR_0025_0":
                save_png(kaggle / ("masks/" + name + ("_mask.png" if name.startswith("CHN") else ".png")), mask[::2, ::2] if name == "CHNCXR_0010_0" else mask)
    save_png(kaggle / "test/CHNCXR_0040_0.png", chest_xray(generator(seed, "chest_xray", 40), 160, 160)[0])
    junk(out / "__MACOSX/MontgomerySet/CXR_png/._MCUCXR_0001_0.png", montgomery / "ManualMask/leftMask/._MCUCXR_0001_0.png")


def write_acdc(out, seed):
    groups = ("NOR", "MINF", "DCM", "HCM", "RV")
    for case in (1, 2, 3, 5, 8, 101, 104):
        name = f"patient{case:03d}"
        folder = out / "ACDC/database" / ("training" if case <= 100 else "testing") / name
        frames, ed, es, rng = {}, 4 if case == 3 else 1, 9 + case % 5, generator(seed, "acdc", case)
        size, fov, slices = 8 * rng.integers(14, 20), rng.uniform(24, 34), rng.integers(8, 11)
        for frame, squeeze in ((ed, 0), (es, 1)):
            s = heart(Scene(generator(seed, "acdc", case, "anatomy"), np.linspace(-.6, 7.8, slices), (size, size - 16), fov, shift=3.5,
                            zoom=(.75, 1.15), turn=35, bend=.4), squeeze)
            image = frames[frame] = mr(s, CINE, None, bias=.35)
            save_nifti(folder / f"{name}_frame{frame:02d}.nii.gz", image, s.spacing, "RAS", form="sform")
            save_nifti(folder / f"{name}_frame{frame:02d}_gt.nii.gz", labels(s.tissue, {"rv": 1, "myo": 2, "lv": 3}), s.spacing, "RAS", np.uint8, "sform")
        save_nifti(folder / f"{name}_4d.nii.gz", np.stack(list(frames.values())), s.spacing, "RAS", form="sform")
        save_text(folder / "Info.cfg", f"ED: {ed}\nES: {es}\nGroup: {groups[case % 5]}\nHeight: 170.0\nNbFrame: 25\nWeight: 70.0\n")
        save_text(folder / "MANDATORY_CITATION.md", "Stand-in: nothing to cite.\n")


def write_la(out, seed):
    names = ("07WDMSAV2VFSPTTYBPZY", "0RZDK210BSMWAA6467LU", "1D7CUD1955YZPGK8XHJX", "5HH5BRS6LBFZQTBMAFRC", "CMPXO4J23G58J53Q98SZ",
             "4498CA6DZWELOXCBRYRF", "67W9VHOSUK9Z2UDA96WQ")
    for i, name in enumerate(names):
        s = trunk(generator(seed, "la", name), 38, 48, 20, (24, 36), (128, 160), shift=5., zoom=(.75, 1.15), turn=25)
        image, atrium = mr(s, TORSO, 4, top=200), s.is_("la")
        wall = (blur(atrium.astype(np.float32)) > 0) & ~atrium
        folder = out / "LA2018" / ("Training Set" if i < 5 else "Testing Set") / name
        for file, a in (("lgemri", np.minimum(image, 255)), ("laendo", 255 * atrium), ("lawall", 255 * wall)):
            save_itk(folder / f"{file}.nrrd", a, (1, 1, 1) if i == 1 else s.spacing, np.uint8)
    save_text(out / "LA2018/Training Set" / names[4] / "desktop.ini", "[.ShellClassInfo]\n")


LESION_HOMES = {4: ("liver", "liver.tumour"), 5: ("lung", "lung.tumour"), 6: ("kidney_l", "kidney.tumour"), 7: ("muscle", "node"), 1: ("marrow", "node"), 2: ("fat", "node")}


def write_deeplesion(out, seed):
    rows, root = [], out / "DeepLesion"
    for index, patient in enumerate((1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 14, 17, 19, 20)):
        part = 1 if index < 8 else 2 if index < 11 else 3
        for study, series, height in ((1, 1, 0), (1, 1, 1), (2, 1, 2)):
            rng, place = generator(seed, "deeplesion", patient), generator(seed, "deeplesion", patient, study, height)
            z = place.uniform(*((4, 20), (20, 34), (38, 52))[(patient + height) % 3])
            size = 192 if patient == 4 else 144
            s = torso(Scene(rng, np.array((z - .5, z, z + .5)), size, rng.uniform(34, 44)))
            stem, key, found = f"{patient:06d}_{study:02d}_{series:02d}", int(20 + 2 * z), []
            s.rng = place
            for kind in place.permutation([k for k, (home, _) in LESION_HOMES.items() if np.sum(s.is_(home)[1]) > 40])[:place.integers(1, 4)]:
                before = s.tissue[1].copy()
                s.lesions(*LESION_HOMES[kind], 1, (1, 2.5))
                rest, across = (np.flatnonzero((s.tissue[1] != before).any(axis)) for axis in (1, 0))
                if len(rest) > 4 and len(across) > 4:
                    found.append((kind, across[0] + 1, rest[0] + 1, across[-1] + 1, rest[-1] + 1))   # 1-based
            hu = ct(s, 8)
            for k, slice_ in enumerate(hu):
                if (patient, height, k) != (2, 0, 2):                                            # a neighbour is missing
                    save_png(root / f"Images_png/{stem}/{key - 1 + k:03d}.png", (np.rint(slice_).astype(np.int32) + 32768).astype(np.uint16))
            for kind, x1, y1, x2, y2 in found:
                noisy, xc, yc = int((patient, height) in ((3, 0), (10, 1), (17, 2))), (x1 + x2) / 2, (y1 + y2) / 2
                join = lambda *values: ", ".join(f"{v:g}" for v in values)
                rows.append(dict(
                    File_name=f"{stem}_{key:03d}.png", Patient_index=patient, Study_index=study, Series_ID=series, Key_slice_index=key,
                    Measurement_coordinates=join(x1, yc, x2, yc, xc, y1, xc, y2), Bounding_boxes=join(x1 - 5, y1 - 5, x2 + 5, y2 + 5),
                    Lesion_diameters_Pixel_=join(*sorted((x2 - x1, y2 - y1))[::-1]), Normalized_lesion_location=join(xc / size, yc / size, (z + 8) / 72),
                    Coarse_lesion_type=-1 if part == 1 else kind, Possibly_noisy=noisy, Slice_range=join(key - 1, key + 1),
                    Spacing_mm_px_=join(*s.spacing), Image_size=join(size, size), DICOM_windows="-1500, 500" if kind == 5 else "-175, 275",
                    Patient_gender="FM"[patient % 2], Patient_age="NaN" if patient == 7 else 40 + patient, Train_Val_Test=part))
    with open(root / "DL_info.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_msd(out, seed, task, pattern, ids, draw, names, modality="CT", codes="RAS", missing=(), dtypes={}):
    """An MSD task: `ids` (the last has no label and is the test case); draw(rng) -> (image, label, spacing)."""
    root, training = out / task, []
    for case in ids:
        image, label, spacing = draw(generator(seed, task, case))
        name, part = pattern.format(case) + ".nii.gz", "Ts" if case == ids[-1] else "Tr"
        dtype, label_dtype = dtypes.get(case, (np.int16, np.uint8))
        save_nifti(root / f"images{part}" / name, image, spacing, codes, dtype)
        if part == "Tr":
            training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
            if case not in missing:
                save_nifti(root / "labelsTr" / name, label, spacing, codes, label_dtype)
    save_text(root / "dataset.json", {
        "name": task.split("_")[1], "description": "stand-in", "reference": "", "licence": "", "relase": "0.0", "tensorImageSize": "3D",
        "modality": {"0": modality}, "labels": {str(i): n for i, n in enumerate(("background", *names))}, "numTraining": len(training),
        "numTest": 1, "training": training, "test": [f"./imagesTs/{name}"]})
    junk(root / f"imagesTr/._{pattern.format(ids[0])}.nii.gz", root / f"labelsTr/._{pattern.format(ids[0])}.nii.gz")


def write_msd_liver(out, seed):
    def draw(rng):
        s = trunk(rng, 18, 37, 16, shift=5., turn=30)
        s.lesions("liver", "liver.tumour", rng.integers(2, 5), (.8, 2.2))
        return ct(s), labels(s.tissue, {"liver": 1, "liver.tumour": 2}), s.spacing
    write_msd(out, seed, "Task03_Liver", "liver_{}", (0, 1, 2, 5, 10, 11, 23, 131), draw, ("liver", "cancer"))


def write_msd_lung(out, seed):
    def draw(rng):
        s = trunk(rng, 30, 57, 18)
        s.lesions("lung", "lung.tumour", rng.integers(1, 4), (1, 2.5))
        return ct(s, contrast=.1), labels(s.tissue, {"lung.tumour": 1}), s.spacing
    write_msd(out, seed, "Task06_Lung", "lung_{:03d}", (1, 3, 4, 5, 6, 9, 10, 14, 2), draw, ("cancer",), codes="LPS", missing=(14,))


def write_msd_spleen(out, seed):
    def draw(rng):
        s = trunk(rng, 20, 37, 14)
        return ct(s, contrast=rng.uniform(.5, 1)), labels(s.tissue, {"spleen": 1}), s.spacing
    write_msd(out, seed, "Task09_Spleen", "spleen_{}", (2, 3, 6, 8, 9, 10, 12, 1), draw, ("spleen",), dtypes={3: (np.float32, np.float32), 6: (np.int16, np.uint16)})


def write_msd_hippocampus(out, seed):
    def draw(rng):
        nx, ny, nz = rng.integers((32, 44, 30), (40, 56, 40))
        s = hippocampus(Scene(rng, np.arange(nz) / 10 - nz / 20, (ny, nx), nx / 10, shift=.7, zoom=(.8, 1.25), turn=25, bend=.12, grain=.7), rng.choice((-1, 1)))
        return mr(s, BRAIN, 1, top=rng.choice((130, 900))), labels(s.tissue, {"hippocampus.front": 1, "hippocampus.back": 2}), s.spacing
    write_msd(out, seed, "Task04_Hippocampus", "hippocampus_{:03d}", (1, 3, 4, 6, 7, 8, 11, 14, 17, 20, 23, 2), draw, ("Anterior", "Posterior"), "MRI",
              dtypes={1: (np.uint8, np.uint8), 3: (np.float32, np.float32)})


def write_nerve_ultrasound(out, seed):
    root = out / "Dataset801_NerveUltrasound"
    for case in (0, 1, 2, 3, 5, 6, 7, 8, 10, 13, 14, 17, 4, 9, 11, 12):
        rng, part = generator(seed, "nerve", case), "Ts" if case in (4, 9, 11, 12) else "Tr"
        image, label = nerve_ultrasound(rng, *8 * rng.integers(18, 26, 2))
        save_png(root / f"images{part}/us_{case:04d}_0000.png", np.dstack([image] * 3) if case % 5 == 3 else image)
        save_png(root / f"labels{part}/us_{case:04d}.png", label)
    save_text(root / "dataset.json", {"name": "NerveUltrasound", "channel_names": {"0": "ultrasound"}, "numTraining": 12, "file_ending": ".png",
                                      "labels": {"background": 0, "nerve": 1, "vessel": 2}})


def write_ms_flair(out, seed):
    root = out / "Dataset802_MsT1ToFlair"
    for case in (7, 12, 19, 21, 3, 26):
        s = brain(Scene(generator(seed, "ms", case), np.linspace(-4, 7.5, 18), (128, 112), 20., shift=1.5, zoom=(.8, 1.05), bend=.25, grain=1.2), plaques=14)
        part = "Ts" if case in (3, 26) else "Tr"
        for folder, column, top, suffix in (("images", 1, 900, "_0000"), ("labels", 4, 160, "")):
            scan = mr(s, BRAIN, column, top=top) + s.rng.normal(0, .012 * top, s.shape)          # dips below 0, as the real ones
            save_nifti(root / f"{folder}{part}/ms_{case:02d}{suffix}.nii.gz", scan, s.spacing, "LAS", np.float32, "qform")
    save_text(root / "dataset.json", {"name": "MsT1ToFlair", "channel_names": {"0": "T1"}, "labels": "image", "numTraining": 4, "file_ending": ".nii.gz"})


STAND_INS = {
    "amos_ct": write_amos_ct, "amos_mri": write_amos_mri, "word": write_word, "btcv": write_btcv, "microsegnet": write_microsegnet,
    "promise12": write_promise12, "brats_gli": write_brats_gli, "brats_local": write_brats_local, "ldct": write_ldct,
    "chest_xray": write_chest_xray, "acdc": write_acdc, "la": write_la, "deeplesion": write_deeplesion, "msd_liver": write_msd_liver,
    "msd_lung": write_msd_lung, "msd_spleen": write_msd_spleen, "msd_hippocampus": write_msd_hippocampus,
    "Dataset801_NerveUltrasound": write_nerve_ultrasound, "Dataset802_MsT1ToFlair": write_ms_flair}
SIXTEEN = tuple(STAND_INS)[:16]


def write(out, seed=0, datasets=None):
    """Write the stand-ins named in `datasets` (default: the sixteen) under `out`, a new or empty place for each; the same
    (seed, dataset) gives the same bytes."""
    for name in tqdm(datasets or SIXTEEN, desc="stand-ins", disable=None):
        if name not in STAND_INS:
            raise ValueError(f"no stand-in is called {name!r}: choose from {', '.join(STAND_INS)}")
        STAND_INS[name](Path(out), seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; becomes a --data_root")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other subjects")
    parser.add_argument("--datasets", nargs="+", default=list(SIXTEEN), choices=list(STAND_INS), metavar="NAME", help="which to write, of: " + ", ".join(STAND_INS))
    args = parser.parse_args()
    start = time.time()
    write(args.out, args.seed, args.datasets)
    files = [f for f in args.out.rglob("*") if f.is_file()]
    print(f"{len(args.datasets)} stand-ins, {len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {args.out}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
