"""A convolutional pair for square images, with one Gaussian stochastic layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.errors import UserError
from iwae_cli.models.architectures.mlp import GaussianChain, GaussianRecognition
from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.likelihoods import LikelihoodName, likelihood_observation, make_likelihood
from iwae_cli.models.networks import check_size, check_sizes

HALVE = (4, 2, 1)
"""Kernel size, stride, padding: make a side exactly half as long; transposed, twice as long."""


class ConvolutionalConditional(nn.Module):
    """A diagonal Gaussian given an image: two convolutions that halve its sides, one hidden layer, ELU.

    No batch norm: an observation's log q must not depend on the others of its batch.

    Args:
        side: of the image.
        channels: after the first and after the second convolution.
        hidden: size of the hidden layer.
        outputs: size of the Gaussian.
    """

    def __init__(self, side: int, channels: Sequence[int], hidden: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(-1, (1, side, side)),
            nn.Conv2d(1, channels[0], *HALVE),
            nn.ELU(),
            nn.Conv2d(channels[0], channels[1], *HALVE),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(channels[1] * (side // 4) ** 2, hidden),
            nn.ELU(),
        )
        self.loc = nn.Linear(hidden, outputs)
        self.log_scale = nn.Linear(hidden, outputs)

    def forward(
        self, given: Float[Tensor, "batch pixels"]
    ) -> tuple[Float[Tensor, "batch o"], Float[Tensor, "batch o"]]:
        """Location and log-scale."""
        features = self.body(given)
        return self.loc(features), self.log_scale(features)


class TransposedNetwork(nn.Module):
    """From latents to ``per_pixel`` values for every pixel, by the mirror image of the convolutions.

    The bias is one number per pixel and value, so that the mean image need not be learned by the filters.

    Args:
        inputs: size of the latents.
        hidden: size of the hidden layer.
        channels: as in ``ConvolutionalConditional``.
        side: of the image.
        per_pixel: values per pixel.
    """

    def __init__(self, inputs: int, hidden: int, channels: Sequence[int], side: int, per_pixel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.ELU(),
            nn.Linear(hidden, channels[1] * (side // 4) ** 2),
            nn.ELU(),
            nn.Unflatten(-1, (channels[1], side // 4, side // 4)),
            nn.ConvTranspose2d(channels[1], channels[0], *HALVE),
            nn.ELU(),
            nn.ConvTranspose2d(channels[0], per_pixel, *HALVE, bias=False),
            nn.Flatten(),
        )
        self.bias = nn.Parameter(torch.zeros(per_pixel * side**2))

    def forward(self, given: Float[Tensor, "k batch i"]) -> Float[Tensor, "k batch values"]:
        """The values, pixel after pixel of the first kind, then of the second."""
        return self.body(given.flatten(0, 1)).unflatten(0, given.shape[:2]) + self.bias


class GaussianConvolutional(Architecture):
    """Sizes of a convolutional pair with one Gaussian layer, for square images with sides divisible by 4.

    Args:
        latent_size: of the stochastic layer.
        channels: after the first and after the second convolution of q; p mirrors them.
        hidden_size: of the layer between convolutions and latents.
        likelihood: of the pixels; ``discretized_logistic`` for grey levels that are not binarized.

    Raises:
        ValueError: a size out of range, other than two channels, unknown likelihood.
    """

    layers = 1

    def __init__(
        self, latent_size: int, channels: list[int], hidden_size: int, likelihood: LikelihoodName = "bernoulli"
    ) -> None:
        check_size("latent_size", latent_size)
        check_sizes("channels", channels)
        if len(channels) != 2:
            raise ValueError(f"channels must hold two sizes, got {len(channels)}")
        check_size("hidden_size", hidden_size)
        self.observation = likelihood_observation(likelihood)
        self.latent_size = latent_size
        self.channels = channels
        self.hidden_size = hidden_size
        self.likelihood: LikelihoodName = likelihood

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts where the likelihood says."""
        side = image_shape[0]
        if image_shape != (side, side) or side % 4:
            shape = "x".join(map(str, image_shape))
            raise UserError(
                f"model=conv needs square images with sides divisible by 4, this data has {shape}: use model=one_layer"
            )
        likelihood = make_likelihood(self.likelihood, mean, levels)
        sizes = (self.hidden_size, self.channels, side)
        head = TransposedNetwork(self.latent_size, *sizes, likelihood.per_pixel)
        q = ConvolutionalConditional(side, self.channels, self.hidden_size, self.latent_size)
        generative = GaussianChain(head, likelihood, [], self.latent_size)
        inference = GaussianRecognition([q], likelihood.white)
        return Networks(generative, inference, head.bias, likelihood.initial_bias())
