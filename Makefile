# Two commands do everything on a fresh machine: `make study` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: study test test-slow check lint types imports docs clean

study: .venv/.study  ## train eight mixers on the bundled digits and write a report
	$(BIN)/saccade study digits --out study-digits

test: .venv/.dev  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: .venv/.dev  ## everything else: long runs, slow claims
	$(BIN)/python -m pytest -m slow

check: lint types imports docs  ## what CI runs after the tests

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

imports: .venv/.dev
	$(BIN)/lint-imports

docs: .venv/.docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

# torch comes first and alone, pinned: any other way to get it pulls gigabytes of CUDA
.venv/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) $(TORCH)
	touch $@

.venv/.study: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[demo]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(INSTALL) --editable '.[demo,dev,hub]'
	touch $@

.venv/.docs: .venv/.dev
	$(INSTALL) --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv docs/_build docs/gallery docs/generated study-digits
