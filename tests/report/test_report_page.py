from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from report_runs import change, config, values, write

from iwae_cli.cli.report import report
from iwae_cli.report.cells import tables
from iwae_cli.report.page import _training
from iwae_cli.report.reader import read
from iwae_cli.report.selection import comparable

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
    return written(runs, *COMPARE)


def test_a_page_is_one_file_and_the_same_every_time(runs: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert text.count("<img ") == 6 and text.count("<svg ") == 3
    assert "84.850 <" not in text and "84.850<span" in text, "the mean over two seeds"
    assert "Paired comparison" in text and "A wins 40 images" in text
    assert "not drawn:" in text, "a damaged record is named"
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert written(runs, *COMPARE).read_text(encoding="utf-8") == text


def test_bounds_of_different_k_are_never_in_one_chart(tmp_path: Path) -> None:
    """Nor validation on different data, where a table has both."""
    for seed, k in enumerate((5, 50, 50)):
        write(tmp_path, config(seed=seed, validation__k=k), values(85.0))
    write(tmp_path, config(), values(100.0), data="omniglot", images="omniglot")

    def charts(columns: list[str]) -> list[dict[str, int]]:
        made = tables(comparable(read([tmp_path]).runs, "test")[0], ["model"], columns)
        return [{title: len(curves) for title, _, curves in _training(table.cells, [])} for table in made]

    mnist, omniglot = charts(["objective"])
    assert mnist == {"Validation, L_5": 1, "Validation, L_50": 2, "Training": 3}
    assert omniglot == {"Validation, L_50": 1, "Training": 1}
    (both,) = charts(["data"])
    assert both == {
        "Validation on mnist, L_5": 1,
        "Validation on mnist, L_50": 2,
        "Validation on omniglot, L_50": 1,
        "Training": 4,
    }


def test_the_diagnostics_of_every_layer_and_network_are_drawn(tmp_path: Path) -> None:
    """Where a run has them: one of an earlier version has none."""
    place = tmp_path / "outputs"
    for seed in range(2):
        folder = write(place, config("two_layer", seed=seed), values(85.0), names=("two_layer", "iwae"))
    rows = [{"step": s, "pass": s, "train/bound": -90.0, "train/kl/1": 20.0 + s, "train/kl/2": 2.0} for s in (1, 2)]
    rows.append({"step": 3, "pass": 3, "train/bound": -90.0, "train/gradient_norm/q": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made,) = tables(comparable(read([place]).runs, "test")[0], ["model"], [])
    charts = {title: curves for title, _, curves in _training(made.cells, [])}
    assert set(charts) == {"Validation, L_50", "Training", "KL of every layer"}
    kl = charts["KL of every layer"]
    assert [curve.name for curve in kl] == ["two_layer, seed 1, kl/1", "two_layer, seed 1, kl/2"]
    assert kl[0].points == [(1.0, 21.0), (2.0, 22.0)] and len(charts["Training"]) == 2
    assert written(place).read_text().count("<svg ") == 4, "with the bound against k"


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
    samples, others = (re.findall(rf'alt="{name} of ([^"]*)"', text) for name in ("Samples", "Reconstructions"))
    assert samples[:2] == ["iwae one_layer 5, seed 0", "iwae one_layer 50, seed 0"], "every cell before a second seed"
    assert len(samples) == 4 and others == ["iwae one_layer 1, seed 0"]
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
        assert layout["sticks_out"] <= 0 and layout["row"] < 120 and layout["font"] >= 12, width
    behaviour = found["behaviour"]
    assert behaviour["columns"] == ["1 5 50", "50 5 1", "1 5 50", "1 5 50", "50 5 1"], "50 after 5"
    assert behaviour["sorted"] == 1
    assert len(behaviour["nlls"]) == 6 and behaviour["nlls"] == sorted(behaviour["nlls"])
    # The bound, validation and training of two seeds, active units.
    assert len(behaviour["on"]) == 6 and all(behaviour["on"]) and behaviour["off"] == 0
