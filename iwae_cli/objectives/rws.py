"""Reweighted wake-sleep."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.objectives.base import Losses, Objective, score_term, weighted_sum


class RWS(Objective):
    """Theta maximizes IWAE-k, phi the likelihood of q (Bornschein and Bengio 2015, arXiv 1406.2751).

    - wake-theta: sum_i w~_i dlog p(x, h_i), the gradient of IWAE-k.
    - ``phi=wake``: sum_i w~_i dlog q(h_i|x) with h held fixed: towards the smallest KL(p(h|x) || q(h|x)), with
      self-normalized weights, so biased at finite k and right in the limit.
    - ``phi=sleep``: dlog q(h|x) on (x, h) ~ p(x, h), one such pair for each observation of the batch, theta held fixed;
      unbiased, but on the model's own images.
    - ``phi=both``: the mean of the two.

    Right for discrete and continuous latents: nothing is differentiated through h, unless ``gradient=dreg`` gives the
    wake-phi direction the doubly reparameterized form sum_i (w~_i - w~_i^2) dlog w_i / dh_i dh_i/dphi (Tucker, Lawson,
    Gu, Maddison 2019, arXiv 1810.04152). It has the same expectation and less variance, and needs continuous latents.

    Special case: k = 1 with ``phi=sleep`` is the wake-sleep algorithm (Hinton, Dayan, Frey, Neal 1995); with
    ``phi=wake`` k = 1 would teach nothing, because a single weight is 1 for any draw. Not to be confused with IWAE or
    VIMCO, whose phi maximizes the bound that is reported here for theta alone. Le et al. 2019 (arXiv 1805.10469)
    compare them.
    """

    plain_gradient = "score"
    stratified = True

    def __init__(
        self,
        k: int,
        phi: Literal["wake", "sleep", "both"] = "wake",
        gradient: Literal["score", "dreg"] = "score",
    ) -> None:
        super().__init__(k)
        if phi not in ("wake", "sleep", "both"):
            raise ValueError(f"phi must be one of wake, sleep, both, got {phi}")
        if k < 2 and phi != "sleep":
            raise ValueError(f"k must be >= 2 with phi={phi}, since a single weight is always 1; or use phi=sleep")
        if gradient not in ("score", "dreg"):
            raise ValueError(f"gradient must be one of score, dreg, got {gradient}")
        if gradient == "dreg" and phi == "sleep":
            raise ValueError("gradient=dreg has a meaning with phi=wake or phi=both only, got phi=sleep")
        self.phi = phi
        self.gradient = gradient
        self.through_latents = gradient == "dreg"
        self.stratified = gradient == "score"  # an average over all draws: it needs no score of mean 0

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return log_mean_exp(log_w)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        log_w = particles.log_w.detach()
        w = normalized_weights(log_w)
        parts = []
        if self.phi != "sleep" and self.gradient == "score":
            parts.append(-weighted_sum(w, score_term(model, x, particles)).mean())
        elif self.phi != "sleep":
            parts.append(-weighted_sum(w - w.square(), particles.log_w_frozen).mean())
        if self.phi != "wake":
            with torch.no_grad():
                latents, dream = model.generative.sample(x.shape[0], noise)
            parts.append(-model.inference(dream, latents).mean())
        return Losses(
            generative=-weighted_sum(w, particles.log_p).mean(),
            inference=torch.stack(parts).mean(),
            bound=self.bound(log_w),
        )
