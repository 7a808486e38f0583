"""The data doctor: reads every case as training would, and says what there is and what is wrong.

    python data.py --data_root path/to/data        # exit status 1 where a dataset has problems

    report = diagnose(find("path/to/data"))        # {name: {"cases": ..., "problems": [...], ...}}
    print(describe_health("acdc", report["acdc"]))

A problem is something for the user to mend. A note is a decision that was taken in reading.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field

import numpy as np

from scans.datasets import DATASETS, Case, Dataset, Found, find
from scans.store import TOP, in_processes, is_stored, prepare_case


@dataclass
class CaseHealth:
    """What is known of one case after reading it."""
    name: str
    split: str
    slices: int
    foreground: int   # slices with something to learn
    classes: set
    spacing: tuple    # (slice, row, column) in mm
    scale: tuple      # intensities that become 0 and 1
    mean: float       # of the image in [0, 1]
    constant: bool    # is the image one value?
    problems: list
    notes: list


@dataclass
class Health:
    """The doctor's answer for a dataset that was found."""
    found: bool = True
    root: str = ""
    cases: dict = field(default_factory=dict)    # how many could be read: {"train": n, "test": n}
    paper: list = field(default_factory=list)    # how many the paper has: [train, test], or []
    slices: int = 0
    foreground: int = 0
    classes: dict = field(default_factory=dict)  # {number: name} of those that occur
    classes_absent: list = field(default_factory=list)  # names of the others
    scaled_from: list | None = None              # [lowest, highest] intensity that becomes 0 and 1
    mean: float | None = None                    # of the images in [0, 1], a case counting once
    notes: list = field(default_factory=list)
    problems: list = field(default_factory=list)


def diagnose(found: dict, workers: int | None = None) -> dict:
    """Read and prepare every case of {name: Found}: {name: report} of all datasets, found or not.

    A report is the `Health` of a dataset as a dictionary; a dataset of the table that is not there
    has "found": False and fewer keys. workers: number of processes (default: one a CPU core).
    """
    report = {name: not_found(row) for name, row in DATASETS.items()}
    answers, errors = examine_all(found, workers)
    for name, hit in found.items():
        report[name] = asdict(health(hit, answers[name], errors[name]))
    return report


def not_found(row):
    """The report of a dataset of the table that is not there."""
    return {"found": False, "root": "", "cases": {"train": 0, "test": 0},
            "paper": list(row.paper), "slices": 0, "problems": []}


def examine_all(found, workers):
    """Examine every case in processes: {dataset: [CaseHealth]} and {dataset: [error line]}.

    Both are in the order of the dataset's cases.
    """
    from tqdm import tqdm
    jobs = [(name, case) for name, hit in found.items() for case in hit.cases if is_stored(case)]
    calls = [(case, found[name].dataset) for name, case in jobs]
    answers, errors = {}, {}
    with tqdm(total=len(jobs), desc="reading", unit="case", disable=None, leave=False) as bar:
        for number, answer, error in in_processes(examine, calls, workers):
            bar.update()
            if error is None:
                answers[number] = answer
            else:
                errors[number] = f"{jobs[number][1].name}: {' '.join(str(error).split())}"
    return by_dataset(answers, jobs, found), by_dataset(errors, jobs, found)


def by_dataset(results, jobs, found):
    """{number of a job: result} -> {dataset: [result]}, in the order of the jobs."""
    lists = {name: [] for name in found}
    for number in sorted(results):
        lists[jobs[number][0]].append(results[number])
    return lists


def examine(case: Case, dataset: Dataset) -> CaseHealth:
    """Read and prepare one case as for the store, and forget it. Raises DataError."""
    arrays, index = prepare_case(case, dataset)
    image = arrays["image"]
    return CaseHealth(
        name=case.name, split=case.split, slices=index["slices"],
        foreground=len(index["foreground"]), classes=set().union(*index["classes"]),
        spacing=index["spacing"], scale=index["scale"], mean=float(image.mean()) / TOP,
        constant=bool(image.min() == image.max()), problems=index["problems"],
        notes=index["notes"])


def health(hit: Found, cases: list, errors: list) -> Health:
    """The `Health` of a `Found`. cases: those that could be read; errors: a line for each other."""
    row = hit.dataset
    classes = sorted(set().union(*(c.classes for c in cases)))
    result = Health(
        root=str(hit.root), paper=list(row.paper),
        cases={split: sum(c.split == split for c in cases) for split in ("train", "test")},
        slices=sum(c.slices for c in cases), foreground=sum(c.foreground for c in cases),
        classes={n: row.labels[n - 1] for n in classes},
        classes_absent=[name for n, name in enumerate(row.labels, 1)
                        if n not in classes and name != f"class {n}"],
        notes=hit.notes + decided(cases),
        problems=[*hit.problems, *errors, *defects(cases), *odd_spacing(cases), *constant(cases),
                  *without_truth(cases, row), *unnamed(classes, row)])
    if cases:
        result.scaled_from = [min(c.scale[0] for c in cases), max(c.scale[1] for c in cases)]
        result.mean = float(np.mean([c.mean for c in cases]))
    return result


# ------------------------------------------------------------------------------------------------
# One question each: [line]

def decided(cases):
    """What was decided in reading, and in how many of the cases."""
    notes = [note for case in cases for note in case.notes]
    return [f"{note} ({notes.count(note)} of {len(cases)} cases)" for note in dict.fromkeys(notes)]


def defects(cases):
    """What was wrong with files and has been mended."""
    return [f"{case.name}: {problem}" for case in cases for problem in case.problems]


def odd_spacing(cases):
    """Voxel sizes that cannot be, are 5 times the dataset's median or a fifth, or 1 x 1 x 1 mm.

    Single slices are left out.
    """
    cases = [c for c in cases if c.slices > 1]
    if not cases:
        return []
    usual = np.median([c.spacing for c in cases], 0)  # (3,) mm
    lines = []
    for case in cases:
        text = f"{case.name}: its spacing is {' x '.join(f'{v:g}' for v in case.spacing)} mm"
        if min(case.spacing) < 0.01 or max(case.spacing) > 50:
            lines.append(text)
        elif (np.abs(np.log(np.array(case.spacing) / usual)) > np.log(5)).any():
            median = " x ".join(f"{v:.3g}" for v in usual)
            lines.append(f"{text}, that of the dataset is {median}")
        elif tuple(case.spacing) == (1, 1, 1) and tuple(usual) != (1, 1, 1):
            lines.append(f"{text}, which may be a placeholder")
    return lines


def constant(cases):
    """Images that hold one value."""
    return [f"{c.name}: its image is constant" for c in cases if c.constant]


def without_truth(cases, row):
    """Cases from which nothing can be learned."""
    reason = "its label is empty" if row.colored else "no slice has a truth to learn"
    return [f"{c.name}: {reason}" for c in cases if not c.foreground]


def unnamed(classes, row):
    """Label values to which dataset.json gives no name."""
    return [f"the label {n} occurs, but dataset.json has no name for it" for n in classes
            if row.labels[n - 1] == f"class {n}"]


# ------------------------------------------------------------------------------------------------
# As text

def describe_health(name: str, report: dict) -> str:
    """The report of a dataset that was found, as text of several lines."""
    counts, paper = report["cases"], report["paper"]
    paper = f" (paper: {paper[0]} / {paper[1]})" if paper else ""
    lines = [f"{name}: {counts['train']} training / {counts['test']} test cases{paper}, "
             f"{report['slices']} slices, {report['foreground']} with foreground, {report['root']}"]
    if report["classes"]:
        classes = ", ".join(f"{number} {label}" for number, label in report["classes"].items())
        absent = ", ".join(report["classes_absent"])
        lines.append(f"    classes: {classes}" + (f"; absent: {absent}" if absent else ""))
    if report["scaled_from"]:
        low, high = report["scaled_from"]
        lines.append(f"    intensities {low:g} to {high:g} become 0 to 1, "
                     f"on average {report['mean']:.2f}")
    lines += [f"    note: {note}" for note in report["notes"]]
    lines += [f"    PROBLEM: {problem}" for problem in report["problems"]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# The command

def main(argv=None, draw=None) -> int:
    """The command line of data.py. draw(path, found) writes --figure. Returns the exit status."""
    p = argparse.ArgumentParser(
        description="The data doctor: reads every case below a data root as training would, and "
                    "says what is there and what is wrong.",
        epilog="Exit status 1 where a dataset that was found has problems.")
    p.add_argument("--data_root", required=True,
                   help="folder that holds the datasets as they were downloaded")
    p.add_argument("--datasets", nargs="+", metavar="NAME",
                   help="only these (default: every dataset found)")
    p.add_argument("--json", action="store_true", help="print the report as JSON, nothing else")
    p.add_argument("--figure", metavar="PNG", help="draw a slice of every dataset with its label")
    p.add_argument("--workers", type=int, help="processes (default: one a CPU core)")
    args = p.parse_args(argv)
    unreadable = []  # folders that describe themselves in a way that cannot be read
    found = find(args.data_root, args.datasets, say=unreadable.append)
    report = diagnose(found, args.workers)
    if args.json:
        print(json.dumps({"datasets": report, "problems": unreadable}, indent=1))
    else:
        for line in unreadable:
            print(f"PROBLEM: {line}")
        for name, health in report.items():
            print(describe_health(name, health) if health["found"] else f"{name}: not found")
    if args.figure:
        draw(args.figure, found)
        print(f"wrote {args.figure}", file=sys.stderr if args.json else sys.stdout)
    return int(bool(unreadable) or any(health["problems"] for health in report.values()))
