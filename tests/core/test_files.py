from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iwae_cli.core.errors import RunLocked, warn_once
from iwae_cli.core.files import RunLock, atomic_path, write_bytes, write_json, write_text


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that has printed ``ready``."""
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
    """A forked process closes the lock as it starts, which may be after the parent's death."""
    stop = time.monotonic() + 5
    while time.monotonic() < stop:
        with contextlib.suppress(RunLocked):
            return attempt()
        time.sleep(0.01)
    attempt()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for _ in range(2):
        write_text(tmp_path / "deep" / "a.txt", "nächste\n")
        write_bytes(tmp_path / "deep" / "b", b"\0\1")
        write_json(tmp_path / "deep" / "c.json", {"a": [1, 2.5, None, True, "x"]})
    (tmp_path / "ordinary").write_text("")
    assert (tmp_path / "deep" / "b").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert names(tmp_path / "deep") == ["a.txt", "b", "c.json"]
    assert (tmp_path / "deep" / "a.txt").read_text(encoding="utf-8") == "nächste\n"
    assert (tmp_path / "deep" / "b").read_bytes() == b"\0\1"
    assert json.loads((tmp_path / "deep" / "c.json").read_text()) == {"a": [1, 2.5, None, True, "x"]}


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"test": {"bounds": {"5": 1.0, "50": math.nan}}}, "test.bounds.50"),
        ({"test": [-math.inf]}, "test.0"),
        ({"a": [1, np.float32(2)]}, "a.1"),
    ],
)
def test_json_errors_name_the_key_and_write_nothing(tmp_path: Path, value: object, key: str) -> None:
    write_json(tmp_path / "r.json", {"old": 1})
    with pytest.raises(ValueError, match=f"^r.json: {key} "):
        write_json(tmp_path / "r.json", value)
    assert json.loads((tmp_path / "r.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["r.json"]


def test_an_error_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(tmp_path / "a") as path:
        path.write_text("half")
        raise RuntimeError("disk")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_bytes_are_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order that survives a power cut."""
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(Path(f"/proc/self/fd/{number}").resolve().name))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_text(tmp_path / "a", "text")
    assert calls[0].endswith("-a") and calls[1:] == ["rename", tmp_path.name]


def test_a_kill_while_writing_keeps_the_old_file_and_the_next_lock_removes_the_new_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    writer = start(
        "import sys, time; from iwae_cli.core.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(60)",
        tmp_path / "a",
    )
    end(writer)
    assert (tmp_path / "a").read_text() == "old"
    assert len(names(tmp_path)) == 2, "killed outside the write"
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


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    try:
        with pytest.raises(RunLocked) as refusal:
            RunLock(tmp_path).__enter__()
        assert str(tmp_path) in str(refusal.value) and str(holder.pid) in str(refusal.value)
        assert refusal.value.exit_code == 3
    finally:
        end(holder)
    with RunLock(tmp_path), pytest.raises(RunLocked):
        RunLock(tmp_path).__enter__()


def test_a_folder_renamed_between_open_and_lock_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process opened the lock file, then ``restart=true`` renamed the folder and created a new one."""
    (tmp_path / "run").mkdir()
    lock, calls = RunLock._locked, 0

    def slow(self: RunLock, path: Path) -> int:
        nonlocal calls
        calls += 1
        descriptor = lock(self, path)
        if calls == 1:
            (tmp_path / "run").rename(tmp_path / "run.old-1")
            (tmp_path / "run").mkdir()
        return descriptor

    monkeypatch.setattr(RunLock, "_locked", slow)
    with RunLock(tmp_path / "run"):
        assert calls == 2 and str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()


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
        os.kill(child_pid, 0)  # the child is alive
        retry(lambda: RunLock(tmp_path).__enter__().__exit__(None, None, None))
    finally:
        os.kill(child_pid, 9)
        holder.communicate()


def leave(lock: RunLock) -> None:
    lock.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_that_exits_keeps_its_parents_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=leave, args=(lock,))
        child.start()
        child.join(20)
        assert child.exitcode == 0
        with pytest.raises(RunLocked):
            RunLock(tmp_path).__enter__()


@pytest.fixture
def odd_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither locks nor a flush of folders, as some network and user-space file systems; files are flushed."""
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("os.fsync", no_folders)
    monkeypatch.setattr("fcntl.flock", no_locks)
    warn_once.cache_clear()


def test_a_file_system_without_locks_and_flush_of_folders_works_with_one_warning_each(
    odd_file_system: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("a", "b"):
        with RunLock(tmp_path):
            write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "b"
    assert ["no locks" in record.getMessage() for record in caplog.records] == [True, False]
    assert "cannot flush a folder (Invalid argument)" in caplog.records[1].getMessage()


def test_a_file_that_cannot_be_flushed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="Invalid argument"):
        write_text(tmp_path / "file", "text")
    assert names(tmp_path) == []
