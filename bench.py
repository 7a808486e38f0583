"""How fast and how large it is, as ratios measured in one run: absolute times on a shared machine say little.

    python bench.py --model tiny --image_size 448 [--only train_step infer_cached] [--json]

train_step: forward, backward and optimizer, the mean of the hybrid's mix of objectives, against the same by two references of
the same width, depth, image and batch: `authors` (two stacks fused after an eighth of the blocks, decomposed relative
positions, the attention matrix materialised, both halves decoded), which the ratio is against, and `sequence` (the
literal four images, one attention under a mask). Floating-point operations are counted and set beside the device's measured matrix rate.
infer_cached: a further slice of a volume, its prompt encoded before, against the authors' way, the sequence, and encoding the prompt again.
volume: a volume of 100 slices of 256 x 256, three classes, one coloring, as infer.py answers it: files aside, with 100 prompt slices and with one.
loader: steps fed by the real loader from a prepared store, against the same steps on one batch that stays.
memory: the peak of a training step, computed without running it (see `cost`), against the authors' way.
store: a training sample (512 -> 448) from the prepared store against reading one 512x512x100 .nii.gz, which it costs without.
synthetic: procedural training samples, one process, one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import data
import mvg
import synthetic

PARTS = ("train_step", "infer_cached", "volume", "loader", "memory", "store", "synthetic")
HYBRID = {"mim": 0.45, "ar": 0.55}  # how often a step of the paper's recipe has each objective


# ---------------------------------------------------------------------------------------------------------------------
# The references: the same blocks, another attention

class Decomposed(nn.Module):
    """Attention inside every element of x (B, E, T, D), a grid of h x w tokens: the matrix is held, and a query's products with the
    vectors of its row's and its column's distance are added to it (decomposed relative positions)."""

    def __init__(self, width, heads, h, w):
        super().__init__()
        self.heads, self.grid = heads, (h, w)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.ParameterList(nn.Parameter(0.02 * torch.randn(2 * n - 1, width // heads)) for n in (h, w))

    def forward(self, x, plan=None, angles=None, past=None):
        B, E, T, D = x.shape
        q, k, v = self.qkv(x).view(B * E, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (BE, heads, T, dh)
        h, w = self.grid
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        apart = [t[torch.arange(n)[:, None] - torch.arange(n) + n - 1] for t, n in zip(self.distance, self.grid)]  # (n, n, dh)
        at = q.unflatten(2, (h, w))
        rows = torch.einsum("bnhwc,hkc->bnhwk", at, apart[0].to(at.dtype))
        columns = torch.einsum("bnhwc,wkc->bnhwk", at, apart[1].to(at.dtype))
        scores = (scores.view(*at.shape[:4], h, w) + rows[..., None] + columns[..., None, :]).view(scores.shape)
        seen = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(seen.transpose(1, 2).reshape(B, E, T, D)), None


class Masked(nn.Module):
    """Attention among all tokens of the elements of x (B, E, N, D), under a mask that lets each element see the earlier ones and itself."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, plan=None, angles=None, past=None):
        B, E, N, D = x.shape
        q, k, v = self.qkv(x).view(B, E * N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        element = torch.arange(E, device=x.device).repeat_interleave(N)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=element[:, None] >= element)
        return self.proj(seen.transpose(1, 2).reshape(B, E, N, D)), None


class Reference(nn.Module):
    """The authors' way, or the literal sequence, to paint label of image after prompt_image with prompt_label."""

    def __init__(self, config, way):
        super().__init__()
        self.way, self.config, c = way, config, config
        self.side = c.image_size // c.patch
        self.embed = nn.Conv2d(1, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros(1, c.width, self.side, self.side))
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.blocks = nn.ModuleList(mvg.Block(c.width, c.heads, c.mlp_ratio, False) for _ in range(c.depth))
        for block in self.blocks:
            block.attn = Decomposed(c.width, c.heads, 2 * self.side, self.side) if way == "authors" else Masked(c.width, c.heads)
        self.taps = [(k + 1) * c.depth // 4 - 1 for k in range(4)]
        self.head = mvg.ConvHead(c.width, c.patch, c.head_channels, 1)

    def forward(self, images, labels):
        """(B, 2, 1, H, W) twice, the last label hidden -> the painted labels (B, 2, 1, H, W)."""
        B, n, s = len(images), self.side ** 2, self.side
        x, y = ((self.embed(t.flatten(0, 1)) + self.position).flatten(2).transpose(1, 2).unflatten(0, (B, 2)) for t in (images, labels))
        y = torch.stack([y[:, 0], self.mask_token.to(y.dtype).expand_as(y[:, 1])], 1)
        if self.way == "sequence":
            x, kept = torch.stack([x, y], 2).flatten(1, 2), []  # P_x, P_y, X, Y
        else:
            x, kept = torch.stack([x.flatten(1, 2), y.flatten(1, 2)], 1), []  # two stacks of twice the height
        for i, block in enumerate(self.blocks):
            x, _ = block(x, None)
            if self.way == "authors" and i + 1 == self.config.fuse_at:
                x = x.mean(1, keepdim=True)
            if i in self.taps:
                kept.append(x[:, 0::2] if self.way == "sequence" else x.mean(1).view(B, 2, n, -1))
        return self.head([k.flatten(0, 1) for k in kept], s, s).unflatten(0, (B, 2))


# ---------------------------------------------------------------------------------------------------------------------
# What a training step costs, without running it

class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            key, size = id(storage), storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self.gone(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def gone(self, key, size):
        if self.alive.pop(key, None):
            self.now -= size


def attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(q, k, v)


def cost(config, batch, objective="ar", bf16=True, recompute=False, way="ours", pairs=2):
    """A training step of `batch` samples of `pairs` pairs, carried out on tensors that have shapes and no contents: (FLOPs, bytes at the peak).

    The peak holds weights, gradients and AdamW's two moments (16 bytes a parameter) and everything that forward and
    backward keep, with attention by a kernel that does not hold the matrix; not the CUDA context (some 0.5 GB), DDP's
    buckets (4 bytes a parameter) and what an allocator loses.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    size, tokens = config.image_size, (config.image_size // config.patch) ** 2

    def step():
        model = mvg.MVG(config) if way == "ours" else Reference(config, way)
        model.recompute = recompute
        images, labels = torch.zeros(2, batch, pairs, 1, size, size).unbind()
        moments = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if way == "ours":
                hidden = torch.zeros(batch, 4, tokens, dtype=torch.bool) if objective == "mim" else None
                loss = model(images, labels, objective, hidden, torch.ones(batch, dtype=torch.bool), torch.ones_like(labels, dtype=torch.uint8),
                             drop=torch.zeros(batch, config.depth, 2))[0]
            else:
                loss = mvg.pixel_loss(model(images, labels).float(), labels, "smooth_l1", 0.01).mean()
        loss.backward()
        return moments  # so that they live to the end

    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FakeTensorMode(), mock.patch.object(mvg.MVG, "_init", staticmethod(lambda module: None)), \
            mock.patch.object(mvg, "attend", F.scaled_dot_product_attention):
        with FlopCounterMode(display=False, custom_mapping={flash: attention_flops}) as flops:
            step()
        with Peak() as memory:  # apart: the other one keeps tensors alive
            step()
    return flops.get_total_flops(), memory.peak


# ---------------------------------------------------------------------------------------------------------------------
# What is measured

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
    """The median of slow / fast over pairs measured in turn."""
    return round(statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast])), 2)


def trainer(model, loss, device, bf16):
    """One training step of a model as a function without arguments; loss(): its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def train_step(config, device, batch, repeats, bf16, compiled, recompute):
    """Seconds a training step, ours (by objective and the hybrid's mean) and the references', and how much of the matrix rate is used."""
    size, tokens = config.image_size, (config.image_size // config.patch) ** 2
    images, labels = torch.rand(2, batch, 2, 1, size, size, device=device).unbind()
    model = mvg.MVG(config).to(device)
    model.recompute = recompute
    hidden = torch.rand(batch, 4, tokens, device=device) < 0.75
    colored, drop = torch.ones(batch, dtype=torch.bool, device=device), torch.rand(batch, config.depth, 2, device=device)
    references = {way: Reference(config, way).to(device) for way in ("authors", "sequence")}
    if compiled:
        for m in (model, *references.values()):
            m.compile()
    steps = {objective: trainer(model, lambda o=objective: model(images, labels, o, hidden if o == "mim" else None, colored, None, None, drop)[0], device, bf16)
             for objective in ("mim", "ar")}
    for way, m in references.items():
        steps[way] = trainer(m, lambda m=m: mvg.pixel_loss(m(images, labels).float(), labels, "smooth_l1", 0.01).mean(), device, bf16)
    seconds = in_turn(device, repeats, **steps)
    seconds["ours"] = [sum(share * s for share, s in zip(HYBRID.values(), pair)) for pair in zip(seconds["mim"], seconds["ar"])]
    median = {k: statistics.median(v) for k, v in seconds.items()}
    work = {o: cost(config, batch, o, bf16)[0] for o in HYBRID}
    rate = sum(share * work[o] for o, share in HYBRID.items()) / median["ours"]
    matrix = matrix_rate(device, bf16)
    return {"ours_s": round(median["ours"], 4), "reference_s": round(median["authors"], 4), "ratio": ratio(seconds, "authors", "ours"),
            "ar_s": round(median["ar"], 4), "mim_s": round(median["mim"], 4), "ratio_ar": ratio(seconds, "authors", "ar"),
            "ratio_mim": ratio(seconds, "authors", "mim"), "sequence_s": round(median["sequence"], 4), "ratio_sequence": ratio(seconds, "sequence", "ours"),
            "teraflops": round(rate / 1e12, 4), "matrix_teraflops": round(matrix / 1e12, 4), "utilisation": round(rate / matrix, 3)}


def matrix_rate(device, bf16):
    """FLOPs a second of a large square matrix product, the device's own limit in this number format."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    return 2 * side ** 3 / min(in_turn(device, 10, product=lambda: a @ a)["product"])


@torch.no_grad()
def infer_cached(config, device, batch, repeats, bf16):
    """Seconds a slice from a cached prompt, by the references, and with the prompt encoded again, for 1 prompt; the last for 2 and 4 too."""
    size, result = config.image_size, {}
    model = mvg.MVG(config).to(device).eval()
    references = {way: Reference(config, way).to(device).eval() for way in ("authors", "sequence")}
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for n in (1, 2, 4):
            images, labels = torch.rand(2, batch, n + 1, 1, size, size, device=device).unbind()
            cache = model.encode_prompts(images[:, :n], labels[:, :n])
            functions = {"cached": lambda: model.predict(cache, images[:, n]),
                         "again": lambda: model.predict(model.encode_prompts(images[:, :n], labels[:, :n]), images[:, n])}
            if n == 1:
                functions |= {way: lambda m=m: m(images, labels) for way, m in references.items()}
            seconds = in_turn(device, repeats, **functions)
            median = {k: round(statistics.median(v) / batch, 5) for k, v in seconds.items()}
            if n == 1:
                result = {"ours_s": median["cached"], "reference_s": median["authors"], "ratio": ratio(seconds, "authors", "cached"),
                          "sequence_s": median["sequence"], "ratio_sequence": ratio(seconds, "sequence", "cached"), "again": {}}
            result["again"][n] = {"ours_s": median["cached"], "reference_s": median["again"], "ratio": ratio(seconds, "again", "cached")}
    return result


def volume(config, device):
    """Seconds for 100 slices: each with a prompt slice of its own (ours), and all with the same one, whose cache they share (shared)."""
    import infer
    rng, model, seconds = np.random.default_rng(0), mvg.MVG(config).to(device).eval(), {}
    stack, label = rng.random((100, 256, 256), dtype=np.float32), np.zeros((100, 256, 256), np.uint8)
    label[:, 40:100, 40:100], label[:, 120:200, 60:120], label[:, 60:160, 160:220] = 1, 2, 3
    for name, prompt in (("ours_s", slice(None)), ("shared_s", slice(1))):
        start = time.perf_counter()
        infer.predict_stack(model, [(stack[prompt], label[prompt])], stack, True, votes=1)
        seconds[name] = round(time.perf_counter() - start, 3)
    return {**seconds, "ratio": round(seconds["ours_s"] / seconds["shared_s"], 2)}


def small_store(folder):
    """A prepared store of two CT cases of 512x512x100, and the path of a scan."""
    import nibabel
    root, rng = Path(folder) / "Dataset001_CT", np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}))
    label = np.zeros((512, 512, 100), np.uint8)
    label[150:300, 200:350, 10:90] = 1
    for case in ("a", "b"):
        scan = rng.integers(-100, 200, label.shape, dtype=np.int16)
        nibabel.save(nibabel.Nifti1Image(scan, np.diag([0.8, 0.8, 3, 1])), root / "imagesTr" / f"{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, np.diag([0.8, 0.8, 3, 1])), root / "labelsTr" / f"{case}.nii.gz")
    data.prepare(data.find(folder, say=lambda *a: None), Path(folder) / "store", say=lambda *a: None)
    return data.Store(Path(folder) / "store"), root / "imagesTr" / "a_0000.nii.gz"


def loader(config, device, batch, repeats, bf16, workers):
    """Seconds a training step fed by the loader, and on a batch that stays; the ratio is what the loader costs (1: nothing)."""
    with tempfile.TemporaryDirectory() as folder:
        episodes = data.Episodes(small_store(folder)[0], config.image_size, config.patch, config.depth, objective="ar", coloring="random")
        model = mvg.MVG(config).to(device)
        batches = iter(torch.utils.data.DataLoader(episodes, batch_sampler=data.Steps(0, 10 ** 6, batch), num_workers=workers,
                                                   pin_memory=device.type == "cuda", persistent_workers=workers > 0))
        kept = next(batches)

        def loss(b):
            b = {k: v.to(device, non_blocking=True) for k, v in b.items()}
            return model(b["images"], data.color(b["labels"], b["palette"], b["colored"]), "ar", None, b["colored"], b["valid"], None, b["drop"])[0]

        seconds = in_turn(device, repeats, fixed=trainer(model, lambda: loss(kept), device, bf16), real=trainer(model, lambda: loss(next(batches)), device, bf16))
        del batches
    return {"ours_s": round(statistics.median(seconds["real"]), 4), "reference_s": round(statistics.median(seconds["fixed"]), 4),
            "ratio": ratio(seconds, "real", "fixed"), "workers": workers}


def memory(config, batch, bf16):
    """Gigabytes at the peak of a training step, computed: ours (the larger of both objectives), with activations recomputed, the authors'."""
    peak = lambda **how: max(cost(config, batch, o, bf16, **how)[1] for o in HYBRID) / 1e9
    ours, again, authors = peak(), peak(recompute=True), cost(config, batch, "ar", bf16, way="authors")[1] / 1e9
    return {"ours_gb": round(ours, 3), "recomputed_gb": round(again, 3), "reference_gb": round(authors, 3), "ratio": round(authors / ours, 2)}


def from_store(repeats):
    """Seconds a sample from the store and from a .nii.gz, one thread."""
    import nibabel
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store, scan = small_store(folder)
        episodes = data.Episodes(store, 448, 16, 24)
        count = iter(range(10 ** 9))
        seconds = in_turn(torch.device("cpu"), repeats, store=lambda: [episodes[next(count), 0] for _ in range(10)],
                          file=lambda: [np.asarray(nibabel.load(scan).dataobj) for _ in range(1)])
    torch.set_num_threads(threads)
    ours, reference = statistics.median(seconds["store"]) / 10, statistics.median(seconds["file"])
    return {"ours_s": round(ours, 5), "reference_s": round(reference, 5), "ratio": round(10 * ratio(seconds, "file", "store"), 1)}


def synthetic_rate(size, tasks=24):
    """Synthetic samples (prompt and task) a second and core at a size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for i in range(tasks):
        synthetic.task(np.random.default_rng([0, i]), 2, size, i % 2 == 0)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return {"samples_per_second": round(tasks / seconds, 1)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="tiny", choices=list(mvg.SIZES), help="size")
    p.add_argument("--image_size", type=int, help="pixels (default: the size's own)")
    p.add_argument("--layout", default="fused", choices=("fused", "sequence"), help="ours")
    p.add_argument("--batch_size", type=int, default=1, help="samples or slices at once")
    p.add_argument("--repeats", type=int, default=7, help="timed repetitions, after one that is not")
    p.add_argument("--workers", type=int, default=1, help="loader processes of `loader`")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (default: on with CUDA)")
    p.add_argument("--compile", action="store_true", help="torch.compile ours and the references")
    p.add_argument("--recompute", action="store_true", help="train_step with activation checkpointing")
    p.add_argument("--device", help="cpu, mps, cuda ... (default: the best there is)")
    p.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = p.parse_args(argv)
    device, reason = mvg.pick_device(args.device)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    config = mvg.build(args.model, args.image_size, args.layout).config
    parts = {"train_step": lambda: train_step(config, device, args.batch_size, args.repeats, bf16, args.compile, args.recompute),
             "infer_cached": lambda: infer_cached(config, device, args.batch_size, args.repeats, bf16),
             "volume": lambda: volume(config, device),
             "loader": lambda: loader(config, device, args.batch_size, args.repeats, bf16, args.workers),
             "memory": lambda: memory(config, args.batch_size, bf16), "store": lambda: from_store(args.repeats),
             "synthetic": lambda: synthetic_rate(config.image_size)}
    result = {name: parts[name]() for name in PARTS if name in args.only}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model}, image {config.image_size}, {args.layout}, batch {args.batch_size}, {'bfloat16' if bf16 else 'float32'}, {device} ({reason})")
    for name, r in result.items():
        again = r.pop("again", {})
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in r.items()))
        for n, a in again.items():
            print(f"  {n} prompt{'s' if n > 1 else ''} encoded again for every slice: {a['reference_s']} s, cached {a['ours_s']} s, ratio {a['ratio']}")


if __name__ == "__main__":
    data.command_line(main)
