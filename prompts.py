"""Section 4.2: which training case is shown as the prompt, and how much that matters.

The paper shows a random case of another patient. `eval.py --prompt_draws K` scores every case under
K such prompts, and under the one that looks most like the input (ours). Each is an evaluation of
its own, which can be resumed. Then it says how far the scores lie apart:

    python eval.py --data_root DIR --prompt_draws 5 --out draws
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

import report
from data import evaluation_prompt, matching_slice, prompt_cases
from metrics import case_values, interval, known_mean, main_metric
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
    runs = {f"draw {d}": {"seed": args.seed + d} for d in range(args.prompt_draws)}
    runs["alike"] = {"alike": True}
    out = Path(args.out or Path(args.checkpoint or find_checkpoint()).parent / "eval")
    lines = {}
    for name, changes in runs.items():
        changes["out"] = str(out / name.replace(" ", "-"))
        run = evaluation(Namespace(**{**vars(args), **changes}))
        run.score_cases()
        ledger = run.read_ledger()
        lines[name] = [ledger[key] for key in run.todo]
    if run.rank > 0:
        return None
    results = {name: spread(lines, dataset) for name, dataset in run.store.datasets.items()
               if any(line["dataset"] == name for line in lines["alike"])}
    table = spread_table(results)
    print(table)
    (out / "prompts.md").write_text(table + "\n")
    write_json(out / "prompts.json", {"datasets": results, **run.about, "draws": args.prompt_draws})
    report.draw_prompts(out / "prompts.png", results)
    return results


def spread(lines, dataset):
    """What the draws of one dataset come to, in its main metric.

    lines: {"draw 0": the ledger's lines, ..., "alike": those}. "mean" over draws and cases, with
    its interval over patients; "sd" of a case over its prompts, "best" and "worst" of a case, each
    averaged over cases; "draws": the mean of every draw; "alike": of the prompt that looks alike.
    """
    metric = main_metric(dataset)
    values, patients = {}, {}
    for name, run in lines.items():
        for line in run:
            if line["dataset"] == dataset.name:
                scores = case_values(line.get("scores", {}).get("prediction"), dataset)
                values.setdefault(line["case"], {})[name] = scores.get(metric, float("nan"))
                patients[line["case"]] = line.get("patient")
    drawn = np.array([[v for name, v in case.items() if name != "alike"]
                      for case in values.values()])  # (cases, draws)
    whole = ~np.isnan(drawn).any(1)
    drawn, alike = drawn[whole], np.array([case["alike"] for case in values.values()])[whole]
    owners = [p for p, kept in zip(patients.values(), whole) if kept]
    if not len(drawn):
        return {"metric": metric, "cases": 0}
    deviations = drawn.std(1, ddof=1) if drawn.shape[1] > 1 else np.zeros(len(drawn))
    return {"metric": metric, "cases": len(drawn), "mean": drawn.mean(),
            "interval": interval(drawn.mean(1), owners), "sd": deviations.mean(),
            "best": drawn.max(1).mean(), "worst": drawn.min(1).mean(),
            "draws": drawn.mean(0).tolist(), "alike": known_mean(alike)}


def spread_table(results):
    head = ["dataset", "metric", "cases", "mean over prompts", "sd over prompts", "worst prompt",
            "best prompt", "prompt that looks alike"]
    names = ("mean", "sd", "worst", "best", "alike")
    return report.markdown(head, [[name, r["metric"], r["cases"],
                                   *(f"{r[n]:.3f}" if n in r else "" for n in names)]
                                  for name, r in results.items()])
