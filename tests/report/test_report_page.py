from __future__ import annotations

import re
from pathlib import Path

import browser
import numpy as np
import pytest
from report_runs import change, config, values, write

from iwae_cli.cli.report import report
from iwae_cli.record.figures import plot_samples

pytestmark = pytest.mark.usefixtures("drawn_pictures")

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three cells, six runs, one that failed with an error that would like to be a script, one damaged record."""
    place = tmp_path / "outputs"
    for seed in range(2):
        for k, nll in ((1, 86.8), (5, 85.5), (50, 84.8)):
            folder = write(place, config(seed=seed, k=k), values(nll + seed / 10, seed=seed), units=[20 + k % 7])
            plot_samples(folder / "figures" / "samples.png", np.random.default_rng(seed).random((4, 8, 8)))
    (folder / "metrics.jsonl").write_text("no json\n")
    bad = write(place, config(seed=9), values(80.0))
    (bad / "result.json").unlink()
    change(bad / "status.json", status="failed", step=3, error=EVIL)
    return place


def written(runs: Path, *arguments: str) -> Path:
    page = runs.parent / "page.html"
    assert report([str(runs), "--html", str(page), *arguments]) == 0
    return page


def test_a_page_is_one_file_and_the_same_every_time(runs: Path) -> None:
    page = written(runs, "--compare", "objective.k=50", "objective.k=1")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert text.count("<img ") == 6 and text.count("<svg ") == 3
    assert "84.85 <" not in text and "84.85<span" in text, "the mean over two seeds"
    assert "Paired comparison" in text and "A wins 40 images" in text
    assert "not drawn:" in text, "a damaged record is named"
    assert written(runs, "--compare", "objective.k=50", "objective.k=1").read_text(encoding="utf-8") == text


def test_bounds_of_different_k_are_never_in_one_chart(tmp_path: Path) -> None:
    """Nor validation on different data, where a table has both."""
    place = tmp_path / "outputs"
    for seed, k in enumerate((5, 50, 50)):
        write(place, config(seed=seed, validation__k=k), values(85.0))
    write(place, config(), values(100.0), data="omniglot", images="omniglot")
    charts = re.findall(r"<figcaption><b>(Validation[^<]*)</b>.*?</figure>", written(place).read_text())
    assert charts == ["Validation, L_5", "Validation, L_50", "Validation, L_50"], "two of mnist, one of omniglot"
    page = written(place, "--columns", "data").read_text()
    drawn = dict(re.findall(r"<figcaption><b>(Validation[^<]*)</b>.*?<svg(.*?)</svg>", page))
    assert {title: chart.count("<polyline") for title, chart in drawn.items()} == {
        "Validation on mnist, L_5": 1,
        "Validation on mnist, L_50": 2,
        "Validation on omniglot, L_50": 1,
    }


def test_a_page_of_nothing_finished(runs: Path) -> None:
    (bad,) = (path for path in runs.iterdir() if not (path / "result.json").exists())
    page = runs.parent / "empty.html"
    assert report([str(bad), "--html", str(page)]) == 0
    assert "Not in a table" in page.read_text()


def test_pictures_stay_within_bounds(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(path.stat().st_size for path in runs.glob("*/figures/samples.png"))
    monkeypatch.setattr("iwae_cli.report.page.SAMPLES", 3 * size)
    next(runs.glob("*-k1-seed0-*")).joinpath("figures", "samples.png").unlink()
    text = written(runs).read_text()
    names = re.findall(r'alt="Samples of ([^"]*)"', text)
    assert len(names) == 3
    assert "iwae one_layer 5, seed 0" in names and "iwae one_layer 50, seed 0" in names, (
        "every cell before a second seed"
    )
    assert "1 without figures/samples.png; 2 more in their folders" in text


@pytest.mark.skipif(browser.PROGRAM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
class TestInChromium:
    def test_it_loads_alone_and_reads_on_a_phone(self, runs: Path, tmp_path: Path) -> None:
        page = written(runs)
        with browser.Browser(tmp_path / "profile") as shown:
            for width, height, mobile in ((1200, 900, False), (390, 844, True), (320, 568, True)):
                shown.open(page, width, height, mobile)
                assert [url for url in shown.requests if not url.startswith("data:")] == [page.as_uri()]
                assert not shown.errors
                assert shown.run("window.hacked === undefined")
                assert shown.run("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
                # Nothing is squeezed either: a row of any table is a few lines high at most.
                assert shown.run("Math.max(...[...document.querySelectorAll('tr')].map(r => r.offsetHeight))") < 120
                assert shown.run("Math.min(...[...document.querySelectorAll('td')].map(c => parseFloat(getComputedStyle(c).fontSize)))") >= 12  # fmt: skip  # noqa: E501
                assert shown.run("[...document.images].every(i => i.loading === 'lazy' || i.complete)")
            assert EVIL in shown.run("document.querySelector('#left').textContent")

    def test_tables_sort_both_ways_by_number(self, runs: Path, tmp_path: Path) -> None:
        column = "[...document.querySelectorAll('.results tbody tr')].map(r => r.cells[1].textContent)"
        click = "[...document.querySelectorAll('.results th button')].find(b => b.textContent === {!r}).click()"
        with browser.Browser(tmp_path / "profile") as shown:
            shown.open(written(runs))
            assert shown.run(column) == ["1", "5", "50"]
            shown.run(click.format("NLL_5000"))
            assert shown.run(column) == ["50", "5", "1"]
            shown.run(click.format("NLL_5000"))
            assert shown.run(column) == ["1", "5", "50"]
            shown.run(click.format("objective.k"))
            shown.run(click.format("objective.k"))
            assert shown.run(column) == ["50", "5", "1"], "50 after 5"
            assert shown.run("document.querySelectorAll('.results [aria-sort]').length") == 1
            runs_by_nll = "[...document.querySelectorAll('.runs tbody tr')].map(r => Number(r.cells[2].dataset.v))"
            shown.run("[...document.querySelectorAll('.runs th button')][2].click()")
            nlls = shown.run(runs_by_nll)
            assert len(nlls) == 6 and nlls == sorted(nlls)

    def test_the_legend_lights_up_one_cell(self, runs: Path, tmp_path: Path) -> None:
        with browser.Browser(tmp_path / "profile") as shown:
            shown.open(written(runs))
            assert shown.run("document.querySelectorAll('.legend button').length") == 3
            shown.run("document.querySelectorAll('.legend button')[1].click()")
            assert shown.run("[...document.querySelectorAll('.on')].every(e => e.classList.contains('c1'))")
            # The bound, validation and training of two seeds, one of whose records may be damaged, active units.
            assert shown.run("document.querySelectorAll('.on').length") == 6
            shown.run("document.querySelectorAll('.legend button')[1].click()")
            assert shown.run("document.querySelectorAll('.on, .lit').length") == 0
