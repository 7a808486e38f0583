"""Section 3.2, random colorization: how classes become gray values, and gray values classes again.

A *palette* gives every class of one sample its gray value. The background, class 0, is black.

    random      (the paper's choice) colors are drawn anew for every sample; a color says nothing,
                and the model has to read in the prompt what it stands for
    predefined  one fixed color for every class of every dataset, no two alike
    binary      one class, drawn at random, is white; the others count as background

batches.py draws the palettes of a batch and train.py lays them on the labels, both with this file.
A new coloring is a new branch of `draw_palettes`, and of `choose_colors` in predict.py. At
inference `decode` reads a painted image.
"""

import numpy as np
import torch

COLORINGS = ("random", "predefined", "binary")
MAX_CLASSES = 256  # size of a palette; the store keeps labels of 8 bits


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


def draw_palettes(asked, keys, coloring, wanted=None, joined=None, offset=None):
    """The gray value of every class, (B, 256): 0 for background and classes not asked for.

    asked       (B, 256) bool: the classes that the prompts show; what they do not show cannot be
                asked for
    keys        (B, 256) and (B, 257): random numbers of `draw_keys`
    coloring    random | predefined | binary
    wanted      (B,): only so many of them, the first ones (task augmentation)
    joined      (B,): so many after the first share its gray (task augmentation)
    offset      (B, 2), for predefined: the dataset's offset and the number of all classes
    n random colors are at least min(0.2, 0.7 / n) apart and from 0 (ours). Raises ValueError for
    another coloring.
    """
    if coloring not in COLORINGS:
        raise ValueError(f"coloring is {coloring!r}: choose one of {', '.join(COLORINGS)}")
    keys, sums = keys
    rank = keys.masked_fill(~asked, torch.inf).argsort(1).argsort(1)  # 0: least key of those asked
    if wanted is not None:
        asked = asked & (rank < wanted[:, None])
    if joined is not None:
        rank = (rank - joined[:, None]).clamp(min=0)
    if coloring == "binary":
        return (asked & (rank == 0)).float()
    number = torch.arange(1, MAX_CLASSES + 1, device=asked.device)
    if coloring == "predefined":
        return (offset[:, :1] + number - 1) / offset[:, 1:] * asked
    n = asked.sum(1, keepdim=True)
    gap = (0.7 / n).clamp(max=0.2)
    uniform = sums[:, :-1] / sums.gather(1, n)  # the first n: uniform in [0, 1], ascending
    return torch.addcmul(uniform * (1 - n * gap), gap, number).gather(1, rank) * asked


def draw_keys(rng):
    """The random numbers for a palette: the order of the classes (256,), the least comes first,
    and running sums of exponential numbers (257,). Of these the first n over number n + 1 are n
    uniform numbers in order, whatever n is."""
    order, steps = rng.random(MAX_CLASSES), rng.exponential(size=MAX_CLASSES + 1)
    return np.float32(order), np.float32(steps.cumsum())


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
