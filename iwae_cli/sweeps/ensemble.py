"""Jobs of a sweep that train together, each in a run folder of its own; evaluated is each alone, as any run.

It does a part of what the jobs would do one after the other, and leaves them as a job leaves itself that is stopped
after its training: whatever cannot be done here is done, or told, when a job has its turn.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from iwae_cli.core import progress, signals
from iwae_cli.core.device import oom_as_run_failed
from iwae_cli.core.errors import Interrupted, RunFailed, UserError
from iwae_cli.core.files import RunLock
from iwae_cli.core.signals import Signals
from iwae_cli.data.base import Data
from iwae_cli.objectives.base import Objective
from iwae_cli.runs.experiment import Experiment
from iwae_cli.runs.runner import Runner, logging_to
from iwae_cli.training import checkpoint
from iwae_cli.training.ensemble import Lane, train_batched
from iwae_cli.training.steps.compiled import CannotCompileError

AT_ONCE = 16
"""Runs that train together at most; their tensors are all in memory."""

DONE = -1
"""Stands for the step of a run whose training is over."""

log = logging.getLogger("iwae_cli")


def batches(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Those that may train together: all is the same but seed, objective and settings of the optimizer, and k is."""
    alike: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        ours = all(type(part).__module__.startswith("iwae_cli.") for part in (experiment.model, experiment.objective))
        # An optimizer of one's own may couple the parameters that it is given.
        ours &= experiment.optimizer.func.__module__.startswith("torch.")
        # The draws of the roulette that are sent back are not of one number.
        if ours and experiment.training.backward == "all":
            free = ("seed", "objective", "optimizer", "output_dir", "logger", "restart")
            same = {key: value for key, value in experiment.config.items() if key not in free}
            kind = experiment.config["optimizer"]["_target_"], experiment.objective.num_samples
            alike[json.dumps([same, kind], sort_keys=True)].append(experiment)
    found = []
    for members in alike.values():
        # Those of one objective side by side.
        members.sort(key=lambda experiment: json.dumps(experiment.config["objective"], sort_keys=True))
        found += [members[start : start + AT_ONCE] for start in range(0, len(members), AT_ONCE)]
    return [members for members in found if len(members) > 1]


def train_together(
    experiments: Sequence[Experiment],
    begins: Callable[[Experiment], None],
    failed: Callable[[Experiment, BaseException], None],
    stop_on_error: bool,
) -> bool:
    """Train one of the ``batches`` to the end of the schedule.

    Left out are runs that are trained already or that another process has; those that stand at different steps, since
    they were stopped by a kill between two files, train in several parts.

    Args:
        experiments: checked.
        begins: told of every one that trains.
        failed: told of every one that failed; its folder says so too.
        stop_on_error: whether the others stop then; their states are saved.

    Returns:
        Whether any failed.

    Raises:
        Interrupted: by a signal; all states are saved.
    """
    experiments[0].device.setup()
    any_failed = False
    with ExitStack() as stack:
        caught = stack.enter_context(signals.caught())
        standing: dict[tuple[int, bool], list[Experiment]] = defaultdict(list)
        with suppress(UserError):
            data = experiments[0].load()
            for experiment in experiments:
                caught.check()
                with suppress(UserError, OSError):
                    standing[_standing(experiment, stack)].append(experiment)
        caught.check()
        for (step, _), members in standing.items():
            if step != DONE and len(members) > 1 and not (any_failed and stop_on_error):
                members = [member for member in members if _is_ready(member, stack)]
                any_failed |= _train(members, data, caught, begins, failed, stop_on_error)
    return any_failed


def _standing(experiment: Experiment, stack: ExitStack) -> tuple[int, bool]:
    """The step at which a run stands, ``DONE`` if it is trained, and whether its step was compiled; it is locked."""
    folder = experiment.folder()
    folder.path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(RunLock(folder.path))
    if experiment.restart:
        return 0, False
    if not folder.checkpoint.exists():
        # Of a finished run that has lost its checkpoint, a result is left.
        return DONE if folder.result() is not None else 0, False
    state = checkpoint.load(folder.checkpoint, folder.identity)
    return state.step if state.step < state.total_steps else DONE, state.plan.get("compiler") is not None


def _is_ready(experiment: Experiment, stack: ExitStack) -> bool:
    """Whether the folder is that in which to train: one to be begun again is set aside, and the new one locked."""
    folder = experiment.folder()
    if experiment.restart and (folder.path / "config.yaml").exists():
        try:
            log.warning("restart: the old run is kept as %s", folder.set_aside().name)
            folder.path.mkdir()
            stack.enter_context(RunLock(folder.path))
        except (UserError, OSError):
            return False
    return True


def _train(
    members: Sequence[Experiment],
    data: Data,
    caught: Signals,
    begins: Callable[[Experiment], None],
    failed: Callable[[Experiment, BaseException], None],
    stop_on_error: bool,
) -> bool:
    """``train_together`` for runs that stand at the same step."""
    sessions = _begun(members, data, caught)
    if not sessions:
        return False
    for session in sessions:
        begins(session.experiment)
    failures, saved = _trained(sessions, failed, stop_on_error)
    for number, session in enumerate(sessions):
        if number in failures:
            continue
        if session.trainer.is_done(session.state):
            why = "trained, and to be evaluated when the others are"
        elif caught.number is not None:
            why = str(Interrupted(caught.number))
        else:
            why = "stopped, since another run failed" if failures and stop_on_error else "to go on alone"
        with suppress(OSError), logging_to(session.folder):
            log.info("at step %d after %.1f s of training: %s", session.state.step, session.state.seconds, why)
            if saved:
                session.folder.set_status("interrupted", session.state.step, why)
            session.sink.close("interrupted")
    caught.check()
    return bool(failures)


def _begun(members: Sequence[Experiment], data: Data, caught: Signals) -> list[Runner]:
    """Sessions that can train together; none if there is but one."""
    sessions: list[Runner] = []
    for experiment in members if len(members) > 1 else ():
        folder = experiment.folder()
        try:
            with logging_to(folder):
                session = Runner(experiment, data, folder, caught, runs_at_once=len(members))
                session.begin()
                at, of, others = session.state.step, session.trainer.total_steps, len(members) - 1
                log.info("begin at step %d of %d, together with %d other runs", at, of, others)
        except (UserError, OSError):
            # It is told when its turn comes; the others begin again, as fewer.
            for session in sessions:
                session.sink.close("interrupted")
            return _begun([member for member in members if member is not experiment], data, caught)
        sessions.append(session)
    shared: dict[str, Objective] = {}
    for session in sessions:
        named = json.dumps(session.experiment.config["objective"], sort_keys=True)
        session.trainer.objective = shared.setdefault(named, session.experiment.objective)
    return sessions


def _trained(
    sessions: Sequence[Runner], tell: Callable[[Experiment, BaseException], None], stop_on_error: bool
) -> tuple[set[int], bool]:
    """Train; the numbers of the sessions whose training has failed, and whether the states of the others are saved."""
    failures: set[int] = set()

    def failed(number: int, error: RunFailed | OSError) -> None:
        failures.add(number)
        session = sessions[number]
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(logging_to(session.folder))
                session.sink.close("failed")
                # It ends here, so that every sink has to know.
                session.open()
            tell(session.experiment, session.ended(error))

    trainer, state = sessions[0].trainer, sessions[0].state
    with progress.Progress(
        f"training {len(sessions)} runs",
        total=trainer.schedule.passes,
        images_per_unit=len(trainer.data.train) * len(sessions),
        start=state.step / trainer.steps_per_pass,
    ) as shown:
        for session in sessions:
            session.progress = shown
        lanes = [Lane(session.trainer, session.state, session) for session in sessions]
        try:
            with oom_as_run_failed():
                train_batched(lanes, state.plan["compiler"] is not None, failed, stop_on_error)
        except (CannotCompileError, RunFailed) as error:
            # Ctrl-C also ends the compiler.
            if sessions[0].signals.number is None:
                progress.announce(f"these runs train one after the other from here on: {error}")
            return failures, isinstance(error, CannotCompileError)
    return failures, True
