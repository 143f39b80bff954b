# Every command of the project; CI calls the same targets. Needs Python 3.11+ with pip, and make.
#
# A target installs what it needs into .venv (with exactly the versions of constraints.txt) and leaves a stamp there,
# so that only the first run, and one after a change of a pyproject.toml or constraints.txt, takes long.

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LM_EVAL_VENV ?= .venv-lm-eval
PIP_ARGS ?=
SEED ?= 1
FAULTS ?= 80
JOBS ?= 60
LLAMA_CPP ?= .cache/llama.cpp
BUCKET ?= .cache/bucket
AXE ?= .cache/axe-core
CHROMIUM ?= /usr/bin/chromium
BIN := $(VENV)/bin

MODEL ?=
METHOD ?=
BITS ?=
PRESET ?=
CALIBRATION ?=
VALID ?=
ARGS ?=

# Containers often set this. Without bytecode every process compiles all that it imports: 10 s of work instead of 4 for
# each attempt at a job, and half of the time that the tests take.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help demo serve test test-slow test-chaos test-hosts test-chaos-hosts test-image test-gpu test-llama-cpp test-lm-eval test-vllm test-browser test-architectures test-mutants results lint format client docs docs-site types contracts migrations-check check setup image clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-18s %s\n", $$1, $$2}'

demo: $(VENV)/.embedded ## Quantize a model end to end: make demo MODEL=<folder or Hub id> METHOD=signround BITS=4 PRESET=light
	$(BIN)/bitwright demo $(if $(MODEL),--model '$(MODEL)') $(if $(METHOD),--method $(METHOD)) $(if $(BITS),--bits $(BITS)) $(if $(PRESET),--preset $(PRESET)) $(ARGS)

serve: $(VENV)/.embedded ## Start the whole service embedded: API, worker, sweep, broker
	$(BIN)/bitwright serve $(ARGS)

test: $(VENV)/.test ## Run the tests, real PostgreSQL and Valkey included (ARGS go to pytest)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not slow and not gpu and not vllm' $(ARGS)

test-slow: $(VENV)/.test ## Run the tests that take long: many kills, whole services, several processes of torch
	$(BIN)/python -m pytest -m 'slow and not gpu and not vllm and not browser' $(ARGS)

test-chaos: $(VENV)/.test ## Strike a whole service with faults drawn from a seed, and check what is left: make test-chaos SEED=1 (half an hour)
	BITWRIGHT_TEST_CHAOS_SEED='$(SEED)' BITWRIGHT_TEST_CHAOS_FAULTS='$(FAULTS)' BITWRIGHT_TEST_CHAOS_JOBS='$(JOBS)' $(BIN)/python -m pytest -s -m slow tests/chaos/test_chaos.py -k 'not hosts' $(ARGS)

test-hosts: $(VENV)/.test $(BUCKET)/.installed ## Run two APIs and three workers on hosts of their own: network namespaces, and a server that speaks S3 (root, Linux)
	BITWRIGHT_TEST_S3='$(abspath $(BUCKET))/bin/moto_server' $(BIN)/python -m pytest -m slow tests/hosts $(ARGS)

test-chaos-hosts: $(VENV)/.test $(BUCKET)/.installed ## The chaos on three hosts of their own, with cables that are pulled and hosts that are lost (root, Linux; half an hour)
	BITWRIGHT_TEST_S3='$(abspath $(BUCKET))/bin/moto_server' BITWRIGHT_TEST_CHAOS_SEED='$(SEED)' BITWRIGHT_TEST_CHAOS_FAULTS='$(FAULTS)' BITWRIGHT_TEST_CHAOS_JOBS='$(JOBS)' $(BIN)/python -m pytest -s -m slow tests/chaos/test_chaos.py -k hosts $(ARGS)

test-image: $(VENV)/.test ## Run the Dockerfile's steps for the API's image in folders, and use what they leave (installs from the index)
	BITWRIGHT_TEST_IMAGE=1 $(BIN)/python -m pytest -m slow tests/deployment/test_image_steps.py $(ARGS)

test-gpu: $(VENV)/.test ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-llama-cpp: $(VENV)/.test $(LLAMA_CPP)/.installed ## Hold GGUF files against a real llama.cpp (built, from npm; Linux, x86-64)
	BITWRIGHT_TEST_LLAMA_CPP='$(abspath $(LLAMA_CPP))' $(BIN)/python -m pytest -m slow tests/engine/ships/test_gguf_in_llama_cpp.py tests/engine/ships/test_few_bits_ship.py tests/engine/ships/gguf/test_architectures.py tests/engine/ships/gguf/test_tokenizers.py tests/engine/loads_here/test_other_runtimes.py tests/numerics/blocks tests/domain/methods/test_mixes_of_llama_cpp.py $(ARGS)

test-lm-eval: $(VENV)/.test $(LM_EVAL_VENV)/.lm-eval ## Hold tasks to a real lm-eval (an environment of its own, with its own torch)
	BITWRIGHT_TEST_LM_EVAL='$(abspath $(LM_EVAL_VENV))/bin/python' $(BIN)/python -m pytest tests/engine/tasks/test_lm_eval.py $(ARGS)

test-vllm: $(VENV)/.test $(VLLM_VENV)/.vllm ## Load checkpoints in a real vLLM on the CPU (an environment of its own, 3 GB; Linux, x86-64)
	BITWRIGHT_TEST_VLLM='$(abspath $(VLLM_VENV))/bin/python' $(BIN)/python -m pytest -m vllm $(ARGS)

test-browser: $(VENV)/.browser $(AXE)/.installed ## Use the dashboard in a real Chromium (Debian: apt install chromium; axe from npm)
	BITWRIGHT_TEST_CHROMIUM='$(CHROMIUM)' BITWRIGHT_TEST_AXE='$(abspath $(AXE))/node_modules/axe-core/axe.min.js' $(BIN)/python -m pytest -m browser tests/browser $(ARGS)

test-architectures: $(VENV)/.test ## Prove every model type on tiny checkpoints, and write the list of those that are accepted
	$(BIN)/python -m pytest -m 'slow or not slow' tests/engine/architectures $(ARGS)
	$(BIN)/python -m tests.engine.architectures
	$(BIN)/python -m tests.documentation

test-mutants: $(VENV)/.mutants ## Put drawn mistakes into the code and count those that the tests notice (30 minutes)
	$(BIN)/python -m tests.mutants sampled $(ARGS)

results: $(VENV)/.test ## Measure the missing cells of docs/results.md: make results MODEL=<folder> CALIBRATION=<jsonl> VALID=<jsonl>
	$(BIN)/python -m benchmarks.tables.results '$(MODEL)' --calibration '$(CALIBRATION)' --valid '$(VALID)' $(ARGS)
	$(BIN)/python -m tests.documentation

lint: $(VENV)/.dev ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

client: $(VENV)/.dev ## Write the blocking client, which is made from the asynchronous one
	$(BIN)/python -m tests.bitwright.made_client

docs: $(VENV)/.test ## Write the parts of the documentation that are made from the code
	$(BIN)/python -m tests.documentation

docs-site: $(VENV)/.docs ## Build the documentation as a static site in build/site; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

format: $(VENV)/.dev ## Fix style and format where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## Check types (mypy, strict)
	$(BIN)/mypy

contracts: $(VENV)/.dev ## Check which package may import which
	$(BIN)/lint-imports

migrations-check: $(VENV)/.dev ## Check that the migrations make exactly the tables of app/store/models.py
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	BITWRIGHT_DATABASE_URL="sqlite:///$$folder/check.db" && export BITWRIGHT_DATABASE_URL && \
	$(BIN)/alembic upgrade head && $(BIN)/alembic check

check: lint types contracts migrations-check ## All static checks

setup: $(VENV)/.dev ## Install everything for development, and the git hooks
	$(BIN)/pre-commit install

image: ## Build the container images
	docker compose build

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) $(VLLM_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info bitwright/build bitwright/dist bitwright/*.egg-info

# Debian's python3 comes without ensurepip unless python3-venv is installed; pip can fill such an environment itself.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Bitwright needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(AXE)/.installed:
	npm install --ignore-scripts --no-audit --no-fund --prefix $(AXE) axe-core@4.14.1
	touch $@

# Its dependencies are none of ours, so it lives in an environment of its own.
$(BUCKET)/.installed:
	$(PYTHON) -m venv $(BUCKET) || { $(PYTHON) -m venv --clear --without-pip $(BUCKET) && $(PYTHON) -m pip --python $(BUCKET)/bin/python install pip; }
	$(BUCKET)/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) 'moto[s3,server]==5.2.5'
	touch $@

$(LLAMA_CPP)/.installed:
	npm install --ignore-scripts --no-audit --no-fund --prefix $(LLAMA_CPP) node-llama-cpp@3.22.1
	touch $@

$(LM_EVAL_VENV)/.lm-eval:
	$(PYTHON) -m venv --clear $(LM_EVAL_VENV)
	$(LM_EVAL_VENV)/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) 'lm-eval[hf]==0.4.13'
	touch $@

# vLLM wants other releases of torch and transformers than we do. Its build for the CPU asks for torch's CPU build, which
# pip finds with PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'.
$(VLLM_VENV)/.vllm: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV) || { $(PYTHON) -m venv --clear --without-pip $(VLLM_VENV) && $(PYTHON) -m pip --python $(VLLM_VENV)/bin/python install pip; }
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile --no-deps $(PIP_ARGS) -r requirements-vllm.txt
	touch $@

# Compiling every file of torch on installation takes longer than compiling those that are used, when they are.
$(VENV)/.%: pyproject.toml bitwright/pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) -c constraints.txt -e ./bitwright -e '.[$*]'
	touch $@
