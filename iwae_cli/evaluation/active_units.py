"""Which latent units a model uses.

A unit u is active if Var_x(E_q[u|x]) > 0.01 (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519, section 5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from iwae_cli.core.noise import KeyedNoise
from iwae_cli.evaluation.workers import map_batches, threads
from iwae_cli.models.base import LatentVariableModel

THRESHOLD = 0.01
RULES = {"active_units": ("test", None, 500), "active_units_authors_rule": ("train", 500, 1)}
"""For each number of ``result.json``: split, number of its first images (None: all), draws of the layer below."""


def active_units(
    model: LatentVariableModel,
    x: Shaped[Tensor, "n pixels"],
    draws: int,
    seed: int,
    stream: str,
    rows: int,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[int] | None:
    """Return the number of active units of every stochastic layer, nearest to x first; None for discrete layers.

    The variance is over the images, with n in the denominator. A layer above the first averages its mean over
    ``draws`` samples of the layer below: with one draw, the authors' rule, Var(mu_2|x) is added and more units look
    active than are. An image is computed with all its draws; other arguments as in ``log_likelihood``.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype

    def means(images: Sequence[int]) -> list[np.ndarray] | None:
        batch = x[images[0] : images[-1] + 1].to(device=device, dtype=dtype)
        noise = KeyedNoise(seed, stream, images, 0, dtype, device)
        found = model.inference.posterior_means(batch, draws, noise)
        return None if found is None else [m.double().cpu().numpy() for m in found]

    batch = max(1, rows // draws)
    parts = map_batches(means, len(x), batch=batch, workers=threads(workers, device), on_progress=on_progress)
    found = [part for part in parts if part is not None]
    if not found:
        return None
    layers = [np.concatenate(layer) for layer in zip(*found, strict=True)]
    return [int((layer.var(axis=0) > THRESHOLD).sum()) for layer in layers]
