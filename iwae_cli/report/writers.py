"""A report as text: terminal, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as Sheet
from rich.text import Text

from iwae_cli.core.files import dump_json
from iwae_cli.record.summary import reliability_warnings
from iwae_cli.report.paired import Paired
from iwae_cli.report.published import RECALLED
from iwae_cli.report.reader import NUMBERS, Found, LeftOut
from iwae_cli.report.table import MISSING, Cell, Scored, Table

OTHERWISE = "\N{DAGGER}"
"""Behind a published value whose runs were trained otherwise."""
WITHIN_BIAS = "\N{DOUBLE DAGGER}"
"""Behind a difference that the bias of the estimates may explain."""
WAYS = 4
"""Ways of training otherwise that a footnote has."""
LISTED = 20
"""Runs left out that a terminal lists one by one; more are counted by reason."""


@dataclass(frozen=True)
class Report:
    """All that there is to say.

    Attributes:
        found: what was read.
        left_out: every run that no table has.
        tables: of the others.
        comparisons: those asked for.
    """

    found: Found
    left_out: Sequence[LeftOut]
    tables: Sequence[Table]
    comparisons: Sequence[Paired]

    @property
    def scored(self) -> list[Scored]:
        """Every run in a table."""
        return [scored for table in self.tables for cell in table.cells for scored in cell.runs]

    @property
    def warnings(self) -> list[str]:
        """Where the estimates are weak: a line with how many runs, then the worst of them in words."""
        weak = [(s, warned) for s in self.scored if (warned := reliability_warnings(s.split, s.numbers))]
        if not weak:
            return []
        worst, words = max(weak, key=lambda pair: (len(pair[1]), abs(pair[0].numbers["bias_mc"] or 0)))
        count = f"{len(weak)} of {len(self.scored)} runs have weak estimates of log p(x)"
        return [f"{count}; of the worst, {worst.run.identity}:", *words]


def nll_text(cell: Cell, plus_minus: str = " \N{PLUS-MINUS SIGN} ") -> str:
    """``84.78 ± 0.03``; without an error for one seed."""
    return f"{cell.nll:.2f}" + ("" if cell.stderr is None else f"{plus_minus}{cell.stderr:.2f}")


def units_text(cell: Cell) -> str:
    """``26+7``, with one decimal where seeds differ."""
    if cell.units is None:
        return MISSING
    return "+".join(f"{n:.0f}" if n == int(n) else f"{n:.1f}" for n in cell.units)


def published_text(cell: Cell) -> str:
    """``84.78 / 25*``, marked where the runs were trained otherwise."""
    return "" if cell.published is None else f"{cell.published}{OTHERWISE if cell.deviations else ''}"


def caption(table: Table) -> str:
    """What the numbers are."""
    images = ", ".join(f"{n:,} images" + (f" of {name}" * (len(table.images) > 1)) for name, n in table.images.items())
    seeds = _seeds(table)
    errors = "one seed each" if seeds == {1} else "mean and standard error over seeds"
    if len(seeds) == 1 and seeds != {1}:
        errors = f"mean and standard error over {min(seeds)} seeds"
    return f"NLL_{table.k} in nats on {table.split} ({images}), lower is better; {table.weights} weights; {errors}"


def footnotes(table: Table) -> list[str]:
    """What the marks in the table mean."""
    cells, seeds = [cell for cell in table.cells if cell.published is not None], _seeds(table)
    notes = []
    if cells:
        sources = dict.fromkeys(cell.published.source for cell in cells if cell.published)
        notes.append(f"paper: NLL_5000 / active units; {'; '.join(sources)}")
    if any(RECALLED in str(cell.published) for cell in cells):
        notes.append(f"{RECALLED} quoted from memory of the paper")
    ways = Counter(way for cell in cells for way in cell.deviations)
    if ways:
        most = ways.most_common(WAYS)
        said = [way if n == len(cells) else f"{way} in {n} of {len(cells)} cells" for way, n in most]
        said += [f"and in {len(ways) - WAYS} more ways"] if len(ways) > WAYS else []
        notes.append(f"{OTHERWISE} trained otherwise than in the paper: {', '.join(said)}")
    if table.against is not None:
        notes.append(
            f"over {table.against}: how much higher log p(x) is than there, paired image by image, nats; beside it the "
            "standard errors over images and over seeds"
        )
    if _has_room(table):
        notes.append("stderr_images, stderr_mc, bias_mc: nats, of one run" + "; their mean over seeds" * (seeds != {1}))
    paired = [cell.against for cell in table.cells if cell.against is not None]
    if any(p.within_bias for p in paired):
        notes.append(
            f"{WITHIN_BIAS} below three times the bias of the estimate: a better fit of q may be all of it; "
            "estimator=ais tells p and q apart"
        )
    notes += dict.fromkeys(f"caution: {p.few_seeds}" for p in paired if p.few_seeds)
    return notes + list(table.notes)


class Field(NamedTuple):
    """Something that stands in every cell: what it is called, how it is printed, and what it is sorted by."""

    name: str
    text: Callable[[Cell], str]
    value: Callable[[Cell], float | None]


def fields(table: Table) -> list[Field]:
    """What stands in every cell."""
    found = [Field(f"NLL_{table.k}", nll_text, lambda cell: cell.nll)]
    if len(_seeds(table)) > 1:
        found.append(Field("seeds", lambda cell: str(len(cell.runs)), lambda cell: len(cell.runs)))
    if table.against is not None:
        found.append(_number(f"over {table.against}", "{:+.3f}", _paired("difference"), _within_bias))
        found.append(_number("\N{PLUS-MINUS SIGN} images", "{:.3f}", _paired("stderr_images")))
        if any(cell.against is not None and cell.against.stderr_seeds is not None for cell in table.cells):
            found.append(_number("\N{PLUS-MINUS SIGN} seeds", "{:.3f}", _paired("stderr_seeds")))
    if _has_room(table):
        for key, form in (("stderr_images", "{:.2f}"), ("stderr_mc", "{:.4f}"), ("bias_mc", "{:+.4f}")):
            found.append(_number(key, form, lambda cell, key=key: cell.mean(key)))  # type: ignore[misc]
    if any(cell.units is not None for cell in table.cells):
        found.append(Field("active units", units_text, lambda cell: None if cell.units is None else sum(cell.units)))
    if any(cell.published for cell in table.cells):
        found.append(Field("paper", published_text, lambda cell: cell.published.nll if cell.published else None))
    return found


def _has_room(table: Table) -> bool:
    """Whether a row has one cell, beside which its errors can stand."""
    return not table.columns


def _paired(key: str) -> Callable[[Cell], float | None]:
    return lambda cell: None if cell.against is None else getattr(cell.against, key)


def _within_bias(cell: Cell) -> str:
    return WITHIN_BIAS if cell.against is not None and cell.against.within_bias else ""


def _number(
    name: str, form: str, value: Callable[[Cell], float | None], mark: Callable[[Cell], str] = lambda cell: ""
) -> Field:
    def text(cell: Cell) -> str:
        number = value(cell)
        return MISSING if number is None else form.format(number) + mark(cell)

    return Field(name, text, value)


def terminal(report: Report, width: int | None = None) -> str:
    """For people. Tables wider than ``width`` (None: as wide as need be) have one row a cell instead."""
    out = io.StringIO()
    console = Console(file=out, width=10_000, highlight=False, markup=False, emoji=False, color_system=None)
    for table in report.tables:
        sheet = _grid(table)
        if width is not None and console.measure(sheet).maximum > width:
            sheet = _tall(table)
        console.print(table.title)
        console.print(sheet)
        for line in (caption(table), *footnotes(table)):
            console.print(line)
        console.print()
    for paired in report.comparisons:
        for line in paired_lines(paired):
            console.print(line)
        console.print()
    for line in after(report, LISTED):
        console.print(line)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().rstrip().splitlines())


def markdown(report: Report) -> str:
    """GitHub's tables; nothing is left out of the lists."""
    lines = []
    for table in report.tables:
        names = [field.name for field in fields(table)]
        head = [*table.rows, *(" ".join((*column, name)) for column in table.column_labels for name in names)]
        lines += [f"**{_escaped(table.title)}**", "", _piped(head)]
        lines.append(_piped(["---"] * len(table.rows) + ["---:"] * (len(head) - len(table.rows))))
        lines += [_piped(row) for row in _body(table)]
        lines += ["", *(f"{_escaped(line)}  " for line in (caption(table), *footnotes(table))), ""]
    for paired in report.comparisons:
        lines += [*(f"{_escaped(line)}  " for line in paired_lines(paired)), ""]
    lines += [_escaped(line) if not line.startswith("  ") else f"- {_escaped(line.strip())}" for line in after(report)]
    return "\n".join(lines).rstrip() + "\n"


def comma_separated(report: Report) -> str:
    """One row a cell, all digits."""
    keys = list(dict.fromkeys(key for table in report.tables for key in (*table.rows, *table.columns)))
    names = ["data", "split", "k", "weights", "images", "seeds", "nll", "stderr_seeds", *NUMBERS, "active_units"]
    differences = ["difference", "difference_stderr_images", "difference_stderr_seeds"]
    names += ["against", *differences] if any(table.against for table in report.tables) else []
    names += ["paper_nll", "paper_active_units", "paper_from_memory", "paper_training", "paper_source", "runs"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*keys, *(name for name in names if name not in keys)], lineterminator="\n")
    writer.writeheader()
    for table in report.tables:
        for cell in table.cells:
            row: dict[str, Any] = {**table.keyed(cell)}
            row |= {"data": cell.runs[0].run.dataset, "split": table.split, "k": cell.runs[0].score.k}
            row |= {"weights": table.weights, "images": cell.runs[0].numbers["n"], "seeds": len(cell.runs)}
            row |= {"nll": cell.nll, "stderr_seeds": cell.stderr}
            row |= {key: cell.mean(key) for key in NUMBERS}
            if cell.against is not None:
                paired = cell.against
                values = (paired.difference, paired.stderr_images, paired.stderr_seeds)
                row |= {"against": paired.b, **dict(zip(differences, values, strict=True))}
            row["active_units"] = None if cell.units is None else units_text(cell)
            if cell.published is not None:
                of_paper = cell.published
                units = of_paper.units
                row["paper_nll"] = of_paper.nll
                row["paper_active_units"] = None if units is None else "+".join(map(str, units))
                recalled = {"nll": of_paper.nll_recalled, "active_units": units is not None}
                row["paper_from_memory"] = " ".join(key for key, value in recalled.items() if value)
                row["paper_training"] = "; ".join(cell.deviations) or "as in the paper"
                row["paper_source"] = of_paper.source
            row["runs"] = " ".join(s.run.identity for s in cell.runs)
            writer.writerow(row)
    return out.getvalue()


def latex(report: Report) -> str:
    """``tabular`` with the rules of booktabs; what is beside the tables stands in comments."""
    lines = []
    for table in report.tables:
        each = fields(table)
        keys, columns = len(table.rows), table.column_labels
        lines += [
            f"% {table.title}",
            r"\begin{tabular}{" + "l" * keys + "r" * len(each) * len(columns) + "}",
            r"\toprule",
        ]
        spans = [rf"\multicolumn{{{len(each)}}}{{c}}{{{_tex(' '.join(column))}}}" for column in columns]
        if any(columns):
            lines.append(" & ".join([""] * keys + spans).strip() + r" \\")
            starts = [keys + 1 + i * len(each) for i in range(len(columns))]
            lines.append(" ".join(rf"\cmidrule(lr){{{start}-{start + len(each) - 1}}}" for start in starts))
        names = [rf"NLL$_{{{table.k}}}$" if field.name.startswith("NLL_") else _tex(field.name) for field in each]
        lines.append(" & ".join([*map(_tex, table.rows), *names * len(columns)]) + r" \\")
        lines.append(r"\midrule")
        lines += [" & ".join(map(_tex, row)) + r" \\" for row in _body(table)]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [f"% {line}" for line in (caption(table), *footnotes(table))]
    lines += [f"% {line}" for paired in report.comparisons for line in paired_lines(paired)]
    lines += [f"% {line}" for line in after(report)]
    return "\n".join(lines) + "\n"


def json_text(report: Report) -> str:
    """Everything, for programs."""
    value = {
        "tables": [
            {
                "data": list(table.images),
                "split": table.split,
                "k": table.k,
                "weights": table.weights,
                "images": dict(table.images),
                "rows": list(table.rows),
                "columns": list(table.columns),
                "cells": [_cell(table, cell) for cell in table.cells],
                "notes": list(table.notes),
            }
            for table in report.tables
        ],
        "comparisons": [_difference(paired) for paired in report.comparisons],
        "left_out": [{"path": str(x.path), "state": x.state, "why": x.why} for x in report.left_out],
        "notes": list(report.found.notes),
        "warnings": report.warnings,
    }
    return dump_json(value, "the report", indent=2) + "\n"


def paired_lines(paired: Paired) -> list[str]:
    """A paired comparison in words."""
    better = "A" if paired.difference > 0 else "B"
    seeds = "" if paired.stderr_seeds is None else f", {paired.stderr_seeds:.4f} over seeds"
    side = {"A": (paired.a, paired.seeds_a), "B": (paired.b, paired.seeds_b)}
    lines = [
        f"{name}: {label} (seed{'s' * (len(s) > 1)} {', '.join(map(str, s))})" for name, (label, s) in side.items()
    ]
    lines.append(
        f"A - B = {paired.difference:+.4f} nats of log p(x), paired on {paired.images:,} {paired.split} images, "
        f"k = {paired.k}; standard error {paired.stderr_images:.4f} over images{seeds}"
    )
    ties = f", {paired.ties:,} neither" if paired.ties else ""
    verdict = f"{better} has the lower NLL" if paired.difference else "both have the same NLL"
    lines.append(f"{verdict}; A wins {paired.wins_a:,} images, B {paired.wins_b:,}{ties}")
    return lines + [f"caution: {caution}" for caution in paired.cautions]


def after(report: Report, listed: int | None = None) -> list[str]:
    """Warnings, notes, and every run that no table has: what it is and why; beyond ``listed`` counted by state."""
    lines = [f"  {line}" if i else f"warning: {line}" for i, line in enumerate(report.warnings)]
    lines += [f"note: {line}" for line in report.found.notes]
    if report.left_out:
        states = Counter(left.state for left in report.left_out)
        lines.append(f"not in a table: {', '.join(f'{n} {state}' for state, n in states.items())}")
        few = report.left_out[:listed]
        lines += [f"  {left.path.name}: {left.state}, {left.why}" for left in few]
        if len(few) < len(report.left_out):
            lines.append(f"  and {len(report.left_out) - len(few)} more: --format json or --html lists all")
    return lines


def _seeds(table: Table) -> set[int]:
    return {len(cell.runs) for cell in table.cells}


def _body(table: Table) -> list[list[str]]:
    each = fields(table)
    body = []
    for row in table.row_labels:
        line = list(row)
        for column in table.column_labels:
            cell = table.grid.get((row, column))
            line += [
                MISSING if cell is None and i == 0 else "" if cell is None else field.text(cell)
                for i, field in enumerate(each)
            ]
        body.append(line)
    return body


def _sheet() -> Sheet:
    return Sheet(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _grid(table: Table) -> Sheet:
    sheet = _sheet()
    for key in table.rows:
        sheet.add_column(f"\n{key}", no_wrap=True)
    for column in table.column_labels:
        for i, field in enumerate(fields(table)):
            sheet.add_column(f"{' '.join(column) if i == 0 else ''}\n{field.name}", justify="right", no_wrap=True)
    for row in _body(table):
        sheet.add_row(*map(Text, row))
    return sheet


def _tall(table: Table) -> Sheet:
    sheet, each = _sheet(), fields(table)
    for key in (*table.columns, *table.rows):
        sheet.add_column(key, no_wrap=True)
    for field in each:
        sheet.add_column(field.name, justify="right", no_wrap=True)
    for cell in table.cells:
        sheet.add_row(*map(Text, (*cell.column, *cell.row, *(field.text(cell) for field in each))))
    return sheet


def _cell(table: Table, cell: Cell) -> dict[str, Any]:
    of_paper = cell.published
    return {
        "keys": table.keyed(cell),
        "seeds": [s.run.seed for s in cell.runs],
        "nll": cell.nll,
        "stderr_seeds": cell.stderr,
        **{key: cell.mean(key) for key in NUMBERS},
        "against": None if cell.against is None else _difference(cell.against),
        "active_units": None if cell.units is None else list(cell.units),
        "bounds": {str(m): value for m, value in cell.bounds.items()},
        "paper": None
        if of_paper is None
        else {
            "nll": of_paper.nll,
            "nll_from_memory": of_paper.nll_recalled,
            "active_units": None if of_paper.units is None else list(of_paper.units),
            "active_units_from_memory": of_paper.units is not None,
            "source": of_paper.source,
            "trained_otherwise": list(cell.deviations),
        },
        "runs": [
            {
                "identity": s.run.identity,
                "path": str(s.run.path),
                "seed": s.run.seed,
                "evaluation": s.score.name,
                **{key: s.numbers.get(key) for key in ("nll", *NUMBERS)},
                "sha256": s.score.sha256[s.split],
                "warnings": reliability_warnings(s.split, s.numbers),
            }
            for s in cell.runs
        ],
    }


def _difference(paired: Paired) -> dict[str, Any]:
    return {**asdict(paired), "cautions": paired.cautions}


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "<"):
        text = text.replace(mark, f"\\{mark}")
    return text


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", " \N{PLUS-MINUS SIGN} ": r" $\pm$ ", MISSING: "--", OTHERWISE: r"$^\dagger$"}
    special |= {WITHIN_BIAS: r"$^\ddagger$", "\N{PLUS-MINUS SIGN}": r"$\pm$"}
    special |= {RECALLED: "$^*$", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
    special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    parts, i = [], 0
    while i < len(text):
        mark = next((mark for mark in special if text.startswith(mark, i)), text[i])
        parts.append(special.get(mark, mark))
        i += len(mark)
    return "".join(parts)
