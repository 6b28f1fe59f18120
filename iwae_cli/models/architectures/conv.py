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
from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional, DiagonalGaussian
from iwae_cli.models.kl import diagonal_to_standard_normal, register_kl
from iwae_cli.models.likelihoods import (
    OBSERVATIONS,
    LikelihoodName,
    PixelLikelihood,
    Pixels,
    check_noise_std,
    make_likelihood,
)
from iwae_cli.models.networks import check_size, check_sizes
from iwae_cli.models.posteriors import PosteriorName, check_posterior, make_posterior
from iwae_cli.models.priors import Prior, PriorName, StandardNormal, check_prior, make_prior

HALVE = (4, 2, 1)
"""Kernel size, stride, padding: make a side exactly half as long; transposed, twice as long."""


def convolutions(image: tuple[int, int, int], channels: Sequence[int], hidden: int) -> nn.Sequential:
    """Return what makes features of an image: two convolutions that halve its sides, one hidden layer, ELU.

    Args:
        image: channels, height and width.
        channels: after the first and after the second convolution.
        hidden: number of features.
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


class ConvolutionalConditional(DiagonalGaussian):
    """A diagonal Gaussian of ``outputs`` units given an image, on ``convolutions``.

    No batch norm: an observation's log q must not depend on the others of its batch.
    """

    def __init__(self, image: tuple[int, int, int], channels: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        self.body = convolutions(image, channels, hidden)
        self.loc = nn.Linear(hidden, outputs)
        self.log_scale = nn.Linear(hidden, outputs)

    def forward(
        self, given: Float[Tensor, "batch pixels"]
    ) -> tuple[Float[Tensor, "batch o"], Float[Tensor, "batch o"]]:
        """Return location and log-scale."""
        features = self.body(given)
        return self.loc(features), self.log_scale(features)


register_kl(ConvolutionalConditional, StandardNormal)(diagonal_to_standard_normal)


class ConvolutionalPixels(Pixels):
    """Pixels whose values come from the mirror image of the convolutions.

    The bias is one number per pixel and value, so that the filters need not learn the mean image.

    Args:
        inputs, hidden: sizes of the latents and of the hidden layer.
        channels, image: as in ``convolutions``.
        likelihood: of the pixels.
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
        """Return the values."""
        return self.body(given.flatten(0, 1)).unflatten(0, given.shape[:2]) + self.bias


@dataclass(eq=False)
class GaussianConvolutional(Architecture):
    """Sizes of a convolutional pair with one Gaussian layer, for images with sides divisible by 4.

    Args:
        latent_size: of the stochastic layer.
        channels: after the first and after the second convolution of q; p mirrors them.
        hidden_size: of the layer between convolutions and latents.
        likelihood: of the pixels; ``discretized_logistic`` for grey levels that are not binarized, ``gaussian`` for
            real values.
        prior, posterior, posterior_size, prior_components: as in ``GaussianMLP``.
        noise_std: scale of ``likelihood=gaussian``, in the units of x; None: learned, one for all pixels.
    """

    latent_size: int
    channels: list[int]
    hidden_size: int
    likelihood: LikelihoodName = "bernoulli"
    prior: PriorName | Prior = "standard"
    posterior: PosteriorName = "diagonal"
    posterior_size: int = 5
    prior_components: int = 500
    noise_std: float | None = None
    layers = 1

    def __post_init__(self) -> None:
        check_size("latent_size", self.latent_size)
        check_sizes("channels", self.channels)
        if len(self.channels) != 2:
            raise ValueError(f"channels must hold two sizes, got {len(self.channels)}")
        check_size("hidden_size", self.hidden_size)
        check_noise_std(self.noise_std, self.likelihood)
        self.observation = OBSERVATIONS[self.likelihood]
        check_posterior(self.posterior, self.posterior_size, [self.latent_size])
        check_prior(self.prior, self.prior_components, self.layers, self.posterior, self.likelihood)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts where the likelihood says."""
        if len(image_shape) not in (2, 3) or image_shape[-1] % 4 or image_shape[-2] % 4:
            raise UserError(
                "model=conv needs images of shape (height, width) or (channels, height, width) with height and width "
                f"divisible by 4, this data has shape {image_shape}: use model=one_layer"
            )
        height, width = image_shape[-2:]
        image = (image_shape[0] if len(image_shape) == 3 else 1, height, width)
        likelihood = make_likelihood(self.likelihood, mean, levels, self.noise_std)
        pixels = ConvolutionalPixels(self.latent_size, self.hidden_size, self.channels, image, likelihood)
        hidden, size = self.hidden_size, self.latent_size
        if self.posterior == "diagonal":
            q: Conditional = ConvolutionalConditional(image, self.channels, hidden, size)
        else:
            body = convolutions(image, self.channels, hidden)
            q = make_posterior(self.posterior, body, hidden, size, self.posterior_size, first=True)
        white = torch.from_numpy(mean / likelihood.white).float()
        prior = make_prior(self.prior, size, self.prior_components, q, white)
        return Networks(
            generative=GenerativeChain(prior, pixels, []),
            inference=InferenceChain([q], likelihood.white),
            output_bias=pixels.bias,
            start=likelihood.initial_bias(),
        )
