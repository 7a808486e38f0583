#!/usr/bin/env bash
# One generalist from scratch on a laptop's CPU: five invented datasets, no download, no GPU.
#   bash runs/cpu.sh [flags of train.py]
# Time: 5 minutes of one core, drawing and scoring included (Intel Xeon, float32, a core shared
# with other work, seed 0, 2026-11-26).
# Expected, held-out stand-ins, mIoU (copying the prompt's label): LA 0.51 (0.05), MicroSegNet 0.58
# (0.11), chest X-ray 0.57 (0.44), ACDC 0.10 (0.05); T1c and T2 19.0 dB (the input 17.5).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=runs/five
datasets="acdc chest_xray la microsegnet brats_gli"

[ -d $data ] || $python -m lab.phantom --out $data --datasets $datasets
# Binary colors and the squared loss show something after minutes (docs/study.md); the paper's
# random colors and smooth L1 are the defaults, and need longer.
length="--steps 200"
[[ " $* " != *" --minutes "* && " $* " != *" --epochs "* ]] || length=
$python train.py --data_root $data --datasets $datasets --model demo --image_size 64 $length \
    --coloring binary --set loss=l2 background_weight=0.2 drop_path=0 \
    --optimizer muon --lr 2e-3 --batch_size 16 --out runs/cpu "$@"
[[ " $* " == *" --dry_run "* ]] || \
    $python eval.py --data_root $data --datasets $datasets --checkpoint runs/cpu/last.pt
