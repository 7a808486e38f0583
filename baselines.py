"""What a score stands beside: answers without a model, and prompts that should be of no use.

A model that does not beat copying the prompt's label has learned nothing. A model whose score does
not fall with a wrong prompt does not read its prompt.
"""

import numpy as np
import torch
import torch.nn.functional as F

from scans.volumes import resize_images, resize_labels


def copied(answer, dataset):
    """The prompt's label as it is, the input, or the prompt's boxes laid over it: (K, H, W).

    answer: an `Answer` of eval.py.
    """
    size = answer.images.shape[1:]
    if dataset.colored:
        return resize_labels(torch.from_numpy(answer.prompt_labels), size).numpy()
    if dataset.task == "detection":
        lines = torch.from_numpy(np.clip(answer.prompt_labels - answer.prompt_images, 0, 1))
        return (answer.images + resize_images(lines, size).numpy()).clip(0, 1)
    return answer.images


def filtered(answer):
    """`linear_filter` of every slice of an `Answer`: (K, H, W)."""
    slices = zip(answer.prompt_images, answer.prompt_labels, answer.images)
    return np.stack([linear_filter(*three) for three in slices])


def linear_filter(prompt_image, prompt_label, image):
    """The linear filter that fits the prompt pair best, on an image; (H, W) arrays.

    Least squares on the pixel, its averages over 3 x 3 and 5 x 5, and 1.
    """
    def basis(picture):
        x = torch.from_numpy(np.ascontiguousarray(picture, np.float32))[None, None]
        maps = [F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False) for side in (1, 3, 5)]
        return torch.cat([*maps, torch.ones_like(x)]).flatten(1).T.double()  # (HW, 4)

    target = torch.from_numpy(np.ascontiguousarray(prompt_label, np.float64)).reshape(-1, 1)
    A = basis(prompt_image)
    ridge = 1e-5 * len(A) * torch.eye(4, dtype=torch.float64)  # where the prompt is constant
    weights = torch.linalg.solve(A.T @ A + ridge, A.T @ target)
    return (basis(image) @ weights).clamp(0, 1).reshape(image.shape).float().numpy()


def wrong_prompts(images, labels, dataset, other=None):
    """{name of metrics.WRONG: ((images, labels), classes asked for or None)}

    other_dataset   a pair of another dataset, where one is given
    other_class     every class is called the next one, where there are several
    empty           no answer at all: no class is shown but all are asked for, or a black image
    """
    prompts = {} if other is None else {"other_dataset": (other, None)}
    classes = np.setdiff1d(labels, [0]) if dataset.colored else ()
    if len(classes) > 1:
        following = np.arange(256, dtype=np.uint8)
        following[classes] = np.roll(classes, -1)
        prompts["other_class"] = (images, following[labels]), None
    asked = tuple(classes.tolist()) if dataset.colored else None
    prompts["empty"] = (images, np.zeros_like(labels)), asked
    return prompts
