"""The end of a sweep on standard output: its jobs, their means over seeds, what to type next. Needs no torch."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from iwae_cli.core.errors import UserError
from iwae_cli.core.files import shown
from iwae_cli.record.summary import SPLITS
from iwae_cli.record.wandb import SYNC, left_to_upload
from iwae_cli.report.reader import Found, Run, read
from iwae_cli.sweeps.records import SweepFolder, job_name

_STYLES = {"finished": "green", "failed": "red", "killed": "red", "interrupted": "yellow"}


class Score(NamedTuple):
    """The NLL of a job, nats, with its name (``NLL_5000 test``), and the seconds of training and evaluation."""

    name: str = ""
    nll: float | None = None
    seconds: float = 0.0


def score(folder: SweepFolder, job: Mapping[str, Any], is_search: bool) -> Score:
    """Return the NLL of the test split of a job, else of another one; of a search what it minimizes."""
    result = folder.result(job) if job["status"] == "finished" else {}
    seconds = result.get("seconds", {})
    for split in ("validation",) if is_search else SPLITS:
        if result.get(split) and result[split]["nll"] is not None:
            took = (seconds.get("train") or 0.0) + (seconds.get("evaluate") or 0.0)
            return Score(f"NLL_{result[split]['k']} {split}", result[split]["nll"], took)
    return Score()


def show(folder: SweepFolder, jobs: Sequence[Mapping[str, Any]], varied: Sequence[str], is_search: bool) -> None:
    """Print the jobs, and what can be typed next."""
    scores = [score(folder, job, is_search) for job in jobs]
    # As wide as needed: names are copied from here.
    out = Console(highlight=False, markup=False, width=10_000)
    out.print()
    out.print(folder.path.name, style="bold", soft_wrap=True)
    out.print(_sheet(jobs, scores))
    for number, job in enumerate(jobs):
        if job["error"]:
            out.print(f"job {number}: {job['error']}", soft_wrap=True)
    counts = Counter(job["status"] for job in jobs)
    out.print(counted(counts) or "no jobs")
    if counts.keys() - {"finished"}:
        restarted = any(override.lower() == "restart=true" for job in jobs for override in job["overrides"])
        same = "the same command" + " without restart=true" * restarted
        out.print(f"{same} resumes here and repeats nothing that is finished")
    lines = {"folder": shown(folder.path)}
    finished = [job for job in jobs if job["status"] == "finished"]
    if is_search:
        lines |= _winner(folder, jobs, scores, varied)
    elif finished and (means := _means(folder, finished, varied)):
        text, lines["next"] = means
        out.print(f"\n{text}", soft_wrap=True)
    left = [left_to_upload(folder.path / job["folder"], job["evaluation"]) for job in finished]
    if uploads := [line["upload"] for line in left if "upload" in line]:
        lines["upload"] = SYNC + " ".join(line.removeprefix(SYNC) for line in uploads)
    # A run has one record, which jobs that evaluate one training make in turn.
    recorded = {job["folder"] for job, line in zip(finished, left, strict=True) if "upload" in line}
    others = [
        line["not uploaded"]
        for job, line in zip(finished, left, strict=True)
        if "not uploaded" in line and job["folder"] not in recorded
    ]
    if others:
        lines["not uploaded"] = f"{len(others)} of {len(finished)} jobs; of the first {others[0]}"
    for name, line in lines.items():
        out.print(f"{name:<14}{line}", soft_wrap=True)


def counted(statuses: Mapping[str, int]) -> str:
    """Return ``2 finished, 1 failed``."""
    return ", ".join(f"{n} {status}" for status, n in statuses.items())


def _sheet(jobs: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> Table:
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    names = sorted({score.name for score in scores} - {""})
    first, fourth = Column("job", justify="right"), Column(", ".join(names) or "NLL", justify="right")
    sheet = Table(first, "overrides", "status", fourth, "run", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for number, (job, (name, nll, _)) in enumerate(zip(jobs, scores, strict=True)):
        value = "" if nll is None else f"{nll:.2f}"
        sheet.add_row(
            str(number),
            Text(" ".join(o for o in job["overrides"] if o not in common)),
            Text(job["status"], style=_STYLES.get(job["status"], "")),
            f"{value} ({name})" if value and len(names) > 1 else value,
            Text(str(job.get("identity", ""))),
        )
    return sheet


def _winner(
    folder: SweepFolder, jobs: Sequence[Mapping[str, Any]], scores: Sequence[Score], varied: Sequence[str]
) -> dict[str, str]:
    """Return lines that name the trial with the least NLL, and what to type for its test split."""
    tried = [(score.nll, number) for number, score in enumerate(scores) if score.nll is not None]
    if not tried:
        return {}
    nll, number = min(tried)
    job = jobs[number]
    run, named = shown(folder.path / job["folder"]), job_name(number, job["overrides"], varied)
    lines = {"winner": f"{named}, least {scores[number].name}: {nll:.4f} nats; {run}"}
    if not folder.result(job).get("test"):
        lines["next"] = f"iwae-eval {shlex.quote(run)} 'evaluation.splits=[test]'"
    return lines


def _as_asked(folder: SweepFolder, finished: Sequence[Mapping[str, Any]]) -> list[Run]:
    """Return the runs of jobs, each with the evaluations that these asked for: a run may have others."""
    asked = {((folder.path / job["folder"]).resolve(), Path(job["result"]).parent.name) for job in finished}
    runs = [
        replace(run, scores=tuple(score for score in run.scores if (run.path, score.name) in asked))
        for run in read([folder.path / job["folder"] for job in finished]).runs
    ]
    return [run for run in runs if run.scores]


def _means(folder: SweepFolder, finished: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> tuple[str, str] | None:
    """Return the table of a report, with mean and standard error over seeds, and the command for more."""
    from iwae_cli.report.cells import tables
    from iwae_cli.report.selection import comparable
    from iwae_cli.report.writers import Report, terminal

    try:
        runs = _as_asked(folder, finished)
        there = {name for run in runs for score in run.scores for name in score.splits}
        scored, _ = comparable(runs, next((name for name in SPLITS if name in there), SPLITS[0]))
        rows = [key for key in varied if key != "seed" and any(key in s.run.keys for s in scored)]
        made = tables(scored, rows or None, [] if rows else None)
    except UserError:  # run folders that were removed or damaged meanwhile
        return None
    if not made:
        return None
    command = ["iwae-report", shown(folder.path), *(["--rows", ",".join(rows)] if rows else [])]
    first = finished[0]["identity"]
    cell = next((c for c in made[0].cells if first in [s.run.identity for s in c.runs]), made[0].cells[0])
    reference = " ".join(f"{key}={value}" for key, value in made[0].keyed(cell).items())
    command += ["--against", reference] if len(made[0].cells) > 1 else ["--html", "report.html"]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return terminal(Report(Found(), [], made, []), width), shlex.join(command)
