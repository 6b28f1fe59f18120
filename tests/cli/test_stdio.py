"""Standard streams that are closed, full, narrow or left by their reader: the run still writes its result."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, finished, read_json, run_folders

from iwae_cli.cli.stdio import Forgiving, exit_code, forgiving
from iwae_cli.core.progress import Progress

REPORT = "from iwae_cli.cli.report import report as main"
TRAIN = "from iwae_cli.cli.train import train as main"
NO_READER = "(no reader)"


def shell(entry: str, *argv: str, ends: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with redirections as a shell writes them; ``(no reader)`` is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    ends = ends.replace(NO_READER, f"&{writing}")
    command = ["bash", "-c", f'exec "$0" "$@" {ends}', sys.executable, "-c", f"import sys; {entry}; sys.exit(main())"]
    try:
        return subprocess.run(
            [*command, *argv],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            pass_fds=[writing],
            timeout=120,
        )
    finally:
        os.close(writing)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("runs"), *TINY)


@pytest.mark.parametrize("ends", ["<&- >&- 2>&-", f">{NO_READER} 2>{NO_READER}"])
def test_a_run_whose_streams_fail_is_finished(ends: str, tmp_path: Path) -> None:
    done = shell(TRAIN, *TINY, f"output_dir={tmp_path}", ends=ends)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "status.json")["status"] == "finished"
    assert read_json(folder / "result.json")["test"]["nll"] > 0
    # With standard error closed, its number must not become that of a file of the run.
    assert "evaluating" not in "".join(path.read_text() for path in folder.glob("*.jsonl"))


def test_what_of_a_finished_run_cannot_be_shown_is_said_in_a_line(run_folder: Path) -> None:
    again = [*TINY, f"output_dir={run_folder.parent}"]
    full = shell(TRAIN, *again, ends=">/dev/full")
    assert (full.returncode, full.stderr) == (
        0,
        "iwae-train: standard output cannot be written: No space left on device\n",
    )
    narrow = shell(TRAIN, *again, ends="", PYTHONIOENCODING="ascii")
    assert (narrow.returncode, narrow.stderr) == (0, "")
    assert re.search(r"stderr_images +\? 0\.", narrow.stdout)


@pytest.mark.parametrize(
    ("command", "ends", "code", "message"),
    [
        ("iwae-report", f">{NO_READER}", 141, ""),
        ("iwae-report", ">/dev/full 2>&-", 1, ""),
        ("iwae-report --help", ">&-", 0, ""),
        ("iwae-train --help", ">/dev/full", 1, ": standard output cannot be written: No space left on device\n"),
        ("iwae-train --cfg job", f">{NO_READER}", 141, ""),
    ],
)
def test_output_that_is_all_there_is(run_folder: Path, command: str, ends: str, code: int, message: str) -> None:
    program, *argv = command.split()
    entry = TRAIN if program == "iwae-train" else REPORT
    done = shell(entry, *argv or [str(run_folder)], ends=ends)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message and program + message)


class Full(io.StringIO):
    """A file on a disk that fills up."""

    tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        if "too much" in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_after_an_error_there_is_silence_and_no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full()
    monkeypatch.setattr(sys, "stderr", full)
    with forgiving():
        print("a line", file=sys.stderr)
        tried = full.tried
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", logging.WARNING, "", 1, "too much", None, None))
        with Progress("training", total=1) as shown:
            shown.update(1)
        print("more", file=sys.stderr)
    assert sys.stderr is full
    assert full.getvalue() == "a line\n"
    assert full.tried == tried + 1


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError(), 141), (OSError(errno.EIO, "gone"), 1), (None, 0)])
def test_only_output_that_is_needed_decides_how_a_command_ends(error: OSError | None, code: int) -> None:
    out = Forgiving(io.StringIO())
    out.lost = error
    assert exit_code("x", out, needed=True) == code
    assert exit_code("x", out, needed=False) == 0


def test_a_sign_that_the_terminal_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with forgiving():
        print("± 0.22")
    assert raw.getvalue() == b"? 0.22\n"
