# `make demo` and `make test` set up by themselves; they need Python 3.10 to 3.13 and git, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo pictures local-up local-down test quick-tests test-all lint bench clean
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch comes first and alone, so that a local index may serve it
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/alfa demo --output out/demo

# the pictures of the README, from the demo's own output; that of the report needs chromium and chromedriver
pictures: $(READY)
	$(BIN)/python -m infra.demo.pictures

# an object store and a Ray head on the loopback address; see infra/local/README.md
local-up: $(READY)
	$(BIN)/python -m infra.local.stack up

local-down: $(READY)
	$(BIN)/python -m infra.local.stack down

# side by side, because tests mostly wait: for Ray, for servers, for processes
test: $(READY)
	$(MAKE) --jobs 2 lint quick-tests

quick-tests: $(READY)
	# the tests of a file share what it has prepared, so they stay together
	$(BIN)/pytest -m 'not slow' --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-all: $(READY) lint
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check schemas pipeline jobs tests infra/demo infra/local
	$(BIN)/ruff format --check schemas pipeline jobs tests infra/demo infra/local
	$(BIN)/mypy

# prints ratios measured side by side in one run
bench: $(READY)
	$(BIN)/python -m tests.bench.detector
	$(BIN)/python -m tests.bench.detector --model alfa-small --batch 8
	$(BIN)/python -m tests.bench.winclip
	$(BIN)/python -m tests.bench.pipeline
	$(BIN)/python -m tests.bench.stages
	$(BIN)/python -m tests.bench.decoding
	$(BIN)/python -m tests.bench.masks
	$(BIN)/python -m tests.bench.planning
	$(BIN)/python -m tests.bench.incremental
	$(BIN)/python -m tests.bench.publishing
	$(BIN)/python -m tests.bench.storage
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.engine
	$(BIN)/python -m tests.bench.decoders

clean:
	rm -rf .venv out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
