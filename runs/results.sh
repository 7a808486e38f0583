#!/usr/bin/env bash
# Every score of the bundled checkpoint, into docs/results; then: python report.py docs
#   bash runs/results.sh REAL [NAME ...]     NAME: only these
# REAL: a data root with ACDC, LA, MSD Hippocampus, a nerve ultrasound set, T1 to FLAIR, DeepLesion,
# and what lab/loose_scans.py reads. A stopped evaluation goes on from its last case.
# Time: about three hours on one core, a third of it for `prompts`.
set -euo pipefail
cd "$(dirname "$0")/.."
real=$1
shift
only=" $* "
python=${PYTHON:-.venv/bin/python}
work=${WORK:-runs/results}
five="acdc la msd_hippocampus Dataset801_NerveUltrasound Dataset802_MsT1ToFlair"
all=$($python -c "from lab.phantom import STAND_INS; print(*STAND_INS)")

asked() { [ "$only" = "  " ] || [[ "$only" == *" $1 "* ]]; }

result() { # name, note, data root, flags of eval.py
    local name=$1 note=$2 root=$3
    shift 3
    asked "$name" || return 0
    $python eval.py --data_root "$root" --store "$work/store-$(basename "$root")" \
        --checkpoint "${checkpoint:-checkpoints/demo.pt}" --out "$work/$name" "$@"
    $python report.py keep "$work/$name" "docs/results/$name.json" --note "$note" \
        --command "bash runs/results.sh REAL $name"
}

mkdir -p "$work/data"
if asked loose && [ ! -d "$work/data/loose" ]; then
    $python -m lab.loose_scans --real "$real" --out "$work/data/loose"
fi
if asked stand_ins && [ ! -d "$work/data/stand_ins" ]; then
    $python -m lab.phantom --out "$work/data/stand_ins" --datasets $all
fi

result real "ACDC: 50 patients of WSL4MIS; LA: crops of UA-MT; hippocampus: 60 volumes" "$real" \
    --datasets $five --wrong_prompt
result all_at_once "The same cases as in real, every class in one answer" "$real" --no-each \
    --datasets acdc msd_hippocampus Dataset801_NerveUltrasound
for set in msd_hippocampus acdc; do  # what a user's own training cases add
    name=finetuned_$set
    if asked $name && [ ! -f "$work/$name-run/last.pt" ]; then
        $python train.py --data_root "$real" --store "$work/store-$(basename "$real")" \
            --datasets $set --finetune checkpoints/demo.pt --steps 150 --out "$work/$name-run"
    fi
    checkpoint="$work/$name-run/last.pt" result $name "150 steps of 16 on its training cases" \
        "$real" --datasets $set
done
result acdc_all "All cases; prompts are training cases of other patients" "$real" \
    --datasets acdc --split all
result loose "One patient: every other slice prompts the rest, 3 mm away" "$work/data/loose" \
    --split all --wrong_prompt
result boxes "Ten pictures of two patients" "$real" --datasets deeplesion --max_cases 10
result stand_ins "Other subjects of the kinds that it was trained on; two cases a dataset" \
    "$work/data/stand_ins" --max_cases 2
result all_slices "At most eight cases a dataset" "$real" --slices all --max_cases 8 \
    --datasets acdc msd_hippocampus
result prompts "Four cases a dataset" "$real" --max_cases 4 --prompt_draws 3 --prompts 1 2 4 8 \
    --datasets acdc la msd_hippocampus Dataset801_NerveUltrasound
if asked cost; then
    $python - <<'END'
import contextlib, datetime, io, json
import report
from lab import bench

found = {"command": "bash runs/results.sh REAL cost", "seed": 0, "hardware": report.hardware(),
         "date": str(datetime.date.today()), "code": report.commit(), "sizes": {}, "counted": {}}
for title, flags in {"`demo`, 128 pixels": "--model demo --image_size 128",
                     "`tiny`, 448 pixels": "--model tiny",
                     "`large`, 448 pixels": "--model large --bf16 --repeats 1"}.items():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.main([*flags.split(), "--only", "memory", "specialist", "--json"])
    part = json.loads(said.getvalue())
    found["sizes"][title] = part["specialist"]
    kind = "bfloat16" if "bf16" in flags else "float32"
    found["counted"][f"{title}, one sample, {kind}"] = part["memory"]["counted"]
json.dump(found, open("docs/results/cost.json", "w"), indent=1)
END
fi
[ ! -f "$work/prompts/prompts.png" ] || cp "$work/prompts/prompts.png" docs/prompts.png
