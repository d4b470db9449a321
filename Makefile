# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Each makes its own virtual environment and installs all it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.PHONY: demo test test-slow test-peft lint format docs docs-serve clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

# The demo needs the library and three packages more; the tests' environment, where it is there, has them.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	@touch $(DEMO_STAMP)

demo: $(DEMO_STAMP)
	$(BIN)/subspace-peft demo --out demo-output

# A process per core, at most four. Each starts with a run of neighbouring tests, which share what is made for their
# module or package; one that has finished takes over the last half of another's.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow" tests

test-slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow tests

# PEFT's own test suite with rows for this method beside LoRA's
test-peft: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[peft-suite]"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_suite.run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation's site, in site/; a warning fails. The variable silences the theme's notice of its successor.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) site demo-output .pytest_cache .ruff_cache .hypothesis
