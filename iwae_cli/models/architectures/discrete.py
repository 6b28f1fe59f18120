"""Sigmoid belief networks: stochastic layers of Bernoulli units joined by linear layers.

Sources: Neal 1992 (Artificial Intelligence 56), for p; the 200-200-200 network of Bornschein and Bengio 2015 (RWS,
arXiv 1406.2751) and of Mnih and Rezende 2016 (VIMCO, arXiv 1602.06725), for the pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import LinearBits
from iwae_cli.models.likelihoods import Bernoulli
from iwae_cli.models.networks import check_sizes
from iwae_cli.models.priors import BitsPrior


@dataclass(eq=False)
class SigmoidBeliefNetwork(Architecture):
    """A sigmoid belief network with layers of these sizes, nearest to x first; p and q are linear between them.

    log p(x) is exact, by enumeration, where the units are 14 or fewer in all.
    """

    latent_sizes: list[int]
    observation = "binary"
    discrete = True

    def __post_init__(self) -> None:
        check_sizes("latent_sizes", self.latent_sizes)
        self.layers = len(self.latent_sizes)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        sizes = list(pairwise([len(mean), *self.latent_sizes]))
        observation, *layers = [LinearBits(above, below) for below, above in sizes]
        return Networks(
            generative=GenerativeChain(BitsPrior(self.latent_sizes[-1]), observation, layers),
            inference=InferenceChain([LinearBits(below, above) for below, above in sizes]),
            output_bias=observation.bias,
            start=Bernoulli(mean).initial_bias(),
        )
