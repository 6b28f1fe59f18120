"""The runs of a table at equal training budgets: validation bounds read from their curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from iwae_cli.core.errors import UserError
from iwae_cli.record.jsonl import read_history
from iwae_cli.report.cells import SHARES, UNITS, Budget, Cell, Table
from iwae_cli.report.reader import Run, class_name

ROUNDING = 1e-9  # relative error of a cost, which is a product of a mean and a number of passes
TWO_LOSSES = "dreg, piwae, rws, vimco, reinforce and tvo with gradient=covariance"


def at_equal(table: Table, unit: str) -> Table:
    """Return the table with the validation bounds of its cells at equal ``UNITS``; with a note if that cannot be."""
    runs = [scored.run for cell in table.cells for scored in cell.runs]
    try:
        costs = _costs(runs, unit)
        curves = {run.identity: _curve(run, costs[run.identity]) for run in runs}
    except (UserError, OSError) as error:
        return replace(table, notes=(*table.notes, f"not compared at equal {unit}: {error}"))
    least = min(costs.values())

    def at(cell: Cell, level: float) -> tuple[float, ...] | None:
        held = [curves[scored.run.identity] for scored in cell.runs]
        if any(costs[0] > level * (1 + ROUNDING) for costs, _ in held):
            return None
        return tuple(float(np.interp(level, costs, bounds)) for costs, bounds in held)

    cautions = [*_cautions(runs, unit)]
    if any(len(cell.runs) == 1 for cell in table.cells):
        cautions.append("bounds of one seed have no error: a validation keeps the mean over images alone")
    found = {name: [at(cell, least * share) for cell in table.cells] for name, share in SHARES.items()}
    shares = [name for name, held in found.items() if any(held)]  # others would be columns of dashes
    if not shares:
        why = "the training of the cheapest run ends before all seeds of a cell have a validation"
        return replace(table, notes=(*table.notes, f"not compared at equal {unit}: {why}"))
    levels = tuple(least * SHARES[name] for name in shares)
    budget = Budget(unit, int(runs[0].keys["validation.k"]), levels, tuple(shares), tuple(cautions))
    held = [tuple(found[name][i] for name in shares) for i in range(len(table.cells))]
    cells = (replace(cell, at_budgets=bounds) for cell, bounds in zip(table.cells, held, strict=True))
    return replace(table, budget=budget, cells=tuple(cells))


def _costs(runs: Sequence[Run], unit: str) -> dict[str, float]:
    """Return what every whole training took; raise UserError if one does not say, or not all are validated alike."""
    costs = {run.identity: run.draws if unit == "evaluations" else run.seconds for run in runs}
    known = {run.identity: cost for run in runs if (cost := costs[run.identity]) and run.result["epochs"]}
    if unknown := [name for name in costs if name not in known]:
        raise UserError(f"{UNITS[unit]} are not recorded of {len(unknown)} of {len(runs)} runs, such as {unknown[0]}")
    ks = sorted({str(run.keys["validation.k"]) for run in runs})
    if len(ks) > 1:
        raise UserError(f"validation.k is {' or '.join(ks)}; keep the runs with one, such as validation.k={ks[0]}")
    return known


def _curve(run: Run, cost: float) -> tuple[list[float], list[float]]:
    """Return the cost up to every validated pass, passes taken to be of equal cost, and the bound there in nats."""
    per_pass = cost / run.result["epochs"]
    rows = [row for _, row in read_history(run.path) if row.get("pass")]
    found = [(per_pass * row["pass"], bound) for row in rows if (bound := row.get("validation/bound")) is not None]
    if not found:
        raise UserError(f"{run.identity} has no validation in its metrics.jsonl")
    return [so_far for so_far, _ in found], [bound for _, bound in found]


def _cautions(runs: Sequence[Run], unit: str) -> Iterator[str]:
    """Yield what is not equal although the budget is."""
    if any(class_name(run.keys["schedule._target_"]) != "Constant" for run in runs):
        yield "learning rates fall with the schedule: a training that is scheduled for less ends better"
    if len({run.keys["validation.every"] for run in runs}) > 1:
        yield "validation.every differs: interpolation between distant validations is too low, since curves bend"
    if any(run.config.get("init_from") for run in runs):
        yield "the trainings before init_from are not counted"
    if unit == "evaluations":
        if len({_has_two_losses(run) for run in runs}) > 1:
            yield f"objectives with a second backward pass for every draw: {TWO_LOSSES}"
        if any(run.keys.get("training.backward") == "roulette" for run in runs):
            yield "training.backward=roulette scores all draws and differentiates some"
        if len({run.keys.get("objective.gradient") == "stl" for run in runs}) > 1:
            yield "objective.gradient=stl scores every draw under q a second time"
        if any(run.keys.get("model.prior") == "vamp" for run in runs):
            yield "model.prior=vamp passes its images through q in every step, which draws do not count"
    else:
        yield "seconds of training include its validations"
        devices = [run.result.get("device") or {} for run in runs]
        if (
            len({tuple(str(device.get(key)) for key in ("kind", "name", "machine", "threads")) for device in devices})
            > 1
        ):
            yield "the runs were made by different devices or numbers of threads"
        if any(str(device.get("train_runs_at_once", 1)) != "1" for device in devices):
            yield "some runs were trained at once, each with the seconds of all"


def _has_two_losses(run: Run) -> bool:
    """Return whether both networks have a loss of their own; of objectives from outside that is not known."""
    name, gradient = class_name(run.keys["objective._target_"]), run.keys.get("objective.gradient")
    return name in ("PIWAE", "RWS", "VIMCO", "REINFORCE") or gradient in ("dreg", "covariance")
