"""Every score on a page comes from a result file."""

import hashlib
import json
import re
import shutil

import pytest

import report
from conftest import ROOT
from lab import pages
from scans.volumes import DataError

# What looks like a score: 0.12 or 0.123, and dB. Code is left out.
SCORE = re.compile(r"(?<![\w.=-])[01]\.\d{2,3}(?![\w.])|\d+(?:\.\d+)? dB")
CODE = re.compile(r"^```(?s:.*?)^```|^ {4,}\S.*$|`[^`\n]*`", re.MULTILINE)


@pytest.mark.parametrize("name", pages.PAGES)
def test_pages_hold_what_the_results_have(name):
    text = (ROOT / name).read_text()
    assert pages.filled(text) == text, "run python report.py docs"


@pytest.mark.parametrize("name", pages.PAGES)
def test_no_score_is_typed_by_hand(name):
    text = CODE.sub("", pages.BLOCK.sub("", (ROOT / name).read_text()))
    text = text.split("## The pictures that it saw")[0]  # a table of licences
    assert SCORE.findall(text) == []


def test_a_typed_score_is_found():
    assert SCORE.findall("has 0.35 and 27.9 dB, in 2026-11-27, at 1.5 s") == ["0.35", "27.9 dB"]
    assert SCORE.findall(CODE.sub("", "with `--lr 0.001` and\n\n    lr 0.25\n")) == []


def test_every_table_is_on_a_page():
    shown = {name for page in pages.PAGES
             for name in pages.BLOCK.findall((ROOT / page).read_text())}
    assert shown == set(pages.TABLES)


def test_a_changed_result_changes_the_page(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "docs/results", tmp_path / "docs/results")
    path = tmp_path / "docs/results/real.json"
    found = json.loads(path.read_text())
    found["datasets"]["la"]["mIoU"] = 0.987
    path.write_text(json.dumps(found))
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    text = "before\n<!-- table: real -->\nold\n<!-- end -->\nafter"
    filled = pages.filled(text)
    assert "0.99 [" in filled and "old" not in filled
    assert filled.startswith("before\n") and filled.endswith("\nafter")
    with pytest.raises(DataError, match="no table is called 'reel'"):
        pages.filled(text.replace("real", "reel"))


def test_what_is_missing_was_not_run(tmp_path, monkeypatch):
    (tmp_path / "docs/claims").mkdir(parents=True)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    lines = pages.TABLES["colors"]().splitlines()
    assert len(lines) == 7 and all(line.count("not run") == 4 for line in lines[2:])
    assert all(line.count("not run") >= 1 for line in pages.verdicts().splitlines()[2:])


def test_verdicts_follow_the_intervals(tmp_path, monkeypatch):
    """ACDC is ahead in every case, the others in some and behind in some; LA is then behind."""
    def run(name, copied=0.3, patients="abcde", **scores):
        each = {d: {"case_scores": {c: [c, v] for c, v in
                                    zip(patients, scores.get(d, (0.4, 0.5, 0.6, 0.5, 0.5)))}}
                for d in pages.MASKS}
        for d, scored in each.items():
            values = [value for _, value in scored["case_scores"].values()]
            scored |= {"mIoU": sum(values) / len(values), "copy": {"mIoU": copied}}
        (tmp_path / f"docs/claims/{name}.json").write_text(json.dumps({"datasets": each}))

    def row(start="AR ahead"):
        return next(line.strip("| ").split(" | ") for line in pages.verdicts().splitlines()
                    if line.startswith("| " + start))

    (tmp_path / "docs/claims").mkdir(parents=True)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    run("ar", acdc=(0.7,) * 5)
    run("mim75", acdc=(0.5,) * 5, msd_hippocampus=(0.5,) * 5)
    assert row()[2:] == ["ACDC [+0.20, +0.20]", "", "", "holds here"]
    run("mim75", acdc=(0.5,) * 5, la=(0.6, 0.7, 0.8, 0.7, 0.7))
    assert row()[2:4] == ["ACDC [+0.20, +0.20]", "LA 2018 [-0.20, -0.20]"]
    assert row()[-1] == "cannot be told"
    run("ar", acdc=(0.5,) * 5)
    assert row()[2] == "" and row()[-1] == "does not hold here"
    run("ar", copied=0.85)  # copying is ahead of both everywhere
    assert row()[4].startswith("ACDC (copying is ahead of both, +0.00); LA 2018 (copying is ahead")
    assert row()[2:4] == ["", ""] and row()[-1] == "cannot be told"
    run("ar", patients="abcd", acdc=(0.7,) * 4)  # too few
    assert row()[4].startswith("ACDC (4 patients); LA 2018 (4 patients)")
    assert row()[2:4] == ["", ""] and row()[-1] == "cannot be told"


def test_verdicts_average_the_seeds(tmp_path, monkeypatch):
    def run(name, value):
        scored = {"case_scores": {c: [c, value] for c in "abcde"}, "mIoU": value,
                  "copy": {"mIoU": 0.1}}
        (tmp_path / f"docs/claims/{name}.json").write_text(
            json.dumps({"datasets": {d: scored for d in pages.MASKS}}))

    (tmp_path / "docs/claims").mkdir(parents=True)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for name, value in {"unified": 0.5, "unified-seed1": 0.2, "unified-seed2": 0.2,
                        "predefined": 0.4}.items():
        run(name, value)
    assert pages.over_seeds(["unified", "unified-seed1", "unified-seed2"], "la") == {
        "mIoU": pytest.approx(0.3), "copied": 0.1,
        "cases": {c: [c, pytest.approx(0.3)] for c in "abcde"}}
    assert "ACDC [-0.10, -0.10]; " in pages.verdicts()
    assert pages.over_seeds(["unified", "unified-seed3"], "la")["mIoU"] == pytest.approx(0.5)
    assert pages.over_seeds(["not run"], "la") is None


def test_a_result_is_kept_with_where_it_comes_from(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "a.pt").write_bytes(b"weights")
    (run / "results.json").write_text(json.dumps({
        "datasets": {"la": {"mIoU": 0.5, "ranked": [["a", 0.5]]}}, "seed": 3, "prompts": 1,
        "checkpoint": str(tmp_path / "a.pt"), "store": "x", "modified": 1.0, "seconds": 2.0,
        "training": {}}))
    report.main(["keep", str(run), str(tmp_path / "kept.json"), "--command", "eval.py --x"])
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["datasets"] == {"la": {"mIoU": 0.5}} and kept["command"] == "eval.py --x"
    assert (kept["seed"], kept["prompts"]) == (3, 1)
    assert kept["checkpoint_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"]) and kept["hardware"]
    assert not {"store", "modified", "seconds", "training", "checkpoint"} & set(kept)
