"""The run folder of a training: config.json, log.jsonl, last.pt, best.pt, samples.png, loss.png.

Where a moving average of the weights is kept (`average`), it is the model of both checkpoints, of
the scores and of the pictures; last.pt holds the weights in training besides.
What happens at a logging step is here, so that the loop of train.py holds nothing but the method.
Every file is written whole or not at all. A full disk costs no run: the next log line tries again.
"""

import copy
import json
import math
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

import mvg
from figures import answer_sample, draw_loss, draw_samples
from metrics import case_values
from report import clock
from running.checkpoints import load_checkpoint
from scans.volumes import DataError, read_json, write_json

OBJECTIVES = ("mim", "ar")
UNKNOWN = 10 ** 7  # steps


class LossLog:
    """Losses by objective and dataset since the last log line. The sums stay on the device."""

    def __init__(self, names, device):
        self.rows = [(objective, name) for objective in OBJECTIVES for name in names]
        kind = torch.float32 if device.type == "mps" else torch.float64
        # A row for each of them, sum and count; in the last row the steps that were left out.
        self.sums = torch.zeros(len(self.rows) + 1, 2, dtype=kind, device=device)
        self.now, self.drawn, self.finite, self.steps = [], [], [], 0

    def add(self, objective, drawn, losses):
        """A batch: drawn (B, 3) numbers of dataset, case and slice; losses (B,), detached."""
        first = OBJECTIVES.index(objective) * (len(self.rows) // 2)
        self.now.append((first + drawn[:, 0], losses))
        self.drawn.append(drawn)
        self.finite.append(torch.isfinite(losses))

    def end_step(self, broken):
        """The step is over. One with a broken gradient (a bool tensor) changed nothing."""
        sound = (~broken).to(self.sums.dtype)
        for rows, losses in self.now:
            finite = losses.nan_to_num(0, 0, 0).to(self.sums.dtype)
            both = torch.stack([finite, torch.ones_like(finite)], 1)
            self.sums.index_add_(0, rows, both * sound)
        self.sums[-1, 0] += 1 - sound
        self.now, self.steps = [], self.steps + 1

    def read(self, interrupted, distributed):
        """(sums by row, steps left out, was a rank interrupted?), of all ranks, as numbers.

        Here the device is waited for.
        """
        total = self.sums.clone()
        total[-1, 1] = float(interrupted)
        if distributed:
            dist.all_reduce(total)
        self.sums.zero_()
        return total[:-1].tolist(), total[-1, 0].item(), bool(total[-1, 1].item())

    def of_broken_steps(self):
        """Numbers (n, 3) of this rank's samples whose loss was not finite; and were there any?

        All of them where every loss was finite, and so it was a gradient that was not.
        """
        drawn, finite = torch.cat(self.drawn).cpu(), torch.cat(self.finite).cpu()
        return (drawn, False) if finite.all() else (drawn[~finite], True)

    def forget(self):
        self.drawn, self.finite, self.steps = [], [], 0


class Run:
    """A training's folder and how far it has come."""

    def __init__(self, args, recipe, samples, ranks, model):
        self.args, self.recipe, self.samples = args, recipe, samples
        self.ranks, self.model, self.out = ranks, model, Path(args.out)
        self.batch = recipe.batch_size * recipe.accumulate * ranks.count
        self.steps = args.steps or max(1, round(args.epochs * len(samples) / self.batch))
        if args.minutes:  # until the first log line nobody knows how many steps they are
            self.steps = UNKNOWN
        self.spent, self.begun = 0.0, time.time()  # seconds: before a --resume, and since when
        self.pace = None  # steps a second, smoothed
        self.stop = min(self.steps, args.stop_at or self.steps)
        self.step, self.best, self.is_best, self.ended = 0, -math.inf, False, False
        self.log, self.unwritten = LossLog(samples.names, ranks.device), []
        # What is scored, shown and shipped: the weights, or their moving average.
        self.shown = copy.deepcopy(model) if recipe.average else model

    # ---- the beginning

    def start(self, optimizers):
        """Say what is trained on; on --resume restore it; make the folder. Raises DataError."""
        samples, recipe, model = self.samples, self.recipe, self.model
        drawn = [n for n in samples.names if n not in samples.excluded]
        model.meta = {
            "coloring": recipe.coloring, "objective": recipe.objective, "augment": recipe.augment,
            "boxes": recipe.boxes, "datasets": drawn,
            "predefined": list(samples.predefined) if recipe.coloring == "predefined" else None}
        self.shown.meta = model.meta
        if self.args.resume:
            self.restore(optimizers)
        self.saved_at = self.due = self.step
        self.describe(drawn)
        self.open_folder()
        self.since = time.time()

    def describe(self, drawn):
        samples, c, say = self.samples, self.model.config, self.ranks.say
        counts = [f"{n} {len(samples.cases[n])} cases" if n in samples.cases else n for n in drawn]
        say(f"{len(samples)} training slices an epoch from {len(drawn)} datasets: "
            + ", ".join(counts))
        for name in samples.excluded:
            say(f"{name} is left out: it has no training case with foreground")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        layout = f"layout {c.layout}" if isinstance(self.model, mvg.MVG) else "a U-Net"
        again = ", activations computed again" if self.model.recompute else ""
        say(f"{self.args.finetune or self.recipe.model}: {millions:.1f} M parameters, image "
            f"{c.image_size}, patch {c.patch}, {layout}{again}; "
            + (f"{self.args.minutes:g} minutes, " if self.args.minutes else f"{self.steps} steps, ")
            + f"run folder {self.out}")

    def restore(self, optimizers):
        path, model, ranks = self.args.resume, self.model, self.ranks
        saved = load_checkpoint(path, ranks.device)
        if saved["ranks"] != ranks.count:
            raise DataError(f"{path} was trained on {saved['ranks']} processes, "
                            f"now {ranks.count}: use as many")
        if saved["meta"]["datasets"] != model.meta["datasets"]:
            raise DataError(f"{path} was trained on {saved['meta']['datasets']}, here are "
                            f"{model.meta['datasets']}: pass the same data, or start anew with "
                            "another --out")
        config = self.out / "config.json"
        if config.exists():
            self.check_splits(path, read_json(config).get("splits", {}))
        if saved["step"] >= self.stop:
            raise DataError(f"{path} has done {saved['step']} steps of {self.stop}: "
                            "ask for more --steps")
        self.shown.load_state_dict(saved["model"])
        model.load_state_dict(saved.get("trained", saved["model"]))
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        self.step, self.best, self.spent = saved["step"], saved["best"], saved.get("spent", 0.0)
        self.pace = saved.get("pace")
        if self.args.minutes and self.pace:
            self.plan_steps()
        ranks.say(f"going on from step {self.step} of {path}")

    def splits(self):
        """{dataset: {"train" | "test": names of its cases}}"""
        return {n: {s: sorted(c.name for c in self.samples.store.split(n, s))
                    for s in ("train", "test")} for n in self.samples.datasets}

    def check_splits(self, path, before):
        """Raise DataError where a case is not in the split that it had when the run began."""
        for name, now in self.splits().items():
            of = [{case: split for split, cases in splits.items() for case in cases}
                  for splits in (before.get(name, now), now)]
            for case in sorted(of[0] | of[1]):
                was, is_now = (splits.get(case, "not there") for splits in of)
                if was != is_now:
                    raise DataError(f"{path}: {name} has another split than the run began with, "
                                    f"{case} was {was} and is {is_now}: put the cases back, or "
                                    "start anew with another --out")

    def open_folder(self):
        """config.json; on --resume the log is cut back to the checkpoint's step."""
        last, samples = self.out / "last.pt", self.samples
        if last.exists() and not (self.args.resume and last.samefile(self.args.resume)):
            raise DataError(f"{self.out} already holds a run: go on with --resume, "
                            "or name another --out")
        if not self.ranks.main:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = locked(self.out)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write_json(self.out / "config.json", {
            "recipe": asdict(self.recipe), "run": vars(self.args), "steps": self.steps,
            "model": asdict(self.model.config), "ranks": self.ranks.count,
            "slices_an_epoch": len(samples), "splits": self.splits(),
            "held_out": {n: [c.name for c in cases] for n, cases in samples.held.items() if cases},
            "split_rules": {n: d.split for n, d in samples.datasets.items()},
            "machine": {"torch": torch.__version__, "python": platform.python_version(),
                        "processor": platform.machine(), "cpus": os.cpu_count(), "gpu": gpu,
                        "started": time.strftime("%Y-%m-%d %H:%M:%S")}})
        log = self.out / "log.jsonl"
        lines = []
        # A run that was killed leaves half a line, or steps that were logged and not saved.
        try:
            if self.step and log.exists():
                lines = log.read_text().splitlines(keepends=True)
            lines = [l for l in lines if l.endswith("\n") and json.loads(l)["step"] <= self.step]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{log} has a line that is no log line: repair or remove it") from None
        log.write_text("".join(lines))
        for left in self.out.glob("*.pt.tmp*"):
            left.unlink()

    def average(self, step):
        """Move the average of the weights on after a step; early on it forgets faster."""
        if self.recipe.average:
            decay = min(self.recipe.average, (1 + step) / (10 + step))
            average, weights = ([*model.parameters()] for model in (self.shown, self.model))
            get_ema_multi_avg_fn(decay)(average, weights, None)

    # ---- a logging step

    def report(self, step, lr, interrupted=False):
        """The log line of the steps since the last one. Raises DataError if none was sound."""
        total, left_out, ending = self.log.read(interrupted, self.ranks.distributed)
        steps, self.step = self.log.steps, step
        rate = steps / (time.time() - self.since)  # steps a second
        self.interrupted = self.ended = ending
        if self.args.minutes:
            self.follow_the_clock(rate)
        losses = {}
        for (objective, name), (error, count) in zip(self.log.rows, total):
            if count:
                losses.setdefault(objective, {})[name] = round(error / count, 6)
        count = sum(n for _, n in total)
        mean = sum(error for error, _ in total) / max(count, 1)
        self.line = {"step": step, "of": self.steps, "loss": round(mean, 6), "losses": losses,
                     "lr": lr, "samples_per_second": round(rate * self.batch, 2),
                     "skipped": int(left_out)}
        if ending:
            self.line["stopped"] = True
        parts = [f"{o} " + " ".join(f"{n} {v:.4f}" for n, v in by.items())
                 for o, by in losses.items()]
        time_left = f"  {clock((self.steps - step) / rate)} left" if step < self.steps else ""
        self.ranks.say(f"step {step}/{self.steps}  loss {mean:.4f}  [{' | '.join(parts)}]  "
                       f"lr {lr:.2e}  {rate * self.batch:.1f} samples/s{time_left}")
        if left_out:
            self.name_the_broken(int(left_out / self.ranks.count), all_of_them=not count)
        self.log.forget()
        self.since = time.time()

    def follow_the_clock(self, rate):
        """With --minutes: how many steps there will be, at `rate` a second; the same on all ranks.

        The learning rate follows, and the run ends with the time. The pace changes by a fifth of
        what is new, so that a short disturbance does not move the learning rate.
        """
        self.pace = rate if self.pace is None else self.pace + 0.2 * (rate - self.pace)
        self.plan_steps()
        self.ended = self.ended or self.steps == self.step

    def plan_steps(self):
        """The number of steps by the pace and the time that is left."""
        left = self.args.minutes * 60 - self.spent - (time.time() - self.begun)
        steps = self.step + max(0, round(left * self.pace))
        steps = torch.tensor([steps], device=self.ranks.device)
        if self.ranks.distributed:
            dist.broadcast(steps, 0)
        self.steps = int(steps)

    def name_the_broken(self, steps, all_of_them):
        self.ranks.say(f"{steps} of the last steps had a loss or gradient that is not finite "
                       "and were left out")
        drawn, by_loss = self.log.of_broken_steps()
        if self.ranks.main or by_loss:  # every rank names its own
            cases = sorted({self.samples.describe(*numbers) for numbers in drawn.tolist()})
            what = "not finite" if by_loss else "these steps drew"
            print(f"{what}: {'; '.join(cases[:40])}", flush=True)
        if all_of_them:
            raise DataError(f"no step since {self.step - self.log.steps} had a finite loss: lower "
                            f"--lr ({self.recipe.lr}) or look at the cases named above")

    def write(self, optimizers):
        """The log line, and the checkpoint with its pictures where it is due."""
        over = self.step == self.stop or self.ended
        saving = over or self.step - self.due >= self.args.save_every
        if saving:
            self.due = self.step
        if saving and self.recipe.validate_cases and not self.interrupted:
            self.validate()
        if not self.ranks.main:
            return
        self.unwritten.append(json.dumps(self.line) + "\n")
        try:
            append(self.out / "log.jsonl", self.unwritten)
            self.unwritten = []
            if saving or self.saved_at < self.due:
                self.save(optimizers)
        except OSError as error:
            kept = "nothing is saved yet"
            if (self.out / "last.pt").exists():
                kept = f"last.pt holds step {self.saved_at} as before"
            self.ranks.say(f"warning: {error}; {kept}, the next log line tries again")
        self.since = time.time()

    def validate(self):
        scores = validate(self.shown, self.samples, self.ranks.rank, self.ranks.count)
        self.line["validation"] = scores
        mean = sum(scores.values()) / len(scores) if scores else -math.inf
        each = ", ".join(f"{n} {v:.3f}" for n, v in scores.items())
        self.ranks.say(f"validation at step {self.step}: {mean:.4f} ({each})")
        if mean > self.best:
            self.best, self.is_best = mean, True

    def save(self, optimizers):
        state = {"step": self.step, "ranks": self.ranks.count, "recipe": asdict(self.recipe),
                 "run": vars(self.args), "pace": self.pace,
                 "spent": self.spent + time.time() - self.begun}
        if self.is_best:
            mvg.save(self.out / "best.pt", self.shown, score=self.best, **state)
            self.is_best = False
        if self.recipe.average:
            state["trained"] = self.model.state_dict()
        mvg.save(self.out / "last.pt", self.shown, best=self.best,
                 optimizers=[o.state_dict() for o in optimizers], **state)
        self.saved_at = self.step
        draw_loss(self.out / "loss.png", self.out / "log.jsonl")
        answer = answer_sample
        if not isinstance(self.model, mvg.MVG):
            from lab.unet import answer_sample as answer
        draw_samples(self.out / "samples.png", self.shown, self.samples, answer)

    # ---- the end

    def end(self):
        """Wait for the other ranks and say how it ended. Raises DataError if nothing was saved."""
        if self.ranks.distributed:
            dist.barrier()
            dist.destroy_process_group()
        if self.ranks.main and (self.saved_at != self.step or self.unwritten):
            kept = "nothing is saved"
            if self.saved_at:
                kept = f"last.pt holds step {self.saved_at} of {self.step}"
            raise DataError(f"{self.out} could not be written: {kept}; "
                            "free some space, then --resume")
        how = "finished" if self.step == self.steps else "stopped"
        self.ranks.say(f"{how} after step {self.step} of {self.steps}: {self.out / 'last.pt'}")
        return self.shown


@torch.no_grad()
def validate(model, samples, rank, ranks):
    """The score of every dataset with held-out cases: {name: mIoU, box IoU or SSIM}.

    samples: the `ContextSamples` of a training; the ranks share the cases.
    """
    from eval import Settings, answer_case, score
    names = [n for n in samples.datasets if samples.held[n] and samples.cases.get(n)]
    sums = torch.zeros(len(names), 2, device=next(model.parameters()).device)
    cases = [(i, case) for i, n in enumerate(names) for case in samples.held[n]
             if any(t.kind == case.kind for t in samples.cases[n])]
    settings, training = Settings(seed=samples.seed), model.training
    model.eval()
    for i, case in cases[rank::ranks]:
        dataset = samples.datasets[names[i]]
        answer = answer_case(model, case, samples.cases[names[i]], dataset, settings)
        values = case_values(score("prediction", answer, dataset), dataset)
        value = values.get("mIoU", values.get("box_IoU", values.get("SSIM", float("nan"))))
        if not np.isnan(value):
            sums[i] += torch.tensor([value, 1.0], device=sums.device)
    model.train(training)
    if ranks > 1:
        dist.all_reduce(sums)
    return {n: round(s / count, 6) for n, (s, count) in zip(names, sums.tolist()) if count}


def locked(folder):
    """A file that this program holds locked while it lives. Raises DataError if another one does.

    Where files cannot be locked (Windows, some network disks) nothing is.
    """
    file = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise DataError(f"{folder} is in use by another training: name another --out") from None
    except (ImportError, OSError):
        pass
    return file


def append(path, lines):
    """Append lines to a file, all of them or, with the OSError, none."""
    size = path.stat().st_size
    try:
        with open(path, "a") as file:
            file.write("".join(lines))
    except OSError:
        os.truncate(path, size)
        raise
