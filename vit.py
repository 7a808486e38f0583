"""Section 3.3, architecture: a Vision Transformer of plain pre-norm blocks over a list of images.

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
ROPE_SIDE = 12.0   # ours: positions run from 0 to this over a side, however many tokens it has
ROPE_BASE = 100.0  # ours: over a side the fastest rotation turns by 12 radians, the slowest by 0.2


# -------------------------------------------------------------------------------------------------
# Rotary positions

def rope(h, w, head_dim, like):
    """Axial rotary positions of h x w tokens: cosines and signed sines, 2 x (N, 1, head_dim).

    Half of the frequencies turn by y, half by x. The same place has the same position at every
    image size. They have the precision of attention on the device of the tensor `like`.
    """
    device, kind = like.device, like.device.type
    frequency = ROPE_BASE ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    y = (torch.arange(h, device=device) + 0.5) / h * ROPE_SIDE
    x = (torch.arange(w, device=device) + 0.5) / w * ROPE_SIDE
    y, x = y[:, None] * frequency, x[:, None] * frequency  # (h, dh / 4), (w, dh / 4)
    angles = torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], -1).flatten(0, 1)
    cos, sin = angles.cos(), angles.sin()  # (N, dh / 2)
    both = torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return tuple(table.to(torch.get_autocast_dtype(kind)) for table in both)
    return both


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + dh / 2]) by the tables of `rope`: (..., N, heads, dh)."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


# -------------------------------------------------------------------------------------------------
# Attention over elements

class Norm(nn.LayerNorm):
    """LayerNorm in the precision of its input: CUDA's autocast would keep a float32 copy of it."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def pick(x, which):
    """The elements of those numbers of x (B, E, ...), without a copy where they are neighbours."""
    if list(which) == list(range(which[0], which[0] + len(which))):
        return x if len(which) == x.shape[1] else x[:, which[0]:which[-1] + 1]
    return torch.cat([x[:, i:i + 1] for i in which], 1)


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
        self.q_norm = Norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = Norm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, plan, turn=None, past=None):
        """x (B, E, N, D) -> those that ask (B, A, N, D), and the (keys, values) of x's elements.

        past: (keys, values) of elements seen earlier. What a plan sees is numbered from
        them on, who asks from x on. A cached prompt with a batch of 1 serves a whole batch.
        """
        B, E, N, D = x.shape
        q, k, v = self.qkv(x).view(B, E, N, 3, self.heads, -1).unbind(3)  # 3 x (B, E, N, heads, dh)
        q, k = self.q_norm(pick(q, asking(plan))), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        keys, values = k, v
        if past is not None:
            keys, values = (torch.cat([old.expand(B, -1, -1, -1, -1), new], 1)
                            for old, new in zip(past, (k, v)))
        answers = []
        for part, (_, seen) in zip(q.split([len(asked) for asked, _ in plan], 1), plan):
            parts = part, pick(keys, seen), pick(values, seen)
            answer = attend(*(t.flatten(1, 2).transpose(1, 2) for t in parts))
            answers.append(answer.transpose(1, 2).reshape(B, -1, N, D))
        return self.proj(answers[0] if len(answers) == 1 else torch.cat(answers, 1)), (k, v)


def asking(plan):
    """The elements that ask, in their order."""
    return [element for asked, _ in plan for element in asked]


class Block(nn.Module):
    """Pre-norm transformer block. `keep` (B, 2) scales its two branches by sample (drop path).

    It returns the elements that ask, and the (keys, values) of all of them.
    """

    def __init__(self, width, heads, mlp_ratio, qk_norm):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, plan, turn=None, past=None, keep=None):
        attended, memory = self.attn(self.norm1(x), plan, turn, past)
        x = pick(x, asking(plan))
        x = x + (attended if keep is None else attended * keep[:, 0, None, None, None])
        computed = self.mlp(self.norm2(x))
        x = x + (computed if keep is None else computed * keep[:, 1, None, None, None])
        return x, memory


# -------------------------------------------------------------------------------------------------
# The head

class ConvHead(nn.Module):
    """Four feature maps -> pixels: "two convolution layers ... four feature maps" (section 3.3).

    gate: one channel more, which the tokens say directly (ours; what it does is said in mvg.py).
    """

    def __init__(self, width, patch, channels, outputs, gate=False):
        super().__init__()
        self.patch, self.channels, self.gate = patch, channels, gate
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.expand = nn.Linear(4 * width, patch ** 2 * (channels + gate))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = Norm(channels)
        self.out = nn.Linear(channels, outputs)  # a 1x1 convolution, channels last

    def forward(self, features, h, w):
        """4 x (M, N, D) -> (M, outputs + gate, H, W)"""
        P, C = self.patch, self.channels
        x = torch.cat([norm(f) for norm, f in zip(self.norms, features)], -1)  # (M, N, 4 D)
        x = self.expand(x).view(-1, h, w, P, P, C + self.gate)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * P, w * P, C + self.gate)  # (M, H, W, C)
        x, gate = x.split([C, self.gate], -1)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last throughout
        x = torch.cat([again(self.finish, self.norm(x)), gate], -1)
        return x.permute(0, 3, 1, 2)  # (M, outputs + gate, H, W)

    def finish(self, x):
        return self.out(F.gelu(x))


def again(function, *inputs):
    """function(*inputs), of which nothing is kept: the backward pass computes it again."""
    if torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# -------------------------------------------------------------------------------------------------
# The trunk

class Grid(NamedTuple):
    """What one pass through the blocks shares."""
    h: int  # tokens along the height
    w: int
    turn: tuple | None = None         # the tables of `rope`, None without rotary positions
    keep: torch.Tensor | None = None  # factors of drop path (B, depth, 2), None without it
    asked: range | None = None        # the elements that are read after the last block, None: all


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
        h, w, turn, keep = H // c.patch, W // c.patch, None, None
        if c.positions == "rope":
            turn = rope(h, w, c.width // c.heads, images)
        if drop is not None and c.drop_path:
            rate = torch.linspace(0, c.drop_path, c.depth, device=drop.device)[:, None]
            keep = (drop >= rate) / (1 - rate)  # deeper blocks are dropped more often
        return Grid(h, w, turn, keep)

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
        return again(module, *inputs) if self.recompute else module(*inputs)

    def run(self, x, plan, blocks, grid, past=None, memory=None):
        """The blocks of that range over x (B, E, N, D).

        past      a list with (keys, values) of every block, of elements seen earlier
        memory    a list that receives (keys, values) of x's elements, block by block
        Returns (x after the last block, {block: x after it} for the blocks in `taps`), both of
        the elements `grid.asked`.
        """
        features, asked = {}, grid.asked or range(x.shape[1])
        for n, i in enumerate(blocks):
            keep = None if grid.keep is None else grid.keep[:, i]
            seen = None if past is None else past[n]
            if i == blocks[-1]:  # an entry is asked for as a whole
                plan = [entry for entry in plan if set(entry[0]) <= set(asked)]
            x, own = self.recomputed(self.blocks[i], x, plan, grid.turn, seen, keep)
            if i in self.taps:
                features[i] = x if i == blocks[-1] else pick(x, asked)
            if memory is not None:
                memory.append(own)
        return x, features
