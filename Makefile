# Everything runs in an environment of its own, made on first use: a machine needs Python 3.10 to 3.13 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# One process of tests a core, eight at most. One process runs them all without these, which suits a single file.
WORKERS ?= auto
PARALLEL := --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.PHONY: demo help test test-all test-native lint bench clean

demo: $(VENV)/.runs  ## a trained model on a rendered walk, dense and sparse against the truth, in about a minute on two cores once installed
	$(BIN)/svggt-kernels demo --force

help:  ## what make can do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1: \2/p' $(firstword $(MAKEFILE_LIST))

test: $(VENV)/.ready  ## the quick tests: every kind of test, a part of each fuzz
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(VENV)/.ready  ## every test that this machine can run
	$(BIN)/python -m pytest $(PARALLEL) --full

test-native: $(VENV)/.ready  ## the C++ of the CPU backend under address, undefined-behaviour and thread sanitizers
	$(BIN)/python -m pytest tests/backends/test_cpu_sanitizers.py --full

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready  ## the CPU-sized benchmark cases, checked before they are timed
	$(BIN)/python -m pytest benchmarks --benchmark-only

$(VENV)/.runs: pyproject.toml setup.py constraints.txt $(wildcard csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[viz]"
	touch $@

$(VENV)/.ready: $(VENV)/.runs tests/models.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,lint]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/models.txt
	touch $@

clean:  ## remove the environment, and what the demo and the tools wrote
	rm -rf $(VENV) demo-output layout-output compare-output evaluate-output sweep-output reconstruct-output .pytest_cache .mypy_cache .ruff_cache
