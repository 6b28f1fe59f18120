"""Base classes of all objectives: from log-weights to a bound in nats, and to losses whose gradients train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import signature
from typing import ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, vmap

from iwae_cli.core.errors import check_range
from iwae_cli.core.interfaces import Model, Particles, StochasticLayers
from iwae_cli.core.noise import Noise

Gradient = Literal["total", "stl", "dreg"]
AT_ONCE = 2**24
"""Log-weights that ``doubly_weights`` differentiates at once, about: bounds its memory."""


@dataclass(frozen=True)
class Losses:
    """The scalars to differentiate and the value to report.

    Attributes:
        generative: scalar whose gradient with respect to theta is used.
        inference: the same for phi; the same object as ``generative`` where one backward pass serves both.
        bound: (batch,), nats, detached: the bound itself, never a surrogate.
    """

    generative: Float[Tensor, ""]
    inference: Float[Tensor, ""]
    bound: Float[Tensor, " batch"]


class Objective(ABC):
    """A bound on log p(x) and the losses that maximize it. This is what a yaml of ``conf/objective`` names.

    The yaml describes the arguments.

    Attributes:
        k: draws of q per observation, at least ``least_k``.
        lower_bound: whether E[bound] <= log p(x) always; only then may a value be called an NLL.
        one_loss: whether one loss trains both networks by its whole derivative, so that they may share parameters.
        stratified: whether k draws that are taken in turn from the components of q serve it as independent ones do. Not
            its gradient where ``needs_score``, nor baselines of score functions: the mean score of q is 0 over q, and
            not over one of its components. Of a class, whether it does with some gradient.
        takes_kl_weight: whether its losses stay right where log p(h) and log q(h|x) are both multiplied by a number,
            but where ``needs_score``.
        plain_gradient: the choice of ``gradient`` that asks least of draws and networks.
        through_latents: whether it differentiates through the latents: the score of q of discrete ones would be
            dropped silently.
    """

    least_k: ClassVar[int] = 1
    plain_gradient: ClassVar[str] = "total"
    lower_bound: bool = True
    one_loss: bool = False
    stratified: bool = False
    takes_kl_weight: bool = False
    through_latents: bool = False

    def __init__(self, k: int) -> None:
        check_range("k", k, self.least_k)
        self.k = k

    @property
    def num_samples(self) -> int:
        """Draws of q per observation and step."""
        return self.k

    @abstractmethod
    def bound(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
        """Return the value that is reported, nats, higher is better."""

    @abstractmethod
    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        """Return scalars to differentiate, means over the batch, in nats.

        Args:
            model: the model that drew ``particles``.
            x: the observations.
            particles: ``num_samples`` draws for each of them.
            noise: for an objective that draws more, such as samples of p.
        """

    @final
    def drawn_losses(self, model: Model, x: Float[Tensor, "batch pixels"], noise: Noise) -> Losses:
        """Return ``losses`` with particles drawn now, from ``noise``."""
        return self.losses(model, x, model.draw(x, self.num_samples, noise), noise)

    @property
    def needs_score(self) -> bool:
        """Whether its gradient leaves out the score of q because its mean over draws of q is 0.

        It is not 0 over draws taken in turn from components of q, nor where log q is multiplied by a number.
        """
        return False

    @property
    def caveats(self) -> tuple[str, ...]:
        """Warnings to print before the training, one line each; empty for most objectives."""
        if self.lower_bound:
            return ()
        return (f"{type(self).__name__} as chosen is not a lower bound: its value may exceed log p(x)",)

    def check(self, architecture: StochasticLayers) -> str | None:
        """Return why this objective cannot train models of such layers, and which ones can; None if it can."""
        if not (self.through_latents and architecture.discrete):
            return None
        return (
            f"{type(self).__name__} differentiates through the latents and cannot train discrete ones; "
            "use objective=vimco, objective=rws, objective=reinforce (the ELBO), or objective=tvo with "
            "objective.gradient=covariance"
        )

    def check_networks(self, model: Model) -> str | None:
        """Return why this objective cannot train these built networks; None if it can."""
        if model.shared and not self.one_loss:
            what, instead = self._blamed(type(self).one_loss)
            return (
                f"{what} gives p and q different gradients, and in this model they share parameters "
                f"({model.shared[0]}): write {instead}"
            )
        strata = model.inference.strata
        if strata == 1:
            return None
        k = -(-self.k // strata) * strata
        if self.needs_score or not self.stratified:
            what, instead = self._blamed(type(self).stratified)
            return (
                f"{what} needs independent draws, and this q takes them from its {strata} components in turn: write "
                f"{instead}{f' objective.k={k}' if k > self.k else ''}, or model.posterior=full"
            )
        if k > self.k:
            fewer = f", or model.posterior_size={self.k}" if self.k > 1 else ""
            return (
                f"objective.k={self.k} is not a multiple of the {strata} components of q, from which draws are taken "
                f"in turn: write objective.k={k}{fewer}"
            )
        return None

    def _blamed(self, gradient: bool) -> tuple[str, str]:
        """Return what of this objective is refused, its gradient or all of it, and what to write instead."""
        chosen = getattr(self, "gradient", None)
        if not gradient or chosen in (None, self.plain_gradient) or "gradient" not in signature(type(self)).parameters:
            return type(self).__name__, "objective=iwae"
        return f"objective.gradient={chosen}", f"objective.gradient={self.plain_gradient}"


class BoundObjective(Objective, ABC):
    """A smooth bound B(log w) on reparameterized latents, with a choice of gradient estimator; ``bound`` is enough.

    With a = dB/dlog w, the gradient for theta is sum_i a_i dlog p(x, h_i). For phi:

    - ``total``: the derivative of the bound, score term included.
    - ``stl`` (Roeder, Wu, Duvenaud 2017, arXiv 1703.09194): path derivative with coefficient a; unbiased for
      the ELBO alone.
    - ``dreg`` (Tucker, Lawson, Gu, Maddison 2019, arXiv 1810.04152): path derivative with coefficient
      b = a - diag(d2B/dlog w2); unbiased for every smooth bound.

    The path derivative freezes the *weights* of q and keeps h live everywhere. Where every log-weight of an image is
    -inf, its bound is -inf and its gradient is finite; -inf beside finite ones counts as a weight of zero.
    """

    one_loss = True
    through_latents = True

    def __init__(self, k: int, gradient: Gradient = "total") -> None:
        super().__init__(k)
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient must be one of {', '.join(get_args(Gradient))}, got {gradient}")
        self.gradient: str = gradient
        self.one_loss = gradient == "total"
        self.takes_kl_weight = type(self).losses is BoundObjective.losses

    @property
    def needs_score(self) -> bool:
        """True of ``dreg``, whose coefficient b stands for the score, but where b = a and it is ``stl``."""
        return self.gradient == "dreg" and not self._is_linear()

    def _is_linear(self) -> bool:
        """Return whether the bound is linear in log w, as the ELBO is: a is constant, and so a = b."""
        ends = ((0, 1), (-100, 20), (20, -100))
        log_w = torch.stack([torch.linspace(*two, self.num_samples, dtype=torch.float64) for two in ends], 1)
        a = self.weights(log_w)
        return torch.allclose(a, a[:, :1].expand_as(a))

    def weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return a = dB/dlog w; by autograd, unless the closed form is there."""
        return grad(lambda given: self.bound(given).sum())(log_w)

    def doubly_weights(self, log_w: Float[Tensor, "k batch"]) -> Float[Tensor, "k batch"]:
        """Return b = a - diag(d2B/dlog w2); by autograd, in the time of k bounds, unless the closed form is there."""

        def second(chosen: Float[Tensor, " k"]) -> Float[Tensor, " batch"]:
            # d2B/dlog w_i2, where only the i-th entry of ``chosen`` is 1.
            of_one = grad(lambda given: (chosen[:, None] * self.weights(given)).sum())(log_w)
            return (chosen[:, None] * of_one).sum(0)

        return self.weights(log_w) - vmap(second, chunk_size=max(1, AT_ONCE // log_w.numel()))(
            torch.eye(len(log_w), dtype=log_w.dtype, device=log_w.device)
        )

    def losses(self, model: Model, x: Float[Tensor, "batch pixels"], particles: Particles, noise: Noise) -> Losses:
        """See the class; ``dreg`` has two losses, each differentiated for its own parameters."""
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
        """STL is unbiased where a = b."""
        if self.gradient != "stl" or self._is_linear():
            return super().caveats
        return (
            *super().caveats,
            "objective.gradient=stl is biased for every bound but the ELBO: it omits part of the score term; "
            "objective.gradient=total is not, nor is dreg, which is for a q that is no mixture",
        )


def weighted_sum(weights: Float[Tensor, "k batch"], values: Float[Tensor, "k batch"]) -> Float[Tensor, " batch"]:
    """Return sum_i weights_i values_i; a weight of zero removes its value, even if it is -inf."""
    return torch.where(weights == 0, 0, weights * values).sum(0)


def score_term(model: Model, x: Float[Tensor, "batch pixels"], particles: Particles) -> Float[Tensor, "k batch"]:
    """Return log q(h|x) with h held fixed, nats: its gradient is the score of q, for any kind of latents."""
    # Where layers of q are of both kinds, some latents are live; h.requires_grad does not say so under vmap.
    layers = getattr(model.inference, "layers", ())
    if not particles.reparameterized and not any(layer.reparameterized for layer in layers):
        return particles.log_q
    return model.inference(x, tuple(h.detach() for h in particles.latents))
