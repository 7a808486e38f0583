"""A batch of training samples: from stored slices to pixels, all of a batch at once, on the device.

The loader (data.py) reads slices as they are stored, and draws numbers with numpy. `make_batch`
makes pixels of them, in batched torch on the training device: as many kernels for a thousand
samples as for one. Two words are used throughout:

    view    an affine map (3, 3) from the model's square to a slice: a crop, a window,
            zoomed, turned and mirrored. Both squares are [-1, 1], x before y
    look    what a scanner makes of an anatomy: contrast, texture, blur, bias field, noise. A region
            map (lab/synthetic.py) is rendered, a slice gets another contrast. A sample of masks has
            one look. An image task has two at the same anatomy, its image and its label: with noise
            and without, blurred and sharp, with holes and whole, in two contrasts

The paper's recipe needs neither looks nor fields: its view is a random crop. What makes another
task of a sample is ours; the idea is the task augmentation of UniverSeg (Butoi et al. 2023).

Shapes: B samples, S pairs each, the task pair last, L looks.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from coloring import MAX_CLASSES, draw_keys, draw_palettes

TOP = 65535   # the uint16 that stands for 1 in the store
NODES = 32    # of a random field, along a side
MOST_CELLS = NODES - 5
EXPONENT = 30  # at most, of a bell: a CPU is slow with denormal numbers
KNOTS = 16    # segments of a curve of intensities
TISSUES = 64  # of a region map, at most
ALL = np.arange(MAX_CLASSES)
WANTED = (1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12)  # how many classes a task asks for
# Bumps of the random fields along a side, from and below: two of the warp, texture, bias, holes
CELLS = (5, 5, 9, 5, 5), (10, 10, 28, 6, 10)
TEXTURE, BIAS, HOLES = 2, 3, 4  # the random fields of a pair; the first two are its warp


@dataclass
class Batch:
    """Training samples of one objective, S pairs each, the task pair last."""
    images: torch.Tensor    # (B, S, 1, H, W) float32 in [0, 1]
    labels: torch.Tensor    # (B, S, 1, H, W) float32: classes where colored, else [0, 1]
    valid: torch.Tensor     # (B, S, 1, H, W) uint8: 0 where a label has no truth
    palette: torch.Tensor   # (B, 256) float32
    colored: torch.Tensor   # (B,) bool
    drop: torch.Tensor      # (B, depth, 2) uniform numbers for drop path
    drawn: torch.Tensor     # (B, 3) numbers of dataset, case and slice, for the log
    hidden: torch.Tensor | None = None  # (B, 4, N) bool, for mim


# -------------------------------------------------------------------------------------------------
# Numbers, drawn by the loader

def view_of(centre, share):
    """The view (3, 3) of a window: its centre and its sides (y, x), in shares of the slice."""
    (y, x), (height, width) = centre, share
    return np.array([[width, 0, 2 * x - 1], [0, height, 2 * y - 1], [0, 0, 1]])


def draw_crop(size, rng):
    """The paper's view: resize to 512 x 512, crop 448 x 448 (the ratio is kept at other sizes)."""
    full = round(size * 512 / 448)
    corner = rng.integers(0, full - size + 1, 2)
    return view_of((corner + size / 2) / full, (size / full,) * 2)


def draw_moves(rng, S, colored, apart=1.0, near=False):
    """(S, 3, 3) by which the views of a sample are moved: mirrored and turned by quarters alike.

    Masks are zoomed, moved and turned besides: all alike, and each pair a little by itself.
    apart: factor of what differs from pair to pair; above 1 where a case prompts itself, which
    would otherwise teach copying. near: what is seen fills the view, and is zoomed out less.
    """
    zoom, move, turn = np.ones(S), np.zeros((2, S)), np.full(S, rng.integers(4) * np.pi / 2)
    mirror = rng.choice([-1, 1])
    if colored:
        zoom = np.exp(rng.uniform(-0.15 if near else -0.5, 0.15) + rng.normal(0, 0.08 * apart, S))
        move = rng.uniform(-0.15, 0.15, (2, 1)) * (0.5 if near else 1)
        move = move + rng.normal(0, 0.06 * apart, (2, S))
        turn = turn + rng.normal(0, 0.12 * apart, S)
    c, s, zero = np.cos(turn) * zoom, np.sin(turn) * zoom, np.zeros(S)
    rows = [[c * mirror, -s, move[0]], [s * mirror, c, move[1]], [zero, zero, zero + 1]]
    return np.array(rows).transpose(2, 0, 1)


def draw_look(rng, S, contrast=None):
    """The numbers of one look at S subjects.

    contrast: the `draw_contrast` of a region map. Without it a slice gets a random curve of
    intensities and little noise; its own blur and bias field are seldom made stronger.
    """
    drawn = contrast is not None
    share = 1.0 if drawn else 0.1
    look = {"sigma": np.full(2, 1e-5), "bias": 0.0, "fade": 0.0, "hole": None, "mean": None,
            "rough": None, "curve": None, "gamma": np.exp(rng.normal(0, 0.2, S)),
            "scaled": drawn and rng.random() < 0.7,
            **draw_noise(rng, abs(rng.normal(0, 0.05 if drawn else 0.025)))}
    if rng.random() < share:
        look["sigma"] = np.full(2, rng.uniform(0, 0.012))
        if rng.random() < 0.2:  # low resolution along one axis
            look["sigma"][rng.integers(2)] = rng.uniform(0.01, 0.025)
    if rng.random() < 0.5 * share:
        look["bias"] = rng.uniform(0, 0.25)
    if drawn:
        mean, look["rough"], look["fade"] = contrast
        if look["fade"]:  # speckle
            look |= {"noise": np.array([0, 0, rng.uniform(0.08, 0.3)]), "grain": 0.5}
        shift = rng.normal(0, rng.choice([0.02, 0.06]), (S, TISSUES))
        look["mean"] = np.clip(mean + shift, 0, 1) ** np.exp(rng.normal(0, 0.15, (S, 1)))
    else:
        knots = np.linspace(0, 1, rng.integers(3, 8))
        places = knots
        if rng.random() < 0.7:
            knots = rng.random(len(places))
            knots[0] *= rng.random() < 0.5  # black stays black
        own = np.clip(knots + rng.normal(0, 0.04, (S, len(knots))), 0, 1)
        look["curve"] = line_segments(places, own)
    return look


def line_segments(places, values):
    """Piecewise linear curves through (S, n) values as (S, 2, KNOTS): the value and the slope of
    every segment of [0, 1]."""
    at = np.linspace(0, 1, KNOTS + 1)
    y = np.stack([np.interp(at, places, each) for each in values])
    slope = np.diff(y) * KNOTS
    return np.stack([y[:, :-1] - slope * at[:-1], slope], 1)


def draw_contrast(rng, layered):
    """(mean and texture of the tissues, how fast the image fades with depth). Two may look alike.

    layered: seen by ultrasound most of the time, with nothing outside of the probe's fan.
    """
    mean, rough, fade = rng.uniform(0.05, 1, TISSUES), abs(rng.normal(0, 0.05, TISSUES)), 0.0
    if rng.random() < 0.5:  # it is dark outside of the body
        mean[0] = rng.uniform(0, 0.08)
    if rng.random() < 0.4:  # most tissue is in a narrow band, as soft tissue in CT
        mean[1:] = rng.uniform(0.2, 0.8) + 0.25 * (mean[1:] - 0.5)
    if layered and rng.random() < 0.7:
        mean[0] = rough[0] = 0
        fade = rng.uniform(0, 1.5)
    return mean, rough, fade


def draw_noise(rng, strength):
    """Gaussian, Rician or speckle noise, white or smooth."""
    kind = rng.integers(3)
    grain = rng.choice([0, 0, 0.5, 1])  # how much of it is shared with a neighbour
    strength = strength / (1 + grain ** 2)
    white_rician_speckle = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 3]])[kind]
    return {"noise": white_rician_speckle * strength, "grain": grain}


def draw_image_task(rng, S, contrast=None, again=None):
    """The two looks of an image task: denoise, sharpen, inpaint, or another contrast.

    contrast, again: two `draw_contrast` of a region map; nothing for a slice.
    """
    label = {**draw_look(rng, S, contrast), "scaled": False, "noise": np.zeros(3)}
    image = {**label, **draw_noise(rng, abs(rng.normal(0, 0.015)))}
    kind = rng.choice(["denoise", "inpaint", "sharpen", "contrast"], p=[0.2, 0.2, 0.2, 0.4])
    if kind == "denoise":
        image |= draw_noise(rng, rng.uniform(0.05, 0.2))
    elif kind == "sharpen":
        image["sigma"] = np.hypot(label["sigma"], rng.uniform(0.012, 0.04))
    elif kind == "inpaint":  # of a quarter to a twentieth; elsewhere image and label are equal
        image |= {"hole": rng.uniform(0.7, 1.6), "noise": np.zeros(3)}
    else:
        other = draw_look(rng, S, again)
        label |= {name: other[name] for name in ("mean", "curve", "gamma", "bias")}
    return [image, label]


def draw_other_task(rng, S, contrast=None):
    """Another task of the same masks: in another contrast, warped, for some of the classes, for
    two or three as one, or for all that is not a class."""
    few, as_one, swapped = rng.random(3)
    bend = abs(rng.normal(0, 0.02 if contrast else 0.01))
    return {"looks": [draw_look(rng, S, contrast)], "bend": np.float32(bend),
            "wanted": int(rng.choice(WANTED)) if few < 0.5 else MAX_CLASSES,
            "joined": int(rng.integers(1, 3)) if as_one < 0.2 else 0,
            "swapped": np.float32(swapped < 0.1)}


def draw_rest(rng, S, size, colored):
    """The numbers of a sample of S pairs beside its views and looks; those of a plain one.

    allowed     (256,) bool: the classes that may be asked for
    wanted      at most so many of them; joined: so many more share the gray of the first
    swapped     1: every gray g becomes 1 - g
    sizes       classes of which every pair shows so many pixels, least and most, come first
    regions     is the label sampled as classes are?
    endless     goes what is at the edge of a slice on outside?
    bend        strength of the elastic warp; cells: bumps of the random fields along a side
    """
    order, sums = draw_keys(rng)
    return {"size": size, "colored": colored, "regions": colored, "looks": [], "endless": False,
            "bend": np.float32(0), "allowed": (ALL > 0) & colored, "wanted": MAX_CLASSES,
            "joined": 0, "swapped": np.float32(0), "sizes": np.float32([-1, 1e9]),
            "order": order, "sums": sums,
            "cells": rng.integers(*CELLS, (S, len(CELLS[0])))}


@dataclass
class Slices:
    """What the loader yields: slices as they are stored, and the numbers drawn for them."""
    images: torch.Tensor  # (B, S, H, W) uint16: stored pixels in the upper left corner
    labels: torch.Tensor  # likewise: classes, or an image
    valid: torch.Tensor | None  # likewise, uint8: None where all labels have a truth
    views: torch.Tensor   # (B, S, 2, 3): in [-1, 1] of the padded slices
    ends: torch.Tensor    # (B, S, 2, 2): where the slices start and end in them, x and y
    levels: torch.Tensor  # (l, B, S): 1 / 65535 at the number of halvings of a slice, else 0
    rest: dict            # of tensors (B, ...): what is drawn for every sample
    looks: dict | None    # of tensors (L, ...), those of images first; `sample` says of which
    images_shown: int     # how many looks are of images
    masks: bool           # are any labels masks or region maps?
    pictures: bool        # are any labels images?
    bends: bool           # is any view elastic?
    leaves: bool          # may any view leave its slice?
    colors: bool          # is any sample colored?

    @classmethod
    def collate(cls, samples):
        """Samples of `ContextSamples` as one, padded to the largest slice."""
        pairs = [pair for sample in samples for pair in sample["pairs"]]
        sizes = np.array([image.shape for image, _, _ in pairs])
        B, most = len(samples), sizes.max(0)
        valid = None
        if any(known is not None for _, _, known in pairs):
            valid = np.ones((len(pairs), *most), np.uint8)
        images, labels = np.empty((2, len(pairs), *most), np.uint16)
        for i, (image, label, known) in enumerate(pairs):
            fill(images[i], image)
            fill(labels[i], label)
            if known is not None:
                fill(valid[i], known)
        filled = (sizes / most)[:, ::-1]  # the share of the padded square, x before y
        views = np.concatenate([sample["views"][:, :2] for sample in samples])
        farthest = abs(views[:, :, :2]).sum(2) + abs(views[:, :, 2])  # 1: the slice's edge
        views = views * filled[:, :, None]
        views[:, :, 2] += (1 + 1e-6) * filled - 1  # 1e-6: a tie goes to the second pixel
        side = np.sqrt(abs(np.linalg.det(views[:, :, :2])) * most.prod())  # in stored pixels
        halvings = np.log2(np.maximum(side / samples[0]["size"], 1)).round().clip(0, 2)
        ends = np.stack([filled * 0 - 1, 2 * filled - 1], -2)
        ends[np.repeat([sample["endless"] for sample in samples], len(pairs) // B)] = [[-9], [9]]
        looks = [{**look, "sample": i} for part in (0, 1) for i, sample in enumerate(samples)
                 for look in sample["looks"][part:part + 1]]  # those of images first
        rest = [{k: v for k, v in s.items() if k not in ("pairs", "views", "looks")}
                for s in samples]
        parts = dict(images=images, labels=labels, valid=valid, views=np.float32(views),
                     ends=np.float32(ends))
        parts = {k: v if v is None else torch.from_numpy(v).unflatten(0, (B, -1))
                 for k, v in parts.items()}
        levels = np.float32([(halvings == i) / TOP for i in range(int(halvings.max()) + 1)])
        bends = any(sample["bend"] > 0 for sample in samples)
        masks = [bool(sample["regions"]) for sample in samples]
        return cls(**parts, rest=default_collate(rest),
                   levels=torch.from_numpy(levels).unflatten(1, (B, -1)),
                   looks=stack_looks(looks, samples[0]["size"]),
                   images_shown=sum(len(sample["looks"]) > 0 for sample in samples),
                   masks=any(masks), pictures=not all(masks),
                   bends=bends, leaves=bends or bool((farthest > 1 + 1e-6).any()),
                   colors=any(sample["colored"] for sample in samples))

    def change(self, function):
        """All tensors through a function."""
        def through(v):
            if isinstance(v, dict):
                return {k: through(w) for k, w in v.items()}
            return function(v) if isinstance(v, torch.Tensor) else v
        return Slices(**{f.name: through(getattr(self, f.name)) for f in fields(self)})

    def to(self, device):
        return self.change(lambda v: v.to(device, non_blocking=True))

    def pin_memory(self):
        return self.change(lambda v: v.pin_memory())


def fill(place, picture):
    """Write a picture into the upper left corner; beyond it its edge goes on."""
    rows, columns = picture.shape
    place[:rows, :columns] = picture
    place[:rows, columns:] = picture[:, -1:]
    place[rows:] = place[rows - 1]


def stack_looks(looks, size):
    """Numbers of looks as tensors. What only some have is stacked for them: `rendered`, `curved`
    and `holed` are their numbers, `..._of` the samples that they belong to."""
    if not looks:
        return None
    sample = np.array([look["sample"] for look in looks])
    groups = {"rendered": [look["mean"] is not None for look in looks],
              "curved": [look["mean"] is None for look in looks],
              "holed": [look["hole"] is not None for look in looks]}
    groups = {name: np.flatnonzero(of) for name, of in groups.items()}
    some = {"mean": "rendered", "rough": "rendered", "curve": "curved", "hole": "holed"}
    stacked = {"sample": sample, **groups}
    stacked |= {f"{name}_of": sample[numbers] for name, numbers in groups.items()}
    for name in looks[0]:
        chosen = groups[some[name]] if name in some else range(len(looks))
        if name != "sample" and len(chosen):
            stacked[name] = np.float32(np.stack([looks[i][name] for i in chosen]))
    steps = np.arange(1 - size, size) / size
    distance = np.minimum((steps / stacked.pop("sigma")[..., None]) ** 2 / 2, EXPONENT)
    stacked["bell"] = np.float32(np.exp(-distance))  # (L, 2, 2 size - 1)
    return {name: torch.from_numpy(value) for name, value in stacked.items()}


# -------------------------------------------------------------------------------------------------
# Pixels, made on the device

def make_batch(slices, size, recipe, key=0):
    """The `Batch` of a `Slices`, on its device.

    size: the model's, in pixels; key: seed of the random fields and the noise.
    """
    s, fields, generator = slices, None, None
    if s.looks or s.bends:
        generator = torch.Generator(s.images.device).manual_seed(key)
        fields = smooth_fields(s.rest["cells"], size, generator)
    images, labels, valid = sample_views(s, size, fields)
    if s.looks:
        images, labels = show(s, images, labels, fields, generator)
    if s.colors:
        palette = choose_palettes(s, labels, recipe)
    else:
        palette = images.new_zeros(len(images), MAX_CLASSES)
    kept = ("colored", "drop", "drawn", "hidden")
    images, labels, valid = (t.unsqueeze(2) for t in (images, labels, valid.view(torch.uint8)))
    return Batch(images=images, labels=labels, valid=valid, palette=palette,
                 **{name: s.rest[name] for name in kept if name in s.rest})


class Constants(NamedTuple):
    """What is computed once for a size."""
    line: torch.Tensor    # (size,): the pixels' places in [-1, 1]
    shift: torch.Tensor   # (size, size): the number of a pixel's distance from another one
    fields: torch.Tensor  # (MOST_CELLS + 1, size, NODES): what the nodes of a field add to a pixel


@lru_cache(maxsize=8)
def constants(size, device):
    numbers = torch.arange(size, device=device)
    cells = torch.arange(MOST_CELLS + 1, device=device)[:, None, None]
    distance = cells * (numbers / size)[:, None] - torch.arange(-2, NODES - 2, device=device)
    weights = distance.square().clamp(max=EXPONENT).neg().exp()
    return Constants((2 * numbers + 1) / size - 1, numbers[:, None] - numbers + size - 1,
                     F.normalize(weights, dim=-1))


def smooth_fields(cells, size, generator):
    """Random smooth fields of unit variance, `cells` (...) bumps a side -> (..., size, size)."""
    weights = constants(size, cells.device).fields[cells]            # (..., size, NODES)
    noise = torch.randn(*cells.shape, NODES, NODES, device=cells.device, generator=generator)
    return weights @ noise @ weights.transpose(-1, -2)


def sample_views(s, size, fields):
    """Slices as their views show them: images, labels, valid (B, S, size, size).

    Images are sampled bilinearly, of slices that are halved first where the view makes them much
    smaller. Masks are sampled to the nearest. What lies outside of a slice is 0.
    """
    B, S = s.views.shape[:2]
    line = constants(size, s.views.device).line
    across, down, centre = s.views.flatten(0, 1)[..., None].unbind(2)  # (B S, 2, 1) each
    grid = torch.addcmul(centre, across, line)[..., None, :] + (down * line)[..., None]
    if s.bends:
        bend = s.rest["bend"][:, None, None, None, None]
        grid = torch.addcmul(grid.view_as(fields[:, :, :2]), fields[:, :, :2], bend).view_as(grid)
    if not s.leaves:
        inside = torch.ones(B, S, size, size, dtype=torch.bool, device=grid.device)
    else:
        start, end = s.ends.flatten(0, 1)[..., None, None].unbind(1)
        inside = ((grid >= start) & (grid <= end)).all(1).view(B, S, size, size)
    grid = grid.permute(0, 2, 3, 1)

    def look_up(pixels, mode):
        sampled = F.grid_sample(pixels, grid, mode, padding_mode="border", align_corners=False)
        return sampled.view_as(inside)

    def smoothly(pixels, shares):
        pixels, shares = pixels.flatten(0, 1)[:, None].float(), shares[..., None, None]
        sampled = look_up(pixels, "bilinear").mul_(shares[0])
        for share in shares[1:]:
            pixels = F.avg_pool2d(pixels, 2)
            sampled.addcmul_(look_up(pixels, "bilinear"), share)
        return within(sampled)

    def nearest(pixels):
        return within(look_up(pixels.flatten(0, 1)[:, None].float(), "nearest"))

    def within(sampled):
        return sampled.mul_(inside) if s.leaves else sampled

    images = smoothly(s.images, s.levels)
    labels = nearest(s.labels) if s.masks else None
    if s.pictures:
        shown = smoothly(s.labels, s.levels[:1])
        mask = s.rest["regions"][:, None, None, None]
        labels = shown if labels is None else torch.where(mask, labels, shown)
    return images, labels, inside if s.valid is None else nearest(s.valid) > 0


def show(s, images, labels, fields, generator):
    """Images and labels (B, S, H, W) in which the looks have taken their places."""
    n, own, count = s.looks, s.looks["sample"], s.images_shown
    texture, bias, holes = (fields[:, :, k] for k in (TEXTURE, BIAS, HOLES))  # (B, S, H, W)
    pictures = images.new_empty(len(own), *images.shape[1:])                  # (L, S, H, W)
    if "mean" in n:
        of = n["rendered_of"]
        pictures[n["rendered"]] = render(labels[of], n["mean"], n["rough"], texture[of])
    if "curve" in n:
        pictures[n["curved"]] = bend_curve(images[n["curved_of"]], n["curve"])
    pictures = scan(pictures, n, bias[own], generator)
    if "hole" in n:
        hole = holes[n["holed_of"]] > n["hole"][:, None, None, None]
        pictures[n["holed"]] = pictures[n["holed"]].masked_fill(hole, 0.0)
    images[own[:count]], labels[own[count:]] = pictures[:count], pictures[count:]
    return images, labels


def render(regions, mean, rough, texture):
    """Textured tissues: (L, S, H, W), the tissues' means (L, S, 64) and roughness (L, 64)."""
    tissue = regions.flatten(2).long()
    rough = rough[:, None].expand_as(mean).gather(2, tissue)
    return torch.addcmul(mean.gather(2, tissue), rough, texture.flatten(2)).view_as(regions)


def bend_curve(images, curve):
    """Images (L, S, H, W) in [0, 1] through curves of intensities (L, S, 2, KNOTS)."""
    x, (value, slope) = images.flatten(2), curve.unbind(2)
    segment = (x * (KNOTS - 1e-3)).long()
    return torch.addcmul(value.gather(2, segment), slope.gather(2, segment), x).view_as(images)


def scan(images, n, bias, generator):
    """Blur, fading, bias field, gamma, noise and scaling of looks (L, S, H, W)."""
    (L, S, size, _), wide = images.shape, (slice(None), None, None, None)
    fixed = constants(size, images.device)
    kernel = n["bell"][..., fixed.shift]                            # (L, 2, size, size)
    down, across = kernel.div_(kernel.sum(-1, keepdim=True)).unbind(1)
    images = (images.flatten(1, 2) @ across.transpose(1, 2)).view(L, S, size, size)
    images = (images.transpose(2, 3).flatten(1, 2) @ down.transpose(1, 2)).view(L, S, size, size)
    images = images.transpose(2, 3).contiguous()
    gain = n["bias"][wide] * bias
    gain.addcmul_(n["fade"][wide], fixed.line[:, None], value=-0.5).exp_()
    images.mul_(gain).clamp_(0, 1).pow_(n["gamma"][..., None, None])
    noise = torch.randn(images.shape, device=images.device, generator=generator)
    for axis in (2, 3):
        noise = torch.addcmul(noise, noise.roll(1, axis), n["grain"][wide])
    added, rician, speckle = (n["noise"][:, i][wide] for i in range(3))
    images.addcmul_(noise, torch.addcmul(added, images, speckle)).clamp_(min=0)
    images.hypot_(noise.roll(size // 2, -1).mul_(rician))           # as if drawn again
    low, high = F.avg_pool2d(images, 4).flatten(2).aminmax(dim=2)
    scaled = n["scaled"][:, None]
    span = (high - low).clamp(min=1e-3).pow(scaled)  # 1 where it is not scaled
    images.sub_((low * scaled)[..., None, None]).div_(span[..., None, None])
    return images.clamp_(0, 1)


def choose_palettes(s, labels, recipe):
    """The grays of the classes that are asked for, (B, 256), by what the labels show.

    What no prompt shows is background. Of the others the first `wanted` are asked for, in random
    order; for the procedural tasks those come first that every pair shows at a fitting size.
    """
    rest, classes = s.rest, labels.flatten(2).long()  # (B, S, H W)
    area = labels.new_zeros(*labels.shape[:2], MAX_CLASSES)
    area.scatter_add_(2, classes, labels.new_ones(()).expand_as(classes))
    asked = (area[:, :-1].amax(1) > 0) & rest["allowed"]
    least, most = rest["sizes"][:, :, None].unbind(1)
    low, high = area.aminmax(dim=1)
    keys = rest["order"] + ((low < least) | (high > most))
    palettes = draw_palettes(asked, (keys, rest["sums"]), recipe.coloring, rest["wanted"],
                             rest["joined"], rest["offset"])
    return (palettes - rest["swapped"][:, None]).abs()
