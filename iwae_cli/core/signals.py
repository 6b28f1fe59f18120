"""SIGINT and SIGTERM as a flag that is looked at between two steps, so that the state can be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from iwae_cli.core.errors import Interrupted

REPEATED_SECONDS = 2.0
"""Signals this close are one: a terminal tells all its processes, and so may whoever has started them."""

SHOW_CURSOR = b"\x1b[?25h"


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
    """Catch the first SIGINT or SIGTERM; a later one ends the process at once. Does nothing outside the main thread.

    At once is as by kill -9, which every file of a run survives; Python's own KeyboardInterrupt would wait for the
    threads at work and for the uploads of W&B.

    In a job of submitit, the signal of preemption instead of SIGTERM, which it ignores: SLURM sends both. A later one
    acts as ever.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGINT, preemption() or signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    first = 0.0

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if signals.number is None:
            signals.number, first = number, time.monotonic()
        elif time.monotonic() - first > REPEATED_SECONDS:
            restore()
            if number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
                if os.isatty(2):
                    # A progress bar hides it.
                    os.write(2, SHOW_CURSOR)
            signal.raise_signal(number)

    for number in numbers:
        signal.signal(number, handle)
    # Ray starts its workers with SIGINT blocked.
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield signals
    finally:
        restore()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def preemption() -> signal.Signals | None:
    """The signal that submitit answers by putting its job into the queue again; None outside such a job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    return number if callable(signal.getsignal(number)) else None
