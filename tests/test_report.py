"""Tables, finished runs side by side, and figures."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import figures
import report
from fakes import failure, rand
from scans.datasets import DATASETS, find
from scans.volumes import write_json


def test_durations():
    expected = ((5, "5 s"), (59, "59 s"), (120, "2 min"), (3540, "59 min"), (3900, "1 h 05 min"),
                (86_400, "1 d 0 h"), (100_000, "1 d 3 h"))
    for seconds, text in expected:
        assert report.clock(seconds) == text


# -------------------------------------------------------------------------------------------------
# Tables


def test_the_papers_rows_add_up():
    """As the paper states them: 0.79 on average, 0.93 of its U-Net, 0.35 above UniverSeg, 0.735 on
    the abdomen."""
    row = {n: np.array(v.split(), float) for n, v in report.PAPER_2.items()}
    assert all(len(v) == 9 for v in row.values())
    assert all(len(v.split()) == 9 for v in report.PAPER_3.values())
    assert row["MVG"].mean() == pytest.approx(0.79, abs=0.005)
    assert (row["MVG"] / row["UNet"]).mean() == pytest.approx(0.93, abs=0.01)
    assert (row["MVG"] - row["UniverSeg*"]).mean() == pytest.approx(0.35, abs=0.01)
    assert row["MVG"][:4].mean() == pytest.approx(0.735)
    known = report.papers_scores()
    assert known["acdc"] == 0.85 and known["ldct"] == 33.521 and known["brats_gli"] == 24.721


def result(task="segmentation", ranked=(), **scores):
    """Results of a dataset: the prediction's scores, each with an interval, and copied ones."""
    spans = {m: [v - 0.1, v + 0.1] for m, v in scores.items()}
    copied = {m: v / 2 for m, v in scores.items()}
    about = {"task": task, "cases": 3, "patients": 2, "failed": 0, "no_cost": [], "ranked": ranked}
    return {**about, **scores, "interval": spans,
            "copy": {**copied, "interval": dict.fromkeys(scores)}}


RESULTS = {"acdc": result(mIoU=0.5, Dice=0.6),
           "ldct": result("denoising", MAE=0.02, PSNR=30.0, SSIM=0.8)}


def test_the_table_of_scores_stands_beside_what_needs_no_model():
    lines = report.score_table(RESULTS).splitlines()
    head = "| dataset | task | cases / patients | score | prompted | copied |"
    assert lines[0] == head and lines[1].count("---|") == 6
    assert lines[2] == ("| acdc | segmentation | 3 / 2 | mIoU | 0.500 [0.400, 0.600] | 0.250 |")
    assert [line.split(" | ")[3] for line in lines[2:]] == ["mIoU", "Dice", "PSNR", "SSIM"]
    more = {"ldct": {**RESULTS["ldct"], "filter": {"PSNR": 28.0, "interval": {"PSNR": None}},
                     "empty": {"PSNR": None}}}
    lines = report.score_table({**RESULTS, **more}).splitlines()
    assert lines[0] == head + " linear filter | empty |"
    assert lines[4].endswith("| 15.000 | 28.000 |  |") and lines[2].endswith("| 0.250 |  |  |")


def test_our_row_stands_below_the_papers():
    two, three = report.paper_tables(RESULTS, "our.pt").split("Table 3")
    rows = [line for line in two.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(report.PAPER_2) + 1
    assert rows[0].count("|") == 11 and "ACDC" in rows[0]
    cells = [c.strip() for c in rows[-1].strip("|").split("|")]
    assert cells == ["our.pt"] + ["0.50" if n == "acdc" else "" for n in report.TABLE_2]
    rows = [line for line in three.splitlines() if line.startswith("|")]
    cells = [c.strip() for c in rows[-1].strip("|").split("|")]
    assert cells == ["our.pt"] + [""] * 6 + ["0.020", "30.000", "0.800"]
    assert all(row.count("|") == 11 for row in rows)


def test_a_line_a_case_answer_and_class(tmp_path):
    lines = [{"dataset": "x", "case": "1", "patient": "a", "prompt": "p",
              "scores": {"prediction": {"liver": (0.5, 0.6), "spleen": (0.1, 0.2)},
                         "copy": {"liver": (0.3, 0.4)}}},
             {"dataset": "y", "case": "2", "patient": "b", "prompt": "q",
              "scores": {"prediction": {"image": (0.1, 20.0, 0.9), "boxes": (0.5, 1.0, 2.0)}}},
             {"dataset": "y", "case": "3", "error": "ValueError: no sense"}]
    report.write_csv(tmp_path / "cases.csv", lines)
    with open(tmp_path / "cases.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["kind"], r["part"]) for r in rows] == [
        ("1", "prediction", "liver"), ("1", "prediction", "spleen"), ("1", "copy", "liver"),
        ("2", "prediction", "image"), ("2", "prediction", "boxes"), ("3", "", "")]
    assert (rows[0]["IoU"], rows[0]["Dice"], rows[0]["prompt"]) == ("0.5", "0.6", "p")
    assert (rows[3]["PSNR"], rows[3]["IoU"], rows[4]["box_IoU"]) == ("20.0", "", "0.5")
    assert rows[5]["error"] == "ValueError: no sense" and rows[5]["IoU"] == ""


# -------------------------------------------------------------------------------------------------
# Finished runs side by side


def write_run(folder, share, **scores):
    found = {d: {"mIoU": v, "interval": {"mIoU": None}} for d, v in scores.items()}
    (folder / "eval").mkdir(parents=True)
    recipe = {"data_fraction": share, "coloring": "random", "out": folder.name}
    write_json(folder / "eval" / "results.json", {"datasets": found, "training": recipe})


def test_finished_runs_side_by_side(tmp_path, capsys):
    write_run(tmp_path / "a", 1.0, acdc=0.5, la=0.7)
    write_run(tmp_path / "b", 0.1, acdc=0.4)
    write_run(tmp_path / "c", 0.1, la=0.6)
    columns = [f"all={tmp_path / 'a'}", f"few={tmp_path / 'b'},{tmp_path / 'c'}"]
    evaluation.main(["--compare", *columns, "--out", str(tmp_path / "t")])
    said = capsys.readouterr().out
    assert "| acdc | mIoU | 0.500 | 0.400 |" in said
    assert "| mean of 2 | mIoU | 0.600 | 0.500 |" in said
    assert "| data_fraction | setting | 1.0 | 0.1 |" in said and "coloring" not in said
    assert (tmp_path / "t" / "compare.md").read_text() in said
    assert (tmp_path / "t" / "data.png").stat().st_size > 1000
    said = failure(capsys, evaluation.main, "--compare", tmp_path / "nowhere")
    assert "no results.json" in said
    said = failure(capsys, evaluation.main, "--compare", f"x={tmp_path / 'a'},{tmp_path / 'b'}")
    assert "acdc twice" in said


def test_columns_that_lack_a_dataset(tmp_path, capsys):
    """Blank where a run has no score, and no mean over what not all have; a run is named by its
    folder, or by the file of its results."""
    write_run(tmp_path / "a", 1.0, acdc=0.5, la=0.7)
    write_run(tmp_path / "b", 1.0, acdc=0.4)
    found = report.compare([str(tmp_path / "a"), f"b={tmp_path / 'b' / 'eval' / 'results.json'}"],
                           tmp_path / "t")
    said = capsys.readouterr().out
    assert list(found) == ["a", "b"] and "| la | mIoU | 0.700 |  |" in said
    assert "| mean of 1 | mIoU | 0.500 | 0.400 |" in said
    assert not (tmp_path / "t" / "data.png").exists()  # the runs do not differ in their share
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text("[1]")
    said = failure(capsys, evaluation.main, "--compare", tmp_path / "c")
    assert "c/results.json is no result of eval.py" in said


# -------------------------------------------------------------------------------------------------
# Figures


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


def colorful(path):
    """How many pixels are no gray."""
    return int((np.ptp(pixels(path), axis=2) > 30).sum())


def test_an_overlay_shows_the_slices_with_an_answer(tmp_path, monkeypatch):
    """At most 25, spread over those with a class; all of them where there is none."""
    titles, axis_type = [], figures.pyplot().Axes
    plain = axis_type.set_title
    monkeypatch.setattr(axis_type, "set_title",
                        lambda self, text, **more: titles.append(text) or plain(self, text, **more))
    stack, answer = rand(60, 16, 16), np.zeros((60, 16, 16), np.uint16)
    figures.draw_overlay(tmp_path / "none.png", stack, answer, [])
    assert len(titles) == 25 and titles[0] == "slice 1" and titles[-1] == "slice 60"
    assert colorful(tmp_path / "none.png") == 0
    titles.clear()
    answer[20:23, 4:12, 4:12], answer[21, :2] = 7, 900
    figures.draw_overlay(tmp_path / "some.png", stack, answer, [7, 900])
    assert titles == ["slice 21", "slice 22", "slice 23"]
    assert colorful(tmp_path / "some.png") > 1000
    titles.clear()
    figures.draw_overlay(tmp_path / "image.png", stack[:2], stack[:2] * 3000 - 1000)
    assert titles == ["slice 1", "slice 2"] and colorful(tmp_path / "image.png") == 0


def test_a_name_with_a_dollar_is_no_formula(tmp_path):
    figure, axis = figures.pyplot().subplots()
    axis.set_title(r"Dataset900_$\x$")
    figures.finish(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 500
    figure, _ = figures.pyplot().subplots()
    figures.finish(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_an_overlay_keeps_the_color_of_a_class_and_the_shape_of_a_pixel(tmp_path):
    """Whatever other classes an answer has, and also where nothing is background."""
    stack, colors = np.zeros((1, 16, 16)), []
    for number, answer in enumerate((np.full((1, 16, 16), 9), np.full((1, 16, 16), 9))):
        answer[0, :8] = 5 * number  # background above, or class 5
        figures.draw_overlay(tmp_path / "o.png", stack, answer, [5, 9])
        picture = pixels(tmp_path / "o.png")
        colors.append([tuple(picture[int(len(picture) * y), picture.shape[1] // 2])
                       for y in (0.3, 0.8)])
    (black, below), (above, below_again) = colors
    assert below == below_again and len({black, below, above}) == 3
    figures.draw_overlay(tmp_path / "flat.png", stack, answer, [5, 9], (4, 1))
    flat = pixels(tmp_path / "flat.png")
    assert len(flat) > 2 * flat.shape[1]


def test_scores_are_drawn_beside_copies_and_the_paper(tmp_path):
    figures.draw_scores(tmp_path / "scores.png", RESULTS, report.papers_scores())
    assert colorful(tmp_path / "scores.png") > 1000
    alone = {"x": {**result(mIoU=0.5), "interval": {"mIoU": None}}}  # one patient: no interval
    figures.draw_scores(tmp_path / "alone.png", alone, {})
    assert colorful(tmp_path / "alone.png") > 1000
    figures.draw_scores(tmp_path / "nothing.png", {"x": {"task": "segmentation", "mIoU": None}}, {})
    assert not (tmp_path / "nothing.png").exists()


def test_the_worst_the_median_and_the_best_case_are_drawn(tmp_path):
    dataset, asked = DATASETS["acdc"], []
    label = np.zeros((3, 20, 20), np.uint8)
    label[:, 5:15, 5:15] = 1

    def answer(name, case):
        asked.append((name, case))
        images = rand(3, 20, 20)
        return SimpleNamespace(images=images, prompt_images=images, prompt_labels=label,
                               truth=label, answers={"prediction": label})

    ranked = [(f"case{n}", n / 10) for n in range(5)]
    found = {"acdc": result(mIoU=0.5, ranked=ranked), "la": result(mIoU=0.5)}
    figures.draw_examples(tmp_path, found, answer, {"acdc": dataset, "la": dataset})
    assert asked == [("acdc", c) for c in ("case0", "case2", "case4")]
    assert colorful(tmp_path / "examples" / "acdc.png") > 1000
    one, three = (pixels(tmp_path / p).shape for p in ("examples.png", "examples/acdc.png"))
    assert one[1] == three[1] and one[0] * 2 < three[0]  # a row a dataset; three rows a dataset
    assert not (tmp_path / "examples" / "la.png").exists()


def test_five_panels_of_the_middle_slice():
    images, label = rand(3, 4, 4), np.ones((3, 4, 4), np.uint8)
    answer = SimpleNamespace(images=images, prompt_images=images / 2, prompt_labels=label,
                             truth=label * 2, answers={"prediction": label * 3})
    panels = figures.middle_slices(answer)
    assert [title for title, _, _ in panels] == ["prompt", "prompt label", "image", "truth",
                                                 "prediction"]
    assert [None if y is None else int(y.max()) for _, _, y in panels] == [None, 1, None, 2, 3]
    for (_, image, _), factor in zip(panels, (0.5, 0.5, 1, 1, 1)):
        assert np.array_equal(image, images[1] * np.float32(factor))


def test_losses_and_validation_scores_are_drawn(tmp_path):
    lines = [{"step": 10 * n, "losses": {"ar": {"acdc": 1 / n}, "mim": {"ldct": 2 / n}}}
             for n in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    figures.draw_loss(tmp_path / "loss.png", tmp_path / "log.jsonl")
    one = pixels(tmp_path / "loss.png")
    lines[-1]["validation"] = {"acdc": 0.5}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    figures.draw_loss(tmp_path / "loss.png", tmp_path / "log.jsonl")
    two = pixels(tmp_path / "loss.png")
    assert two.shape[1] > 1.5 * one.shape[1] and colorful(tmp_path / "loss.png") > 300


def test_a_slice_of_every_dataset_found_is_drawn(stand_ins, tmp_path):
    """Its slice with most classes, colored at random; a dataset that cannot be read is blank."""
    found = find(stand_ins)
    figures.draw_datasets(tmp_path / "data.png", found)
    assert pixels(tmp_path / "data.png").std() > 30
    for name in ("acdc", "Dataset802_MsT1ToFlair"):
        image, label = figures.first_pair(found[name])
        assert image.shape == label.shape and image.dtype == np.uint16
    _, label = figures.first_pair(found["acdc"])
    assert len(np.unique(label)) == 4 and 0 < label.max() <= 65535
    hit = found["acdc"]
    unread = replace(hit, cases=[replace(c, split="inference") for c in hit.cases])
    assert figures.first_pair(unread) is None
    figures.draw_datasets(tmp_path / "blank.png", {"acdc": unread})
    assert pixels(tmp_path / "blank.png").min() == 255
