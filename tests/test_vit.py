"""The trunk against timm's ViT and a naive attention, and the weights of a public ViT."""

import importlib.abc
import importlib.machinery
import sys
import types

import pytest
import torch

import mvg
import vit
from common import pairs, small
from running.checkpoints import IMAGENET_MEAN, IMAGENET_STD, load_vit


# -------------------------------------------------------------------------------------------------
# Tokens, rotary positions, attention, drop path

def test_tokens_of_the_square_are_the_tokens_of_its_images():
    model, elements = small("fused"), torch.rand(2, 4, 1, 32, 32)
    square = (mvg.to_canvas(elements) - vit.PIXEL_MEAN) / vit.PIXEL_STD
    square, h = model.embed(square), model.side  # (B, D, 2h, 2w)
    upper, lower = square[..., :h, :], square[..., h:, :]
    quadrants = [upper[..., :h], upper[..., h:], lower[..., :h], lower[..., h:]]
    expected = torch.stack([q.flatten(2).transpose(1, 2) for q in quadrants], 1)
    assert torch.allclose(model.patchify(elements), expected, atol=1e-6)


def angles(h, w, head_dim):
    """The angles that the tables of `vit.rope` turn by, (N, head_dim / 2)."""
    cos, sin = vit.rope(h, w, head_dim, torch.zeros(1))
    assert torch.equal(cos, cos.roll(head_dim // 2, -1))
    assert torch.equal(sin, -sin.roll(head_dim // 2, -1))
    return torch.atan2(sin, cos)[:, 0, head_dim // 2:]


def test_rotary_positions_are_a_turn_that_only_differences_matter_to():
    """Written as complex numbers; q . k depends on the distance between two tokens alone."""
    tables = vit.rope(6, 6, 8, torch.zeros(1))
    x = torch.randn(36, 3, 8)  # of three heads
    turns = torch.polar(torch.ones(36, 4), angles(6, 6, 8))
    turned = torch.complex(*x.chunk(2, -1)) * turns[:, None]
    expected = torch.view_as_real(turned).transpose(-1, -2).flatten(-2)
    assert torch.allclose(vit.rotate(x, *tables), expected, atol=1e-5)
    q, k = (vit.rotate(torch.randn(8).expand(36, 1, 8), *tables)[:, 0] for _ in "qk")
    product = (q @ k.T).view(6, 6, 6, 6)  # [y, x, y', x']
    assert torch.allclose(product[1:, 2:, 1:, 2:], product[:-1, :-2, :-1, :-2], atol=1e-5)
    assert not torch.allclose(product[0, 0, 0, 1], product[0, 0, 1, 0], atol=1e-3)


def test_the_same_place_has_the_same_position_at_every_size(monkeypatch):
    """The middle of two tokens of the finer grid is a token of the coarser one."""
    monkeypatch.setattr(vit, "ROPE_SIDE", 3.0)  # below pi, where angles are unique
    fine, coarse = angles(6, 6, 8), angles(3, 3, 8)
    fine = fine.view(3, 2, 3, 2, 4).mean((1, 3))
    assert torch.allclose(fine.flatten(0, 1), coarse, atol=1e-6)


def test_attention_keeps_its_precision():
    """Under autocast queries, keys, values and the tables of their turns are bfloat16 alone."""
    model, seen, attend = small("fused"), [], vit.attend
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(vit, "attend", lambda *qkv: seen.extend(qkv) or attend(*qkv))
        model.paint_labels(*pairs(1, 2))
        assert {t.dtype for t in (*seen, *model.grid(pairs(1, 2)[0]).turn)} == {torch.bfloat16}
    assert {t.dtype for t in model.grid(pairs(1, 2)[0]).turn} == {torch.float32}


@pytest.mark.parametrize("which,copied", (((0, 1, 2), False), ((1, 2), False), ((0, 2), True)))
def test_neighbours_are_picked_without_a_copy(which, copied):
    x = torch.randn(2, 3, 4)
    chosen = vit.pick(x, which)
    assert torch.equal(chosen, x[:, list(which)])
    assert (chosen.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()) == copied


def test_the_last_block_computes_what_is_read():
    """With three pairs: the two queries of four elements, and the keys of all."""
    model, inside = small("fused"), []
    model.blocks[-1].mlp.register_forward_hook(lambda *a: inside.append(a[2].shape[1]))
    model.blocks[-1].attn.qkv.register_forward_hook(lambda *a: inside.append(a[2].shape[1]))
    model.paint_labels(*pairs(1, 3))
    assert inside == [4, 2]


@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16))
def test_attention_by_hand(kind):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) / 8 ** 0.5).exp()
    expected = torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)
    answer = vit.attend(q.to(kind), k.to(kind), v.to(kind))
    tolerance = 1e-5 if kind == torch.float32 else 0.05
    assert answer.dtype == kind and torch.allclose(answer.float(), expected, atol=tolerance)


def test_drop_path():
    model = small("fused", drop_path=0.5)
    uniform = torch.rand(4000, 6, 2, generator=torch.Generator().manual_seed(0))
    images, labels = pairs(2, 2)
    keep = model.grid(images, uniform).keep
    assert torch.equal(keep[:, 0], torch.ones(4000, 2))  # the first block is never dropped
    assert (keep[:, 5] == 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert keep.mean().item() == pytest.approx(1, abs=0.02)
    with torch.no_grad():
        whole = model.paint_labels(images, labels)
        kept = model.paint_labels(images, labels, drop=torch.ones(2, 6, 2))
    assert not torch.allclose(whole, kept)  # nothing dropped, but branches scaled
    assert small("fused", drop_path=0.0).grid(images, uniform).keep is None


# -------------------------------------------------------------------------------------------------
# A plain ViT inside

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *a, **k: None})


class Unused(types.ModuleType):
    """Stands for torchvision, whose wheel may be of another build than torch.

    timm imports it, and timm's ViT does not use it.
    """
    __path__ = []

    def __getattr__(self, name):
        return getattr(Anything("torchvision", (), {}), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Unused(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def plain():
    """A plain ViT of timm."""
    finder = Finder()
    sys.meta_path.insert(0, finder)
    timm = pytest.importorskip("timm.models.vision_transformer")
    sys.meta_path.remove(finder)
    torch.manual_seed(3)
    model = timm.VisionTransformer(img_size=48, patch_size=8, embed_dim=64, depth=6, num_heads=4,
                                   num_classes=0).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def trunk(model, gray):
    """Tokens (B, N, D) after the last block of one image seen alone."""
    with torch.no_grad():
        x = model.patchify(gray[:, None]) + model.position.flatten(2).transpose(1, 2)[:, None]
        blocks = range(model.config.depth)
        return model.run(x, [((0,), (0,))], blocks, model.grid(gray))[0][:, 0]


def test_the_trunk_is_timms_vit(plain, tmp_path):
    """With learned positions and without QK-norm, block after block, class token aside."""
    torch.save({"model": plain.state_dict()}, tmp_path / "vit.pt")
    config = mvg.Config(width=64, depth=6, heads=4, head_channels=8, patch=8, image_size=48,
                        positions="learned", qk_norm=False)
    model = mvg.from_config(config).eval()
    load_vit(model, tmp_path / "vit.pt")
    gray = torch.rand(2, 1, 48, 48)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        x = plain.patch_embed((gray.expand(-1, 3, -1, -1) - mean) / std) + plain.pos_embed[:, 1:]
        for block in plain.blocks:
            x = block(x)
    assert torch.allclose(trunk(model, gray), x, atol=1e-5 * x.abs().max().item())


def test_a_vit_of_another_size_is_refused_and_another_grid_resized(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "vit.pt")
    config = dict(width=64, depth=6, heads=4, head_channels=8, patch=8, image_size=32)
    model = mvg.from_config(mvg.Config(**config))
    load_vit(model, tmp_path / "vit.pt")
    assert model.position.shape == (1, 64, 4, 4)
    assert torch.equal(model.blocks[5].mlp[2].weight, plain.blocks[5].mlp.fc2.weight)
    for change, words in ((dict(width=128), "width 64, this model 128"),
                          (dict(depth=8), "depth 6, this model 8"),
                          (dict(patch=16), "patch 8, this model 16")):
        with pytest.raises(ValueError, match=words):
            load_vit(mvg.from_config(mvg.Config(**{**config, **change})), tmp_path / "vit.pt")
    for content in (torch.zeros(3), {"model": {}}, {"patch_embed.proj.weight": torch.zeros(3)}):
        torch.save(content, tmp_path / "no.pt")
        with pytest.raises(ValueError, match="no ViT's state dict"):
            load_vit(model, tmp_path / "no.pt")


def test_what_a_plain_vit_has_not_is_refused(plain, tmp_path):
    config = dict(width=64, depth=6, heads=4, head_channels=8, patch=8, image_size=48)
    state = {**plain.state_dict(), "blocks.0.attn.rel_pos_h": torch.zeros(11, 16)}
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="rel_pos_h, which a plain ViT has not"):
        load_vit(mvg.from_config(mvg.Config(**config)), tmp_path / "vit.pt")
    state = {**plain.state_dict(), "blocks.0.mlp.fc1.weight": torch.zeros(128, 64)}
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match="does not fit"):
        load_vit(mvg.from_config(mvg.Config(**config)), tmp_path / "vit.pt")
