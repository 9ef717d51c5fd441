# One environment, .venv, for everything. PYTHON (3.10 to 3.12) makes it.
PYTHON ?= python3
# More arguments for pytest, for example `make test PYTEST_ARGS="-k triplet -x"`.
PYTEST_ARGS ?=
# Of the speed benchmarks, for example `make bench BENCH_ARGS="--only ida --device cpu"`.
BENCH_ARGS ?=

BIN := .venv/bin
# One process per core, each with one thread: more threads than cores only slow the tests down.
# A file's tests stay together, as they share trainings.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n auto --dist loadfile \
	--no-loadscope-reorder --durations=10

.PHONY: help setup demo test lint docs bench clean

help:
	@echo "make setup  set up .venv, or bring it up to date (first time: about 6 minutes)"
	@echo "make demo   run the demo (12 to 16 minutes; goes on where it was stopped)"
	@echo "make test   lint, types, documentation and tests"
	@echo "make lint   lint and types"
	@echo "make docs   build the documentation: docs/_build/html/index.html"
	@echo "make bench  measure speed and memory on this machine (about 15 minutes)"
	@echo "make clean  remove .venv, caches and the demo's output; other work_dirs stay"

setup:
	@$(PYTHON) tools/setup_environment.py

demo: setup
	$(BIN)/python tools/demo.py

test: lint docs
	$(PYTEST) $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: setup
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache build docs/_build *.egg-info work_dirs/demo plugin_core/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
