"""Invented anatomies: tasks with no data at all (`--datasets synthetic`), or beside real data.

An anatomy is one of three:
- a body with organs of random shape (blobs, rings, crescents, tubes, mirrored pairs, organs in two
  parts, a chamber in its wall beside another), whole or in close-up
- layers of tissue as an ultrasound probe sees them
- plain random regions

Its subjects differ as people do: in place, size and turn, organ by organ, by a smooth warp, by an
organ that is missing, by things that only one of them has. A subject is kept as its *region map*:
the number of the tissue at every pixel. A `Pool` of maps is drawn once; batches.py shows them anew
every time, in another contrast, view and noise, and asks for other structures, so that a model
cannot remember a task and has to read the prompt. SynthSeg and SynthMorph had the idea that random
shapes and contrasts teach what transfers to scans.

    pool = draw_pool(tasks=100, side=128)
    pool.read(7, subject=0)                    # (128, 128) uint8
"""

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from batches import (ALL, WANTED, draw_contrast, draw_image_task, draw_moves, draw_other_task,
                     view_of)
from scans.store import in_processes, usable_cores

VERSION = 1
SUBJECTS = 4   # of every task
MARGIN = 1.25  # a map shows so much more than the view, for zooming and turning
THINGS = 3     # tissues of things that only one subject has
SHAPES = ("blob", "blob", "blob", "ring", "crescent", "tube", "mirrored", "parted", "chambers")


# -------------------------------------------------------------------------------------------------
# The pool

@dataclass
class Pool:
    """Region maps of `SUBJECTS` subjects of every task, packed: about 1 KB each."""
    packed: np.ndarray   # all maps, one after the other, uint8
    ends: np.ndarray     # (tasks, SUBJECTS) int64: where a map ends
    classes: np.ndarray  # (tasks,): the structures that may be asked for are 1 to classes - 1
    layered: np.ndarray  # (tasks,) bool: as an ultrasound probe sees it
    side: int            # pixels along a side of a map

    def __len__(self):
        return len(self.ends)

    def read(self, task, subject):
        """The region map of one subject, (side, side) uint8."""
        at = task * SUBJECTS + subject
        start = self.ends.flat[at - 1] if at else 0
        packed = self.packed[start:self.ends.flat[at]].tobytes()
        return np.frombuffer(zlib.decompress(packed), np.uint8).reshape(self.side, self.side)


def draw_pool(tasks, image_size, workers=1):
    """A `Pool` for a model of this image size; task number i is the same one in all of them."""
    side = min(256, round(image_size * MARGIN))
    jobs = [(number, side) for number in range(tasks)]
    drawn = dict((number, task) for number, task, _ in in_processes(draw_task, jobs, workers))
    maps, classes, layered = zip(*(drawn[number] for number in range(tasks)))
    maps = [packed for subjects in maps for packed in subjects]
    ends = np.cumsum([len(packed) for packed in maps]).reshape(tasks, SUBJECTS)
    return Pool(np.frombuffer(b"".join(maps), np.uint8), ends, np.array(classes),
                np.array(layered), side)


def open_pool(folder, tasks, image_size):
    """The pool that a folder keeps as a file. All cores draw it where it is not there yet."""
    path = Path(folder) / f"synthetic-{VERSION}-{tasks}-{image_size}.npz"
    if not path.exists():
        pool = draw_pool(tasks, image_size, usable_cores())
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **vars(pool))
        os.replace(temporary, path)
    with np.load(path) as file:
        return Pool(**{name: file[name] for name in file.files})


def draw_task(number, side):
    """One task of a pool: ([packed maps], classes, is it layered?)."""
    rng = np.random.default_rng([VERSION, number])
    spread, layered = float(rng.choice([0.5, 1.0, 1.5, 2.5])), False
    if rng.random() < 0.85:
        structures, ground = draw_anatomy(rng)
        layered = structures[0]["shape"] == "layer"
        view, classes = draw_view(rng, structures, ground), len(structures) + 1
        maps = [draw_subject(rng, structures, ground, view, side, spread)
                for _ in range(SUBJECTS)]
        if layered and rng.random() < 0.2:
            fan = draw_fan(rng, side)
            maps = [regions * fan for regions in maps]
    else:
        maps, classes = draw_regions(rng, SUBJECTS, side, min(spread, 1.5))
    return [zlib.compress(m.to(torch.uint8).numpy().tobytes()) for m in maps], classes, layered


def draw_sample(pool, size, S, colored, rng):
    """A training sample of S subjects of a task: its region maps, views, looks (batches.py).

    size: the model's, in pixels.
    colored: some of the structures are asked for. Otherwise it is an image task.
    """
    task = rng.integers(len(pool))
    own, *others = rng.choice(SUBJECTS, min(S, SUBJECTS), replace=False)  # own: of the task pair
    maps = [pool.read(task, subject) for subject in (*np.resize(others, S - 1), own)]
    contrast, other = (draw_contrast(rng, pool.layered[task]) for _ in range(2))
    sample = draw_other_task(rng, S, contrast)
    if not colored:
        sample["looks"] = draw_image_task(rng, S, contrast, other)
    moves = draw_moves(rng, S, colored=True, apart=0.3, near=True)
    return {**sample, "pairs": [(regions, regions, None) for regions in maps],
            "views": view_of((0.5, 0.5), (1 / MARGIN,) * 2) @ moves,
            "regions": True, "endless": True, "wanted": int(rng.choice(WANTED)),
            "allowed": (ALL > 0) & (ALL < pool.classes[task]) & colored,
            "sizes": np.float32([0.002, 0.5]) * np.float32(size ** 2)}


def superpixels(picture, rng, side=96):
    """Regions of like gray in a slice (H, W) as classes 1, 2, ...: a task without a label.

    Felzenszwalb's graph-based segmentation at a random scale, of the slice reduced to about `side`
    pixels, as SSL-ALPNet (Ouyang et al. 2020) and ScribblePrompt train with. What is nearly black,
    or more than half of the slice, is background. Needs scikit-image.
    """
    from skimage.segmentation import felzenszwalb
    step = max(1, round(max(picture.shape) / side))
    h, w = (n // step for n in picture.shape)
    small = picture[:h * step, :w * step].reshape(h, step, w, step).mean((1, 3)) / 65535
    scale, sigma = math.exp(rng.uniform(math.log(20), math.log(400))), rng.uniform(0.5, 1.4)
    least = max(8, small.size // int(rng.integers(80, 400)))
    regions = felzenszwalb(small, scale, sigma, min_size=least)
    gray, size = (np.bincount(regions.flat, weights) for weights in (small.flat, None))
    kept = np.flatnonzero((gray > 0.03 * size) & (size < small.size / 2))[:255]
    number = np.zeros(len(size), np.uint8)
    number[kept] = np.arange(1, len(kept) + 1)
    rows, columns = (np.minimum(np.arange(n) // step, m - 1)
                     for n, m in zip(picture.shape, (h, w)))
    return number[regions][rows[:, None], columns]


# -------------------------------------------------------------------------------------------------
# Random fields

def smooth(rng, maps, size, cells):
    """Random smooth maps (maps, size, size) of about unit variance, `cells` bumps along a side."""
    coarse = torch.from_numpy(rng.standard_normal((1, maps, cells + 3, cells + 3), np.float32))
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0]
    return fine * 1.4


def pixel_grid(size):
    """y and x of the pixels, (size, size) each: [-1, 1] is the view."""
    line = ((torch.arange(size) + 0.5) / size * 2 - 1) * MARGIN
    return torch.meshgrid(line, line, indexing="ij")


def draw_fan(rng, size):
    """The part of a picture that a probe sees, (size, size) bool."""
    y, x = pixel_grid(size)
    across, down = x / 2, (y + 1) / 2 + rng.uniform(0.2, 1.0)
    fan = across.abs() < float(rng.uniform(0.3, 0.66)) * down
    return fan & (torch.hypot(across, down) > float(down.min()) + 0.15)


# -------------------------------------------------------------------------------------------------
# Anatomy: what all subjects of a task share, in body coordinates, x and y in [-1, 1]

def draw_anatomy(rng):
    """(structures, ground): structures are painted in order, on top of each other.

    The first `ground` of them are what the others lie in: a body, or layers of tissue.
    """
    if rng.random() < 0.25:  # what a probe on the skin sees
        heights = np.concatenate([[-9], np.sort(rng.uniform(-1, 1, rng.integers(2, 8)))])
        structures = [{"shape": "layer", "at": np.array([0.0, y]), "radius": 1.0, "aspect": 1.0,
                       "turn": rng.normal(0, 0.1), "bend": rng.normal(0, 0.15),
                       "wobble": wobble(rng, 0.15)} for y in heights]
    else:
        body = {"shape": "blob", "at": rng.uniform(-0.08, 0.08, 2),
                "radius": rng.uniform(0.7, 1.1), "aspect": rng.uniform(0.65, 1.0),
                "turn": rng.uniform(-0.2, 0.2) + rng.choice([0, math.pi / 2]),
                "wobble": wobble(rng, 0.06)}
        structures = [body]
        if rng.random() < 0.6:  # a layer of fat or muscle
            structures.append({**body, "radius": body["radius"] * rng.uniform(0.8, 0.95)})
    ground = len(structures)
    for group in range(rng.integers(3, 15)):
        structures += draw_organ(rng, group)
    return structures, ground


def draw_organ(rng, group):
    """The one to three structures of an organ. Those of one group move together in a subject."""
    radius = math.exp(rng.uniform(math.log(0.06), math.log(0.42)))
    s = {"shape": str(rng.choice(SHAPES)),
         "at": rng.uniform(-0.65, 0.65, 2) * (1 - 0.6 * radius), "radius": radius,
         "aspect": rng.uniform(0.45, 1.0), "turn": rng.uniform(0, math.pi),
         "wobble": wobble(rng, rng.choice([0.04, 0.12, 0.25])),
         "bite": rng.uniform(0.35, 0.8), "bend": rng.uniform(-2, 2), "group": group}
    structures = []
    if s["shape"] == "chambers":  # a thin-walled chamber leans on a ring, as in a heart
        way = rng.uniform(0, 2 * math.pi)
        s = {**s, "shape": "ring", "radius": max(radius, 0.12), "aspect": rng.uniform(0.8, 1.0)}
        beside = s["radius"] * rng.uniform(0.7, 1.1) * np.array([math.cos(way), math.sin(way)])
        structures.append({**s, "shape": "blob", "at": s["at"] + beside,
                           "radius": s["radius"] * rng.uniform(0.8, 1.2),
                           "aspect": rng.uniform(0.5, 0.9), "turn": way + math.pi / 2})
    structures.append(s)
    if s["shape"] == "ring":  # with its inside, as a heart's chamber in its wall
        structures.append({**s, "shape": "blob", "radius": s["radius"] * s["bite"]})
    if s["shape"] == "parted":  # head and body of one organ
        structures.append({**s, "shape": "half", "bite": rng.uniform(-0.4, 0.4)})
    if s["shape"] == "mirrored":
        outline = [(k, c, math.pi * k - p) for k, c, p in s["wobble"]]
        structures.append({**s, "at": s["at"] * (-1, 1), "turn": math.pi - s["turn"],
                           "wobble": outline})
    return structures


def draw_view(rng, structures, ground):
    """(zoom, centre) of the camera. A third of the tasks are close-ups, as cropped scans are."""
    if rng.random() < 0.65:
        return math.exp(rng.uniform(-0.3, 0.1)), np.zeros(2)
    organ = structures[rng.integers(ground, len(structures))]
    zoom = float(np.clip(rng.uniform(0.3, 0.7) / organ["radius"], 1.0, 4.0))
    return zoom, organ["at"] + rng.normal(0, 0.3, 2) * organ["radius"]


def wobble(rng, strength):
    """Fourier terms of an outline: (order, amplitude, phase)."""
    return [(k, float(rng.normal(0, strength / k)), float(rng.uniform(0, 2 * math.pi)))
            for k in range(2, 6)]


def inside(s, x, y):
    """Where a structure is: (H, W) bool, from coordinates x, y (H, W)."""
    c, n = math.cos(s["turn"]), math.sin(s["turn"])
    u, v = x - float(s["at"][0]), y - float(s["at"][1])
    u, v = (c * u + n * v) / s["radius"], (-n * u + c * v) / (s["radius"] * s["aspect"])
    if s["shape"] == "layer":
        waves = sum(a * 0.3 * torch.cos(2 * k * u + p) for k, a, p in s["wobble"])
        return v > 0.1 * s["bend"] * u * u + waves
    if s["shape"] == "tube":
        v = v + s["bend"] * (u * u - 0.3) * 0.3
        return (u.abs() < 1.6) & (v.abs() < 0.28)
    angle = torch.atan2(v, u)
    edge = 1 + sum(a * torch.cos(k * angle + p) for k, a, p in s["wobble"])
    filled = u * u + v * v < edge * edge
    if s["shape"] == "half":
        return filled & (u > s["bite"] + 0.2 * v * s["bend"])
    if s["shape"] == "crescent":
        w = u - s["bite"]
        return filled & ~(w * w + v * v < 0.7 * edge * edge)
    return filled


def draw_subject(rng, structures, ground, view, size, spread):
    """One subject's map of structures, (H, W) int64.

    0 is outside and i + 1 in structure i. Numbers above are things that no other subject has.
    spread scales how much subjects differ.
    """
    y, x = pixel_grid(size)
    shift, turn = rng.normal(0, 0.1, 2) * spread, rng.normal(0, 0.12) * spread
    scale = math.exp(rng.normal(0, 0.12) * spread)
    warp = smooth(rng, 2, size, int(rng.integers(2, 6)))
    warp = warp * float(abs(rng.normal(0, 0.05)) * min(spread, 1.5))
    c, n = math.cos(turn) / scale, math.sin(turn) / scale
    x, y = x - shift[0], y - shift[1]
    x, y = c * x + n * y + warp[0], -n * x + c * y + warp[1]
    x, y = x / view[0] + float(view[1][0]), y / view[0] + float(view[1][1])
    regions, moves = torch.zeros(size, size, dtype=torch.int64), {}
    for i, s in enumerate(structures):
        if i == ground:
            for _ in range(rng.integers(0, 6)):
                thing = {"shape": "blob", "at": rng.uniform(-0.8, 0.8, 2),
                         "radius": rng.uniform(0.03, 0.25), "aspect": rng.uniform(0.3, 1.0),
                         "turn": rng.uniform(0, math.pi), "wobble": wobble(rng, 0.12)}
                tissue = len(structures) + 1 + int(rng.integers(THINGS))
                regions[inside(thing, x, y)] = tissue
        if i >= ground and rng.random() < 0.05:  # missing in this subject
            continue
        regions[inside(vary(rng, s, i, moves, spread), x, y)] = i + 1
    return regions


def vary(rng, s, i, moves, spread):
    """Structure i as one subject has it. moves: {group: (place, growth, turn)}, filled here."""
    reach = 0.04 * spread * min(1.0, s["radius"] / 0.15)
    drawn = (rng.normal(0, 0.03, 2) * spread, rng.normal(0, 0.1) * spread,
             rng.normal(0, 0.12) * spread)
    place, grown, turned = moves.setdefault(s.get("group", -1 - i), drawn)
    return {**s, "at": s["at"] + place + rng.normal(0, 0.5, 2) * reach,
            "radius": s["radius"] * math.exp(grown + rng.normal(0, 0.05) * spread),
            "aspect": s["aspect"] * math.exp(rng.normal(0, 0.08) * spread),
            "turn": s["turn"] + turned}


def draw_regions(rng, pairs, size, spread):
    """Random regions without a plan, warped from subject to subject: (their maps, how many)."""
    count = int(rng.integers(4, 13))
    maps = smooth(rng, count, size, int(rng.integers(3, 8)))
    y, x = pixel_grid(size)
    subjects = []
    for _ in range(pairs):
        warp = smooth(rng, 2, size, int(rng.integers(2, 6))) * float(0.08 * spread)
        turn, scale = rng.normal(0, 0.15) * spread, math.exp(rng.normal(0, 0.12) * spread)
        c, n = math.cos(turn) / scale, math.sin(turn) / scale
        across = c * x + n * y + warp[0] + rng.normal(0, 0.08) * spread
        down = -n * x + c * y + warp[1] + rng.normal(0, 0.08) * spread
        grid = torch.stack([across, down], -1)[None].float()
        moved = F.grid_sample(maps[None], grid, padding_mode="reflection", align_corners=False)
        subjects.append(moved[0].argmax(0))
    return subjects, count
