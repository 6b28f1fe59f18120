"""The base class of the ``logger`` group, and several loggers as one."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, final

from iwae_cli.core.errors import Interrupted

CLOSE_SECONDS = 90
"""Time that a logger has to finish when the run ends; longer than wandb's own bound on its uploads."""

log = logging.getLogger("iwae_cli")

Status = Literal["finished", "failed", "interrupted"]
Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class RunInfo:
    """What a logger knows about a run before its first number.

    Attributes:
        folder: the run folder; exists.
        identity: folder name, unique for the training.
        config: the resolved configuration, plain dicts, lists, strings and numbers; with the ``name`` of every choice,
            ``parameters`` (how many), ``commit`` (None outside a git repository) and ``version``.
        group: name shared by the runs of one sweep, or None.
        overrides: the command line, for display.
        evaluation: name of the evaluation that ends the run.
    """

    folder: Path
    identity: str
    config: Mapping[str, Any]
    group: str | None = None
    overrides: Sequence[str] = ()
    evaluation: str = ""


class Logger(ABC):
    """Receives the record of one run. Steps never decrease; times of day never appear in metrics.

    A logger may raise, hang or be slow: it runs in a thread of its own (see ``FanOut``), and the run is the same.

    Attributes:
        essential: whether a run without this record is no run: its errors are then the run's errors.
    """

    essential: ClassVar[bool] = False

    @abstractmethod
    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Begin; ``history`` holds the rows from before an interruption (empty for a new run)."""

    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """Record one row: ``metrics`` at optimizer step ``step``."""

    def image(self, step: int, name: str, path: Path) -> None:  # noqa: B027 (optional: nothing by default)
        """Record a picture in a file that stays."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:  # noqa: B027 (optional: nothing by default)
        """Record a set of values to be shown as a histogram."""

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:  # noqa: B027
        """Record a table of numbers and words."""

    def summary(self, values: Mapping[str, Any]) -> None:  # noqa: B027 (optional: nothing by default)
        """Record the final numbers, nested plain values."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """End; called exactly once, also for failed runs, after results are on disk."""

    def recorded(self, run: RunInfo) -> bool:
        """Return whether a finished run needs nothing; if not, it is opened, given its record, and closed."""
        return True


@final
class FanOut(Logger):
    """Several loggers as one, with the calls of one. Of several processes, all but the first have ``FanOut([])``.

    ``essential`` loggers are called directly and their errors are raised. Every other logger has a thread that makes
    the calls in their order: one that raises is left out from then on, with one warning, and one that hangs is left
    behind ``CLOSE_SECONDS`` after the end of the run. Every logger is closed, also one that was left out.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self._essential = [logger for logger in loggers if logger.essential]
        self._others = [_Background(logger) for logger in loggers if not logger.essential]
        self._closed = False

    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        self._each(lambda logger: logger.open(run, history))

    def log(self, step: int, metrics: Metrics) -> None:
        row = dict(metrics)
        self._each(lambda logger: logger.log(step, row))

    def image(self, step: int, name: str, path: Path) -> None:
        self._each(lambda logger: logger.image(step, name, path))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self._each(lambda logger: logger.histogram(step, name, values))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._each(lambda logger: logger.table(step, name, columns, rows))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda logger: logger.summary(values))

    def close(self, status: Status) -> None:
        """Close every logger; once. If an essential one raises, the others are closed as failed."""
        if self._closed:
            return
        self._closed = True
        errors: list[Exception] = []
        for logger in self._essential:
            try:
                logger.close(status)
            except Exception as error:
                errors.append(error)
                status = "interrupted" if isinstance(error, Interrupted) else "failed"
        for other in self._others:
            other.begin_close(status)
        for other in self._others:
            other.wait()
        if errors:
            raise errors[0]

    def _each(self, call: Callable[[Logger], None]) -> None:
        # The local record before everything else: where it fails, no other logger may claim to have the row.
        for logger in self._essential:
            call(logger)
        for other in self._others:
            other.put(call)


class _Background:
    """A logger and the thread that calls it."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self._works = True
        self._calls: SimpleQueue[Callable[[Logger], None]] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=type(logger).__name__, daemon=True)

    def put(self, call: Callable[[Logger], None]) -> None:
        """Queue ``call``; not made if an earlier one has raised."""
        self._call(lambda logger: call(logger) if self._works else None)

    def begin_close(self, status: Status) -> None:
        """Queue the last call, which is always made."""

        def end(logger: Logger) -> None:
            self._closing = True
            logger.close(status)

        self._call(end)

    def wait(self) -> None:
        """Wait for the last call, at most ``CLOSE_SECONDS``."""
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("%s did not finish within %s s and was left behind", self._thread.name, CLOSE_SECONDS)

    def _call(self, call: Callable[[Logger], None]) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(call)

    def _work(self) -> None:
        while not self._closing:
            try:
                self._calls.get()(self.logger)
            except Exception as error:
                self._works = False
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                log.warning("%s failed and is left out; the local record is whole: %s", self._thread.name, why)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by names joined with ``/``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
