# Every target works on a machine that has Python 3.10-3.13 and nothing else. PYTHON=<interpreter>
# uses that interpreter as it is and installs nothing: it must have torch and the packages of the
# extras that the target needs.

.DEFAULT_GOAL := help
.PHONY: help install train test test-all test-gpu compile-all lint docs clean

BASE_PYTHON ?= python3
CONFIG ?= configs/default.toml
ARGS ?=

ifdef PYTHON
  RUN_READY :=
  DEV_READY :=
  DOCS_READY :=
  export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
else
  PYTHON := $(CURDIR)/.venv/bin/python
  RUN_READY := .venv/installed-run
  DEV_READY := .venv/installed-dev
  DOCS_READY := .venv/installed-docs
endif
# Every install goes through the constraints: an unpinned torch is whatever is newest today.
INSTALL = .venv/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo
	@echo "PYTHON=<interpreter>  use it as it is, install nothing"
	@echo "CONFIG=<file>         run file for train ($(CONFIG))"
	@echo "ARGS=\"...\"            more arguments for train, pytest, compile-all or mkdocs"

# pip works out the versions once, not once for each of the three.
install: pyproject.toml constraints.txt | .venv/bin/python ## install at once what test, lint and docs need
	$(INSTALL) --editable ".[train,test,dev,docs]"
	@touch .venv/installed-run .venv/installed-dev .venv/installed-docs

train: $(RUN_READY) ## train the small language model of CONFIG over the GPUs or two CPU processes
	$(PYTHON) launch/local.py $(CONFIG) $(ARGS)

test: $(RUN_READY) ## run the tests, except those marked slow
	$(PYTHON) -m tests.in_parts $(ARGS)

test-all: $(RUN_READY) ## run the tests, slow ones included
	$(PYTHON) -m tests.in_parts --run-slow $(ARGS)

test-gpu: $(RUN_READY) ## run the tests that need GPUs, on all GPUs of the machine
	$(PYTHON) -m tests.on_gpus $(ARGS)

compile-all: $(RUN_READY) ## compile every kernel for every GPU, without one
	$(PYTHON) -m tests.ops.triton.compiled $(ARGS)

lint: $(DEV_READY) ## ruff check, ruff format and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: $(DOCS_READY) ## build the documents and the API as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict $(ARGS)

clean: ## remove the environment and everything built or cached
	rm -rf .venv build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(BASE_PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed-run: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[train,test]"
	@touch $@

.venv/installed-dev: .venv/installed-run
	$(INSTALL) --editable ".[train,test,dev]"
	@touch $@

.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[docs]"
	@touch $@
