"""What passes between data, a model and an objective; none imports another, all know this page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.core.noise import Noise

Observation = Literal["binary", "grey", "real"]
"""What a pixel is: {0, 1}; an integer grey level; a real number."""

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
        rescore: gives log q(h|x) of the same draws under q with its *weights* frozen.
    """

    latents: Latents
    log_p: Float[Tensor, "k batch"]
    log_q: Float[Tensor, "k batch"]
    reparameterized: bool
    rescore: Callable[[], Float[Tensor, "k batch"]]

    @cached_property
    def log_w(self) -> Float[Tensor, "k batch"]:
        """log w = log p(x, h) - log q(h|x), (k, batch), nats."""
        return self.log_p - self.log_q

    @cached_property
    def log_w_frozen(self) -> Float[Tensor, "k batch"]:
        """log w with the weights of q frozen and h live: its gradient for phi is the path derivative alone.

        Freezing the parameters of the *distributions* (loc, scale) instead would cut d loc_2 / d h_1 and bias
        every estimator whose weights depend on the latents as soon as there are two stochastic layers.
        """
        return self.log_p - self.rescore()


@runtime_checkable
class Model(Protocol):
    """What an objective may ask of a model."""

    @property
    def generative(self) -> Network: ...

    @property
    def inference(self) -> Inference: ...

    def draw(self, x: Float[Tensor, "batch pixels"], k: int, noise: Noise) -> Particles: ...


@runtime_checkable
class Network(Protocol):
    """The generative network, as far as objectives know it."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def log_prior(self, latents: Latents) -> Float[Tensor, "k batch"]: ...

    def sample(self, n: int, noise: Noise) -> tuple[Latents, Float[Tensor, "n pixels"]]: ...

    def __call__(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]: ...


@runtime_checkable
class Inference(Protocol):
    """The inference network, as far as objectives know it."""

    def parameters(self) -> Iterable[nn.Parameter]: ...

    def kl_to_prior(self, x: Float[Tensor, "batch pixels"]) -> Float[Tensor, " batch"]: ...

    def __call__(self, x: Float[Tensor, "batch pixels"], latents: Latents) -> Float[Tensor, "k batch"]: ...


@runtime_checkable
class StochasticLayers(Protocol):
    """The stochastic layers of a model, known before it is built: for refusing combinations that cannot be."""

    @property
    def layers(self) -> int: ...

    @property
    def discrete(self) -> bool: ...
