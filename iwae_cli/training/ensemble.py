"""One step of several trainings at once: their models are stacked, and the step is that of the stack.

The losses of the plain step are mapped over the models (``torch.func.vmap``) and traced with their gradients, as the
compiled step is: what were products of matrices are batches of them, and every operation is called once for all. Each
training keeps its own parameters, its own minibatches, its own noise and its own memory of the optimizer, so that its
numbers are those that it has alone, but for rounding.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from iwae_cli.core.errors import Interrupted, RunFailed
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.training.checkpoint import State
from iwae_cli.training.steps.compiled import (
    CannotCompileError,
    Graph,
    Recorder,
    Replay,
    Traced,
    Values,
    forget,
    functional,
    of_networks,
    parts,
    tensors_of,
    update,
)
from iwae_cli.training.trainer import SAVE_EVERY_SECONDS, Hooks, Steps, Trainer


@final
class BatchedStep:
    """``train_step`` of several models, for batches of one size.

    Args:
        models: of one architecture.
        objectives: of each, with equal ``num_samples``; neighbours whose objective is the same object share all calls.
        optimizers: of each, all of one class.
        x: a batch of that size; its values do not matter.
        machine_code: whether what was traced is compiled.

    Raises:
        CannotCompileError: the losses cannot be mapped or traced, or the compiler fails.
    """

    def __init__(
        self,
        models: Sequence[LatentVariableModel],
        objectives: Sequence[Objective],
        optimizers: Sequence[torch.optim.Optimizer],
        x: Float[Tensor, "batch pixels"],
        machine_code: bool,
    ) -> None:
        jobs = [list(jobs) for _, jobs in groupby(range(len(models)), key=lambda job: id(objectives[job]))]
        crews = [_Crew([models[job] for job in own], objectives[own[0]], x) for own in jobs]

        def bounds(values: Values, *inputs: Tensor) -> Traced:
            given = iter(inputs)
            outputs, losses = [], []
            for number, crew in enumerate(crews):
                prefix = f"{number}."
                own = {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
                bound, *found = vmap(crew.scored)(own, *islice(given, len(crew.inputs)))
                outputs.append(bound)
                # Each model has its gradients from its own term.
                losses += parts([loss.sum() for loss in found], prefix)
            return (torch.cat(outputs),), losses

        stacked = {
            f"{number}.{name}": value for number, crew in enumerate(crews) for name, value in crew.stacked.items()
        }
        inputs = [value for crew in crews for value in crew.inputs]
        self._graph = Graph(stacked, bounds, *inputs, machine_code=machine_code)
        own = {f"{number}.{name}": each for number, crew in enumerate(crews) for name, each in crew.own.items()}
        self._trained = [parameter for name in self._graph.trained for parameter in own[name]]
        self._jobs, self._crews, self._optimizers = jobs, crews, optimizers
        self._joint: JointOptimizer | None = None

    def __call__(self, x: Sequence[Float[Tensor, "batch pixels"]], noise: Sequence[Noise]) -> list[Tensor]:
        """As ``train_step``, of each model with its own images and noise."""
        forget(self._trained)
        inputs: list[Tensor] = []
        for jobs, crew in zip(self._jobs, self._crews, strict=True):
            given = [[x[job], *(draw(noise[job]) for draw in crew.draws)] for job in jobs]
            inputs += [torch.stack(same) for same in zip(*given, strict=True)]
        bounds, *gradients = self._graph(*inputs)
        # Not before the first step: until then an optimizer may be given the memory of an earlier session.
        self._joint = self._joint or JointOptimizer(self._optimizers)
        update(self._joint.step, self._trained, [each for gradient in gradients for each in gradient.unbind()])
        return list(bounds)


class _Crew:
    """Models of one objective, one upon the other; their parameters are parts of the ``stacked`` ones from here on."""

    def __init__(self, models: Sequence[nn.Module], objective: Objective, x: Tensor) -> None:
        def scored(model: Any, x: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
            noise = Replay(drawn)
            found = objective.losses(model, x, model.draw(x, objective.num_samples, noise), noise)
            return found.bound, *of_networks(found)

        model: Any = models[0]
        recorder = Recorder(x)
        objective.losses(model, x, model.draw(x, objective.num_samples, recorder), recorder)
        self.draws = recorder.draws
        self.inputs = [torch.stack([value] * len(models)) for value in (x, *recorder.drawn)]
        self.scored = functional(model, scored)
        every = [tensors_of(model) for model in models]
        self.own = {name: [values[name] for values in every] for name in every[0]}
        self.stacked: Values = {}
        for name, own in self.own.items():
            whole = torch.stack([value.detach() for value in own])
            for value, part in zip(own, whole.unbind(), strict=True):
                value.data = part
            self.stacked[name] = whole.requires_grad_(own[0].requires_grad)


@final
class JointOptimizer:
    """The optimizers of several models as one: parameters with equal settings are updated in one call.

    Every parameter keeps the memory that it has in its own optimizer, which goes on knowing it, and has the learning
    rate that is set there.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._sources: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                settings = {key: value for key, value in group.items() if key != "params"}
                # The learning rate of today may be equal, and that of which a schedule makes it may not.
                key = repr((settings, optimizer.defaults))
                self._sources.setdefault(key, group)
                groups.setdefault(key, {**settings, "params": []})["params"] += group["params"]
        kind: Any = type(optimizers[0])
        self._optimizer = kind(list(groups.values()))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    self._optimizer.state[parameter] = optimizer.state[parameter]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group, source in zip(self._optimizer.param_groups, self._sources.values(), strict=True):
            group["lr"] = source["lr"]
        self._optimizer.step()


@dataclass(frozen=True)
class Lane:
    """One of several trainings; see ``Trainer.run``."""

    trainer: Trainer
    state: State
    hooks: Hooks


def train_batched(
    lanes: Sequence[Lane], machine_code: bool, failed: Callable[[int, RunFailed | OSError], None], stop_on_error: bool
) -> None:
    """Train all, step by step together, to the end of their schedule or until they are interrupted.

    What fails is left out from there on; the others go on, or stop if ``stop_on_error``.

    Args:
        lanes: at one and the same step, of one schedule and with minibatches of one size;
            neighbours whose trainers have the same objective share all calls. The ``plan`` of their states
            says how many runs train at once.
        machine_code: whether the step is compiled.
        failed: told of every lane that fails, by its number.
        stop_on_error: see above.

    Raises:
        CannotCompileError: they cannot be trained together, or no longer; their states are saved, where any step was
            made.
    """
    started = time.monotonic()
    step = batched_step(lanes, machine_code)
    for lane in lanes:
        lane.state.seconds += time.monotonic() - started
    running = {number: lane.trainer.steps(lane.state, lane.hooks) for number, lane in enumerate(lanes)}
    replies: dict[int, tuple[Tensor, bool] | None] = dict.fromkeys(running)
    last_save = time.monotonic()
    while running:
        asked: dict[int, tuple[Tensor, Noise]] = {}
        stopped = False
        for number in replies:
            try:
                asked[number] = running[number].send(replies[number])
            except StopIteration as end:
                del running[number]
                stopped |= not end.value
            except (RunFailed, OSError) as error:
                del running[number]
                stopped |= stop_on_error
                failed(number, error)
        if stopped or not asked:
            break
        if len(asked) < len(replies):
            for number in asked:
                lanes[number].state.change_plan("runs_at_once", len(asked))
            try:
                step = batched_step([lanes[number] for number in asked], machine_code)
            except CannotCompileError:
                _stop(running.values())
                raise
        x, noise = zip(*asked.values(), strict=True)
        if len(x[0]) == lanes[0].trainer.whole_batch:
            bounds = step(x, noise)
        else:
            bounds = [lanes[number].trainer.plain(*wanted) for number, wanted in asked.items()]
        save = time.monotonic() - last_save > SAVE_EVERY_SECONDS
        if save:
            last_save = time.monotonic()
        replies = {number: (bound, save) for number, bound in zip(asked, bounds, strict=True)}
    _stop(running.values())


def _stop(running: Iterable[Steps]) -> None:
    """Save the states of trainings that wait for a step; what cannot be saved goes on from where it was last."""
    for steps in running:
        with suppress(StopIteration, OSError):
            steps.throw(Interrupted(signal.SIGINT))


def batched_step(lanes: Sequence[Lane], machine_code: bool) -> BatchedStep:
    """The step of these trainings for whole minibatches.

    Raises:
        CannotCompileError: see ``BatchedStep``.
    """
    trainers = [lane.trainer for lane in lanes]
    x = next(trainers[0].model.parameters()).new_zeros(trainers[0].whole_batch, trainers[0].data.train.shape[1])
    models = [trainer.model.train() for trainer in trainers]
    objectives = [trainer.objective for trainer in trainers]
    return BatchedStep(models, objectives, [trainer.optimizer for trainer in trainers], x, machine_code)
