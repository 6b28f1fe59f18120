"""The rules that choose the form of a training step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.device import Device, compiler
from iwae_cli.core.errors import RunFailed
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, Objective
from iwae_cli.record.identity import is_ours
from iwae_cli.training.settings import Training
from iwae_cli.training.steps.compiled import CompiledRouletteStep, CompiledStep
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep
from iwae_cli.training.steps.roulette import RouletteStep

LATENCY = 20.0
"""Seconds that compiling takes on one quiet core, about; less where a similar graph was compiled before."""

SAVED_PER_STEP = 1e-3
SAVED_PER_PRODUCT = 1.5e-11
"""Seconds saved on one core, about: in every step, and in every step for each pair of a draw and a parameter."""

log = logging.getLogger("iwae_cli")


@runtime_checkable
class Step(Protocol):
    """One update of a model; the checkpoint stores its name, which is compared when the run resumes."""

    @property
    def name(self) -> str:
        """``plain``, ``roulette``, ``compiled`` or ``compiled roulette``."""
        ...

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """Return the bound of every image before the update, nats, detached."""
        ...


def choose_step(
    model: LatentVariableModel,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    settings: Training,
    device: Device,
    total_steps: int,
    shape: tuple[int, int],
    compiled: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> Step:
    """Return the step that trains ``model``; it is plain where compiling fails, with a warning.

    Args:
        model, objective, optimizer: what is trained, and how.
        settings: whether the roulette leaves out draws.
        device: whether to compile.
        total_steps: of the whole schedule.
        shape: (rows, pixels) of a minibatch.
        compiled: whether the steps so far were compiled; None before the first.
        check: called when the compiler fails; raises Interrupted if a signal ended it.

    Raises:
        RunFailed: ``device.compile=on``, and it cannot be compiled.
    """
    plain: PlainStep | RouletteStep
    if settings.backward == "roulette":
        assert isinstance(objective, BoundObjective)  # Training.check refuses others
        plain = RouletteStep(model, objective, optimizer, settings.tau)
    else:
        plain = PlainStep(model, objective, optimizer)
    if not should_compile(model, objective, device, total_steps, shape[0], compiled):
        return plain
    x = next(model.parameters()).new_zeros(shape)
    model.train()
    try:
        return CompiledRouletteStep(plain, x) if isinstance(plain, RouletteStep) else CompiledStep(plain, x)
    except CannotCompileError as error:
        check()
        if device.compile == "on":
            raise RunFailed(f"device.compile=on: {error}; write device.compile=auto or off") from error
        log.warning("the step is not compiled, which changes nothing but the time it takes: %s", error)
        return plain


def should_compile(
    model: LatentVariableModel,
    objective: Objective,
    device: Device,
    total_steps: int,
    rows: int,
    compiled: bool | None,
) -> bool:
    """Return whether the step is compiled, by rules that give the same answer whenever a run resumes.

    A run that has begun keeps its form. For the arguments see ``choose_step``; ``rows`` is the size of a minibatch.
    """
    if compiled is not None:
        return compiled
    if device.compile != "auto":
        return device.compile == "on"
    # The rule was measured on processors.
    if not all_ours(model, objective) or device.resolve().type != "cpu":
        return False
    parameters = sum(p.numel() for p in model.parameters())
    return compiling_pays(total_steps, rows * objective.num_samples, parameters) and compiler() is not None


def all_ours(model: LatentVariableModel, objective: Objective) -> bool:
    """Return whether the objective and every module of the model are classes of this package or of torch.

    A graph would freeze the counters of a user's own class.
    """
    return all(is_ours(type(part).__module__) for part in (*model.modules(), objective))


def compiling_pays(steps: int, draws: int, parameters: int) -> bool:
    """Return whether compiling saves more time than it takes, by a rule and not by a clock.

    Args:
        steps: of the whole schedule.
        draws: of q in one step, all images together.
        parameters: of the model.
    """
    return steps * (SAVED_PER_STEP + SAVED_PER_PRODUCT * draws * parameters) > LATENCY
