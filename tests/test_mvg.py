"""The model against independent computations: a naive masked attention, perturbed inputs, hand-made losses."""

import importlib.abc
import importlib.machinery
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mvg

LAYOUTS = ("fused", "sequence")
VARIANTS = (*LAYOUTS, "copies")  # fused, with a head that may copy pixels


def small(layout, size=32, **config):
    """A small model whose random weights are large enough for every input to leave a trace."""
    torch.manual_seed(0)
    layout, config = ("fused", {"copies": True, "head_stride": 2, **config}) if layout == "copies" else (layout, config)
    model = mvg.build("demo", size, layout, width=48, depth=6, heads=4, head_channels=4, max_prompts=3, **config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p.mul_(3)
    return model


def pairs(B, S, size=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, S, 1, size, size, generator=g), torch.rand(B, S, 1, size, size, generator=g)


# ---- causality

@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("layout", VARIANTS)
def test_nothing_at_or_after_a_label_reaches_its_own_prediction(layout, n):
    model, (images, labels) = small(layout), pairs(2, n + 1)
    with torch.no_grad():
        paint = lambda: torch.cat([model.paint_labels(images[:, :1], labels[:, :1]), model.paint_labels(images, labels)], 1)
        before = paint()
        assert before.shape == labels.shape
        for i in range(n + 1):
            for stream, first_touched in ((images, i), (labels, i + 1)):  # image i touches label i, label i the next one
                kept = stream[:, i].clone()
                stream[:, i] = 1 - kept
                after = paint()
                stream[:, i] = kept
                assert torch.equal(after[:, :first_touched], before[:, :first_touched])
                for j in range(first_touched, n + 1):
                    assert not torch.allclose(after[:, j], before[:, j], atol=1e-4)


# ---- the plan of attention calls against one naive attention with a mask, written from the definition

def naive_attention(self, x, allowed, grid_side, head_dim, rope):
    """x (B, T, D), allowed (T, T) bool; softmax written out, rotary positions as complex numbers."""
    B, T, D = x.shape
    q, k, v = (F.linear(x, w, b).view(B, T, self.heads, head_dim).transpose(1, 2)
               for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)))
    q, k = self.q_norm(q), self.k_norm(k)
    if rope:
        N = grid_side ** 2
        turns = []
        for t in range(T):
            y, x_ = divmod(t % N, grid_side)
            f = [mvg.ROPE_BASE ** (-i / (head_dim // 4)) for i in range(head_dim // 4)]
            turns.append([(y + 0.5) * a for a in f] + [(x_ + 0.5) * a for a in f])
        turn = torch.polar(torch.ones(T, head_dim // 2), torch.tensor(turns))
        q, k = (torch.view_as_real(torch.complex(*a.float().chunk(2, -1)) * turn).transpose(-1, -2).flatten(-2) for a in (q, k))
    weights = (q @ k.transpose(-1, -2) / head_dim ** 0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).reshape(B, T, D))


def naive_blocks(model, x, sees, first, last):
    """Blocks over x (B, E, N, D) where element e sees exactly the set sees[e]; the taps on the way."""
    B, E, N, D = x.shape
    allowed = torch.tensor([[j in sees[e] for j in range(E)] for e in range(E)]).repeat_interleave(N, 0).repeat_interleave(N, 1)
    x, taps = x.flatten(1, 2), []
    for i in range(first, last):
        block = model.blocks[i]
        x = x + naive_attention(block.attn, block.norm1(x), allowed, model.grid, D // block.attn.heads, model.config.positions == "rope")
        x = x + block.mlp(block.norm2(x))
        taps += [x.unflatten(1, (E, N))] * model.taps.count(i)
    return x.unflatten(1, (E, N)), taps


def naive_last_label(model, images, labels):
    """p(Y | P_x1, P_y1, ..., X) by the definition of each layout."""
    S, depth, fuse_at = images.shape[1], model.config.depth, model.config.fuse_at
    position = model.position.flatten(2).transpose(1, 2)[:, None]
    tokens = lambda x, s: model.patchify(x) + position + model.stream[s]
    im, lab = tokens(images, 0), tokens(labels[:, :-1], 1)
    hidden = (model.mask_token + position + model.stream[1]).expand(len(im), 1, -1, -1)
    side = (model.grid, model.grid)
    if model.config.layout == "sequence":
        x = torch.cat([torch.cat([im[:, i:i + 1] + model.role[int(i == S - 1)], *([lab[:, i:i + 1] + model.role[0]] if i < S - 1 else [])], 1)
                       for i in range(S)], 1)
        _, taps = naive_blocks(model, x, {e: set(range(e + 1)) for e in range(2 * S - 1)}, 0, depth)
    else:
        x = torch.cat([im, lab, hidden], 1)
        sees = {i: set(range(i + 1)) for i in range(S)}
        sees |= {S + i: {S + j for j in range(i + 1)} for i in range(S)}
        x, _ = naive_blocks(model, x, sees, 0, fuse_at)
        x = (x[:, :S] + x[:, S:]) / 2
        x = torch.cat([x[:, :-1] + model.role[0], x[:, -1:] + model.role[1]], 1)
        _, taps = naive_blocks(model, x, {e: set(range(e + 1)) for e in range(S)}, fuse_at, depth)
    return model.head([t[:, -1] for t in taps], *side)[:, -1:]


@pytest.mark.parametrize("positions,qk_norm", (("rope", True), ("learned", False)))
@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_equals_a_masked_attention(layout, n, positions, qk_norm):
    model, (images, labels) = small(layout, positions=positions, qk_norm=qk_norm), pairs(2, n + 1)
    with torch.no_grad():
        assert torch.allclose(model.paint_labels(images, labels)[:, -1], naive_last_label(model, images, labels), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_canvas_equals_full_attention(layout):
    model, (images, labels) = small(layout), pairs(2, 2)
    hidden = torch.rand(2, 4, model.grid ** 2, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        elements = torch.stack([images, labels], 2).flatten(1, 2)
        painted = mvg.from_canvas(model.paint_canvas(mvg.to_canvas(elements), hidden))
        x = torch.where(hidden[..., None], model.mask_token, model.patchify(elements))
        x = x + model.position.flatten(2).transpose(1, 2)[:, None] + model.stream[[0, 1, 0, 1]][:, None]
        if layout == "sequence":
            x = x + model.role[[0, 0, 1, 1]][:, None]
            _, taps = naive_blocks(model, x, {e: {0, 1, 2, 3} for e in range(4)}, 0, 6)
            expected = torch.cat([model.head([t[:, e] for t in taps], model.grid, model.grid) for e in range(4)], 1)
        else:
            x, _ = naive_blocks(model, x, {0: {0, 2}, 2: {0, 2}, 1: {1, 3}, 3: {1, 3}}, 0, model.config.fuse_at)
            x = torch.stack([x[:, :2].mean(1) + model.role[0], x[:, 2:].mean(1) + model.role[1]], 1)
            _, taps = naive_blocks(model, x, {0: {0, 1}, 1: {0, 1}}, model.config.fuse_at, 6)
            expected = torch.cat([model.head([t[:, e] for t in taps], model.grid, model.grid) for e in range(2)], 1)
    assert torch.allclose(painted[:, :, 0], expected, atol=2e-5, rtol=1e-5)


# ---- the canvas

def test_canvas_and_back():
    elements = torch.rand(3, 4, 1, 16, 24)
    canvas = mvg.to_canvas(elements)
    assert canvas.shape == (3, 1, 32, 48)
    assert torch.equal(canvas[:, :, :16, 24:], elements[:, 1]) and torch.equal(canvas[:, :, 16:, :24], elements[:, 2])
    assert torch.equal(mvg.from_canvas(canvas), elements)


def test_tokens_of_the_square_are_the_tokens_of_its_images():
    model, elements = small("fused"), torch.rand(2, 4, 1, 32, 32)
    square = model.embed((mvg.to_canvas(elements) - mvg.PIXEL_MEAN) / mvg.PIXEL_STD)  # (B, D, 2h, 2w)
    h = model.grid
    quadrants = [square[..., :h, :h], square[..., :h, h:], square[..., h:, :h], square[..., h:, h:]]
    expected = torch.stack([q.flatten(2).transpose(1, 2) for q in quadrants], 1)
    assert torch.allclose(model.patchify(elements), expected, atol=1e-6)


@pytest.mark.parametrize("layout", VARIANTS)
def test_hidden_patches_are_not_seen(layout):
    model, elements = small(layout), torch.rand(1, 4, 1, 32, 32)
    hidden = torch.zeros(1, 4, 16, dtype=torch.bool)
    hidden[0, 1, 5] = hidden[0, 3] = True
    changed = torch.where(model.to_pixels(hidden, elements) > 0, torch.rand_like(elements), elements)
    with torch.no_grad():
        paint = lambda e: model.paint_canvas(mvg.to_canvas(e), hidden)
        assert torch.equal(paint(elements), paint(changed))
        assert not torch.allclose(paint(elements), paint(1 - elements), atol=1e-3)


def test_no_loss_outside_hidden_patches(monkeypatch):
    model, (images, labels) = small("fused"), pairs(2, 2)
    painted = torch.rand(2, 1, 64, 64, requires_grad=True)
    monkeypatch.setattr(model, "paint_canvas", lambda canvas, hidden, drop: painted)
    hidden = torch.rand(2, 4, 16) < 0.4
    model(images, labels, "mim", hidden)[0].backward()
    touched = mvg.from_canvas(painted.grad) != 0
    inside = model.to_pixels(hidden, images) > 0
    assert not (touched & ~inside).any() and (touched & inside).sum() > 0.99 * inside.sum()


# ---- the loss

def test_loss_by_hand(monkeypatch):
    model = small("fused")
    labels = torch.zeros(2, 2, 1, 32, 32)
    labels[0, 1, 0, :8] = 0.5  # sample 0 is colored, sample 1 an image
    painted = torch.full((2, 1, 1, 32, 32), 0.25)
    monkeypatch.setattr(model, "paint_labels", lambda *a: painted)
    valid = torch.ones_like(labels)
    valid[1, 1, 0, 16:] = 0
    valid[1, 1, 0, :16] = 1
    loss, sample, terms = model(torch.zeros_like(labels), labels, "ar", colored=torch.tensor([True, False]), valid=valid, loss="l1")
    # every error is 0.25 whatever the weights, so each sample's weighted mean is 0.25
    assert torch.allclose(sample, torch.tensor([0.25, 0.25]))
    painted[0, 0, 0, :8] = 0.5  # the foreground is right now: what is left is the background, at a tenth of its weight
    loss, sample, terms = model(torch.zeros_like(labels), labels, "ar", colored=torch.tensor([True, False]), valid=valid, loss="l1")
    assert sample[0].item() == pytest.approx(0.1 * 24 * 0.25 / (8 + 0.1 * 24), rel=1e-5)
    assert loss.item() == pytest.approx((sample[0].item() + 0.25) / 2, rel=1e-5)
    assert set(terms) == {"label_2"}


@pytest.mark.parametrize("kind,expected", (("l1", 0.5), ("l2", 0.25), ("smooth_l1", 0.5 - 0.005)))
def test_pixel_losses(kind, expected):
    assert mvg.pixel_loss(torch.tensor(0.75), torch.tensor(0.25), kind, 0.01).item() == pytest.approx(expected)
    small_error = mvg.pixel_loss(torch.tensor(0.001), torch.tensor(0.0), "smooth_l1", 0.01).item()
    assert small_error == pytest.approx(0.5 * 0.001 ** 2 / 0.01)


@pytest.mark.parametrize("layout", VARIANTS)
def test_the_first_term_is_for_the_samples_that_ask(layout):
    """By hand: a sample's loss is the mean over the pixels of all the labels it is asked for."""
    model, (images, labels) = small(layout), pairs(3, 3)
    with torch.no_grad():
        rest, first = model.paint_labels(images, labels), model.paint_labels(images[:, :1], labels[:, :1])
        _, sample, terms = model(images, labels, "ar", first=torch.tensor([2, 0]), loss="l1")
        without = model(images, labels, "ar", first=torch.tensor([], dtype=torch.long), loss="l1")
    errors = torch.cat([(first - labels[:, :1]).abs(), (rest - labels[:, 1:]).abs()], 1).mean((2, 3, 4))  # (3, 3)
    assert torch.allclose(sample, torch.stack([errors[0].mean(), errors[1, 1:].mean(), errors[2].mean()]), atol=1e-5)
    assert terms["label_1"].item() == pytest.approx(errors[[0, 2], 0].mean().item(), rel=1e-4)
    assert torch.allclose(without[1], errors[:, 1:].mean(1), atol=1e-5) and set(without[2]) == {"label_2", "label_3"}


@pytest.mark.parametrize("objective", ("ar", "mim"))
@pytest.mark.parametrize("layout", VARIANTS)
def test_recomputing_activations_changes_no_gradient(layout, objective):
    gradients = []
    for recompute in (False, True):
        model, (images, labels) = small(layout, drop_path=0.3), pairs(2, 2)
        model.recompute = recompute
        uniform = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(0))
        model(images, labels, objective, torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)) < 0.5, drop=uniform)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("objective", ("ar", "mim"))
@pytest.mark.parametrize("layout", VARIANTS)
def test_every_parameter_has_a_gradient(layout, objective):
    model, (images, labels) = small(layout), pairs(2, 2)
    model(images, labels, objective, torch.rand(2, 4, 16) < 0.5)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_prompts_filter_by_hand():
    """Against least squares by numpy; trusted where the label is a filtered image, not where it is something else, and by how much by hand."""
    images = pairs(2, 3)[0]
    x = F.pad(images, (1, 1, 1, 1))
    inside = F.pad(torch.ones_like(images), (1, 1, 1, 1))
    square = lambda t: sum(t[..., i:i + 32, j:j + 32] for i in range(3) for j in range(3))
    labels = 0.7 * images - 0.4 * square(x) / square(inside) + 0.3
    shown = (torch.rand(2, 3, 1, 32, 32) < 0.5).float()
    for where in ((), (torch.ones_like(shown), shown)):  # labels that are hidden do not count
        weights, trust = mvg.PromptFilter.fit(mvg.PromptFilter.sums(images, labels + (9 * (1 - shown) if where else 0), *where))
        assert torch.allclose(weights, torch.tensor([0.7, -0.4, 0.0, 0.3]), atol=0.02) and (trust > 0.99).all()
    block = F.interpolate(shown[..., :4, :4].flatten(0, 1), size=32).unflatten(0, (2, 3))  # nor do hidden pixels of the image, in averages either
    hidden = torch.where(block > 0, images, torch.full_like(images, 9))
    assert torch.equal(mvg.PromptFilter.basis(hidden, block), mvg.PromptFilter.basis(images, block))
    assert mvg.PromptFilter.basis(torch.full_like(images, 0.5), block)[:, :, 1][block[:, :, 0] > 0].allclose(torch.tensor(0.5))
    copy, trusted = mvg.PromptFilter.apply((weights, trust), images)
    assert copy.shape == trusted.shape == images.shape and (copy - labels).abs().mean() < 0.01
    basis = mvg.PromptFilter.basis(images)[0, 0].flatten(1).double().numpy()
    other = pairs(2, 3, seed=5)[1]
    for share in (0.0, 0.6, 1.0):
        label = share * images + (1 - share) * other
        y = label[0, 0].flatten().double().numpy()
        best, rest, *_ = np.linalg.lstsq(basis.T, y, rcond=None)
        weights, trust = mvg.PromptFilter.fit(mvg.PromptFilter.sums(images, label))
        assert trust[0, 0].item() == pytest.approx(max(0, 1 - 2 * (rest[0] if len(rest) else 0) / ((y - y.mean()) ** 2).sum()), abs=0.02), share
    flat = mvg.PromptFilter.fit(mvg.PromptFilter.sums(images * 0, images * 0 + 0.5))
    assert (flat[1] == 0).all()


def test_an_untrained_head_copies_what_can_be_trusted():
    model, (images, labels) = small("copies"), pairs(2, 2)
    with torch.no_grad():
        model.head.out.weight.zero_()
        painted = model.paint_labels(images, images)[:, 0], model.predict_canvas(images[:, 0], images[:, 0], images[:, 1])
        mask = model.paint_labels(images, labels)  # has nothing to do with its image
    for p in painted:
        assert torch.allclose(p, images[:, 1], atol=0.01)
    assert mask.abs().max() == 0
    large = F.interpolate(images[:, 1], size=(70, 50), mode="bicubic")  # what is copied may be finer than what is painted
    copied = mvg.PromptFilter.apply((torch.tensor([1.0, 0, 0, 0]).expand(2, 4), torch.full((2,), 0.5)), large)
    for p in (model.predict(model.encode_prompts(images[:, :1], labels[:, :1]), images[:, 1], copied), model.predict_canvas(images[:, 0], labels[:, 0], images[:, 1], copied)):
        assert torch.allclose(p, torch.sigmoid(torch.tensor(1.0)) * large, atol=1e-5)


def test_balance_by_hand(monkeypatch):
    """Organs of 1/50 and of 1/500 of the images count 5 and 10 times, one of a half once, an image once, no organ once."""
    model, labels = small("fused"), torch.zeros(5, 2, 1, 50, 50)
    for i, rows in enumerate((1, 0.1, 25)):
        labels[i].flatten(2)[..., :int(50 * rows)] = 1
    labels[3] = 0.5
    labels[4] = 0
    monkeypatch.setattr(model, "paint_labels", lambda *a: labels[:, 1:] + 0.25)
    loss = lambda **how: model(torch.zeros_like(labels), labels, "ar", colored=torch.tensor([True, True, True, False, True]), loss="l1", **how)[1]
    assert torch.allclose(loss(balance=True) / loss(), torch.tensor([5.0, 10.0, 1.0, 1.0, 1.0]))
    assert torch.allclose(loss(image_weight=3.0) / loss(), torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0]))
    images = torch.rand(1, 2, 1, 50, 50) * 0.5  # a line across a picture, painted half as bright, and the rest 0.05 too bright
    lined = images.clone()
    lined[..., 10, :] = 1
    monkeypatch.setattr(model, "paint_labels", lambda *a: torch.where(lined[:, 1:] == 1, 0.5, lined[:, 1:] + 0.05))
    line = lambda colored, **how: model(images, lined, "ar", colored=torch.tensor([colored]), loss="l1", background_weight=0.2, **how)[1].item()
    assert line(False) == pytest.approx((0.5 + 49 * 0.05) / 50) and line(False, balance=True) == pytest.approx((0.5 + 0.2 * 49 * 0.05) / (1 + 0.2 * 49))
    assert line(True) == pytest.approx((0.5 + 49 * 0.05) / 50)  # a mask's background is where it is 0
    images, lined = images[..., :48, :48], lined[..., :48, :48]
    whole = torch.stack([images, lined], 2).flatten(1, 2)  # of a canvas the images count alike: the noise of one may be all that there is to learn
    monkeypatch.setattr(model, "paint_canvas", lambda *a: mvg.to_canvas(torch.cat([whole[:, :1] + 0.1, whole[:, 1:]], 1)))
    hidden = torch.ones(1, 4, model._size(images)[0] ** 2, dtype=torch.bool)
    canvas = lambda colored: model(images, lined, "mim", hidden, torch.tensor([colored]), loss="l1", background_weight=0.2, balance=True)[1].item()
    assert canvas(False) == pytest.approx(0.1 / 4, rel=1e-4)


def test_drop_path():
    model = small("fused", drop_path=0.5)
    uniform = torch.rand(4000, 6, 2, generator=torch.Generator().manual_seed(0))
    keep = model._keep(uniform)
    assert torch.equal(keep[:, 0], torch.ones(4000, 2))  # the first block is never dropped
    assert (keep[:, 5] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert keep.mean().item() == pytest.approx(1, abs=0.02)
    images, labels = pairs(2, 2)
    with torch.no_grad():
        whole, kept = model.paint_labels(images, labels), model.paint_labels(images, labels, drop=torch.ones(2, 6, 2))
        assert not torch.allclose(whole, kept)  # nothing dropped, but branches scaled


# ---- the prompt cache

@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("layout", VARIANTS)
def test_the_cache_gives_the_uncached_answer(layout, n):
    model, (images, labels) = small(layout), pairs(4, n + 1)
    cache = model.encode_prompts(images[:, :n], labels[:, :n])
    with torch.no_grad():
        expected = model.paint_labels(images, labels)[:, -1]
    assert torch.allclose(model.predict(cache, images[:, -1]), expected, atol=1e-5)
    one = model.encode_prompts(images[:1, :n], labels[:1, :n])  # one prompt, a batch of images
    same = [torch.cat([images[:1, :n], images[i:i + 1, -1:]], 1) for i in range(4)]
    with torch.no_grad():
        expected = torch.cat([model.paint_labels(x, labels[:1])[:, -1] for x in same])
    assert torch.allclose(model.predict(one, images[:, -1]), expected, atol=1e-5)


def test_another_image_size_and_wrong_sizes():
    model, (images, labels) = small("fused"), pairs(1, 2, 48)
    answer = model.predict(model.encode_prompts(images[:, :1], labels[:, :1]), images[:, 1])
    assert answer.shape == (1, 1, 48, 48) and torch.isfinite(answer).all()
    with pytest.raises(ValueError, match="patch size"):
        model.encode_prompts(torch.rand(1, 1, 1, 30, 32), torch.rand(1, 1, 1, 30, 32))
    with pytest.raises(ValueError, match="its prompts were"):
        model.predict(model.encode_prompts(images[:, :1], labels[:, :1]), torch.rand(1, 1, 32, 32))


# ---- sizes and files

@pytest.mark.parametrize("size,millions", (("tiny", (6, 12)), ("small", (25, 40)), ("base", (110, 150)), ("large", (360, 400))))
def test_sizes(size, millions):
    with torch.device("meta"):
        model = mvg.build(size)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions[0] < count < millions[1], count
    assert model.grid == 28


def test_a_model_starts_from_one_that_saw_fewer_pixels(tmp_path):
    few = small("fused")
    mvg.save(tmp_path / "few.pt", few)
    more = mvg.build("demo", 64, width=48, depth=6, heads=4, head_channels=4, patch=16, head_stride=2, copies=True).eval()
    mvg.load_vit(more, tmp_path / "few.pt")
    images, labels = pairs(1, 2)
    large = lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    for (k, v), (k2, v2) in zip(few.encode_prompts(images, labels)["memory"], more.encode_prompts(large(images), large(labels))["memory"]):
        for a, b in zip([*k, *v], [*k2, *v2]):
            assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(more.head.expand.weight, few.head.expand.weight)
    for name in ("conv", "out"):  # what the head has more of is not used yet
        a, b = (getattr(m.head, name).weight for m in (few, more))
        assert torch.equal(b[:len(a), :a.shape[1]], a) and b.numel() > a.numel() and b.abs().sum().item() == pytest.approx(a.abs().sum().item())
    for change, word in (({"width": 96}, "width"), ({"depth": 7}, "depth"), ({"qk_norm": False}, "qk_norm"), ({"positions": "learned"}, "positions"),
                         ({"fuse_at": 3}, "fuse_at"), ({"layout": "sequence"}, "layout"), ({"patch": 16}, "head.expand")):
        with pytest.raises(ValueError, match=f"few.pt has {word}"):
            mvg.load_vit(mvg.build("demo", 64, **{**dict(width=48, depth=6, heads=4, head_channels=4), **change}), tmp_path / "few.pt")


@pytest.mark.parametrize("bad", (dict(size="demo", head_stride=3), dict(size="demo", layout="sequence", copies=True), dict(size="huge"), dict(size="demo", image_size=65), dict(size="demo", layout="x"), dict(size="demo", depht=3)))
def test_impossible_configurations(bad):
    with pytest.raises(ValueError):
        mvg.build(**bad)


def test_save_and_load(tmp_path):
    model = small("sequence")
    model.meta = {"coloring": "random"}
    mvg.save(tmp_path / "m.pt", model, step=3)
    again = mvg.load(tmp_path / "m.pt")
    assert again.config == model.config and again.meta == model.meta and not again.training
    for (n, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), n
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "tensors.pt")
    mvg.save(tmp_path / "cut.pt", small("fused"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    for name in ("text", "empty", "pickle", "evil", "tensors", "cut"):
        with pytest.raises(ValueError, match=f"{name}.pt"):
            mvg.load(tmp_path / f"{name}.pt")
    assert "never run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        mvg.load(tmp_path / "nothing.pt")


# ---- a plain ViT inside

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *a, **k: None})


class Unused(types.ModuleType):
    """Stands for torchvision, whose wheel may be of another build than torch: timm imports it, its ViT does not use it."""
    __path__ = []

    def __getattr__(self, name):
        return getattr(Anything("torchvision", (), {}), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return Unused(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def vit():
    sys.meta_path.insert(0, finder := Finder())
    timm = pytest.importorskip("timm.models.vision_transformer")
    sys.meta_path.remove(finder)
    torch.manual_seed(3)
    model = timm.VisionTransformer(img_size=48, patch_size=8, embed_dim=64, depth=6, num_heads=4, num_classes=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trunk(model, gray):
    """Tokens (B, N, D) after the last block of one image seen alone."""
    with torch.no_grad():
        x = model.patchify(gray[:, None]) + model.position.flatten(2).transpose(1, 2)[:, None]
        return model._run(x, [((0,), (0,))], 0, model.config.depth, model._size(gray))[0][:, 0]


def test_the_trunk_is_timms_vit(vit, tmp_path):
    """With learned positions and without QK-norm: the patches of a gray picture, block after block, class token aside."""
    torch.save({"model": vit.state_dict()}, tmp_path / "vit.pt")
    model = mvg.MVG(mvg.Config(width=64, depth=6, heads=4, head_channels=8, patch=8, image_size=48, positions="learned", qk_norm=False)).eval()
    mvg.load_vit(model, tmp_path / "vit.pt")
    gray = torch.rand(2, 1, 48, 48)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mvg.IMAGENET_MEAN, mvg.IMAGENET_STD))
    with torch.no_grad():
        x = vit.patch_embed((gray.expand(-1, 3, -1, -1) - mean) / std) + vit.pos_embed[:, 1:]
        for block in vit.blocks:
            x = block(x)
    assert torch.allclose(trunk(model, gray), x, atol=1e-5 * x.abs().max().item())


def test_a_vit_of_another_size_is_refused_and_another_grid_resized(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    config = dict(width=64, depth=6, heads=4, head_channels=8, patch=8, image_size=32)
    model = mvg.MVG(mvg.Config(**config))
    mvg.load_vit(model, tmp_path / "vit.pt")
    assert model.position.shape == (1, 64, 4, 4) and torch.equal(model.blocks[5].mlp[2].weight, vit.blocks[5].mlp.fc2.weight)
    for change, words in ((dict(width=128), "width 64, this model 128"), (dict(depth=8), "depth 6, this model 8"), (dict(patch=16), "patch 8, this model 16")):
        with pytest.raises(ValueError, match=words):
            mvg.load_vit(mvg.MVG(mvg.Config(**{**config, **change})), tmp_path / "vit.pt")
    for content in (torch.zeros(3), {"model": {}}, {"patch_embed.proj.weight": torch.zeros(3)}):
        torch.save(content, tmp_path / "no.pt")
        with pytest.raises(ValueError, match="no ViT's state dict"):
            mvg.load_vit(model, tmp_path / "no.pt")
