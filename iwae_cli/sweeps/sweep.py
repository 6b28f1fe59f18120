"""A sweep: its planned jobs, the status of each, and its folder. Needs no torch.

The run folders are the truth. Jobs may run in other processes, on other machines, and die in any way, so each writes
one small file of its own (``jobs/``), and the process that was started by the command alone gathers them into
``sweep.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iwae_cli.core.errors import MAX_LINE, RunFailed, UserError, clip, one_line
from iwae_cli.core.files import RunLock, as_user_error, shown, write_json
from iwae_cli.core.signals import REPEATED_SECONDS
from iwae_cli.record import schema
from iwae_cli.report.reader import process_alive

Status = Literal["pending", "running", "finished", "failed", "interrupted", "killed"]
POLL_SECONDS = 0.5
STOP_SECONDS = 60.0
"""Time that stopping jobs have to save their state."""
_STYLES = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow"}


class SweepFailed(RunFailed):
    """Not every run of a sweep finished; the table shows which."""


class Stopped(BaseException):
    """Ends a sweep from inside one of its jobs: after an Exception, Hydra would run the next job."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Planned:
    """A job that is known before it runs.

    Attributes:
        overrides: what was asked for.
        folder: of the run.
        evaluation: name of the final evaluation within the run.
        restart: whether it starts from the beginning.
    """

    overrides: Sequence[str]
    folder: Path
    evaluation: str
    restart: bool = False


class SweepFolder:
    """Paths and small files of one sweep.

    Attributes:
        path: absolute path of the folder; its name is the group of the sweep.
        jobs: folder with one record per job.
        stop: file that exists while the sweep is being stopped: no further job begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.jobs = self.path / "jobs"
        self.stop = self.path / "stop"

    def record(self, overrides: Sequence[str]) -> Path:
        """Return the path of the record of the job with these overrides."""
        return self.jobs / f"{hashlib.sha256(json.dumps(list(overrides)).encode()).hexdigest()[:16]}.json"

    def read(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``; empty where there is none."""
        return _read(self.path / "sweep.json", schema.Sweep) or {}


class Attempt:
    """One process that runs one job; it alone writes the record of that job.

    Attributes:
        before: how an earlier attempt of the same command stood or ended, if there was one.
    """

    def __init__(self, folder: SweepFolder, number: int, overrides: Sequence[str]) -> None:
        self._path = folder.record(overrides)
        self._sweep = folder.path
        old = _read(self._path, schema.JobRecord) or {}
        self.before: Status | None = old.get("status")
        self._values: dict[str, Any] = {
            "number": number,
            "overrides": list(overrides),
            "begun": old.get("begun", time.time()),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def begins(self) -> None:
        """Record that the job is being prepared."""
        self._write("running")

    def is_run(self, folder: Path, evaluation: str) -> None:
        """Record which run the job is, and the name of its final evaluation."""
        self._values |= _place(self._sweep, folder, evaluation)
        self._write("running")

    def ends(self, status: Status, error: BaseException | None = None, *, with_trace: bool = False) -> None:
        """Record the final status; ``with_trace`` keeps the traceback of ``error``."""
        self._values["error"] = None if error is None else one_line(error) or type(error).__name__
        self._values["traceback"] = "".join(traceback.format_exception(error)) if error and with_trace else None
        self._write(status)

    def _write(self, status: Status) -> None:
        write_json(self._path, {**self._values, "status": status})


class Sweep:
    """Supervise the jobs of a sweep, in the process that the command started, wherever the jobs run.

    Args:
        folder: of the sweep; made if need be.
        planned: the jobs, or None for a search, which decides them as it runs.
        facts: what else goes into ``sweep.json``: command, launcher, sweeper, workers.
        stop_on_error: whether the first failure ends the sweep.
    """

    def __init__(
        self, folder: Path, planned: Sequence[Planned] | None, facts: Mapping[str, Any], stop_on_error: bool
    ) -> None:
        self.folder = SweepFolder(folder)
        self.stop_on_error = stop_on_error
        self._planned = planned
        self._facts = dict(facts)
        self._known: dict[str, tuple[int, dict[str, Any]]] = {}
        self._reported: set[str] = set()
        self._written: Any = None
        self._exit_code: int | None = None
        self._stopping_since: float | None = None
        self._quit = threading.Event()

    def run(self, work: Callable[[], None]) -> None:
        """Call ``work``, which has an engine run the jobs; meanwhile report failures, and stop all jobs on a signal.

        Raises:
            RunLocked: another process has this sweep.
            UserError: its folder cannot be written to.
            Stopped: by a signal or an error; the jobs have been asked to save their state.
            SweepFailed: not all runs are finished.
        """
        path = self.folder.path
        with as_user_error(path, "mend that, or choose another folder with output_dir=..."):
            self.folder.jobs.mkdir(parents=True, exist_ok=True)
            with RunLock(path):
                self._forget()
                self._update()
                with self._watched(), self._signals():
                    ended = self._worked(work)
                jobs = self._update()
                self._show(jobs)
        if ended is not None:
            raise ended
        # A trial that failed is a result of a search.
        good = {"finished"} if self._planned is not None else {"finished", "failed"}
        left = Counter(job["status"] for job in jobs if job["status"] not in good)
        if left or not any(job["status"] == "finished" for job in jobs):
            raise SweepFailed(f"not all runs are finished: {_counted(left) or 'none was'}")

    def _worked(self, work: Callable[[], None]) -> Stopped | SweepFailed | None:
        """Call ``work``; return what ended it early."""
        try:
            work()
        except UserError:
            raise
        except Stopped as stopped:
            return stopped
        except Exception as error:
            if self._exit_code is not None:
                # Ray replaces the exception of a signal handler by one of its own.
                return Stopped(self._exit_code)
            # The engine lost a job (a worker was killed) and gave up; other jobs may still be running.
            self._settle()
            what = (str(error).strip().splitlines() or [""])[0]
            return SweepFailed(f"the launcher gave up: {type(error).__name__}: {what}")
        return None

    def failed_here(self) -> None:
        """Stop the sweep if its jobs end at the first failure; called for a job that failed in this process."""
        if self.stop_on_error:
            raise Stopped(SweepFailed.exit_code)

    # What is known of the jobs.

    def _forget(self) -> None:
        """Drop the records of an earlier command; those of a search are kept."""
        self.folder.stop.unlink(missing_ok=True)
        for path, record in self._records():
            if self._planned is not None:
                path.unlink(missing_ok=True)
            elif record["status"] == "running" and not process_alive(record["host"], record["pid"]):
                write_json(path, {**record, "status": "killed"})
            elif record["status"] == "failed":
                self._reported.add(path.name)
        self._known.clear()

    def _records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in self.folder.jobs.glob("[!.]*.json"):
            try:
                changed = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            if self._known.get(path.name, (None,))[0] != changed:
                record = _read(path, schema.JobRecord)
                if record is None:
                    continue
                self._known[path.name] = (changed, record)
            yield path, self._known[path.name][1]

    def _update(self) -> list[dict[str, Any]]:
        """Read the records, write ``sweep.json`` if it changed, report failures; return the jobs."""
        records = {path.name: record for path, record in self._records()}
        if self._planned is None:
            jobs = [_job(record) for record in sorted(records.values(), key=lambda record: record["begun"])]
        else:
            jobs = []
            for planned in self._planned:
                job: dict[str, Any] = {"overrides": list(planned.overrides), "status": "pending", "error": None}
                job |= _place(self.folder.path, planned.folder, planned.evaluation)
                record = records.get(self.folder.record(planned.overrides).name)
                if record is not None:
                    job |= _job(record)
                elif not planned.restart and (planned.folder / job["result"]).is_file():
                    job["status"] = "finished"
                jobs.append(job)
        value = {**self._facts, "jobs": [{"number": number, **job} for number, job in enumerate(jobs)]}
        if value != self._written:
            write_json(self.folder.path / "sweep.json", value)
            self._written = value
        for name, record in records.items():
            if record["status"] == "failed" and name not in self._reported:
                self._reported.add(name)
                self._report(record)
        return jobs

    def _report(self, record: Mapping[str, Any]) -> None:
        trace = record.get("traceback")
        folder, error = shown(self.folder.path / record.get("folder", "")), record["error"]
        where = f" ({folder})" if "folder" in record and Path(folder).name not in error else ""
        head, tail = f"iwae-train: job {record['number']} (", f") failed: {error}{where}"
        asked = clip(" ".join(record["overrides"]), max(30, MAX_LINE - len(head + tail)))
        line = one_line(f"{head}{asked}{tail}")
        print(f"{trace or ''}{line}", file=sys.stderr, flush=True)
        if self.stop_on_error and record["pid"] != os.getpid() and self._exit_code is None:
            self._exit_code = SweepFailed.exit_code
            # To the main thread, which waits inside the engine.
            main = threading.main_thread().ident
            if main is not None:
                signal.pthread_kill(main, signal.SIGINT)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        def watch() -> None:
            while not self._quit.wait(POLL_SECONDS):
                with suppress(OSError):  # the disk is full now; the last update raises if it still is
                    self._update()

        thread = threading.Thread(target=watch, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._quit.set()
            thread.join()

    # Stopping.

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            if self._exit_code is None:
                self._exit_code = 128 + number
            self._stop_jobs()
        elif time.monotonic() - self._stopping_since < REPEATED_SECONDS:
            return
        raise Stopped(self._exit_code or 128 + number)

    def _stop_jobs(self) -> None:
        """Signal the jobs in other processes of this machine to save their state, and wait for them."""
        self.folder.stop.touch()
        asked: set[int] = set()
        deadline = time.monotonic() + STOP_SECONDS
        while (running := self._elsewhere()) and time.monotonic() < deadline:
            for pid in {record["pid"] for record in running} - asked:
                asked.add(pid)
                # Not SIGTERM, which submitit takes for a sign of preemption.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGINT)
            time.sleep(0.1)

    def _settle(self) -> None:
        """Wait for jobs that still run although the engine gave up."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < 4 * POLL_SECONDS:
            if self._elsewhere():
                quiet_since = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _elsewhere(self) -> list[dict[str, Any]]:
        """Return the records of jobs that run in other processes of this machine."""
        here, me = socket.gethostname(), os.getpid()
        records = [record for _, record in self._records() if record["status"] == "running"]
        others = [record for record in records if record["host"] == here and record["pid"] != me]
        return [record for record in others if process_alive(here, record["pid"])]

    # The end.

    def _show(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
        scores = [self._nll(job) for job in jobs]
        names = {name for name, _ in scores if name}
        sheet = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        headings = {"job": "right", "overrides": "left", "status": "left", "NLL": "right", "run": "left"}
        for heading, justify in headings.items():
            named = ", ".join(sorted(names)) if heading == "NLL" and names else heading
            sheet.add_column(named, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for number, (job, (name, nll)) in enumerate(zip(jobs, scores, strict=True)):
            sheet.add_row(
                str(number),
                Text(" ".join(o for o in job["overrides"] if o not in common)),
                Text(job["status"], style=_STYLES.get(job["status"], "")),
                nll if len(names) < 2 or not name else f"{nll} ({name})",
                Text(str(job.get("identity", ""))),
            )
        # As wide as needed: names are copied from here.
        out = Console(highlight=False, markup=False, width=10_000)
        counts = Counter(job["status"] for job in jobs)
        out.print()
        out.print(self.folder.path.name, style="bold", soft_wrap=True)
        out.print(sheet)
        for number, job in enumerate(jobs):
            if job["error"]:
                out.print(f"job {number}: {job['error']}", soft_wrap=True)
        out.print(_counted(counts) or "no jobs")
        if counts.keys() - {"finished"}:
            out.print("the same command resumes here and repeats nothing that is finished")
        out.print(f"{'folder':<14}{shown(self.folder.path)}", soft_wrap=True)

    def _nll(self, job: Mapping[str, Any]) -> tuple[str, str]:
        """Return (label, NLL in nats) of the test split, else of the first split that was evaluated."""
        if job["status"] != "finished":
            return "", ""
        result = _read(self.folder.path / job["folder"] / job["result"], schema.Scores) or {}
        for split in ("test", "validation", "train"):
            if split in result and result[split]["nll"] is not None:
                return f"NLL_{result[split]['k']} {split}", f"{result[split]['nll']:.2f}"
        return "", ""


def _counted(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {status}" for status, n in statuses.items())


def _job(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry in ``sweep.json`` of a job that has begun."""
    keys = ("overrides", "status", "identity", "folder", "evaluation", "result", "error")
    job = {"error": None, **{key: record[key] for key in keys if key in record}}
    if job["status"] == "running" and not process_alive(record["host"], record["pid"]):
        job["status"] = "killed"
    return job


def _place(sweep: Path, folder: Path, evaluation: str) -> dict[str, str]:
    return {
        "identity": folder.name,
        "folder": os.path.relpath(folder, sweep),
        "evaluation": evaluation,
        "result": f"evaluations/{evaluation}/result.json",
    }


def _read(path: Path, kind: Any) -> dict[str, Any] | None:
    """Return the content of a file; None where there is none or it is damaged, as if it had not been written."""
    with suppress(schema.Damaged):
        return schema.read_json(path, kind)
    return None
