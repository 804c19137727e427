# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which the targets make themselves. What a step needs is told by stamp files in it, so that a
# second call is quick, and a changed build file or C++ source builds again.
#
#   PYTHON=python3.12   the Python that .venv is made with (3.10 or later)
#   TORCH=torch==2.12.0 the torch that .venv gets
#   SLIMTORCH_CPU=...   scalar, avx2 or avx512: kernels to use, and the only ones that `make test` then runs
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
# As in pyproject.toml, since the build is not isolated; CMake and Ninja come along where the system's are old or absent.
BUILD_TOOLS := "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.25" "ninja>=1.10"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TOOLS := $(VENV)/.tools-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
BUILT := $(VENV)/.built
BUILD_FILES := CMakeLists.txt pyproject.toml $(wildcard cmake/*) $(shell find csrc tests/cuda_host -type f)
CPP := $(filter %.h %.cpp %.cu %.cuh,$(BUILD_FILES))

.PHONY: help build demo test lint format wheel sanitize gpu peers bench tables clean distclean

help: ## This list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or later is needed; set PYTHON=python3.12, say" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(TOOLS): | $(BIN)/python
	@echo "installing $(TORCH) and the build tools"
	@$(PIP) install '$(TORCH)' $(BUILD_TOOLS)
	@rm -f $(VENV)/.tools-*
	@touch $@

# For tests, AVX-512 kernels are built a second time in a form that any AVX2 machine can run, and the CUDA kernels for an
# emulator that needs no GPU, which tells lines by the symbols that are left in. PTX for GPUs to come is left to wheels: it would take a third of the time.
$(BUILT): $(TOOLS) $(BUILD_FILES)
	@command -v nvcc > /dev/null || echo "no nvcc found: building for the CPU only"
	@echo "building slimtorch (some minutes)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install --no-build-isolation --config-settings=build-dir=build/editable \
	  --config-settings=cmake.define.SLIM_EMULATED_AVX512=ON --config-settings=cmake.define.SLIM_CUDA_HOST=ON \
	  --config-settings='cmake.define.CMAKE_CUDA_ARCHITECTURES=80-real;90a-real' \
	  --config-settings=install.strip=false -e '.[test,experiments,lint]'
	@touch $@

build: $(BUILT) ## Make .venv and build the package in it, editable

demo: $(BUILT) ## Train, prune, pack and measure two small networks; the report goes to demo/
	@$(BIN)/slimtorch compare --out demo
	@echo "the report: $(CURDIR)/demo/report.html"

test: $(BUILT) ## All tests, those of the kernels with each instruction set
	@PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test.sh $(BIN)/python

lint: $(BUILT) ## ruff, clang-format and mypy, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(BIN)/mypy

format: $(BUILT) ## clang-format over csrc, and what ruff can mend
	@$(BIN)/clang-format -i $(CPP)
	@$(BIN)/ruff check --fix .

wheel: $(TOOLS) ## A wheel in dist/
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

sanitize: $(BUILT) ## Kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@PYTHON=$(BIN)/python scripts/sanitize.sh

gpu: ## On a machine with a GPU: build, tests, compute-sanitizer, benchmark; at most ten minutes (installs nothing)
	@scripts/gpu.sh

peers: ## An environment with the other engines that bench/ compares with
	@bench/make_peers.sh

bench: $(BUILT) ## The full benchmarks, JSON into bench/results (hours; goes on where it stopped)
	@isa=$$($(BIN)/python -c 'import slimtorch; print(slimtorch._C.isa())'); \
	for family in sparse block_sparse; do \
	  $(BIN)/python -m bench.$$family --json bench/results/$$family-$$isa.json; \
	done; \
	for family in codebook sparse_codebook binary coding networks; do \
	  $(BIN)/python -m bench.$$family --json bench/results/quantized/$$family-$$isa.json; \
	done

tables: $(BUILT) ## Tables and plots of README.md from bench/results
	@$(BIN)/python -m bench.tables

clean: ## Remove what was built and measured; .venv stays
	@rm -rf build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis $(BUILT)

distclean: clean ## Remove the environments too
	@rm -rf $(VENV) .venv-peers
