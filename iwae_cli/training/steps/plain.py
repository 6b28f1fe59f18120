"""One step of training, in its plain form."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective


def train_step(
    model: LatentVariableModel,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch pixels"],
    noise: Noise,
) -> Float[Tensor, " batch"]:
    """Draw, bound, differentiate, update.

    Returns:
        The bound of every image before the update, (batch,), nats, detached.
    """
    losses = objective.losses(model, x, model.draw(x, objective.num_samples, noise), noise)
    optimizer.zero_grad(set_to_none=True)
    if losses.generative is losses.inference:
        losses.generative.backward()
    else:
        # Each loss is right for its own parameters only; theta may be frozen (train=inference).
        theta = [p for p in model.generative.parameters() if p.requires_grad]
        if theta:
            losses.generative.backward(inputs=theta, retain_graph=True)
        losses.inference.backward(inputs=list(model.inference.parameters()))
    optimizer.step()
    return losses.bound
