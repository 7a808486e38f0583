#!/usr/bin/env bash
# The paper's claims at a scale that two CPU cores can run: every run of claims.md, one after the other; what is finished (docs/claims/NAME.json) is skipped, what
# was stopped goes on.
#   bash docs/claims.sh REAL [NAME ...]     REAL: a data root with ACDC, LA, MSD Hippocampus, the nerve ultrasound set and T1 to FLAIR; NAME: only these runs
set -euo pipefail
cd "$(dirname "$0")/.."
real=$1
shift
only=" $* "
python=${PYTHON:-.venv/bin/python}
small="--model demo --optimizer muon --lr 2e-3 --bf16 --batch_size 32 --log_every 50 --save_every 100"
steps=${STEPS:-400}
segmentation="acdc la msd_hippocampus Dataset801_NerveUltrasound"
images="ldct brats_local brats_gli"
[ -d runs/claims/stand_ins ] || $python phantom.py --out runs/claims/stand_ins --datasets $images

claim() { # name, data root, datasets that are scored, flags of train.py
    local name=$1 out=runs/claims/$1 data=$2 scored=$3
    [ "$only" = "  " ] || [[ "$only" == *" $1 "* ]] || return 0
    shift 3
    [ ! -f "docs/claims/$name.json" ] || return 0
    if [ -f "$out/last.pt" ]; then $python train.py --resume "$out/last.pt"
    else $python train.py --data_root "$data" $small --out "$out" "$@"; fi
    $python eval.py --data_root "$data" --datasets $scored --checkpoint "$out/last.pt" --prompts ${prompts:-1}
    mkdir -p docs/claims # what is worth keeping: scores, settings, losses
    $python - "$out" "docs/claims/$name.json" <<'END'
import json, sys
run, to = sys.argv[1:]
result = json.load(open(run + "/eval/results.json"))
for r in result["datasets"].values():
    del r["ranked"]
for content, names in ((result, ("checkpoint", "store", "modified")), (result["training"], ("data_root", "store", "out"))):
    for name in names:
        content.pop(name, None)
result["log"] = [json.loads(line) for line in open(run + "/log.jsonl")]
json.dump(result, open(to, "w"))
END
}

five="$segmentation Dataset802_MsT1ToFlair"
claim unified     "$real" "$five" --datasets $five --steps $steps
for set in $segmentation; do # an eighth of the unified run's samples are of each
    claim "isolated-$set" "$real" $set --datasets $set --steps $((steps / 8))
    claim "unet-$set"     "$real" $set --datasets $set --steps $((steps / 8)) --model unet --image_size 64 --optimizer adamw --lr 1e-3
    claim "unet-long-$set" "$real" $set --datasets $set --steps $steps --model unet --image_size 64 --optimizer adamw --lr 1e-3 # eight times that
done
claim predefined  "$real" "$five" --datasets $five --steps $steps --coloring predefined
claim binary      "$real" "$five" --datasets $five --steps $steps --coloring binary
claim ar          "$real" "$segmentation" --datasets $segmentation --steps $steps --objective ar
claim mim75       "$real" "$segmentation" --datasets $segmentation --steps $steps --objective mim
claim mim50       "$real" "$segmentation" --datasets $segmentation --steps $steps --objective mim --mask_ratio 0.5
claim images-mim runs/claims/stand_ins "$images" --datasets $images --steps $steps --objective mim
claim images-ar  runs/claims/stand_ins "$images" --datasets $images --steps $steps --objective ar
claim data1       "$real" "$five" --datasets $five --steps $steps --data_fraction 0.01
claim data10      "$real" "$five" --datasets $five --steps $steps --data_fraction 0.1
claim data50      "$real" "$five" --datasets $five --steps $steps --data_fraction 0.5
claim sequence    "$real" "$five" --datasets $five --steps $steps --layout sequence
prompts=2 claim prompts2    "$real" "$five" --datasets $five --steps $steps --num_prompts 2
prompts=4 claim prompts4    "$real" "$five" --datasets $five --steps $steps --num_prompts 4
for seed in 1 2; do
    claim unified-seed$seed    "$real" "$five" --datasets $five --steps $steps --seed $seed
    claim predefined-seed$seed "$real" "$five" --datasets $five --steps $steps --seed $seed --coloring predefined
done
