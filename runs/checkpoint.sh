#!/usr/bin/env bash
# The bundled checkpoint's recipe. It goes on from checkpoints/demo.pt, or begins anew with START.
#   bash runs/checkpoint.sh STORE [flags of train.py]
#   START="--model demo --set gate=true drop_path=0" bash runs/checkpoint.sh STORE
# STORE: a prepared store (train.py --data_root DIR --store STORE --dry_run makes one).
# Time: MINUTES, 85 by default; the schedule follows the clock. Killed: add --resume.
# PROCESSES: 1 by default, for the core that the file had; a second core was at other work.
# Result: $OUT/half.pt, the averaged weights in 16 bits, without the optimizer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/checkpoint}
store=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
$python -m torch.distributed.run --standalone --nproc_per_node="${PROCESSES:-1}" train.py \
    --store "$store" ${START:---finetune checkpoints/demo.pt} --minutes "${MINUTES:-85}" \
    --image_size 128 --coloring binary --optimizer muon --lr 5e-4 --batch_size 16 \
    --seg_share 0.7 --augment 0.7 --synthetic_share 0.25 \
    --set loss=smooth_l1 mask_loss=l2 background_weight=0.2 hide_label=0.8 boxes=filled \
    superpixels=0.2 average=0.995 bf16=false --log_every 20 --save_every 100 --out "$out" "$@"
$python - "$out" <<'END'
import sys
from running.checkpoints import load_checkpoint, write_checkpoint
kept = load_checkpoint(sys.argv[1] + "/last.pt")
kept = {name: kept[name] for name in ("config", "meta", "model", "recipe", "step")}
kept["model"] = {name: value.half() for name, value in kept["model"].items()}
write_checkpoint(sys.argv[1] + "/half.pt", kept)
END
