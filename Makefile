# The two entrances: `make demo` and `make test`. Each makes .venv and installs what it needs, once.
#   make demo CORPUS=my_texts/       the demo on your own files (.txt, .jsonl, a folder)
#   make test-slow                   everything, the long tests too
#   make test-gpu                    the tests that need a GPU, on one
#   make test-simulated-gpu          the way of a GPU, with a CUDA build of torch and no GPU
#   make test-slurm                  jobs on a real Slurm: apt-get install slurmctld slurmd munge
#   make chaos ROUNDS=100            kill a training run so often, and compare it with one left alone
#   make lint                        ruff and mypy

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests that share a file share its costly fixtures; in the order of tests/conftest.py.
BOTH_CORES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-gpu test-simulated-gpu chaos test-slurm lint format docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	@$(BIN)/python -m megatron_ext.study.demo $(if $(CORPUS),--corpus "$(CORPUS)")

test: $(INSTALLED)
	@$(BIN)/python -m pytest $(BOTH_CORES) -m "not slow and not gpu and not slurm"

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest

test-gpu: $(INSTALLED)
	@$(BIN)/python -m pytest -m gpu

test-simulated-gpu: $(INSTALLED)
	@$(BIN)/python -m pytest tests/simulated_gpu

test-slurm: $(INSTALLED)
	@$(BIN)/python -m pytest -m "slurm and not slow"

chaos: $(INSTALLED)
	@$(BIN)/python -m tests.chaos --rounds $(or $(ROUNDS),100)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/megatron-ext schema --markdown > docs/config.md.tmp && mv docs/config.md.tmp docs/config.md

# torch first and by its version: left to the resolver, the newest one with another CUDA would come.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10: make PYTHON=python3.11 ..."; exit 2; }
	@echo "Setting up $(VENV) (once; about 2 minutes)"
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "error: $(PYTHON) has no venv module: install it, e.g. apt-get install python3-venv"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs/demo
