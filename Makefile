# Two commands set everything up: `make demo` and `make test`. Each makes .venv once from constraints.txt.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-tests
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed-tests
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-matrix test-slow lint format families docs clean

demo: $(STAMP)
	$(VENV)/bin/halobench demo -o runs/demo

# Two processes on two cores: threads that wait must not spin.
test test-matrix test-slow: export OMP_WAIT_POLICY ?= passive

test: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -q -n 2

# The suite with the oldest transformers that pyproject.toml allows, then with the newest.
test-matrix: $(OLDEST_STAMP) $(TEST_STAMP)
	$(OLDEST)/bin/python -m pytest -q -n 2
	$(VENV)/bin/python -m pytest -q -n 2

test-slow: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -q -m slow

lint: $(TEST_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(TEST_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Runs every family with every mixer and records how it ended: the table of docs/families.md.
families: $(TEST_STAMP)
	$(VENV)/bin/python -m pytest -q tests/test_families.py --families-record benchmarks/families.json

# Rewrites the generated sections of README.md and docs/demo from the committed records.
docs: $(STAMP)
	$(VENV)/bin/halobench report benchmarks/demo -o docs/demo
	$(VENV)/bin/python -m halobench.documents

# torch goes first and alone: an open range would pull gigabytes of CUDA packages onto a machine without a GPU.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

# triton is for the interpreter tests only; CUDA builds of torch bring their own.
$(TEST_STAMP): $(STAMP)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" triton==3.7.1
	touch $@

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints-oldest.txt)"
	$(OLDEST)/bin/pip install -q --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]" triton==3.7.1
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist *.egg-info
