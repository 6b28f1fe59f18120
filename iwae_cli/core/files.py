"""Atomic writes, and the lock that keeps two processes from working on one run."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from iwae_cli.core.errors import RunLocked, UserError, clip, warn_once

TEMPORARY = ".tmp-"
"""Prefix of unfinished files; the holder of a folder's lock removes them."""
EVALUATIONS = "evaluations"
"""Subfolder of a run folder in which ``iwae-eval`` writes without the lock."""
ABANDONED_SECONDS = 24 * 3600
"""Age from which on an unfinished file in ``EVALUATIONS`` is removed: nothing writes one file for so long."""

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What some network and user-space file systems answer to flock, and to fsync of a folder."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ESTALE)


def trouble(error: OSError, folder: Path) -> str | None:
    """Return a description of ``error`` if it concerns reading or writing ``folder``, else None."""
    if not isinstance(error.filename, str):  # write and fsync name no file
        return error.strerror if error.errno in _DISK_ERRORS else None
    place = Path(re.sub(rf"{re.escape(TEMPORARY)}[0-9a-f]{{8}}-(?=[^/]*$)", "", error.filename))
    if not (place.is_relative_to(folder) or folder.is_relative_to(place)):
        return None
    return f"{error.strerror}: {place.relative_to(folder) if place.is_relative_to(folder) else place}"


@contextmanager
def as_user_error(folder: Path, advice: str) -> Iterator[None]:
    """Re-raise OSErrors about ``folder`` as UserError, with ``advice`` at the end of its one line."""
    try:
        yield
    except OSError as error:
        words = trouble(error, folder)
        if words is None:
            raise
        raise UserError(f"{folder} cannot be used ({words}); {advice}") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success fsync it and rename it to ``path``.

    After a crash at any moment ``path`` is the old file or the new one; if the block raises it is the old one. The
    folder must exist. The temporary name ends like ``path``, for writers such as ``np.savez`` that add a suffix.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error matters more
            temporary.unlink(missing_ok=True)
        raise
    # Without this a power cut may undo the rename although the new bytes are on the disk.
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
        ValueError: a number is NaN or infinite, or a value is not a plain JSON value; the message names its key.
    """
    write_text(path, dump_json(value, Path(path).name, indent=2) + "\n")


def dump_json(value: Any, name: str, indent: int | None = None) -> str:
    """Return ``value``, which errors call ``name``, as standard JSON; raise ValueError as ``write_json``."""
    for key, leaf in _leaves(value, ""):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError(f"{name}: {key} must be finite or null, got {leaf}")
        if leaf is not None and not isinstance(leaf, (str, int, float)):
            raise ValueError(f"{name}: {key} must be a plain JSON value, got {type(leaf).__name__}")
    return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


class RunLock:
    """Lock on a run folder for the length of a block; entering it removes leftover temporary files.

    Recent ones in ``EVALUATIONS`` stay, which may be those of an ``iwae-eval`` at work.

    A kernel lock (flock) on ``<folder>/.lock``: it ends with the process, so kill -9 leaves nothing stale. Children do
    not inherit it: the descriptor is closed on exec and after a fork.

    Raises:
        RunLocked: on entering, another process (or another lock in this one) holds it; the message names the holder.
        OSError: on entering, the folder does not exist or cannot be written to, or no lock is left.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        path = self._folder / ".lock"
        while True:
            descriptor = self._locked(path)
            # If the folder was renamed between open and flock, the lock is on the old one: try again.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
            os.close(descriptor)
        with suppress(OSError):  # a full disk has no room for the name, which is only for the message
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor
        _held.add(descriptor)
        for leftover in self._folder.rglob(f"{TEMPORARY}*"):
            with suppress(FileNotFoundError):  # an evaluation that has just finished it
                age = time.time() - leftover.stat().st_mtime
                if self._folder / EVALUATIONS not in leftover.parents or age > ABANDONED_SECONDS:
                    leftover.unlink()
        return self

    def _locked(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        # In a forked child the descriptor is closed already, and its number may have been reused.
        if self._descriptor in _held:
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None


def flock(descriptor: int, operation: int) -> None:
    """Lock an open file as ``fcntl.flock`` does; on a file system without locks do without, with one warning."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        warn_once(f"this file system has no locks ({error.strerror}): do not start the same run twice at a time")


_held: set[int] = set()


def _close_after_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_after_fork)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _UNSUPPORTED:
            raise
        warn_once(f"this file system cannot flush a folder ({error.strerror}): a power cut may undo the last writes")
    finally:
        os.close(descriptor)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every value that is not a container, with its dotted key."""
    if not isinstance(value, (Mapping, list, tuple)):
        yield key or "the value", value
        return
    for name, child in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(child, f"{key}.{name}" if key else str(name))


def expanded(path: str) -> str:
    """Return ``path`` with a leading ``~`` or ``~user`` replaced by the home folder; another text as it is.

    Raises:
        UserError: there is no such user.
    """
    if not re.match(r"~([\w.-]*/|$)", path):
        return path
    place = os.path.expanduser(path)
    if place == path:
        raise UserError(f"{path}: {path.partition('/')[0]} is no user's home folder")
    return place


def absolute(path: str, name: str) -> str:
    """Return ``path``, which messages call ``name``, as an absolute path.

    Raises:
        UserError: no file in it can have a name: it is too long, or holds a null character.
    """
    place = str(Path(expanded(path)).absolute())
    try:
        os.stat(f"{place}/{'x' * 200}")  # about the longest name in a run folder
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{name} cannot be used as a path: {why}: {clip(path)}") from None
    return place


def here() -> Path:
    """Return the current folder.

    Raises:
        UserError: it is gone.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder is gone: change to one that exists, such as with cd") from None


def shown(path: Path) -> str:
    """Return ``path`` as a user would type it here: relative to the current folder where it lies inside."""
    path = Path(os.path.normpath(path))
    with suppress(UserError, ValueError):
        return str(path.relative_to(here()))
    return str(path)
