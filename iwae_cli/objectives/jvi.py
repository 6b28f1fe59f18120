"""Jackknife variational inference."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.numerics import log_mean_exp, log_mean_exp_of_others, normalized_weights
from iwae_cli.objectives.base import BoundObjective


def jackknife(log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
    """Return k L_k - (k-1) mean_j L_-j, where L_-j is L_{k-1} of all draws but the j-th; nats.

    Removes the term of order 1/k of the bias of L_k as an estimate of log p(x); the rest is of order 1/k^2 and of
    either sign, so the value is not a bound. -inf where every weight is zero; NaN where all but one are, since without
    that one nothing is left.

    Raises:
        ValueError: k < 2.
    """
    k = log_w.shape[0]
    bound = log_mean_exp(log_w)
    others = log_mean_exp_of_others(log_w)
    # L_k plus a difference, so that a large common offset is not multiplied by k.
    correction = (k - 1) * (bound - others).mean(0)
    value = bound + torch.where(correction.isinf(), math.nan, correction)
    return torch.where(bound == -math.inf, bound, value)


class JVI(BoundObjective):
    """The jackknife of order one of L_k (Nowozin 2018, "Debiasing Evidence Approximations", ICLR 2018): JVI-1.

    k L_k - (k-1) mean_j L_-j, see ``jackknife``. Not a lower bound on log p(x), and not to be confused with an NLL:
    its value may lie on either side. The bias falls from order 1/k to 1/k^2, the variance rises. Needs all weights at
    once, unlike the streamed L_k. If q is the exact posterior it is log p(x).

    With S = sum_i w_i and r_ij = w_i/(S - w_j), j != i: a = k w~ - (k-1)/k sum_j r_ij,
    b = k w~^2 - (k-1)/k sum_j r_ij^2.
    """

    least_k = 2  # one is left out
    lower_bound = False

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return jackknife(log_w)

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return self.k * normalized_weights(log_w) - (1 - 1 / self.k) * self._shares(log_w, 1)

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        return self.k * normalized_weights(log_w).square() - (1 - 1 / self.k) * self._shares(log_w, 2)

    def _shares(self, log_w: Float[Tensor, "k batch"], power: int) -> Float[Tensor, "k batch"]:
        """Return sum_{j != i} r_ij^power without a table of all pairs, as in ``log_mean_exp_of_others``."""
        largest = log_w.argmax(0, keepdim=True)
        w = normalized_weights(log_w)
        rest = (1 - w.scatter(0, largest, 0)).pow(-power).scatter(0, largest, 0)
        without_largest = normalized_weights(log_w.scatter(0, largest, -math.inf))
        return w.pow(power) * (rest.sum(0) - rest) + without_largest.pow(power)
