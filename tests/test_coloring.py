"""Section 3.2, random coloring: colors keep their distance, and decode to their classes."""

import numpy as np
import pytest
import torch

import coloring
from common import context, shown
from scans.datasets import DATASETS, Dataset
from scans.volumes import resize_images


def palettes(classes, kind, count=1, seed=0, **more):
    """`count` palettes of the classes, (count, 256)."""
    rng, asked = np.random.default_rng(seed), torch.zeros(count, 256, dtype=torch.bool)
    asked[:, list(classes)] = True
    keys = [torch.from_numpy(np.stack(k))
            for k in zip(*(coloring.draw_keys(rng) for _ in range(count)))]
    return coloring.draw_palettes(asked, keys, kind, **more)


def test_colors_keep_their_distance_and_differ_between_draws():
    for n in range(1, 31):
        drawn = palettes(range(3, 3 + n), "random", 50, seed=n)
        colors = drawn[:, 3:3 + n]
        assert ((drawn > 0).sum(1) == n).all() and colors.max() <= 1 + 1e-6
        every = torch.cat([torch.zeros(50, 1), colors], 1).sort(1).values
        assert every.diff(dim=1).min() >= min(0.2, 0.7 / n) - 1e-6
        assert len({tuple(c) for c in colors.tolist()}) == 50
        if n > 1:  # the order is random too: any class can be the brightest
            assert len(set(colors.argmax(1).tolist())) > 1


def test_random_colors_fill_what_their_distance_leaves():
    """One color is uniform in [0.2, 1]; the middle of three has its mean at 0.6."""
    one, three = palettes([9], "random", 4000)[:, 9], palettes([1, 2, 3], "random", 4000)[:, 1:4]
    quartiles = one.quantile(torch.tensor([0.25, 0.5, 0.75]))
    assert torch.allclose(quartiles, torch.tensor([0.4, 0.6, 0.8]), atol=0.03)
    assert three.median(1).values.mean() == pytest.approx(0.6, abs=0.01)
    assert torch.allclose(three.mean(0), torch.full((3,), 0.6), atol=0.02)  # no class is favoured


@pytest.mark.parametrize("n", (1, 2, 7, 15, 30))
def test_labels_decode_exactly_from_blurred_and_noised_colors(n):
    """Grays moved by up to a sixth of the gap by blur, and as much by noise, keep their classes."""
    rng = np.random.default_rng(n)
    labels = torch.from_numpy(rng.integers(0, n + 1, (64, 64)))
    colors = palettes(range(1, n + 1), "random", seed=n)[0, 1:n + 1].numpy()
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
    offset = torch.tensor([[offsets["acdc"], total]], dtype=torch.float32)
    palette = palettes([1, 3], "predefined", offset=offset)[0]
    assert palette[3] == np.float32((offsets["acdc"] + 3) / total) and palette[2] == 0


def test_predefined_colors_do_not_depend_on_what_was_found(store):
    """A part of the datasets has the colors that all of them have."""
    offsets, _ = coloring.predefined_offsets(DATASETS.values())
    here, _ = context(store).predefined
    assert {name: here[name] for name in offsets} == offsets
    assert set(here) - set(offsets) == {"Dataset801_NerveUltrasound", "msd_hippocampus"}


def test_binary_coloring_is_one_class_against_the_rest():
    drawn = palettes([2, 5], "binary", 40)
    assert (drawn.sum(1) == 1).all()
    assert sorted(drawn.argmax(1).bincount().tolist(), reverse=True)[2:] == [0] * 4
    assert 8 < int((drawn.argmax(1) == 5).sum()) < 32


def test_palettes_by_hand():
    for kind in coloring.COLORINGS:
        assert (palettes([], kind, offset=torch.tensor([[0.0, 9.0]])) == 0).all()
    palette = palettes([3, 7], "random")[0]
    assert palette.shape == (256,) and palette.dtype == torch.float32
    assert set(np.flatnonzero(palette)) == {3, 7}
    with pytest.raises(ValueError, match="choose one of random, predefined, binary"):
        palettes([1], "rainbow")


def test_a_task_may_ask_for_fewer_classes_and_join_two():
    for kind in ("random", "binary"):
        fewer = palettes(range(1, 6), kind, 30, wanted=torch.full((30,), 2))
        assert ((fewer > 0).sum(1) == (2 if kind == "random" else 1)).all()
        joined = palettes(range(1, 6), kind, 30, joined=torch.ones(30, dtype=torch.long))
        assert ((joined > 0).sum(1) == (5 if kind == "random" else 2)).all()
        grays = [len(set(row[row > 0].tolist())) for row in joined]
        assert set(grays) == {4 if kind == "random" else 1}


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
        s = shown(samples, step, 0)
        if not s["colored"]:
            assert (s["palette"] == 0).all()
            continue
        painted = coloring.color(s["labels"][None], s["palette"][None], s["colored"][None])[0]
        in_prompts = set(s["labels"][:-1].unique().int().tolist()) - {0}
        for c in set(s["labels"].unique().int().tolist()) - {0}:
            values = painted[s["labels"] == c].unique()
            assert len(values) == 1 and (values[0] > 0) == (c in in_prompts)
            seen += 1
    assert seen > 5
