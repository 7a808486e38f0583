"""Section 3.2, random colorization: how classes become gray values, and gray values classes again.

A *palette* gives every class of one sample its gray value. The background, class 0, is black.

    random      (the paper's choice) colors are drawn anew for every sample; a color says nothing,
                and the model has to read in the prompt what it stands for
    predefined  one fixed color for every class of every dataset, no two alike
    binary      one class, drawn at random, is white; the others count as background

data.py draws a sample's palette and train.py lays it on the labels, both with this file.
A new coloring is a new branch of `make_palette`, and of `choose_colors` in predict.py. At
inference `decode` reads a painted image.
"""

import numpy as np
import torch

COLORINGS = ("random", "predefined", "binary")
MAX_CLASSES = 256  # size of a palette; the store keeps labels of 8 bits


def color_gap(n):
    """The least distance of n random colors from each other and from 0 (ours)."""
    return min(0.2, 0.7 / max(n, 1))


def random_colors(n, rng):
    """n gray values in (0, 1], at least `color_gap(n)` apart and from 0, in random order."""
    gap = color_gap(n)
    room = np.sort(rng.random(n)) * (1 - n * gap)
    return rng.permutation(room + gap * np.arange(1, n + 1))


def spread_colors(n):
    """n gray values in (0, 1] as far apart as can be: the easiest to tell apart at inference."""
    return np.arange(1, n + 1) / max(n, 1)


def predefined_offsets(datasets):
    """({name: offset}, number of all classes): class n of a dataset is (offset + n) / number.

    datasets: the `Dataset`s in their fixed order. The paper's formula i * N_i is read as the
    running sum of the N_i; otherwise two classes would share a color (docs/differences.md).
    """
    offsets, total = {}, 0
    for dataset in datasets:
        if dataset.colored:
            offsets[dataset.name] = total
            total += len(dataset.labels)
    return offsets, total


def make_palette(classes, coloring, rng, name=None, predefined=None):
    """The gray value of every class, (256,) float32: 0 for background and classes not listed.

    classes     those above 0 that the prompt shows; what it does not show cannot be asked for
    coloring    random | predefined | binary
    rng         numpy generator, for random and binary
    name, predefined    the dataset's name and `predefined_offsets`, for predefined
    Raises ValueError for another coloring.
    """
    palette, classes = np.zeros(MAX_CLASSES, np.float32), np.asarray(classes, int)
    if coloring not in COLORINGS:
        raise ValueError(f"coloring is {coloring!r}: choose one of {', '.join(COLORINGS)}")
    if len(classes) == 0:
        return palette
    if coloring == "random":
        palette[classes] = random_colors(len(classes), rng)
    elif coloring == "predefined":
        offsets, total = predefined
        palette[classes] = (offsets[name] + classes) / total
    else:
        palette[rng.choice(classes)] = 1.0
    return palette


def color(labels, palette, colored):
    """Lay colors on integer classes: a look-up in a table, on the labels' device.

    labels (B, ...) floats, palette (B, 256), colored (B,) bool -> (B, ...). Where `colored` is
    False the label is an image, which passes unchanged.
    """
    flat = labels.flatten(1)
    painted = palette.gather(1, flat.clamp(0, MAX_CLASSES - 1).long())
    return torch.where(colored[:, None], painted, flat).view_as(labels)


def decode(painted, colors):
    """How well a pixel fits background and each color: (..., H, W), C grays -> (..., C + 1, H, W).

    The scores of a pixel sum to 1, and the nearest color has the highest. A score falls off
    within a third of the least distance between two colors. Unlike grays, scores can be averaged
    over colorings and resized: no edge between two classes runs through the color of a third.
    """
    colors = torch.as_tensor(np.asarray(colors), dtype=torch.float32)
    colors = torch.cat([torch.zeros(1), colors]).to(painted.device)
    gap = colors.sort().values.diff().min() if len(colors) > 1 else torch.ones(())
    width = gap.clamp(min=1e-3).to(painted.device) / 3
    distance = (painted[..., None, :, :] - colors[:, None, None]) / width
    return torch.softmax(-distance ** 2, dim=-3)
