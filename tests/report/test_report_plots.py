from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.image import imread

from iwae_cli.report.plots import plot_bounds, plot_reconstructions, plot_samples, plot_training, plot_units

IMAGES = np.random.default_rng(0).random((23, 8, 8))
CURVES = {"train": [(0.0, -300.0), (1.0, -120.0), (2.0, -100.0)], "validation": [(1.0, -121.0), (2.0, -103.0)]}
BOUNDS = {"test": {"1": -91.0, "5": -88.0, "50": -86.0}, "validation": {"1": -92.0, "5": -89.0, "50": -87.0}}

PLOTS: dict[str, Callable[[Path], None]] = {
    "samples": lambda path: plot_samples(path, IMAGES),
    "reconstructions": lambda path: plot_reconstructions(path, IMAGES, 1 - IMAGES),
    "training": lambda path: plot_training(path, CURVES, label="bound"),
    "bounds": lambda path: plot_bounds(path, BOUNDS),
    "units": lambda path: plot_units(path, {"iwae": (26.0, 7.5), "elbo": (17.0, 5.0)}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_is_whole_small_the_same_each_time_and_leaves_no_trace(tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "figures" / "a.png", tmp_path / "figures" / "b.png"
    for path in (first, second):
        PLOTS[name](path)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["a.png", "b.png"]
    assert 2_000 < first.stat().st_size < 150_000
    assert imread(first)[..., :3].std() > 0.01, "not a blank sheet"
    assert pyplot.get_fignums() == []


def darkness(path: Path) -> float:
    return float(1 - imread(path)[..., :3].mean())


@pytest.mark.parametrize("plot", ["samples", "reconstructions"])
def test_ink_is_dark_and_paper_is_light(tmp_path: Path, plot: str) -> None:
    for value in (0, 1):
        images = np.full((20, 28, 28), value, dtype=np.uint8)
        if plot == "samples":
            plot_samples(tmp_path / f"{value}.png", images)
        else:
            plot_reconstructions(tmp_path / f"{value}.png", images, images)
    assert darkness(tmp_path / "0.png") < 0.15
    assert darkness(tmp_path / "1.png") > 0.6


def test_a_reconstruction_stands_below_its_original(tmp_path: Path) -> None:
    black, white = np.ones((4, 8, 8)), np.zeros((4, 8, 8))
    plot_reconstructions(tmp_path / "r.png", black, white)
    sheet = imread(tmp_path / "r.png")[..., 0]
    rows = sheet[60:].min(axis=1)  # below the title
    dark = np.flatnonzero(rows < 0.1)
    light = np.flatnonzero((rows > 0.85) & (rows < 0.97))
    assert len(dark) > 20
    assert len(light) > 20
    assert dark.max() < light.max()


@pytest.mark.parametrize("images", [IMAGES - 1, IMAGES * 2, IMAGES * np.nan, IMAGES[:0]])
def test_what_is_no_image_is_refused_and_no_file_is_made(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^images must"):
        plot_samples(tmp_path / "a.png", images)
    with pytest.raises(ValueError, match=r"^images must"):
        plot_reconstructions(tmp_path / "a.png", images, images)
    assert list(tmp_path.iterdir()) == []


def test_reconstructions_of_other_images_are_refused(tmp_path: Path) -> None:
    # Where shapes are checked, as in these tests, by that check; otherwise by the function itself.
    with pytest.raises((ValueError, TypeError), match="reconstructions"):
        plot_reconstructions(tmp_path / "a.png", IMAGES, IMAGES[:-1])


def test_curves_may_be_short_long_or_missing(tmp_path: Path) -> None:
    long = [(i / 2, -100.0 - 200 / (i + 1)) for i in range(6560)]
    plot_training(tmp_path / "long.png", {"train": long, "validation": []}, label="bound")
    plot_training(tmp_path / "one.png", {"train": [(1.0, -100.0)]}, label="bound")
    plot_training(tmp_path / "none.png", {}, label="bound")
    plot_bounds(tmp_path / "k1.png", {"test": {"1": -100.0}})
    assert len(list(tmp_path.iterdir())) == 4


def test_a_dozen_lines_are_all_drawn(tmp_path: Path) -> None:
    """A report has as many as it has cells; the colours begin again."""
    lines = {f"cell {i}": {"1": -90.0 - i, "5": -85.0 - i, "50": -84.0 - i} for i in range(12)}
    some = dict(list(lines.items())[:10])
    plot_bounds(tmp_path / "some.png", some)
    plot_bounds(tmp_path / "more.png", lines)
    assert darkness(tmp_path / "more.png") > darkness(tmp_path / "some.png")
