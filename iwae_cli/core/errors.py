"""Errors that are answers: each is one line for the person at the keyboard, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What was asked for cannot be done as asked; the message says what, where and what to type instead."""

    exit_code = 2


class RunLocked(UserError):
    """Another process is working on the same run."""

    exit_code = 3


class RunFailed(UserError):
    """The run began and could not be finished, for a reason the message names (divergence, a full disk)."""

    exit_code = 1


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state of the run has been saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}")
        self.exit_code = 128 + signal_number
