# One way to do each thing; `make help` lists them. Everything runs inside .venv, which `setup` makes.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done

# Which llama.cpp to build: cpu, cuda, metal or vulkan. The choice is remembered until another is named.
DEFAULT_BACKEND := $(if $(filter Darwin,$(shell uname -s)),metal,cpu)
CHOSEN  := $(shell cat $(VENV)/.backend 2>/dev/null)
BACKEND ?= $(or $(CHOSEN),$(DEFAULT_BACKEND))

CMAKE_cpu    := -DGGML_METAL=off
CMAKE_cuda   := -DGGML_CUDA=on
CMAKE_metal  := -DGGML_METAL=on
CMAKE_vulkan := -DGGML_VULKAN=on

# llama.cpp's converter, quantizer and vocabularies, in the source package of llama-cpp-python: what tests compare with.
REFERENCE := build/reference/convert_hf_to_gguf.py
TAR_WILDCARDS := $(shell tar --version 2>/dev/null | grep -q GNU && echo --wildcards)

.PHONY: help setup demo test test-all bench load adapters-table check docs reference clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## install everything into .venv (BACKEND=cpu|cuda|metal|vulkan)
	@if [ "$(BACKEND)" != "$$(cat $(VENV)/.backend)" ]; then $(MAKE) --no-print-directory backend; fi

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "edgelora needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -n "$(CMAKE_$(BACKEND))" || { echo "BACKEND=$(BACKEND): expected cpu, cuda, metal or vulkan" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(filter $(BACKEND),$(DEFAULT_BACKEND)),,CMAKE_ARGS="$(CMAKE_$(BACKEND))") \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,qlora,serve,dev]' \
		$(if $(filter $(BACKEND),$(DEFAULT_BACKEND)),,--no-cache-dir --no-binary llama-cpp-python)
	@echo $(BACKEND) > $(VENV)/.backend
	@touch $(STAMP)

# Another backend for an existing .venv: llama.cpp is compiled again, never taken from pip's cache of the last one.
.PHONY: backend
backend:
	@test -n "$(CMAKE_$(BACKEND))" || { echo "BACKEND=$(BACKEND): expected cpu, cuda, metal or vulkan" >&2; exit 2; }
	CMAKE_ARGS="$(CMAKE_$(BACKEND))" $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python
	@echo $(BACKEND) > $(VENV)/.backend

reference: $(REFERENCE)  ## unpack llama.cpp's sources, which the tests compare with, into build/reference

$(REFERENCE): constraints.txt | $(STAMP)
	rm -rf build/reference build/download
	mkdir -p build/reference build/download
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest build/download \
		$$(grep -i '^llama.cpp.python==' constraints.txt)
	tar -xzf build/download/*.tar.gz -C build/reference --strip-components=3 $(TAR_WILDCARDS) '*/vendor/llama.cpp/*'
	rm -rf build/download
	touch $(REFERENCE)

demo: setup  ## train two adapters on the bundled base, convert, chat, batch; everything lands in build/demo
	$(BIN)/python examples/demo.py

test: setup reference  ## the tests
	$(BIN)/python -m pytest -q -m "not slow"

test-all: setup reference  ## the tests, the slow ones too
	$(BIN)/python -m pytest -q

bench: setup reference  ## conversion, kernels, importance, perplexity and the engine beside llama.cpp's own programs (two hours)
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/convert.py --memory
	$(BIN)/python -m bench.adapters
	$(BIN)/python -m bench.quantize_kernels
	$(BIN)/python -m bench.imatrix
	$(BIN)/python -m bench.engine

load: setup  ## three minutes of 200 clients and 16 adapters on the server; LOAD='--shape 1.1b --clients 40 --peer' for more
	$(BIN)/python -m bench.load $(LOAD)

adapters-table: setup  ## measure again what becomes of every PEFT method, for the README's tables
	$(BIN)/python -m bench.adapters_table
	$(BIN)/python -m tests.contracts.generated_docs

check: setup  ## ruff, mypy, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.contracts.generated_docs --check

docs: setup  ## write the generated parts of the README again
	$(BIN)/python -m tests.contracts.generated_docs

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
