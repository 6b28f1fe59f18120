from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.image import imread
from small_runs import TINY, read_json, run, run_folders

from iwae_cli.data.base import Data
from iwae_cli.record.figures import (
    Curve,
    Posterior,
    k_figure,
    plot_bounds,
    plot_posteriors,
    plot_reconstructions,
    plot_samples,
    plot_training,
    svg,
    training_figure,
)

pytestmark = pytest.mark.usefixtures("drawn_pictures")

IMAGES = np.random.default_rng(0).random((23, 8, 8))
CURVES = {"train": [(0.0, -300.0), (1.0, -120.0), (2.0, -100.0)], "validation": [(1.0, -121.0), (2.0, -103.0)]}
BOUNDS = {"test": {"1": -91.0, "5": -88.0, "50": -86.0}, "validation": {"1": -92.0, "5": -89.0, "50": -87.0}}


def posterior(image: np.ndarray | None, latents: int) -> Posterior:
    side = np.linspace(-4, 4, 41)
    h = np.stack(np.meshgrid(*[side] * latents, indexing="ij"))
    densities = {name: np.exp(-((h - at) ** 2).sum(0)) for name, at in (("exact", 0.0), ("q", 1.0))}
    return Posterior(image, [side] * latents, densities, {"exact": 0.0, "q": 1.0})


PLOTS: dict[str, Callable[[Path], None]] = {
    "samples": lambda path: plot_samples(path, IMAGES),
    "reconstructions": lambda path: plot_reconstructions(path, IMAGES, 1 - IMAGES),
    "training": lambda path: plot_training(path, CURVES),
    "bounds": lambda path: plot_bounds(path, BOUNDS),
    "posteriors": lambda path: plot_posteriors(path, [posterior(IMAGES[0], 2)] * 3),
    "posteriors of curves": lambda path: plot_posteriors(path, [posterior(None, 1)] * 3),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_figure_is_whole_small_reproducible_and_leaves_no_trace(tmp_path: Path, name: str) -> None:
    first, second = tmp_path / "figures" / "a.png", tmp_path / "figures" / "b.png"
    for path in (first, second):
        PLOTS[name](path)
    starts = {".pdf": b"%PDF", ".png": b"\x89PNG", ".svg": b"<?xml"}
    for form, start in starts.items():
        whole = first.with_suffix(form).read_bytes()
        assert whole == second.with_suffix(form).read_bytes() and whole.startswith(start)
    assert sorted(path.name for path in first.parent.iterdir()) == [f"{n}{form}" for n in "ab" for form in starts]
    assert 2_000 < first.stat().st_size < 150_000
    assert imread(first)[..., :3].std() > 0.01, "not a blank sheet"
    assert pyplot.get_fignums() == []


def test_ink_is_dark_and_paper_is_light(tmp_path: Path) -> None:
    for value in (0, 1):
        images = np.full((20, 28, 28), value, dtype=np.uint8)
        plot_samples(tmp_path / "s.png", images)
        plot_reconstructions(tmp_path / "r.png", images, images)
        darkness = [1 - imread(tmp_path / name)[..., :3].mean() for name in ("s.png", "r.png")]
        assert min(darkness) > 0.6 if value else max(darkness) < 0.15


def test_one_channel_is_drawn_like_none(tmp_path: Path) -> None:
    for images, name in ((IMAGES, "none"), (IMAGES[:, None], "one")):
        plot_reconstructions(tmp_path / f"{name}.png", images, 1 - images)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "none.png").read_bytes()


def test_three_channels_are_red_green_and_blue(tmp_path: Path) -> None:
    images = np.zeros((3, 3, 8, 8))
    for colour in range(3):
        images[colour, colour] = 1
    plot_samples(tmp_path / "s.png", images)
    plot_reconstructions(tmp_path / "r.png", images, images[[1, 2, 0]])
    for name in ("s.png", "r.png"):
        pixels = imread(tmp_path / name)[..., :3].reshape(-1, 3)
        areas = [int((np.abs(pixels - colour) < 0.01).all(1).sum()) for colour in np.eye(3)]
        assert min(areas) > 1000 and max(areas) - min(areas) < 0.1 * max(areas)
        assert (pixels[0] == 1).all() and not (pixels == 0).all(1).any(), "gaps are white"


def test_a_reconstruction_is_below_its_original(tmp_path: Path) -> None:
    black, white = np.ones((4, 8, 8)), np.zeros((4, 8, 8))
    plot_reconstructions(tmp_path / "r.png", black, white)
    sheet = imread(tmp_path / "r.png")[..., 0]
    rows = sheet[60:].min(axis=1)  # below the title
    dark = np.flatnonzero(rows < 0.1)
    light = np.flatnonzero((rows > 0.85) & (rows < 0.97))
    assert len(dark) > 20
    assert len(light) > 20
    assert dark.max() < light.max()


@pytest.mark.parametrize(
    "images", [IMAGES - 1, IMAGES * 2, IMAGES * np.nan, IMAGES[:0], np.zeros((4, 2, 8, 8))],
    ids=["negative", "above 1", "NaN", "none", "two channels"],
)  # fmt: skip
def test_arrays_that_are_no_images_are_refused_and_no_file_is_made(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^images must"):
        plot_samples(tmp_path / "a.png", images)
    # By the shape checks of these tests, or by the function itself.
    with pytest.raises((ValueError, TypeError), match="reconstructions"):
        plot_reconstructions(tmp_path / "a.png", IMAGES, IMAGES[:-1])
    assert list(tmp_path.iterdir()) == []


def test_curves_may_be_short_long_or_missing(tmp_path: Path) -> None:
    long = [(i / 2, -100.0 - 200 / (i + 1)) for i in range(6560)]
    plot_training(tmp_path / "long.png", {"train": long, "validation": []})
    plot_training(tmp_path / "one.png", {"train": [(1.0, -100.0)]})
    plot_training(tmp_path / "none.png", {})
    plot_bounds(tmp_path / "k1.png", {"test": {"1": -100.0}})
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_an_svg_has_its_curves_and_no_colour_of_its_own() -> None:
    curves = [Curve(f"cell {i} <b>", [(1.0, -90.0 - i), (50.0, -84.0 - i)], i) for i in range(10)]
    text = svg(k_figure(curves, "nats"), curves, "Bounds")
    assert text == svg(k_figure(curves, "nats"), curves, "Bounds")
    assert sorted(re.findall(r'class="line (c\d)"', text)) == [f"c{i}" for i in range(10)]
    assert "#" not in re.sub(r"url\(#\w+\)|href=\"#\w+\"", "", text), "colours are those of the page"
    assert "cell 3 &lt;b&gt;: -93.00 at 1; -87.00 at 50" in text
    long = [Curve("long", [(i / 2, -100.0 - 200 / i) for i in range(1, 6560)], 0)]
    assert len(svg(training_figure(long, "nats"), long, "Training")) < 20_000


@pytest.mark.parametrize("sign", [1, -1], ids=["far below", "far above"])
def test_first_passes_far_away_squeeze_nothing_and_no_curve_is_lost(sign: int) -> None:
    """A fall of the first passes by thousands; KL of two layers; a seed whose band is wide; a run of four passes."""
    steep = [(x, sign * (-100.0 - 9000.0 * 0.1**x)) for x in range(1, 14)]
    flat = [(x, sign * -95.0) for x in range(1, 14)]
    band = [(y - 1.0, y + 1.0) for _, y in steep]
    curves = [Curve("steep", steep, 0, band), Curve("flat", flat, 1), Curve("four", steep[:4], 2)]
    (axes,) = training_figure(curves, "nats").axes
    low, high = axes.get_ylim()
    # What follows the first quarter of the passes lies between 95 and 102.
    assert 5 < abs(sign * -100 - (low if sign > 0 else high)) < 8 and high - low < 15
    for curve in curves:
        assert any(low < y < high for _, y in curve.points), curve.name
    text = svg(axes.figure, curves, "Steep")
    (clip,) = re.findall(r'<clipPath id="(\w+)">', text)
    groups = re.findall(r'<g class="line c\d">.*?</g>', text, re.DOTALL)
    assert len(groups) == 4 and all(f"url(#{clip})" in group for group in groups), "with the band; all end at the axis"


def test_a_quarter_of_a_logarithmic_axis_is_few_of_the_passes() -> None:
    curve = Curve("ess", [(x, 3.0 - 1 / x) for x in range(1, 201)], 0)
    (axes,) = training_figure([curve], "draws").axes
    # 200^(1/4) is 3.8: the rest begins at 2.75, and half of its height is below it.
    assert axes.get_xscale() == "log" and 2.55 < axes.get_ylim()[0] < 2.65


def test_a_short_run_is_shown_whole() -> None:
    (axes,) = training_figure([Curve("smoke", [(1, -200.0), (2, -30.0), (3, -28.0)], 0)], "nats").axes
    assert axes.get_ylim()[0] < -200


def test_real_values_and_means_outside_of_the_data_are_drawn() -> None:
    observed = torch.tensor([[-3.0, 0.0, 5.0]])
    of = {"protocol": "", "image_shape": (3,)}
    real = Data("real", train=observed, validation=observed, test=observed, levels=None, binarization="none", **of)
    assert real.pictured(observed) == pytest.approx(np.array([[0.0, 0.375, 1.0]]))
    assert (real.pictured(observed * 9).min(), real.pictured(observed * 9).max()) == (0, 1)
    grey = torch.tensor([[0, 3, 12]], dtype=torch.uint8)
    split = {"train": grey, "validation": grey, "test": grey, "levels": 17, **of}
    assert Data("grey", binarization="none", **split).pictured(grey).tolist() == [[0, 3 / 16, 12 / 16]]
    bits = Data("bits", binarization="dynamic", **split)
    assert bits.pictured(grey / 36) == pytest.approx(np.array([[0, 3 / 36, 1 / 3]]))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(self)
        save(self, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(
    "validation",
    [[-28.14, -25.98, -25.01, -24.72], [-28.16, -25.97, -24.99, -24.70], [-40.0, -33.0, -31.0, -30.0]],
    ids=["crossing", "the same", "far below"],
)
def test_every_value_of_both_splits_is_written_where_it_can_be_read(
    tmp_path: Path, drawn: list[Figure], validation: list[float]
) -> None:
    test, levels = [-28.16, -25.96, -24.98, -24.71], ("1", "5", "50", "500")
    bounds = {"test": dict(zip(levels, test, strict=True)), "validation": dict(zip(levels, validation, strict=True))}
    plot_bounds(tmp_path / "b.png", bounds)
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["test", "validation"]
    assert "nats" in axes.get_ylabel()
    values = [f"{value:.2f}".replace("-", "\N{MINUS SIGN}") for value in (*test, *validation)]
    assert [text.get_text() for text in axes.texts] == values
    boxes = [text.get_window_extent() for text in axes.texts]
    inside = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not box.overlaps(axes.get_legend().get_window_extent())


def test_the_error_of_the_last_bound_is_a_bar_and_a_number(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_bounds(tmp_path / "b.png", BOUNDS, {"test": 0.75, "validation": None})
    (axes,) = drawn[0].axes
    (bars,) = axes.containers
    ((bar,),) = [segments.get_segments() for segments in bars[2]]
    assert bar.tolist() == [[50.0, -86.75], [50.0, -85.25]]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["test \N{PLUS-MINUS SIGN} 0.75, standard error over images", "validation"]


@pytest.mark.parametrize("error", ["ModuleNotFoundError", "KeyError"])
def test_figures_that_fail_do_not_fail_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("tick")

    if error == "KeyError":
        monkeypatch.setattr(Figure, "savefig", fail)
    else:
        # As if it could not be imported.
        monkeypatch.setitem(sys.modules, "iwae_cli.record.figures", None)
    code, _, err = run(*TINY, f"output_dir={tmp_path}")
    assert code == 0 and "Traceback" not in err
    assert len([line for line in err.splitlines() if "figures" in line and error in line]) == 1
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "status.json")["status"] == "finished"
    assert read_json(folder / "result.json")["reasons"]["figures"].startswith(f"{error}: ")
    assert "Traceback" in (folder / "train.log").read_text()
    if error == "ModuleNotFoundError":
        return
    # The same command does not try again; without result.json it does.
    assert run(*TINY, f"output_dir={tmp_path}")[::2] == (0, "")
    monkeypatch.undo()
    (folder / "result.json").unlink()
    assert run(*TINY, f"output_dir={tmp_path}")[0] == 0
    assert (folder / "figures" / "samples.png").is_file()
    assert "figures" not in read_json(folder / "result.json")["reasons"]
