"""Train one model on every dataset found: the paper's recipe (section 4.1) in one loop that reads top to bottom.

    python train.py --data_root DIR                            one process: CPU, Apple GPU or CUDA, whatever is there
    torchrun --nproc_per_node=8 train.py --data_root DIR       eight GPUs, the paper's setting
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --data_root DIR
    python train.py --data_root DIR --model demo --steps 500   minutes on a laptop

The first run reads every case once into the prepared store; later ones start at once, and `--store DIR` alone trains
without the data root. The run folder (--out) holds config.json, log.jsonl, last.pt, samples.png and loss.png.
`--resume` goes on where last.pt stopped, bit for bit on CPU.
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
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import mvg
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
    add("--model", default="large", choices=list(mvg.SIZES), help="size; the paper names none, large is the authors'")
    add("--image_size", type=int, help="side of the crop in pixels (default: 448, the paper's; 64 for the demo size)")
    add("--layout", default="fused", choices=("fused", "sequence"), help="fused: authors; sequence: the paper's text")
    add("--positions", default="rope", choices=("rope", "learned"), help="rope: ours, beside learned ones; learned: the paper's vanilla ViT")
    add("--qk_norm", action=BooleanOptionalAction, default=True, help="normalise queries and keys (ours)")
    add("--drop_path", type=float, default=0.1, help="largest drop rate of a block's branches (authors)")
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
    # the data
    add("--data_fraction", type=float, default=1.0, help="share of the training cases of every dataset, at least one (paper, Figure 7)")
    add("--dataset_weights", default="equal", choices=("equal", "size"), help="how datasets share their group (ours: equal)")
    add("--empty_slices", type=float, default=0.0, help="share of draws from any slice, foreground or not (authors: none)")
    add("--strict", action="store_true", help="do not start where a case cannot be used; otherwise it is named and left out")
    add("--synthetic_share", type=float, help="add the procedural tasks, as this share of the draws (default with --datasets ... synthetic: that of one dataset)")
    add("--augment", type=float, default=0.0, help="share of samples made into other tasks by turning, zooming, other contrasts (paper: none)")
    add("--workers", type=int, help="loader processes a rank (default: 8 with CUDA, else 0)")
    # the optimisation
    add("--optimizer", default="adamw", choices=("adamw", "muon"), help="adamw: paper; muon: on the blocks' matrices, torch 2.9 and newer (ours)")
    add("--epochs", type=float, default=100, help="an epoch is as many samples as there are training slices (paper: 100)")
    add("--steps", type=int, help="number of steps, instead of --epochs")
    add("--stop_at", type=int, help="stop after this step, the schedule unchanged; --resume goes on")
    add("--batch_size", type=int, default=16, help="samples a process and step (authors: 16 on each of 8 GPUs)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (paper)")
    add("--warmup", type=float, default=0.05, help="share of the steps that warm up (paper: 5 of 100 epochs)")
    add("--weight_decay", type=float, default=0.05, help="on matrices (paper)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (ours)")
    # the run
    add("--seed", type=int, default=0, help="of the weights and of every draw")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--bf16", action=BooleanOptionalAction, help="bfloat16 autocast (default: on with CUDA; ours)")
    add("--finetune", metavar="CKPT", help="start from this model instead of fresh weights; its objective, coloring, loss and optimizer, --steps 300 and --lr 3e-4 are the defaults")
    add("--resume", nargs="?", const="", metavar="CKPT", help="go on from the last.pt of --out, or from this one; its settings are the defaults")
    add("--log_every", type=int, default=20, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints, written at the next log line")
    args = p.parse_args(argv)
    typed = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    given = {a.dest for a in p._actions if typed & set(a.option_strings)}
    if args.finetune and args.resume is None:
        saved = mvg.load_checkpoint(args.finetune)
        clash = sorted(given & {"model", "image_size", "layout", "positions", "qk_norm", "drop_path"})
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
        p.set_defaults(**{k: v for k, v in saved["settings"].items() if k not in given and k not in ("resume", "stop_at", "device")})
        args = p.parse_args(argv)
        args.resume, args.out = resume, args.out if "out" in given else str(Path(resume).parent)
        for name in FIXED:
            if getattr(args, name) != saved["settings"].get(name):
                raise DataError(f"{resume} was trained with --{name} {saved['settings'].get(name)}, now {getattr(args, name)}: "
                                f"drop --{name}, or start anew with another --out")
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
RANGES = (("seg_share mim_share hide_label empty_slices warmup synthetic_share augment", 0, 1, "a share is from 0 to 1"),
          ("mask_ratio data_fraction", TINY, 1, "a share above 0, at most 1"),
          ("drop_path", 0, 0.99, "a rate is from 0 to below 1"),
          ("epochs steps stop_at image_size batch_size lr beta clip log_every save_every", TINY, HUGE, "it must be above 0"),
          ("seed workers weight_decay background_weight", 0, HUGE, "it must not be below 0"))

# What a model is fine-tuned with unless said otherwise: what it was trained with.
RECIPE = ("objective", "coloring", "loss", "beta", "background_weight", "optimizer", "mask_ratio", "hide_label", "first_term", "seg_share", "mim_share")

# What a resumed run must share with the run it goes on with.
FIXED = ("model", "image_size", "layout", "positions", "qk_norm", "drop_path", "objective", "seg_share", "mim_share", "mask_ratio",
         "hide_label", "first_term", "num_prompts", "coloring", "optimizer", "batch_size", "seed", "data_fraction", "datasets",
         "dataset_weights", "empty_slices", "synthetic_share", "augment", "bf16", "brats_pairs")


def make_optimizers(model, args):
    """AdamW with weight decay on matrices only; with muon, the blocks' matrices go to torch.optim.Muon."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    muon = args.optimizer == "muon"
    if muon and not hasattr(torch.optim, "Muon"):
        raise DataError(f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}: update torch, or use adamw")
    taken = {id(p) for p in matrices} if muon else set()
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in taken]
    decayed = lambda n, p: p.ndim >= 2 and n not in ("position", "stream", "role")
    groups = [{"params": [p for n, p in rest if decayed(n, p)], "weight_decay": args.weight_decay},
              {"params": [p for n, p in rest if not decayed(n, p)], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)]  # betas: authors
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
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
        model = mvg.load(args.resume or args.finetune)
        model.config.max_prompts = max(model.config.max_prompts, num_prompts[1])
    else:
        model = mvg.build(args.model, args.image_size, args.layout, positions=args.positions, qk_norm=args.qk_norm,
                          drop_path=args.drop_path, max_prompts=num_prompts[1])
    c = model.config
    episodes = data.Episodes(store, c.image_size, c.patch, c.depth, args.seed, num_prompts, args.objective, args.seg_share,
                             args.mim_share, args.mask_ratio, args.hide_label, args.coloring, args.first_term,
                             args.dataset_weights, args.data_fraction, args.empty_slices, synthetic, args.synthetic_share, args.augment)
    steps = args.steps or max(1, round(args.epochs * len(episodes) / (args.batch_size * ranks)))
    drawn_from = [n for n in episodes.names if n not in episodes.excluded]
    say(f"{len(episodes)} training slices an epoch from {len(drawn_from)} datasets: "
        + ", ".join(f"{n} {len(episodes.cases[n])} cases" if n in episodes.cases else n for n in drawn_from))
    for name in episodes.excluded:
        say(f"{name} is left out: it has no training case with foreground")

    # ---- model
    model.meta = {"coloring": args.coloring, "objective": args.objective, "augment": args.augment, "datasets": drawn_from,
                  "predefined": list(episodes.predefined) if args.coloring == "predefined" else None}
    model.to(device)
    optimizers = make_optimizers(model, args)
    out, first = Path(args.out), 0
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
        first = saved["step"]
        if first >= min(steps, args.stop_at or steps):
            raise DataError(f"{args.resume} has done {first} steps of {min(steps, args.stop_at or steps)}: ask for more --steps")
        say(f"going on from step {first} of {args.resume}")
    if (out / "last.pt").exists() and not (args.resume and (out / "last.pt").samefile(args.resume)):
        raise DataError(f"{out} already holds a run: go on with --resume, or name another --out")
    if main_rank:
        start_run_folder(out, args, model, store, episodes, steps, ranks, first)
    say(f"{args.finetune or args.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, image {c.image_size}, patch {c.patch}, "
        f"layout {c.layout}; {steps} steps, run folder {out}")

    step_model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None) if distributed else model
    workers = args.workers if args.workers is not None else 8 if device.type == "cuda" else 0
    stop = min(steps, args.stop_at or steps)
    loader = torch.utils.data.DataLoader(episodes, batch_sampler=data.Steps(first, stop, args.batch_size, rank, ranks),
                                         num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    stopping = []  # SIGTERM and Ctrl-C are noted, and read at logging steps, together on all ranks

    def note(number, frame):
        if stopping and number == signal.SIGINT:  # pressed again
            raise KeyboardInterrupt
        stopping.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}

    # ---- the loop
    rows = [(o, n) for o in ("mim", "ar") for n in episodes.names]  # what the log tells apart
    window = torch.zeros(len(rows) + 1, 2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    seen, since, drawn, saved_at = [], time.time(), 0, first
    model.train()
    for step, batch in enumerate(loader, start=first):  # step: those done before this one
        where = [batch.pop(k) for k in ("dataset", "case", "slice")]
        objective = episodes.step(step)[0]
        asked = batch.pop("first").nonzero()[:, 0].to(device, non_blocking=True)  # who is asked for the first label
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        labels = data.color(batch["labels"], batch["palette"], batch["colored"])
        lr = learning_rate(step, steps, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" if args.bf16 is None else args.bf16):
            loss, sample_loss, _ = step_model(batch["images"], labels, objective, batch.get("hidden"), batch["colored"], batch["valid"],
                                              asked, batch["drop"], args.loss, args.beta,
                                              args.background_weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        update(optimizers, broken := ~torch.isfinite(norm))

        # The log's sums stay on the device until a logging step.
        row = where[0].to(device) + (0 if objective == "mim" else len(episodes.names))
        ok = (~broken).to(window.dtype)
        window.index_add_(0, row, torch.stack([sample_loss.nan_to_num(0, 0, 0).to(window.dtype), torch.ones_like(sample_loss, dtype=window.dtype)], 1) * ok)
        window[-1, 0] += 1 - ok
        seen.append(torch.stack(where, 1))
        drawn += len(where[0]) * ranks

        done = step + 1
        if done % args.log_every == 0 or done == stop:
            total = window.clone()
            flags = torch.tensor([len(stopping)], device=device)
            if distributed:
                dist.all_reduce(total)
                dist.all_reduce(flags)
            total, ending = total.tolist(), bool(flags.item())
            line = report(total, rows, done, steps, lr, drawn / (time.time() - since), ending)
            if main_rank:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            say(text_of(line))
            if total[-1][0]:  # every rank sees the same
                cases = {episodes.describe(*which) for which in torch.cat(seen).tolist()}
                say(f"{int(total[-1][0] / ranks)} of the last steps had a loss that is not finite and were left out; "
                    f"this window drew {'; '.join(sorted(cases)[:40])}")
                if all(not t[1] for t in total[:-1]):
                    raise DataError(f"no step since {done - len(seen)} had a finite loss: lower --lr ({args.lr}) or look at the cases named above")
            stop = done if ending else stop
            if main_rank and (done - saved_at >= args.save_every or done == stop):
                mvg.save(out / "last.pt", model, step=done, ranks=ranks, settings=vars(args), optimizers=[o.state_dict() for o in optimizers])
                draw_curve(out)
                draw_samples(out, model, episodes, device)
                saved_at = done
            window.zero_()
            seen, since, drawn = [], time.time(), 0
        if done == stop:
            break

    for number, handler in previous.items():
        signal.signal(number, handler)
    if distributed:
        dist.barrier()
        dist.destroy_process_group()
    say(f"{'stopped' if stop < steps else 'finished'} after step {max(stop, first)} of {steps}: {out / 'last.pt'}")
    return model


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
             "splits": splits, "split_rules": {n: d.split for n, d in episodes.datasets.items()},
             "machine": {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.machine(),
                         "cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                         "started": time.strftime("%Y-%m-%d %H:%M:%S")}}
    data.write_json(out / "config.json", about)
    log = out / "log.jsonl"
    lines = [l for l in log.read_text().splitlines() if json.loads(l)["step"] <= first] if first and log.exists() else []
    log.write_text("".join(l + "\n" for l in lines))


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


def text_of(line):
    left = (line["of"] - line["step"])
    parts = [f"{o} " + " ".join(f"{n} {v:.4f}" for n, v in by.items()) for o, by in line["losses"].items()]
    return (f"step {line['step']}/{line['of']}  loss {line['loss']:.4f}  [{' | '.join(parts)}]  lr {line['lr']:.2e}  "
            f"{line['samples_per_second']:.1f} samples/s" + (f"  {left} steps left" if left else ""))


def draw_curve(out):
    """loss.png from log.jsonl: every dataset's loss under its objective. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = {}
    for line in (json.loads(l) for l in (out / "log.jsonl").read_text().splitlines()):
        for objective, by in line["losses"].items():
            for name, value in by.items():
                curves.setdefault((objective, name), []).append((line["step"], value))
    figure, axis = plt.subplots(figsize=(8, 5))
    for (objective, name), points in sorted(curves.items()):
        axis.plot(*zip(*points), "-" if objective == "ar" else "--", label=f"{name} ({objective})", linewidth=1)
    axis.set(xlabel="step", ylabel="loss", yscale="log")
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
        if episodes.objective == "ar" or episodes.objective == "hybrid" and s["colored"]:
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
