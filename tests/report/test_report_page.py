from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from report_runs import change, config, values, write, write_estimate

from iwae_cli.cli.report import report
from iwae_cli.report.page import _over_seeds

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
COMPARE = ("--compare", "objective.k=50", "objective.k=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cells, six runs, one that failed with an error that contains a script, one damaged record."""
    place = tmp_path_factory.mktemp("page") / "outputs"
    picture = place.parent / "picture.png"
    Figure(figsize=(2, 2)).savefig(picture, format="png")
    for seed in range(2):
        for k, nll in ((1, 86.8), (5, 85.5), (50, 84.8)):
            folder = write(place, config(seed=seed, k=k), values(nll + seed / 10, seed=seed), units=[20 + k % 7])
            (folder / "figures").mkdir()
            (folder / "figures" / "samples.png").write_bytes(picture.read_bytes())
    (folder / "metrics.jsonl").write_text("no json\n")
    bad = write(place, config(seed=9), values(80.0))
    (bad / "result.json").unlink()
    change(bad / "status.json", status="failed", step=3, error=EVIL)
    return place


def written(runs: Path, *arguments: str) -> Path:
    page = runs.parent / "page.html"
    assert report([str(runs), "--html", str(page), *arguments]) == 0
    return page


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    return written(runs, *COMPARE, "--against", "objective.k=1")


def test_a_page_is_one_file_and_the_same_every_time(runs: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert text.count("<img ") == 6 and text.count("<svg ") == 4
    assert "84.850 <" not in text and "84.850<span" in text, "the mean over two seeds"
    assert "Paired comparison" in text and "A wins 40 images" in text
    assert "not drawn:" in text, "a damaged record is named"
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert written(runs, *COMPARE, "--against", "objective.k=1").read_text(encoding="utf-8") == text


def charts(place: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """Return the curves of every chart of a page, with their points in words."""
    found = re.findall(r'<svg [^>]*aria-label="([^"]*)">(.*?)</svg>', written(place, *arguments).read_text(), re.DOTALL)
    texts = {title: re.findall(r"<title>(.*?)</title>", body) for title, body in found}
    return {title: dict(text.partition(": ")[::2] for text in curves) for title, curves in texts.items()}


def test_bounds_of_different_k_are_never_in_one_chart(tmp_path: Path) -> None:
    """Nor validation on different data, where a table has both."""
    place = tmp_path / "o"
    for seed, k in enumerate((5, 50, 50)):
        write(place, config(seed=seed, validation__k=k), values(85.0))
    write(place, config(), values(100.0), data="omniglot", images="omniglot")
    two = {title: len(curves) for title, curves in charts(place, "--rows=model", "--columns=objective").items()}
    # One curve for the seeds of a cell.
    assert {title: n for title, n in two.items() if title.startswith(("Val", "Train"))} == {
        **{"Validation, L_5, table 1": 1, "Validation, L_50, table 1": 1, "Training, table 1": 1},
        **{"Validation, L_50, table 2": 1, "Training, table 2": 1},
    }
    one = {title: len(curves) for title, curves in charts(place, "--rows=model", "--columns=data").items()}
    assert {title: n for title, n in one.items() if title.startswith(("Val", "Train"))} == {
        **{"Validation on mnist, L_5, table 1": 1, "Validation on mnist, L_50, table 1": 1},
        **{"Validation on omniglot, L_50, table 1": 1, "Training, table 1": 2},
    }


def test_what_was_measured_in_training_is_drawn(tmp_path: Path) -> None:
    """Of every layer, where a run has it; a bound only where it holds the whole KL; a mean where all seeds have it."""
    place = tmp_path / "o"
    for seed in range(2):
        folder = write(place, config("two_layer", seed=seed), values(85.0), names=("two_layer", "iwae"), units=[30, 8])
    rows: list[dict[str, Any]] = [{"step": s, "pass": s, "train/bound": -90.0} for s in range(1, 5)]
    rows[0] |= {"train/kl/1": 21.0, "train/kl/2": 2.0, "train/kl_weight": 0.5}
    rows[1] |= {"train/kl/1": 22.0, "train/kl/2": 2.0, "train/kl_weight": 1}
    rows[2] |= {"train/gradient_norm/q": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = charts(place, "--rows=model", "--columns=objective")
    (kl,) = [curves for title, curves in found.items() if title.startswith("KL")]
    assert list(kl.values()) == ["21.00 at 1; 22.00 at 2", "2.00 at 1; 2.00 at 2"]
    # The other seed has -100 + x at pass x.
    (training,) = found["Training, table 1"].values()
    assert training == "-94.00 at 2; -93.50 at 3; -93.00 at 4"
    text = (tmp_path / "page.html").read_text()
    assert "solid: 1; dashed: 2" in text and text.count("<svg ") == 5
    assert re.findall(r'class="what">[^<]*(h_\d)</span>.*<span>([\d of]*)</span>', text) == [
        ("h_1", "30 of 100"),
        ("h_2", "8 of 50"),
    ]


def test_seeds_with_other_passes_have_a_mean_where_all_have_a_point() -> None:
    seeds = [{1: 1.0, 2: 3.0, 3: None, 4: math.nan}, {2: 5.0, 3: 9.0}, {}]
    assert _over_seeds("a", seeds, 0)[1::2] == ([(2.0, 4.0)], [(3.0, 5.0)])
    apart = _over_seeds("a", [{1: 1.0}, {2: 5.0}], 0)
    assert apart.points == [(1.0, 1.0), (2.0, 5.0)], "no curve is dropped"


def test_the_head_says_what_made_the_page_and_legends_name_what_differs(runs: Path, page: Path) -> None:
    text = html.unescape(page.read_text(encoding="utf-8"))
    head = text[: text.index("<section")]
    assert f"iwae-report {runs} --html {page} --compare objective.k=50 objective.k=1 --against objective.k=1" in head
    assert time.strftime("%Y-%m-%d") in head and "6 runs evaluated by iwae-cli of an unknown version" in head
    assert ">binarized</p>" in text, "the sentence about the data"
    legend = re.findall(r'aria-pressed="false">([^<]*)<', text)
    assert legend == ["objective.k=1", "objective.k=5", "objective.k=50"], "model and objective are the same"
    assert "Means of p(x|h)" in text and ">Samples<" not in text


def test_the_versions_and_commits_of_the_runs_are_named(tmp_path: Path) -> None:
    for seed in range(3):
        git = {"commit": "0123abcd", "changed": seed == 2}
        change(
            write(tmp_path / "o", config(seed=seed), values(85.0)) / "result.json", versions={"iwae-cli": "9"}, git=git
        )
    text = written(tmp_path / "o").read_text()
    assert "2 runs evaluated by iwae-cli 9, commit 0123abcd; 1 run evaluated by iwae-cli 9, commit 0123abcd wi" in text


def test_the_forest_plot_has_the_intervals_of_the_paired_differences(tmp_path: Path) -> None:
    """Three seeds on each side; t of two degrees of freedom from a table."""
    rng = np.random.default_rng(0)
    log_px = {k: [rng.normal(nll, 1, 40) for _ in range(3)] for k, nll in ((1, -86.0), (50, -85.0), (5, -85.5))}
    for k, seeds in log_px.items():
        for seed, values_of in enumerate(seeds):
            write(tmp_path / "o", config(seed=seed, k=k), values_of)
    text = written(tmp_path / "o", "--against", "objective.k=1").read_text(encoding="utf-8")
    (forest,) = re.findall(r"<b>Difference from objective.k=1</b>.*?aria-hidden", text, re.DOTALL)
    assert text.index("<b>Difference from") < text.index("<table"), "on top"
    rows = re.findall(r'class="what">(.*?)</span>(.*?)</div>', forest, re.DOTALL)
    assert [name for name, _ in rows] == ["objective.k=5", "objective.k=50"]
    places = []
    for k, (_, row) in zip((5, 50), rows, strict=True):
        a, b = np.array(log_px[k]), np.array(log_px[1])
        gain = a.mean(0) - b.mean(0)
        images = 1.96 * gain.std(ddof=1) / 40**0.5
        seeds = 4.303 * (a.mean(1).var(ddof=1) / 3 + b.mean(1).var(ddof=1) / 3) ** 0.5
        (thin, thin_width), (thick, thick_width) = re.findall(r"<i.*?left:([\d.]+)%;width:([\d.]+)%", row)
        (point,), (zero,) = re.findall(r'<b style="left:([\d.]+)', row), re.findall(r'<u style="left:([\d.]+)', row)
        scale = (float(point) - float(zero)) / gain.mean()  # percent of a nat
        assert float(thick_width) / scale == pytest.approx(2 * images, rel=0.01)
        assert float(thin_width) / scale == pytest.approx(2 * seeds, rel=0.01)
        assert float(thin) + float(thin_width) / 2 == pytest.approx(float(point), abs=0.02)
        assert float(thick) + float(thick_width) / 2 == pytest.approx(float(point), abs=0.02)
        places.append((zero, scale))
    assert places[0][0] == places[1][0] and places[0][1] == pytest.approx(places[1][1], rel=0.01), "one axis"


def test_a_forest_plot_is_by_refined_values_where_the_report_is(tmp_path: Path) -> None:
    for k, nll in ((1, 86.0), (50, 85.0)):
        write(tmp_path / "o", config(k=k), values(nll), refined=values(nll - 1.5 * (k == 1), seed=1))
    text = written(tmp_path / "o", "--against", "objective.k=1", *COMPARE).read_text(encoding="utf-8")
    assert "by the refined proposals; on the right" in text and "-0.500 ± 0.000" in text and "+1.000" not in text
    assert "<i" in text and text.index('id="compared"') < text.index('id="t0"'), "on top"


def test_other_estimators_have_their_pictures(tmp_path: Path) -> None:
    place = tmp_path / "o"
    folder = write(place, config(), values(85.0))
    snr = {
        n: {str(k): {"per_parameter": y * k**p} for k in (2, 8)}
        for n, y, p in (("inference", 1, -1), ("generative", 2, 1))
    }
    rows = [["k", f"gradient_snr.{n}.{k}.per_parameter", "{:.3f}"] for n in snr for k in (2, 8)]
    write_estimate(folder, "gradient_snr", {"gradient_snr": snr}, rows)
    bounds = {"bounds": {"1": -88.0, "50": -85.0}, "upper_bounds": {"1": -80.0, "50": -84.0}, "exact": -84.0}
    bounds["stderr_gap"] = 0.1
    write_estimate(folder, "sandwich", {"simulated": bounds}, [
        *(["x", f"simulated.{side}.{k}", "{:.2f}"] for side in ("bounds", "upper_bounds") for k in (1, 50)),
        *([key, f"simulated.{key}", "{:.2f}"] for key in ("exact", "stderr_gap")),
    ])  # fmt: skip
    gap = {"approximation_gap": 1.0, "approximation_gap_stderr_images": 0.1}
    write_estimate(folder, "gaps", {"test": gap}, [["x", f"test.{key}", "{:.2f}"] for key in gap])
    Figure(figsize=(2, 2)).savefig(folder / "evaluations" / "gaps-last-01234567" / "posteriors.png", format="png")
    text = written(place).read_text(encoding="utf-8")
    assert "<b>Gradient signal-to-noise</b>" in text
    assert "inference, gradient_snr-last-01234567: 0.50 at 2; 0.12 at 8<" in text
    assert "generative, gradient_snr-last-01234567: 4.00 at 2; 16.00 at 8<" in text
    assert "L_1 to U_1" in text and "-85.00 to -84.00" in text and "test.approximation_gap</span>" in text
    assert 'alt="gaps-last-01234567 of posteriors.png"' in text
    # -88 to -80 with 3% on either side: the exact value is in the middle.
    assert 'style="left:50.00%"></u>' in text and "left:2.83%;width:94.34%" in text


def test_hostile_metrics_are_no_traceback(tmp_path: Path) -> None:
    folder = write(tmp_path / "o", config(), values(85.0))
    row = {"step": 1, "pass": 1, "train/bound": "high", "train/kl/1": None, "train/ess": [1]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    np.savez(folder / "log_likelihood.npz", log_px=values(85.0))
    assert "effective sample sizes of" in written(tmp_path / "o").read_text()


def test_pictures_stay_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = b"\x89PNG" + bytes(96)
    for seed, k in ((0, 1), (0, 5), (1, 5), (0, 50), (1, 50)):
        folder = write(tmp_path / "outputs", config(seed=seed, k=k), values(85.0))
        (folder / "figures").mkdir()
        for name in ("samples", "reconstructions"):
            (folder / "figures" / f"{name}.png").write_bytes(picture)
    next((tmp_path / "outputs").glob("*-k1-seed0-*")).joinpath("figures", "samples.png").unlink()
    monkeypatch.setattr("iwae_cli.report.page.PICTURES", 5 * len(picture))
    text = written(tmp_path / "outputs").read_text()
    samples, others = (re.findall(rf'alt="{name}[^"]* of ([^"]*)"', text) for name in ("Means", "Test images"))
    assert samples[:2] == ["objective.k=5, seed 0; NLL 85.00", "objective.k=50, seed 0; NLL 85.00"], (
        "every cell before a second seed"
    )
    assert len(samples) == 4 and others == ["objective.k=1, seed 0; NLL 85.00"]
    assert "1 without figures/samples.png" in text and "4 more in their folders" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHECKS = """
<pre id="found"></pre>
<script>
const find = (page, query) => [...page.querySelectorAll(query)];
function layout(page, window) {
  return {
    requests: window.performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    hacked: window.hacked !== undefined,
    sticks_out: page.documentElement.scrollWidth - window.innerWidth,
    row: Math.max(...find(page, "tr").map(r => r.offsetHeight)),
    font: Math.min(...find(page, "td").map(c => parseFloat(window.getComputedStyle(c).fontSize))),
    left: page.querySelector("#left").textContent,
    scrolled: find(page, ".scroll").map(b => [b.scrollWidth > b.clientWidth, !b.nextElementSibling.hidden]),
    zeros: new Set(find(page, "#t0 .track u").map(u => Math.round(u.getBoundingClientRect().left))).size,
    clipped: find(page, "svg").every(s => find(s, ".line").every(l => l.innerHTML.includes("clip-path"))),
  };
}
function behaviour(page) {
  const click = (query, text) => find(page, query).find(b => b.textContent === text || text === undefined).click();
  const column = () => find(page, ".results tbody tr").map(r => r.cells[1].textContent).join(" ");
  const found = {columns: [column()]};
  for (const name of ["NLL_5000", "NLL_5000", "objective.k", "objective.k"]) {
    click(".results th button", name);
    found.columns.push(column());
  }
  found.sorted = find(page, ".results [aria-sort]").length;
  find(page, ".runs th button")[2].click();
  found.nlls = find(page, ".runs tbody tr").map(r => Number(r.cells[2].dataset.v));
  const legend = find(page, ".legend button");
  legend[1].click();
  found.on = find(page, ".on").map(e => e.classList.contains("c1"));
  legend[1].click();
  found.off = find(page, ".on, .lit").length;
  const picture = page.querySelector(".pictures img"), width = () => picture.getBoundingClientRect().width;
  found.widths = [width()];
  picture.click();
  found.widths.push(width());
  page.defaultView.dispatchEvent(new page.defaultView.KeyboardEvent("keydown", {key: "Escape"}));
  found.widths.push(width());
  return found;
}
window.onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    found[frame.width] = layout(frame.contentDocument, frame.contentWindow);
  }
  found.behaviour = behaviour(document.querySelector("iframe").contentDocument);
  document.querySelector("#found").textContent = JSON.stringify(found);
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
def test_it_loads_alone_reads_on_a_phone_sorts_and_highlights(page: Path, tmp_path: Path) -> None:
    """In frames of three widths of one page, whose script looks at them."""
    text = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{text}"></iframe>' for width in (1200, 390, 320))
    (tmp_path / "frames.html").write_text(f'<meta charset="utf-8">{frames}{CHECKS}', encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    dumped = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert dumped, done.stderr
    found = json.loads(html.unescape(dumped[1]))
    for width in ("1200", "390", "320"):
        layout = found[width]
        assert layout["requests"] == [] and not layout["hacked"] and EVIL in layout["left"]
        assert all(hidden == said for hidden, said in layout["scrolled"]), "what a frame hides is said below it"
        assert any(hidden for hidden, _ in layout["scrolled"]) == (width != "1200"), "all fits on a screen"
        assert layout["zeros"] == 1 and layout["clipped"]
        assert layout["sticks_out"] <= 0 and layout["row"] < 120 and layout["font"] >= 12, width
    behaviour = found["behaviour"]
    assert behaviour["columns"] == ["1 5 50", "50 5 1", "1 5 50", "1 5 50", "50 5 1"], "50 after 5"
    assert behaviour["sorted"] == 1
    assert len(behaviour["nlls"]) == 6 and behaviour["nlls"] == sorted(behaviour["nlls"])
    small, large, again = behaviour["widths"]
    assert small == again < 300 and large > 1100, "a click enlarges, Escape ends that"
    # The bound, validation and training with their bands, effective sample sizes, the difference, active units.
    assert len(behaviour["on"]) == 9 and all(behaviour["on"]) and behaviour["off"] == 0
