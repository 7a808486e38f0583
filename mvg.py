"""The model of Medical Vision Generalist: one ViT that paints the answer to an image after seeing one example.

A *pair* is an image with its label (a colored mask, another modality, a clean scan ...). The model is shown n prompt
pairs and a task image, and paints the task label. Section 3 of the paper; what the paper leaves open is in README.md.

Two layouts of the same four images P_x, P_y, X, Y:

    fused     (default) image and label of a pair run side by side for the first `fuse_at` blocks and are then averaged:
              one token speaks for an image patch and for its label patch
    sequence  (the paper's text) every image is an element of the sequence, four of them for one prompt

Two objectives (section 3.3):

    mim       the square canvas [P_x P_y; X Y], patches hidden at random, full attention, loss on hidden patches
    ar        next-image prediction, causal over images, loss on labels only (Eq. 2)

Both are the same blocks over a list of *elements* (images as N tokens each); only who sees whom differs. That is all a
`plan` is: [(elements that ask, elements they see), ...], carried out as one attention call an entry, with no mask.

Shapes: B batch, n prompts, S = n + 1 pairs, E elements, N = h * w tokens an image, P patch, D width, C head channels.
Pixels are single-channel floats in [0, 1]. `hidden == True` means the model has to paint it.

    model = build("tiny", image_size=128)
    cache = model.encode_prompts(images, labels)    # both (B, n, 1, H, W)
    label = model.predict(cache, image)             # (B, 1, H, W) -> (B, 1, H, W)
"""

import os
import pickle
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25  # ours; one channel, so no ImageNet statistics
ROPE_BASE = 100.0                  # ours; the slowest rotation turns by about a quarter over a 28-token side
IMAGE, LABEL = 0, 1                # streams
PROMPT, QUERY = 0, 1               # roles of a pair
BLURS = (1, 3, 5)                  # ours; sides in pixels of the squares over which the prompt's filter averages


# ---------------------------------------------------------------------------------------------------------------------
# The canvas (section 3.3, "Mask Image Modeling")

def to_canvas(elements):
    """[P_x, P_y, X, Y] as one square: P_x upper left, P_y upper right, X lower left, Y lower right.

    elements: (B, 4, 1, H, W) -> (B, 1, 2H, 2W)
    """
    B, four, one, H, W = elements.shape
    square = elements.view(B, 2, 2, one, H, W).permute(0, 3, 1, 4, 2, 5)  # (B, 1, 2, H, 2, W)
    return square.reshape(B, one, 2 * H, 2 * W)


def from_canvas(canvas):
    """The four images of a square, the inverse of `to_canvas`: (B, 1, 2H, 2W) -> (B, 4, 1, H, W)."""
    B, one, H2, W2 = canvas.shape
    square = canvas.view(B, one, 2, H2 // 2, 2, W2 // 2).permute(0, 2, 4, 1, 3, 5)  # (B, 2, 2, 1, H, W)
    return square.reshape(B, 4, one, H2 // 2, W2 // 2)


# ---------------------------------------------------------------------------------------------------------------------
# Small modules

def rope_angles(h, w, head_dim, grid, device):
    """Axial rotary angles of an h x w token grid, (N, head_dim / 2): half of the pairs turn with y, half with x.

    The same place has the same angle in every image; another image size is stretched onto the trained `grid`.
    """
    frequency = ROPE_BASE ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    y = (torch.arange(h, device=device) + 0.5) / h * grid
    x = (torch.arange(w, device=device) + 0.5) / w * grid
    y, x = (y[:, None] * frequency), (x[:, None] * frequency)  # (h, dh/4), (w, dh/4)
    return torch.cat([y[:, None].expand(h, w, -1), x[None].expand(h, w, -1)], -1).flatten(0, 1)


def rotate(x, angles):
    """Turn the pairs (x[i], x[i + dh/2]) by their angles: (..., N, dh) -> (..., N, dh)."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head attention over elements; who sees whom is the plan's."""

    def __init__(self, width, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x, plan, angles=None, past=None):
        """x (B, E, N, D) -> (B, E, N, D), and the keys and values of its elements.

        past: keys and values of elements seen earlier; in the plan these are numbered first, x's own after them.
        """
        B, E, N, D = x.shape
        q, k, v = self.qkv(x).view(B, E, N, 3, self.heads, -1).permute(3, 1, 0, 4, 2, 5)  # 3 x (E, B, heads, N, dh)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = q.to(v.dtype).unbind(0), k.to(v.dtype).unbind(0), v.unbind(0)  # E x (B, heads, N, dh)
        keys, values = (k, v) if past is None else (past[0] + k, past[1] + v)

        seen = []
        for asking, visible in plan:
            out = attend(join(q, asking), join(keys, visible), join(values, visible))
            seen.append(out.transpose(1, 2).reshape(B, len(asking), N, D))
        return self.proj(join(seen, range(len(seen)), dim=1)), (k, v)


def attend(q, k, v):
    """Softmax attention, (B, heads, N, dh) and (B, heads, M, dh) -> (B, heads, N, dh). A CPU's bfloat16 kernel is several
    times slower backwards than the two products written out."""
    if q.device.type == "cpu" and v.dtype == torch.bfloat16:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def join(tensors, which, dim=2):
    """Concatenate the chosen tensors; one alone is passed on without a copy. A cached prompt serves a whole batch."""
    chosen = [tensors[i] for i in which]
    if len(chosen) == 1:
        return chosen[0]
    batch = max(t.shape[0] for t in chosen)
    return torch.cat([t.expand(batch, *t.shape[1:]) for t in chosen], dim=dim)


class Block(nn.Module):
    """Pre-norm transformer block. `keep` (B, 2) scales its two branches sample by sample (drop path)."""

    def __init__(self, width, heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, int(width * mlp_ratio)), nn.GELU(),
                                 nn.Linear(int(width * mlp_ratio), width))

    def forward(self, x, plan, angles=None, past=None, keep=None):
        seen, own = self.attn(self.norm1(x), plan, angles, past)
        x = x + (seen if keep is None else seen * keep[:, 0, None, None, None])
        thought = self.mlp(self.norm2(x))
        x = x + (thought if keep is None else thought * keep[:, 1, None, None, None])
        return x, own


class ConvHead(nn.Module):
    """Four feature maps -> pixels: "two convolution layers ... four feature maps" (section 3.3).

    stride: width of a feature in pixels; above 1 is cheaper. copies (ours): the convolution also sees the visible pixels, and decides pixel by pixel
    how much of a label is painted and how much is copied from the image through the prompt's filter (`PromptFilter`).
    """

    def __init__(self, width, patch, channels, outputs, stride=1, copies=False):
        super().__init__()
        self.side, self.channels, self.outputs, self.stride = patch // stride, channels, outputs, stride
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.expand = nn.Linear(4 * width, self.side ** 2 * channels)
        self.conv = nn.Conv2d(channels + 2 * copies, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, outputs + copies)  # a 1x1 convolution, channels last

    def forward(self, taps, h, w, seen=None, copy=None, trust=None):
        """4 x (M, N, D) -> (M, outputs, H, W). To copy: the visible pixels (M, 2, H, W) of image and label, 0 where hidden, the copy of the label
        (M, 1, H', W') and how far it can be trusted, of the answer's size, which may be another: what is painted is then resized to it."""
        P, C = self.side, self.channels  # features, not pixels, along a patch
        x = self.expand(torch.cat([norm(tap) for norm, tap in zip(self.norms, taps)], -1))  # (M, N, P*P*C)
        x = x.view(-1, h, w, P, P, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, h * P, w * P, C)  # (M, H / stride, W / stride, C)
        x = x.permute(0, 3, 1, 2)  # channels last throughout
        if self.stride > 1:
            x = F.interpolate(x, scale_factor=self.stride, mode="nearest")
        if seen is not None:
            x = torch.cat([x, seen.to(x.dtype)], 1).contiguous(memory_format=torch.channels_last)
        x = self.conv(x).permute(0, 2, 3, 1)
        x = self.out(F.gelu(self.norm(x))).permute(0, 3, 1, 2)  # (M, outputs, H, W), to copy with one more
        if seen is None:
            return x
        if x.shape[-2:] != copy.shape[-2:]:
            x = F.interpolate(x, size=copy.shape[-2:], mode="bilinear", align_corners=False)
        odds = trust * torch.exp((x[:, self.outputs:].float() + 1).clamp(-10, 10))  # of copying: those of the trust, times what the head says
        share = odds / (odds + 1 - trust + 1e-6)
        return torch.cat([x[:, :LABEL], x[:, LABEL:self.outputs] * (1 - share) + copy * share], 1)


class PromptFilter:
    """The linear filter that turns a prompt's image into its label as well as one can (ours): a denoised or translated image is mostly its input, and
    none of that need pass through the tokens. A ridge regression on the image, its averages over small squares and 1, in closed form; nothing is learned.

    `sums` of several pairs add up. trust, 0 to 1, is what the filter explains of the label's variance beyond a half: of most masks nothing.
    """

    @staticmethod
    def basis(images, shown=None):
        """(..., 1, H, W) -> (..., 4, H, W) float32: the averages over `BLURS` of the pixels where shown is 1 (default: all), and 1."""
        x, ones = images.flatten(0, -4).float(), torch.ones_like(images, dtype=torch.float32).flatten(0, -4)
        shown = ones if shown is None else shown.flatten(0, -4).float()
        mean = lambda t, size: F.avg_pool2d(t, size, 1, size // 2)
        maps = [x * shown if size == 1 else mean(x * shown, size) / mean(shown, size).clamp(min=1e-6) for size in BLURS]
        return torch.cat([*maps, ones], 1).unflatten(0, images.shape[:-3])

    @staticmethod
    def sums(images, labels, image_shown=None, label_shown=None):
        """What a regression needs of pairs (..., 1, H, W), where both are shown (default: all) -> (..., 5, 5): products of the basis and the label."""
        rows = torch.cat([PromptFilter.basis(images, image_shown), labels.float()], -3).flatten(-2)  # (..., 5, HW)
        weight = 1 if image_shown is None else (image_shown * label_shown).flatten(-2)
        total = 0
        with torch.autocast(rows.device.type, enabled=False):
            for part in (rows * weight).split(2 ** 18, -1):  # weights are 0 or 1; a large picture is not held a second time in double
                part = part if part.device.type == "mps" else part.double()
                total = total + part @ part.transpose(-1, -2)
        return total

    @staticmethod
    def fit(sums):
        """Sums (..., 5, 5) -> (weights of the basis (..., 4), trust (...)), float32. Waits for no device."""
        products = sums / sums[..., 3:4, 3:4].clamp(min=1)
        A, b, label = products[..., :4, :4], products[..., :4, 4], products[..., 4, 4]
        rows = torch.cat([A + 1e-5 * torch.eye(4, dtype=A.dtype, device=A.device), b[..., None]], -1)
        for i in range(4):  # Gauss and Jordan's elimination; the matrix is positive definite
            pivot = rows[..., i:i + 1, :] / rows[..., i:i + 1, i:i + 1]
            rows = torch.cat([rows[..., :i, :] - rows[..., :i, i:i + 1] * pivot, pivot, rows[..., i + 1:, :] - rows[..., i + 1:, i:i + 1] * pivot], -2)
        weights = rows[..., 4]
        left = label - 2 * (weights * b).sum(-1) + (weights[..., None] * A * weights[..., None, :]).sum((-2, -1))
        variance = label - products[..., 3, 4] ** 2
        explained = torch.where(variance > 1e-6, 1 - left / variance.clamp(min=1e-6), 0)
        return weights.float(), (2 * explained - 1).clamp(0, 1).float()

    @staticmethod
    def apply(fitted, images, shown=None):
        """The filter, and its trust, on images (..., 1, H, W): twice the same shape; no trust where an image is not shown."""
        weights, trust = fitted
        copy = (PromptFilter.basis(images, shown) * weights[..., None, None]).sum(-3, keepdim=True)
        trust = trust[..., None, None, None].expand_as(copy)
        return copy, trust if shown is None else trust * shown


# ---------------------------------------------------------------------------------------------------------------------
# The model

@dataclass
class Config:
    """Everything that `build` needs to make the same model again; stored in every checkpoint."""
    width: int
    depth: int
    heads: int
    head_channels: int             # C of the conv head; authors: 64
    patch: int = 16
    image_size: int = 448          # paper: crops of 448 x 448
    layout: str = "fused"          # fused (Painter's and the authors' way) | sequence (paper's text)
    positions: str = "rope"        # rope (learned ones stay as well) | learned (paper: "vanilla ViT")
    qk_norm: bool = True           # ours
    fuse_at: int = 0               # 0: an eighth of the depth, at least 2; authors: 3 of 24
    mlp_ratio: float = 4.0
    drop_path: float = 0.1         # authors
    max_prompts: int = 1           # most prompts seen in training; paper: 1
    head_stride: int = 1           # pixels a feature of the head is wide (ours)
    copies: bool = False           # the head may copy pixels through the prompt's filter (ours)

    def __post_init__(self):
        self.fuse_at = self.fuse_at or max(2, self.depth // 8)
        if self.layout not in ("fused", "sequence"):
            raise ValueError(f"layout is {self.layout!r}: choose fused or sequence")
        if self.positions not in ("rope", "learned"):
            raise ValueError(f"positions is {self.positions!r}: choose rope or learned")
        if self.head_stride < 1 or self.patch % self.head_stride:
            raise ValueError(f"head_stride {self.head_stride} does not divide the patch size {self.patch}")
        if self.copies and self.layout != "fused":
            raise ValueError("copies needs the fused layout, where a token paints both halves of a pair")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of the patch size {self.patch}: "
                             f"choose {self.image_size // self.patch * self.patch or self.patch}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads: the width of a head must be a multiple of 4")
        if self.depth < 4 or self.fuse_at >= self.depth:
            raise ValueError(f"depth {self.depth}: at least 4 blocks, and fusion (after {self.fuse_at}) before the last")


class MVG(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.grid = c.image_size // c.patch
        self.meta = {}  # what a checkpoint says of its training: coloring, objective, datasets
        self.recompute = False  # activation checkpointing: what a block or the head computed is computed again backwards, not kept
        self.embed = nn.Conv2d(1, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros(1, c.width, self.grid, self.grid))
        self.stream = nn.Parameter(torch.zeros(2, c.width))  # image | label
        self.role = nn.Parameter(torch.zeros(2, c.width))    # prompt | query
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, c.mlp_ratio, c.qk_norm) for _ in range(c.depth))
        self.first_block = c.fuse_at if c.layout == "fused" else 0  # features before fusion are of half a pair: no taps
        self.taps = [max(self.first_block, (k + 1) * c.depth // 4 - 1) for k in range(4)]  # evenly spaced
        # A fused token paints its image patch and its label patch, an element of the sequence only itself.
        self.head = ConvHead(c.width, c.patch, c.head_channels, 2 if c.layout == "fused" else 1, c.head_stride, c.copies)
        for parameter in (self.position, self.stream, self.role, self.mask_token):
            nn.init.normal_(parameter, std=0.02)
        self.apply(self._init)

    @staticmethod
    def _init(module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02) if isinstance(module, nn.Linear) \
                else nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)

    # ---- tokens

    def patchify(self, images):
        """(..., 1, H, W) -> (..., N, D), before positions. The tokens of a canvas are the tokens of its four images."""
        lead = images.shape[:-3]
        x = self.embed((images.flatten(0, -4) - PIXEL_MEAN) / PIXEL_STD)  # (M, D, h, w)
        return x.flatten(2).transpose(1, 2).unflatten(0, lead)  # (..., N, D)

    def place(self, tokens, stream, h, w):
        """Add position and stream to tokens (B, E, N, D) that all belong to one stream."""
        position = self.position
        if position.shape[-2:] != (h, w):
            position = F.interpolate(position, size=(h, w), mode="bicubic", align_corners=False)
        return tokens + position.flatten(2).transpose(1, 2)[:, None] + self.stream[stream]

    def hide(self, tokens, hidden):
        """Put the mask token where `hidden` (B, E, N) is True."""
        return torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)

    def _size(self, images):
        H, W = images.shape[-2:]
        if H % self.config.patch or W % self.config.patch:
            raise ValueError(f"images are {H}x{W}: both sides must be multiples of the patch size {self.config.patch}")
        return H // self.config.patch, W // self.config.patch

    # ---- running blocks

    def _run(self, x, plan, first, last, size, past=None, keep=None, remember=False):
        """Blocks first..last-1 over x (B, E, N, D). Returns x, the tapped features, and, to remember, keys and values block by block."""
        h, w = size
        angles = None
        if self.config.positions == "rope":
            angles = rope_angles(h, w, self.config.width // self.config.heads, self.grid, x.device)
        features, memory = [], []
        for i in range(first, last):
            x, own = self._again(self.blocks[i], x, plan, angles, past[i] if past else None, keep[:, i] if keep is not None else None)
            features += [x] * self.taps.count(i)
            memory += [own] * remember
        return x, features, memory

    def _again(self, module, *inputs):
        """module(*inputs), computed a second time backwards if `recompute`."""
        return checkpoint(module, *inputs, use_reentrant=False) if self.recompute and torch.is_grad_enabled() else module(*inputs)

    def _keep(self, drop):
        """Uniform numbers (B, depth, 2) -> factors of the branches: 0 with the block's drop rate, else 1 / (1 - rate)."""
        if drop is None or not self.config.drop_path:
            return None
        rate = torch.linspace(0, self.config.drop_path, self.config.depth, device=drop.device)[:, None]
        return (drop >= rate) / (1 - rate)

    def _paint(self, features, size, seen=None, copied=None):
        """4 x (B, E, N, D) -> (B, E, outputs, H, W). A head that copies needs the visible pixels of E pairs, images and labels, (B, E, 2, H, W),
        and what `PromptFilter.apply` gave, 2 x (B, E, 1, H, W)."""
        B, E = features[0].shape[:2]
        more = [] if seen is None else [t.flatten(0, 1) for t in (seen, *copied)]
        return self._again(self.head, [f.flatten(0, 1) for f in features], *size, *more).unflatten(0, (B, E))

    @torch.no_grad()
    def _copies_canvas(self, elements, hidden):
        """What `_paint` needs of the two pairs of a canvas: the filter is fitted where both halves of a pair are visible."""
        if not self.config.copies:
            return ()
        shown = 1 - self.to_pixels(hidden, elements)  # (B, 4, 1, H, W)
        seen = elements * shown
        (images, labels), (image_shown, label_shown) = ((t[:, 0::2], t[:, 1::2]) for t in (seen, shown))  # (B, 2, 1, H, W)
        fitted = PromptFilter.fit(PromptFilter.sums(images, labels, image_shown, label_shown).sum(1, keepdim=True).expand(-1, 2, -1, -1))
        return torch.cat([images, labels], 2), PromptFilter.apply(fitted, images, image_shown)

    @torch.no_grad()
    def _copies(self, fitted, images, copied=None):
        """What `_paint` needs of images (B, E, 1, H, W) whose labels are hidden."""
        if not self.config.copies:
            return ()
        return torch.cat([images, torch.zeros_like(images)], 2), [c[:, None] for c in copied] if copied else PromptFilter.apply(fitted, images)

    # ---- objective 1: masked image modeling

    def paint_canvas(self, canvas, hidden, drop=None):
        """Reconstruct the hidden patches of a square (Eq. 1).

        canvas (B, 1, 2H, 2W) and hidden (B, 4, N) bool, in the order P_x, P_y, X, Y -> (B, 1, 2H, 2W)
        """
        elements = from_canvas(canvas)  # (B, 4, 1, H, W)
        painted = self._paint(self._read_canvas(elements, hidden, drop), self._size(elements), *self._copies_canvas(elements, hidden))
        return to_canvas(painted.flatten(1, 2).unsqueeze(2).contiguous())  # fused (B, 2, 2, H, W), sequence (B, 4, 1, H, W) -> (B, 4, 1, H, W)

    def _read_canvas(self, elements, hidden, drop=None):
        """The features of a square's four images (B, 4, 1, H, W): 4 x (B, 2 pairs or 4 elements, N, D)"""
        h, w = size = self._size(elements)
        x = self.hide(self.patchify(elements), hidden)  # (B, 4, N, D)
        images, labels = self.place(x[:, 0::2], IMAGE, h, w), self.place(x[:, 1::2], LABEL, h, w)
        keep, depth = self._keep(drop), self.config.depth
        if self.config.layout == "fused":
            x = torch.cat([images, labels], 1)  # P_x, X, P_y, Y
            x, _, _ = self._run(x, [((0, 1), (0, 1)), ((2, 3), (2, 3))], 0, self.config.fuse_at, size, keep=keep)
            x = (x[:, :2] + x[:, 2:]) / 2 + self.role[:, None]  # two pairs, prompt and query
            return self._run(x, [((0, 1), (0, 1))], self.config.fuse_at, depth, size, keep=keep)[1]
        x = torch.stack([images, labels], 2) + self.role[:, None, None]  # (B, pair, stream, N, D)
        return self._run(x.flatten(1, 2), [((0, 1, 2, 3), (0, 1, 2, 3))], 0, depth, size, keep=keep)[1]

    # ---- objective 2: autoregressive, next-image prediction

    def paint_labels(self, images, labels, drop=None):
        """p(label i | image i, all earlier pairs) for every pair after the first, in one pass (Eq. 2).

        images (B, S, 1, H, W), labels (B, S, 1, H, W) -> (B, S - 1, 1, H, W); the last label is never read. A single pair (S = 1)
        is asked for its label without any context: (B, 1, 1, H, W).
        """
        S = images.shape[1]
        h, w = size = self._size(images)
        keep, depth, asked = self._keep(drop), self.config.depth, range(min(1, S - 1), S)
        copies = self._copies(self._fit(images, labels), images[:, asked.start:]) if self.config.copies else ()
        images = self.place(self.patchify(images), IMAGE, h, w)  # (B, S, N, D)
        labels = self.place(self.patchify(labels[:, :-1]), LABEL, h, w) if S > 1 else images[:, :0]  # (B, n, N, D)
        if self.config.layout == "sequence":
            x = [e for pair in zip(images.unbind(1), labels.unbind(1)) for e in pair] + [images[:, -1]]
            roles = [PROMPT] * (2 * S - 2) + [QUERY]
            x = torch.stack(x, 1) + self.role[roles, None]  # (B, 2S - 1, N, D)
            plan = [((e,), range(e + 1)) for e in range(2 * S - 1)]
            _, features, _ = self._run(x, plan, 0, depth, size, keep=keep)
            painted = self._paint([f[:, 2 * asked.start::2] for f in features], size)
            return painted + 0 * self.mask_token.sum()  # no placeholder here, yet never a parameter without gradient
        n, Q = S - 1, len(asked)
        x = torch.cat([images, labels, self._blank(images, Q, h, w)], 1)  # S images, n labels, Q hidden labels
        plan = [((i,), range(i + 1)) for i in range(S)]
        plan += [((S + j,), range(S, S + j + 1)) for j in range(n)]
        plan += [((S + n + q,), [*range(S, S + i), S + n + q]) for q, i in enumerate(asked)]
        x, _, _ = self._run(x, plan, 0, self.config.fuse_at, size, keep=keep)
        context = (x[:, :n] + x[:, S:S + n]) / 2 + self.role[PROMPT]         # z_1 .. z_n
        query = (x[:, asked.start:S] + x[:, S + n:]) / 2 + self.role[QUERY]  # q_i: image i, label hidden
        plan = [((j,), range(j + 1)) for j in range(n)]
        plan += [((n + q,), [*range(i), n + q]) for q, i in enumerate(asked)]
        _, features, _ = self._run(torch.cat([context, query], 1), plan, self.config.fuse_at, depth, size, keep=keep)
        return self._paint([f[:, n:] for f in features], size, *copies)[:, :, LABEL:]  # (B, Q, 1, H, W)

    @torch.no_grad()
    def _fit(self, images, labels):
        """The filter of every asked pair, fitted to the pairs before it; nothing of a pair without context can be trusted."""
        if images.shape[1] == 1:
            return PromptFilter.fit(images.new_zeros(len(images), 1, 5, 5))
        return PromptFilter.fit(PromptFilter.sums(images[:, :-1], labels[:, :-1]).cumsum(1))  # (B, n, 5, 5)

    def _blank(self, like, count, h, w):
        """Labels of which every patch is hidden, (B, count, N, D)."""
        B, _, N, D = like.shape
        return self.place(self.mask_token.expand(B, count, N, D), LABEL, h, w)

    # ---- the loss

    def forward(self, images, labels, objective, hidden=None, colored=None, valid=None, first=None, drop=None,
                loss="smooth_l1", beta=0.01, background_weight=0.1, balance=False, image_weight=1.0):
        """The training loss of a batch, every sample normalised by its own weights, then averaged.

        images, labels (B, S, 1, H, W) in [0, 1]; valid the same shape, 0 where a label has no truth
        objective   "mim" (S = 2, with hidden (B, 4, N)) | "ar"
        colored     (B,) bool: the labels are colored masks, their background (0) counts `background_weight` (authors: 0.1)
        first       (b,) int: the samples that are also asked for their first label, without context (ar only)
        drop        (B, depth, 2) uniform numbers for drop path, None for none
        balance     a colored sample with little foreground counts as if it filled a tenth of its images, at most ten times; where the label of an image task
                    is the image to within 0.1, it counts as background: a box or a hole is what there is to learn (ours)
        image_weight    how much a sample counts whose label is an image (ours)
        Returns (loss, loss of every sample as it counts (B,) detached, {term: its mean, detached}).
        """
        weight = torch.ones_like(labels) if valid is None else valid.to(labels.dtype)
        if colored is not None:
            masks = colored.view(-1, 1, 1, 1, 1)
            background = (labels == 0) & masks
            if balance:
                background = background | ((labels - images).abs() < 0.1) & ~masks
            weight = torch.where(background, background_weight * weight, weight)

        def errors(painted, target, weight):  # (B, E), the sums over pixels and those of their weights
            error = pixel_loss(painted.float(), target.float(), loss, beta) * weight
            return error.sum((2, 3, 4)), weight.sum((2, 3, 4))

        if objective == "mim":
            if images.shape[1] != 2:
                raise ValueError(f"the canvas holds one prompt pair and one task pair, got {images.shape[1]} pairs")
            target = torch.stack([images, labels], 2).flatten(1, 2)  # (B, 4, 1, H, W)
            painted = from_canvas(self.paint_canvas(to_canvas(target), hidden, drop))
            own = torch.ones_like(weight)
            if balance and colored is not None:  # where an answer is background, so is its image
                own = torch.where(masks, own, torch.where(background, background_weight, own))
            weight = torch.stack([own, weight], 2).flatten(1, 2) * self.to_pixels(hidden, images)
            error, weight = errors(painted, target, weight)
            names = ["prompt_image", "prompt_label", "image", "label"]
        elif objective == "ar":
            error, total = errors(self.paint_labels(images, labels, drop), labels[:, 1:], weight[:, 1:])
            names = [f"label_{i + 2}" for i in range(error.shape[1])]
            if first is not None and len(first):
                alone = images[first, :1], labels[first, :1]
                own = errors(self.paint_labels(*alone, drop if drop is None else drop[first]), alone[1], weight[first, :1])
                error, total = (torch.cat([torch.zeros_like(t[:, :1]).index_copy(0, first, o), t], 1) for t, o in zip((error, total), own))
                names = ["label_1", *names]
            weight = total
        else:
            raise ValueError(f"objective is {objective!r}: choose mim or ar")
        sample = error.sum(1) / weight.sum(1).clamp(min=1e-6)  # (B,)
        if balance and colored is not None:  # a small organ would else teach little
            filled = (labels != 0).flatten(1).float().mean(1)
            sample = torch.where(colored & (filled > 0), sample * 0.1 / filled.clamp(0.01, 0.1), sample)
        if image_weight != 1 and colored is not None:
            sample = torch.where(colored, sample, image_weight * sample)
        terms = {k: (error[:, i].sum() / weight[:, i].sum().clamp(min=1e-6)).detach() for i, k in enumerate(names)}
        return sample.mean(), sample.detach(), terms

    def to_pixels(self, hidden, images):
        """(B, E, N) patches -> (B, E, 1, H, W) pixels, as floats"""
        h, w = self._size(images)
        pixels = hidden.to(images.dtype).unflatten(2, (h, w))
        return pixels.repeat_interleave(self.config.patch, 2).repeat_interleave(self.config.patch, 3).unsqueeze(2)

    # ---- inference

    @torch.no_grad()
    def encode_prompts(self, images, labels):
        """Everything of the prompts that does not depend on the task image: keys and values of every block.

        images, labels (B, n, 1, H, W) in [0, 1], n >= 1, sides multiples of the patch size -> cache for `predict`.
        A cache with B = 1 serves any batch. Paper, section 3.3, "Inference". Raises ValueError for other shapes.
        """
        if images.ndim != 5 or images.shape != labels.shape or images.shape[1] < 1:
            raise ValueError(f"prompt images {tuple(images.shape)} and labels {tuple(labels.shape)}: "
                             "both must be (B, n, 1, H, W) with n >= 1")
        n = images.shape[1]
        h, w = size = self._size(images)
        depth, fuse_at = self.config.depth, self.config.fuse_at
        fitted = PromptFilter.fit(PromptFilter.sums(images, labels).sum(1, keepdim=True)) if self.config.copies else None
        images, labels = (self.place(self.patchify(x), s, h, w) for x, s in ((images, IMAGE), (labels, LABEL)))
        if self.config.layout == "sequence":
            x = torch.stack([images, labels], 2).flatten(1, 2) + self.role[PROMPT]
            _, _, memory = self._run(x, [((e,), range(e + 1)) for e in range(2 * n)], 0, depth, size, remember=True)
        else:
            # The task's hidden label sees the prompts' labels and itself: it is the same for every image.
            plan = [((i,), range(i + 1)) for i in range(n)] + [((n + j,), range(n, n + j + 1)) for j in range(n + 1)]
            x, _, memory = self._run(torch.cat([images, labels, self._blank(images, 1, h, w)], 1), plan, 0, fuse_at, size, remember=True)
            memory = [(keys[:n], values[:n]) for keys, values in memory]  # the images'
            blank, x = x[:, 2 * n:], (x[:, :n] + x[:, n:2 * n]) / 2 + self.role[PROMPT]
            memory += self._run(x, plan[:n], fuse_at, depth, size, remember=True)[2]
            return {"memory": memory, "prompts": n, "size": size, "blank": blank, "filter": fitted}
        return {"memory": memory, "prompts": n, "size": size}

    @torch.no_grad()
    def predict(self, cache, image, copied=None):
        """The label of image (B, 1, H, W) in [0, 1] given encoded prompts -> (B, 1, H, W), float32 near [0, 1], not clipped.

        copied: of a model that copies, `PromptFilter.apply` of the images at another resolution, which the answer then has.
        cache: of as many prompts as the image's batch, or of one. Raises ValueError for an image of another size than they had.
        """
        h, w = size = self._size(image)
        if size != cache["size"]:
            raise ValueError(f"image is {image.shape[-2]}x{image.shape[-1]}, its prompts were "
                             f"{cache['size'][0] * self.config.patch}x{cache['size'][1] * self.config.patch}")
        n, past, depth, fuse_at = cache["prompts"], cache["memory"], self.config.depth, self.config.fuse_at
        x = self.place(self.patchify(image[:, None]), IMAGE, h, w)  # (B, 1, N, D)
        if self.config.layout == "sequence":
            _, features, _ = self._run(x + self.role[QUERY], [((0,), range(2 * n + 1))], 0, depth, size, past)
            return self._paint(features, size)[:, 0].float()
        plan = [((0,), range(n + 1))]  # the image sees those of the prompts and itself, and once fused all pairs
        x, _, _ = self._run(x, plan, 0, fuse_at, size, past)
        x = (x + cache["blank"]) / 2 + self.role[QUERY]
        _, features, _ = self._run(x, plan, fuse_at, depth, size, past)
        return self._paint(features, size, *self._copies(cache.get("filter"), image[:, None], copied))[:, 0, LABEL:].float()

    @torch.no_grad()
    def predict_canvas(self, prompt_image, prompt_label, image, copied=None):
        """The label of image by painting the lower right of the canvas, Y all hidden: 3 x (B, 1, H, W) -> (B, 1, H, W).

        A prompt with B = 1 serves any batch. The canvas holds one prompt, and nothing of it can be kept for the next image. copied: as for `predict`.
        """
        h, w = size = self._size(image)
        prompt_image, prompt_label = prompt_image.expand_as(image), prompt_label.expand_as(image)
        elements = torch.stack([prompt_image, prompt_label, image, torch.zeros_like(image)], 1)
        hidden = torch.zeros(len(image), 4, h * w, dtype=torch.bool, device=image.device)
        hidden[:, 3] = True
        features = [f[:, -1:] for f in self._read_canvas(elements, hidden)]  # of the task's pair, or of Y
        fitted = PromptFilter.fit(PromptFilter.sums(prompt_image, prompt_label)[:, None]) if self.config.copies else None
        return self._paint(features, size, *self._copies(fitted, image[:, None], copied))[:, 0, -1:].float()


def pixel_loss(painted, target, kind, beta):
    """The regression loss pixel by pixel: smooth_l1 (paper; beta 0.01 is the authors'), l1 or l2."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(painted, target, beta=beta, reduction="none")
    if kind == "l1":
        return (painted - target).abs()
    if kind == "l2":
        return (painted - target) ** 2
    raise ValueError(f"loss is {kind!r}: choose smooth_l1, l1 or l2")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and files. The paper names no size; `large` is the authors'.

SIZES = {
    "demo": dict(width=192, depth=8, heads=6, head_channels=16, patch=8, image_size=64),
    "demo96": dict(width=192, depth=8, heads=6, head_channels=16, patch=8, image_size=96, copies=True),
    "pocket": dict(width=192, depth=8, heads=6, head_channels=16, patch=16, image_size=128, head_stride=2, copies=True),
    "tiny": dict(width=192, depth=12, heads=3, head_channels=16),
    "small": dict(width=384, depth=12, heads=6, head_channels=32),
    "base": dict(width=768, depth=12, heads=12, head_channels=64),
    "large": dict(width=1024, depth=24, heads=16, head_channels=64),
}


def build(size, image_size=None, layout="fused", **config):
    """A model with fresh weights. size: a name of SIZES; image_size in pixels (default 448; 64, 96 and 128 for demo, demo96 and pocket); the rest: Config.

    Raises ValueError for an unknown size or an impossible configuration.
    """
    if size not in SIZES:
        raise ValueError(f"model size {size!r} is unknown: choose one of {', '.join(SIZES)}")
    settings = {**SIZES[size], "layout": layout, **config}
    if image_size is not None:
        settings["image_size"] = image_size
    unknown = set(settings) - {f.name for f in fields(Config)}
    if unknown:
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}: choose from {[f.name for f in fields(Config)]}")
    return MVG(Config(**settings))


def pick_device(name=None, local_rank=0):
    """The device (the one named, or the best there is) and the reason. Raises ValueError for one that is not there."""
    if name:
        try:
            device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0][:80]}): try cpu") from None
        return device, "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank), f"CUDA is there ({torch.cuda.get_device_name(local_rank)})"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU is there"
    return torch.device("cpu"), f"no GPU is there, {torch.get_num_threads()} threads"


def save(path, model, **state):
    """Write a checkpoint: weights, config, meta and whatever `state` holds, to a temporary file that is then renamed.

    Raises OSError where it cannot be written; the file that was there before is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + f".tmp{os.getpid()}")
    try:
        torch.save({"mvg": 1, "config": asdict(model.config), "meta": model.meta, "model": model.state_dict(), **state},
                   temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise OSError(f"{path} cannot be written ({str(error).splitlines()[0][:100]}): is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """The dictionary that `save` wrote. Raises FileNotFoundError, or ValueError if the file is anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint: pass a file that train.py wrote, such as runs/.../last.pt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, KeyError, ValueError, AttributeError, TypeError,
            UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"{path} is not a checkpoint of tensors ({str(error).splitlines()[0][:80] if str(error) else 'empty'}): "
                         "pass a file that train.py wrote, such as last.pt") from None
    if not isinstance(checkpoint, dict) or not {"mvg", "config", "model"} <= set(checkpoint):
        raise ValueError(f"{path} holds tensors but no MVG model: pass a file that train.py wrote, such as last.pt")
    if checkpoint["mvg"] != 1:
        raise ValueError(f"{path} has checkpoint format {checkpoint['mvg']}, this code reads 1: update the code")
    return checkpoint


def load(path, device="cpu"):
    """A model from any checkpoint that train.py wrote, in evaluation mode, float32. Errors as `load_checkpoint`."""
    checkpoint = load_checkpoint(path, device)
    try:
        model = MVG(Config(**checkpoint["config"]))
        model.load_state_dict({k: v.float() for k, v in checkpoint["model"].items()})
    except (TypeError, RuntimeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} does not fit this code ({str(error).splitlines()[0][:80]}): train it again") from None
    model.meta = meta if isinstance(meta := checkpoint.get("meta"), dict) else {}
    return model.to(device).eval()


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_vit(model, path):
    """Start the trunk from a plain ViT's state dict (MAE's or timm's names); the head and what a ViT has not stay as they are.

    Its three input channels become one that answers to a gray picture as they did together, normalised as ImageNet is; the class token is
    dropped, positions are resized. Raises ValueError where width, depth or patch differ, or the file is no ViT. Of a checkpoint of this code: `load_resized`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (ours := "mvg" in state):
            state = state.get("model", state.get("state_dict", state))
            kernel, bias, position = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], state["pos_embed"]
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no ViT's state dict ({type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}): "
                         "pass a MAE or timm ViT saved with torch.save") from None
    if ours:
        return load_resized(model, path)
    c, depth = model.config, len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    for what, theirs, ours in (("width", kernel.shape[0], c.width), ("depth", depth, c.depth), ("patch", kernel.shape[-1], c.patch)):
        if theirs != ours:
            raise ValueError(f"{path} has {what} {theirs}, this model {ours}: choose the --model of its size")
    mean, std = (torch.tensor(v[:kernel.shape[1]]).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    side = int(position.shape[1] ** 0.5)  # a class token makes it one more than a square
    grid = position[:, -side * side:].transpose(1, 2).unflatten(2, (side, side))
    own = {"embed.weight": (kernel * PIXEL_STD / std).sum(1, keepdim=True), "embed.bias": bias + (kernel * (PIXEL_MEAN - mean) / std).sum((1, 2, 3)),
           "position": F.interpolate(grid, size=(model.grid, model.grid), mode="bicubic", align_corners=False) if side != model.grid else grid}
    for name, value in state.items():
        if name.startswith("blocks."):
            own[name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")] = value
    try:
        unknown = model.load_state_dict({k: v.float() for k, v in own.items()}, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit ({str(error).splitlines()[-1].strip()[:120]}): choose the --model of its size") from None
    if unknown:
        raise ValueError(f"{path} has {unknown[0]}, which a plain ViT has not: pass a MAE or timm ViT")


def load_resized(model, path):
    """Start from the checkpoint of a model that differs in image size, patch size and head alone.

    Patch kernels and positions are resized: of an image enlarged by a whole factor the tokens are those that the other model makes of the image itself.
    What the head has more of begins at 0. Raises ValueError where something else differs.
    """
    other, free = load(path), ("image_size", "patch", "head_stride", "copies", "drop_path", "max_prompts")
    config, own, theirs, side = asdict(other.config), model.state_dict(), other.state_dict(), model.config.patch
    for name, value in asdict(model.config).items():
        if config[name] != value and name not in free:
            raise ValueError(f"{path} has {name} {config[name]}, this model {value}: only {', '.join(free)} may differ")
    for name, value in own.items():
        other = theirs[name]
        if name == "embed.weight":
            other = F.interpolate(other, size=(side, side), mode="area") * (other.shape[-1] / side) ** 2
        elif name == "position":
            other = F.interpolate(other, size=value.shape[-2:], mode="bicubic", align_corners=False)
        if any(o > v for o, v in zip(other.shape, value.shape)) or other.shape != value.shape and not name.startswith(("head.conv.", "head.out.")):
            raise ValueError(f"{path} has {name} {tuple(other.shape)}, this model {tuple(value.shape)}: patch / head_stride must be as it was")
        value.zero_()[tuple(slice(n) for n in other.shape)] = other
