"""Variational inference for Monte Carlo objectives."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.core.numerics import log_mean_exp, log_mean_exp_of_others, normalized_weights
from iwae_cli.objectives.base import Losses, Objective, score_term, weighted_sum

Baseline = Literal["geometric", "arithmetic", "zero"]


class VIMCO(Objective):
    """The bound of IWAE-k by the score function with a baseline for each draw (Mnih and Rezende 2016, 1602.06725).

    Unbiased for any q whose log-density can be evaluated: made for discrete latents, right for Gaussian ones too,
    where the path derivative (objective=iwae) has less variance.

    grad phi = sum_j (L - L_-j) dlog q_j - sum_j w~_j dlog q_j, where L_-j is L with another value in place of w_j; h is
    held fixed in dlog q. grad theta is that of IWAE-k. The second sum is the dependence of the bound on q itself. The
    value may be any that depends on the other draws alone:

    - ``geometric``: the geometric mean of the other weights, the baseline of the paper.
    - ``arithmetic``: their arithmetic mean, also of the paper; then L_-j is L of the k - 1 others.
    - ``zero``: 0. Then L - L_-j = -log(1 - w~_j), and the coefficient of dlog q_j is -log(1 - w~_j) - w~_j, about
      w~_j^2 / 2, as that of ``dreg`` is w~_j^2. The signal-to-noise ratio of the gradient of q grows with k, where with
      the two means it falls (Lievin et al. 2020, arXiv 2008.01998, gamma = 0).

    Not to be confused with wake-phi of ``rws``, which is the second sum with the opposite sign: another direction,
    which maximizes no bound.

    Where all other weights of a draw are zero its baseline is -inf and 0 is put in its place, which depends on the
    others alone and so adds no bias; where all weights are zero nothing is learned.
    """

    least_k = 2  # the baseline of a draw is made from the others

    def __init__(self, k: int, baseline: Baseline = "geometric") -> None:
        super().__init__(k)
        if baseline not in get_args(Baseline):
            raise ValueError(f"baseline must be one of {', '.join(get_args(Baseline))}, got {baseline}")
        self.baseline = baseline

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return log_mean_exp(log_w)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        log_w = particles.log_w.detach()
        w = normalized_weights(log_w)
        return Losses(
            generative=-weighted_sum(w, particles.log_p).mean(),
            inference=-weighted_sum(self._signal(log_w, w) - w, score_term(model, x, particles)).mean(),
            bound=self.bound(log_w),
        )

    def _signal(self, log_w: Float[Tensor, "k batch"], w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return L - L_-j."""
        bound, baseline = self.bound(log_w), self._baseline(log_w)
        signal = torch.where(bound == -math.inf, 0, bound - torch.where(baseline == -math.inf, 0, baseline))
        if self.baseline == "zero":
            # The difference of two numbers near 100 would leave no digit of a small weight in float32.
            signal = torch.where((w < 0.5) & (bound != -math.inf), -torch.log1p(-w), signal)
        return signal

    def _baseline(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return L_-j."""
        mean_of_others = log_mean_exp_of_others(log_w)
        if self.baseline == "arithmetic":
            return mean_of_others
        others = mean_of_others + math.log(self.k - 1)  # log of their sum
        if self.baseline == "zero":
            return others - math.log(self.k)
        zero = log_w == -math.inf
        finite = torch.where(zero, 0, log_w)
        mean = (finite.sum(0) - finite) / (self.k - 1)
        # -inf - (-inf) would be NaN: a mean that includes a weight of zero is -inf.
        mean = torch.where(zero.sum(0) > zero.long(), -math.inf, mean)
        return torch.logaddexp(others, mean) - math.log(self.k)
