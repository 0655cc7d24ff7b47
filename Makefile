# make quickstart   raw text to a trained, verified, benchmarked model
# make test         lint, types and the fast tests
# make test-slow    the tests that take minutes
PYTHON ?= python3.11
BIN := .venv/bin

# The stamp file is written last, so that an interrupted installation starts again.
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

# pip builds DeepSpeed from source in seconds, without a compiler.
.venv/.deepspeed: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]' && touch $@ || \
		echo "DeepSpeed could not be installed: its tests will be skipped"

# The tests of a file run in one process, because they share fixtures. Files run in the order of their names, which starts
# the slow multi-process files early; pytest-xdist's own order, by number of tests, would start them last.
test: lint .venv/.deepspeed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: install .venv/.deepspeed
	$(BIN)/python -m pytest -m slow

.PHONY: install quickstart lint test test-slow
