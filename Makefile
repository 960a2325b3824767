# Everything a checkout needs: `make demo` and `make test` install into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.ready-docs

DEMO_PROMPT ?= a large red circle moves right over a gradient background
DEMO_STEPS ?= 20
DEMO_REPEATS ?= 1
DEMO_OUT ?= out/demo

.PHONY: install demo docs test lint types format check aot clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)  ## prompt to video, dense against sparse, with the shipped model
	$(BIN)/dsattn compare "$(DEMO_PROMPT)" --steps $(DEMO_STEPS) --repeats $(DEMO_REPEATS) --out $(DEMO_OUT)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS_READY)  ## the documentation site, in site/; every warning is an error (not with --quiet)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(READY)  ## compile every kernel for every GPU target, without a GPU
	$(BIN)/python scripts/aot_report.py --check

check: lint types test

clean:
	rm -rf build dist out site .pytest_cache .mypy_cache .ruff_cache *.egg-info
