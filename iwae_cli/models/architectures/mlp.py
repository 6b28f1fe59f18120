"""Gaussian stochastic layers joined by tanh networks: the models of Burda et al. and any deeper ones.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import GaussianConditional
from iwae_cli.models.likelihoods import OBSERVATIONS, LikelihoodName, TanhPixels, check_noise_std, make_likelihood
from iwae_cli.models.networks import check_sizes
from iwae_cli.models.priors import Prior, StandardNormal


@dataclass(eq=False)
class GaussianMLP(Architecture):
    """Sizes of a Gaussian chain with tanh networks between its layers; p mirrors q.

    Args:
        latent_sizes: size of every stochastic layer, nearest to x first.
        hidden_sizes: sizes of the tanh layers below each stochastic layer, in the direction of q.
        likelihood: of the pixels; ``discretized_logistic`` for grey levels that are not binarized, ``gaussian`` for
            real values.
        prior: p(h_L); None is N(0, I).
        noise_std: scale of ``likelihood=gaussian``, in the units of x; None: learned, one for all pixels.
    """

    latent_sizes: list[int]
    hidden_sizes: list[list[int]]
    likelihood: LikelihoodName = "bernoulli"
    prior: Prior | None = None
    noise_std: float | None = None

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
        check_noise_std(self.noise_std, self.likelihood)
        self.observation = OBSERVATIONS[self.likelihood]

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts where the likelihood says."""
        pixels, sizes = len(mean), self.latent_sizes
        likelihood = make_likelihood(self.likelihood, mean, levels, self.noise_std)
        observation = TanhPixels(sizes[0], self.hidden_sizes[0][::-1], pixels, likelihood)
        downwards = [
            GaussianConditional(above, hidden[::-1], below)
            for (below, above), hidden in zip(pairwise(sizes), self.hidden_sizes[1:], strict=True)
        ]
        upwards = [
            GaussianConditional(below, hidden, above)
            for (below, above), hidden in zip(pairwise([pixels, *sizes]), self.hidden_sizes, strict=True)
        ]
        prior = StandardNormal(sizes[-1]) if self.prior is None else self.prior.build(sizes[-1])
        return Networks(
            generative=GenerativeChain(prior, observation, downwards),
            inference=InferenceChain(upwards, likelihood.white),
            output_bias=observation.head.bias,
            start=likelihood.initial_bias(),
        )
