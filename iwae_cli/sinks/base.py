"""The shape of every sink, and the fan-out to several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    """

    folder: Path
    identity: str
    config: Mapping[str, Any]
    group: str | None = None
    overrides: Sequence[str] = ()


class Sink(ABC):
    """Receives the record of one run. Steps never decrease; times of day never appear in metrics."""

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
