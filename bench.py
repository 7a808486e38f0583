"""How fast it is, as ratios measured in one run: absolute times on a shared machine say little.

    python bench.py --model tiny --image_size 448 [--only infer_cached loader]

infer_cached: a further slice of a volume, its prompt encoded before, against encoding the prompt again for the slice; the
same weights and inputs, in turn.
loader: a training sample (prompt and task, 512 -> 448, colors, crops) from the prepared store against reading one 512x512x100
.nii.gz, which is what a sample costs without a store. One process, one thread.
synthetic: procedural training samples, one process, one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import torch

import data
import mvg
import synthetic


PARTS = ("infer_cached", "loader", "synthetic")


def in_turn(device, repeats, **functions):
    """Time functions in turn, A B A B ..., after a warm-up: {name: [seconds, ...]}."""
    seconds = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            elif device.type == "mps":
                torch.mps.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def infer_cached(model, device, batch, repeats):
    """Seconds a slice with and without the prompt cache, for each number of prompts."""
    size, result = model.config.image_size, {}
    for n in (1, 2, 4):
        images, labels = torch.rand(batch, n + 1, 1, size, size, device=device), torch.rand(batch, n + 1, 1, size, size, device=device)
        cache = model.encode_prompts(images[:, :n], labels[:, :n])
        seconds = in_turn(device, repeats, cached=lambda: model.predict(cache, images[:, n]),
                          whole=lambda: model.predict(model.encode_prompts(images[:, :n], labels[:, :n]), images[:, n]))
        ours, reference = (statistics.median(seconds[k]) / batch for k in ("cached", "whole"))
        ratio = statistics.median(w / c for w, c in zip(seconds["whole"], seconds["cached"]))
        result[f"{n} prompts"] = {"ours_s": round(ours, 5), "reference_s": round(reference, 5), "ratio": round(ratio, 2)}
    return result


def loader(repeats):
    """Seconds a sample from the store and from a .nii.gz."""
    import nibabel
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder) / "Dataset001_CT", np.random.default_rng(0)
        for part in ("imagesTr", "labelsTr"):
            (root / part).mkdir(parents=True)
        (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}))
        label = np.zeros((512, 512, 100), np.uint8)
        label[150:300, 200:350, 10:90] = 1
        for case in ("a", "b"):
            scan = rng.integers(-100, 200, label.shape, dtype=np.int16)
            nibabel.save(nibabel.Nifti1Image(scan, np.diag([0.8, 0.8, 3, 1])), root / "imagesTr" / f"{case}_0000.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, np.diag([0.8, 0.8, 3, 1])), root / "labelsTr" / f"{case}.nii.gz")
        data.prepare(data.find(folder), Path(folder) / "store")
        episodes = data.Episodes(data.Store(Path(folder) / "store"), 448, 16, 24)
        count = iter(range(10 ** 9))
        seconds = in_turn(torch.device("cpu"), repeats, store=lambda: [episodes[next(count), 0] for _ in range(10)],
                          file=lambda: np.asarray(nibabel.load(root / "imagesTr" / "a_0000.nii.gz").dataobj))
    torch.set_num_threads(threads)
    ours, reference = statistics.median(seconds["store"]) / 10, statistics.median(seconds["file"])
    ratio = statistics.median(10 * f / s for f, s in zip(seconds["file"], seconds["store"]))
    return {"ours_s": round(ours, 5), "reference_s": round(reference, 5), "ratio": round(ratio, 2)}


def synthetic_rate(size, tasks=24):
    """Synthetic samples (prompt and task) a second and core at a size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    for i in range(tasks):
        synthetic.task(np.random.default_rng([0, i]), 2, size, i % 2 == 0)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    return {"samples_per_second": round(tasks / seconds, 1)}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="tiny", choices=list(mvg.SIZES), help="size")
    p.add_argument("--image_size", type=int, help="pixels (default: the size's own)")
    p.add_argument("--layout", default="fused", choices=("fused", "sequence"), help="layout")
    p.add_argument("--batch_size", type=int, default=1, help="slices at once")
    p.add_argument("--repeats", type=int, default=7, help="timed repetitions, after one that is not")
    p.add_argument("--device", help="cpu, mps, cuda ... (default: the best there is)")
    p.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = p.parse_args(argv)
    device, reason = mvg.pick_device(args.device)
    torch.manual_seed(0)
    model = mvg.build(args.model, args.image_size, args.layout).to(device).eval()
    result = {}
    if "infer_cached" in args.only:
        result["infer_cached"] = infer_cached(model, device, args.batch_size, args.repeats)
    if "loader" in args.only:
        result["loader"] = loader(args.repeats)
    if "synthetic" in args.only:
        result["synthetic"] = synthetic_rate(model.config.image_size)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model}, image {model.config.image_size}, {args.layout}, batch {args.batch_size}, {device} ({reason})")
    for name, r in result.get("infer_cached", {}).items():
        print(f"infer_cached {name}: {r['ours_s']:.4f} s a slice, without the cache {r['reference_s']:.4f} s, ratio {r['ratio']:.2f}")
    if "loader" in result:
        r = result["loader"]
        print(f"loader: {1 / r['ours_s']:.0f} samples a second and core from the store; {r['reference_s']:.2f} s to read a .nii.gz, ratio {r['ratio']:.0f}")
    if "synthetic" in result:
        print(f"synthetic: {result['synthetic']['samples_per_second']:.0f} samples a second and core")


if __name__ == "__main__":
    data.command_line(main)
