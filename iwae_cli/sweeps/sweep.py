"""A sweep: its planned jobs, the status of each, and its folder. Needs no torch.

The run folders are the truth. Jobs may run in other processes, on other machines, and die in any way, so each writes
one small file of its own (``jobs/``), and the process that was started by the command alone gathers them into
``sweep.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
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
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from iwae_cli.core.errors import RunFailed, UserError, clip, one_line
from iwae_cli.core.files import RunLock, as_user_error, shown, write_json
from iwae_cli.core.progress import announce
from iwae_cli.core.signals import REPEATED_SECONDS
from iwae_cli.record import schema
from iwae_cli.record.summary import SPLITS
from iwae_cli.record.wandb import SYNC, left_to_upload
from iwae_cli.report.reader import Found, process_alive, read

Status = Literal["pending", "running", "finished", "failed", "interrupted", "killed"]
POLL_SECONDS = 0.5
STOP_SECONDS = 60.0
"""Time that stopping jobs have to save their state."""
_STYLES = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow"}


class _Score(NamedTuple):
    name: str = ""
    nll: float | None = None
    seconds: float = 0.0


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


def job_name(number: int, overrides: Sequence[str], varied: Sequence[str] | None) -> str:
    """Return ``job 2 (seed=1)``: the number and what varies in the sweep; all overrides where that is not known."""
    asked = [o for o in overrides if not varied or o.lstrip("+").partition("=")[0] in varied]
    return f"job {number} ({clip(' '.join(asked), 100)})" if asked else f"job {number}"


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
        self._updating = threading.RLock()

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
        self.update()
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
            elif record["status"] in ("failed", "finished"):
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

    def update(self) -> list[dict[str, Any]]:
        """Read the records, write ``sweep.json`` if it changed, report jobs that have ended; return the jobs."""
        with self._updating:  # by the thread that watches, and by a job of this process
            return self._update()

    def _update(self) -> list[dict[str, Any]]:
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
            if record["status"] in ("failed", "finished") and name not in self._reported:
                self._reported.add(name)
                self._report(record, jobs)
        return jobs

    def _report(self, record: Mapping[str, Any], jobs: Sequence[Mapping[str, Any]]) -> None:
        named = job_name(record["number"], record["overrides"], self._varied)
        if record["status"] == "finished":
            name, nll, seconds = self._score(_job(record))
            score = "" if nll is None else f": {name} {nll:.2f}, {seconds:.1f} s"
            ended = sum(job["status"] not in ("pending", "running") for job in jobs)
            of = f"; {ended} of {len(jobs)} jobs" if self._planned is not None else ""
            announce(one_line(f"{named} finished{score}{of}"))
            return
        trace = record.get("traceback")
        folder, error = shown(self.folder.path / record.get("folder", "")), record["error"]
        where = f" ({folder})" if "folder" in record and Path(folder).name not in error else ""
        line = one_line(f"iwae-train: {named} failed: {error}{where}")
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
                    self.update()

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
        scores = [self._score(job) for job in jobs]
        names = {name for name, *_ in scores if name}
        sheet = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        headings = {"job": "right", "overrides": "left", "status": "left", "NLL": "right", "run": "left"}
        for heading, justify in headings.items():
            named = ", ".join(sorted(names)) if heading == "NLL" and names else heading
            sheet.add_column(named, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for number, (job, (name, nll, _)) in enumerate(zip(jobs, scores, strict=True)):
            sheet.add_row(
                str(number),
                Text(" ".join(o for o in job["overrides"] if o not in common)),
                Text(job["status"], style=_STYLES.get(job["status"], "")),
                "" if nll is None else f"{nll:.2f}" + f" ({name})" * (len(names) > 1),
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
        lines = {"folder": shown(self.folder.path)}
        finished = [job for job in jobs if job["status"] == "finished"]
        if self._planned is None:
            lines |= self._winner(jobs, scores)
        elif finished:
            text, lines["next"] = self._means(finished)
            out.print(f"\n{text}" if text else "", soft_wrap=True, end="\n" * bool(text))
        found = [left_to_upload(self.folder.path / job["folder"]) for job in finished]
        if records := [line.removeprefix(SYNC) for line in found if line]:
            lines["upload"] = f"{SYNC}{' '.join(records)}"
        for name, line in lines.items():
            if line:
                out.print(f"{name:<14}{line}", soft_wrap=True)

    def _winner(self, jobs: Sequence[Mapping[str, Any]], scores: Sequence[_Score]) -> dict[str, str]:
        """Return lines that name the trial with the least NLL, and what to type for its test split."""
        tried = [(score.nll, number) for number, score in enumerate(scores) if score.nll is not None]
        if not tried:
            return {}
        nll, number = min(tried)
        job = jobs[number]
        run, named = self.folder.path / job["folder"], job_name(number, job["overrides"], self._varied)
        lines = {"winner": f"{named}, least {scores[number].name}: {nll:.4f} nats; {shown(run)}"}
        if not (_read(run / job["result"], schema.Scores) or {}).get("test"):
            lines["next"] = f"iwae-eval {shlex.quote(shown(run))} 'evaluation.splits=[test]'"
        return lines

    def _means(self, finished: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Return the table of a report, with mean and standard error over seeds, and the command for more."""
        from iwae_cli.report.cells import tables
        from iwae_cli.report.selection import comparable
        from iwae_cli.report.writers import Report, terminal

        try:
            runs = read([self.folder.path / job["folder"] for job in finished]).runs
            there = {name for run in runs for score in run.scores for name in score.splits}
            scored, _ = comparable(runs, next((name for name in SPLITS if name in there), SPLITS[0]))
            rows = [key for key in self._varied if key != "seed" and any(key in s.run.keys for s in scored)]
            made = tables(scored, rows or None, [] if rows else None)
        except UserError:  # run folders that were removed or damaged meanwhile
            return "", ""
        if not made:
            return "", ""
        command = ["iwae-report", shown(self.folder.path), *(["--rows", ",".join(rows)] if rows else [])]
        first = finished[0]["identity"]
        cell = next((c for c in made[0].cells if first in [s.run.identity for s in c.runs]), made[0].cells[0])
        reference = " ".join(f"{key}={value}" for key, value in made[0].keyed(cell).items())
        command += ["--against", reference] if len(made[0].cells) > 1 else ["--html", "report.html"]
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        return terminal(Report(Found(), [], made, []), width), shlex.join(command)

    @property
    def _varied(self) -> Sequence[str]:
        return self._facts.get("varied") or ()

    def _score(self, job: Mapping[str, Any]) -> _Score:
        """Return the NLL of a job: of the test split, else of another; of a search that which it minimizes."""
        if job["status"] != "finished":
            return _Score()
        result = _read(self.folder.path / job["folder"] / job["result"], schema.Scores) or {}
        took = [result["seconds"][part] or 0.0 for part in ("train", "evaluate") if part in result.get("seconds", {})]
        for split in ("validation",) if self._planned is None else SPLITS:
            if result.get(split) and result[split]["nll"] is not None:
                return _Score(f"NLL_{result[split]['k']} {split}", result[split]["nll"], sum(took))
        return _Score()


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
