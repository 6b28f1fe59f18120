"""The training step with forward, backward and update in one compiled graph, beside the plain one in ``step``.

The losses of the plain step are traced once, their gradients included, and Inductor makes machine code of the whole.
Noise is drawn outside the graph, in the order in which the plain step draws it, so that both see the same numbers and
their gradients differ by rounding alone. Adam, the usual optimizer, is in the graph as well; others are outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from iwae_cli.core.noise import GeneratorNoise, Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, Losses, Objective
from iwae_cli.training.steps.adam import AdamInPlace
from iwae_cli.training.steps.fx_rewrites import make_cheaper
from iwae_cli.training.steps.roulette import chances, surrogate, survivors

LATENCY = 20.0
"""Seconds that compiling takes on one quiet core, about; less where a graph like it was compiled before."""

SAVED_A_STEP = 1e-3
SAVED_A_PRODUCT = 1.5e-11
"""Seconds saved on one core, about: in every step; and in every step for each draw and parameter."""

ROULETTE_SHARE = 5
"""A graph sends a fifth of all draws back, and is called until none is left that the roulette has kept: mostly once."""

Draw = Callable[[Noise], Tensor]
"""One of the draws of a step."""

T = TypeVar("T")

Values = dict[str, Tensor]
"""Parameters and buffers of a model by their names."""

Part = tuple[Tensor, str]
"""A loss, and what the names of the parameters begin with that it trains."""

Traced = tuple[tuple[Tensor, ...], Sequence[Part]]
"""What is wanted of a function; and what is to be differentiated."""


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
        def losses(model: LatentVariableModel, x: Tensor, noise: Noise) -> Losses:
            return objective.losses(model, x, model.draw(x, objective.num_samples, noise), noise)

        def bound(model: LatentVariableModel, x: Tensor, *drawn: Tensor) -> Traced:
            found = losses(model, x, Replay(drawn))
            return (found.bound,), parts(of_networks(found))

        self._optimizer = optimizer
        recorder = Recorder(x)
        losses(model, x, recorder)
        self._draws = recorder.draws
        tensors = tensors_of(model)
        self._graph = Graph(tensors, functional(model, bound), x, *recorder.drawn, optimizer=optimizer)
        self._trained = [tensors[name] for name in self._graph.trained]

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """As ``train_step``; no parameter has a gradient after it, where the update was in the graph."""
        forget(self._trained)
        bound, *gradients = self._graph(x, *(draw(noise) for draw in self._draws))
        if not self._graph.updates:
            update(self._optimizer.step, self._trained, gradients)
        return bound


@final
class CompiledRouletteStep:
    """``roulette_step`` for batches of one size: one graph weighs the draws, another sends some of them back.

    Args:
        model, objective, optimizer, tau: what is trained, and how.
        x: a batch of that size; its values do not matter.

    Raises:
        CannotCompileError: as ``CompiledStep``.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        objective: BoundObjective,
        optimizer: torch.optim.Optimizer,
        x: Float[Tensor, "batch pixels"],
        tau: float,
    ) -> None:
        def weigh(model: LatentVariableModel, x: Tensor, *drawn: Tensor) -> Traced:
            noise = Replay(drawn)
            with torch.no_grad():
                latents, log_q = model.inference.sample(x, objective.num_samples, noise)
                log_w = model.generative(x, latents) - log_q
                weights = survivors(objective.weights(log_w), chances(log_w, noise), tau)
                return (objective.bound(log_w), weights.flatten()), ()

        def send_back(model: LatentVariableModel, x: Tensor, rows: Tensor, weights: Tensor, *drawn: Tensor) -> Traced:
            latents, log_q = model.inference.sample(x, objective.num_samples, Replay(drawn))
            loss = surrogate(model, x, latents, log_q, rows, weights)
            return (), parts((loss,))

        self._optimizer = optimizer
        recorder = Recorder(x)
        _, log_q = model.inference.sample(x, objective.num_samples, recorder)
        chances(log_q, recorder)
        self._draws = recorder.draws
        self._rows = -(-log_q.numel() // ROULETTE_SHARE)
        self._weigh = Graph(tensors_of(model), functional(model, weigh), x, *recorder.drawn)
        rows = torch.zeros(self._rows, dtype=torch.long, device=x.device)
        tensors, weights = tensors_of(model), x.new_zeros(self._rows)
        self._send_back = Graph(tensors, functional(model, send_back), x, rows, weights, *recorder.drawn)
        self._trained = [tensors[name] for name in self._send_back.trained]

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """As ``roulette_step``."""
        forget(self._trained)
        drawn = [draw(noise) for draw in self._draws]
        bound, weights = self._weigh(x, *drawn)
        rows = weights.nonzero()[:, 0]
        # A graph has one shape: the last one is filled up with draws of weight zero.
        size = max(1, -(-len(rows) // self._rows)) * self._rows
        chosen = F.pad(weights[rows], (0, size - len(rows)))
        rows = F.pad(rows, (0, size - len(rows)))
        gradients: Sequence[Tensor] = ()
        for part, of_part in zip(rows.split(self._rows), chosen.split(self._rows), strict=True):
            found = self._send_back(x, part, of_part, *drawn)
            gradients = [a + b for a, b in zip(gradients, found, strict=True)] if gradients else found
        update(self._optimizer.step, self._trained, gradients)
        return bound


def forget(parameters: Sequence[Tensor]) -> None:
    """Drop the gradients of the last step, so that those of the next take their memory, which is in the cache."""
    for parameter in parameters:
        parameter.grad = None


def update(step: Callable[[], object], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Give every parameter its gradient and carry out the ``step`` of an optimizer."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Fused optimizers read memory in order: a gradient must lie as its parameter does, as autograd sees to it.
        alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
    step()


def tensors_of(model: nn.Module) -> Values:
    """The tensors of a model, those that it has and no copies."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def functional(model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """A ``function`` of a model and of other tensors as one of the tensors of such a model and of those."""

    def with_values(values: Values, *inputs: Tensor) -> T:
        found: T = functional_call(_OfModel(model, function), {f"model.{n}": v for n, v in values.items()}, inputs)
        return found

    return with_values


@final
class Graph:
    """What a function of tensors gives, and the gradients of its losses or an update by them, compiled for some shapes.

    Args:
        tensors: read whenever the graph is called; those that require gradients are differentiated by.
        function: of ``tensors``, then of the inputs.
        inputs: the other tensors; their values do not matter.
        machine_code: whether Inductor makes machine code of it; else torch carries out what was traced.
        optimizer: whose step is to be done by the graph, if it can be.

    Attributes:
        trained: names of the tensors that have a gradient.
        updates: whether it does the optimizer's step.
    """

    def __init__(
        self,
        tensors: Values,
        function: Callable[..., Traced],
        *inputs: Tensor,
        machine_code: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        # Half a second to import, for those who compile alone.
        import torch._inductor
        from torch.fx.experimental.proxy_tensor import make_fx

        self.trained: list[str] = []

        def traced(*given: Tensor) -> tuple[Tensor, ...]:
            values = {
                name: value.detach().requires_grad_(tensor.requires_grad)
                for (name, tensor), value in zip(tensors.items(), given, strict=False)
            }
            outputs, losses = function(values, *given[len(tensors) :])
            found = _gradients(losses, {name: value for name, value in values.items() if value.requires_grad})
            self.trained = [*found]
            return *outputs, *found.values()

        self._values = [tensor.detach() for tensor in tensors.values()]
        self._adam: AdamInPlace | None = None
        try:
            given = [*self._values, *inputs]
            graph = make_fx(traced, tracing_mode="fake")(*given)
            on_cpu = all(value.device.type == "cpu" for value in given)
            if machine_code and on_cpu:
                make_cheaper(graph)
            parameters = [tensors[name] for name in self.trained]
            if optimizer is not None and on_cpu and AdamInPlace.fits(optimizer, parameters):
                self._adam = AdamInPlace(optimizer, parameters)
                names = [*tensors]
                updating = self._adam.after(graph, len(names), [names.index(name) for name in self.trained])
                given = [*self._values, *self._adam.memory(), *inputs]
                graph = make_fx(updating, tracing_mode="fake")(*given)
            with torch.no_grad():
                if machine_code:
                    # Called from C++, its many small parts cost less than from Python.
                    options = {"cpp_wrapper": on_cpu}
                    self._compiled: Callable[..., Any] = torch._inductor.compile(graph, [*given], options=options)
                else:
                    self._compiled = _carried_out(graph)
        except Exception as error:  # whatever code of one's own does with a tensor that has no values
            raise CannotCompileError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
        self.updates = self._adam is not None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """What is wanted of the function and, unless it updates, the gradients of what is ``trained`` in that order."""
        memory = self._adam.begin_step() if self._adam is not None else ()
        with torch.no_grad():
            given: Sequence[Tensor] = self._compiled(*self._values, *memory, *inputs)
        return given


def _carried_out(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    for node in graph.graph.nodes:
        # Strides of what convolutions give are not known before.
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


def of_networks(losses: Losses) -> tuple[Tensor, ...]:
    """The loss of all parameters, or that of the generative and that of the inference network."""
    one = losses.generative is losses.inference
    return (losses.generative,) if one else (losses.generative, losses.inference)


def parts(losses: Sequence[Tensor], model: str = "") -> list[Part]:
    """What is to be differentiated for a model, the names of whose parameters begin so."""
    networks = ("",) if len(losses) == 1 else ("generative.", "inference.")
    return [(loss, model + network) for loss, network in zip(losses, networks, strict=True)]


def _gradients(parts: Sequence[Part], parameters: Values) -> Values:
    """Of every parameter that has one; each of two losses for its own parameters, as in the plain step."""
    found: Values = {}
    for loss, prefix in parts:
        own = {name: value for name, value in parameters.items() if name.startswith(prefix)}
        if own:
            gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            found |= {name: g for name, g in zip(own, gradients, strict=True) if g is not None}
    return found


class _OfModel(nn.Module):
    """A function of a model, as a module: for the model's tensors to be given from outside."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        """What the function gives."""
        return self._function(self.model, *inputs)


class Recorder:
    """Noise for ``x`` that keeps what it was asked for, and what it gave."""

    def __init__(self, x: Float[Tensor, "batch pixels"]) -> None:
        self._noise = GeneratorNoise(torch.Generator(x.device), x.dtype)
        self.draws: list[Draw] = []
        self.drawn: list[Tensor] = []

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """As the noise gives it."""
        return self._kept(lambda noise: noise.normal(layer, k, batch, size))

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """As the noise gives it."""
        return self._kept(lambda noise: noise.uniform(layer, k, batch, size))

    def _kept(self, draw: Draw) -> Tensor:
        self.draws.append(draw)
        self.drawn.append(draw(self._noise))
        return self.drawn[-1]


class Replay:
    """Noise that was drawn before."""

    def __init__(self, drawn: Sequence[Tensor]) -> None:
        self._drawn = iter(drawn)

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """The next of them, whatever was asked for."""
        return next(self._drawn)

    uniform = normal
