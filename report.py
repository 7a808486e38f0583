"""What is read: the paper's tables, finished runs side by side, and the pages' tables.

    python eval.py --compare unified=runs/a isolated=runs/b,runs/c --out compared
    python report.py keep runs/mvg/eval docs/results/mine.json --command "eval.py ..."
    python report.py docs                                  fill the tables of README and docs

Functions get results as dictionaries or files, and write Markdown or CSV.
"""

import argparse
import csv
import datetime
import hashlib
import platform
import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from figures import draw_data
from metrics import MAIN, METRICS, WRONG, main_metrics
from scans.datasets import DATASETS
from scans.volumes import DataError, command_line, read_json, write_json

# The paper's Tables 2 (mIoU) and 3 (MAE, PSNR, SSIM each). *: with 64 examples.
TABLE_2 = ("amos_ct", "word", "btcv", "amos_mri", "microsegnet", "promise12", "chest_xray", "acdc",
           "la")
PAPER_2 = {"ResNet-18": "0.55 0.50 0.51 0.53 0.67 0.75 0.62 0.69 0.68",
           "UNet": "0.81 0.83 0.82 0.81 0.90 0.91 0.89 0.86 0.83",
           "VNet": "0.70 0.75 0.72 0.73 0.90 0.89 0.86 0.87 0.84",
           "TranUNet": "0.80 0.82 0.84 0.82 0.94 0.90 0.88 0.88 0.84",
           "nnUNet": "0.87 0.90 0.91 0.88 0.97 0.93 0.90 0.90 0.89",
           "UniverSeg*": "0.20 0.29 0.37 0.25 0.71 0.55 0.55 0.54 0.57",
           "Painter": "0.52 0.48 0.45 0.51 0.69 0.68 0.50 0.52 0.55",
           "LVM": "0.12 0.14 0.10 0.15 0.36 0.30 0.10 0.12 0.13",
           "SegGPT": "0.66 0.66 0.65 0.71 0.88 0.75 0.68 0.70 0.71",
           "MVG": "0.73 0.74 0.73 0.74 0.91 0.85 0.79 0.85 0.81"}
TABLE_3 = ("brats_gli", "brats_local", "ldct")
PAPER_3 = {"ResNet-18": "0.026 20.984 0.860 0.008 30.981 0.959 0.022 30.519 0.709",
           "Pix2Pix": "0.018 24.311 0.899 0.008 34.891 0.982 0.020 33.011 0.730",
           "TranUNet": "0.016 25.541 0.938 0.005 35.561 0.989 0.016 33.999 0.761",
           "Painter": "0.021 24.031 0.920 0.006 33.595 0.978 0.020 33.104 0.721",
           "MVG": "0.019 24.721 0.929 0.006 34.521 0.981 0.018 33.521 0.731"}


def clock(seconds):
    """Seconds as text: 1 h 05 min."""
    minutes = round(seconds / 60)
    if minutes >= 1440:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes > 1 else f"{seconds:.0f} s"


# -------------------------------------------------------------------------------------------------
# Tables

def cell(scores, metric, form=".3f"):
    """A score with its interval as text; empty where there is none."""
    if not scores or scores.get(metric) is None:
        return ""
    span = scores["interval"][metric]
    text = format(scores[metric], form)
    return text if not span else f"{text} [{span[0]:{form}}, {span[1]:{form}}]"


def row(*cells):
    return "| " + " | ".join(str(c) for c in cells) + " |"


def markdown(head, rows):
    """A Markdown table."""
    return "\n".join([row(*head), "|" + "---|" * len(head), *(row(*cells) for cells in rows)])


def score_table(results):
    """The scores of every dataset, with intervals, beside what needs no model and wrong prompts."""
    titles = {"with it": "on slices with it", "filter": "linear filter", **WRONG}
    others = [k for k in titles if any(k in r for r in results.values())]
    alarms = any("false_alarm" in r for r in results.values())
    head = ["dataset", "task", "cases / patients", "score", "prompted", "copied"]
    rows = []
    for name, r in results.items():
        for metric in ("mIoU", "Dice", "box_IoU", "PSNR", "SSIM", "PSNR_inside", "PSNR_outside"):
            if metric in r:
                scores = [cell(r, metric), cell(r.get("copy"), metric)]
                scores += [cell(r.get(k), metric) for k in others]
                cases = f"{r['cases']} / {r['patients']}"
                rows.append([name, r["task"], cases, metric, *scores])
                if alarms:
                    known = metric == "mIoU" and "false_alarm" in r
                    rows[-1].append(f"{r['false_alarm']:.2%}" if known else "")
    head += [titles[k] for k in others]
    return markdown(head + ["painted on slices without it"] * alarms, rows)


def paper_tables(results, name):
    """The paper's Tables 2 and 3 with a row for `results`; blank is what was not run."""
    def number(dataset, metric, form):
        value = results.get(dataset, {}).get(metric)
        return "" if value is None else format(value, form)

    def rows(paper, ours):
        return [[n, *values.split()] for n, values in paper.items()] + [[name, *ours]]

    titles = [DATASETS[n].title for n in TABLE_2]
    two = markdown(["", *titles], rows(PAPER_2, [number(n, "mIoU", ".2f") for n in TABLE_2]))
    image = METRICS["image"][:3]
    head = [f"{task} {m}" for task in ("synthesis", "inpainting", "denoising") for m in image]
    ours = [number(n, m, ".3f") for n in TABLE_3 for m in image]
    three = markdown(["", *head], rows(PAPER_3, ours))
    return ("Table 2, mIoU (the paper's rows are the paper's; *: 64 examples)\n\n" + two
            + f"\n\nTable 3 ({', '.join(DATASETS[n].title for n in TABLE_3)})\n\n" + three)


def papers_scores():
    """{dataset: the paper's MVG}: mIoU of Table 2, PSNR of Table 3."""
    scores = dict(zip(TABLE_2, map(float, PAPER_2["MVG"].split())))
    return scores | dict(zip(TABLE_3, map(float, PAPER_3["MVG"].split()[1::3])))


def write_csv(path, lines):
    """cases.csv: a line a case, answer and class, from the lines of an evaluation's ledger."""
    names = {"class": ("IoU", "Dice"), "image": METRICS["image"], "boxes": METRICS["detection"]}
    about = ["dataset", "case", "patient", "prompt"]
    metrics = [m for group in names.values() for m in group]
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, [*about, "kind", "part", *metrics, "error"])
        writer.writeheader()
        for line in lines:
            common = {k: line.get(k, "") for k in [*about, "error"]}
            for kind, parts in line.get("scores", {"": {"": ()}}).items():
                for part, values in parts.items():
                    numbers = dict(zip(names.get(part, names["class"]), values))
                    writer.writerow({**common, "kind": kind, "part": part, **numbers})


# -------------------------------------------------------------------------------------------------
# Finished runs side by side

def read_results(path):
    """results.json of an evaluation. Raises DataError for anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
        raise DataError(f"{path} is no result of eval.py: name a run that was scored")
    return content


def read_runs(columns):
    """NAME=RUN[,RUN] -> ({name: {dataset: results}}, {name: [recipe of every run]}).

    A RUN is a run folder with eval/results.json, or the folder or file of the results. Raises
    DataError for a folder without results, or a dataset twice in one column.
    """
    found, recipes = {}, {}
    for column in columns:
        name, _, runs = column.rpartition("=")
        for run in map(Path, runs.split(",")):
            places = (run, run / "results.json", run / "eval" / "results.json")
            path = next((p for p in places if p.is_file()), None)
            if path is None:
                raise DataError(f"{run} has no results.json: score it first "
                                f"(python eval.py --checkpoint {run}/last.pt)")
            content, title = read_results(path), name or run.name
            into = found.setdefault(title, {})
            twice = sorted(set(into) & set(content["datasets"]))
            if twice:
                raise DataError(f"{title} has {twice[0]} twice: name the runs apart")
            into |= content["datasets"]
            recipes.setdefault(title, []).append(content.get("training", {}))
    return found, recipes


def compared_scores(found):
    """Rows: a dataset's main score in every column, then the means over what all columns have."""
    metric, rows = main_metrics(found), []
    for d, m in metric.items():
        for name in ("mIoU", "Dice") if m == "mIoU" else (m,):
            rows.append([d, name, *(cell(results.get(d), name) for results in found.values())])
    for m in (*MAIN, "Dice"):
        shared = [d for d in metric if metric[d] == ("mIoU" if m == "Dice" else m)
                  and all(r.get(d, {}).get(m) is not None for r in found.values())]
        if shared:
            means = [np.mean([r[d][m] for d in shared]) for r in found.values()]
            rows.append([f"mean of {len(shared)}", m, *(f"{mean:.3f}" for mean in means)])
    return rows


def settings_that_differ(recipes):
    """Rows: a field of the recipe that is not the same in all columns."""
    rows = []
    for key in sorted({k for runs in recipes.values() for recipe in runs for k in recipe}):
        values = [sorted({str(recipe.get(key)) for recipe in runs}) for runs in recipes.values()]
        if any(v != values[0] for v in values):
            rows.append([key, "setting", *(", ".join(v) for v in values)])
    return rows


def compare(columns, out=None):
    """Print finished evaluations side by side; columns as of `read_runs`.

    With `out` also compare.md, and where the runs differ in their share of the data data.png
    (Figure 7). Returns {name: {dataset: results}}.
    """
    found, recipes = read_runs(columns)
    rows = compared_scores(found) + settings_that_differ(recipes)
    text = markdown(["dataset", "score", *found], rows)
    print(text)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "compare.md").write_text(text + "\n")
        shares = [{float(recipe.get("data_fraction", 1)) for recipe in runs}
                  for runs in recipes.values()]
        if all(len(s) == 1 for s in shares) and len(set.union(*shares)) > 1:
            draw_data(Path(out) / "data.png", [s.pop() for s in shares], found)
    return found


# -------------------------------------------------------------------------------------------------
# What infer.py did

def describe_answer(case, answer):
    """What was used and assumed, volumes in ml, versions, seconds: for `infer.py --report`.

    case: a `Case` of infer.py; answer: (K, H, W) as it was written.
    """
    classes = {}
    if case.segmentation:
        for value, voxels in zip(*np.unique(answer[answer > 0], return_counts=True)):
            classes[str(int(value))] = {"voxels": int(voxels)}
            if case.source.kind != "picture" and case.source.sized:
                ml = abs(float(np.linalg.det(case.source.affine[:3, :3]))) / 1000
                classes[str(int(value))]["ml"] = round(int(voxels) * ml, 4)
    files = ("prompt", "prompt_label", "input", "output")
    return {
        "input": str(case.source.path), "output": str(case.output),
        "prompts": [{"image": str(e.image.path), "label": str(e.label.path)}
                    for e in case.prompts.examples],
        "task": "segmentation" if case.segmentation else "image",
        "modality": case.modality, "axis": case.axis,
        "prompt_slices": [list(s) for s in case.slices], "classes": classes, "said": case.notes,
        "options": {k: v for k, v in vars(case.args).items() if k not in files},
        "checkpoint": str(case.args.checkpoint), "seconds": round(time.time() - case.begun, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__}}


# -------------------------------------------------------------------------------------------------
# Results that are kept

def keep(run, path, command, checkpoint=None, note=""):
    """Write what an evaluation found and where it comes from to a small JSON file.

    run: a folder with results.json or prompts.json of eval.py. path: docs/results/NAME.json.
    """
    name = "prompts.json" if (Path(run) / "prompts.json").is_file() else "results.json"
    found = read_results(Path(run) / name)
    for scores in found["datasets"].values():
        scores.pop("ranked", None)
    checkpoint = Path(checkpoint or found["checkpoint"])
    of_here = ("checkpoint", "store", "modified", "seconds", "training")
    about = {"command": command, "note": note, "seed": found["seed"],
             "date": str(datetime.date.today()), "hardware": hardware(), "code": commit(),
             "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest()}
    write_json(Path(path), {**about, **{k: v for k, v in found.items() if k not in of_here}})


def hardware():
    """The GPU, or the processor and how many threads of it are used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
    threads = torch.get_num_threads()
    return (f"{threads} thread{'s' * (threads > 1)} of "
            f"{model[1] if model else platform.processor() or platform.machine()}")


def commit():
    """The commit of the code, empty where there is no git."""
    with suppress(OSError):
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True, cwd=Path(__file__).parent).stdout.strip()
    return ""


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(dest="command_name", required=True)
    one = commands.add_parser("keep", help="keep what an evaluation found in a small file")
    one.add_argument("run", help="folder that eval.py wrote")
    one.add_argument("path", help="docs/results/NAME.json")
    one.add_argument("--command", required=True, help="what was run")
    one.add_argument("--checkpoint", help="default: the one that was scored")
    one.add_argument("--note", default="", help="what a reader has to know")
    commands.add_parser("docs", help="fill the tables of README and docs from docs/results")
    args = p.parse_args(argv)
    if args.command_name == "keep":
        return keep(args.run, args.path, args.command, args.checkpoint, args.note)
    from lab import pages  # it imports this file
    changed = pages.write()
    print(f"filled: {', '.join(changed)}" if changed else "every table was as docs/results has it")


if __name__ == "__main__":
    command_line(main)
