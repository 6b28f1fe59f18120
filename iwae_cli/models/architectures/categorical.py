"""One categorical latent: a mixture of Bernoulli images, whose exact posterior q can represent."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from iwae_cli.core.interfaces import Observation
from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import LinearBits, LinearOneHot
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import check_size
from iwae_cli.models.priors import OneHotPrior


class Categorical(Architecture):
    """Size of one categorical latent; log p(x) is exact, by enumeration.

    The logits of q are linear in x, which is the form of the exact posterior of a mixture of Bernoulli images.

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
        observation = LinearBits(self.categories, len(mean))
        return Networks(
            generative=GenerativeChain(OneHotPrior(self.categories), observation, []),
            inference=InferenceChain([LinearOneHot(len(mean), self.categories)]),
            output_bias=observation.bias,
            start=Bernoulli(mean).initial_bias(),
        )
