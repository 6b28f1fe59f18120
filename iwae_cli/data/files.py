"""Read, check and download the files of data sets; several processes that ask for one file download it once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import importlib
import os
import shutil
import socket
import sys
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

from iwae_cli.core.errors import UserError, clip
from iwae_cli.core.files import atomic_path, flock

TIMEOUT = 5.0
"""Seconds without an answer from one address after which a server is given up."""

AFRESH = "move it away and run again to download it afresh, or put a whole and unaltered copy in its place"

DOWNLOADS = ContextVar("DOWNLOADS", default=True)
"""Whether missing files are downloaded; not where data are only compared."""

_kept: list[torch.library.Library] = []


class Damaged(UserError):
    """A file that is truncated, altered, or of another format: ``what`` is its fault, ``advice`` the remedy."""

    def __init__(self, path: Path, what: str, advice: str = AFRESH) -> None:
        super().__init__(f"{path} {what}; {advice}")
        self.short = f"{path.name} {what}"


def directory(data_dir: str) -> Path:
    """Return ``data_dir`` as an absolute path; raise ValueError if it is empty."""
    if not data_dir:
        raise ValueError("data_dir must not be empty")
    return Path(data_dir).expanduser().absolute()


def read_bytes(path: Path) -> bytearray:
    """Return the content of a file, in memory that a tensor may share; raise UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = bytearray(os.fstat(file.fileno()).st_size)
            del content[file.readinto(content) :]
            return content
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def check_hash(path: Path, content: bytearray, algorithm: str, expected: str, advice: str = AFRESH) -> None:
    """Raise Damaged unless ``content`` of ``path`` has the published hash."""
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        what = f"is altered or damaged: its {algorithm} is {found}, the published one is {expected}"
        raise Damaged(path, what, advice)


def import_torchvision(module: str) -> ModuleType:
    """Return a module of torchvision, also where its compiled part does not match torch.

    Beside a CPU build of torch, the import may fail because the schemas of two operators of its detection models are
    missing. Only then are they declared: on a healthy installation that would clash.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    declare: Any = torch.library.Library
    library = declare("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)  # the declarations live as long as this object
    return importlib.import_module(module)


def download(url: str, folder: Path) -> Path:
    """Download ``url`` into ``folder`` and return the file."""
    utils: Any = import_torchvision("torchvision.datasets.utils")
    utils.download_url(url, folder)
    return folder / url.rpartition("/")[2]


def obtain(
    data: str, data_dir: Path, wanted: Sequence[Path], what: str, fetch: Callable[[Path], Sequence[Path]]
) -> None:
    """Download the missing files of a data set, once for all processes that ask.

    One process holds a lock in ``data_dir`` while it downloads into a temporary folder beside the final one. Complete
    files are flushed and renamed, so that a file under its final name is always complete.

    Args:
        data, data_dir, what: the name on the command line, where the lock is taken, the files in words.
        wanted: the files under their final names, all in one folder.
        fetch: downloads into a given folder, checks the files, and returns them, under their final names.

    Raises:
        UserError: no network, no room, no permission, or a damaged download.
    """
    if all(path.exists() for path in wanted):
        return
    folder = wanted[0].parent
    if not DOWNLOADS.get():
        raise UserError(f"{what} of data={data} are not in {folder}")
    try:
        with _locked(data_dir):
            if all(path.exists() for path in wanted):
                return
            # On the file system of the final folder, which may be a link to another disk.
            temporary = next(place for place in (folder, *folder.parents) if place.exists()) / f".download-{data}"
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process, since this one holds the lock
            temporary.mkdir()
            before = socket.getdefaulttimeout()
            try:
                socket.setdefaulttimeout(TIMEOUT)  # the downloader has no limit
                print(f"downloading {what}", file=sys.stderr)
                for path in fetch(temporary):
                    if not (folder / path.name).exists():
                        folder.mkdir(parents=True, exist_ok=True)
                        with atomic_path(folder / path.name) as place:
                            os.replace(path, place)
            finally:
                socket.setdefaulttimeout(before)
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, RuntimeError, EOFError, ImportError, http.client.HTTPException, Damaged) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = " ".join((error.short if isinstance(error, Damaged) else str(error)).split())
        reason = clip(reason.removeprefix("<urlopen error ").rstrip(".>"), 100)
        raise UserError(
            f"data={data} needs {what} in {folder}; the download failed ({reason}): put them there, or write "
            "data_dir=DIR; data=digits needs none"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock in ``folder``; remove lock and folders again if nothing was put there."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / ".download.lock"
    file = _lock(path)
    try:
        yield
    finally:
        # Removed while held: a process that waits on the removed file notices and takes a new one.
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # not empty: the files, or another process at work
            for place in made:
                place.rmdir()


def _lock(path: Path) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the holder of the lock has removed the folder that it made
            file = open(path, "w")  # noqa: SIM115  (closed by the holder of the lock)
            try:
                flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that downloads into {path.parent}", file=sys.stderr)
                flock(file.fileno(), fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()
