# `make` lists the targets. Everything happens in .venv; PYTHON chooses the interpreter it is made with, PIP_ARGS is
# handed to pip (an index with CPU builds of torch, say).

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# hqq compiles an extension nobody here uses wherever it sees nvcc.
export DISABLE_CUDA := 1

.PHONY: help setup demo test test-long check bench format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## make .venv and install everything into it

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard quant/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; 'make PYTHON=python3.12 $(MAKECMDGOALS)' chooses another one"; exit 1; }
	@echo "installing into $(VENV) (torch and friends: some hundred MB, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[test,demo,dev]'
	@touch $@

demo: setup  ## build the demo model, quantize it, start expertd, generate text
	@$(BIN)/python -m tools.demo

test: setup  ## everything that runs without a GPU, in minutes
	$(BIN)/python -m pytest

test-long: setup  ## the same and what takes longer
	$(BIN)/python -m pytest --run-slow

check: setup  ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## speed and memory on the demo store, as a table and JSON
	@$(BIN)/python -m benchmarks

format: setup  ## put the code into its canonical form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, not what was downloaded
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
