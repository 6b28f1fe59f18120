"""Sigmoid belief networks: stochastic layers of Bernoulli units joined by linear layers.

Sources: Neal 1992 (Artificial Intelligence 56), for p; the 200-200-200 network of Bornschein and Bengio 2015 (RWS,
arXiv 1406.2751) and of Mnih and Rezende 2016 (VIMCO, arXiv 1602.06725), for the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.interfaces import Latents, Observation
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import Architecture, GenerativeNetwork, InferenceNetwork, Networks
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import bernoulli_draw, bernoulli_log_prob, check_sizes

MAX_STATES = 2**14
"""Joint states of all layers up to which log p(x) is enumerated; that costs about as much as 5000 samples do."""

_CHUNK = 1024
"""States whose logits are in memory at once."""


def linear(layer: nn.Linear, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
    """``layer`` in the precision of its input, so that an enumeration can be in float64."""
    return F.linear(given, layer.weight.to(given.dtype), layer.bias.to(given.dtype))


def enumerated_log_px(
    x: Float[Tensor, "batch pixels"],
    log_prior: Float64[Tensor, " states"],
    states: Float64[Tensor, "states d"],
    layer: nn.Linear,
) -> Float64[Tensor, " batch"]:
    """log p(x) = log sum_h p(h) p(x|h) with Bernoulli pixels, over all ``states`` of the layer next to x, nats.

    Args:
        x: observations.
        log_prior: log p(h) of every state.
        states: every h.
        layer: from h to the logits of the pixels.
    """
    x = x.double()
    parts = []
    for h, log_p in zip(states.split(_CHUNK), log_prior.split(_CHUNK), strict=True):
        logits = linear(layer, h)
        # Split as in bernoulli_log_prob, but with the pixels summed by a product of matrices.
        log_joint = logits @ x.T + (log_p - F.softplus(logits).sum(-1))[:, None]
        parts.append(log_joint.logsumexp(0))
    return torch.stack(parts).logsumexp(0)


class BernoulliChain(GenerativeNetwork):
    """p(x|h_1) p(h_1|h_2) ... p(h_L): Bernoulli units whose logits are linear above; the top logits are learned.

    Args:
        pixels: size of x, in {0, 1}.
        latent_sizes: nearest to x first.
    """

    def __init__(self, pixels: int, latent_sizes: Sequence[int]) -> None:
        super().__init__()
        self._latent_sizes = tuple(latent_sizes)
        layers = (nn.Linear(above, below) for below, above in pairwise([pixels, *latent_sizes]))
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList(layers))
        self.prior_logits = nn.Parameter(torch.zeros(latent_sizes[-1]))

    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h_1), nats."""
        return bernoulli_log_prob(x, self.layers[0](latents[0]))

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(h_1|h_2) + ... + log p(h_L), nats."""
        log_p = bernoulli_log_prob(latents[-1], self.prior_logits.to(latents[-1].dtype))
        for layer, (below, above) in zip(self.layers[1:], pairwise(latents), strict=True):
            log_p = log_p + bernoulli_log_prob(below, linear(layer, above))
        return log_p

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """Ancestral sampling from the top layer down."""
        depth = len(self.layers)
        values = [bernoulli_draw(self.prior_logits.expand(1, n, -1), depth, noise)]
        for level in range(depth - 1, -1, -1):
            values.insert(0, bernoulli_draw(self.layers[level](values[0]), level, noise))
        return tuple(values[1:]), values[0][0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """Probability of every pixel to be 1."""
        return torch.sigmoid(self.layers[0](latents[0]))

    def exact_log_px(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"] | None:
        """log p(x) by enumeration in float64, nats, differentiable; None above ``MAX_STATES`` joint states."""
        bits = sum(self._latent_sizes)
        if 2**bits > MAX_STATES:
            return None
        # The bits of h_1 vary slowest, so that the states above one h_1 are neighbours.
        numbers = torch.arange(2**bits, device=x.device)[:, None]
        states = (numbers >> torch.arange(bits - 1, -1, -1, device=x.device) & 1).double()
        latents = tuple(states[:, None].split(self._latent_sizes, dim=-1))
        first = 2 ** self._latent_sizes[0]
        log_prior = self.log_prior(latents).view(first, -1).logsumexp(1)
        return enumerated_log_px(x, log_prior, latents[0][:: len(states) // first, 0], self.layers[0])


class BernoulliRecognition(InferenceNetwork):
    """q(h_1|x) q(h_2|h_1) ...: Bernoulli units whose logits are linear in the layer below.

    Draws are not differentiable; the gradient is carried by log q, their score.
    """

    reparameterized: ClassVar[bool] = False

    def __init__(self, pixels: int, latent_sizes: Sequence[int]) -> None:
        super().__init__()
        layers = (nn.Linear(below, above) for below, above in pairwise([pixels, *latent_sizes]))
        self.layers = cast(Sequence[nn.Linear], nn.ModuleList(layers))

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """Draws in {0, 1}."""
        latents: list[Tensor] = []
        log_q = x.new_zeros(())
        given = x
        for level, layer in enumerate(self.layers, start=1):
            logits = layer(given)
            given = bernoulli_draw(logits.expand(k, x.shape[0], -1), level, noise)
            log_q = log_q + bernoulli_log_prob(given, logits)
            latents.append(given)
        return tuple(latents), log_q

    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log q(h_1|x) + log q(h_2|h_1) + ..., nats."""
        log_q = x.new_zeros(())
        for layer, given, h in zip(self.layers, (x, *latents), latents, strict=False):
            log_q = log_q + bernoulli_log_prob(h, layer(given))
        return log_q

    def posterior_means(self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise) -> None:
        """None: active units are not defined for discrete layers."""
        return None


class SigmoidBeliefNetwork(Architecture):
    """Sizes of a sigmoid belief network; p and q are linear between stochastic layers.

    Args:
        latent_sizes: Bernoulli units of every stochastic layer, nearest to x first. log p(x) is exact, by
            enumeration, where they are 14 or fewer in all.

    Raises:
        ValueError: no layer or a size below 1.
    """

    observation: Observation = "binary"
    discrete: ClassVar[bool] = True

    def __init__(self, latent_sizes: list[int]) -> None:
        check_sizes("latent_sizes", latent_sizes)
        self.layers = len(latent_sizes)
        self.latent_sizes = latent_sizes

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts at the logit of the training mean."""
        generative = BernoulliChain(len(mean), self.latent_sizes)
        inference = BernoulliRecognition(len(mean), self.latent_sizes)
        return Networks(generative, inference, generative.layers[0].bias, Bernoulli(mean).initial_bias())
