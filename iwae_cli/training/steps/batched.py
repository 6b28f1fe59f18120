"""One step of several trainings at once: their models are stacked, and the stack makes one step.

The losses of the plain step are mapped over the models (``torch.func.vmap``) and traced with their gradients, as in the
compiled step: products of matrices become batches of products, and every operation is called once for all. Each
training keeps its own parameters, minibatches, noise and optimizer state, so that its numbers are those that it has
alone, except for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from iwae_cli.core.noise import Noise
from iwae_cli.training.steps.compiled import Recorder, Replay
from iwae_cli.training.steps.graph import (
    Graph,
    Tensors,
    Traced,
    clear_gradients,
    distinct_losses,
    functional,
    tensors_of,
    update,
    with_prefixes,
)
from iwae_cli.training.steps.plain import PlainStep


@final
class BatchedStep:
    """Several ``PlainStep`` at once, for minibatches of one size; another size takes the plain steps.

    Args:
        plain: one step for each training, with models of one architecture, objectives of equal ``num_samples`` and
            optimizers of one class. Neighbours whose objective is the same object share all calls.
        x: a minibatch of that size; its values do not matter.
        machine_code: whether the graph is compiled.

    Raises:
        CannotCompileError: the losses cannot be mapped or traced, or the compiler fails.
    """

    def __init__(self, plain: Sequence[PlainStep], x: Float[Tensor, "batch pixels"], machine_code: bool) -> None:
        stacks = [_Stack(list(steps), x) for _, steps in groupby(plain, key=lambda step: id(step.objective))]

        def bounds(tensors: Tensors, *inputs: Tensor) -> Traced:
            given = iter(inputs)
            outputs, losses = [], []
            for number, stack in enumerate(stacks):
                prefix = f"{number}."
                own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
                bound, *found = vmap(stack.losses)(own, *islice(given, len(stack.inputs)))
                outputs.append(bound)
                # Each model has its gradient from its own term of the sum.
                losses += with_prefixes([loss.sum() for loss in found], prefix)
            return (torch.cat(outputs),), losses

        stacked = {f"{n}.{name}": tensor for n, stack in enumerate(stacks) for name, tensor in stack.stacked.items()}
        inputs = [value for stack in stacks for value in stack.inputs]
        self._graph = Graph(stacked, bounds, *inputs, machine_code=machine_code)
        own = {f"{n}.{name}": each for n, stack in enumerate(stacks) for name, each in stack.own.items()}
        self._trained = [parameter for name in self._graph.trained for parameter in own[name]]
        self._plain, self._stacks, self._rows = plain, stacks, len(x)
        self._joint: JointOptimizer | None = None

    def __call__(
        self, x: Sequence[Float[Tensor, "batch pixels"]], noise: Sequence[Noise]
    ) -> list[Float[Tensor, " batch"]]:
        """As ``PlainStep``, for each training with its own images and noise."""
        if len(x[0]) != self._rows:
            return [step(images, draws) for step, images, draws in zip(self._plain, x, noise, strict=True)]
        clear_gradients(self._trained)
        inputs: list[Tensor] = []
        given = zip(x, noise, strict=True)
        for stack in self._stacks:
            each = [[images, *(draw(draws) for draw in stack.draws)] for images, draws in islice(given, stack.size)]
            inputs += [torch.stack(same) for same in zip(*each, strict=True)]
        bounds, *gradients = self._graph(*inputs)
        # Not before the first step: until then an optimizer may load the state of an earlier session.
        self._joint = self._joint or JointOptimizer([step.optimizer for step in self._plain])
        update(self._joint.step, self._trained, [each for gradient in gradients for each in gradient.unbind()])
        return list(bounds)


class _Stack:
    """The models of one objective; from here on their parameters are slices of the ``stacked`` ones."""

    def __init__(self, plain: Sequence[PlainStep], x: Float[Tensor, "batch pixels"]) -> None:
        objective, model = plain[0].objective, plain[0].model

        def losses(model: Any, x: Tensor, *drawn: Tensor) -> tuple[Tensor, ...]:
            found = objective.drawn_losses(model, x, Replay(drawn))
            return found.bound, *distinct_losses(found)

        recorder = Recorder(x)
        objective.drawn_losses(model, x, recorder)
        self.size = len(plain)
        self.draws = recorder.draws
        self.inputs = [torch.stack([value] * len(plain)) for value in (x, *recorder.drawn)]
        self.losses = functional(model, losses)
        every = [tensors_of(step.model) for step in plain]
        self.own = {name: [tensors[name] for tensors in every] for name in every[0]}
        self.stacked: Tensors = {}
        for name, own in self.own.items():
            whole = torch.stack([value.detach() for value in own])
            for value, part in zip(own, whole.unbind(), strict=True):
                value.data = part
            self.stacked[name] = whole.requires_grad_(own[0].requires_grad)


@final
class JointOptimizer:
    """The optimizers of several models as one: parameters with equal settings are updated in one call.

    Every parameter keeps its state in its own optimizer, and uses the learning rate that is set there.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._sources: dict[str, dict[str, Any]] = {}
        groups: dict[str, dict[str, Any]] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                settings = {key: value for key, value in group.items() if key != "params"}
                # Learning rates that are equal now may differ later: the defaults hold those before the schedule.
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
