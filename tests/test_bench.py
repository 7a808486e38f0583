"""bench.py runs and reports what it says; how fast is not a test's business."""

import json

import bench


def test_bench_reports_ratios(capsys):
    bench.main(["--model", "demo", "--image_size", "32", "--repeats", "1", "--only", "infer_cached", "synthetic", "--json"])
    result = json.loads(capsys.readouterr().out)
    for r in result["infer_cached"].values():
        assert r["ours_s"] > 0 and r["reference_s"] > 0 and r["ratio"] > 0
    assert result["synthetic"]["samples_per_second"] > 0
