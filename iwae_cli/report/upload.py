"""A report as one run of W&B's, beside the runs that it is about."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from iwae_cli.record.figures import plot_bounds, plot_training, plot_units
from iwae_cli.record.jsonl import read_history
from iwae_cli.record.loggers import RunInfo
from iwae_cli.record.wandb import WandbLogger
from iwae_cli.report import writers as formats
from iwae_cli.report.page import page
from iwae_cli.report.reader import Run
from iwae_cli.report.table import Cell, Table
from iwae_cli.report.writers import Report

DRAWN = 10
"""Cells in one figure, the best ones."""


def upload(report: Report, place: Path, mode: Literal["offline", "online"]) -> str | None:
    """Tables, figures and the page as one run in the group of the sweep; the same report again is the same run.

    Args:
        report: what to show.
        place: the folder that was reported on; what W&B writes goes to ``reports/`` in it, or beside a single run.
        mode: as the sink has it.

    Returns:
        The command line that uploads it, or None if there is nothing left to upload.
    """
    runs = [scored.run for scored in report.scored]
    group = report.found.sweep.name if report.found.sweep is not None else _common(runs, "logger.group")
    base = place.parent if any(run.path == place.resolve() for run in runs) else place
    folder = base.absolute() / "reports" / (group or "all")
    folder.mkdir(parents=True, exist_ok=True)
    sink = WandbLogger(
        mode=mode,
        project=_common(runs, "logger.project") or "iwae-cli",
        entity=_common(runs, "logger.entity"),
        group=group,
        tags=["report"],
        name=f"report {group}" if group else "report",
    )
    identity = f"report-{group or base.absolute().name}"
    config = {"runs": [run.identity for run in runs], "left_out": len(report.left_out)}
    sink.open(RunInfo(folder, identity, config, group, kind="report"), [])
    head, *rows = csv.reader(io.StringIO(formats.comma_separated(report)))
    # W&B wants one type a column.
    columns = [_column(values) for values in zip(*rows, strict=True)]
    sink.table(0, "table", head, list(zip(*columns, strict=True)))
    for table in report.tables:
        for name, path in _figures(table, folder / "figures").items():
            sink.image(0, f"{table.title}/{name}", path)
    sink.html(0, "page", page(report))
    sink.summary({t.title: {c.name: {"nll": c.nll, "stderr_seeds": c.stderr} for c in t.cells} for t in report.tables})
    sink.close("finished")
    return sink.sync_command()


def _figures(table: Table, folder: Path) -> dict[str, Path]:
    cells = sorted(table.cells, key=lambda cell: cell.nll)[:DRAWN]
    prefix = table.title.replace(", ", "+")
    made = {name: folder / f"{prefix}-{name}.png" for name in ("bound_vs_k", "active_units")}
    bounds = {cell.name: {str(m): nats for m, nats in cell.bounds.items()} for cell in cells}
    plot_bounds(made["bound_vs_k"], bounds)
    # Bounds of different k are not compared.
    for data, k in sorted({_validated(cell) for cell in cells}):
        name = f"validation_{data}_L{k}"
        made[name] = folder / f"{prefix}-{name}.png"
        curves = {cell.name: _validation(cell) for cell in cells if _validated(cell) == (data, k)}
        plot_training(made[name], curves, label=f"$L_{{{k}}}$ on validation")
    units = {cell.name: cell.units for cell in cells if cell.units is not None}
    if units:
        plot_units(made["active_units"], units)
    else:
        del made["active_units"]
    return made


def _validated(cell: Cell) -> tuple[str, int]:
    """On what, and by which L_k, the first seed was validated."""
    run = cell.runs[0].run
    return run.dataset, int(run.keys["validation.k"])


def _validation(cell: Cell) -> list[tuple[float, float]]:
    """Of the first seed."""
    rows = [row for _, row in read_history(cell.runs[0].run.path)]
    return [(float(row["pass"] or 0), float(nats)) for row in rows if (nats := row.get("validation/bound")) is not None]


def _common(runs: list[Run], key: str) -> Any:
    """What all runs have there; None where they differ, but for the most frequent project."""
    values = Counter(run.keys.get(key) for run in runs)
    if len(values) == 1 or (key == "logger.project" and values):
        return values.most_common(1)[0][0]
    return None


def _column(values: Sequence[str]) -> list[str | None] | list[float | None]:
    """Numbers if all of them are; None where there is nothing."""
    try:
        return [float(value) if value else None for value in values]
    except ValueError:
        return [value or None for value in values]
