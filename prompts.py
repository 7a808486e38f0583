"""Section 4.2: which training case is shown as the prompt, and how much that matters.

The paper shows a random case of another patient. `eval.py --prompt_draws K` scores every case under
K such prompts, and under the one that looks most like the input (ours); with several numbers for
--prompts once for each of them. Every draw is an evaluation of its own, which can be resumed. Then
it says how far the scores lie apart:

    python eval.py --data_root DIR --prompt_draws 5 --prompts 1 2 4 8 --out draws
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import figures
import report
from data import evaluation_prompt, matching_slice, prompt_cases
from metrics import METRICS, case_values, interval, known_mean, main_metric
from running.checkpoints import find_checkpoint
from scans.volumes import resize_images, write_json

SIDE = 16         # pixels at which two slices are compared
CANDIDATES = 32   # training cases that are compared with an input, at most
SLICES = 5        # of every case that is compared


def choose_prompts(training, case, rng, settings):
    """Training cases that prompt a case, each of another patient, at most `settings.prompts`."""
    shown, left = [], training
    while len(shown) < settings.prompts:
        patients = {s.patient for s in shown}
        left = [c for c in left if c.patient not in patients]
        if shown and not prompt_cases(left, case):
            break
        pick = most_alike if settings.alike else evaluation_prompt
        shown.append(pick(left, case, rng, settings.slices))
    return shown


def most_alike(cases, target, rng, slices="foreground"):
    """The training case whose slices look most like those of the target: see `likeness`."""
    others = prompt_cases([c for c in cases if c.kept(slices)], target)
    if len(others) > CANDIDATES:
        others = [others[i] for i in rng.choice(len(others), CANDIDATES, replace=False)]
    seen = thumbnails(target, slices)
    return max(others, key=lambda other: likeness(seen, thumbnails(other, slices)))


def thumbnails(case, slices):
    """`SLICES` slices of a case, evenly apart, (SLICES, SIDE * SIDE), each without its mean."""
    kept = case.kept(slices)
    shown = [case.read(kept[matching_slice(k, SLICES, len(kept))])[0] for k in range(SLICES)]
    small = torch.stack([resize_images(torch.from_numpy(image)[None], (SIDE, SIDE)).flatten()
                         for image in shown])
    return small - small.mean(1, keepdim=True)


def likeness(a, b):
    """The mean correlation of matching thumbnails, -1 to 1."""
    return float(torch.cosine_similarity(a, b, dim=1).mean())


# -------------------------------------------------------------------------------------------------
# Many prompts for every case

def score_draws(args, evaluation):
    """Evaluate under several prompts, and write what they come to: {dataset: `spread`}.

    args: of eval.py; evaluation: its class `Evaluation`. Into --out go prompts.json, prompts.md,
    prompts.png, and an evaluation's files for every draw.
    """
    runs = {(count, d): {"prompts": count, "seed": args.seed + d}
            for count in args.prompts for d in range(args.prompt_draws)}
    runs[args.prompts[0], "alike"] = {"prompts": args.prompts[0], "alike": True}
    out = Path(args.out or Path(args.checkpoint or find_checkpoint()).parent / "eval")
    lines = {}
    for (count, draw), changes in runs.items():
        changes["out"] = str(out / f"{count}-prompts-{draw}")
        run = evaluation(Namespace(**{**vars(args), **changes}))
        run.score_cases()
        ledger = run.read_ledger()
        lines[count, draw] = [ledger[key] for key in run.todo]
    if run.rank > 0:
        return None
    drawn = {str(count): {d: of for (n, d), of in lines.items() if n == count}
             for count in args.prompts}
    results = {name: {count: spread(by_draw, dataset) for count, by_draw in drawn.items()}
               for name, dataset in run.store.datasets.items()
               if any(name == key[0] for key in run.todo)}
    table = spread_table(results)
    print(table)
    (out / "prompts.md").write_text(table + "\n")
    about = {**run.about, "prompts": args.prompts, "draws": args.prompt_draws}
    del about["alike"]
    write_json(out / "prompts.json", {"datasets": results, **about, "split": args.split})
    figures.draw_prompts(out / "prompts.png", results)
    return results


def spread(lines, dataset):
    """What the draws of one dataset come to, {metric: numbers}: the main one, and Dice.

    lines: {0: the ledger's lines of a draw, 1: ..., "alike": those}. "mean" over draws and cases,
    with its "interval" over patients; "sd" of a case over its prompts, "best" and "worst" of a
    case, each averaged over cases; "draws": the mean of every draw; "alike": of the prompt that
    looks alike, None where none was tried. Only cases with a score in every draw count.
    """
    metrics = METRICS["segmentation"] if dataset.task == "segmentation" else [main_metric(dataset)]
    result = {}
    for metric in metrics:
        values, patients = {}, {}
        for draw, run in lines.items():
            for line in run:
                if line["dataset"] == dataset.name:
                    scores = case_values(line.get("scores", {}).get("prediction"), dataset)
                    values.setdefault(line["case"], {})[draw] = scores.get(metric, float("nan"))
                    patients[line["case"]] = line.get("patient")
        result[metric] = spread_of(values, patients)
    return result


def spread_of(values, patients):
    """values: {case: {draw: score}}; patients: {case: whose it is}. See `spread`."""
    values = {case: v for case, v in values.items() if not np.isnan(list(v.values())).any()}
    if not values:
        return {"cases": 0}
    drawn = np.array([[v[d] for d in v if d != "alike"] for v in values.values()])  # (cases, draws)
    alike = [v["alike"] for v in values.values() if "alike" in v]
    deviations = drawn.std(1, ddof=1) if drawn.shape[1] > 1 else np.zeros(len(drawn))
    return {"cases": len(drawn), "mean": drawn.mean(), "sd": deviations.mean(),
            "interval": interval(drawn.mean(1), [patients[case] for case in values]),
            "best": drawn.max(1).mean(), "worst": drawn.min(1).mean(),
            "draws": drawn.mean(0).tolist(), "alike": known_mean(alike) if alike else None}


def spread_table(results):
    """A row a dataset, number of prompts and metric."""
    head = ["dataset", "prompts", "metric", "cases", "mean over prompts", "sd over prompts",
            "worst prompt", "best prompt", "prompt that looks alike"]
    names = ("mean", "sd", "worst", "best", "alike")
    return report.markdown(head, [
        [name, count, metric, r["cases"],
         *("" if r.get(n) is None else f"{r[n]:.3f}" for n in names)]
        for name, by in results.items() for count, each in by.items()
        for metric, r in each.items()])
