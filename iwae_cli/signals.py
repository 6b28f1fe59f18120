"""SIGINT and SIGTERM as a flag that is looked at between two steps, so that the state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from iwae_cli.errors import Interrupted


class Signals:
    """The signal that has come, if any.

    Attributes:
        number: SIGINT, SIGTERM or None.
    """

    number: int | None = None

    def check(self, *_: object) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def caught() -> Iterator[Signals]:
    """Catch the first SIGINT or SIGTERM; the second one acts as ever. Does nothing outside the main thread."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        signals.number = number
        restore()

    for number in before:
        signal.signal(number, handle)
    try:
        yield signals
    finally:
        restore()
