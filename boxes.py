"""Boxes as pictures: the answer of detection is the image with a white box around every finding (paper, section 4.2).

A box is (top, left, bottom, right), from its first row and column to its last. `draw` and `read` go from boxes to such a picture and back. At few pixels a line is
thinner than one; `fill` and `around` go through masks of the boxes' insides instead, which a model paints as it does any class (`train.py --boxes filled`, ours).
"""

import numpy as np
import torch
import torch.nn.functional as F


def draw(image, boxes, width=2):
    """An image (H, W) in [0, 1] with white boxes on it, their lines `width` pixels wide and inside."""
    image = np.array(image, np.float32)
    for top, left, bottom, right in boxes:
        inside = image[top + width:bottom + 1 - width, left + width:right + 1 - width].copy()
        image[top:bottom + 1, left:right + 1] = 1
        if inside.size:
            image[top + width:bottom + 1 - width, left + width:right + 1 - width] = inside
    return image


def fill(boxes, shape):
    """The insides of boxes, lines included: (H, W) uint8, 0 and 1."""
    mask = np.zeros(shape, np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom + 1, left:right + 1] = 1
    return mask


def around(mask, least=0.1, side=256):
    """Boxes around the connected parts of a mask (H, W), largest first, without those that have less than `least` of the largest one's pixels.

    Parts nearer to each other than a `side`-th of the picture may count as one.
    """
    mask = torch.from_numpy(np.ascontiguousarray(mask > 0))
    shape = [min(n, side) for n in mask.shape]
    coarse = F.adaptive_max_pool2d(mask[None, None].float(), shape)
    parts = torch.arange(1, coarse.numel() + 1).view_as(coarse) * coarse
    while not torch.equal(spread := F.max_pool2d(parts, 3, 1, 1) * coarse, parts):
        parts = spread
    rows, columns = (torch.arange(n) * small // n for n, small in zip(mask.shape, shape))
    parts = parts[0, 0][rows[:, None], columns] * mask
    numbers, sizes = parts[mask].unique(return_counts=True)
    found = []
    for i in sizes.argsort(descending=True):
        if sizes[i] >= least * sizes.max():
            rows, columns = torch.where(parts == numbers[i])
            found.append(tuple(int(v) for v in (rows.min(), columns.min(), rows.max(), columns.max())))
    return found


def drawn(answer, image):
    """The boxes of an answer that is the image with white boxes drawn on it, (H, W) both, in [0, 1]; none where it is anything else.

    Four fifths of what became brighter must be along the boxes that were read, and nine tenths of their edges white.
    """
    brighter = answer - image > 0.1
    if not 0 < brighter.mean() < 0.3 or (image - answer > 0.1).mean() > 0.005:
        return []
    found, black = read(answer, image), np.zeros_like(image)
    near = draw(black, [(max(0, t - 1), max(0, l - 1), b + 1, r + 1) for t, l, b, r in found], max(6, len(image) // 64)) > 0
    edges = draw(black, found, 1) > 0
    return found if found and brighter[near].sum() > 0.8 * brighter.sum() and (answer[edges] > 0.8).mean() > 0.9 else []


def read(painted, image, side=64, most=8):
    """The white boxes drawn onto an image, (H, W) both, in [0, 1] -> [(top, left, bottom, right)], plainest first.

    A line is how far a pixel went from the image to white; where the image is white itself, nothing is known. Every rectangle on a grid of at most side x side is
    tried: its fit is the mean line of its faintest edge and that of all four, less that of its inside. The best is moved to the pixel, of its lines nothing is known
    from then on, and so on while the fit is above 0.6 of the first.
    """
    H, W = image.shape
    lines = np.clip((np.asarray(painted, np.float32) - image) / (1.1 - image), 0, 1)
    cells = (min(H, side), min(W, side))
    coarse, known = (F.adaptive_max_pool2d(torch.from_numpy(t)[None, None], cells)[0, 0].numpy() for t in (lines, np.clip((1 - image) / 0.15, 0, 1).astype(np.float32)))
    h, w = coarse.shape
    left, right = (v + 2 * i for i, v in enumerate(np.triu_indices(w - 2)))
    found, first = [], None
    for _ in range(most):
        both = np.stack([coarse * known, known])  # lines, and what is known
        along = np.pad(both.cumsum(2), ((0, 0), (0, 0), (1, 0)))  # sums of a row up to a column
        down = np.pad(both.cumsum(1), ((0, 0), (1, 0), (0, 0)))
        whole = np.pad(along[:, :, 1:].cumsum(1), ((0, 0), (1, 0), (1, 0)))
        mean = lambda sums, length: sums[0] / np.maximum(sums[1], 0.4 * length)  # of an edge of which less is known, the rest counts as no line
        best, at = 0.0, None
        for top in np.arange(h - 2)[:, None, None]:
            bottom = np.arange(top.item() + 2, h)[:, None]
            high, wide = bottom - top + 1, right - left + 1
            rows = [mean(along[:, y, right + 1] - along[:, y, left], wide) for y in (top, bottom)]
            columns = [mean(down[:, bottom + 1, x] - down[:, top, x], high) for x in (left, right)]
            inner = whole[:, bottom, right] - whole[:, bottom, left + 1] - whole[:, top + 1, right] + whole[:, top + 1, left + 1]
            fit = (np.minimum(np.minimum(*rows), np.minimum(*columns)) + (sum(rows) + sum(columns)) / 4) / 2 - mean(inner, (high - 2) * (wide - 2))
            k = int(fit.argmax())
            if fit.flat[k] > best:
                best, (b, c) = fit.flat[k], np.unravel_index(k, fit.shape)
                at = top.item(), left[c].item(), bottom[b].item(), right[c].item()
        if at is None or best < max(0.02, 0.6 * (first or 0)):
            break
        first = first or best
        found.append(sharpen(lines, at, (H / h, W / w)))
        top, l, bottom, r = at
        for y in (top, bottom):
            known[max(0, y - 1):y + 2, max(0, l - 1):r + 2] = 0
        for x in (l, r):
            known[max(0, top - 1):bottom + 2, max(0, x - 1):x + 2] = 0
    return found


def sharpen(lines, box, cell):
    """Move the edges of a box on a grid of cells to the pixel: from the brightest row or column of their cell outwards, as long as it falls and is half as bright."""
    spans = [(int(box[i] * cell[i % 2]), max(int(np.ceil((box[i] + 1) * cell[i % 2])), int(box[i] * cell[i % 2]) + 1)) for i in range(4)]
    (top, _), (left, _), (_, bottom), (_, right) = spans
    profiles, edges = (lines[:, left:right].mean(1), lines[top:bottom].mean(0)), []
    for i, (start, end) in enumerate(spans):
        line, out = profiles[i % 2], 1 if i > 1 else -1
        at = first = start + int(line[start:end].argmax())
        while 0 <= at + out < len(line) and line[first] / 2 <= line[at + out] <= 1.02 * line[at]:
            at += out
        edges.append(at)
    return tuple(edges)
