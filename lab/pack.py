"""A prepared store made small enough to be sent to a machine that has a GPU and no scans.

    python -m lab.pack STORE OUT.tar.xz [--datasets ...] [--side 160] [--slices 40]
    tar xf OUT.tar.xz -C FOLDER             there; then train.py --store FOLDER

Kept are training cases, of each dataset at most so many slices with foreground, spread over its
cases; images of 8 bits, at most `side` pixels along a side. What is sent is no store to score on.
"""

import argparse
import json
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from scans.store import Store, shrink
from scans.volumes import command_line


def pack(store, out, side, slices):
    """Write the archive of a `Store`: (slices kept, bytes written)."""
    kept = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in store.datasets:
            cases = [case for case in store.split(name, "train") if case.foreground]
            about = json.loads((store.root / name / "dataset.json").read_text())
            about["cases"] = []
            for case, chosen in zip(cases, share_out(cases, slices)):
                if chosen:
                    write_case(case, chosen, Path(folder) / name / case.folder.name, side)
                    about["cases"].append(case.folder.name)
                    kept += len(chosen)
            if about["cases"]:
                (Path(folder) / name / "dataset.json").write_text(json.dumps(about))
        with tarfile.open(out, "w:xz") as archive:
            archive.add(folder, ".")
    return kept, Path(out).stat().st_size


def share_out(cases, most):
    """For every case the slices that are kept: all, or about `most` over all cases together."""
    total = sum(len(case.foreground) for case in cases)
    share, kept = min(1.0, most / max(1, total)), []
    for i, case in enumerate(cases):
        count = len(case.foreground)
        wanted = int((i + 1) * share * count + 0.5) - int(i * share * count + 0.5)
        places = np.linspace(0, count - 1, wanted + 2).round().astype(int)[1:-1]
        kept.append([case.foreground[k] for k in sorted(set(places.tolist()))])
    return kept


def write_case(case, chosen, folder, side):
    """Some slices of a `StoredCase`, in the form of the store."""
    folder.mkdir(parents=True)
    parts = [case.stored(k) for k in chosen]
    size = tuple(min(n, side) for n in parts[0][0].shape)
    arrays = {"image": np.stack([p[0] for p in parts]), "label": np.stack([p[1] for p in parts])}
    if parts[0][2] is not None:
        arrays["valid"] = np.stack([p[2] for p in parts])
    arrays = {name: shrink(stack, size) for name, stack in arrays.items()}
    arrays["image"] = (arrays["image"] // 257).astype(np.uint8)  # 65535 becomes 255
    for name, stack in arrays.items():
        np.save(folder / f"{name}.npy", stack)
    scale = np.array(size * 2) / np.array(parts[0][0].shape * 2)  # boxes are of single slices
    index = {**case.index, "slices": len(chosen), "size": list(size),
             "foreground": list(range(len(chosen))), "classes": [case.classes[k] for k in chosen],
             "boxes": [(np.array(box) * scale).astype(int).tolist() for box in case.index["boxes"]],
             "bytes": {p.name: p.stat().st_size for p in folder.glob("*.npy")}}
    (folder / "case.json").write_text(json.dumps(index))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("store", help="a prepared store")
    p.add_argument("out", help="the archive, .tar.xz")
    p.add_argument("--datasets", nargs="+", help="only these")
    p.add_argument("--side", type=int, default=160, help="most pixels along a side")
    p.add_argument("--slices", type=int, default=40, help="about so many of a dataset at most")
    args = p.parse_args(argv)
    kept, size = pack(Store(args.store, args.datasets), args.out, args.side, args.slices)
    print(f"{args.out}: {kept} slices, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line(main)
