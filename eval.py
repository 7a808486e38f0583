"""Section 4.2: score a checkpoint on every dataset found, by the paper's protocol.

    python eval.py --data_root DIR --checkpoint runs/mvg/last.pt [--wrong_prompt]
    torchrun --nproc_per_node=8 eval.py --data_root DIR --checkpoint ...     the same, sooner
    python eval.py --compare unified=runs/a isolated=runs/b,runs/c           finished runs

One prompt, the matching slice of a random training case of another patient. metrics.py has the
metrics, baselines.py what every score stands beside: copying the prompt's label or the input, for
images a linear filter, and with --wrong_prompt prompts that should be of no use.

Into --out go scores.jsonl, a line a case (a stopped evaluation goes on from there), and results.
"""

import argparse
import json
import os
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import figures
import report
from baselines import copied, filtered, wrong_prompts
from data import matching_slice, prompt_cases
from lab import unet
from metrics import (KINDS, WRONG, box_scores, change_scores, false_alarms, image_scores,
                     known_mean, overlap, tabulate)
from predict import Options, answer_stack
from prompts import choose_prompts, score_draws
from running.checkpoints import find_checkpoint, load_checkpoint, pick_device
from running.ranks import PATIENCE
from scans import boxes
from scans.store import Store, default_store, open_store
from scans.volumes import DataError, command_line, write_json


# -------------------------------------------------------------------------------------------------
# One case

@dataclass
class Answer:
    """The kept slices of a case and every answer to them, arrays (K, H, W)."""
    images: np.ndarray
    truth: np.ndarray
    valid: np.ndarray | None    # 1 where a truth is scored, 2 where it is the input's, 0: no truth
    prompt: str                 # names of the cases that prompt it
    prompt_images: np.ndarray   # the matching slices of the first one
    prompt_labels: np.ndarray
    boxes: list                 # the true ones
    found: list | None = None   # those of every slice, where they were asked for as masks
    answers: dict = field(default_factory=dict)  # prediction, copy, filter, wrong prompts: by name


def read_pair(case, dataset, slices):
    """The kept slices of a stored case: images, labels, valid or None, (K, H, W) each."""
    images, labels, valid = zip(*(case.read(k) for k in case.kept(slices)))
    labels = np.stack(labels)
    labels = labels.astype(np.uint8) if dataset.colored else labels
    return np.stack(images), labels, None if valid[0] is None else np.stack(valid)


def answer_case(model, case, training, dataset, settings, others=None):
    """The `Answer` of a model to a case of a dataset.

    The prompt is drawn from (seed, case), whatever other cases are scored. others: training cases
    of other datasets, for the wrong prompts. A U-Net takes no prompt.
    """
    key = zlib.crc32(f"{dataset.name}/{case.name}".encode())
    rng = np.random.default_rng([settings.seed, key])
    shown = choose_prompts(training, case, rng, settings)
    images, truth, valid = read_pair(case, dataset, settings.slices)
    prompts = [read_pair(c, dataset, settings.slices)[:2] for c in shown]
    first_images, first_labels = prompts[0]
    matched = [matching_slice(k, len(images), len(first_images)) for k in range(len(images))]
    result = Answer(images, truth, valid, " ".join(c.name for c in shown), first_images[matched],
                    first_labels[matched], case.index["boxes"])
    options = settings.options(dataset)
    if isinstance(model, unet.UNet):
        result.answers["prediction"] = unet.predict_stack(model, images)
    else:
        answer, more = answer_stack(model, prompts, images, dataset.colored, options)
        result.answers["prediction"] = answer
        result.found = more if isinstance(more, list) else None
        wrong = {}
        if settings.wrong_prompt and others is not None:  # not for a picture of examples
            other = others[rng.integers(len(others))] if others else None
            other = read_pair(other, dataset, settings.slices)[:2] if other else None
            wrong = wrong_prompts(*prompts[0], dataset, other)
        for name, (pair, classes) in wrong.items():
            asked = replace(options, classes=classes)
            result.answers[name] = answer_stack(model, [pair], images, dataset.colored, asked)[0]
    if dataset.colored and settings.slices == "all":
        shows = truth.any((1, 2))[:, None, None]
        result.answers["with it"] = result.answers["prediction"] * shows
    result.answers["copy"] = copied(result, dataset)
    if not dataset.colored:
        result.answers["filter"] = filtered(result)
    return result


def score(name, answer, dataset):
    """The scores of one of an `Answer`'s answers.

    {class name: (IoU, Dice)}, or {"image": those of METRICS}, for detection also {"boxes":
    (IoU, hit rate, false boxes)}.
    """
    prediction = answer.answers[name]
    if dataset.colored:
        if answer.valid is not None:  # elsewhere the truth is 0 as well
            prediction = prediction * (answer.valid == 1)
        found = overlap(prediction, answer.truth, range(1, len(dataset.labels) + 1))
        return {dataset.labels[c - 1]: s for c, s in found.items()}
    valid = np.ones(prediction.shape) if answer.valid is None else answer.valid
    each = [image_scores(p, t, v == 1) + change_scores(p, t, i, v > 0)
            for p, t, v, i in zip(prediction, answer.truth, valid, answer.images)]
    scores = {"image": tuple(known_mean(values) for values in zip(*each))}
    if dataset.task == "detection":  # a case is one picture
        as_masks = name == "prediction" and answer.found is not None
        found = answer.found[0] if as_masks else boxes.read(prediction[0], answer.images[0])
        scores["boxes"] = box_scores(found, answer.boxes)
    return scores


# -------------------------------------------------------------------------------------------------
# The command

@dataclass
class Settings:
    """What an evaluation asks for; the first line of its ledger."""
    slices: str = "foreground"
    seed: int = 0
    prompts: int = 1
    alike: bool = False
    wrong_prompt: bool = False
    mode: str = "auto"
    votes: int = 1
    each: bool | None = None
    looks: int | None = None

    def options(self, dataset):
        return Options(self.mode, self.votes, self.each, self.looks, self.seed, dataset.name)


def make_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(alike=False)  # prompts.py asks for it
    add = p.add_argument
    add("--data_root", help="folder that holds the datasets as they were downloaded")
    add("--store", help="prepared store (default: store/<name of data_root>-<hash>)")
    add("--checkpoint", help="what train.py wrote (default: the bundled one, or the newest run's)")
    add("--out", help="folder for what is written (default: eval/ beside the checkpoint)")
    add("--datasets", nargs="+", metavar="NAME", help="only these (default: every dataset found)")
    add("--split", default="test", choices=("test", "train", "all"),
        help="cases to score; prompts are training cases of other patients")
    add("--slices", default="foreground", choices=("foreground", "all"),
        help="foreground: slices whose truth has some (paper silent)")
    add("--max_cases", type=int, help="at most so many cases a dataset")
    add("--prompts", type=int, nargs="+", default=[1],
        help="training cases shown (paper: 1); several numbers with --prompt_draws")
    add("--prompt_draws", type=int, help="score under so many random prompts, and the most alike")
    add("--looks", type=int, choices=(1, 2),
        help="2: again from near (default: where training knew binary colors)")
    add("--each", action=argparse.BooleanOptionalAction,
        help="ask for one class at a time (default: where training knew binary colors)")
    add("--votes", type=int, default=1, help="answers averaged, under other colors (paper: 1)")
    add("--mode", default="auto", choices=("auto", "ar", "canvas"),
        help="auto: as trained (ours: ar for segmentation, canvas for images)")
    add("--wrong_prompt", action="store_true",
        help="also prompts that should be of no use: other class, other dataset, empty")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--device", help="cpu, mps, cuda ... (default: the best there is)")
    add("--compare", nargs="+", metavar="NAME=RUN[,RUN]",
        help="score nothing, put finished runs side by side; several of one name are one column")
    return p


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.compare:
        return report.compare(args.compare, args.out)
    for name, least in (("votes", 1), ("max_cases", 1), ("prompts", 1), ("seed", 0),
                        ("prompt_draws", 1)):
        value = getattr(args, name)
        value = min(value) if isinstance(value, list) else value
        if value is not None and value < least:
            raise DataError(f"--{name} is {value}: it must be at least {least}")
    if len(args.prompts) > 1 and not args.prompt_draws:
        raise DataError("--prompts takes several numbers with --prompt_draws alone")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)
    if args.prompt_draws:
        results = score_draws(args, Evaluation)
    else:
        args.prompts = args.prompts[0]
        evaluation = Evaluation(args)
        evaluation.score_cases()
        results = evaluation.write_results() if evaluation.rank == 0 else None
    if dist.is_initialized():
        dist.destroy_process_group()
    return results


class Evaluation:
    """A checkpoint, a store, and the ledger of the cases that were scored."""

    def __init__(self, args):
        self.args, self.start = args, time.time()
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.checkpoint = Path(args.checkpoint or find_checkpoint())
        device, reason = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
        self.model = unet.load_any(self.checkpoint, device)
        self.recipe = load_checkpoint(self.checkpoint).get("recipe", {})
        self.store = self.open_store()
        self.out = Path(args.out) if args.out else self.checkpoint.parent / "eval"
        self.say(f"checkpoint {self.checkpoint}, device {device} ({reason})")
        fields = Settings.__dataclass_fields__
        self.settings = Settings(**{name: getattr(args, name) for name in fields})
        self.training, self.todo = {}, {}
        for name in self.store.datasets:
            self.choose_cases(name)
        self.about = {"checkpoint": str(self.checkpoint), "store": str(self.store.root),
                      "modified": self.checkpoint.stat().st_mtime, **vars(self.settings)}
        self.ledger = self.out / "scores.jsonl"
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            before = self.read_ledger().values()  # without the half line of a stopped evaluation
            lines = [json.dumps(line) + "\n" for line in (self.about, *before)]
            self.ledger.write_text("".join(lines))
        self.wait()

    def say(self, text):
        if self.rank == 0:
            print(text)

    def wait(self):
        if self.ranks > 1:
            dist.barrier()

    def open_store(self):
        """The first rank prepares it, the others find it prepared."""
        args, store, found = self.args, None, [None]
        if self.rank == 0:
            pairs = self.recipe.get("brats_pairs", ())
            store = open_store(args.data_root, args.store, args.datasets, pairs)
            found = [list(store.datasets)]
        if self.ranks > 1:
            dist.broadcast_object_list(found)
        return store or Store(args.store or default_store(args.data_root), found[0])

    def choose_cases(self, name):
        store, args = self.store, self.args
        training = [c for c in store.split(name, "train") if c.kept(args.slices)]
        cases = store.cases[name] if args.split == "all" else store.split(name, args.split)
        cases = [c for c in cases if c.kept(args.slices) and prompt_cases(training, c)]
        if not cases:
            self.say(f"{name}: not scored, it has no {args.split} case with a training case of "
                     "another patient")
        self.training[name] = training
        self.todo |= {(name, c.name): c for c in cases[:args.max_cases]}

    def read_ledger(self):
        """{(dataset, case): its last whole line} of an evaluation with the same settings."""
        try:
            lines = self.ledger.read_text().splitlines(keepends=True)
            if json.loads(lines[0]) != self.about:
                return {}
        except (OSError, ValueError, IndexError):
            return {}
        lines = [json.loads(l) for l in lines[1:] if l.endswith("\n")]
        return {(l["dataset"], l["case"]): l for l in lines}

    def score_cases(self):
        """Score what the ledger lacks, a line a case; the ranks share the cases."""
        done = self.read_ledger()
        left = [key for key in self.todo if "scores" not in done.get(key, ())]
        if len(left) < len(self.todo):
            self.say(f"{len(self.todo) - len(left)} of {len(self.todo)} cases were scored before")
        self.wait()
        mine, silent = left[self.rank::self.ranks], None if self.rank == 0 else True
        for key in tqdm(mine, unit="case", disable=silent, leave=False):
            line = self.score_case(*key)
            with open(self.ledger, "a") as file:  # one write, so that processes do not mix theirs
                file.write(json.dumps(line) + "\n")
        self.wait()

    def answer(self, name, case_name, others=None):
        return answer_case(self.model, self.todo[name, case_name], self.training[name],
                           self.store.datasets[name], self.settings, others)

    def score_case(self, name, case_name):
        dataset = self.store.datasets[name]
        line = {"dataset": name, "case": case_name}
        others = [c for n, d in self.store.datasets.items()
                  if n != name and d.colored == dataset.colored for c in self.training[n]]
        try:
            answer = self.answer(name, case_name, others)
            line |= {"patient": self.todo[name, case_name].patient, "prompt": answer.prompt,
                     "scores": {k: score(k, answer, dataset) for k in KINDS
                                if k in answer.answers}}
            if dataset.colored:
                line["false_alarms"] = false_alarms(answer.answers["prediction"], answer.truth,
                                                    dataset.labels)
        except (ValueError, OSError, RuntimeError) as error:
            line["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"{name} {case_name} could not be scored: {line['error']}", flush=True)
        return line

    def write_results(self):
        """results.json, cases.csv, tables and pictures. Returns {dataset: its results}."""
        done, out, datasets = self.read_ledger(), self.out, self.store.datasets
        results = {name: tabulate([done[key] for key in self.todo if key[0] == name], dataset)
                   for name, dataset in datasets.items() if any(k[0] == name for k in self.todo)}
        write_json(out / "results.json", {
            "datasets": results, **self.about, "split": self.args.split, "training": self.recipe,
            "seconds": round(time.time() - self.start, 1)})
        report.write_csv(out / "cases.csv", [done[key] for key in self.todo])
        text = report.score_table(results)
        tables = text + "\n\n" + report.paper_tables(results, str(self.checkpoint)) + "\n"
        (out / "tables.md").write_text(tables)
        print(text)
        for name, result in results.items():
            for kind in result["no_cost"]:
                print(f"{name}: the score does not fall with a prompt that is wrong "
                      f"({WRONG[kind]}): the model ignores its prompt, "
                      "or has nothing to lose")
        figures.draw_scores(out / "scores.png", results, report.papers_scores())
        figures.draw_examples(out, results, self.answer, datasets)
        written = "results.json cases.csv tables.md scores.png examples.png".split()
        bad = sum(r["failed"] for r in results.values())
        print(f"wrote {', '.join(str(out / name) for name in written)}"
              + (f"; {bad} cases could not be scored" if bad else ""))
        return results


if __name__ == "__main__":
    command_line(main)
