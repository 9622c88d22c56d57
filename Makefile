# `make` lists the targets. Everything happens in .venv; PYTHON chooses the interpreter it is made with, PIP_ARGS is
# handed to pip (an index with CPU builds of torch, say).

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# How many processes `make test` runs tests in, a file at a time: what a file's tests share is made once.
WORKERS ?= 2

# How long `make soak` takes.
MINUTES ?= 10

# What `make sanitize` looks for: address,undefined or thread.
SANITIZE ?= address,undefined
SANITIZED := build/sanitize/$(SANITIZE)
ifeq ($(SANITIZE),thread)
SANITIZER_RUNTIME := libtsan.so
# The thread sanitizer follows no threads that are started after a fork.
SANITIZED_TESTS := $(addprefix tests/unit/quant/test_,workspace.py products.py layer_experts.py timed_copies.py) -k 'not forked'
else
SANITIZER_RUNTIME := libasan.so
SANITIZED_TESTS := tests/unit/quant tests/unit/runner/test_in_place.py --ignore-glob='*against_hqq*'
endif

# hqq compiles an extension nobody here uses wherever it sees nvcc.
export DISABLE_CUDA := 1

.PHONY: help setup demo test test-long soak sanitize cross-check check bench gpu format clean
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
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: setup  ## the same and what takes longer
	$(BIN)/python -m pytest --run-slow

sanitize: setup  ## the kernels' tests on a library that watches its memory; SANITIZE=thread: its threads
	@command -v cmake >/dev/null && command -v gcc >/dev/null || { echo "make sanitize needs cmake and gcc"; exit 1; }
	cmake -S . -B $(SANITIZED) -DCMAKE_C_COMPILER=gcc -DCMAKE_BUILD_TYPE=Release -DEXPERTD_SANITIZE=$(SANITIZE)
	cmake --build $(SANITIZED)
	OMP_NUM_THREADS=1 LD_PRELOAD=$$(gcc -print-file-name=$(SANITIZER_RUNTIME)) ASAN_OPTIONS=detect_leaks=0 \
	  TSAN_OPTIONS=suppressions=tests/support/thread_sanitizer.txt \
	  $(BIN)/python -m pytest -p tests.support.other_kernels --kernels-from $(SANITIZED) $(SANITIZED_TESTS)

soak: setup  ## runners and daemon killed at random for MINUTES, then the report; MEMORY=300KiB: experts in slots
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(MEMORY),--memory $(MEMORY))

cross-check: setup  ## the kernels' results on aarch64, under emulation, bit for bit those of this machine
	@$(BIN)/python -m tests.cross_check

check: setup  ## style, types, who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## speed and memory on the demo store, as a table and JSON
	@$(BIN)/python -m benchmarks

gpu: setup  ## what this machine's GPU makes of it: ten minutes, one JSON report without names of hosts or users
	@$(BIN)/python -m benchmarks.gpu

format: setup  ## put the code into its canonical form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built, not what was downloaded
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
