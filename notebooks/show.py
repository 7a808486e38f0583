"""What the six notebooks share: where they run, and pictures side by side.

A notebook starts with `from show import show`. From there on it works in the repository's folder:
`import mvg` finds the repository's file, and `!python` is the Python of the notebook.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

from figures import show_classes  # after the line that finds it


def show(panels, columns=None, rows=(), ticks=None, size=1.9):
    """Draw pictures side by side.

    panels   [(title, picture)] or [(title, picture, mask)], (H, W) arrays or tensors: a picture is
             gray, 0 to 1, or in colors, (H, W, 3); a mask holds integers, which are laid over it
    columns  panels in a row (default: all of them)
    rows     a name for each row
    ticks    (names of columns, names of rows) of the panels' pixels, for small matrices
    size     width of a panel in inches, of 80 pixels; a row has at most 10.8 inches
    """
    columns = columns or len(panels)
    lines = -(-len(panels) // columns)
    size = min(size, 10.8 / columns)
    tallest = 1 if ticks else max(picture.shape[0] / picture.shape[1] for _, picture, *_ in panels)
    words = 0.15 * max(2 + title.count("\n") for title, *_ in panels)
    figure, axes = plt.subplots(lines, columns, squeeze=False, dpi=80,
                                figsize=(size * columns, (size * tallest + words) * lines))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=bool(ticks))
    for axis, (title, picture, *mask) in zip(axes.flat, panels):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect="auto" if ticks else "equal")
        if mask:
            show_classes(axis, np.asarray(mask[0]), 10)
        axis.set_title(title, fontsize=8)
        if ticks:
            axis.set_xticks(range(len(ticks[0])), ticks[0], fontsize=8)
            axis.set_yticks(range(len(ticks[1])), ticks[1], fontsize=8)
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(name, fontsize=8)
    figure.tight_layout(pad=0.4)
    plt.show()


def middle(store, name, split="train", case=0):
    """The middle one of the slices with foreground of a case in the store: (image, label).

    Both are (H, W). The image is in [0, 1]. The label holds integers, or an image in [0, 1].
    """
    chosen = store.split(name, split)[case]
    image, label, _ = chosen.read(chosen.foreground[len(chosen.foreground) // 2])
    return image, label.astype(np.uint8) if store.datasets[name].colored else label
