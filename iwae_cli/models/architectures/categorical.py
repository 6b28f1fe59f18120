"""One categorical latent: a mixture of Bernoulli images, whose exact posterior q can represent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import LinearBits, LinearOneHot
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import check_size
from iwae_cli.models.priors import OneHotPrior


@dataclass(eq=False)
class Categorical(Architecture):
    """States of one categorical latent; log p(x) is exact, by enumeration.

    The logits of q are linear in x, which is the form of the exact posterior of a mixture of Bernoulli images.
    """

    categories: int
    observation = "binary"
    layers = 1
    discrete = True

    def __post_init__(self) -> None:
        check_size("categories", self.categories, least=2)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        observation = LinearBits(self.categories, len(mean))
        return Networks(
            generative=GenerativeChain(OneHotPrior(self.categories), observation, []),
            inference=InferenceChain([LinearOneHot(len(mean), self.categories)]),
            output_bias=observation.bias,
            start=Bernoulli(mean).initial_bias(),
        )
