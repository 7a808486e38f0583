#!/usr/bin/env bash
# A recipe like the bundled checkpoint's, one size up, on one GPU: 10.6 M parameters, 128 pixels.
#   bash runs/gpu.sh [DATA] [flags of train.py]
# DATA: a data root of yours; without it nineteen invented datasets are drawn first (minutes).
# Not run: hours and score are not known. Counted: 0.039 TFLOP a sample, 15 PFLOP for the 384,000
# samples, 9 GB of memory. A sample takes 8 ms of a loader's core (Intel Xeon, 2026-11-26).
# Ask first what it costs: bash runs/gpu.sh runs/drawn --dry_run
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=${1:-runs/drawn}
[ $# = 0 ] || shift
if [ "$data" = runs/drawn ] && [ ! -d $data ]; then
    $python -m lab.phantom --out $data
    $python -m lab.phantom --out $data \
        --datasets msd_hippocampus Dataset801_NerveUltrasound Dataset802_MsT1ToFlair
fi
$python train.py --data_root "$data" --model pocket --coloring binary --optimizer muon --lr 1e-3 \
    --seg_share 0.8 --augment 0.6 --synthetic_share 0.3 --batch_size 96 --steps 4000 \
    --set loss=l2 background_weight=0.2 balance=true hide_label=0.8 gate=true drop_path=0 \
    close_up=0.35 boxes=filled --log_every 50 --save_every 500 --out runs/gpu "$@"
[[ " $* " == *" --dry_run "* ]] || \
    $python eval.py --data_root "$data" --checkpoint runs/gpu/last.pt --wrong_prompt
