# Every target makes its own environment in .venv first, from pyproject.toml and constraints.txt.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := .venv/.installed
INSTALLED_DOCS := .venv/.installed-docs
INSTALLED_INTEGRATION := .venv/.installed-integration
DEMO := build/demo

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test integration lint bench gpu docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter; ARGS='...' is passed on by test, bench and gpu; WORKERS=2 is for test."

install: $(INSTALLED) ## make .venv with the package, its extras and the tools

demo: $(INSTALLED) ## fit a head to the digits, then write the page that explains the chain
	@mkdir -p $(DEMO)
	@$(BIN)/softcurve fit --path 0.001,0.01,0.1,1,10,100 --out $(DEMO)/head.safetensors --no-json --overwrite
	@$(BIN)/softcurve explain --out $(DEMO)/explain.html --no-json --overwrite
	@echo
	@echo "The report of the fit, and the page that explains the chain:"
	@echo "$(CURDIR)/$(DEMO)/head.html"
	@echo "$(CURDIR)/$(DEMO)/explain.html"

# One thread a worker: two workers with two threads each would fight over two cores.
test: $(INSTALLED_DOCS) ## run every test, the slow ones too (fewer: ARGS="-m 'not slow'")
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

integration: $(INSTALLED_INTEGRATION) ## run the tests with transformers, peft and TRL
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/integration $(ARGS)

lint: $(INSTALLED) ## check style, formatting, types and the order of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED) ## measure speed and memory
	$(BIN)/python -m bench $(ARGS)

gpu: $(INSTALLED) ## run the head's tests and the benchmark on a CUDA device, in ten minutes
	$(BIN)/python -m bench.gpu.check $(ARGS)

docs: $(INSTALLED_DOCS) ## build the documentation into build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "The documentation is at $(CURDIR)/build/docs/index.html"

clean: ## remove the environment, builds and caches
	rm -rf .venv build dist docs/gallery .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A system Python without ensurepip (Debian splits it off) still has its own pip, which can fill the environment from outside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		version=$$($(PYTHON) --version 2>&1) || version="not there"; \
		echo "softcurve needs Python 3.11 or newer, but PYTHON=$(PYTHON) is $$version." >&2; \
		echo "Name another one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv .venv; else \
		$(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet -c constraints.txt pip; fi

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing softcurve and its tools into .venv ..."
	@$(PIP) -e '.[all,test,lint]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	@$(PIP) -e '.[all,docs]'
	@touch $@

$(INSTALLED_INTEGRATION): $(INSTALLED)
	@echo "Installing transformers, peft, TRL and others into .venv ..."
	@$(PIP) -e '.[all,integration]'
	@touch $@
