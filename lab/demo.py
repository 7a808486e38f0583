"""The picture of `make demo`: what a checkpoint answers to cases that it was not trained on.

    python -m lab.demo --data_root demo/data --store demo/store --out demo/demo.png

A row a dataset, its first test case: the prompt, its label, the image, the truth, and the answer
with its score. Beside it stands the score of copying the prompt's label, or the input.
"""

import argparse

import numpy as np

import figures
import mvg
from eval import Settings, answer_case, score
from metrics import case_values, main_metric
from scans.datasets import find
from scans.store import Store, prepare
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


def row_of(model, store, name):
    """(title, dataset, panels) of a dataset's first test case, and a line to print."""
    dataset, case = store.datasets[name], store.split(name, "test")[0]
    a = answer_case(model, case, store.split(name, "train"), dataset, Settings())
    k = best_slice(a)
    answered, copied = (value_of(which, a, dataset) for which in ("prediction", "copy"))
    panels = [("prompt", a.prompt_images[k], None),
              ("its label", a.prompt_images[k], a.prompt_labels[k]),
              ("image", a.images[k], None), ("truth", a.images[k], a.truth[k]),
              (f"answer: {answered}", a.images[k], a.answers["prediction"][k])]
    return (f"{name}\ncopied: {copied}", dataset, panels), f"{name}: {answered}, copied {copied}"


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--data_root", required=True, help="datasets")
    p.add_argument("--store", required=True, help="where they are prepared")
    p.add_argument("--checkpoint", default="checkpoints/demo.pt", help="default: %(default)s")
    p.add_argument("--out", required=True, metavar="PNG", help="the picture")
    args = p.parse_args(argv)
    prepare(find(args.data_root), args.store)
    store, model = Store(args.store), mvg.load(args.checkpoint)
    rows = [row_of(model, store, name) for name in store.datasets if store.split(name, "test")]
    for _, line in rows:
        print(line)
    figures.draw_rows(args.out, [row for row, _ in rows], titles_in_every_row=True)


if __name__ == "__main__":
    command_line(main)
