"""The picture of `make demo`: what two checkpoints answer to cases that they were not trained on.

    python -m lab.demo --store demo/store --before checkpoints/demo.pt --after runs/demo/last.pt \
        --out runs/demo/demo.png

A row a dataset, its first test case: the prompt, its label, the image, the truth, and both answers
with their scores. Beside them stands the score of copying the prompt's label, or the input.
"""

import argparse

import numpy as np

import figures
from eval import Settings, answer_case, score
from lab import unet
from metrics import case_values, main_metric
from scans.store import Store
from scans.volumes import command_line


def value_of(name, answer, dataset):
    """The main score of one of an `Answer`'s answers as text, and its number."""
    metric = main_metric(dataset)
    value = case_values(score(name, answer, dataset), dataset)[metric]
    return f"{metric} {value:.2f}" if metric != "PSNR" else f"{value:.1f} dB"


def best_slice(answer):
    """The slice in which there is most to answer."""
    if answer.truth.dtype == np.uint8:
        return int(np.argmax([(t > 0).mean() for t in answer.truth]))
    return int(np.argmax([np.abs(t - x).mean() for t, x in zip(answer.truth, answer.images)]))


def row_of(models, store, name):
    """(title, dataset, panels) of a dataset's first test case, and a line to print."""
    dataset, case = store.datasets[name], store.split(name, "test")[0]
    answers = {title: answer_case(model, case, store.split(name, "train"), dataset, Settings())
               for title, model in models.items()}
    first = next(iter(answers.values()))
    k = best_slice(first)
    panels = [("prompt", first.prompt_images[k], None),
              ("its label", first.prompt_images[k], first.prompt_labels[k]),
              ("image", first.images[k], None), ("truth", first.images[k], first.truth[k])]
    scores = {"copied": value_of("copy", first, dataset)}
    for title, answer in answers.items():
        scores[title] = value_of("prediction", answer, dataset)
        panels.append((f"{title}: {scores[title]}", answer.images[k],
                       answer.answers["prediction"][k]))
    line = f"{name}: " + ", ".join(f"{what} {text}" for what, text in scores.items())
    return (f"{name}\ncopied: {scores['copied']}", dataset, panels), line


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--store", required=True, help="prepared store")
    p.add_argument("--before", required=True, help="a checkpoint")
    p.add_argument("--after", required=True, help="another one, fine-tuned from it")
    p.add_argument("--out", required=True, metavar="PNG", help="the picture")
    args = p.parse_args(argv)
    store = Store(args.store)
    models = {"before": unet.load_any(args.before), "after": unet.load_any(args.after)}
    rows = [row_of(models, store, name) for name in store.datasets if store.split(name, "test")]
    for _, line in rows:
        print(line)
    figures.draw_rows(args.out, [row for row, _ in rows], titles_in_every_row=True)


if __name__ == "__main__":
    command_line(main)
