# Espalier. `make` alone lists what there is to do.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
SOAK_MINUTES ?= 30
# A process a core, of one thread each. A file's tests stay together, since they share a Ray of their
# own; files go in the order of the folders, which has the longest early.
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo check test test-slow test-faults soak miniature bench bench-search bench-train bench-checkpoint study clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with everything, once

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $@

# Apart, because diffusers imports torchao wherever it is, at a second a process.
$(TESTABLE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,8bit]'
	touch $@

demo: install ## compress the miniature Qwen-Image end to end, then say where the report is
	$(BIN)/espalier sweep examples/miniature.yaml

check: install ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --verbose
	$(BIN)/mypy

test: $(TESTABLE) ## the default suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not faults' $(SIDE_BY_SIDE)

test-slow: $(TESTABLE) ## the default suite and the long tests (kills in every stage)
	$(BIN)/python -m pytest

test-faults: $(TESTABLE) ## break stores and processes in every known way, and print what was lost
	$(BIN)/python -m pytest -m faults tests

soak: install ## break a sweep at random for SOAK_MINUTES (30) and count what was lost
	$(BIN)/python -m tests.faults.soak --minutes $(SOAK_MINUTES) --out build/soak

bench: install ## the figures of benchmarks/README.md (after make demo)
	$(BIN)/python -m benchmarks.library examples/miniature.yaml
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node 2 -m benchmarks.shard examples/miniature.yaml

bench-search: install ## what a search costs, against TPE and ASHA with a student a trial (after make demo)
	$(BIN)/python -m benchmarks.solver
	$(BIN)/python -m benchmarks.search examples/miniature.yaml --trials 2000
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rival.run benchmarks/rival/half.yaml --out build/rival

bench-train: install ## memory and speed of training (the GPU's figures where there is one)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.train

bench-checkpoint: install ## checkpoints against raw transfers, on an S3 server that it starts
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.checkpoint
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.checkpoint --gib 1.75 --turns 2

study: install ## run the study of docs/study.md again (about an hour on 2 cores; after make demo)
	$(BIN)/python -m benchmarks.study.run examples/miniature.yaml --out build/study
	$(BIN)/python -m benchmarks.study.report build/study

miniature: install ## train examples/miniature from nothing (about three hours on 2 cores)
	$(BIN)/python -m examples.make_miniature

clean: ## remove the environment and local runs
	rm -rf .venv runs build *.egg-info
