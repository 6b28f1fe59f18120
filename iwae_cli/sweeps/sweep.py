"""Supervise the jobs of a sweep, in the process that the command started: report, stop, end as one table."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from iwae_cli.core.errors import UserError, one_line
from iwae_cli.core.files import RunLock, as_user_error, shown, write_json
from iwae_cli.core.progress import announce
from iwae_cli.core.signals import REPEATED_SECONDS
from iwae_cli.report.reader import process_alive
from iwae_cli.sweeps import table
from iwae_cli.sweeps.records import Planned, Stopped, SweepFailed, SweepFolder, job_name

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0
"""Time that stopping jobs have to save their state."""


class Sweep:
    """The jobs of a sweep, wherever they run.

    ``planned`` is None for a search, which decides its jobs as it runs; ``facts`` go into ``sweep.json`` too.
    """

    def __init__(
        self, folder: Path, planned: Sequence[Planned] | None, facts: Mapping[str, Any], stop_on_error: bool
    ) -> None:
        self.folder = SweepFolder(folder)
        self.stop_on_error = stop_on_error
        self._planned = planned
        self._facts = facts
        self._varied: Sequence[str] = facts.get("varied") or ()
        self._reported: set[Path] = set()
        self._written: Any = None
        self._exit_code: int | None = None
        self._stopping_since: float | None = None
        self._updating = threading.Lock()
        self._main_thread = threading.get_ident()

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
                self.update()
                with self._watched(), self._signals():
                    ended = self._worked(work)
                jobs = self.update()
                table.show(self.folder, jobs, self._varied, self._planned is None)
        if ended is not None:
            raise ended
        counts = Counter(job["status"] for job in jobs)
        # A trial that failed is a result of a search.
        good = {"finished"} if self._planned is not None else {"finished", "failed"}
        left = {status: n for status, n in counts.items() if status not in good}
        if left or not counts["finished"]:
            raise SweepFailed(f"not all runs are finished: {table.counted(left) or 'none was'}")

    def _worked(self, work: Callable[[], None]) -> Stopped | SweepFailed | None:
        """Call ``work``; return what ended it early."""
        try:
            work()
            return None
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

    def failed_here(self) -> None:
        """Stop the sweep if its jobs end at the first failure; called for a job that failed in this process."""
        self.update()
        if self.stop_on_error:
            raise Stopped(SweepFailed.exit_code)

    # What is known of the jobs.

    def _forget(self) -> None:
        """Drop the records of an earlier command; those of a search are kept."""
        self.folder.stop.unlink(missing_ok=True)
        for path, record in self.folder.records().items():
            if self._planned is not None:
                path.unlink(missing_ok=True)
            elif _job(record)["status"] == "killed":
                write_json(path, {**record, "status": "killed"})
            elif record["status"] in ("failed", "finished"):
                self._reported.add(path)

    def update(self) -> list[dict[str, Any]]:
        """Read the records, write ``sweep.json`` if it changed, report jobs that have ended; return the jobs."""
        with self._updating:  # by the thread that watches, and by a job of this process
            records = self.folder.records()
            jobs = self._jobs(records)
            value = {**self._facts, "jobs": [{"number": number, **job} for number, job in enumerate(jobs)]}
            if value != self._written:
                write_json(self.folder.path / "sweep.json", value)
                self._written = value
            known = {path: record for path, record in records.items() if path not in self._reported}
            new = [(path, record) for path, record in known.items() if record["status"] in ("failed", "finished")]
            before = sum(job["status"] not in ("pending", "running") for job in jobs) - len(new)
            for ended, (path, record) in enumerate(new, start=before + 1):
                self._reported.add(path)
                self._report(record, f"{ended} of {len(jobs)} jobs")
            return jobs

    def _jobs(self, records: Mapping[Path, dict[str, Any]]) -> list[dict[str, Any]]:
        if self._planned is None:
            return [_job(record) for record in sorted(records.values(), key=lambda record: record["begun"])]
        jobs = []
        for planned in self._planned:
            job: dict[str, Any] = {"overrides": list(planned.overrides), "status": "pending", "error": None}
            job |= self.folder.place(planned.folder, planned.evaluation)
            record = records.get(self.folder.record(planned.overrides))
            if record is not None:
                job |= _job(record)
            elif not planned.restart and (planned.folder / job["result"]).is_file():
                job["status"] = "finished"
            jobs.append(job)
        return jobs

    def _report(self, record: Mapping[str, Any], ended: str) -> None:
        named = job_name(record["number"], record["overrides"], self._varied)
        if record["status"] == "finished":
            name, nll, seconds = table.score(self.folder, record, self._planned is None)
            line = f"{named} finished" if nll is None else f"{named} finished: {name} {nll:.2f}, {seconds:.1f} s"
            announce(one_line(line if self._planned is None else f"{line}; {ended}"))
            return
        error, where = record["error"], ""
        if "folder" in record and Path(record["folder"]).name not in error:
            where = f" ({shown(self.folder.path / record['folder'])})"
        line = one_line(f"iwae-train: {named} failed: {error}{where}")
        print(f"{record.get('traceback') or ''}{line}", file=sys.stderr, flush=True)
        if self.stop_on_error and record["pid"] != os.getpid() and self._exit_code is None:
            self._exit_code = SweepFailed.exit_code
            # To the thread that waits inside the engine.
            signal.pthread_kill(self._main_thread, signal.SIGINT)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(POLL_SECONDS):
                with suppress(OSError):  # the disk is full now; the last update raises if it still is
                    self.update()

        thread = threading.Thread(target=watch, name="sweep", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    # Stopping.

    @contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)}
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
            for pid in running - asked:
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

    def _elsewhere(self) -> set[int]:
        """Return the other processes of this machine that run jobs."""
        here = socket.gethostname()
        records = [record for record in self.folder.records().values() if record["status"] == "running"]
        pids = {record["pid"] for record in records if record["host"] == here}
        return {pid for pid in pids - {os.getpid()} if process_alive(here, pid)}


def _job(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry in ``sweep.json`` of a job that has begun."""
    keys = ("overrides", "status", "identity", "folder", "evaluation", "result", "error")
    job = {"error": None, **{key: record[key] for key in keys if key in record}}
    if job["status"] == "running" and not process_alive(record["host"], record["pid"]):
        job["status"] = "killed"
    return job
