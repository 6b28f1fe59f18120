"""A function of a model's tensors and other inputs with its gradients, traced once and compiled by Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from iwae_cli.objectives.base import Losses
from iwae_cli.training.steps.adam import AdamInPlace
from iwae_cli.training.steps.fx_rewrites import use_cheaper_forms

T = TypeVar("T")

Tensors = dict[str, Tensor]
"""Parameters and buffers of a model by name."""

Traced = tuple[tuple[Tensor, ...], Sequence[tuple[Tensor, str]]]
"""(outputs, [(loss, parameter-name prefix), ...]): each loss is differentiated by the parameters with its prefix."""


class CannotCompileError(Exception):
    """The step cannot be compiled; the message says why, in one line."""


@final
class Graph:
    """The outputs of a function and the gradients of its losses, or an update by them, compiled for fixed shapes.

    Args:
        tensors: read at every call; the losses are differentiated by those that require gradients.
        function: of ``tensors``, then of the inputs.
        inputs: the other tensors; only shape and dtype matter.
        machine_code: whether Inductor compiles the graph; otherwise torch interprets it.
        optimizer: its update becomes part of the graph where ``AdamInPlace.fits``.

    Attributes:
        trained: names of the tensors that have a gradient.
        updates: whether the graph contains the optimizer's update.

    Raises:
        CannotCompileError: the function depends on values, or the compiler fails.
    """

    def __init__(
        self,
        tensors: Tensors,
        function: Callable[..., Traced],
        *inputs: Tensor,
        machine_code: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        # Imported here: it takes half a second.
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

        self._tensors = [tensor.detach() for tensor in tensors.values()]
        self._adam: AdamInPlace | None = None
        try:
            given = [*self._tensors, *inputs]
            graph = make_fx(traced, tracing_mode="fake")(*given)
            on_cpu = all(value.device.type == "cpu" for value in given)
            if machine_code and on_cpu:
                use_cheaper_forms(graph)
            parameters = [tensors[name] for name in self.trained]
            if optimizer is not None and on_cpu and AdamInPlace.fits(optimizer, parameters):
                self._adam = AdamInPlace(optimizer, parameters)
                names = [*tensors]
                updating = self._adam.append_to(graph, len(names), [names.index(name) for name in self.trained])
                given = [*self._tensors, *self._adam.example_inputs(), *inputs]
                graph = make_fx(updating, tracing_mode="fake")(*given)
            self._compiled: Callable[..., Any] = graph
            if machine_code:
                with torch.no_grad():
                    # The C++ wrapper calls many small kernels faster than Python does.
                    self._compiled = torch._inductor.compile(graph, [*given], options={"cpp_wrapper": on_cpu})
            else:
                for node in graph.graph.nodes:
                    # The strides of a convolution's result are not known when it is traced.
                    if node.target is torch.ops.aten.view.default:
                        node.target = torch.ops.aten.reshape.default
                graph.recompile()
        except Exception as error:  # a user's own objective may do anything with a tensor that has no values
            raise CannotCompileError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
        self.updates = self._adam is not None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Return the outputs and, unless the graph updates, the gradients of ``trained`` in that order."""
        adam = self._adam.begin_step() if self._adam is not None else ()
        with torch.no_grad():
            found: Sequence[Tensor] = self._compiled(*self._tensors, *adam, *inputs)
        return found


def tensors_of(model: nn.Module) -> Tensors:
    """Return the tensors of a model themselves, one that several modules share once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def functional(model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """Return ``function(model, *inputs)`` as a function of (tensors of such a model, *inputs)."""
    # Every place of a tensor once: torch would swap that of a module with two names twice, and restore it wrongly.
    places: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for attribute, tensor in own.items():
                if tensor is not None:
                    name = f"{path}.{attribute}" if path else attribute
                    places[name] = first.setdefault(id(tensor), name)

    def with_tensors(tensors: Tensors, *inputs: Tensor) -> T:
        given = {f"model.{name}": tensors[source] for name, source in places.items()}
        found: T = functional_call(_OfModel(model, function), given, inputs, tie_weights=False)
        return found

    return with_tensors


def distinct_losses(losses: Losses) -> tuple[Tensor, ...]:
    """Return one scalar loss for all parameters, or those of the generative and of the inference network."""
    one = losses.generative is losses.inference
    return (losses.generative,) if one else (losses.generative, losses.inference)


def with_prefixes(losses: Sequence[Tensor], model: str = "") -> list[tuple[Tensor, str]]:
    """Return ``distinct_losses`` with their parameter-name prefixes; ``model`` is the prefix of the whole model."""
    networks = ("",) if len(losses) == 1 else ("generative.", "inference.")
    return [(loss, model + network) for loss, network in zip(losses, networks, strict=True)]


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """Drop the gradients of the last step, so that those of the next reuse their memory, which is in the cache."""
    for parameter in parameters:
        parameter.grad = None


def update(step: Callable[[], object], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Give every parameter its gradient and call ``step`` of an optimizer."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # Fused optimizers read memory in order: like autograd, give a gradient the strides of its parameter.
        alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)
    step()


def _gradients(losses: Sequence[tuple[Tensor, str]], parameters: Tensors) -> Tensors:
    found: Tensors = {}
    for loss, prefix in losses:
        own = {name: value for name, value in parameters.items() if name.startswith(prefix)}
        if own:
            gradients = torch.autograd.grad(loss, list(own.values()), retain_graph=True, allow_unused=True)
            found |= {name: g for name, g in zip(own, gradients, strict=True) if g is not None}
    return found


class _OfModel(nn.Module):
    """A function of a model as a module, for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *inputs: Tensor) -> Any:
        """Return ``function(model, *inputs)``."""
        return self._function(self.model, *inputs)
