"""The paper's protocol: cases and prompts, the ledger, results, wrong prompts, two processes."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import metrics
import mvg
import train
from baselines import linear_filter
from conftest import ROOT
from eval import Settings, answer_case, score
from fakes import Echo, failure, fake
from lab import unet
from predict import Options
from scans import boxes
from scans.datasets import DATASETS, Dataset
from scans.store import Store


def results(folder):
    return json.loads((folder / "results.json").read_text())["datasets"]


def a_case(store, name):
    """(dataset, training cases, a test case)"""
    return store.datasets[name], store.split(name, "train"), store.split(name, "test")[0]


# -------------------------------------------------------------------------------------------------
# One case


def test_a_perfect_prediction_is_perfect_and_a_copied_prompt_scores_as_copying(store, checkpoint):
    model = mvg.load(checkpoint)
    for name in ("acdc", "Dataset802_MsT1ToFlair"):
        dataset, training, case = a_case(store, name)
        answer = answer_case(model, case, training, dataset, Settings())
        answer.answers["truth"] = answer.truth
        perfect = metrics.summary([score("truth", answer, dataset)], ["a"], dataset)
        if not dataset.colored:
            assert (perfect["MAE"], perfect["PSNR"]) == (0, metrics.MAX_PSNR)
            first = linear_filter(*(a[0] for a in (answer.prompt_images, answer.prompt_labels,
                                                   answer.images)))
            assert np.array_equal(answer.answers["filter"][0], first)
            assert np.array_equal(answer.answers["copy"], answer.images)
            continue
        assert (perfect["mIoU"], perfect["Dice"]) == (1, 1) and "filter" not in answer.answers
        assert all(c.patient != case.patient for c in training if c.name == answer.prompt)
        by_hand = []
        for c in (1, 2, 3):
            a, b = answer.answers["copy"] == c, answer.truth == c
            by_hand.append((a & b).sum() / (a | b).sum())
        copied = metrics.summary([score("copy", answer, dataset)], ["a"], dataset)
        assert copied["mIoU"] == pytest.approx(np.mean(by_hand))


def test_the_prompt_of_a_case_is_drawn_from_its_name_and_the_seed(store, checkpoint):
    dataset, training, case = a_case(store, "acdc")
    model = fake(Echo, 32)

    def prompt(seed, cases=training):
        return answer_case(model, case, cases, dataset, Settings(seed=seed)).prompt

    assert len({prompt(0) for _ in range(3)}) == 1
    assert len({prompt(seed) for seed in range(10)}) > 2
    names = {c.name for c in training}
    assert {prompt(seed) for seed in range(10)} <= names - {case.name}


def watch_prompts(monkeypatch):
    """A list that grows by the prompts of every stack that is answered, with zeros."""
    seen = []

    def answer_stack(model, prompts, stack, *rest):
        seen.append(prompts)
        return np.zeros(stack.shape, np.uint8), np.ones(stack.shape)

    monkeypatch.setattr(evaluation, "answer_stack", answer_stack)
    return seen


def test_several_prompts_are_of_other_patients(store, checkpoint, monkeypatch):
    seen, model = watch_prompts(monkeypatch), mvg.load(checkpoint)
    dataset, training, case = a_case(store, "acdc")

    def prompts(count, cases=training):
        settings = Settings(prompts=count)
        return answer_case(model, case, cases, dataset, settings).prompt.split()

    one, three = prompts(1), prompts(3)
    assert len(seen[0]) == 1 and len(seen[1]) == 3 and one == three[:1]
    assert len({c.patient for c in training if c.name in three} - {case.patient}) == 3
    assert len(prompts(3, training[:1])) == 1  # no more there


def test_the_kept_slices_are_those_with_foreground_unless_all_are_asked_for(store, checkpoint):
    dataset, training, case = a_case(store, "acdc")
    model = fake(Echo, 32)
    some, every = (answer_case(model, case, training, dataset, Settings(slices=s))
                   for s in ("foreground", "all"))
    assert len(some.images) == len(case.foreground) <= len(every.images) == case.slices
    assert np.array_equal(every.truth[case.foreground], some.truth)
    assert some.truth.any(axis=(1, 2)).all()
    for answer in (some, every):
        assert {a.shape for a in answer.answers.values()} == {answer.images.shape}
        assert len(answer.prompt_images) == len(answer.prompt_labels) == len(answer.images)


def test_voxels_without_a_truth_are_not_scored():
    truth = np.array([[[0, 1, 1, 0]]])
    valid = np.array([[[True, True, True, False]]])
    answer = evaluation.Answer(truth * 0.0, truth, valid, "", None, None, [])
    answer.answers["prediction"] = np.array([[[0, 1, 0, 1]]])  # the last pixel does not count
    assert score("prediction", answer, Dataset("x", "", "", "mri", "segmentation", ("a",))) == \
        {"a": (0.5, 2 / 3)}


def test_boxes_of_a_case_are_scored_as_masks_or_as_they_are_drawn():
    dataset, image = DATASETS["deeplesion"], np.full((64, 64), 0.3, np.float32)
    truth, found = [(10, 10, 30, 40)], [(10, 10, 30, 40), (45, 45, 60, 60)]
    drawn = boxes.draw(image, truth)[None]
    answer = evaluation.Answer(image[None], drawn, None, "p", image[None], drawn, truth)
    answer.answers = {"prediction": drawn, "copy": image[None]}
    scores = score("prediction", answer, dataset)
    assert scores["image"][:2] == (0, metrics.MAX_PSNR) and scores["boxes"][1:] == (1, 0)
    assert score("copy", answer, dataset)["boxes"] == (0, 0, 0)
    answer.found = [found]  # asked for as a mask: the picture is not read
    assert score("prediction", answer, dataset)["boxes"] == (1, 1, 1)
    assert score("copy", answer, dataset)["boxes"] == (0, 0, 0)


# -------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_results(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "2"]
    evaluation.main([*argv, "--out", str(tmp_path / "a")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, "eval.py", *argv, "--device", "cpu", "--out", str(tmp_path / "b")],
                   cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    a = results(tmp_path / "a")
    assert a == results(tmp_path / "b")  # the same seed, the same table, by however many processes
    assert a["acdc"]["cases"] == 2 and 0 <= a["acdc"]["mIoU"] <= 1
    assert set(a["acdc"]["per_class"]) <= set(DATASETS["acdc"].labels)
    assert {"MAE", "PSNR", "SSIM"} < set(a["Dataset802_MsT1ToFlair"])
    with open(tmp_path / "a" / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    atria = [float(r["IoU"]) for r in rows if r["dataset"] == "la" and r["kind"] == "prediction"]
    assert np.mean(atria) == pytest.approx(a["la"]["mIoU"])
    for name in ("examples.png", "scores.png", "examples/la.png"):
        assert (tmp_path / "a" / name).stat().st_size > 1000
    text = (tmp_path / "a" / "tables.md").read_text()
    two, three = text.split("Table 2")[1].split("Table 3")
    ours = [line for line in (two + three).splitlines() if str(checkpoint) in line]
    assert f"| {a['acdc']['mIoU']:.2f} | {a['la']['mIoU']:.2f} |" in ours[0]
    # the stand-ins have no part in Table 3
    assert not ours[1].split("|", 2)[2].strip(" |")


def test_a_stopped_evaluation_goes_on_and_a_bad_case_is_named(store, checkpoint, tmp_path,
                                                              monkeypatch, capsys):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--datasets", "acdc", "la",
            "--out", str(tmp_path / "e")]
    whole, asked, answer = evaluation.main(argv), [], evaluation.answer_case
    ledger = tmp_path / "e" / "scores.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:3]) + lines[3][:40])  # stopped in the middle of a line
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
    assert not {json.loads(line)["case"] for line in lines[1:3]} & set(scored_again)
    assert f"2 of {len(lines) - 1} cases were scored before" in said
    assert f"{victim} could not be scored: ValueError: no sense" in said
    assert "1 cases could not be scored" in said
    assert sum(r["failed"] for r in part.values()) == 1 and part != whole
    monkeypatch.setattr(evaluation, "answer_case", answer)
    assert evaluation.main(argv) == whole  # what failed is tried again
    evaluation.main([*argv, "--seed", "1", "--max_cases", "1"])  # other settings begin anew
    assert len(ledger.read_text().splitlines()) == 3


class Truthful:
    """Answers the first question about a case as one should, and others so if `always`."""

    def __init__(self, monkeypatch):
        self.always, self.asked, self.truth = False, 0, None
        self.answer_case = evaluation.answer_case
        monkeypatch.setattr(evaluation, "answer_case", self.case)
        monkeypatch.setattr(evaluation, "answer_stack", self.stack)

    def case(self, model, case, training, dataset, settings, others=None):
        self.truth, self.asked = evaluation.read_pair(case, dataset, settings.slices)[1], 0
        return self.answer_case(model, case, training, dataset, settings, others)

    def stack(self, model, prompts, stack, segmentation, options):
        self.asked += 1
        answer = np.zeros(stack.shape, prompts[0][1].dtype)
        if self.asked == 1 or self.always and options.classes is None:
            answer = self.truth.astype(answer.dtype)
        return answer, np.ones(stack.shape)


@pytest.mark.slow
def test_wrong_prompts(store, checkpoint, tmp_path, monkeypatch, capsys):
    """A model that copies its prompt's label falls with every wrong prompt; one that does not look
    at it is called so."""
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--wrong_prompt",
            "--max_cases", "2"]
    model = Truthful(monkeypatch)
    falls = evaluation.main([*argv, "--out", str(tmp_path / "a")])
    assert set(metrics.WRONG) < set(falls["acdc"]) and "other_class" not in falls["la"]
    assert "empty" in falls["Dataset802_MsT1ToFlair"]
    assert falls["acdc"]["mIoU"] == 1 and falls["acdc"]["other_class"]["mIoU"] == 0
    assert not any(r["no_cost"] for r in falls.values())
    capsys.readouterr()
    model.always = True
    stays = evaluation.main([*argv, "--out", str(tmp_path / "b")])
    assert stays["la"]["no_cost"] == ["other_dataset"]
    assert stays["acdc"]["no_cost"] == ["other_class", "other_dataset"]
    said = capsys.readouterr().out
    assert "la: the score does not fall with a prompt that is wrong (other dataset)" in said


@pytest.mark.parametrize("meta", ({"coloring": "random"}, {"coloring": "binary"}))
def test_what_is_seen_without_a_prompt_is_scored(store, meta, monkeypatch):
    """The empty prompt asks for every class all the same, by a model that sees them all the same.

    Also from near: no prompt says where to look.
    """
    dataset, training, case = a_case(store, "acdc")
    model = fake(Echo, 32, **meta)
    seen = torch.zeros(1, 1, 32, 32)
    seen[..., 10:16, 10:16] = 1
    monkeypatch.setattr(model, "predict", lambda cache, x: seen.expand_as(x).clone())
    answer = answer_case(model, case, training, dataset, Settings(wrong_prompt=True), ())
    assert answer.answers["empty"].any()
    assert set(np.unique(answer.answers["empty"])) <= {0, *np.unique(answer.prompt_labels)}


def test_options_of_inference_are_passed_on(store, checkpoint, tmp_path, monkeypatch):
    asked = []

    def answer_stack(model, prompts, stack, segmentation, options):
        asked.append(options)
        return np.zeros(stack.shape, np.uint8), np.ones(stack.shape)

    monkeypatch.setattr(evaluation, "answer_stack", answer_stack)
    evaluation.main(["--store", str(store.root), "--checkpoint", str(checkpoint), "--datasets",
                     "la", "--max_cases", "1", "--out", str(tmp_path), "--votes", "3", "--mode",
                     "canvas", "--each", "--looks", "2", "--seed", "5"])
    assert asked[0] == Options("canvas", 3, True, 2, 5, "la")


@pytest.mark.slow
@pytest.mark.parametrize("name,steps", [
    ("la", 60), pytest.param("Dataset802_MsT1ToFlair", 60, marks=pytest.mark.slow)])
def test_the_u_net_learns_and_is_scored_by_the_same_programs(store, tmp_path, name, steps):
    """Segmentation and regression, stopped and resumed half-way."""
    small = ["--image_size", "32", "--log_every", "2", "--model", "unet", "--batch_size", "8"]
    train.main(["--store", str(store.root), *small, "--datasets", name, "--steps", str(steps),
                "--stop_at", str(steps // 2), "--lr", "3e-3", "--out", str(tmp_path)])
    last = str(tmp_path / "last.pt")
    model = train.main(["--resume", last])
    scores = evaluation.main(["--store", str(store.root), "--datasets", name, "--checkpoint", last])
    scores, metric = scores[name], "mIoU" if name == "la" else "PSNR"
    print(name, scores[metric], scores["copy"][metric])
    assert isinstance(model, unet.UNet) and scores[metric] > scores["copy"][metric]
    assert (tmp_path / "samples.png").stat().st_size > 500


def test_a_resumed_u_net_repeats_bit_for_bit_and_learns_one_task(store, tmp_path, capsys):
    argv = ["--store", str(store.root), "--image_size", "32", "--log_every", "2", "--model", "unet",
            "--batch_size", "8"]
    one = [*argv, "--datasets", "la", "--steps", "4"]
    whole = train.main([*one, "--out", str(tmp_path / "whole")])
    train.main([*one, "--stop_at", "2", "--out", str(tmp_path / "part")])
    part = train.main(["--resume", str(tmp_path / "part" / "last.pt")])
    both = zip(whole.state_dict().values(), part.state_dict().values())
    assert all(torch.equal(a, b) for a, b in both)
    assert "learns one task" in failure(capsys, train.main, *argv, "--out", tmp_path / "no")


def test_bad_input_gets_one_line(store, checkpoint, tmp_path, capsys):
    for argv, words in ((["--checkpoint", tmp_path / "no.pt"], "no.pt"),
                        (["--checkpoint", checkpoint, "--datasets", "lla"], "did you mean la"),
                        (["--checkpoint", checkpoint, "--device", "cuda:9"], "cuda:9"),
                        (["--checkpoint", checkpoint, "--votes", "0"], "--votes is 0"),
                        (["--checkpoint", checkpoint, "--max_cases", "0"], "--max_cases is 0"),
                        (["--checkpoint", checkpoint, "--seed", "-1"], "--seed is -1")):
        out = ["--store", store.root, "--out", tmp_path / "e"]
        assert words in failure(capsys, evaluation.main, *out, *argv)


def test_a_dataset_without_another_patient_is_not_scored_and_named(store, checkpoint, tmp_path,
                                                                   monkeypatch, capsys):
    split = Store.split
    monkeypatch.setattr(Store, "split", lambda self, name, part: (
        [] if (name, part) == ("la", "train") else split(self, name, part)))
    found = evaluation.main(["--store", str(store.root), "--checkpoint", str(checkpoint),
                             "--datasets", "la", "acdc", "--max_cases", "1", "--out",
                             str(tmp_path)])
    assert list(found) == ["acdc"]
    assert "la: not scored, it has no test case with a training case of another patient" in (
        capsys.readouterr().out)
