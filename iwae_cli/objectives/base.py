"""The shape of every objective: log-weights in, a bound in nats out, and losses whose gradients train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from iwae_cli.particles import Architecture, Model, Particles

Gradient = Literal["total", "stl", "dreg"]


@dataclass(frozen=True)
class Losses:
    """What to differentiate, and what to report.

    Attributes:
        generative: scalar whose gradient with respect to theta is used.
        inference: scalar whose gradient with respect to phi is used; the same object as ``generative`` where
            one backward pass serves both.
        bound: (batch,), nats, detached: the bound itself, never a surrogate.
    """

    generative: Float[Tensor, ""]
    inference: Float[Tensor, ""]
    bound: Float[Tensor, " batch"]


class Objective(ABC):
    """Something to maximize. This is what a yaml of ``conf/objective`` names."""

    lower_bound: ClassVar[bool] = True
    """Whether E[bound] <= log p(x) always; only then may a value be called an NLL."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Draws of q per observation and step."""

    @abstractmethod
    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        """The value that is reported, nats, higher is better."""

    @abstractmethod
    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles) -> Losses:
        """Scalars to differentiate, means over the batch, in nats."""

    def check(self, architecture: Architecture) -> str | None:
        """Why this objective cannot train such a model, in words that name what can; None if it can."""
        return None


class BoundObjective(Objective, ABC):
    """A smooth bound B(log w) on reparameterized latents, with a choice of gradient estimator.

    With a = dB/dlog w, the gradient for theta is sum_i a_i dlog p(x, h_i). For phi:

    - ``total``: the derivative of the bound, score term included.
    - ``stl`` (Roeder, Wu, Duvenaud 2017, arXiv 1703.09194): path derivative with coefficient a; unbiased for
      the ELBO alone.
    - ``dreg`` (Tucker, Lawson, Gu, Maddison 2019, arXiv 1810.04152): path derivative with coefficient
      b = a - diag(d2B/dlog w2); unbiased for every smooth bound.

    The path derivative freezes the *weights* of q and keeps h live everywhere.

    Raises:
        ValueError: unknown ``gradient``.
    """

    def __init__(self, gradient: Gradient = "total") -> None:
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient!r}")
        self.gradient: Gradient = gradient

    @abstractmethod
    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """a = dB/dlog w, in closed form."""

    @abstractmethod
    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """b = a - diag(d2B/dlog w2), in closed form."""

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles) -> Losses:
        """See the class; ``dreg`` is two losses, each differentiated for its own parameters."""
        if self.gradient == "total":
            bound = self.bound(particles.log_w)
            loss = -bound.mean()
            return Losses(loss, loss, bound.detach())
        log_w = particles.log_w.detach()
        bound = self.bound(log_w)
        if self.gradient == "stl":
            loss = -(self.weights(log_w) * particles.log_w_frozen).sum(0).mean()
            return Losses(loss, loss, bound)
        return Losses(
            generative=-(self.weights(log_w) * particles.log_p).sum(0).mean(),
            inference=-(self.doubly_weights(log_w) * particles.log_w_frozen).sum(0).mean(),
            bound=bound,
        )

    def check(self, architecture: Architecture) -> str | None:
        """Discrete latents are refused: the score of q would be dropped silently."""
        if architecture.discrete:
            return (
                f"{type(self).__name__} differentiates through the latents and cannot train discrete ones; "
                "use objective=vimco or objective=rws"
            )
        return None
