"""The importance weighted bound."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.numerics import log_mean_exp, normalized_weights
from iwae_cli.objectives.base import BoundObjective


class IWAE(BoundObjective):
    """L_k = E[log 1/k sum_i w_i], tighter with every k (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519).

    Special cases: k = 1 is the sampled ELBO. Not to be confused with the ELBO of k samples, which averages
    the logarithms and gets no tighter with k. ``stl`` is biased for k >= 2 (it misses part of the score term).

    a = w~, b = w~^2.
    """

    stratified = True

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return log_mean_exp(log_w)

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return normalized_weights(log_w)

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return normalized_weights(log_w).square()
