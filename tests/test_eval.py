"""The metrics against hand-computed cases and slow, plain implementations."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import infer
import mvg
from test_train import failure


def test_overlap_by_hand():
    truth = np.array([[0, 1, 1, 1], [0, 0, 2, 2]])
    guess = np.array([[0, 1, 1, 0], [1, 0, 2, 2]])
    scores = evaluation.overlap(guess, truth, (1, 2, 3))
    assert scores == {1: (2 / 4, 4 / 6), 2: (1.0, 1.0)}  # 3 is in neither and does not count
    assert evaluation.overlap(truth * 0, truth, (1, 2)) == {1: (0.0, 0.0), 2: (0.0, 0.0)}
    assert evaluation.overlap(truth, truth * 0, (1,)) == {1: (0.0, 0.0)}  # present in the prediction only: wrong, not skipped


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
            va, vb, vab = (g * (a - ma) ** 2).sum(), (g * (b - mb) ** 2).sum(), (g * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma ** 2 + mb ** 2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_ssim_against_a_plain_implementation():
    rng = np.random.default_rng(0)
    x = rng.random((20, 27))
    for y in (rng.random((20, 27)), np.clip(x + 0.1 * rng.normal(size=x.shape), 0, 1), x * 0.5, np.zeros_like(x)):
        assert evaluation.ssim(x, y) == pytest.approx(plain_ssim(x, y), abs=1e-9)
    assert evaluation.ssim(x, x) == pytest.approx(1)
    assert math.isnan(evaluation.ssim(x[:8], x[:8]))
    valid = np.zeros(x.shape, bool)
    valid[5, 5] = True  # one valid pixel: the window around it
    assert evaluation.ssim(x, x ** 2, valid) == pytest.approx(plain_ssim(x[:11, :11], x[:11, :11] ** 2), abs=1e-9)


def test_image_scores_by_hand():
    truth, guess = np.zeros((12, 12)), np.full((12, 12), 0.1)
    mae, psnr, _ = evaluation.image_scores(guess, truth)
    assert mae == pytest.approx(0.1) and psnr == pytest.approx(20)
    assert evaluation.image_scores(truth, truth) == (0, evaluation.MAX_PSNR, pytest.approx(1))
    valid = np.zeros((12, 12), bool)
    valid[:6] = True
    guess[6:] = 0.9  # outside: never scored
    assert evaluation.image_scores(guess, truth, valid)[:2] == (pytest.approx(0.1), pytest.approx(20))
    assert all(math.isnan(v) for v in evaluation.image_scores(guess, truth, ~valid & valid))


def test_means_are_over_classes_then_cases():
    dataset = data.Dataset("x", "", "", "ct", "segmentation", ("liver", "spleen"))
    scores = [{"liver": (1.0, 1.0), "spleen": (0.0, 0.0)}, {"liver": (0.5, 2 / 3)}]
    s = evaluation.summary(scores, ["a", "b"], dataset)
    assert s["mIoU"] == pytest.approx(0.5) and s["Dice"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert s["per_class"]["liver"] == {"IoU": 0.75, "Dice": pytest.approx(5 / 6), "cases": 2} and s["per_class"]["spleen"]["cases"] == 1


def test_intervals_are_over_patients():
    assert evaluation.interval([0.5] * 4, list("abcd")) == [0.5, 0.5]
    assert evaluation.interval([0.1, 0.9], ["a", "a"]) is None  # one patient tells nothing of others
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, 400)
    low, high = evaluation.interval(values, range(400))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.002) and high == pytest.approx(values.mean() + error, abs=0.002)
    twice = evaluation.interval(np.repeat(values, 2), np.repeat(np.arange(400), 2))  # repeating patients adds no certainty
    assert twice == pytest.approx([low, high], abs=0.002)
    assert evaluation.interval([*values, float("nan")], range(401)) == pytest.approx([low, high], abs=0.003)


def test_boxes_are_read_as_they_were_drawn():
    rng = np.random.default_rng(0)
    image = (0.5 + 0.1 * rng.standard_normal((200, 160))).clip(0, 1).astype(np.float32)
    painted, boxes = image.copy(), [(20, 30, 60, 90), (100, 20, 180, 60), (90, 110, 130, 150)]
    for top, left, bottom, right in boxes:
        painted[top:bottom + 1, left:right + 1] = np.where(np.pad(np.zeros((bottom - top - 3, right - left - 3), bool), 2, constant_values=True),
                                                           1, painted[top:bottom + 1, left:right + 1])
    read = evaluation.read_boxes(painted, image)
    assert len(read) == 3 and np.abs(np.subtract(sorted(read), sorted(boxes))).max() <= 1  # to a pixel
    assert evaluation.box_scores(read, boxes)[1:] == (1, 0)
    assert evaluation.read_boxes(image, image) == []
    faint = evaluation.read_boxes(image + 0.3 * (painted - image), image)
    assert evaluation.box_scores(faint, boxes)[0] > 0.9


def test_box_scores_by_hand():
    assert evaluation.box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1 and evaluation.box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert evaluation.box_iou((0, 0, 9, 9), (0, 5, 9, 14)) == pytest.approx(50 / 150)
    truth, read = [(0, 0, 9, 9), (50, 50, 59, 59)], [(0, 0, 9, 4), (0, 0, 9, 9), (80, 80, 90, 90)]
    assert evaluation.box_scores(read, truth) == (0.5, 0.5, 1)
    assert evaluation.box_scores([], truth) == (0, 0, 0)


def test_results(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "2"]
    evaluation.main([*argv, "--out", str(tmp_path / "a")])
    evaluation.main([*argv, "--out", str(tmp_path / "b")])
    a, b = (json.loads((tmp_path / n / "results.json").read_text())["datasets"] for n in "ab")
    assert a == b  # the same seed, the same table
    assert a["acdc"]["cases"] == 2 and 0 <= a["acdc"]["mIoU"] <= 1 and set(a["acdc"]["per_class"]) <= set(data.DATASETS["acdc"].labels)
    assert {"MAE", "PSNR", "SSIM"} < set(a["Dataset802_MsT1ToFlair"])
    rows = list(csv.DictReader(open(tmp_path / "a" / "cases.csv")))
    liver = [float(r["IoU or MAE"]) for r in rows if r["dataset"] == "la"]
    assert np.mean(liver) == pytest.approx(a["la"]["mIoU"])
    assert (tmp_path / "a" / "examples.png").stat().st_size > 1000


def test_a_perfect_prediction_is_perfect_and_a_copied_prompt_scores_as_copying(store, checkpoint, tmp_path, monkeypatch):
    model = mvg.load(checkpoint)
    for name in ("acdc", "Dataset802_MsT1ToFlair"):
        dataset, training = store.datasets[name], store.split(name, "train")
        case = store.split(name, "test")[0]
        answer = evaluation.answer_case(model, case, training, dataset, "foreground", 0)
        perfect = evaluation.summary([evaluation.score(answer["truth"], answer, dataset)], ["a"], dataset)
        assert (perfect["mIoU"], perfect["Dice"]) == (1, 1) if dataset.colored else (perfect["MAE"], perfect["PSNR"]) == (0, evaluation.MAX_PSNR)
        if dataset.colored:
            assert all(c.patient != case.patient for c in training if c.name == answer["prompt"])
            by_hand = [((answer["copy"] == c) & (answer["truth"] == c)).sum() / ((answer["copy"] == c) | (answer["truth"] == c)).sum() for c in (1, 2, 3)]
            assert evaluation.summary([evaluation.score(answer["copy"], answer, dataset)], ["a"], dataset)["mIoU"] == pytest.approx(np.mean(by_hand))


def test_bad_input_gets_one_line(store, checkpoint, tmp_path, capsys):
    for argv, words in ((["--checkpoint", tmp_path / "no.pt"], "no.pt"), (["--checkpoint", checkpoint, "--datasets", "lla"], "did you mean la"),
                        (["--checkpoint", checkpoint, "--device", "cuda:9"], "cuda:9")):
        assert words in failure(capsys, evaluation.main, "--store", store.root, "--out", tmp_path / "e", *argv)
