"""Importance-weighted autoencoders from one command: train, measure the log-likelihood, keep the record.

``iwae_cli.load(run_folder)`` gives a trained model back, for a notebook; ``iwae_cli.check(part)`` checks an objective,
a model or a prior of your own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iwae_cli.runs.evaluate import load
    from iwae_cli.training.check import check

__all__ = ["__version__", "check", "load"]

__version__ = "0.4.0"


def __getattr__(name: str) -> Any:
    """Import a function when it is asked for: torch takes seconds to import, and ``--help`` needs none of it."""
    if name == "load":
        from iwae_cli.runs.evaluate import load

        return load
    if name == "check":
        from iwae_cli.training.check import check

        return check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
