# `make demo` and `make test` need Python 3.10 or newer and nothing else: they make .venv first.
PYTHON ?= python3
BIN = .venv/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: app demo lint test test-slow clean

.venv/done: requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    -r requirements.txt -r tests/requirements.txt
	touch $@

# So many tests at once, of a thread each; make JOBS=1 for one after the other.
JOBS ?= 2
TESTS = $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup --durations 12 tests
test test-slow: export OMP_NUM_THREADS = 1

lint: .venv/done
	$(BIN)/python -m ruff check .

test: lint
	$(TESTS) -m "not slow"

# What takes minutes: models have to learn something, programs are killed, the notebooks run.
test-slow: .venv/done
	$(TESTS) -m slow

# The bundled checkpoint on invented subjects that it never saw: one prompt by the command line,
# then four kinds of task as one picture: demo/demo.png.
DEMO_DATASETS = acdc ldct brats_local Dataset802_MsT1ToFlair
DEMO_SCAN = demo/data/ACDC/database/testing

demo: .venv/done
	rm -rf demo
	$(BIN)/python -m lab.phantom --out demo/data --seed 1 --datasets $(DEMO_DATASETS)
	$(BIN)/python infer.py --prompt $(DEMO_SCAN)/patient101/patient101_frame01.nii.gz \
	    --input $(DEMO_SCAN)/patient104/patient104_frame01.nii.gz --output demo/answer.nii.gz
	$(BIN)/python -m lab.demo --data_root demo/data --store demo/store --out demo/demo.png
	@echo "look at demo/demo.png; the answer to the prompt is demo/answer.nii.gz"

# The page: http://127.0.0.1:8000
app: .venv/done
	$(BIN)/python app.py

clean:
	rm -rf .venv demo .pytest_cache
