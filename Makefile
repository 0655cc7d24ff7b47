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

# DeepSpeed comes as source, which pip makes a package of in seconds, without a compiler.
.venv/.deepspeed: .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed]' && touch $@ || \
		echo "DeepSpeed could not be installed: its tests will be skipped"

# A file's tests stay in one process: they share what their fixtures have made. Files in the order of their names, which
# has the long ones, of several processes, early; by the number of its tests pytest-xdist would put them last.
test: lint .venv/.deepspeed
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: install .venv/.deepspeed
	$(BIN)/python -m pytest -m slow

.PHONY: install quickstart lint test test-slow
