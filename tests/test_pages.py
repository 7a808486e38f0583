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
    """ACDC is ahead in every case, the others in one of two; then LA is behind as well."""
    def run(name, copied=0.3, **scores):
        each = {d: {"case_scores": {c: [c, v] for c, v in zip("ab", scores.get(d, (0.4, 0.6)))}}
                for d in pages.MASKS}
        for d, scored in each.items():
            values = [value for _, value in scored["case_scores"].values()]
            scored |= {"mIoU": sum(values) / 2, "copy": {"mIoU": copied}}
        (tmp_path / f"docs/claims/{name}.json").write_text(json.dumps({"datasets": each}))

    (tmp_path / "docs/claims").mkdir(parents=True)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    run("ar", acdc=(0.5, 0.8))
    run("mim75", msd_hippocampus=(0.5, 0.5))
    verdict = {line.split(" | ")[0].strip("| "): line for line in pages.verdicts().splitlines()}
    assert verdict["AR ahead of MIM on segmentation"].endswith(
        "| ACDC, heart MRI |  | holds here |")
    run("mim75", la=(0.7, 0.8))
    assert "| LA 2018, MRI | cannot be told |" in pages.verdicts()
    run("ar")
    assert pages.paired({"a": ["p", 0.5], "b": ["q", 0.7]}, {"a": ["p", 0.4], "b": ["q", 0.4]}) == \
        pytest.approx([0.1, 0.3])
    assert "|  | LA 2018, MRI | does not hold here |" in pages.verdicts()
    run("ar", copied=0.76)  # no run is ahead of copying: no set counts
    assert "does not hold" not in pages.verdicts() and "cannot be told" in pages.verdicts()


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
