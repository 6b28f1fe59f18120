"""The local record of a run: ``metrics.jsonl`` while it trains, ``metrics.csv`` when it ends."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TextIO, final

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import dump_json, write_text
from iwae_cli.record.loggers import Logger, Metrics, RunInfo, Status

ROWS = "metrics.jsonl"
TABLE = "metrics.csv"


@final
class JsonlLogger(Logger):
    """Write one JSON object per row: ``step`` and the metrics; nothing in it depends on the time of day.

    Pictures, histograms and final numbers have files of their own.

    Raises:
        ValueError: in ``log``, a metric is NaN or infinite, or is called ``step``.
        OSError: the disk is full or the folder is gone; a run without its record is no run.
    """

    essential: ClassVar[bool] = True

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: TextIO | None = None

    def open(self, run: RunInfo, history: Sequence[tuple[int, Metrics]]) -> None:
        """Make the file hold exactly ``history``, then append."""
        self._path = run.folder / ROWS
        write_text(self._path, "".join(_line(step, metrics) for step, metrics in history))
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Metrics) -> None:
        """Append one row and fsync, so that no later checkpoint is newer than the record."""
        if self._file is None:
            raise RuntimeError("log needs an open logger")
        self._file.write(_line(step, metrics))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, status: Status) -> None:
        """Write ``metrics.csv``: one column per metric, in the order of first appearance."""
        if self._file is None or self._path is None:
            return
        file, self._file = self._file, None
        file.close()
        rows = [{"step": step, **metrics} for step, metrics in read_history(self._path.parent)]
        columns = dict.fromkeys(["step", *(name for row in rows for name in row)])
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path.with_name(TABLE), table.getvalue())


def read_history(folder: str | Path, up_to_step: int | None = None) -> list[tuple[int, dict[str, float | int | None]]]:
    """Return the rows of a run's local record whose step is at most ``up_to_step``; none if there is no record.

    A last line that was cut by the death of its writer is left out.

    Raises:
        UserError: any other line is no row of a record.
    """
    path = Path(folder) / ROWS
    if not path.exists():
        return []
    history = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            step = row.pop("step")
            values = [value for value in row.values() if value is not None]
            if type(step) is not int or not all(type(x) in (int, float) and math.isfinite(x) for x in values):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError):
            raise UserError(
                f"{path}, line {number}: not a row of metrics; remove the line and the run resumes without it, "
                "or begin again with restart=true"
            ) from None
        if up_to_step is None or step <= up_to_step:
            history.append((step, row))
    return history


def _line(step: int, metrics: Metrics) -> str:
    if "step" in metrics:
        raise ValueError("metrics must not hold the name 'step'")
    return dump_json({"step": step, **metrics}, f"metrics at step {step}") + "\n"
