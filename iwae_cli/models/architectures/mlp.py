"""Gaussian stochastic layers joined by tanh networks: the models of Burda et al. and any deeper ones.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import Architecture, GenerativeNetwork, InferenceNetwork, Networks
from iwae_cli.models.likelihoods import LikelihoodName, PixelLikelihood, likelihood_observation, make_likelihood
from iwae_cli.models.networks import (
    GaussianConditional,
    TanhNetwork,
    check_sizes,
    normal_log_prob,
    standard_normal_log_prob,
)


class GaussianChain(GenerativeNetwork):
    """p(x|h_1) p(h_1|h_2) ... p(h_L): independent pixels, diagonal Gaussian layers, p(h_L) = N(0, I).

    Args:
        observation: from h_1 to the values that ``likelihood`` wants.
        likelihood: of the pixels.
        layers: from every layer to location and log-scale of the one below, nearest to x first.
        top_size: size of the last layer.
    """

    def __init__(
        self, observation: nn.Module, likelihood: PixelLikelihood, layers: Sequence[nn.Module], top_size: int
    ) -> None:
        super().__init__()
        self.observation = observation
        self.likelihood = likelihood
        self.layers = nn.ModuleList(layers)
        self._top_size = top_size

    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h_1), nats."""
        return self.likelihood.log_prob(x, self.observation(latents[0]))

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
        return tuple(latents), self.likelihood.sample(self.observation(latents[0]), noise)[0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """E[x|h_1], in the units of x."""
        return self.likelihood.mean(self.observation(latents[0]))


class GaussianRecognition(InferenceNetwork):
    """q(h_1|x) q(h_2|h_1) ...: diagonal Gaussians.

    Args:
        layers: from x, and then from every layer, to location and log-scale of the next.
        white: the largest value of a pixel; the first network sees x / white.
    """

    def __init__(self, layers: Sequence[nn.Module], white: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._white = white

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Reparameterized draws (Kingma and Welling 2014, arXiv 1312.6114)."""
        latents: list[Tensor] = []
        log_q = x.new_zeros(())
        given = x / self._white
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
        for layer, given, h in zip(self.layers, (x / self._white, *latents), latents, strict=False):
            log_q = log_q + normal_log_prob(h, *layer(given))
        return log_q

    def posterior_means(
        self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise
    ) -> tuple[Float[Tensor, "batch _"], ...]:
        """E_q[h_l|x]: exact for the first layer, averaged over ``draws`` of the layer below for the others."""
        loc, log_scale = self.layers[0](x / self._white)
        means = [loc]
        for level, layer in enumerate(self.layers[1:], start=1):
            h = loc + log_scale.exp() * noise.normal(level, draws, x.shape[0], loc.shape[-1])
            loc, log_scale = layer(h)
            means.append(loc.mean(0))
        return tuple(means)

    def kl_to_prior(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """KL(q(h|x) || N(0, I)) of a model with one stochastic layer, nats.

        Raises:
            TypeError: more than one stochastic layer.
        """
        if len(self.layers) > 1:
            return super().kl_to_prior(x)
        loc, log_scale = self.layers[0](x / self._white)
        return 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)


class GaussianMLP(Architecture):
    """Sizes of a Gaussian chain with tanh networks between its layers; p mirrors q.

    Args:
        latent_sizes: size of every stochastic layer, nearest to x first.
        hidden_sizes: sizes of the tanh layers below each stochastic layer, in the direction of q.
        likelihood: of the pixels; ``discretized_logistic`` for grey levels that are not binarized.

    Raises:
        ValueError: no layer, a size below 1, lists of different lengths, unknown likelihood.
    """

    def __init__(
        self, latent_sizes: list[int], hidden_sizes: list[list[int]], likelihood: LikelihoodName = "bernoulli"
    ) -> None:
        check_sizes("latent_sizes", latent_sizes)
        for hidden in hidden_sizes:
            check_sizes("hidden_sizes", hidden)
        if len(hidden_sizes) != len(latent_sizes):
            raise ValueError(
                "hidden_sizes must hold one list per stochastic layer: "
                f"latent_sizes has {len(latent_sizes)}, got {len(hidden_sizes)}"
            )
        self.observation = likelihood_observation(likelihood)
        self.layers = len(latent_sizes)
        self.latent_sizes = latent_sizes
        self.hidden_sizes = hidden_sizes
        self.likelihood: LikelihoodName = likelihood

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts where the likelihood says."""
        pixels, sizes = len(mean), self.latent_sizes
        likelihood = make_likelihood(self.likelihood, mean, levels)
        head = TanhNetwork(sizes[0], self.hidden_sizes[0][::-1], likelihood.per_pixel * pixels)
        downwards = [
            GaussianConditional(above, hidden[::-1], below)
            for (below, above), hidden in zip(pairwise(sizes), self.hidden_sizes[1:], strict=True)
        ]
        upwards = [
            GaussianConditional(below, hidden, above)
            for (below, above), hidden in zip(pairwise([pixels, *sizes]), self.hidden_sizes, strict=True)
        ]
        generative = GaussianChain(head, likelihood, downwards, sizes[-1])
        inference = GaussianRecognition(upwards, likelihood.white)
        return Networks(generative, inference, head.head.bias, likelihood.initial_bias())
