"""Image tasks at the scan's own resolution (ours): in windows of the model's side.

A mask is asked of the whole slice, reduced to the model's side. An image task would lose the detail
that it is about. So training shows windows of the model's side, at the same relative place of
prompt and task, and inference answers in windows that overlap by a half and are blended.
"""

import numpy as np
import torch

from batches import view_of
from scans.volumes import resize_images

MAX_SIDE = 512  # pixels along a side at most, the resolution of the store


def fitted(shape, side):
    """The shape (H, W) reduced to 512 pixels along a side at most, enlarged to the model's."""
    grow = max(1, side / min(min(n, MAX_SIDE) for n in shape))
    most = max(side, MAX_SIDE)
    return [min(most, max(side, round(min(n, MAX_SIDE) * grow))) for n in shape]


def fit(picture, side):
    """A picture (H, W) at its `fitted` size: a tensor."""
    picture = torch.from_numpy(np.ascontiguousarray(picture, np.float32))
    return resize_images(picture[None, None], fitted(picture.shape, side))[0, 0].clamp(0, 1)


def window(picture, place, side):
    """The window at a relative place (y, x), 0 to 1: (H, W) -> (side, side)."""
    top, left = (round(at * (n - side)) for at, n in zip(place, picture.shape))
    return picture[top:top + side, left:left + side].contiguous()


# -------------------------------------------------------------------------------------------------
# Training

def draw_windows(pairs, side, rng):
    """The views (3, 3) of pairs [(image, label, valid or None)], (H, W) arrays, the task last.

    Where the truth is known in part only, the window holds some of what is scored.
    """
    place, views = draw_place(pairs[-1][2], side, rng), []
    for image, _, _ in pairs:
        shape = np.array(fitted(image.shape, side))
        corner = np.round(place * (shape - side))
        views.append(view_of((corner + side / 2) / shape, side / shape))
    return views


def draw_place(valid, side, rng):
    """A relative place anywhere, or so that the window holds a random pixel that is scored."""
    scored = np.zeros((0, 2)) if valid is None else np.argwhere(valid == 1)
    if not len(scored):
        return rng.random(2)
    shape = np.array(fitted(valid.shape, side))
    chosen = scored[rng.integers(len(scored))] * shape / valid.shape
    middle = chosen + rng.uniform(-0.4, 0.4, 2) * side
    return np.clip((middle - side / 2) / np.maximum(shape - side, 1), 0, 1)


# -------------------------------------------------------------------------------------------------
# Inference

def starts(length, side):
    """Where windows begin along a length: they overlap by a half, the last one ends inside."""
    return [*range(0, length - side, side // 2), length - side]


def answer_in_windows(paint, pairs, image, side, batch=16):
    """The answer (H, W) to an image (H, W) in [0, 1], window by window, blended.

    paint   (prompt images (B, n, 1, s, s), prompt labels, images (B, 1, s, s)) -> (B, 1, s, s)
    pairs   prompts [(image, label)], (H, W) arrays of any sizes, in [0, 1]
    """
    image_size, full = image.shape, fit(image, side)
    images_of, labels_of = zip(*([fit(t, side) for t in pair] for pair in pairs))
    corners = [(y, x) for y in starts(full.shape[0], side) for x in starts(full.shape[1], side)]
    fade = torch.hann_window(side + 2)[1:-1]
    fade = fade[:, None] * fade
    total, weight = torch.zeros(full.shape), torch.zeros(full.shape)
    for part in (corners[i:i + batch] for i in range(0, len(corners), batch)):
        places = [[at / max(n - side, 1) for at, n in zip(corner, full.shape)] for corner in part]

        def cut(pictures):
            windows = [[window(p, place, side) for p in pictures] for place in places]
            return torch.stack([torch.stack(row) for row in windows])[:, :, None]  # (B, n, 1, s, s)

        images, labels, shown = cut(images_of), cut(labels_of), cut([full])[:, 0]
        for (y, x), answer in zip(part, paint(images, labels, shown)[:, 0]):
            here = slice(y, y + side), slice(x, x + side)
            total[here] += answer * fade
            weight[here] += fade
    return resize_images((total / weight)[None, None], image_size)[0, 0].clamp(0, 1)
