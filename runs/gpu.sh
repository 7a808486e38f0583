#!/usr/bin/env bash
# The bundled checkpoint's recipe, one size up, on one GPU: 10.6 M parameters, 128 pixels, patch 8.
#   bash runs/gpu.sh STORE [flags of train.py]
# STORE: a prepared store (train.py --data_root DIR --store STORE --dry_run makes one), or one that
# lab.pack made small, unpacked: 23 MB hold 44 open sets and the stand-ins, 60 slices of each.
# Time: MINUTES, 14 by default; the schedule follows the clock. Killed: add --resume.
# Not run on a GPU: its score is not known. Counted: 0.039 TFLOP a sample, 9 GB of memory for 96.
# Needs torch, NumPy and scikit-image; results are below 16 MB a file with `half` (runs/gpu/half.pt).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
store=$1
shift
$python train.py --store "$store" --model pocket --coloring binary --optimizer muon --lr 1e-3 \
    --minutes "${MINUTES:-14}" --seg_share 0.7 --augment 0.8 --synthetic_share 0.3 \
    --batch_size "${BATCH:-256}" --set loss=l2 background_weight=0.2 balance=true hide_label=0.8 \
    gate=true drop_path=0 close_up=0.35 boxes=filled superpixels=0.25 average=0.999 \
    pool="${POOL:-8000}" --log_every 20 --save_every 200 --out "${OUT:-runs/gpu}" "$@"
# What is shipped: the averaged weights in 16 bits, without the optimizer.
$python - "${OUT:-runs/gpu}" <<'END'
import sys, torch
from running.checkpoints import load_checkpoint, write_checkpoint
kept = load_checkpoint(sys.argv[1] + "/last.pt")
kept = {name: kept[name] for name in ("config", "meta", "model", "recipe", "step")}
kept["model"] = {name: value.half() for name, value in kept["model"].items()}
write_checkpoint(sys.argv[1] + "/half.pt", kept)
END
