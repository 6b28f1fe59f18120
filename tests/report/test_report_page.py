from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import browser
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
    assert "84.85 <" not in text and "84.85<span" in text, "the mean over two seeds"
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


def test_a_page_of_nothing_finished(runs: Path, tmp_path: Path) -> None:
    (bad,) = (path for path in runs.iterdir() if not (path / "result.json").exists())
    assert report([str(bad), "--html", str(tmp_path / "empty.html")]) == 0
    assert "Not in a table" in (tmp_path / "empty.html").read_text()


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


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_it_loads_alone_and_reads_on_a_phone(shown: browser.Browser, page: Path) -> None:
    for width, height, mobile in ((1200, 900, False), (390, 844, True), (320, 568, True)):
        shown.open(page, width, height, mobile)
        assert [url for url in shown.requests if not url.startswith("data:")] == [page.as_uri()]
        assert not shown.errors
        assert shown.run("window.hacked === undefined")
        assert shown.run("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
        # Nothing is squeezed either: a row of any table is a few lines high at most.
        assert shown.run("Math.max(...[...document.querySelectorAll('tr')].map(r => r.offsetHeight))") < 120
        sizes = "[...document.querySelectorAll('td')].map(c => parseFloat(getComputedStyle(c).fontSize))"
        assert shown.run(f"Math.min(...{sizes})") >= 12
        assert shown.run("[...document.images].every(i => i.loading === 'lazy' || i.complete)")
    assert EVIL in shown.run("document.querySelector('#left').textContent")


def test_tables_sort_both_ways_by_number(shown: browser.Browser, page: Path) -> None:
    column = "[...document.querySelectorAll('.results tbody tr')].map(r => r.cells[1].textContent)"
    click = "[...document.querySelectorAll('.results th button')].find(b => b.textContent === {!r}).click()"
    shown.open(page)
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


def test_the_legend_highlights_one_cell(shown: browser.Browser, page: Path) -> None:
    shown.open(page)
    assert shown.run("document.querySelectorAll('.legend button').length") == 3
    shown.run("document.querySelectorAll('.legend button')[1].click()")
    assert shown.run("[...document.querySelectorAll('.on')].every(e => e.classList.contains('c1'))")
    # The bound, validation and training of two seeds, active units.
    assert shown.run("document.querySelectorAll('.on').length") == 6
    shown.run("document.querySelectorAll('.legend button')[1].click()")
    assert shown.run("document.querySelectorAll('.on, .lit').length") == 0
