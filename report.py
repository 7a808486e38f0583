"""What is read and looked at: the paper's tables, finished runs side by side, and every figure.

    python eval.py --compare unified=runs/a isolated=runs/b,runs/c --out compared

Functions get results as dictionaries, arrays or files, and write Markdown, CSV or PNG.
"""

import csv
import json
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from coloring import color, spread_colors
from metrics import METRICS, WRONG
from scans.datasets import DATASETS
from scans.store import prepare_case
from scans.volumes import DataError, read_json, to_unit

MAIN = ("mIoU", "box_IoU", "PSNR")  # what a dataset is known by, the first it has

# The paper's Tables 2 (mIoU) and 3 (MAE, PSNR, SSIM each). *: with 64 examples.
TABLE_2 = ("amos_ct", "word", "btcv", "amos_mri", "microsegnet", "promise12", "chest_xray", "acdc",
           "la")
PAPER_2 = {"ResNet-18": "0.55 0.50 0.51 0.53 0.67 0.75 0.62 0.69 0.68",
           "UNet": "0.81 0.83 0.82 0.81 0.90 0.91 0.89 0.86 0.83",
           "VNet": "0.70 0.75 0.72 0.73 0.90 0.89 0.86 0.87 0.84",
           "TranUNet": "0.80 0.82 0.84 0.82 0.94 0.90 0.88 0.88 0.84",
           "nnUNet": "0.87 0.90 0.91 0.88 0.97 0.93 0.90 0.90 0.89",
           "UniverSeg*": "0.20 0.29 0.37 0.25 0.71 0.55 0.55 0.54 0.57",
           "Painter": "0.52 0.48 0.45 0.51 0.69 0.68 0.50 0.52 0.55",
           "LVM": "0.12 0.14 0.10 0.15 0.36 0.30 0.10 0.12 0.13",
           "SegGPT": "0.66 0.66 0.65 0.71 0.88 0.75 0.68 0.70 0.71",
           "MVG": "0.73 0.74 0.73 0.74 0.91 0.85 0.79 0.85 0.81"}
TABLE_3 = ("brats_gli", "brats_local", "ldct")
PAPER_3 = {"ResNet-18": "0.026 20.984 0.860 0.008 30.981 0.959 0.022 30.519 0.709",
           "Pix2Pix": "0.018 24.311 0.899 0.008 34.891 0.982 0.020 33.011 0.730",
           "TranUNet": "0.016 25.541 0.938 0.005 35.561 0.989 0.016 33.999 0.761",
           "Painter": "0.021 24.031 0.920 0.006 33.595 0.978 0.020 33.104 0.721",
           "MVG": "0.019 24.721 0.929 0.006 34.521 0.981 0.018 33.521 0.731"}


def clock(seconds):
    """Seconds as text: 1 h 05 min."""
    minutes = round(seconds / 60)
    if minutes >= 1440:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"


# -------------------------------------------------------------------------------------------------
# Tables

def cell(scores, metric):
    """A score with its interval as text; empty where there is none."""
    if not scores or scores.get(metric) is None:
        return ""
    span = scores["interval"][metric]
    text = f"{scores[metric]:.3f}"
    return text if not span else f"{text} [{span[0]:.3f}, {span[1]:.3f}]"


def row(*cells):
    return "| " + " | ".join(str(c) for c in cells) + " |"


def markdown(head, rows):
    """A Markdown table."""
    return "\n".join([row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)])


def score_table(results):
    """The scores of every dataset, with intervals, beside what needs no model and wrong prompts."""
    titles = {"with it": "on slices with it", "filter": "linear filter", **WRONG}
    others = [k for k in titles if any(k in r for r in results.values())]
    alarms = any("false_alarm" in r for r in results.values())
    head = ["dataset", "task", "cases / patients", "score", "prompted", "copied"]
    rows = []
    for name, r in results.items():
        for metric in ("mIoU", "Dice", "box_IoU", "PSNR", "SSIM"):
            if metric in r:
                scores = [cell(r, metric), cell(r.get("copy"), metric)]
                scores += [cell(r.get(k), metric) for k in others]
                cases = f"{r['cases']} / {r['patients']}"
                rows.append([name, r["task"], cases, metric, *scores])
                if alarms:
                    known = metric == "mIoU" and "false_alarm" in r
                    rows[-1].append(f"{r['false_alarm']:.2%}" if known else "")
    head += [titles[k] for k in others]
    return markdown(head + ["painted on slices without it"] * alarms, rows)


def paper_tables(results, name):
    """The paper's Tables 2 and 3 with a row for `results`; blank is what was not run."""
    def number(dataset, metric, form):
        value = results.get(dataset, {}).get(metric)
        return "" if value is None else format(value, form)

    def rows(paper, ours):
        return [[n, *values.split()] for n, values in paper.items()] + [[name, *ours]]

    titles = [DATASETS[n].title for n in TABLE_2]
    two = markdown(["", *titles], rows(PAPER_2, [number(n, "mIoU", ".2f") for n in TABLE_2]))
    image = METRICS["image"]
    head = [f"{task} {m}" for task in ("synthesis", "inpainting", "denoising") for m in image]
    ours = [number(n, m, ".3f") for n in TABLE_3 for m in image]
    three = markdown(["", *head], rows(PAPER_3, ours))
    return ("Table 2, mIoU (the paper's rows are the paper's; *: 64 examples)\n\n" + two
            + f"\n\nTable 3 ({', '.join(DATASETS[n].title for n in TABLE_3)})\n\n" + three)


def write_csv(path, lines):
    """cases.csv: a line a case, answer and class, from the lines of an evaluation's ledger."""
    names = {"class": ("IoU", "Dice"), "image": METRICS["image"], "boxes": METRICS["detection"]}
    about = ["dataset", "case", "patient", "prompt"]
    metrics = [m for group in names.values() for m in group]
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, [*about, "kind", "part", *metrics, "error"])
        writer.writeheader()
        for line in lines:
            common = {k: line.get(k, "") for k in [*about, "error"]}
            for kind, parts in line.get("scores", {"": {"": ()}}).items():
                for part, values in parts.items():
                    numbers = dict(zip(names.get(part, names["class"]), values))
                    writer.writerow({**common, "kind": kind, "part": part, **numbers})


# -------------------------------------------------------------------------------------------------
# Finished runs side by side

def read_results(path):
    """results.json of an evaluation. Raises DataError for anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
        raise DataError(f"{path} is no result of eval.py: name a run that was scored")
    return content


def read_runs(columns):
    """NAME=RUN[,RUN] -> ({name: {dataset: results}}, {name: [recipe of every run]}).

    A RUN is a run folder with eval/results.json, or the folder or file of the results. Raises
    DataError for a folder without results, or a dataset twice in one column.
    """
    found, recipes = {}, {}
    for column in columns:
        name, _, runs = column.rpartition("=")
        for run in map(Path, runs.split(",")):
            places = (run, run / "results.json", run / "eval" / "results.json")
            path = next((p for p in places if p.is_file()), None)
            if path is None:
                raise DataError(f"{run} has no results.json: score it first "
                                f"(python eval.py --checkpoint {run}/last.pt)")
            content, title = read_results(path), name or run.name
            into = found.setdefault(title, {})
            twice = sorted(set(into) & set(content["datasets"]))
            if twice:
                raise DataError(f"{title} has {twice[0]} twice: name the runs apart")
            into |= content["datasets"]
            recipes.setdefault(title, []).append(content.get("training", {}))
    return found, recipes


def main_metrics(found):
    """{dataset: the metric that it is known by}, of all columns."""
    names = dict.fromkeys(d for results in found.values() for d in results)
    return {d: next(m for m in MAIN if any(m in r.get(d, {}) for r in found.values()))
            for d in names}


def compared_scores(found):
    """Rows: a dataset's main score in every column, then the means over what all columns have."""
    metric, rows = main_metrics(found), []
    for d, m in metric.items():
        rows.append([d, m, *(cell(results.get(d), m) for results in found.values())])
    for m in MAIN:
        shared = [d for d in metric if metric[d] == m
                  and all(r.get(d, {}).get(m) is not None for r in found.values())]
        if shared:
            means = [np.mean([r[d][m] for d in shared]) for r in found.values()]
            rows.append([f"mean of {len(shared)}", m, *(f"{mean:.3f}" for mean in means)])
    return rows


def settings_that_differ(recipes):
    """Rows: a field of the recipe that is not the same in all columns."""
    rows = []
    for key in sorted({k for runs in recipes.values() for recipe in runs for k in recipe}):
        values = [sorted({str(recipe.get(key)) for recipe in runs}) for runs in recipes.values()]
        if any(v != values[0] for v in values):
            rows.append([key, "setting", *(", ".join(v) for v in values)])
    return rows


def compare(columns, out=None):
    """Print finished evaluations side by side; columns as of `read_runs`.

    With `out` also compare.md, and where the runs differ in their share of the data data.png
    (Figure 7). Returns {name: {dataset: results}}.
    """
    found, recipes = read_runs(columns)
    rows = compared_scores(found) + settings_that_differ(recipes)
    text = markdown(["dataset", "score", *found], rows)
    print(text)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "compare.md").write_text(text + "\n")
        shares = [{float(recipe.get("data_fraction", 1)) for recipe in runs}
                  for runs in recipes.values()]
        if all(len(s) == 1 for s in shares) and len(set.union(*shares)) > 1:
            draw_data(Path(out) / "data.png", [s.pop() for s in shares], found)
    return found


# -------------------------------------------------------------------------------------------------
# What infer.py did

def describe_answer(case, answer):
    """What was used and assumed, volumes in ml, versions, seconds: for `infer.py --report`.

    case: a `Case` of infer.py; answer: (K, H, W) as it was written.
    """
    classes = {}
    if case.segmentation:
        for value, voxels in zip(*np.unique(answer[answer > 0], return_counts=True)):
            classes[str(int(value))] = {"voxels": int(voxels)}
            if case.source.kind != "picture":
                ml = abs(float(np.linalg.det(case.source.affine[:3, :3]))) / 1000
                classes[str(int(value))]["ml"] = round(int(voxels) * ml, 4)
    files = ("prompt", "prompt_label", "input", "output")
    return {
        "input": str(case.source.path), "output": str(case.output),
        "prompts": [{"image": str(e.image.path), "label": str(e.label.path)}
                    for e in case.prompts.examples],
        "task": "segmentation" if case.segmentation else "image",
        "modality": case.modality, "axis": case.axis,
        "prompt_slices": [list(s) for s in case.slices], "classes": classes, "said": case.notes,
        "options": {k: v for k, v in vars(case.args).items() if k not in files},
        "checkpoint": str(case.args.checkpoint), "seconds": round(time.time() - case.begun, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__}}


# -------------------------------------------------------------------------------------------------
# Figures

def pyplot():
    """matplotlib.pyplot, without a display unless it was imported before, as in a notebook.

    Raises ImportError where matplotlib is missing.
    """
    import matplotlib
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def finish(figure, path, dpi=110, **layout):
    """Write a figure and forget it."""
    figure.tight_layout(**layout)
    figure.savefig(path, dpi=dpi)
    pyplot().close(figure)


def show_classes(axis, label, classes, alpha=0.6):
    """Lay the classes (H, W), 1 to `classes`, over what an axis shows."""
    colors, most = ("tab20", 20) if classes > 10 else ("tab10", 10)
    axis.imshow(np.ma.masked_equal(label, 0), cmap=colors, alpha=alpha, vmin=1, vmax=most,
                interpolation="nearest")


def draw_data(path, shares, found):
    """Score against the share of the training data, a line a dataset (the paper's Figure 7)."""
    figure, axis = pyplot().subplots(figsize=(7, 4.5))
    columns = sorted(zip(shares, found.values()), key=lambda c: c[0])
    for d, metric in main_metrics(found).items():
        points = [(100 * share, results.get(d, {}).get("mIoU")) for share, results in columns]
        points = [p for p in points if p[1] is not None]
        if metric == "mIoU" and points:
            axis.plot(*zip(*points), ".-", label=d)
    axis.set(xscale="log", xlabel="share of the training data, %", ylabel="mIoU", ylim=(0, 1))
    axis.legend(fontsize=7)
    finish(figure, path)


def papers_scores():
    """{dataset: the paper's MVG}: mIoU of Table 2, PSNR of Table 3."""
    scores = dict(zip(TABLE_2, map(float, PAPER_2["MVG"].split())))
    return scores | dict(zip(TABLE_3, map(float, PAPER_3["MVG"].split()[1::3])))


def draw_scores(path, results):
    """Every dataset's main score with its interval, beside copying and the paper's MVG.

    One panel a metric (the paper's Figure 2 as bars).
    """
    groups = {}
    for name, r in results.items():
        metric = next((m for m in MAIN if r.get(m) is not None), None)
        if metric:
            groups.setdefault(metric, []).append(name)
    if not groups:
        return
    height = 1.5 + 0.35 * max(map(len, groups.values()))
    figure, axes = pyplot().subplots(1, len(groups), figsize=(5 * len(groups), height),
                                     squeeze=False)
    for axis, (metric, names) in zip(axes[0], groups.items()):
        draw_bars(axis, metric, names, results)
    finish(figure, path)


def draw_bars(axis, metric, names, results):
    places, values = range(len(names)), [results[n][metric] for n in names]
    spans = [results[n]["interval"][metric] or (v, v) for n, v in zip(names, values)]
    axis.barh(places, values, 0.6, color="#0072b2", label="prompted")
    for at, span in zip(places, spans):
        axis.plot(span, (at, at), color="black", linewidth=1)
    copied = [results[n]["copy"][metric] for n in names]
    axis.plot(copied, places, "o", color="#e69f00", label="copied")
    paper = papers_scores()
    known = [(paper[n], at) for at, n in enumerate(names) if n in paper]
    if known:
        axis.plot(*zip(*known), "D", color="#cc79a7", label="paper's MVG")
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xlabel("PSNR in dB" if metric == "PSNR" else metric.replace("_", " "))
    if metric != "PSNR":
        axis.set_xlim(0, 1)
    axis.legend(fontsize=7)


def draw_prompts(path, results):
    """Every dataset's score under each random prompt, and under the one that looks alike.

    results: {dataset: what prompts.py's `spread` gives}. The line ends at the worst and the best
    prompt of every case.
    """
    known = {name: r for name, r in results.items() if "mean" in r}
    if not known:
        return
    figure, axis = pyplot().subplots(figsize=(6, 1.3 + 0.4 * len(known)))
    for at, r in enumerate(known.values()):
        scale = 100 if r["metric"] == "PSNR" else 1  # dB in hundreds, to lie beside IoU
        axis.plot(np.array([r["worst"], r["best"]]) / scale, (at, at), color="0.6")
        axis.plot(np.array(r["draws"]) / scale, [at] * len(r["draws"]), "o", color="#0072b2",
                  markersize=4, label=None if at else "random prompts, all cases")
        axis.plot(r["alike"] / scale, at, "D", color="#d55e00",
                  label=None if at else "the prompt that looks alike")
    titles = [f"{name}, {r['metric'].replace('_', ' ')}" + (" / 100" * (r["metric"] == "PSNR"))
              for name, r in known.items()]
    axis.set_yticks(range(len(known)), titles)
    axis.invert_yaxis()
    axis.set_xlabel("score; the line goes from each case's worst prompt to its best")
    axis.legend(fontsize=7)
    finish(figure, path)


def draw_examples(out, results, answer, datasets):
    """examples/<dataset>.png: the worst, median and best case; examples.png: all medians.

    answer(dataset, case): an `Answer` of eval.py, of which the middle slice is shown.
    """
    medians = []
    for name, r in results.items():
        ranked, rows = r["ranked"], []
        if not ranked:
            continue
        chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
        cases = dict.fromkeys(case for case, _ in chosen.values())  # one may be worst and best
        panels = {case: middle_slices(answer(name, case)) for case in cases}
        for what, (case, value) in chosen.items():
            rows.append((f"{what}: {case}\n{value:.2f}", datasets[name], panels[case]))
        (out / "examples").mkdir(exist_ok=True)
        draw_rows(out / "examples" / f"{name}.png", rows)
        medians.append((name, *rows[1][1:]))
    if medians:
        draw_rows(out / "examples.png", medians)


def middle_slices(answer):
    """(title, image, label or None) of the middle slice of an `Answer`, five panels."""
    k = len(answer.images) // 2
    prompt, image = answer.prompt_images[k], answer.images[k]
    return [("prompt", prompt, None), ("prompt label", prompt, answer.prompt_labels[k]),
            ("image", image, None), ("truth", image, answer.truth[k]),
            ("prediction", image, answer.answers["prediction"][k])]


def draw_rows(path, examples, titles_in_every_row=False):
    """A row an example: (its name, dataset, panels as of `middle_slices`)."""
    columns = len(examples[0][2])
    figure, axes = pyplot().subplots(len(examples), columns, squeeze=False,
                                     figsize=(2 * columns, 2.1 * len(examples)))
    for axes_of_row, (name, dataset, panels) in zip(axes, examples):
        for axis, (title, image, label) in zip(axes_of_row, panels):
            colored = label is not None and dataset.colored
            shown = image if label is None or colored else label
            axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
            if colored:
                show_classes(axis, label, len(dataset.labels))
            axis.set_xticks([])
            axis.set_yticks([])
            if titles_in_every_row or axes_of_row is axes[0]:
                axis.set_title(title, fontsize=9)
        axes_of_row[0].set_ylabel(name, fontsize=7)
    finish(figure, path)


def draw_overlay(path, stack, answer, segmentation, columns=5):
    """A montage of up to 25 slices: classes laid over the image, or the image and its answer."""
    shown = np.flatnonzero([a.any() for a in answer]) if segmentation else np.arange(len(stack))
    shown = shown if len(shown) else np.arange(len(stack))
    places = np.linspace(0, len(shown) - 1, min(25, len(shown))).round().astype(int)
    shown = shown[np.unique(places)]
    rows, columns = -(-len(shown) // columns), min(columns, len(shown))
    figure, axes = pyplot().subplots(rows, columns, figsize=(2.2 * columns, 2.3 * rows),
                                     squeeze=False)
    classes = np.unique(answer)[1:] if segmentation else ()
    for axis in axes.flat:
        axis.axis("off")
    for axis, k in zip(axes.flat, shown):
        axis.set_title(f"slice {k}", fontsize=7)
        picture = stack[k]
        if not segmentation:
            low, high = answer.min(), answer.max()
            scaled = to_unit(answer[k], (low, max(high, low + 1e-6)))
            picture = np.concatenate([picture, scaled], 1)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        if segmentation:
            numbers = np.where(answer[k] == 0, 0, np.searchsorted(classes, answer[k]) + 1)
            show_classes(axis, numbers, len(classes), alpha=0.5)
    finish(figure, path, dpi=100)


def draw_datasets(path, found, columns=4):
    """A slice of every dataset found beside its label, colored at random as in training."""
    columns = max(1, min(columns, len(found)))
    rows = -(-len(found) // columns)
    figure, axes = pyplot().subplots(rows, 2 * columns, squeeze=False,
                                     figsize=(2 * columns * 1.5, rows * 1.75))
    for axis in axes.flat:
        axis.axis("off")
    for n, (name, hit) in enumerate(found.items()):
        pair = first_pair(hit)
        if pair is None:
            continue
        first = 2 * (n % columns)
        for axis, picture in zip(axes[n // columns, first:], pair):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=65535)
        axes[n // columns, first].set_title(name, fontsize=8, loc="left")
    finish(figure, path, dpi=100, pad=0.4)


def first_pair(hit):
    """(image, colored label) of the first case that can be read: its slice with most classes."""
    for case in hit.cases:
        with suppress(DataError):
            if case.split != "inference":
                arrays, index = prepare_case(case, hit.dataset)
                break
    else:
        return None

    def content(k):
        return len(index["classes"][k]), np.count_nonzero(arrays["label"][k])

    k = max(index["foreground"] or [0], key=content)
    label = arrays["label"][k]
    if hit.dataset.colored:
        classes = index["classes"][k]
        palette = np.zeros(256)
        palette[classes] = spread_colors(len(classes))
        label = palette[label] * 65535
    return arrays["image"][k], label


def draw_loss(path, log):
    """loss.png from log.jsonl: every dataset's loss under its objective, and validation scores.

    Nothing where matplotlib is missing.
    """
    try:
        plt = pyplot()
    except ImportError:
        return
    curves, scores = {}, {}
    for line in (json.loads(l) for l in log.read_text().splitlines()):
        for objective, by in line["losses"].items():
            for name, value in by.items():
                curves.setdefault((objective, name), []).append((line["step"], value))
        for name, value in line.get("validation", {}).items():
            scores.setdefault(name, []).append((line["step"], value))
    panels = 1 + bool(scores)
    figure, axes = plt.subplots(1, panels, figsize=(2 + 6 * panels, 5), squeeze=False)
    for (objective, name), points in sorted(curves.items()):
        style = "-" if objective == "ar" else "--"
        axes[0, 0].plot(*zip(*points), style, label=f"{name} ({objective})", linewidth=1)
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log")
    for name, points in sorted(scores.items()):
        axes[0, 1].plot(*zip(*points), ".-", label=name, linewidth=1)
        axes[0, 1].set(xlabel="step", ylabel="held-out cases: mIoU, box IoU or SSIM", ylim=(0, 1))
    for axis in axes[0]:
        axis.legend(fontsize=4 if len(curves) > 30 else 7, ncols=1 + len(curves) // 30)
    finish(figure, path)


@torch.no_grad()
def draw_samples(path, model, samples, answer):
    """samples.png: a row a dataset, in the colors of training: the prompt, its label, the image,
    its label, and the model's answer. answer(model, batch): (1, 1, H, W). Needs Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return
    training, rows = model.training, []
    model.eval()
    device = next(model.parameters()).device
    for _, sample in sorted(first_samples(samples).items()):
        batch = samples.make(samples.collate([sample]).to(device), 0)
        labels = color(batch.labels, batch.palette, batch.colored)
        tiles = [batch.images[:, -2], labels[:, -2], batch.images[:, -1], labels[:, -1],
                 answer(model, batch)]
        rows.append(torch.cat([t[0, 0].cpu() for t in tiles], 1))
    model.train(training)
    grid = (torch.cat(rows).clamp(0, 1) * 255).byte().numpy()
    zoom = max(1, 128 // samples.image_size)
    Image.fromarray(np.kron(grid, np.ones((zoom, zoom), np.uint8))).save(path)


def first_samples(samples, steps=200):
    """{dataset: one of its samples}, the same ones every time."""
    found, wanted = {}, len(samples.names) - len(samples.excluded)
    for step in range(steps):
        for i in range(4):
            sample = samples[step, i]
            found.setdefault(samples.names[sample["drawn"][0]], sample)
        if len(found) == wanted:
            break
    return found


def answer_sample(model, batch):
    """What an MVG paints for a batch of one, in the way that its task was trained: (1, 1, H, W)."""
    labels = color(batch.labels, batch.palette, batch.colored)
    objective = model.meta.get("objective", "hybrid")
    if objective == "ar" or objective == "hybrid" and batch.colored:
        cache = model.encode_prompts(batch.images[:, :-1], labels[:, :-1])
        return model.predict(cache, batch.images[:, -1])
    return model.predict_canvas(batch.images[:, -2], labels[:, -2], batch.images[:, -1])
