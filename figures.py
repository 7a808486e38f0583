"""Every figure: scores, examples, overlays, losses, samples, datasets.

Functions get results as dictionaries or arrays, and write PNG files. matplotlib is loaded when one
is drawn, because training works without it.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from coloring import color, spread_colors
from metrics import MAIN, main_metrics
from scans.store import prepare_case
from scans.volumes import DataError, to_unit


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
    path = Path(path)
    try:
        figure.tight_layout(**layout)
    except ValueError:  # a name with a $ is no formula
        from matplotlib.text import Text
        for text in figure.findobj(Text):
            text.set_parse_math(False)
        figure.tight_layout(**layout)
    temporary = path.with_name(f".{path.name}")  # whole or not at all
    try:
        figure.savefig(temporary, dpi=dpi)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot().close(figure)


def show_classes(axis, label, classes, alpha=0.6):
    """Lay the classes (H, W), 1 to `classes`, over what an axis shows."""
    colors, most = ("tab20", 20) if classes > 10 else ("tab10", 10)
    numbers = np.where(label == 0, 0, (label.astype(int) - 1) % most + 1)  # more classes: again
    return axis.imshow(np.ma.masked_equal(numbers, 0), cmap=colors, alpha=alpha, vmin=1, vmax=most,
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


def draw_scores(path, results, paper):
    """Every dataset's main score with its interval, beside copying and the paper's MVG.

    One panel a metric (the paper's Figure 2 as bars). paper: {dataset: the paper's MVG}.
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
        draw_bars(axis, metric, names, results, paper)
    finish(figure, path)


def draw_bars(axis, metric, names, results, paper):
    places, values = range(len(names)), [results[n][metric] for n in names]
    spans = [results[n]["interval"][metric] or (v, v) for n, v in zip(names, values)]
    axis.barh(places, values, 0.6, color="#0072b2", label="prompted")
    for at, span in zip(places, spans):
        axis.plot(span, (at, at), color="black", linewidth=1)
    copied = [results[n]["copy"][metric] for n in names]
    axis.plot(copied, places, "o", color="#e69f00", label="copied")
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
    """How much the prompt matters. results: {dataset: {number of prompts: `spread` of prompts.py}}.

    Left every dataset's score under each single draw, and under the prompt that looks alike; the
    line goes from every case's worst prompt to its best. Right the mean for the number of prompts.
    """
    known = {name: by for name, by in results.items()
             if all(main_spread(r)[1]["cases"] for r in by.values())}
    if not known:
        return
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 2 + 0.4 * len(known)))
    titles, counts = [], [int(count) for count in next(iter(known.values()))]
    for at, (name, by) in enumerate(known.items()):
        metric, r = main_spread(next(iter(by.values())))
        scale = 100 if metric == "PSNR" else 1  # dB in hundreds, to lie beside IoU
        left.plot(np.array([r["worst"], r["best"]]) / scale, (at, at), color="0.6")
        left.plot(np.array(r["draws"]) / scale, [at] * len(r["draws"]), "o", color="#0072b2",
                  markersize=4, label=None if at else "random prompts, all cases")
        left.plot(r["alike"] / scale, at, "D", color="#d55e00",
                  label=None if at else "the prompt that looks alike")
        means = [main_spread(r)[1]["mean"] / scale for r in by.values()]
        right.plot(counts, means, "o-", label=name)
        titles.append(f"{name}, {metric.replace('_', ' ')}" + (" / 100" * (metric == "PSNR")))
    left.set_yticks(range(len(known)), titles)
    left.invert_yaxis()
    left.set_xlabel("score; the line goes from each case's worst prompt to its best")
    right.set(xlabel="number of prompts", ylabel="score", ylim=(0, 1))
    right.set_xscale("log", base=2)
    right.set_xticks(counts, counts)
    for axis in (left, right):
        axis.legend(fontsize=7)
    finish(figure, path)


def main_spread(by_metric):
    """(name, numbers) of the first metric of what `spread` of prompts.py gives."""
    return next(iter(by_metric.items()))


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


def draw_overlay(path, stack, answer, classes=None, pixel=(1, 1)):
    """A montage of up to 25 slices: classes laid over the image, or the image and its answer.

    stack, answer: (K, H, W); classes: the values of the prompt's classes, in order, or None for an
    image; pixel: its height and width in mm. Slices count from 1.
    """
    shown = np.arange(len(stack))
    if classes is not None and answer.any():
        shown = np.flatnonzero([a.any() for a in answer])
    places = np.linspace(0, len(shown) - 1, min(25, len(shown))).round().astype(int)
    shown = shown[np.unique(places)]
    columns = min(5, len(shown))
    rows, width = -(-len(shown) // columns), min(6, 11 / columns)  # inches
    _, H, W = stack.shape
    high = width * H * pixel[0] / (W * pixel[1] * (1 if classes is not None else 2))
    tall, named = (min(high, 3 * width) + 0.2) * rows, classes is not None and len(classes) <= 20
    legend = 0.5 if named else 0  # inches below
    figure, axes = pyplot().subplots(rows, columns, squeeze=False,
                                     figsize=(width * columns, tall + legend))
    for axis in axes.flat:
        axis.axis("off")
    for axis, k in zip(axes.flat, shown):
        axis.set_title(f"slice {k + 1}", fontsize=7)
        picture = stack[k]
        if classes is None:
            low, high = answer.min(), answer.max()
            scaled = to_unit(answer[k], (low, max(high, low + 1e-6)))
            picture = np.concatenate([picture, scaled], 1)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=pixel[0] / pixel[1])
        if classes is not None:
            numbers = np.searchsorted([0, *classes], answer[k])
            laid = show_classes(axis, numbers, len(classes), alpha=0.5)
            laid.axes.set_aspect(pixel[0] / pixel[1])
    if named:
        from matplotlib.patches import Patch
        handles = [Patch(color=laid.cmap(laid.norm(n)), label=f"{value}")
                   for n, value in enumerate(classes, 1)]
        figure.legend(handles=handles, fontsize=7, loc="lower center", ncols=10, frameon=False)
    finish(figure, path, dpi=100, rect=(0, legend / (tall + legend), 1, 1))


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
