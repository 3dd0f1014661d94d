PYTHON ?= python3
VENV ?= .venv
BIN = $(CURDIR)/$(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: demo test lint types unit bench performance clean

demo: $(INSTALLED)
	$(BIN)/bnsharp demo

test: lint types unit

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[test,peers]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .

# The wheel, unpacked: type checkers do not follow an editable install's package mapping.
types: $(INSTALLED)
	rm -rf build/wheel build/lib build/typed && mkdir -p build/wheel build/typed
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/*.whl build/typed
	test ! -e build/typed/cli && test ! -e build/typed/experiments
	cd build/typed && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p bnsharp

unit: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4

# Ours and others' side by side; writes benchmarks/results/. Not part of the tests: a timing is never
# asserted. `make bench BENCH="SAM --threads=2"` for some of it.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH)

# All that docs/performance.md shows.
performance: bench
	$(BIN)/python -m benchmarks.profile
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.document

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
