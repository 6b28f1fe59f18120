"""A training that several processes share: each has a share of every minibatch, and all do the same update.

The processes hold the same weights and draw the same noise of the whole minibatch. The gradient of its mean loss is the
mean of those of the shares, weighted by their sizes, so that it is that of one process but for rounding.
"""

from __future__ import annotations

from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.noise import Noise

SAVED_A_PRODUCT = 4e-11
"""Seconds that the whole of a step takes on one core for each draw and parameter, about."""

EXCHANGE, EXCHANGE_A_PARAMETER = 5e-4, 6e-9
"""Seconds that two processes of one machine take to sum their gradients, about."""


@runtime_checkable
class Crew(Protocol):
    """The processes, this one among them; every method raises RunFailed where one of the others is gone."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> None:
        """Over all processes, in place: the same bits in each."""

    def attend(self) -> None:
        """Do what rank 0 asks for, until it calls ``dismiss``."""

    def dismiss(self) -> None:
        """The others may go on with what they did before."""


def pays(size: int, draws: int, parameters: int) -> bool:
    """Whether sharing a step saves more time than the exchange takes, by rule and not by a clock.

    Args:
        size: number of processes.
        draws: of q in one step, all images together.
        parameters: of the model.
    """
    saved = (1 - 1 / size) * SAVED_A_PRODUCT * draws * parameters
    return saved > 2 * (EXCHANGE + EXCHANGE_A_PARAMETER * parameters)


def share(n: int, crew: Crew | None) -> slice:
    """Which of ``n`` images this process has; all, where there are too few for every process to have one."""
    if crew is None or n < crew.size:
        return slice(0, n)
    return slice(n * crew.rank // crew.size, n * (crew.rank + 1) // crew.size)


@final
class ShareOfNoise:
    """Of the noise of a whole minibatch, that of some of its images.

    Args:
        noise: of the minibatch.
        n: its images.
        own: which of them.

    Raises:
        ValueError: of a draw, for another number of images than the share has.
    """

    def __init__(self, noise: Noise, n: int, own: slice) -> None:
        self._noise, self._n, self._own = noise, n, own

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Standard normal draws."""
        return self._part(self._noise.normal(layer, k, self._n, size), batch)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Uniform draws on [0, 1)."""
        return self._part(self._noise.uniform(layer, k, self._n, size), batch)

    def _part(self, drawn: Tensor, batch: int) -> Tensor:
        part = drawn[:, self._own].contiguous()
        if part.shape[1] != batch:
            raise ValueError(f"batch must be the {part.shape[1]} images of this share, got {batch}")
        return part


@final
class MeanOfShares:
    """Means over a minibatch from those over its shares; before every update, that of the gradients.

    Args:
        crew: who has the other shares.

    Attributes:
        weight: of this process; those of all add up to 1.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self.weight = 1 / crew.size

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """As a hook of the optimizer: every process leaves with the same bits in its parameters' gradients."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        together = self.of(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, found in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(found.view_as(gradient))

    def of(self, mean: Tensor) -> Tensor:
        """Over the minibatch, from the mean over this process's share.

        Raises:
            RunFailed: another process is gone.
        """
        total = mean * self.weight
        self._crew.sum(total)
        return total
