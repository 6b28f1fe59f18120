"""Line charts as SVG inside a page: no library, no script needed to see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 44
POINTS = 160
"""Points of one line; more cannot be seen."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve: its name, the number of its colour (lines of one colour are lit up together), its points."""

    name: str
    colour: int
    points: Sequence[Point]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x: str,
    y: str,
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    focus: bool = False,
) -> str:
    """An ``svg`` element.

    Args:
        lines: with at least one point in all.
        title: for screen readers.
        x, y: what the axes show.
        log_x: logarithmic axis; points at 0 or below are left out.
        x_ticks: where to write numbers; None chooses.
        focus: begin the vertical axis where learning slows down, cutting off the first steep part.
    """
    kept = [Line(line.name, line.colour, [p for p in line.points if p[0] > 0 or not log_x]) for line in lines]
    xs = [p[0] for line in kept for p in line.points]
    ys = [p[1] for line in kept for p in line.points]
    low, high = min(ys), max(ys)
    if focus and max(len(line.points) for line in kept) > 10:
        # No line may vanish below the axis: where each of them ends is seen.
        low = min(sorted(ys)[len(ys) // 5], *(line.points[-1][1] for line in kept if line.points))
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def place(value: float, first: float, last: float, log: bool) -> float:
        if log:
            value, first, last = math.log(value), math.log(first), math.log(last)
        return 0.5 if last == first else (value - first) / (last - first)

    def at(point: Point) -> tuple[float, float]:
        across = place(point[0], min(xs), max(xs), log_x)
        up = place(point[1], low, high, False)
        return LEFT + 8 + across * (WIDTH - LEFT - RIGHT - 16), TOP + (1 - up) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    step, marks = _ticks(low, high)
    for mark in marks:
        height = at((max(xs), mark))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{height + 4:.1f}" text-anchor="end">{_number(mark, step)}</text>')
    if x_ticks is None:
        x_ticks = _log_ticks(min(xs), max(xs)) if log_x else [m for m in _ticks(min(xs), max(xs))[1]]
    free, floor = math.inf, HEIGHT - BOTTOM
    # From the right, so that the largest is always there, and none runs into its neighbour.
    for mark in sorted(x_ticks, reverse=True):
        left = at((mark, high))[0] if min(xs) <= mark <= max(xs) else math.inf
        if left < free:
            free = left - 12 - 9 * len(f"{mark:,.10g}")
            parts.append(f'<line class="tick" x1="{left:.1f}" x2="{left:.1f}" y1="{floor}" y2="{floor + 4}"/>')
            parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{mark:,.10g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    )
    parts.append(
        f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    for line in kept:
        if not line.points:
            continue
        # Below the axis a curve would run over the numbers there.
        inside = next((i for i, point in enumerate(line.points) if point[1] >= low), len(line.points) - 1)
        shown = [at(point) for point in _thinned(line.points[inside:], log_x)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in shown)
        parts.append(f'<g class="line c{line.colour}"><title>{escape(line.name)}</title><polyline points="{path}"/>')
        if len(shown) <= 12:
            for (a, b), (u, v) in zip(shown, line.points[inside:], strict=True):
                tip = f"{escape(line.name)}: {v:.2f} at {u:,.10g}"
                parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2"><title>{tip}</title></circle>')
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def _thinned(points: Sequence[Point], log_x: bool) -> Sequence[Point]:
    """At most ``POINTS`` of them, evenly along the axis; the last stays."""
    if len(points) <= POINTS:
        return points
    n = len(points)
    spots = [(n ** (i / (POINTS - 1)) - 1) if log_x else i * (n - 1) / (POINTS - 1) for i in range(POINTS)]
    return [points[i] for i in dict.fromkeys(min(round(spot), n - 1) for spot in spots)]


def _ticks(low: float, high: float) -> tuple[float, list[float]]:
    """The distance of round numbers between ``low`` and ``high``, and some four to eight of them."""
    if high <= low:
        return 1.0, [low]
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return step, [step * i for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 10, 100, ... and in between 3, 30, ... where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 3) if len(powers) <= 5 else (1,)
    return [step * 10.0**power for power in powers for step in steps]


def _number(value: float, step: float) -> str:
    decimals = max(0, -math.floor(math.log10(step)))
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")
