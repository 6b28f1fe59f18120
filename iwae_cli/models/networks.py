"""Parts that models are built from: tanh networks, diagonal Gaussian conditionals, Bernoulli observations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(
    h: Float[Tensor, "*#n d"], loc: Float[Tensor, "*#n d"], log_scale: Float[Tensor, "*#n d"]
) -> Float[Tensor, "*_"]:
    """log N(h; loc, diag(exp(log_scale))^2) summed over the last axis, nats."""
    standardized = (h - loc) * torch.exp(-log_scale)
    return (-0.5 * standardized.square() - log_scale).sum(-1) - h.shape[-1] * HALF_LOG_2PI


def standard_normal_log_prob(h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """log N(h; 0, I) summed over the last axis, nats."""
    return -0.5 * h.square().sum(-1) - h.shape[-1] * HALF_LOG_2PI


def bernoulli_log_prob(
    x: Float[Tensor, "batch pixels"], logits: Float[Tensor, "k batch pixels"]
) -> Float[Tensor, "k batch"]:
    """log p(x) of independent Bernoulli pixels with the given logits, summed over pixels, nats."""
    return (x * logits - F.softplus(logits)).sum(-1)


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


class BernoulliConditional(nn.Module):
    """Independent Bernoulli pixels whose logits are a head on a tanh network.

    Args:
        inputs: size of what is conditioned on.
        hidden: sizes of the tanh layers.
        mean: training mean of every pixel in [0, 1]; the output bias starts at its logit.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], mean: np.ndarray) -> None:
        super().__init__()
        self.body = tanh_network([inputs, *hidden])
        self.logits = nn.Linear(hidden[-1], mean.size)
        self._mean = mean

    def reset_output_bias(self) -> None:
        """Output bias = logit(clip(mean, .001, .999)), as in the paper."""
        clipped = np.clip(self._mean, 0.001, 0.999)
        with torch.no_grad():
            self.logits.bias.copy_(torch.from_numpy(np.log(clipped / (1 - clipped))))

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n pixels"]:
        """Logits."""
        return self.logits(self.body(given))


def initialize(module: nn.Module, generator: torch.Generator) -> None:
    """Glorot-uniform weights (Glorot and Bengio 2010) drawn in the order of the modules, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, BernoulliConditional):
            part.reset_output_bias()
