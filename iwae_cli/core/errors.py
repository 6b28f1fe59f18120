"""Errors that end a command with one line on standard error and an exit code, without a traceback."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

MAX_LINE = 300
"""Characters of a message."""
_hidden: dict[str, str] = {}
"""Text of a value that comes from the environment -> what is printed for it."""


class UserError(Exception):
    """The request cannot be carried out; the message names the override or file and what to type instead."""

    exit_code = 2


def check_range(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise ValueError unless ``value`` is None or from ``least`` to ``most``; the message begins with ``name``."""
    if value is None:
        return
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


def clip(text: str, most: int = 80) -> str:
    """Return ``text`` without hidden values, with at most ``most`` characters: beginning and end of a longer one."""
    text, half = without_hidden(text), (most - 5) // 2
    return text if len(text) <= most else f"{text[: most - 5 - half]} ... {text[-half:]}"


def one_line(error: BaseException | str) -> str:
    """Return the message of an error: one line of at most ``MAX_LINE`` printable characters, no hidden values.

    What is too long loses the middle of its longest words, which are paths, before it loses a reason.
    """
    text = " ".join(without_hidden(str(error)).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    for word in sorted(text.split(), key=len, reverse=True):
        text = text if len(text) <= MAX_LINE else text.replace(word, clip(word, 50))
    return clip(text, MAX_LINE)


def without_hidden(text: str) -> str:
    """Return ``text`` with what ``hide`` was called for replaced."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text


def hide(value: Any, reference: str) -> None:
    """Have messages name ``reference``, such as ``${oc.env:TOKEN}``, for ``value`` and for all that it holds."""
    for leaf in _scalars(value):
        is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        as_json = json.dumps(str(leaf))[1:-1]
        for text in (
            str(leaf),
            repr(str(leaf))[1:-1],
            as_json,
            as_json.replace('"', ""),
            f"{leaf:,}" if is_number else "",
        ):
            for spelling in (text, " ".join(text.split())):
                if len(spelling) > 3:  # shorter ones are no secrets, and parts of many words
                    _hidden.setdefault(spelling, reference)


def hide_nothing() -> None:
    """Forget what ``hide`` was called for."""
    _hidden.clear()


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning that this process has not logged yet."""
    logging.getLogger("iwae_cli").warning(message)


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping | list | tuple):
        for child in [*value, *value.values()] if isinstance(value, Mapping) else value:
            yield from _scalars(child)
    else:
        yield value
