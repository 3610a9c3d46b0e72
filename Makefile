# Everything here needs python3 and make alone; packages come from wherever pip is configured to look.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-kernels test-convert fuzz lint bench train clean

demo: $(STAMP)
	$(RUN) examples/demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow and not kernels" -n auto --maxprocesses 4

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4

# Every configuration of every kernel compiled, its machine code looked at; no GPU is used.
test-kernels: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/kernels -n auto --maxprocesses 4

# Conversions killed a hundred times, at random points.
test-convert: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/checkpoints/test_convert_interrupted.py

# Hostile checkpoints, 100,000 of them (minutes); a failure names its seed: make fuzz FUZZ="--first SEED --count 1".
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) -m checkpoints.fuzz $(FUZZ)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Minutes on a quiet machine; the tables in README.md are made from what it writes.
bench: $(STAMP)
	$(RUN) benchmarks/cpu_layer.py
	$(RUN) benchmarks/cpu_layer.py --threads 1 --output benchmarks/results/cpu_layer_1_thread.json
	$(RUN) benchmarks/tables.py

# Repeats the training of the small model that ships in models/ (about half an hour on two cores).
train: $(STAMP)
	$(RUN) scripts/train_small_model.py --out out/tiny-deepseek-v4

# torch first and alone: the pinned version has a CPU build, which the other packages then find installed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
