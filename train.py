"""Train one model on every dataset found: the paper's recipe (section 4.1) in one loop that reads top to bottom.

    python train.py --data_root DIR                            one process: CPU, Apple GPU or CUDA, whatever is there
    torchrun --nproc_per_node=8 train.py --data_root DIR       eight GPUs, the paper's setting
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --data_root DIR
    python train.py --data_root DIR --model demo --steps 500   minutes on a laptop

The first run reads every case once into the prepared store; later ones start at once, and `--store DIR` alone trains
without the data root. The run folder (--out) holds config.json, log.jsonl, last.pt, samples.png and loss.png, and best.pt with
--validate_cases. `--resume` goes on where last.pt stopped, bit for bit on CPU. `--dry_run` says what a run will cost.
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import time
from argparse import BooleanOptionalAction
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import mvg
import unet
from data import DataError


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    add = p.add_argument
    add("--data_root", help="folder that holds the datasets as they were downloaded")
    add("--store", help="prepared store, written on first use (default: store/<name of data_root>-<hash>)")
    add("--out", default="runs/mvg", help="run folder")
    add("--datasets", nargs="+", metavar="NAME", help="only these; `synthetic` adds procedural tasks (default: every dataset found)")
    add("--brats_pairs", nargs="+", metavar="FROM:TO", help="what BraTS-GLI translates, of t1n t1c t2w t2f (default: t1c:t2w t2w:t1c, authors)")
    # the model
    add("--model", default="large", choices=[*mvg.SIZES, "unet"], help="size; the paper names none, large is the authors'; unet: a specialist for one dataset, to compare with")
    add("--image_size", type=int, help="side of the crop in pixels (default: 448, the paper's; 64, 96 and 128 for demo, demo96 and pocket)")
    add("--layout", default="fused", choices=("fused", "sequence"), help="fused: authors; sequence: the paper's text")
    add("--positions", default="rope", choices=("rope", "learned"), help="rope: ours, beside learned ones; learned: the paper's vanilla ViT")
    add("--qk_norm", action=BooleanOptionalAction, default=True, help="normalise queries and keys (ours)")
    add("--drop_path", type=float, default=0.1, help="largest drop rate of a block's branches (authors)")
    add("--init", metavar="FILE", help="start the trunk from a plain ViT's weights (MAE, timm; authors), or from a checkpoint of the same width and depth, of another image or patch size")
    # the objective
    add("--objective", default="hybrid", choices=("hybrid", "ar", "mim"), help="hybrid: paper; ar or mim alone: its ablations")
    add("--seg_share", type=float, default=0.5, help="share of segmentation samples (paper)")
    add("--mim_share", type=float, default=0.9, help="share of mim in the other tasks under hybrid (paper)")
    add("--mask_ratio", type=float, default=0.75, help="share of canvas patches hidden (ours; the paper tries 0.5 and 0.75)")
    add("--hide_label", type=float, default=0.1, help="share of canvases on which exactly Y is hidden, as at inference (ours)")
    add("--first_term", default="auto", choices=("auto", "on", "off"), help="ask for the first label, without context: auto means of image labels only (ours)")
    add("--num_prompts", default="1", help="prompt pairs, a number (paper: 1) or a range such as 1-4")
    add("--coloring", default="random", choices=("random", "predefined", "binary"), help="how classes become grays (paper: random)")
    add("--loss", default="smooth_l1", choices=("smooth_l1", "l1", "l2"), help="paper: smooth_l1")
    add("--beta", type=float, default=0.01, help="where smooth L1 turns from square to straight (authors)")
    add("--background_weight", type=float, default=0.1, help="weight of the background of colored labels (authors)")
    add("--balance", action=BooleanOptionalAction, default=False, help="samples of little foreground count more, at most ten times, and what an image task leaves as it is counts as background (ours)")
    add("--image_weight", type=float, default=1.0, help="how much a sample counts whose label is an image (ours); with l2 its errors are small beside those of masks")
    # the data
    add("--data_fraction", type=float, default=1.0, help="share of the training cases of every dataset, at least one (paper, Figure 7)")
    add("--cases", type=int, help="at most so many training cases of every dataset (few-shot; default: all)")
    add("--dataset_weights", default="equal", metavar="RULE", help="how datasets share their group: equal (ours), size, or factors of equal shares such as deeplesion=4,acdc=2")
    add("--empty_slices", type=float, default=0.0, help="share of draws from any slice, foreground or not (authors: none)")
    add("--strict", action="store_true", help="do not start where a case cannot be used; otherwise it is named and left out")
    add("--synthetic_share", type=float, help="add the procedural tasks, as this share of the draws (default with --datasets ... synthetic: that of one dataset)")
    add("--augment", type=float, default=0.0, help="share of samples made into other tasks by turning, zooming, other contrasts (paper: none)")
    add("--close_up", type=float, default=0.0, help="share of segmentation samples that see one class from near, as infer.py does at a second look of --coloring binary (ours)")
    add("--boxes", default="lines", choices=("lines", "filled"), help="the answer of detection, lines: boxes drawn on the image (paper); filled: a mask of their insides, which infer.py draws (ours; for small models); the procedural tasks have lines either way")
    add("--workers", type=int, help="loader processes a rank (default: 8 with CUDA, else 0)")
    # the optimisation
    add("--optimizer", default="adamw", choices=("adamw", "muon"), help="adamw: paper; muon: on the blocks' matrices (ours)")
    add("--epochs", type=float, default=100, help="an epoch is as many samples as there are training slices (paper: 100)")
    add("--steps", type=int, help="number of steps, instead of --epochs")
    add("--stop_at", type=int, help="stop after this step, the schedule unchanged; --resume goes on")
    add("--batch_size", type=int, default=16, help="samples a process at once (authors: 16 on each of 8 GPUs)")
    add("--accumulate", type=int, default=1, help="batches a process and step, where one large batch does not fit (paper: 1)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (paper)")
    add("--layer_decay", type=float, help="factor of the learning rate from a block to the one before it (default: 0.8 with --init, else 1)")
    add("--warmup", type=float, default=0.05, help="share of the steps that warm up (paper: 5 of 100 epochs)")
    add("--weight_decay", type=float, default=0.05, help="on matrices (paper)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (ours)")
    # the run
    add("--seed", type=int, default=0, help="of the weights and of every draw")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (default: on with CUDA; ours)")
    add("--recompute", action=BooleanOptionalAction, help="compute activations again instead of keeping them (default: where a GPU's memory is too small)")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps on a GPU")
    add("--dry_run", action="store_true", help="say what the run draws, needs and takes, by ten measured steps, then stop")
    add("--finetune", metavar="CKPT", help="start from this model instead of fresh weights; its objective, coloring, loss and optimizer, --steps 300 and --lr 3e-4 are the defaults")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on from the last.pt of --out, or from this one; its settings are the defaults")
    add("--log_every", type=int, default=20, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints, written at the next log line")
    add("--validate_cases", type=int, default=0, help="patients of every dataset kept from training, at most a fifth, and scored at every checkpoint; best.pt keeps the best (paper: 0)")
    args = p.parse_args(argv)
    typed = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    given = {a.dest for a in p._actions if typed & set(a.option_strings)}
    if args.finetune and args.resume is None:
        saved = mvg.load_checkpoint(args.finetune)
        clash = sorted(given & {"model", "image_size", "layout", "positions", "qk_norm", "drop_path"})
        clash += ["init"] if args.init else []
        if clash:
            raise DataError(f"--finetune takes the model of {args.finetune} as it is: drop --{clash[0]}")
        recipe = saved.get("settings") or saved.get("meta") or {}
        p.set_defaults(lr=3e-4, **({} if "epochs" in given else {"steps": 300}), num_prompts=f"1-{saved['config'].get('max_prompts', 1)}",
                       **{k: recipe[k] for k in RECIPE if k in recipe})
        args = p.parse_args(argv)
    if args.resume is not None:
        args.resume = args.resume or str(Path(args.out) / "last.pt")
        saved = mvg.load_checkpoint(args.resume)
        if "optimizers" not in saved:
            raise DataError(f"{args.resume} holds a model but no run to go on with: pass the last.pt of a run folder")
        resume = args.resume
        standard = {name: p.get_default(name) for name in FIXED}  # of runs that an older version began
        p.set_defaults(**{k: v for k, v in saved["settings"].items() if k not in given and k not in ("resume", "stop_at", "device", "dry_run")})
        args = p.parse_args(argv)
        args.resume, args.out = resume, args.out if "out" in given else str(Path(resume).parent)
        for name in FIXED:
            if getattr(args, name) != (before := saved["settings"].get(name, standard[name])):
                raise DataError(f"{resume} was trained with --{name} {before}, now {getattr(args, name)}: drop --{name}, or start anew with another --out")
    words = args.num_prompts.split("-")
    low, high = (int(words[0]), int(words[-1])) if len(words) < 3 and all(w.isdigit() for w in words) else (0, 0)
    if not 1 <= low <= high:
        raise DataError(f"--num_prompts is {args.num_prompts!r}: write a number such as 1 or a range such as 1-4")
    for names, low_end, high_end, words in RANGES:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not (low_end <= value <= high_end):
                raise DataError(f"--{name} is {value}: {words}")
    return args, (low, high)


TINY, HUGE = 1e-12, 1e12
RANGES = (("seg_share mim_share hide_label empty_slices warmup synthetic_share augment close_up", 0, 1, "a share is from 0 to 1"),
          ("mask_ratio data_fraction layer_decay", TINY, 1, "above 0, at most 1"),
          ("drop_path", 0, 0.99, "a rate is from 0 to below 1"),
          ("epochs steps stop_at image_size image_weight batch_size accumulate cases lr beta clip log_every save_every", TINY, HUGE, "it must be above 0"),
          ("seed workers weight_decay background_weight validate_cases", 0, HUGE, "it must not be below 0"))

# What a model is fine-tuned with unless said otherwise: what it was trained with.
RECIPE = ("objective", "coloring", "loss", "beta", "background_weight", "balance", "image_weight", "optimizer", "mask_ratio", "hide_label", "first_term", "seg_share", "mim_share", "augment", "close_up", "boxes")

# What a resumed run must share with the run it goes on with.
FIXED = ("model", "image_size", "layout", "positions", "qk_norm", "drop_path", "objective", "seg_share", "mim_share", "mask_ratio",
         "hide_label", "first_term", "num_prompts", "coloring", "optimizer", "batch_size", "accumulate", "layer_decay", "seed", "data_fraction", "cases",
         "validate_cases", "datasets", "dataset_weights", "empty_slices", "synthetic_share", "augment", "close_up", "boxes", "bf16", "brats_pairs")


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is added (Jordan et al. 2024), as large as an AdamW step (Liu et al. 2025).

    As torch.optim.Muon, which rounds to bfloat16; a CPU without bfloat16 arithmetic takes eighty times as long for that, so that here it is float32 except with CUDA.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                kept = state["momentum_buffer"]
                kept.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(kept, group["momentum"]))  # Nesterov's
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    @staticmethod
    def orthogonal(matrix, steps=5):
        """A matrix of the same singular vectors, whose singular values are all near 1: five steps of Newton and Schulz with a quintic."""
        x = matrix.bfloat16() if matrix.is_cuda else matrix
        x = x.T if (tall := x.shape[0] > x.shape[1]) else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(steps):
            square = x @ x.T
            x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
        return (x.T if tall else x).to(matrix.dtype)


def make_optimizers(model, args):
    """AdamW with weight decay on matrices only; with muon, the blocks' matrices go to `Muon`.

    A group's "scale" is its factor of the learning rate: layer_decay ** (blocks and head above it), as for weights that come trained (Bao et al. 2022).
    """
    decay, depth = args.layer_decay or (0.8 if args.init else 1.0), model.config.depth
    muon = args.optimizer == "muon"
    groups = {}
    for name, p in model.named_parameters():
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0 if name.startswith(("embed.", "position")) else depth + 1
        matrix = muon and name.startswith("blocks.") and p.ndim == 2
        decayed = p.ndim >= 2 and name not in ("position", "stream", "role")
        groups.setdefault((matrix, not decayed, decay ** (depth + 1 - layer)), []).append(p)
    group = lambda key, p: {"params": p, "weight_decay": 0.0 if key[1] else args.weight_decay, "scale": key[2]}
    groups = {key: groups[key] for key in sorted(groups)}
    optimizers = [torch.optim.AdamW([group(k, p) for k, p in groups.items() if not k[0]], lr=args.lr, betas=(0.9, 0.999), fused=True)]  # betas: authors
    if muon:
        optimizers.append(Muon([group(k, p) for k, p in groups.items() if k[0]], lr=args.lr))
    return optimizers


def learning_rate(step, steps, args):
    """Linear warm-up, then a cosine to 0 (paper). step counts from 0."""
    warmup = max(1, round(args.warmup * steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def main(argv=None):
    args, num_prompts = parse(argv)

    # ---- where: device and ranks
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, reason = mvg.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    distributed = "RANK" in os.environ
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if distributed:  # a long timeout: the other ranks wait while the first prepares the store
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    main_rank = rank == 0
    say = (lambda *a: print(*a, flush=True)) if main_rank else (lambda *a: None)
    say(f"device {device}: {reason}; {ranks} process{'es' if ranks > 1 else ''} x batch {args.batch_size}")

    # ---- data
    synthetic = data.SYNTHETIC in (args.datasets or ()) or bool(args.synthetic_share)
    names, store = [n for n in args.datasets or () if n != data.SYNTHETIC], None
    if names or not args.datasets:  # the first rank prepares the store, the others wait to hear what it found
        found, problem = None, None
        if main_rank:
            try:
                store = data.open_store(args.data_root, args.store, names, args.brats_pairs, args.strict)
                found = list(store.datasets)
            except (ValueError, OSError) as error:
                problem = str(error)
        if distributed:
            said = [found, problem]
            dist.broadcast_object_list(said, device=device if device.type == "cuda" else None)
            found, problem = said
        if problem:  # all ranks end together, the first one says why
            raise DataError(problem) if main_rank else SystemExit(2)
        store = store or data.Store(args.store or data.default_store(args.data_root), found)
    torch.manual_seed(args.seed)
    if args.resume or args.finetune:
        model = unet.load(args.resume or args.finetune)
        if isinstance(model, mvg.MVG):
            model.config.max_prompts = max(model.config.max_prompts, num_prompts[1])
    elif args.model == "unet":
        if synthetic or len(store.datasets) != 1 or args.init:
            raise DataError(f"--model unet learns one task: name one of --datasets {' '.join(store.datasets) if store else ''}, without synthetic and --init")
        model = unet.build(*store.datasets.values(), args.image_size)
    else:
        model = mvg.build(args.model, args.image_size, args.layout, positions=args.positions, qk_norm=args.qk_norm,
                          drop_path=args.drop_path, max_prompts=num_prompts[1])
        if args.init:
            mvg.load_vit(model, args.init)
    c, specialist = model.config, isinstance(model, unet.UNet)
    if specialist and (args.augment or args.close_up or args.balance or args.boxes == "filled"):
        raise DataError("a U-Net learns its task as it is: leave --augment, --close_up, --balance and --boxes out")
    episodes = data.Episodes(store, c.image_size, c.patch, c.depth, args.seed, num_prompts, "ar" if specialist else args.objective, args.seg_share,
                             args.mim_share, args.mask_ratio, args.hide_label, args.coloring, args.first_term,
                             args.dataset_weights, args.data_fraction, args.empty_slices, synthetic, args.synthetic_share, args.augment,
                             args.cases, args.validate_cases, args.close_up, args.boxes == "filled")
    steps = args.steps or max(1, round(args.epochs * len(episodes) / (args.batch_size * args.accumulate * ranks)))
    drawn_from = [n for n in episodes.names if n not in episodes.excluded]
    say(f"{len(episodes)} training slices an epoch from {len(drawn_from)} datasets: "
        + ", ".join(f"{n} {len(episodes.cases[n])} cases" if n in episodes.cases else n for n in drawn_from))
    for name in episodes.excluded:
        say(f"{name} is left out: it has no training case with foreground")

    # ---- model
    model.meta = {"coloring": args.coloring, "objective": args.objective, "augment": args.augment, "close_up": args.close_up, "boxes": args.boxes, "datasets": drawn_from,
                  "predefined": list(episodes.predefined) if args.coloring == "predefined" else None}
    model.to(device)
    bf16 = device.type == "cuda" if args.bf16 is None else args.bf16
    if bf16 and device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("--bf16: this CPU has no bfloat16 arithmetic and would take many times as long; float32 it is")
        bf16 = False
    model.recompute = args.recompute
    if args.recompute is None and device.type == "cuda" and not specialist:
        import bench
        model.recompute = bench.cost(c, args.batch_size, "mim", bf16)[1] > 0.9 * torch.cuda.get_device_properties(device).total_memory
    optimizers = make_optimizers(model, args)
    out, first, best = Path(args.out), 0, -math.inf
    if args.resume:
        saved = mvg.load_checkpoint(args.resume, device)
        if saved["ranks"] != ranks:
            raise DataError(f"{args.resume} was trained on {saved['ranks']} processes, now {ranks}: use as many")
        if saved["meta"]["datasets"] != model.meta["datasets"]:
            raise DataError(f"{args.resume} was trained on {saved['meta']['datasets']}, here are {model.meta['datasets']}: "
                            "pass the same data, or start anew with another --out")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first, best = saved["step"], saved.get("best", best)
        if first >= min(steps, args.stop_at or steps):
            raise DataError(f"{args.resume} has done {first} steps of {min(steps, args.stop_at or steps)}: ask for more --steps")
        say(f"going on from step {first} of {args.resume}")
    if not args.dry_run:
        if (out / "last.pt").exists() and not (args.resume and (out / "last.pt").samefile(args.resume)):
            raise DataError(f"{out} already holds a run: go on with --resume, or name another --out")
        if main_rank:
            start_run_folder(out, args, model, store, episodes, steps, ranks, first)
    say(f"{args.finetune or args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, image {c.image_size}, patch {c.patch}, "
        f"{'a U-Net' if specialist else f'layout {c.layout}'}{', activations computed again' if model.recompute else ''}; {steps} steps, run folder {out}")

    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it cannot split what is computed again
        model.compile()
    step_model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) if distributed else model
    workers = args.workers if args.workers is not None else 8 if device.type == "cuda" else 0
    stop = first + MEASURED + 2 if args.dry_run else min(steps, args.stop_at or steps)
    batches = iter(torch.utils.data.DataLoader(episodes, batch_sampler=data.Steps(first, stop, args.batch_size, rank, ranks, args.accumulate),
                                               num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0))
    rows = [(o, n) for o in ("mim", "ar") for n in episodes.names]  # what the log tells apart
    window = torch.zeros(len(rows) + 1, 2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    model.train()

    def one_step(step):
        """Step number `step`, with nothing that waits for the device. Returns what was drawn, (samples, 3) on the host and whether each loss is finite, on the device."""
        drawn, errors, objective = [], [], episodes.step(step)[0]
        lr = learning_rate(step, steps, args)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * group["scale"]
        for part in range(args.accumulate):
            batch = next_batch(batches)
            drawn.append(torch.stack([batch.pop(k) for k in ("dataset", "case", "slice")], 1))
            asked = batch.pop("first").nonzero()[:, 0].to(device, non_blocking=True)  # who is asked for the first label
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            labels = batch["labels"] if specialist else data.color(batch["labels"], batch["palette"], batch["colored"])
            with step_model.no_sync() if distributed and part < args.accumulate - 1 else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss, sample_loss, _ = step_model(batch["images"], labels, objective, batch.get("hidden"), batch["colored"], batch["valid"],
                                                      asked, batch["drop"], args.loss, args.beta, args.background_weight, args.balance, args.image_weight)
                (loss / args.accumulate).backward()
            errors.append(sample_loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        update(optimizers, broken := ~torch.isfinite(norm))
        drawn, errors = torch.cat(drawn), torch.cat(errors)
        row = drawn[:, 0].to(device, non_blocking=True) + (0 if objective == "mim" else len(episodes.names))
        ok = (~broken).to(window.dtype)
        window.index_add_(0, row, torch.stack([errors.nan_to_num(0, 0, 0).to(window.dtype), torch.ones_like(errors, dtype=window.dtype)], 1) * ok)
        window[-1, 0] += 1 - ok
        return drawn, torch.isfinite(errors)

    if args.dry_run:
        dry_run(args, episodes, model, first, steps, ranks, num_prompts, device, bf16, one_step, say)
        if distributed:
            dist.destroy_process_group()
        return model

    stopping = []  # SIGTERM and Ctrl-C are noted, and read at logging steps, together on all ranks

    def note(number, frame):
        if stopping and number == signal.SIGINT:  # pressed again
            raise KeyboardInterrupt
        stopping.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}

    # ---- the loop
    seen, unwritten, since = [], [], time.time()
    done = due = saved_at = first  # steps done, when a checkpoint was last due, and the step of the one that is there
    while done < stop:
        seen.append(one_step(done))
        done += 1
        if done % args.log_every and done < stop:
            continue

        # A logging step. The log's sums stayed on the device until here.
        total, flags = window.clone(), torch.tensor([len(stopping)], device=device)
        if distributed:
            dist.all_reduce(total)
            dist.all_reduce(flags)
        total, ending = total.tolist(), bool(flags.item())
        rate = len(seen) / (time.time() - since)  # steps a second
        line = report(total, rows, done, steps, learning_rate(done - 1, steps, args), rate * args.batch_size * args.accumulate * ranks, ending)
        stop = done if ending else stop
        say(text_of(line, rate))
        if total[-1][0]:  # every rank sees the same, and names its own
            say(f"{int(total[-1][0] / ranks)} of the last steps had a loss or gradient that is not finite and were left out")
            name_the_broken(seen, episodes, main_rank)
            if all(not t[1] for t in total[:-1]):
                raise DataError(f"no step since {done - len(seen)} had a finite loss: lower --lr ({args.lr}) or look at the cases named above")
        saving = done - due >= args.save_every or done == stop
        due = done if saving else due
        if saving and args.validate_cases and not ending:
            line["validation"] = validate(model, episodes, device, rank, ranks, args.seed)
            score = float(np.mean(list(line["validation"].values()))) if line["validation"] else -math.inf
            say(f"validation at step {done}: {score:.4f} ({', '.join(f'{n} {v:.3f}' for n, v in line['validation'].items())})")
        if main_rank:
            unwritten.append(json.dumps(line) + "\n")
            try:
                unwritten = append(out / "log.jsonl", unwritten)
                if saving or saved_at < due:
                    state = {"step": done, "ranks": ranks, "settings": vars(args)}
                    if line.get("validation") and score > best:
                        mvg.save(out / "best.pt", model, score=score, **state)
                        best = score
                    mvg.save(out / "last.pt", model, best=best, optimizers=[o.state_dict() for o in optimizers], **state)
                    saved_at = done
                    draw_curve(out)
                    draw_samples(out, model, episodes, device)
            except OSError as error:
                say(f"warning: {error}; {f'last.pt holds step {saved_at} as before' if (out / 'last.pt').exists() else 'nothing is saved yet'}, "
                    "the next log line tries again")
        window.zero_()
        seen, since = [], time.time()

    for number, handler in previous.items():
        signal.signal(number, handler)
    if distributed:
        dist.barrier()
        dist.destroy_process_group()
    if main_rank and (saved_at != done or unwritten):
        raise DataError(f"{out} could not be written: {f'last.pt holds step {saved_at} of {done}' if saved_at else 'nothing is saved'}; free some space, then --resume")
    say(f"{'stopped' if stop < steps else 'finished'} after step {done} of {steps}: {out / 'last.pt'}")
    return model


def next_batch(batches):
    """The next batch. What a loader's process could not read is said in its own words, without the process's traceback."""
    try:
        return next(batches)
    except DataError as error:
        raise DataError(str(error).split("DataError: ")[-1].strip()) from error


def name_the_broken(seen, episodes, main_rank):
    """Say which of this rank's samples, [((B, 3), finite (B,))], had a loss that is not finite; all of the first rank's where it was a gradient."""
    drawn, finite = (torch.cat(t).cpu() for t in zip(*seen))
    if main_rank or not finite.all():
        cases = sorted({episodes.describe(*which) for which in (drawn if finite.all() else drawn[~finite]).tolist()})
        print(f"{'these steps drew' if finite.all() else 'not finite'}: {'; '.join(cases[:40])}", flush=True)


def update(optimizers, broken):
    """One step of the optimizers, skipped on the device, without a synchronisation, where the gradient is broken."""
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = broken.float()  # the fused kernel leaves weights and moments alone
            optimizer.grad_scale = None
        else:  # Muon knows no such flag: its momentum and weight decay go on with a gradient of zero
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.nan_to_num_(0, 0, 0).mul_((~broken).to(p.grad.dtype))
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# The run folder

def start_run_folder(out, args, model, store, episodes, steps, ranks, first):
    """config.json: settings, model, splits and machine. On resume the log is cut back to the checkpoint's step."""
    out.mkdir(parents=True, exist_ok=True)
    splits = {n: {s: sorted(c.name for c in store.split(n, s)) for s in ("train", "test")} for n in episodes.datasets}
    about = {"settings": vars(args), "model": asdict(model.config), "steps": steps, "ranks": ranks, "slices_an_epoch": len(episodes),
             "splits": splits, "held_out": {n: [c.name for c in cs] for n, cs in episodes.held.items() if cs}, "split_rules": {n: d.split for n, d in episodes.datasets.items()},
             "machine": {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine(),
                         "cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                         "started": time.strftime("%Y-%m-%d %H:%M:%S")}}
    data.write_json(out / "config.json", about)
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if first and log.exists() else []
    lines = [l for l in lines if l.endswith("\n") and json.loads(l)["step"] <= first]  # a run that was killed leaves half a line
    log.write_text("".join(lines))
    for left in out.glob("*.pt.tmp*"):
        left.unlink()


def report(total, rows, done, steps, lr, rate, ending):
    """One line of log.jsonl: mean losses since the last, by objective and dataset."""
    losses = {}
    for (objective, name), (error, count) in zip(rows, total):
        if count:
            losses.setdefault(objective, {})[name] = round(error / count, 6)
    counts = sum(t[1] for t in total[:-1])
    mean = sum(t[0] for t in total[:-1]) / max(counts, 1)
    return {"step": done, "of": steps, "loss": round(mean, 6), "losses": losses, "lr": lr, "samples_per_second": round(rate, 2),
            "skipped": int(total[-1][0]), **({"stopped": True} if ending else {})}


def append(path, lines):
    """Append lines to a file, all or, with the OSError, none of them. Returns what is left to write: nothing."""
    size = path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write("".join(lines))
    except OSError:
        os.truncate(path, size)
        raise
    return []


def clock(seconds):
    """Seconds as text: 1 h 05 min."""
    minutes = round(seconds / 60)
    return f"{minutes // 1440} d {minutes % 1440 // 60} h" if minutes >= 1440 else f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else \
        f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"


def text_of(line, rate):
    left = line["of"] - line["step"]
    parts = [f"{o} " + " ".join(f"{n} {v:.4f}" for n, v in by.items()) for o, by in line["losses"].items()]
    return (f"step {line['step']}/{line['of']}  loss {line['loss']:.4f}  [{' | '.join(parts)}]  lr {line['lr']:.2e}  "
            f"{line['samples_per_second']:.1f} samples/s" + (f"  {clock(left / rate)} left" if left else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Before the run, and beside it

MEASURED = 10  # steps of a dry run that are timed, after two that are not


def dry_run(args, episodes, model, first, steps, ranks, num_prompts, device, bf16, one_step, say):
    """What the run draws, computes, needs and takes, as text; the steps are taken, and nothing is kept."""
    import bench
    say(f"\n{'dataset':32} {'task':12} {'cases':>6} {'slices':>8} {'share':>7} {'draws an epoch':>15}")
    for group, share in ((True, episodes.seg_share), (False, 1 - episodes.seg_share)):
        for name, weight in zip(episodes.groups[group], episodes.weights[group]):
            task = episodes.datasets[name].task if name in episodes.datasets else "segmentation" if group else "images"
            cases, slices = len(episodes.cases.get(name, ())) or "", len(episodes.slices.get(name, ())) or ""
            say(f"{name:32} {task:12} {cases:>6} {slices:>8} {share * weight:>7.1%} {share * weight * len(episodes):>15.0f}")
    batch, known = args.batch_size * args.accumulate * ranks, model.recompute
    mim = float(np.mean([episodes.step(s)[0] == "mim" for s in range(1000)]))
    say(f"\n{steps} steps of {ranks} x {args.accumulate} x {args.batch_size} samples, {len(episodes) / batch:.1f} an epoch, {steps * batch / len(episodes):.1f} epochs; {mim:.0%} of the steps mim")
    costs = {o: (share, *bench.cost(model.config, args.batch_size, o, bf16, known, pairs=2 if o == "mim" else num_prompts[1] + 1))
             for o, share in (("mim", mim), ("ar", 1 - mim)) if share and isinstance(model, mvg.MVG)}
    flops = sum(share * count for share, count, _ in costs.values()) / args.batch_size
    if costs:
        say(f"{flops / 1e12:.4f} TFLOP a sample, {flops * batch / 1e12:.3f} a step (counted, forward and backward{', activations computed again' if known else ''})")
        say(f"{max(m for _, _, m in costs.values()) / 1e9:.2f} GB a process at the peak (computed: weights, gradients, moments, activations)")
    seconds = []
    for step in range(MEASURED + 2):
        start = time.perf_counter()
        one_step(first + step)[1].sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    seconds = float(np.mean(seconds[2:]))
    if device.type == "cuda":
        say(f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB a GPU measured, of {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}")
    say(f"{seconds:.3f} s a step (mean of {MEASURED}), {batch / seconds:.1f} samples/s, {f'{flops * batch / seconds / 1e12:.3f} TFLOP/s; ' if costs else ''}"
        f"an epoch {clock(seconds * len(episodes) / batch)}, the run {clock(seconds * steps)}. Dry run: nothing was written but the prepared store.")


@torch.no_grad()
def validate(model, episodes, device, rank, ranks, seed):
    """The score of every dataset with held-out cases, by eval.py's protocol, {name: mIoU, box IoU or SSIM}; the ranks share the cases."""
    import eval as evaluation
    names = [n for n in episodes.datasets if episodes.held[n] and episodes.cases.get(n)]
    sums = torch.zeros(len(names), 2, dtype=torch.float32, device=device)
    model.eval()
    cases = [(i, case) for i, n in enumerate(names) for case in episodes.held[n] if any(t.kind == case.kind for t in episodes.cases[n])]
    for i, case in cases[rank::ranks]:
        dataset = episodes.datasets[names[i]]
        answer = evaluation.answer_case(model, case, episodes.cases[names[i]], dataset, "foreground", seed, votes=1)
        scores = evaluation.summary([evaluation.score(answer["prediction"], answer, dataset)], [case.patient], dataset)
        score = next(scores[m] for m in ("mIoU", "box_IoU", "SSIM") if m in scores)
        if score is not None:
            sums[i] += torch.tensor([score, 1.0], device=device)
    model.train()
    if ranks > 1:
        dist.all_reduce(sums)
    return {n: round(s / count, 6) for n, (s, count) in zip(names, sums.tolist()) if count}


def draw_curve(out):
    """loss.png from log.jsonl: every dataset's loss under its objective. Nothing without matplotlib."""
    try:
        plt = data.pyplot()
    except ImportError:
        return
    curves, scores = {}, {}
    for line in (json.loads(l) for l in (out / "log.jsonl").read_text().splitlines()):
        for objective, by in line["losses"].items():
            for name, value in by.items():
                curves.setdefault((objective, name), []).append((line["step"], value))
        for name, value in line.get("validation", {}).items():
            scores.setdefault(name, []).append((line["step"], value))
    figure, axes = plt.subplots(1, 1 + bool(scores), figsize=(8 + 6 * bool(scores), 5), squeeze=False)
    for (objective, name), points in sorted(curves.items()):
        axes[0, 0].plot(*zip(*points), "-" if objective == "ar" else "--", label=f"{name} ({objective})", linewidth=1)
    axes[0, 0].set(xlabel="step", ylabel="loss", yscale="log")
    for name, points in sorted(scores.items()):
        axes[0, 1].plot(*zip(*points), ".-", label=name, linewidth=1)
        axes[0, 1].set(xlabel="step", ylabel="held-out cases: mIoU, box IoU or SSIM", ylim=(0, 1))
    for axis in axes[0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    plt.close(figure)


@torch.no_grad()
def draw_samples(out, model, episodes, device):
    """samples.png: a row a dataset with prompt, its label, image, label, prediction, in the colors of training. Needs Pillow."""
    try:
        from PIL import Image
    except ImportError:
        return
    rows, step = {}, 0
    while len(rows) < len(episodes.names) - len(episodes.excluded) and step < 200:  # the same draws every time
        for i in range(4):
            s = episodes[step, i]
            name = episodes.names[s["dataset"]]
            if name not in rows and len(s["images"]) >= 2:
                rows[name] = s
        step += 1
    model.eval()
    picture = []
    for name in sorted(rows):
        s = {k: v[None].to(device) for k, v in rows[name].items() if torch.is_tensor(v)}
        labels = data.color(s["labels"], s["palette"], s["colored"])
        if isinstance(model, unet.UNet):
            painted = model.paint(s["images"][:, -1]).float()
            answer = painted.argmax(1, keepdim=True) if model.config.classes else painted  # classes, in the colors of the sample
            prediction = data.color(answer[:, None].to(s["labels"].dtype), s["palette"], s["colored"])[:, 0]
        elif episodes.objective == "ar" or episodes.objective == "hybrid" and s["colored"]:
            prediction = model.predict(model.encode_prompts(s["images"][:, :-1], labels[:, :-1]), s["images"][:, -1])
        else:
            prediction = model.predict_canvas(s["images"][:, -2], labels[:, -2], s["images"][:, -1])
        tiles = [s["images"][:, -2], labels[:, -2], s["images"][:, -1], labels[:, -1], prediction]
        picture.append(torch.cat([t[0, 0].cpu() for t in tiles], 1))
    model.train()
    grid = (torch.cat(picture).clamp(0, 1) * 255).byte().numpy()
    zoom = max(1, 128 // episodes.image_size)
    Image.fromarray(np.kron(grid, np.ones((zoom, zoom), np.uint8))).save(out / "samples.png")


if __name__ == "__main__":
    data.command_line(main)
