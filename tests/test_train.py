"""Training: it learns, it repeats, it resumes, and two ranks are one process."""

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

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import mvg
import train
from conftest import FIVE, REAL, ROOT

SMALL = ["--model", "demo", "--image_size", "32", "--batch_size", "2", "--log_every", "2"]


def run(store, out, *args):
    return train.main(["--store", str(store.root), "--out", str(out), *SMALL, *args])


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# ---- it learns

@pytest.mark.slow
def test_a_tiny_model_overfits_four_pairs_with_colors_redrawn(store):
    """tiny at 128, a fixed batch of four real ultrasound pairs (stand-ins where the real ones are not here): IoU above 0.95."""
    name = "Dataset801_NerveUltrasound"
    if REAL.is_dir():
        found = data.find(REAL, [name])[name]
        prepared = [data.prepare_case(c, found.dataset)[0] for c in found.cases[:40]]
        slices = [(torch.from_numpy(a["image"][0] / np.float32(65535)), torch.from_numpy(a["label"][0])) for a in prepared if len(np.unique(a["label"])) == 3]
    else:
        slices = [tuple(map(torch.from_numpy, c.read(0)[:2])) for c in store.cases[name] if len(c.classes[0]) == 2]
    images = torch.stack([data.resize_images(image, (128, 128)) for image, _ in slices[:8]]).view(4, 2, 1, 128, 128)
    labels = torch.stack([data.resize_labels(label, (128, 128)) for _, label in slices[:8]]).float().view(4, 2, 1, 128, 128)
    torch.manual_seed(0)
    model, steps = mvg.build("tiny", 128, drop_path=0.0), 500
    args = train.parse(["--optimizer", "muon", "--weight_decay", "0"])[0]
    optimizers, rng, colored = train.make_optimizers(model, args), np.random.default_rng(0), torch.ones(4, dtype=torch.bool)

    def palettes():
        return torch.from_numpy(np.stack([data.make_palette([1, 2], "random", rng) for _ in range(4)]))

    def iou():
        palette, truth = palettes(), labels[:, 1, 0]
        painted = data.color(labels, palette, colored)
        answer = model.predict(model.encode_prompts(images[:, :1], painted[:, :1]), images[:, 1])
        decoded = torch.stack([data.decode(answer[i, 0], palette[i, 1:3]).argmax(0) for i in range(4)])
        return np.mean([((decoded == c) & (truth == c)).sum() / ((decoded == c) | (truth == c)).sum() for c in (1, 2)])

    assert iou() < 0.3
    for step in range(steps):
        for group in (g for o in optimizers for g in o.param_groups):
            group["lr"] = train.learning_rate(step, steps, args)
        loss = model(images, data.color(labels, palettes(), colored), "ar", colored=colored, background_weight=1.0)[0]
        loss.backward()
        train.update(optimizers, torch.tensor(False))
    scores = [iou() for _ in range(10)]  # under ten colorings, each new to the model
    print(f"IoU {np.mean(scores):.3f}, lowest {min(scores):.3f}, after {steps} steps")
    assert np.mean(scores) > 0.95


def test_muon_is_that_of_torch_without_its_rounding():
    """Ten steps on matrices of three shapes: where torch's bfloat16 rounds by at most 0.4%, both are as near as that lets them be."""
    rng = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((24, 24), (16, 48), (48, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = train.Muon(ours, lr=0.02, weight_decay=0.05), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=rng)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (p - s).norm() and (p - s).norm() > 0.5
    values = torch.linalg.svdvals(train.Muon.orthogonal(torch.randn(32, 20, generator=rng)))
    assert 0.5 < values.min() and values.max() < 1.5
    assert torch.equal(train.Muon.orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_bfloat16_is_left_out_where_a_cpu_has_none(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    asked, real = [], torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *a, enabled=True, **k: asked.append(enabled) or real(*a, enabled=enabled, **k))
    run(store, tmp_path / "r", "--steps", "1", "--bf16", "--device", "cpu")
    assert "float32 it is" in capsys.readouterr().out and asked and not any(asked)


# ---- it repeats and resumes

@pytest.mark.parametrize("how", (["--optimizer", "adamw"], ["--optimizer", "muon", "--num_prompts", "1-3"], ["--layout", "sequence", "--first_term", "on"]))
def test_five_steps_equal_three_and_two(store, tmp_path, how):
    """Bit for bit on CPU, both objectives among the steps, the log without gap or repetition."""
    whole = run(store, tmp_path / "whole", "--steps", "5", *how)
    run(store, tmp_path / "parts", "--steps", "5", "--stop_at", "3", *how)
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:  # a step that was logged but not saved
        log.write('{"step": 4, "losses": {}}\n')
    parts = train.main(["--resume", str(tmp_path / "parts" / "last.pt")])  # all settings are the run's
    assert equal(whole, parts)
    logs = [[json.loads(l) for l in open(tmp_path / n / "log.jsonl")] for n in ("whole", "parts")]
    assert [l["step"] for l in logs[0]] == [2, 4, 5] and [l["step"] for l in logs[1]] == [2, 3, 4, 5]
    assert logs[0][-1]["losses"] == logs[1][-1]["losses"]
    saved = [mvg.load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "parts")]
    assert saved[0]["step"] == saved[1]["step"] == 5
    for a, b in zip(saved[0]["optimizers"], saved[1]["optimizers"]):
        assert all(torch.equal(x, y) for k in a["state"] for x, y in zip(a["state"][k].values(), b["state"][k].values()))


def test_sigterm_saves_and_ends_at_the_next_log_line(store, tmp_path, monkeypatch):
    whole, rate = run(store, tmp_path / "whole", "--steps", "5"), train.learning_rate

    def interrupted(step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupted)
    run(store, tmp_path / "r", "--steps", "5")
    assert mvg.load_checkpoint(tmp_path / "r" / "last.pt")["step"] == 4
    monkeypatch.setattr(train, "learning_rate", rate)
    assert equal(whole, train.main(["--resume", "--out", str(tmp_path / "r")]))
    assert [json.loads(l)["step"] for l in open(tmp_path / "r" / "log.jsonl")] == [2, 4, 5]


def test_loader_workers_change_nothing(store, tmp_path):
    assert equal(run(store, tmp_path / "a", "--steps", "2"), run(store, tmp_path / "b", "--steps", "2", "--workers", "1"))


def test_accumulated_batches_are_one_batch_and_so_is_what_is_computed_again(store, tmp_path):
    whole = run(store, tmp_path / "a", "--steps", "3", "--batch_size", "4")
    parts = run(store, tmp_path / "b", "--steps", "3", "--accumulate", "2")  # of 2
    again = run(store, tmp_path / "c", "--steps", "3", "--batch_size", "4", "--recompute")
    other = run(store, tmp_path / "d", "--steps", "3")
    apart = lambda a, b: max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))
    assert apart(whole, parts) < 2e-4 < 2e-3 < apart(whole, other) and apart(whole, again) == 0
    logs = [[json.loads(l)["losses"] for l in open(tmp_path / n / "log.jsonl")] for n in "ab"]
    for a, b in zip(*logs):
        assert a.keys() == b.keys() and all(a[o] == pytest.approx(b[o], rel=1e-2) for o in a)


# ---- it survives

def weights(path):
    return mvg.load_checkpoint(path)["model"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(store, tmp_path, monkeypatch, capsys):
    """Files may not grow beyond a limit from step 3 on, to step 5 or to the end."""
    rate, free = train.learning_rate, resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, until = run(store, tmp_path / "whole", "--steps", "6", "--save_every", "2"), [5]

    def limited(step, *rest):
        if step in (2, until[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20 if step == 2 else free[0], free[1]))
        return rate(step, *rest)

    monkeypatch.setattr(train, "learning_rate", limited)
    again = run(store, tmp_path / "a", "--steps", "6", "--save_every", "2")
    said = capsys.readouterr().out
    assert "is the disk full?; last.pt holds step 2 as before" in said and equal(whole, again)
    assert mvg.load_checkpoint(tmp_path / "a" / "last.pt")["step"] == 6 and not list((tmp_path / "a").glob("*.tmp*"))
    until[0] = 99
    try:
        with pytest.raises(data.DataError, match="last.pt holds step 2 of 6; free some space, then --resume"):
            run(store, tmp_path / "b", "--steps", "6", "--save_every", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    monkeypatch.setattr(train, "learning_rate", rate)
    assert equal(whole, train.main(["--resume", str(tmp_path / "b" / "last.pt")]))
    assert [json.loads(l)["step"] for l in open(tmp_path / "b" / "log.jsonl")] == [2, 4, 6]


def test_what_a_loader_process_cannot_read_is_named(store, tmp_path, capsys):
    shutil.copytree(store.root, tmp_path / "store")
    bad = next((tmp_path / "store" / "acdc").glob("*/image.npy"))
    bad.write_bytes(b"\0" * bad.stat().st_size)  # as long as it was
    said = failure(capsys, train.main, "--store", tmp_path / "store", "--datasets", "acdc", "--out", tmp_path / "r", *SMALL, "--steps", 40, "--workers", 1)
    assert re.search(r"sample \d of step \d+ cannot be read, acdc \w+ slice \d+, \w+ slice \d+: ValueError: ", said), said


def test_a_loss_that_is_not_finite_is_left_out_and_its_case_named(store, tmp_path, monkeypatch, capsys):
    draw, spoilt = data.Episodes.__getitem__, []

    def spoil(self, key):
        sample = draw(self, key)
        if key == (1, 1):
            sample["images"][0, 0, 0, 0] = float("nan")
            spoilt.append(self.describe(sample["dataset"], sample["case"], sample["slice"]))
        return sample

    monkeypatch.setattr(data.Episodes, "__getitem__", spoil)
    model = run(store, tmp_path / "r", "--steps", "4")
    assert re.findall("not finite: (.*)", capsys.readouterr().out) == spoilt[:1]  # the sample grid draws it again
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [json.loads(l)["skipped"] for l in open(tmp_path / "r" / "log.jsonl")] == [1, 0]


def test_nothing_waits_for_the_device_between_logging_steps(store, tmp_path, monkeypatch):
    """On the meta device, which has shapes and no contents, whatever needs a value raises: the first logging step does, not one before."""
    steps = []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(mvg, "pick_device", lambda *a: (torch.device("meta"), "no contents"))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, fused, **k: adamw(*a, **k, capturable=False, foreach=False))  # the fused one knows no meta tensors
    monkeypatch.setattr(train, "update", lambda optimizers, broken: steps.append(broken.device.type))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run(store, tmp_path / "r", "--steps", "9", "--log_every", "7", "--num_prompts", "1-2", "--accumulate", "2")
    assert steps == ["meta"] * 7


def killed_and_resumed(store, out, ranks, kills, steps, rng):
    """Run train.py, killed (SIGKILL to all of its processes) after random times and resumed, to its end; how often it was killed."""
    base = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []), str(ROOT / "train.py")]
    fresh = ["--store", str(store.root), *SMALL, "--steps", str(steps), "--log_every", "1", "--save_every", "1", "--out", str(out), "--device", "cpu"]
    done = 0
    while True:
        argv = ["--resume", "--out", str(out)] if (out / "last.pt").exists() else fresh
        log = out / "log.jsonl"
        before = len(log.read_text().splitlines()) if log.exists() else 0
        process = subprocess.Popen([*base, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done < kills:  # some moment after it began to work
            while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > before):
                time.sleep(0.02)
            time.sleep(rng.random() * 0.8)
        if done < kills and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            subprocess.run(["pkill", "-KILL", "-f", str(out)])  # the ranks have sessions of their own
            done += 1
            continue
        assert process.wait() == 0, process.stderr.read().decode()[-2000:]
        return done


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_kill_9_at_ten_random_moments(store, tmp_path, ranks):
    """The log has no gap and no repeated step, and the weights are those of a run that was not killed, bit for bit."""
    killed_and_resumed(store, tmp_path / "whole", ranks, 0, 60, None)
    assert killed_and_resumed(store, tmp_path / "killed", ranks, 10, 60, random.Random(ranks)) == 10
    logs = [[json.loads(l) for l in open(tmp_path / n / "log.jsonl")] for n in ("whole", "killed")]
    assert [l["step"] for l in logs[1]] == list(range(1, 61))
    assert [l["losses"] for l in logs[0]] == [l["losses"] for l in logs[1]]
    whole, killed = weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "killed" / "last.pt")
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    if ranks == 2:
        with pytest.raises(data.DataError, match="trained on 2 processes, now 1"):
            train.main(["--resume", str(tmp_path / "killed" / "last.pt"), "--steps", "61"])


def torchrun(store, out, *argv):
    """train.py on two ranks, and the process ids of the ranks once the log has a line."""
    run = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), "--store", str(store.root),
                            *SMALL, "--steps", "100000", "--save_every", "1000", "--device", "cpu", "--out", str(out), *argv],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    return run, [int(p) for p in subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_and_ends_all_ranks(store, tmp_path):
    run, ranks = torchrun(store, tmp_path / "r")
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    log = [json.loads(l) for l in open(tmp_path / "r" / "log.jsonl")]
    assert len(ranks) == 2 and not any(data.alive(p) for p in ranks)
    assert log[-1]["stopped"] and mvg.load_checkpoint(tmp_path / "r" / "last.pt")["step"] == log[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("death", ("killed", "error"))
def test_a_rank_that_dies_ends_the_others_within_a_minute(store, tmp_path, death):
    shutil.copytree(store.root, tmp_path / "store")
    run, ranks = torchrun(data.Store(tmp_path / "store"), tmp_path / "r", "--datasets", "acdc")
    start = time.time()
    if death == "killed":
        os.kill(ranks[1], signal.SIGKILL)
    else:
        for bad in (tmp_path / "store" / "acdc").glob("*/image.npy"):
            bad.unlink()
    said = run.communicate(timeout=60)[0]
    print(f"{death}: {time.time() - start:.1f} s")
    assert run.returncode != 0 and not any(data.alive(p) for p in ranks)
    assert ("Signal 9 (SIGKILL)" if death == "killed" else "cannot be read, acdc ") in said


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(store, tmp_path):
    run(store, tmp_path / "r", "--steps", "2", "--stop_at", "1")
    with pytest.raises(data.DataError, match="already holds a run"):
        run(store, tmp_path / "r", "--steps", "2")
    with pytest.raises(data.DataError, match="seed 0, now 1"):
        train.main(["--resume", str(tmp_path / "r" / "last.pt"), "--seed", "1"])
    with pytest.raises(data.DataError, match="acdc"):
        train.main(["--resume", "--out", str(tmp_path / "r"), "--datasets", "acdc"])
    with pytest.raises(data.DataError, match="done 1 steps of 1"):
        train.main(["--resume", "--out", str(tmp_path / "r"), "--steps", "1"])
    run(store, tmp_path / "other", "--steps", "1")
    before = (tmp_path / "other" / "last.pt").read_bytes()
    with pytest.raises(data.DataError, match="already holds a run"):
        train.main([f"--resume={tmp_path / 'r' / 'last.pt'}", f"--out={tmp_path / 'other'}"])
    assert (tmp_path / "other" / "last.pt").read_bytes() == before


def test_finetuning_starts_from_a_model_and_its_recipe(store, tmp_path):
    first = run(store, tmp_path / "a", "--steps", "2", "--coloring", "binary", "--loss", "l2", "--layout", "sequence", "--num_prompts", "2")
    argv = ["--store", str(store.root), "--finetune", str(tmp_path / "a" / "last.pt"), "--batch_size", "2"]
    args = train.parse([*argv, "--lr", "1e-4"])[0]
    assert (args.coloring, args.loss, args.steps, args.lr, args.num_prompts) == ("binary", "l2", 300, 1e-4, "1-2")
    same = train.main([*argv, "--out", str(tmp_path / "b"), "--steps", "1", "--lr", "1e-12"])
    assert same.config == first.config and all(torch.allclose(x, y, atol=1e-6) for x, y in zip(first.state_dict().values(), same.state_dict().values()))
    whole = train.main([*argv, "--out", str(tmp_path / "c"), "--steps", "3"])
    train.main([*argv, "--out", str(tmp_path / "d"), "--steps", "3", "--stop_at", "2"])
    assert equal(whole, train.main(["--resume", str(tmp_path / "d" / "last.pt")])) and not equal(whole, first)
    with pytest.raises(data.DataError, match="drop --model"):
        train.parse([*argv, "--model", "tiny"])
    with pytest.raises(data.DataError, match="drop --init"):
        train.parse([*argv, "--init", "mae.pth"])
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        train.parse(["--finetune", str(tmp_path / "no.pt")])


def test_a_vits_weights_come_in_and_lower_blocks_learn_less(store, tmp_path):
    model = mvg.build("demo", 32)
    names = {"embed.weight": "patch_embed.proj.weight", "embed.bias": "patch_embed.proj.bias"}
    state = {names.get(k, k.replace("mlp.0", "mlp.fc1").replace("mlp.2", "mlp.fc2")): v for k, v in model.state_dict().items() if k.startswith(("blocks.", "embed."))}
    state["pos_embed"] = model.position.flatten(2).transpose(1, 2)
    torch.save({"model": state}, tmp_path / "vit.pth")
    same = run(store, tmp_path / "r", "--steps", "1", "--init", str(tmp_path / "vit.pth"), "--lr", "1e-12")
    assert all(torch.allclose(a, b) for a, b in zip(model.blocks.parameters(), same.blocks.parameters()))
    head = [next(p for p in m.head.parameters() if p.ndim == 4) for m in (model, same)]
    assert not torch.allclose(*head)
    for optimizer in ("adamw", "muon"):
        args = train.parse(["--init", "vit.pth", "--optimizer", optimizer])[0]
        scale = {id(p): g["scale"] for o in train.make_optimizers(model, args) for g in o.param_groups for p in g["params"]}
        assert len(scale) == len(list(model.parameters()))
        assert scale[id(head[0])] == 1 == scale[id(model.role)]
        assert [scale[id(b.attn.qkv.weight)] for b in model.blocks] == pytest.approx([0.8 ** (8 - i) for i in range(8)])
        assert scale[id(model.embed.weight)] == scale[id(model.position)] == pytest.approx(0.8 ** 9)
    assert {g["scale"] for o in train.make_optimizers(model, train.parse([])[0]) for g in o.param_groups} == {1.0}


def test_validation_scores_held_out_cases_and_keeps_the_best(store, tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.3])
    monkeypatch.setattr(train, "validate", lambda *a: {"acdc": next(scores)})
    run(store, tmp_path / "r", "--steps", "6", "--save_every", "2", "--validate_cases", "1")
    monkeypatch.undo()
    best, last = (mvg.load_checkpoint(tmp_path / "r" / f"{n}.pt") for n in ("best", "last"))
    assert (best["step"], best["score"], last["step"], last["best"]) == (4, 0.5, 6, 0.5)
    about = json.loads((tmp_path / "r" / "config.json").read_text())
    assert about["held_out"] and all(set(cases) < set(about["splits"][n]["train"]) for n, cases in about["held_out"].items())
    with pytest.raises(data.DataError, match="validate_cases 1, now 0"):
        train.main(["--resume", str(tmp_path / "r" / "last.pt"), "--steps", "8", "--validate_cases", "0"])
    episodes = data.Episodes(store, 32, 8, 8, held_out=1)
    model, cpu = mvg.load(tmp_path / "r" / "last.pt"), torch.device("cpu")
    real = train.validate(model, episodes, cpu, 0, 1, 0)
    assert set(real) == {n for n, held in episodes.held.items() if held} and all(0 <= v <= 1 for v in real.values())
    assert real == train.validate(model, episodes, cpu, 0, 1, 0)


def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(store, tmp_path, capsys):
    run(store, tmp_path / "r", "--dry_run", "--epochs", "2", "--accumulate", "2")
    said = capsys.readouterr().out
    slices = sum(len(c.foreground) for n in store.datasets for c in store.split(n, "train"))
    assert not (tmp_path / "r").exists() and f"{round(2 * slices / 4)} steps of 1 x 2 x 2 samples" in said
    shares = [float(v) for v in re.findall(r" (\d+\.\d)% ", said)]
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5)
    for words in ("TFLOP a sample", "GB a process at the peak", "s a step (mean of 10)", "an epoch"):
        assert words in said


def test_the_run_folder(store, tmp_path):
    run(store, tmp_path / "r", "--steps", "4", "--coloring", "predefined")
    about = json.loads((tmp_path / "r" / "config.json").read_text())
    assert about["settings"]["seed"] == 0 and about["model"]["width"] == 192 and set(about["splits"]) == set(FIVE)
    assert set(about["splits"]["acdc"]["train"]).isdisjoint(about["splits"]["acdc"]["test"])
    model = mvg.load(tmp_path / "r" / "last.pt")
    assert model.meta["coloring"] == "predefined" and model.meta["predefined"][0]["acdc"] >= 0
    for name in ("loss.png", "samples.png"):
        assert (tmp_path / "r" / name).stat().st_size > 500
    assert not list((tmp_path / "r").glob("*.tmp*"))


def test_a_broken_gradient_changes_nothing():
    model = mvg.build("demo", 32)
    args = train.parse([])[0]
    optimizers = train.make_optimizers(model, args)
    images = torch.rand(2, 2, 1, 32, 32)
    for broken in (False, True):
        model(images, images, "ar")[0].backward()
        if broken:
            model.mask_token.grad[0] = float("nan")
            before = [p.clone() for p in model.parameters()], {k: v.clone() for k, v in optimizers[0].state[model.role].items()}
        train.update(optimizers, torch.tensor(broken))
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters()))
    assert all(torch.equal(v, optimizers[0].state[model.role][k]) for k, v in before[1].items())


def test_learning_rate_by_hand():
    args = train.parse(["--lr", "0.1", "--warmup", "0.1"])[0]
    rates = [train.learning_rate(s, 100, args) for s in range(100)]
    assert rates[0] == pytest.approx(0.01) and rates[9] == rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05) and rates[99] < 1e-4


def test_the_papers_defaults():
    args, prompts = train.parse([])
    assert (args.epochs, args.lr, args.weight_decay, args.warmup, prompts) == (100, 1e-3, 0.05, 0.05, (1, 1))
    assert (args.objective, args.seg_share, args.mim_share, args.coloring, args.loss) == ("hybrid", 0.5, 0.9, "random", "smooth_l1")
    assert mvg.Config(**mvg.SIZES["large"]).image_size == 448


# ---- ranks

def steps_of_gradients(store_root, rank, ranks, batch, folder):
    """The gradients of six steps of this rank's share of the batch, from fixed weights, after DDP's averaging."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    episodes = data.Episodes(data.Store(store_root), 32, 8, 8, seed=1)
    torch.manual_seed(0)
    model = mvg.build("demo", 32)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    gradients, objectives = [], set()
    for step, keys in enumerate(data.Steps(0, 6, batch // ranks, rank, ranks)):
        b = torch.utils.data.default_collate([episodes[k] for k in keys])
        objective = episodes.step(step)[0]
        objectives.add(objective)
        loss = wrapped(b["images"], data.color(b["labels"], b["palette"], b["colored"]), objective, b.get("hidden"), b["colored"],
                       b["valid"], b["first"].nonzero()[:, 0], b["drop"])[0]
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    torch.save((torch.stack(gradients), objectives), f"{folder}/gradients-{ranks}-{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def in_rank(rank, store_root, ranks, batch, folder):
    steps_of_gradients(store_root, rank, ranks, batch, folder)


def test_two_ranks_give_the_gradients_of_one_process(store, tmp_path):
    torch.multiprocessing.spawn(in_rank, (store.root, 2, 8, tmp_path), nprocs=2)
    threads = torch.get_num_threads()
    steps_of_gradients(store.root, 0, 1, 8, tmp_path)
    torch.set_num_threads(threads)
    one, both = torch.load(tmp_path / "gradients-1-0.pt"), [torch.load(tmp_path / f"gradients-2-{r}.pt") for r in (0, 1)]
    assert one[1] == {"ar", "mim"} == both[0][1] == both[1][1]
    assert torch.equal(both[0][0], both[1][0]) and one[0].abs().max() > 1e-3
    assert (one[0] - both[0][0]).abs().max() < 1e-5


def test_torchrun_and_python_are_the_same_code(store, tmp_path):
    """Two ranks of batch 1 log the losses of one process of batch 2."""
    common = [str(ROOT / "train.py"), "--store", str(store.root), *SMALL, "--steps", "4", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    common += ["--validate_cases", "1"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *common,
                    "--batch_size", "1", "--out", str(tmp_path / "two")], check=True, capture_output=True, env=environment)
    subprocess.run([sys.executable, *common, "--out", str(tmp_path / "one")], check=True, capture_output=True, env=environment)
    two, one = ([json.loads(l) for l in open(tmp_path / n / "log.jsonl")] for n in ("two", "one"))
    for a, b in zip(two, one):
        assert a["step"] == b["step"] and a["losses"].keys() == b["losses"].keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert two[-1]["validation"].keys() == one[-1]["validation"].keys() and two[-1]["validation"] == pytest.approx(one[-1]["validation"], abs=0.02)


# ---- the command line

def test_no_flag_is_unread():
    for program in ("train", "infer", "eval"):
        text = (ROOT / f"{program}.py").read_text()
        for flag in re.findall(r'add\("--(\w+)"', text):
            assert re.search(rf"args\.{flag}\b|\"{flag}\"", text.split("parse_args", 1)[1]), f"{program}.py --{flag} is never read"


def failure(capsys, main, *argv):
    """Run a program as its command line does; the one line it says, and its exit status 2."""
    with pytest.raises(SystemExit) as stop:
        data.command_line(lambda: main([str(a) for a in argv]))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and said.startswith("error: ") and "\n" not in said, said
    return said


def test_bad_training_input_gets_one_line(stand_ins, store, tmp_path, capsys):
    out = ["--out", tmp_path / "r"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    for argv, words in (
        (["--data_root", tmp_path / "nowhere"], "nowhere"),
        (["--data_root", tmp_path / "empty"], "holds no dataset"),
        (["--data_root", stand_ins, "--datasets", "acdcx"], "did you mean acdc"),
        (["--store", tmp_path / "empty"], "no prepared store"),
        (["--store", store.root, "--datasets", "la", "hippocampus"], "did you mean msd_hippocampus"),
        ([], "--data_root"),
        (["--store", store.root, "--num_prompts", "4-1"], "range such as 1-4"),
        (["--store", store.root, "--mask_ratio", "1.5"], "at most 1"),
        (["--store", store.root, "--steps", "0"], "--steps is 0"),
        (["--store", store.root, "--cases", "0"], "--cases is 0"),
        (["--store", store.root, "--model", "demo", "--init", tmp_path / "no.pt"], "no ViT's state dict"),
        (["--store", store.root, "--seed", "-1"], "--seed is -1"),
        (["--store", store.root, "--num_prompts", "1-2-3"], "range such as 1-4"),
        (["--store", store.root, "--image_size", "100", "--model", "tiny"], "multiple of the patch size"),
        (["--store", store.root, "--device", "cuda:9"], "cuda:9"),
        (["--resume", tmp_path / "no.pt"], "no.pt"),
        (["--resume", tmp_path / "missing.pt"], "missing.pt"),
    ):
        assert words in failure(capsys, train.main, *argv, *(out if "--resume" not in argv else [])), argv
    assert not (tmp_path / "r").exists()
