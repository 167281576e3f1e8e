# Everything runs in .venv, which `setup` makes from requirements.lock with nothing but Python.
PYTHON ?= python3
BIN := .venv/bin
# Transparent huge pages: XLA on CPU takes memory afresh for each step, which costs a third of its time in small pages.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
ARGS ?=
# cuda12, cuda13 or tpu; found by itself where NVIDIA's driver is.
ACCELERATOR ?= $(if $(wildcard /proc/driver/nvidia/version),cuda12)
PACKAGES = -r requirements.lock $(if $(ACCELERATOR),"jax[$(ACCELERATOR)]")

FAULTS := distributed peers watchdog pods topologies fixed_order pretrain checkpoint damaged_checkpoint failing_saves fuzz verify

.DEFAULT_GOAL := help
.PHONY: help setup train check format lint types test test-all faults smoke verify oracle bench audit docs lock

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/ready ## make .venv with all dependencies

.venv/ready: requirements.lock pyproject.toml
	@echo "Setting up .venv (once, under a minute)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv
	@$(BIN)/uv pip install -q --python $(BIN)/python $(PACKAGES) || $(BIN)/python -m pip install -q $(PACKAGES)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

train: setup ## train a language model on Python's own sources, in about three minutes (ARGS="--help" for more)
	@$(BIN)/python experiments/pretrain.py $(ARGS)

check: lint types test ## all that must hold before a commit
	$(BIN)/pytest -m slow tests/test_experiments.py

format: setup ## put the source into its standard form
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lint: setup ## ruff
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: setup ## pyright
	$(BIN)/pyright

test: setup ## the tests but the slow ones, in a quarter of an hour on two cores
	$(BIN)/pytest -n 2 -m "not slow and not gpu and not oracle" $(ARGS)

test-all: setup ## all tests that this machine can run
	$(BIN)/pytest -n 2 $(ARGS)

faults: setup ## damage, full disks, SIGKILL at every call of a save, lost processes, other machines: an hour and a half
	$(BIN)/pytest tests/faults $(addprefix tests/test_,$(FAULTS:=.py)) -m "not gpu" $(ARGS)

smoke: setup ## every experiment and benchmark, two steps each
	$(BIN)/pytest tests/test_experiments.py -m "" $(ARGS)

verify: setup ## that a small experiment is the same however it is computed (ARGS="--optimizer muon")
	@$(BIN)/python experiments/verify.py $(ARGS)

oracle: setup ## the optimizers against PyTorch's, which this installs
	@$(BIN)/uv pip install -q --python $(BIN)/python -e ".[oracle]"
	$(BIN)/pytest -m oracle $(ARGS)

bench: setup ## train steps, optimizers, attention, memory and data against baselines, each in one run
	$(BIN)/python benchmarks/train_step.py $(ARGS)
	$(BIN)/python benchmarks/optimizers.py $(ARGS)
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/restart.py
	$(BIN)/python benchmarks/data.py $(ARGS)

audit: .venv-ahead/ready ## what compilers make of it for H100s and TPUs, none of which is needed
	.venv-ahead/bin/python benchmarks/traffic.py
	.venv-ahead/bin/python benchmarks/precision_ahead.py
	.venv-ahead/bin/python benchmarks/remat_ahead.py
	.venv-ahead/bin/python benchmarks/cross_entropy_ahead.py
	.venv-ahead/bin/python benchmarks/attention_ahead.py
	.venv-ahead/bin/python benchmarks/zero.py $(ARGS)

.venv-ahead/ready: requirements.lock pyproject.toml
	@echo "Setting up .venv-ahead (once, some minutes)"
	@$(PYTHON) -m venv .venv-ahead
	@.venv-ahead/bin/python -m pip install -q --disable-pip-version-check uv
	@.venv-ahead/bin/uv pip install -q --python .venv-ahead/bin/python -r requirements.lock "jax[cuda12,tpu]"
	@.venv-ahead/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

docs: setup ## the examples in docstrings and the README's program
	$(BIN)/pytest jaxlm tests/test_readme.py $(ARGS)

lock: setup ## choose the newest versions that fit together
	$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra data --extra experiments --extra quantized --extra dev --no-emit-index-url --upgrade pyproject.toml -o requirements.lock
