"""The shape of every objective: log-weights in, a bound in nats out, and losses whose gradients train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.interfaces import Model, Particles, StochasticLayers
from iwae_cli.core.noise import Noise

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

    lower_bound: bool = True
    """Whether E[bound] <= log p(x) always; only then may a value be called an NLL."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Draws of q per observation and step."""

    @abstractmethod
    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        """The value that is reported, nats, higher is better."""

    @abstractmethod
    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        """Scalars to differentiate, means over the batch, in nats.

        Args:
            model: what drew ``particles``.
            x: the observations.
            particles: ``num_samples`` draws for each of them.
            noise: for an objective that draws more, such as samples of p.
        """

    @property
    def caveats(self) -> tuple[str, ...]:
        """What whoever chose this should know before it trains, one line each; empty for most."""
        if self.lower_bound:
            return ()
        return (f"{type(self).__name__} as chosen is not a lower bound: its value may exceed log p(x)",)

    def check(self, architecture: StochasticLayers) -> str | None:
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

    The path derivative freezes the *weights* of q and keeps h live everywhere. Where every log-weight of an image is
    -inf, its bound is -inf and its gradient is finite; -inf beside finite ones counts as a weight of zero.

    Raises:
        ValueError: unknown ``gradient``.
    """

    def __init__(self, gradient: str = "total", choices: tuple[str, ...] = get_args(Gradient)) -> None:
        if gradient not in choices:
            raise ValueError(f"gradient must be one of {', '.join(choices)}, got {gradient}")
        self.gradient = gradient

    @abstractmethod
    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """a = dB/dlog w, in closed form."""

    @abstractmethod
    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """b = a - diag(d2B/dlog w2), in closed form."""

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        """See the class; ``dreg`` is two losses, each differentiated for its own parameters."""
        if self.gradient == "total":
            bound = self.bound(particles.log_w)
            loss = -bound.mean()
            return Losses(loss, loss, bound.detach())
        log_w = particles.log_w.detach()
        bound = self.bound(log_w)
        if self.gradient == "stl":
            loss = -weighted_sum(self.weights(log_w), particles.log_w_frozen).mean()
            return Losses(loss, loss, bound)
        return Losses(
            generative=-weighted_sum(self.weights(log_w), particles.log_p).mean(),
            inference=-weighted_sum(self.doubly_weights(log_w), particles.log_w_frozen).mean(),
            bound=bound,
        )

    @property
    def caveats(self) -> tuple[str, ...]:
        """STL is unbiased where a = b, that is where the bound is linear in log w: then it is the ELBO."""
        caveats = super().caveats
        if self.gradient == "stl":
            log_w = torch.linspace(0, 1, self.num_samples, dtype=torch.float64)[:, None]
            if not torch.allclose(self.weights(log_w), self.doubly_weights(log_w)):
                caveats += (
                    "objective.gradient=stl is biased for every bound but the ELBO: it omits part of the score term; "
                    "objective.gradient=dreg is not",
                )
        return caveats

    def check(self, architecture: StochasticLayers) -> str | None:
        """Discrete latents are refused: the score of q would be dropped silently."""
        return refuse_discrete(self, architecture)


def refuse_discrete(objective: Objective, architecture: StochasticLayers) -> str | None:
    """The message of an objective that differentiates through the latents, for a model of discrete ones."""
    if not architecture.discrete:
        return None
    return (
        f"{type(objective).__name__} differentiates through the latents and cannot train discrete ones; "
        "use objective=vimco, objective=rws, or objective=tvo with objective.gradient=covariance"
    )


def weighted_sum(weights: Float[Tensor, "k batch"], values: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
    """sum_i weights_i values_i, where a weight of zero takes its value out, be it -inf."""
    return torch.where(weights == 0, 0, weights * values).sum(0)


def score_term(model: Model, x: Float[Tensor, "batch pixels"], particles: Particles) -> Float[Tensor, "k batch"]:
    """log q(h|x) with h held fixed, nats: its gradient is the score of q, for discrete and continuous latents."""
    if not particles.reparameterized:
        return particles.log_q
    return model.inference(x, tuple(h.detach() for h in particles.latents))
