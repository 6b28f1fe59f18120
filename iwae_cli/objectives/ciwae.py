"""The combination of ELBO and importance weighted bound."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.objectives.base import BoundObjective, Gradient


class CIWAE(BoundObjective):
    """beta ELBO + (1-beta) L_k, both from the same k draws (Rainforth et al. 2018, arXiv 1802.04537).

    Special cases: beta = 0 is IWAE-k, beta = 1 the ELBO averaged over k draws, k = 1 the sampled ELBO. Not to be
    confused with the beta-VAE, whose beta weighs the KL term, or with VR, which goes from one end to the other by
    powers of the weights.

    a = beta/k + (1-beta) w~, b = beta/k + (1-beta) w~^2. ``stl`` is biased unless beta = 1 or k = 1.
    """

    stratified = True

    def __init__(self, k: int, beta: float, gradient: Gradient = "total") -> None:
        super().__init__(k, gradient)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, got {beta}")
        self.beta = beta

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        # At either end the other bound is left out, not multiplied by zero: it may be -inf.
        if self.beta == 0:
            return log_mean_exp(log_w)
        if self.beta == 1:
            return log_w.mean(0)
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return self.beta / self.k + (1 - self.beta) * normalized_weights(log_w)

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return self.beta / self.k + (1 - self.beta) * normalized_weights(log_w).square()
