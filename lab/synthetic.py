"""Endless synthetic tasks: train with no data at all (`--datasets synthetic`), or beside real data.

A task is an invented anatomy, one of three:
- a body with organs of random shape (blobs, rings, crescents, tubes, mirrored pairs, organs in two
  parts, a chamber in its wall beside another), whole or in close-up
- layers of tissue as an ultrasound probe sees them
- plain random regions

Its subjects differ as people do: in place, size and turn, organ by organ, by a smooth warp, by an
organ that is missing, by things that only one of them has. They are imaged with a random contrast,
texture, blur, bias field and noise.

A task asks for a random subset of the structures, or it is image-to-image: denoise, inpaint,
another contrast, sharpen, draw a box around a structure. No task repeats, so a model cannot
remember a dataset and has to read the prompt. SynthSeg and SynthMorph had the idea that random
shapes and contrasts teach what transfers to scans.

    rng = np.random.default_rng([seed, index])
    images, labels = task(rng, pairs=2, size=64, colored=True)    # (S, H, W) each

Labels are classes, or floats in [0, 1].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

THINGS = 3  # tissues of things that only one subject has
SHAPES = ("blob", "blob", "blob", "ring", "crescent", "tube", "mirrored", "parted", "chambers")
IMAGE_TASKS = ("denoise", "inpaint", "contrast", "contrast", "sharpen", "box")


# -------------------------------------------------------------------------------------------------
# Task augmentation: another task made of a sample's pairs

def augment(images, labels, valid, colored, rng, apart=1, near=False):
    """Another task made of the pairs (S, 1, H, W) of a sample, so that few datasets teach more.

    Ours; the idea is the task augmentation of UniverSeg (Butoi et al. 2023).
    All pairs are mirrored and turned by quarters alike. Where the labels are classes,
    - all pairs are zoomed and moved alike, and each a little by itself
    - all get the same random curve of intensities: another contrast of the same anatomy
    - each is brightened a little, and gets a little noise
    - half of the time only some of the classes are asked for

    apart   factor of what differs from pair to pair; above 1 where a case prompts itself, which
            would otherwise teach copying
    near    the pairs are close-ups, and are zoomed out less
    """
    S = len(images)
    zoom, move, turn = np.ones(S), np.zeros((S, 2)), np.full(S, rng.integers(4) * np.pi / 2)
    mirror = rng.choice([-1, 1])
    if colored:
        zoom = np.exp(rng.uniform(-0.15 if near else -0.5, 0.15) + rng.normal(0, 0.08 * apart, S))
        move = rng.uniform(-0.15, 0.15, 2) * (0.5 if near else 1)
        move = move + rng.normal(0, 0.06 * apart, (S, 2))
        turn = turn + rng.normal(0, 0.12 * apart, S)
    c, s = np.cos(turn) * zoom, np.sin(turn) * zoom
    first, second = [c * mirror, -s, move[:, 0]], [s * mirror, c, move[:, 1]]
    theta = np.stack([np.stack(first, -1), np.stack(second, -1)], 1)  # (S, 2, 3)
    grid = F.affine_grid(torch.from_numpy(theta).float(), images.shape, align_corners=False)

    def sample(x, mode):
        return F.grid_sample(x.float(), grid, mode=mode, align_corners=False)

    images, valid = sample(images, "bilinear"), sample(valid, "nearest").to(valid.dtype)
    labels = sample(labels, "nearest" if colored else "bilinear")
    if not colored:
        return images, labels, valid
    shown = labels[:-1].unique()[1:].numpy()
    if len(shown) > 1 and rng.random() < 0.5:
        asked = torch.from_numpy(rng.permutation(shown)[:rng.integers(1, len(shown))])
        labels = labels * torch.isin(labels, asked)
    if rng.random() < 0.7:
        at = np.linspace(0, 1, rng.integers(3, 8))
        curve = rng.random(len(at))
        if rng.random() < 0.5:  # black stays black
            curve[0] = 0
        curves = [(curve + rng.normal(0, 0.04, len(at))).clip(0, 1) for _ in images]
        images = torch.stack([torch.from_numpy(np.interp(x.numpy(), at, each)).float()
                              for x, each in zip(images, curves)])
    gamma = torch.from_numpy(np.exp(rng.normal(0, 0.2, S))).float()[:, None, None, None]
    grain = rng.standard_normal(images.shape, dtype=np.float32) * abs(rng.normal(0, 0.04))
    images = (images.clamp(0, 1) ** gamma + torch.from_numpy(grain)).clamp(0, 1)
    return images, labels, valid


# -------------------------------------------------------------------------------------------------
# Random fields

def noise(rng, *shape):
    """Standard normal numbers, float32."""
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def smooth(rng, maps, size, cells):
    """Random smooth maps (maps, size, size) of about unit variance, `cells` bumps along a side."""
    coarse = noise(rng, 1, maps, cells + 3, cells + 3)
    fine = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)[0]
    return fine * 1.4


def blur(images, sigma):
    """Gaussian blur of (S, H, W), sigma in pixels."""
    if sigma < 0.3:
        return images
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-torch.arange(-reach, reach + 1) ** 2 / (2 * sigma ** 2))
    kernel = kernel / kernel.sum()
    edge = "replicate" if reach >= images.shape[-1] else "reflect"
    x = F.pad(images[:, None], (reach,) * 4, mode=edge)
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def pixel_grid(size):
    """y and x of the pixels, (size, size) each, in [-1, 1]."""
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    return torch.meshgrid(line, line, indexing="ij")


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
    """Random regions without a plan, warped from subject to subject.

    Returns (regions (S, H, W) int64, how many there are).
    """
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
    return torch.stack(subjects), count


# -------------------------------------------------------------------------------------------------
# Imaging: what a scanner makes of a subject

def draw_contrast(rng, count):
    """(means, texture strengths, texture scale) of `count` tissues. Two tissues may look alike."""
    mean = rng.uniform(0.05, 1.0, count)
    if rng.random() < 0.5:  # it is dark outside of the body
        mean[0] = rng.uniform(0, 0.08)
    if rng.random() < 0.4:  # most tissue is in a narrow band, as soft tissue in CT
        mean[1:] = rng.uniform(0.2, 0.8) + 0.25 * (mean[1:] - 0.5)
    return mean, np.abs(rng.normal(0, 0.05, count)), int(rng.integers(6, 24))


def render(rng, regions, contrast, size):
    """Clean images (S, H, W) of region maps: textured tissues, a little different by subject."""
    mean, rough, cells = contrast
    rough = torch.from_numpy(rough.astype(np.float32))
    images = []
    for r in regions:
        own = np.clip(mean + rng.normal(0, float(rng.choice([0.02, 0.06])), len(mean)), 0, 1)
        own = own ** math.exp(rng.normal(0, 0.15))
        own = torch.from_numpy(own.astype(np.float32))
        images.append(own[r] + rough[r] * smooth(rng, 1, size, min(cells, size // 2))[0])
    return torch.stack(images)


def echo(rng, images):
    """What ultrasound makes of echo strengths (S, H, W).

    There is speckle, wider than deep, and the image fades with depth. Some show the fan's edge.
    """
    size = images.shape[-1]
    grain = noise(rng, 2, *images.shape)
    grain = F.avg_pool2d(grain.flatten(0, 1)[:, None], (1, 3), 1, (0, 1)).view_as(grain)
    grain = grain.square().sum(0).sqrt()
    images = images * (1 + float(rng.uniform(0.2, 0.7)) * (grain / grain.mean() - 1))
    line = (torch.arange(size) + 0.5) / size
    images = images * torch.exp(-float(rng.uniform(0, 1.5)) * line)[:, None]
    if rng.random() < 0.3:
        apex = float(rng.uniform(0.2, 1.0))
        across, down = line[None] - 0.5, line[:, None] + apex
        fan = across.abs() < float(rng.uniform(0.5, 1.1)) * down * 0.6
        images = images * fan * (torch.hypot(across, down) > apex + 0.05)
    return images


def acquire(rng, images, clean=False):
    """Blur, bias field, resolution, gamma and noise of one scanner.

    (S, H, W) -> (S, H, W) in [0, 1]; clean: without the noise.
    """
    size = images.shape[-1]
    images = blur(images, float(rng.uniform(0, 0.012)) * size)
    if rng.random() < 0.5:
        bias = smooth(rng, len(images), size, 2) * float(rng.uniform(0, 0.25))
        images = images * torch.exp(bias)
    if rng.random() < 0.2:
        small = max(8, int(size * rng.uniform(0.35, 0.8)))
        coarse = F.interpolate(images[:, None], (small, small), mode="area")
        images = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)[:, 0]
    images = images.clamp(0, 1) ** float(math.exp(rng.normal(0, 0.2)))
    return images if clean else add_noise(rng, images, float(abs(rng.normal(0, 0.05))))


def add_noise(rng, images, strength):
    """Gaussian, Rician or speckle noise, white or a little smoothed."""
    kind, grain = rng.choice(["gauss", "rician", "speckle"]), float(rng.choice([0, 0, 0.7, 1.2]))
    a = blur(noise(rng, *images.shape), grain) * (1 + 2.2 * grain) * strength
    b = blur(noise(rng, *images.shape), grain) * (1 + 2.2 * grain) * strength
    if kind == "gauss":
        noisy = images + a
    elif kind == "rician":
        noisy = torch.sqrt((images + a) ** 2 + b ** 2)
    else:
        noisy = images * (1 + 3 * a)
    return noisy.clamp(0, 1)


# -------------------------------------------------------------------------------------------------
# Tasks

def task(rng, pairs, size, colored):
    """`pairs` subjects of one new task: images (S, H, W) in [0, 1], labels (S, H, W), float32.

    colored: labels are classes 0, 1, ... of a random subset of the structures. Otherwise labels
    are images in [0, 1]. Deterministic in the generator.
    """
    spread = float(rng.choice([0.5, 1.0, 1.5, 2.5]))
    layered = False
    if rng.random() < 0.85:
        structures, ground = draw_anatomy(rng)
        view, layered = draw_view(rng, structures, ground), structures[0]["shape"] == "layer"
        regions = torch.stack([draw_subject(rng, structures, ground, view, size, spread)
                               for _ in range(pairs)])
        classes, count = len(structures) + 1, len(structures) + 1 + THINGS
    else:
        regions, count = draw_regions(rng, pairs, size, min(spread, 1.5))
        classes = count
    images = render(rng, regions, draw_contrast(rng, count), size)
    if layered and rng.random() < 0.7:
        images = echo(rng, images)
    if not colored:
        return image_task(rng, regions, count, classes, images, size)
    images = acquire(rng, images)
    if rng.random() < 0.7:  # as scans are scaled, by their percentiles
        ends = images.flatten(1).quantile(torch.tensor([0.005, 0.995]), dim=1)
        low, high = ends[..., None, None]
        images = ((images - low) / (high - low).clamp(min=1e-3)).clamp(0, 1)
    return images, draw_classes(rng, regions, classes)


def areas(regions, count):
    """The share of each image that each of `count` regions has, (S, count or more)."""
    pixels = torch.stack([torch.bincount(r.flatten(), minlength=count) for r in regions])
    return pixels.float() / regions[0].numel()


def draw_classes(rng, regions, classes):
    """Classes (S, H, W) of a random subset of structures, some of them joined.

    Structures that every pair shows are preferred.
    """
    area = areas(regions, classes + THINGS)
    candidates = [i for i in range(1, classes)
                  if (area[:, i] > 0.002).all() and area[:, i].max() < 0.5]
    candidates = candidates or list(range(1, classes))
    wanted = rng.permutation(candidates)
    wanted = wanted[:int(rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12]))]
    table = torch.zeros(classes + THINGS)
    for n, i in enumerate(wanted):  # now and then two structures are one class
        table[int(i)] = n + 1 if n == 0 or rng.random() > 0.1 else n
    return table[regions]


def image_task(rng, regions, count, classes, images, size):
    """(images, labels) of an image-to-image task."""
    kind = str(rng.choice(IMAGE_TASKS))
    clean = acquire(rng, images, clean=True)
    if kind == "denoise":
        return add_noise(rng, clean, float(rng.uniform(0.05, 0.2))), clean
    if kind == "sharpen":
        return blur(clean, float(rng.uniform(0.012, 0.04)) * size).clamp(0, 1), clean
    if kind == "inpaint":
        clean = add_noise(rng, clean, float(abs(rng.normal(0, 0.02))))
        maps = torch.stack([smooth(rng, 1, size, int(rng.integers(2, 6)))[0] for _ in clean])
        edge = maps.flatten(1).quantile(float(rng.uniform(0.75, 0.95)), dim=1)
        return clean.masked_fill(maps > edge[:, None, None], 0.0), clean
    if kind == "box":
        clean = add_noise(rng, clean, float(abs(rng.normal(0, 0.03))))
        area = areas(regions, count)
        small = [i for i in range(1, classes)
                 if area[:, i].max() < 0.15 and area[:, i].min() > 0.001]
        return clean, boxed(clean, regions, int(rng.choice(small or [classes - 1])))
    other = acquire(rng, render(rng, regions, draw_contrast(rng, count), size), clean=True)
    strength = float(abs(rng.normal(0, 0.03)))
    return add_noise(rng, clean, strength), other


def boxed(images, regions, structure):
    """Images (S, H, W) with a white box around a structure.

    The line is a 256th of the side wide, at least one pixel.
    """
    images, width = images.clone(), max(1, images.shape[-1] // 256)
    for image, r in zip(images, regions):
        rows, columns = torch.where(r == structure)
        if len(rows):
            top, bottom = rows.min(), rows.max() + 1
            left, right = columns.min(), columns.max() + 1
            box = torch.zeros_like(image, dtype=torch.bool)
            box[max(0, top - width):bottom + width, max(0, left - width):right + width] = True
            box[top:bottom, left:right] = False
            image[box] = 1.0
    return images
