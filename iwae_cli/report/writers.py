"""A report as text: terminal, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Sheet
from rich.text import Text

from iwae_cli.core.files import dump_json
from iwae_cli.record.schema import GAP, NUMBERS
from iwae_cli.record.summary import PLUS_MINUS
from iwae_cli.record.units import units_text
from iwae_cli.report.cells import OTHERWISE, UNITS, WITHIN, Cell, Table, stderr
from iwae_cli.report.paired import Paired
from iwae_cli.report.published import RECALLED
from iwae_cli.report.reader import Estimate, Found, LeftOut, Run, Score
from iwae_cli.report.selection import MISSING, Scored

LISTED = 20  # runs that a terminal lists one by one; more are counted


@dataclass(frozen=True)
class Report:
    """Everything that the writers show."""

    found: Found  # runs, and remarks on them
    left_out: Sequence[LeftOut]  # every run that is in no table
    tables: Sequence[Table]
    comparisons: Sequence[Paired]  # of --compare

    @property
    def scored(self) -> list[Scored]:
        """Every run in a table."""
        return [scored for table in self.tables for cell in table.cells for scored in cell.runs]

    @property
    def estimates(self) -> list[tuple[Run, Estimate]]:
        """Every evaluation by another estimator than L_k."""
        return [(run, estimate) for run in self.found.runs for estimate in run.estimates]

    @property
    def warnings(self) -> list[str]:
        """Unreliable estimates among those compared: a line with their number, then the warning of the worst."""
        judged = [s for table in self.tables for cell in table.cells for s in table.compared(cell).runs]
        weak = [(s, s.warning) for s in judged if s.warning]
        if not weak:
            return []
        worst, words = max(weak, key=lambda one: max(abs(one[0].numbers.get(key) or 0) for key in ("gap_q", "bias_mc")))
        what = "runs" if len({s.run.identity for s in judged}) == len(judged) else "evaluations"
        count = f"weak estimates of log p(x): {len(weak)} of {len(judged)} {what}"
        return [f"{count}; of the worst, {worst.run.identity}:", words]

    def below(self, listed: int | None = None) -> list[str]:
        """Return the lines below the tables, indented where they belong to the line before.

        Of estimates and of runs that are in no table at most ``listed`` each are named.
        """

        def more(there: Sequence[object]) -> list[str]:
            hidden = len(there[listed:]) if listed is not None else 0
            return [f"  and {hidden} more: --format json or --html lists all"] if hidden else []

        lines = [line for paired in self.comparisons for line in paired.lines]
        for run, estimate in self.estimates[:listed]:
            lines.append(f"{run.identity}, {estimate.heading}:")
            for name, numbers in estimate.lines.items():
                held = [f"{of} {text}".strip() for of, text in zip(estimate.columns, numbers, strict=True) if text]
                lines.append(f"  {name.strip()}: {', '.join(held)}")
        lines += more(self.estimates)
        lines += [f"  {line}" if i else f"warning: {line}" for i, line in enumerate(self.warnings)]
        lines += [f"note: {line}" for line in self.found.notes]
        if self.left_out:
            states = Counter(left.state for left in self.left_out)
            lines.append(f"not in a table: {', '.join(f'{n} {state}' for state, n in states.items())}")
            lines += [f"  {left.path.name}: {left.state}, {left.why}" for left in self.left_out[:listed]]
            lines += more(self.left_out)
        return lines


def terminal(report: Report, width: int | None = None) -> str:
    """Return text for people; tables wider than ``width`` (None: no limit) have one row per cell instead."""
    out = io.StringIO()
    console = Console(file=out, width=10_000, highlight=False, markup=False, emoji=False, color_system=None)
    for table in report.tables:
        names = table.names
        heads = [f"{' '.join(c) if i == 0 else ''}\n{n}" for c in table.column_labels for i, n in enumerate(names)]
        sheet = _sheet([f"\n{key}" for key in table.rows], heads, table.body)
        if width is not None and console.measure(sheet).maximum > width:
            rows = [[*cell.column, *cell.row, *(field.text for field in table.fields(cell))] for cell in table.cells]
            sheet = _sheet([*table.columns, *table.rows], names, rows)
        console.print(table.title, sheet, *table.notes_below, "", sep="\n")
    console.print(*report.below(LISTED), sep="\n")
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().rstrip().splitlines())


def _sheet(keys: Sequence[str], numbers: Sequence[str], rows: Sequence[Sequence[str]]) -> Sheet:
    sheet = Sheet(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate((*keys, *numbers)):
        sheet.add_column(name, justify="left" if i < len(keys) else "right", no_wrap=True)
    for row in rows:
        sheet.add_row(*map(Text, row))
    return sheet


def markdown(report: Report) -> str:
    """Return tables in GitHub's Markdown."""
    lines = []
    for table in report.tables:
        names = [" ".join((*column, name)) for column in table.column_labels for name in table.names]
        lines += [f"**{_escaped(table.title)}**", "", _piped([*table.rows, *names])]
        lines.append(_piped([*["---"] * len(table.rows), *["---:"] * len(names)]))
        lines += [_piped(row) for row in table.body]
        lines += ["", *(f"{_escaped(line)}  " for line in table.notes_below), ""]
    for line in report.below():
        lines.append(f"- {_escaped(line.strip())}" if line.startswith("  ") else f"{_escaped(line)}  ")
    return "\n".join(lines).rstrip() + "\n"


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "<"):
        text = text.replace(mark, f"\\{mark}")
    return text


def comma_separated(report: Report) -> str:
    """Return one row per cell, all digits."""
    compared = any(table.against for table in report.tables)
    rows = [_row(table, cell, compared) for table in report.tables for cell in table.cells]
    keys = [key for table in report.tables for key in (*table.rows, *table.columns)]
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys([*keys, *(name for row in rows for name in row)]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _row(table: Table, cell: Cell, compared: bool) -> dict[str, Any]:
    """Return the numbers of ``_cell`` side by side."""
    whole, paper, paired = _cell(table, cell), cell.published, cell.against
    one, means = cell.runs[0], ("nll", "stderr_seeds", *NUMBERS)
    memory = {"nll": paper and paper.nll_recalled, "active_units": paper and paper.units is not None}
    errors = ("stderr_images", "stderr_seeds", "by") if compared else ()
    return {
        **whole["keys"],
        "data": one.run.dataset,
        "split": table.split,
        "k": table.k,
        "weights": table.weights,
        "precision": table.precision,
        "evaluation_seed": one.score.keys["evaluation.seed"],
        "images": one.numbers["n"],
        "images_sha256": one.kind.images,
        "seeds": len(cell.runs),
        **{key: whole[key] for key in (*means, *GAP, "exact_nll")},
        **{f"refined_{key}": whole["refined"] and whole["refined"][key] for key in means},
        "active_units": cell.units and units_text(cell.units, ()).replace(" ", ""),
        **cell.cost,
        **{f"L_{level['k']}_at_{level[unit]:.6g}_{unit}": level["bound"] for unit, level in _levels(table, cell)},
        **({"against": paired and paired.b, "difference": paired and paired.difference} if compared else {}),
        **{f"difference_{key}": paired and getattr(paired, key) for key in errors},
        "paper_nll": paper and paper.nll,
        "paper_active_units": paper and paper.units and "+".join(map(str, paper.units)),
        "paper_from_memory": " ".join(key for key, recalled in memory.items() if recalled),
        "paper_training": paper and ("; ".join(cell.deviations) or "as in the paper"),
        "paper_source": paper and paper.source,
        "runs": " ".join(s.run.identity for s in cell.runs),
        "evaluations": " ".join(s.score.name for s in cell.runs),
    }


def latex(report: Report) -> str:
    """Return a ``tabular`` with the rules of booktabs; everything beside the tables is a comment."""
    lines = []
    for table in report.tables:
        keys, columns, width = len(table.rows), table.column_labels, len(table.names)
        lines.append(f"% {table.title}")
        lines += [r"\begin{tabular}{" + "l" * keys + "r" * width * len(columns) + "}", r"\toprule"]
        if any(columns):
            spans = [rf"\multicolumn{{{width}}}{{c}}{{{_tex(' '.join(column))}}}" for column in columns]
            lines.append(" & ".join([""] * keys + spans).strip() + r" \\")
            starts = [keys + 1 + i * width for i in range(len(columns))]
            lines.append(" ".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts))
        names = [rf"NLL$_{{{table.k}}}$", *map(_tex, table.names[1:])]
        lines += [_tex_row([*map(_tex, table.rows), *names * len(columns)]), r"\midrule"]
        lines += [_tex_row(map(_tex, row)) for row in table.body]
        lines += [r"\bottomrule", r"\end{tabular}", *(f"% {line}" for line in table.notes_below)]
    return "\n".join([*lines, *(f"% {line}" for line in report.below())]) + "\n"


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", f" {PLUS_MINUS} ": r" $\pm$ ", MISSING: "--", OTHERWISE: r"$^\dagger$"}
    special |= {WITHIN: r"$^\ddagger$", PLUS_MINUS: r"$\pm$", "~": r"\textasciitilde{}"}
    special |= {RECALLED: "$^*$", "^": r"\textasciicircum{}", **{mark: rf"\{mark}" for mark in "_%&#${}"}}
    return re.sub("|".join(map(re.escape, special)), lambda mark: special[mark[0]], text)


def json_text(report: Report) -> str:
    """Return everything, for programs."""
    fields = ("split", "k", "weights", "precision", "images", "images_sha256", "rows", "columns", "notes")
    value = {
        "tables": [
            {
                "data": list(table.images),
                **{key: getattr(table, key) for key in fields},
                "cells": [_cell(table, cell) for cell in table.cells],
            }
            for table in report.tables
        ],
        "comparisons": [paired.as_dict() for paired in report.comparisons],
        "estimates": [
            {
                **_evaluated(run, estimate),
                "estimator": estimate.estimator,
                "objective": estimate.objective or None,
                "weights": estimate.weights,
                "numbers": estimate.numbers,
            }
            for run, estimate in report.estimates
        ],
        "left_out": [{"path": str(x.path), "state": x.state, "why": x.why} for x in report.left_out],
        "notes": list(report.found.notes),
        "warnings": report.warnings,
    }
    return dump_json(value, "the report", indent=2) + "\n"


def _cell(table: Table, cell: Cell) -> dict[str, Any]:
    paper = cell.published and {
        "nll": cell.published.nll,
        "nll_from_memory": cell.published.nll_recalled,
        "active_units": cell.published.units,
        "active_units_from_memory": cell.published.units is not None,
        "source": cell.published.source,
        "trained_otherwise": cell.deviations,
    }
    return {
        "keys": table.keyed(cell),
        "seeds": [s.run.seed for s in cell.runs],
        **_means(cell),
        **{key: cell.mean(key) for key in (*GAP, "exact_nll")},
        "refined": cell.refined and _means(cell.refined),
        "against": cell.against and cell.against.as_dict(),
        "active_units": cell.units,
        **cell.cost,
        "at_budgets": [level for _, level in _levels(table, cell)],
        "bounds": {str(m): value for m, value in cell.bounds.items()},
        "paper": paper,
        "runs": [
            {
                **_evaluated(s.run, s.score),
                "evaluation_seed": s.score.keys["evaluation.seed"],
                **{key: s.numbers.get(key) for key in ("nll", *NUMBERS, *GAP)},
                "refined": (found := s.numbers.get("refined")) and {key: found[key] for key in ("n", "nll", *NUMBERS)},
                "sha256": s.score.sha256[s.split],
                "warning": s.warning,
            }
            for s in cell.runs
        ],
    }


def _levels(table: Table, cell: Cell) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the unit and the validation bound of a cell at each budget, mean and standard error over seeds, nats."""
    for level, held in zip(table.budget.levels if table.budget else (), cell.at_budgets, strict=True):
        assert table.budget is not None
        bound = {"bound": held and statistics.fmean(held), "stderr_seeds": held and stderr(held)}
        unit = UNITS[table.budget.unit]
        yield unit, {"k": table.budget.k, unit: level, **bound}


def _evaluated(run: Run, evaluation: Score | Estimate) -> dict[str, Any]:
    return {"identity": run.identity, "path": str(run.path), "seed": run.seed, "evaluation": evaluation.name}


def _means(cell: Cell) -> dict[str, float | None]:
    return {"nll": cell.nll, "stderr_seeds": cell.stderr, **{key: cell.mean(key) for key in NUMBERS}}
