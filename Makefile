# Two commands on a fresh machine: `make train` and `make test`.

# The first Python of at least 3.11 that really starts.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# A step takes and returns half a gigabyte of memory; by 4 KiB pages that is a tenth of its time.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
VENV := .venv
RUN := $(VENV)/bin

.PHONY: train test test-all parity compiles lint notebooks clean

train: $(VENV)/installed  ## Install, train the small model on real text, print a sample.
	$(HUGE_PAGES) $(RUN)/k2jax train tiny

test: $(VENV)/installed-dev  ## Install what tests need and run all but the slow ones.
	$(RUN)/python -m pytest -q -m "not slow and not parity and not compiles"

test-all: $(VENV)/installed-dev  ## The slow ones too.
	$(RUN)/python -m pytest -q -m "not parity and not compiles"

parity: $(VENV)/installed-parity  ## Against transformers on PyTorch; installs both.
	$(RUN)/python -m pytest -q -m parity

compiles: $(VENV)/installed-plan  ## By the real TPU and CUDA compilers, without their devices.
	$(RUN)/python -m pytest -q -m compiles

lint: $(VENV)/installed-dev  ## Style of the tree, types of the installed wheel.
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/python .ci/check_wheel.py

notebooks: $(VENV)/installed-dev  ## Run every notebook at its small size.
	$(RUN)/python .ci/run_notebooks.py

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "k2jax needs Python 3.11 or newer; none found"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN)/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(RUN)/python -m pip install -q -e ".[dev]"
	@touch $@

$(VENV)/installed-plan: $(VENV)/installed-dev
	$(RUN)/python -m pip install -q -e ".[dev,plan]"
	@touch $@

$(VENV)/installed-parity: $(VENV)/installed-dev
	$(RUN)/python -m pip install -q -e ".[dev,parity]"
	@touch $@

clean:  ## Remove the environment and every run.
	rm -rf $(VENV) runs
