"""Adam as part of the compiled step: a weight is updated while its gradient is still in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

UNSUPPORTED = ("amsgrad", "capturable", "differentiable", "maximize", "weight_decay")
"""Options of ``torch.optim.Adam`` that the update here does not implement."""

_AVERAGES = ("exp_avg", "exp_avg_sq")


@final
class AdamInPlace:
    """The update of ``torch.optim.Adam`` (Kingma and Ba 2015, arXiv 1412.6980) as operations of a graph.

    It works on the optimizer's own state, so that the optimizer may load another state or make steps in between.

    Args:
        optimizer: one that ``fits``.
        parameters: those that have a gradient in every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        # An optimizer that loads a state replaces its groups; their order stays.
        groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._optimizer = optimizer
        self._parameters = parameters
        self._group_of = [groups[id(p)] for p in parameters]
        self._settings = self._fixed_settings()
        self._state_in_use: object = None

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
        """Return whether this class implements the optimizer's whole update of ``parameters``."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return (
            type(optimizer) is torch.optim.Adam
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and all(not group[option] for group in optimizer.param_groups for option in UNSUPPORTED)
            and len(parameters) > 0
            and all(id(p) in known for p in parameters)
        )

    def example_inputs(self) -> list[Tensor]:
        """Return zeros of the shapes that ``begin_step`` returns; all distinct, or a graph would rely on aliases."""
        rates = self._parameters[0].new_zeros(len(self._parameters), 2)
        return [rates, *(torch.zeros_like(p) for _ in range(2) for p in self._parameters)]

    def begin_step(self) -> list[Tensor]:
        """Count a step and return what the update needs besides parameters and gradients.

        Returns:
            ``_rates`` of every parameter, (parameters, 2); then the averages of the gradients; then those of their
            squares.

        Raises:
            RuntimeError: the optimizer was given hooks or other settings after the graph was traced.
        """
        if self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks:
            raise RuntimeError("the optimizer got hooks after its step became part of a graph, which calls none")
        # An optimizer that loads a state has a new dictionary.
        if self._optimizer.state is not self._state_in_use:
            self._use_state()
        self._steps += 1
        every = list(zip(self._group_of, self._steps.tolist(), strict=True))
        of_step = {(group, step): _rates(self._optimizer.param_groups[group], step) for group, step in {*every}}
        rates = torch.tensor([of_step[each] for each in every], dtype=self._parameters[0].dtype)
        return [rates, *self._averages]

    def append_to(
        self, graph: Callable[..., Any], size: int, trained: Sequence[int]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Return ``graph`` followed by the update.

        From a function of a model's ``size`` tensors, then of inputs, that returns outputs, then a gradient of each
        ``trained`` one, it makes a function of the tensors, of what ``begin_step`` returns, and of the inputs, that
        returns the outputs.
        """
        end = size + 1 + 2 * len(trained)

        def updating(*given: Tensor) -> tuple[Tensor, ...]:
            found = graph(*given[:size], *given[end:])
            gradients = found[-len(trained) :]
            self._update([given[index] for index in trained], gradients, *given[size:end])
            return tuple(found[: -len(trained)])

        return updating

    def _update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        rates: Float[Tensor, "parameters 2"],
        *averages: Tensor,
    ) -> None:
        """Overwrite parameters and averages."""
        means, squares = averages[: len(parameters)], averages[len(parameters) :]
        groups = [self._optimizer.param_groups[index] for index in self._group_of]
        every = zip(groups, rates, parameters, gradients, means, squares, strict=True)
        for group, (rate, correction), p, gradient, mean, square in every:
            beta1, beta2 = group["betas"]
            mean.copy_(mean + (1 - beta1) * (gradient - mean))
            square.copy_(beta2 * square + (1 - beta2) * gradient * gradient)
            p.copy_(p - rate * mean / (correction * square.sqrt() + group["eps"]))

    def _fixed_settings(self) -> list[dict[str, Any]]:
        """Return the settings that are part of the graph; learning rates are read in every step."""
        names = ("betas", "eps", *UNSUPPORTED)
        return [{name: group[name] for name in names} for group in self._optimizer.param_groups]

    def _use_state(self) -> None:
        if (settings := self._fixed_settings()) != self._settings:
            raise RuntimeError(f"Adam has the settings {settings}; its graph was traced with {self._settings}")
        for p in self._parameters:
            if not self._optimizer.state[p]:
                zeros = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
                self._optimizer.state[p] = dict(zip(("step", *_AVERAGES), (torch.tensor(0.0), *zeros), strict=True))
        states = [self._optimizer.state[p] for p in self._parameters]
        # The step counters become views of one tensor: counting them one by one takes ten times as long.
        self._steps = torch.stack([state["step"] for state in states])
        for state, step in zip(states, self._steps, strict=True):
            state["step"] = step
        self._averages = [state[name] for name in _AVERAGES for state in states]
        self._state_in_use = self._optimizer.state


def _rates(group: dict[str, Any], step: float) -> tuple[float, float]:
    """Return lr / (1 - beta1^step) and 1 / sqrt(1 - beta2^step): the bias corrections of mean and root mean square."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
