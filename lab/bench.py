"""How fast and how large the method is, and what a training run will cost.

    python -m lab.bench --model tiny --image_size 448 [--only train_step infer_cached] [--json]

Absolute times on a shared machine say little, so speeds are ratios that one run measures in turn.
The parts:

train_step    Forward, backward and optimizer: the mean of the paper's mix of objectives, against
              two references of the same width, depth, image and batch. `authors` is what the ratio
              is against: two stacks fused after an eighth of the blocks, decomposed relative
              positions, the attention matrix held, both halves decoded. `sequence` is the four
              images in one attention under a mask. Floating-point operations are counted, and set
              beside the device's measured rate of matrix products.
infer_cached  A further slice of a volume, its prompt encoded before. It is measured against the
              references, and against encoding the prompt again.
volume        A volume of 100 slices of 256 x 256 with three classes, under one coloring, without
              files: with 100 prompt slices, and with one.
samples       Samples a second of procedural tasks: made from the pool by the loader and the
              device, a step on a batch that stays, and both together.
memory        The peak of a training step, computed without running it (`cost`), against `authors`.
store         A training sample (512 -> 448) from the prepared store, against reading one .nii.gz of
              512 x 512 x 100, which a sample costs without a store.
specialist    Parameters, operations, seconds and memory of a slice, beside a U-Net for one class.

`train.py --dry_run` says the plan of a run by `DryRun`. `needs_recompute` decides whether a
training computes its activations again.
"""

import argparse
import json
import statistics
import tempfile
import time
import weakref
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import mvg
import vit
from coloring import color
from batches import Batch
from data import BatchSampler, ContextSamples
from lab import unet
from objectives import LOSSES, pixel_loss
from predict import answer_stack
from recipe import Recipe
from report import clock
from running.checkpoints import pick_device
from running.folder import Run
from running.ranks import compile_blocks, use_bf16
from scans.datasets import find
from scans.store import Store, prepare
from scans.volumes import command_line

HYBRID = {"mim": 0.45, "ar": 0.55}  # how often a step of the paper's recipe has each objective
REFERENCES = ("authors", "sequence")


def silent(*words):
    """Says and does nothing."""


# -------------------------------------------------------------------------------------------------
# The references: the same blocks, another attention

class Decomposed(nn.Module):
    """Attention inside every element of x (B, E, T, D), a grid of h x w tokens.

    The attention matrix is held. A query's products with the vectors of its row's and its column's
    distance are added to it (decomposed relative positions).
    """

    def __init__(self, width, heads, h, w):
        super().__init__()
        self.heads, self.grid = heads, (h, w)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(2 * n - 1, width // heads)) for n in (h, w))

    def forward(self, x, plan, turn=None, past=None):
        B, E, T, D = x.shape
        h, w = self.grid
        qkv = self.qkv(x).view(B * E, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # 3 x (BE, heads, T, dh)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)    # (BE, heads, T, T)
        of_rows, of_columns = (self.vectors(i).to(q.dtype) for i in range(2))
        q = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwc,hkc->bnhwk", q, of_rows)
        columns = torch.einsum("bnhwc,wkc->bnhwk", q, of_columns)
        by_place = scores.view(*q.shape[:4], h, w) + rows[..., None] + columns[..., None, :]
        seen = by_place.view(scores.shape).softmax(-1).to(v.dtype) @ v
        return self.proj(seen.transpose(1, 2).reshape(B, E, T, D)), None

    def vectors(self, axis):
        """The vector of every distance along an axis of n tokens, (n, n, dh)."""
        n = self.grid[axis]
        return self.distance[axis][torch.arange(n)[:, None] - torch.arange(n) + n - 1]


class Masked(nn.Module):
    """Attention among all tokens of x (B, E, N, D): an element sees the earlier ones and itself."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, plan, turn=None, past=None):
        B, E, N, D = x.shape
        q, k, v = self.qkv(x).view(B, E * N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        element = torch.arange(E, device=x.device).repeat_interleave(N)
        mask = element[:, None] >= element
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, E N, dh)
        return self.proj(seen.transpose(1, 2).reshape(B, E, N, D)), None


class Reference(nn.Module):
    """The authors' way, or the plain sequence, to paint the label of an image after a prompt."""

    def __init__(self, config, way):
        super().__init__()
        self.way, self.config, c = way, config, config
        self.side = c.image_size // c.patch
        self.embed = nn.Conv2d(1, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros(1, c.width, self.side, self.side))
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.blocks = nn.ModuleList(vit.Block(c.width, c.heads, c.mlp_ratio, False)
                                    for _ in range(c.depth))
        for block in self.blocks:
            if way == "authors":
                block.attn = Decomposed(c.width, c.heads, 2 * self.side, self.side)
            else:
                block.attn = Masked(c.width, c.heads)
        self.taps = [(k + 1) * c.depth // 4 - 1 for k in range(4)]
        self.head = vit.ConvHead(c.width, c.patch, c.head_channels, 1)

    def forward(self, images, labels):
        """2 x (B, 2, 1, H, W), the last label hidden -> the painted labels (B, 2, 1, H, W)."""
        B, side = len(images), self.side
        x, y = self.tokens(images), self.tokens(labels)             # (B, 2, N, D) each
        hidden = self.mask_token.to(y.dtype).expand_as(y[:, 1])
        y = torch.stack([y[:, 0], hidden], 1)
        if self.way == "sequence":
            x = torch.stack([x, y], 2).flatten(1, 2)                # P_x, P_y, X, Y: (B, 4, N, D)
        else:
            x = torch.stack([x.flatten(1, 2), y.flatten(1, 2)], 1)  # two stacks: (B, 2, 2 N, D)
        features = []
        for i, block in enumerate(self.blocks):
            x, _ = block(x, mvg.together(range(x.shape[1])))
            if self.way == "authors" and i + 1 == self.config.fuse_at:
                x = x.mean(1, keepdim=True)                         # (B, 1, 2 N, D)
            if i in self.taps:
                features.append(self.of_pairs(x).flatten(0, 1))     # (2 B, N, D)
        return self.head(features, side, side).unflatten(0, (B, 2))

    def tokens(self, pixels):
        """(B, 2, 1, H, W) -> (B, 2, N, D)"""
        x = self.embed(pixels.flatten(0, 1)) + self.position
        return x.flatten(2).transpose(1, 2).unflatten(0, pixels.shape[:2])

    def of_pairs(self, x):
        """What the head reads of each pair: (B, E, ..., D) -> (B, 2, N, D)."""
        if self.way == "sequence":
            return x[:, 0::2]
        return x.mean(1).view(len(x), 2, self.side ** 2, -1)


# -------------------------------------------------------------------------------------------------
# What a training step costs, without running it

class Costs(TorchDispatchMode):
    """Counts FLOPs, and the bytes of the tensors that are made inside and alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.flops = self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in COUNTED:
            self.flops += COUNTED[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.remove(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def remove(self, key, size):
        if self.alive.pop(key, None):
            self.now -= size


def attention_flops(q, k, v, *args, **kwargs):
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def attention_backward_flops(gradient, q, k, v, *args, **kwargs):
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


COUNTED = {  # torch leaves out the attention of a CPU
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops}


def in_float32(function):
    """A function as CUDA's autocast computes it. That of a CPU leaves its input in bfloat16."""
    def computed(x, *args):
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args)
    return computed


@contextmanager
def without_values():
    """Tensors have shapes and no contents, and are those that a CUDA device would hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for where, name, other in (
                (vit, "attend", F.scaled_dot_product_attention),  # it does not hold the matrix
                (F, "layer_norm", in_float32(F.layer_norm)),
                (torch.Tensor, "softmax", in_float32(torch.Tensor.softmax)),
                (mvg.MVG, "_initialise", silent)):  # it reads what it has drawn
            stack.enter_context(mock.patch.object(where, name, other))
        yield


def make_model(config, way):
    """The model of this project, or a reference."""
    return Reference(config, way) if way in REFERENCES else mvg.from_config(config)


def random_batch(config, batch, pairs=2, device=None) -> Batch:
    """Samples of noise that count as colored masks, with three quarters of the canvas hidden."""
    size, tokens = config.image_size, (config.image_size // config.patch) ** 2
    images, labels = torch.rand(2, batch, pairs, 1, size, size, device=device).unbind()
    return Batch(images=images, labels=labels, valid=torch.ones_like(labels, dtype=torch.uint8),
                 palette=torch.zeros(batch, 256, device=device),
                 colored=torch.ones(batch, dtype=torch.bool, device=device),
                 drop=torch.rand(batch, config.depth, 2, device=device),
                 drawn=torch.zeros(batch, 3, dtype=torch.int64, device=device),
                 hidden=torch.rand(batch, 4, tokens, device=device) < 0.75)


def batch_loss(model, batch, objective):
    """The loss of a `Batch` whose labels are colored, a scalar. objective: ar | mim, of ours."""
    recipe = Recipe()
    if isinstance(model, Reference):
        painted = model(batch.images, batch.labels)
        return pixel_loss(painted.float(), batch.labels, recipe.loss, recipe.beta).mean()
    return LOSSES[objective](model, batch, batch.labels, recipe).mean()


def cost(config, batch, objective="ar", bf16=True, recompute=False, pairs=2) -> tuple:
    """(FLOPs, bytes at the peak) of a training step of `batch` samples of `pairs` pairs.

    objective: ar | mim, or a reference: authors | sequence. The step is carried out on tensors that
    have shapes and no contents.

    The peak holds weights, gradients and AdamW's two moments (16 bytes a parameter) and everything
    that forward and backward keep on a CUDA device, with an attention kernel that does not hold
    the matrix. It does not hold the CUDA context (some 0.5 GB), DDP's buckets (4 bytes a
    parameter) and what an allocator loses.
    """
    with without_values(), Costs() as counted:
        fake_step(config, batch, objective, bf16, recompute, pairs)
    return counted.flops, counted.peak


def fake_step(config, batch, objective, bf16, recompute, pairs):
    """Forward and backward, of tensors without values."""
    model = make_model(config, objective)
    model.recompute = recompute
    samples = random_batch(config, batch, pairs)
    moments = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = batch_loss(model, samples, objective)
    loss.backward()
    return moments  # they live to the end


# -------------------------------------------------------------------------------------------------
# Is a GPU's memory too small?

def costs(config, recipe, bf16, recompute=False) -> dict:
    """{objective: (FLOPs, bytes at the peak)} of one batch of a process, by `cost`.

    mim has one prompt pair, and ar here the most that the recipe draws.
    """
    pairs = {"mim": 2, "ar": recipe.prompt_range[1] + 1}
    names = list(pairs) if recipe.objective == "hybrid" else [recipe.objective]
    return {name: cost(config, recipe.batch_size, name, bf16, recompute, pairs[name])
            for name in names}


def is_too_large(config, recipe, bf16, available) -> bool:
    """Does a training step need more than 0.9 of `available` bytes, if nothing is recomputed?"""
    peak = max(memory for _, memory in costs(config, recipe, bf16).values())
    return peak > 0.9 * available


def needs_recompute(model, recipe, device, bf16) -> bool:
    """Must a training on a CUDA device compute its activations again? Never that of a U-Net."""
    if not isinstance(model, mvg.MVG):
        return False
    available = torch.cuda.get_device_properties(device).total_memory
    return is_too_large(model.config, recipe, bf16, available)


# -------------------------------------------------------------------------------------------------
# The plan of a run

class DryRun(Run):
    """What train.py says with --dry_run: what a run draws, computes, needs and takes.

    It stands in for a `Run`. Two steps are taken, and then `MEASURED` that are timed. Nothing is
    written.
    """

    MEASURED = 10

    def __init__(self, args, recipe, samples, ranks, model):
        every_step = argparse.Namespace(**{**vars(args), "log_every": 1})
        super().__init__(every_step, recipe, samples, ranks, model)
        self.seconds = []  # of every step
        self.flops = 0     # of a sample, by the shares of the objectives

    def start(self, optimizers):
        """Say the plan; on --resume the steps go on from the checkpoint. Raises DataError."""
        super().start(optimizers)
        self.stop = self.step + 2 + self.MEASURED
        self.say_draws()
        self.say_cost()
        self.since = time.perf_counter()

    def open_folder(self):
        """A dry run has none."""

    def say_draws(self):
        samples, say = self.samples, self.ranks.say
        say(f"\n{'dataset':32} {'task':12} {'cases':>6} {'slices':>8} {'share':>7} "
            f"{'draws an epoch':>15}")
        masks = samples.segmentation_share
        groups = ((samples.segmentation, "segmentation", masks),
                  (samples.others, "images", 1 - masks))
        for names, task_of_synthetic, group_share in groups:
            for name, weight in zip(names, samples.shares(names)):
                task, share = task_of_synthetic, group_share * weight
                if name in samples.datasets:
                    task = samples.datasets[name].task
                cases = len(samples.cases.get(name, ())) or ""
                slices = len(samples.slices.get(name, ())) or ""
                say(f"{name:32} {task:12} {cases:>6} {slices:>8} {share:>7.1%} "
                    f"{share * len(samples):>15.0f}")

    def say_cost(self):
        recipe, say, epoch = self.recipe, self.ranks.say, len(self.samples)
        mim = float(np.mean([self.samples.switch(step)[0] == "mim" for step in range(1000)]))
        minutes, epochs = self.args.minutes, self.steps * self.batch / epoch
        say(f"\n{f'{minutes:g} minutes' if minutes else f'{self.steps} steps'} of "
            f"{self.ranks.count} x {recipe.accumulate} x {recipe.batch_size} samples, "
            f"{epoch / self.batch:.1f} an epoch, {'' if minutes else f'{epochs:.1f} epochs; '}"
            f"{mim:.0%} of the steps mim")
        if not isinstance(self.model, mvg.MVG):
            return
        again = self.model.recompute
        by_objective = costs(self.model.config, recipe, use_bf16(recipe, self.ranks), again)
        shares = {"mim": mim, "ar": 1 - mim}
        drawn = {name: both for name, both in by_objective.items() if shares[name]}
        self.flops = sum(shares[name] * flops for name, (flops, _) in drawn.items())
        self.flops /= recipe.batch_size
        peak = max(memory for _, memory in drawn.values())
        say(f"{self.flops / 1e12:.4f} TFLOP a sample, {self.flops * self.batch / 1e12:.3f} a step "
            f"(counted, forward and backward{', activations computed again' if again else ''})")
        say(f"{peak / 1e9:.2f} GB a process at the peak "
            "(computed: weights, gradients, moments, activations)")

    def report(self, step, lr, interrupted=False):
        """The step is over, on all ranks and on the device: note its seconds."""
        _, left_out, self.ended = self.log.read(interrupted, self.ranks.distributed)
        self.seconds.append(time.perf_counter() - self.since)
        self.step = step
        if left_out:
            self.name_the_broken(int(left_out / self.ranks.count), all_of_them=False)
        self.log.forget()
        self.since = time.perf_counter()

    def write(self, optimizers):
        """A dry run writes nothing."""

    def end(self):
        """Say the seconds of a step, an epoch and the run."""
        ranks, epochs = self.ranks, len(self.samples) / self.batch  # steps an epoch
        if ranks.distributed:
            dist.destroy_process_group()
        if ranks.device.type == "cuda":
            measured = torch.cuda.max_memory_allocated(ranks.device) / 1e9
            there = torch.cuda.get_device_properties(ranks.device).total_memory / 1e9
            ranks.say(f"{measured:.2f} GB a GPU measured, of {there:.0f}")
        timed = self.seconds[2:]
        if not timed:
            ranks.say("interrupted before a step was timed")
            return self.model
        seconds = float(np.mean(timed))
        rate = f"{self.flops * self.batch / seconds / 1e12:.3f} TFLOP/s; " if self.flops else ""
        run = f"the run {clock(seconds * self.steps)}"
        if self.args.minutes:
            run = f"{self.args.minutes:g} minutes {self.args.minutes * 60 / seconds:.0f} steps"
        ranks.say(f"{seconds:.3f} s a step (mean of {len(timed)}), "
                  f"{self.batch / seconds:.1f} samples/s, {rate}"
                  f"an epoch {clock(seconds * epochs)}, {run}. "
                  "Dry run: nothing was written but the prepared store.")
        return self.model


# -------------------------------------------------------------------------------------------------
# Measuring

@dataclass
class Setting:
    """What is measured, and how."""
    config: mvg.Config
    device: torch.device
    batch: int        # samples or slices at once
    repeats: int      # timed repetitions, after one that is not
    bf16: bool        # bfloat16 autocast
    workers: int      # loader processes
    compile: bool     # torch.compile of every block, in train_step and samples
    recompute: bool   # activations computed again, in train_step

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def in_turn(device, repeats, **functions):
    """Time functions in turn, A B A B ..., after a warm-up: {name: [seconds, ...]}."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            elif device.type == "mps":
                torch.mps.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, slow, fast):
    """The median of slow / fast over pairs measured in turn; None where one was not measured."""
    if slow not in seconds:
        return None
    return round(statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast])), 2)


def trainer(model, loss, setting):
    """One training step of a model as a function without arguments; loss() is its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with setting.autocast():
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def train_step(setting):
    """Seconds a training step of ours, by objective and their mix, and of the references.

    utilisation is the counted operations a second over the rate of matrix products. A reference
    that does not fit into a GPU's memory is left out: None.
    """
    config, device = setting.config, setting.device
    batch = random_batch(config, setting.batch, device=device)
    ours = make_model(config, "ours").to(device)
    ours.recompute = setting.recompute
    models = {"mim": ours, "ar": ours}
    models |= {way: make_model(config, way).to(device) for way in REFERENCES if fits(setting, way)}
    if setting.compile:
        for model in {id(m): m for m in models.values()}.values():
            compile_blocks(model)
    steps = {name: trainer(model, partial(batch_loss, model, batch, name), setting)
             for name, model in models.items()}
    seconds = in_turn(device, setting.repeats, **steps)
    seconds["ours"] = [HYBRID["mim"] * mim + HYBRID["ar"] * ar
                       for mim, ar in zip(seconds["mim"], seconds["ar"])]
    median = {name: round(statistics.median(values), 4) for name, values in seconds.items()}
    work = sum(share * cost(config, setting.batch, name, setting.bf16)[0]
               for name, share in HYBRID.items())
    rate, limit = work / median["ours"], matrix_rate(device, setting.bf16)
    taken = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"ours_s": median["ours"], "reference_s": median.get("authors"),
            "ratio": ratio(seconds, "authors", "ours"),
            "ar_s": median["ar"], "mim_s": median["mim"],
            "ratio_ar": ratio(seconds, "authors", "ar"),
            "ratio_mim": ratio(seconds, "authors", "mim"),
            "sequence_s": median.get("sequence"),
            "ratio_sequence": ratio(seconds, "sequence", "ours"), "gb_taken": taken,
            "teraflops": round(rate / 1e12, 4), "matrix_teraflops": round(limit / 1e12, 4),
            "utilisation": round(rate / limit, 3)}


def fits(setting, way):
    """Does a training step of a reference fit into the memory of a GPU?"""
    if setting.device.type != "cuda":
        return True
    there = torch.cuda.get_device_properties(setting.device).total_memory
    return cost(setting.config, setting.batch, way, setting.bf16)[1] < 0.8 * there


def matrix_rate(device, bf16):
    """FLOPs a second of a large square matrix product: the device's limit in this format."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side ** 3 / min(in_turn(device, 10, product=lambda: a @ a)["product"])


@torch.no_grad()
def infer_cached(setting):
    """Seconds a slice from a cached prompt, by the references, and with the prompt encoded again.

    The last is measured for 1, 2 and 4 prompts, the references for 1.
    """
    s, size, result = setting, setting.config.image_size, {}
    model = make_model(s.config, "ours").to(s.device).eval()
    references = {way: make_model(s.config, way).to(s.device).eval() for way in REFERENCES}
    with s.autocast():
        for n in (1, 2, 4):
            pairs = torch.rand(2, s.batch, n + 1, 1, size, size, device=s.device)
            functions = ways_to_answer(model, *pairs)
            if n == 1:
                functions |= {way: partial(m, *pairs) for way, m in references.items()}
            seconds = in_turn(s.device, s.repeats, **functions)
            median = {name: round(statistics.median(values) / s.batch, 5)
                      for name, values in seconds.items()}
            if n == 1:
                result = {"ours_s": median["cached"], "reference_s": median["authors"],
                          "ratio": ratio(seconds, "authors", "cached"),
                          "sequence_s": median["sequence"],
                          "ratio_sequence": ratio(seconds, "sequence", "cached"), "again": {}}
            result["again"][n] = {"ours_s": median["cached"], "reference_s": median["again"],
                                  "ratio": ratio(seconds, "again", "cached")}
    return result


def ways_to_answer(model, images, labels):
    """The last of the pairs, 2 x (B, n + 1, 1, H, W), answered from a cache and without one."""
    prompts, image = (images[:, :-1], labels[:, :-1]), images[:, -1]
    cache = model.encode_prompts(*prompts)

    def encode_again():
        model.predict(model.encode_prompts(*prompts), image)

    return {"cached": partial(model.predict, cache, image), "again": encode_again}


def volume(setting):
    """Seconds for 100 slices: each with a prompt slice of its own, and all with the same one."""
    rng, seconds = np.random.default_rng(0), {}
    model = make_model(setting.config, "ours").to(setting.device).eval()
    stack = rng.random((100, 256, 256), dtype=np.float32)
    label = np.zeros(stack.shape, np.uint8)
    label[:, 40:100, 40:100] = 1
    label[:, 120:200, 60:120] = 2
    label[:, 60:160, 160:220] = 3
    for name, prompt in (("ours_s", slice(None)), ("shared_s", slice(1))):
        start = time.perf_counter()
        answer_stack(model, [(stack[prompt], label[prompt])], stack, True)
        seconds[name] = round(time.perf_counter() - start, 3)
    return {**seconds, "ratio": round(seconds["ours_s"] / seconds["shared_s"], 2)}


def small_store(folder):
    """A prepared store of two CT cases of 512 x 512 x 100, and the path of a scan."""
    import nibabel
    root, rng = Path(folder) / "Dataset001_CT", np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    about = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    (root / "dataset.json").write_text(json.dumps(about))
    label, affine = np.zeros((512, 512, 100), np.uint8), np.diag([0.8, 0.8, 3, 1])
    label[150:300, 200:350, 10:90] = 1
    for case in ("a", "b"):
        scan = rng.integers(-100, 200, label.shape, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(scan, affine), root / f"imagesTr/{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), root / f"labelsTr/{case}.nii.gz")
    prepare(find(folder, say=silent), Path(folder) / "store", say=silent)
    return Store(Path(folder) / "store"), root / "imagesTr" / "a_0000.nii.gz"


def samples(setting):
    """Samples a second of procedural tasks: made alone, a step on a batch that stays, and both."""
    s = setting
    drawn = ContextSamples(None, Recipe(datasets=("synthetic",), objective="ar", pool=50), s.config)
    model = make_model(s.config, "ours").to(s.device)
    if s.compile:
        compile_blocks(model)
    batches = iter(DataLoader(drawn, batch_sampler=BatchSampler(0, 10 ** 6, s.batch),
                              collate_fn=drawn.collate, num_workers=s.workers,
                              pin_memory=s.device.type == "cuda",
                              persistent_workers=s.workers > 0))

    def make():
        return drawn.make(next(batches).to(s.device), 0)

    def loss(batch):
        labels = color(batch.labels, batch.palette, batch.colored)
        return batch_loss(model, replace(batch, labels=labels), "ar")

    kept = make()
    seconds = in_turn(s.device, s.repeats, data=make, step=trainer(model, lambda: loss(kept), s),
                      both=trainer(model, lambda: loss(make()), s))
    return {f"{name}_per_second": round(s.batch / statistics.median(values), 1)
            for name, values in seconds.items()} | {"workers": s.workers}


def memory(setting):
    """Computed gigabytes at the peak of a training step, of the larger objective.

    Ours, ours with activations recomputed, and the authors'. "counted" has the operations, too:
    {objective or reference: [GFLOP of a step, GB at its peak]}.
    """
    def count(name, recompute=False):
        return cost(setting.config, setting.batch, name, setting.bf16, recompute)

    counted = {name: count(name) for name in (*HYBRID, *REFERENCES)}
    counted |= {f"{name}, activations computed again": count(name, True) for name in HYBRID}
    gb = {name: peak / 1e9 for name, (_, peak) in counted.items()}
    ours = max(gb[name] for name in HYBRID)
    again = max(gb[f"{name}, activations computed again"] for name in HYBRID)
    return {"ours_gb": round(ours, 3), "recomputed_gb": round(again, 3),
            "reference_gb": round(gb["authors"], 3), "ratio": round(gb["authors"] / ours, 2),
            "counted": {name: [round(flops / 1e9, 1), round(gb[name], 3)]
                        for name, (flops, _) in counted.items()}}


def single_thread(function):
    """The same function, in which torch has one thread."""
    def alone(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)
    return alone


@single_thread
def from_store(setting):
    """Seconds a sample from the store, and to read a .nii.gz, one thread."""
    import nibabel
    with tempfile.TemporaryDirectory() as folder:
        store, scan = small_store(folder)
        drawn = ContextSamples(store, Recipe(), mvg.Config(**mvg.SIZES["large"]))
        steps = iter(range(10 ** 9))

        def ten_samples():
            for step in (next(steps) for _ in range(10)):
                drawn.make(drawn.collate([drawn[step, 0]]), step)

        def one_file():
            return np.asarray(nibabel.load(scan).dataobj)

        seconds = in_turn(torch.device("cpu"), setting.repeats, store=ten_samples, file=one_file)
    ours = statistics.median(seconds["store"]) / 10
    return {"ours_s": round(ours, 5), "reference_s": round(statistics.median(seconds["file"]), 5),
            "ratio": round(10 * ratio(seconds, "file", "store"), 1)}


def specialist(setting):
    """What the generalist costs beside a U-Net for one class at the same image size.

    For each: parameters, operations of a training sample, seconds and operations of a slice, and
    bytes at its peak, weights included. MVG's prompt is encoded before.
    """
    s, size = setting, setting.config.image_size
    models = {"mvg": make_model(s.config, "ours"), "unet": unet.UNet(unet.Config(1, size))}
    pairs, result = torch.rand(2, 1, 2, 1, size, size, device=s.device), {}
    with torch.no_grad():
        for model in models.values():
            model.to(s.device).eval()
        ways = {"mvg": ways_to_answer(models["mvg"], *pairs)["cached"],
                "unet": partial(models["unet"], pairs[0, :, -1])}
        seconds = in_turn(s.device, s.repeats, **ways)
        for name, answer in ways.items():
            parameters = sum(p.numel() for p in models[name].parameters())
            with Costs() as counted:
                answer()
            result[name] = {"parameters": parameters,
                            "slice_s": round(statistics.median(seconds[name]), 5),
                            "slice_gflop": round(counted.flops / 1e9, 2),
                            "slice_mb": round((4 * parameters + counted.peak) / 1e6)}
    with Costs() as counted:
        models["unet"](pairs[0, :, -1]).sum().backward()
    of_ours = sum(share * cost(s.config, 1, name, s.bf16)[0] for name, share in HYBRID.items())
    result["unet"]["train_gflop"] = round(counted.flops / 1e9, 2)
    result["mvg"]["train_gflop"] = round(of_ours / 1e9, 2)
    return result


PARTS = {"train_step": train_step, "infer_cached": infer_cached, "volume": volume,
         "samples": samples, "memory": memory, "store": from_store, "specialist": specialist}


# -------------------------------------------------------------------------------------------------
# python -m lab.bench

def make_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="tiny", choices=list(mvg.SIZES), help="size")
    p.add_argument("--image_size", type=int, help="pixels (default: the size's own)")
    p.add_argument("--layout", default="fused", choices=list(mvg.LAYOUTS), help="ours")
    p.add_argument("--batch_size", type=int, default=1, help="samples or slices at once")
    p.add_argument("--repeats", type=int, default=7,
                   help="timed repetitions, after one that is not")
    p.add_argument("--workers", type=int, default=1, help="loader processes of `samples`")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                   help="bfloat16 autocast (default: on with CUDA)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile every block, of ours and of the references")
    p.add_argument("--recompute", action="store_true",
                   help="train_step with activation checkpointing")
    p.add_argument("--device", help="cpu, mps, cuda ... (default: the best there is)")
    p.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS),
                   help="what to measure")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def main(argv=None):
    args = make_parser().parse_args(argv)
    device, reason = pick_device(args.device)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    size = {**mvg.SIZES[args.model], "layout": args.layout}
    if args.image_size:
        size["image_size"] = args.image_size
    setting = Setting(mvg.Config(**size), device, args.batch_size, args.repeats, bf16,
                      args.workers, args.compile, args.recompute)
    result = {name: part(setting) for name, part in PARTS.items() if name in args.only}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model}, image {setting.config.image_size}, {args.layout}, "
          f"batch {args.batch_size}, {'bfloat16' if bf16 else 'float32'}, {device} ({reason})")
    for name, values in result.items():
        again = values.pop("again", {})
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in values.items()))
        for n, seconds in again.items():
            print(f"  {n} prompt{'s' if n > 1 else ''} encoded again for every slice: "
                  f"{seconds['reference_s']} s, cached {seconds['ours_s']} s, "
                  f"ratio {seconds['ratio']}")


if __name__ == "__main__":
    command_line(main)
