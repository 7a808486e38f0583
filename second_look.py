"""A second look from near (ours): a function around the plain prediction.

A small model sees few pixels of a small organ. So inference first looks at the whole slice. Where
a class was seen it asks again, in a window around it, with the prompt cropped around its label.
Models that were trained with binary colors take two looks; `--looks 1` leaves the second one out.
"""

import numpy as np
import torch

from scans import boxes

MARGIN = 1.5     # a window is so many times as large as the class
SMALLEST = 0.25  # and at least this share of the picture; from LARGEST on one look is enough
LARGEST = 0.85
WEIGHT = 0.67    # how much the second answer counts beside the first one
THRESHOLD = 0.5  # the gray from which a class is seen


def extent(mask, trim=0.0):
    """Where a mask (H, W) is: (its centre (y, x), its larger side), in shares of the picture.

    trim: the share of the mask that may lie outside, at either end. None for an empty mask.
    """
    ends = []
    for axis in (1, 0):
        total = mask.sum(axis).cumsum()
        if not total[-1]:
            return None
        ends.append((np.searchsorted(total, trim * total[-1], "right"),
                     np.searchsorted(total, (1 - trim) * total[-1]) + 1))
    centre = tuple((a + b) / 2 / n for (a, b), n in zip(ends, mask.shape))
    return centre, max((b - a) / n for (a, b), n in zip(ends, mask.shape))


def window(centre, side, shape):
    """(rows, columns) of a window of a picture (H, W), moved inside, at least 2 pixels a side.

    centre (y, x) and side are shares of the picture.
    """
    spans = []
    for at, n in zip(centre, shape):
        length = min(n, max(2, round(side * n)))
        start = int(np.clip(round(at * n - length / 2), 0, n - length))
        spans.append(slice(start, start + length))
    return tuple(spans)


def look_again(ask, prompts, image, gray, value, candidates=None):
    """The answer (H, W) for one class of one image after a second look, from the first one.

    ask         ([prompt images], [masks], image), (h, w) arrays of any sizes -> gray (h, w) tensor
    prompts     [(image, label)], (H, W) arrays; value: the class
    gray        (H, W) tensor, 0 to 1: the first answer
    candidates  look at so many connected parts one by one (default: at all of the class at once)
    """
    places = [extent(label == value) for _, label in prompts]
    known = [place for place in places if place]
    if not known:  # a class that no prompt shows
        return gray
    seen = (gray > THRESHOLD).numpy()
    looks = [extent(seen, trim=0.01)]  # a stray pixel does not widen the window
    if candidates:
        parts = boxes.around(seen) if seen.any() else []
        looks = [extent(boxes.fill([box], seen.shape)) for box in parts[:candidates]]
    answer, looked = torch.zeros_like(gray), False
    for look in looks:
        if look is None:
            continue
        side = max(SMALLEST, MARGIN * max(look[1], *(p[1] for p in known)))
        if side > LARGEST:
            continue
        looked, here = True, window(look[0], side, image.shape)
        # A prompt without the class is cropped where the first one has it.
        around = [window((place or known[0])[0], side, x.shape)
                  for place, (x, _) in zip(places, prompts)]
        near = ask([x[w] for w, (x, _) in zip(around, prompts)],
                   [y[w] == value for w, (_, y) in zip(around, prompts)], image[here])
        near = torch.lerp(gray[here], near, WEIGHT)
        answer[here] = torch.maximum(answer[here], near)  # outside of all windows the class is not
    return answer if looked else gray
