"""The types that data, models and objectives share; none of these three imports another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.noise import Noise

Observation = Literal["binary", "grey", "real"]
"""Values of a pixel: {0, 1}; integer grey levels; real numbers."""

Latents = tuple[Float[Tensor, "k batch _"], ...]
"""One draw per stochastic layer, nearest to x first; layer l has shape (k, batch, d_l)."""


@dataclass(frozen=True)
class Particles:
    """k draws h ~ q(h|x) for every x of a batch, scored under both networks.

    Attributes:
        latents: the draws, nearest to x first, each (k, batch, d_l); differentiable with respect to the
            inference network where ``reparameterized``.
        log_p: log p(x, h), (k, batch), nats.
        log_q: log q(h|x), (k, batch), nats.
        reparameterized: whether ``latents`` are smooth functions of the parameters of q (False for discrete).
        rescore: returns log q(h|x) of the same draws under q with its *weights* frozen.
    """

    latents: Latents
    log_p: Float[Tensor, "k batch"]
    log_q: Float[Tensor, "k batch"]
    reparameterized: bool
    rescore: Callable[[], Float[Tensor, "k batch"]]

    @cached_property
    def log_w(self) -> Float[Tensor, "k batch"]:
        """Return log w = log p(x, h) - log q(h|x), nats."""
        return self.log_p - self.log_q

    @cached_property
    def log_w_frozen(self) -> Float[Tensor, "k batch"]:
        """Return log w with the weights of q frozen and h live: its gradient for phi is the path derivative alone.

        Freezing the parameters of the *distributions* (loc, scale) instead would cut d loc_2 / d h_1: biased from two
        stochastic layers on.
        """
        return self.log_p - self.rescore()


@runtime_checkable
class Model(Protocol):
    """The part of a model that objectives use."""

    @property
    def generative(self) -> Generative: ...

    @property
    def inference(self) -> Inference: ...

    @property
    def has_kl(self) -> bool: ...

    @property
    def shared(self) -> tuple[str, ...]: ...

    def draw(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise) -> Particles: ...

    def kl(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]: ...


@runtime_checkable
class Generative(Protocol):
    """The part of the generative network that objectives use."""

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]: ...

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]: ...

    def __call__(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]: ...


@runtime_checkable
class Inference(Protocol):
    """The part of the inference network that objectives use."""

    strata: int

    def __call__(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]: ...


@runtime_checkable
class StochasticLayers(Protocol):
    """The stochastic layers of a model, known before it is built, for refusing combinations that cannot work."""

    layers: int
    discrete: bool
