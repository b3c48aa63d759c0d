# What a person does with Marathon; `make` alone lists it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup smoke test chaos check format clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/ready ## the environment in .venv, with the versions of constraints.txt

smoke: $(VENV)/ready ## the whole chain on two CPU cores: text to released model, in minutes
	$(BIN)/marathon run experiment=smoke

test: $(VENV)/ready ## all tests; as root on Debian also those on a real Slurm, which is installed if need be
	$(BIN)/python -m pytest

chaos: $(VENV)/ready ## kill a small run KILLS times (6) on a real Slurm, as root on Debian; SEED (1) draws the moments
	$(BIN)/python benchmarks/chaos.py --kills $(or $(KILLS),6) --seed $(or $(SEED),1)

check: $(VENV)/ready ## format, lint, types, imports between rooms, layout
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	@imports=$$($(BIN)/lint-imports 2>&1) || { echo "$$imports"; exit 1; }
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(VENV)/ready ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove environment and caches; runs and corpora stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# torch comes first and by name: whatever else is installed then keeps it.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "error: $$($(PYTHON) --version 2>&1)"; echo "  rule:   Python 3.11, 3.12 or 3.13"; \
	    echo "  repair: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
