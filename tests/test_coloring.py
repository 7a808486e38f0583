"""Section 3.2, random coloring: colors keep their distance, and decode to their classes."""

import numpy as np
import pytest
import torch

import coloring
from common import context
from scans.datasets import DATASETS, Dataset
from scans.volumes import resize_images


def test_colors_keep_their_distance_and_differ_between_draws():
    rng = np.random.default_rng(0)
    for n in range(1, 31):
        draws = [coloring.random_colors(n, rng) for _ in range(50)]
        for colors in draws:
            every = np.sort([0, *colors])
            assert np.diff(every).min() >= coloring.color_gap(n) - 1e-9 and every[-1] <= 1 + 1e-9
        assert len({tuple(c) for c in draws}) == 50
        if n > 1:  # the order is random too: any class can be the brightest
            assert len({int(np.argmax(c)) for c in draws}) > 1


@pytest.mark.parametrize("n", (1, 2, 7, 15, 30))
def test_labels_decode_exactly_from_blurred_and_noised_colors(n):
    """Grays moved by up to a sixth of the gap by blur, and as much by noise, keep their classes."""
    rng = np.random.default_rng(n)
    labels = torch.from_numpy(rng.integers(0, n + 1, (64, 64)))
    colors = coloring.random_colors(n, rng)
    gray = torch.from_numpy(np.concatenate([[0], colors]))[labels].float()
    gap = np.diff(np.sort([0, *colors])).min()
    blurred = torch.nn.functional.avg_pool2d(gray[None, None], 3, 1, 1, count_include_pad=False)
    grain = torch.from_numpy(rng.uniform(-gap / 6, gap / 6, gray.shape)).float()
    moved = gray + (blurred[0, 0] - gray).clamp(-gap / 6, gap / 6) + grain
    fit = coloring.decode(moved, colors)
    assert torch.equal(fit.argmax(0), labels)
    assert torch.allclose(fit.sum(0), torch.ones(64, 64), atol=1e-5)


def test_fits_survive_resizing_where_grays_do_not():
    """Between class 2 (bright) and background lies the gray of class 1, and no fit to it."""
    colors = [0.5, 1.0]
    gray = torch.zeros(8, 8)
    gray[:, 4:] = 1.0
    through_gray = coloring.decode(resize_images(gray[None], (64, 64)), colors)[0].argmax(0)
    through_fit = resize_images(coloring.decode(gray, colors), (64, 64)).argmax(0)
    assert (through_gray == 1).any() and not (through_fit == 1).any()


def test_spread_colors_are_as_far_apart_as_can_be():
    for n in range(1, 31):
        every = np.array([0, *coloring.spread_colors(n)])
        assert np.allclose(np.diff(every), 1 / n) and every[-1] == 1
    assert len(coloring.spread_colors(0)) == 0


def test_predefined_colors_never_collide():
    extra = Dataset("mine", "", "", "mri", "segmentation", ("a", "b"))
    every = [*DATASETS.values(), extra]
    offsets, total = coloring.predefined_offsets(every)
    grays = [(offsets[d.name] + n) / total for d in every if d.colored
             for n in range(1, len(d.labels) + 1)]
    assert len(set(grays)) == len(grays) == total and min(grays) > 0 and max(grays) == 1
    palette = coloring.make_palette([1, 3], "predefined", None, "acdc", (offsets, total))
    assert palette[3] == np.float32((offsets["acdc"] + 3) / total) and palette[2] == 0


def test_predefined_colors_do_not_depend_on_what_was_found(store):
    """A part of the datasets has the colors that all of them have."""
    offsets, _ = coloring.predefined_offsets(DATASETS.values())
    here, _ = context(store).predefined
    assert {name: here[name] for name in offsets} == offsets
    assert set(here) - set(offsets) == {"Dataset801_NerveUltrasound", "msd_hippocampus"}


def test_binary_coloring_is_one_class_against_the_rest():
    rng = np.random.default_rng(0)
    palettes = [coloring.make_palette([2, 5], "binary", rng) for _ in range(20)]
    assert all(p.sum() == 1 for p in palettes) and {int(p.argmax()) for p in palettes} == {2, 5}


def test_palettes_by_hand():
    rng = np.random.default_rng(0)
    for kind in coloring.COLORINGS:
        assert (coloring.make_palette([], kind, rng) == 0).all()
    palette = coloring.make_palette([3, 7], "random", rng)
    assert palette.shape == (256,) and palette.dtype == np.float32
    assert set(np.flatnonzero(palette)) == {3, 7}
    with pytest.raises(ValueError, match="choose one of random, predefined, binary"):
        coloring.make_palette([1], "rainbow", rng)


def test_color_is_a_table_and_lets_images_pass():
    labels = torch.tensor([[[[0.0, 1.0], [2.0, 1.0]]], [[[0.1, 0.9], [0.5, 0.0]]]])  # (2, 1, 2, 2)
    palette = torch.zeros(2, 256)
    palette[:, 1], palette[:, 2] = 0.4, 0.8
    painted = coloring.color(labels, palette, torch.tensor([True, False]))
    assert torch.equal(painted[0], torch.tensor([[[0.0, 0.4], [0.8, 0.4]]]))
    assert torch.equal(painted[1], labels[1])


def test_one_color_a_class_in_all_pairs_of_a_sample(store):
    """The same palette paints prompt and task; a class that the prompt lacks is background."""
    samples = context(store, seed=3)
    seen = 0
    for step in range(20):
        s = samples[step, 0]
        if not s["colored"]:
            assert (s["palette"] == 0).all()
            continue
        painted = coloring.color(s["labels"][None], s["palette"][None], s["colored"][None])[0]
        shown = set(s["labels"][:-1].unique().int().tolist()) - {0}
        for c in set(s["labels"].unique().int().tolist()) - {0}:
            values = painted[s["labels"] == c].unique()
            assert len(values) == 1 and (values[0] > 0) == (c in shown)
            seen += 1
    assert seen > 5
