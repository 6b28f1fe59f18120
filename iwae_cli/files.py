"""Files written whole or not at all, and the lock that keeps two processes off one run."""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from iwae_cli.errors import RunLocked, UserError

TEMPORARY = ".tmp-"
"""How the name of an unfinished file begins; such a file may be removed by whoever holds the lock of its folder."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to instead of ``path``; what lies there at the end takes the place of ``path`` in one step.

    It is in the same folder (made if need be) and ends with the same name, so that writers that look at or add a
    suffix (``torch.save``, ``np.savez``) do the same as ever. After a crash, at any moment, ``path`` is the old file
    or the new one. If the block raises, the old file stays and the temporary one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Without this a power cut may bring the old name back although the new bytes are on the disk.
    _sync(path.parent, os.O_RDONLY)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically.

    Raises:
        ValueError: a number is NaN or infinite, or something is no plain JSON value; the message names its key.
    """
    write_text(path, dump_json(value, Path(path).name, indent=2) + "\n")


def dump_json(value: Any, name: str, indent: int | None = None) -> str:
    """``value`` as standard JSON, which knows neither NaN nor Infinity; ``name`` is for the error message.

    Raises:
        ValueError: as for ``write_json``.
    """
    for key, leaf in _leaves(value, ""):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{name}: {key} must be finite or null, got {leaf}")
        if leaf is not None and not isinstance(leaf, (str, int, float)):
            raise ValueError(f"{name}: {key} must be a plain JSON value, got {type(leaf).__name__}")
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


class RunLock:
    """Held while a process works on a run folder; given up when the block ends or the process dies in any way.

    A lock of the kernel's on ``<folder>/.lock``, so kill -9 leaves nothing stale. Child processes do not keep it
    alive: those that execute another program lose the descriptor then (close-on-exec), forked ones at the fork.

    Args:
        folder: the run folder; exists.

    Raises:
        RunLocked: on entering, another process (or another lock in this one) has it; the message says who.
        UserError: on entering, the file system has no locks.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        path = self._folder / ".lock"
        while True:
            descriptor = self._locked(path)
            # While this waited at the door, the folder may have been renamed: then the lock is on what it was.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)
        for leftover in self._folder.rglob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        return self

    def _locked(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise RunLocked(
                f"{self._folder} is being worked on by {holder}; wait until it ends, or choose another output_dir="
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{self._folder} cannot be locked ({error.strerror}); choose a folder on a local disk with output_dir="
            ) from None
        return descriptor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A forked child that leaves the block finds its copy closed already, and must not close a reused number.
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


_held: set[int] = set()


def _let_go_after_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its dotted key."""
    if isinstance(value, Mapping):
        children = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(i), child) for i, child in enumerate(value)]
    else:
        yield key or "the value", value
        return
    for name, child in children:
        yield from _leaves(child, f"{key}.{name}" if key else name)
