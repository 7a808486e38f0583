"""Score a checkpoint on every dataset found, by the paper's protocol: one prompt, the matching slice of a random training case.

    python eval.py --data_root DIR --checkpoint runs/mvg/last.pt [--wrong_prompt]
    torchrun --nproc_per_node=8 eval.py --data_root DIR --checkpoint runs/mvg/last.pt        the same table, sooner
    python eval.py --compare unified=runs/a isolated=runs/b,runs/c                             finished runs side by side

Segmentation: IoU and Dice of every foreground class over a case's slices (the volume at once), averaged over the classes of
a case, then over cases; a class absent from truth and prediction is skipped. Image tasks: MAE, PSNR, SSIM a slice on
[0, 1], averaged over slices, then over cases; where the truth is known in part only (inpainting), there. Detection: boxes are
read back from the painted image; IoU of every true box with the best of them. Beside every score stands that of copying (the
prompt's label, or the input; for detection the prompt's boxes), for images that of the linear filter that fits the prompt pair best, and, with --wrong_prompt, those of prompts that should be of no
use; intervals are bootstrapped over patients.

Written into --out: scores.jsonl, a line a case as it is scored (a stopped evaluation goes on from there), then results.json,
cases.csv (a line a case, prompt and class), tables.md (with the paper's Tables 2 and 3), scores.png, examples.png (the median
case of every dataset) and examples/ (its worst, median and best).
"""

import argparse
import csv
import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import boxes
import data
import infer
import mvg
import readers
import unet
from data import DataError

WRONG = {"other_class": "other class", "other_dataset": "other dataset", "empty": "empty"}  # prompts that should be of no use
MAIN = ("mIoU", "box_IoU", "PSNR")  # what a dataset is known by, the first it has

# The paper's Tables 2 (mIoU) and 3 (MAE, PSNR, SSIM each). *: with 64 examples.
TABLE_2 = ("amos_ct", "word", "btcv", "amos_mri", "microsegnet", "promise12", "chest_xray", "acdc", "la")
PAPER_2 = {"ResNet-18": "0.55 0.50 0.51 0.53 0.67 0.75 0.62 0.69 0.68", "UNet": "0.81 0.83 0.82 0.81 0.90 0.91 0.89 0.86 0.83",
           "VNet": "0.70 0.75 0.72 0.73 0.90 0.89 0.86 0.87 0.84", "TranUNet": "0.80 0.82 0.84 0.82 0.94 0.90 0.88 0.88 0.84",
           "nnUNet": "0.87 0.90 0.91 0.88 0.97 0.93 0.90 0.90 0.89", "UniverSeg*": "0.20 0.29 0.37 0.25 0.71 0.55 0.55 0.54 0.57",
           "Painter": "0.52 0.48 0.45 0.51 0.69 0.68 0.50 0.52 0.55", "LVM": "0.12 0.14 0.10 0.15 0.36 0.30 0.10 0.12 0.13",
           "SegGPT": "0.66 0.66 0.65 0.71 0.88 0.75 0.68 0.70 0.71", "MVG": "0.73 0.74 0.73 0.74 0.91 0.85 0.79 0.85 0.81"}
TABLE_3 = ("brats_gli", "brats_local", "ldct")
PAPER_3 = {"ResNet-18": "0.026 20.984 0.860 0.008 30.981 0.959 0.022 30.519 0.709", "Pix2Pix": "0.018 24.311 0.899 0.008 34.891 0.982 0.020 33.011 0.730",
           "TranUNet": "0.016 25.541 0.938 0.005 35.561 0.989 0.016 33.999 0.761", "Painter": "0.021 24.031 0.920 0.006 33.595 0.978 0.020 33.104 0.721",
           "MVG": "0.019 24.721 0.929 0.006 34.521 0.981 0.018 33.521 0.731"}

MAX_PSNR = 100.0  # dB, stands for infinity where two slices are equal, so that means stay numbers


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def overlap(prediction, truth, classes):
    """IoU and Dice of each class over arrays of one shape: {class: (IoU, Dice)}; classes absent from both are left out."""
    scores = {}
    for c in classes:
        p, t = prediction == c, truth == c
        both, p, t = int((p & t).sum()), int(p.sum()), int(t.sum())
        if p + t:
            scores[c] = both / (p + t - both), 2 * both / (p + t)
    return scores


def ssim(prediction, truth, valid=None):
    """Structural similarity of two images (H, W) in [0, 1]: 11x11 Gaussian window, sigma 1.5 (Wang et al. 2004).

    The mean over the windows that lie wholly inside the image, or, with valid (H, W) bool, over those centred on a valid
    pixel. nan for images smaller than the window, or without a valid one.
    """
    if min(truth.shape) < 11:
        return float("nan")
    g = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(np.asarray(a, np.float64))[None, None] for a in (prediction, truth))
    blur = lambda a: F.conv2d(a, window)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2)))[0, 0].numpy()
    if valid is not None:
        similarity = similarity[valid[5:-5, 5:-5]]
    return float(similarity.mean()) if similarity.size else float("nan")


def image_scores(prediction, truth, valid=None):
    """(MAE, PSNR in dB, SSIM) of two images (H, W) in [0, 1], inside valid (H, W) bool if given; nan where nothing is valid."""
    difference = (prediction.astype(np.float64) - truth)[valid if valid is not None else slice(None)]
    if difference.size == 0:
        return (float("nan"),) * 3
    mse = (difference ** 2).mean()
    psnr = min(MAX_PSNR, -10 * np.log10(mse)) if mse > 0 else MAX_PSNR
    return float(np.abs(difference).mean()), float(psnr), ssim(prediction, truth, valid)


def box_iou(a, b):
    """IoU of two boxes (top, left, bottom, right), each from its first row and column to its last."""
    shared = [min(a[2 + i], b[2 + i]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    area = lambda box: (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
    both = max(0, shared[0]) * max(0, shared[1])
    return both / (area(a) + area(b) - both)


def box_scores(read, truth):
    """(mean over the true boxes of the IoU with the best box read, share of them above 0.5, boxes read that hit none)."""
    overlaps = np.array([[box_iou(t, r) for r in read] or [0.0] for t in truth])
    best = overlaps.max(1)
    return float(best.mean()), float((best >= 0.5).mean()), float((overlaps.max(0) < 0.5).sum()) if read else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# One case

def read_slices(case, numbers):
    """Slices of a stored case: images, labels (integers for classes), valid or None, each (K, H, W)."""
    images, labels, valid = zip(*(case.read(k) for k in numbers))
    return np.stack(images), np.stack(labels), None if valid[0] is None else np.stack(valid)


def answer_case(model, case, training, dataset, slices, seed, others=(), wrong=False, prompts=1, **how):
    """Predict the kept slices of a case and copy its prompt; all that `score` and the figures need, (K, H, W) each.

    The prompt is drawn from (seed, case), whatever other cases are scored. wrong: also answer prompts that should be of no use: of a case of
    another dataset (one of `others`), with every class called the next one, and without any answer (no class; a black image). prompts: how many training cases are shown;
    how: votes, mode, neighbours, tile, propagate, close_up of `infer.predict_stack`. A U-Net takes no prompt.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{dataset.name}/{case.name}".encode())])
    shown = [data.evaluation_prompt(training, case, rng, slices)]
    for _ in range(prompts - 1):  # others, as long as there are any
        left = [c for c in training if c.kind == case.kind and c.patient not in {case.patient, *(s.patient for s in shown)}]
        shown += [data.evaluation_prompt(left, case, rng, slices)] if left else []
    pick = (lambda labels: labels.astype(np.uint8)) if dataset.colored else (lambda labels: labels)

    def pair(case):
        images, labels, valid = read_slices(case, case.kept(slices))
        return images, pick(labels), valid

    def ask(*pairs, found=None):
        return infer.predict_stack(model, list(pairs), images, dataset.colored, seed=seed, dataset=dataset.name, found=found, **how)

    images, truth, valid = pair(case)
    (prompt_images, prompt_labels), *more = [pair(c)[:2] for c in shown]
    specialist, found = isinstance(model, unet.UNet), []
    answers = {"prediction": unet.predict_stack(model, images) if specialist else ask((prompt_images, prompt_labels), *more, found=found)}
    if others:
        answers["other_dataset"] = ask(pair(others[rng.integers(len(others))])[:2])
    if wrong and not specialist:
        classes = np.unique(prompt_labels)[1:] if dataset.colored else ()
        if len(classes) > 1:
            following = np.arange(256, dtype=np.uint8)
            following[classes] = np.roll(classes, -1)
            answers["other_class"] = ask((prompt_images, following[prompt_labels]))
        answers["empty"] = (answer_without_label(model, prompt_images, classes, images, how.get("votes"), how.get("mode", "auto"), seed, dataset.name) if dataset.colored
                            else ask((prompt_images, np.zeros_like(prompt_labels))))
    side = (model.config.image_size,) * 2
    seen = images if getattr(model.config, "copies", False) and not how.get("tile") else data.resize_images(data.resize_images(torch.from_numpy(images), side), images.shape[1:]).numpy()  # as sharp as an answer
    matched = [data.matching_slice(k, len(images), len(prompt_images)) for k in range(len(images))]
    prompt_images, prompt_labels = prompt_images[matched], prompt_labels[matched]
    copied = data.resize_labels(torch.from_numpy(prompt_labels), images.shape[1:]).numpy() if dataset.colored else images
    if dataset.task == "detection":  # the prompt's lines laid over the image
        lines = torch.from_numpy(np.clip(prompt_labels - prompt_images, 0, 1))
        copied = (seen + data.resize_images(lines, images.shape[1:]).numpy()).clip(0, 1)
    if not dataset.colored:
        answers["filter"] = np.concatenate([filtered(*(torch.from_numpy(a[None, k:k + 1]) for a in (prompt_images, prompt_labels, images))) for k in range(len(images))])
    return {**answers, "copy": copied, "truth": truth, "images": images, "seen": seen, "boxes": case.index["boxes"], "found": found,
            "prompt_images": prompt_images, "prompt_labels": prompt_labels, "valid": valid, "prompt": " ".join(c.name for c in shown)}


def filtered(prompt_image, prompt_label, image):
    """What the linear filter from a prompt's image to its label makes of an image: (1, 1, H, W) tensors -> (1, H, W) array."""
    fitted = mvg.PromptFilter.fit(mvg.PromptFilter.sums(prompt_image, prompt_label))
    return mvg.PromptFilter.apply(fitted, image)[0][0].clamp(0, 1).numpy()


def answer_without_label(model, prompt_images, classes, images, votes, mode, seed, name):
    """What a model paints for classes that its prompt, a middle slice, does not show: (K, H, W) uint8."""
    side, answer = (model.config.image_size,) * 2, np.zeros(images.shape, np.uint8)
    shown = data.resize_images(torch.from_numpy(prompt_images[len(prompt_images) // 2])[None, None], side)
    for k in range(0, len(images), infer.BATCH):
        x = data.resize_images(torch.from_numpy(images[k:k + infer.BATCH])[:, None], side)
        fit = infer.segment(model, shown, torch.zeros(shown.shape, dtype=torch.long), x, classes.tolist(), mode, votes, seed, name)
        answer[k:k + infer.BATCH] = np.array([0, *classes], np.uint8)[data.resize_images(fit, images.shape[1:]).argmax(1).numpy()]
    return answer


def score(prediction, case, dataset):
    """case: what `answer_case` returns. The scores of one case: {class name: (IoU, Dice)}, or {"image": (MAE, PSNR, SSIM)}, with {"boxes": (IoU, hit rate, false
    boxes)} for detection."""
    if dataset.colored:
        found = overlap(prediction, case["truth"], range(1, len(dataset.labels) + 1))
        return {dataset.labels[c - 1]: s for c, s in found.items()}
    valid = case["valid"] if case["valid"] is not None else [None] * len(prediction)
    scores = {"image": tuple(known_mean(v) for v in zip(*(image_scores(*s) for s in zip(prediction, case["truth"], valid))))}
    if dataset.task == "detection":
        asked_for = prediction is case.get("prediction") and case.get("found")  # as masks, and not read from a painted picture; a case is one picture
        scores["boxes"] = box_scores(asked_for[0] if asked_for else boxes.read(prediction[0], case["seen"][0]), case["boxes"])
    return scores


def known_mean(values):
    """The mean of what is not nan; nan if nothing is."""
    values = [v for v in values if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def summary(scores, patients, dataset):
    """The mean over cases: {"mIoU", "Dice", "per_class"}, or {"MAE", "PSNR", "SSIM"}, for detection with "box_IoU", "hit_rate"
    and "false_boxes"; "interval" {metric: [low, high]} holds 95% of the bootstrap over patients.

    scores: a list of `score`'s answers; patients: whose they are.
    """
    known = [bool(s) for s in scores]
    scores, patients = [s for s in scores if s], [p for p, k in zip(patients, known) if k]
    if dataset.colored:
        values = {m: [float(np.mean([v[i] for v in s.values()])) for s in scores] for i, m in enumerate(("mIoU", "Dice"))}
    else:
        values = {m: [s["image"][i] for s in scores] for i, m in enumerate(("MAE", "PSNR", "SSIM"))}
        if dataset.task == "detection":
            values |= {m: [s["boxes"][i] for s in scores] for i, m in enumerate(("box_IoU", "hit_rate", "false_boxes"))}
    mean = lambda v: None if np.isnan(m := known_mean(v)) else m
    result = {m: mean(v) for m, v in values.items()}
    if dataset.colored:
        per_class = {name: [s[name] for s in scores if name in s] for name in dataset.labels}
        result["per_class"] = {n: dict(zip(("IoU", "Dice"), np.mean(v, 0).tolist()), cases=len(v)) for n, v in per_class.items() if v}
    return {**result, "interval": {m: interval(v, patients) for m, v in values.items()}}


def interval(values, patients, draws=2000):
    """The 95% bootstrap interval [low, high] of the mean of values (nan is left out), patients drawn as wholes; None for fewer
    than two patients."""
    groups = {}
    for value, patient in zip(values, patients):
        if not np.isnan(value):
            groups.setdefault(patient, []).append(value)
    if len(groups) < 2:
        return None
    sums, counts = np.array([sum(g) for g in groups.values()]), np.array([len(g) for g in groups.values()])
    drawn = np.random.default_rng(0).integers(len(groups), size=(draws, len(groups)))
    return np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# All cases

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data_root", help="folder that holds the datasets as they were downloaded")
    add("--store", help="prepared store (default: store/<name of data_root>-<hash>)")
    add("--checkpoint", help="what train.py wrote (default: checkpoints/*.pt, else the newest runs/*/last.pt)")
    add("--out", help="folder for what is written (default: eval/ beside the checkpoint)")
    add("--datasets", nargs="+", metavar="NAME", help="only these (default: every dataset found)")
    add("--brats_pairs", nargs="+", metavar="FROM:TO", help="what BraTS-GLI translates, of t1n t1c t2w t2f (default: t1c:t2w t2w:t1c)")
    add("--split", default="test", choices=("test", "train", "all"), help="cases to score; prompts are training cases of other patients")
    add("--wrong_prompt", action="store_true", help="also score prompts that should be of no use: of another class, of another dataset, empty")
    add("--max_cases", type=int, help="at most so many cases a dataset")
    add("--slices", default="foreground", choices=("foreground", "all"), help="foreground: slices whose truth has some (paper silent)")
    add("--prompts", type=int, default=1, help="training cases shown (paper: 1)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"), help="auto: as trained (ours: ar for segmentation, canvas for images)")
    add("--votes", type=int, help="colorings (binary: views) averaged (paper: 1; default: 2 where training knew such views, else 1)")
    add("--neighbours", type=int, default=0, help="prompt slices before and after the matching one that are shown as well (paper: 0)")
    add("--tile", action="store_true", help="nine overlapping quarters at twice the resolution")
    add("--propagate", action="store_true", help="show each slice the answer of the one before")
    add("--close_up", action=argparse.BooleanOptionalAction, help="look a second time, from near, where a class was seen (default: where training knew that)")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--compare", nargs="+", metavar="NAME=RUN[,RUN]", help="score nothing, put finished runs side by side (their eval/results.json); several of one name are one column")
    args = p.parse_args(argv)
    if args.compare:
        return compare(args.compare, args.out)
    for name in ("votes", "max_cases", "prompts"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DataError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    for name in ("seed", "neighbours"):
        if getattr(args, name) < 0:
            raise DataError(f"--{name} is {getattr(args, name)}: it must not be below 0")
    how = {name: getattr(args, name) for name in ("votes", "mode", "neighbours", "tile", "propagate", "close_up")}
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
    say = print if rank == 0 else lambda *a: None
    checkpoint = Path(args.checkpoint or infer.find_checkpoint())
    device, reason = mvg.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    model = unet.load(checkpoint, device)
    store = data.open_store(args.data_root, args.store, args.datasets, args.brats_pairs) if rank == 0 else None
    if ranks > 1:  # the others find it prepared
        dist.broadcast_object_list(found := [store and list(store.datasets)])
        store = store or data.Store(args.store or data.default_store(args.data_root), *found)
    out = Path(args.out) if args.out else checkpoint.parent / "eval"
    say(f"checkpoint {checkpoint}, device {device} ({reason})")

    # ---- what is to be scored, and what was before
    training, todo = {}, {}
    for name in store.datasets:
        training[name] = [c for c in store.split(name, "train") if c.kept(args.slices)]
        cases = store.cases[name] if args.split == "all" else store.split(name, args.split)
        cases = [c for c in cases if c.kept(args.slices) and any(t.patient != c.patient and t.kind == c.kind for t in training[name])]
        if not cases:
            say(f"{name}: not scored, it has no {args.split} case with a training case of another patient")
        todo |= {(name, c.name): c for c in cases[:args.max_cases]}
    about = {"checkpoint": str(checkpoint), "modified": checkpoint.stat().st_mtime, "store": str(store.root), "slices": args.slices, "seed": args.seed, "prompts": args.prompts,
             "wrong_prompt": args.wrong_prompt, **how}
    ledger, done = out / "scores.jsonl", {}
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        before = read_ledger(ledger, about) or {}  # also leaves half a line behind
        ledger.write_text("".join(json.dumps(line) + "\n" for line in (about, *before.values())))
    if ranks > 1:
        dist.barrier()
    done = read_ledger(ledger, about)
    left = [key for key in todo if "scores" not in done.get(key, ())]
    if len(left) < len(todo):
        say(f"{len(todo) - len(left)} of {len(todo)} cases were scored before")
    if ranks > 1:
        dist.barrier()

    # ---- score, case by case
    def others(name):
        return [c for n, d in store.datasets.items() if args.wrong_prompt and n != name and d.colored == store.datasets[name].colored for c in training[n]]

    start = time.time()
    for name, case_name in tqdm(left[rank::ranks], unit="case", disable=None if rank == 0 else True, leave=False):
        case, dataset, line = todo[name, case_name], store.datasets[name], {"dataset": name, "case": case_name}
        try:
            answer = answer_case(model, case, training[name], dataset, args.slices, args.seed, others(name), args.wrong_prompt, args.prompts, **how)
            kinds = [k for k in ("prediction", "copy", "filter", *WRONG) if k in answer]
            line |= {"patient": case.patient, "prompt": answer["prompt"], "scores": {k: score(answer[k], answer, dataset) for k in kinds}}
        except (ValueError, OSError, RuntimeError) as error:
            line["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"{name} {case_name} could not be scored: {line['error']}", flush=True)
        with open(ledger, "a") as file:  # one write a line, so that processes do not mix theirs
            file.write(json.dumps(line) + "\n")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank:
        return None

    # ---- tables and figures
    done = read_ledger(ledger, about)
    results = {name: tabulate([done[key] for key in todo if key[0] == name], dataset) for name, dataset in store.datasets.items() if any(key[0] == name for key in todo)}
    settings = mvg.load_checkpoint(checkpoint).get("settings", {})
    data.write_json(out / "results.json", {"datasets": results, **about, "split": args.split, "training": settings, "seconds": round(time.time() - start, 1)})
    write_csv(out / "cases.csv", [done[key] for key in todo], store.datasets)
    text = table(results) + "\n\n" + paper_tables(results, str(checkpoint))
    (out / "tables.md").write_text(text + "\n")
    print(table(results))
    for name, r in results.items():
        for kind in r.get("ignored", ()):
            print(f"{name}: the score does not fall with a prompt that is wrong ({WRONG[kind]}): the model ignores its prompt, or has nothing to lose")
    draw_scores(out / "scores.png", results)
    draw_examples(out, results, lambda name, case: answer_case(model, todo[name, case], training[name], store.datasets[name], args.slices, args.seed, prompts=args.prompts, **how),
                  store.datasets)
    bad = sum(r["failed"] for r in results.values())
    print(f"wrote {', '.join(str(out / n) for n in ('results.json', 'cases.csv', 'tables.md', 'scores.png', 'examples.png'))}"
          + (f"; {bad} cases could not be scored" if bad else ""))
    return results


def read_ledger(path, about):
    """{(dataset, case): its last whole line} of an evaluation with the same settings; None where there is none."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        if json.loads(lines[0]) != about:
            return None
    except (OSError, ValueError, IndexError):
        return None
    lines = [json.loads(l) for l in lines[1:] if l.endswith("\n")]
    return {(l["dataset"], l["case"]): l for l in lines}


def tabulate(lines, dataset):
    """What the lines of a dataset's cases come to: `summary` of the prediction, and of each other kind under its name; "ignored" names wrong prompts
    that do not cost anything (95% of the differences, over patients, reach down to 0)."""
    scored = [l for l in lines if "scores" in l]
    patients, result = [l["patient"] for l in scored], {"task": dataset.task, "cases": len(scored), "patients": len({l["patient"] for l in scored}), "failed": len(lines) - len(scored)}
    for kind in (k for k in ("prediction", "copy", "filter", *WRONG) if any(k in l["scores"] for l in scored)):
        means = summary([l["scores"].get(kind, {}) for l in scored], patients, dataset)
        result |= means if kind == "prediction" else {kind: means}
    metric = next((m for m in MAIN if m in result), None)
    value = lambda l, kind: case_score(l["scores"].get(kind), dataset)
    ranked = [(l["case"], value(l, "prediction")) for l in scored]
    result["ranked"] = sorted((r for r in ranked if not np.isnan(r[1])), key=lambda r: r[1])
    result["ignored"] = []
    for kind in WRONG if metric else ():
        both = [(value(l, "prediction") - value(l, kind), l["patient"]) for l in scored if kind in l["scores"]]
        both = [(d, p) for d, p in both if not np.isnan(d)]
        if both and (interval(*zip(*both)) or [np.mean([d for d, _ in both])])[0] <= 0:
            result["ignored"].append(kind)
    return result


def case_score(scores, dataset):
    """The number by which cases are ranked, larger is better: mIoU, box IoU or PSNR; nan where there is nothing to score."""
    if not scores:
        return float("nan")
    return float(np.mean([v[0] for v in scores.values()])) if dataset.colored else scores["boxes"][0] if dataset.task == "detection" else scores["image"][1]


def write_csv(path, lines, datasets):
    names = {"class": ("IoU", "Dice"), "image": ("MAE", "PSNR", "SSIM"), "boxes": ("box_IoU", "hit_rate", "false_boxes")}
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, ["dataset", "case", "patient", "prompt", "kind", "part", *(m for group in names.values() for m in group), "error"])
        writer.writeheader()
        for l in lines:
            about = {k: l.get(k, "") for k in ("dataset", "case", "patient", "prompt", "error")}
            for kind, parts in l.get("scores", {"": {"": ()}}).items():
                for part, values in parts.items():
                    writer.writerow({**about, "kind": kind, "part": part, **dict(zip(names.get(part, names["class"]), values))})


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures

def cell(scores, metric):
    if not scores or scores.get(metric) is None:
        return ""
    span = scores["interval"][metric]
    return f"{scores[metric]:.3f}" + (f" [{span[0]:.3f}, {span[1]:.3f}]" if span else "")


def table(results):
    """The scores of every dataset as a Markdown table, with their intervals, beside copying, the linear filter and the wrong prompts that were asked."""
    others = {k: title for k, title in {"filter": "linear filter", **WRONG}.items() if any(k in r for r in results.values())}
    lines = ["| dataset | task | cases / patients | score | prompted | copied | " + "".join(f"{title} | " for title in others.values()), "|---" * (6 + len(others)) + "|"]
    for name, r in results.items():
        for metric in (m for m in ("mIoU", "Dice", "box_IoU", "PSNR", "SSIM") if m in r):
            lines.append(f"| {name} | {r['task']} | {r['cases']} / {r['patients']} | {metric} | "
                         + " | ".join(cell(scores, metric) for scores in (r, r.get("copy"), *(r.get(k) for k in others))) + " |")
    return "\n".join(line.strip() for line in lines)


def paper_tables(results, name):
    """The paper's Tables 2 and 3 with a row for `results`; blank is what was not run."""
    def rows(paper, ours):
        return [f"| {n} | " + " | ".join(values.split()) + " |" for n, values in paper.items()] + [f"| {name} | " + " | ".join(ours) + " |"]
    number = lambda dataset, metric, form: format(results[dataset][metric], form) if results.get(dataset, {}).get(metric) is not None else ""
    titles = lambda names: " | ".join(data.DATASETS[n].title for n in names)
    two = [f"Table 2, mIoU (the paper's rows are the paper's; *: 64 examples)\n\n| | {titles(TABLE_2)} |", "|---" * 10 + "|", *rows(PAPER_2, [number(n, "mIoU", ".2f") for n in TABLE_2])]
    heads = " | ".join(f"{t} {m}" for t in ("synthesis", "inpainting", "denoising") for m in ("MAE", "PSNR", "SSIM"))
    three = [f"Table 3 ({titles(TABLE_3)})\n\n| | {heads} |", "|---" * 10 + "|", *rows(PAPER_3, [number(n, m, ".3f") for n in TABLE_3 for m in ("MAE", "PSNR", "SSIM")])]
    return "\n".join(two) + "\n\n" + "\n".join(three)


def read_results(path):
    """results.json of an evaluation. Raises DataError for anything else."""
    content = readers.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
        raise DataError(f"{path} is no result of eval.py: name a run that was scored")
    return content


def compare(columns, out=None):
    """Finished evaluations side by side: a line a dataset with its main score, the means over the datasets that all have, and how the runs' settings differ.

    columns: NAME=RUN[,RUN]; a RUN is a run folder with eval/results.json, or the folder or file of the results. With `out`, also compare.md, and, where the
    runs differ in their share of the data, data.png (Figure 7). Raises DataError for a folder without results, or a dataset twice in one column.
    """
    found, settings = {}, {}
    for column in columns:
        name, _, runs = column.rpartition("=")
        for run in map(Path, runs.split(",")):
            path = next((p for p in (run, run / "results.json", run / "eval" / "results.json") if p.is_file()), None)
            if path is None:
                raise DataError(f"{run} has no results.json: score it first (python eval.py --checkpoint {run}/last.pt)")
            content = read_results(path)
            into = found.setdefault(name or run.name, {})
            if twice := sorted(set(into) & set(content["datasets"])):
                raise DataError(f"{name or run.name} has {twice[0]} twice: name the runs apart")
            into |= content["datasets"]
            settings.setdefault(name or run.name, []).append(content.get("training", {}))
    names = list(dict.fromkeys(d for results in found.values() for d in results))
    metric = {d: next(m for m in MAIN if any(m in r.get(d, {}) for r in found.values())) for d in names}
    lines = ["| dataset | score | " + " | ".join(found) + " |", "|---" * (2 + len(found)) + "|"]
    lines += [f"| {d} | {metric[d]} | " + " | ".join(cell(r.get(d), metric[d]) for r in found.values()) + " |" for d in names]
    for m in MAIN:
        shared = [d for d in names if metric[d] == m and all(r.get(d, {}).get(m) is not None for r in found.values())]
        if shared:
            lines.append(f"| mean of {len(shared)} | {m} | " + " | ".join(f"{np.mean([r[d][m] for d in shared]):.3f}" for r in found.values()) + " |")
    keys = sorted({k for runs in settings.values() for s in runs for k in s} - {"out", "resume", "store", "data_root", "device", "workers", "log_every", "save_every", "stop_at"})
    values = {k: [sorted({str(s.get(k)) for s in runs}) for runs in settings.values()] for k in keys}
    lines += [f"| {k} | setting | " + " | ".join(", ".join(v) for v in values[k]) + " |" for k in keys if any(v != values[k][0] for v in values[k])]
    text = "\n".join(lines)
    print(text)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "compare.md").write_text(text + "\n")
        shares = [sorted({float(s.get("data_fraction", 1)) for s in runs}) for runs in settings.values()]
        if len({tuple(v) for v in shares}) > 1 and all(len(v) == 1 for v in shares):
            draw_data(Path(out) / "data.png", [v[0] for v in shares], found, names, metric)
    return found


def draw_data(path, shares, found, names, metric):
    """Score against the share of the training data, a line a dataset (the paper's Figure 7)."""
    plt = data.pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5))
    order = np.argsort(shares)
    for d in (d for d in names if metric[d] == "mIoU"):
        points = [(100 * shares[i], list(found.values())[i].get(d, {}).get("mIoU")) for i in order]
        axis.plot(*zip(*[p for p in points if p[1] is not None]), ".-", label=d)
    axis.set(xscale="log", xlabel="share of the training data, %", ylabel="mIoU", ylim=(0, 1))
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scores(path, results):
    """Every dataset's main score with its interval, beside copying and the paper's MVG (its Figure 2 as bars): one panel a metric."""
    plt = data.pyplot()
    paper = {**{n: float(v) for n, v in zip(TABLE_2, PAPER_2["MVG"].split())}, **{n: float(v) for n, v in zip(TABLE_3, PAPER_3["MVG"].split()[1::3])}}
    groups = {m: [n for n, r in results.items() if m == next((m for m in MAIN if r.get(m) is not None), None)] for m in MAIN}
    groups = {m: names for m, names in groups.items() if names}
    if not groups:
        return
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 1.5 + 0.35 * max(map(len, groups.values()))), squeeze=False)
    for axis, (metric, names) in zip(axes[0], groups.items()):
        for at, name in enumerate(names):
            r = results[name]
            low, high = r["interval"][metric] or (r[metric],) * 2
            axis.barh(at, r[metric], 0.6, color="#0072b2", label="prompted" if not at else None)
            axis.plot((low, high), (at, at), color="black", linewidth=1)
            axis.plot(r["copy"][metric], at, "o", color="#e69f00", label="copied" if not at else None)
            if name in paper:
                axis.plot(paper[name], at, "D", color="#cc79a7", label="paper's MVG" if name == next(n for n in names if n in paper) else None)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="PSNR in dB" if metric == "PSNR" else metric.replace("_", " "), **({} if metric == "PSNR" else {"xlim": (0, 1)}))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_examples(out, results, answer, datasets):
    """examples/<dataset>.png: worst, median and best case; examples.png: the median of every dataset. answer(dataset, case): what `answer_case` returns."""
    medians = []
    for name, r in results.items():
        ranked, rows = r["ranked"], []
        for what, (case, value) in {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}.items() if ranked else ():
            whole = answer(name, case)  # of which only the middle slice is kept
            middle = {k: whole[k][len(whole["images"]) // 2] for k in ("prompt_images", "prompt_labels", "images", "truth", "prediction")}
            rows.append((f"{what}: {case}\n{value:.2f}", datasets[name], middle))
        if not rows:
            continue
        (out / "examples").mkdir(exist_ok=True)
        draw_rows(out / "examples" / f"{name}.png", rows)
        medians.append((name, *rows[1][1:]))
    draw_rows(out / "examples.png", medians)


def draw_rows(path, examples):
    """A row an example, (its name, dataset, answers): prompt, its label, image, truth, prediction, of the middle slice."""
    plt = data.pyplot()
    if not examples:
        return
    figure, axes = plt.subplots(len(examples), 5, figsize=(10, 2.1 * len(examples)), squeeze=False)
    for n, (row, (name, dataset, a)) in enumerate(zip(axes, examples)):
        panels = [("prompt", a["prompt_images"], None), ("prompt label", a["prompt_images"], a["prompt_labels"]),
                  ("image", a["images"], None), ("truth", a["images"], a["truth"]), ("prediction", a["images"], a["prediction"])]
        for axis, (title, image, label) in zip(row, panels):
            axis.imshow(image if label is None or dataset.colored else label, cmap="gray", vmin=0, vmax=1)
            if label is not None and dataset.colored:
                axis.imshow(np.ma.masked_equal(label, 0), cmap="tab20" if len(dataset.labels) > 10 else "tab10", alpha=0.6,
                            vmin=1, vmax=20 if len(dataset.labels) > 10 else 10, interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            if n == 0:
                axis.set_title(title, fontsize=9)
        row[0].set_ylabel(name, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    data.command_line(main)
