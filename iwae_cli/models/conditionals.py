"""Distributions of one stochastic layer given the layer next to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.noise import Noise
from iwae_cli.models.networks import (
    Activation,
    bernoulli_draw,
    bernoulli_log_prob,
    hidden_layers,
    normal_log_prob,
    standard_normal_log_prob,
)

Given = Float[Tensor, "*#n i"] | None
"""(batch, i) or (k, batch, i); None for a prior."""
Draws = tuple[Float[Tensor, "k batch d"], Float[Tensor, "k batch"]]
"""h and log p(h|given), nats."""


class Conditional(nn.Module, ABC):
    """The distribution of h given another variable, or given None: then it is a prior.

    Attributes:
        reparameterized: whether draws are smooth functions of the parameters and of ``given``.
        linear_mean: whether the mean is linear in ``given``.
        strata: draws in training are taken in turn from so many parts of the distribution; 1 if they are independent.
        largest: of the values of h where they are the integers from 0 on; None for real numbers.
    """

    reparameterized: ClassVar[bool] = True
    linear_mean: ClassVar[bool] = False
    strata: int = 1
    largest: int | None = None

    @abstractmethod
    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return ``k`` draws for each of ``batch`` rows, from the noise of layer ``level``, and log-probabilities."""

    @abstractmethod
    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        """Return log p(h|given), summed over the last axis, nats."""

    @abstractmethod
    def mean(self, given: Given) -> Float[Tensor, "*_ d"] | None:
        """Return E[h|given]; None where it has no closed form."""

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the initial values of parameters that no linear or convolutional layer holds; by default none."""


class DiagonalGaussian(Conditional):
    """N(loc, diag(exp(log_scale))^2), both from ``forward``, which a subclass implements."""

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return reparameterized draws (Kingma and Welling 2014, arXiv 1312.6114) and their log-densities."""
        loc, log_scale = self(given)
        h = loc + log_scale.exp() * noise.normal(level, k, batch, loc.shape[-1])
        return h, normal_log_prob(h, loc, log_scale)

    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        return normal_log_prob(h, *self(given))

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        loc: Tensor = self(given)[0]
        return loc


class GaussianHeads(DiagonalGaussian):
    """A diagonal Gaussian of ``outputs`` units; location and log-scale are linear in the ``features`` of ``body``."""

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.loc = nn.Linear(features, outputs)
        self.log_scale = nn.Linear(features, outputs)

    def forward(self, given: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n o"], Float[Tensor, "*n o"]]:
        features = self.body(given)
        return self.loc(features), self.log_scale(features)


class GaussianConditional(GaussianHeads):
    """A diagonal Gaussian of ``outputs`` units on layers of ``hidden`` sizes."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, activation: Activation = "tanh") -> None:
        super().__init__(hidden_layers([inputs, *hidden], activation), hidden[-1], outputs)


class LinearConditional(DiagonalGaussian):
    """N(W given + b, diag(exp(log_scale))^2) with constant scales."""

    linear_mean: ClassVar[bool] = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, given: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n o"], Float[Tensor, " o"]]:
        return self.linear(given), self.log_scale


class CholeskyConditional(Conditional):
    """N(A given + c, L L^T) with L lower triangular and a positive diagonal.

    The full covariance is needed: the exact posterior of a linear-Gaussian model is correlated, and the weights of a
    mean-field q soon have infinite variance.
    """

    linear_mean: ClassVar[bool] = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.log_diagonal = nn.Parameter(torch.zeros(outputs))
        self.below_diagonal = nn.Parameter(torch.zeros(outputs, outputs))

    def cholesky(self) -> Float[Tensor, "o o"]:
        return torch.tril(self.below_diagonal, -1) + torch.diag(self.log_diagonal.exp())

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        standard = noise.normal(level, k, batch, self.linear.out_features)
        h = self.linear(given) + standard @ self.cholesky().T
        return h, standard_normal_log_prob(standard) - self.log_diagonal.sum()

    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        centred = (h - self.linear(given)).flatten(0, 1).T
        standardized = torch.linalg.solve_triangular(self.cholesky(), centred, upper=False).T.view(h.shape)
        return standard_normal_log_prob(standardized) - self.log_diagonal.sum()

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        return self.linear(given)


class Bits(Conditional):
    """Independent bits with the logits of ``forward``, which a subclass implements; draws carry no gradient."""

    reparameterized: ClassVar[bool] = False
    largest = 1

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return draws in {0, 1} and their log-probabilities, whose gradient is the score."""
        logits = self(given)
        h = bernoulli_draw(logits.expand(k, batch, -1), level, noise)
        return h, bernoulli_log_prob(h, logits)

    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        return bernoulli_log_prob(h, self(given).to(h.dtype))

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        return torch.sigmoid(self(given))


class OneHot(Conditional):
    """One of several categories, as a one-hot vector, with the logits of ``forward``; draws carry no gradient."""

    reparameterized: ClassVar[bool] = False

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return one-hot draws and their log-probabilities, whose gradient is the score."""
        log_probability = torch.log_softmax(self(given), -1)
        below = torch.softmax(log_probability.detach().expand(k, batch, -1), -1).cumsum(-1)
        # Inverts the distribution function; without the last category, since rounding may leave its sum short of 1.
        chosen = (noise.uniform(level, k, batch, 1) >= below[..., :-1]).sum(-1)
        h = F.one_hot(chosen, below.shape[-1]).to(log_probability.dtype)
        return h, (h * log_probability).sum(-1)

    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        return (h * torch.log_softmax(self(given).to(h.dtype), -1)).sum(-1)

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        return torch.softmax(self(given), -1)


class _Linear(Conditional, nn.Linear):
    """Logits that are linear in ``given``."""

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """Return the logits, in the precision of ``given``, so that an enumeration can be in float64."""
        return F.linear(given, self.weight.to(given.dtype), self.bias.to(given.dtype))


class LinearBits(_Linear, Bits):
    """Independent bits whose logits are linear in ``given``."""


class LinearOneHot(_Linear, OneHot):
    """A category whose logits are linear in ``given``."""
