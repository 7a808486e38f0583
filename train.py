"""Section 4.1, training: one model on every dataset found, by the paper's recipe.

    torchrun --nproc_per_node=8 train.py --data_root DIR            the paper's eight GPUs
    python train.py --data_root DIR --model demo --steps 500        minutes on a laptop
    python train.py --data_root DIR --layout paper --set loss=l1    another recipe (recipe.py)

The first run reads every case once into the prepared store; later ones need only `--store`. The
run folder (--out) is that of running/folder.py. `--resume` goes on where its last.pt stopped, bit
for bit on a CPU. `--dry_run` says what a run will cost.
"""

import math

import torch
from torch.utils.data import DataLoader

import mvg
from coloring import color
from data import BatchSampler, ContextSamples
from objectives import LOSSES
from recipe import parse
from running.checkpoints import load_vit, resized
from running.folder import Run
from running.muon import Muon
from running.ranks import (Interrupts, Ranks, compile_if_it_works, find_data, find_pool,
                           use_bf16)
from scans.volumes import DataError, command_line


# -------------------------------------------------------------------------------------------------
# The optimizer and the schedule

def make_optimizers(model, recipe):
    """AdamW with weight decay on matrices only; with muon the blocks' matrices go to `Muon`.

    A group's "scale" is its factor of the learning rate: layer_decay ** (blocks and head above
    it), for weights that come trained (Bao et al. 2022).
    """
    depth, muon = model.config.depth, recipe.optimizer == "muon"
    decay = recipe.layer_decay or (0.8 if recipe.init else 1.0)
    groups = {}
    for name, p in model.named_parameters():
        layer = depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("embed.", "position")):
            layer = 0
        matrix = muon and name.startswith("blocks.") and p.ndim == 2
        decayed = p.ndim >= 2 and name not in ("position", "stream", "role")
        groups.setdefault((matrix, not decayed, decay ** (depth + 1 - layer)), []).append(p)
    of_adamw, of_muon = [], []
    for matrix, free, scale in sorted(groups):
        group = {"params": groups[matrix, free, scale], "scale": scale,
                 "weight_decay": 0.0 if free else recipe.weight_decay}
        (of_muon if matrix else of_adamw).append(group)
    betas = (0.9, 0.999)  # authors
    optimizers = [torch.optim.AdamW(of_adamw, lr=recipe.lr, betas=betas, fused=True)]
    if muon:
        optimizers.append(Muon(of_muon, lr=recipe.lr))
    return optimizers


def learning_rate(step, steps, recipe):
    """Linear warm-up, then a cosine (paper) to 0. step counts from 0."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(optimizers, broken):
    """One step of the optimizers, which changes nothing where `broken` (a tensor) is True.

    Nothing waits for the device.
    """
    for optimizer in optimizers:
        optimizer.found_inf, optimizer.grad_scale = broken.float(), None  # torch's step reads both
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------
# The parts of a run

def make_model(args, recipe, store):
    """The model of a run with its first weights, and the losses that train it."""
    names = ("layout", "positions", "qk_norm", "gate", "drop_path")
    start = args.resume or args.finetune
    if start or recipe.model == "unet":
        from lab import unet
        model = unet.load_any(start) if start else unet.build_for(store, recipe)
        if isinstance(model, unet.UNet):
            unet.check(recipe)
            return model, {"ar": unet.loss}
        model = resized(model, recipe.image_size)
    else:
        model = mvg.build(recipe.model, recipe.image_size,
                          **{name: getattr(recipe, name) for name in names})
        if recipe.init:
            load_vit(model, recipe.init)
    model.config.max_prompts = max(model.config.max_prompts, recipe.prompt_range[1])
    return model, LOSSES


def make_batches(samples, first, stop, workers, ranks):
    """The batches of this rank for the steps from `first` up to `stop`."""
    cuda, recipe = ranks.device.type == "cuda", samples.recipe
    if workers is None:
        workers = 8 if cuda else 0
    sampler = BatchSampler(first, stop, recipe.batch_size, recipe.accumulate,
                           ranks.rank, ranks.count)
    return iter(DataLoader(samples, batch_sampler=sampler, collate_fn=samples.collate,
                           num_workers=workers, persistent_workers=workers > 0, pin_memory=cuda))


def next_batch(batches, device):
    """The next `Slices`, on the device. A loader process's error is said in its own words."""
    try:
        return next(batches).to(device)
    except DataError as error:
        raise DataError(str(error).split("DataError: ")[-1].strip()) from error


# -------------------------------------------------------------------------------------------------
# The run

def main(argv=None):
    args, recipe = parse(argv)
    ranks = Ranks(args.device)
    ranks.say(f"device {ranks.device}: {ranks.reason}; {ranks.count} "
              f"process{'es' if ranks.count > 1 else ''} x batch {recipe.batch_size}")
    store = find_data(args, recipe, ranks)
    torch.manual_seed(recipe.seed)
    model, losses = make_model(args, recipe, store)
    pool = find_pool(args, recipe, ranks, model.config.image_size)
    samples = ContextSamples(store, recipe, model.config, pool)
    bf16 = use_bf16(recipe, ranks)
    model.to(ranks.device)
    model.recompute = args.recompute
    if args.recompute is None and ranks.device.type == "cuda":
        from lab.bench import needs_recompute
        model.recompute = needs_recompute(model, recipe, ranks.device, bf16)
    optimizers = make_optimizers(model, recipe)
    if args.dry_run:
        from lab.bench import DryRun
        run = DryRun(args, recipe, samples, ranks, model)
    else:
        run = Run(args, recipe, samples, ranks, model)
    run.start(optimizers)
    compile_if_it_works(model, args.compile, ranks, bf16)
    try:
        train(run, losses, optimizers, bf16)
    except RuntimeError as error:  # torch raises it wherever the program is just then
        if "DataLoader worker" not in str(error):
            raise
        raise DataError("a loader process was killed, as a system does when memory runs out: "
                        "pass fewer --workers, and go on with --resume") from error
    return run.end()


def train(run, losses, optimizers, bf16):
    """The loop: from a batch to a step, and now and then a log line and a checkpoint."""
    recipe, samples, device, model = run.recipe, run.samples, run.ranks.device, run.model
    wrapped = run.ranks.wrap(model)
    batches = make_batches(samples, run.step, run.stop, run.args.workers, run.ranks)
    model.train()
    with Interrupts() as interrupts:
        for step in range(run.step, run.stop):
            objective = samples.switch(step)[0]  # "mim" | "ar": one a step, on all ranks
            lr = learning_rate(step, run.steps, recipe)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = lr * group["scale"]
            for part in range(recipe.accumulate):
                batch = samples.make(next_batch(batches, device), step, part, run.ranks.rank)
                labels = color(batch.labels, batch.palette, batch.colored)  # (B, S, 1, H, W)
                wrapped.require_backward_grad_sync = part == recipe.accumulate - 1
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    error = losses[objective](wrapped, batch, labels, recipe)  # (B,)
                (error.mean() / recipe.accumulate).backward()
                run.log.add(objective, batch.drawn, error.detach())  # stays on the device
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            broken = ~torch.isfinite(norm)
            update(optimizers, broken)
            run.average(step)
            run.log.end_step(broken)
            if (step + 1) % run.args.log_every == 0 or step + 1 == run.stop:
                run.report(step + 1, lr, interrupted=bool(interrupts.noted))  # waits for the device
                with torch.compiler.set_stance("force_eager"):  # other shapes: nothing compiles
                    run.write(optimizers)
                if run.ended:
                    break


if __name__ == "__main__":
    command_line(main)
