PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test lint

help:
	@echo "make train    make $(VENV) if need be, install the project, run iwae-train"
	@echo "make test     the same environment with the developer's tools; run every test"
	@echo "make lint     the same; check style and types"
	@echo
	@echo "ARGS=\"...\"    passed on: make train ARGS=\"data=mnist objective.k=50\", make test ARGS=\"-k wheel\""
	@echo "PYTHON=...    the Python (3.11 or later) that the environment is made from"
	@echo "VENV=...      where the environment is"
	@echo
	@echo "CUDA or CPU: pip takes the torch that its index offers, for Linux one with CUDA (several GB; runs on a CPU too)."
	@echo "For another build, name the index that PyTorch's page 'Get started' gives for it, before the first make:"
	@echo "  PIP_EXTRA_INDEX_URL=<that index> make train"
	@echo "or install torch and torchvision into $(VENV) yourself first: a version that fits is kept."

train: $(VENV)/.installed
	$(VENV)/bin/iwae-train $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The stamps are laid only when pip has finished, and .installing stays behind when it was cut off: half a package
# can look installed, so the next make then begins with an empty folder.
$(VENV)/.installed-dev: EXTRAS = [dev]
$(VENV)/.installed $(VENV)/.installed-dev: pyproject.toml
	@if [ -e $(VENV)/.installing ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $(VENV)/.installed $(VENV)/.installed-dev && touch $(VENV)/.installing
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable ".$(EXTRAS)"
	@rm $(VENV)/.installing && touch $(VENV)/.installed $@
