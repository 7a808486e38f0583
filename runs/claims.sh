#!/usr/bin/env bash
# The paper's ablations at a scale that a CPU can run: every run of docs/claims.md, one by one.
#   bash runs/claims.sh REAL STEPS [NAME ...]     NAME: only these runs
# REAL: a data root with ACDC, LA, MSD Hippocampus, a nerve ultrasound set and T1 to FLAIR.
# STEPS: the budget of every run, in steps of 32 samples; docs/claims.md has 400.
# Isolated runs and U-Nets take an eighth of it, unless their name says otherwise.
# What is finished (docs/claims/NAME.json with this budget) is skipped, what was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
real=$1
steps=$2
shift 2
only=" $* "
python=${PYTHON:-.venv/bin/python}
small="--model demo --image_size 64 --optimizer muon --lr 2e-3 --set bf16=false --batch_size 32
    --log_every 50 --save_every 100"
unet="--model unet --optimizer adamw --lr 1e-3"
segmentation="acdc la msd_hippocampus Dataset801_NerveUltrasound"
five="$segmentation Dataset802_MsT1ToFlair"
images="ldct brats_local brats_gli"
drawn=runs/claims/stand_ins
[ -d $drawn ] || $python -m lab.phantom --out $drawn --datasets $images

claim() { # name, data root, datasets, flags of train.py
    local name=$1 data=$2 datasets=$3 out=runs/claims/$steps/$1
    shift 3
    [ "$only" = "  " ] || [[ "$only" == *" $name "* ]] || return 0
    ! grep -qs "\"budget\": $steps," "docs/claims/$name.json" || return 0
    if [ -f "$out/last.pt" ]; then
        $python train.py --resume "$out/last.pt"
    else
        $python train.py --data_root "$data" --datasets $datasets $small --out "$out" "$@"
    fi
    $python eval.py --data_root "$data" --datasets $datasets --checkpoint "$out/last.pt" \
        --prompts "${prompts:-1}" --looks 1
    keep "$out" "docs/claims/$name.json"
}

keep() { # run folder, file: what is worth keeping are scores, settings and losses
    $python - "$@" "$steps" <<'END'
import datetime, json, sys
import report
run, to, budget = sys.argv[1:]
result = json.load(open(run + "/eval/results.json"))
lines = map(json.loads, open(run + "/eval/scores.jsonl"))
patients = {(line["dataset"], line["case"]): line["patient"] for line in lines if "patient" in line}
for name, scores in result["datasets"].items():  # for paired differences
    scores["case_scores"] = {case: [patients[name, case], round(value, 4)]
                             for case, value in scores.pop("ranked")}
for name in ("checkpoint", "store", "modified"):
    result.pop(name, None)
result |= {"command": "bash runs/claims.sh REAL " + budget, "budget": int(budget),
           "date": str(datetime.date.today()), "code": report.commit(),
           "hardware": report.hardware(),
           "log": [json.loads(line) for line in open(run + "/log.jsonl")]}
json.dump(result, open(to, "w"))
END
}

claim unified "$real" "$five" --steps $steps
claim predefined "$real" "$five" --steps $steps --coloring predefined
claim binary "$real" "$five" --steps $steps --coloring binary
claim ar "$real" "$segmentation" --steps $steps --objective ar
claim mim75 "$real" "$segmentation" --steps $steps --objective mim
for set in $segmentation; do # an eighth of the unified run's samples are of each
    claim "isolated-$set" "$real" $set --steps $((steps / 8))
    claim "unet-$set" "$real" $set --steps $((steps / 8)) $unet
done
claim sequence "$real" "$five" --steps $steps --layout sequence
for seed in 1 2; do # three seeds of every coloring
    claim "unified-seed$seed" "$real" "$five" --steps $steps --seed $seed
    claim "predefined-seed$seed" "$real" "$five" --steps $steps --seed $seed --coloring predefined
    claim "binary-seed$seed" "$real" "$five" --steps $steps --seed $seed --coloring binary
done
claim data10 "$real" "$five" --steps $steps --data_fraction 0.1
claim data50 "$real" "$five" --steps $steps --data_fraction 0.5
claim images-mim $drawn "$images" --steps $steps --objective mim
claim images-ar $drawn "$images" --steps $steps --objective ar
for set in $segmentation; do # eight times as many
    claim "unet-long-$set" "$real" $set --steps $steps $unet
done
claim data1 "$real" "$five" --steps $steps --data_fraction 0.01
claim mim50 "$real" "$segmentation" --steps $steps --objective mim --mask_ratio 0.5
prompts=2 claim prompts2 "$real" "$five" --steps $steps --num_prompts 2
prompts=4 claim prompts4 "$real" "$five" --steps $steps --num_prompts 4
