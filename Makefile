# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
# Each makes its own virtual environment and installs all it needs. `make help` lists the others.
VENV   ?= .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN    := $(VENV)/Scripts
else
PYTHON ?= python3
BIN    := $(VENV)/bin
endif
STAMP  := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-peft lint format tutorials docs docs-serve package clean

help:  ## print this list
	@echo "make TARGET; on a fresh machine each target first makes $(VENV), by $(PYTHON):"
	@while IFS= read -r line; do case "$$line" in \
	  [a-z]*:*"## "*) printf '  %-11s %s\n' "$${line%%:*}" "$${line##*## }";; esac; done < $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=python3.12 takes another Python, VENV=folder another environment. On Linux the usual index serves torch"
	@echo "for NVIDIA GPUs, 2.7 GB to fetch: PIP_EXTRA_INDEX_URL=address of PyTorch's index for CPUs makes it 0.2 GB."

# Releases of constraints.txt need Python 3.11.5; an older one gets the newest that there are for it.
constraint = $$($(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' && echo --constraint constraints.txt || \
  echo "Python before 3.11.5: the newest releases for it are installed, not those of constraints.txt." >&2)

# Finished installations leave a stamp. One that was interrupted, or whose requirements changed, is done again; an
# environment that cannot be used, such as one whose Python is gone, is made again from nothing.
define install
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "There is no $(PYTHON). Install Python 3.10 or newer, or name yours: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is `$(PYTHON) -V 2>&1`, and 3.10 or newer is needed. Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || \
	  $(PYTHON) -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV)
	@echo "Installing what \`make $(MAKECMDGOALS)\` needs into $(VENV): 1.6 to 2.5 GB on the disk, more with torch for GPUs."
	@echo "That takes some minutes, in which pip says nothing."
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet $(constraint) --editable ".[$(1)]"
	@echo > $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,dev)

# The demo needs the library and three packages more; the tests' environment, where it is there, has them.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(call install,demo)

demo: $(DEMO_STAMP)  ## the main job on real data: a LoRA fleet, its basis, held-out tasks; ten minutes on two cores
	$(BIN)/subspace-peft demo --out demo-output

# A process per core, at most four. Each starts with a run of neighbouring tests, which share what is made for their
# module or package; one that has finished takes over the last half of another's.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(STAMP)  ## the fast tests, eight minutes on two cores
	$(BIN)/python $(PYTEST) -m "not slow" tests

test-slow: $(STAMP)  ## the slow tests: recipes, tutorials, real models
	$(BIN)/python $(PYTEST) -m slow tests

test-peft: $(STAMP)  ## PEFT's own test suite, with rows for this method beside LoRA's
	$(BIN)/python -m pip install --quiet $(constraint) --editable ".[peft-suite]"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.peft_suite.run

lint: $(STAMP)  ## style, formatting, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP)  ## mend what lint can mend itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tutorials: $(STAMP)  ## run the tutorials' notebooks and save them with what they print
	$(BIN)/python docs/tutorials/run.py

# The documentation's site, in site/; a warning fails. The variable silences the theme's notice of its successor.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(STAMP)  ## the documentation's site, in site/
	$(BIN)/mkdocs build --strict

docs-serve: $(STAMP)  ## the site in a browser, while pages are written
	$(BIN)/mkdocs serve

# What lies in the folders that are packaged would be published: notes, settings and outputs are no part of it.
package: $(STAMP)  ## the wheel and the source distribution, in dist/, checked
	@test ! -e .git || { new=$$(git ls-files --others --exclude-standard) && test -z "$$new" || { \
	  echo "Not under version control, and would be packaged; add, ignore or move it:" >&2; echo "$$new" >&2; exit 1; }; }
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/twine check --strict dist/*

clean:  ## remove the environment and everything that was made
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo "$(VENV) is no environment, and stays as it is" >&2; exit 1; }
	rm -rf $(VENV) site dist demo-output .nox .pytest_cache .ruff_cache .hypothesis
