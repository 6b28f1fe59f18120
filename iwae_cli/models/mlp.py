"""Gaussian stochastic layers joined by tanh networks: the models of Burda et al. and any deeper ones.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.models.base import (
    Architecture,
    GenerativeNetwork,
    InferenceNetwork,
    LatentVariableModel,
    Observation,
)
from iwae_cli.models.networks import (
    BernoulliConditional,
    GaussianConditional,
    bernoulli_log_prob,
    initialize,
    normal_log_prob,
    standard_normal_log_prob,
)
from iwae_cli.noise import Noise
from iwae_cli.particles import Latents


class GaussianChain(GenerativeNetwork):
    """p(x|h_1) p(h_1|h_2) ... p(h_L): Bernoulli pixels, diagonal Gaussian layers, p(h_L) = N(0, I)."""

    def __init__(self, latent_sizes: Sequence[int], hidden_sizes: Sequence[Sequence[int]], mean: np.ndarray) -> None:
        super().__init__()
        self._top_size = latent_sizes[-1]
        self.observation = BernoulliConditional(latent_sizes[0], hidden_sizes[0][::-1], mean)
        self.layers = nn.ModuleList(
            GaussianConditional(above, hidden[::-1], below)
            for (below, above), hidden in zip(pairwise(latent_sizes), hidden_sizes[1:], strict=True)
        )

    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h_1), nats."""
        return bernoulli_log_prob(x, self.observation(latents[0]))

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(h_1|h_2) + ... + log p(h_L), nats."""
        log_p = standard_normal_log_prob(latents[-1])
        for layer, (below, above) in zip(self.layers, pairwise(latents), strict=True):
            log_p = log_p + normal_log_prob(below, *layer(above))
        return log_p

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """Ancestral sampling from the top layer down."""
        depth = len(self.layers) + 1
        latents = [noise.normal(depth, 1, n, self._top_size)]
        for level in range(depth - 1, 0, -1):
            loc, log_scale = self.layers[level - 1](latents[0])
            latents.insert(0, loc + log_scale.exp() * noise.normal(level, *loc.shape))
        probability = self.mean(tuple(latents))
        return tuple(latents), (noise.uniform(0, *probability.shape) < probability).to(probability.dtype)[0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """Probability of every pixel to be 1."""
        return torch.sigmoid(self.observation(latents[0]))


class GaussianRecognition(InferenceNetwork):
    """q(h_1|x) q(h_2|h_1) ...: diagonal Gaussians."""

    def __init__(self, pixels: int, latent_sizes: Sequence[int], hidden_sizes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GaussianConditional(below, hidden, above)
            for (below, above), hidden in zip(pairwise([pixels, *latent_sizes]), hidden_sizes, strict=True)
        )

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Reparameterized draws (Kingma and Welling 2014, arXiv 1312.6114)."""
        latents: list[Tensor] = []
        log_q = x.new_zeros(())
        given = x
        for level, layer in enumerate(self.layers, start=1):
            loc, log_scale = layer(given)
            h = loc + log_scale.exp() * noise.normal(level, k, x.shape[0], loc.shape[-1])
            log_q = log_q + normal_log_prob(h, loc, log_scale)
            latents.append(h)
            given = h
        return tuple(latents), log_q

    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log q(h_1|x) + log q(h_2|h_1) + ..., nats."""
        log_q = x.new_zeros(())
        for layer, given, h in zip(self.layers, (x, *latents), latents, strict=False):
            log_q = log_q + normal_log_prob(h, *layer(given))
        return log_q

    def posterior_means(
        self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise
    ) -> tuple[Float[Tensor, "batch _"], ...]:
        """E_q[h_l|x]: exact for the first layer, averaged over ``draws`` of the layer below for the others."""
        loc, log_scale = self.layers[0](x)
        means = [loc]
        for level, layer in enumerate(self.layers[1:], start=1):
            h = loc + log_scale.exp() * noise.normal(level, draws, x.shape[0], loc.shape[-1])
            loc, log_scale = layer(h)
            means.append(loc.to(torch.float64).mean(0).to(loc.dtype))
        return tuple(means)

    def kl_to_prior(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """KL(q(h|x) || N(0, I)) of a model with one stochastic layer, nats.

        Raises:
            TypeError: more than one stochastic layer.
        """
        if len(self.layers) > 1:
            return super().kl_to_prior(x)
        loc, log_scale = self.layers[0](x)
        return 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)


class GaussianMLP(Architecture):
    """Sizes of a Gaussian chain with tanh networks between its layers; p mirrors q.

    Args:
        latent_sizes: size of every stochastic layer, nearest to x first.
        hidden_sizes: sizes of the tanh layers below each stochastic layer, in the direction of q.

    Raises:
        ValueError: no layer, a size below 1, or lists of different lengths.
    """

    observation: ClassVar[Observation] = "binary"

    def __init__(self, latent_sizes: list[int], hidden_sizes: list[list[int]]) -> None:
        check_sizes("latent_sizes", latent_sizes)
        for hidden in hidden_sizes:
            check_sizes("hidden_sizes", hidden)
        if len(hidden_sizes) != len(latent_sizes):
            raise ValueError(
                "hidden_sizes must hold one list per stochastic layer: "
                f"latent_sizes has {len(latent_sizes)}, got {len(hidden_sizes)}"
            )
        self.latent_sizes = latent_sizes
        self.hidden_sizes = hidden_sizes

    @property
    def layers(self) -> int:
        """Number of stochastic layers."""
        return len(self.latent_sizes)

    def build(self, image_shape: tuple[int, ...], mean: np.ndarray, generator: torch.Generator) -> LatentVariableModel:
        """See the base class."""
        model = LatentVariableModel(
            GaussianChain(self.latent_sizes, self.hidden_sizes, mean),
            GaussianRecognition(math.prod(image_shape), self.latent_sizes, self.hidden_sizes),
        )
        initialize(model, generator)
        return model


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless ``sizes`` holds at least one positive integer."""
    if not sizes:
        raise ValueError(f"{name} must name at least one layer, got []")
    for size in sizes:
        if size < 1:
            raise ValueError(f"{name} must hold sizes >= 1, got {size}")
