"""bench.py runs and reports what it says; how fast is not a test's business."""

import json

import bench


def test_bench_reports_ratios(capsys):
    bench.main(["--model", "demo", "--image_size", "32", "--batch_size", "16", "--repeats", "1", "--workers", "0", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == list(bench.PARTS)
    for r in (result["train_step"], result["infer_cached"], *result["infer_cached"]["again"].values(), result["loader"], result["store"]):
        assert r["ours_s"] > 0 and r["reference_s"] > 0 and r["ratio"] > 0
    assert 0 < result["train_step"]["utilisation"] < 1 and result["synthetic"]["samples_per_second"] > 0
    assert 0 < result["memory"]["recomputed_gb"] < result["memory"]["ours_gb"] < result["memory"]["reference_gb"]
