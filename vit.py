"""The Vision Transformer under the method: plain pre-norm blocks over a list of images.

What is notable:
- tokens come as *elements*, (B, E, N, D): E images of N = h * w tokens each; no class token
- who sees whom is a *plan*, [(elements that ask, elements they see), ...]: every entry is one
  attention call over whole images, exact, and without a mask
- rotary positions turn by the place in the image, the same for the same place in every image
  (ours; the paper says "vanilla ViT", which `positions="learned"` is)
- queries and keys are normalised (ours, `qk_norm`)
- the head reads four feature maps and ends in two convolutions (section 3.3)
- `load_vit` of running/checkpoints.py starts it from a public MAE or timm ViT, as the authors do

Shapes: B batch, E elements, N tokens an image, D width, P patch, C channels of the head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # ours; one channel, so no statistics of ImageNet
ROPE_BASE = 100.0  # ours; over a side of 28 tokens the slowest rotation turns by about 0.4 radians


# -------------------------------------------------------------------------------------------------
# Rotary positions

def rope_angles(h, w, head_dim, trained_side, device):
    """Axial rotary angles of h x w tokens, (N, head_dim / 2): one half for y, one for x.

    An image of another size is stretched onto the trained side of `trained_side` tokens.
    """
    frequency = ROPE_BASE ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    y = (torch.arange(h, device=device) + 0.5) / h * trained_side
    x = (torch.arange(w, device=device) + 0.5) / w * trained_side
    y, x = y[:, None] * frequency, x[:, None] * frequency  # (h, dh / 4), (w, dh / 4)
    both = torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], -1)
    return both.flatten(0, 1)  # (N, dh / 2)


def rotate(x, angles):
    """Turn the pairs (x[i], x[i + dh / 2]) by their angles: (..., N, dh) -> (..., N, dh)."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# -------------------------------------------------------------------------------------------------
# Attention over elements

def join(tensors, which, dim=2):
    """Concatenate the chosen tensors. A cached prompt with a batch of 1 serves a whole batch."""
    chosen = [tensors[i] for i in which]
    if len(chosen) == 1:
        return chosen[0]  # without a copy
    batch = max(t.shape[0] for t in chosen)
    return torch.cat([t.expand(batch, *t.shape[1:]) for t in chosen], dim=dim)


def attend(q, k, v):
    """Softmax attention: (B, heads, N, dh) asks (B, heads, M, dh) -> (B, heads, N, dh).

    On a CPU with bfloat16 the two products are written out: torch's kernel is several times
    slower there in the backward pass.
    """
    if q.device.type == "cpu" and v.dtype == torch.bfloat16:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head attention over elements by a plan."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, plan, angles=None, past=None):
        """x (B, E, N, D) -> (B, E, N, D), and the (keys, values) of its E elements.

        past: (keys, values) of elements seen earlier. The plan numbers them first, then x's own.
        """
        B, E, N, D = x.shape
        qkv = self.qkv(x).view(B, E, N, 3, self.heads, -1)
        q, k, v = qkv.permute(3, 1, 0, 4, 2, 5)  # 3 x (E, B, heads, N, dh)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = q.to(v.dtype).unbind(0), k.to(v.dtype).unbind(0), v.unbind(0)
        keys, values = (k, v) if past is None else (past[0] + k, past[1] + v)

        answers = []
        for asking, seen in plan:
            out = attend(join(q, asking), join(keys, seen), join(values, seen))
            answers.append(out.transpose(1, 2).reshape(B, len(asking), N, D))
        return self.proj(join(answers, range(len(answers)), dim=1)), (k, v)


class Block(nn.Module):
    """Pre-norm transformer block. `keep` (B, 2) scales its two branches by sample (drop path)."""

    def __init__(self, width, heads, mlp_ratio, qk_norm):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, plan, angles=None, past=None, keep=None):
        attended, memory = self.attn(self.norm1(x), plan, angles, past)
        x = x + (attended if keep is None else attended * keep[:, 0, None, None, None])
        computed = self.mlp(self.norm2(x))
        x = x + (computed if keep is None else computed * keep[:, 1, None, None, None])
        return x, memory


# -------------------------------------------------------------------------------------------------
# The head

class ConvHead(nn.Module):
    """Four feature maps -> pixels: "two convolution layers ... four feature maps" (section 3.3)."""

    def __init__(self, width, patch, channels, outputs):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.expand = nn.Linear(4 * width, patch ** 2 * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, outputs)  # a 1x1 convolution, channels last

    def forward(self, features, h, w):
        """4 x (M, N, D) -> (M, outputs, H, W)"""
        P, C = self.patch, self.channels
        x = torch.cat([norm(f) for norm, f in zip(self.norms, features)], -1)  # (M, N, 4 D)
        x = self.expand(x).view(-1, h, w, P, P, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * P, w * P, C)  # (M, H, W, C)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last throughout
        return self.out(F.gelu(self.norm(x))).permute(0, 3, 1, 2)  # (M, outputs, H, W)


# -------------------------------------------------------------------------------------------------
# The trunk

class Grid(NamedTuple):
    """What one pass through the blocks shares: h x w tokens, their angles, drop-path factors."""
    h: int
    w: int
    angles: torch.Tensor | None = None  # (N, dh / 2), None without rotary positions
    keep: torch.Tensor | None = None    # (B, depth, 2), None without drop path


class ViT(nn.Module):
    """Patch embedding, positions and blocks, as a `Config` of mvg.py says."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.config = c
        self.side = c.image_size // c.patch  # tokens along a side of a training image
        self.taps = range(c.depth)  # the blocks whose features a head reads
        self.recompute = False  # activation checkpointing: compute again, keep nothing
        self.embed = nn.Conv2d(1, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros(1, c.width, self.side, self.side))
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.mlp_ratio, c.qk_norm) for _ in range(c.depth))

    def grid(self, images, drop=None):
        """The `Grid` of images (..., H, W); drop: uniform numbers (B, depth, 2) for drop path.

        Raises ValueError where a side is no multiple of the patch size.
        """
        c, (H, W) = self.config, images.shape[-2:]
        if H % c.patch or W % c.patch:
            raise ValueError(f"images are {H}x{W}: "
                             f"both sides must be multiples of the patch size {c.patch}")
        h, w, angles, keep = H // c.patch, W // c.patch, None, None
        if c.positions == "rope":
            angles = rope_angles(h, w, c.width // c.heads, self.side, images.device)
        if drop is not None and c.drop_path:
            rate = torch.linspace(0, c.drop_path, c.depth, device=drop.device)[:, None]
            keep = (drop >= rate) / (1 - rate)  # deeper blocks are dropped more often
        return Grid(h, w, angles, keep)

    def patchify(self, images):
        """(..., 1, H, W) in [0, 1] -> (..., N, D), before positions."""
        x = self.embed((images.flatten(0, -4) - PIXEL_MEAN) / PIXEL_STD)  # (M, D, h, w)
        return x.flatten(2).transpose(1, 2).unflatten(0, images.shape[:-3])

    def positions(self, grid):
        """Learned positions of the tokens (N, D), resized for another image size."""
        position = self.position
        if position.shape[-2:] != (grid.h, grid.w):
            size = (grid.h, grid.w)
            position = F.interpolate(position, size=size, mode="bicubic", align_corners=False)
        return position.flatten(2).transpose(1, 2)[0]

    def recomputed(self, module, *inputs):
        """module(*inputs); with `recompute` once more in the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def run(self, x, plan, blocks, grid, past=None, memory=None):
        """The blocks of that range over x (B, E, N, D).

        past      a list with (keys, values) of every block, of elements seen earlier
        memory    a list that receives (keys, values) of x's elements, block by block
        Returns (x after the last block, {block: x after it} for the blocks in `taps`).
        """
        features = {}
        for n, i in enumerate(blocks):
            keep = None if grid.keep is None else grid.keep[:, i]
            seen = None if past is None else past[n]
            x, own = self.recomputed(self.blocks[i], x, plan, grid.angles, seen, keep)
            if i in self.taps:
                features[i] = x
            if memory is not None:
                memory.append(own)
        return x, features
