"""Windows around what was found, by hand, and training samples seen from near."""

import numpy as np
import pytest
import torch

import data
import second_look
from common import batch_of, context
from second_look import close_ups, extent, window


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


def test_close_ups_show_one_class_of_the_prompt_from_near():
    rng = np.random.default_rng(0)
    labels = np.zeros((2, 60, 80), np.uint8)
    labels[0, 10:16, 10:18], labels[1, 30:36, 50:58], labels[:, 40:42, 70:74] = 1, 1, 2
    labels[1, 0, 0] = 3  # the prompt does not show it
    seen = set()
    for _ in range(50):
        views, asked = close_ups(labels, rng)
        seen.add(asked)
        # of the picture: 8 of 80 pixels, 2 of 60 are less than 4 of 80
        size = {1: 0.1, 2: 4 / 80}[asked]
        for view, label in zip(views, labels):
            side = view[0, 0]
            assert max(0.2, 1.5 * size) <= side <= max(0.2, 2.6 * size) and view[1, 1] == side
            assert abs(view[:2, 2]).max() <= 1 - side + 1e-9  # inside of the picture
            rows, columns = np.nonzero(label == asked)
            middle = np.array([(columns.mean() + 0.5) / 40 - 1, (rows.mean() + 0.5) / 30 - 1])
            assert abs(middle - view[:2, 2]).max() < side  # the window holds the class
    assert seen == {1, 2}
    views, asked = close_ups(np.zeros((2, 60, 80), np.uint8), rng)
    assert asked == 0 and all(np.array_equal(view, np.eye(3)) for view in views)


def test_close_ups_are_drawn_as_often_as_asked_for(store, monkeypatch):
    asked = []

    def counted(*arguments):
        asked.append(1)
        return close_ups(*arguments)

    monkeypatch.setattr(data, "close_ups", counted)
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        asked.clear()
        samples = context(store, 32, seg_share=1.0, objective="ar", close_up=share)
        batch = batch_of(samples, *((0, i) for i in range(200)))
        assert low <= len(asked) <= high and batch.images.shape == (200, 2, 1, 32, 32)
    assert ((batch.palette > 0).sum(1) <= 1).all()  # one class each
    assert ((batch.palette > 0).sum(1) == 1).float().mean() > 0.9


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
