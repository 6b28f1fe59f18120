"""The thermodynamic variational objective."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.errors import check_range
from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.core.numerics import normalized_weights
from iwae_cli.objectives.base import BoundObjective, Losses, score_term, weighted_sum

HALVINGS = 20
"""Of [0, 1], to find a point of ``schedule=moments``; the sum is a lower bound wherever its points are."""


class TVO(BoundObjective):
    """A left Riemann sum of thermodynamic integration (Masrani, Le, Wood 2019, arXiv 1907.00031).

    log p(x) = int_0^1 E_{pi_beta}[log w] dbeta with pi_beta ~ q^(1-beta) p^beta; the integrand does not fall, so that
    the left sum over 0 = beta_0 < ... < beta_J = 1 is a lower bound. Each expectation is taken over the k draws of q
    with weights v_j = softmax(beta_j log w): f_j = sum_i v_ji log w_i, and the bound is sum_j d_j f_j with
    d_j = beta_{j+1} - beta_j. For the same draws ELBO <= TVO <= IWAE-k, with equality on the left for one partition
    and on the right in the limit of many.

    Not to be confused with the right sum, an upper bound, or with VR, which takes powers of the weights and
    one logarithm.

    With u_j = 1 + beta_j (log w - f_j): a = sum_j d_j v_j u_j, b = a - sum_j d_j beta_j v_j [1 + (1 - 2 v_j) u_j].
    ``gradient=covariance`` is the paper's estimator, for discrete and for continuous latents: for phi
    sum_j d_j Cov_{v_j}(log w, dlog q) - sum_i a_i dlog q_i, with Bessel's k/(k-1) before the covariance, so that one
    partition is REINFORCE with the mean of the other draws as baseline, unbiased. With more partitions it is
    biased at finite k, as self-normalized weights are.

    Args:
        k: draws of q per observation, at least 2 for ``covariance``.
        partitions: number of intervals J.
        schedule: ``log``: beta_1 to 1 equally spaced in the logarithm; ``linear``: 0 to 1 equally spaced; ``moments``:
            where the integrand, as the draws of the image estimate it, rises by equal steps (Brekelmans et al. 2020,
            arXiv 2007.00642, who place the points once a pass). The derivative holds these points fixed.
        beta_1: first point after 0 of the ``log`` schedule; no other uses it; between 0 and 1.
        gradient: ``total``, ``stl`` (biased unless partitions = 1), ``dreg``, or ``covariance``; ``moments`` has the
            first and the last only, since the two others would be biased by points that depend on the draws.
    """

    stratified = True

    def __init__(
        self,
        k: int,
        partitions: int = 5,
        schedule: Literal["log", "linear", "moments"] = "log",
        beta_1: float = 0.025,
        gradient: Literal["total", "stl", "dreg", "covariance"] = "total",
    ) -> None:
        super().__init__(k, "total" if gradient == "covariance" else gradient)
        self.gradient = gradient
        self.one_loss = gradient == "total"
        self.through_latents = gradient != "covariance"
        self.takes_kl_weight = self.stratified = gradient != "covariance"
        if gradient == "covariance" and k < 2:
            raise ValueError(f"k must be >= 2 with gradient=covariance, got {k}")
        check_range("partitions", partitions, 1)
        if not 0 < beta_1 < 1:
            raise ValueError(f"beta_1 must be between 0 and 1, both excluded, got {beta_1}")
        if schedule not in ("log", "linear", "moments"):
            raise ValueError(f"schedule must be one of log, linear, moments, got {schedule}")
        if schedule == "moments" and gradient in ("stl", "dreg"):
            raise ValueError(f"schedule=moments needs gradient=total or gradient=covariance, got gradient={gradient}")
        self.partitions = partitions
        self.schedule = schedule
        if schedule == "log" and partitions > 1:
            self._points = [0.0, *(beta_1 ** ((partitions - j) / (partitions - 1)) for j in range(1, partitions + 1))]
        else:
            self._points = [j / partitions for j in range(partitions + 1)]

    def points(self, log_w: Float[Tensor, "k batch"]) -> list[float | Float[Tensor, " batch"]]:
        """Return 0 = beta_0 < ... < beta_J = 1; those of ``moments`` are placed for every image."""
        if self.schedule != "moments":
            return list(self._points)
        with torch.no_grad():
            low, high = _expectation(_tilted(0.0, log_w), log_w), _expectation(_tilted(1.0, log_w), log_w)
            share = torch.tensor(self._points[1:-1], dtype=log_w.dtype, device=log_w.device)[:, None]
            wanted = low + share * (high - low)  # (J - 1, batch)
            # A weight of zero makes the first moment -inf; any points give a bound of -inf then.
            inner = share.expand_as(wanted).clone()
            left, right = torch.zeros_like(inner), torch.ones_like(inner)
            for _ in range(HALVINGS):
                middle = (left + right) / 2
                tilted = torch.softmax(middle[:, None] * log_w, 1)  # (J - 1, k, batch)
                below = (tilted * log_w).sum(1) < wanted
                left, right = torch.where(below, middle, left), torch.where(below, right, middle)
            return [0.0, *torch.where(wanted.isfinite(), right, inner), 1.0]

    def _intervals(self, log_w: Float[Tensor, "k batch"]) -> list[tuple[Any, Any]]:
        """Return left end and width of every interval."""
        return [(left, right - left) for left, right in pairwise(self.points(log_w))]

    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        bound = torch.zeros_like(log_w[0])
        for beta, width in self._intervals(log_w):
            bound = bound + width * _expectation(_tilted(beta, log_w), log_w)
        return bound

    def right_sum(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        """Return sum_j d_j f_{j+1}: the same draws' L_k lies between ``bound`` and this."""
        value = torch.zeros_like(log_w[0])
        for left, right in pairwise(self.points(log_w)):
            value = value + (right - left) * _expectation(_tilted(right, log_w), log_w)
        return value

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        a = torch.zeros_like(log_w)
        for beta, width in self._intervals(log_w):
            v = _tilted(beta, log_w)
            a += width * v * (1 + beta * _centred(v, log_w))
        return a

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        b = torch.zeros_like(log_w)
        for beta, width in self._intervals(log_w):
            v = _tilted(beta, log_w)
            u = 1 + beta * _centred(v, log_w)
            b += width * v * (u - beta * (1 + (1 - 2 * v) * u))
        return b

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        if self.gradient != "covariance":
            return super().losses(model, x, particles, noise)
        log_w = particles.log_w.detach()
        a = self.weights(log_w)
        covariance = torch.zeros_like(log_w)
        for beta, width in self._intervals(log_w):
            v = _tilted(beta, log_w)
            covariance += width * v * _centred(v, log_w)
        score = self.k / (self.k - 1) * covariance - a
        return Losses(
            generative=-weighted_sum(a, particles.log_p).mean(),
            inference=-weighted_sum(score, score_term(model, x, particles)).mean(),
            bound=self.bound(log_w),
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        caveats = super().caveats
        if self.gradient == "covariance" and self.partitions > 1:
            caveats += ("objective.gradient=covariance is biased at finite k for more than one partition",)
        elif self.schedule == "moments" and self.partitions > 1:
            caveats += ("the gradient is biased with objective.schedule=moments: it holds the points fixed",)
        return caveats


def _tilted(beta: float | Float[Tensor, " batch"], log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
    """Return v = softmax(beta log w); with beta = 0 equal weights, also where log w = -inf: 0 * (-inf) is avoided."""
    if isinstance(beta, float) and beta == 0:
        return torch.full_like(log_w, 1 / log_w.shape[0])
    return normalized_weights(beta * log_w)


def _expectation(v: Float[Tensor, "k batch"], log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
    """Return f = sum_i v_i log w_i."""
    # Before the product, not after it: the derivative for v would be 0 * (-inf).
    return (v * torch.where(v == 0, 0, log_w)).sum(0)


def _centred(v: Float[Tensor, "k batch"], log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
    """Return log w - f; 0 where a draw has no weight or f is -inf."""
    f = _expectation(v, log_w)
    return torch.where((v == 0) | (f == -torch.inf), 0, log_w - f)
