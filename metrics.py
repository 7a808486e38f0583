"""Section 4.2: the metrics, and what they come to over the cases of a dataset.

    segmentation  IoU and Dice of every class over a case's slices at once, averaged over the
                  classes of a case, then over cases; a class absent from truth and prediction is
                  skipped
    image tasks   MAE, PSNR, SSIM of a slice on [0, 1], averaged over slices, then over cases;
                  where the truth is known in part only (inpainting), there; ours: PSNR inside of
                  what changes, where the truth is not the input, and outside of it
    detection     IoU of every true box with the best one that was read

Intervals are bootstrapped over patients.
"""

import numpy as np
import torch
import torch.nn.functional as F

MAX_PSNR = 100.0  # dB, stands for infinity where two slices are equal, so that means stay numbers
METRICS = {"segmentation": ("mIoU", "Dice"), "detection": ("box_IoU", "hit_rate", "false_boxes"),
           "image": ("MAE", "PSNR", "SSIM", "PSNR_inside", "PSNR_outside")}
CHANGE = 0.02     # a pixel changes where truth and input are farther apart
MAIN = ("mIoU", "box_IoU", "PSNR")  # what a dataset is known by, the first it has
WRONG = {"other_class": "other class", "other_dataset": "other dataset", "empty": "empty"}
# The answers of a case that are scored. "with it": the prediction, on slices that show something.
KINDS = ("prediction", "with it", "copy", "filter", *WRONG)


# -------------------------------------------------------------------------------------------------
# Metrics

def overlap(prediction, truth, classes):
    """{class: (IoU, Dice)} over arrays of one shape; classes absent from both are left out."""
    scores = {}
    for c in classes:
        p, t = prediction == c, truth == c
        both, p, t = int((p & t).sum()), int(p.sum()), int(t.sum())
        if p + t:
            scores[c] = both / (p + t - both), 2 * both / (p + t)
    return scores


def false_alarms(prediction, truth, labels):
    """{class name: the share of pixels painted with it on slices without it}, stacks (K, H, W).

    Classes that every slice shows are left out. labels: names of the classes 1, 2 ...
    """
    shares = {}
    for c, label in enumerate(labels, 1):
        without = ~(truth == c).any((1, 2))
        if without.any():
            shares[label] = float((prediction[without] == c).mean())
    return shares


def ssim(prediction, truth, valid=None):
    """Structural similarity of two images (H, W) in [0, 1] (Wang et al. 2004).

    11x11 Gaussian window, sigma 1.5. The mean over the windows that lie wholly inside the image,
    with valid (H, W) bool over those centred on a valid pixel. nan where there is none.
    """
    if min(truth.shape) < 11:
        return float("nan")
    g = torch.exp(-(torch.arange(11, dtype=torch.float64) - 5) ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(np.asarray(a, np.float64))[None, None] for a in (prediction, truth))
    both = torch.cat([x, y, x * x, y * y, x * y])
    mx, my, xx, yy, xy = F.conv2d(both, window)[:, 0].numpy()
    vx, vy, vxy = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2)
    similarity = similarity / ((mx * mx + my * my + c1) * (vx + vy + c2))
    if valid is not None:
        similarity = similarity[valid[5:-5, 5:-5]]
    return float(similarity.mean()) if similarity.size else float("nan")


def image_scores(prediction, truth, valid=None):
    """(MAE, PSNR in dB, SSIM) of two images (H, W) in [0, 1], inside valid (H, W) bool if given.

    nan where nothing is valid.
    """
    difference = prediction.astype(np.float64) - truth
    if valid is not None:
        difference = difference[valid]
    if difference.size == 0:
        return (float("nan"),) * 3
    return float(np.abs(difference).mean()), psnr(difference), ssim(prediction, truth, valid)


def psnr(difference):
    """The peak signal-to-noise ratio of differences on [0, 1], in dB; nan where there are none."""
    if difference.size == 0:
        return float("nan")
    mse = (difference.astype(np.float64) ** 2).mean()
    return float(min(MAX_PSNR, -10 * np.log10(mse))) if mse > 0 else MAX_PSNR


def change_scores(prediction, truth, image, known=True):
    """PSNR in dB inside and outside of what changes from the image (H, W) to the truth (H, W).

    known: (H, W) bool, where there is a truth; True: everywhere.
    """
    changes = np.abs(truth - image) > CHANGE
    difference = prediction - truth
    return psnr(difference[changes & known]), psnr(difference[~changes & known])


def box_iou(a, b):
    """IoU of two boxes (top, left, bottom, right), each from its first pixel to its last."""
    shared = [min(a[2 + i], b[2 + i]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    both = max(0, shared[0]) * max(0, shared[1])
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return both / (sum(areas) - both)


def box_scores(read, truth):
    """(mean IoU of the true boxes with the best one read, share above 0.5, boxes that hit none)"""
    if not read:
        return 0.0, 0.0, 0.0
    overlaps = np.array([[box_iou(t, r) for r in read] for t in truth])
    best = overlaps.max(1)
    return float(best.mean()), float((best >= 0.5).mean()), float((overlaps.max(0) < 0.5).sum())


def known_mean(values):
    """The mean of what is not nan; nan if nothing is."""
    values = [v for v in values if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


# -------------------------------------------------------------------------------------------------
# All cases of a dataset

def case_values(scores, dataset):
    """The metrics of one case: {name: number}, from what `score` gives; empty for no score."""
    if not scores:
        return {}
    if dataset.colored:
        return dict(zip(METRICS["segmentation"], np.mean(list(scores.values()), 0).tolist()))
    values = dict(zip(METRICS["image"], scores["image"]))
    return values | dict(zip(METRICS["detection"], scores.get("boxes", ())))


def main_metric(dataset):
    """The metric by which cases are ranked; larger is better."""
    names = {"segmentation": "mIoU", "detection": "box_IoU"}
    return names.get(dataset.task, "PSNR")


def main_metrics(found):
    """{dataset: the metric that it is known by}, of all columns."""
    names = dict.fromkeys(d for results in found.values() for d in results)
    return {d: next(m for m in MAIN if any(m in r.get(d, {}) for r in found.values()))
            for d in names}


def summary(scores, patients, dataset):
    """The mean over cases: every metric, "interval" {metric: [low, high]}, and "per_class".

    scores: what `score` gives for each case; patients: whose they are.
    """
    known = [(case_values(s, dataset), p) for s, p in zip(scores, patients) if s]
    names = known[0][0] if known else METRICS["segmentation" if dataset.colored else "image"]
    result, intervals = {}, {}
    for name in names:
        values = [v[name] for v, _ in known]
        mean = known_mean(values)
        result[name] = None if np.isnan(mean) else mean
        intervals[name] = interval(values, [p for _, p in known])
    if dataset.colored:
        result["per_class"] = {}
        for label in dataset.labels:
            each = [s[label] for s in scores if label in s]
            if each:
                iou, dice = np.mean(each, 0).tolist()
                result["per_class"][label] = {"IoU": iou, "Dice": dice, "cases": len(each)}
    return {**result, "interval": intervals}


def interval(values, patients, draws=2000):
    """The 95% bootstrap interval [low, high] of the mean, patients drawn as wholes.

    nan is left out. None for fewer than two patients.
    """
    groups = {}
    for value, patient in zip(values, patients):
        if not np.isnan(value):
            groups.setdefault(patient, []).append(value)
    if len(groups) < 2:
        return None
    sums = np.array([sum(g) for g in groups.values()])
    counts = np.array([len(g) for g in groups.values()])
    drawn = np.random.default_rng(0).integers(len(groups), size=(draws, len(groups)))
    return np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5)).tolist()


def tabulate(lines, dataset):
    """What the ledger's lines of a dataset come to: `summary` of the prediction and of each other
    answer under its name; "false_alarm", the mean over classes, then cases; and "no_cost", the
    wrong prompts that do not cost anything: 95% of the differences, over patients, reach down to 0.
    """
    scored = [l for l in lines if "scores" in l]
    patients = [l["patient"] for l in scored]
    result = {"task": dataset.task, "cases": len(scored), "patients": len(set(patients)),
              "failed": len(lines) - len(scored), "no_cost": []}
    for kind in KINDS:
        if any(kind in l["scores"] for l in scored):
            means = summary([l["scores"].get(kind, {}) for l in scored], patients, dataset)
            result |= means if kind == "prediction" else {kind: means}

    def value(line, kind):
        scores = case_values(line["scores"].get(kind), dataset)
        return scores.get(main_metric(dataset), float("nan"))

    ranked = [(l["case"], value(l, "prediction")) for l in scored]
    result["ranked"] = sorted((r for r in ranked if not np.isnan(r[1])), key=lambda r: r[1])
    shares = [list(l["false_alarms"].values()) for l in scored if l.get("false_alarms")]
    if shares:
        result["false_alarm"] = known_mean([np.mean(case) for case in shares])
    for kind in WRONG:
        lost = [value(l, "prediction") - value(l, kind) for l in scored]
        span = interval(lost, patients)
        low = span[0] if span else known_mean(lost)
        if not np.isnan(low) and low <= 0:  # nan: this prompt was not tried
            result["no_cost"].append(kind)
    return result
