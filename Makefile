# Needs python3 (3.11 or newer, with venv), make and git. `make demo` and `make test` prepare everything else in .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.ready
DEMO := rightbatch-runs/demo
BENCHMARKS := benchmarks/planted_laws.py benchmarks/find_speed.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test check golden bench pictures clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1	\2/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install torch, the dependencies and this package
	@:

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "rightbatch needs Python 3.11 or newer; '$(PYTHON)' is missing or older. Run: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "'$(PYTHON)' has no venv module; on Debian and Ubuntu run: apt-get install python3-venv" >&2; exit 1; }
	@echo "setup 1/3: virtual environment in .venv"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "setup 2/3: $(TORCH)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "$(TORCH)"
	@echo "setup 3/3: rightbatch and its dependencies, at the versions of constraints.txt"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

# `find` ends with the run folder and the report; the answer's line is repeated below them. Its exit code 5 means "inconclusive":
# the answer says so itself, so it does not fail the demo.
demo: setup  ## find the batch size of a small CNN on handwritten digits
	@$(BIN)/rightbatch find examples/digits.py:workload --out $(DEMO) || test $$? -eq 5
	@$(BIN)/rightbatch show $(DEMO) | sed -n '/^$$/q;p'

# A module's tests stay together, so that what they share is made once; those that start processes come first, as their folders do.
test: check  ## check, then run every test, one process a core
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder

check: setup  ## formatting, lint, types, and who may import whom
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

golden: setup  ## rewrite the stored reports and messages; read the diff before committing
	@OMP_NUM_THREADS=1 RIGHTBATCH_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/unit/report tests/unit/cli tests/integration/test_recorded_runs.py

bench: setup  ## run the benchmarks that take about a minute
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

pictures: demo  ## draw the pictures of the README: the demo's run, a training with its plan, a sweep around it
	@$(BIN)/rightbatch train examples/digits.py:workload --plan $(DEMO) --epochs 12 --target 'accuracy>=0.97' --fresh --out $(DEMO)-training --quiet
	@$(BIN)/rightbatch sweep examples/digits.py:workload --plan $(DEMO) --target 'accuracy>=0.97' --batches 8..256 --out $(DEMO)-sweep
	@$(BIN)/python benchmarks/pictures.py $(DEMO) --training $(DEMO)-training --sweep $(DEMO)-sweep

clean:  ## remove .venv, caches and runs
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage build dist rightbatch-runs
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
