from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iwae_cli.core.errors import RunLocked
from iwae_cli.core.files import RunLock, atomic_path, write_bytes, write_json, write_text


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that has said its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def retry(attempt: Callable[[], None]) -> None:
    """A forked process lets go of the lock in its first instants, which may come after the parent's next ones."""
    stop = time.monotonic() + 5
    while time.monotonic() < stop:
        with contextlib.suppress(RunLocked):
            return attempt()
        time.sleep(0.01)
    attempt()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_and_replaced_and_leave_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for _ in range(2):
        write_text(tmp_path / "deep" / "a.txt", "nächste\n")
        write_bytes(tmp_path / "deep" / "b", b"\0\1")
        write_json(tmp_path / "deep" / "c.json", {"a": [1, 2.5, None, True, "x"]})
    assert names(tmp_path / "deep") == ["a.txt", "b", "c.json"]
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "nächste\n"
    assert (tmp_path / "deep" / "b").read_bytes() == b"\0\1"
    assert json.loads((tmp_path / "deep" / "c.json").read_text()) == {"a": [1, 2.5, None, True, "x"]}


def test_a_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "gone" / "a", "text")
    assert names(tmp_path) == []


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    write_text(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_json_does_not_know_and_names_the_key(tmp_path: Path, bad: float) -> None:
    write_json(tmp_path / "r.json", {"old": 1})
    with pytest.raises(ValueError, match=r"^r\.json: test\.bounds\.50 must be finite or null, got"):
        write_json(tmp_path / "r.json", {"test": {"bounds": {"5": 1.0, "50": bad}}})
    with pytest.raises(ValueError, match=r"a\.1 must be a plain JSON value, got float32"):
        write_json(tmp_path / "r.json", {"a": [1, np.float32(2)]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["r.json"]


def test_writers_that_add_a_suffix_do_not(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "values.npz") as path:
        assert path.parent == tmp_path
        np.savez(path, a=np.arange(3))
    assert names(tmp_path) == ["values.npz"]
    with np.load(tmp_path / "values.npz") as values:
        assert values["a"].tolist() == [0, 1, 2]


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(tmp_path / "a") as path:
        path.write_text("half")
        raise RuntimeError("disk")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_kill_while_writing_keeps_the_old_file_and_the_next_lock_tidies_up(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    writer = start(
        "import sys, time; from iwae_cli.core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(60)",
        tmp_path / "a",
    )
    end(writer)
    assert (tmp_path / "a").read_text() == "old"
    assert len(names(tmp_path)) == 2, "the writer was not in the middle of it"
    with RunLock(tmp_path):
        pass
    assert names(tmp_path) == [".lock", "a"]


HOLD = """
import sys, time
from iwae_cli.core.files import RunLock
with RunLock(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_told_who_has_the_run_and_a_killed_one_leaves_nothing_stale(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    try:
        message = f"^{tmp_path} is being worked on by process {holder.pid} on "
        with pytest.raises(RunLocked, match=message) as caught:
            RunLock(tmp_path).__enter__()
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 3
    finally:
        end(holder)
    with RunLock(tmp_path), pytest.raises(RunLocked, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize(
    "child",
    [
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False).pid",
        "os.fork() or time.sleep(60)",
    ],
    ids=["exec", "fork"],
)
def test_a_child_process_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path, child: str) -> None:
    holder = start(
        "import os, subprocess, sys, time; from iwae_cli.core.files import RunLock\n"
        "with RunLock(sys.argv[1]):\n"
        f"    pid = {child}\n"
        "    open(sys.argv[2], 'w').write(str(pid)); print('ready', flush=True); time.sleep(60)",
        tmp_path,
        tmp_path / "pid",
    )
    child_pid = int((tmp_path / "pid").read_text())
    holder.kill()
    holder.wait()
    try:
        os.kill(child_pid, 0)  # it lives, or this test shows nothing
        retry(lambda: RunLock(tmp_path).__enter__().__exit__(None, None, None))
    finally:
        os.kill(child_pid, 9)
        holder.communicate()


def leave(lock: RunLock) -> None:
    lock.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_that_leaves_does_not_take_the_lock_from_its_parent(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=leave, args=(lock,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        with pytest.raises(RunLocked):
            RunLock(tmp_path).__enter__()


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [0] * 1000)
    writer = start(
        "import sys; from iwae_cli.core.files import write_json; print('ready', flush=True)\n"
        "for i in range(10**9): write_json(sys.argv[1], [i] * 1000)",
        path,
    )
    try:
        seen = set()
        stop = time.monotonic() + 20
        while len(seen) < 20 and time.monotonic() < stop:
            values = json.loads(path.read_text())
            assert len(values) == 1000
            assert len(set(values)) == 1
            seen.add(values[0])
        assert len(seen) == 20
    finally:
        end(writer)
