# make demo      the operations on real data: on a GPU, else small in the emulator
# make test      every test that this machine can run
# make mutants   faults planted in the large kernels, each of which the emulator must report: an hour
# make coverage  which lines of the kernels the emulator runs; wants g++
# make lint      ruff, clang-format and mypy; changes nothing
# make format    what of that can be mended
# make bench     one line a case, on a GPU
#
# The first of them makes a virtual environment and installs the project into it.  Settings:
#   CUDA=13      CUDA 12 or 13, as the driver has it (no GPU is needed to install or to test)
#   PYTHON=…     the interpreter that makes the environment
#   VENV=.venv   where it is.  `VENV=` (empty): none, use PYTHON as it is and install nothing; for a
#                machine that holds the packages already and reaches no registry:
#                    make test PYTHON=python3 VENV=
#   WITH=…       more extras to install, e.g. WITH=torch,jax: their tests are skipped without them
#   JOBS=2       processes for the tests
#   ARGS=…       passed on, e.g. make test ARGS="-k causal", make bench ARGS=--help

CUDA ?= 13
PYTHON ?= python3
VENV ?= .venv
WITH ?=
JOBS ?= 2
ARGS ?=

comma := ,
EXTRAS := cuda$(CUDA),test,plot$(if $(strip $(WITH)),$(comma)$(strip $(WITH)))

ifeq ($(strip $(VENV)),)
  READY :=
  RUN := $(PYTHON)
  BIN := $(if $(findstring /,$(PYTHON)),$(dir $(PYTHON)))
else
  READY := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))
  RUN := $(VENV)/bin/python
  BIN := $(VENV)/bin/
endif

CUDA_FILES = $(shell find kernels cuattn/emulator -name '*.cu*' -o -name '*.cpp' -o -name '*.h')

.PHONY: demo test mutants coverage lint format bench

demo: $(READY)
	$(RUN) -m cuattn demo $(ARGS)

test: $(READY) # one thread of BLAS a process: the processes are many
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) $(ARGS)

mutants: $(READY)
	OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) -m slow tests/test_emulator_mutants.py $(ARGS)

coverage: $(READY)
	$(RUN) -m tests.coverage

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(if $(CUDA_FILES),$(BIN)clang-format --dry-run -Werror $(CUDA_FILES))
	$(RUN) -m mypy

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(if $(CUDA_FILES),$(BIN)clang-format -i $(CUDA_FILES))

bench: $(READY)
	$(RUN) -m cuattn bench $(ARGS)

$(VENV)/installed-$(subst $(comma),-,$(EXTRAS)): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@
