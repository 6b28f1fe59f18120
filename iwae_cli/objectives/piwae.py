"""One bound for the generative network, another for the inference network."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import Noise
from iwae_cli.objectives.base import Gradient, Losses, Objective
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.objectives.miwae import MIWAE


class PIWAE(Objective):
    """Theta maximizes IWAE-(m k), phi maximizes MIWAE(m, k), from the same draws (Rainforth et al. 2018, 1802.04537).

    The generative network gets the tightest bound that the draws give, the inference network one whose gradient has
    more signal. The reported bound is IWAE-(m k). Special cases: m = 1 is IWAE-k for both; k = 1 trains q by
    the ELBO. Not to be confused with MIWAE(m, k), where both networks maximize the mean of the small bounds.
    ``gradient`` is that of phi; ``stl`` is biased for k >= 2.
    """

    stratified = takes_kl_weight = through_latents = True

    def __init__(self, m: int, k: int, gradient: Gradient = "total") -> None:
        super().__init__(k)
        self.inference = MIWAE(m, k, gradient)
        self.generative = IWAE(m * k)
        self.gradient = gradient

    @property
    def needs_score(self) -> bool:
        return self.inference.needs_score

    @property
    def num_samples(self) -> int:
        return self.inference.num_samples

    def bound(self, log_w: Float[Tensor, "mk batch"]) -> Float[Tensor, " batch"]:
        return self.generative.bound(log_w)

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        generative = self.generative.losses(model, x, particles, noise)
        inference = self.inference.losses(model, x, particles, noise)
        return Losses(generative.generative, inference.inference, generative.bound)

    @property
    def caveats(self) -> tuple[str, ...]:
        return self.generative.caveats + self.inference.caveats
