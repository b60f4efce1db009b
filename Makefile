# `make run`: environment, then the whole workflow on the miniature world.
# `make test`: environment, then all tests.
# `make torture`: environment, then every stage is killed in every way (half an hour or more).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint torture

run: $(VENV)/.installed
	snakemake --cores all

test: $(VENV)/.installed lint
	python -m pytest

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint

# Every stage killed in every way; see docs/torture.md.
torture: $(VENV)/.installed
	PYTHONPATH=. python tests/torture.py --output docs/torture.md

# Moved into place when whole: an interrupted installation starts again.
$(VENV)/.installed: requirements.lock
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	pip install -q -r requirements.lock
	touch $@
