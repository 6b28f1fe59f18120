"""Adam as a part of the compiled step: a weight is updated while its gradient is still in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

LEFT_OUT = ("amsgrad", "capturable", "differentiable", "maximize", "weight_decay")
"""Options of ``torch.optim.Adam`` that the update here does not know."""


@final
class AdamInPlace:
    """What ``torch.optim.Adam`` does in a step (Kingma and Ba 2015, arXiv 1412.6980), as operations of a graph.

    Its memory is the optimizer's own, which may load another at any time, and may make steps of its own between.

    Args:
        optimizer: one that ``fits``.
        parameters: those that have a gradient in every step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        # The groups themselves are others as soon as the optimizer has loaded a state; their order stays.
        groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._optimizer = optimizer
        self._parameters = parameters
        self._group_of = [groups[id(p)] for p in parameters]
        self._settings = self._fixed()
        self._looked_up: object = None

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
        """Whether the update of these ``parameters`` is known here, all of it."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return (
            type(optimizer) is torch.optim.Adam
            and not optimizer._optimizer_step_pre_hooks
            and not optimizer._optimizer_step_post_hooks
            and all(not group[option] for group in optimizer.param_groups for option in LEFT_OUT)
            and len(parameters) > 0
            and all(id(p) in known for p in parameters)
        )

    def memory(self) -> list[Tensor]:
        """Zeros of the shapes that ``begin_step`` gives; no two are one tensor, or a graph would count on that."""
        rates = self._parameters[0].new_zeros(len(self._parameters), 2)
        return [rates, *(torch.zeros_like(p) for _ in range(2) for p in self._parameters)]

    def begin_step(self) -> list[Tensor]:
        """Count a step, and give what the update needs beside parameters and gradients.

        Returns:
            What depends on the number of the step, (parameters, 2), then the averages of the gradients, then those of
            their squares.

        Raises:
            RuntimeError: the optimizer has got hooks or other settings since, of which the graph does not know.
        """
        if self._optimizer._optimizer_step_pre_hooks or self._optimizer._optimizer_step_post_hooks:
            raise RuntimeError("the optimizer has got hooks since its step became a part of a graph, which calls none")
        # An optimizer that loads a state has another dictionary of them.
        if self._optimizer.state is not self._looked_up:
            self._look_up()
        self._steps += 1
        every = list(zip(self._group_of, self._steps.tolist(), strict=True))
        of_step = {(group, step): _rates(self._optimizer.param_groups[group], step) for group, step in {*every}}
        rates = torch.tensor([of_step[each] for each in every], dtype=self._parameters[0].dtype)
        return [rates, *self._averages]

    def after(self, graph: Callable[..., Any], size: int, trained: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
        """A ``graph`` with the update by the gradients that it gives.

        Args:
            graph: of values and then of inputs; gives outputs, and last a gradient of each of the parameters.
            size: number of its values.
            trained: which of them are the parameters.

        Returns:
            A function of the values, of what ``begin_step`` gives, and of the inputs; it gives the outputs alone.
        """
        end = size + 1 + 2 * len(trained)

        def updating(*given: Tensor) -> tuple[Tensor, ...]:
            found = graph(*given[:size], *given[end:])
            gradients = found[-len(trained) :]
            self._update([given[index] for index in trained], gradients, *given[size:end])
            return tuple(found[: -len(trained)])

        return updating

    def _update(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], rates: Tensor, *averages: Tensor
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

    def _fixed(self) -> list[dict[str, Any]]:
        """What is a part of the graph; the learning rates are asked for in every step."""
        return [{name: group[name] for name in ("betas", "eps", *LEFT_OUT)} for group in self._optimizer.param_groups]

    def _look_up(self) -> None:
        if self._fixed() != self._settings:
            raise RuntimeError(f"Adam has been given {self._fixed()}, after a graph was made with {self._settings}")
        states = [self._optimizer.state[p] or self._begun(p) for p in self._parameters]
        # Views of one tensor are counted at once; tensors of their own, one after the other, take ten times as long.
        self._steps = torch.stack([state["step"] for state in states])
        for state, step in zip(states, self._steps, strict=True):
            state["step"] = step
        self._averages = [state[name] for name in ("exp_avg", "exp_avg_sq") for state in states]
        self._looked_up = self._optimizer.state

    def _begun(self, parameter: Tensor) -> dict[str, Tensor]:
        """The memory of a parameter before its first step, as torch has it."""
        state: dict[str, Tensor] = self._optimizer.state[parameter]
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


def _rates(group: dict[str, Any], step: float) -> tuple[float, float]:
    """The learning rate over the bias correction of the mean, and that of the root of the square, as a factor."""
    beta1, beta2 = group["betas"]
    return group["lr"] / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
