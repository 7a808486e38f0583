"""The model against independent computations: a naive masked attention and perturbed inputs."""

import pickle

import pytest
import torch
import torch.nn.functional as F

import mvg
import vit
from common import LAYOUTS, VARIANTS, make_batch, pairs, small
from objectives import LOSSES
from recipe import Recipe
from running.checkpoints import load_checkpoint


# -------------------------------------------------------------------------------------------------
# Causality

@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("layout", VARIANTS)
def test_nothing_at_or_after_a_label_reaches_its_own_prediction(layout, n):
    """Image i reaches the answers from i on, label i those from i + 1 on, and all of them."""
    model, (images, labels) = small(layout), pairs(2, n + 1)
    with torch.no_grad():
        before = model.paint_labels(images, labels)
        assert before.shape == labels[:, 1:].shape
        for i in range(n + 1):
            for stream, first_touched in ((images, max(i, 1)), (labels, i + 1)):
                kept = stream[:, i].clone()
                stream[:, i] = 1 - kept
                after = model.paint_labels(images, labels)
                stream[:, i] = kept
                untouched = slice(0, first_touched - 1)  # the first answer is that to image 1
                assert torch.equal(after[:, untouched], before[:, untouched])
                for j in range(first_touched, n + 1):
                    assert not torch.allclose(after[:, j - 1], before[:, j - 1], atol=1e-4)


# -------------------------------------------------------------------------------------------------
# The plan of attention calls against one attention with a mask, written from the definition

def turn_naively(x, grid_side, head_dim):
    """Rotary positions of x (..., T, dh) as complex numbers."""
    T, N, turns = x.shape[-2], grid_side ** 2, []
    frequencies = [vit.ROPE_BASE ** (-i / (head_dim // 4)) for i in range(head_dim // 4)]
    for t in range(T):
        places = [(p + 0.5) * vit.ROPE_SIDE / grid_side for p in divmod(t % N, grid_side)]
        turns.append([place * f for place in places for f in frequencies])
    turn = torch.polar(torch.ones(T, head_dim // 2), torch.tensor(turns))
    turned = torch.complex(*x.float().chunk(2, -1)) * turn
    return torch.view_as_real(turned).transpose(-1, -2).flatten(-2)


def naive_attention(attention, x, allowed, grid_side, rope):
    """x (B, T, D), allowed (T, T) bool; softmax written out."""
    B, T, D = x.shape
    head_dim = D // attention.heads
    q, k, v = (F.linear(x, w, b).view(B, T, attention.heads, head_dim).transpose(1, 2)
               for w, b in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope:
        q, k = (turn_naively(a, grid_side, head_dim) for a in (q, k))
    fit = (q @ k.transpose(-1, -2) / head_dim ** 0.5).masked_fill(~allowed, float("-inf"))
    return attention.proj((fit.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


def naive_blocks(model, x, sees, first, last):
    """Blocks over x (B, E, N, D), element e sees exactly the set sees[e]; the taps on the way."""
    B, E, N, D = x.shape
    allowed = torch.tensor([[j in sees[e] for j in range(E)] for e in range(E)])
    allowed = allowed.repeat_interleave(N, 0).repeat_interleave(N, 1)
    x, taps, rope = x.flatten(1, 2), [], model.config.positions == "rope"
    for i in range(first, last):
        block = model.blocks[i]
        x = x + naive_attention(block.attn, block.norm1(x), allowed, model.side, rope)
        x = x + block.mlp(block.norm2(x))
        taps += [x.unflatten(1, (E, N))] * model.taps.count(i)
    return x.unflatten(1, (E, N)), taps


def naive_last_label(model, images, labels):
    """p(Y | P_x1, P_y1, ..., X) by the definition of each layout."""
    S, depth, fuse_at = images.shape[1], model.config.depth, model.config.fuse_at
    position = model.position.flatten(2).transpose(1, 2)[:, None]
    im = model.patchify(images) + position + model.stream[0]
    lab = model.patchify(labels[:, :-1]) + position + model.stream[1]
    hidden = (model.mask_token + position + model.stream[1]).expand(len(im), 1, -1, -1)
    if model.config.layout == "sequence":
        elements = []
        for i in range(S - 1):
            elements += [im[:, i] + model.role[0], lab[:, i] + model.role[0]]
        x = torch.stack([*elements, im[:, -1] + model.role[1]], 1)
        sees = {e: set(range(e + 1)) for e in range(2 * S - 1)}
        _, taps = naive_blocks(model, x, sees, 0, depth)
    else:
        x = torch.cat([im, lab, hidden], 1)
        sees = {i: set(range(i + 1)) for i in range(S)}
        sees |= {S + i: {S + j for j in range(i + 1)} for i in range(S)}
        x, _ = naive_blocks(model, x, sees, 0, fuse_at)
        x = (x[:, :S] + x[:, S:]) / 2
        x = torch.cat([x[:, :-1] + model.role[0], x[:, -1:] + model.role[1]], 1)
        sees = {e: set(range(e + 1)) for e in range(S)}
        _, taps = naive_blocks(model, x, sees, fuse_at, depth)
    return model.head([t[:, -1] for t in taps], model.side, model.side)[:, -1:]


@pytest.mark.parametrize("positions,qk_norm", (("rope", True), ("learned", False)))
@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_equals_a_masked_attention(layout, n, positions, qk_norm):
    model = small(layout, positions=positions, qk_norm=qk_norm)
    images, labels = pairs(2, n + 1)
    with torch.no_grad():
        painted = model.paint_labels(images, labels)[:, -1]
        expected = naive_last_label(model, images, labels)
    assert torch.allclose(painted, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_canvas_equals_full_attention(layout):
    model, (images, labels) = small(layout), pairs(2, 2)
    side, fuse_at = model.side, model.config.fuse_at
    g = torch.Generator().manual_seed(0)
    hidden = torch.rand(2, 4, side ** 2, generator=g) < 0.5
    with torch.no_grad():
        elements = torch.stack([images, labels], 2).flatten(1, 2)
        painted = mvg.from_canvas(model.paint_canvas(mvg.to_canvas(elements), hidden))
        x = torch.where(hidden[..., None], model.mask_token, model.patchify(elements))
        position = model.position.flatten(2).transpose(1, 2)[:, None]
        x = x + position + model.stream[[0, 1, 0, 1]][:, None]
        if layout == "sequence":
            x = x + model.role[[0, 0, 1, 1]][:, None]
            _, taps = naive_blocks(model, x, {e: {0, 1, 2, 3} for e in range(4)}, 0, 6)
        else:
            sees = {0: {0, 2}, 2: {0, 2}, 1: {1, 3}, 3: {1, 3}}
            x, _ = naive_blocks(model, x, sees, 0, fuse_at)
            prompt, query = x[:, :2].mean(1) + model.role[0], x[:, 2:].mean(1) + model.role[1]
            x = torch.stack([prompt, query], 1)
            _, taps = naive_blocks(model, x, {0: {0, 1}, 1: {0, 1}}, fuse_at, 6)
        expected = [model.head([t[:, e] for t in taps], side, side) for e in range(x.shape[1])]
    assert torch.allclose(painted[:, :, 0], torch.cat(expected, 1), atol=2e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------
# The canvas

def test_canvas_and_back():
    elements = torch.rand(3, 4, 1, 16, 24)
    canvas = mvg.to_canvas(elements)
    assert canvas.shape == (3, 1, 32, 48)
    assert torch.equal(canvas[:, :, :16, :24], elements[:, 0])
    assert torch.equal(canvas[:, :, :16, 24:], elements[:, 1])
    assert torch.equal(canvas[:, :, 16:, :24], elements[:, 2])
    assert torch.equal(canvas[:, :, 16:, 24:], elements[:, 3])
    assert torch.equal(mvg.from_canvas(canvas), elements)


def test_pairs_become_elements_in_order():
    images, labels = pairs(2, 3)
    elements = mvg.interleave(images, labels)
    assert elements.shape == (2, 6, 1, 32, 32)
    assert torch.equal(elements[:, 0::2], images) and torch.equal(elements[:, 1::2], labels)


def test_patches_become_pixels():
    hidden = torch.zeros(1, 2, 6, dtype=torch.bool)
    hidden[0, 1, 4] = True  # row 1, column 1 of 2 x 3 patches
    pixels = mvg.to_pixels(hidden, (8, 12))
    assert pixels.shape == (1, 2, 1, 8, 12) and pixels.sum() == 16
    assert (pixels[0, 1, 0, 4:, 4:8] == 1).all()


@pytest.mark.parametrize("layout", VARIANTS)
def test_hidden_patches_are_not_seen(layout):
    model, elements = small(layout), torch.rand(1, 4, 1, 32, 32)
    hidden = torch.zeros(1, 4, 16, dtype=torch.bool)
    hidden[0, 1, 5] = hidden[0, 3] = hidden[0, 2, 7] = hidden[0, 0, 2] = True
    inside = mvg.to_pixels(hidden, (32, 32)) > 0
    changed = torch.where(inside, torch.rand_like(elements), elements)

    def paint(elements):
        with torch.no_grad():
            return model.paint_canvas(mvg.to_canvas(elements), hidden)

    assert torch.equal(paint(elements), paint(changed))
    assert not torch.allclose(paint(elements), paint(1 - elements), atol=1e-3)


def test_a_canvas_holds_one_prompt():
    model, (images, labels) = small("fused"), pairs(1, 3)
    with pytest.raises(ValueError, match="got 3 pairs"):
        model(images, labels, torch.zeros(1, 4, 16, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------
# Gradients

def loss_of(model, objective, drop=None):
    """The mean loss of two random samples."""
    images, labels = pairs(2, 2)
    hidden = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = make_batch(images, labels, hidden=hidden if objective == "mim" else None, drop=drop)
    return LOSSES[objective](model, batch, labels, Recipe()).mean()


@pytest.mark.parametrize("objective", ("ar", "mim"))
@pytest.mark.parametrize("layout", VARIANTS)
def test_recomputing_activations_changes_no_gradient(layout, objective):
    gradients = []
    for recompute in (False, True):
        model = small(layout, drop_path=0.3)
        model.recompute = recompute
        uniform = torch.rand(2, 6, 2, generator=torch.Generator().manual_seed(0))
        loss_of(model, objective, uniform).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("objective", ("ar", "mim"))
@pytest.mark.parametrize("layout", VARIANTS)
def test_every_parameter_has_a_gradient(layout, objective):
    model = small(layout)
    loss_of(model, objective).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


# -------------------------------------------------------------------------------------------------
# The gate

def force_gate(model, logit):
    """Let the gate of every pixel have this logit."""
    with torch.no_grad():
        gate_rows(model, "weight")[:, -1] = 0
        gate_rows(model, "bias")[:, -1] = logit
    return model


def gate_rows(model, name):
    """The head's first weights by pixel of a patch: (P * P, C + 1, ...), the last is the gate's."""
    return getattr(model.head.expand, name).unflatten(0, (model.head.patch ** 2, -1))


def without_gate(model):
    """A model of the same weights whose head has no gate."""
    plain = mvg.build("demo", 32, width=48, depth=6, heads=4, head_channels=4).eval()
    state = model.state_dict()
    for name in ("weight", "bias"):
        state[f"head.expand.{name}"] = gate_rows(model, name)[:, :-1].flatten(0, 1)
    plain.load_state_dict(state)
    return plain


def every_way(model, hidden):
    """(labels painted one after another, the canvas (B, 4, 1, H, W), two predictions)"""
    images, labels = pairs(2, 2)
    with torch.no_grad():
        canvas = model(images, labels, hidden)
        cache = model.encode_prompts(images[:, :1], labels[:, :1])
        return (model.paint_labels(images, labels), canvas, model.predict(cache, images[:, 1]),
                model.predict_canvas(images[:, 0], labels[:, 0], images[:, 1]))


def test_an_open_gate_copies_the_image_where_it_is_visible():
    images, _ = pairs(2, 2)
    hidden = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    model = small("gate")
    plain_canvas = every_way(without_gate(model), hidden)[1]
    painted, canvas, one, two = every_way(force_gate(model, 100.0), hidden)
    assert torch.equal(painted, images[:, 1:])
    assert torch.equal(one, images[:, 1]) and torch.equal(two, images[:, 1])
    seen = mvg.to_pixels(~hidden[:, 0::2], (32, 32)) > 0  # of the images
    labels, plain_labels = canvas[:, 1::2], plain_canvas[:, 1::2]
    assert torch.equal(labels[seen], images[seen])
    assert torch.allclose(labels[~seen], plain_labels[~seen], atol=1e-6)  # it has to be painted
    assert not torch.allclose(labels[~seen], images[~seen], atol=1e-3)
    assert torch.allclose(canvas[:, 0::2], plain_canvas[:, 0::2], atol=1e-6)  # images have no gate


def test_a_shut_gate_changes_nothing():
    hidden = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    model = small("gate")
    expected = every_way(without_gate(model), hidden)
    for a, b in zip(every_way(force_gate(model, -100.0), hidden), expected):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_gate_mixes_by_its_logit():
    images, labels = pairs(2, 2)
    model = small("gate")
    with torch.no_grad():
        plain = without_gate(model).paint_labels(images, labels)
        mixed = force_gate(model, 1.0).paint_labels(images, labels)
    share = 1 / (1 + 2.718281828 ** -1)
    assert torch.allclose(mixed, share * images[:, 1:] + (1 - share) * plain, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# The prompt cache

@pytest.mark.parametrize("n", (1, 2, 3))
@pytest.mark.parametrize("layout", VARIANTS)
def test_the_cache_gives_the_uncached_answer(layout, n):
    model, (images, labels) = small(layout), pairs(4, n + 1)
    cache = model.encode_prompts(images[:, :n], labels[:, :n])
    with torch.no_grad():
        expected = model.paint_labels(images, labels)[:, -1]
    assert torch.allclose(model.predict(cache, images[:, -1]), expected, atol=1e-5)
    one = model.encode_prompts(images[:1, :n], labels[:1, :n])  # one prompt, a batch of images
    alone = [torch.cat([images[:1, :n], images[i:i + 1, -1:]], 1) for i in range(4)]
    with torch.no_grad():
        expected = torch.cat([model.paint_labels(x, labels[:1])[:, -1] for x in alone])
    assert torch.allclose(model.predict(one, images[:, -1]), expected, atol=1e-5)


@pytest.mark.parametrize("layout", VARIANTS)
def test_the_canvas_is_asked_with_its_lower_right_hidden(layout):
    model, (images, labels) = small(layout), pairs(3, 2)
    hidden = torch.zeros(3, 4, 16, dtype=torch.bool)
    hidden[:, 3] = True
    with torch.no_grad():
        expected = model(images, labels, hidden)[:, 3]
    answer = model.predict_canvas(images[:, 0], labels[:, 0], images[:, 1])
    assert torch.allclose(answer, expected, atol=1e-6)
    one = model.predict_canvas(images[:1, 0], labels[:1, 0], images[:, 1])  # one prompt for all
    assert torch.allclose(one[0], answer[0], atol=1e-5) and one.shape == (3, 1, 32, 32)


def test_another_image_size_and_wrong_sizes():
    model, (images, labels) = small("fused"), pairs(1, 2, 48)
    cache = model.encode_prompts(images[:, :1], labels[:, :1])
    answer = model.predict(cache, images[:, 1])
    assert answer.shape == (1, 1, 48, 48) and torch.isfinite(answer).all()
    with pytest.raises(ValueError, match="patch size"):
        model.encode_prompts(torch.rand(1, 1, 1, 30, 32), torch.rand(1, 1, 1, 30, 32))
    with pytest.raises(ValueError, match="its prompts were"):
        model.predict(cache, torch.rand(1, 1, 32, 32))
    with pytest.raises(ValueError, match="n >= 1"):
        model.encode_prompts(images, labels[:, :1])


# -------------------------------------------------------------------------------------------------
# Sizes and files

@pytest.mark.parametrize("size,millions", (("tiny", (6, 12)), ("small", (25, 40)),
                                           ("base", (110, 150)), ("large", (360, 400))))
def test_sizes(size, millions):
    with torch.device("meta"):
        model = mvg.build(size)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions[0] < count < millions[1], count
    assert model.side == 28


@pytest.mark.parametrize("bad,words", (
    (dict(size="demo", layout="sequence", gate=True), "gate needs the fused layout"),
    (dict(size="huge"), "model size 'huge' is unknown"),
    (dict(size="demo", image_size=65), "choose 64"),
    (dict(size="demo", layout="x"), "choose fused or sequence"),
    (dict(size="demo", positions="x"), "choose rope or learned"),
    (dict(size="demo", heads=5), "multiple of 4"),
    (dict(size="demo", fuse_at=8), "before the last"),
    (dict(size="demo", depht=3), "unknown setting depht")))
def test_impossible_configurations(bad, words):
    with pytest.raises(ValueError, match=words):
        mvg.build(**bad)


@pytest.mark.parametrize("layout", VARIANTS)
def test_save_and_load(tmp_path, layout):
    model = small(layout)
    model.meta = {"coloring": "random"}
    mvg.save(tmp_path / "m.pt", model, step=3)
    again = mvg.load(tmp_path / "m.pt")
    assert again.config == model.config and again.meta == model.meta and not again.training
    for (n, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    assert list(tmp_path.iterdir()) == [tmp_path / "m.pt"]
    assert load_checkpoint(tmp_path / "m.pt")["step"] == 3


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
    broken = small("fused")
    broken.mask_token.data[...] = float("nan")
    mvg.save(tmp_path / "nan.pt", broken)
    with pytest.raises(ValueError, match="nan.pt has weights that are NaN or infinite"):
        mvg.load(tmp_path / "nan.pt")
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        mvg.load(tmp_path / "nothing.pt")
