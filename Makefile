# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.11 and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.txt')

.PHONY: demo test lint bench clean

demo: $(VENV)/.built
	$(BIN)/sparseserve demo

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.built
	$(BIN)/python kernels/bench/ops.py --json build/bench-ops.json
	$(BIN)/python kernels/bench/decode.py --json build/bench-decode.json

# The lock lists every package; --no-deps leaves out torchvision, torchaudio and torchcodec, whose PyPI builds need CUDA.
$(VENV)/.installed: deploy/cpu.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --requirement deploy/cpu.lock
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -Ccmake.define.SPARSESERVE_SIMULATOR=ON --editable .
	touch $@

clean:
	rm -rf $(VENV) build
