# `make help` lists what there is. Needs Python 3.10 or newer (with venv), g++ and make; the rest goes into .venv.
# make demo ARGS="--data shapes" hands options on. make PYTHON=python3.12 chooses the interpreter.
.DEFAULT_GOAL := help
.PHONY: help demo test test-all sanitize gpu-static build lint format bench size clean FORCE
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
DEPS := $(VENV)/.installed
BUILT := $(VENV)/.built
PYTHON ?= python3.11 python3.12 python3.13 python3.10 python3
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f 2>/dev/null)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(BUILT) ## the whole way on real images: distil, prune, retrain, swap, measure (ARGS="...")
	$(BIN)/sparsekd demo $(ARGS)

test: $(BUILT) ## the tests, without those marked slow
	$(BIN)/python -m pytest tests -m "not slow" $(ARGS)

test-all: $(BUILT) ## every test
	$(BIN)/python -m pytest tests $(ARGS)

# In a copy, so that the build in use stays as it is. The sanitizers' runtimes have to be in the process before all else;
# leaks are not looked for, as Python itself leaks by design. Code is made by its own tests only: a sanitized loop does not
# fuse its multiplications with its additions, so that its results have other bits.
SANITIZED := $(addprefix ../../,$(wildcard $(addprefix tests/test_,conv2d*.py linear*.py kd_loss*.py \
  layer_plans.py generated.py kept_code.py max_pool2d.py sequence.py strips.py)))
sanitize: $(BUILT) ## the tests of the operators under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r sparsekd build/sanitize/
	rm -f build/sanitize/sparsekd/_C*
	SPARSEKD_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	cd build/sanitize && \
	  LD_PRELOAD="$$(for name in asan ubsan stdc++; do printf '%s ' "$$($${CXX:-c++} -print-file-name=lib$$name.so)"; done)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SPARSEKD_GENERATE=never \
	  ../../$(BIN)/python -m pytest -p no:cacheprovider $(SANITIZED) $(ARGS)

gpu-static: $(DEPS) ## compile the CUDA kernels for all architectures and compare what came out (needs nvcc, no GPU)
	$(BIN)/python benchmarks/gpu_static.py $(ARGS)

build: $(BUILT) ## .venv with the pinned dependencies, and sparsekd in it

lint: $(DEPS) ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEPS) ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BUILT) ## time the operators against torch's
	$(BIN)/python benchmarks/conv2d.py $(ARGS)
	$(BIN)/python benchmarks/kd_loss.py

size: ## lines per room
	@for room in $(wildcard sparsekd csrc kernels tests benchmarks); do \
	  printf '%7d  %s\n' "$$(find $$room -type f \( -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.inc' \
	    -o -name '*.cu' -o -name '*.cuh' -o -name '*.sh' \) -exec cat {} + | wc -l)" $$room; \
	done

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(wildcard sparsekd kernels tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f sparsekd/*.so

# An interpreter counts when it runs (a pyenv shim may not), can make environments and has its headers.
USABLE := import os, sys, sysconfig, ensurepip, venv; \
  sys.exit(sys.version_info < (3, 10) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
$(DEPS): requirements.lock
	@set -e; python=; \
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  for name in $(PYTHON); do \
	    if $$name -c '$(USABLE)' 2>/dev/null; then \
	      python=$$name; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo 'Expected Python 3.10 or newer with venv and headers (Debian: python3-venv, python3-dev) as one of' \
	      '$(PYTHON), got none' >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$python --version)"; \
	  $$python -m venv --clear $(VENV); \
	fi
	@echo 'installing the pinned dependencies (once; torch is large)'
	$(PIP) install -q -r requirements.lock
	@touch $@

# ninja compiles only what changed. A removed library is built again, whatever the stamp says.
$(BUILT): $(DEPS) setup.py pyproject.toml $(SOURCES) $(if $(wildcard sparsekd/_C*.so),,FORCE)
	@echo 'building sparsekd (a minute or two the first time)'
	$(PIP) install -q -e . --no-build-isolation --no-deps
	@touch $@

FORCE:
