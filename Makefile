PYTHON ?= python3
ARGS ?=

# Python keeps its bytecode, also where the environment forbids it: compiling the package costs each process seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint bench

help:
	@echo "make train    create .venv if needed, install the project, run iwae-train"
	@echo "make test     the same with the developer's tools; run every test and print the ten slowest"
	@echo "make lint     the same; check style, types and layers"
	@echo "make bench    the same with JAX, Pythae and Pyro; measure all (under an hour; ARGS=--quick takes minutes)"
	@echo
	@echo "ARGS=\"...\"    extra arguments: make train ARGS=\"data=mnist objective.k=50\", make test ARGS=\"-k wheel\""
	@echo "PYTHON=...    the Python (3.11 or later) that creates the environment"
	@echo
	@echo "CUDA or CPU: pip installs the torch of its index; on Linux that build has CUDA (several GB; it runs on a CPU too)."
	@echo "For another build, name the index that PyTorch's page 'Get started' gives for it, before the first make:"
	@echo "  PIP_EXTRA_INDEX_URL=<that index> make train"
	@echo "Or use an environment that you manage: pip install . && iwae-train. The folder .venv belongs to make."

train: .venv/.installed
	.venv/bin/iwae-train $(ARGS)

test: .venv/.installed-dev
	.venv/bin/python -m pytest --numprocesses 2 --dist worksteal --durations=10 $(ARGS)

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/.installed-bench
	.venv/bin/python -m benchmarks $(ARGS)

# A stamp exists only after pip has finished. .installing remains if pip was interrupted: the environment may then be
# incomplete although it looks installed, so the next make starts with an empty folder.
.venv/.installed-dev: EXTRAS = [dev]
.venv/.installed-bench: EXTRAS = [bench]
.venv/.installed .venv/.installed-dev .venv/.installed-bench: pyproject.toml
	@if [ -e .venv/.installing ]; then rm -rf .venv; fi
	@mkdir -p .venv && rm -f .venv/.installed* && touch .venv/.installing
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --editable ".$(EXTRAS)"
	@rm .venv/.installing && touch .venv/.installed $@
