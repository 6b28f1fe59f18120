"""The runs of a table at equal training budgets: validation bounds read from their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from iwae_cli.core.errors import UserError
from iwae_cli.record.jsonl import read_history
from iwae_cli.report.cells import UNITS, Budget, Cell, Table
from iwae_cli.report.reader import Run, class_name

SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of the budget that every run of a table has."""
ROUNDING = 1e-9
"""Relative error of a cost, which is a product of a mean and a number of passes."""
TWO_LOSSES = "dreg, piwae, rws, vimco, reinforce and tvo with gradient=covariance"


def at_equal(table: Table, unit: str) -> Table:
    """Return the table with the validation bounds of its cells at equal budgets; with a note if that cannot be.

    Args:
        table: see ``cells.tables``.
        unit: what is equal, one of ``UNITS``.
    """
    runs = [scored.run for cell in table.cells for scored in cell.runs]
    try:
        _require(runs, unit)
        curves = {run.identity: _curve(run, unit) for run in runs}
    except (UserError, OSError) as error:
        return replace(table, notes=(*table.notes, f"not compared at equal {unit}: {error}"))
    whole = min(_cost(run, unit) or 0.0 for run in runs)
    levels = tuple(whole * share for share in SHARES)

    def at(cell: Cell, level: float) -> tuple[float, ...] | None:
        held = [curves[scored.run.identity] for scored in cell.runs]
        if any(not costs or costs[0] > level * (1 + ROUNDING) for costs, _ in held):
            return None
        return tuple(float(np.interp(level, costs, bounds)) for costs, bounds in held)

    budget = Budget(unit, int(runs[0].keys["validation.k"]), levels, tuple(_cautions(runs, unit)))
    cells = tuple(replace(cell, at_budgets=tuple(at(cell, level) for level in levels)) for cell in table.cells)
    return replace(table, budget=budget, cells=cells)


def _cost(run: Run, unit: str) -> float | None:
    """Return what the whole training took."""
    return run.draws if unit == "evaluations" else run.seconds


def _require(runs: Sequence[Run], unit: str) -> None:
    """Raise UserError unless every run says what it cost, and all are validated alike."""
    unknown = [run.identity for run in runs if not (_cost(run, unit) and run.result["epochs"])]
    if unknown:
        raise UserError(f"{UNITS[unit]} are not recorded of {len(unknown)} of {len(runs)} runs, such as {unknown[0]}")
    ks = sorted({str(run.keys["validation.k"]) for run in runs})
    if len(ks) > 1:
        raise UserError(f"validation.k is {' or '.join(ks)}; keep the runs with one, such as validation.k={ks[0]}")


def _curve(run: Run, unit: str) -> tuple[list[float], list[float]]:
    """Return the cost up to every validated pass, passes taken to be of equal cost, and the bound there in nats."""
    rows = [row for _, row in read_history(run.path) if row.get("pass")]
    per_pass = (_cost(run, unit) or 0.0) / run.result["epochs"]
    found = [(per_pass * row["pass"], bound) for row in rows if (bound := row.get("validation/bound")) is not None]
    return [cost for cost, _ in found], [bound for _, bound in found]


def _cautions(runs: Sequence[Run], unit: str) -> list[str]:
    """Return what is not equal although the budget is."""
    found = []
    if any(class_name(str(run.keys["schedule._target_"])) != "Constant" for run in runs):
        found.append("learning rates fall with the schedule: a training that is scheduled for less ends better")
    if len({run.keys["validation.every"] for run in runs}) > 1:
        found.append(
            "validation.every differs: interpolation between distant validations is too low, since curves bend"
        )
    if any(run.config.get("init_from") for run in runs):
        found.append("the trainings before init_from are not counted")
    if unit == "evaluations" and len({_has_two_losses(run) for run in runs}) > 1:
        found.append(f"objectives with a second backward pass for every draw: {TWO_LOSSES}")
    if unit == "evaluations" and any(run.keys.get("training.backward") == "roulette" for run in runs):
        found.append("training.backward=roulette scores all draws and differentiates some")
    if unit == "seconds":
        devices = [run.result.get("device") or {} for run in runs]
        ran = {tuple(str(device.get(key)) for key in ("kind", "name", "machine", "threads")) for device in devices}
        if len(ran) > 1:
            found.append("the runs were made by different devices or numbers of threads")
        if any(str(device.get("train_runs_at_once", 1)) != "1" for device in devices):
            found.append("some runs were trained at once, each with the seconds of all")
    return found


def _has_two_losses(run: Run) -> bool:
    """Return whether both networks have a loss of their own; of objectives from outside that is not known."""
    name, gradient = class_name(str(run.keys["objective._target_"])), run.keys.get("objective.gradient")
    return name in ("PIWAE", "RWS", "VIMCO", "REINFORCE") or gradient in ("dreg", "covariance")
