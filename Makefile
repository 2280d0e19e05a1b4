# Needs python3 (3.11 or newer) with venv, and nothing else. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests start many small processes; more than one thread each only makes them wait for one another.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# `make test PYTEST_ARGS="-m 'not slow'"` leaves out the minutes-long experiments.
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format acceptance recipes-page clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed  ## set up, build a tiny model, align it, say where the report lies
	$(BIN)/alignkit quickstart

test: $(VENV)/.installed-dev  ## set up and run every test
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## style, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## repair style where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

acceptance: $(VENV)/.installed-dev  ## every method's experiments on three seeds; updates docs/acceptance.md
	$(TEST_ENV) $(BIN)/python scripts/acceptance.py --write

recipes-page: $(VENV)/.installed-dev  ## write recipes/README.md anew
	$(BIN)/python scripts/recipes_page.py

clean:  ## remove the environment, caches and build outputs; runs stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than the files that decide what is installed, so a second `make` installs nothing.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"alignkit needs Python 3.11 or newer, this is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.installed $@
