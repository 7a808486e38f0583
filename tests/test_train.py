"""Training: it learns, it repeats, it resumes, and two ranks are one process."""

import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import mvg
import running.ranks
import train
from coloring import color, decode, draw_keys, draw_palettes
from common import batch_of, context, make_batch, pairs
from conftest import FIVE, REAL, ROOT
from fakes import failure
from objectives import LOSSES
from recipe import Recipe, parse
from running import folder, muon
from running.checkpoints import load_checkpoint
from running.muon import Muon, orthogonal
from scans.datasets import find
from scans.store import Store, is_alive, prepare_case
from scans.volumes import DataError, resize_images, resize_labels

SMALL = ["--model", "demo", "--image_size", "32", "--batch_size", "2", "--log_every", "2"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def run(store, out, *args):
    return train.main(["--store", str(store.root), "--out", str(out), *SMALL, *args])


def equal(a, b):
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------
# It learns

def eight_slices(store):
    """Real ultrasound pictures with both of their classes (stand-ins where there are none)."""
    name = "Dataset801_NerveUltrasound"
    if not REAL.is_dir():
        return [tuple(map(torch.from_numpy, c.read(0)[:2])) for c in store.cases[name]
                if len(c.classes[0]) == 2][:8]
    found = find(REAL, [name])[name]
    prepared = [prepare_case(c, found.dataset)[0] for c in found.cases[:40]]
    return [(torch.from_numpy(a["image"][0] / np.float32(65535)), torch.from_numpy(a["label"][0]))
            for a in prepared if len(np.unique(a["label"])) == 3][:8]


@pytest.mark.slow
def test_a_tiny_model_overfits_four_pairs_with_colors_redrawn(store):
    """tiny at 128, a fixed batch of four pairs: IoU above 0.95."""
    slices = eight_slices(store)
    images = torch.stack([resize_images(image, (128, 128)) for image, _ in slices])
    labels = torch.stack([resize_labels(label, (128, 128)) for _, label in slices]).float()
    images, labels = images.view(4, 2, 1, 128, 128), labels.view(4, 2, 1, 128, 128)
    torch.manual_seed(0)
    model, steps = mvg.build("tiny", 128, drop_path=0.0), 500
    recipe = Recipe(optimizer="muon", weight_decay=0.0, background_weight=1.0)
    optimizers, rng = train.make_optimizers(model, recipe), np.random.default_rng(0)
    colored = torch.ones(4, dtype=torch.bool)

    def palettes():
        keys = [torch.from_numpy(np.stack(k)) for k in zip(*(draw_keys(rng) for _ in range(4)))]
        number = torch.arange(256).expand(4, -1)
        return draw_palettes((number > 0) & (number < 3), keys, "random")

    def iou():
        palette, truth = palettes(), labels[:, 1, 0]
        painted = color(labels, palette, colored)
        cache = model.encode_prompts(images[:, :1], painted[:, :1])
        answer = model.predict(cache, images[:, 1])
        decoded = [decode(answer[i, 0], palette[i, 1:3]).argmax(0) for i in range(4)]
        decoded, scores = torch.stack(decoded), []
        for c in (1, 2):
            both, either = (decoded == c) & (truth == c), (decoded == c) | (truth == c)
            scores.append(both.sum() / either.sum())
        return np.mean(scores)

    assert iou() < 0.3
    for step in range(steps):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = train.learning_rate(step, steps, recipe)
        painted = color(labels, palettes(), colored)
        batch = make_batch(images, painted, colored)
        LOSSES["ar"](model, batch, painted, recipe).mean().backward()
        train.update(optimizers, torch.tensor(False))
    scores = [iou() for _ in range(10)]  # under ten colorings, each new to the model
    print(f"IoU {np.mean(scores):.3f}, lowest {min(scores):.3f}, after {steps} steps")
    assert np.mean(scores) > 0.95


def test_muon_is_that_of_torch_without_its_rounding():
    """Ten steps on matrices of three shapes.

    torch's bfloat16 rounds by at most 0.4%, and both are as near as that lets them be.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = ((24, 24), (16, 48), (48, 16))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = (Muon(ours, lr=0.02, weight_decay=0.05),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05,
                                   adjust_lr_fn="match_rms_adamw"))
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (p - s).norm() and (p - s).norm() > 0.5
    values = torch.linalg.svdvals(orthogonal(torch.randn(1, 32, 20, generator=rng)))
    assert 0.5 < values.min() and values.max() < 1.5
    assert torch.equal(orthogonal(torch.zeros(1, 3, 5)), torch.zeros(1, 3, 5))


def test_muon_takes_matrices_of_one_shape_together():
    """In one batch of products, with the result of each alone."""
    rng = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=rng) for shape in ((8, 24), (24, 8), (8, 24), (8, 24))]
    gradients = [[torch.randn(p.shape, generator=rng) for p in start] for _ in range(3)]
    batches, steps = [], muon.orthogonal

    def watched(matrices):
        batches.append(tuple(matrices.shape))
        return steps(matrices)

    def trained(matrices, numbers):
        matrices = [torch.nn.Parameter(p.clone()) for p in matrices]
        optimizer = Muon(matrices, lr=0.1)
        for now in gradients:
            for p, i in zip(matrices, numbers):
                p.grad = now[i].clone()
            optimizer.step()
        return matrices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "orthogonal", watched)
        together = trained(start, range(4))
    assert batches == 3 * [(3, 8, 24), (1, 24, 8)]
    for i, p in enumerate(together):
        (alone,) = trained([start[i]], [i])
        assert torch.allclose(p, alone, atol=1e-5) and not torch.allclose(p, start[i], atol=0.05)


def test_muon_gets_the_matrices_of_the_blocks():
    model = mvg.build("demo", 32)
    adamw, muon = train.make_optimizers(model, Recipe(optimizer="muon"))
    theirs = {id(p) for g in muon.param_groups for p in g["params"]}
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in theirs}
    expected = {f"blocks.{i}.{m}.weight" for i in range(8)
                for m in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}
    assert names == expected and not theirs & rest
    assert len(theirs) + len(rest) == len(list(model.parameters()))


def test_weight_decay_is_of_matrices():
    model = mvg.build("demo", 32)
    (adamw,) = train.make_optimizers(model, Recipe(weight_decay=0.3))
    names = {id(p): n for n, p in model.named_parameters()}
    free = {names[id(p)] for g in adamw.param_groups for p in g["params"] if not g["weight_decay"]}
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.0, 0.3}
    vectors = {n for n, p in model.named_parameters() if p.ndim < 2}
    assert free == vectors | {"position", "stream", "role"}


def test_bfloat16_is_left_out_where_a_cpu_has_none(store, tmp_path, monkeypatch, capsys):
    asked, autocast = [], torch.autocast

    def noted(*args, enabled=True, **more):
        asked.append(enabled)
        return autocast(*args, enabled=enabled, **more)

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch, "autocast", noted)
    run(store, tmp_path / "r", "--steps", "1", "--set", "bf16=true", "--device", "cpu")
    assert "float32 it is" in capsys.readouterr().out and asked and not any(asked)


# -------------------------------------------------------------------------------------------------
# It repeats and resumes

@pytest.mark.parametrize("how", (["--optimizer", "adamw"],
                                 ["--optimizer", "muon", "--num_prompts", "1-3"],
                                 ["--layout", "sequence", "--set", "loss=l1"],
                                 ["--set", "gate=true", "mask_loss=l2"]))
def test_five_steps_equal_three_and_two(store, tmp_path, how):
    """Bit for bit on CPU, both objectives among the steps, the log without gap or repetition."""
    whole = run(store, tmp_path / "whole", "--steps", "5", *how)
    run(store, tmp_path / "parts", "--steps", "5", "--stop_at", "3", *how)
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:  # a step logged but not saved
        log.write('{"step": 4, "losses": {}}\n')
    # all settings are the run's
    parts = train.main(["--resume", str(tmp_path / "parts" / "last.pt")])
    assert equal(whole, parts)
    logs = [read_log(tmp_path / n) for n in ("whole", "parts")]
    assert [[l["step"] for l in log] for log in logs] == [[2, 4, 5], [2, 3, 4, 5]]
    assert {o for l in logs[0] for o in l["losses"]} == {"ar", "mim"}
    assert logs[0][-1]["losses"] == logs[1][-1]["losses"]
    saved = [load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "parts")]
    assert saved[0]["step"] == saved[1]["step"] == 5
    for a, b in zip(saved[0]["optimizers"], saved[1]["optimizers"], strict=True):
        assert a["state"].keys() == b["state"].keys() and a["state"]
        for k in a["state"]:
            values = zip(a["state"][k].values(), b["state"][k].values(), strict=True)
            assert all(torch.equal(x, y) for x, y in values)


def interrupt_at(monkeypatch, number):
    """Let train.py get SIGTERM in a step."""
    rate = train.learning_rate

    def interrupted(step, *rest):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupted)


def test_sigterm_saves_and_ends_at_the_next_log_line(store, tmp_path, monkeypatch):
    whole = run(store, tmp_path / "whole", "--steps", "5")
    interrupt_at(monkeypatch, 2)
    run(store, tmp_path / "r", "--steps", "5")
    assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == 4
    assert read_log(tmp_path / "r")[-1]["stopped"]
    monkeypatch.undo()
    assert equal(whole, train.main(["--resume", "--out", str(tmp_path / "r")]))
    assert [l["step"] for l in read_log(tmp_path / "r")] == [2, 4, 5]


def test_loader_workers_change_nothing(store, tmp_path):
    alone = run(store, tmp_path / "a", "--steps", "2")
    assert equal(alone, run(store, tmp_path / "b", "--steps", "2", "--workers", "1"))


def test_accumulated_batches_are_one_batch_and_so_is_what_is_computed_again(store, tmp_path):
    whole = run(store, tmp_path / "a", "--steps", "3", "--batch_size", "4")
    parts = run(store, tmp_path / "b", "--steps", "3", "--accumulate", "2")  # of 2
    again = run(store, tmp_path / "c", "--steps", "3", "--batch_size", "4", "--recompute")
    other = run(store, tmp_path / "d", "--steps", "3")

    def apart(a, b):
        return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))

    assert apart(whole, parts) < 2e-4 < 2e-3 < apart(whole, other) and apart(whole, again) == 0
    for a, b in zip(*(read_log(tmp_path / n) for n in "ab"), strict=True):
        a, b = a["losses"], b["losses"]
        assert a.keys() == b.keys() and all(a[o] == pytest.approx(b[o], rel=1e-2) for o in a)


# -------------------------------------------------------------------------------------------------
# It survives

def weights(path):
    return load_checkpoint(path)["model"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(store, tmp_path, monkeypatch, capsys):
    """Files may not grow beyond a limit from step 3 on, to step 5 or to the end."""
    rate, free = train.learning_rate, resource.getrlimit(resource.RLIMIT_FSIZE)
    often = ["--steps", "6", "--save_every", "2"]
    whole, until = run(store, tmp_path / "whole", *often), [5]

    def limited(step, *rest):
        if step in (2, until[0]):
            limit = 2 ** 20 if step == 2 else free[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", limited)
    again = run(store, tmp_path / "a", *often)
    said = capsys.readouterr().out
    assert "is the disk full?; last.pt holds step 2 as before" in said and equal(whole, again)
    assert load_checkpoint(tmp_path / "a" / "last.pt")["step"] == 6
    assert not list((tmp_path / "a").glob("*.tmp*"))
    until[0] = 99
    words = "last.pt holds step 2 of 6; free some space, then --resume"
    try:
        with pytest.raises(DataError, match=words):
            run(store, tmp_path / "b", *often)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    monkeypatch.setattr(train, "learning_rate", rate)
    assert equal(whole, train.main(["--resume", str(tmp_path / "b" / "last.pt")]))
    assert [l["step"] for l in read_log(tmp_path / "b")] == [2, 4, 6]


def test_what_a_loader_process_cannot_read_is_named(store, tmp_path, capsys):
    shutil.copytree(store.root, tmp_path / "store")
    bad = next((tmp_path / "store" / "acdc").glob("*/image.npy"))
    bad.write_bytes(b"\0" * bad.stat().st_size)  # as long as it was
    argv = ["--store", tmp_path / "store", "--datasets", "acdc", "--out", tmp_path / "r", *SMALL]
    said = failure(capsys, train.main, *argv, "--steps", 40, "--workers", 1)
    assert re.search(r"sample \d of step \d+ cannot be read, acdc \w+ slice \d+, \w+ slice \d+: "
                     r"ValueError: ", said), said


def test_a_loss_that_is_not_finite_is_left_out_and_its_case_named(store, tmp_path, monkeypatch,
                                                                  capsys):
    make, spoilt = data.ContextSamples.make, []

    def spoil(self, slices, step, *more):
        batch = make(self, slices, step, *more)
        if step == 1 and len(batch.images) > 1:
            batch.images[1, 0, 0, 0, 0] = float("nan")
            spoilt.append(self.describe(*batch.drawn[1].tolist()))
        return batch

    monkeypatch.setattr(data.ContextSamples, "make", spoil)
    model = run(store, tmp_path / "r", "--steps", "4")
    said = capsys.readouterr().out
    assert re.findall("not finite: (.*)", said) == spoilt
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [l["skipped"] for l in read_log(tmp_path / "r")] == [1, 0]


def test_a_run_without_a_finite_loss_ends(store, tmp_path, monkeypatch, capsys):
    def broken(model, batch, labels, recipe):
        return sum(p.sum() for p in model.parameters()) * torch.full((2,), float("nan"))

    monkeypatch.setattr(train, "LOSSES", {"ar": broken, "mim": broken})
    with pytest.raises(DataError, match="no step since 0 had a finite loss: lower --lr"):
        run(store, tmp_path / "r", "--steps", "4")
    assert not (tmp_path / "r" / "last.pt").exists()


def test_nothing_waits_for_the_device_between_logging_steps(store, tmp_path, monkeypatch):
    """The meta device has shapes and no contents, and whatever needs a value raises there.

    The first logging step raises, and no step before it.
    """
    steps, adamw = [], torch.optim.AdamW

    def plain_adamw(*args, fused, **more):  # the fused one knows no meta tensors
        return adamw(*args, **more, capturable=False, foreach=False)

    meta = torch.device("meta"), "no contents"
    monkeypatch.setattr(running.ranks, "pick_device", lambda *args: meta)
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch.optim, "AdamW", plain_adamw)
    monkeypatch.setattr(train, "update",
                        lambda optimizers, broken: steps.append(broken.device.type))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run(store, tmp_path / "r", "--steps", "9", "--log_every", "7", "--num_prompts", "1-2",
            "--accumulate", "2")
    assert steps == ["meta"] * 7


def children(pid):
    """Process ids of the children of a process."""
    said = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in said.split()]


def kill_with_children(process):
    """SIGKILL to a process and to all that it started; ranks have sessions of their own."""
    os.kill(process.pid, signal.SIGSTOP)  # it starts no more
    family = [process.pid]
    for pid in family:
        family += children(pid)
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in family):
        time.sleep(0.02)


def killed_and_resumed(store, out, ranks, kills, steps, rng):
    """Run train.py to its end, killed at random moments and resumed; how often it was killed."""
    base = [sys.executable, *([*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else []),
            str(ROOT / "train.py")]
    fresh = ["--store", str(store.root), *SMALL, "--steps", str(steps), "--log_every", "1",
             "--save_every", "1", "--out", str(out), "--device", "cpu"]
    done, log = 0, out / "log.jsonl"

    def lines():
        return len(log.read_text().splitlines()) if log.exists() else 0

    while True:
        argv = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else fresh
        before = lines()
        process = subprocess.Popen([*base, *argv], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, env=ONE_THREAD)
        if done < kills:  # some moment after it began to work
            while process.poll() is None and lines() <= before:
                time.sleep(0.02)
            time.sleep(rng.random() * 0.8)
        if done < kills and process.poll() is None:
            kill_with_children(process)
            done += 1
            continue
        assert process.wait() == 0, process.stderr.read().decode()[-2000:]
        return done


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_kill_9_at_ten_random_moments(store, tmp_path, ranks):
    """The log has no gap and no repeated step, and the weights are those of a run that was not
    killed, bit for bit."""
    killed_and_resumed(store, tmp_path / "whole", ranks, 0, 60, None)
    rng = random.Random(ranks)
    assert killed_and_resumed(store, tmp_path / "killed", ranks, 10, 60, rng) == 10
    logs = [read_log(tmp_path / n) for n in ("whole", "killed")]
    assert [l["step"] for l in logs[1]] == list(range(1, 61))
    assert [l["losses"] for l in logs[0]] == [l["losses"] for l in logs[1]]
    whole, killed = (weights(tmp_path / n / "last.pt") for n in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    if ranks == 2:
        with pytest.raises(DataError, match="trained on 2 processes, now 1"):
            train.main(["--resume", str(tmp_path / "killed" / "last.pt"), "--steps", "61"])


def torchrun(store, out, *argv):
    """train.py on two ranks, and the process ids of the ranks once the log has a line."""
    command = [sys.executable, *TORCHRUN, "--nproc_per_node=2", str(ROOT / "train.py"),
               "--store", str(store.root), *SMALL, "--steps", "100000", "--save_every", "1000",
               "--device", "cpu", "--out", str(out), *argv]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=ONE_THREAD)
    log = out / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    return run, children(run.pid)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_ends_all_ranks(store, tmp_path):
    run, ranks = torchrun(store, tmp_path / "r")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    log = read_log(tmp_path / "r")
    assert len(ranks) == 2 and not any(is_alive(p) for p in ranks)
    assert log[-1]["stopped"]
    assert load_checkpoint(tmp_path / "r" / "last.pt")["step"] == log[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("death", ("killed", "error"))
def test_a_rank_that_dies_ends_the_others_within_a_minute(store, tmp_path, death):
    shutil.copytree(store.root, tmp_path / "store")
    run, ranks = torchrun(Store(tmp_path / "store"), tmp_path / "r", "--datasets", "acdc")
    start = time.time()
    if death == "killed":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        for bad in (tmp_path / "store" / "acdc").glob("*/image.npy"):
            bad.unlink()
    said = run.communicate(timeout=60)[0]
    print(f"{death}: {time.time() - start:.1f} s")
    assert run.returncode != 0 and not any(is_alive(p) for p in ranks)
    assert ("Signal 9 (SIGKILL)" if death == "killed" else "cannot be read, acdc ") in said


def test_a_run_folder_is_used_by_one_training_at_a_time(store, tmp_path):
    (tmp_path / "r").mkdir()
    hold = ("import sys; from pathlib import Path; from running.folder import locked; "
            "kept = locked(Path(sys.argv[1])); print(1, flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "r")], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(DataError, match="r is in use by another training: name another --out"):
        run(store, tmp_path / "r", "--steps", "1")
    other.communicate()
    run(store, tmp_path / "r", "--steps", "1")


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(store, tmp_path):
    run(store, tmp_path / "r", "--steps", "2", "--stop_at", "1")
    last = tmp_path / "r" / "last.pt"
    with pytest.raises(DataError, match="already holds a run"):
        run(store, tmp_path / "r", "--steps", "2")
    with pytest.raises(DataError, match="seed 0, now 1"):
        train.main(["--resume", str(last), "--seed", "1"])
    with pytest.raises(DataError, match="acdc"):
        train.main(["--resume", "--out", str(tmp_path / "r"), "--datasets", "acdc"])
    with pytest.raises(DataError, match="done 1 steps of 1"):
        train.main(["--resume", "--out", str(tmp_path / "r"), "--steps", "1"])
    log = tmp_path / "r" / "log.jsonl"
    kept = log.read_text()
    log.write_text("\0" * 40 + "\n")
    with pytest.raises(DataError, match="log.jsonl has a line that is no log line"):
        train.main(["--resume", str(last)])
    log.write_text(kept)
    run(store, tmp_path / "other", "--steps", "1")
    before = (tmp_path / "other" / "last.pt").read_bytes()
    with pytest.raises(DataError, match="already holds a run"):
        train.main([f"--resume={last}", f"--out={tmp_path / 'other'}"])
    assert (tmp_path / "other" / "last.pt").read_bytes() == before


def test_resuming_on_other_datasets_is_refused(store, tmp_path):
    """The store has lost a dataset since, although the recipe is the same."""
    shutil.copytree(store.root, tmp_path / "store")
    run(Store(tmp_path / "store"), tmp_path / "r", "--steps", "2", "--stop_at", "1")
    shutil.rmtree(tmp_path / "store" / "la")
    with pytest.raises(DataError, match="pass the same data, or start anew"):
        train.main(["--resume", str(tmp_path / "r" / "last.pt")])


@pytest.mark.parametrize("was,is_now", (("train", "test"), ("test", "train"), ("train", None)))
def test_resuming_with_another_split_is_refused(store, tmp_path, was, is_now):
    """A case that was held out is trained on, or is gone: it is named, and nothing is written."""
    shutil.copytree(store.root, tmp_path / "store")
    run(Store(tmp_path / "store"), tmp_path / "r", "--steps", "2", "--stop_at", "1")
    before = (tmp_path / "r" / "config.json").read_bytes()
    case = Store(tmp_path / "store").split("la", was)[0]
    index = case.folder / "case.json"
    if is_now:
        index.write_text(json.dumps({**json.loads(index.read_text()), "split": is_now}))
    else:
        listed = tmp_path / "store" / "la" / "dataset.json"
        about = json.loads(listed.read_text())
        listed.write_text(json.dumps({**about, "cases": [c for c in about["cases"]
                                                         if c != case.folder.name]}))
    words = f"{case.name} was {was} and is {is_now or 'not there'}"
    with pytest.raises(DataError, match=words):
        train.main(["--resume", str(tmp_path / "r" / "last.pt")])
    assert (tmp_path / "r" / "config.json").read_bytes() == before


def test_a_killed_loader_process_is_one_line(store, tmp_path):
    """As a system kills it when memory runs out."""
    argv = [sys.executable, str(ROOT / "train.py"), "--store", str(store.root), *SMALL, "--steps",
            "9000", "--workers", "1", "--out", str(tmp_path / "r")]
    program = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=ONE_THREAD)
    for line in program.stdout:
        if line.startswith("step"):
            break
    children = subprocess.run(["pgrep", "-P", str(program.pid)], capture_output=True, text=True)
    for child in children.stdout.split():
        os.kill(int(child), signal.SIGKILL)
    said = program.communicate(timeout=60)[1]
    assert program.returncode == 2 and "a loader process was killed" in said, said
    assert "Traceback" not in said and len(said.splitlines()) == 1, said


# -------------------------------------------------------------------------------------------------
# It starts from other weights

def test_finetuning_starts_from_a_model_and_its_recipe(store, tmp_path):
    first = run(store, tmp_path / "a", "--steps", "2", "--coloring", "binary", "--set", "loss=l2",
                "--layout", "sequence", "--num_prompts", "2")
    argv = ["--store", str(store.root), "--finetune", str(tmp_path / "a" / "last.pt"),
            "--batch_size", "2"]
    args, recipe = parse([*argv, "--lr", "1e-4"])
    assert (recipe.coloring, recipe.loss, args.steps) == ("binary", "l2", 300)
    assert (recipe.lr, recipe.num_prompts) == (1e-4, "1-2")
    same = train.main([*argv, "--out", str(tmp_path / "b"), "--steps", "1", "--lr", "1e-12"])
    both = zip(first.state_dict().values(), same.state_dict().values(), strict=True)
    assert same.config == first.config
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in both)
    whole = train.main([*argv, "--out", str(tmp_path / "c"), "--steps", "3"])
    train.main([*argv, "--out", str(tmp_path / "d"), "--steps", "3", "--stop_at", "2"])
    resumed = train.main(["--resume", str(tmp_path / "d" / "last.pt")])
    assert equal(whole, resumed) and not equal(whole, first)
    larger = train.main([*argv, "--out", str(tmp_path / "e"), "--steps", "1", "--lr", "1e-12",
                         "--image_size", "64"])
    assert larger.config == type(first.config)(**{**vars(first.config), "image_size": 64})
    assert torch.allclose(larger.blocks[1].mlp[0].weight, first.blocks[1].mlp[0].weight, atol=1e-6)
    with pytest.raises(DataError, match="drop --model"):
        parse([*argv, "--model", "tiny"])
    with pytest.raises(DataError, match="drop --init"):
        parse([*argv, "--init", "mae.pth"])
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        parse(["--finetune", str(tmp_path / "no.pt")])


def test_a_vits_weights_come_in_and_lower_blocks_learn_less(store, tmp_path):
    model = mvg.build("demo", 32)
    names = {"embed.weight": "patch_embed.proj.weight", "embed.bias": "patch_embed.proj.bias"}
    state = {names.get(k, k.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")): v
             for k, v in model.state_dict().items() if k.startswith(("blocks.", "embed."))}
    state["pos_embed"] = model.position.flatten(2).transpose(1, 2)
    torch.save({"model": state}, tmp_path / "vit.pth")
    same = run(store, tmp_path / "r", "--steps", "1", "--init", str(tmp_path / "vit.pth"),
               "--lr", "1e-12")
    both = zip(model.blocks.parameters(), same.blocks.parameters(), strict=True)
    assert all(torch.allclose(a, b) for a, b in both)
    head = [next(p for p in m.head.parameters() if p.ndim == 4) for m in (model, same)]
    assert not torch.allclose(*head)
    for optimizer in ("adamw", "muon"):
        recipe = Recipe(init="vit.pth", optimizer=optimizer)
        groups = [g for o in train.make_optimizers(model, recipe) for g in o.param_groups]
        scale = {id(p): g["scale"] for g in groups for p in g["params"]}
        assert len(scale) == len(list(model.parameters()))
        assert scale[id(head[0])] == 1 == scale[id(model.role)]
        of_blocks = [scale[id(b.attn.qkv.weight)] for b in model.blocks]
        assert of_blocks == pytest.approx([0.8 ** (8 - i) for i in range(8)])
        lowest = scale[id(model.embed.weight)]
        assert lowest == scale[id(model.position)] == pytest.approx(0.8 ** 9)
    fresh = train.make_optimizers(model, Recipe())
    assert {g["scale"] for o in fresh for g in o.param_groups} == {1.0}
    chosen = train.make_optimizers(model, Recipe(layer_decay=0.5))
    assert min(g["scale"] for o in chosen for g in o.param_groups) == pytest.approx(0.5 ** 9)


# -------------------------------------------------------------------------------------------------
# What it leaves and says

def test_validation_scores_held_out_cases_and_keeps_the_best(store, tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.3])
    monkeypatch.setattr(folder, "validate", lambda *a: {"acdc": next(scores)})
    run(store, tmp_path / "r", "--steps", "6", "--save_every", "2", "--validate_cases", "1")
    monkeypatch.undo()
    best, last = (load_checkpoint(tmp_path / "r" / f"{n}.pt") for n in ("best", "last"))
    assert (best["step"], best["score"], last["step"], last["best"]) == (4, 0.5, 6, 0.5)
    about = json.loads((tmp_path / "r" / "config.json").read_text())
    assert about["held_out"]
    for name, cases in about["held_out"].items():
        assert set(cases) < set(about["splits"][name]["train"])
    with pytest.raises(DataError, match="validate_cases 1, now 0"):
        train.main(["--resume", str(tmp_path / "r" / "last.pt"), "--steps", "8",
                    "--validate_cases", "0"])
    samples = context(store, 32, validate_cases=1)
    model = mvg.load(tmp_path / "r" / "last.pt")
    real = folder.validate(model, samples, 0, 1)
    assert set(real) == {n for n, held in samples.held.items() if held}
    assert all(0 <= v <= 1 for v in real.values())
    assert real == folder.validate(model, samples, 0, 1)


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(store, tmp_path, capsys):
    run(store, tmp_path / "r", "--dry_run", "--epochs", "2", "--accumulate", "2")
    said = capsys.readouterr().out
    slices = sum(len(c.foreground) for n in store.datasets for c in store.split(n, "train"))
    assert not (tmp_path / "r").exists()
    assert f"{round(2 * slices / 4)} steps of 1 x 2 x 2 samples" in said
    shares = [float(v) for v in re.findall(r" (\d+\.\d)% ", said)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5)
    for words in ("TFLOP a sample", "GB a process at the peak", "s a step (mean of 10)",
                  "an epoch"):
        assert words in said


def test_the_run_folder(store, tmp_path):
    run(store, tmp_path / "r", "--steps", "4", "--coloring", "predefined")
    about = json.loads((tmp_path / "r" / "config.json").read_text())
    assert about["recipe"]["seed"] == 0 and about["recipe"]["coloring"] == "predefined"
    assert about["model"]["width"] == 192 and set(about["splits"]) == set(FIVE)
    assert about["run"]["out"] == str(tmp_path / "r") and about["steps"] == 4
    assert set(about["splits"]["acdc"]["train"]).isdisjoint(about["splits"]["acdc"]["test"])
    model = mvg.load(tmp_path / "r" / "last.pt")
    assert model.meta["coloring"] == "predefined" and model.meta["predefined"][0]["acdc"] >= 0
    for name in ("loss.png", "samples.png"):
        assert (tmp_path / "r" / name).stat().st_size > 500
    assert not list((tmp_path / "r").glob("*.tmp*"))


# -------------------------------------------------------------------------------------------------
# The step

def state_of(model, optimizers):
    """Copies of all weights, and of all that the optimizers keep."""
    kept = [p.detach().clone() for p in model.parameters()]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                kept += [v.clone() for v in optimizer.state[p].values()]
    return kept


def spoil_nothing(model):
    """The gradients stay finite."""


def spoil_one_number(model):
    model.mask_token.grad[0] = float("nan")


def spoil_everything(model):
    """As clip_grad_norm_ leaves them, whose norm is not a number."""
    for i, p in enumerate(model.parameters()):
        p.grad.fill_((float("nan"), float("inf"), -float("inf"))[i % 3])


@pytest.mark.parametrize("spoil", (spoil_nothing, spoil_one_number, spoil_everything))
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_a_broken_gradient_changes_nothing(optimizer, spoil):
    """Neither weights nor momentum nor moments, in the third step after two that were sound."""
    torch.manual_seed(0)
    model, recipe = mvg.build("demo", 32), Recipe(optimizer=optimizer)
    optimizers = train.make_optimizers(model, recipe)
    assert len(optimizers) == (1 if optimizer == "adamw" else 2)
    before = state_of(model, optimizers)
    for broken in (False, False, True, False):
        images, labels = pairs(2, 2)
        LOSSES["ar"](model, make_batch(images, labels), labels, recipe).mean().backward()
        if broken:
            spoil(model)
        train.update(optimizers, torch.tensor(broken))
        after = state_of(model, optimizers)
        if broken:
            assert len(after) == len(before) > 2 * len(list(model.parameters()))
            assert all(torch.equal(a, b) for a, b in zip(after, before))
        else:
            assert not any(torch.equal(a, b) for a, b in zip(after, before)
                           if a.shape == (192, 192))
        assert all(torch.isfinite(a).all() for a in after)
        assert all(p.grad is None for p in model.parameters())
        before = after


def test_a_broken_first_step_changes_no_weight():
    """Before there is a momentum, too."""
    for optimizer in ("adamw", "muon"):
        model, recipe = mvg.build("demo", 32), Recipe(optimizer=optimizer)
        optimizers = train.make_optimizers(model, recipe)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        train.update(optimizers, torch.tensor(True))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_learning_rate_by_hand():
    recipe = Recipe(lr=0.1, warmup=0.1)
    rates = [train.learning_rate(s, 100, recipe) for s in range(100)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05) and rates[99] < 1e-4


# -------------------------------------------------------------------------------------------------
# A run of so many minutes

def test_a_run_of_so_many_minutes_ends_with_them_and_its_schedule(store, tmp_path, monkeypatch):
    """By a clock that goes on by a tenth of a second whenever it is read."""
    now = itertools.count()
    clock = SimpleNamespace(time=lambda: next(now) / 10, strftime=time.strftime)
    monkeypatch.setattr(folder, "time", clock)
    run(store, tmp_path / "r", "--minutes", "0.1")
    log = read_log(tmp_path / "r")
    rates = [line["lr"] for line in log]
    assert 10 < len(log) < 30 and max(rates[3:6]) > 0.8e-3 and rates[-1] < 0.1e-3
    saved = load_checkpoint(tmp_path / "r" / "last.pt")
    assert saved["step"] == log[-1]["step"] == log[-1]["of"] and 5.8 < saved["spent"] < 6.8
    train.main(["--resume", str(tmp_path / "r" / "last.pt"), "--minutes", "0.15"])
    again = load_checkpoint(tmp_path / "r" / "last.pt")
    assert again["step"] > saved["step"] and 8.8 < again["spent"] < 9.8
    # the pace is known: the schedule goes on at once
    rates = [line["lr"] for line in read_log(tmp_path / "r")[len(log):]]
    assert 1e-4 < rates[0] < 0.7e-3 and rates == sorted(rates, reverse=True)


def test_a_run_of_so_many_minutes_scores_its_last_model(store, tmp_path, monkeypatch):
    now = itertools.count()
    clock = SimpleNamespace(time=lambda: next(now) / 10, strftime=time.strftime)
    monkeypatch.setattr(folder, "time", clock)
    monkeypatch.setattr(folder, "validate", lambda *a: {"acdc": 0.5})
    run(store, tmp_path / "r", "--minutes", "0.05", "--validate_cases", "1", "--save_every", "999")
    assert read_log(tmp_path / "r")[-1]["validation"] == {"acdc": 0.5}
    assert (tmp_path / "r" / "best.pt").exists()


# -------------------------------------------------------------------------------------------------
# The moving average of the weights

def test_the_average_of_the_weights_is_what_is_kept_and_resumed(store, tmp_path):
    """After n steps it is what the recursion says, whether the run was stopped between or not."""
    averaged = ["--set", "average=0.5", "--log_every", "1", "--save_every", "1"]
    plain = run(store, tmp_path / "plain", "--steps", "3")
    whole = run(store, tmp_path / "whole", "--steps", "3", *averaged)
    run(store, tmp_path / "parts", "--steps", "3", "--stop_at", "2", *averaged)
    parts = train.main(["--resume", str(tmp_path / "parts" / "last.pt"), "--stop_at", "3"])
    assert equal(whole, parts) and not equal(whole, plain)
    saved = load_checkpoint(tmp_path / "whole" / "last.pt")
    trained = plain.state_dict()  # averaging does not change the training
    assert all(torch.equal(saved["trained"][k], v) for k, v in trained.items())
    assert equal(mvg.load(tmp_path / "whole" / "last.pt"), whole)
    # by hand, from the weights after every step
    expected = None
    for step in range(3):
        run(store, tmp_path / f"to{step}", "--steps", "3", "--stop_at", str(step + 1))
        weights = load_checkpoint(tmp_path / f"to{step}" / "last.pt")["model"]["embed.weight"]
        if expected is None:
            torch.manual_seed(0)
            expected = train.make_model(*parse([*map(str, SMALL)]), store)[0].embed.weight
        decay = min(0.5, (1 + step) / (10 + step))
        expected = expected * decay + weights * (1 - decay)
    assert torch.allclose(saved["model"]["embed.weight"], expected, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# Compiled blocks

def test_compiled_blocks_train_the_same_model(store, tmp_path, monkeypatch, capsys):
    """Recomputed too. Graphs are made in steps, and none while checkpoint and pictures are."""
    graphs, compiler, write = [], torch.compile, folder.Run.write

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def written(self, optimizers):
        before = len(graphs)
        write(self, optimizers)
        assert len(graphs) == before > 2  # one of the attempt, and those of the steps

    how = ["--steps", "4", "--num_prompts", "1-2", "--save_every", "2"]
    plain = run(store, tmp_path / "a", *how)
    assert "blocks are" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, backend=backend, **k))
    monkeypatch.setattr(folder.Run, "write", written)
    for name, more in (("b", []), ("c", ["--recompute"])):
        torch._dynamo.reset()
        graphs.clear()
        compiled = run(store, tmp_path / name, *how, "--compile", *more)
        assert "blocks are compiled" in capsys.readouterr().out
        both = zip(plain.parameters(), compiled.parameters(), strict=True)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in both)
        assert len(graphs) < 12  # one for every plan, and not for every block
    assert plain.state_dict().keys() == weights(tmp_path / "c" / "last.pt").keys()


def test_what_cannot_be_compiled_is_trained_without(store, tmp_path, monkeypatch, capsys):
    def broken(*args, **more):
        raise RuntimeError("no compiler here\nand so on")

    plain = run(store, tmp_path / "a", "--steps", "1")
    monkeypatch.setattr(torch, "compile", broken)
    assert equal(plain, run(store, tmp_path / "b", "--steps", "1", "--compile"))
    assert "blocks are not compiled: no compiler here\n" in capsys.readouterr().out
    run(store, tmp_path / "c", "--steps", "1", "--compile", "--model", "unet", "--datasets", "la")
    assert "blocks are" not in capsys.readouterr().out  # a U-Net has no blocks


# -------------------------------------------------------------------------------------------------
# Ranks

def steps_of_gradients(store_root, rank, ranks, batch, folder):
    """Gradients of six steps of this rank's share of the batch, after DDP's averaging."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                world_size=ranks)
    samples = context(Store(store_root), 32, seed=1)
    torch.manual_seed(0)
    model = mvg.build("demo", 32)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    gradients, objectives = [], set()
    for step, keys in enumerate(data.BatchSampler(0, 6, batch // ranks, 1, rank, ranks)):
        batch_here = batch_of(samples, *keys)
        objective = samples.switch(step)[0]
        objectives.add(objective)
        labels = color(batch_here.labels, batch_here.palette, batch_here.colored)
        LOSSES[objective](wrapped, batch_here, labels, samples.recipe).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    torch.save((torch.stack(gradients), objectives), f"{folder}/gradients-{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def in_rank(rank, store_root, ranks, batch, folder):
    steps_of_gradients(store_root, rank, ranks, batch, folder)


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one_process(store, tmp_path):
    torch.multiprocessing.spawn(in_rank, (store.root, 2, 8, tmp_path), nprocs=2)
    threads = torch.get_num_threads()
    steps_of_gradients(store.root, 0, 1, 8, tmp_path)
    torch.set_num_threads(threads)
    one = torch.load(tmp_path / "gradients-1-0.pt")
    both = [torch.load(tmp_path / f"gradients-2-{r}.pt") for r in (0, 1)]
    assert one[1] == {"ar", "mim"} == both[0][1] == both[1][1]
    assert torch.equal(both[0][0], both[1][0]) and one[0].abs().max() > 1e-3
    assert (one[0] - both[0][0]).abs().max() < 1e-5


@pytest.mark.slow
def test_torchrun_and_python_are_the_same_code(store, tmp_path):
    """Two ranks of batch 1 log the losses of one process of batch 2."""
    common = [str(ROOT / "train.py"), "--store", str(store.root), *SMALL, "--steps", "4",
              "--device", "cpu", "--validate_cases", "1"]
    two = [*TORCHRUN, "--nproc_per_node=2", *common, "--batch_size", "1"]
    for command, out in ((two, "two"), (common, "one")):
        subprocess.run([sys.executable, *command, "--out", str(tmp_path / out)], check=True,
                       capture_output=True, env=ONE_THREAD)
    two, one = (read_log(tmp_path / n) for n in ("two", "one"))
    for a, b in zip(two, one, strict=True):
        assert a["step"] == b["step"] and a["losses"].keys() == b["losses"].keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    two, one = two[-1]["validation"], one[-1]["validation"]
    assert two.keys() == one.keys() and two == pytest.approx(one, abs=0.02)


# -------------------------------------------------------------------------------------------------
# The command line

def test_bad_training_input_gets_one_line(stand_ins, store, tmp_path, capsys):
    out = ["--out", tmp_path / "r"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    here = ["--store", store.root]
    for argv, words in (
        (["--data_root", tmp_path / "nowhere"], "nowhere"),
        (["--data_root", tmp_path / "empty"], "holds no dataset"),
        (["--data_root", stand_ins, "--datasets", "acdcx"], "did you mean acdc"),
        (["--store", tmp_path / "empty"], "no prepared store"),
        ([*here, "--datasets", "la", "hippocampus"], "did you mean msd_hippocampus"),
        ([], "--data_root"),
        ([*here, "--num_prompts", "4-1"], "range such as 1-4"),
        ([*here, "--mask_ratio", "1.5"], "at most 1"),
        ([*here, "--steps", "0"], "--steps is 0"),
        ([*here, "--cases", "0"], "--cases is 0"),
        ([*here, "--model", "demo", "--init", tmp_path / "no.pt"], "no ViT's state dict"),
        ([*here, "--seed", "-1"], "--seed is -1"),
        ([*here, "--num_prompts", "1-2-3"], "range such as 1-4"),
        ([*here, "--image_size", "100", "--model", "tiny"], "multiple of the patch size"),
        ([*here, "--device", "cuda:9"], "cuda:9"),
        ([*here, "--model", "demo", "--layout", "sequence", "--set", "gate=true"],
         "gate needs the fused layout"),
        (["--resume", tmp_path / "no.pt"], "no.pt"),
        (["--resume", tmp_path / "missing.pt"], "missing.pt"),
    ):
        where = [] if "--resume" in argv else out
        assert words in failure(capsys, train.main, *argv, *where), argv
    assert not (tmp_path / "r").exists()
