"""The shape of every sink, and the fan-out to several."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from iwae_cli.core.errors import Interrupted

log = logging.getLogger("iwae_cli")

Status = Literal["finished", "failed", "interrupted"]
Metrics = Mapping[str, float | int | None]


@dataclass(frozen=True)
class RunInfo:
    """What a sink may know of a run before its first number.

    Attributes:
        folder: the run folder; exists.
        identity: folder name, unique for the training.
        config: the resolved configuration, plain dicts, lists, strings and numbers.
        group: name shared by the runs of one sweep, or None.
        overrides: the command line, for display.
        kind: what it is among the runs of its group: ``train``, ``report``.
    """

    folder: Path
    identity: str
    config: Mapping[str, Any]
    group: str | None = None
    overrides: Sequence[str] = ()
    kind: str = "train"


class Logger(ABC):
    """Receives the record of one run. Steps never decrease; times of day never appear in metrics."""

    essential: ClassVar[bool] = False
    """Whether a run without this record is no run: its errors are then the run's errors."""

    @abstractmethod
    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Begin; ``history`` is the record kept from before an interruption (empty for a new run)."""

    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """One row: ``metrics`` at optimizer step ``step``."""

    @abstractmethod
    def image(self, step: int, name: str, path: Path) -> None:
        """A picture in a file that stays."""

    @abstractmethod
    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """A set of values to be shown as a histogram."""

    @abstractmethod
    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers, nested plain values."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """End; called exactly once, also for failed runs, after results are on disk. Must not raise or hang."""

    def sync_command(self) -> str | None:
        """After ``close``: the command line that uploads what only lies on this machine; None if there is none."""
        return None


@final
class FanOut(Logger):
    """Several sinks as one. Where several processes work on a run, all but the first have ``FanOut([])``.

    A sink that raises is left out from then on, with one warning, and the others go on; only the errors of an
    ``essential`` sink are raised. Every sink is closed, also one that was left out.
    """

    def __init__(self, sinks: Sequence[Logger]) -> None:
        # The local record before everything that may be slow.
        self._sinks = sorted(sinks, key=lambda sink: not sink.essential)
        self._failed: set[int] = set()
        self._closed = False

    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Open every sink."""
        self._each(lambda sink: sink.open(run, history))

    def log(self, step: int, metrics: Metrics) -> None:
        """One row to every sink."""
        self._each(lambda sink: sink.log(step, metrics))

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture to every sink."""
        self._each(lambda sink: sink.image(step, name, path))

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """A set of values to every sink."""
        self._each(lambda sink: sink.histogram(step, name, values))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final numbers to every sink."""
        self._each(lambda sink: sink.summary(values))

    def close(self, status: Status) -> None:
        """Close every sink, whatever became of it; once. After an error that is raised, the others as failed."""
        if self._closed:
            return
        self._closed = True
        errors: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close(status)
            except Exception as error:
                if sink.essential or isinstance(error, Interrupted):
                    errors.append(error)
                    status = "interrupted" if isinstance(error, Interrupted) else "failed"
                else:
                    _warn(sink, error)
        if errors:
            raise errors[0]

    def sync_command(self) -> str | None:
        """The first command line that a sink has."""
        return next((command for sink in self._sinks if (command := sink.sync_command())), None)

    def _each(self, call: Callable[[Logger], None]) -> None:
        for sink in self._sinks:
            if id(sink) in self._failed:
                continue
            try:
                call(sink)
            except Interrupted:
                raise
            except Exception as error:
                if sink.essential:
                    raise
                self._failed.add(id(sink))
                _warn(sink, error)


def _warn(sink: Logger, error: Exception) -> None:
    log.warning("%s failed and is left out: %s: %s", type(sink).__name__, type(error).__name__, error)
