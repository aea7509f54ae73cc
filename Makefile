# make demo | test | lint | bench | venv      needs only python3 (3.11 or newer, with venv) and make
# make demo FILES="a.h5ad b.h5ad"             the demo on your own files
# make test TESTS=tests/cli                   some of the tests
# make docs                                   the API reference and the notebooks as pages in site/
# make notebooks                              runs the notebooks and keeps what they show; NOTEBOOKS=notebooks/lazy.ipynb for one
# make chaos                                  what is too slow for make test: builds killed at every moment
# make bench ANNBATCH_PYTHON=path/to/python   the figures of README.md, beside annbatch where that Python has it
# make rehearsal                              a billion cells, planned from made-up descriptions of files: minutes
# make test PYTHON=python3.13                 another interpreter, whose packages go into .venv-313

PYTHON ?= python3
VENV   ?= .venv$(patsubst python3.%,-3%,$(filter python3.%,$(notdir $(PYTHON))))
FILES  ?=
NOTEBOOKS ?=
TESTS  ?= tests
SHARED ?= ../shared
ATLAS  ?=
ATLAS_SMALL ?=
ANNBATCH_PYTHON ?=
BENCH_ARGS ?=

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.installed-demo
STORES := $(VENV)/.installed-stores

.DEFAULT_GOAL := help
.PHONY: help venv demo lint types docs notebooks test chaos bench rehearsal clean

# What pip installs is compiled where it is first imported. Where nothing may be kept, each of the tests' many processes
# would compile anndata and torch anew: 9 s instead of 3.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^# make/make/p' Makefile

venv: $(STAMP)

# --group needs pip 25.1; the one that comes with Python 3.11 is older.
define install
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
$(BIN)/python -m pip install --quiet --no-compile --editable . $(1)
@touch $@
endef

$(STAMP): pyproject.toml
	$(call install,--group demo --group test --group docs)

# The demo needs neither torch nor what tests and docs need; where these are installed, it is content.
$(DEMO): pyproject.toml
	$(if $(wildcard $(STAMP)),$(MAKE) --no-print-directory $(STAMP) && touch $@,$(call install,--group demo))

demo: $(DEMO)
	$(BIN)/python pipelines/demo.py $(FILES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(MAKE) --no-print-directory --jobs 2 types docs

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

notebooks: $(STAMP)
	$(BIN)/python tests/notebooks/execute.py $(NOTEBOOKS)

# One process more than cores: a fifth of the tests' time is waiting for clusters, servers and disks.
PYTEST = $(BIN)/python -m pytest --numprocesses $(shell $(PYTHON) -c "import os; print(os.cpu_count() + 1)") --dist worksteal

# Types are checked once, with the releases that Python 3.11 gets: anndata 0.13 and pandas 3 type much otherwise.
test: $(if $(filter .venv,$(VENV)),lint,$(STAMP))
	$(PYTEST) $(TESTS)

chaos: $(STAMP) $(STORES)
	$(PYTEST) -m chaos $(TESTS)

# Emulators of stores. Without npm, Azure's tests are skipped, and say so.
$(STORES): pyproject.toml | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-compile --group stores
	if command -v npm >/dev/null; then npm install --silent --no-save --prefix $(VENV)/azurite azurite@3; fi
	@touch $@

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py --shared "$(SHARED)" --atlas "$(ATLAS)" --atlas-small "$(ATLAS_SMALL)" \
		--annbatch-python "$(ANNBATCH_PYTHON)" $(BENCH_ARGS)

rehearsal: $(STAMP)
	for cells in 1e7 1e8 1e9; do $(BIN)/python benchmarks/scale.py plan --cells $$cells || exit 1; done
	$(BIN)/python benchmarks/scale.py root --datasets 10000
	$(BIN)/python benchmarks/scale.py tasks --tasks 5000

clean:
	rm -rf .venv .venv-* demo_data site .mypy_cache .pytest_cache .ruff_cache
