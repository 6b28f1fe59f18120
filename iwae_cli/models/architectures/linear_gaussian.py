"""Linear-Gaussian chains: a model of real-valued data whose log p(x) is known exactly, and the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.interfaces import Latents, Observation
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import Architecture, GenerativeNetwork, InferenceNetwork, Networks
from iwae_cli.models.networks import (
    HALF_LOG_2PI,
    check_sizes,
    normal_log_prob,
    standard_normal_log_prob,
)


class LinearConditional(nn.Module):
    """y | h ~ N(W h + b, diag(exp(log_scale))^2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.log_scale = nn.Parameter(torch.zeros(outputs))

    def forward(self, given: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n o"], Float[Tensor, " o"]]:
        """Location and log-scale."""
        return self.linear(given), self.log_scale


class CholeskyConditional(nn.Module):
    """h | y ~ N(A y + c, L L^T) with L lower triangular and a positive diagonal.

    The full covariance is needed: the exact posterior of a linear-Gaussian model is correlated, and weights against
    a mean-field q soon have infinite variance.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.log_diagonal = nn.Parameter(torch.zeros(outputs))
        self.below_diagonal = nn.Parameter(torch.zeros(outputs, outputs))

    def cholesky(self) -> Float[Tensor, "o o"]:
        """L."""
        return torch.tril(self.below_diagonal, -1) + torch.diag(self.log_diagonal.exp())

    def log_prob(self, h: Float[Tensor, "k batch o"], loc: Float[Tensor, "*n o"]) -> Float[Tensor, "k batch"]:
        """log N(h; loc, L L^T), nats."""
        centred = (h - loc).flatten(0, 1).T
        standardized = torch.linalg.solve_triangular(self.cholesky(), centred, upper=False).T.view(h.shape)
        return standard_normal_log_prob(standardized) - self.log_diagonal.sum()


class LinearGaussianChain(GenerativeNetwork):
    """p(x|h_1) p(h_1|h_2) ... p(h_L) with linear means and constant diagonal scales, p(h_L) = N(0, I)."""

    def __init__(self, pixels: int, latent_sizes: Sequence[int]) -> None:
        super().__init__()
        self._top_size = latent_sizes[-1]
        layers = (LinearConditional(above, below) for below, above in pairwise([pixels, *latent_sizes]))
        self.layers = cast(Sequence[LinearConditional], nn.ModuleList(layers))

    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h_1), nats."""
        return normal_log_prob(x, *self.layers[0](latents[0]))

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(h_1|h_2) + ... + log p(h_L), nats."""
        log_p = standard_normal_log_prob(latents[-1])
        for layer, (below, above) in zip(self.layers[1:], pairwise(latents), strict=True):
            log_p = log_p + normal_log_prob(below, *layer(above))
        return log_p

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """Ancestral sampling from the top layer down."""
        depth = len(self.layers)
        values = [noise.normal(depth, 1, n, self._top_size)]
        for level in range(depth - 1, -1, -1):
            loc, log_scale = self.layers[level](values[0])
            values.insert(0, loc + log_scale.exp() * noise.normal(level, *loc.shape))
        return tuple(values[1:]), values[0][0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """E[x|h_1]."""
        loc, _ = self.layers[0](latents[0])
        return loc

    def exact_log_px(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """log p(x) = log N(x; mu, C), by marginalizing the layers from the top down; float64, nats."""
        loc = torch.zeros(self._top_size, dtype=torch.float64, device=x.device)
        covariance = torch.eye(self._top_size, dtype=torch.float64, device=x.device)
        for layer in reversed(self.layers):
            weight, bias = layer.linear.weight.double(), layer.linear.bias.double()
            loc = weight @ loc + bias
            covariance = weight @ covariance @ weight.T + torch.diag((2 * layer.log_scale.double()).exp())
        centred = (x.double() - loc).T
        _, log_determinant = torch.linalg.slogdet(covariance)
        mahalanobis = (centred * torch.linalg.solve(covariance, centred)).sum(0)
        return -0.5 * (mahalanobis + log_determinant) - x.shape[1] * HALF_LOG_2PI


class LinearGaussianRecognition(InferenceNetwork):
    """q(h_1|x) q(h_2|h_1) ... with linear means and full covariances."""

    def __init__(self, pixels: int, latent_sizes: Sequence[int]) -> None:
        super().__init__()
        layers = (CholeskyConditional(below, above) for below, above in pairwise([pixels, *latent_sizes]))
        self.layers = cast(Sequence[CholeskyConditional], nn.ModuleList(layers))

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Reparameterized draws."""
        latents: list[Tensor] = []
        log_q = x.new_zeros(())
        given = x
        for level, layer in enumerate(self.layers, start=1):
            standard = noise.normal(level, k, x.shape[0], layer.linear.out_features)
            h = layer.linear(given) + standard @ layer.cholesky().T
            log_q = log_q + standard_normal_log_prob(standard) - layer.log_diagonal.sum()
            latents.append(h)
            given = h
        return tuple(latents), log_q

    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log q(h_1|x) + log q(h_2|h_1) + ..., nats."""
        log_q = x.new_zeros(())
        for layer, given, h in zip(self.layers, (x, *latents), latents, strict=False):
            log_q = log_q + layer.log_prob(h, layer.linear(given))
        return log_q

    def posterior_means(
        self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise
    ) -> tuple[Float[Tensor, "batch _"], ...]:
        """E_q[h_l|x], exact for every layer (means are linear), so that no draw is needed."""
        means = []
        given = x
        for layer in self.layers:
            given = layer.linear(given)
            means.append(given)
        return tuple(means)

    def kl_to_prior(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """KL(q(h|x) || N(0, I)) of a model with one stochastic layer, nats.

        Raises:
            TypeError: more than one stochastic layer.
        """
        if len(self.layers) > 1:
            return super().kl_to_prior(x)
        layer = self.layers[0]
        loc, cholesky = layer.linear(x), layer.cholesky()
        return 0.5 * (loc.square().sum(-1) + cholesky.square().sum() - loc.shape[-1]) - layer.log_diagonal.sum()


class LinearGaussianModel(Architecture):
    """Sizes of a linear-Gaussian chain; log p(x) is exact, and q can be the exact posterior.

    Args:
        latent_sizes: size of every stochastic layer, nearest to x first.

    Raises:
        ValueError: no layer or a size below 1.
    """

    observation: Observation = "real"

    def __init__(self, latent_sizes: list[int]) -> None:
        check_sizes("latent_sizes", latent_sizes)
        self.layers = len(latent_sizes)
        self.latent_sizes = latent_sizes

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts at the training mean."""
        generative = LinearGaussianChain(len(mean), self.latent_sizes)
        inference = LinearGaussianRecognition(len(mean), self.latent_sizes)
        return Networks(generative, inference, generative.layers[0].linear.bias, mean)
