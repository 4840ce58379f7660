# make demo   the whole pipeline on real images, on a CPU
# make test   lint, types, import layers, tests

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test up clean

demo: .venv/installed
	$(BIN)/ditflow demo $(ARGS)

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

up: .venv/installed
	$(BIN)/ditflow up $(ARGS)

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
