"""Which training case is shown: the one that looks alike; and what several draws come to."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import eval as evaluation
import metrics
import prompts
from conftest import ROOT
from scans.datasets import Dataset


class Case:
    """A case whose slices are given, each of another patient."""

    kind = height = None

    def __init__(self, name, images):
        self.name = self.patient = name
        self.images, self.slices = images, len(images)

    def kept(self, slices):
        return list(range(self.slices))

    def read(self, k):
        return self.images[k], None, None


def blob(y, x, contrast=1.0, count=6):
    rows, columns = np.mgrid[:64, :80]
    image = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 200) * contrast
    return np.stack([image.astype(np.float32)] * count)


def test_the_case_that_looks_alike_is_found_whatever_its_contrast_and_number_of_slices():
    cases = [Case("far", blob(50, 60)), Case("near", blob(21, 22, 0.3, 11)),
             Case("other", blob(20, 60)), Case("itself", blob(20, 20))]
    cases[-1].patient = "target"
    target = Case("target", blob(20, 20))
    rng = np.random.default_rng(0)
    assert prompts.most_alike(cases, target, rng).name == "near"
    settings = evaluation.Settings(prompts=2, alike=True)
    shown = prompts.choose_prompts(cases, target, rng, settings)
    assert [case.name for case in shown] == ["near", "other"]


def test_likeness_is_a_correlation():
    rng = np.random.default_rng(1)
    a, b = (rng.random((5, 16, 16)).astype(np.float32) for _ in range(2))
    ours = prompts.likeness(*(prompts.thumbnails(Case("x", c), "all") for c in (a, b)))
    theirs = [np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)]
    assert ours == pytest.approx(np.mean(theirs), abs=1e-5)


def line(case, value, dataset="d"):
    return {"dataset": dataset, "case": case, "patient": case,
            "scores": {"prediction": {"organ": (value, value)}}}


def test_the_spread_of_two_cases_under_three_prompts_by_hand():
    dataset = Dataset("d", "a title", "abdomen", "ct", "segmentation", ("organ",))
    drawn = {"a": (0.2, 0.4, 0.6), "b": (0.5, 0.5, 0.8)}
    lines = {d: [line(c, v[d]) for c, v in drawn.items()] for d in range(3)}
    lines["alike"] = [line("a", 0.7), line("b", 0.3)]
    for run in lines.values():  # one that failed, and one of another dataset
        run += [{"dataset": "d", "case": "c", "error": "x"}, line("a", 1.0, "other")]
    both = prompts.spread(lines, dataset)
    found = both["mIoU"]
    assert found["cases"] == 2 and both["Dice"] == found  # the same numbers in this example
    assert found["mean"] == pytest.approx(0.5)
    assert found["sd"] == pytest.approx((0.2 + np.std([0.5, 0.5, 0.8], ddof=1)) / 2)
    assert found["best"] == pytest.approx(0.7) and found["worst"] == pytest.approx(0.35)
    assert found["draws"] == pytest.approx([0.35, 0.45, 0.7])
    assert found["alike"] == pytest.approx(0.5)


@pytest.mark.slow
def test_draws_are_evaluations_of_their_own_seeds(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "1",
            "--datasets", "la", "Dataset802_MsT1ToFlair", "--seed", "3"]
    found = evaluation.main([*argv, "--prompt_draws", "2", "--prompts", "1", "3",
                             "--out", str(tmp_path / "draws")])
    for count in ("1", "3"):
        alone = evaluation.main([*argv[:-1], "4", "--prompts", count, "--out", str(tmp_path / "a")])
        for metric in ("mIoU", "Dice"):
            assert found["la"][count][metric]["draws"][1] == pytest.approx(alone["la"][metric])
    assert found["la"]["1"]["mIoU"]["alike"] >= 0 and found["la"]["3"]["mIoU"]["alike"] is None
    written = json.loads((tmp_path / "draws" / "prompts.json").read_text())
    assert written["datasets"] == found and written["draws"] == 2
    assert list(found["Dataset802_MsT1ToFlair"]["3"]) == ["PSNR"]
    assert (tmp_path / "draws" / "prompts.png").stat().st_size > 1000
    assert "| la | 3 | Dice | 1 |" in (tmp_path / "draws" / "prompts.md").read_text()


@pytest.mark.slow
def test_two_processes_score_the_same_draws(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "2",
            "--datasets", "la", "--prompt_draws", "2", "--device", "cpu"]
    found = evaluation.main([*argv, "--out", str(tmp_path / "a")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, "eval.py", *argv, "--out", str(tmp_path / "b")], cwd=ROOT, check=True,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / "b" / "prompts.json").read_text())["datasets"] == found


def test_all_slices_are_scored_beside_those_that_show_something(store, checkpoint, tmp_path):
    argv = ["--store", str(store.root), "--checkpoint", str(checkpoint), "--max_cases", "1",
            "--datasets", "la", "--slices", "all", "--out", str(tmp_path)]
    found = evaluation.main(argv)["la"]
    assert "with it" in metrics.KINDS and found["with it"]["mIoU"] >= found["mIoU"]
    assert 0 <= found["false_alarm"] <= 1
    table = (tmp_path / "tables.md").read_text().splitlines()
    assert table[0].endswith("| painted on slices without it |")
    assert f"{found['false_alarm']:.2%}" in table[2]
