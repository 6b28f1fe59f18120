"""The variational Renyi bound."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.objectives.base import BoundObjective, Gradient

NEAR = 1e-3
"""Distance of alpha from 1 within which float32 rounds much of what the bound divides by it."""


class VR(BoundObjective):
    """E[1/(1-alpha) log 1/k sum_i w_i^(1-alpha)] (Li and Turner 2016, arXiv 1602.02311).

    For 0 <= alpha < 1 it is the VR-IWAE bound of Daudel, Benton, Shi, Doucet 2023 (arXiv 2210.06226).
    Special cases: alpha = 0 is IWAE-k; alpha -> 1 tends to the ELBO; k = 1 is the sampled ELBO for every alpha;
    alpha = max is VR-max, the limit alpha = -inf, which trains on the largest weight alone.

    A lower bound on log p(x) for every alpha >= 0: it grows with k for 0 <= alpha < 1 and falls with k for
    alpha > 1. For alpha < 0, VR-max included, it is not a lower bound. Not to be confused with the alpha of
    alpha-divergences in other conventions, or with CIWAE's beta, which mixes bounds and not powers.

    v = softmax((1-alpha) log w), a = v, b = alpha v + (1-alpha) v^2.

    Args:
        alpha: order of the divergence, not 1; or ``max``.
        gradient: ``total``, ``stl`` (biased for k >= 2) or ``dreg``; VR-max, whose derivative jumps where the
            largest weight changes, has ``total`` alone.
    """

    stratified = True

    def __init__(self, k: int, alpha: float | Literal["max"], gradient: Gradient = "total") -> None:
        super().__init__(k, gradient)
        if alpha == "max":
            if gradient != "total":
                raise ValueError(f"gradient must be total with alpha=max, whose derivative jumps, got {gradient}")
            order = -math.inf
        elif not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, or max for VR-max (the limit alpha = -inf), got {alpha}")
        elif alpha == 1:
            raise ValueError("alpha must not be 1: that limit is the ELBO, use objective=elbo")
        else:
            order = alpha
        self.alpha = order
        self.lower_bound = order >= 0

    @property
    def caveats(self) -> tuple[str, ...]:
        """Near alpha = 1 the gradient is right, and the printed bound is not."""
        if abs(self.alpha - 1) >= NEAR:
            return super().caveats
        return (*super().caveats, "objective.alpha is so near to 1 that rounding moves the bound that is printed")

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        if self.alpha == -math.inf:
            return log_w.amax(0)
        bound = log_mean_exp(self._powers(log_w)) / (1 - self.alpha)
        if self.alpha < 1:
            return bound
        # A negative power of a weight of zero is infinite, and the bound -inf; that of an infinite one would hide it.
        return torch.where(log_w.isinf().any(0), log_w.detach().sum(0), bound)

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        if self.alpha == -math.inf:
            largest = (log_w == log_w.amax(0)).to(log_w.dtype)
            return largest / largest.sum(0)
        return normalized_weights(self._powers(log_w))

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return b = alpha v + (1-alpha) v^2.

        Raises:
            ValueError: VR-max has none.
        """
        if self.alpha == -math.inf:
            raise ValueError("gradient must be total with alpha=max, whose derivative jumps")
        v = self.weights(log_w)
        return self.alpha * v + (1 - self.alpha) * v.square()

    def _powers(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        if self.alpha > 1:
            log_w = torch.where(log_w.isinf().any(0), 0, log_w)
        return (1 - self.alpha) * log_w
