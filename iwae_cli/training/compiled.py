"""The training step with forward and backward in one compiled graph, beside the plain one in ``step``.

The losses of the plain step are traced once, their gradients included, and Inductor makes machine code of the whole.
Noise is drawn outside the graph, in the order in which the plain step draws it, so that both see the same numbers and
their gradients differ by rounding alone. The optimizer is outside too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from iwae_cli.models.base import LatentVariableModel
from iwae_cli.noise import GeneratorNoise, Noise
from iwae_cli.objectives.base import Losses, Objective

LATENCY = 20.0
"""Seconds that compiling takes on one quiet core, about; less where a graph like it was compiled before."""

SAVED_A_STEP = 5e-4
SAVED_A_PRODUCT = 2e-11
"""Seconds saved on one core, about: in every step; and in every step for each draw and parameter."""

Draw = Callable[[Noise], Tensor]
"""One of the draws of a step."""


class CannotCompileError(Exception):
    """The step cannot be compiled; the message says why, in one line."""


def pays(steps: int, draws: int, parameters: int) -> bool:
    """Whether compiling saves more time than it takes: by rule and not by a clock, so that the answer does not change.

    Args:
        steps: of the whole schedule, so that a run that is resumed decides as it did at first.
        draws: of q in one step, all images together.
        parameters: of the model.
    """
    return steps * (SAVED_A_STEP + SAVED_A_PRODUCT * draws * parameters) > LATENCY


@final
class CompiledStep:
    """``train_step`` for batches of one size.

    Args:
        model, objective, optimizer: what is trained, and how.
        x: a batch of that size; its values do not matter.

    Attributes:
        batch: the size, in images.

    Raises:
        CannotCompileError: the losses depend on values in a way that no graph has, or the compiler fails.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        x: Float[Tensor, "batch pixels"],
    ) -> None:
        # Half a second to import, for those who compile alone.
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        self.batch = len(x)
        self._optimizer = optimizer
        scored = _Scored(model, objective)
        recorder = _Recorder(GeneratorNoise(torch.Generator(x.device), x.dtype))
        scored(x, recorder)
        self._draws = recorder.draws
        parameters = dict(scored.named_parameters())
        tensors = {**parameters, **dict(scored.named_buffers())}
        trained: list[str] = []

        def bound_and_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
            values = {
                name: value.detach().requires_grad_(tensor.requires_grad)
                for (name, tensor), value in zip(tensors.items(), inputs, strict=False)
            }
            x, *drawn = inputs[len(tensors) :]
            losses: Losses = functional_call(scored, values, (x, _Replay(drawn)))
            found = _gradients(losses, {name: values[name] for name in parameters if values[name].requires_grad})
            trained[:] = found
            return losses.bound, *found.values()

        self._values = [tensor.detach() for tensor in tensors.values()]
        inputs = [*self._values, x, *recorder.drawn]
        try:
            graph = make_fx(bound_and_gradients, tracing_mode="fake")(*inputs)
            with torch.no_grad():
                self._graph = torch._inductor.compile(graph, [*inputs])
        except (RuntimeError, OSError) as error:
            raise CannotCompileError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
        self._trained = [parameters[name] for name in trained]

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """As ``train_step``."""
        with torch.no_grad():
            bound, *gradients = self._graph(*self._values, x, *(draw(noise) for draw in self._draws))
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        return bound


def _gradients(losses: Losses, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter that has one; each loss for its own parameters, as in the plain step."""
    parts = [(losses.generative, "model.")]
    if losses.generative is not losses.inference:
        parts = [(losses.generative, "model.generative."), (losses.inference, "model.inference.")]
    found: dict[str, Tensor] = {}
    for loss, prefix in parts:
        own = {name: value for name, value in parameters.items() if name.startswith(prefix)}
        if own:
            gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            found |= {name: g for name, g in zip(own, gradients, strict=True) if g is not None}
    return found


class _Scored(nn.Module):
    """Losses as a module, for its parameters to be given from outside."""

    def __init__(self, model: LatentVariableModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Losses:
        particles = self.model.draw(x, self._objective.num_samples, noise)
        return self._objective.losses(self.model, x, particles, noise)


class _Recorder:
    """Noise that keeps what it was asked for, and what it gave."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self.draws: list[Draw] = []
        self.drawn: list[Tensor] = []

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        return self._kept(lambda noise: noise.normal(layer, k, batch, size))

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        return self._kept(lambda noise: noise.uniform(layer, k, batch, size))

    def _kept(self, draw: Draw) -> Tensor:
        self.draws.append(draw)
        self.drawn.append(draw(self._noise))
        return self.drawn[-1]


class _Replay:
    """Noise that was drawn before."""

    def __init__(self, drawn: list[Tensor]) -> None:
        self._drawn = iter(drawn)

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        return next(self._drawn)

    uniform = normal
