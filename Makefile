# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make .venv and install into it.
PYTHON ?= python3
BIN = .venv/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-slow clean

.venv/done: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

test: .venv/done
	$(BIN)/python -m pytest -q -m "not slow" tests

# What takes minutes: a small model has to learn something.
test-slow: .venv/done
	$(BIN)/python -m pytest -q -s -m slow tests

# Stand-in data in native layouts (demo/), a few minutes of training (runs/demo), one prompt, scores, a figure.
DEMO_DATASETS = la msd_hippocampus Dataset802_MsT1ToFlair
DEMO_STEPS ?= 400
DEMO_SCAN = demo/data/Task04_Hippocampus/imagesTr/hippocampus_

demo: .venv/done
	rm -rf demo runs/demo
	$(BIN)/python phantom.py --out demo/data --datasets $(DEMO_DATASETS)
	$(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=1 train.py --data_root demo/data --store demo/store \
	    --out runs/demo --model demo --optimizer muon --steps $(DEMO_STEPS) --log_every 50
	$(BIN)/python infer.py --checkpoint runs/demo/last.pt --prompt $(DEMO_SCAN)001.nii.gz --input $(DEMO_SCAN)023.nii.gz \
	    --output demo/answer.nii.gz
	$(BIN)/python eval.py --data_root demo/data --store demo/store --checkpoint runs/demo/last.pt --out runs/demo/eval
	@echo "figure: runs/demo/eval/examples.png; the answer to the prompt: demo/answer.nii.gz; training: runs/demo/loss.png, samples.png"

clean:
	rm -rf .venv demo runs/demo .pytest_cache
