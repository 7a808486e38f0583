"""Section 4.1: the switch, the hidden patches, and the losses against ones written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import mvg
from common import context, make_batch, pairs, small
from objectives import LOSSES, draw_hidden, pixel_loss, switch
from recipe import Recipe


# -------------------------------------------------------------------------------------------------
# The switch

def test_the_shares_of_the_switch(store):
    samples = context(store)
    draws = [samples.draw(step, 0)[:3] for step in range(10_000)]
    segmentation = [o for o, _, name in draws if store.datasets[name].colored]
    others = [o for o, _, name in draws if not store.datasets[name].colored]
    assert len(segmentation) / 10_000 == pytest.approx(0.5, abs=0.02)
    assert set(segmentation) == {"ar"}
    assert others.count("mim") / len(others) == pytest.approx(0.9, abs=0.02)
    names = [name for _, _, name in draws if store.datasets[name].colored]
    for name in set(names):  # equally likely inside the group
        assert names.count(name) / len(names) == pytest.approx(1 / 4, abs=0.02)


def test_a_step_has_one_objective_whatever_the_rank(store):
    samples = context(store, seed=5)
    for step in range(30):
        assert len({samples.draw(step, i)[0] for i in range(32)}) == 1
    ranks = [[key for batch in data.BatchSampler(2, 6, 4, 1, rank, 2) for key in batch]
             for rank in (0, 1)]
    assert not set(ranks[0]) & set(ranks[1])
    assert sorted(ranks[0] + ranks[1]) == [(step, i) for step in range(2, 6) for i in range(8)]


def test_accumulated_batches_and_ranks_share_a_step():
    """Two ranks of three parts of two: every sample of a step once, and each part its own."""
    batches = [list(data.BatchSampler(0, 2, 2, 3, rank, 2)) for rank in (0, 1)]
    assert [len(b) for b in batches] == [6, 6] == [len(data.BatchSampler(0, 2, 2, 3, r, 2))
                                                   for r in (0, 1)]
    for step in (0, 1):
        numbers = [i for rank in batches for batch in rank for s, i in batch if s == step]
        assert sorted(numbers) == list(range(12))


@pytest.mark.parametrize("objective", ("ar", "mim"))
def test_one_objective_alone(store, objective):
    samples = context(store, objective=objective, num_prompts="1-3")
    draws = [samples.draw(step, 0) for step in range(2000)]
    assert {d[0] for d in draws} == {objective}
    assert {d[1] for d in draws} == ({1, 2, 3} if objective == "ar" else {1})
    colored = [store.datasets[d[2]].colored for d in draws]
    assert np.mean(colored) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("share", (0.0, 1.0))
def test_a_kind_of_task_that_is_not_there_leaves_its_share(share):
    """Segmentation alone is trained with ar alone, the rest alone in nine steps of ten with mim."""
    draws = [switch(Recipe(), step, share) for step in range(2000)]
    mim = np.mean([objective == "mim" for objective, _, _ in draws])
    assert mim == pytest.approx(0.9 * (1 - share), abs=0.02)
    assert {p for _, _, p in draws} == {share}


def test_the_switch_by_hand():
    """P(segmentation | ar) = s / (1 - (1 - s) m), and no other one among mim's."""
    recipe = Recipe(seg_share=0.3, mim_share=0.6)
    draws = [switch(recipe, step, 0.3) for step in range(4000)]
    assert np.mean([d[0] == "mim" for d in draws]) == pytest.approx(0.7 * 0.6, abs=0.025)
    (of_ar,), (of_mim,) = ({d[2] for d in draws if d[0] == o} for o in ("ar", "mim"))
    assert of_ar == pytest.approx(0.3 / (1 - 0.42)) and of_mim == 0
    assert draws == [switch(recipe, step, 0.3) for step in range(4000)]
    assert draws != [switch(Recipe(mim_share=0.6, seed=1), step, 0.3) for step in range(4000)]


def test_hidden_share_and_hidden_label():
    rng = np.random.default_rng(0)
    for ratio in (0.5, 0.75, 0.3):
        assert draw_hidden(rng, 49, ratio).sum() == round(4 * 49 * ratio)
    drawn = np.mean([draw_hidden(rng, 16, 0.75) for _ in range(2000)], 0)
    assert drawn.shape == (4, 16)
    assert drawn.min() > 0.7 and drawn.max() < 0.8  # anywhere, all four images alike
    only_y = [draw_hidden(rng, 16, 0.75, 0.1) for _ in range(2000)]
    share = np.mean([h[3].all() and not h[:3].any() for h in only_y])
    assert share == pytest.approx(0.1, abs=0.025)


# -------------------------------------------------------------------------------------------------
# The losses

@pytest.mark.parametrize("kind,expected", (("l1", 0.5), ("l2", 0.25), ("smooth_l1", 0.5 - 0.005)))
def test_pixel_losses(kind, expected):
    error = pixel_loss(torch.tensor(0.75), torch.tensor(0.25), kind, 0.01).item()
    assert error == pytest.approx(expected)
    little = pixel_loss(torch.tensor(0.001), torch.tensor(0.0), "smooth_l1", 0.01).item()
    assert little == pytest.approx(0.5 * 0.001 ** 2 / 0.01)


def painter(painted):
    """A model that answers always with these pixels."""
    return lambda images, labels, hidden=None, drop=None: painted


def test_loss_by_hand():
    labels = torch.zeros(2, 2, 1, 32, 32)
    labels[0, 1, 0, :8] = 0.5  # sample 0 is colored, sample 1 an image
    painted = torch.full((2, 1, 1, 32, 32), 0.25)
    valid = torch.ones(labels.shape, dtype=torch.uint8)
    valid[1, 1, 0, 16:] = 0
    batch = make_batch(torch.zeros_like(labels), labels, torch.tensor([True, False]), valid)
    sample = LOSSES["ar"](painter(painted), batch, labels, Recipe(loss="l1"))
    # every error is 0.25 whatever the weights, so each sample's weighted mean is 0.25
    assert torch.allclose(sample, torch.tensor([0.25, 0.25]))
    painted[0, 0, 0, :8] = 0.5  # only the background is wrong now, a tenth of its weight
    painted[1, 0, 0, 16:] = 9  # and this has no truth
    sample = LOSSES["ar"](painter(painted), batch, labels, Recipe(loss="l1"))
    assert sample[0].item() == pytest.approx(0.1 * 24 * 0.25 / (8 + 0.1 * 24), rel=1e-5)
    assert sample[1].item() == pytest.approx(0.25)


def naive_loss(objective, painted, batch, recipe):
    """The loss of every sample, pixel by pixel, from the text of objectives.py and the recipe."""
    losses = []
    for b in range(len(batch.images)):
        colored, top, bottom = bool(batch.colored[b]), 0.0, 0.0
        S, _, H, W = batch.images[b].shape
        loss = recipe.mask_loss if colored and recipe.mask_loss else recipe.loss
        for s in range(S):
            for y in range(H):
                for x in range(W):
                    image, label = (float(t[b, s, 0, y, x]) for t in (batch.images, batch.labels))
                    empty = colored and label == 0
                    weight_of_label = recipe.background_weight if empty else 1.0
                    weight_of_label *= float(batch.valid[b, s, 0, y, x])
                    if objective == "ar":
                        if s == 0:
                            continue
                        terms = [(painted[b, s - 1], label, weight_of_label)]
                    else:
                        patch = (y // 4) * (W // 4) + x // 4
                        terms = [(painted[b, 2 * s + half], truth, weight)
                                 for half, truth, weight in ((0, image, 1.0),
                                                             (1, label, weight_of_label))
                                 if batch.hidden[b, 2 * s + half, patch]]
                    for answer, truth, weight in terms:
                        error = abs(float(answer[0, y, x]) - truth)
                        if loss == "l2":
                            error = error ** 2
                        elif loss == "smooth_l1":
                            straight = error >= recipe.beta
                            error = error - recipe.beta / 2 if straight \
                                else error ** 2 / (2 * recipe.beta)
                        top, bottom = top + weight * error, bottom + weight
        mean = top / max(bottom, 1e-6)
        losses.append(mean)
    return torch.tensor(losses)


@pytest.mark.parametrize("loss,mask_loss", (("smooth_l1", None), ("l1", None), ("l2", None),
                                            ("smooth_l1", "l2"), ("l2", "l1")))
@pytest.mark.parametrize("objective,S", (("ar", 2), ("ar", 4), ("mim", 2)))
def test_losses_equal_a_loop_over_the_pixels(objective, S, loss, mask_loss):
    """Masks of much, little and no foreground; images; no truth."""
    images, labels = pairs(6, S, 8)
    for b, share in enumerate((0.5, 0.04, 0.0, 1.0)):
        labels[b] = 0.5 * (labels[b] < share)
    labels[4] = (images[4] + 0.3 * (labels[4] > 0.5) * labels[4]).clamp(0, 1)
    valid = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.8).byte()
    valid[3] = 0  # no truth at all
    hidden = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    colored = torch.tensor([True, True, True, True, False, False])
    batch = make_batch(images, labels, colored, valid, hidden if objective == "mim" else None)
    recipe = Recipe(loss=loss, mask_loss=mask_loss, beta=0.2, background_weight=0.3)
    painted = pairs(6, 4 if objective == "mim" else S - 1, 8, seed=7)[0]
    answer = LOSSES[objective](painter(painted), batch, labels, recipe)
    assert answer.shape == (6,)
    assert torch.allclose(answer, naive_loss(objective, painted, batch, recipe), rtol=1e-4)


def test_what_is_painted_is_compared_with_its_own_label():
    """The model's own answers, not those of a stand-in: ar over three pairs, and mim."""
    model, (images, labels) = small("fused"), pairs(2, 3)
    with torch.no_grad():
        painted = model.paint_labels(images, labels)
        ar = LOSSES["ar"](model, make_batch(images, labels), labels, Recipe(loss="l1"))
        assert torch.allclose(ar, (painted - labels[:, 1:]).abs().flatten(1).mean(1))
        hidden = torch.ones(2, 4, 16, dtype=torch.bool)
        batch = make_batch(images[:, :2], labels[:, :2], hidden=hidden)
        elements = mvg.interleave(images[:, :2], labels[:, :2])
        painted = mvg.from_canvas(model.paint_canvas(mvg.to_canvas(elements), hidden))
        mim = LOSSES["mim"](model, batch, labels[:, :2], Recipe(loss="l1"))
        assert torch.allclose(mim, (painted - elements).abs().flatten(1).mean(1))


def test_no_loss_outside_hidden_patches():
    images, labels = pairs(2, 2)
    painted = torch.rand(2, 4, 1, 32, 32, requires_grad=True)
    hidden = torch.rand(2, 4, 16) < 0.4
    batch = make_batch(images, labels, hidden=hidden)
    LOSSES["mim"](painter(painted), batch, labels, Recipe()).mean().backward()
    touched = painted.grad != 0
    blocks = F.interpolate(hidden.float().view(2, 4, 4, 4), scale_factor=8)
    inside = blocks.unsqueeze(2) > 0
    assert not (touched & ~inside).any() and (touched & inside).sum() > 0.99 * inside.sum()


def test_a_sample_is_normalised_by_itself():
    """The loss of a sample does not depend on what else is in its batch."""
    images, labels = pairs(3, 2)
    labels = labels * (labels > 0.7)
    hidden = torch.rand(3, 4, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    colored, model = torch.tensor([True, False, True]), small("fused")
    for objective in ("ar", "mim"):
        with torch.no_grad():
            together = LOSSES[objective](
                model, make_batch(images, labels, colored, hidden=hidden), labels, Recipe())
            for i in range(3):
                here = slice(i, i + 1)
                batch = make_batch(images[here], labels[here], colored[here], hidden=hidden[here])
                alone = LOSSES[objective](model, batch, labels[here], Recipe())
                assert torch.allclose(alone, together[here], rtol=1e-4)
