"""Errors that end a command with one line on standard error and an exit code, without a traceback."""

from __future__ import annotations

import math


class UserError(Exception):
    """The request cannot be carried out; the message names the override or file and what to type instead."""

    exit_code = 2


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is from ``least`` to ``most``; the message begins with ``name``."""
    if value < least:
        raise ValueError(f"{name} must be >= {least:,}, got {value:,}")
    if value > most:
        raise ValueError(f"{name} must be <= {most:,}, got {value:,}")


class RunLocked(UserError):
    """Another process is working on the same run."""

    exit_code = 3


class RunFailed(UserError):
    """The run started and could not finish; the message gives the reason (divergence, a full disk)."""

    exit_code = 1


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state of the run has been saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number
