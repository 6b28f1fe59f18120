"""Which latent units a model uses.

A unit u is active if Var_x(E_q[u|x]) > 0.01 (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519, section 5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped
from torch import Tensor

from iwae_cli.core.noise import KeyedNoise
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.models.base import LatentVariableModel

THRESHOLD = 0.01
RULES = {"active_units": ("test", None, 500), "active_units_authors_rule": ("train", 500, 1)}
"""For each number of ``result.json``: split, number of its first images (None: all), draws of the layer below."""


def active_units(model: LatentVariableModel, x: Shaped[Tensor, "n pixels"], draws: int, **how: Any) -> list[int] | None:
    """Return the number of active units of every stochastic layer, nearest to x first.

    None for discrete layers, and where a mean is not finite.

    The variance is over the images, with n in the denominator. With one of the ``draws``, the authors' rule,
    Var(mu_2|x) is added and more units look active than are. Arguments as in ``posterior_means``.
    """
    if not model.inference.reparameterized:
        return None
    means = posterior_means(model, x, draws, **how)
    if not all(np.isfinite(layer).all() for layer in means):
        return None
    return [int((layer.var(axis=0) > THRESHOLD).sum()) for layer in means]


def posterior_means(
    model: LatentVariableModel,
    x: Shaped[Tensor, "n pixels"],
    draws: int,
    seed: int,
    stream: str,
    rows: int,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Float64[np.ndarray, "n _"]]:
    """Return E_q[h_l|x] of every stochastic layer, nearest to x first.

    A layer above the first averages its mean over ``draws`` samples of the layer below. An image is computed with all
    its draws; other arguments as in ``log_likelihood``.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype

    def means(images: Sequence[int]) -> list[np.ndarray]:
        batch = x[images[0] : images[-1] + 1].to(device=device, dtype=dtype)
        noise = KeyedNoise(seed, stream, images, 0, dtype, device)
        return [m.double().cpu().numpy() for m in model.inference.posterior_means(batch, draws, noise)]

    parts = map_batches(means, len(x), max(1, rows // draws), workers, device, on_progress)
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]
