# The two commands of the README, and more. All create .venv first, and all can be run again at any time.
#   make quickstart    draw moving shapes, train a video diffusion transformer on them, sample clips (CPU or GPU)
#   make world         record a small world, train a model of it, and open the page on which it is played
#   make test          install the development tools and run the tests
# Also: make lint, which runs ruff and mypy, and make docs, which builds the documentation in site/.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# This index has a small CPU build of torch. If it cannot be reached, the build of the default package index is used.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

ifneq ($(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1),)
CONSTRAINTS := constraints/cuda.txt
INDEX =
else
CONSTRAINTS := constraints/cpu.txt
INDEX = $(shell curl -fsI -m 5 $(TORCH_CPU_INDEX)/ >/dev/null 2>&1 && echo --extra-index-url $(TORCH_CPU_INDEX))
endif

.PHONY: quickstart world test lint docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check $(INDEX) --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@

quickstart: $(VENV)/.installed-tracking
	$(RUN) -m stdit quickstart

world: $(VENV)/.installed-web
	$(RUN) -m stdit play

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.installed-docs
	$(RUN) dev/make_config_reference.py
	$(RUN) -m mkdocs build --strict
