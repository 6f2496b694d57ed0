# Two commands on a fresh machine: `make train` and `make test`.

# The first Python of at least 3.11 that really starts.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin
# The newest tested Python (README, "Versions"), with the newest jax that setup.cfg allows.
NEWEST_PYTHON = $(shell for p in python3.13 $(HOME)/.pyenv/versions/3.13*/bin/python3.13; do \
	$$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
NEWEST := .venv-newest
NEWEST_TESTS := tests/ops tests/model tests/planner tests/training/test_step.py tests/training/test_loop.py

.PHONY: train test test-all newest-python install-newest test-newest parity compiles lint notebooks \
	clean

train: $(VENV)/installed  ## Install, train the small model on real text, print a sample.
	$(RUN)/k2jax train tiny

test: $(VENV)/installed-dev  ## Install what tests need and run all but the slow ones.
	$(RUN)/python -m pytest -q -n 2 -W error -W ignore::ResourceWarning -m "not slow and not parity and not compiles"

test-all: $(VENV)/installed-dev  ## The slow ones too, and an hour of drawn inputs.
	K2JAX_FUZZ=80 $(RUN)/python -m pytest -q -m "not parity and not compiles"

newest-python:
	@echo $(NEWEST_PYTHON)

install-newest: $(NEWEST)/installed

test-newest: install-newest  ## On the newest Python and jax: part of the tests, and the compilers.
	@$(NEWEST)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	$(NEWEST)/bin/python -m pytest -q -n 2 -m "not slow and not parity and not compiles" $(NEWEST_TESTS)
	$(NEWEST)/bin/python -m pytest -q -m compiles tests/ops tests/planner
	@echo "left out on this Python: all tests besides $(NEWEST_TESTS)"

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

$(NEWEST)/bin/python:
	@test -n "$(NEWEST_PYTHON)" || { echo "no Python 3.13 on PATH or under ~/.pyenv/versions"; exit 1; }
	$(NEWEST_PYTHON) -m venv $(NEWEST)

$(NEWEST)/installed: $(NEWEST)/bin/python setup.cfg pyproject.toml
	$(NEWEST)/bin/python -m pip install -q --upgrade --upgrade-strategy eager -e ".[dev,plan]"
	@touch $@

clean:  ## Remove the environments and every run.
	rm -rf $(VENV) $(NEWEST) runs
