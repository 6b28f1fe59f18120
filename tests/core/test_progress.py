"""What ``Progress`` prints on standard error, at a terminal and elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from small_runs import TINY, bits, finished, read_json, run, run_folders

from iwae_cli.core import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress, "monotonic", lambda: self.now)


def errors(monkeypatch: pytest.MonkeyPatch, file: io.StringIO) -> io.StringIO:
    """Replace standard error by ``file``."""
    monkeypatch.setattr(sys, "stderr", file)
    return file


def test_without_a_terminal_there_is_a_plain_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), errors(monkeypatch, io.StringIO())
    with progress.Progress("training", total=10, images_per_unit=1000) as shown:
        for second in range(1, 13):
            clock.now = second
            shown.update(second / 2, bound=-100.0 + second)
    lines = file.getvalue().splitlines()
    assert lines == [
        "training  pass 2.5/10  -95.00 nats  500 images/s  0:15 left",
        "training  pass 5.0/10  -90.00 nats  500 images/s  0:10 left",
        "training  pass 6.0/10  -88.00 nats  500 images/s  0:08 left",
    ]
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_speed_and_time_left_count_from_where_a_resumed_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, file = Clock(monkeypatch), errors(monkeypatch, io.StringIO())
    with progress.Progress("training", total=7300, images_per_unit=1, start=100.0) as shown:
        clock.now = 10.0
        shown.update(120.0)
    with progress.Progress("test, k=5000", total=250, unit="image"):
        pass  # nothing is done, nothing is printed
    assert file.getvalue() == "training  pass 120.0/7,300  2 images/s  59:50 left\n"


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    file = errors(monkeypatch, Terminal())
    with progress.Progress("training", total=4, images_per_unit=1000) as shown:
        shown.update(4, bound=-85.5)
    assert "training" in file.getvalue()
    assert "pass 4/4  -85.50 nats" in file.getvalue()
    assert "images/s" in file.getvalue()
    assert "\r" in file.getvalue()


@pytest.mark.usefixtures("coarse")
def test_a_training_that_lasts_says_how_long_its_evaluation_will_take_and_keeps_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*TINY, "schedule.passes=6", "evaluation.k=500", "evaluation.refine=20", "evaluation.workers=2"]
    plain = finished(tmp_path / "plain", *line)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr("iwae_cli.runs.runner.FORECAST_SECONDS", 0.0)
    code, _, err = run(*line, f"output_dir={tmp_path}")
    assert code == 0
    (folder,) = run_folders(tmp_path)
    assert bits(folder) == bits(plain)
    lines = [text for text in err.splitlines() if text.startswith("training ")]
    found = [re.search(r"then about 0:(\d\d) of evaluation", text) for text in lines]
    assert found[0] is None, "nothing was measured yet"
    took = read_json(folder / "result.json")["seconds"]["evaluate"]
    assert found[-1] and took / 8 - 1 < int(found[-1][1]) < took * 8 + 1, "not exact on a loaded machine"


def test_a_bar_has_the_number_of_its_job_and_a_line_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for file in (io.StringIO(), Terminal()):
        errors(monkeypatch, file)
        with progress.labelled("job 2 (model.latent_sizes=[3])"), progress.Progress("training", total=4) as shown:
            shown.update(4)
        name = "job 2 training" if file.isatty() else "job 2 (model.latent_sizes=[3]): training  pass 4/4"
        assert name in file.getvalue()
    progress.announce("after the job")
    assert file.getvalue().rpartition("\x1b[?25h")[2] == "after the job\n"
