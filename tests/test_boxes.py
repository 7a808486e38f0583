"""Boxes are drawn on an image, read from one, and turned into masks and back."""

import numpy as np
import pytest
import torch

from metrics import box_scores
from scans import boxes
from scans.volumes import resize_images


def test_boxes_are_read_as_they_were_drawn():
    rng = np.random.default_rng(0)
    image = (0.5 + 0.1 * rng.standard_normal((200, 160))).clip(0, 1).astype(np.float32)
    known = [(20, 30, 60, 90), (100, 20, 180, 60), (90, 110, 130, 150)]
    painted = boxes.draw(image, known)
    assert np.array_equal(painted[22:59, 32:89], image[22:59, 32:89])
    assert (painted[20:61, 30:32] == 1).all()
    assert (painted != image).sum() == 2 * 2 * (41 + 57 + 81 + 37 + 41 + 37)
    read = boxes.read(painted, image)
    # to a pixel
    assert len(read) == 3 and np.abs(np.subtract(sorted(read), sorted(known))).max() <= 1
    assert box_scores(read, known)[1:] == (1, 0)
    assert boxes.read(image, image) == []
    faint = boxes.read(image + 0.3 * (painted - image), image)
    assert box_scores(faint, known)[0] > 0.9
    # all line
    assert np.array_equal(boxes.draw(image, [(5, 5, 6, 7)])[5:7, 5:8], np.ones((2, 3)))


@pytest.mark.parametrize("known", (
    [(20, 20, 50, 60), (35, 50, 80, 90)],
    [(20, 20, 50, 60), (34, 59, 64, 99)],
    [(50, 55, 90, 100)],
))
def test_boxes_that_overlap_are_blurred_or_cross_bone_are_read(known):
    """Each of what a real answer is: two boxes that share lines, an answer painted at half the
    size, lines over what is white already."""
    image = np.full((144, 144), 0.5, np.float32)
    image[60:100, 40:70] = 1
    painted = boxes.draw(image, known)
    half = resize_images(torch.from_numpy(painted - image)[None], (72, 72))
    blurred = image + resize_images(half, (144, 144))[0].numpy()
    for answer, least in ((painted, 0.9), (blurred, 0.85)):
        assert box_scores(boxes.read(answer, image), known)[0] > least


def test_what_is_drawn_in_white_on_an_image():
    rng = np.random.default_rng(0)
    image = (rng.random((128, 128)) * 0.7).astype(np.float32)
    known = [(20, 30, 60, 90), (80, 20, 119, 50)]
    painted = boxes.draw(image, known)
    assert sorted(boxes.drawn(painted, image)) == known
    # thick lines may be read twice
    thick = boxes.drawn(boxes.draw(image, known, 5), image)
    assert np.array_equal(boxes.fill(thick, image.shape), boxes.fill(known, image.shape))
    # as a JPEG is
    noisy = (painted + rng.normal(0, 0.02, painted.shape)).clip(0, 1).astype(np.float32)
    assert len(boxes.drawn(noisy, image)) == 2


def test_what_is_not_drawn_in_white_on_an_image():
    rng = np.random.default_rng(0)
    image, known = (rng.random((44, 40)) * 0.7).astype(np.float32), [(3, 5, 20, 30)]
    assert len(boxes.drawn(boxes.draw(image, known), image)) == 1
    y, x = np.mgrid[:44, :40] - 20
    far = np.hypot(y, x)
    for other in (image, np.maximum(image, far < 8), np.maximum(image, (far < 12) & (far > 9)),
                  1 - image, image * 0, np.where(boxes.fill(known, image.shape), image, 0),
                  np.maximum(image, rng.random(image.shape) > 0.97), image[::-1]):
        assert boxes.drawn(other.astype(np.float32), image) == []


def test_boxes_around_the_parts_of_a_mask():
    known = [(3, 4, 12, 19), (20, 5, 29, 14), (0, 24, 2, 31)]
    mask = boxes.fill(known, (30, 32))
    assert mask.sum() == 160 + 100 + 24 and boxes.around(mask) == known  # largest first
    mask[15, 28] = 1  # a speck
    assert boxes.around(mask) == known
    assert boxes.around(mask, 0) == [*known, (15, 28, 15, 28)]
    mask[13, 20] = 1  # touches the first at its corner
    assert boxes.around(mask)[0] == (3, 4, 13, 20)
    assert boxes.around(np.zeros((4, 4))) == []


def test_a_winding_part_is_one_part():
    snake = np.zeros((41, 41), bool)
    snake[::4], snake[:, ::40] = True, False
    for row in (1, 2, 3):
        snake[row::8, 39] = snake[row + 4::8, 1] = True
    assert boxes.around(snake) == [(0, 1, 40, 39)]


def test_boxes_around_the_parts_of_a_large_mask():
    large = np.zeros((1500, 2000), bool)
    large[303:901, 1200:1777] = large[303:901, 0:595] = True
    assert boxes.around(large) == [(303, 0, 900, 594), (303, 1200, 900, 1776)]
