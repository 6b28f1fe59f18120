"""A weight on the KL term inside log w, for the first passes of a training."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Latents, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.models.base import LatentVariableModel


class WarmedUp(LatentVariableModel):
    """``model`` with log w = log p(x|h) + beta (log p(h) - log q(h|x)) (Bowman et al. 2016, arXiv 1511.06349).

    It shares the networks of ``model``. Below beta = 1 no bound of these weights is a bound on log p(x).
    """

    _kl_weight: Tensor

    def __init__(self, model: LatentVariableModel) -> None:
        super().__init__(model.generative, model.inference)
        # A tensor, which a compiled step reads; no part of the state.
        self.register_buffer("_kl_weight", next(model.parameters()).new_ones(()), persistent=False)

    def set_kl_weight(self, beta: float) -> None:
        """Set beta for the draws from here on."""
        self._kl_weight.fill_(beta)

    def draw(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise | None = None) -> Particles:
        """Return ``k`` samples h ~ q(h|x) for every x; log p(h) and log q(h|x) are multiplied by beta."""
        drawn, beta = super().draw(x, k, noise), self._kl_weight
        return replace(drawn, log_q=beta * drawn.log_q, rescore=lambda: beta * drawn.rescore())

    def _log_p(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]:
        return self.generative.log_likelihood(x, latents) + self._kl_weight * self.generative.log_prior(latents)
