#!/usr/bin/env bash
# What a GPU machine makes of this code, as one JSON, in at most 3 minutes.
#   bash runs/device.sh [OUT.json]
# Not run on a GPU. On a CPU, small: LARGE=demo SMALL=demo BATCH=2 SIZE=32 bash runs/device.sh
# Measured: samples a second of the 10 M model at 128 pixels (data alone, step alone, both), and
# steps of `large` at 448 pixels, eager and with its blocks compiled, with the memory they took.
# Aims: 2,500 samples/s of both; AR of `large` from 0.36 s a step (eager, H100) to 0.21 s.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-docs/results/device.json}
parts=$(mktemp -d)
bench() { # name, flags
    local name=$1
    shift
    timeout 100 $python -m lab.bench --json "$@" > "$parts/$name.json" 2> "$parts/$name.log" ||
        tail -n 3 "$parts/$name.log" >&2
}
small="--model ${SMALL:-pocket} ${SIZE:+--image_size $SIZE} --workers ${WORKERS:-14}"
large="--model ${LARGE:-large} ${SIZE:+--image_size $SIZE} --batch_size ${BATCH:-16} --repeats 3"
bench samples $small --batch_size $((16 * ${BATCH:-16})) --only samples
bench samples_compiled $small --batch_size $((16 * ${BATCH:-16})) --only samples --compile
bench large $large --only train_step
bench large_compiled $large --only train_step --compile
$python - "$parts" "$out" <<'END'
import json, pathlib, sys, time, torch
parts, out = map(pathlib.Path, sys.argv[1:])
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
result = {"command": "bash runs/device.sh", "date": time.strftime("%Y-%m-%d"), "seed": 0,
          "gpu": gpu, "torch": torch.__version__}
for path in sorted(parts.glob("*.json")):
    text = path.read_text().strip()
    result[path.stem] = json.loads(text.splitlines()[-1]) if text else "failed"
out.write_text(json.dumps(result, indent=1) + "\n")
print(out.read_text())
END
