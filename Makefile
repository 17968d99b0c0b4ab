# `make demo` and `make test` need python3 (3.11 or later), make and a package index; nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= plot,train
GPU_VENV ?= .venv-gpu
GPU_BENCH ?=

.PHONY: demo test check docs bench gpu clean

demo: $(STAMP)
	$(BIN)/flexgen-jax demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 40

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs

# Into build/site. A warning is an error; with --quiet none would be counted.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	for name in startup memory stream_weights; do $(BIN)/python benchmarks/$$name.py || exit 1; done

# On a machine with an NVIDIA GPU and a driver for CUDA 12.
gpu: export JAX_PLATFORMS = cuda,cpu
gpu: export JAX_DISABLE_MOST_OPTIMIZATIONS = 0
gpu:
	$(MAKE) VENV=$(GPU_VENV) EXTRAS=gpu $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m pytest -m gpu tests/gpu
	$(GPU_VENV)/bin/python benchmarks/gpu.py --out gpu.jsonl $(GPU_BENCH)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexgen-jax needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]' --group test --group check
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(GPU_VENV) build demo-output
