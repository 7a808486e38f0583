#!/usr/bin/env bash
# The bundled checkpoint's recipe with a larger model on one GPU: 10.6 M parameters, 128 pixels.
#   bash runs/gpu.sh STORE [flags of train.py]
# STORE: as of runs/checkpoint.sh, or one that lab.pack made small, unpacked: 23 MB hold 44 open
# sets and the stand-ins, 60 slices of each.
# Time: MINUTES, 14 by default; the schedule follows the clock. Killed: add --resume.
# Not run on a GPU: its score is not known. Counted: 0.039 TFLOP a sample, 9 GB of memory for 96.
# Needs torch, NumPy and scikit-image. Result: runs/gpu/half.pt, 21 MB, and the same in parts below
# 16 MB (cat half.pt.a? > half.pt), for a machine that gives no larger file back; log.jsonl.
set -euo pipefail
export START="--model pocket --set gate=true drop_path=0" PROCESSES=1 OMP_NUM_THREADS=16
export MINUTES=${MINUTES:-14} SIZE=128 ASK=128 OUT=${OUT:-runs/gpu}
cd "$(dirname "$0")/.."
bash runs/checkpoint.sh "$@" --batch_size "${BATCH:-256}" --lr 1e-3 \
    --seg_share 0.7 --synthetic_share 0.3 --set average=0.999 bf16=none pool="${POOL:-8000}" \
    --save_every 200
split -b 14m "$OUT/half.pt" "$OUT/half.pt."
