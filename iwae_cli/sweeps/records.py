"""The files of a sweep: ``sweep.json``, and in ``jobs/`` a record of every job, which only its own process writes.

The run folders are the truth. Jobs may run in other processes, on other machines, and die in any way; the process that
the command started gathers their records into ``sweep.json``. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from iwae_cli.core.errors import RunFailed, UserError, clip, one_line
from iwae_cli.core.files import write_json
from iwae_cli.record import schema

Status = Literal["pending", "running", "finished", "failed", "interrupted", "killed"]


class SweepFailed(RunFailed):
    """Not every run of a sweep finished; the table shows which."""


class Stopped(BaseException):
    """Ends a sweep from inside one of its jobs: after an Exception, Hydra would run the next job."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Planned:
    """A job that is known before it runs: its overrides, and the run folder and the final evaluation it will have."""

    overrides: Sequence[str]
    folder: Path
    evaluation: str
    restart: bool = False


class SweepFolder:
    """One sweep on disk; the name of the folder is the group of the sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.jobs = self.path / "jobs"
        self.stop = self.path / "stop"  # exists while the sweep is being stopped: no further job begins

    def read(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``; empty where there is none."""
        return read_or_none(self.path / "sweep.json", schema.Sweep) or {}

    def record(self, overrides: Sequence[str]) -> Path:
        """Return the path of the record of the job with these overrides."""
        return self.jobs / f"{hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:16]}.json"

    def records(self) -> dict[Path, dict[str, Any]]:
        """Return the records of all jobs that have begun."""
        found = {}
        for path in self.jobs.glob("[!.]*.json"):
            with suppress(FileNotFoundError):
                record = _unchanged_record(path, path.stat().st_mtime_ns)
                if record is not None:
                    found[path] = record
        return found

    def place(self, folder: Path, evaluation: str) -> dict[str, str]:
        """Return what records say about the place of a run and its final evaluation."""
        return {
            "identity": folder.name,
            "folder": os.path.relpath(folder, self.path),
            "evaluation": evaluation,
            "result": f"evaluations/{evaluation}/result.json",
        }

    def result(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return the scores of a finished job; empty where they are gone."""
        return read_or_none(self.path / job["folder"] / job["result"], schema.Scores) or {}


class Attempt:
    """One process that runs one job and writes its record."""

    def __init__(self, folder: SweepFolder, number: int, overrides: Sequence[str]) -> None:
        self._folder = folder
        self._path = folder.record(overrides)
        old = read_or_none(self._path, schema.JobRecord) or {}
        self.before: Status | None = old.get("status")  # of an earlier attempt of the same command
        self._values: dict[str, Any] = {
            "number": number,
            "overrides": list(overrides),
            "begun": old.get("begun", time.time()),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def begins(self, folder: Path | None = None, evaluation: str = "") -> None:
        """Record that the job is at work, and where its run and evaluation lie as soon as that is known."""
        if folder is not None:
            self._values |= self._folder.place(folder, evaluation)
        self._write("running")

    def has_made(self, folder: Path) -> bool:
        """Return whether an earlier attempt of the same command began the run in ``folder``."""
        with suppress(OSError):
            return self.before is not None and (folder / "config.yaml").stat().st_mtime >= self._values["begun"]
        return False

    def ends(self, status: Status, error: BaseException | None = None) -> None:
        """Record the final status, and of a failure that is no UserError the traceback."""
        self._values["error"] = None if error is None else one_line(error) or type(error).__name__
        is_bug = status == "failed" and error is not None and not isinstance(error, UserError)
        self._values["traceback"] = "".join(traceback.format_exception(error)) if is_bug else None
        self._write(status)

    def _write(self, status: Status) -> None:
        write_json(self._path, {**self._values, "status": status})


def job_name(number: int, overrides: Sequence[str], varied: Sequence[str] | None) -> str:
    """Return ``job 2 (seed=1)``: the number and what varies in the sweep; all overrides where that is not known."""
    asked = [o for o in overrides if not varied or o.lstrip("+").partition("=")[0] in varied]
    return f"job {number} ({clip(' '.join(asked), 100)})" if asked else f"job {number}"


def read_or_none(path: Path, kind: Any) -> dict[str, Any] | None:
    """Return the content of a file; None where there is none or it is damaged, as if it had not been written."""
    with suppress(schema.Damaged):
        return schema.read_json(path, kind)
    return None


@lru_cache(maxsize=20_000)
def _unchanged_record(path: Path, mtime_ns: int) -> dict[str, Any] | None:
    return read_or_none(path, schema.JobRecord)
