"""Figures of runs: PNG, PDF and SVG files for run folders, SVG for pages.

Built from ``Figure`` objects: pyplot keeps every figure in a global list, which leaks between runs of a process.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from iwae_cli.core.files import atomic_path
from iwae_cli.record.folder import drawable

Images = Shaped[np.ndarray, "n *image"]

COLOURS = (
    "#2f5d9e", "#d9822b", "#3d8f6e", "#8a5fa8", "#b5473c", "#3f9bb3", "#94802f", "#c46a9b", "#6b7885", "#7a5238",
)  # fmt: skip
"""The first three are distinguishable with any colour vision, and in grey."""
BOUND = "mean bound L\N{LATIN SUBSCRIPT SMALL LETTER K} (nats)"
INK = "#33373d"
FAINT = "#e3e6ea"
DPI = 150
DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKED = 12
"""Curves of an SVG with at most this many points have a marker at each."""


class Curve(NamedTuple):
    """One curve: name, points (x, y), number of its colour; least and largest y at each point; number of its dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    band: Sequence[tuple[float, float]] = ()
    dash: int = 0


class Posterior(NamedTuple):
    """Densities of one or two latents given one image; the exact posterior is the first.

    Attributes:
        image: (height, width), or with 1 or 3 channels in front, in [0, 1]; None if it is no image.
        sides: coordinates of the points on each side of the grid.
        densities: by name, on the points of the grid.
        divergences: KL of each from the exact posterior, nats; NaN where it is not known.
    """

    image: Shaped[np.ndarray, "*image"] | None
    sides: Sequence[Shaped[np.ndarray, " points"]]
    densities: Mapping[str, Shaped[np.ndarray, "*points"]]
    divergences: Mapping[str, float]


def plot_run(
    folder: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    results: Mapping[str, Mapping[str, Any]],
    ess: Mapping[str, Shaped[np.ndarray, " images"]],
    units: Sequence[Shaped[np.ndarray, " _units"]],
    samples: Shaped[np.ndarray, "samples *image"] | None = None,
    originals: Images | None = None,
    reconstructions: Images | None = None,
) -> None:
    """Draw the figures of a run into ``folder``; no images where these are None.

    Args:
        curves: see ``plot_training``.
        results: for every split ``bounds``, ``stderr_images`` and ``k`` of ``result.json``.
        ess: for every split the effective sample size of each image.
        units: KL of the units of every layer, nearest to x first, nats; empty where they are not Gaussian.
        samples, originals, reconstructions: see ``plot_samples`` and ``plot_reconstructions``.
    """
    plot_training(folder / "training.png", curves)
    by_split = ({name: result[key] for name, result in results.items()} for key in ("bounds", "stderr_images"))
    plot_bounds(folder / "bound_vs_k.png", *by_split)
    shares = [ess_curve(name, values, results[name]["k"], i) for i, (name, values) in enumerate(ess.items())]
    by_size = k_figure(shares, "share of images", "effective sample size of an image", 0)
    _save(by_size, folder / "ess.png", legend="best")
    figure, axes = _figure("KL (nats), mean over images", "unit of the layer, by falling KL")
    for i, values in enumerate(units):
        name = f"$h_{{{i + 1}}}$: {values.sum():.2f} in all"
        _line(axes, Curve(name, list(enumerate(-np.sort(-values), 1)), i), marked=200)
    if units:
        _save(figure, folder / "kl_per_unit.png", legend="upper right")
    if samples is not None:
        plot_samples(folder / "samples.png", samples)
    if originals is not None and reconstructions is not None:
        plot_reconstructions(folder / "reconstructions.png", originals, reconstructions)


def plot_samples(path: str | Path, images: Images) -> None:
    """Draw means of p(x|h), h from the prior, in a grid that is nearly square.

    Args:
        path: PNG file, beside which the same as PDF and as SVG is written.
        images: (n, height, width) or (n, channels, height, width) with 1 or 3 channels, n >= 1, in [0, 1]; with one
            channel 0 is paper and 1 is ink.

    Raises:
        ValueError: no image, values outside [0, 1], or another number of channels.
    """
    rows = _rows(images, int(np.ceil(np.sqrt(len(images)))))
    _save_grid(path, rows, "Means of p(x|h), h drawn from the prior", group=len(rows))


def plot_reconstructions(path: str | Path, originals: Images, reconstructions: Images) -> None:
    """Draw pairs of rows: observations above, means of p(x|h) below, h from q; images as for ``plot_samples``."""
    if originals.shape != reconstructions.shape:
        raise ValueError(f"reconstructions must have shape {originals.shape}, got {reconstructions.shape}")
    columns = min(10, len(originals))
    pairs = np.stack([_rows(originals, columns), _rows(reconstructions, columns)], axis=1)
    title = "Observed above, means of p(x|h) with h drawn from q(h|x) below"
    _save_grid(path, pairs.reshape(-1, *pairs.shape[2:]), title, group=2)


def plot_posteriors(path: str | Path, posteriors: Sequence[Posterior]) -> None:
    """Draw a row for each image into a PNG file: the image, the exact posterior, and what approximates it.

    In a row, axes and shades are the same for all; lines hold 50% and 95% of the mass, orange ones of the exact
    posterior and blue ones of its approximation. One latent gives curves, the exact posterior in orange.
    """
    names = list(posteriors[0].densities)
    pictured = posteriors[0].image is not None
    rows, columns = len(posteriors), len(names) + pictured
    figure = Figure(figsize=(1.12 * columns, 1.12 * rows + 0.65), layout="constrained")
    sheet = figure.subplots(rows, columns, squeeze=False)
    cmap, shades = LinearSegmentedColormap.from_list("shades", ["white", COLOURS[0]]), np.linspace(0.02, 1, 9)
    for row, (posterior, cells) in enumerate(zip(posteriors, sheet, strict=True)):
        if posterior.image is not None:
            _show(cells[0], _rows(posterior.image[None], 1)[0, 0])
        exact, *_ = posterior.densities.values()
        for axes, (name, density) in zip(cells[pictured:], posterior.densities.items(), strict=True):
            if len(posterior.sides) == 1:
                axes.fill_between(posterior.sides[0], exact, color=COLOURS[1], alpha=0.35, lw=0)
                axes.plot(posterior.sides[0], density, color=COLOURS[0], lw=1.4)
                axes.set_ylim(0, 1.25 * exact.max())
            else:
                axes.contourf(*posterior.sides, density.T, shades * exact.max(), cmap=cmap, extend="max")
                for shown, colour in ((density, COLOURS[0]), (exact, COLOURS[1])):
                    levels = sorted({_level(shown, share) for share in (0.95, 0.5)})
                    axes.contour(*posterior.sides, shown.T, levels, colors=colour, linewidths=0.8)
                axes.set_aspect("equal")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(FAINT)
            if density is not exact:
                divergence = posterior.divergences[name]
                kl = "KL unknown" if np.isnan(divergence) else f"KL {divergence:.2f}"
                place = (0.96, 0.88) if len(posterior.sides) == 1 else (0.96, 0.04)
                behind = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
                axes.text(*place, kl, transform=axes.transAxes, ha="right", fontsize=7, color=INK, bbox=behind)
            if not row:
                axes.set_title(name, fontsize=8, color=INK)
    lines = "; lines around 50 and 95% of the mass" * (len(posteriors[0].sides) > 1)
    words = {1: f"exact p(h|x){lines}", 0: "approximation; KL(approximation \N{PARALLEL TO} exact) in nats"}
    handles = [Line2D([], [], color=COLOURS[i], label=label) for i, label in words.items()]
    figure.legend(handles=handles, loc="outside lower center", fontsize=7, frameon=False, labelcolor=INK)
    _save(figure, path, legend=None)


def _level(density: Shaped[np.ndarray, "*points"], share: float) -> float:
    """Return the density above which ``share`` of the mass lies."""
    falling = np.sort(density, axis=None)[::-1]
    return float(falling[np.searchsorted(falling.cumsum(), share * falling.sum())])


def plot_training(path: str | Path, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw bounds (nats) against passes over the training data into a PNG file; points (pass, nats) by name."""
    named = [
        Curve(f"{name}: {_nats(points[-1][1])} at the end", points, i)
        for i, (name, points) in enumerate(curves.items())
        if len(points)
    ]
    _save(training_figure(named, "bound (nats)", marked=40), path)


def training_figure(curves: Sequence[Curve], label: str, marked: int = MARKED) -> Figure:
    """Return a figure of what is measured in training, against passes; logarithmic where these span more than 100.

    From four points on, the axis clips a first quarter of its width that is far from the rest, which fills at least
    half of the height; the last point of a curve is never clipped.
    Points are (pass, value), ``label`` is the title of the vertical axis, and ``marked`` is as for ``k_figure``.
    """
    figure, axes = _figure(label, "passes over the training data")
    for curve in curves:
        _line(axes, curve, marked)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    passes = [x for curve in curves for x, _ in curve.points if x > 0]
    # The usual schedules grow by powers of three: a linear axis would show the last stage only.
    log = bool(passes) and max(passes) / min(passes) > 100
    if log:
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    spans = [np.array(curve.band or [(y, y) for _, y in curve.points]) for curve in curves if len(curve.points)]
    if passes and max(map(len, spans)) > 3:
        every = np.concatenate(spans)
        first, last = min(passes), max(passes)
        quarter = (first**3 * last) ** 0.25 if log else (3 * first + last) / 4
        drawn = [[x for x, _ in curve.points] for curve in curves if len(curve.points)]
        rest = np.concatenate([y[np.array([*xs[:-1], last]) >= quarter] for y, xs in zip(spans, drawn, strict=True)])
        more = np.ptp(rest) / 2
        low, high = max(every.min(), rest.min() - more), min(every.max(), rest.max() + more)
        pad = 0.06 * (high - low or 1.0)
        axes.set_ylim(low - pad, high + pad)
    return figure


def plot_bounds(
    path: str | Path, bounds: Mapping[str, Mapping[str, float]], errors: Mapping[str, float | None] | None = None
) -> None:
    """Draw the mean bound L_k of each split against k into a PNG file, with the values written beside the points.

    Args:
        path: PNG file.
        bounds: such as ``{"test": {"1": -91.2, "5": -88.4, "50": -86.9}}``; with three splits only the values of the
            first are written.
        errors: standard error over images of each split at its largest k, drawn as a bar.
    """
    lines = {name: sorted((int(k), y) for k, y in levels.items() if y is not None) for name, levels in bounds.items()}
    lines = {name: points for name, points in lines.items() if points}
    known = {name: error for name, error in (errors or {}).items() if error is not None and name in lines}
    words = {name: f" \N{PLUS-MINUS SIGN} {error:.2f}, standard error over images" for name, error in known.items()}
    curves = [Curve(name + words.get(name, ""), points, i) for i, (name, points) in enumerate(lines.items())]
    figure = k_figure(curves, BOUND)
    (axes,) = figure.axes
    for i, name in enumerate(lines):
        if name in known:
            axes.errorbar(*lines[name][-1], yerr=known[name], fmt="none", ecolor=COLOURS[i], capsize=3.5 + 2 * i)
    for row, curve in enumerate(curves):
        for k, value in curve.points if len(curves) <= 2 or row == 0 else ():
            # Bounds rise with k and flatten: no curve is above and left of a point, nor below and right of it.
            beside = [(dict(other.points).get(k, value), -i) for i, other in enumerate(curves)]
            above = (value, -row) == max(beside)
            offset, side = ((-3, 6), "right") if above or len(curves) == 3 else ((3, -13), "left")
            colour = COLOURS[curve.colour]
            axes.annotate(
                _nats(value), (k, value), offset, textcoords="offset points", ha=side, color=colour, fontsize=9
            )
    axes.margins(x=0.2, y=0.15)  # room for the values beside the first and the last point
    _save(figure, path)


def k_figure(
    curves: Sequence[Curve], label: str, x: str = "samples k", marked: int = 10**9, log: bool = False
) -> Figure:
    """Return a figure of points (k, value) with k on a logarithmic axis; with ``log`` both axes are.

    Curves with at most ``marked`` points have a marker at each; where none has, the axis has no tick at every k either.
    """
    figure, axes = _figure(label, x)
    for i, curve in enumerate(curves):
        # Where curves coincide the first one is visible.
        _line(axes, curve, marked, zorder=3 - i / len(curves))
    axes.set_xscale("log")
    ticks, last = [], float("inf")
    for k in sorted({k for curve in curves for k, _ in curve.points}, reverse=True):
        if k <= last / 1.6:  # closer labels overlap
            ticks.append(k)
            last = k
    axes.xaxis.set_major_locator(FixedLocator(ticks) if marked else LogLocator())
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
    return figure


def ess_curve(name: str, values: Shaped[np.ndarray, " images"], k: int, colour: int) -> Curve:
    """Return the histogram of effective sample sizes of ``k`` draws: the share of images by size, on a log scale."""
    edges = np.geomspace(1, max(k, 2), 21)
    counts, _ = np.histogram(np.clip(values[np.isfinite(values)], 1, edges[-1]), edges)
    return Curve(name, list(zip(np.repeat(edges, 2)[1:-1], np.repeat(counts / len(values), 2), strict=True)), colour)


def svg(figure: Figure, curves: Sequence[Curve], title: str) -> str:
    """Return a figure as an ``svg`` element for an HTML page, without the legend.

    Text takes the font of the page. Colours are the CSS variables ``--ink``, ``--rule`` and, on ``<g class="line cN">``
    of a curve with colour N, ``--c``, so that one element serves light and dark pages. ``title`` names the figure for
    screen readers and begins its ids: it must be unique in the page.
    """

    def tag(match: re.Match[str]) -> str:
        curve = curves[int(match[2])]
        if match[1] == "band":
            return f' class="line c{curve.colour}">'
        values = "; ".join(f"{y:.2f} at {x:,.10g}" for x, y in curve.points) if len(curve.points) <= MARKED else ""
        name = html.escape(f"{curve.name}: {values}" if values else curve.name)
        return f' class="line c{curve.colour}"><title>{name}</title>'

    figure.set_size_inches(5, 3.3)
    for axes in figure.axes:
        axes.yaxis.labelpad = 9  # the text of a narrow page is larger
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    text = out.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = text[text.index("<g id=") :]
    body = re.sub(r"font: [^;\"]*;? ?|font-size: [^;\"]*;? ?|font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), body)
    body = re.sub(r' id="(curve|band)(\d+)">', tag, body)
    body = re.sub(r' id="[a-z][\w.]*_\w+"', "", body)  # not unique in a page with several figures
    for colour, variable in {INK: "var(--soft)", FAINT: "var(--rule)", **dict.fromkeys(COLOURS, "var(--c)")}.items():
        body = body.replace(colour, variable)
    return f'<svg {box[0]} role="img" aria-label="{html.escape(title)}">\n{body}'


def _rows(images: Images, columns: int) -> Shaped[np.ndarray, "rows columns height width colours"]:
    """Arrange images in rows, the last one filled up with NaN, which is drawn as nothing; 1 or 3 colours."""
    if not len(images):
        raise ValueError("images must hold at least one image")
    if not drawable(images.shape[1:]):
        raise ValueError(f"images must have 1 or 3 channels, got shape {images.shape}")
    if not (np.min(images) >= 0 and np.max(images) <= 1):
        raise ValueError(f"images must lie in [0, 1], got {np.min(images)} to {np.max(images)}")
    pixels = images[..., None] if images.ndim == 3 else np.moveaxis(images, 1, -1)  # (n, height, width, colours)
    filled = np.full((-(-len(pixels) // columns) * columns, *pixels.shape[1:]), np.nan)
    filled[: len(pixels)] = pixels
    return filled.reshape(-1, columns, *pixels.shape[1:])


def _save_grid(
    path: str | Path, images: Shaped[np.ndarray, "rows columns height width colours"], title: str, group: int
) -> None:
    """Draw a grid with a wider gap after every ``group`` rows."""
    rows, columns, height, width, colours = images.shape
    gap = max(1, height // 14)
    tops = [row * (height + gap) + row // group * 2 * gap for row in range(rows)]
    sheet = np.full((tops[-1] + height, columns * (width + gap) - gap, colours), np.nan)
    for top, row in zip(tops, images, strict=True):
        for column, image in enumerate(row):
            left = column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    inches = 5.0 / max(sheet.shape)
    figure = Figure(figsize=(max(2.2, sheet.shape[1] * inches), sheet.shape[0] * inches + 0.35), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=INK)
    _show(axes, sheet)
    _save(figure, path, legend=None)


def _show(axes: Axes, image: Shaped[np.ndarray, "height width colours"]) -> None:
    """Show an image; NaN is the page."""
    axes.set_axis_off()
    if image.shape[-1] == 3:
        axes.imshow(np.nan_to_num(image, nan=1.0), interpolation="none")
    else:
        # Paper is slightly darker than the page, so that the gaps show where an image ends.
        axes.imshow(-0.08 - 0.92 * image[..., 0], cmap="gray", vmin=-1, vmax=0, interpolation="none")


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


def _line(axes: Axes, curve: Curve, marked: int, zorder: float = 2) -> None:
    colour, number = COLOURS[curve.colour % len(COLOURS)], len(axes.lines)
    if curve.band:
        low, high = np.asarray(curve.band, dtype=np.float64).T
        xs = [x for x, _ in curve.points]
        axes.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0, zorder=1.5, gid=f"band{number}")
    axes.plot(
        *np.asarray(curve.points, dtype=np.float64).reshape(-1, 2).T,
        color=colour,
        lw=1.6,
        ls=DASHES[curve.dash % len(DASHES)],
        marker="o" if len(curve.points) <= marked else "",
        ms=4,
        label=curve.name,
        zorder=zorder,
        gid=f"curve{number}",
    )


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _save(figure: Figure, path: str | Path, legend: Any = "lower right") -> None:
    """Write a PNG file, and before it the same as PDF and as SVG: a run with the PNG has all three."""
    for axes in figure.axes if legend is not None else ():
        if axes.lines:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc=legend)
    Path(path).parent.mkdir(exist_ok=True)
    # Without dates and versions: the same run makes the same files.
    for form, key in {"pdf": "CreationDate", "svg": "Date", "png": "Software"}.items():
        target = Path(path).with_suffix(f".{form}")
        with atomic_path(target) as temporary, matplotlib.rc_context({"svg.hashsalt": "figure"}):
            figure.savefig(temporary, format=form, dpi=DPI, metadata={key: None})
