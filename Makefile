# make run       environment, then the whole workflow on the miniature world
# make test      environment, then all checks and tests (fast ones alone: pytest -n 2 -m "not slow")
# make lint      format, style, types and Snakemake's own lint
# make pictures  the README's pictures, from a finished default run
# make torture   every stage killed in every way; half an hour or more
#
# TORCH_INDEX=ADDRESS  a package index with CPU-only wheels of torch and torchvision: the environment
#                      then lacks CUDA's libraries and Triton, 4.1 of 6.2 GB

VENV := .venv
# Not the environment's own, which is removed before a new one is made.
PYTHON ?= $(shell PATH=$$(echo "$$PATH" | tr : '\n' | grep -vxF "$(CURDIR)/$(VENV)/bin" | paste -sd: -); \
	command -v python3.11 || command -v python3)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test lint pictures torture

run: $(VENV)/.installed
	snakemake --cores all

test: $(VENV)/.installed lint
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile rules
	snakemake --lint

pictures: $(VENV)/.installed
	snakemake --cores all pictures

# See docs/torture.md.
torture: $(VENV)/.installed
	PYTHONPATH=. python tests/torture.py --output docs/torture.md

# Moved into place when whole: an interrupted installation starts again.
$(VENV)/.installed: requirements.lock pyproject.toml
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
ifdef TORCH_INDEX
	grep -E '^torch(vision)?==' requirements.lock | pip install -q --no-deps --index-url $(TORCH_INDEX) -r /dev/stdin
	grep -vE '^(torch|torchvision|triton|nvidia-.*|cuda-.*)==' requirements.lock | pip install -q -r /dev/stdin
else
	pip install -q -r requirements.lock
endif
	pip install -q --no-deps --no-build-isolation -e .
	touch $@
