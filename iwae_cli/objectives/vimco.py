"""Variational inference for Monte Carlo objectives."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.core.numerics import log_mean_exp, log_mean_exp_of_others, normalized_weights
from iwae_cli.objectives.base import Losses, Objective, score_term, weighted_sum


class VIMCO(Objective):
    """The bound of IWAE-k by the score function with a baseline for each draw (Mnih and Rezende 2016, 1602.06725).

    Unbiased for any q whose log-density can be evaluated: made for discrete latents, right for Gaussian ones too,
    where the path derivative (objective=iwae) has less variance.

    grad phi = sum_j (L - L_-j) dlog q_j - sum_j w~_j dlog q_j, where L_-j is L with the mean of the other log-weights
    in place of log w_j; h is held fixed in dlog q. grad theta is that of IWAE-k. The second sum is the dependence of
    the bound on q itself. Not to be confused with wake-phi of ``rws``, which is the second sum with the opposite
    sign: another direction, which maximizes no bound.

    Where all other weights of a draw are zero its baseline is -inf and 0 is put in its place, which depends on the
    others alone and so adds no bias; where all weights are zero nothing is learned.

    Args:
        k: draws of q per observation, at least 2: the baseline of a draw is made from the others.
    """

    least_k = 2

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        """Return log 1/k sum_i w_i."""
        return log_mean_exp(log_w)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        """Return theta's loss as IWAE-k and phi's by the score alone."""
        log_w = particles.log_w.detach()
        bound = self.bound(log_w)
        w = normalized_weights(log_w)
        baseline = self._baseline(log_w)
        signal = torch.where(bound == -math.inf, 0, bound - torch.where(baseline == -math.inf, 0, baseline))
        return Losses(
            generative=-weighted_sum(w, particles.log_p).mean(),
            inference=-weighted_sum(signal - w, score_term(model, x, particles)).mean(),
            bound=bound,
        )

    def _baseline(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return L_-j = log 1/k (sum_{i != j} w_i + exp(mean_{i != j} log w_i))."""
        others = log_mean_exp_of_others(log_w) + math.log(self.k - 1)
        zero = log_w == -math.inf
        finite = torch.where(zero, 0, log_w)
        mean = (finite.sum(0) - finite) / (self.k - 1)
        # -inf - (-inf) would be NaN: a mean that includes a weight of zero is -inf.
        mean = torch.where(zero.sum(0) > zero.long(), -math.inf, mean)
        return torch.logaddexp(others, mean) - math.log(self.k)
