"""Prompt a model with an image and its answer, and get the answer of a new image, on the new image's grid.

    python infer.py --prompt a.nii --input b.nii
    python infer.py --prompt a.nii c.nii --input scans/ --output answers/ --overlay --report      several prompts, a folder of scans

finds the label of `a.nii` beside it (a_label, a_seg, a_gt, a-mask, labelsTr/a ...) or takes --prompt_label, a checkpoint
(checkpoints/*.pt here, else the newest runs/*/last.pt, or --checkpoint), and writes `b_mvg.nii` (or --output): the input's
shape, affine and header, with the prompt's label values, or in the units of the prompt's label image. Volumes (NIfTI,
MetaImage, NRRD, a folder with a DICOM series, answered as NIfTI) and single pictures (PNG, JPEG, TIFF, written as PNG);
segmentation and image-to-image.

Slice n of the input is shown slice floor(n * N_prompt / N_input) of the prompt (paper, section 3.3). From Python:

    label = infer.predict("runs/mvg/last.pt", [(image, label)], new_image)     # (H, W) or (K, H, W) arrays, images in [0, 1]

Research software, not a medical device.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import boxes
import data
import mvg
import readers
from readers import DataError, shape_text

MAX_CLASSES = 64  # a label of integers with more distinct values is an image
BATCH = 16        # slices painted at once
VIEWS = 2         # of a question, as it is and mirrored, that are averaged where training knew such views
SEEN, FAINT = 0.65, 0.2   # a class painted by itself is seen from the share SEEN of a slice's brightest pixel on, and never below the gray FAINT
SURE, PARTS = 0.8, 3      # a box is drawn around what is seen from the share SURE on, and so many candidates are looked at again
NEAR, SECOND = 1.5, 0.67  # a second look's window is so many times as large as what was seen, and its answer counts so much
MAX_FITS = 2 ** 26  # values of per-class fits held at once, 256 MiB
LABEL_NAMES = [sign + word for word in ("label", "labels", "seg", "segmentation", "gt", "mask", "target") for sign in "_-"]


# ---------------------------------------------------------------------------------------------------------------------
# The answer, at model resolution; that of a model that copies has an image's own

def paint(model, prompt_images, prompt_labels, images, mode, fine=None):
    """Paint the labels of images (B, 1, s, s) from n prompts (n, 1, s, s), gray; a list of answers to be averaged.

    mode ar: one answer from all prompts, or one a prompt where the model never saw so many; canvas: one a prompt.
    fine: of a model that copies, the n prompts [(image, label)], (1, 1, H_p, W_p) each, and the images (B, 1, H, W) at their own resolution; the answers then have it.
    """
    images_device = next(model.parameters()).device
    together = mode == "ar" and len(prompt_images) <= model.config.max_prompts
    groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(prompt_images))]
    answers = []
    for group in groups:
        px, py = prompt_images[group].to(images_device), prompt_labels[group].to(images_device)
        cache = model.encode_prompts(px[None], py[None]) if mode == "ar" else None
        copied = itertools.repeat(())
        answer = lambda x, *c: model.predict(cache, x, *c) if mode == "ar" else model.predict_canvas(px, py, x, *c)
        if fine:
            fitted = mvg.PromptFilter.fit(sum(mvg.PromptFilter.sums(x, y) for x, y in fine[0][group]))
            filtered = lambda x: [c.to(images_device) for c in mvg.PromptFilter.apply(fitted, x)]
            copied = [(filtered(x),) for x in fine[1].split(BATCH)]
        parts = torch.cat([answer(x, *c) for x, c in zip(images.to(images_device).split(BATCH), copied)])
        if fine:
            tried = [(answer(x[None], c), c[0], full.to(images_device), y.to(images_device)) for x, (full, y) in zip(px, fine[0][group]) for c in [filtered(full)]]
            parts = mix(parts, torch.cat([c[0][0] for c in copied]), tried)
        answers.append(parts.cpu())
    return answers


def mix(painted, filtered, tried):
    """Painted and filtered answers (B, 1, H, W), mixed as would have been best for the prompts themselves.

    tried: [(painted, filtered, image, label)] of the prompts. The filter's share is by least squares, apart for where the two differ little and much: grain
    is best filtered, a hole or a box painted. Pixels that a prompt leaves as they are say nothing of that.
    """
    steps = torch.tensor([0.03, 0.1, 0.2], device=painted.device)
    sums = torch.zeros(2, len(steps) + 1, device=painted.device)
    for paint, filt, image, label in tried:
        apart = ((filt - paint) * (image != label)).flatten()
        place = torch.bucketize(apart.abs(), steps)
        sums[0].index_add_(0, place, (label - paint).flatten() * apart)
        sums[1].index_add_(0, place, apart ** 2)
    share = (sums[0] / sums[1].clamp(min=1e-6)).clamp(0, 1)
    apart = filtered - painted
    return painted + share[torch.bucketize(apart.abs(), steps)] * apart


def paint_each(model, prompt_images, prompt_labels, images, mode):
    """V questions, each with prompts of its own (V, n, 1, s, s) and images (V, B, 1, s, s) -> (V, B, 1, s, s), the mean over
    what `paint` answers. Where few images share a prompt, questions are painted side by side."""
    V, B = images.shape[:2]
    if B > 4:
        return torch.stack([sum(a) / len(a) for a in (paint(model, *question, mode) for question in zip(prompt_images, prompt_labels, images))])
    device, n = next(model.parameters()).device, prompt_images.shape[1]
    together = mode == "ar" and n <= model.config.max_prompts
    answers = []
    for px, py, x in zip(*(t.to(device).split(BATCH) for t in (prompt_images.repeat_interleave(B, 0), prompt_labels.repeat_interleave(B, 0), images.flatten(0, 1)))):
        parts = [(px, py)] if together else list(zip(px.split(1, 1), py.split(1, 1)))
        gray = [model.predict(model.encode_prompts(a, b), x) if mode == "ar" else model.predict_canvas(a[:, 0], b[:, 0], x) for a, b in parts]
        answers.append((sum(gray) / len(gray)).cpu())
    return torch.cat(answers).unflatten(0, (V, B))


def choose_mode(model, segmentation, mode="auto"):
    """ar | canvas. auto: what the task was trained with; under the hybrid, ar for segmentation and canvas for images."""
    if mode not in ("auto", "ar", "canvas"):
        raise ValueError(f"mode is {mode!r}: choose auto, ar or canvas")
    if mode != "auto":
        return mode
    objective = model.meta.get("objective", "hybrid")
    return {"ar": "ar", "mim": "canvas"}.get(objective, "ar" if segmentation else "canvas")


def segment_each(model, prompt_images, prompt_labels, images, classes, mode, votes=None):
    """What a model trained on binary colorings paints for each class by itself: arguments of `segment` -> grays (B, C, s, s), 0 to 1."""
    masks = torch.stack([(prompt_labels == c).float() for c in classes])
    gray = paint_views(model, prompt_images.expand(masks.shape), masks, images.expand(len(classes), *images.shape), mode, votes)
    return gray[:, :, 0].transpose(0, 1)


def paint_views(model, prompt_images, prompt_labels, images, mode, votes=None):
    """`paint_each`, same shapes, the mean over so many views, mirrored and turned by quarters (default: as `segment`), in [0, 1]."""
    votes = votes or (VIEWS if model.meta.get("augment") else 1)
    turn = lambda x, view: torch.rot90(x.flip(-1) if view % 2 else x, view // 2 % 4, (-2, -1))
    back = lambda x, view: torch.rot90(x, -(view // 2) % 4, (-2, -1)).flip(-1 if view % 2 else ())
    views = [torch.cat([turn(t, v) for v in range(votes)]) for t in (prompt_images, prompt_labels, images)]
    gray = paint_each(model, *views, mode).unflatten(0, (votes, -1)).clamp(0, 1)
    return sum(back(g, v) for v, g in enumerate(gray)) / votes


def begins(gray):
    """The gray from which a class painted by itself is seen: (B, C, H, W) -> (B, C, 1, 1)."""
    return (SEEN * gray.flatten(2).amax(2)[..., None, None]).clamp(min=FAINT)


def fits(gray):
    """Grays of classes painted one by one (B, C, H, W) -> how well every pixel fits each class (B, C + 1, H, W), summing to 1, background first."""
    fit = torch.cat([torch.ones_like(gray[:, :1]), gray / begins(gray)], 1)
    return fit / fit.sum(1, keepdim=True)


def look_again(model, pairs, images, gray, classes, mode, votes=None, parts=1):
    """A second look from near, of each class by itself where the first one has seen it, as in training with --close_up; `gray` is changed in place.

    pairs: prompts [(image, label)] and images [(H, W)], arrays at their own resolution; gray (B, C, H, W): what a first look at the images painted.
    A window is NEAR times as large as the class, on the prompts or the image, whichever is largest, and at least a quarter of the picture; from 0.85 of it on, once
    is enough. Outside the window the class is not, and a hundredth of what was seen at either end does not move it. parts: above 1, so many of the largest connected
    parts that were seen are looked at one by one.
    """
    side, places = model.config.image_size, []
    seen = (gray > begins(gray)).numpy()
    for c, value in enumerate(classes):
        found = [data.extent(y == value) for _, y in pairs]
        somewhere = next((f for f in found if f), None)  # a prompt without the class is seen where another has it
        for b in range(len(images)):
            if parts > 1:
                looks = [data.extent(boxes.fill([box], seen.shape[2:])) for box in boxes.around(seen[b, c])[:parts]]
            else:
                looks = [data.extent(seen[b, c], 0.01)]
            for place in (p for p in looks if p and somewhere):
                size = max(0.25, NEAR * max(place[1], *(f[1] for f in found if f)))
                if size <= 0.85:
                    places.append((b, c, data.window(place[0], size, images[b].shape), [data.window((f or somewhere)[0], size, x.shape) for f, (x, _) in zip(found, pairs)]))
    first = gray.clone()
    for b, c, *_ in places:
        gray[b, c] = 0
    for start in range(0, len(places), BATCH):
        part = places[start:start + BATCH]
        questions = [(look([x[w] for (x, _), w in zip(pairs, around)], side, data.resize_images),
                      look([y[w] == classes[c] for (_, y), w in zip(pairs, around)], side, data.resize_labels).float(),
                      look([images[b][here]], side, data.resize_images)) for b, c, here, around in part]
        near = paint_views(model, *(torch.stack(t) for t in zip(*questions)), mode, votes)
        for (b, c, here, _), answer in zip(part, near):
            before = first[b, c][here]
            gray[b, c][here] = torch.maximum(gray[b, c][here], torch.lerp(before, data.resize_images(answer[0, 0], before.shape), SECOND))


def segment(model, prompt_images, prompt_labels, images, classes, mode="auto", votes=None, seed=0, dataset=None):
    """How well every pixel fits each class: images (B, 1, s, s) -> (B, C + 1, s, s), summing to 1, background first.

    prompt_labels (n, 1, s, s) integers; classes: the C values that are asked for, all above 0.
    votes: answers under so many random colorings are averaged, or, of a model trained on binary ones, of so many views (mirrored,
    turned); None: VIEWS of those that training with --augment knew, else 1. dataset: whose colors a model trained on predefined ones uses.
    """
    mode, coloring = choose_mode(model, True, mode), model.meta.get("coloring", "random")
    if coloring == "binary":
        return fits(segment_each(model, prompt_images, prompt_labels, images, classes, mode, votes))
    votes = votes or 1
    rng, fit = np.random.default_rng(seed), 0
    for vote in range(votes):
        colors = data.spread_colors(len(classes))
        if coloring == "predefined":
            offsets, total = model.meta["predefined"]
            if dataset in offsets:
                colors = (offsets[dataset] + np.asarray(classes)) / total
        elif vote:
            colors = rng.permutation(colors) if len(classes) > 1 else colors * (1 - 0.6 * vote / votes)
        painted = sum((prompt_labels == c).float() * v for c, v in zip(classes, colors.tolist()))
        for answer in paint(model, prompt_images, painted, images, mode):
            fit = fit + data.decode(answer[:, 0], colors)
    return fit / fit.sum(1, keepdim=True)


class Scaled:
    """A stack (K, H, W) whose slices become floats in [0, 1] when they are taken out, so that a large volume stays as small as its file."""

    def __init__(self, stack, low_high):
        self.stack, self.low_high, self.shape = stack, low_high, stack.shape

    def __len__(self):
        return len(self.stack)

    def __getitem__(self, k):
        return data.to_unit(np.ascontiguousarray(self.stack[k]), self.low_high)


def windows(side, tile):
    """Where a slice is looked at: [(rows, columns)] of a square of `side` pixels, or, to tile, nine overlapping quarters of one twice as large."""
    starts = (0, side // 2, side) if tile else (0,)
    return [(slice(y, y + side), slice(x, x + side)) for y in starts for x in starts]


def look(pictures, size, resize):
    """Slices (H, W) of any sizes -> (B, 1, size, size), brought there by data.resize_images or data.resize_labels."""
    return torch.cat([resize(torch.from_numpy(np.ascontiguousarray(p))[None, None], (size, size)) for p in pictures])


def box_masks(prompts):
    """Prompts whose labels are the images, some with white boxes drawn on them, [(images, labels)] -> the same with masks of the boxes; None where one is anything else."""
    masks = []
    for images, labels in prompts:
        found = []
        for x, y in zip(images, labels):
            found.append(boxes.drawn(y, x) if x.shape == y.shape else [])
            if not found[-1] and (x.shape != y.shape or np.abs(x - y).max() > 0.05):
                return None
        masks.append((images, np.stack([boxes.fill(f, images.shape[1:]) for f in found])))
    return masks if any(m.any() for _, m in masks) else None


def predict_boxes(model, masks, stack, *how, close_up=None, found=None):
    """Detection by a model that was trained with --boxes filled: a stack (K, H, W) with boxes drawn on it, around what is surely of the class that the boxes of
    the prompts hold. masks: what `box_masks` gives; how: `mode` to `propagate` of `predict_stack`, in its order; found: a list to fill with every slice's boxes."""
    confidence = np.zeros(stack.shape, np.float32)
    answer = predict_stack(model, masks, stack, True, *how, confidence, close_up, parts=PARTS)
    around = [boxes.around(mask) for mask in (answer > 0) & (confidence >= SURE / (SURE + SEEN))]
    if found is not None:
        found[:] = around
    return np.stack([boxes.draw(stack[k], b) for k, b in enumerate(around)])


def predict_stack(model, prompts, stack, segmentation, mode="auto", votes=None, seed=0, dataset=None, slices=None, progress=None,
                  neighbours=0, tile=False, propagate=False, confidence=None, close_up=None, found=None, parts=1):
    """Answer every slice of a stack (K, H, W) float in [0, 1] -> (K, H, W): integers with the prompt's values, or floats.

    prompts: list of (images, labels), each (K_p, H_p, W_p), label integers or floats in [0, 1]
    slices: which slice of every prompt serves slice k, a list of K tuples; default floor(k * K_p / K), the paper's rule
    neighbours: so many slices before and after that one serve, too; tile: look at nine overlapping quarters at twice the resolution;
    propagate: the slice before with its answer counts as one more prompt (segmentation, slice by slice)
    close_up: look a second time, from near, where a class was seen (segmentation by a model of binary colorings, not with tile; default: if it was trained so)
    confidence: a (K, H, W) float array to fill with the winning class's share of the votes, 1 / (classes + 1) to 1 (segmentation)
    parts: as for `look_again`; found: a list to fill with the boxes of every slice, where they were asked for as masks (a model trained with --boxes filled, images with white boxes drawn on them as labels)
    """
    if not segmentation and model.meta.get("boxes") == "filled" and (masks := box_masks(prompts)):
        return predict_boxes(model, masks, stack, mode, votes, seed, dataset, slices, progress, neighbours, tile, propagate, close_up=close_up, found=found)
    side, scale = model.config.image_size, 2 if tile else 1
    mode, near = choose_mode(model, segmentation, mode), segmentation and not tile and model.meta.get("coloring") == "binary"
    if close_up and segmentation and not near:
        raise ValueError("close_up is of a model trained with --coloring binary, and not with tile: leave it out")
    near = near and (model.meta.get("close_up") if close_up is None else close_up)
    K, H, W = stack.shape
    slices = slices or [tuple(data.matching_slice(k, K, len(p[0])) for p in prompts) for k in range(K)]
    groups = {}
    for k, shown in enumerate(slices):
        groups.setdefault(shown, []).append(k)
    output = np.zeros(stack.shape, prompts[0][1].dtype if segmentation else np.float32)
    weight = torch.hann_window(side + 2)[1:-1] if tile else torch.ones(side)
    weight = weight[:, None] * weight
    for shown, members in groups.items():  # slices that share their prompt slices share one prompt cache
        pairs = [(p[0][k], p[1][k]) for p, s in zip(prompts, shown) for k in sorted({min(max(s + d, 0), len(p[0]) - 1) for d in range(-neighbours, neighbours + 1)})]
        classes = sorted({int(v) for _, y in pairs for v in np.unique(y)} - {0}) if segmentation else []
        if segmentation and not classes:
            if confidence is not None:
                confidence[members] = 1
            if progress is not None:
                progress.update(len(members))
            continue
        values = torch.tensor([0, *classes])  # resized by their numbers: floats hold no large values
        number = lambda y: np.searchsorted([0, *classes], y)
        own = lambda p: torch.from_numpy(np.array(p, np.float32))[None, None]
        fine = [(own(x), own(y)) for x, y in pairs] if model.config.copies and not segmentation and not tile else None

        def prepare(pairs):
            """Prompts at the model's resolution, and as they are."""
            return (look([x for x, _ in pairs], scale * side, data.resize_images), values[look([number(y) for _, y in pairs], scale * side, data.resize_labels)] if segmentation
                    else look([y for _, y in pairs], scale * side, data.resize_images), pairs)

        def answer(images, labels, pairs, part):
            """Prompts and the numbers of slices -> fits (B, C + 1, H, W), or answers (B, 1, H, W)."""
            x = look(stack[part], scale * side, data.resize_images)
            if fine:
                a = paint(model, images, labels, x, mode, (fine, torch.cat([own(stack[k]) for k in part])))
                return sum(a) / len(a)
            if near:
                gray = data.resize_images(segment_each(model, images, labels, x, classes, mode, votes), (H, W))
                look_again(model, pairs, stack[part], gray, classes, mode, votes, parts)
                return fits(gray)
            total, weights = 0, torch.zeros(x.shape[-2:])
            for rows, columns in windows(side, tile):
                cut = [t[..., rows, columns] for t in (images, labels, x)]
                quarter = segment(model, *cut, classes, mode, votes, seed, dataset) if segmentation else sum(a := paint(model, *cut, mode)) / len(a)
                whole = torch.zeros(*quarter.shape[:2], *x.shape[-2:])
                whole[..., rows, columns] = quarter * weight
                total, weights[rows, columns] = total + whole, weights[rows, columns] + weight
            return data.resize_images(total / weights, (H, W))

        prompted = prepare(pairs)
        batch = 1 if propagate else max(1, min(BATCH, MAX_FITS // (H * W * (len(classes) + 1))))
        for part in (members[i:i + batch] for i in range(0, len(members), batch)):
            result = answer(*prompted, part)
            if propagate and part[0] and np.isin(output[part[0] - 1], classes).any():
                before = np.where(np.isin(output[part[0] - 1], classes), output[part[0] - 1], 0)
                last = answer(*prepare([(stack[part[0] - 1], before)]), part)
                result = (len(pairs) * result + last) / (len(pairs) + 1)
            if segmentation:
                fit, best = result.max(1)
                output[part] = np.array([0, *classes], output.dtype)[best.numpy()]
                if confidence is not None:
                    confidence[part] = fit.numpy()
            else:
                output[part] = result[:, 0].clamp(0, 1).numpy()
            if progress is not None:
                progress.update(len(part))
    return output


def predict(model_or_path, prompts, image, mode="auto", votes=None, seed=0, device=None, dataset=None, **how):
    """Answer one image, or a stack of slices.

    model_or_path   an MVG, or a checkpoint's path
    prompts         list of (image, label), (H, W) or (K, H, W) arrays; images in [0, 1]. Integer (or bool) labels mean segmentation:
                    the answer holds their values. Float labels in [0, 1] mean an image. Sizes may differ.
    image           (H, W) or (K, H, W) in [0, 1]
    mode            auto | ar | canvas; votes: colorings averaged; device: for a path, see mvg.pick_device; dataset: whose
                    colors to use, for a model trained on predefined ones
    how             neighbours, tile, propagate, close_up, confidence and found of `predict_stack`
    Returns an array of the image's shape: the labels' integer type, or float32 in [0, 1]. Raises ValueError for arrays of another form.
    """
    if not prompts:
        raise ValueError("no prompts: pass a list with at least one (image, label)")
    image = _checked(image, "image")
    pairs = [(_checked(x, f"image of prompt {i}"), np.asarray(y)) for i, (x, y) in enumerate(prompts)]
    for i, (x, y) in enumerate(pairs):
        if x.ndim != image.ndim:
            raise ValueError(f"image is {shape_text(image.shape)} and image of prompt {i} {shape_text(x.shape)}: pass slices (H, W), or stacks (K, H, W), throughout")
        if x.shape != y.shape:
            raise ValueError(f"label of prompt {i} is {shape_text(y.shape)} but its image is {shape_text(x.shape)}: they must be equal")
    kinds = {y.dtype.kind in "iub" for _, y in pairs}
    if len(kinds) > 1:
        raise ValueError("some prompt labels are integers and some floats: integers mean segmentation, floats an image")
    segmentation = kinds.pop()
    if segmentation:
        pairs = [(x, y.astype(np.uint8) if y.dtype == bool else y) for x, y in pairs]
        if min(int(y.min()) for _, y in pairs) < 0:
            raise ValueError(f"a prompt label holds {min(int(y.min()) for _, y in pairs)}: classes start at 0, the background")
        kind = np.result_type(*(y.dtype for _, y in pairs))
        kind = kind if kind.kind in "iu" else np.dtype(np.int64)  # numpy makes floats of uint64 beside int
        pairs = [(x, y.astype(np.int64)) for x, y in pairs]
    else:
        pairs = [(x, _checked(y, f"label of prompt {i}")) for i, (x, y) in enumerate(pairs)]
    if votes is not None and votes < 1:
        raise ValueError(f"votes is {votes}: it must be at least 1")
    model = model_or_path
    if not isinstance(model, mvg.MVG):
        device = mvg.pick_device(device)[0]
        model = mvg.load(model_or_path, device)
    training = model.training
    model.eval()
    three = lambda a: a if a.ndim == 3 else a[None]
    answer = predict_stack(model, [(three(x), three(y)) for x, y in pairs], three(image), segmentation, mode, votes, seed, dataset, **how).reshape(image.shape)
    model.train(training)
    return answer.astype(kind) if segmentation else answer


def _checked(array, what):
    """A (H, W) or (K, H, W) array in [0, 1] as float32."""
    array = np.asarray(array)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{what} is {shape_text(array.shape) or 'a number'}: pass one (H, W) slice or a (K, H, W) stack of them")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has {int((~np.isfinite(array)).sum())} values that are NaN or infinite: replace them")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{what} reaches from {array.min():.4g} to {array.max():.4g}: scale it to [0, 1] (data.to_unit)")
    return array.clip(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def find_label(image):
    """The label file that belongs to an image file, by the usual names. Raises DataError where there is none."""
    image = Path(image)
    name, folder = readers.stem(image), image.parent
    base = name[:-5] if name.endswith("_0000") else name
    places = [(folder, b + n) for b in dict.fromkeys((name, base)) for n in LABEL_NAMES]
    twins = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesVa": "labelsVa", "imagesVal": "labelsVal", "images": "labels",
             "image": "label", "img": "label"}
    if folder.name in twins:
        places += [(folder.parent / twins[folder.name], b) for b in dict.fromkeys((base, name))]
    if folder.name == "images":
        places += [(folder.parent / "masks", name)]
    if name == "lgemri":
        places.append((folder, "laendo"))
    for place, label in places:
        for kind in (readers.extension(image), *readers.EXTENSIONS):
            if (place / (label + kind)).is_file():
                return place / (label + kind)
    raise DataError(f"{image}: no label beside it (looked for {name}_label, {name}_seg, {name}_gt, ...): pass --prompt_label")


def find_checkpoint():
    """The bundled checkpoint, else the newest run's. Raises DataError where there is none."""
    bundled = sorted((Path(__file__).parent / "checkpoints").glob("*.pt"))
    runs = sorted({p for place in (Path("runs"), Path(__file__).parent / "runs") for p in place.glob("*/last.pt")}, key=lambda p: p.stat().st_mtime)
    if not bundled and not runs:
        raise DataError("no checkpoint in checkpoints/ or runs/*/last.pt: train one (make demo), or pass --checkpoint")
    return bundled[0] if bundled else runs[-1]


def is_segmentation(label, task):
    """Does a label volume hold classes? auto: integers with at most 64 distinct values do."""
    if task != "auto":
        return task == "seg"
    array = label.array
    if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() > 1e-3:
        return False
    return len(np.unique(array)) <= MAX_CLASSES


def write_like(path, array, like):
    """Write (X, Y, Z) as the kind of file `path` says, on the grid and with the header of `like`: whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{readers.stem(path)}.", suffix=readers.extension(path))
    os.close(handle)
    try:
        if like.kind == "nifti":
            import nibabel
            header = like.header.copy()
            header.set_data_dtype(array.dtype)
            header["cal_min"] = header["cal_max"] = 0
            kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
            nibabel.save(kind(array.reshape(like.shape or array.shape), None, header), temporary)
        elif like.kind == "itk":
            import SimpleITK as sitk
            image = sitk.GetImageFromArray(np.ascontiguousarray(array[..., 0].T if like.header.GetDimension() == 2 else array.T))
            image.CopyInformation(like.header)
            sitk.WriteImage(image, temporary, useCompression=True)
        else:
            from PIL import Image
            Image.fromarray(np.ascontiguousarray(array[:, :, 0].T)).save(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp is private, an answer is not
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def output_path(given, source, inputs, several=False):
    """Where the answer goes: --output, a file or a folder, or beside the input: <input>_mvg of the input's kind (pictures: PNG, MetaImage: .mha).

    Raises DataError for a place that cannot be written, another kind of file, and any of `inputs`.
    """
    kind = readers.extension(source.path)
    kind = ".png" if source.kind == "picture" else ".mha" if kind in (".mhd", ".mha") else ".nrrd" if kind in (".nrrd", ".nhdr") else kind or ".nii.gz"
    folder = Path(given) if given and (several or Path(given).is_dir()) else None
    path = Path(given) if given and not folder else (folder or source.path.parent) / (readers.stem(source.path) + "_mvg" + kind)
    allowed = {"nifti": readers.NIFTI, "itk": (".mha", ".nrrd"), "picture": (".png", ".tif", ".tiff")}[source.kind]
    if readers.extension(path) not in allowed:
        raise DataError(f"--output {path} cannot hold the answer to {source.path.name}: end it in {' or '.join(allowed)}")
    if not path.parent.is_dir():
        raise DataError(f"--output {path}: there is no folder {path.parent}: make it first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise DataError(f"--output {path} cannot be written there: name a file in a folder of yours")
    if path.exists() and path.resolve() in [p.resolve() for p in inputs]:
        raise DataError(f"--output {path} is one of the inputs: name another file")
    return path


def find_inputs(given):
    """Files and folders -> the files to answer. A folder is a DICOM series, or stands for every image in it that is no label and no answer.

    Raises DataError for a folder without either.
    """
    found = []
    for path in map(Path, given):
        if not path.is_dir() or readers.is_dicom(path):
            found.append(path)
            continue
        files = [f for f in sorted(path.iterdir()) if readers.extension(f) and not f.name.startswith(".")]
        names = [readers.stem(f) for f in files]
        labels = {n for n in names if any(n.endswith(sign) and n[:-len(sign)] in names for sign in LABEL_NAMES)}
        images = [f for f, n in zip(files, names) if n not in labels and not n.endswith(("_mvg", "_mvg_confidence", "_mvg_overlay"))]
        if not images:
            raise DataError(f"{path} holds no image ({' '.join(readers.EXTENSIONS)}) and no DICOM series: name another folder")
        found += images
    return found


def answer_type(label, segmentation, output):
    """The numbers of the answer's file: the smallest integers that hold the classes; floats for images, where a file can hold
    them. Raises DataError where it cannot."""
    if segmentation:
        kind = np.dtype(np.uint8 if label.array.max() <= 255 else np.uint16 if label.array.max() < 2 ** 16 else np.int64)
        if label.kind != "picture" and kind != np.uint8:
            kind = np.dtype(np.int32 if label.array.max() < 2 ** 31 else np.int64)
        if kind.itemsize > 2 and readers.extension(output) in readers.PICTURE:
            raise DataError(f"{label.path} holds the label {label.array.max()}, too large for a picture: renumber its classes below 65536")
        return kind
    if label.kind == "picture" and label.array.dtype.kind in "iu":
        return np.dtype(np.uint8 if label.eight_bit else np.uint16)
    if readers.extension(output) == ".png":
        raise DataError(f"--output {output} cannot hold the numbers of {label.path}, which are no integers of a picture: end it in .tif")
    return np.dtype(np.float32)


def read_prompt(image, label, args):
    """An example: (image Volume, label Volume, is it a segmentation?), checked against each other."""
    volume = readers.read_image(image, args.series)
    label = readers.read_volume(label or find_label(image), mask=args.task != "image")
    readers.check_fit(label, volume)
    segmentation = is_segmentation(label, args.task)
    if segmentation and readers.extension(label.path) in (".jpg", ".jpeg"):
        raise DataError(f"{label.path} is a JPEG, which blurs classes into each other: save the mask as PNG")
    if segmentation:
        label.array = readers.integer_labels(label.array, label.path)
    elif label.kind == "picture":  # its grays, not the indices of a palette
        label = readers.read_volume(label.path)
    return volume, label, segmentation


def as_stack(volume, modality, axis):
    """How a volume is cut, and its slices in [0, 1]."""
    cut = data.slicing(volume, None if axis == "auto" else AXES.index(axis))
    return cut, Scaled(cut.cut(volume.array), data.intensity_range(volume, modality))


def draw_overlay(path, stack, answer, segmentation, columns=5):
    """A montage of up to 25 slices: classes laid over the image, or the image beside its answer."""
    plt = data.pyplot()
    shown = np.flatnonzero([a.any() for a in answer]) if segmentation else np.arange(len(stack))
    shown = shown if len(shown) else np.arange(len(stack))
    shown = shown[np.unique(np.linspace(0, len(shown) - 1, min(25, len(shown))).round().astype(int))]
    rows, classes = -(-len(shown) // columns), np.unique(answer)[1:] if segmentation else ()
    figure, axes = plt.subplots(rows, min(columns, len(shown)), figsize=(2.2 * min(columns, len(shown)), 2.3 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, k in zip(axes.flat, shown):
        axis.set_title(f"slice {k}", fontsize=7)
        axis.imshow(stack[k] if segmentation else np.concatenate([stack[k], data.to_unit(answer[k], (answer.min(), max(answer.max(), answer.min() + 1e-6)))], 1),
                    cmap="gray", vmin=0, vmax=1)
        if segmentation:
            number = np.searchsorted(classes, answer[k])
            axis.imshow(np.ma.masked_where(answer[k] == 0, number), cmap="tab10" if len(classes) <= 10 else "tab20", alpha=0.5, vmin=0,
                        vmax=9 if len(classes) <= 10 else 19, interpolation="nearest")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


AXES = ("sagittal", "coronal", "axial")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--prompt", required=True, nargs="+", metavar="FILE", help="image of the example, or of several")
    add("--prompt_label", nargs="+", metavar="FILE", help="its answer, one for each (default: found beside it)")
    add("--input", required=True, nargs="+", metavar="FILE", help="images to answer: files, folders of files, folders with a DICOM series")
    add("--output", help="file to write, or a folder for several (default: <input>_mvg of the same kind, beside the input)")
    add("--series", help="which series of a DICOM folder: its number or UID (default: the only one)")
    add("--checkpoint", help="what train.py wrote (default: checkpoints/*.pt, else the newest runs/*/last.pt)")
    add("--task", default="auto", choices=("auto", "seg", "image"), help=f"auto: a label of integers, at most {MAX_CLASSES} distinct ones, is a segmentation")
    add("--modality", default="auto", choices=("auto", "ct", "mri", "xray", "ultrasound"), help="auto: ct where values reach -200, 8-bit pictures as they are, else mri")
    add("--axis", default="auto", choices=("auto", *AXES), help="how volumes are sliced (auto: across the coarsest axis, as in training)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"), help="auto: as trained; canvas paints the lower right of the square")
    add("--votes", type=int, help="colorings (binary: views) whose answers are averaged (default: 2 where training knew such views, else 1)")
    add("--neighbours", type=int, default=0, help="prompt slices before and after the matching one that are shown as well")
    add("--tile", action="store_true", help="look at nine overlapping quarters at twice the model's resolution, and answer at that")
    add("--propagate", action="store_true", help="show each slice the answer of the one before (segmentation)")
    add("--close_up", action=argparse.BooleanOptionalAction, help="look a second time, from near, where a class was seen (default: where training knew that)")
    add("--overlay", action="store_true", help="also draw <output>_overlay.png")
    add("--confidence", action="store_true", help="also write <output>_confidence, the winning class's share of the votes (segmentation)")
    add("--report", action="store_true", help="also write <output>.json: what was used and assumed, volumes in ml, versions, seconds")
    add("--seed", type=int, default=0, help="of the votes")
    add("--dataset", metavar="NAME", help="whose colors to use, for a model trained with --coloring predefined")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    args = p.parse_args(argv)
    if (args.votes is not None and args.votes < 1) or args.seed < 0 or args.neighbours < 0:
        raise DataError(f"--votes is {args.votes}, --seed {args.seed} and --neighbours {args.neighbours}: votes are at least 1, the others not below 0")
    if args.prompt_label and len(args.prompt_label) != len(args.prompt):
        raise DataError(f"{len(args.prompt)} prompts and {len(args.prompt_label)} labels: pass one --prompt_label for each --prompt, in the same order")

    # ---- the examples
    prompts = [read_prompt(image, label, args) for image, label in zip(args.prompt, args.prompt_label or [None] * len(args.prompt))]
    segmentation = prompts[0][2]
    if len({kind for _, _, kind in prompts}) > 1:
        raise DataError("some prompts are segmentations and some images: prompt one task at a time, or say which with --task")
    if not segmentation and (args.confidence or args.propagate or args.close_up):
        raise DataError("--confidence, --propagate and --close_up are of segmentations, these prompts are images: leave them out")
    inputs = find_inputs(args.input)
    several = len(inputs) > 1
    if several and args.output and not Path(args.output).is_dir():
        raise DataError(f"--output {args.output} is no folder, and there are {len(inputs)} inputs: make it first")
    checkpoint = args.checkpoint or find_checkpoint()
    device, reason = mvg.pick_device(args.device)
    model = mvg.load(checkpoint, device)
    print(f"checkpoint {checkpoint}; device {device} ({reason})")

    # ---- each input
    failed = []
    for path in inputs:
        try:
            answer_file(path, prompts, model, checkpoint, args, several)
        except DataError as error:
            if not several:
                raise
            failed.append(path)
            print(f"error: {error}", file=sys.stderr)
    if failed:
        raise DataError(f"{len(failed)} of {len(inputs)} inputs have no answer, {failed[0].name} is the first: see above")


def answer_file(path, prompts, model, checkpoint, args, several):
    """Read one input, answer it from the prompts [(image, label, segmentation)], and write what `args` asks for."""
    start, notes, segmentation = time.time(), [], prompts[0][2]

    def say(text):
        notes.append(text)
        print(text)

    source = readers.read_image(path, args.series)
    written = output_path(args.output, source, [*inputs_of(prompts), Path(path)], several)
    label = prompts[0][1]
    kind = answer_type(max((y for _, y, _ in prompts), key=lambda y: y.array.max()) if segmentation else label, segmentation, written)
    modality = lambda volume: data.guess_modality(volume) if args.modality == "auto" else args.modality
    cut, stack = as_stack(source, modality(source), args.axis)
    shown, drawn_on, labels_range = [], [], None if segmentation else data.intensity_range(label, modality(label))
    for image, answer, _ in prompts:
        own, images = as_stack(image, modality(image), args.axis)
        labels = own.cut(answer.array)
        shown.append((images, labels if segmentation else Scaled(labels, labels_range)))
        drawn_on.append((images, labels))
        say(f"label {answer.path}; task {'segmentation' if segmentation else 'image'}; prompt {modality(image)}, {len(images)} {AXES[own.axis]} slices; "
            f"input {modality(source)}, {len(stack)} {AXES[cut.axis]} slices; mode {choose_mode(model, segmentation, args.mode)}")
        if modality(image) != modality(source):
            say(f"warning: the prompt looks like {modality(image)} and the input like {modality(source)}: pass --modality if that is wrong")
        if own.axis != cut.axis:
            say(f"warning: the prompt has {AXES[own.axis]} slices and the input {AXES[cut.axis]} ones: --axis chooses for both")
    masks = None
    if not segmentation and model.meta.get("boxes") == "filled":
        masks = box_masks([(x, Scaled(y, x.low_high)) for x, y in drawn_on])
        if masks:
            say(f"{sum(len(boxes.around(m)) for _, stacked in masks for m in stacked)} boxes are drawn on the prompts: what is in them is asked for as a class, and boxes are drawn around what is found")
            labels_range = stack.low_high
    if not segmentation and not masks and modality(label) == "ct":
        say("note: CT is seen through the window [-100, 200] HU, so the answer stays inside it")
    slices = [tuple(data.matching_slice(k, len(stack), len(p[0])) for p in shown) for k in range(len(stack))]
    if segmentation:
        there = lambda numbers: {int(v) for (_, y), chosen in zip(shown, numbers) for k in chosen for v in np.unique(y[k])} - {0}
        everywhere, matched = there([range(len(y)) for _, y in shown]), there([sorted(set(s)) for s in zip(*slices)])
        if not everywhere:
            raise DataError(f"{label.path} is empty: pass a prompt with at least one class")
        say("classes shown: " + ", ".join(map(str, sorted(matched))))
        if model.meta.get("coloring") == "predefined" and args.dataset not in model.meta["predefined"][0]:
            say(f"warning: the model knows the colors of {', '.join(model.meta['predefined'][0])} only: pass --dataset, one of them")
        if everywhere - matched:
            say("warning: the prompt slices that match the input lack " + ", ".join(map(str, sorted(everywhere - matched))))

    # ---- answer, back on the input's grid
    confidence = np.zeros(stack.shape, np.float32) if args.confidence else None
    with tqdm(total=len(stack), unit="slice", disable=None) as progress:
        how = args.mode, args.votes, args.seed, args.dataset, slices, progress, args.neighbours, args.tile, args.propagate
        answer = predict_boxes(model, masks, stack, *how) if masks else predict_stack(model, shown, stack, segmentation, *how, confidence, args.close_up)
    if not segmentation:
        answer = answer * (labels_range[1] - labels_range[0]) + labels_range[0]
        answer = answer if kind.kind == "f" else np.rint(answer).clip(np.iinfo(kind).min, np.iinfo(kind).max)
    answer = answer.astype(kind, copy=False)
    beside = lambda ending: written.with_name(readers.stem(written) + ending)
    if args.confidence:
        picture = source.kind == "picture"  # as PNG: 255 is certain
        write_like(beside("_confidence" + (".png" if picture else readers.extension(written))),
                   np.ascontiguousarray(cut.restore(np.rint(255 * confidence).astype(np.uint8) if picture else confidence)), source)
    if args.overlay:
        draw_overlay(beside("_overlay.png"), stack, answer, segmentation)
    write_like(written, np.ascontiguousarray(cut.restore(answer)), source)
    if args.report:
        voxel = abs(float(np.linalg.det(source.affine[:3, :3]))) / 1000 if source.kind != "picture" else None  # ml
        counts = dict(zip(*np.unique(answer, return_counts=True))) if segmentation else {}
        data.write_json(beside(".json"), {
            "input": str(path), "output": str(written), "prompts": [{"image": str(x.path), "label": str(y.path)} for x, y, _ in prompts],
            "task": "segmentation" if segmentation else "image", "modality": modality(source), "axis": AXES[cut.axis],
            "prompt_slices": [list(s) for s in slices],
            "classes": {str(int(c)): {"voxels": int(n), **({"ml": round(n * voxel, 4)} if voxel else {})} for c, n in counts.items() if c},
            "said": notes, "options": {k: v for k, v in vars(args).items() if k not in ("prompt", "prompt_label", "input", "output")},
            "checkpoint": str(checkpoint), "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "seconds": round(time.time() - start, 2)})
    print(f"wrote {written} ({shape_text(source.array.shape)})")


def inputs_of(prompts):
    return [volume.path for image, label, _ in prompts for volume in (image, label)]


if __name__ == "__main__":
    data.command_line(main)
