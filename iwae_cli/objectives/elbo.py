"""The evidence lower bound."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles, StochasticLayers
from iwae_cli.core.noise import Noise
from iwae_cli.objectives.base import BoundObjective, Gradient, Losses


class ELBO(BoundObjective):
    """E_q[log w] (Kingma and Welling 2014, arXiv 1312.6114), averaged over k draws: "VAE-k" in Burda et al. 2016.

    More draws lower the variance of the estimate and leave the bound where it is; not to be confused with IWAE-k.
    ``dreg`` is ``stl`` here, since b = a = 1/k: it is unbiased, and holds wherever ``stl`` does.

    Args:
        analytic_kl: E_q[log p(x|h)] - KL(q || p) with the KL in closed form instead of sampled; for models of one
            layer that have one, with ``gradient=total`` (the closed form has no score term to drop).
    """

    stratified = True

    def __init__(self, k: int = 1, gradient: Gradient = "total", analytic_kl: bool = False) -> None:
        super().__init__(k, gradient)
        if analytic_kl and gradient != "total":
            raise ValueError(f"analytic_kl has a meaning with gradient=total only, got gradient={gradient}")
        self.analytic_kl = analytic_kl
        self.takes_kl_weight = not analytic_kl

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return log_w.mean(0)

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return torch.full_like(log_w, 1 / log_w.shape[0])

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return self.weights(log_w)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        if not self.analytic_kl:
            return super().losses(model, x, particles, noise)
        log_likelihood = particles.log_p - model.generative.log_prior(particles.latents)
        bound = log_likelihood.mean(0) - model.kl(x)
        loss = -bound.mean()
        return Losses(loss, loss, bound.detach())

    def check(self, architecture: StochasticLayers) -> str | None:
        if self.analytic_kl and architecture.layers > 1:
            return (
                f"objective.analytic_kl=true needs a model of one stochastic layer, this one has "
                f"{architecture.layers}; use model=one_layer or objective.analytic_kl=false"
            )
        return super().check(architecture)

    def check_networks(self, model: Model) -> str | None:
        if self.analytic_kl and not model.has_kl:
            return (
                "objective.analytic_kl=true needs KL(q || p) in closed form, and none is known for q and prior of this "
                "model: write objective.analytic_kl=false"
            )
        return super().check_networks(model)
