# make demo       the whole pipeline on real images, on a CPU
# make test       lint, types, import layers, and the tests of 15 minutes
# make test-all   the same with all tests, and the site of the documentation
# make docs       the site of the documentation: site/index.html
# make screens    its pictures of Prefect, MLflow and a report: docs/screens (needs chromium)

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: demo lint test test-all docs screens up clean

demo: .venv/installed
	$(BIN)/ditflow demo $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m "not full" $(ARGS)

test-all: lint docs
	$(PYTEST) $(ARGS)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --config-file docs/site/mkdocs.yml

screens: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[screens]"
	$(BIN)/python docs/site/screens.py $(ARGS)

up: .venv/installed
	$(BIN)/ditflow up $(ARGS)

.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs site
