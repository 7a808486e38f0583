# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make .venv and install into it.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test clean

.venv/done: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: .venv/done
	$(BIN)/python -m pytest -q tests

# Stand-in data in native layouts, a few minutes of training, one prompt, scores, a figure: all below demo/.
demo: .venv/done
	rm -rf demo/run
	$(BIN)/python phantom.py --out demo/data
	$(BIN)/torchrun --standalone --nproc_per_node=1 train.py --data_root demo/data --store demo/store --out demo/run --model demo \
	    --datasets $(DEMO_DATASETS) --optimizer muon --batch_size 16 --steps $(DEMO_STEPS) --save_every 200
	$(BIN)/python infer.py --checkpoint demo/run/last.pt --prompt $(DEMO_CASE)002/patient002_frame01.nii.gz --input $(DEMO_INPUT) \
	    --output demo/answer.nii.gz
	$(BIN)/python eval.py --data_root demo/data --store demo/store --datasets $(DEMO_DATASETS) --checkpoint demo/run/last.pt --out demo/run/eval
	@echo "figure: demo/run/eval/examples.png   answer: demo/answer.nii.gz"

clean:
	rm -rf .venv demo .pytest_cache
