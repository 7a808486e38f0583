"""Windows around what was found, by hand."""

import numpy as np
import pytest
import torch

import second_look
from second_look import extent, window


def test_windows_by_hand():
    mask = np.zeros((10, 20), bool)
    mask[2:4, 5:15] = True
    assert extent(mask) == ((0.3, 0.5), 0.5) and extent(mask > 1) is None
    mask[9, 19] = True  # one of 21 pixels
    assert extent(mask) == ((0.6, 0.625), 0.8) and extent(mask, 0.05) == ((0.3, 0.5), 0.5)
    assert window((0.3, 0.5), 0.4, mask.shape) == (slice(1, 5), slice(6, 14))
    assert window((0.0, 1.0), 0.4, mask.shape) == (slice(0, 4), slice(12, 20))  # moved inside
    assert window((0.5, 0.5), 1.0, mask.shape) == (slice(0, 10), slice(0, 20))
    assert window((0.5, 0.5), 0.01, (3, 1)) == (slice(0, 2), slice(0, 1))


# -------------------------------------------------------------------------------------------------
# The second look

def scene(size=80):
    """(a prompt and its label, an image, the first answer): a bright square of 1 / 10."""
    image, label = np.zeros((size, size), np.float32), np.zeros((size, size), np.uint8)
    image[20:28, 20:28], label[20:28, 20:28] = 1, 3
    task, gray = np.zeros((size, size), np.float32), torch.zeros(size, size)
    task[48:56, 40:48], gray[46:56, 40:50] = 1, 0.9
    return (image, label), task, gray


def test_a_second_look_asks_near_what_the_first_one_saw():
    """The model is asked once, with windows of one size around the class in both pictures."""
    prompt, task, gray = scene()
    asked = []

    def ask(images, masks, image):
        asked.append((images, masks, image))
        return torch.as_tensor(image)  # the perfect answer

    answer = second_look.look_again(ask, [prompt], task, gray, 3)
    ((near, mask, image),) = asked
    side = round(second_look.SMALLEST * 80)  # 1.5 times 10 of 80 pixels is less
    assert near[0].shape == mask[0].shape == image.shape == (side, side)
    assert mask[0].dtype == bool and mask[0].sum() == 64 == near[0].sum() == image.sum()
    inside = torch.zeros(80, 80, dtype=torch.bool)
    inside[41:61, 35:55] = True  # the middle of the first answer, 51, 45
    expected = torch.lerp(gray, torch.from_numpy(task), second_look.WEIGHT) * inside
    assert torch.allclose(answer, expected, atol=1e-6)


def test_a_second_look_is_left_out_where_it_would_not_help():
    prompt, task, gray = scene()

    def never(*arguments):
        raise AssertionError("asked again")

    for first in (torch.zeros(80, 80), torch.ones(80, 80), 0.4 * torch.ones(80, 80)):
        assert torch.equal(second_look.look_again(never, [prompt], task, first, 3), first)


@pytest.mark.parametrize("candidates,looks", ((1, 1), (2, 2), (5, 2)))
def test_parts_are_looked_at_one_by_one(candidates, looks):
    prompt, task, gray = scene()
    gray[5:12, 60:67] = 0.8
    asked = []

    def ask(images, masks, image):
        asked.append(image.shape)
        return torch.ones(image.shape)

    answer = second_look.look_again(ask, [prompt], task, gray, 3, candidates)
    assert len(asked) == looks
    if candidates == 1:
        assert (answer[5:12, 60:67] == 0).all()  # outside of all windows the class is not
    else:
        assert (answer[5:12, 60:67] > 0.8).all()
    assert (answer[46:56, 40:50] > 0.9).all()
