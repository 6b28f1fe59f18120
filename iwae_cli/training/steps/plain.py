"""The plain training step: draw, bound, differentiate, update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective


@final
@dataclass(frozen=True)
class PlainStep:
    """One update of ``model`` by ``optimizer``; see ``Step``."""

    model: LatentVariableModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    name = "plain"

    def __call__(self, x: Float[Tensor, "batch pixels"], noise: Noise) -> Float[Tensor, " batch"]:
        """Return the bound of every image before the update, nats, detached."""
        losses = self.objective.drawn_losses(self.model, x, noise)
        self.optimizer.zero_grad(set_to_none=True)
        if losses.generative is losses.inference:
            # One pass for all parameters, also for those that both networks share.
            losses.generative.backward()
        else:
            # Each loss is right for its own parameters only; theta may be frozen (train=inference).
            theta = [p for p in self.model.generative.parameters() if p.requires_grad]
            if theta:
                losses.generative.backward(inputs=theta, retain_graph=True)
            losses.inference.backward(inputs=[p for p in self.model.inference.parameters() if p.requires_grad])
        self.optimizer.step()
        return losses.bound
