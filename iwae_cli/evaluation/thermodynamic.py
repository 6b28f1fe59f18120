"""log p(x) between the two sums of thermodynamic integration.

log p(x) = int_0^1 f(beta) dbeta with f(beta) = E_{pi_beta}[log w], pi_beta ~ q^(1-beta) p^beta, and f does not fall:
the left sum over points 0 = beta_0 < ... < beta_J = 1 lies below log p(x), the right one above it (Masrani, Le, Wood
2019, arXiv 1907.00031). The points are where f rises by equal steps (Brekelmans et al. 2020, arXiv 2007.00642): then
the sums differ by (f(1) - f(0)) / J.

Here every f(beta) is estimated by the same k draws of q with weights w^beta. L_k of these draws lies between the two
sums for any k; log p(x) does where the weights at beta = 1 are well estimated. Their effective sample size says
whether: where it is small, f(1) is too low, and so is the right sum (docs/numbers.md has measurements).

Their Monte Carlo error is from the sums of two halves of the draws, of a and b draws: v = (S_a - S_b)^2 ab/k^2 for each
image has as its mean the variance of S_k, but for terms of order 1/k^2. It includes the points, which the draws place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float64

from iwae_cli.core.errors import check_range
from iwae_cli.core.numerics import effective_sample_size, log_mean_exp
from iwae_cli.core.progress import Progress
from iwae_cli.data.base import Split
from iwae_cli.evaluation.estimator import (
    Estimates,
    Estimator,
    EstimatorInput,
    PerImage,
    monte_carlo_error,
    monte_carlo_variance,
    require_probabilities,
    share_below_10,
    standard_error,
    stderr_mc,
)
from iwae_cli.evaluation.likelihood import in_pieces, piece_size
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.objectives.tvo import TVO

ENOUGH = 5
"""Effective draws for each interval from which on the right sum of linear-Gaussian models is above log p(x) in the
mean. More intervals bring it nearer to L_k, which lies below.
"""

ROWS = (
    ("right sum, an upper bound where the ESS is large, nats", "right", "{:.3f}"),
    ("  other images: stderr_images of right", "right_stderr_images", "± {:.2f}"),
    ("  other noise: stderr_mc of right", "right_stderr_mc", "± {:.4f}"),
    ("L_{k}, nats", "log_px", "{:.3f}"),
    ("  other images: stderr_images of L_{k}", "log_px_stderr_images", "± {:.2f}"),
    ("  other noise: stderr_mc of L_{k}", "stderr_mc", "± {:.4f}"),
    ("left sum, nats", "left", "{:.3f}"),
    ("  other images: stderr_images of left", "left_stderr_images", "± {:.2f}"),
    ("  other noise: stderr_mc of left", "left_stderr_mc", "± {:.4f}"),
    ("right - left, nats", "difference", "{:.3f}"),
    ("  paired: stderr of right - left", "difference_stderr", "± {:.3f}"),
    ("exact log p(x), nats", "exact", "{:.3f}"),
    ("effective sample size at beta = 1, median", "ess_median", "{:,.1f}"),
    ("  images below 10", "ess_share_below_10", "{:.1%}"),
    ("  images below {enough}", "ess_share_below_enough", "{:.1%}"),
    ("first images", "n", "{:,}"),
)


@final
@dataclass(frozen=True)
class Thermodynamic(Estimator):
    """Left and right sum and L_k for every split of the evaluation; all log-weights of an image are in memory."""

    recipe = 1  # Monte Carlo errors of both sums

    k: int
    partitions: int = 20
    images: int | None = 100

    def __post_init__(self) -> None:
        check_range("k", self.k, 2, MAX_K)
        check_range("partitions", self.partitions, 1)
        check_range("images", self.images, 1)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return both sums of every split and the L_k between them."""
        estimates = Estimates()
        for name in subject.evaluation.splits:
            split = subject.split(name, self.images)
            with Progress(f"thermodynamic sums of {name}", total=len(split.x), unit="image") as progress:
                found = self._sums(subject, split, check, progress.update)
            with np.errstate(invalid="ignore"):
                errors = monte_carlo_error(found["ess"], self.k)
                require_probabilities(f"L_{self.k} of {name}", split.x, found["log_px"], errors)
                estimates.add(name, self._summary(found), found)
            estimates.hashes[name] = split.sha256
        enough = f"{ENOUGH} x {self.partitions} partitions"
        estimates.lay_out([(label.replace("{enough}", enough), key, form) for label, key, form in ROWS], self.k)
        estimates.notes = [
            f"L_{self.k} lies between the sums of its draws; so does log p(x) in the mean where the effective sample "
            f"size (ESS) at beta = 1 is large, {enough} in linear-Gaussian models; where it is small the "
            "right sum is too low"
        ]
        return estimates

    def _sums(
        self, subject: EstimatorInput, split: Split, check: Callable[[], None], on_progress: Callable[[int], None]
    ) -> dict[str, PerImage]:
        """Return the results of every image by name."""
        model, evaluation = subject.model, subject.evaluation
        parameter, sums = next(model.parameters()), TVO(self.k, self.partitions, "moments")
        piece = piece_size(self.k, evaluation.rows)

        def score(images: Sequence[int]) -> Float64[np.ndarray, "values batch"]:
            x = split.x[images[0] : images[-1] + 1].to(parameter)
            pieces = in_pieces(self.k, piece, evaluation.seed, f"{split.name}, thermodynamic", images, x, check)
            log_w = torch.cat([model(x, n, noise).double() for n, noise in pieces])
            exact = model.generative.exact_log_px(x)
            absent = torch.full_like(log_w[0], math.nan)
            values = [sums.bound(log_w), sums.right_sum(log_w), log_mean_exp(log_w), effective_sample_size(log_w)]
            first, second = log_w.chunk(2)
            share = len(first) * len(second) / self.k**2
            variances = [share * (of(first) - of(second)).square() for of in (sums.bound, sums.right_sum)]
            return torch.stack([*values, *variances, absent if exact is None else exact]).cpu().numpy()

        batch, workers = max(1, evaluation.rows // piece), evaluation.workers
        parts = map_batches(score, len(split.x), batch, workers, parameter.device, on_progress)
        names = ("left", "right", "log_px", "ess", "left_variance", "right_variance", "exact")
        found = dict(zip(names, np.concatenate(parts, axis=1), strict=True))
        return {name: values for name, values in found.items() if name != "exact" or not np.isnan(values).all()}

    def _summary(self, found: dict[str, PerImage]) -> dict[str, Any]:
        ess = found["ess"]
        means = [key for key in ("left", "right", "log_px", "exact") if key in found]
        numbers: dict[str, Any] = {key: found[key].mean() for key in means}
        numbers |= {f"{key}_stderr_images": standard_error(found[key]) for key in ("left", "right", "log_px")}
        return numbers | {
            "stderr_mc": stderr_mc(monte_carlo_variance(ess, self.k)),
            "left_stderr_mc": stderr_mc(found["left_variance"]),
            "right_stderr_mc": stderr_mc(found["right_variance"]),
            "difference": (found["right"] - found["left"]).mean(),
            "difference_stderr": standard_error(found["right"] - found["left"]),
            "ess_median": np.median(ess),
            "ess_share_below_10": share_below_10(ess),
            "ess_share_below_enough": math.nan if np.isnan(ess).any() else (ess < ENOUGH * self.partitions).mean(),
            "k": self.k,
            "partitions": self.partitions,
            "n": len(ess),
        }
