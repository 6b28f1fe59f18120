"""Errors that end a command with one line on standard error and an exit code, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """The request cannot be carried out; the message names the override or file and what to type instead."""

    exit_code = 2


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
