"""Bounds on log p(x) from both sides, on observations drawn from the model, each with an exact draw of its posterior.

A pair (h_0, x) drawn from p has h_0 ~ p(h|x). Let Q be the distribution of k draws of q(h|x), and P the same with one
draw, at a random place, replaced by a draw of p(h|x). With w_i = p(x, h_i) / q(h_i|x) and W = 1/k sum_i w_i,

    dP/dQ = 1/k sum_i p(h_i|x) / q(h_i|x) = W / p(x), hence
    L_k = E_Q[log W] = log p(x) - KL(Q || P),
    U_k = E_P[log W] = log p(x) + KL(P || Q).

W does not depend on the order of the draws, so h_0 may take the first place. L_1 is the ELBO, and U_1 = E[log w_0] =
log p(x) + KL(p(h|x) || q(h|x)) is the EUBO. Both bounds tighten with k: W of k + 1 draws is the mean of the W of its
subsets of k, and -log r and r log r are convex.

The forward effective sample size is 1 / sum_i w~_i^2 with h_0 among the k draws. Given the draws of P without their
places, the exact one is the i-th with probability w~_i; so E_P[1/ESS] = E_P[w~_0], the share of the weight that the
exact draw has. For large k this is rho / k with rho = E_p[p(h|x) / q(h|x)] (Agapiou, Papaspiliopoulos, Sanz-Alonso,
Stuart 2017, arXiv 1511.06196; 1 / rho is the forward ESS of Midgley et al. 2023, arXiv 2208.01893). The effective
sample size of q's draws alone has the same limit, but cannot show what q does not draw.

Sources: Grosse, Ghahramani, Adams 2015 (arXiv 1511.02543) for exact draws by simulation; Domke and Sheldon 2018 (arXiv
1808.09034) for L_k as a KL divergence; Sobolev and Vetrov 2019 (arXiv 1905.03290) for U_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float64

from iwae_cli.core.errors import check_range
from iwae_cli.core.noise import BLOCK, KeyedNoise
from iwae_cli.core.numerics import StreamingLogWeights, grid_levels
from iwae_cli.core.progress import Progress
from iwae_cli.evaluation.estimator import (
    Estimates,
    Estimator,
    EstimatorInput,
    PerImage,
    monte_carlo_variance,
    share_below_10,
    standard_error,
    stderr_mc,
)
from iwae_cli.evaluation.likelihood import piece_size
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record.summary import Row


@dataclass(frozen=True)
class Bounds:
    """Results of every simulated observation, nats."""

    lower: dict[int, PerImage]  # L_m for every level m up to k, see numerics.grid_levels, from k draws of q
    upper: dict[int, PerImage]  # U_m, from the exact draw and the first m - 1 of the same draws of q
    ess: PerImage  # effective sample size of the k draws of q
    forward_ess: PerImage  # that of the exact draw and k - 1 draws of q
    exact: PerImage | None  # log p(x) in closed form; None if the model has none


@final
@dataclass(frozen=True)
class Sandwich(Estimator):
    """L_k and U_k on simulated observations."""

    k: int
    simulated: int

    def __post_init__(self) -> None:
        check_range("k", self.k, 2, MAX_K)
        check_range("simulated", self.simulated, 1)

    def bounds(
        self,
        model: LatentVariableModel,
        *,
        seed: int,
        rows: int,
        workers: int | None = None,
        check: Callable[[], None] = lambda: None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Bounds:
        """Return bounds on log p(x) of every simulated observation; arguments as in ``likelihood.log_likelihood``.

        An observation and its draws are functions of (seed, its index) alone.
        """
        parameter = next(model.parameters())
        piece, levels = piece_size(self.k, rows), grid_levels(self.k)

        def noise(stream: str, images: Sequence[int], start: int = 0) -> KeyedNoise:
            check()
            return KeyedNoise(seed, stream, images, start, parameter.dtype, parameter.device)

        def weigh(images: Sequence[int]) -> Float64[np.ndarray, "values batch"]:
            # One by one: products of another shape are rounded differently, which may change a pixel.
            pairs = [model.generative.sample(1, noise("simulated", [image])) for image in images]
            x = torch.cat([x for _, x in pairs])
            h = tuple(torch.cat(layer, 1) for layer in zip(*(h for h, _ in pairs), strict=True))
            before = (model.generative(x, h) - model.inference(x, h)).double()  # (1, batch)
            size: dict[str, Any] = {"batch": len(images), "block": BLOCK, "device": parameter.device}
            lower = StreamingLogWeights(self.k, **size)
            upper = {m: StreamingLogWeights(m, **size) for m in levels}
            for start in range(0, self.k, piece):
                log_w = model(x, min(piece, self.k - start), noise("simulated draws", images, start)).double()
                lower.add(log_w)
                # The exact draw takes the first place and moves all others by one.
                moved = torch.cat([before, log_w[:-1]])
                before = log_w[-1:]
                for m in levels:
                    if start < m:
                        upper[m].add(moved[: m - start])
            exact = model.generative.exact_log_px(x)
            values = [*lower.bounds().values(), *(sums.log_px() for sums in upper.values())]
            absent = torch.full_like(before[0], math.nan)
            values += [lower.ess(), upper[self.k].ess(), absent if exact is None else exact]
            return torch.stack(values).cpu().numpy()

        batch = max(1, rows // piece)
        parts = map_batches(weigh, self.simulated, batch, workers, parameter.device, on_progress)
        *found, ess, forward_ess, exact = np.concatenate(parts, axis=1)
        lower, upper = (dict(zip(levels, half, strict=True)) for half in (found[: len(levels)], found[len(levels) :]))
        return Bounds(lower, upper, ess, forward_ess, None if np.isnan(exact).all() else exact)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return the bounds with their difference, and the effective sample sizes without and with the exact draw."""
        with Progress("sandwich", total=self.simulated, unit="observation") as progress:
            found = self.bounds(subject.model, **subject.how(check), on_progress=progress.update)
        arrays = {f"L_{m}": values for m, values in found.lower.items()}
        arrays |= {f"U_{m}": values for m, values in found.upper.items()}
        arrays |= {"ess": found.ess, "forward_ess": found.forward_ess}
        arrays |= {} if found.exact is None else {"exact": found.exact}
        notes = [
            f"in expectation L_{self.k} is at most and U_{self.k} at least log p(x) of the model's own draws: their "
            f"difference bounds the bias of NLL_{self.k} on simulated data, not on the test data",
            f"stderr_mc is of L_{self.k} alone. U_{self.k} also depends on how often an exact draw fell where q is "
            "small: stderr_gap contains that, but a part that holds less than about "
            f"1/{self.simulated:,} of the posteriors is not seen",
            "forward: with an exact draw of the posterior among the samples; where this effective sample size is much "
            "smaller than that of q's own draws, q misses a part of the posterior",
        ]
        estimates = Estimates(notes=notes)
        with np.errstate(invalid="ignore"):
            estimates.add("simulated", self._numbers(found), arrays)
        estimates.rows = self._rows(estimates.numbers["simulated"])
        return estimates

    def _numbers(self, found: Bounds) -> dict[str, Any]:
        gap = found.upper[self.k] - found.lower[self.k]
        numbers: dict[str, Any] = {
            "n": self.simulated,
            "k": self.k,
            "gap": gap.mean(),
            "stderr_gap": standard_error(gap),
            "stderr_upper": standard_error(found.upper[self.k]),
            "stderr_images": standard_error(found.lower[self.k]),
            "stderr_mc": stderr_mc(monte_carlo_variance(found.ess, self.k)),
        }
        if found.exact is not None:
            numbers["exact"] = found.exact.mean()
        for prefix, ess in (("", found.ess), ("forward_", found.forward_ess)):
            numbers |= {f"{prefix}ess_median": np.median(ess), f"{prefix}ess_min": ess.min()}
            numbers[f"{prefix}ess_share_below_10"] = share_below_10(ess)
        for name, bounds in (("upper_bounds", found.upper), ("bounds", found.lower)):
            numbers[name] = {str(m): values.mean() for m, values in bounds.items()}
        return numbers

    def _rows(self, numbers: Mapping[str, Any]) -> list[Row]:
        """Return the rows of the table: the difference, the bounds from the highest to the lowest, the sample sizes."""
        levels = list(numbers["bounds"])
        upper = [(f"U_{m}{' (EUBO)' if m == '1' else ''}, nats", f"upper_bounds.{m}", "{:.3f}") for m in levels]
        lower = [(f"L_{m}{' (ELBO)' if m == '1' else ''}, nats", f"bounds.{m}", "{:.3f}") for m in levels]
        rows = [
            (f"U_{self.k} - L_{self.k}, nats", "gap", "{:.4f}"),
            ("  paired: stderr_gap", "stderr_gap", "± {:.4f}"),
            *upper,
            (f"  U_{self.k}, other observations: stderr_upper", "stderr_upper", "± {:.2f}"),
            *([("exact log p(x), nats", "exact", "{:.3f}")] if "exact" in numbers else []),
            lower[-1],
            (f"  L_{self.k}, other observations: stderr_images", "stderr_images", "± {:.2f}"),
            (f"  L_{self.k}, other noise: stderr_mc", "stderr_mc", "± {:.4f}"),
            *reversed(lower[:-1]),
            ("simulated observations", "n", "{:,}"),
            ("effective sample size, median", "ess_median", "{:,.1f}"),
            ("effective sample size, least", "ess_min", "{:,.1f}"),
            ("  observations below 10", "ess_share_below_10", "{:.1%}"),
            ("forward effective sample size, median", "forward_ess_median", "{:,.1f}"),
            ("forward effective sample size, least", "forward_ess_min", "{:,.1f}"),
            ("  observations below 10, forward", "forward_ess_share_below_10", "{:.1%}"),
        ]
        return [(label, f"simulated.{key}", form) for label, key, form in rows]
