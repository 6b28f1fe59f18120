"""log p(x) by quadrature over one or two real latents.

p(x) is the integral of p(x, h): the sum over equally spaced points times the volume of a cell. For a smooth function
that vanishes at the borders of the grid this rule converges faster than any power of the spacing (Trefethen and
Weideman 2014, SIAM Review 56). Every other point is a grid too, and so much worse that the change to it is nearly its
whole error, far above that of the full grid. Rounding is not in it: in float32 about 1e-6 nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int, Shaped
from torch import Tensor

from iwae_cli.core.noise import BLOCK, KeyedNoise
from iwae_cli.evaluation.estimator import PerImage
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.models.base import LatentVariableModel

PART = BLOCK  # points scored at once: a fixed number, so that products have one shape however images are batched
PRIOR_DRAWS = 4096  # of the prior, which place the grid
FARTHEST = 5.0  # standard deviations that the farthest of them counts as at least
BORDER = 0.9  # points beyond this share of the half side are near the border


@dataclass(frozen=True)
class Box:
    """Equally spaced points between two corners of a box, or of a box for each image."""

    low: Float64[Tensor, "*n d"]
    high: Float64[Tensor, "*n d"]
    points: int  # on each side

    def __len__(self) -> int:
        return self.points ** self.low.shape[-1]

    def indices(self, start: int = 0, count: int | None = None) -> Int[Tensor, "m d"]:
        """Return the indices on each side of ``count`` points (None: of all) from the one with number ``start`` on."""
        last = len(self) if count is None else min(len(self), start + count)
        sides = (self.points,) * self.low.shape[-1]
        return torch.stack(torch.unravel_index(torch.arange(start, last, device=self.low.device), sides), -1)

    def at(self, indices: Int[Tensor, "m *#n d"]) -> Float64[Tensor, "m *n d"]:
        """Return the points with these indices."""
        return self.low + indices * (self.high - self.low) / (self.points - 1)

    def log_cell(self) -> Float64[Tensor, "*n"]:
        """Return the logarithm of the volume of a cell."""
        return ((self.high - self.low) / (self.points - 1)).log().sum(-1)


@dataclass(frozen=True)
class Quadrature:
    """Per-image results."""

    log_px: PerImage  # log p(x), nats
    error: PerImage  # by how much it differs from the same by every other point of each side, nats
    border: PerImage  # share of the mass near the border of the grid


@torch.no_grad()
def prior_box(model: LatentVariableModel, span: float, points: int, seed: int) -> Box:
    """Return the box of ``span`` standard deviations of p(h) around its mean, which a prior need not know: from draws.

    A few draws far away, of a mixture, may be the posterior of some image. ``FARTHEST`` keeps them well inside.
    """
    parameter = next(model.parameters())
    noise = KeyedNoise(seed, "grid", [0], dtype=parameter.dtype, device=parameter.device)
    drawn = model.generative.prior.sample(None, PRIOR_DRAWS, 1, 1, noise)[0][:, 0].double()
    mean = drawn.mean(0)
    reach = span * torch.maximum(drawn.std(0), (drawn - mean).abs().amax(0) / FARTHEST)
    return Box(mean - reach, mean + reach, points)


def quadrature(
    model: LatentVariableModel,
    x: Shaped[Tensor, "n pixels"],
    box: Box,
    *,
    rows: int,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] | None = None,
) -> Quadrature:
    """Return log p(x) of every image by the points of ``box``, with two measures of its error.

    The model has one layer of real latents, and ``box``, one for all images, an odd number of points on each side.
    Other arguments as in ``likelihood.log_likelihood``; ``rows`` bounds images x points.
    """
    parameter = next(model.parameters())
    p = model.generative

    def integrate(images: Sequence[int]) -> Float64[np.ndarray, "sums batch"]:
        observed = x[images[0] : images[-1] + 1].to(parameter)
        sums = torch.full((3, len(images)), -math.inf, dtype=torch.float64, device=parameter.device)
        for start in range(0, len(box), PART):
            check()
            indices = box.indices(start, PART)
            # One h for all images: the networks are evaluated once for the batch.
            h = box.at(indices)[:, None].to(parameter.dtype)
            log_p = (p.observation.log_prob(observed, h) + p.prior.log_prob(h, None)).double()
            counted = _counted(indices, box.points)[..., None]
            sums = torch.logaddexp(sums, log_p.masked_fill(~counted, -math.inf).logsumexp(1))
        return sums.cpu().numpy()

    found = map_batches(integrate, len(x), max(1, rows // PART), workers, parameter.device, on_progress)
    every, other, border = np.concatenate(found, axis=1)
    cell, doubled = float(box.log_cell()), box.low.shape[-1] * math.log(2)
    with np.errstate(invalid="ignore"):
        return Quadrature(every + cell, np.abs(other + doubled - every), np.exp(border - every))


def _counted(indices: Int[Tensor, "m d"], points: int) -> Bool[Tensor, "3 m"]:
    """Return which points belong to the grid, to that of every other point, and to its border."""
    from_centre = (2 * indices - (points - 1)).abs()
    every = torch.ones_like(indices[:, 0], dtype=torch.bool)
    return torch.stack([every, (indices % 2 == 0).all(-1), (from_centre > BORDER * (points - 1)).any(-1)])
