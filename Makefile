# PY=... runs a target with another Python than the repository's own environment, which is then neither made nor touched.
PY ?= .venv/bin/python
ARGS ?=

.PHONY: help setup kernels kernels-gate demo test test-parallel chaos fuzz-data lint smoke recipes bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  ARGS=... is passed on to the command, PY=... picks another Python."

setup:  ## make .venv (once: about 4 minutes and 7 GB; instant afterwards)
	@if [ "$(PY)" = .venv/bin/python ]; then tools/bootstrap.sh; fi

kernels: setup  ## compile csrc/ for this machine, where it has a C++ compiler (and nvcc); optional, about half a minute
	@PYTHONPATH=kernels $(PY) -m iomm_kernels.build

kernels-gate: setup  ## compile every GPU kernel for Hopper (no GPU needed) and judge its machine code
	@$(PY) tools/kernels_gate.py $(ARGS)

demo: setup  ## both stages on the embedded images, samples and a report (10 to 15 minutes on 2 CPU cores)
	@$(PY) -m iomm.cli demo $(ARGS)

test: setup  ## the test suite
	@$(PY) -m pytest -q $(ARGS)

test-parallel: setup  ## every layout on 1, 2 and 4 processes against one, checkpoints between all of them
	@$(PY) -m pytest -q -m parallel $(ARGS)

chaos: setup  ## 100 kills of random ranks at random moments: the run must not differ from an undisturbed one
	@PYTHONPATH=.:kernels $(PY) -m tests.chaos.chaos $(ARGS)

fuzz-data: setup  ## 10,000 damaged inputs through iomm shard and the loader: each one accounted for (about 15 minutes)
	@PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(PY) -m tools.fuzz_data $(ARGS)

lint: setup  ## ruff, basedpyright, import-linter
	@$(PY) -m ruff check .
	@$(PY) -m basedpyright --pythonpath $(PY) --level error
	@PYTHONPATH=.:kernels $(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'

smoke: setup  ## five training steps of stage 1
	@rm -rf runs/smoke
	@$(PY) -m iomm.cli train examples/configs/tiny_stage1.py --set name=smoke --set train.steps=5 --set optimizer.warmup_steps=2 $(ARGS)

recipes: setup  ## what is missing of the six recipes in miniature, two seeds; stop and go on at any time (hours)
	@PYTHONPATH=. $(PY) tools/recipes.py $(ARGS)

bench: setup  ## frozen-prefix split against the naive full pass: time and peak memory
	@$(PY) -m iomm.cli bench prefix $(ARGS)

clean:  ## remove caches and build leftovers (runs/ and .venv stay)
	@rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find iomm kernels examples tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
