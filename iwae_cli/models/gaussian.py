"""What all models with Gaussian layers choose: the distribution of the pixels, the prior, and the family of q."""

# Without postponed annotations: those of a field are read in the modules of subclasses, which lack these names.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from iwae_cli.models.base import Architecture, Networks
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional, DiagonalGaussian
from iwae_cli.models.likelihoods import LEAST_STD, OBSERVATIONS, LikelihoodName, PixelLikelihood, Pixels
from iwae_cli.models.networks import check_size
from iwae_cli.models.posteriors import Coupling, FullGaussian, GaussianMixture
from iwae_cli.models.priors import MixturePrior, Prior, StandardNormal, VampPrior


@dataclass(eq=False, kw_only=True)
class GaussianArchitecture(Architecture):
    """A model with Gaussian layers; ``noise_std`` is in the units of x, None if it is learned, one for all pixels."""

    likelihood: LikelihoodName = "bernoulli"
    prior: Literal["standard", "mixture", "vamp"] | Prior = "standard"
    posterior: Literal["diagonal", "full", "coupling", "mixture"] = "diagonal"
    posterior_size: int = 5
    prior_components: int = 500
    noise_std: float | None = None

    def _check_choices(self, latent_sizes: Sequence[int]) -> None:
        """Set ``observation``; raise ValueError unless the choices go together in layers of these sizes."""
        std, likelihood = self.noise_std, self.likelihood
        if std is not None and (likelihood != "gaussian" or not LEAST_STD <= std <= 1 / LEAST_STD):
            wanted = f"null, or with likelihood=gaussian from {LEAST_STD:g} to {1 / LEAST_STD:g}"
            raise ValueError(f"noise_std must be {wanted}, got {std:g} with likelihood={likelihood}")
        self.observation = OBSERVATIONS[likelihood]
        check_size("posterior_size", self.posterior_size, 2 if self.posterior == "mixture" else 1)
        if self.posterior == "coupling" and min(latent_sizes) < 2:
            raise ValueError(
                "posterior=coupling needs two latents or more in every layer, got 1: write model.posterior=full"
            )
        check_size("prior_components", self.prior_components)
        for is_wrong, needs in (
            (self.layers > 1, f"one stochastic layer, got {self.layers}"),
            (self.posterior != "diagonal", f"model.posterior=diagonal, got {self.posterior}"),
            (likelihood == "gaussian", "pixels in [0, 1], as its images have, got model.likelihood=gaussian"),
        ):
            if self.prior == "vamp" and is_wrong:
                raise ValueError(f"prior=vamp needs {needs}: write model.prior=mixture")

    def _rich_posterior(self, body: nn.Module, features: int, outputs: int, first: bool) -> Conditional:
        """Return q(h|given) of a family other than ``diagonal``, on the features of ``body``; ``first``: given x."""
        if self.posterior == "full":
            return FullGaussian(body, features, outputs)
        if self.posterior == "coupling":
            return Coupling(body, features, outputs, self.posterior_size)
        return GaussianMixture(body, features, outputs, self.posterior_size, stratified=first)

    def _joined(
        self,
        mean: np.ndarray,
        observation: Pixels,
        downwards: Sequence[Conditional],
        upwards: Sequence[Conditional],
        size: int,
        output_bias: nn.Parameter,
    ) -> Networks:
        """Return the networks of these conditionals, with the prior of the top layer, which has ``size`` units."""
        likelihood: PixelLikelihood = observation.likelihood
        if isinstance(self.prior, Prior):
            prior = self.prior.build(size)
        elif self.prior == "mixture":
            prior = MixturePrior(self.prior_components, size)
        elif self.prior == "vamp":
            (q,) = upwards
            assert isinstance(q, DiagonalGaussian)  # see _check_choices
            prior = VampPrior(q, torch.from_numpy(mean / likelihood.white).float(), self.prior_components)
        else:
            prior = StandardNormal(size)
        return Networks(
            generative=GenerativeChain(prior, observation, downwards),
            inference=InferenceChain(upwards, likelihood.white),
            output_bias=output_bias,
            start=likelihood.initial_bias(),
        )
