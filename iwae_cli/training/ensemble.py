"""The training loop of several runs at once, with the minibatches and checkpoints of each alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from iwae_cli.core.errors import RunFailed
from iwae_cli.training.steps.batched import BatchedStep
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep
from iwae_cli.training.trainer import Diverged, SaveClock, Trainer


@dataclass(frozen=True)
class Member:
    """One of several trainings, with the step that it would make alone."""

    trainer: Trainer
    step: PlainStep


def train_ensemble(
    members: Sequence[Member],
    machine_code: bool,
    failed: Callable[[int, RunFailed | OSError], None],
    stop_on_error: bool,
) -> None:
    """Train all, step by step together, to the end of their schedule or until they are interrupted.

    A member that fails is left out from then on; the others continue, or stop if ``stop_on_error``.

    Args:
        members: at the same step of the same schedule, with minibatches of one size; see ``BatchedStep`` for the rest.
            The ``plan`` of their states says how many runs train at once.
        machine_code: whether the step is compiled.
        failed: called for every member that fails, with its number.
        stop_on_error: see above.

    Raises:
        CannotCompileError: the members cannot be trained together; if any step was made, all states are saved.
    """
    running = dict(enumerate(members))
    stopped = False

    def attempt(number: int, work: Callable[[], bool]) -> None:
        nonlocal stopped
        try:
            if work():
                return
            stopped = True
        except (RunFailed, OSError) as error:
            stopped |= stop_on_error
            member = running[number]
            failed(number, member.trainer.located(error, member.step) if isinstance(error, Diverged) else error)
        del running[number]

    started = time.monotonic()
    step_fn, size = batched_step(members, machine_code), len(members)
    for member in members:
        member.trainer.state.seconds += time.monotonic() - started
    for number, member in enumerate(members):
        attempt(number, member.trainer.begin)
    clock = SaveClock()
    for step in range(members[0].trainer.state.step, members[0].trainer.total_steps):
        if stopped or not running:
            break
        if len(running) < size:
            size = len(running)
            for member in running.values():
                member.trainer.state.update_plan(runs_at_once=size)
            try:
                step_fn = batched_step(list(running.values()), machine_code)
            except CannotCompileError:
                _save(running.values())
                raise
        for member in running.values():
            member.trainer.begin_step(step)
        x, noise = zip(*(member.trainer.minibatches[step] for member in running.values()), strict=True)
        bounds, save = step_fn(x, noise), clock.is_due()
        for (number, member), bound in zip(list(running.items()), bounds, strict=True):
            attempt(number, partial(member.trainer.end_step, bound, save))
    if stopped:
        _save(running.values())


def _save(running: Iterable[Member]) -> None:
    for member in running:
        # A state that cannot be saved leaves the run at its last checkpoint.
        with suppress(OSError, Diverged):
            member.trainer.save()


def batched_step(members: Sequence[Member], machine_code: bool) -> BatchedStep:
    """Return the common step of the members, for whole minibatches.

    Raises:
        CannotCompileError: see ``BatchedStep``.
    """
    for member in members:
        member.step.model.train()
    x = next(members[0].step.model.parameters()).new_zeros(members[0].trainer.minibatches.shape)
    return BatchedStep([member.step for member in members], x, machine_code)
