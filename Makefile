# Everything runs in a virtual environment of its own, .venv, which is made on first
# use. A changed source rebuilds what depends on it.
#   make demo | test | bench | lint | docs | mutants | wheel | clean
# Options: PYTHON=python3.12, EXTRA=cuda13 (Linux: which MLX backend), ARGS="-k name",
# WORKERS=0 (tests in one process; by default one for each core, but at most eight).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# On Linux MLX needs a backend beside it; its macOS wheel has one.
EXTRA ?= $(if $(filter Linux,$(shell uname -s)),cpu)
WORKERS ?= auto
SPLIT = -n $(WORKERS) --maxprocesses 8 --dist worksteal
PIP := $(RUN)/python -m pip --disable-pip-version-check
# Pip would compile every file; Python compiles what is imported, and keeps it.
INSTALL := $(PIP) install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

NATIVE := $(wildcard csrc metal cuda)
SOURCES := CMakeLists.txt LICENSE README.md $(shell find $(NATIVE) python -type f \
  ! -name '*.py[co]' ! -name '*.so' ! -name '*.dylib')
FORMATTED := $(shell find $(NATIVE) tests -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.metal' -o -name '*.cu' -o -name '*.cuh' \))

.PHONY: demo test mutants bench lint format docs wheel clean

demo: $(VENV)/installed
	$(RUN)/python bench/demo.py $(ARGS)

bench: $(VENV)/installed
	$(RUN)/python bench/bench.py $(ARGS)

# The tests, and the examples in the docstrings of the installed package.
test: $(VENV)/tools $(VENV)/installed metal-check-if-possible
	$(RUN)/python -m pytest $(SPLIT) tests/ --doctest-modules --pyargs mlx_fused_optim $(ARGS)

# Plants bugs, one after another, and asks that each is caught. ARGS: see the program.
mutants: $(VENV)/tools $(VENV)/installed
	$(RUN)/python tests/mutation $(ARGS)

lint: $(VENV)/tools
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run -Werror $(FORMATTED)
	$(RUN)/mypy

format: $(VENV)/tools
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(FORMATTED)

# The site, into build/docs; anything that Sphinx warns of is an error.
docs: $(VENV)/docs $(VENV)/installed
	rm -rf build/docs
	$(RUN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env \
	  --doctree-dir build/doctrees docs build/docs

wheel: $(VENV)/installed
	@ls dist/*.whl

clean:
	rm -rf $(VENV) build dist

include schedules.mk

include metal.mk

# ---- Stamps ------------------------------------------------------------------

$(RUN)/pip:
	tools/make_venv.sh $(PYTHON) $(VENV)

# What builds, runs and shows the package; and what tests it.
$(VENV)/build: Makefile pyproject.toml tools/requirements.py | $(RUN)/pip
	$(RUN)/python tools/requirements.py $(EXTRA) build bench > $(VENV)/build.txt
	$(INSTALL) --requirement $(VENV)/build.txt
	touch $@

$(VENV)/tools: $(VENV)/build
	$(RUN)/python tools/requirements.py $(EXTRA) dev > $(VENV)/tools.txt
	$(INSTALL) --requirement $(VENV)/tools.txt
	touch $@

$(VENV)/docs: $(VENV)/build
	$(RUN)/python tools/requirements.py $(EXTRA) docs > $(VENV)/docs.txt
	$(INSTALL) --requirement $(VENV)/docs.txt
	touch $@

# The package is installed from its wheel, as users get it.
$(VENV)/installed: $(VENV)/build $(SOURCES)
	rm -rf dist
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(INSTALL) --no-deps --force-reinstall dist/*.whl
	touch $@
