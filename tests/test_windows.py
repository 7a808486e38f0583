"""windows.py: image tasks are shown and answered in windows of the model's side."""

import numpy as np
import pytest
import torch

import windows
from fakes import Echo, Identity, fake, rand, watch
from predict import predict


# -------------------------------------------------------------------------------------------------
# Inference


@pytest.mark.parametrize("side", (32, 96, 448))
def test_windows_cover_every_pixel(side):
    for length in (side, side + 1, side + side // 2, 2 * side - 1, 2 * side, 512, 700):
        if length < side:
            continue
        begin = windows.starts(length, side)
        assert begin[0] == 0 and begin[-1] == length - side and begin == sorted(set(begin))
        assert max(np.diff(begin), default=0) <= side // 2  # neighbours overlap by a half
        covered = np.zeros(length, int)
        for start in begin:
            covered[start:start + side] += 1
        assert covered.min() >= 1


@pytest.mark.parametrize("mode", ("ar", "canvas"))
@pytest.mark.parametrize("shape", ((32, 32), (33, 32), (75, 50), (200, 37), (512, 100)))
def test_windows_of_the_image_itself_are_blended_into_the_image(mode, shape):
    image, prompt = rand(*shape), rand(40, 60, seed=1)
    answer = predict(fake(Identity, 32), [(prompt, prompt)], image, mode=mode)
    assert answer.shape == shape and answer.dtype == np.float32
    assert np.abs(answer - image).max() < 1e-5


@pytest.mark.parametrize("mode", ("ar", "canvas"))
def test_a_model_that_copies_answers_images_at_their_own_resolution(mode):
    """Pixel by pixel, whatever the prompts' sizes, also slice by slice of a stack."""
    model, rng = fake(Identity, 32), np.random.default_rng(0)
    a, b, new = (rng.random(s, dtype=np.float32) for s in ((40, 60), (33, 21), (3, 75, 50)))
    for prompts in ([(a, a)], [(a, a), (b, b)]):
        answer = np.stack([predict(model, prompts, x, mode=mode) for x in new])
        assert np.allclose(answer, new, atol=0.01)
        stacks = [(x[None], y[None]) for x, y in prompts]
        assert np.allclose(predict(model, stacks, new, mode=mode), answer, atol=1e-6)
    classes = [(a, (a > 0.5).astype(np.uint8))]
    assert predict(model, classes, new[0], mode=mode).dtype == np.uint8


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    wave = np.sin(3 * y / height) * np.cos(2 * x / width)
    return (0.5 + 0.4 * wave).astype(np.float32)


@pytest.mark.parametrize("shape", ((20, 24), (12, 60), (31, 33), (64, 700), (600, 530)))
def test_images_smaller_than_the_models_side_and_larger_than_512_are_answered(shape):
    """They are resized before and after, so a smooth image comes back as it was."""
    image = smooth(*shape)
    answer = predict(fake(Identity, 32), [(image, image)], image)
    assert answer.shape == shape and np.abs(answer - image).max() < 0.03


@pytest.mark.parametrize("shape", ((20, 24), (64, 700), (600, 530), (512, 512), (5, 400)))
@pytest.mark.parametrize("side", (32, 448))
def test_no_side_is_smaller_than_the_models_or_larger_than_512(shape, side):
    height, width = windows.fit(smooth(*shape), side).shape
    assert side <= min(height, width) and max(height, width) <= windows.MAX_SIDE
    if side <= min(shape) and max(shape) <= windows.MAX_SIDE:
        assert (height, width) == shape


def test_a_window_of_the_prompt_lies_at_the_same_relative_place(monkeypatch):
    """The prompt is half as long and twice as wide; its windows have the same pixels, not sizes."""
    model = fake(Identity, 32)
    asked = watch(monkeypatch, model)
    image, prompt, label = rand(128, 64), rand(64, 128, seed=1), rand(64, 128, seed=2)
    predict(model, [(prompt, label)], image)
    places = [(y, x) for y in windows.starts(128, 32) for x in windows.starts(64, 32)]
    assert len(asked) == len(places) == 7 * 3
    for (y, x), (images, labels) in zip(places, asked):
        top, left = round(y / 96 * 32), round(x / 32 * 96)
        here = slice(top, top + 32), slice(left, left + 32)
        assert np.array_equal(images[0, 0, 0], prompt[here])
        assert np.array_equal(labels[0, 0, 0], label[here])
    first, last = asked[0][0][0, 0, 0], asked[-1][0][0, 0, 0]
    assert np.array_equal(first, prompt[:32, :32]) and np.array_equal(last, prompt[-32:, -32:])


def test_an_answer_follows_its_prompt_from_window_to_window():
    """The echo of a prompt of the image's size is the prompt's label, blended without a seam."""
    echo = fake(Echo)
    image, label = rand(150, 200), rand(150, 200, seed=1)
    assert np.abs(predict(echo, [(image, label)], image) - label).max() < 1e-5
    other = rand(150, 200, seed=2)
    both = predict(echo, [(image, label), (image, other)], image)  # the mean of both
    assert np.abs(both - (label + other) / 2).max() < 1e-5


# -------------------------------------------------------------------------------------------------
# Training


def numbered(height, width):
    """A picture whose every pixel says where it is."""
    return (np.arange(height * width).reshape(height, width) / (height * width)).astype(np.float32)


def training_windows(pairs, side, rng):
    """What the views of `draw_windows` show: [(image, label, known)], (side, side) tensors each."""
    views = windows.draw_windows(pairs, side, rng)

    def seen(picture, view, mode):
        picture = torch.from_numpy(np.asarray(picture, np.float32))[None, None]
        grid = torch.nn.functional.affine_grid(torch.from_numpy(view[None, :2]).float(),
                                               (1, 1, side, side), align_corners=False)
        return torch.nn.functional.grid_sample(picture, grid, mode, "border", False)[0, 0]

    return [(seen(image, view, "bilinear"), seen(label, view, "bilinear"),
             seen(np.ones(image.shape) if known is None else known, view, "nearest"))
            for (image, label, known), view in zip(pairs, views)]


def test_a_training_window_lies_at_the_same_relative_place_of_every_pair():
    """Pixel for pixel, in image, label and what is known of it."""
    rng = np.random.default_rng(0)
    task, prompt = numbered(80, 100), numbered(50, 41)
    seen = set()
    for _ in range(100):
        pairs = [(prompt, 1 - prompt, None), (task, 1 - task, None)]
        (image, label, known), (own, answer, _) = training_windows(pairs, 32, rng)
        for picture in (image, label, known, own, answer):
            assert picture.shape == (32, 32)
        assert known.min() == 1
        assert torch.allclose(image + label, torch.ones(32, 32))
        top, left = np.unravel_index(abs(prompt - image[0, 0].item()).argmin(), prompt.shape)
        assert np.allclose(image, prompt[top:top + 32, left:left + 32], atol=1e-5)
        y, x = np.unravel_index(abs(task - own[0, 0].item()).argmin(), task.shape)
        assert np.allclose(own, task[y:y + 32, x:x + 32], atol=1e-5)
        assert abs(top / 18 - y / 48) <= 0.5 / 18 + 0.5 / 48
        assert abs(left / 9 - x / 68) <= 0.5 / 9 + 0.5 / 68
        seen.add((int(y), int(x)))
    assert len(seen) > 90 and min(y for y, _ in seen) < 5 and max(x for _, x in seen) > 62


def test_a_training_window_holds_some_of_a_truth_that_is_known_in_part():
    """Inpainting: a small hole is in every window, at many places of it."""
    rng, places = np.random.default_rng(0), set()
    image, label = rng.random((2, 120, 90)).astype(np.float32)
    valid = np.zeros((120, 90), bool)
    valid[100:106, 4:9] = True
    label = np.where(valid, label, image)
    label[:10] = image[:10] = 0
    marks = np.where(valid, 1, 2).astype(np.uint8)
    marks[50:60] = 0
    pairs = [(image, image, None), (image, label, marks)]
    for _ in range(100):
        _, (own, answer, _) = training_windows(pairs, 32, rng)
        hole = np.argwhere(((own - answer).abs() > 1e-4).numpy())
        assert len(hole) > 0
        places.add(tuple(hole[0]))
    assert len(places) > 20
    assert all(0 <= v <= 1 for _ in range(50) for v in windows.draw_place(marks, 32, rng))
    everywhere = np.array([windows.draw_place(0 * marks, 32, rng) for _ in range(200)])
    assert everywhere.min() < 0.05 and everywhere.max() > 0.95


def test_a_small_picture_is_enlarged_for_its_training_window():
    image = smooth(16, 40)
    rng, marks = np.random.default_rng(0), np.zeros(image.shape, np.uint8)
    marks[3:5, 33:36] = 1  # what is scored is in every window
    assert all((training_windows([(image, image, marks)], 32, rng)[0][2] > 0).any()
               for _ in range(50))
    (pair,) = training_windows([(image, image, None)], 32, np.random.default_rng(0))
    assert [tuple(t.shape) for t in pair] == [(32, 32)] * 3 and pair[2].unique().tolist() == [1]
