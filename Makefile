# make quickstart   raw text to a trained, verified, benchmarked model
# make test         lint, types and the fast tests
# make test-slow    the tests that take minutes
PYTHON ?= python3.11
BIN := .venv/bin

# The stamp is made last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: .venv/.installed

quickstart: install
	$(BIN)/scratch-gpt quickstart $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A file's tests stay in one process: they share what their fixtures have made.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

.PHONY: install quickstart lint test test-slow
