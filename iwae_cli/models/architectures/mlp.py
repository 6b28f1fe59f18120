"""Gaussian stochastic layers joined by networks of hidden layers: the models of Burda et al. and any deeper ones.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519, section 5.
"""

# Without postponed annotations: those of a field are read in the modules of subclasses, which lack these names.

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from iwae_cli.models.base import Networks
from iwae_cli.models.conditionals import Conditional, GaussianConditional
from iwae_cli.models.gaussian import GaussianArchitecture
from iwae_cli.models.likelihoods import MLPPixels, make_likelihood
from iwae_cli.models.networks import Activation, check_sizes, hidden_layers


@dataclass(eq=False)
class GaussianMLP(GaussianArchitecture):
    """A Gaussian chain with hidden layers between the stochastic ones, of sizes in the direction of q; p mirrors q."""

    latent_sizes: list[int]
    hidden_sizes: list[list[int]]
    activation: Activation = field(default="tanh", kw_only=True)

    def __post_init__(self) -> None:
        check_sizes("latent_sizes", self.latent_sizes)
        for hidden in self.hidden_sizes:
            check_sizes("hidden_sizes", hidden)
        self.layers = len(self.latent_sizes)
        if len(self.hidden_sizes) != self.layers:
            raise ValueError(
                "hidden_sizes must hold one list per stochastic layer: "
                f"latent_sizes has {self.layers}, got {len(self.hidden_sizes)}"
            )
        self._check_choices(self.latent_sizes)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        pixels, sizes = len(mean), self.latent_sizes
        likelihood = make_likelihood(self.likelihood, mean, levels, self.noise_std)
        observation = MLPPixels(sizes[0], self.hidden_sizes[0][::-1], pixels, likelihood, self.activation)
        downwards = [
            GaussianConditional(above, hidden[::-1], below, self.activation)
            for (below, above), hidden in zip(pairwise(sizes), self.hidden_sizes[1:], strict=True)
        ]
        upwards = [
            self._posterior(below, hidden, above, first=level == 0)
            for level, ((below, above), hidden) in enumerate(
                zip(pairwise([pixels, *sizes]), self.hidden_sizes, strict=True)
            )
        ]
        return self._joined(mean, observation, downwards, upwards, sizes[-1], observation.head.bias)

    def _posterior(self, inputs: int, hidden: list[int], outputs: int, first: bool) -> Conditional:
        if self.posterior == "diagonal":
            return GaussianConditional(inputs, hidden, outputs, self.activation)
        body = hidden_layers([inputs, *hidden], self.activation)
        return self._rich_posterior(body, hidden[-1], outputs, first)
