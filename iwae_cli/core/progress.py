"""Progress on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from time import monotonic
from types import TracebackType

from rich import progress, table
from rich.console import Console

QUIET_SECONDS = 5.0
"""Minimum time between two plain lines."""
_label = ""
"""Begins every line of this process; see ``labelled``."""


@dataclass(eq=False)
class Progress:
    """A bar on a terminal; elsewhere (a log file, CI) a plain line every ``QUIET_SECONDS``.

    ::

        with Progress("training", total=13, unit="pass", images_per_unit=59_600) as progress:
            progress.update(2.5, bound=-92.1)

    Attributes:
        title: start of the line.
        total, start: units of the whole work, and those done before by a run that is resumed.
        unit: name of a unit, such as ``"pass"`` or ``"image"``.
        images_per_unit: for the speed, images, or other things than passes, per second.
        may_grow: whether ``change`` may raise the total, so that the time left is a lower bound.
        evaluation: measured forecast of the evaluation that follows, seconds; None: none is shown.
    """

    title: str
    _: KW_ONLY
    total: float
    unit: str = "pass"
    images_per_unit: float = 1
    start: float = 0
    may_grow: bool = False
    evaluation: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._done = self.start
        self._bound: float | None = None
        self._bar: progress.Progress | None = None
        console = Console(stderr=True)
        if sys.stderr.isatty() and not console.is_dumb_terminal:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TextColumn("{task.fields[state]}", markup=False, table_column=table.Column(no_wrap=True)),
                console=console,
                refresh_per_second=4,
            )

    def __enter__(self) -> Progress:
        self._started = self._printed = monotonic()
        self._last_position: str | None = None
        if self._bar is not None:
            self._bar.start()
            task = self._bar.add_task(f"{_short()}{self.title}", total=self.total, state="")
            self._bar.update(task, completed=self._done)
        return self

    def update(self, done: float, bound: float | None = None) -> None:
        """Show that ``done`` units are done, and the latest ``bound`` in nats (None: keep the previous one)."""
        self._done = done
        self._bound = self._bound if bound is None else bound
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, state=self._line())
        elif monotonic() - self._printed >= QUIET_SECONDS:
            self._print()

    def change(self, title: str, total: float) -> None:
        """Replace the title and the total."""
        self.title, self.total = title, total
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{_short()}{title}", total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._done > self.start and self._last_position != self._position():
            self._print()

    def _print(self) -> None:
        self._printed = monotonic()
        self._last_position = self._position()
        announce(f"{self.title}  {self._line()}")

    def _position(self) -> str:
        # A float counts fractions of a unit, to show movement within a pass.
        done = f"{self._done:.1f}" if isinstance(self._done, float) else f"{self._done:,}"
        parts = [f"{self.unit} {done}/{self.total:,}"]
        if self._bound is not None:
            parts.append(f"{self._bound:.2f} nats")
        return "  ".join(parts)

    def _line(self) -> str:
        parts = [self._position()]
        elapsed = monotonic() - self._started
        moved = self._done - self.start
        if moved > 0 and elapsed > 0:
            things = "images" if self.unit == "pass" else f"{self.unit}s"
            parts.append(f"{moved * self.images_per_unit / elapsed:,.0f} {things}/s")
            if self._done < self.total:
                least = "at least " if self.may_grow else ""
                parts.append(f"{least}{_clock((self.total - self._done) * elapsed / moved)} left")
            if self.evaluation is not None:
                parts.append(f"then about {_clock(self.evaluation)} of evaluation")
        return "  ".join(parts)


@contextmanager
def labelled(name: str) -> Iterator[None]:
    """Begin every line inside with the name of a job, such as ``job 2 (seed=1)``."""
    global _label
    _label = f"{name}: "
    try:
        yield
    finally:
        _label = ""


def label() -> str:
    """Return what lines begin with."""
    return _label


def _short() -> str:
    # A bar has room for the number alone; the line above it says what varies.
    return f"{_label.partition(' (')[0]} " if _label else ""


def announce(plan: str) -> None:
    """Print ``plan`` to standard error."""
    print(f"{_label}{plan}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
