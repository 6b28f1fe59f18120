"""Which latent units a model uses.

A unit u is active if Var_x(E_q[u|x]) > 0.01 (Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519, section 5.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from iwae_cli.core.noise import KeyedNoise
from iwae_cli.evaluation.workers import available_cores, map_batches
from iwae_cli.models.base import LatentVariableModel

THRESHOLD = 0.01


def active_units(
    model: LatentVariableModel,
    x: Shaped[Tensor, "n pixels"],
    *,
    draws: int,
    seed: int,
    stream: str,
    rows: int,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[int] | None:
    """Number of active units of every stochastic layer, nearest to x first; None for discrete layers.

    The variance is over the images, with n in the denominator. A layer above the first averages its mean over
    ``draws`` samples of the layer below: with one draw, the authors' rule, Var(mu_2|x) is added and more units look
    active than are.

    Args:
        model: in evaluation mode.
        x: observations.
        draws: samples of the layer below (500 for our rule, 1 for the authors').
        seed, stream: of the noise.
        rows: bound on images x draws computed at once by one worker, but for one image with all its draws.
        workers: threads that share the images; None is one per core on a CPU, one on another device.
        on_progress: called with the number of images done; may raise to stop.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    if workers is None:
        workers = available_cores() if device.type == "cpu" else 1

    def means(images: Sequence[int]) -> list[np.ndarray] | None:
        batch = x[images[0] : images[-1] + 1].to(device=device, dtype=dtype)
        noise = KeyedNoise(seed, stream, images, 0, dtype, device)
        found = model.inference.posterior_means(batch, draws, noise)
        return None if found is None else [m.double().cpu().numpy() for m in found]

    results = [
        r
        for r in map_batches(means, len(x), batch=max(1, rows // draws), workers=workers, on_progress=on_progress)
        if r is not None
    ]
    if not results:
        return None
    layers = [np.concatenate([r[layer] for r in results]) for layer in range(len(results[0]))]
    return [int((layer.var(axis=0) > THRESHOLD).sum()) for layer in layers]
