"""Section 3.3, "Inference": the answer to slices, from prompts that are arrays.

The paper's inference is `predict_stack`: slice n of the input is shown slice
floor(n * N_prompt / N_input) of the prompt. For a segmentation the model sees whole slices at its
own side and paints colors, which are read back as classes. An image task is answered in windows of
that side at the scan's own resolution (windows.py).

    label = predict("last.pt", [(image, label)], new_image)     # (H, W) or (K, H, W), in [0, 1]
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import mvg
from coloring import decode, spread_colors
from data import matching_slice
from running.checkpoints import pick_device
from scans import boxes
from scans.volumes import resize_images, resize_labels, shape_text
from second_look import look_again
from windows import answer_in_windows

MAX_SCORES = 2 ** 26   # values of per-class scores held at once, 256 MiB
CANDIDATES = 3         # parts of a mask of boxes that are looked at again one by one


@dataclass
class Options:
    """How a model is asked."""
    mode: str = "auto"          # ar, canvas; auto: as trained, ar for masks and canvas for images
    votes: int = 1              # answers averaged, each under other colors (not predefined ones)
    each: bool | None = None    # one class at a time; None: where training knew binary colors
    looks: int | None = None    # 2: again from near (second_look.py); None: as that of `each`
    seed: int = 0               # of the votes
    dataset: str | None = None  # whose colors, for a model trained on predefined ones
    classes: tuple | None = None   # those asked for; None: what the prompt slices show
    candidates: int | None = None  # parts of a class that are looked at again one by one
    batch: int = 16                # slices painted at once

    def settled(self, model, segmentation):
        """The same with nothing left open. Raises ValueError for what cannot be."""
        if self.mode not in ("auto", "ar", "canvas"):
            raise ValueError(f"mode is {self.mode!r}: choose auto, ar or canvas")
        if self.votes < 1:
            raise ValueError(f"votes is {self.votes}: it must be at least 1")
        if self.looks not in (None, 1, 2):
            raise ValueError(f"looks is {self.looks}: choose 1 or 2")
        mode, meta = self.mode, model.meta
        if mode == "auto":
            hybrid = "ar" if segmentation else "canvas"
            mode = {"ar": "ar", "mim": "canvas"}.get(meta.get("objective"), hybrid)
        binary = meta.get("coloring") == "binary"
        each = binary if self.each is None else self.each
        return replace(self, mode=mode, each=each, looks=self.looks or (2 if binary else 1))


# -------------------------------------------------------------------------------------------------
# The plain prediction, at the model's resolution

def paint(model, prompt_images, prompt_labels, images, mode):
    """Labels of images (B, 1, s, s) from n prompts -> [(B, 1, s, s)], to be averaged.

    prompt_images, prompt_labels: (1, n, 1, s, s) for all images, or (B, n, 1, s, s). One answer
    from all prompts, or one from each of them: on the canvas, which holds one, and where the model
    never saw so many.
    """
    device, n = model.mask_token.device, prompt_images.shape[1]
    size = n if mode == "ar" and n <= model.config.max_prompts else 1
    prompts = zip(prompt_images.to(device).split(size, 1), prompt_labels.to(device).split(size, 1))
    answers, images = [], images.to(device)
    for x, y in prompts:
        if mode == "ar":
            answer = model.predict(model.encode_prompts(x, y), images)
        else:
            answer = model.predict_canvas(x[:, 0], y[:, 0], images)
        answers.append(answer.cpu())
    return answers


def to_side(pictures, side, resize):
    """Slices (H, W) of any sizes -> (B, 1, side, side)."""
    pictures = [torch.from_numpy(np.ascontiguousarray(p))[None, None] for p in pictures]
    return torch.cat([resize(p, (side, side)) for p in pictures])


def segment(model, pairs, classes, images, options):
    """How well every pixel fits each class: (B, C + 1, H, W), summing to 1, background first.

    pairs: prompts [(image, label)], (H, W) arrays; classes: the C values asked for; images: a
    stack (B, H, W) in [0, 1]. All at once, under `votes` colorings.
    """
    side, rng, total = model.config.image_size, np.random.default_rng(options.seed), 0
    numbers = [np.searchsorted([0, *classes], np.where(np.isin(label, classes), label, 0))
               for _, label in pairs]  # 0, 1, ... C
    prompt_images = to_side([image for image, _ in pairs], side, resize_images)
    numbers = to_side(numbers, side, resize_labels)
    x = to_side(images, side, resize_images)
    for vote in range(options.votes):
        colors = choose_colors(model, classes, vote, rng, options)
        palette = torch.tensor([0, *colors], dtype=torch.float32)
        for answer in paint(model, prompt_images[None], palette[numbers][None], x, options.mode):
            total = total + decode(answer[:, 0], colors)
    return resize_images(total / total.sum(1, keepdim=True), images.shape[1:])


def choose_colors(model, classes, vote, rng, options):
    """The grays of C classes for one vote: far apart at first, then in another order."""
    colors = spread_colors(len(classes))
    if model.meta.get("coloring") == "predefined":
        offsets, total = model.meta["predefined"]
        if options.dataset in offsets:
            colors = (offsets[options.dataset] + np.asarray(classes)) / total
    elif vote and len(classes) > 1:
        colors = rng.permutation(colors)
    elif vote:
        colors = colors * (1 - 0.6 * vote / options.votes)
    return colors


def ask_for(model, images, masks, stack, options):
    """One class by itself, white on black -> gray (B, H, W), 0 to 1; arguments as of `segment`."""
    side = model.config.image_size
    one_by_one = options.mode == "canvas" or len(masks) > model.config.max_prompts
    if one_by_one and any(m.any() for m in masks):
        # A prompt that lacks the class says nothing of it.
        images, masks = zip(*((x, m) for x, m in zip(images, masks) if m.any()))
    prompt_images = to_side(images, side, resize_images)
    prompt_masks = to_side([m.astype(np.uint8) for m in masks], side, resize_labels).float()
    x = to_side(stack, side, resize_images)
    answers = paint(model, prompt_images[None], prompt_masks[None], x, options.mode)
    gray = sum(answers).div(len(answers)).clamp(0, 1)
    return resize_images(gray, stack.shape[1:])[:, 0]


def class_scores(model, pairs, classes, images, options):
    """`segment`, or every class by itself (`each`), and from near (`looks`): (B, C + 1, H, W)."""
    if options.each:
        asked = [image for image, _ in pairs]
        gray = torch.stack([ask_for(model, asked, [label == c for _, label in pairs], images,
                                    options) for c in classes], 1)  # (B, C, H, W)
    else:
        gray = segment(model, pairs, classes, images, options)
        if options.looks == 1:
            return gray
        gray = gray[:, 1:]
    if options.looks == 2:
        def ask(prompt_images, masks, image):
            return ask_for(model, prompt_images, masks, image[None], options)[0]

        for b, image in enumerate(images):
            for n, value in enumerate(classes):
                gray[b, n] = look_again(ask, pairs, image, gray[b, n], value, options.candidates)
    scores = torch.cat([1 - gray.amax(1, keepdim=True), gray], 1)  # a class wins above 0.5
    return scores.div_(scores.sum(1, keepdim=True))


# -------------------------------------------------------------------------------------------------
# Stacks of slices

def shown_classes(pairs):
    """The classes above 0 of some labels, in order. pairs: [(image, label)]"""
    return sorted({int(v) for _, label in pairs for v in np.unique(label)} - {0})


def answer_image(model, pairs, image, options):
    """The answer of an image task to an image (H, W), in windows (windows.py)."""
    def mean_answer(prompt_images, prompt_labels, images):
        answers = paint(model, prompt_images, prompt_labels, images, options.mode)
        return sum(answers) / len(answers)

    return answer_in_windows(mean_answer, pairs, image, model.config.image_size)


def predict_stack(model, prompts, stack, segmentation, options=Options(), slices=None):
    """Answer a stack (K, H, W) in [0, 1] part by part.

    prompts     [(images, labels)], each (K_p, H_p, W_p): labels integers, or floats in [0, 1]
    slices      which slice of every prompt serves slice k, K tuples; default: the paper's rule
    A generator of (slice numbers, answer (B, H, W), confidence (B, H, W)): integers with the
    prompt's values, or floats. confidence is the winning class's score, of images 1. A caller can
    show answers as they come, or stop.
    """
    options = options.settled(model, segmentation)
    kind = np.result_type(*(labels.dtype for _, labels in prompts)) if segmentation else np.float32
    K, H, W = stack.shape
    slices = slices or [tuple(matching_slice(k, K, len(p[0])) for p in prompts) for k in range(K)]
    groups = {}
    for k, shown in enumerate(slices):
        groups.setdefault(shown, []).append(k)
    for shown, members in groups.items():  # slices that are shown the same
        pairs = [(images[k], labels[k]) for (images, labels), k in zip(prompts, shown)]
        classes = shown_classes(pairs) if segmentation else []
        if options.classes is not None:
            classes = sorted(options.classes)
        batch = max(1, min(options.batch, MAX_SCORES // (H * W * (len(classes) + 1))))
        for part in (members[i:i + batch] for i in range(0, len(members), batch)):
            images = np.stack([stack[k] for k in part])
            confidence = np.ones(images.shape, np.float32)
            if not segmentation:
                answer = np.stack([answer_image(model, pairs, x, options) for x in images])
            elif not classes:
                answer = np.zeros(images.shape, kind)
            else:
                best, number = class_scores(model, pairs, classes, images, options).max(1)
                answer = np.array([0, *classes], kind)[number.numpy()]
                confidence = best.numpy()
            yield part, answer, confidence


def predict_boxes(model, masks, stack, options=Options(), slices=None):
    """Detection by a model trained with boxes=filled, around `predict_stack`: also a generator.

    masks: what `boxes.to_masks` makes of the prompts. Yields (slice numbers, images with boxes
    drawn on them (B, H, W), the boxes of every slice).
    """
    options = replace(options, each=True, candidates=CANDIDATES)
    for part, answer, _ in predict_stack(model, masks, stack, True, options, slices):
        found = [boxes.around(mask) if mask.any() else [] for mask in answer]
        yield part, np.stack([boxes.draw(stack[k], b) for k, b in zip(part, found)]), found


def detection_masks(model, prompts, segmentation):
    """Prompts with masks of the boxes drawn on them, [(images, masks)], for a model trained so.

    None for another model, for a segmentation, and where a label is anything else than its image,
    with white boxes on it in at least one slice.
    """
    if segmentation or model.meta.get("boxes") != "filled":
        return None
    masks = []
    for images, labels in prompts:
        found = []
        for x, y in zip(images, labels):
            found.append(boxes.drawn(y, x) if x.shape == y.shape else [])
            if not found[-1] and (x.shape != y.shape or np.abs(x - y).max() > 0.05):
                return None
        masks.append((images, np.stack([boxes.fill(f, images.shape[1:]) for f in found])))
    return masks if any(m.any() for _, m in masks) else None


def answer_stack(model, prompts, stack, segmentation, options=Options()):
    """All of `predict_stack`, or of `predict_boxes`, at once: (answer (K, H, W), confidence).

    With boxes the second is a list of every slice's boxes.
    """
    masks = detection_masks(model, prompts, segmentation)
    if masks:
        parts = predict_boxes(model, masks, stack, options)
    else:
        parts = predict_stack(model, prompts, stack, segmentation, options)
    answer, beside = [None] * len(stack), [None] * len(stack)
    for part, answers, more in parts:
        for k, value in zip(part, answers):
            answer[k] = value
        for k, value in zip(part, more):
            beside[k] = value
    return np.stack(answer), (beside if masks else np.stack(beside))


def predict(model_or_path, prompts, image, device=None, confidence=None, **options):
    """Answer one image, or a stack of slices.

    model_or_path   an MVG, or a checkpoint's path
    prompts         [(image, label)], (H, W) or (K, H, W) arrays, images in [0, 1]. Labels of
                    integers (or bools) mean segmentation: the answer holds their values. Floats in
                    [0, 1] mean an image. Sizes may differ.
    image           (H, W) or (K, H, W) in [0, 1]
    device          for a path, see `running.checkpoints.pick_device`
    confidence      an array of the image's shape, filled with the winning class's score (masks)
    options         fields of `Options`: mode, votes, each, looks, seed, dataset, classes ...
    Returns an array of the image's shape: the labels' integer type, or float32 in [0, 1].
    Raises ValueError for arrays of another form.
    """
    image = checked(image, "image")
    pairs, segmentation, kind = checked_prompts(prompts, image)
    model = model_or_path
    if not isinstance(model, mvg.MVG):
        model = mvg.load(model_or_path, pick_device(device)[0])
    stack = image.reshape(-1, *image.shape[-2:])
    pairs = [[t.reshape(-1, *t.shape[-2:]) for t in pair] for pair in pairs]
    training = model.training
    model.eval()
    try:
        answer, sure = answer_stack(model, pairs, stack, segmentation, Options(**options))
    finally:
        model.train(training)
    if confidence is not None and segmentation:
        confidence[...] = sure.reshape(image.shape)
    return answer.reshape(image.shape).astype(kind, copy=False)


def checked_prompts(prompts, image):
    """([(image, label)] as floats and integers or floats, segmentation?, the answer's type)."""
    if not prompts:
        raise ValueError("no prompts: pass a list with at least one (image, label)")
    pairs = [(checked(x, f"image of prompt {i}"), np.asarray(y))
             for i, (x, y) in enumerate(prompts)]
    for i, (x, y) in enumerate(pairs):
        if x.ndim != image.ndim:
            raise ValueError(
                f"image is {shape_text(image.shape)} and image of prompt {i} "
                f"{shape_text(x.shape)}: pass slices (H, W), or stacks (K, H, W), throughout")
        if x.shape != y.shape:
            raise ValueError(f"label of prompt {i} is {shape_text(y.shape)} but its image is "
                             f"{shape_text(x.shape)}: they must be equal")
    kinds = {y.dtype.kind in "iub" for _, y in pairs}
    if len(kinds) > 1:
        raise ValueError("some prompt labels are integers and some floats: "
                         "integers mean segmentation, floats an image")
    if not kinds.pop():
        pairs = [(x, checked(y, f"label of prompt {i}")) for i, (x, y) in enumerate(pairs)]
        return pairs, False, np.dtype(np.float32)
    least = min(int(y.min()) for _, y in pairs)
    if least < 0:
        raise ValueError(f"a prompt label holds {least}: classes start at 0, the background")
    kind = np.result_type(*(np.uint8 if y.dtype == bool else y.dtype for _, y in pairs))
    if kind.kind not in "iu":  # numpy makes floats of uint64 beside int
        kind = np.dtype(np.int64)
    return [(x, y.astype(np.int64)) for x, y in pairs], True, kind


def checked(array, what):
    """A (H, W) or (K, H, W) array in [0, 1] as float32."""
    array = np.asarray(array)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{what} is {shape_text(array.shape) or 'a number'}: "
                         "pass one (H, W) slice or a (K, H, W) stack of them")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        count = int((~np.isfinite(array)).sum())
        raise ValueError(f"{what} has {count} values that are NaN or infinite: replace them")
    if array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{what} reaches from {array.min():.4g} to {array.max():.4g}: "
                         "scale it to [0, 1] (scans.volumes.to_unit); a mask has to be integers")
    return array.clip(0, 1)
