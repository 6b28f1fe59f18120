"""KL(q(h|given) || p(h)) in closed form: a property of the pair, found by the exact classes of both.

A subclass may have another density, so it is unknown until it is registered itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import (
    CholeskyConditional,
    DiagonalGaussian,
    GaussianConditional,
    GaussianHeads,
    Given,
    LinearConditional,
)
from iwae_cli.models.posteriors import FullGaussian
from iwae_cli.models.priors import StandardNormal

KL = Callable[[Any, Any, Tensor], Tensor]
"""(q, p, given) -> KL(q(h|given) || p(h)) of every row of ``given``, (batch,), nats."""

_KNOWN: dict[tuple[type, type], KL] = {}


def register_kl(q: type[nn.Module], p: type[nn.Module]) -> Callable[[KL], KL]:
    """Return a decorator that makes a function the KL of these two classes: a conditional and a prior.

    Subclasses of ``InferenceChain`` and ``GenerativeChain`` can be named as well.
    """

    def register(function: KL) -> KL:
        _KNOWN[q, p] = function
        return function

    return register


def find_kl(q: nn.Module, p: nn.Module) -> Callable[[Float[Tensor, "batch pixels"]], Float[Tensor, " batch"]] | None:
    """Return KL(q(h|x) || p(h)) of two networks as a function of x, (batch, pixels) -> (batch,), nats.

    None if no closed form is registered, and for chains of more than one layer.
    """
    white = 1.0
    if type(q) is InferenceChain and type(p) is GenerativeChain and len(q.layers) == 1:
        q, p, white = q.layers[0], p.prior, cast(float, q.white)
    function = _KNOWN.get((type(q), type(p)))
    return None if function is None else lambda x: function(q, p, x / white)


@register_kl(GaussianConditional, StandardNormal)
@register_kl(GaussianHeads, StandardNormal)
@register_kl(LinearConditional, StandardNormal)
def diagonal_to_standard_normal(q: DiagonalGaussian, p: StandardNormal, given: Given) -> Float[Tensor, " batch"]:
    """Return KL(N(loc, diag(scale)^2) || N(0, I)), nats."""
    loc, log_scale = q(given)
    return 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum(-1)


@register_kl(CholeskyConditional, StandardNormal)
def cholesky_to_standard_normal(q: CholeskyConditional, p: StandardNormal, given: Given) -> Float[Tensor, " batch"]:
    """Return KL(N(loc, L L^T) || N(0, I)), nats."""
    loc, cholesky = q.linear(given), q.cholesky()
    return 0.5 * (loc.square().sum(-1) + cholesky.square().sum() - loc.shape[-1]) - q.log_diagonal.sum()


@register_kl(FullGaussian, StandardNormal)
def full_to_standard_normal(q: FullGaussian, p: StandardNormal, given: Given) -> Float[Tensor, " batch"]:
    """Return KL(N(loc, L L^T) || N(0, I)) with L from ``given``, nats."""
    loc, log_diagonal, cholesky = q(given)
    return 0.5 * (loc.square().sum(-1) + cholesky.square().sum((-2, -1)) - loc.shape[-1]) - log_diagonal.sum(-1)
