"""The evidence lower bound by the score function."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.objectives.base import Losses, Objective, score_term, weighted_sum


class REINFORCE(Objective):
    """E_q[log w] averaged over k draws, for latents through which nothing can be differentiated.

    grad phi = 1/k sum_i (log w_i - mean_{j != i} log w_j) dlog q_i with h held fixed: the score function (Williams
    1992) with the mean of the other draws as baseline (Kool, van Hoof, Welling 2019). It is unbiased, and is minus the
    gradient of half the variance of log w over the draws, VarGrad (Richter et al. 2020, arXiv 2010.10436). grad theta
    is that of the ELBO. Right for discrete and for continuous latents; for continuous ones the path derivative
    (objective=elbo) has less variance. Not to be confused with ``vimco``, whose bound is that of IWAE-k, or with
    ``tvo`` of one partition and ``gradient=covariance``, which also subtracts 1/k sum_i dlog q_i: zero in expectation.

    Where a log-weight is -inf the bound is -inf, and the image teaches nothing.
    """

    least_k = 2  # the baseline of a draw is made from the others

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        return log_w.mean(0)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        log_w = particles.log_w.detach()
        bound = self.bound(log_w)
        # log w_i less the mean of the others is k/(k-1) times log w_i less the mean of all.
        signal = torch.where(bound == -torch.inf, 0, log_w - bound) / (self.k - 1)
        share = torch.full_like(log_w, 1 / self.k)
        return Losses(
            generative=-weighted_sum(share, particles.log_p).mean(),
            inference=-weighted_sum(signal, score_term(model, x, particles)).mean(),
            bound=bound,
        )
