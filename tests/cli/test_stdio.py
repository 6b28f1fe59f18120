"""Standard streams that are closed, full, narrow or left by their reader: the run still writes its result."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import TINY, read_json, run_folders

from iwae_cli.cli.stdio import forgiving
from iwae_cli.core.progress import Progress

REPORT = "from iwae_cli.cli.report import report as main"
TRAIN = "from iwae_cli.cli.train import train as main"
NO_READER = "(no reader)"


def shell(entry: str, *argv: str, ends: str) -> subprocess.CompletedProcess[str]:
    """The command with redirections as a shell writes them; ``(no reader)`` is a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; {entry}; sys.exit(main())"
    command = ["bash", "-c", f'exec "$0" "$@" {ends.replace(NO_READER, f"&{writing}")}', sys.executable, "-c", code]
    try:
        return subprocess.run([*command, *argv], capture_output=True, text=True, pass_fds=[writing], timeout=120)
    finally:
        os.close(writing)


def test_a_run_whose_streams_fail_is_finished(tmp_path: Path) -> None:
    done = shell(TRAIN, *TINY, f"output_dir={tmp_path}", ends=f"<&- >{NO_READER} 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (folder,) = run_folders(tmp_path)
    assert read_json(folder / "status.json")["status"] == "finished"
    assert read_json(folder / "result.json")["test"]["nll"] > 0
    # With standard error closed, its number must not become that of a file of the run.
    assert "evaluating" not in "".join(path.read_text() for path in folder.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("entry", "argument", "ends", "code"),
    [
        (REPORT, "<run>", f">{NO_READER}", 141),
        (REPORT, "<run>", ">/dev/full 2>&-", 1),
        (REPORT, "--help", ">&-", 0),
        (TRAIN, "--help", ">/dev/full", 1),
    ],
)
def test_output_that_is_all_there_is(tiny_run: Path, entry: str, argument: str, ends: str, code: int) -> None:
    done = shell(entry, argument.replace("<run>", str(tiny_run)), ends=ends)
    assert (done.returncode, done.stdout, bool(done.stderr)) == (code, "", ends == ">/dev/full")
    assert done.stderr.count("\n") <= 1


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


def test_a_sign_that_the_terminal_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    ascii_only = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with forgiving():
        print("± 0.22")
    assert raw.getvalue() == b"? 0.22\n"
