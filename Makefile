# make run: the main job on the embedded data set.  make test: the tests of the core, the oracles and a short run (5 to 14
# minutes on 2 cores).  make test-all: every test, make test-slow: those that make test leaves out.  All make .venv first.
# make check: what .ci/run checks before the tests.  make docs: the documentation, in site/.
# make results: the tables and figures of docs/results.md and docs/benchmarks.md, from docs/data.
# make gallery: the pictures of the examples, in docs/gallery.  make vendor: what the site has of others, in docs/vendor.
# make benchmark: what docs/benchmarks.md shows of a CPU (about 25 minutes), in an environment of its own; resumes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-benchmarks
KATEX := katex@0.19.1
IFRAME_WORKER := iframe-worker@1.0.4
PEERS := torchopt==0.7.3 boat-torch==1.1.1 hypergrad==0.0.1 higher==0.2.1 jax==0.4.38 jaxopt==0.8.5

.PHONY: run test test-all test-slow check format docs gallery vendor results notebooks betty browser benchmark benchmark-environment clean

run: $(VENV)/.installed
	$(BIN)/python -m lfmcw_app.run digits --preset smoke

PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 8 $(PYTEST_OPTIONS)

test: $(VENV)/.installed-test $(VENV)/.installed-betty
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.installed-test $(VENV)/.installed-betty
	$(PYTEST) -m slow

test-all: $(VENV)/.installed-test $(VENV)/.installed-betty
	$(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable keeps mkdocs-material from printing that it gets critical fixes only, until May 2027. Its successor, Zensical,
# reads the same mkdocs.yml.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# The pictures of docs/examples.md, drawn by the examples.
gallery: $(VENV)/.installed
	$(BIN)/python benchmarks/gallery.py

# KaTeX, and the worker that searches without a server, as npm's registry has them; of the fonts the one format that
# browsers take.
vendor:
	rm -rf build/vendor && mkdir -p build/vendor docs/vendor/katex/fonts docs/vendor/iframe-worker
	cd build/vendor && npm pack --silent $(KATEX) $(IFRAME_WORKER)
	cd build/vendor && for packed in *.tgz; do mkdir $$packed.d && tar xzf $$packed -C $$packed.d; done
	cp build/vendor/katex-*.d/package/dist/katex.min.js build/vendor/katex-*.d/package/dist/contrib/auto-render.min.js docs/vendor/katex
	cp build/vendor/katex-*.d/package/dist/fonts/*.woff2 docs/vendor/katex/fonts
	sed -E 's/,url\(fonts\/[A-Za-z0-9_-]+\.(woff|ttf)\) format\("[a-z]+"\)//g' \
		build/vendor/katex-*.d/package/dist/katex.min.css > docs/vendor/katex/katex.min.css
	cp build/vendor/katex-*.d/package/LICENSE docs/vendor/katex
	cp build/vendor/iframe-worker-*.d/package/shim/index.js docs/vendor/iframe-worker/iframe-worker.min.js
	cp build/vendor/iframe-worker-*.d/package/LICENSE docs/vendor/iframe-worker

# The tables and figures of the pages that docs/data has the figures of.
results: $(VENV)/.installed
	$(BIN)/python benchmarks/results_page.py

# Executes the notebooks of docs/notebooks anew, with what they show (about a minute).
notebooks: $(VENV)/.installed-test
	$(BIN)/python tests/executed_notebooks.py

# For the tests of the report, which are skipped without it (Debian; needs root).
browser:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver

betty: $(VENV)/.installed-betty

# With BEFORE=REVISION that revision is compared with this one, too.
benchmark: benchmark-environment
	$(BENCH)/bin/python benchmarks/measure_all.py $(if $(BEFORE),--before $(BEFORE))
	$(BENCH)/bin/python benchmarks/results_page.py

benchmark-environment: $(BENCH)/.installed

# A peer that does not install is said, and its rows say so; the others are measured.
$(BENCH)/.installed: pyproject.toml
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --editable .
	$(BENCH)/bin/python -m pip install --quiet --ignore-requires-python --no-deps 'betty-ml==0.2.1' || echo 'NOT INSTALLED: betty-ml==0.2.1'
	for peer in $(PEERS); do $(BENCH)/bin/python -m pip install --quiet "$$peer" || echo "NOT INSTALLED: $$peer"; done
	touch $@

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# Betty's metadata: 0.2.1 claims Python < 3.11, on which it does not depend, and 0.1.1 has a specifier that pip 24.1 and later
# refuse. 0.2.1 goes into the environment; 0.1.1, which the tests run as well, beside it.
$(VENV)/.installed-betty: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --ignore-requires-python --no-deps 'betty-ml==0.2.1'
	rm -rf $(VENV)/pip-24.0 $(VENV)/betty-0.1.1
	$(BIN)/python -m pip install --quiet --target $(VENV)/pip-24.0 'pip==24.0'
	PYTHONPATH=$(VENV)/pip-24.0 $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/betty-0.1.1 'betty-ml==0.1.1'
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
