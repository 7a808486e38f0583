#!/usr/bin/env bash
# The bundled checkpoint's recipe. It goes on from checkpoints/demo.pt, or begins anew with START.
#   bash runs/checkpoint.sh STORE [flags of train.py]
#   START="--model demo --set gate=true drop_path=0" bash runs/checkpoint.sh STORE
# STORE: a prepared store (train.py --data_root DIR --store STORE --dry_run makes one).
# Time: MINUTES, 34 by default; the schedule follows the clock. Killed: add --resume.
# PROCESSES: 2 by default, for the two cores of the machine that trained the file.
# SIZE: pixels, 96 by default; the last step had 128 (docs/study.md). ASK: pixels of the result, 128.
# Result: $OUT/half.pt, the averaged weights in 16 bits, without the optimizer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/checkpoint}
store=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
$python -m torch.distributed.run --standalone --nproc_per_node="${PROCESSES:-2}" train.py \
    --store "$store" ${START:---finetune checkpoints/demo.pt} --minutes "${MINUTES:-34}" \
    --image_size "${SIZE:-96}" --coloring binary --optimizer muon --lr 4e-4 --batch_size 16 \
    --seg_share 0.6 --augment 0.8 --synthetic_share 0.2 --set loss=smooth_l1 mask_loss=l2 background_weight=0.2 \
    hide_label=0.8 boxes=filled superpixels=0.25 average=0.99 bf16=false \
    --log_every 20 --save_every 100 --out "$out" "$@"
$python - "$out" "${ASK:-128}" <<'END'
import sys
import mvg
from running.checkpoints import load_checkpoint, resized
out, side = sys.argv[1], int(sys.argv[2])
kept = load_checkpoint(out + "/last.pt")
model = resized(mvg.load(out + "/last.pt"), side).half()
mvg.save(out + "/half.pt", model, recipe={**kept["recipe"], "image_size": side}, step=kept["step"])
END
