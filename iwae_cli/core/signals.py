"""SIGINT and SIGTERM as a flag that is read between two steps, so that the state can be saved."""

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
"""Signals this close count as one: a terminal sends Ctrl-C to every process of a group, a parent may send it again."""

SHOW_CURSOR = b"\x1b[?25h"


class Signals:
    """The first signal received inside ``caught``.

    Attributes:
        number: SIGINT, SIGTERM or None.
    """

    number: int | None = None

    def check(self, *_: object) -> None:
        """Raise Interrupted if a signal has arrived; arguments are ignored, so that it fits any callback."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextmanager
def caught() -> Iterator[Signals]:
    """Record the first SIGINT or SIGTERM instead of acting on it; outside the main thread, do nothing.

    A second signal terminates immediately, like SIGKILL, which every file of a run survives; Python's own
    KeyboardInterrupt would wait for worker threads and W&B uploads. In a submitit job the preemption signal takes the
    place of SIGTERM, which submitit ignores because SLURM sends both.
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
                    # A progress bar hides the cursor.
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
    """Return the signal on which submitit puts its job back into the queue; None outside such a job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    return number if callable(signal.getsignal(number)) else None
