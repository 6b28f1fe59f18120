"""A report as one HTML file: no network, no other file; readable without its script."""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit

from iwae_cli import __version__
from iwae_cli.core.errors import UserError
from iwae_cli.record.figures import BOUND, COLOURS, DASHES, Curve, ess_curve, k_figure, svg, training_figure
from iwae_cli.record.jsonl import read_history
from iwae_cli.record.summary import NO_GAP, PLUS_MINUS
from iwae_cli.record.units import layer_sizes, units_text
from iwae_cli.report.cells import WITHIN, Cell, Field, Table, number_field
from iwae_cli.report.paired import BY_Q, BY_REFINED, ENOUGH_SEEDS, UNREADABLE, Paired, per_image
from iwae_cli.report.reader import Estimate
from iwae_cli.report.selection import MISSING, Scored, by_refined
from iwae_cli.report.writers import Report

PICTURES = 20_000_000  # bytes of pictures in a page
NORMAL = 1.96  # standard errors on each side of a 95% interval over images, of which there are many
PAIRED = (
    f"nats of log p(x); thick: 95% over images ({PLUS_MINUS} {NORMAL} standard errors); thin: 95% over seeds, by "
    f"Student's t, where each side has {ENOUGH_SEEDS} or more"
)
MEASURED = {
    "Reconstruction": ("train/reconstruction", "nats", "during training, E_q[log p(x|h)]"),
    "KL of every layer": ("train/kl/", "nats", "during training, E_q[log q - log p]"),
    "Effective sample size": ("train/ess", "draws", "during training, of the draws of an image"),
    "Gradient norms": ("train/gradient_norm/", "norm", "during training, of p and of q"),
}
"""Title -> beginning of the metrics' names, unit, words beside it."""
GALLERIES = {
    "samples": "Means of p(x|h), h drawn from the prior",
    "reconstructions": "Test images, and means of p(x|h) with h drawn from q(h|x)",
    "kl_per_unit": "KL of every unit",
}
"""Pictures of a run folder -> title."""
HTML = Path(__file__).parent / "html"
Points = Mapping[Any, float | None]
Named = tuple[str, Cell]  # a cell, and the keys and values that tell it from the others


class Interval(NamedTuple):
    """A row of a forest plot."""

    name: str
    low: float
    high: float
    text: str
    at: float | None = None  # a point in it
    wide: tuple[float, float] | None = None  # a wider interval
    colour: int | None = 0


def page(report: Report, command: str = "", date: str = "") -> str:
    """Return the whole page, which names the command that made it and the date; the same runs give the same page."""
    room = [PICTURES]
    compared = [_paired(f"{pair.a} \N{MINUS SIGN} {pair.b}, by {pair.by}", pair) for pair in report.comparisons]
    sections = [_section(i, table, room) for i, table in enumerate(report.tables)]
    links = [("compared", "Paired comparison")] if report.comparisons else []
    links += [(f"t{i}", table.title) for i, table in enumerate(report.tables)]
    links += [("estimates", "Other estimators")] if report.estimates else []
    links += [("left", "Not in a table")] if report.left_out else []
    cells = sum(len(table.cells) for table in report.tables)
    evaluations, runs = len(report.scored), len({s.run.identity for s in report.scored})
    several = f"{_count(evaluations, 'evaluation')} of " if evaluations > runs else ""
    counts = [f"{several}{_count(runs, 'run')} in {_count(cells, 'cell')}"]
    counts += [f"{len(report.left_out):,} not in a table"] if report.left_out else []
    environment = Environment(
        loader=FileSystemLoader(HTML), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    css, js = (Markup((HTML / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return environment.get_template("page.html.jinja").render(
        report=report, sections=sections, links=links, counts=counts, css=css, js=js, version=__version__,
        missing=MISSING, command=command, date=date, sources=_sources(report.scored),
        compared=_forest("A \N{MINUS SIGN} B", PAIRED, compared, 0.0),
        estimates=[
            (run, estimate, _intervals(estimate), _pictures(run.path / "evaluations" / estimate.name, room))
            for run, estimate in report.estimates
        ],
    )  # fmt: skip


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _sources(scored: Sequence[Scored]) -> list[str]:
    """Return with which versions and commits the runs were evaluated."""
    found: dict[str, set[str]] = {}
    for s in scored:
        name = f"iwae-cli {s.run.result.get('versions', {}).get('iwae-cli', 'of an unknown version')}"
        if git := s.run.result.get("git"):
            name += f", commit {git['commit']}{' with changes' if git['changed'] else ''}"
        found.setdefault(name, set()).add(s.run.identity)
    return [f"{_count(len(runs), 'run')} evaluated by {name}" for name, runs in found.items()]


def _names(table: Table) -> list[str]:
    """Return for each cell the keys in which the cells differ, with their values; for a lone cell all keys."""
    values = [table.keyed(cell) for cell in table.cells]
    keys = (*table.columns, *table.rows)
    differ = [key for key in keys if len({held[key] for held in values}) > 1] or keys
    return [" ".join(f"{key}={held[key]}" for key in differ) for held in values]


def _section(index: int, table: Table, room: list[int]) -> dict[str, Any]:
    """Return what the template shows of one table; as many cells are drawn as there are colours, the best ones."""
    named: list[Named] = list(zip(_names(table), table.cells, strict=True))
    best = sorted(range(len(named)), key=lambda i: table.cells[i].nll)[: len(COLOURS)]
    colours = {i: colour for colour, i in enumerate(sorted(best))}
    drawn = [named[i] for i in colours]
    notes = table.notes_below
    if len(drawn) < len(named):
        notes.append(f"drawn below: the {len(drawn)} cells of lowest NLL, of {len(named)}")
    damaged: list[str] = []
    pairs = [(name, cell.against, colours.get(i)) for i, (name, cell) in enumerate(named)]
    paired = [_paired(name, pair, colour) for name, pair, colour in pairs if pair is not None]
    by = f"by {BY_REFINED if table.refined else BY_Q}; on the right of 0 is better; {PAIRED}"
    units = []
    for i, (name, cell) in enumerate(drawn):
        found, sizes = cell.units or (), layer_sizes(cell.runs[0].run.config["model"])
        for layer, n in enumerate(found):
            size = sizes[layer : layer + 1] if len(sizes) == len(found) else []
            of_layer = f"{name}, h_{layer + 1}" if len(found) > 1 else name
            units.append(Interval(of_layer, 0.0, n, units_text([n], size), wide=(0.0, sum(size) or n), colour=i))
    runs = [(scored, name, _numbers(scored, table.k)) for name, cell in named for scored in cell.runs]
    known = {field.name for _, _, fields in runs for field in fields if field.value is not None}
    return {
        "table": table,
        "protocols": dict.fromkeys(str(s.run.result["dataset"].get("protocol", "")) for _, c in named for s in c.runs),
        "notes": notes,
        "drawn": drawn,
        "charts": [
            {"title": title, "words": words, "svg": Markup(svg(figure, curves, f"{title}, table {index + 1}"))}
            for title, words, curves, figure in _charts(table, drawn, damaged)
            if curves
        ],
        "forests": [
            _forest(f"Difference from {table.against}", by, paired, 0.0),
            _forest("Active units", "mean over seeds", units, None),
        ],
        "damaged": damaged,
        "count": _count(len(runs), "run"),
        "headings": ["run", *(field.name for field in runs[0][2] if field.name in known)],
        "runs": [
            {
                "identity": s.run.identity,
                "title": "; ".join(filter(None, (name, str(s.run.path), s.warning))),
                "numbers": [field for field in fields if field.name in known],
            }
            for s, name, fields in runs
        ],
        "galleries": [_gallery(named, name, room) for name in GALLERIES],
    }


def _charts(table: Table, drawn: Sequence[Named], damaged: list[str]) -> Iterator[tuple[str, str, list[Curve], Any]]:
    """Yield title, words, curves and figure of every chart."""
    band = "; band: from the lowest to the highest seed" if any(len(cell.runs) > 1 for _, cell in drawn) else ""
    bounds: list[Curve] = []
    shares: list[Curve] = []
    ratios: list[Curve] = []
    for i, (name, cell) in enumerate(drawn):
        bounds.append(_over_seeds(name, [s.numbers["bounds"] for s in cell.runs], i))
        try:
            ess = np.concatenate([per_image(s, "ess") for s in cell.runs])
            shares.append(ess_curve(name, ess, table.k, i))
        except UNREADABLE as error:
            damaged.append(f"effective sample sizes of {name}: {error}")
        ratios += _ratios(name, cell, i)
    words = f"mean over {table.split} images and seeds{', by the trained q' if table.refined else ''}{band}"
    yield "Bound against k", words, bounds, k_figure(bounds, BOUND)
    words = f"of {table.k:,} draws of q, {table.split} images of all seeds; an estimate from fewer than 10 is weak"
    yield "Effective sample sizes", words, shares, k_figure(shares, "share of images", "effective sample size", 0)
    words = f"median over parameters; without values that chance gives too; solid: q, dashed: p{band}"
    yield "Gradient signal-to-noise", words, ratios, k_figure(ratios, "signal-to-noise ratio", log=True)
    for title, words, curves in _training(drawn, damaged):
        yield title, words + band, curves, training_figure(curves, MEASURED.get(title, ("", "nats"))[1])


def _ratios(name: str, cell: Cell, colour: int) -> Iterator[Curve]:
    """Yield the signal-to-noise ratios of both networks by k, for every evaluation by ``gradient_snr``."""
    estimates = [e for s in cell.runs for e in s.run.estimates if e.estimator == "gradient_snr"]
    for evaluation in dict.fromkeys(e.heading for e in estimates):
        for dash, network in enumerate(("inference", "generative")):
            key = re.compile(rf"gradient_snr\.{network}\.(\d+)\.per_parameter")
            seeds = [
                {found[1]: value for name, value in e.numbers.items() if (found := key.fullmatch(name))}
                for e in estimates
                if e.heading == evaluation
            ]
            yield _over_seeds(f"{name}, {network}, {evaluation}", seeds, colour, dash)


def _over_seeds(name: str, seeds: Sequence[Points], colour: int, dash: int = 0) -> Curve:
    """Return mean and range over seeds at each x that all have; where they share none, at each x that one has."""
    held = [{float(x): y for x, y in seed.items() if isinstance(y, int | float) and math.isfinite(y)} for seed in seeds]
    found = [points for points in held if points]
    shared = set.intersection(*map(set, found)) or set.union(*map(set, found)) if found else set()
    values = [(x, [points[x] for points in found if x in points]) for x in sorted(shared)]
    band = [(min(ys), max(ys)) for _, ys in values] if len(found) > 1 else []
    return Curve(name, [(x, statistics.fmean(ys)) for x, ys in values], colour, band, dash)


def _training(drawn: Sequence[Named], damaged: list[str]) -> Iterator[tuple[str, str, list[Curve]]]:
    """Yield charts of validation by data set and k, training and ``MEASURED``; note unreadable runs in ``damaged``."""
    on_same: dict[tuple[str, int], list[tuple[int, Sequence[Mapping[str, Any]]]]] = {}
    for i, (_, cell) in enumerate(drawn):
        for run in (scored.run for scored in cell.runs):
            try:
                rows = [row for _, row in read_history(run.path) if (row.get("pass") or 0) > 0]
                on_same.setdefault((run.dataset, int(run.keys["validation.k"])), []).append((i, rows))
            except (UserError, OSError, ValueError, TypeError) as error:
                damaged.append(f"{run.identity}: {error}")
    several = len({dataset for dataset, _ in on_same}) > 1
    charts = {}
    for dataset, k in sorted(on_same):
        title = f"Validation on {dataset}, L_{k}" if several else f"Validation, L_{k}"
        charts[title] = ("validation/bound", "the same images and noise for all", on_same[dataset, k])
    every = [run for runs in on_same.values() for run in runs]
    # With a part of the KL term it is no bound.
    bounds: list[tuple[int, Sequence[Mapping[str, Any]]]] = [
        (i, [row for row in rows if row.get("train/kl_weight", 1) == 1]) for i, rows in every
    ]
    charts["Training"] = ("train/bound", "every run's own bound: not comparable between objectives", bounds)
    charts |= {title: (prefix, words, every) for title, (prefix, _, words) in MEASURED.items()}
    for title, (prefix, words, runs) in charts.items():
        keys = sorted({key for _, rows in runs for row in rows for key in row if key.startswith(prefix)})
        parts = [key.removeprefix(prefix) for key in keys]
        if len(parts) > 1:
            words += "".join(f"; {DASHES[i % len(DASHES)]}: {part}" for i, part in enumerate(parts))
        curves = []
        for dash, (key, part) in enumerate(zip(keys, parts, strict=True)):
            for i, (name, _) in enumerate(drawn):
                seeds = [{row["pass"]: row.get(key) for row in rows} for of, rows in runs if of == i]
                curves.append(_over_seeds(f"{name}, {part}" if part else name, seeds, i, dash))
        yield title, words, [curve for curve in curves if curve.points]


def _paired(name: str, pair: Paired, colour: int | None = 0) -> Interval:
    at, reach, wide = pair.difference, NORMAL * pair.stderr_images, None
    seeds = min(len(pair.seeds_a), len(pair.seeds_b))
    if pair.stderr_seeds is not None and seeds >= ENOUGH_SEEDS:
        # With the degrees of freedom of the smaller side, the fewest that Welch's formula can give.
        over_seeds = float(stdtrit(seeds - 1, 0.975)) * pair.stderr_seeds
        wide = (at - over_seeds, at + over_seeds)
    text = f"{at:+.3f}{WITHIN if pair.within else ''} {PLUS_MINUS} {pair.stderr_images:.3f}"
    return Interval(name, at - reach, at + reach, text, at, wide, colour)


def _intervals(estimate: Estimate) -> dict[str, Any] | None:
    """Return the forest plot of an estimator that has one: gaps, differences from the grid, bounds around log p(x)."""
    held = estimate.numbers
    gaps = [
        (key, at)
        for key, at in held.items()
        if key.endswith(("_gap", "above_grid")) and not key.endswith("stderr_gap") and at is not None
    ]
    errors = {key: held.get(f"{key}_stderr_images", held.get(f"{key}_stderr")) or 0.0 for key, _ in gaps}
    rows = [Interval(key, at - NORMAL * errors[key], at + NORMAL * errors[key], f"{at:+.3f}", at) for key, at in gaps]
    if rows:
        return _forest("", f"nats, with 95% over images ({PLUS_MINUS} {NORMAL} standard errors)", rows, 0.0)
    levels = [key.removeprefix("simulated.bounds.") for key in held if key.startswith("simulated.bounds.")]
    sides = {f"L_{m} to U_{m}": (f"simulated.bounds.{m}", f"simulated.upper_bounds.{m}") for m in levels}
    sides["lower to upper"] = ("simulated.lower", "simulated.upper")
    for name, (low, high) in ((name, (held.get(a), held.get(b))) for name, (a, b) in sides.items()):
        if low is not None and high is not None:
            rows.append(Interval(name, min(low, high), max(low, high), f"{low:.2f} to {high:.2f}"))
    words = "nats; in expectation log p(x) of the model's own draws lies between; line: its exact value, if known"
    return _forest("", words, rows, held.get("simulated.exact"))


def _forest(title: str, words: str, rows: Sequence[Interval], line: float | None) -> dict[str, Any] | None:
    """Return rows with all positions in percent of the width, and a vertical line; None without a row."""
    if not rows:
        return None
    ends = [x for row in rows for x in (row.low, row.high, *(row.wide or ()))] + ([] if line is None else [line])
    margin = 0.03 * (max(ends) - min(ends)) or 1.0
    first, width = min(ends) - margin, max(ends) - min(ends) + 2 * margin

    def percent(x: float | None, of: float = first) -> float | None:
        return None if x is None else 100 * (x - of) / width

    def spans(row: Interval) -> list[tuple[float | None, ...]]:
        return [(percent(a), percent(b, a)) for a, b in filter(None, (row.wide, (row.low, row.high)))]

    ticks = [x for x in MaxNLocator(4).tick_values(min(ends), max(ends)) if 0 <= x - first <= width]
    return {
        **{"title": title, "words": words, "line": percent(line)},
        "ticks": [(percent(x), f"{x:.6g}".replace("-", "\N{MINUS SIGN}")) for x in ticks],
        "rows": [{**row._asdict(), "at": percent(row.at), "spans": spans(row)} for row in rows],
    }


def _numbers(scored: Scored, k: int) -> list[Field]:
    """Return the row of a run in the list of all."""
    numbers, units, refined = scored.numbers, scored.score.active_units, by_refined([scored])
    return [
        number_field("seed", scored.run.seed, "{}"),
        number_field(f"NLL_{k}", numbers["nll"], "{:.3f}"),
        number_field("stderr_images", numbers["stderr_images"], "{:.3f}"),
        number_field("stderr_mc", numbers["stderr_mc"], "{:.4f}"),
        number_field("bias_mc", numbers["bias_mc"], "{:+.4f}"),
        number_field("gap_q", numbers.get("gap_q"), NO_GAP if (numbers.get("gap_q") or 0) <= 0 else "{:.2f}"),
        number_field(f"refined NLL_{k}", refined[0].numbers["nll"] if refined else None, "{:.3f}"),
        number_field("L_1", numbers["bounds"].get("1"), "{:.2f}"),
        number_field("ESS, median", numbers.get("ess_median"), "{:,.1f}"),
        number_field("active units", sum(units) if units else None, "+".join(map(str, units or ()))),
        number_field("passes", scored.run.result["epochs"], "{:,}"),
        number_field("draws", scored.run.draws, "{:,}"),
        number_field("training, s", scored.run.seconds, "{:,.0f}"),
        number_field("weak", 1 if scored.warning else None, "yes"),
    ]


def _pictures(place: Path, room: list[int]) -> list[dict[str, Any]]:
    found = [_picture(path, path.name, room) for path in sorted(place.glob("*.png"))]
    return [picture for picture in found if isinstance(picture, dict)]


def _gallery(named: Sequence[Named], name: str, room: list[int]) -> dict[str, Any]:
    """Return ``figures/<name>.png`` of the first seed of every cell, then of the second, until ``room`` is used up."""
    found = []
    for i in range(max(len(cell.runs) for _, cell in named)):
        for label, s in [(label, cell.runs[i]) for label, cell in named if i < len(cell.runs)]:
            caption = f"{label}, seed {s.run.seed}; NLL {s.numbers['nll']:.2f}"
            found.append(_picture(s.run.path / "figures" / f"{name}.png", caption, room))
    pictures, missing, full = [p for p in found if isinstance(p, dict)], found.count("missing"), found.count("full")
    notes = [f"{missing} without figures/{name}.png"] if missing else []
    notes += [f"{full} more in their folders: the page holds {PICTURES // 1_000_000} MB of pictures"] if full else []
    return {"title": GALLERIES[name], "pictures": pictures, "notes": notes if name == "samples" or pictures else []}


def _picture(path: Path, name: str, room: list[int]) -> dict[str, Any] | str:
    """Return a PNG file with its size; ``missing``, or ``full`` where it does not fit into ``room``."""
    try:
        data = path.read_bytes()
    except OSError:
        data = b""
    if not data.startswith(b"\x89PNG"):
        return "missing"
    if len(data) > room[0]:
        return "full"
    room[0] -= len(data)
    # The size, so that the page reserves room for pictures that are not decoded yet.
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    return {"name": name, "width": width, "height": height, "data": base64.b64encode(data).decode()}
