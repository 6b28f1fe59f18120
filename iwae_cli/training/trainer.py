"""The training loop: steps, passes, validation and checkpoints; resumable at every step, bit for bit."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from typing import Protocol, cast, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from iwae_cli.core.errors import Interrupted, RunFailed
from iwae_cli.core.numerics import accumulator_device
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.training.checkpoint import State, not_finite
from iwae_cli.training.diagnostics import EVERY, diagnostics
from iwae_cli.training.minibatches import Minibatches
from iwae_cli.training.schedule import Schedule
from iwae_cli.training.settings import PLAIN, Training
from iwae_cli.training.steps.choose import Step
from iwae_cli.training.warmup import WarmedUp

SAVE_EVERY_SECONDS = 30.0
"""A SIGKILL loses at most this much work."""

ADVICE = "try a smaller optimizer.lr, which is another run, or a larger batch_size"

log = logging.getLogger("iwae_cli")


class Diverged(RunFailed):
    """The bound, a weight or the state of the optimizer is not finite; nothing of it was saved."""


@runtime_checkable
class Hooks(Protocol):
    """What the loop calls, always between two steps."""

    def on_step(self, step: int) -> None:
        """Called after every step."""

    def on_best(self, state: State) -> None:
        """Called after a validation that found the best weights so far."""

    def on_pass(self, step: int, metrics: dict[str, float | None]) -> None:
        """Called after every pass.

        ``metrics`` holds ``pass`` (from 1), ``train/bound`` in nats, ``learning_rate``; where a step was measured, the
        ``diagnostics``; after a validation ``validation/bound`` in nats. A value that is not finite is None.
        """

    def on_save(self, state: State) -> None:
        """Write a checkpoint of ``state``."""

    def interrupted(self) -> bool:
        """Return whether to stop after this step; the state is then saved."""
        ...


@final
class SaveClock:
    """Says when the next checkpoint is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Return whether ``SAVE_EVERY_SECONDS`` have passed since this was last True."""
        due = time.monotonic() - self._last > SAVE_EVERY_SECONDS
        if due:
            self._last = time.monotonic()
        return due


@final
class Trainer:
    """Trains ``model`` in place, from ``state`` to the end of the schedule.

    Args:
        model: holds the weights of ``state``.
        objective: what the steps maximize, for the diagnostics.
        optimizer: of the parameters that are trained; its learning rates are those of the first pass before
            ``schedule``.
        schedule: number of passes, and a factor on the learning rates for each.
        minibatches: images and noise of every step.
        validate: returns the validation bound of the model in nats; may raise Interrupted.
        validation_every: passes between validations; the last pass is always validated.
        state: where to begin; updated as the training proceeds.
        hooks: see ``Hooks``.
        settings: how a step is made.

    Attributes:
        model: what the steps train.
        evaluated: what is validated and evaluated: the model that was given, or its averaged weights.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        minibatches: Minibatches,
        validate: Callable[[], float],
        validation_every: int,
        state: State,
        hooks: Hooks,
        settings: Training = PLAIN,
    ) -> None:
        self.model = WarmedUp(model) if settings.kl_warmup else model
        self._without_weight = model
        self.evaluated = model
        self.settings = settings
        self._averaged: AveragedModel | None = None
        if settings.ema is not None:
            self._averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
            self.evaluated = cast(LatentVariableModel, self._averaged.module)
        if settings.clip is not None:
            _clip(optimizer, settings.clip)
        self.objective = objective
        self.optimizer = optimizer
        self.schedule = schedule
        self.minibatches = minibatches
        self.validate = validate
        self.validation_every = validation_every
        self.state = state
        self.hooks = hooks
        self.steps_per_pass = minibatches.per_pass
        state.total_steps = minibatches.per_pass * schedule.passes
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._measures = True

    @property
    def total_steps(self) -> int:
        """Steps of the schedule, or up to where ``patience`` has ended it."""
        return self.state.total_steps

    @property
    def is_validation_pending(self) -> bool:
        """Whether the training was interrupted between the last step of a pass and the end of its validation."""
        return self.state.step % self.steps_per_pass == 0 and self.state.bound_sum != 0

    @property
    def is_done(self) -> bool:
        """Whether all steps and the last validation are done."""
        return self.state.step == self.total_steps and not self.is_validation_pending

    def run(self, step_fn: Step) -> bool:
        """Train; return True if the schedule was completed, False if interrupted.

        Raises:
            Diverged: see there.
        """
        if not self.begin():
            return False
        clock = SaveClock()
        while (step := self.state.step) < self.total_steps:
            self.begin_step(step)
            x, noise = self.minibatches[step]
            bounds = step_fn(x, noise)
            try:
                if not self.end_step(bounds, save=clock.is_due()):
                    return False
            except Diverged as error:
                raise self.located(error, step_fn) from error
        return True

    def located(self, error: Diverged, step_fn: Step) -> Diverged:
        """Return the error with the step and the term that was not finite first.

        The steps since the last good state are repeated, since only then what they begin with is known.
        """
        good, end, names = self._good, self.state.step, [name for name, _ in self.model.named_parameters()]
        self.model.load_state_dict(good.model)
        self.optimizer.load_state_dict(good.optimizer)
        self._measures = False
        for step in range(good.step, end):
            if self.hooks.interrupted():
                break
            self.begin_step(step)
            before = copy.deepcopy(self.model.state_dict())
            good.bound_sum = float(step_fn(*self.minibatches[step]).sum())
            good.model, good.optimizer = self.model.state_dict(), self.optimizer.state_dict()
            if found := not_finite(good, names):
                self.model.load_state_dict(before)
                where = f"training diverged in pass {step // self.steps_per_pass + 1} at step {step + 1}"
                kept = f"the same command resumes from step {good.step:,}; " if good.step else ""
                return Diverged(f"{where}: non-finite {self._term(step) or found}; {kept}{ADVICE}")
        return error

    def _term(self, step: int) -> str | None:
        """Return which term of the bound of a step, or else which gradient, is not finite with the present weights."""
        try:
            x, noise = self.minibatches[step]
            with torch.no_grad():
                drawn, p = self.model.draw(x, self.objective.num_samples, noise), self.model.generative
                terms = {"log q(h|x)": drawn.log_q, "log p(h)": p.log_prior(drawn.latents)}
                terms["log p(x|h)"] = p.log_likelihood(x, drawn.latents)
            found = [name for name, value in terms.items() if not value.isfinite().all()]
            measured = {} if found else diagnostics(self._without_weight, self.objective, *self.minibatches[step])
        except Exception:  # a user's own class may raise anything where numbers are not finite
            return None
        for name in ("p", "q"):
            if not math.isfinite(measured.get(f"train/gradient_norm/{name}", 0.0)):
                found.append(f"gradient of {name}")
        return " and ".join(found) or None

    def begin(self) -> bool:
        """Load the optimizer's state and end a pending validation; return False if that is interrupted again."""
        state = self.state
        if state.step:
            self.optimizer.load_state_dict(state.optimizer)
        if state.step and self._averaged is not None:
            self._averaged.module.load_state_dict(state.average)
            self._averaged.n_averaged.fill_(state.step)
        device = accumulator_device(next(self.model.parameters()).device)
        self._bound_sum = torch.tensor(state.bound_sum, dtype=torch.float64, device=device)
        self._started = time.monotonic() - state.seconds
        if self.is_validation_pending:
            if not self._end_pass():
                return False
            self.save()
        self.model.train()
        self._good = copy.deepcopy(self._update(state))
        return True

    def begin_step(self, step: int) -> None:
        """Give the optimizer the learning rates of the pass of ``step``; measure the diagnostics where due."""
        pass_index, in_pass = divmod(step, self.steps_per_pass)
        factor = self.schedule.factor(pass_index)
        for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * factor
        if isinstance(self.model, WarmedUp):
            self.model.set_kl_weight(self._kl_weight(pass_index))
        # The last minibatch of a pass may hold a single image: it is never measured, unless it is the only one.
        rows, _ = self.minibatches.shape
        number, whole = in_pass + 1, len(self.minibatches.data.train) // rows
        due = number % EVERY == 0 or (number == whole and self._is_validated(pass_index + 1))
        if self._measures and due and number <= whole:
            if self._is_extra(pass_index + 1) and number % EVERY:
                self.state.before_extra = {"diagnostics": self._means()}
            self._measure(step)

    def _measure(self, step: int) -> None:
        """Add the diagnostics of ``step`` to the sums of the pass; the step itself then draws the same numbers."""
        try:
            found = diagnostics(self._without_weight, self.objective, *self.minibatches[step])
        except Exception as error:  # a user's own class may refuse to be copied; memory may suffice for the step alone
            self._measures = False
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("no KL, reconstruction, effective sample size and gradient norms from here on: %s", why)
            return
        state = self.state
        state.measured += 1
        state.diagnostics = {name: state.diagnostics.get(name, 0.0) + value for name, value in found.items()}

    def _kl_weight(self, pass_index: int) -> float:
        return min(1.0, (pass_index + 1) / max(1, self.settings.kl_warmup))

    def _means(self) -> dict[str, float | None]:
        sums, measured = self.state.diagnostics, self.state.measured
        return {name: value / measured if math.isfinite(value) else None for name, value in sums.items()}

    def _is_validated(self, pass_number: int) -> bool:
        return pass_number == self.schedule.passes or pass_number % self.validation_every == 0

    def _is_extra(self, pass_number: int) -> bool:
        """Whether a pass is validated only because it is the last one."""
        return pass_number == self.schedule.passes and pass_number % self.validation_every != 0

    def end_step(self, bounds: Float[Tensor, " batch"], save: bool) -> bool:
        """Count a step with these bounds in nats; validate and save where due; return whether to continue."""
        state = self.state
        self._bound_sum += bounds.to(self._bound_sum).sum()
        state.step += 1
        if state.draws is not None:
            state.draws += len(bounds) * self.objective.num_samples
        if self._averaged is not None:
            self._averaged.update_parameters(self._without_weight)
        self.hooks.on_step(state.step)
        if state.step % self.steps_per_pass == 0 and not self._end_pass():
            return False
        interrupted, done = self.hooks.interrupted(), state.step == self.total_steps
        if save or interrupted or done:
            self.save()
        return done or not interrupted

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training."""
        self._started += seconds

    def save(self) -> None:
        """Bring ``state`` up to date and give it to ``Hooks.on_save``.

        Raises:
            Diverged: something of it is not finite.
        """
        state = self._update(self.state)
        if found := not_finite(state, (name for name, _ in self.model.named_parameters())):
            pass_number = -(-state.step // self.steps_per_pass)
            raise Diverged(
                f"training diverged in pass {pass_number} before step {state.step + 1}: non-finite {found}; {ADVICE}"
            )
        self.hooks.on_save(state)
        self._good = copy.deepcopy(state)

    def _update(self, state: State) -> State:
        state.bound_sum = float(self._bound_sum)
        state.seconds = time.monotonic() - self._started
        state.model = self.model.state_dict()
        state.optimizer = self.optimizer.state_dict()
        state.average = {} if self._averaged is None else self._averaged.module.state_dict()
        return state

    def _end_pass(self) -> bool:
        """Record a pass and validate; if interrupted, save the state with the pass still to end, and return False."""
        state, pass_number = self.state, self.state.step // self.steps_per_pass
        bound = float(self._bound_sum) / len(self.minibatches.data.train)
        if not math.isfinite(bound):
            raise Diverged(f"training diverged in pass {pass_number}: the bound is {bound}; {ADVICE}")
        rate = self._base_rates[0] * self.schedule.factor(pass_number - 1)
        metrics: dict[str, float | None] = {"pass": pass_number, "train/bound": bound, "learning_rate": rate}
        if self.settings.kl_warmup:
            metrics["train/kl_weight"] = self._kl_weight(pass_number - 1)
        if self._is_extra(pass_number):
            earlier = state.before_extra.get("diagnostics", self._means())
            state.before_extra |= {"best": dict(state.best), "row": metrics | earlier}
        metrics |= self._means()
        if self._is_validated(pass_number):
            self.evaluated.eval()
            try:
                value = self.validate()
            except Interrupted:
                self.save()
                return False
            self.model.train()
            metrics["validation/bound"] = value if math.isfinite(value) else None
            if math.isfinite(value) and value > state.best.get("bound", -math.inf):
                state.best = {"step": state.step, "bound": value}
                self.hooks.on_best(state)
            self._end_early(pass_number)
        self.hooks.on_pass(state.step, metrics)
        self._bound_sum.zero_()
        state.diagnostics, state.measured = {}, 0
        return True

    def _end_early(self, pass_number: int) -> None:
        """End the training where ``patience`` says so."""
        state, patience = self.state, self.schedule.patience
        best = state.best.get("step", 0) // self.steps_per_pass
        # While the KL has a small weight the bound may fall: the passes of a warm-up do not count.
        since = max(best, self.settings.kl_warmup)
        if patience is not None and pass_number - since >= patience and state.step < self.total_steps:
            state.total_steps = state.step
            log.warning(
                "the training ends after pass %d: no better validation bound since pass %d, schedule.patience=%d",
                *(pass_number, best, patience),
            )


def _clip(optimizer: torch.optim.Optimizer, most: float) -> None:
    """Scale the gradient of all parameters down to this norm before each update."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(trained, most)

    optimizer.register_step_pre_hook(clip)
