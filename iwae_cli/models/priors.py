"""Distributions of the top layer, which nothing is given to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.noise import Noise
from iwae_cli.models.conditionals import Bits, Conditional, DiagonalGaussian, Draws, Given, OneHot
from iwae_cli.models.networks import gaussian_mixture_log_prob, standard_normal_log_prob

INSIDE = 0.05
"""Least distance from 0 and 1 of the pixels of a VampPrior at the start, before noise of a fifth of it."""
MOST_AT_ONCE = 1 << 22
"""Numbers that the density of a mixture of many components takes at once in an evaluation."""


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
        h = noise.normal(level, k, batch, self._size)
        return h, standard_normal_log_prob(h)

    def log_prob(self, h: Float[Tensor, "*n d"], given: Given) -> Float[Tensor, "*n"]:
        return standard_normal_log_prob(h)

    def mean(self, given: Given) -> Float[Tensor, " d"]:
        return torch.zeros(self._size)


class MixturePrior(Conditional):
    """sum_j softmax(logits)_j N(loc_j, diag(exp(log_scale_j))^2) of ``size`` units, all learned.

    Locations begin at draws of N(0, I), scales at 1, weights equal.
    """

    def __init__(self, components: int, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.zeros(components, size))
        self.log_scale = nn.Parameter(torch.zeros(components, size))

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the locations: components that begin equal would stay equal."""
        nn.init.normal_(self.loc, generator=generator)

    def forward(self) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Return locations, log-scales and log-weights."""
        return self.loc, self.log_scale, torch.log_softmax(self.logits, 0)

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return draws, smooth functions of locations and scales but not of the weights, and their log-densities."""
        loc, log_scale, log_weights = self()
        below = log_weights.exp().cumsum(0)[:-1]
        chosen = (noise.uniform(level, k, batch, 1) >= below).sum(-1)
        h = loc[chosen] + log_scale[chosen].exp() * noise.normal(level, k, batch, loc.shape[-1])
        return h, self.log_prob(h, None)

    def log_prob(self, h: Float[Tensor, "*n d"], given: Given) -> Float[Tensor, "*n"]:
        components = self()
        rows = max(1, MOST_AT_ONCE // components[0].numel())
        parts = h.flatten(0, -2).split(rows)
        return torch.cat([gaussian_mixture_log_prob(part, *components) for part in parts]).view(h.shape[:-1])

    def mean(self, given: Given) -> Float[Tensor, " d"]:
        loc, _, log_weights = self()
        return log_weights.exp() @ loc


class VampPrior(MixturePrior):
    """1/K sum_j q(h|u_j) with K learned images u_j (Tomczak and Welling 2018, arXiv 1705.07120).

    It shares the parameters of q, so that one loss must train both networks. The images are clamped to [0, 1], the
    range of pixels that q is given where they are integers, and begin with a little noise at the mean image, ``INSIDE``
    of that range: a clamped pixel has no gradient, and would never change.

    Args:
        q: q(h|x), a diagonal Gaussian.
        mean: mean image, (pixels,), in [0, 1].
        components: K.
    """

    def __init__(self, q: DiagonalGaussian, mean: Float[Tensor, " pixels"], components: int) -> None:
        Conditional.__init__(self)
        self.q = q
        self.images = nn.Parameter(mean.clamp(INSIDE, 1 - INSIDE).repeat(components, 1))

    def initialize(self, generator: torch.Generator) -> None:
        """Add noise to the images: components that begin equal would stay equal."""
        with torch.no_grad():
            self.images.add_(torch.randn(self.images.shape, generator=generator), alpha=INSIDE / 5)

    def forward(self) -> tuple[Float[Tensor, "s d"], Float[Tensor, "s d"], Float[Tensor, " s"]]:
        """Return locations and log-scales of q given the images, and equal log-weights."""
        loc, log_scale = self.q(self.images.clamp(0, 1))
        return loc, log_scale, loc.new_full((len(loc),), -math.log(len(loc)))


class _LearnedLogits(Conditional):
    """Logits that are parameters, zero at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(size))

    def forward(self, given: Given) -> Float[Tensor, " d"]:
        return self.logits


class BitsPrior(_LearnedLogits, Bits):
    """Independent bits with learned logits."""


class OneHotPrior(_LearnedLogits, OneHot):
    """A category with learned probabilities."""
