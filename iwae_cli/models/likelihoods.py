"""What a pixel's distribution given the latents can be: Bernoulli, or grey levels by a discretized logistic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, final, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from iwae_cli.core.interfaces import Observation
from iwae_cli.core.noise import Noise
from iwae_cli.models.networks import bernoulli_draw, bernoulli_log_prob

LikelihoodName = Literal["bernoulli", "discretized_logistic"]


class PixelLikelihood(ABC):
    """Independent pixels x given what a network says of each: ``per_pixel`` numbers, all first ones first.

    Attributes:
        per_pixel: numbers per pixel that the network puts out.
        white: the largest value of a pixel; x / white lies in [0, 1].
    """

    per_pixel: ClassVar[int]
    white: float

    @abstractmethod
    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """What the network should put out at first: the training mean, whatever the latents."""

    @abstractmethod
    def log_prob(
        self, x: Float[Tensor, "batch pixels"], values: Float[Tensor, "k batch values"]
    ) -> Float[Tensor, "k batch"]:
        """log p(x|values) summed over the pixels, nats."""

    @abstractmethod
    def mean(self, values: Float[Tensor, "k batch values"]) -> Float[Tensor, "k batch pixels"]:
        """E[x|values], in the units of x."""

    @abstractmethod
    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        """x ~ p(x|values), from the uniform draws of layer 0."""


@final
class Bernoulli(PixelLikelihood):
    """Pixels in {0, 1}; the network puts out logits.

    Args:
        mean: training mean of every pixel, in [0, 1].
    """

    per_pixel = 1
    white = 1.0

    def __init__(self, mean: Float64[np.ndarray, " pixels"]) -> None:
        self._mean = mean

    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """logit(clip(mean, .001, .999)), as in Burda et al. 2016."""
        clipped = np.clip(self._mean, 0.001, 0.999)
        return np.log(clipped / (1 - clipped))

    def log_prob(
        self, x: Float[Tensor, "batch pixels"], values: Float[Tensor, "k batch values"]
    ) -> Float[Tensor, "k batch"]:
        """See the base class."""
        return bernoulli_log_prob(x, values)

    def mean(self, values: Float[Tensor, "k batch values"]) -> Float[Tensor, "k batch pixels"]:
        """Probability of every pixel to be 1."""
        return torch.sigmoid(values)

    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        """See the base class."""
        return bernoulli_draw(values, 0, noise)


@final
class DiscretizedLogistic(PixelLikelihood):
    """Grey levels 0 to ``levels`` - 1: the mass of a logistic distribution in the bin around each level.

    With white = levels - 1, the bin of level v is ((v - .5) / white, (v + .5) / white]; the first and the last one
    are open towards their ends, so that the masses sum to one. A probability of integers: its NLL is comparable with
    any other on the same levels, and NLL / (pixels ln 2) is honest bits per dimension. Two levels are a Bernoulli.
    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling 2016, arXiv 1606.04934, appendix; open end bins as
    in Salimans, Karpathy, Chen, Kingma 2017, arXiv 1701.05517.

    The network puts out locations (all pixels) and then log-scales (all pixels), both in units of white.

    Args:
        mean: training mean of every pixel, in grey levels.
        levels: number of grey levels.

    Raises:
        ValueError: fewer than two levels.
    """

    per_pixel = 2

    def __init__(self, mean: Float64[np.ndarray, " pixels"], levels: int) -> None:
        if levels < 2:
            raise ValueError(f"levels must be >= 2, got {levels}")
        self._mean = mean
        self.white = float(levels - 1)

    def initial_bias(self) -> Float64[np.ndarray, " values"]:
        """Locations at the mean; a scale of 0.1, about that of a grey image around its mean."""
        return np.concatenate([self._mean / self.white, np.full_like(self._mean, np.log(0.1))])

    def log_prob(
        self, x: Float[Tensor, "batch pixels"], values: Float[Tensor, "k batch values"]
    ) -> Float[Tensor, "k batch"]:
        """See the base class; summed, and returned, in float64 where the device has it."""
        loc, log_scale = values.chunk(2, dim=-1)
        precision = torch.exp(-log_scale)
        upper = ((x + 0.5) / self.white - loc) * precision
        lower = ((x - 0.5) / self.white - loc) * precision
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): no difference of nearly equal numbers,
        # however far x is from the location; and u - l, the width of a bin, is known without x.
        first, last = x == 0, x == self.white
        inside = torch.log(-torch.expm1(-precision / self.white)).masked_fill(first | last, 0.0)
        log_mass = F.logsigmoid(upper).masked_fill(last, 0.0) + F.logsigmoid(-lower).masked_fill(first, 0.0) + inside
        return log_mass.sum(-1, dtype=torch.float32 if x.device.type == "mps" else torch.float64)

    def mean(self, values: Float[Tensor, "k batch values"]) -> Float[Tensor, "k batch pixels"]:
        """E[x] = sum over v of P(x > v), in grey levels."""
        loc, log_scale = values.chunk(2, dim=-1)
        mean = torch.zeros_like(loc)
        for level in range(int(self.white)):
            mean += torch.sigmoid((loc - (level + 0.5) / self.white) * torch.exp(-log_scale))
        return mean

    def sample(self, values: Float[Tensor, "k batch values"], noise: Noise) -> Float[Tensor, "k batch pixels"]:
        """A draw of the logistic, moved to the nearest level."""
        loc, log_scale = values.chunk(2, dim=-1)
        grey = loc + log_scale.exp() * torch.logit(noise.uniform(0, *loc.shape))
        return (grey * self.white).round().clamp(0, self.white)


def likelihood_observation(name: LikelihoodName) -> Observation:
    """What kind of pixels the likelihood ``name`` is for.

    Raises:
        ValueError: no such likelihood.
    """
    if name not in get_args(LikelihoodName):
        raise ValueError(f"likelihood must be one of {', '.join(get_args(LikelihoodName))}, got {name!r}")
    return "binary" if name == "bernoulli" else "grey"


def make_likelihood(name: LikelihoodName, mean: Float64[np.ndarray, " pixels"], levels: int | None) -> PixelLikelihood:
    """The likelihood ``name`` for data of the given training mean and number of grey levels.

    Raises:
        ValueError: grey levels are wanted and the data has none.
    """
    if name == "bernoulli":
        return Bernoulli(mean)
    if levels is None:
        raise ValueError("levels must be known for likelihood=discretized_logistic, got none")
    return DiscretizedLogistic(mean, levels)
