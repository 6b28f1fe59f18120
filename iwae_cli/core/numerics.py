"""Functions of log-weights shared by objectives and evaluation: log-mean-exp, ESS, streaming sums, Pareto k-hat.

The sample axis is dim 0 everywhere. Logarithms are natural: log-weights and bounds are in nats.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.errors import check_range


def log_mean_exp(log_w: Float[Tensor, "k *batch"]) -> Float[Tensor, "*batch"]:
    """Return log (1/k sum_i exp(log_w_i)), (*batch,), nats; stable for any offset.

    All -inf gives -inf (with zero gradient, not NaN); NaN and +inf propagate.
    """
    top = log_w.detach().amax(0)
    # Otherwise inf - inf would turn "every weight is zero" and "a weight is infinite" into NaN.
    offset = torch.where(top.isinf(), torch.zeros_like(top), top)
    total = (log_w - offset).exp().sum(0)
    empty = total == 0
    log_total = torch.where(empty, torch.ones_like(total), total).log()
    mean = log_total + (offset - math.log(log_w.shape[0]))
    return torch.where(empty, torch.full_like(mean, -math.inf), mean)


def normalized_weights(log_w: Float[Tensor, "k *batch"]) -> Float[Tensor, "k *batch"]:
    """Return w~ = softmax(log w), (k, *batch); 1/k each where every weight is zero (all log w = -inf)."""
    top = log_w.amax(0, keepdim=True)
    safe = torch.where(top == -math.inf, torch.zeros_like(log_w), log_w)
    return torch.softmax(safe, dim=0)


def log_mean_exp_of_others(log_w: Float[Tensor, "k *batch"]) -> Float[Tensor, "k *batch"]:
    """Return log (1/(k-1) sum_{j != i} exp(log_w_j)) for every i, (k, *batch), nats; stable, in O(k) memory.

    Subtracting w_i from the sum is accurate except for the largest weight, for which the others are summed again.
    """
    k = log_w.shape[0]
    if k < 2:
        raise ValueError(f"log_w must hold at least 2 samples, got {k}")
    largest = log_w.argmax(0, keepdim=True)
    share = normalized_weights(log_w).scatter(0, largest, 0)
    without = log_mean_exp(log_w) + torch.log1p(-share)
    without_largest = log_mean_exp(log_w.scatter(0, largest, -math.inf))
    others = without.scatter(0, largest, without_largest[None])
    return others + math.log(k / (k - 1))


def effective_sample_size(log_w: Float[Tensor, "k *batch"]) -> Float[Tensor, "*batch"]:
    """Return 1 / sum_i w~_i^2, (*batch,), between 1 and k (Kong 1992)."""
    return 1 / normalized_weights(log_w).square().sum(0)


def accumulator_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums of values on ``device``: itself, or the CPU for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def grid_levels(k: int) -> list[int]:
    """Return the sample sizes m at which an evaluation of k samples reports L_m: 1, 5, 50, 500, ... and k.

    Only levels that divide k are kept. Each then divides the next, which orders the averages over disjoint groups:
    L_m <= L_m' holds for every image, not only in expectation, because the mean of logs never exceeds the log of the
    mean.
    """
    check_range("k", k, 1)
    return sorted({1, k} | {m for m in (5 * 10**i for i in range(len(str(k)))) if m < k and k % m == 0})


class _Groups:
    """Mean over disjoint consecutive groups of ``size`` values of their log-mean-exp; values arrive in pieces.

    A group is always reduced from the same values in the same order, however the pieces are cut.
    """

    def __init__(self, size: int, batch: int, device: torch.device) -> None:
        self._size = size
        self._rest = torch.empty(0, batch, dtype=torch.float64, device=device)
        self._sum = torch.zeros(batch, dtype=torch.float64, device=device)
        self._count = 0

    def add(self, values: Float[Tensor, "n batch"]) -> Float[Tensor, "m batch"]:
        """Add ``n`` values; return the log-mean-exp of each of the ``m`` groups that they complete."""
        joined = torch.cat([self._rest, values])
        whole = joined.shape[0] // self._size
        groups = joined[: whole * self._size].view(whole, self._size, joined.shape[1]).transpose(0, 1)
        self._rest = joined[whole * self._size :].clone()
        means = log_mean_exp(groups)
        # A cumulative sum adds sequentially, so that its rounding does not depend on the cut.
        self._sum = torch.cat([self._sum[None], means]).cumsum(0)[-1]
        self._count += whole
        return means

    def mean(self) -> Float[Tensor, " batch"]:
        """Return the mean over the groups completed so far, (batch,)."""
        return self._sum / self._count


class StreamingLogWeights:
    """Bounds and diagnostics of k log-weights per image, in memory that does not grow with k.

    Consecutive pieces of the sample axis are added and accumulated in float64. The results have the same bits for every
    cut into multiples of ``block`` (the last piece may be shorter).
    """

    def __init__(self, k: int, batch: int, *, block: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.k = k
        self._block = block
        self._seen = 0
        minus_inf = torch.full((batch,), -math.inf, dtype=torch.float64, device=device)
        self._log_sum = minus_inf
        self._log_sum_squares = minus_inf
        # Levels 1, 5, 50, 500, ...: a group of one level is five or ten groups of the level below.
        self._levels = grid_levels(k)[:-1]
        sizes = [level // below for below, level in pairwise([1, *self._levels])]
        self._groups = [_Groups(size, batch, device) for size in sizes]
        self._tail_size = tail_size(k) + 1
        self._tail = torch.empty(0, batch, dtype=torch.float64, device=device)

    def add(self, log_w: Float[Tensor, "n batch"]) -> None:
        """Add the next ``n`` samples; raise ValueError beyond ``k`` samples and for pieces off block boundaries."""
        if self._seen % self._block:
            raise ValueError(f"pieces must start at multiples of {self._block} samples, got {self._seen}")
        if self._seen + log_w.shape[0] > self.k:
            raise ValueError(f"log_w must not exceed {self.k} samples, got {self._seen + log_w.shape[0]}")
        log_w = log_w.to(torch.float64)
        self._seen += log_w.shape[0]
        whole = log_w.shape[0] // self._block
        blocks, rest = log_w.split([whole * self._block, log_w.shape[0] - whole * self._block])
        for piece in (blocks.unflatten(0, (whole, self._block)).transpose(0, 1), rest[:, None]):
            if piece.numel():
                # Sequentially, so that the rounding does not depend on the cut.
                for block in _log_sum_exp(piece):
                    self._log_sum = torch.logaddexp(self._log_sum, block)
                for block in _log_sum_exp(2 * piece):
                    self._log_sum_squares = torch.logaddexp(self._log_sum_squares, block)
        values = log_w
        for groups in self._groups:
            values = groups.add(values)
        candidates = torch.cat([self._tail, log_w])
        self._tail = candidates.topk(min(self._tail_size, candidates.shape[0]), dim=0).values

    def log_px(self) -> Float[Tensor, " batch"]:
        """Return L_k per image, (batch,), nats."""
        self._require_all()
        return self._log_sum - math.log(self.k)

    def bounds(self) -> dict[int, Float[Tensor, " batch"]]:
        """Return {m: L_m per image, (batch,), nats} for every level m; increasing in m for every image."""
        log_px = self.log_px()
        return {m: g.mean() for m, g in zip(self._levels, self._groups, strict=True)} | {self.k: log_px}

    def ess(self) -> Float[Tensor, " batch"]:
        """Return the effective sample size per image, (batch,), between 1 and k; NaN where every weight is zero."""
        self._require_all()
        return (2 * self._log_sum - self._log_sum_squares).exp().clamp(1, self.k)

    def top_weight(self) -> Float[Tensor, " batch"]:
        """Return the largest normalized weight per image, (batch,); NaN where every weight is zero."""
        self._require_all()
        return (self._tail[0] - self._log_sum).exp()

    def khat(self) -> Float[Tensor, " batch"]:
        """Return Pareto k-hat per image, (batch,); NaN where ``pareto_khat`` is not defined."""
        self._require_all()
        return pareto_khat(self._tail)

    def _require_all(self) -> None:
        if self._seen != self.k:
            raise ValueError(f"k must be reached before results are read: {self._seen} of {self.k} samples were added")


def _log_sum_exp(log_w: Float[Tensor, "n *batch"]) -> Float[Tensor, "*batch"]:
    return log_mean_exp(log_w) + math.log(log_w.shape[0])


def tail_size(k: int) -> int:
    """Return M = min(k/5, 3 sqrt k), the number of largest weights that k-hat is fitted to (Vehtari et al. 2024)."""
    return int(min(k / 5, 3 * math.sqrt(k)))


SMALLEST_TAIL = 5
"""Minimum number of weights for a fit of k-hat."""

EQUAL = 1e-4
"""Weights this close, relative to the largest, count as equal: float32 rounds log-weights of 100 nats to 1e-5."""


def pareto_khat(largest: Float[Tensor, "m batch"]) -> Float[Tensor, " batch"]:
    """Return the shape of a generalized Pareto distribution fitted to the largest weights of each column.

    The fit is the empirical Bayes estimate of Zhang and Stephens (2009), with the weak prior of Vehtari, Simpson,
    Gelman, Yao and Gabry (2024, arXiv 1507.02646) that pulls small tails towards 0.5. NaN where fewer than five weights
    lie above the threshold, or all of them are equal within ``EQUAL`` (the fit would be to rounding errors). Where the
    least quarter equals the threshold so, as with discrete latents of few values, the fit is to the weights above it.

    Args:
        largest: the M + 1 largest log-weights in descending order, nats; the last one is the threshold.
    """
    m = largest.shape[0] - 1
    if m < SMALLEST_TAIL:
        return torch.full(largest.shape[1:], math.nan, dtype=torch.float64, device=largest.device)
    shifted = (largest.to(torch.float64) - largest[0]).exp()
    x = (shifted[:-1] - shifted[-1]).flip(0)  # exceedances, ascending
    defined = torch.isfinite(x).all(0) & (x[-1] > EQUAL) & (x[0] < x[-1])
    x = torch.where(defined, x, torch.linspace(0.5, 1.5, m, dtype=torch.float64, device=x.device)[:, None])

    quartile = x[int(m / 4 + 0.5) - 1].clamp(min=torch.finfo(torch.float64).tiny)  # positive for the grid below
    points = 30 + int(math.sqrt(m))
    j = torch.arange(1, points + 1, dtype=torch.float64, device=x.device)[:, None]
    theta = 1 / x[-1] + (1 - torch.sqrt(points / (j - 0.5))) / (3 * quartile)
    shape = torch.stack([torch.log1p(-t * x).mean(0) for t in theta])
    log_likelihood = m * (torch.log(-theta / shape) - shape - 1)
    weights = torch.softmax(log_likelihood, dim=0)
    theta_hat = (weights * theta).sum(0)
    khat = torch.log1p(-theta_hat * x).mean(0)
    khat = (khat * m + 0.5 * 10) / (m + 10)
    khat = torch.where(defined & torch.isfinite(khat), khat, torch.full_like(khat, math.nan))
    # Where the threshold is so far below the largest weight that it is zero, the tail is heavy in any case.
    tied = defined & (quartile <= EQUAL * shifted[-1]) & (shifted[-1] > 0)
    for column in tied.nonzero().flatten().tolist():
        above = int((x[:, column] > EQUAL * shifted[-1, column]).sum())
        khat[column] = pareto_khat(largest[: above + 1, [column]])[0]
    return khat
