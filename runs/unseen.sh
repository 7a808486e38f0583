#!/usr/bin/env bash
# Section 4.2, out of distribution: MSD liver with a new prompt only; MSD spleen and lung with a new
# prompt only and after fine-tuning on one case.
#   bash runs/unseen.sh DIR [CKPT] [STEPS]     DIR: a data root with MSD Task03, Task06, Task09
# Result: docs/results/unseen_NAME.json, and the table of docs/claims.md by python report.py docs.
# A checkpoint that was trained on these sets is no test. The bundled one saw stand-ins of them.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 checkpoint=${2:-checkpoints/demo.pt} steps=${3:-300}
python=${PYTHON:-.venv/bin/python}
work=${WORK:-runs/unseen}

score() { # name, dataset, checkpoint
    $python eval.py --data_root "$data" --store "$work/store" --datasets "$2" --checkpoint "$3" \
        --out "$work/$1-eval"
    $python report.py keep "$work/$1-eval" "docs/results/unseen_$1.json" \
        --command "bash runs/unseen.sh DIR $checkpoint $steps"
}

mkdir -p "$work"
score liver msd_liver "$checkpoint"
for organ in spleen lung; do
    score $organ msd_$organ "$checkpoint"
    $python train.py --data_root "$data" --store "$work/store" --datasets msd_$organ \
        --cases 1 --augment 1 --finetune "$checkpoint" --steps "$steps" --out "$work/$organ"
    score ${organ}_one msd_$organ "$work/$organ/last.pt"
done
