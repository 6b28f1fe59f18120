"""Gaussian stochastic layers joined by networks of hidden layers: the models of Burda et al. and any deeper ones.

Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016, arXiv 1509.00519, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional, GaussianConditional
from iwae_cli.models.likelihoods import OBSERVATIONS, LikelihoodName, MLPPixels, check_noise_std, make_likelihood
from iwae_cli.models.networks import Activation, check_sizes, hidden_layers
from iwae_cli.models.posteriors import PosteriorName, check_posterior, make_posterior
from iwae_cli.models.priors import Prior, PriorName, check_prior, make_prior


@dataclass(eq=False)
class GaussianMLP(Architecture):
    """Sizes of a Gaussian chain with hidden layers between the stochastic ones; p mirrors q.

    Args:
        latent_sizes: size of every stochastic layer, nearest to x first.
        hidden_sizes: sizes of the hidden layers below each stochastic layer, in the direction of q.
        likelihood: of the pixels; ``discretized_logistic`` for grey levels that are not binarized, ``gaussian`` for
            real values.
        prior: p(h_L): ``standard`` is N(0, I); ``mixture`` of Gaussians; ``vamp``, of q given learned images; or
            settings of another one.
        activation: of every hidden layer; tanh in the paper.
        posterior: family of every factor of q: a Gaussian with ``diagonal`` or ``full`` covariance, a diagonal one
            moved by affine ``coupling`` blocks, or a ``mixture`` of diagonal ones.
        posterior_size: number of coupling blocks, or of components of the mixture.
        prior_components: of ``mixture`` and ``vamp``.
        noise_std: scale of ``likelihood=gaussian``, in the units of x; None: learned, one for all pixels.
    """

    latent_sizes: list[int]
    hidden_sizes: list[list[int]]
    likelihood: LikelihoodName = "bernoulli"
    prior: PriorName | Prior = "standard"
    activation: Activation = "tanh"
    posterior: PosteriorName = "diagonal"
    posterior_size: int = 5
    prior_components: int = 500
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
        check_posterior(self.posterior, self.posterior_size, self.latent_sizes)
        check_prior(self.prior, self.prior_components, self.layers, self.posterior, self.likelihood)

    def networks(self, image_shape: tuple[int, ...], mean: np.ndarray, levels: int | None) -> Networks:
        """See the base class; the output bias starts where the likelihood says."""
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
        white = torch.from_numpy(mean / likelihood.white).float()
        prior = make_prior(self.prior, sizes[-1], self.prior_components, upwards[-1], white)
        return Networks(
            generative=GenerativeChain(prior, observation, downwards),
            inference=InferenceChain(upwards, likelihood.white),
            output_bias=observation.head.bias,
            start=likelihood.initial_bias(),
        )

    def _posterior(self, inputs: int, hidden: list[int], outputs: int, first: bool) -> Conditional:
        if self.posterior == "diagonal":
            return GaussianConditional(inputs, hidden, outputs, self.activation)
        body = hidden_layers([inputs, *hidden], self.activation)
        return make_posterior(self.posterior, body, hidden[-1], outputs, self.posterior_size, first)
