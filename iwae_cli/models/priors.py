"""Distributions of the top layer, which nothing is given to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.noise import Noise
from iwae_cli.models.conditionals import Bits, Conditional, Draws, Given, OneHot
from iwae_cli.models.networks import standard_normal_log_prob


class Prior(ABC):
    """Settings of a prior, before the size of its layer is known. This is what ``model.prior`` names in a yaml."""

    @abstractmethod
    def build(self, size: int) -> Conditional:
        """Return the prior of a layer of ``size`` units."""


class StandardNormal(Conditional):
    """N(0, I) of ``size`` units."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return the noise itself, and its log-density in nats."""
        h = noise.normal(level, k, batch, self._size)
        return h, standard_normal_log_prob(h)

    def log_prob(self, h: Float[Tensor, "*n d"], given: Given) -> Float[Tensor, "*n"]:
        """Return the log-density, nats."""
        return standard_normal_log_prob(h)

    def mean(self, given: Given) -> Float[Tensor, " d"]:
        """Return zeros."""
        return torch.zeros(self._size)


class _LearnedLogits(Conditional):
    """Logits that are parameters, zero at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self, given: Given) -> Float[Tensor, " d"]:
        """Return the logits."""
        return self.logits


class BitsPrior(_LearnedLogits, Bits):
    """Independent bits with learned logits."""


class OneHotPrior(_LearnedLogits, OneHot):
    """A category with learned probabilities."""
