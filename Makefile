# One verb a job. Each target installs what it needs first: once, and again when pyproject.toml changes.
#
#   make serve      the service, on a CPU or on the GPUs that are found
#   make test       the tests of every change
#   make test-all   the slow ones too
#   make test-gpu   the ones that need a GPU, on a machine that has one
#   make test-bare  kernels and engine core on Python 3.12 with the packages of tests/bare_machine.txt alone
#   make check      format, lint, types, import contracts, and what the wheel holds
#   make format     lets ruff rewrite what `make check` would complain about
#   make bench      throughput and latency beside Hugging Face transformers, as a table
#   make protos     the gRPC stubs, from serve/protos/**/*.proto
#   make clean      removes everything that the other targets make
#
# ARGS passes flags on:            make serve ARGS="--grpc-port 9000"      make test ARGS="-k scheduler"
# EXTRAS picks JAX's platform:     make serve EXTRAS=cuda13
# PYTHON picks the interpreter:    PYTHON=python3.12 make test        (the first one used gets .venv, others .venv-X.Y)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
EXTRAS ?=

python_version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
WANTED_PYTHON := $(call python_version,$(PYTHON))
ifeq ($(WANTED_PYTHON),)
$(error PYTHON=$(PYTHON) does not run; jaxserve needs Python 3.11 or later)
endif
VENV := $(if $(filter-out $(WANTED_PYTHON),$(call python_version,.venv/bin/python)),.venv-$(WANTED_PYTHON),.venv)
BIN := $(VENV)/bin

# Nothing to look for, so JAX need not try (with the GPU compiler of the tests installed it would log an error).
ifeq ($(wildcard /dev/nvidia* /dev/accel* /dev/vfio/*),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: serve test test-all test-gpu test-bare check check-format check-lint check-types check-imports check-wheel format bench protos clean

serve: $(VENV)/.installed-runtime$(EXTRAS)
	$(BIN)/jaxserve serve $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-test$(EXTRAS)
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu $(ARGS)

# Needs a package that is not there: a compiler for another GPU, checkpoints in safetensors, the oracle of the parity tests.
BARE_TESTS := tests/kernels_pallas tests/sharding tests/jaxserve/execution tests/jaxserve/models tests/jaxserve/scheduling \
	$(wildcard tests/jaxserve/test_*.py) tests/repository/test_bare_machine.py
NOT_BARE := test_gpu_compile.py test_*parity.py

test-bare: .venv-bare/.installed
	PYTHONPATH=$(CURDIR) .venv-bare/bin/python -m pytest $(NOT_BARE:%=--ignore-glob="*/%") $(BARE_TESTS) $(ARGS)

check: check-format check-lint check-types check-imports check-wheel

check-format: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .

check-lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

check-types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

check-imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports --cache-dir .cache/import_linter

check-wheel: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/repository/test_wheel.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.offline $(ARGS)

# The oldest tools whose stubs we support, because a runtime refuses stubs newer than itself. They need an older protobuf
# than today's grpcio, hence an environment of their own.
PROTO_TOOLS := grpcio-tools==1.76.0
PROTOS = $(shell find serve/protos -name '*.proto')

protos: .venv-protos/.installed
	.venv-protos/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. $(PROTOS)

clean:
	rm -rf .venv .venv-* .cache build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------- installation
# uv takes half of pip's time; where it cannot be had, or cannot find a package, pip does the work.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python $(1) || $(BIN)/python -m pip install --quiet $(1)
TORCH = $(shell sed -n 's/^ *"\(torch==[^;]*\);.*/\1/p' pyproject.toml)

$(BIN)/python:
	$(PYTHON) -m venv --clear $(VENV)
	-$(BIN)/python -m pip install --quiet uv==0.13.9

$(VENV)/.installed-runtime%: pyproject.toml | $(BIN)/python
	$(call install,--editable ".[$*]")
	touch $@

$(VENV)/.installed-runtime: pyproject.toml | $(BIN)/python
	$(call install,--editable .)
	touch $@

# By pip and on its own: what pip finds under the bare version is the build for a CPU, a few hundred MB instead of GBs.
$(VENV)/.installed-torch: pyproject.toml | $(BIN)/python
	if [ $(WANTED_PYTHON) = 3.11 ]; then $(BIN)/python -m pip install --quiet $(TORCH); fi
	touch $@

$(VENV)/.installed-bench: pyproject.toml $(VENV)/.installed-torch
	$(call install,--editable ".[bench]")
	touch $@ $(VENV)/.installed-runtime

$(VENV)/.installed-test%: $(VENV)/.installed-test
	$(call install,--editable ".[test,$*]")
	touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed-torch
	$(call install,--editable ".[test]")
	touch $@ $(VENV)/.installed-runtime

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed-test
	$(call install,--editable ".[dev]")
	touch $@

BARE_PYTHON ?= python3.12

.venv-bare/.installed: tests/bare_machine.txt
	$(BARE_PYTHON) -m venv --clear .venv-bare
	.venv-bare/bin/python -m pip install --quiet --requirement $< hypothesis pytest pytest-timeout
	touch $@

.venv-protos/.installed: Makefile
	$(PYTHON) -m venv --clear .venv-protos
	.venv-protos/bin/python -m pip install --quiet $(PROTO_TOOLS)
	touch $@
