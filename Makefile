# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-processors lint results gpu clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/varl train recipes/inkling-ocr.yaml

# The quick tests; then everything; then the tests of numbers as other processors would compute them.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest

test-processors: $(VENV)/.ready
	$(BIN)/python tests/processors.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(VENV)/.ready
	$(BIN)/python -m benchmarks.results run
	$(BIN)/python -m benchmarks.results report

# Prove varl on this machine's GPU in ten minutes; tools/gpu/wheels.sh serves machines without a network.
gpu: $(VENV)/.ready
	tools/gpu/day.sh --python $(BIN)/python

clean:
	rm -rf $(VENV) tools/gpu/.site .pytest_cache .mypy_cache .ruff_cache
