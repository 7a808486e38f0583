"""lab/bench.py runs and reports what it says. How fast anything is, is not a test's business."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mvg
import train
import vit
from common import small
from conftest import ROOT
from data import ContextSamples
from lab import bench, unet
from recipe import Recipe
from scans.store import Store

TINY = mvg.Config(**{**mvg.SIZES["tiny"], "image_size": 224})


@pytest.mark.slow
def test_bench_reports_ratios(capsys):
    bench.main(["--model", "demo", "--image_size", "32", "--batch_size", "16", "--repeats", "1",
                "--workers", "0", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == list(bench.PARTS)
    cached = result["infer_cached"]
    for r in (result["train_step"], cached, *cached["again"].values(), result["store"]):
        assert r["ours_s"] > 0 and r["reference_s"] > 0 and r["ratio"] > 0
    assert result["volume"]["ours_s"] >= result["volume"]["shared_s"] / 2 > 0
    assert 0 < result["train_step"]["utilisation"] < 1
    assert all(result["samples"][f"{name}_per_second"] > 0 for name in ("data", "step", "both"))
    assert 0 < result["memory"]["recomputed_gb"] < result["memory"]["ours_gb"]
    assert result["memory"]["counted"]["authors"][1] == result["memory"]["reference_gb"]
    for name, r in result["specialist"].items():
        assert all(value > 0 for value in r.values()) and r["train_gflop"] > r["slice_gflop"], name
    parameters = sum(p.numel() for p in mvg.build("demo", 32).parameters())
    assert result["specialist"]["mvg"]["parameters"] == parameters


def test_a_reference_that_is_too_large_for_a_gpu_is_left_out(monkeypatch):
    setting = bench.Setting(TINY, torch.device("cpu"), 8, 1, True, 0, False, False)
    assert bench.fits(setting, "authors")
    need = bench.cost(TINY, 8, "authors", True)[1]
    setting.device, gpu = torch.device("cuda"), SimpleNamespace(total_memory=need / 0.79)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert bench.fits(setting, "authors")
    gpu.total_memory = need / 0.81
    assert not bench.fits(setting, "authors")
    assert bench.ratio({"ours": [1.0]}, "authors", "ours") is None


def test_the_table_of_a_measurement(capsys):
    bench.main(["--model", "demo", "--image_size", "16", "--repeats", "1", "--device", "cpu",
                "--workers", "0", "--only", "infer_cached", "samples"])
    head, cached, *again, rates = capsys.readouterr().out.splitlines()
    assert head.startswith("demo, image 16, fused, batch 1, float32, cpu")
    assert cached.startswith("infer_cached: ours_s 0.") and "reference_s" in cached
    assert [line.split(" encoded")[0] for line in again] == ["  1 prompt", "  2 prompts",
                                                             "  4 prompts"]
    assert rates.startswith("samples: data_per_second ")


# -------------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import sys, torch, torch.nn.functional as F
import mvg, vit
from lab import bench
torch.set_num_threads(1)
vit.attend = F.scaled_dot_product_attention  # as on a GPU, where the matrix is not held
recompute = sys.argv[1] == "True"
def peak():
    lines = open("/proc/self/status")
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
def step(config, batch):
    model = mvg.from_config(config)
    model.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    bench.batch_loss(model, bench.random_batch(config, batch), "ar").backward()
step(mvg.Config(**{**mvg.SIZES["demo"], "image_size": 32}), 1)  # libraries load
before = peak()
step(mvg.Config(**{**mvg.SIZES["tiny"], "image_size": 224}), 8)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(),
                    reason="memory is measured by /proc, which is not here")
@pytest.mark.parametrize("recompute", (False, True))
def test_the_computed_memory_is_what_a_process_takes(recompute):
    """tiny at 224, batch 8: within a tenth and 100 MB, which libraries take for themselves."""
    said = subprocess.run([sys.executable, "-c", MEASURE, str(recompute)], cwd=ROOT, check=True,
                          capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}).stdout
    measured = int(said)
    computed = bench.cost(TINY, 8, "ar", bf16=False, recompute=recompute)[1]
    print(f"measured {measured / 1e9:.3f} GB, computed {computed / 1e9:.3f} GB")
    assert abs(measured - computed) < 0.1 * computed + 100e6


def test_operations_are_those_that_torch_counts():
    """On real tensors; those of attention by hand: two products forward, and five backward."""
    config = mvg.Config(**{**mvg.SIZES["demo"], "image_size": 32})
    model, batch = mvg.from_config(config), bench.random_batch(config, 2)
    with FlopCounterMode(display=False) as counted:
        bench.batch_loss(model, batch, "mim").backward()
    tokens, two_streams = 16, config.fuse_at
    attention = 2 * (2 * tokens) ** 2 * config.width * (config.depth + two_streams)
    expected = counted.get_total_flops() + 2 * 7 * attention
    assert bench.cost(config, 2, "mim", bf16=False)[0] == expected


def test_what_cudas_autocast_computes_in_float32():
    """A LayerNorm and a softmax, and not the norms inside of attention and head."""
    with bench.without_values():
        x = torch.randn(3, 8, dtype=torch.bfloat16)
        norm, inside = torch.nn.LayerNorm(8), vit.Norm(8)
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == x.softmax(-1).dtype == torch.float32
            assert inside(x).dtype == torch.bfloat16
        assert x.softmax(-1).dtype == torch.bfloat16
    assert torch.nn.functional.layer_norm(torch.ones(1, 2), (2,)).dtype == torch.float32


def test_the_papers_size_fits_the_papers_gpu():
    """large, batch 16, 448 pixels, bfloat16, activations computed again: within 24 GB with a
    tenth to spare."""
    config = mvg.Config(**mvg.SIZES["large"])
    gb = max(bench.cost(config, 16, o, recompute=True)[1] for o in ("ar", "mim")) / 1e9
    print(f"{gb:.1f} GB")
    assert config.image_size == 448 and gb < 0.9 * 24


def test_activations_are_computed_again_where_any_objective_needs_it(monkeypatch):
    """tiny at 224, batch 16, bfloat16: ar with four prompts needs 3.8 GB, and mim 1.1 GB."""
    computed, cost = {}, bench.cost

    def remembered(config, *settings):
        if settings not in computed:
            computed[settings] = cost(config, *settings)
        return computed[settings]

    monkeypatch.setattr(bench, "cost", remembered)
    four, one = Recipe(num_prompts="1-4"), Recipe()
    peaks = {name: memory for name, (_, memory) in bench.costs(TINY, four, True).items()}
    assert peaks["ar"] == pytest.approx(3.79e9, rel=0.01)
    assert peaks["mim"] == pytest.approx(1.11e9, rel=0.01)
    assert bench.is_too_large(TINY, four, True, peaks["ar"] / 0.901)
    assert not bench.is_too_large(TINY, four, True, peaks["ar"] / 0.899)
    assert bench.is_too_large(TINY, one, True, peaks["mim"] / 0.901)

    gpu = SimpleNamespace(total_memory=2e9)  # mim fits, and so does ar with one prompt
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with torch.device("meta"):
        model = mvg.from_config(TINY)
    device = torch.device("cuda")
    assert bench.needs_recompute(model, four, device, True)
    assert not bench.needs_recompute(model, one, device, True)
    assert not bench.needs_recompute(model, Recipe(num_prompts="4", objective="mim"), device, True)
    gpu.total_memory = 1
    assert bench.needs_recompute(model, one, device, True)
    assert not bench.needs_recompute(unet.UNet(unet.Config(1, 32, 4)), one, device, True)


# -------------------------------------------------------------------------------------------------
# The references

@pytest.mark.parametrize("way", bench.REFERENCES)
def test_a_reference_paints_from_everything_but_the_answer(way):
    """Its painted labels depend on the images and on the first label, never on the second."""
    torch.manual_seed(0)
    model = bench.Reference(small("fused").config, way)
    images, labels = torch.rand(2, 1, 2, 1, 32, 32).unbind()
    painted = model(images, labels)
    assert painted.shape == (1, 2, 1, 32, 32)
    for changed, which, same in ((labels, 1, True), (labels, 0, False), (images, 0, False),
                                 (images, 1, False)):
        pair = {"images": images, "labels": labels}
        name = "labels" if changed is labels else "images"
        pair[name] = changed.clone()
        pair[name][:, which] = torch.rand(1, 1, 32, 32)
        assert torch.equal(model(**pair)[:, 1], painted[:, 1]) == same


# -------------------------------------------------------------------------------------------------
# The plan of a run

U_NET = ["--image_size", "32", "--model", "unet", "--batch_size", "4", "--datasets", "la"]


@pytest.fixture
def steps(monkeypatch):
    """The steps whose samples are drawn."""
    drawn, getitem = [], ContextSamples.__getitem__

    def watched(self, key):
        drawn.append(key[0])
        return getitem(self, key)

    monkeypatch.setattr(ContextSamples, "__getitem__", watched)
    return drawn


def test_a_dry_run_of_a_resumed_run_goes_on_from_its_step(store, tmp_path, capsys, steps):
    train.main(["--store", str(store.root), *U_NET, "--steps", "6", "--stop_at", "3",
                "--out", str(tmp_path / "r")])
    kept = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    capsys.readouterr()
    steps.clear()
    train.main(["--resume", str(tmp_path / "r" / "last.pt"), "--dry_run"])
    said = capsys.readouterr().out
    assert sorted(set(steps)) == list(range(3, 15))
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == kept
    assert "going on from step 3" in said and "6 steps of 1 x 1 x 4 samples" in said
    assert "s a step (mean of 10)" in said and "nothing was written but the prepared store" in said
    assert "TFLOP" not in said  # nothing is counted of a U-Net


def test_a_dry_run_of_so_many_minutes_says_how_many_steps_they_are(store, tmp_path, capsys):
    train.main(["--store", str(store.root), *U_NET, "--minutes", "7", "--dry_run",
                "--out", str(tmp_path / "r")])
    said = capsys.readouterr().out
    seconds = float(re.search(r"([\d.]+) s a step", said)[1])
    steps = int(re.search(r"7 minutes (\d+) steps", said)[1])
    assert steps * seconds == pytest.approx(420, rel=0.3)
    assert "7 minutes of 1 x 1 x 4 samples" in said and "10000000" not in said


def test_a_dry_run_ends_when_it_is_asked_to(store, tmp_path, capsys, monkeypatch):
    """By a signal, which is noted and read after the step."""
    read = bench.Run.__init__

    def interrupted(self, *args):
        read(self, *args)
        log_read = self.log.read
        self.log.read = lambda noted, distributed: log_read(True, distributed)

    monkeypatch.setattr(bench.Run, "__init__", interrupted)
    train.main(["--store", str(store.root), *U_NET, "--dry_run", "--out", str(tmp_path / "r")])
    assert "interrupted before a step was timed" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_the_shares_of_a_dry_run_are_those_of_the_draws(store):
    """A dataset of masks, one of images and the procedural tasks, which are of both kinds."""
    recipe = Recipe(datasets=("synthetic",), synthetic_share=0.4, seg_share=0.7, pool=4)
    store = Store(store.root, ["la", "Dataset802_MsT1ToFlair"])
    samples, said = ContextSamples(store, recipe, small("fused").config), []
    ranks = SimpleNamespace(device=torch.device("cpu"), count=1, say=said.append)
    args = Namespace(out="nowhere", steps=10, stop_at=None, minutes=None)
    bench.DryRun(args, recipe, samples, ranks, small("fused")).say_draws()
    table = {}
    for line in said[1:]:
        name, task, *_, share, draws = line.split()
        table[name, task] = float(share[:-1]) / 100
        assert float(draws) == pytest.approx(table[name, task] * len(samples), abs=6)
    drawn = Counter(samples.draw(step, 0)[2:4] for step in range(4000))
    for (name, task), share in table.items():
        masks = task == "segmentation"
        assert drawn[name, masks] / 4000 == pytest.approx(share, abs=0.03)
    assert len(table) == 4 and sum(table.values()) == pytest.approx(1, abs=0.002)
