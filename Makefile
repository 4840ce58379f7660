# make demo       the whole pipeline on real images, on a CPU
# make test       lint, types, import layers, and the tests of ten minutes
# make test-all   the same with all tests

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: demo lint test test-all up clean

demo: .venv/installed
	$(BIN)/ditflow demo $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m "not full" $(ARGS)

test-all: lint
	$(PYTEST) $(ARGS)

up: .venv/installed
	$(BIN)/ditflow up $(ARGS)

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
