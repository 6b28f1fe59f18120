"""Parts that models are built from: log-densities, tanh networks, diagonal Gaussian conditionals, initial weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.noise import Noise

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
MAX_SIZE = 32_768
"""Of a layer; the weights between two such layers are 4 GB, and Adam wants four times that."""


def normal_log_prob(
    h: Float[Tensor, "*#n d"], loc: Float[Tensor, "*#n d"], log_scale: Float[Tensor, "*#n d"]
) -> Float[Tensor, "*_"]:
    """log N(h; loc, diag(exp(log_scale))^2) summed over the last axis, nats."""
    standardized = (h - loc) * torch.exp(-log_scale)
    return (-0.5 * standardized.square() - log_scale).sum(-1) - h.shape[-1] * HALF_LOG_2PI


def standard_normal_log_prob(h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """log N(h; 0, I) summed over the last axis, nats."""
    return -0.5 * h.square().sum(-1) - h.shape[-1] * HALF_LOG_2PI


def bernoulli_log_prob(x: Float[Tensor, "*#n d"], logits: Float[Tensor, "*#n d"]) -> Float[Tensor, "*_"]:
    """log p(x) of independent Bernoulli variables with the given logits, summed over the last axis, nats."""
    return (x * logits - F.softplus(logits)).sum(-1)


def bernoulli_draw(logits: Float[Tensor, "k batch d"], layer: int, noise: Noise) -> Float[Tensor, "k batch d"]:
    """Draws in {0, 1}, without gradient."""
    return (noise.uniform(layer, *logits.shape) < torch.sigmoid(logits)).to(logits.dtype)


def tanh_network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given sizes, input first, each followed by tanh."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers)


class GaussianConditional(nn.Module):
    """A diagonal Gaussian whose location and log-scale are heads on a tanh network.

    Args:
        inputs: size of what is conditioned on.
        hidden: sizes of the tanh layers.
        outputs: size of the Gaussian.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.body = tanh_network([inputs, *hidden])
        self.loc = nn.Linear(hidden[-1], outputs)
        self.log_scale = nn.Linear(hidden[-1], outputs)

    def forward(self, given: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n o"], Float[Tensor, "*n o"]]:
        """Location and log-scale."""
        features = self.body(given)
        return self.loc(features), self.log_scale(features)


class TanhNetwork(nn.Module):
    """A linear head on a tanh network; linear altogether if ``hidden`` is empty.

    Args:
        inputs: size of what is conditioned on.
        hidden: sizes of the tanh layers.
        outputs: size of the head.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        self.body = tanh_network(sizes)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        """The head's values."""
        return self.head(self.body(given))


def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Glorot-uniform weights (Glorot and Bengio 2010) drawn in the order of the modules, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_size(name: str, size: int) -> None:
    """Raise ValueError unless ``size`` is from 1 to ``MAX_SIZE``."""
    if size < 1:
        raise ValueError(f"{name} must be >= 1, got {size}")
    if size > MAX_SIZE:
        raise ValueError(f"{name} must be <= {MAX_SIZE:,}, got {size:,}")


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless ``sizes`` holds at least one integer and all are from 1 to ``MAX_SIZE``."""
    if not sizes:
        raise ValueError(f"{name} must name at least one layer, got []")
    for size in sizes:
        if size < 1:
            raise ValueError(f"{name} must hold sizes >= 1, got {size}")
        if size > MAX_SIZE:
            raise ValueError(f"{name} must hold sizes <= {MAX_SIZE:,}, got {size:,}")
