"""From composed jobs to runs: start a sweep, train its jobs as one program where asked, run one job of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iwae_cli.config.build import BASES, call, check_arguments, construct
from iwae_cli.core.errors import Interrupted, RunLocked, UserError, one_line
from iwae_cli.core.files import absolute
from iwae_cli.core.progress import announce, labelled
from iwae_cli.core.signals import preemption
from iwae_cli.record.identity import evaluation_name, unused
from iwae_cli.report.reader import class_name
from iwae_cli.sweeps.launchers import BATCHED, adapter
from iwae_cli.sweeps.records import Attempt, Planned, Stopped, SweepFolder, job_name
from iwae_cli.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from iwae_cli.data.base import Data
    from iwae_cli.runs.experiment import Experiment

LOCKED_SECONDS = 2.0
"""Pause before a job asks again for a run that another process has."""


@dataclass(frozen=True)
class Job:
    """One run as composed."""

    config: dict[str, Any]  # plain values
    names: dict[str, str]  # chosen name of every group
    overrides: list[str]  # the command line of this run
    logger: dict[str, Any] | None = None  # recorded instead of loggers that hold values from the environment

    def sent(self) -> dict[str, Any]:
        """Return what is sent to the process that runs the job, without values of loggers from the environment."""
        config = {key: value for key, value in self.config.items() if key != "logger" or self.logger is None}
        return asdict(replace(self, config=config))

    def experiment(self, group: str | None = None) -> Experiment:
        """Return the experiment of a sweep called ``group``, all its objects built; a wrong value is a UserError."""
        from iwae_cli.runs.experiment import Experiment

        objects = construct(self.config)
        objects["loggers"] = objects.pop("logger")
        config = self.config if self.logger is None else {**self.config, "logger": self.logger}
        record = {"config": config, "names": self.names, "overrides": self.overrides, "group": group}
        values = {key: value for key, value in self.config.items() if key not in (*BASES, "config_dir")}
        scalars = check_arguments(Experiment, values, "", given={*objects, *record})
        return call(Experiment, {**objects, **scalars, **record}, "")


@dataclass(frozen=True)
class Plan:
    """Everything one command line asks for."""

    jobs: list[Job]  # all, or of a search, which decides its jobs itself, one that it may try
    multirun: bool
    varied: list[str]  # keys that differ between jobs
    is_grid: bool  # no search
    overrides: list[str]  # the command line, as parsed
    stop_on_error: bool
    choices: Mapping[str, Any]  # of hydra/launcher, hydra/sweeper and the groups
    launcher: Mapping[str, Any]  # Hydra's node, resolved
    sweeper: Mapping[str, Any]  # Hydra's node, resolved
    base: Any  # what Hydra composed for all jobs

    @property
    def name(self) -> str:
        """Name of the sweep, the same for the same command: the varied keys, and a hash of all its runs."""
        runs = list(dict.fromkeys(tuple(o for o in job.overrides if not o.startswith("restart=")) for job in self.jobs))
        # More trials, other workers or another way to treat errors continue the same search.
        settings = ("hydra/launcher=", "hydra.launcher.", "hydra.sweeper.n_trials=", "hydra.sweeper.n_jobs=")
        outside = (*settings, "on_error=", "restart=")
        searched = [] if self.is_grid else [o for o in self.overrides if not o.lstrip("+").startswith(outside)]
        readable = re.sub(r"[^\w.+-]", "_", "+".join(self.varied))[:60] or "sweep"
        return f"{readable}-{hashlib.sha256(json.dumps([runs, searched]).encode()).hexdigest()[:8]}"


def say_unused(plan: Plan) -> None:
    """Say which keys were typed that no job uses; none of a search, whose other jobs may use it."""
    if not plan.is_grid or "WANDB_SWEEP_ID" in os.environ:
        return
    typed = {line.lstrip("+").partition("=")[0] for line in plan.jobs[0].overrides}
    for group in ("model", "objective", "training"):
        nodes = [job.config[group] for job in plan.jobs]
        for key, (choice, using) in unused(nodes[0], classes=True).items():
            if f"{group}.{key}" in typed and all(key in unused(node, classes=True) for node in nodes):
                chosen = nodes[0][choice]
                name = class_name(chosen["_target_"]) if isinstance(chosen, Mapping) else chosen
                why = f"{group}.{key} has no effect with {group}.{choice}={name}"
                announce(f"{why}: it is for {' or '.join(f'{group}.{choice}={value}' for value in using)}")


_sweep: Sweep | None = None
"""The sweep that this process started; None in a process that runs one job of a sweep started elsewhere."""


def run_sweep(plan: Plan, command: str, engine: Callable[[Plan, Path, list[Job], dict[str, str | int]], None]) -> None:
    """Check every job, then have ``engine`` call ``run_job`` for each; ``command`` is for the record.

    The engine is given the plan, the folder of the sweep, its jobs, and keys and values for a search.

    Raises:
        UserError: a job that cannot run; nothing has been written.
        Stopped, SweepFailed: see ``Sweep.run``.
    """
    global _sweep
    from iwae_cli.evaluation.workers import available_cores

    name = str(plan.choices["hydra/launcher"])
    launcher = adapter(name)
    if name == BATCHED and not plan.is_grid:
        raise UserError(f"a search decides its jobs as it runs, hydra/launcher={BATCHED} has to know them before")
    checked = _checked(plan, launcher.elsewhere)
    say_unused(plan)
    jobs, planned = [job for job, _ in checked], [one for _, one in checked]
    if twins := len(plan.jobs) - len(jobs):
        announce(f"{twins} of {len(plan.jobs)} jobs ask{'s' * (twins == 1)} for the training of another: it runs once")
    path = Path(absolute(jobs[-1].config["output_dir"], "output_dir")) / "sweeps" / plan.name
    at_once = len(planned) if plan.is_grid else plan.sweeper.get("n_jobs")
    facts = {
        "command": command,
        "group": plan.name,
        "launcher": name,
        "sweeper": plan.choices["hydra/sweeper"],
        "varied": plan.varied,
        "workers": launcher.workers(plan.launcher, at_once, available_cores()),
    }
    launcher.start(plan.launcher)
    sweep = _sweep = Sweep(path, planned if plan.is_grid else None, facts, plan.stop_on_error)

    def work() -> None:
        if name == BATCHED:
            _train_together(jobs, sweep)
        left: dict[str, str | int] = {}
        if str(plan.sweeper["_target_"]).endswith(".OptunaSweeper"):
            from iwae_cli.sweeps.optuna import remaining

            left = remaining(plan.sweeper, path)
        engine(plan, path, jobs, left)

    try:
        sweep.run(work)
    finally:
        _sweep = None


def _checked(plan: Plan, elsewhere: bool) -> list[tuple[Job, Planned]]:
    """Return the jobs, each training and evaluation once; their data are read unless they run ``elsewhere``."""
    found: dict[tuple[Path, str], tuple[Job, Planned]] = {}
    loaded: dict[str, Data] = {}
    seen: set[str] = set()
    for job in plan.jobs:
        name = job_name(len(found), job.overrides, plan.varied) if len(plan.jobs) > 1 else None
        with _naming(name):
            experiment = job.experiment(plan.name)
            experiment.check()
        if not plan.is_grid and "validation" not in experiment.evaluation.splits:
            why = "a search minimizes the NLL of the validation split"
            raise UserError(f"{why}: evaluation.splits must hold validation")
        one = Planned(job.overrides, experiment.folder().path, evaluation_name(job.config), experiment.restart)
        if (one.folder, one.evaluation) in found:
            continue  # the same in other words
        if one.restart and any(folder == one.folder for folder, _ in found):
            why = "restart=true would set aside what another job of the same training has just trained"
            raise UserError(f"{name}: {why}: ask for one evaluation, and for the others by iwae-eval")
        found[one.folder, one.evaluation] = job, one
        kept = one.folder / "evaluations" / one.evaluation / "result.json"
        if elsewhere or (kept.is_file() and not experiment.restart):
            continue  # a finished job needs no data
        # What load refuses is said once, before job 0.
        data = json.dumps(job.config["data"], sort_keys=True)
        others = [job.config[key] for key in ("model", "objective", "evaluation", "train", "init_from")]
        parts = data + json.dumps(others, sort_keys=True)
        if data not in loaded:
            loaded[data] = experiment.data.load()
        if parts not in seen:
            with _naming(name):
                experiment.check_with(loaded[data])
            seen.add(parts)
    return list(found.values())


@contextmanager
def _naming(job: str | None) -> Iterator[None]:
    """Begin what is refused with the name of the job, if it has one."""
    try:
        yield
    except UserError as error:
        if job is not None:
            error.args = (f"{job}: {error}",)
        raise


def run_job(job: Job, sweep_folder: Path, number: int, launcher: str) -> float | None:
    """Run one job of a sweep, perhaps in another process; return what a search minimizes.

    That is the NLL of the validation split, nats; None if there is none. Errors are recorded, not raised, except for
    ``Stopped`` where the sweep was started by this process and ends here.
    """
    folder = SweepFolder(sweep_folder)
    if folder.stop.exists():
        return None
    sweep = folder.read()
    known = [planned.get("overrides") for planned in sweep.get("jobs", ())]
    # As in the table: a search that continues counts on.
    shown = known.index(job.overrides) if job.overrides in known else len(known)
    attempt = Attempt(folder, shown, job.overrides)
    if attempt.before == "failed" and launcher == BATCHED:
        # It failed, and was reported, while it trained with the others.
        return None
    attempt.begins()
    try:
        with labelled(job_name(shown, job.overrides, sweep.get("varied"))):
            result = _run(job, attempt, folder, number)
    except (Interrupted, KeyboardInterrupt) as error:
        received = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
        attempt.ends("interrupted", error)
        if _sweep is not None:
            raise Stopped(128 + received) from None
        if adapter(launcher).preempts and received == preemption():
            # The state is saved: the engine's own handler may queue the job again.
            signal.raise_signal(received)
        return None
    except Exception as error:
        attempt.ends("failed", error)
        if _sweep is not None:
            _sweep.failed_here()
        return None
    except BaseException as error:
        attempt.ends("interrupted", error)
        raise
    attempt.ends("finished")
    if _sweep is not None:
        _sweep.update()  # now, not among the lines of the next job
    return result.get("validation", {}).get("nll")


def _run(job: Job, attempt: Attempt, folder: SweepFolder, number: int) -> dict[str, Any]:
    from iwae_cli.runs.runner import run

    experiment = job.experiment(folder.path.name)
    is_cut_short = attempt.before in ("running", "pending")  # also by the training of several at once
    if experiment.restart and (is_cut_short or attempt.has_made(experiment.folder().path)):
        # Set aside already. A grid that is typed again has forgotten its attempts, and restarts.
        job = replace(job, config={**job.config, "restart": False})
        experiment = job.experiment(folder.path.name)
    if _sweep is None:
        experiment.device.assign_gpu(number)
    if experiment.evaluation.workers is None:
        experiment.evaluation.workers = folder.read().get("workers")
    attempt.begins(experiment.folder().path, evaluation_name(job.config))
    is_waiting = False
    while True:
        try:
            return run(experiment)
        except RunLocked as error:
            # Another sweep shares this run, or a job has survived the process that started it.
            if not is_waiting:
                announce(one_line(f"waiting: {error}"))
            is_waiting = True
            time.sleep(LOCKED_SECONDS)


def _train_together(jobs: list[Job], sweep: Sweep) -> None:
    """Train the jobs that can be one program; what is left of each is done when its turn comes."""
    from iwae_cli.sweeps.ensemble import batches, train_together

    overrides = [job.overrides for job in jobs]

    def attempt_of(experiment: Experiment) -> Attempt:
        return Attempt(sweep.folder, overrides.index(experiment.overrides), experiment.overrides)

    for batch in batches([job.experiment(sweep.folder.path.name) for job in jobs]):
        try:
            any_failed = train_together(batch, attempt_of, sweep.stop_on_error)
        except Interrupted as error:
            raise Stopped(error.exit_code) from None
        if any_failed:
            sweep.failed_here()
