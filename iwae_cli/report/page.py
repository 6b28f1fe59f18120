"""A report as one HTML file that needs nothing else: no network, no other file; without a script it still reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from iwae_cli import __version__
from iwae_cli.core.errors import UserError
from iwae_cli.record.jsonl import read_history
from iwae_cli.record.summary import reliability_warnings
from iwae_cli.report import writers as formats
from iwae_cli.report.charts import Line, line_chart
from iwae_cli.report.reader import Run
from iwae_cli.report.table import MISSING, Cell, Scored, Table
from iwae_cli.report.writers import Report

COLOURS = 10
"""As many cells are drawn as there are colours: the best ones."""
CURVES = 5
"""Runs of one cell whose training is drawn."""
LONG = 15
"""Rows of a table that scrolls in itself."""
SAMPLES = 20_000_000
"""Bytes of pictures in a page."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(report: Report) -> str:
    """The whole page. The same runs make the same page."""
    counts = [f"{len(report.scored):,} run{'s' * (len(report.scored) != 1)} in {_cells(report)}"]
    if report.left_out:
        counts.append(f"{len(report.left_out):,} not in a table")
    links = [(f"t{i}", table.title) for i, table in enumerate(report.tables)]
    if report.comparisons:
        links.append(("compared", "Paired comparison"))
    links += [("left", "Not in a table")] if report.left_out else []
    nav = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in links)
    body = [
        f'<header><h1>Importance weighted autoencoders</h1><p class="lead">{escape("; ".join(counts))}</p>',
        f"<nav>{nav}</nav></header>" if len(links) > 1 else "</header>",
        _warnings(report),
        *(_section(f"t{i}", table) for i, table in enumerate(report.tables)),
        _comparisons(report),
        _left_out(report),
        f'<footer class="note">iwae-report {escape(__version__)}</footer>',
    ]
    folder = Path(__file__).parent
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>iwae-report: {escape(", ".join(table.title for table in report.tables) or "no finished run")}</title>
<style>
{style}</style>
</head>
<body><main>
{"".join(body)}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _cells(report: Report) -> str:
    n = sum(len(table.cells) for table in report.tables)
    return f"{n:,} cell{'s' * (n != 1)}"


def _warnings(report: Report) -> str:
    parts = [f'<p class="note warn">{escape(line)}</p>' for line in report.found.notes]
    if report.warnings:
        first, *words = report.warnings
        inside = "".join(f"<p>{escape(line)}</p>" for line in words)
        parts.insert(0, f'<details class="note warn"><summary>{escape(first.rstrip(":"))}</summary>{inside}</details>')
    return "".join(parts)


def _section(name: str, table: Table) -> str:
    drawn = sorted(table.cells, key=lambda cell: cell.nll)[:COLOURS]
    drawn = [cell for cell in table.cells if cell in drawn]
    notes = [formats.caption(table), *formats.footnotes(table)]
    if len(drawn) < len(table.cells):
        notes.append(f"drawn below: the {len(drawn)} cells of lowest NLL, of {len(table.cells)}")
    return f"""<section id="{name}">
<h2>{escape(table.title)}</h2>
{_results(table)}
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes)}
{_legend(drawn)}
<div class="charts">{_bounds(drawn, table)}{_training(drawn)}{_units(drawn)}</div>
<h3>Runs</h3>
{_runs(table)}
{_samples(table)}
</section>
"""


def _results(table: Table) -> str:
    each = formats.fields(table)
    columns = table.column_labels
    groups = ""
    if any(columns):
        spans = "".join(f'<th class="group start" colspan="{len(each)}">{escape(" ".join(c))}</th>' for c in columns)
        groups = f'<tr><th class="key first" colspan="{len(table.rows)}"></th>{spans}</tr>'
    names = [(key, "key first" if i == 0 else "key") for i, key in enumerate(table.rows)]
    names += [(field.name, "start" if i == 0 else "") for _ in columns for i, field in enumerate(each)]
    head = "".join(_head(name, i, kind) for i, (name, kind) in enumerate(names))
    rows = []
    for row in table.row_labels:
        cells = [f'<th class="key{" first" * (i == 0)}" scope="row">{escape(key)}</th>' for i, key in enumerate(row)]
        for column in columns:
            cell = table.grid.get((row, column))
            for i, field in enumerate(each):
                kind = ' class="start"' if i == 0 else ""
                if cell is None:
                    cells.append(f'<td{kind} data-v="">{MISSING if i == 0 else ""}</td>')
                    continue
                value = field.value(cell)
                sorts = "" if value is None else value
                cells.append(f'<td{kind} data-v="{sorts}">{_soft(field.text(cell))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    inside = f"<thead>{groups}<tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll{" long" * (len(rows) > LONG)}"><table class="results">{inside}</table></div>'


def _head(name: str, column: int, kind: str = "") -> str:
    return f'<th class="{kind}" scope="col" data-column="{column}"><button type="button">{escape(name)}</button></th>'


def _soft(text: str) -> str:
    """An error stands back behind its number."""
    number, sign, error = text.partition(" \N{PLUS-MINUS SIGN} ")
    return f'{escape(number)}<span class="pm"> &plusmn; {escape(error)}</span>' if sign else escape(text)


def _legend(cells: Sequence[Cell]) -> str:
    buttons = (
        f'<button type="button" class="c{i}" data-c="c{i}" aria-pressed="false">{escape(cell.name)}</button>'
        for i, cell in enumerate(cells)
    )
    return f'<div class="legend" aria-label="light up">{"".join(buttons)}</div>'


def _figure(title: str, words: str, inside: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(words)}</figcaption>{inside}</figure>"


def _bounds(cells: Sequence[Cell], table: Table) -> str:
    lines = [Line(cell.name, i, [(float(m), nats) for m, nats in cell.bounds.items()]) for i, cell in enumerate(cells)]
    levels = sorted({p[0] for line in lines for p in line.points})
    if not levels:
        return ""
    chart = line_chart(
        lines,
        title="Bound against k",
        x="samples k",
        y="L\N{LATIN SUBSCRIPT SMALL LETTER K}, nats",
        log_x=True,
        x_ticks=levels,
    )
    return _figure("Bound against k", f"mean over {table.split} images and seeds", chart)


def _training(cells: Sequence[Cell]) -> str:
    """A chart of validation for every data set and every k, one of training; a damaged record is named, not drawn."""
    validation: dict[tuple[str, int], list[Line]] = {}
    training: list[Line] = []
    damaged, hidden = [], 0
    for i, cell in enumerate(cells):
        hidden += len(cell.runs[CURVES:])
        for scored in cell.runs[:CURVES]:
            run = scored.run
            try:
                history = _history(run)
            except (UserError, OSError, ValueError, TypeError) as error:
                damaged.append(f"{run.identity}: {error}")
                continue
            of_k = validation.setdefault((run.dataset, int(run.keys["validation.k"])), [])
            for key, lines in (("validation/bound", of_k), ("train/bound", training)):
                points = [(x, values[key]) for x, values in history if key in values]
                if points:
                    lines.append(Line(f"{cell.name}, seed {run.seed}", i, points))
    some = f"; the first {CURVES} seeds of each" if hidden else ""
    several = len({dataset for dataset, _ in validation}) > 1
    charts = [
        (f"Validation{f' on {dataset}' * several}, L_{k}", f"the same images and noise for all{some}", lines)
        for (dataset, k), lines in sorted(validation.items())
    ]
    charts.append(("Training", f"every run's own bound: not comparable between objectives{some}", training))
    parts = []
    for title, said, lines in charts:
        xs = [x for line in lines for x, _ in line.points if x > 0]
        if xs:
            log = max(xs) / min(xs) > 100
            chart = line_chart(lines, title=title, x="passes over the training data", y="nats", log_x=log, focus=True)
            parts.append(_figure(title, said, chart))
    parts += [f'<p class="note warn">not drawn: {escape(line)}</p>' for line in damaged]
    return "".join(parts)


def _history(run: Run) -> list[tuple[float, dict[str, float]]]:
    rows = []
    for step, metrics in read_history(run.path):
        numbers = {key: float(value) for key, value in metrics.items() if value is not None}
        rows.append((numbers.get("pass", float(step)), numbers))
    return rows


def _units(cells: Sequence[Cell]) -> str:
    known = [(i, cell, cell.units) for i, cell in enumerate(cells) if cell.units is not None]
    if not known:
        return ""
    most = max(sum(_sizes(cell)) or sum(units) for _, cell, units in known)
    bars = []
    for i, cell, units in known:
        sizes = _sizes(cell)
        tracks = "".join(f'<i style="width:{100 * n / most:.2f}%"></i>' for n in units)
        of = f" of {'+'.join(map(str, sizes))}" if sizes else ""
        bars.append(
            f'<div class="bar c{i}"><span class="what">{escape(cell.name)}</span>'
            f'<span class="track">{tracks}</span><span>{escape(formats.units_text(cell))}{escape(of)}</span></div>'
        )
    return _figure("Active units", "by layer, nearest to x first; mean over seeds", "".join(bars))


def _sizes(cell: Cell) -> list[int]:
    """Units there are, one a layer; empty for models that say it otherwise."""
    keys = cell.runs[0].run.keys
    if "model.latent_size" in keys:
        return [int(keys["model.latent_size"])]
    return [int(n) for n in json.loads(keys.get("model.latent_sizes", "[]"))]


def _runs(table: Table) -> str:
    names = [
        "run",
        "seed",
        f"NLL_{table.k}",
        "stderr_images",
        "stderr_mc",
        "bias_mc",
        "L_1",
        "ESS, median",
        "active units",
    ]
    names += ["passes", "training, s", "weak"]
    head = "".join(_head(name, i, "key first" if i == 0 else "") for i, name in enumerate(names))
    rows = [_run(scored, cell) for cell in table.cells for scored in cell.runs]
    return (
        f'<div class="scroll{" long" * (len(rows) > LONG)}"><table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="note">stderr_images: another test set; stderr_mc: other noise; bias_mc: how far the estimate lies '
        "below log p(x) by Jensen's inequality; none of them covers training seeds. All in nats. weak: warnings of "
        "its evaluation</p>"
    )


def _run(scored: Scored, cell: Cell) -> str:
    numbers, result = scored.numbers, scored.run.result
    units = scored.score.active_units
    weak = reliability_warnings(scored.split, numbers)
    values: list[tuple[float | int | None, str]] = [
        (scored.run.seed, "{}"),
        (numbers["nll"], "{:.3f}"),
        (numbers["stderr_images"], "{:.3f}"),
        (numbers["stderr_mc"], "{:.4f}"),
        (numbers["bias_mc"], "{:+.4f}"),
        (numbers["bounds"].get("1"), "{:.2f}"),
        (numbers.get("ess_median"), "{:,.1f}"),
        (None if units is None else sum(units), "+".join(map(str, units or ()))),
        (result.get("epochs"), "{:,}"),
        ((result.get("seconds") or {}).get("train"), "{:,.0f}"),
        (len(weak), "{}"),
    ]
    cells = "".join(
        f'<td data-v="{"" if value is None else value}">{MISSING if value is None else form.format(value)}</td>'
        for value, form in values
    )
    title = escape(f"{cell.name}; {scored.run.path}" + "".join(f"; {line}" for line in weak))
    return f'<tr><th class="key first run" scope="row" title="{title}">{escape(scored.run.identity)}</th>{cells}</tr>'


def _samples(table: Table) -> str:
    """The first seed of every cell before the second of any, until the page is full."""
    ordered = [
        (cell, s)
        for i in range(max(len(c.runs) for c in table.cells))
        for cell in table.cells
        for s in cell.runs[i : i + 1]
    ]
    figures, room, missing, full = [], SAMPLES, 0, 0
    for cell, scored in ordered:
        path = scored.run.path / "figures" / "samples.png"
        try:
            picture = path.read_bytes()
        except OSError:
            picture = b""
        if not picture.startswith(b"\x89PNG"):
            missing += 1
        elif len(picture) > room:
            full += 1
        else:
            room -= len(picture)
            name = escape(f"{cell.name}, seed {scored.run.seed}")
            # As the file says of itself, so that the page keeps room for pictures that are not decoded yet.
            width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
            data = base64.b64encode(picture).decode()
            figures.append(
                f'<figure><img loading="lazy" width="{width}" height="{height}" alt="Samples of {name}" '
                f'src="data:image/png;base64,{data}">'
                f"<figcaption>{name}; NLL {scored.numbers['nll']:.2f}</figcaption></figure>"
            )
    notes = [f"{missing} without figures/samples.png"] if missing else []
    notes += [f"{full} more in their folders: the page holds {SAMPLES // 1_000_000} MB of pictures"] if full else []
    said = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    return f'<h3>Samples</h3><div class="samples">{"".join(figures)}</div>{said}' if figures or notes else ""


def _comparisons(report: Report) -> str:
    if not report.comparisons:
        return ""
    cards = "".join(
        f'<div class="card">{"".join(f"<p>{_breakable(line)}</p>" for line in formats.paired_lines(paired))}</div>'
        for paired in report.comparisons
    )
    return f'<section id="compared"><h2>Paired comparison</h2>{cards}</section>'


def _breakable(text: str) -> str:
    """``KEY=VALUE,KEY=VALUE`` breaks between its parts."""
    return escape(text).replace(",", ",<wbr>")


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    items = "".join(
        f'<li><span class="state">{escape(x.state)}</span><span class="run">{escape(x.path.name)}</span> '
        f'<span class="note">{escape(x.why)}</span></li>'
        for x in report.left_out
    )
    return f'<section id="left"><h2>Not in a table</h2><ul class="left">{items}</ul></section>'
