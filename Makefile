# Two commands from a fresh clone: `make demo` and `make test`. Both set up .venv first, and again when its list changes.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check bench clean

demo: .venv/ready-all
	$(BIN)/moescope demo

test: .venv/ready-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready-dev
	$(BIN)/python benchmarks/tally.py
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/meaning.py
	$(BIN)/python benchmarks/parallel.py

.venv/ready-%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: moescope needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing moescope[$*] into .venv (PyTorch among it; some minutes the first time)"
	$(PIP) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv moescope-demo
