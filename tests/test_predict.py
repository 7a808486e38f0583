"""predict.py: slices are answered from prompts that are arrays."""

import ast
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import mvg
import predict as prediction
import second_look
from conftest import ROOT
from fakes import Echo, at_side, fake, rand, watch
from predict import Options, answer_stack, class_scores, detection_masks, predict, predict_stack
from scans import boxes
from scans.volumes import resize_images, resize_labels


@pytest.fixture
def echo():
    return fake(Echo)


def two_classes(shape=(32, 32)):
    label = np.zeros(shape, np.uint8)
    label[5:20, 5:20] = 1
    label[22:30, 8:30] = 2
    return label


# -------------------------------------------------------------------------------------------------
# `predict`


def test_predict_follows_the_type_of_the_label():
    model, rng = mvg.build("demo", 32), np.random.default_rng(0)
    image, new = rng.random((20, 24)), rng.random((50, 40))
    label = np.zeros((20, 24), np.int16)
    label[5:12, 5:15], label[14:18, 3:20] = 7, 300
    answer = predict(model, [(image, label)], new)
    assert answer.shape == (50, 40) and answer.dtype == np.int16
    assert set(np.unique(answer)) <= {0, 7, 300}
    answer = predict(model, [(image, image.astype(np.float32))], new)
    assert answer.shape == (50, 40) and answer.dtype == np.float32
    assert 0 <= answer.min() and answer.max() <= 1
    assert predict(model, [(image, label > 0)], new).max() <= 1
    several = [(image, label), (new, np.zeros(new.shape, np.int16))]
    assert predict(model, several, new).shape == (50, 40)


def test_predict_from_a_path_equals_predict_from_a_model(checkpoint):
    rng = np.random.default_rng(0)
    image, label = rng.random((32, 32)), rng.integers(0, 3, (32, 32))
    model = mvg.load(checkpoint)
    assert np.array_equal(predict(checkpoint, [(image, label)], image),
                          predict(model, [(image, label)], image))
    assert np.array_equal(predict(model, [(image, label)], image, votes=3),
                          predict(model, [(image, label)], image, votes=3))


ZEROS, CLASSES = np.zeros((8, 8)), np.zeros((8, 8), int)


@pytest.mark.parametrize("prompts,image,words", (
    ([], ZEROS, "no prompts"),
    ([(ZEROS, np.zeros((8, 9), int))], ZEROS, "8x9 but its image is 8x8"),
    ([(ZEROS, CLASSES)], np.zeros((8, 8, 3)), "8x8x3"),
    ([(ZEROS, CLASSES)], np.full((8, 8), 255.0), "scale it to"),
    ([(ZEROS, np.full((8, 8), -1))], ZEROS, "holds -1"),
    ([(ZEROS, CLASSES), (ZEROS, ZEROS)], ZEROS, "some floats"),
    ([(ZEROS, CLASSES)], np.full((8, 8), np.nan), "64 values that are NaN"),
    ([(ZEROS, CLASSES)], np.zeros((0, 8)), "image is 0x8"),
))
def test_predict_says_what_is_wrong(prompts, image, words):
    with pytest.raises(ValueError, match=words):
        predict(mvg.build("demo", 32), prompts, image)


@pytest.mark.parametrize("options,words", (
    ({"mode": "both"}, "mode is 'both': choose auto, ar or canvas"),
    ({"votes": 0}, "votes is 0: it must be at least 1"),
    ({"looks": 3}, "looks is 3: choose 1 or 2"),
))
@pytest.mark.parametrize("kind", (int, np.float32))
def test_an_option_that_cannot_be_is_named(options, words, kind):
    with pytest.raises(ValueError, match=words):
        predict(mvg.build("demo", 32), [(ZEROS, ZEROS.astype(kind))], ZEROS, **options)


@pytest.mark.parametrize("training", (True, False))
def test_predict_leaves_the_model_as_it_was(echo, training, monkeypatch):
    """In training mode or not, also where an error is raised on the way."""
    image, modes = rand(64, 64), []
    plain = echo.predict
    monkeypatch.setattr(echo, "predict",
                        lambda *rest: modes.append(echo.training) or plain(*rest))
    prompts = [(image, (image > 0.5).astype(int))]
    echo.train(training)
    predict(echo, prompts, image)
    assert modes == [False] and echo.training is training
    with pytest.raises(ValueError, match="votes"):
        predict(echo, prompts, image, votes=0)
    assert echo.training is training

    def fail(*rest):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(echo, "predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(echo, prompts, image)
    assert echo.training is training
    with pytest.raises(ValueError, match="no prompts"):
        predict(echo, [], image)
    assert echo.training is training


def test_the_mode_is_as_trained():
    def mode(segmentation, asked="auto", **meta):
        return Options(asked).settled(fake(Echo, **meta), segmentation).mode

    assert (mode(True), mode(False)) == ("ar", "canvas")  # a hybrid
    for objective, way in (("ar", "ar"), ("mim", "canvas")):
        for segmentation in (True, False):
            assert mode(segmentation, objective=objective) == way
    assert mode(True, "canvas", objective="ar") == "canvas"


def test_large_label_values(echo):
    image, label = np.random.default_rng(0).random((24, 20)), np.zeros((24, 20), np.int64)
    label[4:12, 4:12], label[14:20, 10:18] = 614454277, 2035
    assert np.array_equal(predict(echo, [(image, label)], image), label)


def test_classes_are_asked_for_in_any_order(echo):
    label, image = two_classes((64, 64)), rand(64, 64)
    for each in (True, False):
        found = predict(echo, [(image, label)], image, classes=(2, 1), each=each)
        assert np.array_equal(found, label)


# -------------------------------------------------------------------------------------------------
# Prompts


def test_more_prompts_than_trained_are_averaged():
    model = mvg.build("demo", 32)  # trained with one
    images, labels = torch.rand(2, 1, 3, 1, 32, 32)
    x = torch.rand(2, 1, 32, 32)
    answers = prediction.paint(model, images, labels, x, "ar")
    assert len(answers) == 3
    assert len(prediction.paint(model, images, labels, x, "canvas")) == 3  # which holds one
    model.config.max_prompts = 3
    assert len(prediction.paint(model, images, labels, x, "ar")) == 1
    assert len(prediction.paint(model, images, labels, x, "canvas")) == 3


def test_every_slice_is_shown_its_matching_slices(echo, monkeypatch):
    """floor(n * N_prompt / N_input) of every prompt; `slices` chooses others."""
    asked = watch(monkeypatch, echo)
    stack, longer = rand(4, 64, 64), rand(6, 64, 64, seed=1)
    label, few = np.zeros((2, 64, 64), int), np.zeros((6, 64, 64), int)
    for k in range(6):
        few[k, 8 * k:8 * k + 20, 10:40] = 1
    label[:] = few[:2]
    prompts = [(stack[:2], label), (longer, few)]
    answer_stack(echo, prompts, stack, True)
    shown = [images[0, 0, 0].numpy() for images, _ in asked]
    expected = [(k // 2, k * 6 // 4) for k in range(4)]
    for n, (a, b) in enumerate(expected):  # the echo is asked with one prompt at a time
        assert np.array_equal(shown[2 * n], stack[a])
        assert np.array_equal(shown[2 * n + 1], longer[b])
    asked.clear()
    chosen = [(1, 5), (0, 0), (1, 5), (0, 0)]
    parts = list(predict_stack(echo, prompts, stack, True, slices=chosen))
    assert [part for part, _, _ in parts] == [[0, 2], [1, 3]]  # encoded once for both
    assert np.array_equal(asked[1][0][0, 0, 0], longer[5])


def test_a_prompt_of_another_size_is_brought_to_the_models_side(echo, monkeypatch):
    asked = watch(monkeypatch, echo)
    image, label, new = rand(40, 90), np.zeros((40, 90), np.uint8), rand(70, 50)
    label[10:30, 20:60] = 3
    answer = predict(echo, [(image, label)], new)
    assert torch.allclose(asked[0][0][0, 0, 0], at_side(image, 64, resize_images), atol=1e-6)
    assert torch.equal(asked[0][1][0, 0, 0], at_side(label == 3, 64, resize_labels))
    grown = resize_labels(torch.from_numpy(label)[None], (70, 50))[0].numpy()
    assert answer.shape == (70, 50) and (answer == grown).mean() > 0.97


def test_predefined_colors_are_those_of_the_class_whatever_else_is_shown(echo, monkeypatch):
    """Classes 1 and 3 without 2 keep their own grays; without the name they are far apart."""
    echo.meta = {"coloring": "predefined", "predefined": [{"acdc": 10}, 20]}
    asked = watch(monkeypatch, echo)
    image, label = np.random.default_rng(0).random((64, 64)), np.zeros((64, 64), np.uint8)
    label[4:20, 4:20], label[30:50, 30:50] = 1, 3
    own, apart = [0, 11 / 20, 13 / 20], [0, 0.5, 1]
    for name, grays in (("acdc", own), ("other", apart), (None, apart)):
        asked.clear()
        assert np.array_equal(predict(echo, [(image, label)], image, dataset=name), label)
        assert len(asked) == 1 and asked[0][1].unique().tolist() == pytest.approx(grays)


def test_votes_are_asked_for_under_other_colors(echo, monkeypatch):
    asked = watch(monkeypatch, echo)
    image, label = rand(64, 64), np.zeros((64, 64), int)
    for n in range(5):
        label[10 * n:10 * n + 8, 10:50] = n + 1
    assert np.array_equal(predict(echo, [(image, label)], image, votes=6), label)
    orders = [tuple(labels[0, 0, 0, 4:50:10, 20].tolist()) for _, labels in asked]
    assert len(asked) == 6 and len(set(orders)) > 4  # the grays are those of the first in any order
    assert all(sorted(o) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1]) for o in orders)
    asked.clear()
    predict(echo, [(image, label)], image, votes=6, seed=1)
    others = [tuple(labels[0, 0, 0, 4:50:10, 20].tolist()) for _, labels in asked]
    assert others[0] == orders[0] and others != orders
    asked.clear()
    predict(echo, [(image, (label == 2).astype(int))], image, votes=2)
    assert [labels.max().item() for _, labels in asked] == pytest.approx([1, 0.7])  # one class


# -------------------------------------------------------------------------------------------------
# Stacks


@pytest.mark.parametrize("segmentation", (True, False))
def test_a_batch_answers_as_one_by_one(segmentation):
    model = mvg.build("demo", 32).eval()
    stack, label = rand(5, 32, 32), rand(1, 32, 32, seed=1)
    if segmentation:
        label = two_classes()[None]
    prompts, options = [(stack[:1], label)], Options("ar")
    whole, sure = answer_stack(model, prompts, stack, segmentation, options)
    single = [answer_stack(model, prompts, stack[k:k + 1], segmentation, options) for k in range(5)]
    one_by_one, fit = (np.concatenate(arrays) for arrays in zip(*single))
    assert np.abs(sure - fit).max() < 1e-4
    if segmentation:
        assert (whole == one_by_one)[sure > 0.51].all() and (sure > 0.51).any()
    else:
        assert np.abs(whole - one_by_one).max() < 1e-5


def test_twice_the_same_and_a_batch_as_one_by_one(checkpoint):
    model = mvg.load(checkpoint)
    stack, label = rand(20, 32, 32), two_classes()[None]
    sure = [np.zeros(stack.shape, np.float32) for _ in range(3)]
    answers = []
    for batch, fit in zip((16, 16, 1), sure):
        answers.append(predict(model, [(stack[:1], label)], stack, votes=2, batch=batch,
                               confidence=fit))
    assert np.array_equal(answers[0], answers[1]) and np.array_equal(sure[0], sure[1])
    assert np.abs(sure[0] - sure[2]).max() < 1e-4
    assert (answers[0] == answers[2])[sure[0] > 0.51].all()


@pytest.mark.parametrize("segmentation", (True, False))
def test_parts_come_one_by_one_and_hold_every_slice_once(checkpoint, segmentation):
    """A generator: nothing is answered before it is asked for, and a caller can stop."""
    model, stack = mvg.load(checkpoint), rand(7, 40, 48)
    images = rand(3, 32, 32, seed=1)
    labels = images[::-1]
    if segmentation:
        labels = np.stack([np.roll(two_classes(), k) for k in range(3)])
    counted, encode, canvas = [], model.encode_prompts, model.predict_canvas
    model.encode_prompts = lambda *rest: counted.append(1) or encode(*rest)
    model.predict_canvas = lambda *rest: counted.append(1) or canvas(*rest)
    parts = predict_stack(model, [(images, labels)], stack, segmentation)
    assert not counted
    first = next(parts)
    asked = len(counted)
    assert asked > 0 and first[0] == [k for k in range(7) if k * 3 // 7 == 0]
    rest = list(parts)
    assert len(counted) > asked and len(rest) == 2
    numbers = [k for part, _, _ in (first, *rest) for k in part]
    assert sorted(numbers) == list(range(7))
    answer, sure = answer_stack(model, [(images, labels)], stack, segmentation)
    for part, slices, confidence in (first, *rest):
        assert slices.shape == confidence.shape == (len(part), 40, 48)
        assert np.array_equal(slices, answer[part]) and np.array_equal(confidence, sure[part])
    assert answer.dtype == (labels.dtype if segmentation else np.float32)
    for k in range(7):  # asked for alone, of the prompt slice that is its own
        shown = [(images[[k * 3 // 7]], labels[[k * 3 // 7]])]
        alone, fit = answer_stack(model, shown, stack[[k]], segmentation)
        assert np.abs(fit[0] - sure[k]).max() < 1e-4
        if segmentation:
            assert (alone[0] == answer[k])[sure[k] > 0.51].all()
        else:
            assert np.abs(alone[0] - answer[k]).max() < 1e-5 and (sure == 1).all()


def test_a_stack_is_answered_in_parts_of_a_bounded_size(checkpoint, monkeypatch):
    model, stack = mvg.load(checkpoint), rand(40, 32, 32)
    prompts = [(stack[:1], two_classes()[None])]

    def sizes():
        return [len(part) for part, _, _ in predict_stack(model, prompts, stack, True)]

    assert sizes() == [16, 16, 8]
    monkeypatch.setattr(prediction, "MAX_SCORES", 32 * 32 * 3 * 5)  # five slices' scores
    assert sizes() == [5] * 8
    monkeypatch.setattr(prediction, "MAX_SCORES", 1)
    assert sizes() == [1] * 40


def test_a_slice_whose_prompt_shows_nothing_is_background(echo, monkeypatch):
    asked = watch(monkeypatch, echo)
    stack, label = rand(2, 64, 64), np.zeros((2, 64, 64), np.int64)
    label[1, 5:30, 5:30] = 4
    answer = predict(echo, [(stack, label)], stack)
    assert np.array_equal(answer, label) and len(asked) == 1


# -------------------------------------------------------------------------------------------------
# One class at a time


@pytest.mark.parametrize("coloring", ("random", "binary"))
def test_one_class_at_a_time_for_every_model(checkpoint, coloring):
    """Integers with the prompt's values; the scores of a pixel sum to 1."""
    model = mvg.load(checkpoint)
    model.meta = {"coloring": coloring}
    stack, label = rand(2, 40, 48), np.where(two_classes() == 2, 9, two_classes()).astype(np.int32)
    sure = np.zeros(stack.shape, np.float32)
    answer = predict(model, [(rand(1, 32, 32), label[None])], stack, each=True, confidence=sure)
    assert answer.dtype == np.int32 and set(np.unique(answer)) <= {0, 1, 9}
    assert 1 / 3 - 1e-5 <= sure.min() and sure.max() <= 1 + 1e-5
    for each in (True, False):
        options = Options(each=each).settled(model, True)
        scores = class_scores(model, [(rand(32, 32), label)], [1, 9], stack, options)
        assert scores.shape == (2, 3, 40, 48) and scores.min() >= 0
        assert torch.allclose(scores.sum(1), torch.ones(2, 40, 48), atol=1e-5)


def test_the_mask_of_each_class_is_asked_for_in_white_on_black(echo, monkeypatch):
    """A model that paints the mask gives the mask back; binary colors ask so by themselves."""
    asked = watch(monkeypatch, echo)
    image, label = rand(64, 64), np.zeros((64, 64), np.uint16)
    label[5:20, 5:20], label[25:40, 10:50], label[50:60, 30:60] = 3, 17, 1000
    for meta, each in (({}, True), ({"coloring": "binary"}, None), ({"coloring": "binary"}, True)):
        echo.meta = meta
        asked.clear()
        assert np.array_equal(predict(echo, [(image, label)], image, each=each, looks=1),
                              label)
        assert len(asked) == 3
        for (_, shown), value in zip(asked, (3, 17, 1000)):
            assert np.array_equal(shown[0, 0, 0], label == value)
    for meta, each in (({}, None), ({"coloring": "binary"}, False), ({"coloring": "random"}, None)):
        echo.meta = meta
        asked.clear()
        assert np.array_equal(predict(echo, [(image, label)], image, each=each, looks=1),
                              label)
        assert len(asked) == 1


def test_a_class_is_seen_from_a_gray_of_one_half_on(echo, monkeypatch):
    image, label = rand(64, 64), np.zeros((64, 64), int)
    label[10:40, 10:40] = 5
    for gray, seen in ((0.51, True), (0.49, False)):
        monkeypatch.setattr(echo, "predict", lambda cache, x, gray=gray: gray * cache)
        answer = predict(echo, [(image, label)], image, each=True)
        assert np.array_equal(answer, label * seen)


def test_binary_coloring_averages_over_the_prompts_that_show_a_class(monkeypatch):
    """Prompts that are asked one by one: one that lacks the class says nothing of it."""
    model = fake(Echo, coloring="binary")
    asked = watch(monkeypatch, model)
    label, empty, image = np.zeros((2, 64, 64), int), np.zeros((64, 64), int), rand(64, 64)
    label[0, 10:40, 10:40] = label[1, 10:40, 20:50] = 5
    pairs = [(image, y) for y in (label[0], empty, label[1])]
    assert np.array_equal(predict(model, pairs[:1], image), label[0])
    assert np.array_equal(predict(model, pairs[:2], image), label[0])
    options = Options(looks=1).settled(model, True)
    asked.clear()
    half = class_scores(model, pairs, [5], image[None], options)
    assert len(asked) == 2 and half[0, 0, 50, 50] == 1
    assert half[0, :, 20, 15].tolist() == half[0, :, 20, 45].tolist() == pytest.approx([0.5, 0.5])
    assert half[0, :, 20, 30].tolist() == [0, 1]
    assert torch.allclose(half.sum(1), torch.ones(1, 64, 64))
    model.config.max_prompts = 3  # seen together, the empty one is an example, too
    asked.clear()
    class_scores(model, pairs, [5], image[None], options)
    assert [labels.shape[1] for _, labels in asked] == [3]
    asked.clear()  # the canvas holds one prompt, whatever the model was trained with
    class_scores(model, pairs, [5], image[None], replace(options, mode="canvas"))
    assert len(asked) == 2


# -------------------------------------------------------------------------------------------------
# A second look


def three_classes():
    """One of middle size, one that is tiny, and one that spans the picture."""
    label = np.zeros((128, 128), int)
    label[20:36, 30:50], label[80:90, 90:94], label[110:, :] = 5, 7, 9
    return label


def test_a_second_look_from_near(echo, monkeypatch):
    """The same question is asked once more around a class that was seen; else nothing is.

    On the prompt's side around the prompt's class.
    """
    echo.meta = {"coloring": "binary"}
    asked = watch(monkeypatch, echo)
    image, label = np.random.default_rng(0).random((128, 128)), three_classes()
    assert np.array_equal(predict(echo, [(image, label)], image), label)
    assert len(asked) == 3 + 2  # classes looked at, and looked at again
    for (images, labels), value in zip(asked[3:], (5, 7)):
        centre, side = second_look.extent(label == value)
        side = max(0.25, second_look.MARGIN * side)
        here = second_look.window(centre, side, label.shape)
        near = at_side(image[here], 64, resize_images)
        assert torch.allclose(images[0, 0, 0], near, atol=1e-6)
        assert torch.equal(labels[0, 0, 0], at_side((label == value)[here], 64, resize_labels))
    for options, count in (({"looks": 1}, 3), ({"looks": 2}, 5), ({}, 5)):
        asked.clear()
        predict(echo, [(image, label)], image, **options)
        assert len(asked) == count
    monkeypatch.setattr(echo, "predict", lambda cache, x: torch.zeros_like(x))  # sees nothing
    asked.clear()
    assert not predict(echo, [(image, label)], image).any() and len(asked) == 3
    asked.clear()
    assert predict(echo, [(image, image)], image, looks=2).shape == image.shape
    assert len(asked) == 9  # an image is answered in windows, once


def test_a_second_look_of_a_model_of_random_colors(echo, checkpoint, monkeypatch):
    """First all classes in colors, then one by one in white."""
    asked = watch(monkeypatch, echo)
    image, label = np.random.default_rng(0).random((128, 128)), three_classes()
    for looks, count in ((2, 3), (None, 1), (1, 1)):
        echo.meta = {"coloring": "random"}
        asked.clear()
        assert np.array_equal(predict(echo, [(image, label)], image, looks=looks), label)
        assert len(asked) == count
        assert len(asked[0][1].unique()) == 4
        assert all(labels.unique().tolist() == [0, 1] for _, labels in asked[1:])
    model, sure = mvg.load(checkpoint), np.zeros((32, 32), np.float32)
    answer = predict(model, [(rand(32, 32), two_classes())], rand(32, 32), looks=2, confidence=sure)
    assert answer.dtype == np.uint8 and set(np.unique(answer)) <= {0, 1, 2}
    assert 1 / 3 - 1e-5 <= sure.min() and sure.max() <= 1 + 1e-5


def test_a_second_look_at_a_class_that_one_slice_lacks(echo):
    echo.meta = {"coloring": "binary"}
    stack, label = rand(3, 64, 64), np.zeros((3, 64, 64), int)
    label[:, 10:20, 10:20], label[1:, 40:50, 30:40] = 1, 2
    answer = predict(echo, [(stack, label)], stack)
    assert np.array_equal(answer[0], label[0]) and (answer[1:] == 1).any()
    assert np.array_equal(answer > 0, label > 0)


def asker(model, mode="ar"):
    """The plain question that `look_again` asks."""
    def ask(images, masks, image):
        return prediction.ask_for(model, images, masks, image[None], Options(mode))[0]

    return ask


def test_a_second_look_moves_what_the_first_one_saw(echo):
    """Two prompts of which one lacks the class, pictures of other shapes than the prompts', and a
    part that is as the second look says."""
    label, empty = np.zeros((100, 50), int), np.zeros((30, 40), int)
    label[10:20, 5:10] = 3
    prompts = [((y * 0.1).astype(np.float32), y) for y in (label, empty)]
    image, before = rand(60, 90), torch.zeros(60, 90)
    before[30:36, 45:54] = 1
    nothing = torch.zeros(60, 90)
    after = second_look.look_again(asker(echo), prompts, image, nothing, 3)
    assert not after.any()  # the class was not seen: there is no second look
    kept = before.clone()
    after = second_look.look_again(asker(echo), prompts, image, before, 3)
    assert torch.equal(before, kept)
    rows, columns = second_look.window((0.55, 0.55), 0.25, (60, 90))
    outside = torch.ones(60, 90, dtype=torch.bool)
    outside[rows, columns] = False
    assert after[outside].abs().max() == 0
    near = (label == 3)[second_look.window((0.15, 0.15), 0.25, (100, 50))]
    near = resize_images(at_side(near, 64, resize_labels)[None, None], (15, 22))[0, 0]
    old = before[rows, columns]
    expected = torch.maximum(old * 0, torch.lerp(old, near, second_look.WEIGHT))
    assert torch.allclose(after[rows, columns], expected, atol=1e-5)


def test_a_less_sure_second_look_lets_no_haze_through(echo, monkeypatch):
    """What the first look left below its threshold stays background, outside of the window, however
    faint the class is from near."""
    echo.meta = {"coloring": "binary"}
    label = np.zeros((64, 64), int)
    label[10:20, 10:20] = 5
    faint = iter((1.0, 0.4))

    def hazy(cache, x):
        k = next(faint)
        return cache.expand_as(x) * k + (cache == 0) * 0.5 * (k == 1)

    monkeypatch.setattr(echo, "predict", hazy)
    assert np.array_equal(predict(echo, [(label * 0.1, label)], label * 0.1) > 0, label > 0)


def test_outside_of_the_window_the_class_is_not(echo):
    """One far pixel of a hundred does not widen the window; with one look it would stay."""
    label = np.zeros((64, 64), int)
    label[10:20, 10:20] = 5
    image = (label * 0.1).astype(np.float32)
    stray = torch.zeros(64, 64)
    stray[10:20, 10:20], stray[60, 60] = 1, 1
    after = second_look.look_again(asker(echo), [(image, label)], np.zeros((64, 64), np.float32),
                                   stray, 5)
    assert after[60, 60] == 0 and after[12:18, 12:18].min() > 0.9


def test_parts_of_a_class_are_looked_at_one_by_one(echo, monkeypatch):
    """The largest `candidates` of them; a part that is not looked at is not."""
    asked = watch(monkeypatch, echo)
    label = np.zeros((64, 64), int)
    label[4:12, 4:12] = 5
    gray = torch.zeros(64, 64)
    for size, at in ((8, (4, 4)), (7, (50, 4)), (6, (4, 50)), (5, (50, 50))):
        gray[at[0]:at[0] + size, at[1]:at[1] + size] = 1
    after = second_look.look_again(asker(echo), [(rand(64, 64), label)], rand(64, 64), gray, 5, 3)
    assert len(asked) == 3
    assert after[50:, 50:].max() == 0 and gray[50:, 50:].max() == 1
    for y, x in ((7, 7), (53, 7), (6, 53)):
        assert after[y, x] > 0.9


def test_a_second_look_without_the_class_on_any_prompt(echo, monkeypatch):
    """eval.py's empty prompt: what a model sees all the same is not looked at again."""
    echo.meta = {"coloring": "binary"}
    seen = torch.zeros(1, 1, 64, 64)
    seen[..., 10:20, 10:20] = 1
    monkeypatch.setattr(echo, "predict", lambda cache, x: seen.expand_as(x).clone())
    options = Options().settled(echo, True)
    empty = np.zeros((64, 64), np.uint8)
    scores = class_scores(echo, [(rand(64, 64), empty)], [5], rand(1, 64, 64), options)
    assert torch.equal(scores[0].argmax(0), seen[0, 0].long())


# -------------------------------------------------------------------------------------------------
# Boxes

KNOWN = [(5, 8, 20, 30), (40, 30, 59, 47)]


@pytest.fixture
def detector():
    return fake(Echo, coloring="binary", boxes="filled")


def test_boxes_drawn_on_a_prompt_are_asked_for_as_a_mask(detector, monkeypatch):
    """The mask of the prompt's boxes goes in, and boxes around the answer's parts come out, drawn
    on the input; only for a model that was trained so."""
    image, other = rand(2, 64, 64) * np.float32(0.8)
    marked = boxes.draw(image, KNOWN)
    asked = watch(monkeypatch, detector)
    answer = predict(detector, [(image, marked)], other)
    read = boxes.read(marked, image)
    assert np.abs(np.subtract(sorted(read), KNOWN)).max() <= 1
    assert np.array_equal(asked[0][1][0, 0, 0], boxes.fill(read, (64, 64)))
    assert np.array_equal(answer, boxes.draw(other, read))
    prompts = [(np.stack([image, other]), np.stack([marked, other]))]
    stack = np.stack([other, other, image, image])
    answer, found = answer_stack(detector, prompts, stack, False)
    drawn = boxes.draw(other, read)  # the prompt's second slice has none
    assert np.array_equal(answer, [drawn, drawn, image, image])
    assert np.array_equal(predict(detector, prompts, stack), answer)
    assert [sorted(f) for f in found] == [sorted(read)] * 2 + [[], []]


def test_an_image_that_is_not_its_prompt_with_boxes_is_painted(detector):
    image, other = rand(2, 64, 64) * np.float32(0.8)
    marked = boxes.draw(image, KNOWN)
    assert detection_masks(detector, [(image[None], marked[None])], False) is not None
    assert detection_masks(detector, [(image[None], marked[None])], True) is None
    filled = np.where(boxes.fill(KNOWN, (64, 64)), 0, image)
    on_another = np.where(boxes.draw(image * 0, KNOWN), other, image)
    for label in (other, image, filled, on_another):
        prompts = [(image[None], label[None].astype(np.float32))]
        assert detection_masks(detector, prompts, False) is None
        answer = predict(detector, [(image, label.astype(np.float32))], other)
        assert np.abs(answer - label).max() < 1e-5  # painted: the echo's answer
    for meta in ({"coloring": "binary", "boxes": "lines"}, {"coloring": "binary"}):
        detector.meta = meta
        assert detection_masks(detector, [(image[None], marked[None])], False) is None
        assert np.abs(predict(detector, [(image, marked)], other) - marked).max() < 1e-5


def test_an_example_without_a_finding_beside_one_with_two(detector, monkeypatch):
    image, other = rand(2, 64, 64) * np.float32(0.8)
    asked = watch(monkeypatch, detector)
    prompts = [(other[None], other[None] + np.float32(1e-4)),
               (image[None], boxes.draw(image, KNOWN)[None])]
    _, found = answer_stack(detector, prompts, other[None], False)
    assert [bool(labels.sum() > 0) for _, labels in asked] == [True] and len(found[0]) == 2


def test_boxes_are_searched_for_once_on_every_slice_of_a_prompt(detector, monkeypatch):
    count, drawn = [], boxes.drawn
    monkeypatch.setattr(boxes, "drawn", lambda *rest: count.append(1) or drawn(*rest))
    image = rand(64, 64) * np.float32(0.8)
    images = np.stack([image, image])
    labels = np.stack([boxes.draw(image, KNOWN), image])
    predict(detector, [(images, labels)], rand(5, 64, 64))
    assert len(count) == 2


# -------------------------------------------------------------------------------------------------
# The source


@pytest.mark.parametrize("name", ("predict.py", "infer.py", "eval.py"))
def test_no_argument_is_passed_on_by_position(name):
    """No function takes `*how`, and no call hands a parameter on as `*how`: one parameter more
    would shift the others without a word."""
    tree = ast.parse((ROOT / name).read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    assert len(functions) > 5
    for function in functions:
        taken = function.args
        where = f"{name}:{function.lineno}"
        assert taken.vararg is None, where
        parameters = {a.arg for a in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            for argument in call.args:
                starred = isinstance(argument, ast.Starred) and isinstance(argument.value, ast.Name)
                assert not starred or argument.value.id not in {*parameters, "how"}, where


def test_a_slice_matches_by_its_relative_place():
    assert [data.matching_slice(k, 4, 10) for k in range(4)] == [0, 2, 5, 7]
    assert [data.matching_slice(k, 10, 4) for k in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
