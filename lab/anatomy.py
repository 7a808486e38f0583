"""Drawn anatomy and its images: what lab/phantom.py writes as stand-ins of datasets.

One body is drawn in centimetres. x points to the patient's left, y to the back, z up (LPS).
Organs are rows of a table: ellipsoids and tubes, painted one over another into a `Scene`. A
modality (`ct`, `mr`, ultrasound, X-ray) turns the scene's tissues into an image. CT of chest and
abdomen, MR of the same, left atrium, prostate and chest X-ray all view one torso.

Volumes are (z, y, x): a slice is a picture, its rows run front to back, its columns from the
patient's right to the left. Lengths are cm unless a name says mm.
"""

import zlib
from dataclasses import dataclass, replace

import numpy as np

# --------------------------------------------------------------------------------------------------
# Tissues. The part of a name after the dot is a detail that keeps its organ's label:
# kidney_r.sinus counts as kidney_r.

TORSO = {  # name: (HU, gain in HU at full contrast, T1, T2 with bright fat, late gadolinium)
    "skin": (20, 0, 0.5, 0.3, 0.4),              "fat": (-105, 0, 0.85, 0.55, 0.55),
    "muscle": (50, 8, 0.4, 0.2, 0.35),           "bone": (700, 0, 0.08, 0.06, 0.1),
    "marrow": (230, 0, 0.6, 0.5, 0.45),          "disc": (85, 0, 0.35, 0.6, 0.4),
    "cord": (35, 0, 0.35, 0.8, 0.4),             "rib": (480, 0, 0.2, 0.2, 0.2),
    "table": (-350, 0, 0, 0, 0),                 "lung": (-850, 0, 0.05, 0.06, 0.05),
    "lung.vessel": (-250, 200, 0.3, 0.2, 0.3),   "lung.tumour": (35, 20, 0.4, 0.55, 0.4),
    "airway": (-990, 0, 0, 0, 0),                "vessel": (42, 150, 0.55, 0.15, 0.7),
    "heart": (-70, 0, 0.75, 0.65, 0.45),         "myocardium": (60, 45, 0.4, 0.35, 0.15),
    "lv": (42, 190, 0.55, 0.3, 0.72),            "rv": (42, 190, 0.55, 0.3, 0.68),
    "ra": (42, 170, 0.55, 0.3, 0.7),             "la": (42, 190, 0.55, 0.3, 0.82),
    "pa": (42, 200, 0.5, 0.2, 0.72),             "aorta": (42, 210, 0.6, 0.1, 0.75),
    "ivc": (42, 110, 0.55, 0.12, 0.65),          "portal": (42, 130, 0.58, 0.14, 0.6),
    "liver": (58, 50, 0.55, 0.35, 0.45),         "liver.vessel": (45, 95, 0.65, 0.2, 0.5),
    "liver.tumour": (30, 25, 0.3, 0.62, 0.5),    "gallbladder": (8, 0, 0.2, 0.95, 0.2),
    "spleen": (48, 70, 0.42, 0.6, 0.4),          "spleen.vessel": (48, 85, 0.5, 0.5, 0.4),
    "kidney_r": (32, 130, 0.45, 0.65, 0.4),      "kidney_r.sinus": (-60, 30, 0.75, 0.8, 0.6),
    "kidney_l": (32, 130, 0.45, 0.65, 0.4),      "kidney_l.sinus": (-60, 30, 0.75, 0.8, 0.6),
    "kidney_l.tumour": (20, 40, 0.35, 0.6, 0.4), "pancreas": (38, 55, 0.65, 0.45, 0.4),
    "esophagus": (35, 20, 0.4, 0.4, 0.4),        "adrenal_r": (30, 45, 0.5, 0.4, 0.4),
    "adrenal_l": (30, 45, 0.5, 0.4, 0.4),        "duodenum": (28, 35, 0.45, 0.55, 0.4),
    "stomach": (25, 15, 0.3, 0.75, 0.3),         "stomach.gas": (-950, 0, 0.02, 0.02, 0),
    "colon": (30, 20, 0.5, 0.45, 0.4),           "colon.gas": (-850, 0, 0.03, 0.03, 0),
    "bowel": (28, 35, 0.4, 0.6, 0.4),            "rectum": (40, 20, 0.4, 0.35, 0.4),
    "rectum.gas": (-800, 0, 0.03, 0.03, 0),      "bladder": (8, 0, 0.2, 1, 0.2),
    "seminal": (25, 10, 0.4, 0.85, 0.4),         "prostate": (42, 25, 0.42, 0.36, 0.4),
    "prostate.zone": (36, 20, 0.4, 0.88, 0.4),   "femur_r": (320, 0, 0.6, 0.5, 0.5),
    "femur_l": (320, 0, 0.6, 0.5, 0.5),          "node": (35, 35, 0.4, 0.5, 0.4),
}
BRAIN = {  # name: (HU, t1n, t1c, t2w, t2f)
    "scalp": (-20, 0.8, 0.8, 0.6, 0.5),          "skull": (1000, 0.05, 0.05, 0.05, 0.05),
    "csf": (6, 0.14, 0.14, 1, 0.12),             "gray": (39, 0.5, 0.5, 0.62, 0.62),
    "white": (30, 0.72, 0.72, 0.45, 0.47),       "deep": (37, 0.57, 0.58, 0.52, 0.57),
    "edema": (22, 0.48, 0.48, 0.85, 1),          "core": (14, 0.25, 0.22, 0.9, 0.5),
    "enhancing": (45, 0.45, 1, 0.72, 0.85),      "plaque": (24, 0.42, 0.45, 0.85, 1),
    "hippocampus.front": (38, 0.47, 0.48, 0.62, 0.65),
    "hippocampus.back": (38, 0.5, 0.5, 0.62, 0.65),
}
CINE = {  # name: (bSSFP,)
    "lung": (0.06,), "fat": (0.65,), "muscle": (0.3,), "bone": (0.12,), "heart": (0.6,),
    "wall": (0.35,), "rv": (0.9,), "lv": (0.95,), "myo": (0.32,), "lv.papillary": (0.38,),
    "liver": (0.42,), "aorta": (0.9,), "stomach": (0.5,), "stomach.gas": (0.03,),
}
NAMES = ["air", *dict.fromkeys([*TORSO, *BRAIN, *CINE])]
CODE = {name: code for code, name in enumerate(NAMES)}


def labels(tissue, ids):
    """Tissue codes -> uint8 label map of the same shape; ids: {tissue: label}.

    A detail without an id takes its organ's. A tissue without either is 0.
    """
    table = [ids.get(name, ids.get(name.split(".")[0], 0)) for name in NAMES]
    return np.array(table, np.uint8)[tissue]


def numbered(names):
    """'spleen liver' -> {"spleen": 1, "liver": 2}; names joined by + share a number."""
    groups = enumerate(names.split(), 1)
    return {name: number for number, group in groups for name in group.split("+")}


def generator(seed, *key):
    """The generator of one case. It depends on nothing but (seed, key)."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, key)).encode())])


def smooth_noise(rng, shape, cells):
    """Noise of unit variance, float32 of `shape`, with about `cells` bumps along each axis."""
    noise = rng.standard_normal([count + 3 for count in cells], np.float32)
    for axis, (length, count) in enumerate(zip(shape, cells)):
        places = np.linspace(1, count + 1, length)[:, None]
        basis = np.exp(-2 * (places - np.arange(count + 3)) ** 2)  # (length, count + 3)
        basis = (basis / np.sqrt((basis ** 2).sum(1, keepdims=True))).astype(np.float32)
        noise = np.moveaxis(np.tensordot(basis, noise, (1, axis)), 0, axis)
    return noise


def blur_slices(volume):
    """[1 2 1] / 4 along rows and columns (the last two axes); edges are repeated."""
    for axis in (-1, -2):
        length = volume.shape[axis]
        first, last = np.take(volume, [0], axis), np.take(volume, [-1], axis)
        padded = np.concatenate((first, volume, last), axis)
        before = np.take(padded, range(length), axis)
        after = np.take(padded, range(2, length + 2), axis)
        volume = 0.25 * before + 0.5 * volume + 0.25 * after
    return volume


def rotated(u, v, angle):
    """Plane coordinates -> the same in axes that are turned by `angle` (radians)."""
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    return cos * u + sin * v, cos * v - sin * u


# --------------------------------------------------------------------------------------------------
# Shapes, and the volume that they are painted into


@dataclass(frozen=True)
class Shape:
    """An Ellipsoid (a centre, three radii) or a Tube (a line of points, one radius)."""
    tissue: str
    where: tuple | list | np.ndarray    # (x, y, z) or a list of them, cm
    size: tuple | float | np.ndarray    # radii or radius, cm
    turn: float = 0                     # degrees from +x (left) towards +y (back)

    def altered(self, move, zoom):
        """The shape moved by `move` (x, y, z) cm, its size multiplied by `zoom`, in float32."""
        where = (np.array(self.where) + move).astype(np.float32)
        return replace(self, where=where, size=(np.array(self.size) * zoom).astype(np.float32))

    def bounds(self):
        """Two corners, (x, y, z) each, between which an altered shape lies, however turned."""
        points = self.where.reshape(-1, 3)
        return points.min(0) - self.reach(), points.max(0) + self.reach()


class Ellipsoid(Shape):
    def reach(self):
        across = self.size[:2].max()
        return 1.3 * np.array((across, across, self.size[2]))

    def level(self, x, y, z):
        """Distance from the centre as a share of the radius: 1 on the surface."""
        x, y, z = x - self.where[0], y - self.where[1], z - self.where[2]
        x, y = rotated(x, y, np.deg2rad(self.turn))
        return np.sqrt((x / self.size[0]) ** 2 + (y / self.size[1]) ** 2 + (z / self.size[2]) ** 2)


class Tube(Shape):
    def reach(self):
        return 1.3 * self.size

    def level(self, x, y, z):
        """Distance from the line as a share of the radius: 1 on the surface."""
        nearest = np.inf  # squared distance, cm2
        for (px, py, pz), step in zip(self.where[:-1], np.diff(self.where, axis=0)):
            dx, dy, dz = step
            share = ((x - px) * dx + (y - py) * dy + (z - pz) * dz) / (step @ step)
            t = np.clip(share, 0, 1)  # 0: nearest to the segment's start, 1: to its end
            distance = (x - px - t * dx) ** 2 + (y - py - t * dy) ** 2 + (z - pz - t * dz) ** 2
            nearest = np.minimum(nearest, distance)
        return np.sqrt(nearest) / self.size


def both(shape, sides=("", "")):
    """A shape of the patient's left (x > 0) -> its mirror image on the right, and itself.

    sides: what is added to the tissue's name on the right and on the left.
    """
    mirrored = np.array(shape.where) * (-1.0, 1, 1)
    right = replace(shape, tissue=shape.tissue + sides[0], where=mirrored, turn=-shape.turn)
    return right, replace(shape, tissue=shape.tissue + sides[1])


@dataclass(frozen=True)
class Variation:
    """How far a subject may differ from the drawn body."""
    shift: float = 2.5           # cm that the body may move to each side, to front and to back
    zoom: tuple = (0.85, 1.1)    # range of the body's scale
    turn: float = 18.0           # degrees that the body may turn, either way
    bend: float = 0.6            # cm of smooth deformation, about
    jitter: float = 0.4          # how far an organ may move, as a share of its smallest radius
    rough: float = 0.1           # how uneven an outline is, as a share of the radius
    grain: float = 1.6           # cm between the bumps of the texture, about


@dataclass(frozen=True)
class Lesion:
    """A kind of lesion: balls of `tissue` that start inside `organ`."""
    organ: str
    tissue: str
    over: tuple = ()             # further tissues that the balls may cover
    core: str | None = None      # tissue of the inside, to half of the radius


class Scene:
    """A volume that is being painted.

    x, y: (z, y, x), z: (z, 1, 1): body coordinates of every voxel, cm. spacing: mm, (x, y, z).
    tissue: (z, y, x), uint8 codes. grain: two textures, (z, y, x), of about unit variance.
    free: where `paint` may paint, (z, y, x) bool, or None for everywhere.
    """

    def __init__(self, rng, z, size, fov, variation=Variation()):
        """z: heights of the slices, evenly spaced; size: rows and columns; fov: cm across."""
        rows, columns = (size, size) if np.isscalar(size) else size
        pixel = fov / columns
        scale = rng.uniform(*variation.zoom)
        angle = np.deg2rad(rng.uniform(-variation.turn, variation.turn))
        move = rng.uniform(-variation.shift, variation.shift, 2)
        u = (np.arange(columns) - (columns - 1) / 2)[None, None] * pixel - move[0]
        v = (np.arange(rows) - (rows - 1) / 2)[None, :, None] * pixel - move[1]
        x, y = rotated(u, v, angle)  # (1, rows, columns)
        self.rng = rng
        self.shape = (len(z), rows, columns)
        self.spacing = (10 * pixel, 10 * pixel, 10 * float(z[1] - z[0]))
        self.jitter, self.rough = variation.jitter, variation.rough
        self.margin = 4 * variation.bend
        self.free = None
        bends = [variation.bend * smooth_noise(rng, self.shape, (2, 4, 4)) for _ in range(2)]
        self.x = bends[0] + (x / scale).astype(np.float32)
        self.y = bends[1] + (y / scale).astype(np.float32)
        self.z = np.asarray(z, np.float32)[:, None, None]
        cells = [max(int(n * pixel / variation.grain / scale), 3) for n in (rows, columns)]
        cells = (max(len(z) // 3, 1), *cells)
        self.grain = [smooth_noise(rng, self.shape, cells) for _ in range(2)]
        self.tissue = np.zeros(self.shape, np.uint8)

    def is_(self, *names):
        """Where the volume holds one of these tissues: (z, y, x) bool."""
        return np.isin(self.tissue, [CODE[name] for name in names])

    def fill(self, name, where):
        """Paint `where`: bool, broadcast to the volume."""
        self.tissue[np.broadcast_to(where, self.shape)] = CODE[name]

    def box(self, low, high):
        """-> three slices of the volume: the part that holds all voxels between two points, cm.

        The middle slice decides about rows and columns, with a margin for the body's bends.
        """
        x, y, z = self.x[len(self.x) // 2], self.y[len(self.y) // 2], self.z.ravel()
        near = (x > low[0] - self.margin) & (x < high[0] + self.margin)
        near &= (y > low[1] - self.margin) & (y < high[1] + self.margin)
        found = []
        for line in ((z >= low[2]) & (z <= high[2]), near.any(1), near.any(0)):
            inside = np.flatnonzero(line)
            found.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0))
        return tuple(found)

    def paint(self, *shapes):
        """Paint shapes, each a little altered and uneven, inside `free` where that is set.

        Bone gets a core of marrow.
        """
        rng = self.rng
        for drawn in shapes:
            radius = np.min(drawn.size)
            move = rng.uniform(-1, 1, 3) * self.jitter * min(radius, 3)
            shape = drawn.altered(move, np.exp(rng.normal(0, 0.08)))
            texture = self.grain[rng.integers(2)]
            rough = float(rng.choice((-1, 1)) * self.rough * min(1, 3 / radius))
            box = self.box(*shape.bounds())
            level = shape.level(self.x[box], self.y[box], self.z[box[0]]) + rough * texture[box]
            free = True if self.free is None else self.free[box]
            self.tissue[box][(level < 1) & free] = CODE[shape.tissue]
            if shape.tissue == "bone":
                self.tissue[box][(level < 1 - 0.45 / radius) & free] = CODE["marrow"]

    def lesions(self, lesion, count, radius):
        """Paint `count` lesions of `radius` = (low, high) cm -> self.

        Nothing is painted outside the lesion's organ and the tissues of `over`.
        """
        home = labels(self.tissue, {lesion.organ: 1}) > 0
        free = home | self.is_(*lesion.over)
        thinnest = (0, 0, 0.06 * self.spacing[2])  # a lesion is over a slice thick
        for k, i, j in self.rng.permutation(np.argwhere(home))[:count]:
            size = self.rng.uniform(*radius) * np.exp(self.rng.normal(0, 0.2, 3))
            size = np.maximum(size, thinnest)
            center = (self.x[k, i, j], self.y[k, i, j], self.z[k, 0, 0])
            self.free = free
            self.paint(Ellipsoid(lesion.tissue, center, size))
            if lesion.core:
                self.free = free & self.is_(lesion.tissue)
                self.paint(Ellipsoid(lesion.core, center, size / 2))
        self.free = None
        return self


# --------------------------------------------------------------------------------------------------
# The torso. z: hip joints 1, navel 16, diaphragm 35, heart 40, lung tips 57 cm.

SIDES = ("_r", "_l")
HIPS = [
    half for center, radii, turn in (
        ((8, 7.6, 1), (5.4, 2.2, 8), 28), ((13, 2.8, 7), (5.8, 1.9, 6), 112),
        ((9.2, -0.5, 9), (4.4, 1.5, 6), 120), ((10.5, -6.3, -1), (2.7, 1.9, 7), 15),
        ((14.3, -3, -1), (1.5, 2.6, 6), -20), ((6, -5.8, -5), (2.8, 2.4, 4), 0),
        ((5.8, -1, -3.2), (3, 1.6, 1.8), 20), ((10.5, 4.6, -2), (3.2, 1.6, 4), 10),
        ((4, 9.6, 12), (3.4, 1.6, 8), 0))
    for half in both(Ellipsoid("muscle", center, radii, turn))]
SKELETON = [  # and the muscles along the spine
    *both(Tube("muscle", [(3.6, 4.6, 26), (4.4, 4.6, 14), (7, -1.5, 4), (9, -2, -3)], 1.8)),
    *both(Ellipsoid("muscle", (3.9, 9, 30), (3.2, 1.9, 30))),
    *both(Ellipsoid("bone", (9.3, 2.3, 11), (6.6, 0.95, 6.5), 120)),
    Ellipsoid("bone", (0, 7.8, 3.5), (4.8, 1.9, 6)),
    *both(Ellipsoid("bone", (8.6, 0.5, 1.6), (3.4, 3.7, 3.6))),
    *both(Tube("bone", [(9.5, 0.5, 1), (13, 1.5, -1)], 1.4)),
    *both(Ellipsoid("bone", (13, 2, -3), (2.1, 2.4, 3.5))),
    *both(Tube("bone", [(7, 3, 0), (6.3, 4.5, -6)], 1.4)),
    *both(Tube("bone", [(7, -2, 0.5), (4, -5, -0.5), (0.7, -5.9, -2)], 1.0)),
    *both(Ellipsoid("femur", (9.5, 0.4, 1.3), (2.4, 2.4, 2.4)), SIDES),
    *both(Ellipsoid("bone", (11, 7.3, 49), (4.3, 0.6, 6.5), -25)),
    *both(Tube("bone", [(1.6, -7, 54.5), (8, -6, 57), (15, -1, 57)], 0.75)),
    *both(Ellipsoid("bone", (16, 0.5, 56), (2.4, 2.4, 2.6)))]
PELVIS = [
    Tube("rectum", [(0, 6, -5), (0, 4.6, 0), (0, 5.2, 5), (0.5, 6, 9)], 1.8),
    Tube("rectum.gas", [(0, 5.2, -5), (0, 4.2, 0), (0, 4.8, 5), (0.5, 5.6, 9)], 0.9),
    *both(Ellipsoid("muscle", (5.3, 0.5, -0.5), (1.1, 4, 3.8))),
    *both(Ellipsoid("muscle", (2.6, 3, -4), (0.6, 3, 3), -20)),
    Ellipsoid("bladder", (0, -3.2, 3.8), (4.2, 3, 3.2)),
    *both(Ellipsoid("seminal", (2, 1.2, 1.8), (2, 0.8, 0.8), -15)),
    Ellipsoid("prostate.zone", (0, 0, -1), (3, 2.3, 2.8)),
    Ellipsoid("prostate", (0, -0.8, -0.8), (2.1, 1.6, 2.3))]
ABDOMEN = [
    Tube("colon", [(-11.3, 1.5, 6), (-11.3, 2, 20)], 2.2),
    Tube("colon", [(11.5, 1.5, 24), (11.6, 3, 8)], 1.6),
    Tube("colon", [(-11, -1, 20), (-6, -7, 18), (0, -8, 16), (7, -7, 19), (10.5, -1, 24)], 1.9),
    Tube("colon", [(11.5, 1, 8), (7, -3, 6), (2, -1, 9), (0, 5.5, 9)], 1.5),
    Ellipsoid("stomach", (6.5, 0.8, 32), (4.2, 4.3, 4.3)),
    Tube("stomach", [(8, -1, 31), (7.3, -5, 27), (3, -7, 23.5), (-2, -5.5, 23)], 2.6),
    Ellipsoid("spleen", (10.2, 4.2, 28.5), (5.3, 3.1, 5.5), 119),
    Ellipsoid("liver", (-7.5, 0.5, 28.5), (8.3, 8.6, 9.5)),
    Ellipsoid("liver", (0, -5.5, 30.5), (8, 4, 4)),
    *both(Ellipsoid("kidney", (6.2, 4.9, 21.3), (2.9, 2.6, 5.4), 35), SIDES),
    *both(Tube("adrenal", [(2.9, 2.8, 28.8), (4.4, 4.8, 27)], 0.55), SIDES),
    Tube("duodenum", [
        (-2, -4, 23.5), (-5, -2.5, 23), (-5.2, 0, 20), (-3, 1.2, 17.5), (2, 0.3, 18.5)], 1.25),
    Tube("pancreas", [
        (-3, -1.2, 20.5), (-2.6, -1.8, 22.5), (0, -2.8, 24), (4, -0.6, 25.5), (8.8, 2.2, 27)],
        1.35),
    Tube("portal", [
        (8.5, 1.2, 26.2), (2, -1, 24.8), (-1.5, -0.8, 23.5), (-4, -1.5, 28), (-7, -2.5, 29)],
        0.75),
    Ellipsoid("gallbladder", (-5.6, -4.6, 22.3), (1.8, 2.5, 3))]
CHEST = [
    Ellipsoid("heart", (2, -3, 39.5), (7, 6.6, 7)),
    Ellipsoid("myocardium", (4.6, -3, 38.5), (4.2, 3.7, 4.6), -40),
    Ellipsoid("rv", (-0.2, -6, 38.5), (4.2, 2.1, 4.3), -15),
    Ellipsoid("ra", (-3.6, -2.6, 40), (2.4, 3, 3.6)),
    Ellipsoid("lv", (4.4, -2.8, 38.7), (3, 2.3, 3.6), -40),
    Tube("pa", [(1, -5, 43), (1.6, -2.6, 46.5), (-4.5, 1, 47.5)], 1.3),
    Tube("pa", [(1.6, -2.6, 46.5), (5.5, 1, 48)], 1.2),
    Ellipsoid("la", (0.6, 0.3, 42), (4.3, 2.6, 3.6)),
    Ellipsoid("la", (4.4, -0.8, 43.5), (1.8, 1, 1.3), -60),
    *both(Tube("la", [(2.5, 1, 43), (5, 1.6, 43.6), (8, 2.6, 44)], 0.85)),
    *both(Tube("la", [(2.5, 1.6, 41), (5.5, 3, 40.6), (8, 4.2, 40)], 0.85))]
PIPES = [
    Tube("ivc", [(-2, 2, 12), (-2.4, 2, 24), (-3, 0.8, 33), (-3, -0.6, 38)], 1.25),
    Tube("vessel", [(-3.4, -2, 42), (-3, -1.5, 55)], 1.0),
    *both(Tube("vessel", [(0.9, 2.3, 14), (3.5, 2.6, 10), (6.5, -2, 3), (7, -5, -4)], 0.75)),
    Tube("airway", [(0, 1, 63), (0.2, 2, 49.5)], 0.9),
    *both(Tube("airway", [(0.2, 2, 49.5), (5, 2.6, 46)], 0.65)),
    Tube("esophagus", [(0.3, 3.2, 61), (0.6, 3.9, 46), (1.5, 2.8, 36), (3.5, 1.6, 33)], 0.85),
    Tube("aorta", [
        (-0.8, -2.4, 41.5), (-1.8, -2.8, 49), (0, -0.2, 52.3), (2.3, 3.6, 50.5), (2.6, 4.2, 48),
        (2.3, 4.2, 36), (0.9, 2.6, 26), (0.7, 2.2, 14)], 1.25)]


def by_height(scene, heights, values):
    """Values between those given for some heights: float32 (z, 1, 1)."""
    return np.interp(scene.z, heights, values).astype(np.float32)


def depth_under_skin(scene):
    """How far every voxel lies under the skin, about: (z, y, x) cm, negative outside the body."""
    half_width = by_height(
        scene, (-8, 2, 16, 40, 50, 57, 60, 62), (17.5, 18, 15.3, 16.5, 17.5, 18.5, 10, 7))
    half_depth = by_height(
        scene, (-8, 2, 16, 40, 50, 56, 62), (11, 11.5, 10.5, 11.8, 11.3, 9, 7))
    u, v = (scene.x / half_width) ** 2, (scene.y / half_depth) ** 2
    oval, rounded_box = np.sqrt(u + v), np.sqrt(np.sqrt(u * u + v * v))
    return (1 - 0.5 * (oval + rounded_box)) * (half_width + half_depth) / 2


def paint_wall(scene, depth):
    """Paint table, skin, fat and muscle -> thickness of the wall, cm, cavity, bool: (z, y, x)."""
    x, y, z = scene.x, scene.y, scene.z
    fat = scene.rng.uniform(0.7, 2.2) * (1 + 0.25 * scene.grain[0] * (z < 20) - 0.3 * (z > 44))
    # The wall is thick at the shoulders.
    wall = fat + by_height(scene, (20, 30, 44, 50, 54, 58), (1.1, 1.4, 1.5, 2.6, 4.6, 8))
    table = (np.abs(y - 13.2 + 0.012 * x * x) < 0.45) & (np.abs(x) < 21)
    scene.fill("table", (depth < -0.4) & table)
    scene.fill("skin", depth > 0)
    scene.fill("fat", depth > 0.2)
    scene.fill("muscle", (depth > fat) & ((z > 9) | (y < -3) & (depth < wall)))
    scene.free = (depth > fat) & (z < 12)
    scene.paint(*HIPS)
    scene.free = None
    across = x / by_height(scene, (-3, 3, 15), (4.3, 6.3, 17))  # the pelvis is a funnel
    along = (y + 0.5) / by_height(scene, (-3, 3, 15), (5, 6.8, 14))
    cavity = (depth > wall) & (np.hypot(across, along) < 1) & (z < 57.5)
    scene.fill("fat", cavity)
    return wall, cavity


def paint_bones(scene, depth, wall):
    """Paint ribs, breastbone, SKELETON, the vertebrae with their processes, discs and cord."""
    x, y, z = scene.x, scene.y, scene.z
    shell = (depth > wall - 0.9) & (depth < wall) & (z > 22)
    phase = (z + 0.55 * (6 - y) - 0.1 * np.abs(x)) % 3.2 / 3.2  # ribs slope down to the front
    gap = (np.abs(x) <= 2.2) | (y <= -9 + (z < 36) * 6)
    scene.fill("rib", shell & (phase < 0.42) & ~gap & (z < 57))
    scene.fill("bone", shell & (np.abs(x) < 1.9) & (y < 0) & (z > 37) & (z < 53))
    scene.paint(*SKELETON)
    back = y - by_height(scene, (0, 8, 16, 40, 62), (9, 6.6, 5.2, 6.4, 4.4))  # behind the curve
    spine = (z > 7) & (depth > 0.6)
    column, canal = np.hypot(x / 1.15, back), np.hypot(x, back - 3)
    spinous = (np.abs(x) < 0.45) & (back > 0) & (back < 5.5)
    transverse = (np.abs(x) < 4.2) & (np.abs(back - 2.6) < 0.55) & (z % 3 > 1.5)
    scene.fill("bone", spine & ((column < 2) | (canal < 1.7) | spinous | transverse))
    scene.fill("marrow", spine & (column < 1.55))
    scene.fill("disc", spine & (column < 1.9) & (z % 3 < 0.6))
    scene.fill("cord", spine & (canal < 0.95))


def paint_lungs(scene, cavity):
    """Paint the lungs with their vessels -> the cavity above the diaphragm, (z, y, x) bool."""
    x, y, z = scene.x, scene.y, scene.z
    first, second = scene.grain
    domes = 36.5 - 0.1 * ((np.abs(x) - 7.5) ** 2 + (y + 1) ** 2) - (x > 0)  # of the diaphragm
    chest = cavity & (z > domes)
    mediastinum = by_height(scene, (36, 48, 55), (2.2, 2.4, 2.8))  # half width
    mediastinum = mediastinum * (0.45 + 0.6 * np.exp(-((y - 1) / 4.5) ** 2))
    scene.fill("lung", chest & (np.abs(x + 0.3 * first) > mediastinum))
    vessels = (np.abs(first) < 0.16) & (np.abs(second) < 0.5)
    scene.fill("lung.vessel", scene.is_("lung") & vessels)
    return chest


def paint_abdomen(scene, cavity):
    """Paint the organs below the diaphragm inside `cavity`, (z, y, x) bool."""
    x, y, z = scene.x, scene.y, scene.z
    first, second = scene.grain
    scene.free = cavity
    loops = np.cos(np.pi * (x / 3 + 0.45 * first)) * np.cos(np.pi * (y / 3 + 0.45 * second))
    middle = (z > 4) & (z < 21) & (np.hypot(x / 10, (y + 2) / 7) < 1)
    scene.fill("bowel", cavity & middle & (np.abs(loops) > 0.12))
    scene.paint(*ABDOMEN)
    for side, sign in zip(SIDES, (-1, 1)):
        sinus = (np.hypot(x - 5.1 * sign, y - 4) < 1.5) & (np.abs(z - 21.3) < 3)
        scene.fill(f"kidney{side}.sinus", scene.is_(f"kidney{side}") & sinus)
    surface = scene.rng.uniform(-6.5, -4)  # patients lie on their back: gas gathers in front
    scene.fill("stomach.gas", scene.is_("stomach") & (y < surface))
    scene.fill("colon.gas", scene.is_("colon") & (second > 0.5))
    vessels = (np.abs(first) < 0.1) & (np.abs(second) < 0.5)
    for organ in ("liver", "spleen"):
        scene.fill(organ + ".vessel", scene.is_(organ) & vessels)
    scene.free = None


def torso(scene):
    """Paint the trunk from hips to neck into a scene -> the scene."""
    depth = depth_under_skin(scene)
    wall, cavity = paint_wall(scene, depth)
    paint_bones(scene, depth, wall)
    cavity &= ~scene.is_("bone", "marrow", "disc", "cord", "muscle")
    chest = paint_lungs(scene, cavity)
    scene.free = chest
    scene.paint(*CHEST)
    paint_abdomen(scene, cavity & ~chest)
    scene.paint(*PELVIS, *PIPES)
    return scene


def trunk(rng, heights, slices, fov=(34, 42), variation=Variation()):
    """A torso seen in `slices` slices between two heights z, about; fov: range, cm.

    Field of view and matrix differ between subjects.
    """
    low, high = heights[0] + rng.uniform(-2, 2), heights[1] + rng.uniform(-2, 2)
    matrix = 8 * int(rng.integers(14, 19))
    z = np.linspace(low, high, slices)
    return torso(Scene(rng, z, matrix, rng.uniform(*fov), variation))


# --------------------------------------------------------------------------------------------------
# Brain and heart

DEEP_NUCLEI = [  # and the ventricles
    *both(Ellipsoid("deep", (1.6, -1.6, 2.2), (0.75, 2.2, 1.8), -20)),
    *both(Ellipsoid("deep", (1.3, 1.2, 1.3), (1.1, 1.6, 1.3), 20)),
    *both(Ellipsoid("deep", (2.9, -0.3, 1), (0.85, 2.1, 1.5), 12)),
    Ellipsoid("csf", (0, 0.8, 0.8), (0.28, 1.5, 1.2)),
    *both(Tube("csf", [(0.9, -3.4, 2.6), (0.8, -1, 3.4), (1.2, 1.6, 3.2), (2.3, 3.8, 1.6)], 0.62)),
    *both(Tube("csf", [(2.3, 3.8, 1.6), (3, 2, -1)], 0.5))]
CEREBELLUM = [  # and the brain stem
    *both(Ellipsoid("csf", (2.5, 4.4, -3.9), (3.7, 3.4, 2.9))),
    *both(Ellipsoid("gray", (2.5, 4.6, -3.9), (3.1, 2.7, 2.4))),
    *both(Ellipsoid("white", (2.3, 4.4, -3.9), (1.7, 1.3, 1.7))),
    Ellipsoid("white", (0, 1.7, -4), (1.5, 1.4, 3.5))]
THORAX = [  # for the short axis of the heart
    Ellipsoid("fat", (0, 3, 4), (15, 12.6, 99)),
    Ellipsoid("muscle", (0, 3, 4), (13.6, 11.2, 99)),
    Ellipsoid("lung", (0, 3, 4), (12.4, 10, 99))]
HEART_NEIGHBOURS = [
    Ellipsoid("muscle", (2.5, 12, 4), (6, 3.2, 99)),
    Ellipsoid("bone", (3, 10.8, 4), (2.1, 1.9, 99)),
    Ellipsoid("aorta", (5.2, 8.4, 4), (1.2, 1.2, 99)),
    Ellipsoid("liver", (-6.5, 9, 1.5), (8.5, 5.5, 3.6)),
    Ellipsoid("stomach", (8, 9, 0.5), (4, 3.5, 3)),
    Ellipsoid("stomach.gas", (8.4, 8, 0.5), (2.5, 2, 2.4)),
    Ellipsoid("fat", (-3, -6.5, 4), (5.5, 2.4, 99))]
PAPILLARY_MUSCLES = [
    Ellipsoid("lv.papillary", (-0.3, 1.6, 3.5), (0.55, 0.5, 2)),
    Ellipsoid("lv.papillary", (1.9, 1.5, 3.5), (0.5, 0.55, 2))]


def paint_head(scene):
    """Paint scalp, skull and the fluid around the brain."""
    for name, grow in (("scalp", 1.3), ("skull", 0.9), ("csf", 0.3)):
        across, along = scene.x / (6.7 + grow), scene.y / (8.5 + grow)
        up = np.maximum(scene.z - 1, 0) / (6.8 + grow)
        scene.fill(name, across ** 2 + along ** 2 + up ** 2 < 1)


def paint_tumour(scene, enhancing):
    """Paint a tumour: edema, a rim that takes up contrast agent if `enhancing`, a dead core."""
    rng = scene.rng
    place = rng.uniform((2.2, -4.5, 1), (4.2, 4.5, 4))
    center = place * (rng.choice((-1, 1)), 1, 1)
    radius = rng.uniform(1.3, 3)
    scene.jitter = 0
    scene.rough = 0.22
    for name, r in (("edema", radius), ("enhancing", 0.6 * radius), ("core", 0.42 * radius)):
        if enhancing or name != "enhancing":
            scene.paint(Ellipsoid(name, center, (r, r * rng.uniform(0.8, 1.3), r)))


def brain(scene, tumour=False, enhancing=True, plaques=0, head=False):
    """Paint a brain into a scene -> the scene. z is 0 under the ventricles.

    tumour: with a tumour, whose rim is bright in t1c if `enhancing`; plaques: how many;
    head: with scalp and skull.
    """
    x, y, z = scene.x, scene.y, scene.z
    first, second = scene.grain
    if head:
        paint_head(scene)
    up = np.where(z > 1, z - 1, (1 - z) * 0.8) / 6.8
    level = np.sqrt((x / 6.7) ** 2 + (y / 8.5) ** 2 + up ** 2) + 0.012 * second
    inside, depth = level < 1, 6.8 * (1 - level)  # cm under the surface
    fold = np.abs(0.8 * first + 0.25 * second)
    furrow = (fold < 0.13) & (depth < 1.9) & (depth > 0.15)
    between_halves = (np.abs(x + 0.1 * second) < 0.16) & (np.abs(y) > 3.4) & (z > -2)
    scene.fill("white", inside)
    scene.fill("gray", inside & ((depth < 0.45) | (fold < 0.42) & (depth < 2.4)))
    scene.fill("csf", inside & (furrow | between_halves))
    scene.free = inside
    scene.paint(*DEEP_NUCLEI)
    scene.free = inside & (z < -2)
    scene.paint(*CEREBELLUM)
    scene.free = inside
    if tumour:
        paint_tumour(scene, enhancing)
    scene.free = None
    if plaques:
        scene.lesions(Lesion("white", "plaque"), plaques, (0.2, 0.6))
    return scene


def heart(scene, squeeze=0.0):
    """Paint a heart in short axis and the chest around it into a scene -> the scene.

    z is 0 at the heart's tip and 7 at its base. squeeze: 0 filled (ED) .. 1 contracted (ES).
    """
    scene.paint(*THORAX)
    angle = np.arctan2(scene.y - 3, scene.x)
    ribs = (angle * 3.5 + 0.4 * scene.z) % 1.6 < 0.6  # cut across
    scene.fill("bone", scene.is_("muscle") & ribs)
    scene.paint(*HEART_NEIGHBOURS)
    scene.jitter = 0.35 * scene.jitter
    right = 1 - 0.18 * squeeze
    outer, inner = 3.3 - 0.15 * squeeze, 2.3 - 0.7 * squeeze
    scene.paint(
        Ellipsoid("heart", (-0.6, 0.2, 3.4), (6.3, 5, 6.4), 20),
        Ellipsoid("wall", (-2.5, -0.9, 4.2), (4 * right, 3.3 * right, 5.2), 25),
        Ellipsoid("rv", (-2.5, -0.9, 4.3), (3.6 * right, 2.9 * right, 4.8), 25),
        Ellipsoid("myo", (0.8, 0.5, 4.4), (outer, outer, 5)),
        Ellipsoid("lv", (0.8, 0.5, 4.7), (inner, inner, 4.2)))
    scene.free = scene.is_("lv")
    scene.paint(*PAPILLARY_MUSCLES)
    return scene


def hippocampus(scene, side):
    """Paint the temporal lobe around one hippocampus into a scene -> the scene.

    side: -1 right, 1 left. The front is the head, the back is body and tail.
    """
    scene.fill("white", True)
    scene.fill("gray", np.abs(scene.grain[0]) < 0.35)
    scene.fill("csf", (np.abs(scene.grain[1]) < 0.12) | (scene.x * side < -1.3))
    path = np.array([(-0.2, -1.5, -0.2), (0.25, -0.7, -0.3), (0.35, 0.4, 0), (-0.2, 1.5, 0.6)])
    path = path * (side, 1, 1)
    scene.jitter = 0
    scene.paint(
        Tube("csf", path + (0.35 * side, 0, 0.25), 0.35),
        Tube("hippocampus.back", path, 0.42),
        Tube("hippocampus.front", path[:2], 0.62))
    border = scene.rng.uniform(-0.7, -0.2)
    scene.fill("hippocampus.back", scene.is_("hippocampus.front") & (scene.y > border))
    return scene


# --------------------------------------------------------------------------------------------------
# Modalities


def ct(scene, noise=12.0, contrast=None, table=TORSO):
    """Scene -> HU, float32 (z, y, x).

    noise: HU; contrast: phase 0..1 of the contrast agent in a torso, by default any.
    """
    rng = scene.rng
    phase = rng.uniform(0.1, 1) if contrast is None else contrast
    value = np.full(len(NAMES), -1000, np.float32)
    for name, row in table.items():
        gain = row[1] * phase if table is TORSO else 0
        value[CODE[name]] = row[0] + gain + rng.normal(0, 4)
    texture = 6 * scene.grain[0] * (scene.tissue > 0)
    grain = 2 * noise * rng.standard_normal(scene.shape, np.float32)
    return blur_slices(value[scene.tissue] + texture + grain)


def mr(scene, table, column, bias=0.25, noise=0.03, top=1000):
    """Scene -> MR, float32 (z, y, x), about 0..top, from one column of a tissue table.

    The contrast varies, a smooth field of strength `bias` multiplies it, the noise is Rician.
    """
    rng = scene.rng
    value = np.zeros(len(NAMES), np.float32)
    for name, row in table.items():
        value[CODE[name]] = max(row[column] * (1 + rng.normal(0, 0.06)), 0)
    image = blur_slices(value[scene.tissue] * (1 + 0.06 * scene.grain[1]))
    image = image * np.exp(bias * smooth_noise(rng, scene.shape, (1, 2, 2)))
    real, imaginary = noise * rng.standard_normal((2, *scene.shape), np.float32)
    return top * np.hypot(image + real, imaginary)


def speckle(rng, echo):
    """Echo strength (rows, columns) -> log-compressed ultrasound 0..1 with speckle."""
    wave = blur_slices(rng.standard_normal((2, *echo.shape), np.float32))
    strength = np.hypot(*wave / wave.std())
    return np.clip(0.62 + 0.2 * np.log(echo * (strength + 0.15)), 0, 1)


def centred_grid(rows, columns):
    """Row and column coordinates in picture heights, 0 0 in the middle: (2, rows, columns)."""
    return (np.mgrid[:rows, :columns] - np.array((rows, columns))[:, None, None] / 2) / rows


def micro_ultrasound(rng, frames=12, rows=160, columns=224):
    """-> image uint8 0..254, prostate bool, both (frames, rows, columns).

    A probe below the picture is swept through the gland.
    """
    v, u = centred_grid(rows, columns)
    foot = rng.uniform(0.75, 0.95)
    near, distance = foot - 0.45, np.hypot(u, v - foot)
    fan = (distance > near) & (distance < near + 0.9) & (np.abs(np.arctan2(u, foot - v)) < 0.75)
    center_u, center_v = rng.uniform((-0.36, -0.2), (0.36, 0.17))
    height = rng.uniform(0.13, 0.3)
    width = height * rng.uniform(1.1, 1.6)
    turn = rng.uniform(-0.5, 0.5)
    lumps = smooth_noise(rng, (frames, rows, columns), (2, 5, 5))
    images, masks = [], []
    for sweep, lump in zip(np.linspace(-1, 1, frames), lumps):
        du, dv = rotated(u - center_u - 0.05 * sweep, v - center_v, turn)
        du, dv = du / width, dv / height
        level = np.hypot(du, dv) / np.sqrt(1.05 - sweep ** 2) + 0.09 * lump
        inner_zone = (np.hypot(du, dv + 0.25) < 0.55) & (level < 0.95)
        urethra = (np.hypot(width * du, height * (dv + 0.2)) < 0.02) & (level < 0.9)
        echo = 0.5 * np.exp(0.35 * lump) * (1 + 0.3 * np.sin(45 * (v - foot) + 2 * lump) ** 8)
        echo[level < 1.12] = 1.5  # the capsule
        echo[level < 1] = 0.33
        echo[inner_zone] = 0.17
        echo[urethra] = 0.03
        probe = 2 * np.exp(-((distance - near) / 0.02) ** 2)
        images.append(speckle(rng, echo * np.exp(-1.3 * (distance - near)) + probe) * fan)
        masks.append((level < 1) & fan)
    return (254 * np.array(images)).astype(np.uint8), np.array(masks)


NERVE, VESSEL = 1, 2


def nerve_ultrasound(rng, rows, columns):
    """-> image uint8, label uint8 (NERVE, VESSEL), both (rows, columns).

    Layers of muscle and fascia hold the vessels and nerves.
    """
    shape = (rows, columns)
    v, u = (np.mgrid[:rows, :columns] / np.array(shape)[:, None, None]).astype(np.float32)
    bend = 0.03 * smooth_noise(rng, shape, (2, 3)) + rng.uniform(-0.12, 0.12) * u
    echo = 0.25 * np.exp(0.5 * smooth_noise(rng, shape, (14, 5)))
    for depth in rng.uniform(0.08, 0.9, 9):
        fascia = rng.uniform(0.5, 2.5) * np.exp(-((v - depth - bend) / 0.006) ** 2)
        echo += fascia * (smooth_noise(rng, shape, (2, 4)) > -0.6)
    label = np.zeros(shape, np.uint8)
    kinds = [NERVE, VESSEL]
    kinds += [NERVE] * int(rng.integers(2))
    kinds += [VESSEL] * int(rng.integers(3))
    for kind in rng.permutation(kinds):
        center_v, center_u = rng.uniform((0.18, 0.1), (0.75, 0.9))
        tilt = rng.uniform(-0.5, 0.5)
        height = rng.uniform(0.05, 0.11)
        width = height * rng.uniform(1, 1.8)
        du, dv = u - center_u, v - center_v
        level = np.hypot((du + tilt * dv) / width, (dv - tilt * du) / height)
        level = level + 0.07 * smooth_noise(rng, shape, (5, 5))
        if label[level < 1.15].any():
            continue
        if kind == NERVE:  # a honeycomb in a bright sheath
            comb = np.cos(2 * np.pi * du / 0.022) * np.cos(2 * np.pi * dv / 0.022) > 0.1
            echo = np.where(level < 1.15, 1.6, echo)
            echo = np.where(level < 1, 0.12 + 0.9 * comb, echo)
        else:  # black, with a bright wall and acoustic enhancement below it
            echo = np.where((np.abs(du) < 0.8 * width) & (dv > 0), echo * 1.9, echo)
            echo = np.where(level < 1.12, 1.2, echo)
            echo = np.where(level < 1, 0.012, echo)
        label[level < 1] = kind
    image = speckle(rng, echo * np.exp(-1.6 * v)) * ((v > 0.04) & (v < 0.95))
    return (255 * image).astype(np.uint8), label


def chest_xray(rng, rows, columns):
    """-> image uint8, left lung bool, right lung bool, all (rows, columns).

    A torso is projected front to back, then the picture is turned, scaled and moved.
    """
    variation = Variation(shift=0, zoom=(0.95, 1.05), turn=4, jitter=0.25)
    scene = torso(Scene(rng, np.linspace(19, 64, 150), (36, 140), 44.0, variation))
    scene.tissue[scene.is_("table")] = CODE["air"]

    def ray(volume):
        """(z, y, x) -> its integral along y, (z, x), with the head up."""
        return scene.spacing[1] / 10 * volume.sum(1)[::-1]

    density = np.clip(ct(scene, 0, 0.1) + 1000, 0, 2000) / 1000
    path = ray(density + 2.2 * scene.is_("rib", "bone"))
    organs = ray(scene.is_(*[shape.tissue for shape in CHEST + ABDOMEN]))
    field_of_lungs = (ray(scene.is_("lung", "lung.vessel")) > 3) & (blur_slices(organs) < 5)
    left = scene.x.mean((0, 1)) > 0
    image = np.clip(path / np.percentile(path, 97), 0, 1) ** rng.uniform(0.65, 1.1)

    angle = np.deg2rad(rng.uniform(-22, 22))
    zoom = rng.uniform(0.7, 1.3)
    move = rng.uniform(-0.2, 0.2, 2)[:, None, None]
    v, u = (centred_grid(rows, columns) - move) / zoom
    u, v = rotated(u, v, angle)
    down = np.clip(np.rint(150 * v + 75).astype(int), 0, 149)
    across = np.clip(np.rint(150 * u + 70).astype(int), 0, 139)
    image = blur_slices(image[down, across]) * rng.uniform(0.8, 1)
    image = image + 0.02 * rng.standard_normal((rows, columns))
    image = (255 * np.clip(image, 0, 1)).astype(np.uint8)
    return image, (field_of_lungs & left)[down, across], (field_of_lungs & ~left)[down, across]
