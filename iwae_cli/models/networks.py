"""Parts that models are built from: log-densities, draws of discrete variables, hidden layers, checks of sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.errors import check_range
from iwae_cli.core.noise import Noise

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
MAX_SIZE = 32_768
"""Largest layer: the weights between two of them take 4 GB, and Adam needs four times that."""


def normal_log_prob(
    h: Float[Tensor, "*#n d"], loc: Float[Tensor, "*#n d"], log_scale: Float[Tensor, "*#n d"]
) -> Float[Tensor, "*_"]:
    """Return log N(h; loc, diag(exp(log_scale))^2) summed over the last axis, nats."""
    standardized = (h - loc) * torch.exp(-log_scale)
    return (-0.5 * standardized.square() - log_scale).sum(-1) - h.shape[-1] * HALF_LOG_2PI


def standard_normal_log_prob(h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """Return log N(h; 0, I) summed over the last axis, nats."""
    return -0.5 * h.square().sum(-1) - h.shape[-1] * HALF_LOG_2PI


def full_normal_log_prob(
    h: Float[Tensor, "k n d"], loc: Float[Tensor, "n d"], cholesky: Float[Tensor, "n d d"]
) -> Float[Tensor, "k n"]:
    """Return log N(h; loc, cholesky cholesky^T), nats."""
    centred = (h - loc).permute(1, 2, 0)  # (n, d, k)
    standardized = torch.linalg.solve_triangular(cholesky, centred, upper=False).permute(2, 0, 1)
    return standard_normal_log_prob(standardized) - cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def gaussian_mixture_log_prob(
    h: Float[Tensor, "*n d"],
    loc: Float[Tensor, "*#n s d"],
    log_scale: Float[Tensor, "*#n s d"],
    log_weights: Float[Tensor, " s"] | None = None,
) -> Float[Tensor, "*n"]:
    """Return log sum_j weight_j N(h; loc_j, diag(exp(log_scale_j))^2), nats; None: all weights are 1/s."""
    of_component = normal_log_prob(h[..., None, :], loc, log_scale)
    if log_weights is None:
        return of_component.logsumexp(-1) - math.log(loc.shape[-2])
    return (of_component + log_weights).logsumexp(-1)


def bernoulli_log_prob(x: Float[Tensor, "*#n d"], logits: Float[Tensor, "*#n d"]) -> Float[Tensor, "*_"]:
    """Return log p(x) of independent Bernoulli variables, summed over the last axis, nats."""
    return (x * logits - F.softplus(logits)).sum(-1)


def bernoulli_draw(logits: Float[Tensor, "k batch d"], layer: int, noise: Noise) -> Float[Tensor, "k batch d"]:
    """Return draws in {0, 1}, without gradient."""
    return (noise.uniform(layer, *logits.shape) < torch.sigmoid(logits)).to(logits.dtype)


Activation = Literal["tanh", "relu", "elu", "gated"]
ACTIVATIONS: Mapping[Activation, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}


class Gated(nn.Module):
    """A linear layer times the sigmoid of another (Dauphin, Fan, Auli, Grangier 2017, arXiv 1612.08083)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(inputs, outputs)

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return self.value(given) * torch.sigmoid(self.gate(given))


def hidden_layers(sizes: Sequence[int], activation: Activation) -> nn.Sequential:
    """Return linear layers of the given sizes, input first, each followed by the activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        if activation == "gated":
            layers.append(Gated(inputs, outputs))
        else:
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def check_size(name: str, size: int, least: int = 1) -> None:
    """Raise ValueError unless ``size`` is from ``least`` to ``MAX_SIZE``."""
    check_range(name, size, least, MAX_SIZE)


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless ``sizes`` holds at least one integer and all are from 1 to ``MAX_SIZE``."""
    if not sizes:
        raise ValueError(f"{name} must name at least one layer, got []")
    for size in sizes:
        check_size(name, size)
