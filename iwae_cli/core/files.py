"""Files written whole or not at all, and the lock that keeps two processes off one run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from iwae_cli.core.errors import RunLocked, UserError

TEMPORARY = ".tmp-"
"""How the name of an unfinished file begins; such a file may be removed by whoever holds the lock of its folder."""


_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ESTALE)


def trouble(error: OSError, folder: Path) -> str | None:
    """What ``error`` says of ``folder``, which should be read and written; None if it is about something else."""
    if not isinstance(error.filename, str):  # a write or a sync has no name to tell
        return error.strerror if error.errno in _OF_A_DISK else None
    place = Path(re.sub(rf"{re.escape(TEMPORARY)}[0-9a-f]{{8}}-(?=[^/]*$)", "", error.filename))
    if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
        return None
    return f"{error.strerror}: {place}"


@contextmanager
def as_user_error(folder: Path, advice: str) -> Iterator[None]:
    """Errors of the operating system that are about ``folder`` become one line that ends with what to type instead.

    Raises:
        UserError: in place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        words = trouble(error, folder)
        if words is None:
            raise
        raise UserError(f"{folder} cannot be used ({words}); {advice}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A path to write to instead of ``path``; what lies there at the end takes the place of ``path`` in one step.

    It is in the same folder, which must be there: one that somebody has renamed meanwhile is not made again. It ends
    with the same name, so that writers that look at or add a suffix (``np.savez``) do the same as ever. After a crash,
    at any moment, ``path`` is the old file or the new one. If the block raises, the old file stays and the temporary
    one is removed.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what was raised says more
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
        OSError: on entering, the folder cannot be written to, or its file system has no locks.
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
        with suppress(OSError):  # the name is a courtesy, and a full disk has no room for it
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
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
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


def shown(path: Path) -> str:
    """Return ``path`` as a user would type it here: relative to the current folder where it lies inside."""
    path, here = Path(os.path.normpath(path)), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
