"""The metrics against hand-computed cases, slow plain implementations, and two libraries."""

import math

import numpy as np
import pytest
import scipy.spatial.distance
import skimage.metrics

import metrics
from scans.datasets import Dataset


def test_overlap_by_hand():
    truth = np.array([[0, 1, 1, 1], [0, 0, 2, 2]])
    guess = np.array([[0, 1, 1, 0], [1, 0, 2, 2]])
    scores = metrics.overlap(guess, truth, (1, 2, 3))
    assert scores == {1: (2 / 4, 4 / 6), 2: (1.0, 1.0)}  # 3 is in neither and does not count
    assert metrics.overlap(truth * 0, truth, (1, 2)) == {1: (0.0, 0.0), 2: (0.0, 0.0)}
    # present in the prediction only: wrong, not skipped
    assert metrics.overlap(truth, truth * 0, (1,)) == {1: (0.0, 0.0)}


def plain_ssim(x, y):
    """SSIM window by window, as the paper of the metric writes it."""
    ax = np.arange(11) - 5
    g = np.exp(-(ax[:, None] ** 2 + ax ** 2) / (2 * 1.5 ** 2))
    g /= g.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (g * a).sum(), (g * b).sum()
            va, vb = (g * (a - ma) ** 2).sum(), (g * (b - mb) ** 2).sum()
            vab = (g * (a - ma) * (b - mb)).sum()
            above = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4)
            values.append(above / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_ssim_against_a_plain_implementation():
    rng = np.random.default_rng(0)
    x = rng.random((20, 27))
    noisy = np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1)
    for y in (rng.random((20, 27)), noisy, x * 0.5, np.zeros_like(x)):
        assert metrics.ssim(x, y) == pytest.approx(plain_ssim(x, y), abs=1e-9)
    assert metrics.ssim(x, x) == pytest.approx(1)
    assert math.isnan(metrics.ssim(x[:8], x[:8]))
    valid = np.zeros(x.shape, bool)
    valid[5, 5] = True  # one valid pixel: the window around it
    first = plain_ssim(x[:11, :11], x[:11, :11] ** 2)
    assert metrics.ssim(x, x ** 2, valid) == pytest.approx(first, abs=1e-9)


def test_overlap_agrees_with_scipy():
    rng = np.random.default_rng(1)
    maps = [rng.integers(0, 4, (5, 17, 23)) for _ in range(2)]
    maps += [np.zeros((5, 17, 23), int) for _ in range(3)]
    maps[2][2, 8, 8] = 1           # one voxel
    maps[3][:, 0, :] = 2           # at the border
    for truth in maps:             # the last one is empty
        for guess in maps:
            found = metrics.overlap(guess, truth, range(1, 4))
            for c in range(1, 4):
                a, b = (guess == c).ravel(), (truth == c).ravel()
                if not (a | b).any():
                    assert c not in found
                    continue
                theirs = (1 - scipy.spatial.distance.jaccard(a, b),
                          1 - scipy.spatial.distance.dice(a, b))
                assert found[c] == pytest.approx(theirs, abs=1e-6)


def test_image_scores_agree_with_scikit_image():
    rng = np.random.default_rng(1)
    for _ in range(5):
        truth, guess = rng.random((2, 40, 31)).astype(np.float32)
        a, b = truth.astype(float), guess.astype(float)
        psnr = skimage.metrics.peak_signal_noise_ratio(a, b, data_range=1)
        ssim = skimage.metrics.structural_similarity(
            a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        theirs = np.abs(truth - guess).mean(), psnr, ssim
        assert metrics.image_scores(guess, truth) == pytest.approx(theirs, abs=1e-6)


def test_image_scores_by_hand():
    truth, guess = np.zeros((12, 12)), np.full((12, 12), 0.1)
    mae, psnr, _ = metrics.image_scores(guess, truth)
    assert mae == pytest.approx(0.1) and psnr == pytest.approx(20)
    assert metrics.image_scores(truth, truth) == (0, metrics.MAX_PSNR, pytest.approx(1))
    valid = np.zeros((12, 12), bool)
    valid[:6] = True
    guess[6:] = 0.9  # outside: never scored
    scores = metrics.image_scores(guess, truth, valid)
    assert scores[:2] == (pytest.approx(0.1), pytest.approx(20))
    assert all(math.isnan(v) for v in metrics.image_scores(guess, truth, ~valid & valid))


def test_change_is_scored_apart_by_hand_and_as_scikit_image_does():
    """A hole of ones in zeros: 0.1 away inside, 0.01 outside, where the input is 0.02 away."""
    truth, image, guess = np.zeros((12, 12)), np.full((12, 12), 0.02), np.full((12, 12), 0.01)
    truth[:3], guess[:3] = 1, 0.9
    assert metrics.change_scores(guess, truth, image) == pytest.approx((20, 40))
    assert metrics.change_scores(truth, truth, image) == (metrics.MAX_PSNR, metrics.MAX_PSNR)
    known = np.ones((12, 12), bool)
    known[0], known[6:] = False, False
    spoiled = np.where(known, guess, 0.5)
    assert metrics.change_scores(spoiled, truth, image, known) == pytest.approx((20, 40))
    inside, outside = metrics.change_scores(guess, truth, truth)  # nothing changes
    assert math.isnan(inside) and outside == metrics.image_scores(guess, truth)[1]
    rng = np.random.default_rng(1)
    truth, image, guess = rng.random((3, 40, 31)).astype(np.float32)
    changes = np.abs(truth - image) > metrics.CHANGE
    theirs = [skimage.metrics.peak_signal_noise_ratio(truth[part], guess[part], data_range=1)
              for part in (changes, ~changes)]
    assert metrics.change_scores(guess, truth, image) == pytest.approx(theirs, abs=1e-4)


def test_box_scores_by_hand():
    assert metrics.box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert metrics.box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert metrics.box_iou((0, 0, 9, 9), (0, 5, 9, 14)) == pytest.approx(50 / 150)
    truth = [(0, 0, 9, 9), (50, 50, 59, 59)]
    read = [(0, 0, 9, 4), (0, 0, 9, 9), (80, 80, 90, 90)]
    assert metrics.box_scores(read, truth) == (0.5, 0.5, 1)
    assert metrics.box_scores([], truth) == (0, 0, 0)


def test_false_alarms_by_hand():
    truth, prediction = np.zeros((4, 2, 5), int), np.zeros((4, 2, 5), int)
    truth[0, 0, :3] = 1           # class 1 is on slice 0 alone, class 2 on none, class 3 on all
    truth[:, 1, 4] = 3
    prediction[0, 0] = 1          # no false alarm: the slice shows the class
    prediction[2, 0, :2] = 1      # 2 of 30 pixels on slices 1, 2, 3
    prediction[3, 1] = 2          # 5 of 40 pixels
    found = metrics.false_alarms(prediction, truth, ("one", "two", "three"))
    assert found == {"one": pytest.approx(2 / 30), "two": pytest.approx(5 / 40)}


def test_the_mean_of_what_is_known():
    nan = float("nan")
    assert metrics.known_mean([1, nan, 2]) == 1.5 and math.isnan(metrics.known_mean([nan]))
    assert math.isnan(metrics.known_mean([]))


# -------------------------------------------------------------------------------------------------
# All cases of a dataset

ORGANS = Dataset("x", "", "", "ct", "segmentation", ("liver", "spleen"))
IMAGES = Dataset("y", "", "", "mri", "synthesis", ())
LESIONS = Dataset("z", "", "", "ct", "detection", ())


def test_means_are_over_classes_then_cases():
    scores = [{"liver": (1.0, 1.0), "spleen": (0.0, 0.0)}, {"liver": (0.5, 2 / 3)}]
    s = metrics.summary(scores, ["a", "b"], ORGANS)
    assert s["mIoU"] == pytest.approx(0.5) and s["Dice"] == pytest.approx((0.5 + 2 / 3) / 2)
    liver = {"IoU": 0.75, "Dice": pytest.approx(5 / 6), "cases": 2}
    assert s["per_class"]["liver"] == liver and s["per_class"]["spleen"]["cases"] == 1


def test_the_values_of_one_case():
    scores = {"liver": (1.0, 1.0), "spleen": (0.0, 0.5)}
    assert metrics.case_values(scores, ORGANS) == {"mIoU": 0.5, "Dice": 0.75}
    image = {"image": (0.1, 20.0, 0.9)}
    values = {"MAE": 0.1, "PSNR": 20.0, "SSIM": 0.9}
    assert metrics.case_values(image, IMAGES) == values
    boxes = {"box_IoU": 0.5, "hit_rate": 1.0, "false_boxes": 2.0}
    assert metrics.case_values({**image, "boxes": (0.5, 1.0, 2.0)}, LESIONS) == values | boxes
    assert metrics.case_values({}, ORGANS) == metrics.case_values(None, IMAGES) == {}
    mains = [metrics.main_metric(d) for d in (ORGANS, IMAGES, LESIONS)]
    assert mains == ["mIoU", "PSNR", "box_IoU"]


def test_what_is_not_known_is_left_out_of_a_mean():
    nan = float("nan")
    scores = [{"image": (0.1, 20.0, nan)}, {"image": (0.3, 10.0, 0.5)}, {}]
    s = metrics.summary(scores, ["a", "b", "c"], IMAGES)
    assert s["MAE"] == pytest.approx(0.2) and s["PSNR"] == 15 and s["SSIM"] == 0.5
    assert s["interval"]["SSIM"] is None and "per_class" not in s
    nothing = metrics.summary([{"image": (nan, nan, nan)}], ["a"], IMAGES)
    assert nothing["PSNR"] is None and nothing["interval"]["PSNR"] is None


def test_intervals_are_over_patients():
    assert metrics.interval([0.5] * 4, list("abcd")) == [0.5, 0.5]
    # one patient tells nothing of others
    assert metrics.interval([0.1, 0.9], ["a", "a"]) is None
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = metrics.interval(values, range(400))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.002)
    assert high == pytest.approx(values.mean() + error, abs=0.002)
    # repeating patients adds no certainty
    twice = metrics.interval(np.repeat(values, 2), np.repeat(np.arange(400), 2))
    assert twice == pytest.approx([low, high], abs=0.002)
    unknown = metrics.interval([*values, float("nan")], range(401))
    assert unknown == pytest.approx([low, high], abs=0.003)


def line(case, patient, **scores):
    return {"case": case, "patient": patient,
            "scores": {kind: {"liver": (iou, iou)} for kind, iou in scores.items()}}


def test_a_dataset_is_tabulated_by_hand():
    lines = [line("1", "a", prediction=0.8, copy=0.2, other_dataset=0.1, empty=0.9),
             line("2", "a", prediction=0.6, copy=0.4, other_dataset=0.2, empty=0.5),
             line("3", "b", prediction=0.7, copy=0.3, other_dataset=0.3, empty=0.8),
             {"case": "4", "error": "no sense"}]
    result = metrics.tabulate(lines, ORGANS)
    assert (result["cases"], result["patients"], result["failed"]) == (3, 2, 1)
    assert result["task"] == "segmentation" and result["mIoU"] == pytest.approx(0.7)
    assert result["copy"]["mIoU"] == pytest.approx(0.3) and "filter" not in result
    assert [case for case, _ in result["ranked"]] == ["2", "3", "1"]
    assert result["no_cost"] == ["empty"]  # only this wrong prompt costs nothing; one was not tried
    assert result["per_class"]["liver"]["cases"] == 3
    alone = metrics.tabulate([line("1", "a", prediction=0.8, empty=0.8)], ORGANS)
    assert alone["no_cost"] == ["empty"] and alone["interval"]["mIoU"] is None
    failed = metrics.tabulate(lines[3:], ORGANS)
    assert failed["cases"] == 0 and failed["failed"] == 1 and failed["ranked"] == []
