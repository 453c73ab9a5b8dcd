# `make demo` and `make test` do all the set-up they need, in one local .venv.

PYTHON ?= python3
# A python3.12 on PATH that runs (a shim of pyenv need not), else pyenv's newest.
PYTHON_LATEST ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null || \
  ls -d "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python 2>/dev/null | sort -V | tail -1)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
MAX_KB := 500
BENCHMARKS ?= mask_overhead data_loading tokenization conversion checkpoints evaluation scaling inference

# The mathematics, configuration, tables, golden losses, and three steps of pruning.
QUICK := tests/golden tests/config tests/pruning tests/reference tests/test_layering.py \
  tests/planning/test_layouts.py tests/planning/test_targets.py tests/checkpoint/hf/test_mapping.py \
  tests/data/test_domain_weights.py tests/model/test_masked_weights.py \
  tests/model/test_reference_llama.py tests/platform/test_layers.py tests/training/test_oracle.py
# What meets Megatron-Core or torch, whose releases differ.
LATEST := tests/golden tests/model tests/platform tests/performance/test_counts.py \
  tests/planning/test_communication.py tests/planning/test_memory.py \
  tests/pruning/test_masked_extracted_hf.py tests/checkpoint/hf tests/checkpoint/torch_dist \
  tests/checkpoint/test_dense.py tests/data/test_dataset.py tests/data/test_loader.py \
  tests/tools/test_megatron_lm.py tests/test_shipped.py tests/training/test_documents.py \
  tests/training/test_layouts.py tests/training/test_oracle.py tests/training/test_resume.py

.DEFAULT_GOAL := help
.PHONY: help venv venv-latest demo test-quick test test-all test-long test-gpu test-latest test-slurm bench \
  python-latest check format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "Variables: PYTHON=$(PYTHON) (3.10 to 3.12), VENV=$(VENV), ARGS (for demo, test, bench)"

venv: $(STAMP) ## install everything into .venv, with pinned versions

$(STAMP): setup.py pyproject.toml constraints.txt tests/requirements-files.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	  { echo "error: $(PYTHON) is not Python 3.10 to 3.12. Name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv. Install it: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# On its own first: whatever build of torch the index offers for the pinned version is kept.
	$(BIN)/python -m pip install -qq -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev,dali]'
	$(BIN)/python -m pip install -qq --no-deps -r tests/requirements-files.txt
	@touch $@

demo: $(STAMP) ## shear a small LLaMA end to end on two processes of this machine
	$(BIN)/python examples/demo/run.py $(ARGS)

test-quick: $(STAMP) ## run the tests of the mathematics (under two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(QUICK) $(ARGS)

test: $(STAMP) ## run the tests, without those that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-all: ## run every test, here, on Slurm and with the newest Megatron-Core (an hour)
	$(MAKE) test ARGS="--long $(ARGS)"
	$(MAKE) test-slurm
	$(MAKE) test-latest LATEST=tests

test-long: $(STAMP) ## run only the tests that take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu tests/platform $(ARGS)

venv-latest:
	@test -n "$(PYTHON_LATEST)" || \
	  { echo "error: no Python 3.12. Name one: make PYTHON_LATEST=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(MAKE) venv PYTHON="$(PYTHON_LATEST)" VENV=.venv-latest

test-latest: venv-latest ## run what meets Megatron-Core with its newest release, in .venv-latest (6 GB)
	$(MAKE) test PYTHON="$(PYTHON_LATEST)" VENV=.venv-latest ARGS="$(LATEST) $(ARGS)"

test-slurm: $(STAMP) ## run the tests with a real Slurm on this machine (as root; installs it on Debian)
	@test "$$(id -u)" = 0 || { echo "error: $@ starts Slurm's daemons, as root" >&2; exit 1; }
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null || \
	  { test -f /etc/debian_version && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm >/dev/null; } || \
	  { echo "error: slurmctld and slurmd are missing. On Debian: apt-get install slurm-wlm" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

bench: $(STAMP) ## run the benchmarks, one after another (half an hour on two idle cores)
	@failed=; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py $(ARGS)"; \
	  OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py $(ARGS); status=$$?; echo; \
	  test $$status -ne 130 || exit 130; \
	  test $$status -eq 0 || failed="$$failed $$name"; \
	done; \
	test -z "$$failed" || { echo "error: failed:$$failed" >&2; exit 1; }

python-latest:
	@echo $(PYTHON_LATEST)

check: $(STAMP) ## lint, format, types, spelling, sizes of committed files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	@big=$$(git ls-files -z | xargs -0 sh -c 'find "$$@" -maxdepth 0 -size +$(MAX_KB)k' sh); \
	  test -z "$$big" || { echo "error: larger than $(MAX_KB) kB: $$big" >&2; exit 1; }

format: $(STAMP) ## put imports and layout in order
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean: ## remove .venv, .venv-latest, caches and what the examples made (not runs/)
	rm -rf $(VENV) .venv-latest demo-run smollm2-run build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
