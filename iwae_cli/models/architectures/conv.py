"""A convolutional pair for images, with one Gaussian stochastic layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.errors import UserError
from iwae_cli.models.base import Networks
from iwae_cli.models.conditionals import Conditional, GaussianHeads
from iwae_cli.models.gaussian import GaussianArchitecture
from iwae_cli.models.likelihoods import PixelLikelihood, Pixels, make_likelihood
from iwae_cli.models.networks import check_size, check_sizes

HALVE = (4, 2, 1)
"""Kernel size, stride, padding: make a side exactly half as long; transposed, twice as long."""


def convolutions(image: tuple[int, int, int], channels: Sequence[int], hidden: int) -> nn.Sequential:
    """Return what makes ``hidden`` features of an image: two convolutions that halve its sides, one hidden layer, ELU.

    ``image`` is (channels, height, width); ``channels`` those after the first and after the second convolution. No
    batch norm: an observation's log q must not depend on the others of its batch.
    """
    return nn.Sequential(
        nn.Unflatten(-1, image),
        nn.Conv2d(image[0], channels[0], *HALVE),
        nn.ELU(),
        nn.Conv2d(channels[0], channels[1], *HALVE),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(channels[1] * (image[1] // 4) * (image[2] // 4), hidden),
        nn.ELU(),
    )


class ConvolutionalPixels(Pixels):
    """Pixels whose values come from the mirror image of the convolutions.

    The bias is one number per pixel and value, so that the filters need not learn the mean image.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        channels: Sequence[int],
        image: tuple[int, int, int],
        likelihood: PixelLikelihood,
    ) -> None:
        super().__init__(likelihood)
        smallest = (channels[1], image[1] // 4, image[2] // 4)
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ELU(),
            nn.Linear(hidden, math.prod(smallest)),
            nn.ELU(),
            nn.Unflatten(-1, smallest),
            nn.ConvTranspose2d(channels[1], channels[0], *HALVE),
            nn.ELU(),
            nn.ConvTranspose2d(channels[0], likelihood.per_pixel * image[0], *HALVE, bias=False),
            nn.Flatten(),
        )
        self.bias = nn.Parameter(torch.zeros(likelihood.per_pixel * math.prod(image)))

    def forward(self, given: Float[Tensor, "k batch i"]) -> Float[Tensor, "k batch values"]:
        return self.body(given.flatten(0, 1)).unflatten(0, given.shape[:2]) + self.bias


@dataclass(eq=False)
class GaussianConvolutional(GaussianArchitecture):
    """A convolutional pair with one Gaussian layer, for images with sides divisible by 4; p mirrors q."""

    latent_size: int
    channels: list[int]
    hidden_size: int
    layers = 1

    def __post_init__(self) -> None:
        check_size("latent_size", self.latent_size)
        check_sizes("channels", self.channels)
        if len(self.channels) != 2:
            raise ValueError(f"channels must hold two sizes, got {len(self.channels)}")
        check_size("hidden_size", self.hidden_size)
        self._check_choices([self.latent_size])

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        if len(image_shape) not in (2, 3) or image_shape[-1] % 4 or image_shape[-2] % 4:
            raise UserError(
                "model=conv needs images of shape (height, width) or (channels, height, width) with height and width "
                f"divisible by 4, this data has shape {image_shape}: use model=one_layer"
            )
        height, width = image_shape[-2:]
        image = (image_shape[0] if len(image_shape) == 3 else 1, height, width)
        likelihood = make_likelihood(self.likelihood, mean, levels, self.noise_std)
        pixels = ConvolutionalPixels(self.latent_size, self.hidden_size, self.channels, image, likelihood)
        body, hidden, size = convolutions(image, self.channels, self.hidden_size), self.hidden_size, self.latent_size
        if self.posterior == "diagonal":
            q: Conditional = GaussianHeads(body, hidden, size)
        else:
            q = self._rich_posterior(body, hidden, size, first=True)
        return self._joined(mean, pixels, [], [q], size, pixels.bias)
