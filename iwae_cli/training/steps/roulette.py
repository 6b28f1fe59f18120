"""A step that sends few of its draws back: Russian roulette on the weights of a bound.

Most normalized weights of a trained model are next to nothing, but forward and backward cost the same for every draw.
Here all draws go forward, without gradient, and a draw of weight a comes back with probability min(1, |a| / tau) and
the weight a / min(1, |a| / tau), whose expectation is a: the gradient has the expectation it had, and a little more
variance (Kahn and Harris 1951 for the roulette; for the weights of IWAE see the tests).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, weighted_sum


def roulette_step(
    model: LatentVariableModel,
    objective: BoundObjective,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch pixels"],
    noise: Noise,
    tau: float,
) -> Float[Tensor, " batch"]:
    """``train_step`` with the draws that survive; the same draws of q and the same bound.

    Returns:
        The bound of every image before the update, from all draws, (batch,), nats, detached.
    """
    latents, log_q = model.inference.sample(x, objective.num_samples, noise)
    with torch.no_grad():
        log_w = model.generative(x, latents) - log_q
        weights = survivors(objective.weights(log_w), chances(log_w, noise), tau).flatten()
        rows = weights.nonzero()[:, 0]
    loss = surrogate(model, x, latents, log_q, rows, weights[rows])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return objective.bound(log_w)


def chances(log_w: Float[Tensor, "k batch"], noise: Noise) -> Float[Tensor, "k batch"]:
    """A uniform number for every draw."""
    k, batch = log_w.shape
    return noise.uniform(0, k, batch, 1)[..., 0]


def survivors(weights: Float[Tensor, "k batch"], u: Float[Tensor, "k batch"], tau: float) -> Float[Tensor, "k batch"]:
    """``weights`` after the roulette: with p = min(1, |a| / tau), a / p where u < p, else 0."""
    kept = (weights.abs() / tau).clamp(max=1)
    return torch.where(u < kept, weights / kept, 0)


def surrogate(
    model: LatentVariableModel,
    x: Float[Tensor, "batch pixels"],
    latents: Latents,
    log_q: Float[Tensor, "k batch"],
    rows: Int[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
) -> Float[Tensor, ""]:
    """What to differentiate: minus the sum of weight times log w over the draws ``rows``, over the size of the batch.

    Args:
        model: its generative network scores these draws anew.
        x: the observations.
        latents, log_q: all draws, differentiable.
        rows: which of them, as sample times batch plus image.
        weights: of each.
    """
    chosen = tuple(h.flatten(0, 1).index_select(0, rows)[None] for h in latents)
    log_p = model.generative(x.index_select(0, rows % len(x)), chosen)[0]
    return -weighted_sum(weights[:, None], (log_p - log_q.flatten().index_select(0, rows))[:, None])[0] / len(x)
