"""Score a checkpoint on every dataset found, by the paper's protocol: one prompt, the matching slice of a random training case.

    python eval.py --data_root DIR --checkpoint runs/mvg/last.pt

Segmentation: IoU and Dice of every foreground class over a case's slices (the volume at once), averaged over the classes of
a case, then over cases; a class absent from truth and prediction is skipped. Image tasks: MAE, PSNR, SSIM a slice on
[0, 1], averaged over slices, then over cases. Beside every score stands that of copying: the prompt's label, or the input.

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


# ---------------------------------------------------------------------------------------------------------------------
# One case

def read_slices(case, numbers):
    """Slices of a stored case: images, labels (integers for classes), valid or None, each (K, H, W)."""
    images, labels, valid = zip(*(case.read(k) for k in numbers))
    return np.stack(images), np.stack(labels), None if valid[0] is None else np.stack(valid)


def answer_case(model, case, training, dataset, slices, seed, votes=1, mode="auto"):
    """Predict the kept slices of a case and copy its prompt; all that `score` and the figure need, (K, H, W) each.

    The prompt is drawn from (seed, case), whatever other cases are scored.
    """
    prompt = data.evaluation_prompt(training, case, np.random.default_rng([seed, zlib.crc32(f"{dataset.name}/{case.name}".encode())]), slices)
    images, truth, valid = read_slices(case, case.kept(slices))
    prompt_images, prompt_labels, _ = read_slices(prompt, prompt.kept(slices))
    if dataset.colored:
        truth, prompt_labels = truth.astype(np.uint8), prompt_labels.astype(np.uint8)
    prediction = infer.predict_stack(model, [(prompt_images, prompt_labels)], images, dataset.colored, mode, votes, seed, dataset.name)
    matched = [data.matching_slice(k, len(images), len(prompt_images)) for k in range(len(images))]
    prompt_images, prompt_labels = prompt_images[matched], prompt_labels[matched]
    copied = data.resize_labels(torch.from_numpy(prompt_labels), images.shape[1:]).numpy() if dataset.colored else images
    return {"prediction": prediction, "copy": copied, "truth": truth, "images": images, "prompt_images": prompt_images,
            "prompt_labels": prompt_labels, "valid": valid, "prompt": prompt.name}


def score(prediction, case, dataset):
    """The scores of one case: {class name: (IoU, Dice)}, or {"image": (MAE, PSNR, SSIM)}."""
    if dataset.colored:
        found = overlap(prediction, case["truth"], range(1, len(dataset.labels) + 1))
        return {dataset.labels[c - 1]: s for c, s in found.items()}
    valid = case["valid"] if case["valid"] is not None else [None] * len(prediction)
    return {"image": tuple(known_mean(v) for v in zip(*(image_scores(*s) for s in zip(prediction, case["truth"], valid))))}


def known_mean(values):
    """The mean of what is not nan; nan if nothing is."""
    values = [v for v in values if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def summary(scores, dataset):
    """The mean over cases: {"mIoU", "Dice", "per_class"}, or {"MAE", "PSNR", "SSIM"}. scores: a list of `score`'s answers."""
    scores = [s for s in scores if s]
    if not dataset.colored:
        means = [known_mean(v) for v in zip(*(s["image"] for s in scores))] or [float("nan")] * 3
        return {m: None if np.isnan(v) else v for m, v in zip(("MAE", "PSNR", "SSIM"), means)}
    case_means = np.array([np.mean(list(s.values()), 0) for s in scores])
    per_class = {name: [s[name] for s in scores if name in s] for name in dataset.labels}
    return {"mIoU": float(case_means[:, 0].mean()) if scores else None, "Dice": float(case_means[:, 1].mean()) if scores else None,
            "per_class": {n: dict(zip(("IoU", "Dice"), np.mean(v, 0).tolist()), cases=len(v)) for n, v in per_class.items() if v}}


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
    add("--split", default="test", choices=("test", "train"), help="cases to score; prompts are training cases of other patients")
    add("--max_cases", type=int, help="at most so many cases a dataset")
    add("--slices", default="foreground", choices=("foreground", "all"), help="foreground: slices whose truth has some (paper silent)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"), help="auto: as trained (ours: ar for segmentation, canvas for images)")
    add("--votes", type=int, default=1, help="colorings averaged (paper: 1)")
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
        cases = [c for c in store.split(name, args.split) if c.kept(args.slices) and any(t.patient != c.patient and t.kind == c.kind for t in training)]
        cases = cases[:args.max_cases]
        if not cases:
            print(f"{name}: not scored, it has no {args.split} case with a training case of another patient")
            continue
        scores, copies = [], []
        for i, case in enumerate(tqdm(cases, desc=name, unit="case", disable=None, leave=False)):
            answer = answer_case(model, case, training, dataset, args.slices, args.seed, args.votes, args.mode)
            scores.append(score(answer["prediction"], answer, dataset))
            copies.append(score(answer["copy"], answer, dataset))
            rows += [[name, case.name, answer["prompt"], part, *values] for part, values in scores[-1].items()]
            if i == len(cases) // 2:
                examples.append((name, dataset, answer))
        results[name] = {"task": dataset.task, "cases": len(cases), **summary(scores, dataset), "copy": summary(copies, dataset)}

    data.write_json(out / "results.json", {"datasets": results, "checkpoint": str(checkpoint), "split": args.split, "slices": args.slices,
                                           "seed": args.seed, "votes": args.votes, "mode": args.mode, "seconds": round(time.time() - started, 1)})
    with open(out / "cases.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["dataset", "case", "prompt", "part", "IoU or MAE", "Dice or PSNR", "SSIM"])
        writer.writerows(rows)
    print(table(results))
    draw_examples(out / "examples.png", examples)
    print(f"wrote {out / 'results.json'}, {out / 'cases.csv'}, {out / 'examples.png'}")
    return results


def table(results):
    """The scores as a Markdown table, copying in brackets."""
    lines = ["| dataset | task | cases | mIoU (copy) | Dice (copy) | MAE (copy) | PSNR (copy) | SSIM (copy) |", "|---|---|---|---|---|---|---|---|"]
    for name, r in results.items():
        cells = [f"{r[m]:.3f} ({r['copy'][m]:.3f})" if r.get(m) is not None else "" for m in ("mIoU", "Dice", "MAE", "PSNR", "SSIM")]
        lines.append(f"| {name} | {r['task']} | {r['cases']} | " + " | ".join(cells) + " |")
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
