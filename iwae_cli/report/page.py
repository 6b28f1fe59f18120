"""A report as one HTML file: no network, no other file; readable without its script."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from iwae_cli import __version__
from iwae_cli.core.errors import UserError
from iwae_cli.record.figures import COLOURS, Curve, bounds_figure, svg, training_figure
from iwae_cli.record.jsonl import read_history
from iwae_cli.record.summary import reliability_warning
from iwae_cli.record.units import layer_sizes
from iwae_cli.report.cells import Cell, Table
from iwae_cli.report.selection import MISSING, Scored, by_refined
from iwae_cli.report.writers import Report

CURVES = 5
"""Seeds of a cell whose training is drawn."""
PICTURES = 20_000_000
"""Bytes of pictures in a page."""
MEASURED = {
    "Reconstruction": ("train/reconstruction", "nats", "during training, E_q[log p(x|h)]"),
    "KL of every layer": ("train/kl/", "nats", "during training, E_q[log q - log p]"),
    "Effective sample size": ("train/ess", "draws", "during training, of the draws of an image"),
    "Gradient norms": ("train/gradient_norm/", "norm", "during training, of p and of q"),
}
"""Title -> beginning of the metrics' names, unit, words beside it."""
HTML = Path(__file__).parent / "html"


def page(report: Report) -> str:
    """Return the whole page; the same runs give the same page."""
    room = [PICTURES]
    sections = [_section(i, table, room) for i, table in enumerate(report.tables)]
    links = [(f"t{i}", table.title) for i, table in enumerate(report.tables)]
    links += [("estimates", "Other estimators")] if report.estimates else []
    links += [("compared", "Paired comparison")] if report.comparisons else []
    links += [("left", "Not in a table")] if report.left_out else []
    cells = sum(len(table.cells) for table in report.tables)
    counts = [f"{_count(len(report.scored), 'run')} in {_count(cells, 'cell')}"]
    counts += [f"{len(report.left_out):,} not in a table"] if report.left_out else []
    environment = Environment(
        loader=FileSystemLoader(HTML), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css, js = (Markup((HTML / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return environment.get_template("page.html.jinja").render(
        report=report, sections=sections, links=links, counts=counts, css=css, js=js, version=__version__,
        missing=MISSING,
    )  # fmt: skip


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _section(index: int, table: Table, room: list[int]) -> dict[str, Any]:
    """Return what the template shows of one table; as many cells are drawn as there are colours, the best ones."""
    best = sorted(table.cells, key=lambda cell: cell.nll)[: len(COLOURS)]
    drawn = [cell for cell in table.cells if cell in best]
    notes = table.notes_below
    if len(drawn) < len(table.cells):
        notes.append(f"drawn below: the {len(drawn)} cells of lowest NLL, of {len(table.cells)}")
    damaged: list[str] = []
    bounds = [Curve(cell.name, [(float(k), y) for k, y in cell.bounds.items()], i) for i, cell in enumerate(drawn)]
    bounds = [curve for curve in bounds if curve.points]
    words = f"mean over {table.split} images and seeds" + ", by the trained q" * table.refined
    charts = [("Bound against k", words, bounds, bounds_figure(bounds))]
    for title, words, curves in _training(drawn, damaged):
        _, unit, _ = MEASURED.get(title, ("", "nats", ""))
        charts.append((title, words, curves, training_figure(curves, unit, focus=title not in MEASURED)))
    return {
        "table": table,
        "notes": notes,
        "drawn": drawn,
        "charts": [
            {"title": title, "words": words, "svg": Markup(svg(figure, curves, f"{title}, table {index + 1}"))}
            for title, words, curves, figure in charts
            if curves
        ],
        "damaged": damaged,
        "bars": _bars(drawn),
        "headings": ["run", "seed", f"NLL_{table.k}", "stderr_images", "stderr_mc", "bias_mc", "gap_q",
                     f"refined NLL_{table.k}", "L_1", "ESS, median",
                     "active units", "passes", "training, s", "weak"],
        "runs": [_run(scored, cell) for cell in table.cells for scored in cell.runs],
        "galleries": [_gallery(table, name, room) for name in ("samples", "reconstructions")],
    }  # fmt: skip


Chart = tuple[str, str, list[Curve]]
"""Title, words beside it, curves."""


def _training(cells: Sequence[Cell], damaged: list[str]) -> Iterator[Chart]:
    """Yield charts of validation by data set and k, training and ``MEASURED``; note unreadable runs in ``damaged``."""
    validation: dict[tuple[str, int], list[Curve]] = {}
    training: list[Curve] = []
    measured: dict[str, list[Curve]] = {title: [] for title in MEASURED}
    for i, cell in enumerate(cells):
        for scored in cell.runs[:CURVES]:
            run = scored.run
            try:
                history = [(x, row) for _, row in read_history(run.path) if (x := row.get("pass") or 0) > 0]
            except (UserError, OSError, ValueError, TypeError) as error:
                damaged.append(f"{run.identity}: {error}")
                continue
            on_same = validation.setdefault((run.dataset, int(run.keys["validation.k"])), [])
            kinds = [("validation/bound", on_same), ("train/bound", training)]
            kinds += [(prefix, measured[title]) for title, (prefix, _, _) in MEASURED.items()]
            for prefix, curves in kinds:
                for key in sorted({key for _, row in history for key in row if key.startswith(prefix)}):
                    points = [(float(x), float(y)) for x, row in history if (y := row.get(key)) is not None]
                    part = f", {key.removeprefix('train/')}" if key != prefix else ""
                    if points:
                        curves.append(Curve(f"{cell.name}, seed {run.seed}{part}", points, i))
    some = f"; the first {CURVES} seeds of each" if any(len(cell.runs) > CURVES for cell in cells) else ""
    several = len({dataset for dataset, _ in validation}) > 1
    for (dataset, k), curves in sorted(validation.items()):
        yield f"Validation{f' on {dataset}' * several}, L_{k}", f"the same images and noise for all{some}", curves
    yield "Training", f"every run's own bound: not comparable between objectives{some}", training
    for title, (_, _, words) in MEASURED.items():
        if measured[title]:
            yield title, f"{words}{some}", measured[title]


def _bars(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    known = [
        (i, cell, cell.units, layer_sizes(cell.runs[0].run.config["model"]))
        for i, cell in enumerate(cells)
        if cell.units is not None
    ]
    most = max((sum(sizes) or sum(units) for _, _, units, sizes in known), default=0) or 1
    return [
        {
            "colour": i,
            "name": cell.name,
            "widths": [100 * n / most for n in units],
            "text": cell.units_of_sizes,
        }
        for i, cell, units, _ in known
    ]


def _run(scored: Scored, cell: Cell) -> dict[str, Any]:
    numbers, result, units = scored.numbers, scored.run.result, scored.score.active_units
    weak = reliability_warning({scored.split: numbers})
    refined = by_refined([scored])
    values: list[tuple[float | int | None, str]] = [
        (scored.run.seed, "{}"),
        (numbers["nll"], "{:.3f}"),
        (numbers["stderr_images"], "{:.3f}"),
        (numbers["stderr_mc"], "{:.4f}"),
        (numbers["bias_mc"], "{:+.4f}"),
        (numbers.get("gap_q"), "{:.2f}"),
        (refined[0].numbers["nll"] if refined else None, "{:.3f}"),
        (numbers["bounds"].get("1"), "{:.2f}"),
        (numbers.get("ess_median"), "{:,.1f}"),
        (None if units is None else sum(units), "+".join(map(str, units or ()))),
        (result.get("epochs"), "{:,}"),
        ((result.get("seconds") or {}).get("train"), "{:,.0f}"),
        (int(weak is not None), "{}"),
    ]
    return {
        "identity": scored.run.identity,
        "title": "; ".join((cell.name, str(scored.run.path), *([weak] if weak else []))),
        "numbers": [(value, MISSING if value is None else form.format(value)) for value, form in values],
    }


def _gallery(table: Table, name: str, room: list[int]) -> dict[str, Any]:
    """Return ``figures/<name>.png`` of the first seed of every cell, then of the second, until ``room`` is used up."""
    pictures, missing, full = [], 0, 0
    seeds = range(max(len(cell.runs) for cell in table.cells))
    for cell, scored in [(cell, cell.runs[i]) for i in seeds for cell in table.cells if i < len(cell.runs)]:
        try:
            data = (scored.run.path / "figures" / f"{name}.png").read_bytes()
        except OSError:
            data = b""
        if not data.startswith(b"\x89PNG"):
            missing += 1
        elif len(data) > room[0]:
            full += 1
        else:
            room[0] -= len(data)
            # The size, so that the page reserves room for pictures that are not decoded yet.
            width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
            label = f"{cell.name}, seed {scored.run.seed}"
            encoded = base64.b64encode(data).decode()
            pictures.append(dict(name=label, nll=scored.numbers["nll"], width=width, height=height, data=encoded))
    notes = [f"{missing} without figures/{name}.png"] if missing else []
    notes += [f"{full} more in their folders: the page holds {PICTURES // 1_000_000} MB of pictures"] if full else []
    return {"title": name.capitalize(), "pictures": pictures, "notes": notes if name == "samples" or pictures else []}
