"""Sections 3.3 and 4.1: the two objectives, their losses, and the switch between them.

    mim    masked image modeling (Eq. 1): hidden patches of the canvas [P_x P_y; X Y]
    ar     next-image prediction (Eq. 2), without its first factor, a label that has no context

Segmentation is always trained with ar. The other tasks are trained with mim nine times of ten, and
with ar the tenth time. Half of all samples are segmentation.

The loss of a pixel is a branch of `pixel_loss`. An objective is a function (model, batch, labels,
recipe) -> the loss of every sample (B,), each normalised by itself: two ranks equal one process.
"""

import numpy as np
import torch
import torch.nn.functional as F

from mvg import interleave, to_pixels

WHOLE_STEP = 2 ** 31 - 1  # stands for "all samples of the step" in the key of a generator


# -------------------------------------------------------------------------------------------------
# The switch

def switch(recipe, step, segmentation_share):
    """(objective, prompt pairs, probability that a sample is segmentation) of a whole step.

    One draw from (seed, step), so that all ranks agree. A batch has one objective, which is drawn
    first; the tasks of its samples follow by Bayes' rule. segmentation_share: recipe.seg_share, or
    0 or 1 where one of the two kinds of task is not there.
    """
    rng = np.random.default_rng([recipe.seed, step, WHOLE_STEP])
    p_mim = {"hybrid": (1 - segmentation_share) * recipe.mim_share,
             "ar": 0.0, "mim": 1.0}[recipe.objective]
    objective = "mim" if rng.random() < p_mim else "ar"
    low, high = recipe.prompt_range
    prompts = 1 if objective == "mim" else int(rng.integers(low, high + 1))
    if recipe.objective != "hybrid":
        return objective, prompts, segmentation_share
    p_segmentation = 0.0 if objective == "mim" else segmentation_share / (1 - p_mim)
    return objective, prompts, p_segmentation


def draw_hidden(rng, tokens, mask_ratio, hide_label=0.0):
    """Which patches of the canvas are hidden, (4, N) bool.

    round(4 N mask_ratio) patches anywhere in the four images; with probability hide_label instead
    all of Y and nothing else, as at inference (ours).
    """
    hidden = np.zeros(4 * tokens, bool)
    if rng.random() < hide_label:
        hidden[3 * tokens:] = True
    else:
        hidden[rng.permutation(4 * tokens)[:round(4 * tokens * mask_ratio)]] = True
    return hidden.reshape(4, tokens)


# -------------------------------------------------------------------------------------------------
# The losses

def pixel_loss(painted, target, loss, beta):
    """A regression loss pixel by pixel: smooth_l1 (paper), l1 or l2."""
    if loss == "smooth_l1":
        return F.smooth_l1_loss(painted, target, beta=beta, reduction="none")
    if loss == "l1":
        return (painted - target).abs()
    return (painted - target) ** 2


def pixel_weights(batch, labels, recipe):
    """How much every pixel of the images and of the labels counts, 2 x (B, S, 1, H, W).

    1, but `background_weight` on the background of colored masks (authors), and 0 where a label
    has no truth.
    """
    background = (labels == 0) & batch.colored.view(-1, 1, 1, 1, 1)
    of_label = batch.valid.to(labels.dtype)
    of_label = torch.where(background, recipe.background_weight * of_label, of_label)
    return torch.ones_like(labels), of_label


def mean_error(painted, target, weight, batch, recipe):
    """The weighted mean loss of every sample: 3 x (B, E, 1, H, W) -> (B,).

    With `mask_loss` (ours) the loss switches with the task: a squared error lets a mask be gray
    where it is in doubt, but hardly sees the small errors that make an image blurred.
    """
    painted, target = painted.float(), target.float()
    error = pixel_loss(painted, target, recipe.loss, recipe.beta)
    if recipe.mask_loss:
        masks = batch.colored.view(-1, 1, 1, 1, 1)
        error = torch.where(masks, pixel_loss(painted, target, recipe.mask_loss, recipe.beta),
                            error)
    error = error * weight
    return error.sum((1, 2, 3, 4)) / weight.sum((1, 2, 3, 4)).clamp(min=1e-6)


def next_image_loss(model, batch, labels, recipe):
    """"ar", Eq. 2: the loss on every label after the first. labels (B, S, 1, H, W), colored."""
    _, weight = pixel_weights(batch, labels, recipe)
    painted = model(batch.images, labels, drop=batch.drop)  # (B, S - 1, 1, H, W)
    return mean_error(painted, labels[:, 1:], weight[:, 1:], batch, recipe)


def masked_loss(model, batch, labels, recipe):
    """"mim", Eq. 1: the loss on the hidden patches of the canvas. labels (B, 2, 1, H, W)."""
    weight = interleave(*pixel_weights(batch, labels, recipe))  # (B, 4, 1, H, W)
    weight = weight * to_pixels(batch.hidden, labels.shape[-2:])
    painted = model(batch.images, labels, hidden=batch.hidden, drop=batch.drop)
    return mean_error(painted, interleave(batch.images, labels), weight, batch, recipe)


LOSSES = {"ar": next_image_loss, "mim": masked_loss}
