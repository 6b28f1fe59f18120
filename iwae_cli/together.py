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

from iwae_cli import console, signals
from iwae_cli.data.base import Data
from iwae_cli.device import memory_told
from iwae_cli.errors import Interrupted, RunFailed, RunLocked, UserError
from iwae_cli.experiment import Experiment, logging_to
from iwae_cli.files import RunLock
from iwae_cli.objectives.base import Objective
from iwae_cli.run_folder import RunFolder
from iwae_cli.session import Session
from iwae_cli.signals import Signals
from iwae_cli.sinks.jsonl import read_history
from iwae_cli.training import checkpoint
from iwae_cli.training.batched import Lane, train_batched
from iwae_cli.training.compiled import CannotCompileError

AT_ONCE = 16
"""Runs that train together at most; their tensors are all in memory."""

DONE = -1
"""Stands for the step of a run whose training is over."""

logger = logging.getLogger("iwae_cli")


def batches(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Those that may train together: all is the same but seed, objective and settings of the optimizer, and k is."""
    alike: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        ours = all(type(part).__module__.startswith("iwae_cli.") for part in (experiment.model, experiment.objective))
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
    failed: Callable[[Experiment, RunFailed], None],
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
    any_failed = False
    experiments[0].device.setup()
    with ExitStack() as stack:
        caught = stack.enter_context(signals.caught())
        standing: dict[int, list[tuple[Experiment, RunFolder]]] = defaultdict(list)
        with suppress(UserError):
            data = experiments[0].load()
            for experiment in experiments:
                folder = RunFolder(experiment.output_dir / experiment.identity())
                with suppress(RunLocked, UserError, OSError):
                    standing[_locked(experiment, folder, stack)].append((experiment, folder))
        for step, members in standing.items():
            if step != DONE and len(members) > 1:
                any_failed |= _train(members, data, caught, begins, failed, stop_on_error)
            if any_failed and stop_on_error:
                break
    return any_failed


def _locked(experiment: Experiment, folder: RunFolder, stack: ExitStack) -> int:
    """The step at which a run stands, which nobody else touches from here on; ``DONE`` if it is trained."""
    if experiment.restart and folder.path.exists():
        with RunLock(folder.path):
            logger.warning("restart: the old run is kept as %s", folder.set_aside().name)
    folder.path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(RunLock(folder.path))
    if not folder.checkpoint.exists():
        return 0
    state = checkpoint.load(folder.checkpoint, folder.identity)
    read_history(folder.path)
    return state.step if state.step < state.total_steps else DONE


def _train(
    members: Sequence[tuple[Experiment, RunFolder]],
    data: Data,
    caught: Signals,
    begins: Callable[[Experiment], None],
    failed: Callable[[Experiment, RunFailed], None],
    stop_on_error: bool,
) -> bool:
    sessions: list[Session] = []
    shared: dict[str, Objective] = {}
    for experiment, folder in members:
        begins(experiment)
        with logging_to(folder):
            session = Session(experiment, data, folder, caught, runs_at_once=len(members))
            session.begin()
            at, of, others = session.state.step, session.trainer.total_steps, len(members) - 1
            logger.info("begin at step %d of %d, together with %d other runs", at, of, others)
        named = json.dumps(experiment.config["objective"], sort_keys=True)
        session.trainer.objective = shared.setdefault(named, experiment.objective)
        sessions.append(session)
    failures = _failures(sessions, failed, stop_on_error)
    why = "trained, and to be evaluated when the others are"
    if caught.number is not None:
        why = str(Interrupted(caught.number))
    elif failures and stop_on_error:
        why = "stopped, since another run failed"
    for number, session in enumerate(sessions):
        if number not in failures:
            with suppress(OSError), logging_to(session.folder):
                logger.info("at step %d after %.1f s of training: %s", session.state.step, session.state.seconds, why)
                session.folder.set_status("interrupted", session.state.step, why)
                session.sink.close("interrupted")
    caught.check()
    return bool(failures)


def _failures(
    sessions: Sequence[Session], tell: Callable[[Experiment, RunFailed], None], stop_on_error: bool
) -> set[int]:
    """Train; the numbers of the sessions whose training has failed."""
    failures: set[int] = set()

    def failed(number: int, error: RunFailed) -> None:
        failures.add(number)
        session = sessions[number]
        with logging_to(session.folder):
            session.sink.close("failed")
            # It ends here, so that every sink has to know.
            session.open()
            session.ended(error)
        tell(session.experiment, error)

    trainer, state = sessions[0].trainer, sessions[0].state
    with console.Progress(
        f"training {len(sessions)} runs",
        total=trainer.schedule.passes,
        images_per_unit=len(trainer.data.train) * len(sessions),
        start=state.step / trainer.steps_per_pass,
    ) as shown:
        for session in sessions:
            session.progress = shown
        lanes = [Lane(session.trainer, session.state, session) for session in sessions]
        try:
            with memory_told():
                train_batched(lanes, state.plan["compiler"] is not None, failed, stop_on_error)
        except (CannotCompileError, RunFailed, OSError) as error:
            # Ctrl-C also ends the compiler.
            if sessions[0].signals.number is None:
                console.announce(f"these runs train one after the other from here on: {error}")
    return failures
