"""Training: it learns, it repeats, it resumes, and two ranks are one process."""

import json
import os
import re
import signal
import subprocess
import sys

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
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        train.parse(["--finetune", str(tmp_path / "no.pt")])


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
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *common,
                    "--batch_size", "1", "--out", str(tmp_path / "two")], check=True, capture_output=True, env=environment)
    subprocess.run([sys.executable, *common, "--out", str(tmp_path / "one")], check=True, capture_output=True, env=environment)
    two, one = ([json.loads(l) for l in open(tmp_path / n / "log.jsonl")] for n in ("two", "one"))
    for a, b in zip(two, one):
        assert a["step"] == b["step"] and a["losses"].keys() == b["losses"].keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


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
        (["--store", store.root, "--seed", "-1"], "--seed is -1"),
        (["--store", store.root, "--num_prompts", "1-2-3"], "range such as 1-4"),
        (["--store", store.root, "--image_size", "100", "--model", "tiny"], "multiple of the patch size"),
        (["--store", store.root, "--device", "cuda:9"], "cuda:9"),
        (["--resume", tmp_path / "no.pt"], "no.pt"),
        (["--resume", tmp_path / "missing.pt"], "missing.pt"),
    ):
        assert words in failure(capsys, train.main, *argv, *(out if "--resume" not in argv else [])), argv
    assert not (tmp_path / "r").exists()
