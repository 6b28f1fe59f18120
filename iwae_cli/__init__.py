"""Importance-weighted autoencoders from one command: train, measure the log-likelihood, keep the record.

From Python: ``iwae_cli.train("data=mnist", "objective=dreg")`` trains a run and opens it, ``iwae_cli.open(run_folder)``
opens one, ``iwae_cli.load(run_folder)`` returns its model and configuration, and ``iwae_cli.check(part)`` checks an
objective, a model or a prior of your own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwae_cli.cli.train import train_run as train
    from iwae_cli.runs.evaluate import load
    from iwae_cli.runs.opened import open_run as open
    from iwae_cli.training.check import check

__all__ = ["__version__", "check", "load", "open", "train"]

__version__ = "0.9.0"

_FUNCTIONS = {
    "check": ("iwae_cli.training.check", "check"),
    "load": ("iwae_cli.runs.evaluate", "load"),
    "open": ("iwae_cli.runs.opened", "open_run"),
    "train": ("iwae_cli.cli.train", "train_run"),
}


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: torch takes seconds to import, and ``--help`` needs none of it."""
    if name in _FUNCTIONS:
        module, function = _FUNCTIONS[name]
        return getattr(import_module(module), function)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
