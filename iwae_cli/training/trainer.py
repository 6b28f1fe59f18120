"""The training loop: passes over the data, validation, checkpoints; resumable at every step, bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from iwae_cli.core.errors import Interrupted, RunFailed
from iwae_cli.core.noise import GeneratorNoise, Noise, derive, generator
from iwae_cli.core.numerics import accumulator_device
from iwae_cli.data.base import Data
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, Objective
from iwae_cli.training.checkpoint import State
from iwae_cli.training.schedule import Schedule
from iwae_cli.training.steps.compiled import CompiledRouletteStep, CompiledStep
from iwae_cli.training.steps.plain import train_step
from iwae_cli.training.steps.roulette import roulette_step

SAVE_EVERY_SECONDS = 30.0
"""At most this much work is lost to a SIGKILL."""


Steps = Generator[tuple[Tensor, Noise], tuple[Tensor, bool] | None, bool]
"""A training that waits for its steps: see ``Trainer.steps``."""


@runtime_checkable
class Hooks(Protocol):
    """What the loop tells its caller, always between two steps."""

    def on_step(self, step: int) -> None:
        """After every step."""

    def on_best(self, state: State) -> None:
        """After a validation that found the best weights so far."""

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        """After every pass: ``pass`` (from 1), ``train/bound`` in nats, ``learning_rate``; and where it was
        validated ``validation/bound`` in nats, None if it is not finite."""

    def on_save(self, state: State) -> None:
        """The state is to be kept."""

    def interrupted(self) -> bool:
        """Whether to stop here; the state is given to ``on_save`` before ``Trainer.run`` returns."""
        ...


@dataclass
class Trainer:
    """Trains ``model`` in place from ``state`` to the end of the schedule.

    Attributes:
        model, objective, optimizer, schedule, data: what is trained, how, and on what.
        seed: seed of the run: order of the images, binarization and noise are derived from (seed, stream, step).
        batch_size: images a step; the last batch of a pass takes what is left.
        validate: the validation bound in nats of the model as it is; may raise Interrupted.
        validation_every: passes between validations; the last pass is always validated.
        tau: where ``Training.check`` had nothing against it, of ``roulette_step``; None for ``train_step``.
    """

    model: LatentVariableModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    data: Data
    seed: int
    batch_size: int
    validate: Callable[[], float]
    validation_every: int
    tau: float | None = None
    _compiled: CompiledStep | CompiledRouletteStep | None = field(default=None, init=False, repr=False)

    @property
    def steps_per_pass(self) -> int:
        """Batches in one pass over the training split."""
        return math.ceil(len(self.data.train) / self.batch_size)

    @property
    def whole_batch(self) -> int:
        """Images of every step but perhaps the last of a pass."""
        return min(self.batch_size, len(self.data.train))

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.steps_per_pass * self.schedule.passes

    def is_done(self, state: State) -> bool:
        """Whether nothing of the schedule is left, the last validation included."""
        return state.step == self.total_steps and not self.is_open(state)

    def is_open(self, state: State) -> bool:
        """Whether the last step of a pass is done and its end is not: it was stopped while it was validated."""
        return state.step % self.steps_per_pass == 0 and state.bound_sum != 0

    def compile(self) -> None:
        """Compile the step for whole batches; what is smaller keeps the plain step.

        Raises:
            CannotCompileError: it cannot be; the trainer is as before.
        """
        parameter = next(self.model.parameters())
        x = parameter.new_zeros(self.whole_batch, self.data.train.shape[1])
        model = self.model.train()
        if self.tau is None:
            self._compiled = CompiledStep(model, self.objective, self.optimizer, x)
        else:
            self._compiled = CompiledRouletteStep(model, self._thinned, self.optimizer, x, self.tau)

    def plain(self, x: Tensor, noise: Noise) -> Tensor:
        """The bounds of a step, as it is for a batch of any size."""
        if self.tau is None:
            return train_step(self.model, self.objective, self.optimizer, x, noise)
        return roulette_step(self.model, self._thinned, self.optimizer, x, noise, self.tau)

    @property
    def _thinned(self) -> BoundObjective:
        assert isinstance(self.objective, BoundObjective)
        return self.objective

    def run(self, state: State, hooks: Hooks) -> bool:
        """Train on from ``state.step``; True if the schedule was completed, False if interrupted.

        Raises:
            RunFailed: the training bound is no longer finite.
        """
        steps, last_save, reply = self.steps(state, hooks), time.monotonic(), None
        while True:
            try:
                x, noise = steps.send(reply)
            except StopIteration as end:
                return bool(end.value)
            step = self._compiled if self._compiled is not None and len(x) == self.whole_batch else self.plain
            bounds = step(x, noise)
            save = time.monotonic() - last_save > SAVE_EVERY_SECONDS
            if save:
                last_save = time.monotonic()
            reply = bounds, save

    def steps(self, state: State, hooks: Hooks) -> Steps:
        """Everything of ``run`` but the steps themselves, which whoever drives it carries out.

        It gives a minibatch and its noise, and wants the bounds of the step that was made of them, and whether the
        state is to be saved (it is, whatever is wanted, when it stops). ``Interrupted`` thrown in stops it there.

        Returns:
            As ``run``.
        """
        parameter = next(self.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        images = self.data.train.to(device)
        random = torch.Generator(device)
        noise = GeneratorNoise(random, dtype)
        bound_sum = torch.tensor(state.bound_sum, dtype=torch.float64, device=accumulator_device(device))
        base_rates = [group["lr"] for group in self.optimizer.param_groups]
        if state.step:
            self.optimizer.load_state_dict(state.optimizer)
        order, first = torch.empty(0), state.step
        started = time.monotonic()
        seconds_before = state.seconds

        def save() -> None:
            state.bound_sum = float(bound_sum)
            state.seconds = seconds_before + time.monotonic() - started
            state.model = self.model.state_dict()
            state.optimizer = self.optimizer.state_dict()
            hooks.on_save(state)

        def end_pass(pass_index: int) -> bool:
            try:
                rate = base_rates[0] * self.schedule.factor(pass_index)
                self._end_pass(state, hooks, pass_index, float(bound_sum) / len(images), rate)
            except Interrupted:
                # As the steps have left it: the sum of the bounds says, when the run goes on, that this is still to do.
                save()
                return False
            bound_sum.zero_()
            return True

        if self.is_open(state):
            if not end_pass(state.step // self.steps_per_pass - 1):
                return False
            save()
        self.model.train()
        for step in range(state.step, self.total_steps):
            pass_index, batch_index = divmod(step, self.steps_per_pass)
            if batch_index == 0 or step == first:
                order = self._order(pass_index).to(device)
                factor = self.schedule.factor(pass_index)
                for group, rate in zip(self.optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
            random.manual_seed(derive(self.seed, "step", step) >> 65)
            chosen = order[batch_index * self.batch_size : (batch_index + 1) * self.batch_size]
            x = self.data.batch(images.index_select(0, chosen), random).to(dtype)
            try:
                reply = yield x, noise
            except Interrupted:
                save()
                return False
            assert reply is not None
            bounds, wanted = reply[0].to(bound_sum), reply[1]
            bound_sum += bounds.sum()
            state.step = step + 1
            hooks.on_step(state.step)
            if batch_index == self.steps_per_pass - 1 and not end_pass(pass_index):
                return False
            interrupted = hooks.interrupted()
            done = state.step == self.total_steps
            if interrupted or done or wanted:
                save()
            if interrupted and not done:
                return False
        return True

    def _order(self, pass_index: int) -> Tensor:
        order = generator("cpu", self.seed, "order", pass_index)
        return torch.randperm(len(self.data.train), generator=order)

    def _end_pass(self, state: State, hooks: Hooks, pass_index: int, bound: float, rate: float) -> None:
        if not math.isfinite(bound):
            raise RunFailed(
                f"training diverged in pass {pass_index + 1}: the bound is {bound}; "
                "try a smaller optimizer.lr or a larger batch_size"
            )
        metrics: dict[str, float | None] = {"pass": pass_index + 1, "train/bound": bound, "learning_rate": rate}
        last = pass_index + 1 == self.schedule.passes
        if last or (pass_index + 1) % self.validation_every == 0:
            self.model.eval()
            value = self.validate()
            self.model.train()
            metrics["validation/bound"] = value if math.isfinite(value) else None
            if math.isfinite(value) and value > state.best.get("bound", -math.inf):
                state.best = {"step": state.step, "bound": value}
                hooks.on_best(state)
        hooks.on_pass(state.step, metrics)


class NullHooks:
    """Hooks that do nothing: of a process that leaves them to another."""

    def on_step(self, step: int) -> None:
        """As in ``Hooks``."""

    def on_best(self, state: State) -> None:
        """As in ``Hooks``."""

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        """As in ``Hooks``."""

    def on_save(self, state: State) -> None:
        """As in ``Hooks``."""

    def interrupted(self) -> bool:
        """Never."""
        return False
