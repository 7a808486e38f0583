"""Answers without a model, and prompts that should be of no use."""

from types import SimpleNamespace

import numpy as np
import pytest

from baselines import copied, filtered, linear_filter, wrong_prompts
from fakes import rand
from scans import boxes
from scans.datasets import Dataset

ORGANS = Dataset("x", "", "", "ct", "segmentation", ("a", "b", "c"))
IMAGES = Dataset("y", "", "", "mri", "denoising")
LESIONS = Dataset("z", "", "", "ct", "detection")


# -------------------------------------------------------------------------------------------------
# The linear filter


def box_mean(picture, side):
    """The average over the pixels of a side x side box that lie in the picture, one by one."""
    half, means = side // 2, np.zeros(picture.shape)
    for y, x in np.ndindex(picture.shape):
        means[y, x] = picture[max(0, y - half):y + half + 1, max(0, x - half):x + half + 1].mean()
    return means


def basis(picture):
    """(H, W) -> (HW, 4): the pixel, its averages over 3 x 3 and 5 x 5, and 1."""
    maps = [picture.astype(float), box_mean(picture, 3), box_mean(picture, 5)]
    return np.stack([m.ravel() for m in maps] + [np.ones(picture.size)], 1)


def test_the_linear_filter_is_that_of_least_squares():
    """Against numpy on a basis averaged pixel by pixel."""
    prompt, label, image = rand(40, 31), rand(40, 31, seed=1), rand(26, 50, seed=2)
    label = (0.3 * label + 0.5 * box_mean(prompt, 3) + 0.1).astype(np.float32)
    weights = np.linalg.lstsq(basis(prompt), label.ravel(), rcond=None)[0]
    expected = (basis(image) @ weights).clip(0, 1).reshape(image.shape)
    found = linear_filter(prompt, label, image)
    assert found.shape == image.shape and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-2


@pytest.mark.parametrize("weights", (
    (1, 0, 0, 0),
    (-1, 0, 0, 1),
    (0, 1, 0, 0),
    (0.2, 0.1, 0.5, 0.1),
    (1.2, -0.3, -0.2, 0.1),
))
def test_a_filter_that_made_the_prompts_label_is_found(weights):
    """It is applied to an image of another size, and the answer is clipped to [0, 1]."""
    prompt, image = rand(60, 60), rand(30, 70, seed=1)
    label = (basis(prompt) @ weights).reshape(prompt.shape)
    expected = (basis(image) @ weights).reshape(image.shape).clip(0, 1)
    found = linear_filter(prompt, label, image)
    assert np.abs(found - expected).max() < 2e-2 and np.abs(found - expected).mean() < 2e-3
    assert found.min() >= 0 and found.max() <= 1


def test_a_constant_prompt_gives_a_filter_too():
    flat = np.full((20, 20), 0.5, np.float32)
    found = linear_filter(flat, flat * 0.5, flat)
    assert np.isfinite(found).all() and np.abs(found - 0.25).max() < 1e-3


# -------------------------------------------------------------------------------------------------
# Copies


def answer(images, prompt_images, prompt_labels):
    return SimpleNamespace(images=images, prompt_images=prompt_images, prompt_labels=prompt_labels)


def test_a_mask_is_copied_at_the_images_size():
    labels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    found = copied(answer(rand(1, 4, 6), rand(1, 2, 2), labels), ORGANS)
    assert np.array_equal(found[0], np.kron(labels[0], np.ones((2, 3), int)))


def test_of_an_image_task_the_input_is_copied_and_of_detection_the_boxes():
    images, prompt = rand(2, 64, 64) * np.float32(0.6), rand(2, 32, 32, seed=1) * np.float32(0.6)
    marked = np.stack([boxes.draw(p, [(8, 8, 20, 24)], 4) for p in prompt])
    given = answer(images, prompt, marked)
    assert copied(given, IMAGES) is images
    found = copied(given, LESIONS)
    assert found.min() >= 0 and found.max() <= 1
    assert np.array_equal(found[:, :14], images[:, :14])
    for k in range(2):  # a prompt's pixel is two here
        assert (found[k, 18:40, 18:22] > images[k, 18:40, 18:22]).all()
        assert np.abs(found[k, 28:32, 28:38] - images[k, 28:32, 28:38]).max() < 1e-6


def test_every_slice_is_filtered_by_the_filter_of_its_prompt():
    images, prompts = rand(2, 30, 30), rand(2, 30, 30, seed=1)
    labels = np.stack([1 - prompts[0], prompts[1] / 2])
    found = filtered(answer(images, prompts, labels))
    assert np.abs(found - np.stack([1 - images[0], images[1] / 2])).max() < 0.02


# -------------------------------------------------------------------------------------------------
# Wrong prompts


def test_the_wrong_prompts_of_a_segmentation():
    images, labels = rand(2, 3, 3), np.array([[[0, 1, 3]] * 3, [[0, 5, 1]] * 3], np.uint8)
    other = rand(1, 4, 4), np.ones((1, 4, 4), np.uint8)
    found = wrong_prompts(images, labels, ORGANS, other)
    assert list(found) == ["other_dataset", "other_class", "empty"]
    assert found["other_dataset"] == (other, None)
    (shown, following), classes = found["other_class"]
    assert shown is images and classes is None and following.dtype == np.uint8
    assert following[0, 0].tolist() == [0, 3, 5] and following[1, 0].tolist() == [0, 1, 3]
    (shown, blank), classes = found["empty"]
    assert shown is images and not blank.any() and blank.shape == labels.shape
    assert classes == (1, 3, 5)  # asked for all the same
    assert list(wrong_prompts(images, (labels == 3).astype(np.uint8), ORGANS)) == ["empty"]
    full = wrong_prompts(images, labels + np.uint8(1), ORGANS)  # no background
    assert full["other_class"][0][1][0, 0].tolist() == [2, 4, 6]
    assert full["empty"][1] == (1, 2, 4, 6)


def test_the_wrong_prompts_of_an_image_task():
    images, labels = rand(2, 3, 3), rand(2, 3, 3, seed=1)
    found = wrong_prompts(images, labels, IMAGES)
    assert list(found) == ["empty"]
    (shown, black), classes = found["empty"]
    assert shown is images and classes is None and black.max() == 0 and black.dtype == np.float32
    found = wrong_prompts(images, labels, IMAGES, (images, labels))
    assert list(found) == ["other_dataset", "empty"]
