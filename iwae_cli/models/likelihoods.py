"""The distribution of pixels given the nearest latents: Bernoulli, discretized logistic (grey levels) or Gaussian."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.interfaces import Observation
from iwae_cli.core.noise import Noise
from iwae_cli.models.conditionals import Conditional, Draws, Given
from iwae_cli.models.networks import HALF_LOG_2PI, Activation, bernoulli_draw, bernoulli_log_prob, hidden_layers

LikelihoodName = Literal["bernoulli", "discretized_logistic", "gaussian"]
OBSERVATIONS: Mapping[LikelihoodName, Observation] = {
    "bernoulli": "binary",
    "discretized_logistic": "grey",
    "gaussian": "real",
}
"""The kind of pixels that each likelihood is for."""

LEAST_STD = 1e-6
"""Least scale of a Gaussian pixel, in the units of x: below, float32 holds no difference from the mean."""


class PixelLikelihood(ABC):
    """Independent pixels x given ``per_pixel`` values each: the first values of all pixels, then the second ones.

    Attributes:
        per_pixel: values per pixel.
        white: largest value of a pixel; x / white lies in [0, 1].
        integers: whether the values of a pixel are the integers from 0 to ``white`` alone.
    """

    per_pixel: ClassVar[int]
    integers: ClassVar[bool] = False
    white: float

    @abstractmethod
    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """Return the values for which E[x] is the training mean."""

    @abstractmethod
    def log_prob(self, x: Float[Tensor, "*#n pixels"], values: Float[Tensor, "*#n values"]) -> Float[Tensor, "*_"]:
        """Return log p(x|values) summed over the pixels, nats."""

    @abstractmethod
    def mean(self, values: Float[Tensor, "*n values"]) -> Float[Tensor, "*n pixels"]:
        """Return E[x|values], in the units of x."""

    @abstractmethod
    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        """Return draws of x, from the noise of layer 0."""


@final
class Bernoulli(PixelLikelihood):
    """Pixels in {0, 1}; the values are logits, and ``mean`` is the training mean of every pixel."""

    per_pixel = 1
    integers = True
    white = 1.0

    def __init__(self, mean: Float64[np.ndarray, " pixels"]) -> None:
        self._mean = mean

    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """Return logit(clip(mean, .001, .999)), as in Burda et al. 2016."""
        clipped = np.clip(self._mean, 0.001, 0.999)
        return np.log(clipped / (1 - clipped))

    def log_prob(self, x: Float[Tensor, "*#n pixels"], values: Float[Tensor, "*#n values"]) -> Float[Tensor, "*_"]:
        return bernoulli_log_prob(x, values)

    def mean(self, values: Float[Tensor, "*n values"]) -> Float[Tensor, "*n pixels"]:
        return torch.sigmoid(values)

    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        return bernoulli_draw(values, 0, noise)


@final
class DiscretizedLogistic(PixelLikelihood):
    """Grey levels 0 to ``levels`` - 1: the mass of a logistic distribution in the bin around each level.

    With white = levels - 1, the bin of level v is ((v - .5) / white, (v + .5) / white]; the first and the last one
    are open towards their ends, so that the masses sum to one. It is a probability of integers: its NLL is comparable
    with any other on the same levels, and NLL / (pixels ln 2) is bits per dimension. Two levels are a Bernoulli.
    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling 2016, arXiv 1606.04934, appendix; open end bins as
    in Salimans, Karpathy, Chen, Kingma 2017, arXiv 1701.05517.

    The values are locations (all pixels) and then log-scales (all pixels), both in units of white.

    Args:
        mean: training mean of every pixel, in grey levels.
        levels: number of grey levels, at least 2.
    """

    per_pixel = 2
    integers = True

    def __init__(self, mean: Float64[np.ndarray, " pixels"], levels: int) -> None:
        if levels < 2:
            raise ValueError(f"levels must be >= 2, got {levels}")
        self._mean = mean
        self.white = float(levels - 1)

    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """Return locations at the mean and scales of 0.1, about that of a grey image around its mean."""
        return np.concatenate([self._mean / self.white, np.full_like(self._mean, np.log(0.1))])

    def log_prob(self, x: Float[Tensor, "*#n pixels"], values: Float[Tensor, "*#n values"]) -> Float[Tensor, "*_"]:
        """See the base class; summed and returned in float64 where the device has it."""
        loc, log_scale = values.chunk(2, dim=-1)
        precision = torch.exp(-log_scale)
        upper = ((x + 0.5) / self.white - loc) * precision
        lower = ((x - 0.5) / self.white - loc) * precision
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)) has no difference of nearly equal numbers,
        # however far x is from the location; and u - l, the width of a bin, does not depend on x.
        first, last = x == 0, x == self.white
        inside = torch.log(-torch.expm1(-precision / self.white)).masked_fill(first | last, 0.0)
        log_mass = F.logsigmoid(upper).masked_fill(last, 0.0) + F.logsigmoid(-lower).masked_fill(first, 0.0) + inside
        return _long_sum(log_mass)

    def mean(self, values: Float[Tensor, "*n values"]) -> Float[Tensor, "*n pixels"]:
        """Return E[x] = sum over v of P(x > v), in grey levels."""
        loc, log_scale = values.chunk(2, dim=-1)
        mean = torch.zeros_like(loc)
        for level in range(int(self.white)):
            mean += torch.sigmoid((loc - (level + 0.5) / self.white) * torch.exp(-log_scale))
        return mean

    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        """Return draws of the logistic, moved to the nearest level."""
        loc, log_scale = values.chunk(2, dim=-1)
        grey = loc + log_scale.exp() * torch.logit(noise.uniform(0, *loc.shape))
        return (grey * self.white).round().clamp(0, self.white)


@final
class Gaussian(nn.Module, PixelLikelihood):
    """Real pixels, N(value, noise_std^2) with one scale for all of them; its log-density may be positive.

    A learned scale is the sigma-VAE of Rybkin, Daniilidis, Levine 2021, arXiv 2006.13202: at the optimum its square is
    the mean squared error. A scale for each pixel, or one that depends on h, would make the likelihood unbounded where
    a pixel is constant.

    Args:
        mean: training mean of every pixel.
        noise_std: the scale, in the units of x; None: learned, see ``start_at``.
    """

    per_pixel = 1
    white = 1.0

    def __init__(self, mean: Float64[np.ndarray, " pixels"], noise_std: float | None) -> None:
        super().__init__()
        self._mean = mean
        self.is_learned = noise_std is None
        log_std = torch.tensor(math.log(noise_std or 1.0))
        if self.is_learned:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)

    def start_at(self, std: float) -> None:
        """Set a learned scale to ``std``, that of the data about their means: what p has when h says nothing."""
        if self.is_learned:
            nn.init.constant_(self.log_std, math.log(max(std, LEAST_STD)))

    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        return self._mean

    def log_prob(self, x: Float[Tensor, "*#n pixels"], values: Float[Tensor, "*#n values"]) -> Float[Tensor, "*_"]:
        """See the base class; summed and returned in float64 where the device has it."""
        standardized = (x - values) * torch.exp(-self.log_std)
        return _long_sum(-0.5 * standardized.square() - self.log_std - HALF_LOG_2PI)

    def mean(self, values: Float[Tensor, "*n values"]) -> Float[Tensor, "*n pixels"]:
        return values

    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        return values + self.log_std.exp() * noise.normal(0, *values.shape)


def _long_sum(terms: Float[Tensor, "*n pixels"]) -> Float[Tensor, "*n"]:
    """Return the sum over the last axis, in float64 where the device has it."""
    return terms.sum(-1, dtype=torch.float32 if terms.device.type == "mps" else torch.float64)


class Pixels(Conditional):
    """p(x|h_1): ``likelihood`` with the values of ``forward``, which a subclass implements."""

    reparameterized: ClassVar[bool] = False

    def __init__(self, likelihood: PixelLikelihood) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.largest = int(likelihood.white) if likelihood.integers else None

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return draws of x and their log-probabilities; ``level`` must be 0."""
        values = self(given)
        x = self.likelihood.sample(values, noise)
        return x, self.likelihood.log_prob(x, values)

    def log_prob(self, h: Float[Tensor, "*#n d"], given: Given) -> Float[Tensor, "*_"]:
        return self.likelihood.log_prob(h, self(given))

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        return self.likelihood.mean(self(given))


class MLPPixels(Pixels):
    """Pixels whose values are a linear head on layers of ``hidden`` sizes; ``inputs`` is the size of h_1."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        pixels: int,
        likelihood: PixelLikelihood,
        activation: Activation = "tanh",
    ) -> None:
        super().__init__(likelihood)
        self.body = hidden_layers([inputs, *hidden], activation)
        self.head = nn.Linear([inputs, *hidden][-1], likelihood.per_pixel * pixels)

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n values"]:
        return self.head(self.body(given))


TanhPixels = MLPPixels
"""Its name up to version 0.4.0, which classes of users import."""


def make_likelihood(
    name: LikelihoodName,
    mean: Float64[np.ndarray, " pixels"],
    levels: int | None,
    noise_std: float | None = None,
) -> PixelLikelihood:
    """Return the likelihood ``name`` for data of the given training mean and number of grey levels, if it needs one."""
    if name == "gaussian":
        return Gaussian(mean, noise_std)
    if name == "bernoulli":
        return Bernoulli(mean)
    if levels is None:
        raise ValueError("levels must be known for likelihood=discretized_logistic, got none")
    return DiscretizedLogistic(mean, levels)
