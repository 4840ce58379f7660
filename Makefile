# make demo       the whole pipeline on real images, on a CPU
# make test       lint, types, import layers, and the tests of ten minutes
# make test-all   the same, and then all the other tests

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: demo test test-all up clean

demo: .venv/installed
	$(BIN)/ditflow demo $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not full" $(ARGS)

test-all: test
	$(PYTEST) -m full $(ARGS)

up: .venv/installed
	$(BIN)/ditflow up $(ARGS)

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
