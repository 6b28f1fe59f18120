"""The pictures of a run, as PNG files that appear whole or not at all.

Built from ``Figure`` objects: pyplot keeps every figure in one global list, which leaks between runs of a process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from iwae_cli.core.files import atomic_path

T = TypeVar("T")
Images = Shaped[np.ndarray, "n height width"]

COLOURS = (
    "#2f5d9e", "#d9822b", "#3d8f6e", "#8a5fa8", "#b5473c", "#3f9bb3", "#94802f", "#c46a9b", "#6b7885", "#7a5238",
)  # fmt: skip
"""The first three are told apart by people with any colour vision, and in grey."""
INK = "#33373d"
FAINT = "#e3e6ea"
DPI = 150


def plot_samples(path: str | Path, images: Images) -> None:
    """Samples from the prior in a grid as square as can be.

    Args:
        path: the PNG file.
        images: (n, height, width), n >= 1; 0 is paper, 1 is ink.

    Raises:
        ValueError: no image, or values outside [0, 1].
    """
    _check(images)
    rows = _rows(images, int(np.ceil(np.sqrt(len(images)))))
    _save_grid(path, rows, "Samples from the prior", group=len(rows))


def plot_reconstructions(path: str | Path, originals: Images, reconstructions: Images, columns: int = 10) -> None:
    """Rows in pairs: observations above, what the model makes of them below.

    Args:
        path: the PNG file.
        originals: (n, height, width), n >= 1, in [0, 1].
        reconstructions: the same shape and order.
        columns: pairs a row.

    Raises:
        ValueError: no image, values outside [0, 1], or shapes that differ.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"reconstructions must have shape {originals.shape}, got {reconstructions.shape}")
    _check(originals)
    _check(reconstructions)
    columns = min(columns, len(originals))
    pairs = np.stack([_rows(originals, columns), _rows(reconstructions, columns)], axis=1)
    _save_grid(path, pairs.reshape(-1, *pairs.shape[2:]), "Observed above, reconstructed below", group=2)


def plot_training(path: str | Path, curves: Mapping[str, Sequence[tuple[float, float]]], label: str) -> None:
    """Bounds against passes over the training data.

    Args:
        path: the PNG file.
        curves: such as ``{"train": [(pass, nats), ...], "validation": [...]}``.
        label: what the vertical axis shows, such as ``"bound, IWAE k = 50"``; nats are added.
    """
    figure, axes = _figure(f"{label} (nats)", "passes over the training data")
    for colour, (name, points) in _coloured(curves.items()):
        if not points:
            continue
        x, y = np.asarray(points, dtype=np.float64).T
        end = f"{name}: {_nats(y[-1])} at the end"
        axes.plot(x, y, color=colour, lw=1.6, marker="o" if len(x) <= 40 else "", ms=3.5, label=end)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # The schedules of the field grow by powers of three: a straight axis would show the last stage alone.
    passes = [x for points in curves.values() for x, _ in points if x > 0]
    if passes and max(passes) / min(passes) > 100:
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    _legend(axes)
    _save(figure, path)


def plot_bounds(path: str | Path, bounds: Mapping[str, Mapping[str, float]]) -> None:
    """Mean bound L_k of each split against k, as ``result.json`` has them.

    Args:
        path: the PNG file.
        bounds: such as ``{"test": {"1": -91.2, "5": -88.4, "50": -86.9}}``; of up to two lines the values are written
            in, of three those of the first.
    """
    figure, axes = _figure("mean bound $L_k$ (nats)", "samples k")
    ticks: set[int] = set()
    lines = {
        name: sorted((int(k), value) for k, value in levels.items() if value is not None)
        for name, levels in bounds.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    for row, (colour, (name, points)) in enumerate(_coloured(lines.items())):
        ticks.update(k for k, _ in points)
        # Where lines coincide the first is seen, which is the one that is spoken of.
        axes.plot(
            *zip(*points, strict=True), color=colour, lw=1.6, marker="o", ms=5, label=name, zorder=3 - row / len(lines)
        )
        for k, value in points if len(lines) <= 2 or (row == 0 and len(lines) == 3) else ():
            # Bounds rise with k and flatten: no line is above and to the left of a point, nor below and to the right.
            beside = [(dict(other).get(k, value), -i) for i, other in enumerate(lines.values())]
            above = (value, -row) == max(beside)
            offset, side = ((-3, 6), "right") if above or len(lines) == 3 else ((3, -13), "left")
            axes.annotate(
                _nats(value), (k, value), offset, textcoords="offset points", ha=side, color=colour, fontsize=9
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    # Room for the values beside the first and the last point.
    axes.margins(x=0.2, y=0.15)
    _legend(axes)
    _save(figure, path)


def plot_units(path: str | Path, units: Mapping[str, Sequence[float]]) -> None:
    """Active units of every layer as bars, nearest to x first.

    Args:
        path: the PNG file.
        units: such as ``{"iwae, k = 50": (26.0, 7.0)}``; at least one.
    """
    figure, axes = _figure("", "active units")
    figure.set_size_inches(6, 0.9 + 0.32 * len(units))
    for row, (colour, (_, layers)) in enumerate(_coloured(units.items())):
        left = 0.0
        for depth, n in enumerate(layers):
            axes.barh(row, n, left=left, color=colour, alpha=0.6**depth, height=0.6)
            left += n
        axes.text(left, row, f" {'+'.join(f'{n:g}' for n in layers)}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(units)), list(units))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15)
    _save(figure, path)


def _coloured(items: Iterable[T]) -> Iterator[tuple[str, T]]:
    return zip(cycle(COLOURS), items, strict=False)


def _check(images: Images) -> None:
    if not len(images):
        raise ValueError("images must hold at least one image")
    if not (np.min(images) >= 0 and np.max(images) <= 1):
        raise ValueError(f"images must lie in [0, 1], got {np.min(images)} to {np.max(images)}")


def _rows(images: Images, columns: int) -> Shaped[np.ndarray, "rows columns height width"]:
    """Images in rows; where the last row is not full there is NaN, which is drawn as nothing."""
    n, height, width = images.shape
    filled = np.full((-(-n // columns) * columns, height, width), np.nan)
    filled[:n] = images
    return filled.reshape(-1, columns, height, width)


def _save_grid(
    path: str | Path, images: Shaped[np.ndarray, "rows columns height width"], title: str, group: int
) -> None:
    """Draw a grid with a wider gap after every ``group`` rows."""
    rows, columns, height, width = images.shape
    gap = max(1, height // 14)
    tops = [row * (height + gap) + row // group * 2 * gap for row in range(rows)]
    sheet = np.full((tops[-1] + height, columns * (width + gap) - gap), np.nan)
    for top, row in zip(tops, images, strict=True):
        for column, image in enumerate(row):
            left = column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    inches = 5.0 / max(sheet.shape)
    figure = Figure(figsize=(max(2.2, sheet.shape[1] * inches), sheet.shape[0] * inches + 0.35), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, fontsize=10, color=INK)
    # Paper is a little darker than the page, so that the gaps show where an image ends.
    axes.imshow(-0.08 - 0.92 * sheet, cmap="gray", vmin=-1, vmax=0, interpolation="nearest")
    _save(figure, path)


def _figure(y: str, x: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    return figure, axes


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _legend(axes: Axes) -> None:
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        # No version of matplotlib inside: the same run makes the same file.
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
