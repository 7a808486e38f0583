# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make .venv and install into it.
PYTHON ?= python3
BIN = .venv/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test test-slow clean

.venv/done: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r tests/requirements.txt
	touch $@

# So many tests at once, of a thread each; make JOBS=1 for one after the other.
JOBS ?= 2
TESTS = $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations 12 tests
test test-slow: export OMP_NUM_THREADS = 1

test: .venv/done
	$(TESTS) -m "not slow"

# What takes minutes: small models have to learn something, programs are killed and go on, the notebooks run.
test-slow: .venv/done
	$(TESTS) -m slow

# The bundled checkpoint on subjects it never saw: one prompt, then the four kinds of task; then a few minutes of training on
# them, and the same again. Pictures: runs/demo/before, runs/demo/after.
DEMO_DATASETS = acdc ldct brats_local Dataset802_MsT1ToFlair
DEMO_STEPS ?= 300
DEMO_SCAN = demo/data/ACDC/database/testing

demo: .venv/done
	rm -rf demo runs/demo
	$(BIN)/python phantom.py --out demo/data --seed 1 --datasets $(DEMO_DATASETS)
	$(BIN)/python infer.py --prompt $(DEMO_SCAN)/patient101/patient101_frame01.nii.gz --input $(DEMO_SCAN)/patient104/patient104_frame01.nii.gz \
	    --output demo/answer.nii.gz
	$(BIN)/python eval.py --data_root demo/data --store demo/store --checkpoint checkpoints/demo.pt --out runs/demo/before --wrong_prompt
	$(BIN)/python -m torch.distributed.run --standalone --nproc_per_node=1 train.py --data_root demo/data --store demo/store \
	    --finetune checkpoints/demo.pt --steps $(DEMO_STEPS) --augment 0.3 --log_every 50 --out runs/demo
	$(BIN)/python eval.py --data_root demo/data --store demo/store --checkpoint runs/demo/last.pt --out runs/demo/after
	@echo "pictures: runs/demo/before/examples.png, runs/demo/after/examples.png; the answer to the prompt: demo/answer.nii.gz"

clean:
	rm -rf .venv demo runs/demo .pytest_cache
