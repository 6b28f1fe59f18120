"""Training steps with forward pass, gradients and update in one compiled graph.

The losses of the plain step are traced once with their gradients, and Inductor compiles the whole. Noise is drawn
outside the graph in the order of the plain step, so that both use the same numbers and their gradients differ by
rounding only. Adam, the usual optimizer, is part of the graph; others are called after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from iwae_cli.core.noise import GeneratorNoise, Kind, Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.training.steps.graph import (
    Graph,
    Traced,
    clear_gradients,
    distinct_losses,
    functional,
    tensors_of,
    update,
    with_prefixes,
)
from iwae_cli.training.steps.plain import PlainStep
from iwae_cli.training.steps.roulette import RouletteStep, surrogate, survivors, uniforms

ROULETTE_SHARE = 5
"""A graph differentiates a fifth of all draws; it is called until all survivors are done, which is mostly once."""


@final
class CompiledStep:
    """``PlainStep``, compiled for minibatches of one size; another size takes the plain step.

    Args:
        plain: the step to compile.
        x: a minibatch of that size; its values do not matter.

    Raises:
        CannotCompileError: the losses depend on values, or the compiler fails.
    """

    name = "compiled"

    def __init__(self, plain: PlainStep, x: Float[Tensor, "batch pixels"]) -> None:
        objective = plain.objective

        def bound(model: LatentVariableModel, x: Tensor, *drawn: Tensor) -> Traced:
            found = objective.drawn_losses(model, x, Replay(drawn))
            return (found.bound,), with_prefixes(distinct_losses(found))

        self._plain, self._rows = plain, len(x)
        recorder = Recorder(x)
        objective.drawn_losses(plain.model, x, recorder)
        self._draws = recorder.draws
        tensors = tensors_of(plain.model)
        function = functional(plain.model, bound)
        self._graph = Graph(tensors, function, x, *recorder.drawn, optimizer=plain.optimizer)
        self._trained = [tensors[name] for name in self._graph.trained]

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """As ``PlainStep``; parameters have no gradient afterwards where the update is part of the graph."""
        if len(x) != self._rows:
            return self._plain(x, noise)
        clear_gradients(self._trained)
        bound, *gradients = self._graph(x, *(draw(noise) for draw in self._draws))
        if not self._graph.updates:
            update(self._plain.optimizer.step, self._trained, gradients)
        return bound


@final
class CompiledRouletteStep:
    """``RouletteStep``, compiled for minibatches of one size; another size takes the plain step.

    One graph computes the weights of all draws, a second one the gradients of some of them.

    Args:
        plain: the step to compile.
        x: a minibatch of that size; its values do not matter.

    Raises:
        CannotCompileError: as ``CompiledStep``.
    """

    name = "compiled roulette"

    def __init__(self, plain: RouletteStep, x: Float[Tensor, "batch pixels"]) -> None:
        model, objective, k = plain.model, plain.objective, plain.objective.num_samples

        def weigh(model: LatentVariableModel, x: Tensor, *drawn: Tensor) -> Traced:
            noise = Replay(drawn)
            with torch.no_grad():
                latents, log_q = model.inference.sample(x, k, noise)
                log_w = model.generative(x, latents) - log_q
                weights = survivors(objective.weights(log_w), uniforms(log_w, noise), plain.tau)
                return (objective.bound(log_w), weights.flatten()), ()

        def differentiate(
            model: LatentVariableModel,
            x: Tensor,
            rows: Int[Tensor, " rows"],
            weights: Float[Tensor, " rows"],
            *drawn: Tensor,
        ) -> Traced:
            latents, log_q = model.inference.sample(x, k, Replay(drawn))
            return (), [(surrogate(model, x, latents, log_q, rows, weights), "")]

        self._plain, self._batch = plain, len(x)
        recorder = Recorder(x)
        _, log_q = model.inference.sample(x, k, recorder)
        uniforms(log_q, recorder)
        self._draws = recorder.draws
        self._rows = -(-log_q.numel() // ROULETTE_SHARE)
        self._weigh = Graph(tensors_of(model), functional(model, weigh), x, *recorder.drawn)
        rows, weights = torch.zeros(self._rows, dtype=torch.long, device=x.device), x.new_zeros(self._rows)
        tensors = tensors_of(model)
        self._differentiate = Graph(tensors, functional(model, differentiate), x, rows, weights, *recorder.drawn)
        self._trained = [tensors[name] for name in self._differentiate.trained]

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """As ``RouletteStep``."""
        if len(x) != self._batch:
            return self._plain(x, noise)
        clear_gradients(self._trained)
        drawn = [draw(noise) for draw in self._draws]
        bound, weights = self._weigh(x, *drawn)
        rows = weights.nonzero()[:, 0]
        # A graph has fixed shapes: fill up the last call with draws of weight zero.
        size = max(1, -(-len(rows) // self._rows)) * self._rows
        chosen = F.pad(weights[rows], (0, size - len(rows)))
        rows = F.pad(rows, (0, size - len(rows)))
        gradients: Sequence[Tensor] = ()
        for some, their_weights in zip(rows.split(self._rows), chosen.split(self._rows), strict=True):
            found = self._differentiate(x, some, their_weights, *drawn)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
        update(self._plain.optimizer.step, self._trained, gradients)
        return bound


class Recorder(Noise):
    """Noise that records its draws, as functions of a noise source in ``draws`` and as tensors in ``drawn``."""

    def __init__(self, x: Float[Tensor, "batch pixels"]) -> None:
        self._noise = GeneratorNoise(torch.Generator(x.device), x.dtype)
        self.draws: list[Callable[[Noise], Tensor]] = []
        self.drawn: list[Tensor] = []

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        self.draws.append(lambda noise: getattr(noise, kind)(layer, k, batch, size))
        self.drawn.append(self.draws[-1](self._noise))
        return self.drawn[-1]


class Replay(Noise):
    """Noise that returns given tensors, in their order."""

    def __init__(self, drawn: Sequence[Tensor]) -> None:
        self._drawn = iter(drawn)

    def _draw(self, kind: Kind, layer: int, k: int, batch: int, size: int) -> Tensor:
        return next(self._drawn)
