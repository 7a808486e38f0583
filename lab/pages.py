"""Fill the tables of README and docs from docs/results and docs/claims: python report.py docs

A page marks the place of a table like this, and everything between the two lines is replaced:

    <!-- table: real -->
    <!-- end -->

So no score is typed by hand. tests/test_pages.py writes the pages again and compares.
"""

import re
from pathlib import Path

import numpy as np

from metrics import interval
from report import PAPER_2, TABLE_2, cell, markdown
from scans.volumes import DataError, read_json

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "checkpoints/README.md", "docs/results/README.md", "docs/claims.md",
         "docs/study.md", "docs/speed.md", "docs/prompting.md", "docs/training.md")
BLOCK = re.compile(r"<!-- table: ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)
NOT_RUN = "not run"
TITLES = {"acdc": "ACDC, heart MRI", "la": "LA 2018, MRI", "msd_hippocampus": "hippocampus, MRI",
          "Dataset801_NerveUltrasound": "nerves and vessels, ultrasound",
          "Dataset802_MsT1ToFlair": "T1 to FLAIR, MRI", "deeplesion": "DeepLesion, CT",
          "Dataset901_ChestXray": "lungs, chest X-ray", "Dataset902_ProstateMr": "prostate MRI",
          "Dataset903_CtOrgans": "six organs, CT, one patient",
          "Dataset904_MrOrgans": "six organs, MRI, one patient",
          "Dataset905_LowDoseCt": "quarter- to full-dose CT, one patient",
          "Dataset906_T1cToT2": "T1c to T2, one patient",
          "Dataset907_Inpainting": "inpainting, T1, one patient", "all": "ACDC, all cases"}
UNSEEN = ("acdc", "la", "msd_hippocampus", "Dataset801_NerveUltrasound", "Dataset901_ChestXray",
          "Dataset902_ProstateMr")


def write(root=ROOT):
    """Fill every page below `root` again; returns the names of those that changed."""
    changed = []
    for name in PAGES:
        path = root / name
        before = path.read_text()
        after = filled(before)
        if after != before:
            path.write_text(after)
            changed.append(name)
    return changed


def filled(text):
    """A page with its tables as docs/results has them. Raises DataError for an unknown table."""
    def table(match):
        if match[1] not in TABLES:
            raise DataError(f"no table is called {match[1]!r}: there are {', '.join(TABLES)}")
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"
    return BLOCK.sub(table, text)


def results(name):
    """docs/results/NAME.json; without datasets where it was not run."""
    path = ROOT / "docs/results" / f"{name}.json"
    return read_json(path) if path.is_file() else {"datasets": {}}


def mean(values, form=".3f"):
    """The mean as text; "not run" where there is nothing or something is missing."""
    values = list(values)
    return NOT_RUN if not values or None in values else format(np.mean(values), form)


# -------------------------------------------------------------------------------------------------
# The bundled checkpoint

def real():
    """README: sets that the checkpoint never saw, beside the paper's MVG, trained on all of it."""
    found = results("real")["datasets"] | results("loose")["datasets"]
    paper = dict(zip(TABLE_2, PAPER_2["MVG"].split()))
    rows = []
    for name in UNSEEN[:4]:
        r = found[name]
        low, high = r["interval"]["mIoU"]
        rows.append([TITLES[name], f"{r['cases']} / {r['patients']}", paper.get(name, ""),
                     f"{r['mIoU']:.2f} [{low:.2f}, {high:.2f}] ({r['Dice']:.2f})",
                     f"{r['copy']['mIoU']:.2f} ({r['copy']['Dice']:.2f})"])
    head = ["", "cases / patients", "paper's MVG, trained on it", "ours, one prompt",
            "copied prompt"]
    return markdown(head, rows)


def card_masks():
    """Every unseen set: mIoU and Dice, copying, wrong prompts."""
    found = results("real")["datasets"] | results("loose")["datasets"]
    kinds = ("other_class", "other_dataset", "empty")
    rows = [[TITLES[n], f"{found[n]['cases']} / {found[n]['patients']}", cell(found[n], "mIoU"),
             cell(found[n], "Dice"), cell(found[n]["copy"], "mIoU"),
             *(short(found[n].get(kind), "mIoU") for kind in kinds)] for n in UNSEEN]
    scores = [found[n] for n in UNSEEN]
    rows.append(["mean", "", mean([r["mIoU"] for r in scores]), mean([r["Dice"] for r in scores]),
                 mean([r["copy"]["mIoU"] for r in scores]), "", "", ""])
    return markdown(["", "cases / patients", "mIoU", "Dice", "copied, mIoU",
                     "prompt of another class", "of another dataset", "empty"], rows)


def short(scores, metric, form=".3f"):
    """A score without its interval as text."""
    return "" if not scores or scores.get(metric) is None else format(scores[metric], form)


def card_images():
    """Image tasks on real scans."""
    found = results("real")["datasets"] | results("loose")["datasets"]
    names = [f"Dataset{n}" for n in ("905_LowDoseCt", "906_T1cToT2", "907_Inpainting",
                                     "802_MsT1ToFlair")]

    def three(scores):
        return " / ".join(short(scores, m, f) for m, f in (("PSNR", ".1f"), ("SSIM", ".3f"),
                                                           ("MAE", ".4f")))

    rows = []
    for name in names:
        r = found[name]
        parts = [short(r, m, ".1f") + f" ({short(r['copy'], m, '.1f')})"
                 for m in ("PSNR_inside", "PSNR_outside")]
        rows.append([TITLES[name], r["cases"], three(r), three(r["copy"]), three(r["filter"]),
                     *parts])
    return markdown(["PSNR in dB / SSIM / MAE", "cases", "answer", "the input itself",
                     "the prompt's linear filter", "PSNR inside of what changes (input)",
                     "outside of it (input)"], rows)


def card_rest():
    """Neighbouring slices of one patient, and boxes."""
    found = results("loose")["datasets"] | results("boxes")["datasets"]
    found["all"] = results("acdc_all")["datasets"].get("acdc")
    rows = []
    for name in ("all", "Dataset903_CtOrgans", "Dataset904_MrOrgans", "deeplesion"):
        metric = "box_IoU" if name == "deeplesion" else "mIoU"
        r = found[name]
        if r:
            rows.append([TITLES[name], f"{r['cases']} / {r['patients']}", metric.replace("_", " "),
                         cell(r, metric), cell(r["copy"], metric)])
    return markdown(["", "cases / patients", "score", "prompted", "copied"], rows)


def stand_ins():
    """Invented subjects, a row a kind of task."""
    found = results("stand_ins")["datasets"]
    masks = [r for r in found.values() if r.get("mIoU") is not None]
    rows = [[f"mean of {len(masks)} segmentation sets", "mIoU", mean([r["mIoU"] for r in masks]),
             mean([r["copy"]["mIoU"] for r in masks]), ""]]
    for name, r in found.items():
        metric = "box_IoU" if "box_IoU" in r else "PSNR" if "mIoU" not in r else None
        if metric:
            form = ".1f" if metric == "PSNR" else ".3f"
            rows.append([name, metric.replace("_", " "), short(r, metric, form),
                         short(r["copy"], metric, form), short(r.get("filter"), metric, form)])
    return markdown(["", "score", "prompted", "copied, or the input", "the prompt's linear filter"],
                    rows)


def prompts():
    """How much the prompt matters, by the number of prompts."""
    rows = []
    for name, by in results("prompts")["datasets"].items():
        for count, each in by.items():
            for metric, r in each.items():
                form = ".1f" if metric == "PSNR" else ".3f"
                names = ("mean", "sd", "worst", "best", "alike")
                rows.append([TITLES.get(name, name), count, metric, r["cases"],
                             *(short(r, n, form) for n in names)])
    return markdown(["", "prompts", "score", "cases", "mean over draws", "sd of a case",
                     "worst draw of a case", "best draw", "prompt that looks alike"], rows)


def alarms():
    """All slices against those that show something."""
    rows = [[TITLES[name], cell(r, "mIoU"), cell(r.get("with it"), "mIoU"),
             f"{r['false_alarm']:.2%}" if "false_alarm" in r else ""]
            for name, r in results("all_slices")["datasets"].items()]
    return markdown(["", "mIoU over all slices", "over slices that show something",
                     "pixels painted on slices without the class"], rows)


def unseen():
    """Section 4.2, out of distribution."""
    rows = []
    for name, organ, shown, paper in (("liver", "msd_liver", "a new prompt only", "0.84"),
                                      ("spleen", "msd_spleen", "a new prompt only", ""),
                                      ("spleen_one", "msd_spleen", "one case", "0.87"),
                                      ("lung", "msd_lung", "a new prompt only", ""),
                                      ("lung_one", "msd_lung", "one case", "0.48")):
        r = results(f"unseen_{name}")["datasets"].get(organ)
        ours = [cell(r, "mIoU"), cell(r, "Dice"), cell(r["copy"], "mIoU")] if r else [NOT_RUN] * 3
        rows.append([organ, shown, str(r["cases"]) if r else "", *ours, paper])
    return markdown(["", "learned from", "cases", "mIoU", "Dice", "copied, mIoU", "paper, mIoU"],
                    rows)


# Isensee et al. 2024, nnU-Net Revisited, as nnU-Net's documentation/resenc_presets.md has it.
NNUNET = ["nnU-Net (published)", "", "9 h on an A100 a dataset, 7.7 GB", "", ""]


def cost():
    """What a generalist costs beside a specialist at the same image size."""
    rows = []
    for title, found in results("cost").get("sizes", {}).items():
        for model, name in (("mvg", f"MVG, {title}"), ("unet", f"U-Net of ours, {title}")):
            r = found[model]
            rows.append([name, f"{r['parameters'] / 1e6:.1f} M",
                         f"{r['train_gflop']:.0f} GFLOP a sample",
                         f"{r['slice_s']:.3f} s, {r['slice_gflop']:.1f} GFLOP",
                         f"{r['slice_mb']} MB"])
    return markdown(["", "parameters", "training", "a slice, on one core", "memory of it"],
                    [*rows, NNUNET])


def counted():
    """Operations and memory of a training step, a row a size and objective."""
    rows = [[title, {"ar": "AR", "mim": "MIM", "authors": "authors' way"}.get(name, name).replace(
        "mim", "MIM").replace("ar,", "AR,"), f"{gflop:,.0f}", f"{gb:.2f}"]
        for title, found in results("cost").get("counted", {}).items()
        for name, (gflop, gb) in found.items()]
    return markdown(["", "way", "GFLOP", "GB at the peak"], rows)


# -------------------------------------------------------------------------------------------------
# What was tried

def bought():
    """What bought what, at equal samples: means over sets."""
    found = results("what_bought_what")
    arms = {"copy": "copying the prompt's label",
            "start64": "nothing: the file itself, at 64 pixels",
            "invented-0": "invented images (19 stand-ins, procedural tasks)",
            "invented-1": "the same, seed 1", "real-0": "and 34 open sets",
            "superpixels-0": "and superpixels (a quarter of the masks)",
            "augment-0": "and task augmentation (`--augment 0.8`)",
            "augment-0-trained": "the last row without the average of the weights"}
    rows = []
    for arm, title in arms.items():
        means = []
        for group in ("real", "open"):
            values = [r[arm] for r in found["datasets"].values() if r["held out of"] == group]
            means.append(mean([v if arm == "copy" else v[0] for v in values]))
        rows.append([title, *means])
    return markdown(["seen after run 6", "real", "open"], rows)


def at_once():
    """Every class asked for by itself, against all of them in one answer."""
    by_one, once = results("real")["datasets"], results("all_at_once")["datasets"]
    rows = [[TITLES[d], f"{by_one[d]['cases']} / {by_one[d]['patients']}",
             cell(by_one[d], "mIoU"), cell(once[d], "mIoU") if d in once else NOT_RUN]
            for d in ("acdc", "msd_hippocampus", "Dataset801_NerveUltrasound")]
    return markdown(["mIoU", "cases / patients", "class by class", "all at once"], rows)


def finetuned():
    """The bundled file before and after fine-tuning on a dataset's own training cases."""
    before, rows = results("real")["datasets"], []
    for d in ("msd_hippocampus", "acdc"):
        after = results(f"finetuned_{d}")["datasets"].get(d)
        rows.append([TITLES[d], f"{before[d]['cases']} / {before[d]['patients']}",
                     *(cell(before[d], m) for m in ("mIoU", "Dice")),
                     *(cell(after, m) if after else NOT_RUN for m in ("mIoU", "Dice"))])
    return markdown(["", "test cases / patients", "mIoU before", "Dice before", "mIoU after",
                     "Dice after"], rows)


def finetuning():
    """Ways of fine-tuning on MSD hippocampus."""
    return markdown(["150 steps of 16", "mIoU of 12 test cases"],
                    [[name, cell(r, "mIoU")] for name, r in results("finetuning")["runs"].items()])


def larger():
    """The same weights at other image sizes, and after more training."""
    rows = [[name, *(f"{scores[d]:.3f}" for d in UNSEEN), mean([scores[d] for d in UNSEEN])]
            for name, scores in results("larger")["runs"].items()]
    return markdown(["", *(TITLES[d] for d in UNSEEN), "mean"], rows)


def tricks():
    """Every trick on and off: means over the six unseen sets, and ACDC alone."""
    runs = results("tricks")["runs"]
    rows = [[r.get("title", name), f"{r['mean']:.3f}", f"{r['datasets']['acdc']['mIoU']:.3f}",
             r.get("verdict", "")] for name, r in runs.items()]
    return markdown(["", "mean mIoU", "ACDC", "verdict"], rows)


def speed():
    """Ratios of a run of lab.bench, two sizes and bfloat16."""
    found = results("speed")
    columns = [found[k] for k in ("448", "448 bf16, 3 repeats, train_step and infer_cached", "224")]

    def each(part, *names):
        values = [[c.get(part, {}).get(n) for n in names] for c in columns]
        return [" / ".join(f"{v:.2f}" for v in of) if None not in of else "" for of in values]

    again = [" / ".join(f"{v['ratio'] if isinstance(v, dict) else v:.2f}"
                        for v in c["infer_cached"]["again"].values()) for c in columns]
    return markdown(["`tiny`, batch 1", "448, float32", "448, bfloat16", "224, float32"], [
        ["training step against the authors' way", *each("train_step", "ratio")],
        ["the same, AR / MIM alone", *each("train_step", "ratio_ar", "ratio_mim")],
        ["training step against the sequence", *each("train_step", "ratio_sequence")],
        ["a further slice, prompt encoded, against the authors' way",
         *each("infer_cached", "ratio")],
        ["the same against the sequence", *each("infer_cached", "ratio_sequence")],
        ["the same against encoding 1 / 2 / 4 prompts again", *again],
        ["memory of a step, authors' way against ours", *each("memory", "ratio")],
        ["procedural samples a second, made alone", *each("samples", "data_per_second")]])


# -------------------------------------------------------------------------------------------------
# The paper's claims

MASKS = ("acdc", "la", "msd_hippocampus", "Dataset801_NerveUltrasound")


def claim(name):
    """docs/claims/NAME.json's datasets; empty where it was not run."""
    path = ROOT / "docs/claims" / f"{name}.json"
    return read_json(path)["datasets"] if path.is_file() else {}


def claims(columns, sets=MASKS, metric="mIoU", form=".3f"):
    """A table of runs side by side. columns: {title: run, or {dataset: run}}."""
    found = {title: {d: claim(run if isinstance(run, str) else run[d]).get(d) for d in sets}
             for title, run in columns.items()}
    copied = {d: next((r[d]["copy"] for r in found.values() if r[d]), None) for d in sets}
    rows = []
    for d in sets:
        scores = [cell(r[d], metric, form) if r[d] else NOT_RUN for r in found.values()]
        rows.append([TITLES.get(d, d), short(copied[d], metric, form) or NOT_RUN, *scores])
    if len(sets) > 1:
        def means(scores):
            return mean([s[metric] if s else None for s in scores], form)
        rows.append(["mean", means(copied.values()), *(means(r.values()) for r in found.values())])
    return markdown(["", "copied", *columns], rows)


def each(run):
    """The runs of one dataset each."""
    return {d: f"{run}-{d}" for d in MASKS}


def verdicts():
    """Every claim of the paper on segmentation: on which sets the paired difference is not 0.

    Scores are averaged over the seeds that were run. A set is left out where an interval over its
    patients would be little more than their range, or where neither run is ahead of copying.
    """
    random, predefined, binary = ([run, f"{run}-seed1", f"{run}-seed2"] for run in COLORINGS)
    asked = (("unified ahead of isolated", "5", ["unified"], each("isolated")),
             ("random ahead of predefined colors", "4", random, predefined),
             ("random ahead of binary colors", "4", random, binary),
             ("AR ahead of MIM on segmentation", "6", ["ar"], ["mim75"]),
             ("more data is better: all against a tenth", "Figure 7", ["unified"], ["data10"]))
    rows = []
    for title, table, *runs in asked:
        ahead, behind, out = [], [], []
        for d in MASKS:
            pair = [over_seeds(run, d) for run in runs]
            if None in pair:
                rows.append([title, table, "", "", "", NOT_RUN])
                break
            patients = len({patient for patient, _ in pair[0]["cases"].values()})
            name = TITLES[d].split(",")[0]
            if patients < FEWEST_PATIENTS:
                out.append(f"{name} ({patients} patients)")
                continue
            low, high = interval_of_difference(pair)
            span = f"[{low:+.2f}, {high:+.2f}]"
            if max(r["mIoU"] for r in pair) <= pair[0]["copied"]:
                difference = pair[0]["mIoU"] - pair[1]["mIoU"]
                out.append(f"{name} (copying is ahead of both, {difference:+.2f})")
            elif low > 0:
                ahead.append(f"{name} {span}")
            elif high < 0:
                behind.append(f"{name} {span}")
        else:
            verdict = ("holds here" if ahead and not behind else
                       "does not hold here" if behind and not ahead else "cannot be told")
            rows.append([title, table, *("; ".join(x) for x in (ahead, behind, out)), verdict])
    return markdown(["claim", "table", "ahead on", "behind on", "left out", "verdict"], rows)


FEWEST_PATIENTS = 5  # of a verdict's set
COLORINGS = ("unified", "predefined", "binary")  # runs with random, predefined, binary colors


def over_seeds(run, dataset):
    """A run's mean scores over its seeds, or None: mIoU, copied, cases {case: [patient, mIoU]}.

    run: names of one run with several seeds, or {dataset: name}.
    """
    names = [run[dataset]] if isinstance(run, dict) else run
    found = [claim(name).get(dataset) for name in names]
    if found[0] is None:
        return None
    found = [r for r in found if r]
    return {"mIoU": np.mean([r["mIoU"] for r in found]), "copied": found[0]["copy"]["mIoU"],
            "cases": {case: [patient, np.mean([r["case_scores"][case][1] for r in found])]
                      for case, (patient, _) in found[0]["case_scores"].items()}}


def interval_of_difference(pair):
    """The 95% interval over patients of the difference of two of `over_seeds`, case by case."""
    first, second = (r["cases"] for r in pair)
    cases = sorted(set(first) & set(second))
    return interval([first[c][1] - second[c][1] for c in cases], [first[c][0] for c in cases])


def isolated():
    return claims({"unified": "unified", "isolated": each("isolated"), "U-Net": each("unet"),
                   "U-Net, all steps": each("unet-long")})


def seeds():
    """Every coloring, three seeds."""
    rows = []
    for d in (*MASKS, "mean"):
        row = [TITLES.get(d, d)]
        for run in COLORINGS:
            values = []
            for name in (run, f"{run}-seed1", f"{run}-seed2"):
                found = claim(name)
                of = [found.get(x, {}).get("mIoU") for x in (MASKS if d == "mean" else (d,))]
                values.append(mean(of))
            row.append(" / ".join(values))
        rows.append(row)
    return markdown(["seeds 0 / 1 / 2", "random", "predefined", "binary"], rows)


def images():
    """MIM against AR on image tasks: MAE, then PSNR in dB."""
    both = [claims({"MIM": "images-mim", "AR": "images-ar"}, ("brats_gli", "brats_local", "ldct"),
                   metric, form) for metric, form in (("MAE", ".4f"), ("PSNR", ".1f"))]
    return "MAE\n\n" + both[0] + "\n\nPSNR, dB\n\n" + both[1]


def flair(columns):
    return claims(columns, ("Dataset802_MsT1ToFlair",), "PSNR", ".1f")


def layouts():
    columns = {"fused": "unified", "sequence": "sequence"}
    return claims(columns) + "\n\nPSNR, dB\n\n" + flair(columns)


def more_prompts():
    columns = {"one": "unified", "two": "prompts2", "four": "prompts4"}
    return claims(columns) + "\n\nPSNR, dB\n\n" + flair(columns)


def sources():
    """Every result file: what was run, when, where."""
    rows = []
    for path in sorted((ROOT / "docs/results").glob("*.json")):
        r = read_json(path)
        command = r["command"].replace("|", "or")  # a bar ends a cell
        rows.append([f"[{path.stem}]({path.name})", f"`{command}`", r["seed"], r["hardware"],
                     r["date"], r.get("code", "")])
    runs = [read_json(p) for p in sorted((ROOT / "docs/claims").glob("*.json"))]
    if runs:
        kept = [", ".join(sorted({r[key] for r in runs}))
                for key in ("command", "hardware", "date", "code")]
        rows.append([f"[{len(runs)} runs](../claims)", f"`{kept[0]}`", "in each file", *kept[1:]])
    return markdown(["file", "command", "seed", "hardware", "date", "code"], rows)


TABLES = {
    "real": real, "card masks": card_masks, "card images": card_images, "card rest": card_rest,
    "stand ins": stand_ins, "prompts": prompts, "alarms": alarms, "unseen": unseen, "cost": cost,
    "bought": bought, "tricks": tricks, "speed": speed,
    "counted": counted, "sources": sources,
    "verdicts": verdicts, "isolated": isolated, "seeds": seeds, "images": images,
    "layouts": layouts, "more prompts": more_prompts, "larger": larger, "at once": at_once,
    "finetuned": finetuned, "finetuning": finetuning,
    "colors": lambda: claims({"random": "unified", "predefined": "predefined", "binary": "binary"}),
    "objectives": lambda: claims({"AR": "ar", "MIM 75%": "mim75", "MIM 50%": "mim50"}),
    "data": lambda: claims({"1%": "data1", "10%": "data10", "50%": "data50", "100%": "unified"})}
