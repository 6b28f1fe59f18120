"""A training step that differentiates few of its draws: Russian roulette on the weights of a bound.

Most normalized weights of a trained model are almost zero, but forward and backward pass cost the same for every draw.
Here all draws are scored without gradient, and a draw of weight a is differentiated with probability
p = min(1, |a| / tau) and the weight a / p, whose expectation is a: the expected gradient stays the same, and its
variance grows a little (Kahn and Harris 1951 for the roulette; for the weights of IWAE see the tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import BoundObjective, weighted_sum


@final
@dataclass(frozen=True)
class RouletteStep:
    """``PlainStep`` with the gradient of the surviving draws; the same draws of q and the same bound.

    ``tau`` is the roulette threshold in (0, 1]: draws with at least this weight always survive.
    """

    model: LatentVariableModel
    objective: BoundObjective
    optimizer: torch.optim.Optimizer
    tau: float
    name = "roulette"

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """Return the bound of every image before the update, from all draws, nats, detached."""
        model, objective = self.model, self.objective
        latents, log_q = model.inference.sample(x, objective.num_samples, noise)
        with torch.no_grad():
            log_w = model.generative(x, latents) - log_q
            weights = survivors(objective.weights(log_w), uniforms(log_w, noise), self.tau).flatten()
            rows = weights.nonzero()[:, 0]
        loss = surrogate(model, x, latents, log_q, rows, weights[rows])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return objective.bound(log_w)


def uniforms(log_w: Float[Tensor, "k batch"], noise: Noise) -> Float[Tensor, "k batch"]:
    """Return a uniform number on [0, 1) for every draw."""
    k, batch = log_w.shape
    return noise.uniform(0, k, batch, 1)[..., 0]


def survivors(weights: Float[Tensor, "k batch"], u: Float[Tensor, "k batch"], tau: float) -> Float[Tensor, "k batch"]:
    """Return ``weights`` after the roulette: with p = min(1, |a| / tau), a / p where u < p, else 0."""
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
    """Return the loss to differentiate: minus the sum of weight times log w over the draws ``rows``, over the batch.

    The generative network scores these draws, sample * batch + image, once more, with gradient. ``latents`` and
    ``log_q``, nats, are of all draws and differentiable.
    """
    chosen = tuple(h.flatten(0, 1).index_select(0, rows)[None] for h in latents)
    log_p = model.generative(x.index_select(0, rows % len(x)), chosen)[0]
    return -weighted_sum(weights[:, None], (log_p - log_q.flatten().index_select(0, rows))[:, None])[0] / len(x)
