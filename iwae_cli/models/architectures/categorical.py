"""One categorical latent: a mixture of Bernoulli images, whose exact posterior q can represent."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.interfaces import Latents, Observation
from iwae_cli.core.noise import Noise
from iwae_cli.models.architectures.discrete import enumerated_log_px
from iwae_cli.models.base import Architecture, GenerativeNetwork, InferenceNetwork, Networks
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import bernoulli_draw, bernoulli_log_prob, check_size


def categorical_draw(logits: Float[Tensor, "k batch d"], layer: int, noise: Noise) -> Float[Tensor, "k batch d"]:
    """One-hot draws, without gradient: the inverse of the distribution function at one uniform number."""
    k, batch, categories = logits.shape
    below = torch.softmax(logits.detach(), -1).cumsum(-1)
    # Without the last one, which rounding may leave short of 1.
    chosen = (noise.uniform(layer, k, batch, 1) >= below[..., :-1]).sum(-1)
    return F.one_hot(chosen, categories).to(logits.dtype)


class BernoulliMixture(GenerativeNetwork):
    """p(h) p(x|h): one of ``categories``, with learned probabilities; Bernoulli pixels with logits of its own.

    Args:
        pixels: size of x, in {0, 1}.
        categories: states of h, one-hot.
    """

    def __init__(self, pixels: int, categories: int) -> None:
        super().__init__()
        self.observation = nn.Linear(categories, pixels)
        self.prior_logits = nn.Parameter(torch.zeros(categories))

    def log_likelihood(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(x|h), nats."""
        return bernoulli_log_prob(x, self.observation(latents[0]))

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]:
        """log p(h), nats."""
        return latents[0] @ torch.log_softmax(self.prior_logits, 0)

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]:
        """A category, then its pixels."""
        h = categorical_draw(self.prior_logits.expand(1, n, -1), 1, noise)
        return (h,), bernoulli_draw(self.observation(h), 0, noise)[0]

    def mean(self, latents: Latents) -> Float[Tensor, "k batch pixels"]:
        """Probability of every pixel to be 1."""
        return torch.sigmoid(self.observation(latents[0]))

    def exact_log_px(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]:
        """log p(x) by enumeration in float64, nats, differentiable."""
        log_prior = torch.log_softmax(self.prior_logits.double(), 0)
        states = torch.eye(len(log_prior), dtype=torch.float64, device=x.device)
        return enumerated_log_px(x, log_prior, states, self.observation)


class CategoricalRecognition(InferenceNetwork):
    """q(h|x) with logits linear in x, which is the form of the exact posterior of a mixture of Bernoulli images.

    Draws are not differentiable; the gradient is carried by log q, their score.
    """

    reparameterized: ClassVar[bool] = False

    def __init__(self, pixels: int, categories: int) -> None:
        super().__init__()
        self.logits = nn.Linear(pixels, categories)

    def sample(
        self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise
    ) -> tuple[Latents, Float[Tensor, "k batch"]]:
        """One-hot draws."""
        log_probability = torch.log_softmax(self.logits(x), -1)
        h = categorical_draw(log_probability.expand(k, *log_probability.shape), 1, noise)
        return (h,), (h * log_probability).sum(-1)

    def forward(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        """log q(h|x), nats."""
        return (latents[0] * torch.log_softmax(self.logits(x), -1)).sum(-1)

    def posterior_means(self, x: Float[Tensor, "batch pixels"], draws: int, noise: Noise) -> None:
        """None: active units are not defined for discrete layers."""
        return None


class Categorical(Architecture):
    """Size of one categorical latent; log p(x) is exact, by enumeration.

    Args:
        categories: states of the latent.

    Raises:
        ValueError: fewer than two categories, or too many.
    """

    observation: Observation = "binary"
    layers = 1
    discrete: ClassVar[bool] = True

    def __init__(self, categories: int) -> None:
        if categories < 2:
            raise ValueError(f"categories must be >= 2, got {categories}")
        check_size("categories", categories)
        self.categories = categories

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts at the logit of the training mean."""
        generative = BernoulliMixture(len(mean), self.categories)
        inference = CategoricalRecognition(len(mean), self.categories)
        return Networks(generative, inference, generative.observation.bias, Bernoulli(mean).initial_bias())
