#!/usr/bin/env bash
# The paper's training: eight GPUs, 448 pixels, 100 epochs, 16 samples a GPU.
#   bash runs/paper.sh DATA [flags of train.py]
# DATA: a folder with the datasets as they were downloaded (docs/datasets.md).
# Not run: hours and score are not known. The paper's own mean mIoU is 0.794 on its nine sets.
# Counted: 4.0 TFLOP a sample and 40 GB a GPU; 5.4 TFLOP and 12 GB where activations are computed
# again, as on the paper's 24 GB. Samples an epoch are the training slices of what is in DATA.
# The size is the authors', ViT-L. The layout of the paper's text is --layout paper; the authors
# start from a MAE: --init mae_pretrain_vit_large.pth. Ask first what it costs: --dry_run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=$1
shift
torchrun="$python -m torch.distributed.run --standalone --nproc_per_node=${GPUS:-8}"

$torchrun train.py --data_root "$data" --out runs/paper "$@"
[[ " $* " == *" --dry_run "* ]] || \
    $torchrun eval.py --data_root "$data" --checkpoint runs/paper/last.pt --wrong_prompt
