"""The metrics against hand-computed cases and slow, plain implementations."""

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.spatial.distance
import skimage.metrics
import torch

import boxes
import data
import eval as evaluation
import infer
import mvg
import train
import unet
from conftest import ROOT
from test_train import SMALL, failure


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


def test_metrics_agree_with_scikit_image_and_scipy():
    rng = np.random.default_rng(1)
    maps = [rng.integers(0, 4, (5, 17, 23)) for _ in range(2)] + [np.zeros((5, 17, 23), int) for _ in range(3)]
    maps[2][2, 8, 8] = 1           # one voxel
    maps[3][:, 0, :] = 2           # at the border
    for truth in maps:             # the last one is empty
        for guess in maps:
            found = evaluation.overlap(guess, truth, range(1, 4))
            for c in range(1, 4):
                a, b = (guess == c).ravel(), (truth == c).ravel()
                if not (a | b).any():
                    assert c not in found
                    continue
                theirs = 1 - scipy.spatial.distance.jaccard(a, b), 1 - scipy.spatial.distance.dice(a, b)
                assert found[c] == pytest.approx(theirs, abs=1e-6)
    for _ in range(5):
        truth, guess = rng.random((2, 40, 31)).astype(np.float32)
        theirs = (np.abs(truth - guess).mean(), skimage.metrics.peak_signal_noise_ratio(truth.astype(float), guess.astype(float), data_range=1),
                  skimage.metrics.structural_similarity(truth.astype(float), guess.astype(float), data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False))
        assert evaluation.image_scores(guess, truth) == pytest.approx(theirs, abs=1e-6)


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
    known = [(20, 30, 60, 90), (100, 20, 180, 60), (90, 110, 130, 150)]
    painted = boxes.draw(image, known)
    assert np.array_equal(painted[22:59, 32:89], image[22:59, 32:89]) and (painted[20:61, 30:32] == 1).all() and (painted != image).sum() == 2 * 2 * (41 + 57 + 81 + 37 + 41 + 37)
    read = boxes.read(painted, image)
    assert len(read) == 3 and np.abs(np.subtract(sorted(read), sorted(known))).max() <= 1  # to a pixel
    assert evaluation.box_scores(read, known)[1:] == (1, 0)
    assert boxes.read(image, image) == []
    faint = boxes.read(image + 0.3 * (painted - image), image)
    assert evaluation.box_scores(faint, known)[0] > 0.9
    assert np.array_equal(boxes.draw(image, [(5, 5, 6, 7)])[5:7, 5:8], np.ones((2, 3)))  # all line


def test_boxes_that_overlap_are_blurred_or_cross_bone_are_read():
    """Each of what a real answer is: two boxes that share lines, an answer painted at half the size, lines over what is white already."""
    image = np.full((144, 144), 0.5, np.float32)
    image[60:100, 40:70] = 1
    for known in ([(20, 20, 50, 60), (35, 50, 80, 90)], [(20, 20, 50, 60), (34, 59, 64, 99)], [(50, 55, 90, 100)]):
        painted = boxes.draw(image, known)
        blurred = image + data.resize_images(data.resize_images(torch.from_numpy(painted - image)[None], (72, 72)), (144, 144))[0].numpy()
        for answer, least in ((painted, 0.9), (blurred, 0.85)):
            assert evaluation.box_scores(boxes.read(answer, image), known)[0] > least


def test_what_is_drawn_in_white_on_an_image_and_what_is_not():
    rng = np.random.default_rng(0)
    image = (rng.random((128, 128)) * 0.7).astype(np.float32)
    known = [(20, 30, 60, 90), (80, 20, 119, 50)]
    painted = boxes.draw(image, known)
    assert sorted(boxes.drawn(painted, image)) == known
    assert np.array_equal(boxes.fill(boxes.drawn(boxes.draw(image, known, 5), image), image.shape), boxes.fill(known, image.shape))  # thick lines may be read twice
    assert len(boxes.drawn((painted + rng.normal(0, 0.02, painted.shape)).clip(0, 1).astype(np.float32), image)) == 2  # as a JPEG is
    image, known = image[:44, :40], [(3, 5, 20, 30)]
    assert len(boxes.drawn(boxes.draw(image, known), image)) == 1
    y, x = np.mgrid[:44, :40] - 20
    far = np.hypot(y, x)
    for other in (image, np.maximum(image, far < 8), np.maximum(image, (far < 12) & (far > 9)), 1 - image, image * 0,
                  np.where(boxes.fill(known, image.shape), image, 0), np.maximum(image, rng.random(image.shape) > 0.97), image[::-1]):
        assert boxes.drawn(other.astype(np.float32), image) == []


def test_boxes_around_the_parts_of_a_mask():
    known = [(3, 4, 12, 19), (20, 5, 29, 14), (0, 24, 2, 31)]
    mask = boxes.fill(known, (30, 32))
    assert mask.sum() == 160 + 100 + 24 and boxes.around(mask) == known  # largest first
    mask[15, 28] = 1  # a speck
    assert boxes.around(mask) == known and boxes.around(mask, 0) == [*known, (15, 28, 15, 28)]
    mask[13, 20] = 1  # touches the first at its corner
    assert boxes.around(mask)[0] == (3, 4, 13, 20)
    snake = np.zeros((41, 41), bool)
    snake[::4], snake[:, ::40] = True, False
    snake[1::8, 39], snake[2::8, 39], snake[3::8, 39], snake[5::8, 1], snake[6::8, 1], snake[7::8, 1] = (True,) * 6
    assert boxes.around(snake) == [(0, 1, 40, 39)]  # one winding part
    assert boxes.around(np.zeros((4, 4))) == []
    large = np.zeros((1500, 2000), bool)
    large[303:901, 1200:1777] = large[303:901, 0:595] = True
    assert boxes.around(large) == [(303, 0, 900, 594), (303, 1200, 900, 1776)]


def test_box_scores_by_hand():
    assert evaluation.box_iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1 and evaluation.box_iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert evaluation.box_iou((0, 0, 9, 9), (0, 5, 9, 14)) == pytest.approx(50 / 150)
    truth, read = [(0, 0, 9, 9), (50, 50, 59, 59)], [(0, 0, 9, 4), (0, 0, 9, 9), (80, 80, 90, 90)]
    assert evaluation.box_scores(read, truth) == (0.5, 0.5, 1)
    assert evaluation.box_scores([], truth) == (0, 0, 0)


def results(folder):
    return json.loads((folder / "results.json").read_text())["datasets"]


def test_results(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "2"]
    evaluation.main([*argv, "--out", str(tmp_path / "a")])
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval.py", *argv, "--device", "cpu", "--out", str(tmp_path / "b")],
                   cwd=ROOT, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    a = results(tmp_path / "a")
    assert a == results(tmp_path / "b")  # the same seed, the same table, by however many processes
    assert a["acdc"]["cases"] == 2 and 0 <= a["acdc"]["mIoU"] <= 1 and set(a["acdc"]["per_class"]) <= set(data.DATASETS["acdc"].labels)
    assert {"MAE", "PSNR", "SSIM"} < set(a["Dataset802_MsT1ToFlair"])
    rows = list(csv.DictReader(open(tmp_path / "a" / "cases.csv")))
    atria = [float(r["IoU"]) for r in rows if r["dataset"] == "la" and r["kind"] == "prediction"]
    assert np.mean(atria) == pytest.approx(a["la"]["mIoU"])
    for name in ("examples.png", "scores.png", "examples/la.png"):
        assert (tmp_path / "a" / name).stat().st_size > 1000
    two, three = (tmp_path / "a" / "tables.md").read_text().split("Table 2")[1].split("Table 3")
    ours = [l for l in (two + three).splitlines() if str(checkpoint) in l]
    assert f"| {a['acdc']['mIoU']:.2f} | {a['la']['mIoU']:.2f} |" in ours[0] and not ours[1].split("|", 2)[2].strip(" |")  # the stand-ins have no part in Table 3


def test_the_papers_rows_add_up():
    """As the paper states them: 0.79 on average, 0.93 of its U-Net, 0.35 above UniverSeg, 0.735 on the abdomen."""
    row = {n: np.array(v.split(), float) for n, v in evaluation.PAPER_2.items()}
    assert all(len(v) == 9 for v in row.values()) and all(len(v.split()) == 9 for v in evaluation.PAPER_3.values())
    assert row["MVG"].mean() == pytest.approx(0.79, abs=0.005) and (row["MVG"] / row["UNet"]).mean() == pytest.approx(0.93, abs=0.01)
    assert (row["MVG"] - row["UniverSeg*"]).mean() == pytest.approx(0.35, abs=0.01) and row["MVG"][:4].mean() == pytest.approx(0.735)


def test_a_stopped_evaluation_goes_on_and_a_bad_case_is_named(store, checkpoint, tmp_path, monkeypatch, capsys):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--datasets", "acdc", "la", "--out", str(tmp_path / "e")]
    whole, asked, answer = evaluation.main(argv), [], evaluation.answer_case
    lines = (tmp_path / "e" / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "e" / "scores.jsonl").write_text("".join(lines[:3]) + lines[3][:40])  # stopped in the middle of a line
    victim = json.loads(lines[-1])["case"]

    def spoilt(model, case, *rest, **more):
        asked.append(case.name)
        if case.name == victim and len(asked) < len(lines):
            raise ValueError("no\nsense")
        return answer(model, case, *rest, **more)

    monkeypatch.setattr(evaluation, "answer_case", spoilt)
    part = evaluation.main(argv)
    said = capsys.readouterr().out
    scored_again = asked[:len(lines) - 3]
    assert not {json.loads(l)["case"] for l in lines[1:3]} & set(scored_again) and f"2 of {len(lines) - 1} cases were scored before" in said
    assert f"{victim} could not be scored: ValueError: no sense" in said and "1 cases could not be scored" in said
    assert sum(r["failed"] for r in part.values()) == 1 and part != whole
    monkeypatch.setattr(evaluation, "answer_case", answer)
    assert evaluation.main(argv) == whole  # what failed is tried again
    evaluation.main([*argv, "--seed", "1", "--max_cases", "1"])  # other settings begin anew
    assert len((tmp_path / "e" / "scores.jsonl").read_text().splitlines()) == 3


def test_wrong_prompts(store, checkpoint, tmp_path, monkeypatch, capsys):
    """A model that copies its prompt's label falls with every wrong prompt; one that does not look at it is called so."""
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--wrong_prompt", "--max_cases", "2"]
    shown = {}
    answer_case = evaluation.answer_case

    def truthful(model, case, training, dataset, *rest, **more):
        shown.update(truth=evaluation.read_slices(case, case.foreground)[1], asked=0)
        return answer_case(model, case, training, dataset, *rest, **more)

    def echo(model, prompts, stack, segmentation, *rest, **more):  # the first question has the right prompt: answer it as one should
        shown["asked"] += 1
        if shown["asked"] == 1 or always:
            return shown["truth"].astype(prompts[0][1].dtype)
        return np.zeros(stack.shape, prompts[0][1].dtype)

    monkeypatch.setattr(evaluation, "answer_case", truthful)
    monkeypatch.setattr(infer, "predict_stack", echo)
    always = False
    falls = evaluation.main([*argv, "--out", str(tmp_path / "a")])
    assert set(evaluation.WRONG) < set(falls["acdc"]) and "other_class" not in falls["la"] and "empty" in falls["Dataset802_MsT1ToFlair"]
    assert falls["acdc"]["mIoU"] == 1 and falls["acdc"]["other_class"]["mIoU"] == 0 and not any(r["ignored"] for r in falls.values())
    capsys.readouterr()
    always = True
    stays = evaluation.main([*argv, "--out", str(tmp_path / "b")])
    assert stays["la"]["ignored"] == ["other_dataset"] and stays["acdc"]["ignored"] == ["other_class", "other_dataset"]
    assert "la: the score does not fall with a prompt that is wrong (other dataset)" in capsys.readouterr().out


def test_options_of_inference_are_passed_on(store, checkpoint, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(infer, "predict_stack", lambda model, prompts, stack, *rest, **how: asked.append(how) or np.zeros(stack.shape, np.uint8))
    evaluation.main(["--store", str(store.root), "--checkpoint", str(checkpoint), "--datasets", "la", "--max_cases", "1", "--out", str(tmp_path), "--votes", "3", "--mode", "canvas",
                     "--neighbours", "2", "--tile", "--propagate"])
    assert asked[0].items() >= dict(votes=3, mode="canvas", neighbours=2, tile=True, propagate=True).items()


def test_several_prompts_are_of_other_patients(store, checkpoint, monkeypatch):
    seen, model = [], mvg.load(checkpoint)
    monkeypatch.setattr(infer, "predict_stack", lambda model, prompts, stack, *rest, **how: seen.append(prompts) or np.zeros(stack.shape, np.uint8))
    dataset, training, case = store.datasets["acdc"], store.split("acdc", "train"), store.split("acdc", "test")[0]
    one, three = (evaluation.answer_case(model, case, training, dataset, "foreground", 0, prompts=n)["prompt"].split() for n in (1, 3))
    assert len(seen[0]) == 1 and len(seen[1]) == 3 and one == three[:1]
    assert len({c.patient for c in training if c.name in three} - {case.patient}) == 3
    assert len(evaluation.answer_case(model, case, training[:1], dataset, "foreground", 0, prompts=3)["prompt"].split()) == 1  # no more there


def test_finished_runs_side_by_side(tmp_path, capsys):
    def write(name, share, **scores):
        found = {d: {"mIoU": v, "interval": {"mIoU": None}} for d, v in scores.items()}
        (tmp_path / name / "eval").mkdir(parents=True)
        data.write_json(tmp_path / name / "eval" / "results.json", {"datasets": found, "training": {"data_fraction": share, "coloring": "random", "out": name}})
    write("a", 1.0, acdc=0.5, la=0.7)
    write("b", 0.1, acdc=0.4)
    write("c", 0.1, la=0.6)
    evaluation.main(["--compare", f"all={tmp_path / 'a'}", f"few={tmp_path / 'b'},{tmp_path / 'c'}", "--out", str(tmp_path / "t")])
    said = capsys.readouterr().out
    assert "| acdc | mIoU | 0.500 | 0.400 |" in said and "| mean of 2 | mIoU | 0.600 | 0.500 |" in said
    assert "| data_fraction | setting | 1.0 | 0.1 |" in said and "coloring" not in said and (tmp_path / "t" / "data.png").stat().st_size > 1000
    assert "no results.json" in failure(capsys, evaluation.main, "--compare", tmp_path / "nowhere")
    assert "acdc twice" in failure(capsys, evaluation.main, "--compare", f"x={tmp_path / 'a'},{tmp_path / 'b'}")


def test_the_u_net_learns_and_is_scored_by_the_same_programs(store, tmp_path, capsys):
    """Segmentation and regression; resumed bit for bit; two tasks at once are refused."""
    argv = ["--store", str(store.root), *SMALL, "--model", "unet", "--batch_size", "8"]
    for name, steps in (("la", 60), ("Dataset802_MsT1ToFlair", 60)):
        out = tmp_path / name
        train.main([*argv, "--datasets", name, "--steps", str(steps), "--stop_at", str(steps // 2), "--lr", "3e-3", "--out", str(out)])
        model = train.main(["--resume", str(out / "last.pt")])
        scores = evaluation.main(["--store", str(store.root), "--datasets", name, "--checkpoint", str(out / "last.pt")])[name]
        metric = "mIoU" if name == "la" else "PSNR"
        print(name, scores[metric], scores["copy"][metric])
        assert isinstance(model, unet.UNet) and scores[metric] > scores["copy"][metric] and (out / "samples.png").stat().st_size > 500
    whole = train.main([*argv, "--datasets", "la", "--steps", "4", "--out", str(tmp_path / "whole")])
    train.main([*argv, "--datasets", "la", "--steps", "4", "--stop_at", "2", "--out", str(tmp_path / "part")])
    part = train.main(["--resume", str(tmp_path / "part" / "last.pt")])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), part.state_dict().values()))
    assert "learns one task" in failure(capsys, train.main, *argv, "--out", tmp_path / "no")


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
            assert "filter" not in answer
        else:  # by numpy's least squares
            rows = lambda x: mvg.PromptFilter.basis(torch.from_numpy(x[None, :1]))[0].flatten(1).double().numpy().T
            weights = np.linalg.lstsq(rows(answer["prompt_images"]), answer["prompt_labels"][0].flatten(), rcond=None)[0]
            assert np.allclose(answer["filter"][0].flatten(), (rows(answer["images"]) @ weights).clip(0, 1), atol=0.02)


def test_bad_input_gets_one_line(store, checkpoint, tmp_path, capsys):
    for argv, words in ((["--checkpoint", tmp_path / "no.pt"], "no.pt"), (["--checkpoint", checkpoint, "--datasets", "lla"], "did you mean la"),
                        (["--checkpoint", checkpoint, "--device", "cuda:9"], "cuda:9")):
        assert words in failure(capsys, evaluation.main, "--store", store.root, "--out", tmp_path / "e", *argv)
