"""Score a checkpoint on every dataset found, by the paper's protocol: one prompt, the matching slice of a random training case.

    python eval.py --data_root DIR --checkpoint runs/mvg/last.pt

Segmentation: IoU and Dice of every foreground class over a case's slices (the volume at once), averaged over the classes of
a case, then over cases; a class absent from truth and prediction is skipped. Image tasks: MAE, PSNR, SSIM a slice on
[0, 1], averaged over slices, then over cases. Detection: boxes are read back from the painted image; IoU of every true box
with the best of them. Beside every score stands that of copying (the prompt's label, or the input; for detection the
prompt's boxes) and, with --wrong_prompt, that of a prompt from another dataset; intervals are bootstrapped over patients.

Writes results.json, cases.csv (a line a case and class) and examples.png into --out, and prints a table.
"""

import argparse
import csv
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import infer
import mvg
from data import DataError

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


def read_boxes(painted, image, side=64, most=8):
    """The white boxes drawn onto an image, (H, W) both, in [0, 1] -> [(top, left, bottom, right)], plainest first.

    A line is how far a pixel went from the image to white. Every rectangle on a grid of at most side x side is tried: its fit is the mean line of its faintest edge, less that
    of its inside. The best is moved to the pixel, its lines are wiped out, and so on while the fit is above 0.6 of the first.
    """
    H, W = image.shape
    lines = np.clip((np.asarray(painted, np.float32) - image) / (1.1 - image), 0, 1)
    coarse = F.adaptive_max_pool2d(torch.from_numpy(lines)[None, None], (min(H, side), min(W, side)))[0, 0].numpy()
    h, w = coarse.shape
    left, right = (v + 2 * i for i, v in enumerate(np.triu_indices(w - 2)))
    boxes, first = [], None
    for _ in range(most):
        along = np.pad(coarse.cumsum(1), ((0, 0), (1, 0)))  # sums of a row up to a column
        down = np.pad(coarse.cumsum(0), ((1, 0), (0, 0)))
        whole = np.pad(along[:, 1:].cumsum(0), ((1, 0), (1, 0)))
        best, found = 0.0, None
        for top in range(h - 2):
            bottom = np.arange(top + 2, h)[:, None]
            high, wide = bottom - top + 1, right - left + 1
            rows = [(along[y, right + 1] - along[y, left]) / wide for y in (top, bottom)]
            columns = [(down[bottom + 1, x] - down[top, x]) / high for x in (left, right)]
            inner = whole[bottom, right] - whole[bottom, left + 1] - whole[top + 1, right] + whole[top + 1, left + 1]
            fit = (np.minimum(np.minimum(*rows), np.minimum(*columns)) + (sum(rows) + sum(columns)) / 4) / 2 - inner / ((high - 2) * (wide - 2))
            k = int(fit.argmax())
            if fit.flat[k] > best:
                best, (b, c) = fit.flat[k], np.unravel_index(k, fit.shape)
                found = top, int(left[c]), top + 2 + int(b), int(right[c])
        if found is None or best < max(0.02, 0.6 * (first or 0)):
            break
        first = first or best
        boxes.append(sharpen(lines, found, (H / h, W / w)))
        top, l, bottom, r = found
        for y in (top, bottom):
            coarse[max(0, y - 1):y + 2, max(0, l - 1):r + 2] = 0
        for x in (l, r):
            coarse[max(0, top - 1):bottom + 2, max(0, x - 1):x + 2] = 0
    return boxes


def sharpen(lines, box, cell):
    """Move the edges of a box on a grid of cells to the brightest row or column of pixels of their cell, the outermost if equal."""
    spans = [(int(box[i] * cell[i % 2]), max(int(np.ceil((box[i] + 1) * cell[i % 2])), int(box[i] * cell[i % 2]) + 1)) for i in range(4)]
    (top, _), (left, _), (_, bottom), (_, right) = spans
    rows, columns = lines[:, left:right].mean(1), lines[top:bottom].mean(0)
    edges = []
    for i, (start, end) in enumerate(spans):
        part = (rows if i % 2 == 0 else columns)[start:end]
        near = np.flatnonzero(part >= 0.9 * part.max())
        edges.append(start + int(near[0] if i < 2 else near[-1]))
    return tuple(edges)


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


def answer_case(model, case, training, dataset, slices, seed, votes=None, mode="auto", others=()):
    """Predict the kept slices of a case and copy its prompt; all that `score` and the figure need, (K, H, W) each.

    The prompt is drawn from (seed, case), whatever other cases are scored. others: cases of other datasets, of which one is a
    wrong prompt.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{dataset.name}/{case.name}".encode())])
    prompt = data.evaluation_prompt(training, case, rng, slices)
    images, truth, valid = read_slices(case, case.kept(slices))
    prompt_images, prompt_labels, _ = read_slices(prompt, prompt.kept(slices))
    if dataset.colored:
        truth, prompt_labels = truth.astype(np.uint8), prompt_labels.astype(np.uint8)
    prediction = infer.predict_stack(model, [(prompt_images, prompt_labels)], images, dataset.colored, mode, votes, seed, dataset.name)
    side = (model.config.image_size,) * 2
    seen = data.resize_images(data.resize_images(torch.from_numpy(images), side), images.shape[1:]).numpy()  # as sharp as an answer
    matched = [data.matching_slice(k, len(images), len(prompt_images)) for k in range(len(images))]
    prompt_images, prompt_labels = prompt_images[matched], prompt_labels[matched]
    copied = data.resize_labels(torch.from_numpy(prompt_labels), images.shape[1:]).numpy() if dataset.colored else images
    if dataset.task == "detection":  # the prompt's lines laid over the image
        lines = torch.from_numpy(np.clip(prompt_labels - prompt_images, 0, 1))
        copied = (seen + data.resize_images(lines, images.shape[1:]).numpy()).clip(0, 1)
    wrong = None
    if others:
        wrong_images, wrong_labels, _ = read_slices(other := others[rng.integers(len(others))], other.kept(slices))
        wrong_labels = wrong_labels.astype(np.uint8) if dataset.colored else wrong_labels
        wrong = infer.predict_stack(model, [(wrong_images, wrong_labels)], images, dataset.colored, mode, votes, seed, dataset.name)
    return {"prediction": prediction, "copy": copied, "wrong": wrong, "truth": truth, "images": images, "seen": seen, "boxes": case.index["boxes"],
            "prompt_images": prompt_images, "prompt_labels": prompt_labels, "valid": valid, "prompt": prompt.name}


def score(prediction, case, dataset):
    """case: what `answer_case` returns. The scores of one case: {class name: (IoU, Dice)}, or {"image": (MAE, PSNR, SSIM)}, with {"boxes": (IoU, hit rate, false
    boxes)} for detection."""
    if dataset.colored:
        found = overlap(prediction, case["truth"], range(1, len(dataset.labels) + 1))
        return {dataset.labels[c - 1]: s for c, s in found.items()}
    valid = case["valid"] if case["valid"] is not None else [None] * len(prediction)
    scores = {"image": tuple(known_mean(v) for v in zip(*(image_scores(*s) for s in zip(prediction, case["truth"], valid))))}
    if dataset.task == "detection":
        scores["boxes"] = box_scores(read_boxes(prediction[0], case["seen"][0]), case["boxes"])  # a case is one picture
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

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data_root", help="folder that holds the datasets as they were downloaded")
    add("--store", help="prepared store (default: store/<name of data_root>-<hash>)")
    add("--checkpoint", help="what train.py wrote (default: checkpoints/*.pt, else the newest runs/*/last.pt)")
    add("--out", help="folder for results.json, cases.csv, examples.png (default: eval/ beside the checkpoint)")
    add("--datasets", nargs="+", metavar="NAME", help="only these (default: every dataset found)")
    add("--brats_pairs", nargs="+", metavar="FROM:TO", help="what BraTS-GLI translates, of t1n t1c t2w t2f (default: t1c:t2w t2w:t1c)")
    add("--split", default="test", choices=("test", "train", "all"), help="cases to score; prompts are training cases of other patients")
    add("--wrong_prompt", action="store_true", help="also score a prompt from another dataset of the same kind, which should be worse")
    add("--max_cases", type=int, help="at most so many cases a dataset")
    add("--slices", default="foreground", choices=("foreground", "all"), help="foreground: slices whose truth has some (paper silent)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"), help="auto: as trained (ours: ar for segmentation, canvas for images)")
    add("--votes", type=int, help="colorings (binary: views) averaged (paper: 1; default: 8 where training knew such views, else 1)")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    args = p.parse_args(argv)
    for name in ("votes", "max_cases"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DataError(f"--{name} is {getattr(args, name)}: it must be at least 1")
    if args.seed < 0:
        raise DataError(f"--seed is {args.seed}: it must not be below 0")
    checkpoint = Path(args.checkpoint or infer.find_checkpoint())
    device, reason = mvg.pick_device(args.device)
    model = mvg.load(checkpoint, device)
    store = data.open_store(args.data_root, args.store, args.datasets, args.brats_pairs)
    out = Path(args.out) if args.out else checkpoint.parent / "eval"
    out.mkdir(parents=True, exist_ok=True)
    print(f"checkpoint {checkpoint}, device {device} ({reason})")

    results, examples, rows, started = {}, [], [], time.time()
    for name, dataset in store.datasets.items():
        training = [c for c in store.split(name, "train") if c.kept(args.slices)]
        cases = store.cases[name] if args.split == "all" else store.split(name, args.split)
        cases = [c for c in cases if c.kept(args.slices) and any(t.patient != c.patient and t.kind == c.kind for t in training)]
        cases = cases[:args.max_cases]
        if not cases:
            print(f"{name}: not scored, it has no {args.split} case with a training case of another patient")
            continue
        others = [c for n, d in store.datasets.items() if args.wrong_prompt and n != name and d.colored == dataset.colored
                  for c in store.split(n, "train") if c.kept(args.slices)]
        scores = {"prediction": [], "copy": [], **({"wrong": []} if others else {})}
        for i, case in enumerate(tqdm(cases, desc=name, unit="case", disable=None, leave=False)):
            answer = answer_case(model, case, training, dataset, args.slices, args.seed, args.votes, args.mode, others)
            for what in scores:
                scores[what].append(score(answer[what], answer, dataset))
            rows += [[name, case.name, answer["prompt"], part, *values] for part, values in scores["prediction"][-1].items()]
            if i == len(cases) // 2:
                examples.append((name, dataset, answer))
        patients = [c.patient for c in cases]
        means = {what: summary(s, patients, dataset) for what, s in scores.items()}
        results[name] = {"task": dataset.task, "cases": len(cases), "patients": len(set(patients)), **means.pop("prediction"), **means}

    data.write_json(out / "results.json", {"datasets": results, "checkpoint": str(checkpoint), "split": args.split, "slices": args.slices,
                                           "seed": args.seed, "votes": args.votes, "mode": args.mode, "seconds": round(time.time() - started, 1)})
    with open(out / "cases.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["dataset", "case", "prompt", "part", "IoU or MAE", "Dice, PSNR or hit rate", "SSIM or false boxes"])
        writer.writerows(rows)
    print(table(results))
    draw_examples(out / "examples.png", examples)
    print(f"wrote {out / 'results.json'}, {out / 'cases.csv'}, {out / 'examples.png'}")
    return results


def table(results):
    """The main score of every dataset as a Markdown table, with its interval, beside copying and, if scored, a wrong prompt."""
    lines = ["| dataset | task | cases / patients | score | prompted | copied | wrong prompt |", "|---|---|---|---|---|---|---|"]

    def cell(scores, metric):
        if scores is None or scores[metric] is None:
            return ""
        span = scores["interval"][metric]
        return f"{scores[metric]:.3f}" + (f" [{span[0]:.3f}, {span[1]:.3f}]" if span else "")

    for name, r in results.items():
        for metric in (m for m in ("mIoU", "Dice", "box_IoU", "PSNR", "SSIM") if m in r):
            lines.append(f"| {name} | {r['task']} | {r['cases']} / {r['patients']} | {metric} | "
                         + " | ".join(cell(scores, metric) for scores in (r, r["copy"], r.get("wrong"))) + " |")
    return "\n".join(lines)


def draw_examples(path, examples):
    """A row a dataset: prompt, its label, image, truth, prediction, of the middle slice of the middle case."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    if not examples:
        return
    figure, axes = plt.subplots(len(examples), 5, figsize=(10, 2.1 * len(examples)), squeeze=False)
    for n, (row, (name, dataset, a)) in enumerate(zip(axes, examples)):
        k = len(a["images"]) // 2
        panels = [("prompt", a["prompt_images"][k], None), ("prompt label", a["prompt_images"][k], a["prompt_labels"][k]),
                  ("image", a["images"][k], None), ("truth", a["images"][k], a["truth"][k]), ("prediction", a["images"][k], a["prediction"][k])]
        for axis, (title, image, label) in zip(row, panels):
            axis.imshow(image if label is None or dataset.colored else label, cmap="gray", vmin=0, vmax=1)
            if label is not None and dataset.colored:
                axis.imshow(np.ma.masked_equal(label, 0), cmap="tab20" if len(dataset.labels) > 10 else "tab10", alpha=0.6,
                            vmin=1, vmax=20 if len(dataset.labels) > 10 else 10, interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
            if n == 0:
                axis.set_title(title, fontsize=9)
        row[0].set_ylabel(name, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    data.command_line(main)
