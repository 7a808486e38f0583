"""Section 3.3: one ViT that paints the answer to an image after seeing one example.

A *pair* is an image with its label (a colored mask, another modality, a clean scan ...). The model
is shown n prompt pairs (P_x, P_y) and a task image X, and paints the task label Y.

It paints in two ways, one for each objective (objectives.py has the losses):

    paint_canvas    the square [P_x P_y; X Y], patches hidden anywhere, full attention  (Eq. 1)
    paint_labels    next-image prediction: label i > 1 from image i and earlier pairs   (Eq. 2)

The tokens come in two layouts. A third one is a subclass of `MVG` with `paint_canvas`,
`paint_labels`, `encode` and `answer`, named in LAYOUTS.

    Sequence    the paper's text: every image is an element of its own: P_x, P_y, X, Y
    Fused       the default, Painter's and the authors' way: image and label of a pair run side by
                side for the first `fuse_at` blocks and are then averaged; from there on one token
                speaks for an image patch and for its label patch

Shapes: B batch, n prompts, S = n + 1 pairs, E elements, N = h * w tokens an image, D width.
Pixels are single-channel floats in [0, 1]. `hidden == True` means the model has to paint it.

    cache = model.encode_prompts(images, labels)    # both (B, n, 1, H, W)
    label = model.predict(cache, image)             # (B, 1, H, W) -> (B, 1, H, W)
"""

from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from running.checkpoints import first_line, load_checkpoint, write_checkpoint
from vit import ConvHead, ViT

IMAGE, LABEL = 0, 1   # streams
PROMPT, QUERY = 0, 1  # roles of a pair


# -------------------------------------------------------------------------------------------------
# The canvas (section 3.3, "Mask Image Modeling")

def interleave(images, labels):
    """Pairs as elements: 2 x (B, S, 1, H, W) -> (B, 2S, 1, H, W), P_x, P_y, ..., X, Y."""
    return torch.stack([images, labels], 2).flatten(1, 2)


def to_canvas(elements):
    """[P_x, P_y, X, Y] as one square: P_x upper left, P_y upper right, X and Y below them.

    elements: (B, 4, 1, H, W) -> (B, 1, 2H, 2W)
    """
    B, four, one, H, W = elements.shape
    square = elements.view(B, 2, 2, one, H, W).permute(0, 3, 1, 4, 2, 5)  # (B, 1, 2, H, 2, W)
    return square.reshape(B, one, 2 * H, 2 * W)


def from_canvas(canvas):
    """The four images of a square, the inverse: (B, 1, 2H, 2W) -> (B, 4, 1, H, W)."""
    B, one, H2, W2 = canvas.shape
    square = canvas.view(B, one, 2, H2 // 2, 2, W2 // 2)
    return square.permute(0, 2, 4, 1, 3, 5).reshape(B, 4, one, H2 // 2, W2 // 2)


def to_pixels(hidden, size):
    """Patches as pixels, 1 where hidden: (B, E, N) bool -> (B, E, 1, H, W). size: (H, W)"""
    H, W = size
    patch = round((H * W / hidden.shape[-1]) ** 0.5)
    grid = hidden.float().unflatten(2, (H // patch, W // patch)).unsqueeze(2)
    return grid.repeat_interleave(patch, 3).repeat_interleave(patch, 4)


# -------------------------------------------------------------------------------------------------
# Plans: who sees whom. [(elements that ask, elements they see), ...]

def causal(elements):
    """Each of these elements sees those before it and itself: the triangle of Eq. 2."""
    return [((e,), elements[:i + 1]) for i, e in enumerate(elements)]


def together(elements):
    """All of these elements see all of them: full attention."""
    return [(elements, elements)]


# -------------------------------------------------------------------------------------------------
# The model

@dataclass
class Config:
    """All that is needed to make the same model again; stored in every checkpoint."""
    width: int
    depth: int
    heads: int
    head_channels: int        # C of the conv head; authors: 64
    patch: int = 16
    image_size: int = 448     # paper: crops of 448 x 448
    layout: str = "fused"     # fused (authors) | sequence (the paper's text)
    positions: str = "rope"   # rope (ours, beside learned ones) | learned (paper: "vanilla ViT")
    qk_norm: bool = True      # ours
    gate: bool = False        # ours: a pixel of a label may be copied from its image
    fuse_at: int = 0          # 0: an eighth of the depth, at least 2; authors: 3 of 24
    mlp_ratio: float = 4.0
    drop_path: float = 0.1    # authors
    max_prompts: int = 1      # most prompts seen in training; paper: 1

    def __post_init__(self):
        self.fuse_at = self.fuse_at or max(2, self.depth // 8)
        for name, choices in (("layout", tuple(LAYOUTS)), ("positions", ("rope", "learned"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: "
                                 f"choose {' or '.join(choices)}")
        if self.gate and self.layout != "fused":
            raise ValueError("gate needs the fused layout, where a token paints both halves")
        if self.image_size % self.patch:
            nearest = self.image_size // self.patch * self.patch or self.patch
            raise ValueError(f"image_size {self.image_size} is no multiple of the patch size "
                             f"{self.patch}: choose {nearest}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads: "
                             "the width of a head must be a multiple of 4")
        if self.depth < 4 or self.fuse_at >= self.depth:
            raise ValueError(f"depth {self.depth}: at least 4 blocks, and fusion "
                             f"(after {self.fuse_at}) before the last")


class MVG(ViT):
    """What both layouts share: streams, roles, the mask token, the head, and the ways to paint."""
    halves = 1  # how many of a pair's two halves a token paints

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.meta = {}  # what a checkpoint says of its training: coloring, objective, datasets
        self.stream = nn.Parameter(torch.zeros(2, c.width))  # image | label
        self.role = nn.Parameter(torch.zeros(2, c.width))    # prompt | query
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        first = c.fuse_at if c.layout == "fused" else 0  # the first block that sees whole pairs
        self.taps = [max(first, (k + 1) * c.depth // 4 - 1) for k in range(4)]  # at every quarter
        self.head = ConvHead(c.width, c.patch, c.head_channels, self.halves, c.gate)
        for parameter in (self.position, self.stream, self.role, self.mask_token):
            nn.init.normal_(parameter, std=0.02)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)

    def forward(self, images, labels, hidden=None, drop=None):
        """The training pass, for the losses of objectives.py.

        images, labels (B, S, 1, H, W); drop: uniform numbers (B, depth, 2) for drop path.
        hidden (B, 4, N): paint the canvas of S = 2 pairs -> (B, 4, 1, H, W), P_x, P_y, X, Y.
        Without it: paint every label after the first -> (B, S - 1, 1, H, W).
        Raises ValueError for a canvas of another number of pairs.
        """
        if hidden is None:
            return self.paint_labels(images, labels, drop)
        if images.shape[1] != 2:
            raise ValueError("the canvas holds one prompt pair and one task pair, "
                             f"got {images.shape[1]} pairs")
        return from_canvas(self.paint_canvas(to_canvas(interleave(images, labels)), hidden, drop))

    def place(self, tokens, stream, grid):
        """Add positions and stream to tokens (B, E, N, D) that all belong to one stream."""
        return tokens + (self.positions(grid) + self.stream[stream])

    def hide(self, tokens, hidden):
        """Put the mask token where `hidden` (B, E, N) is True."""
        return torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)

    def paint(self, features, grid):
        """{block: (B, E, N, D)} -> (B, E, halves, H, W), and one channel more for the gate."""
        maps = [features[i] for i in self.taps]
        B, E = maps[0].shape[:2]
        painted = self.recomputed(self.head, [m.flatten(0, 1) for m in maps], grid.h, grid.w)
        return painted.unflatten(0, (B, E))

    # ---- inference

    @torch.no_grad()
    def encode_prompts(self, images, labels):
        """All of the prompts that does not depend on the task image: keys and values.

        images, labels (B, n, 1, H, W) in [0, 1], n >= 1, sides multiples of the patch size.
        Returns a cache for `predict`; one with B = 1 serves any batch. Section 3.3, "Inference".
        Raises ValueError for other shapes.
        """
        if images.ndim != 5 or images.shape != labels.shape or images.shape[1] < 1:
            raise ValueError(f"prompt images {tuple(images.shape)} and labels "
                             f"{tuple(labels.shape)}: both must be (B, n, 1, H, W) with n >= 1")
        grid = self.grid(images)
        images = self.place(self.patchify(images), IMAGE, grid)  # (B, n, N, D)
        labels = self.place(self.patchify(labels), LABEL, grid)
        return {"grid": grid, "prompts": images.shape[1], **self.encode(images, labels, grid)}

    @torch.no_grad()
    def predict(self, cache, image):
        """The label of image (B, 1, H, W) in [0, 1] -> (B, 1, H, W), float32, not clipped.

        cache: with the image's batch size B, or with B = 1. Raises ValueError for an image of
        another size than the prompts had.
        """
        grid, before, patch = self.grid(image), cache["grid"], self.config.patch
        if (grid.h, grid.w) != (before.h, before.w):
            raise ValueError(f"image is {image.shape[-2]}x{image.shape[-1]}, "
                             f"its prompts were {before.h * patch}x{before.w * patch}")
        tokens = self.place(self.patchify(image[:, None]), IMAGE, grid)  # (B, 1, N, D)
        return self.answer(cache, tokens, image[:, None])[:, 0].float()

    @torch.no_grad()
    def predict_canvas(self, prompt_image, prompt_label, image):
        """The label by painting the lower right of the canvas: 3 x (B, 1, H, W) -> (B, 1, H, W).

        A prompt with B = 1 serves any batch. The canvas holds one prompt, and has no cache.
        """
        grid = self.grid(image)
        shown = [prompt_image.expand_as(image), prompt_label.expand_as(image), image]
        canvas = to_canvas(torch.stack([*shown, torch.zeros_like(image)], 1))
        hidden = torch.zeros(len(image), 4, grid.h * grid.w, dtype=torch.bool, device=image.device)
        hidden[:, 3] = True
        return from_canvas(self.paint_canvas(canvas, hidden))[:, 3].float()


class Sequence(MVG):
    """The paper's text: every image is an element of its own, P_x1, P_y1, ..., X, Y."""

    def paint_canvas(self, canvas, hidden, drop=None):
        """Paint the hidden patches (Eq. 1): square (B, 1, 2H, 2W), hidden (B, 4, N) -> square."""
        pixels = from_canvas(canvas)  # (B, 4, 1, H, W)
        grid = self.grid(pixels, drop)
        x = self.hide(self.patchify(pixels), hidden)  # (B, 4, N, D)
        x = torch.stack([self.place(x[:, 0::2], IMAGE, grid),
                         self.place(x[:, 1::2], LABEL, grid)], 2)  # (B, pair, stream, N, D)
        x = (x + self.role[:, None, None]).flatten(1, 2)
        _, features = self.run(x, together(range(4)), range(self.config.depth), grid)
        return to_canvas(self.paint(features, grid).contiguous())  # of (B, 4, 1, H, W)

    def paint_labels(self, images, labels, drop=None):
        """Every label after the first (Eq. 2): 2 x (B, S, 1, H, W) -> (B, S - 1, 1, H, W).

        The last label is never read. The output at an image's tokens is its label.
        """
        S, grid = images.shape[1], self.grid(images, drop)
        images = self.place(self.patchify(images), IMAGE, grid)           # (B, S, N, D)
        labels = self.place(self.patchify(labels[:, :-1]), LABEL, grid)   # (B, S - 1, N, D)
        x = torch.cat([interleave(images[:, :-1], labels), images[:, -1:]], 1)
        roles = [PROMPT] * (2 * S - 2) + [QUERY]
        x = x + self.role[roles, None]                                    # (B, 2S - 1, N, D)
        _, features = self.run(x, causal(range(2 * S - 1)), range(self.config.depth),
                               grid._replace(asked=range(2, 2 * S - 1, 2)))
        painted = self.paint(features, grid)                              # (B, S - 1, 1, H, W)
        return painted + 0 * self.mask_token.sum()  # DDP waits for its gradient

    def encode(self, images, labels, grid):
        """Keys and values of the prompts (B, n, N, D), by block."""
        x, memory = interleave(images, labels) + self.role[PROMPT], []
        self.run(x, causal(range(x.shape[1])), range(self.config.depth), grid, memory=memory)
        return {"memory": memory}

    def answer(self, cache, tokens, pixels):
        seen = range(2 * cache["prompts"] + 1)
        _, features = self.run(tokens + self.role[QUERY], [((0,), seen)],
                               range(self.config.depth), cache["grid"], past=cache["memory"])
        return self.paint(features, cache["grid"])


class Fused(MVG):
    """A pair is an element: two streams for `fuse_at` blocks, then their mean."""
    halves = 2

    def __init__(self, config):
        super().__init__(config)
        self.two_streams, self.fused = range(config.fuse_at), range(config.fuse_at, config.depth)

    def finish(self, features, grid, pixels, visible=1.0):
        """Both halves of some pairs, (B, E, 2, H, W), from their features.

        With `gate` (ours) every pixel of a label is painted or copied from the pair's image, as
        the gate says: what a denoised or inpainted image shares with its input need not pass
        through the tokens. pixels: the pairs' images (B, E, 1, H, W); visible: 1 where shown.
        """
        painted = self.paint(features, grid)
        if not self.config.gate:
            return painted
        image, label, gate = painted.split(1, 2)
        gate = torch.sigmoid(gate.float()) * visible
        return torch.cat([image, gate * pixels + (1 - gate) * label], 2)

    def paint_canvas(self, canvas, hidden, drop=None):
        """Paint the hidden patches (Eq. 1): square (B, 1, 2H, 2W), hidden (B, 4, N) -> square.

        The halves of a token are hidden independently of each other.
        """
        pixels = from_canvas(canvas)  # (B, 4, 1, H, W)
        grid = self.grid(pixels, drop)
        x = self.hide(self.patchify(pixels), hidden)  # (B, 4, N, D)
        x = torch.cat([self.place(x[:, 0::2], IMAGE, grid),
                       self.place(x[:, 1::2], LABEL, grid)], 1)  # P_x, X, P_y, Y
        x, _ = self.run(x, together((0, 1)) + together((2, 3)), self.two_streams, grid)
        x = (x[:, :2] + x[:, 2:]) / 2 + self.role[:, None]  # (B, 2, N, D): prompt, query
        _, features = self.run(x, together((0, 1)), self.fused, grid)
        visible = 1 - to_pixels(hidden[:, 0::2], pixels.shape[-2:])
        painted = self.finish(features, grid, pixels[:, 0::2], visible)
        return to_canvas(painted.flatten(1, 2).unsqueeze(2).contiguous())

    def paint_labels(self, images, labels, drop=None):
        """Every label after the first (Eq. 2): 2 x (B, S, 1, H, W) -> (B, S - 1, 1, H, W).

        The last label is never read. Prompts form the context z_1 .. z_n, z_j sees those up to
        itself. The query q_i is image i with its label hidden; it sees z_1 .. z_(i-1) and itself.
        All labels come from one pass.
        """
        n, grid = images.shape[1] - 1, self.grid(images, drop)
        pixels = images[:, 1:]
        images = self.place(self.patchify(images), IMAGE, grid)          # (B, n + 1, N, D)
        labels = self.place(self.patchify(labels[:, :-1]), LABEL, grid)  # (B, n, N, D)
        x = torch.cat([images, labels, self.blank(images, n, grid)], 1)  # (B, 3n + 1, N, D)
        image_at, label_at = range(n + 1), range(n + 1, 2 * n + 1)       # numbers of elements
        blank_at = range(2 * n + 1, 3 * n + 1)  # of image i + 1 it sees the labels before
        plan = causal(image_at) + causal(label_at)
        plan += [((b,), [*label_at[:i + 1], b]) for i, b in enumerate(blank_at)]
        x, _ = self.run(x, plan, self.two_streams, grid)
        context = (x[:, :n] + x[:, n + 1:2 * n + 1]) / 2 + self.role[PROMPT]  # z_1 .. z_n
        query = (x[:, 1:n + 1] + x[:, 2 * n + 1:]) / 2 + self.role[QUERY]     # q_2 .. q_(n+1)
        z, q = range(n), range(n, 2 * n)
        plan = causal(z) + [((e,), [*z[:i + 1], e]) for i, e in enumerate(q)]
        x = torch.cat([context, query], 1)
        _, features = self.run(x, plan, self.fused, grid._replace(asked=q))
        return self.finish(features, grid, pixels)[:, :, 1:]  # the label halves

    def blank(self, like, count, grid):
        """Labels of which every patch is hidden, (B, count, N, D)."""
        B, _, N, D = like.shape
        return self.place(self.mask_token.expand(B, count, N, D), LABEL, grid)

    def encode(self, images, labels, grid):
        """Keys and values of the prompts (B, n, N, D), by block, and the task's hidden label."""
        n, memory, fused_memory = images.shape[1], [], []
        # The task's hidden label sees the prompts' labels and itself: the same for every image.
        x = torch.cat([images, labels, self.blank(images, 1, grid)], 1)  # (B, 2n + 1, N, D)
        plan = causal(range(n)) + causal(range(n, 2 * n + 1))
        x, _ = self.run(x, plan, self.two_streams, grid, memory=memory)
        memory = [(keys[:, :n], values[:, :n]) for keys, values in memory]  # of the images
        context = (x[:, :n] + x[:, n:2 * n]) / 2 + self.role[PROMPT]
        self.run(context, causal(range(n)), self.fused, grid, memory=fused_memory)
        return {"memory": memory, "fused": fused_memory, "blank": x[:, 2 * n:]}

    def answer(self, cache, tokens, pixels):
        """The label of an image's tokens (B, 1, N, D): (B, 1, 1, H, W)."""
        grid, plan = cache["grid"], [((0,), range(cache["prompts"] + 1))]
        x, _ = self.run(tokens, plan, self.two_streams, grid, past=cache["memory"])
        x = (x + cache["blank"]) / 2 + self.role[QUERY]
        _, features = self.run(x, plan, self.fused, grid, past=cache["fused"])
        return self.finish(features, grid, pixels)[:, :, 1:]  # the label halves


LAYOUTS = {"fused": Fused, "sequence": Sequence}


def from_config(config):
    """A model with fresh weights, of the configuration's layout."""
    return LAYOUTS[config.layout](config)


# -------------------------------------------------------------------------------------------------
# Sizes and files. The paper names no size; `large` is the authors'.

SIZES = {
    "demo": dict(width=192, depth=8, heads=6, head_channels=16, patch=8, image_size=96),
    "pocket": dict(width=256, depth=12, heads=8, head_channels=16, patch=8, image_size=128),
    "tiny": dict(width=192, depth=12, heads=3, head_channels=16),
    "small": dict(width=384, depth=12, heads=6, head_channels=32),
    "base": dict(width=768, depth=12, heads=12, head_channels=64),
    "large": dict(width=1024, depth=24, heads=16, head_channels=64),
}


def build(size, image_size=None, layout="fused", **config):
    """A model with fresh weights.

    size: a name of SIZES; image_size: side in pixels (default: 448, demo 96, pocket 128); config:
    other fields of `Config`. Raises ValueError for an unknown size or field, or an impossible one.
    """
    if size not in SIZES:
        raise ValueError(f"model size {size!r} is unknown: choose one of {', '.join(SIZES)}")
    settings = {**SIZES[size], "layout": layout, **config}
    if image_size is not None:
        settings["image_size"] = image_size
    names = [f.name for f in fields(Config)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}: choose from {names}")
    return from_config(Config(**settings))


def save(path, model, **state):
    """Write a checkpoint: weights, config, meta and `state`. Raises OSError where it cannot."""
    write_checkpoint(path, {"config": asdict(model.config), "meta": model.meta,
                            "model": model.state_dict(), **state})


def load(path, device="cpu"):
    """An MVG from a checkpoint of train.py, in evaluation mode, float32; a U-Net: lab/unet.py.

    Raises what `load_checkpoint` raises, and ValueError where the file does not fit this code.
    """
    checkpoint = load_checkpoint(path, device)
    try:
        model = from_config(Config(**checkpoint["config"]))
        model.load_state_dict({k: v.float() for k, v in checkpoint["model"].items()})
    except (TypeError, RuntimeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} does not fit this code ({first_line(error)}): "
                         "train it again") from None
    meta = checkpoint.get("meta")
    model.meta = meta if isinstance(meta, dict) else {}
    return model.to(device).eval()
