"""log p(x) by a sum over a grid of all latents, of models with one or two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from iwae_cli.models.base import LatentVariableModel


def grid(sizes: Sequence[int], points: int, reach: float) -> tuple[tuple[Tensor, ...], float]:
    """All points of [-reach, reach]^d as latents, each (points^d, 1, size), and the logarithm of a cell's size."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    h = torch.stack(torch.meshgrid(*[axis] * sum(sizes), indexing="ij"), -1).reshape(-1, 1, sum(sizes))
    return h.split(list(sizes), -1), sum(sizes) * math.log(2 * reach / (points - 1))


def log_px_on_grid(
    model: LatentVariableModel, x: Tensor, sizes: Sequence[int], points: int = 151, reach: float = 10.0
) -> Tensor:
    """log p(x), (n,)."""
    latents, log_cell = grid(sizes, points, reach)
    with torch.no_grad():
        log_p = model.generative(x, tuple(h.expand(-1, len(x), -1) for h in latents))
    return log_p.logsumexp(0) + log_cell
