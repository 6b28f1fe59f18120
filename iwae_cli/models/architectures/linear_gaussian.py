"""Linear-Gaussian chains: a model of real-valued data whose log p(x) is exact, and whose q can be the posterior."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import CholeskyConditional, LinearConditional
from iwae_cli.models.networks import check_sizes
from iwae_cli.models.priors import StandardNormal


@dataclass(eq=False)
class LinearGaussianModel(Architecture):
    """A linear-Gaussian chain with layers of these sizes: p has constant diagonal scales, q full covariances."""

    latent_sizes: list[int]
    observation = "real"

    def __post_init__(self) -> None:
        check_sizes("latent_sizes", self.latent_sizes)
        self.layers = len(self.latent_sizes)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        sizes = list(pairwise([len(mean), *self.latent_sizes]))
        observation, *layers = [LinearConditional(above, below) for below, above in sizes]
        return Networks(
            generative=GenerativeChain(StandardNormal(self.latent_sizes[-1]), observation, layers),
            inference=InferenceChain([CholeskyConditional(below, above) for below, above in sizes]),
            output_bias=observation.linear.bias,
            start=mean,
        )
