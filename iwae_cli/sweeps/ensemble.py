"""Jobs of a sweep that train at once, each in its own run folder; each is evaluated alone, as any run.

This does part of what the jobs would do one after the other, and leaves each run as if interrupted after training. What
cannot be done here is done, or reported, when the job has its turn.
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
from iwae_cli.record.identity import evaluation_name, is_ours
from iwae_cli.runs.experiment import Experiment
from iwae_cli.runs.extend import extend
from iwae_cli.runs.runner import Runner, logging_to
from iwae_cli.sweeps.records import Attempt, Status
from iwae_cli.training import checkpoint
from iwae_cli.training.ensemble import Member, train_ensemble
from iwae_cli.training.settings import PLAIN
from iwae_cli.training.steps.choose import all_ours, should_compile
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep

AT_ONCE = 16
"""Most runs that train at once; all their tensors are in memory."""

log = logging.getLogger("iwae_cli")


def batches(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """Return groups that may train at once: equal k, and equal in all but seed, objective and optimizer settings."""
    alike: dict[str, list[Experiment]] = defaultdict(list)
    for experiment in experiments:
        # A user's own optimizer may couple the parameters that it is given.
        classes = type(experiment.model), type(experiment.objective), experiment.optimizer.func
        ours = all(is_ours(cls.__module__) for cls in classes)
        # Other settings than these belong to one training: the draws that survive a roulette, the length of a clipped
        # gradient, where patience ends.
        if ours and experiment.training == PLAIN and experiment.schedule.patience is None:
            free = ("seed", "objective", "optimizer", "output_dir", "logger", "restart")
            same = {key: value for key, value in experiment.config.items() if key not in free}
            kind = experiment.config["optimizer"]["_target_"], experiment.objective.num_samples
            alike[json.dumps([same, kind], sort_keys=True)].append(experiment)
    found = []
    for members in alike.values():
        # Members of one objective must be neighbours.
        members.sort(key=lambda experiment: json.dumps(experiment.config["objective"], sort_keys=True))
        found += [members[start : start + AT_ONCE] for start in range(0, len(members), AT_ONCE)]
    return [members for members in found if len(members) > 1]


def train_together(
    experiments: Sequence[Experiment], attempt_of: Callable[[Experiment], Attempt], stop_on_error: bool
) -> bool:
    """Train one of the ``batches`` to the end of the schedule; return whether any run failed.

    Runs that are trained already or that another process holds are left out. Runs at different steps, after a kill
    between two checkpoints, train in several groups. Where a run fails, the others stop if ``stop_on_error``; their
    states are saved.

    Raises:
        Interrupted: by a signal; all states are saved.
    """
    experiments[0].device.setup()
    any_failed = False
    with ExitStack() as stack:
        caught = stack.enter_context(signals.caught())
        groups: dict[tuple[int, bool], list[Experiment]] = defaultdict(list)
        with suppress(UserError):
            data = experiments[0].load()
            model = experiments[0].model.outline(data.image_shape, data.levels)
            for experiment in experiments if all_ours(model, experiments[0].objective) else ():
                caught.check()
                with suppress(UserError, OSError):
                    if (standing := _standing(experiment, data, stack)) is not None:
                        groups[standing].append(experiment)
        caught.check()
        for members in groups.values():
            if len(members) > 1 and not (any_failed and stop_on_error):
                ready = [member for member in members if _is_ready(member, stack)]
                if runners := _begun(ready, data, caught):
                    attempts = [attempt_of(runner.experiment) for runner in runners]
                    any_failed |= _train(runners, attempts, stop_on_error)
    return any_failed


def _standing(experiment: Experiment, data: Data, stack: ExitStack) -> tuple[int, bool] | None:
    """Lock a run; return its step, and whether its steps were compiled; None if it is trained."""
    folder = experiment.folder()
    folder.path.mkdir(parents=True, exist_ok=True)
    stack.enter_context(RunLock(folder.path))
    if experiment.restart:
        return 0, False
    extend(experiment, data, folder)
    if not checkpoint.exists(folder.checkpoint):
        # A finished run that has lost its checkpoint still has a result.
        return None if folder.result() is not None else (0, False)
    state = checkpoint.load(folder.checkpoint, folder.identity)
    return (state.step, bool(state.compiled)) if state.step < state.total_steps else None


def _is_ready(experiment: Experiment, stack: ExitStack) -> bool:
    """Return whether the folder is ready; with restart=true, first set an old run aside and lock the new folder."""
    folder = experiment.folder()
    if experiment.restart and (folder.path / "config.yaml").exists():
        try:
            log.warning("restart: the old run is kept as %s", folder.set_aside().name)
            folder.path.mkdir()
            stack.enter_context(RunLock(folder.path))
        except (UserError, OSError):
            return False
    return True


def _begun(members: Sequence[Experiment], data: Data, caught: Signals) -> list[Runner]:
    """Return the runners that can train at once; none if there would be only one."""
    runners: list[Runner] = []
    for experiment in members if len(members) > 1 else ():
        folder = experiment.folder()
        try:
            with logging_to(folder):
                runner = Runner(experiment, data, folder, caught)
                runner.begin()
                runner.record_plan("compiled" if _machine_code(runner) else "plain", runs_at_once=len(members))
                at, of, others = runner.state.step, runner.trainer.total_steps, len(members) - 1
                log.info("begin at step %d of %d, at once with %d other runs", at, of, others)
        except (UserError, OSError):
            # Its job reports the error when it has its turn; the others begin again without it.
            for runner in runners:
                runner.logger.close("interrupted")
            return _begun([member for member in members if member is not experiment], data, caught)
        runners.append(runner)
    return runners


def _machine_code(runner: Runner) -> bool:
    trainer, experiment = runner.trainer, runner.experiment
    rows, _ = trainer.minibatches.shape
    return should_compile(
        trainer.model, experiment.objective, experiment.device, trainer.total_steps, rows, runner.state.compiled
    )


def _train(runners: Sequence[Runner], attempts: Sequence[Attempt], stop_on_error: bool) -> bool:
    """Train runs that stand at the same step, with the records of their jobs; return whether any failed."""
    for runner, attempt in zip(runners, attempts, strict=True):
        attempt.begins(runner.folder.path, evaluation_name(runner.experiment.config))
    left = dict(enumerate(attempts))
    ended: Status = "interrupted"
    error: Interrupted | None = None
    caught = runners[0].signals
    try:
        saved = _trained(runners, left, stop_on_error)
        any_failed = len(left) < len(runners)
        stopped = any_failed and stop_on_error
        for runner in [runners[number] for number in left]:
            if runner.trainer.is_done:
                why = "trained; evaluated after all have trained"
            elif caught.number is not None:
                why = str(Interrupted(caught.number))
            else:
                why = "stopped, since another run failed" if stopped else "continues alone"
            with suppress(OSError), logging_to(runner.folder):
                log.info("at step %d after %.1f s of training: %s", runner.state.step, runner.state.seconds, why)
                if saved:
                    runner.folder.set_status("interrupted", runner.state.step, why)
                runner.logger.close("interrupted")
        caught.check()
        ended = "interrupted" if stopped else "pending"
        return any_failed
    except Interrupted as signalled:
        error = signalled
        raise
    finally:
        for attempt in left.values():
            attempt.ends(ended, error)


def _trained(runners: Sequence[Runner], left: dict[int, Attempt], stop_on_error: bool) -> bool:
    """Train; remove from ``left`` the runs that fail; return whether the states of the others are saved."""

    def failed(number: int, error: RunFailed | OSError) -> None:
        runner = runners[number]
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(logging_to(runner.folder))
                runner.logger.close("failed")
                # The run ends here, so all loggers record it.
                runner.open()
            left.pop(number).ends("failed", runner.ended(error))

    members = []
    shared: dict[str, Objective] = {}
    for runner in runners:
        # Runs with equal settings share one objective, and so its calls.
        named = json.dumps(runner.experiment.config["objective"], sort_keys=True)
        objective = shared.setdefault(named, runner.experiment.objective)
        members.append(Member(runner.trainer, PlainStep(runner.model, objective, runner.trainer.optimizer)))
    trainer, state = runners[0].trainer, runners[0].state
    progress.announce(f"{len(runners)} runs at once, each {runners[0].plan()}")
    with progress.Progress(
        f"training {len(runners)} runs",
        total=trainer.schedule.passes,
        images_per_unit=len(runners[0].data.train) * len(runners),
        start=state.step / trainer.steps_per_pass,
    ) as shown:
        for runner in runners:
            runner.progress = shown
        try:
            with oom_as_run_failed():
                train_ensemble(members, _machine_code(runners[0]), failed, stop_on_error)
        except (CannotCompileError, RunFailed) as error:
            # Ctrl-C also ends the compiler.
            if runners[0].signals.number is None:
                progress.announce(f"these runs train one after the other from here on: {error}")
            return isinstance(error, CannotCompileError)
    return True
