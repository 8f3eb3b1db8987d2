# make run: the main job on the embedded data set.  make test: the test suite.  Both make .venv first.
# make check: what .ci/run checks before the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test check format betty clean

run: $(VENV)/.installed
	$(BIN)/python -m lfmcw_app.run digits --preset smoke

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

betty: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --ignore-requires-python --no-deps 'betty-ml==0.2.1'

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "mlo needs Python 3.11 or newer; name one with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
