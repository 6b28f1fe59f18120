PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint bench

help:
	@echo "make train    make .venv if need be, install the project, run iwae-train"
	@echo "make test     the same environment with the developer's tools; run every test"
	@echo "make lint     the same; check style and types"
	@echo "make bench    the same with the programs to compare with; measure all, ARGS=--quick for minutes instead of an hour"
	@echo
	@echo "ARGS=\"...\"    passed on: make train ARGS=\"data=mnist objective.k=50\", make test ARGS=\"-k wheel\""
	@echo "PYTHON=...    the Python (3.11 or later) that the environment is made from"
	@echo
	@echo "CUDA or CPU: pip takes the torch that its index offers, for Linux one with CUDA (several GB; runs on a CPU too)."
	@echo "For another build, name the index that PyTorch's page 'Get started' gives for it, before the first make:"
	@echo "  PIP_EXTRA_INDEX_URL=<that index> make train"
	@echo "or stay in an environment of your own: pip install . && iwae-train. The folder .venv belongs to make."

train: .venv/.installed
	.venv/bin/iwae-train $(ARGS)

test: .venv/.installed-dev
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/.installed-bench
	.venv/bin/python -m benchmarks $(ARGS)

# The stamps are laid only when pip has finished, and .installing stays behind when it was cut off: half a package
# can look installed, so the next make then begins with an empty folder.
.venv/.installed-dev: EXTRAS = [dev]
.venv/.installed-bench: EXTRAS = [bench]
.venv/.installed .venv/.installed-dev .venv/.installed-bench: pyproject.toml
	@if [ -e .venv/.installing ]; then rm -rf .venv; fi
	@mkdir -p .venv && rm -f .venv/.installed* && touch .venv/.installing
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable ".$(EXTRAS)"
	@rm .venv/.installing && touch .venv/.installed $@
