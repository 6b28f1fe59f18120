"""log p(x) in closed form: by marginalizing linear-Gaussian layers, or by enumerating discrete ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.models.conditionals import Conditional, LinearBits, LinearConditional, LinearOneHot
from iwae_cli.models.networks import HALF_LOG_2PI
from iwae_cli.models.priors import BitsPrior, OneHotPrior, StandardNormal

MAX_STATES = 2**14
"""Joint states of all layers up to which log p(x) is enumerated; that costs about as much as 5000 samples."""

_CHUNK = 1024
"""States whose logits are in memory together."""


def exact_log_px(
    x: Float[Tensor, "batch pixels"], prior: Conditional, observation: Conditional, layers: Sequence[Conditional]
) -> Float64[Tensor, " batch"] | None:
    """Return log p(x) of a chain in float64, nats, differentiable; None where it is not known.

    Only the exact classes count: a subclass may have another density.
    """
    factors = [observation, *layers]
    linear = [factor for factor in factors if type(factor) is LinearConditional]
    if type(prior) is StandardNormal and len(linear) == len(factors):
        return _marginalized(x, linear)
    discrete = [factor for factor in factors if type(factor) in (LinearBits, LinearOneHot)]
    if type(prior) in (BitsPrior, OneHotPrior) and type(observation) is LinearBits and len(discrete) == len(factors):
        return _enumerated(x, prior, cast(list[nn.Linear], discrete))
    return None


def _marginalized(x: Float[Tensor, "batch pixels"], layers: Sequence[LinearConditional]) -> Float64[Tensor, " batch"]:
    """Return log N(x; mu, C), with mu and C carried from N(0, I) at the top down to x."""
    top = layers[-1].linear.in_features
    loc = torch.zeros(top, dtype=torch.float64, device=x.device)
    covariance = torch.eye(top, dtype=torch.float64, device=x.device)
    for layer in reversed(layers):
        weight, bias = layer.linear.weight.double(), layer.linear.bias.double()
        loc = weight @ loc + bias
        covariance = weight @ covariance @ weight.T + torch.diag((2 * layer.log_scale.double()).exp())
    centred = (x.double() - loc).T
    _, log_determinant = torch.linalg.slogdet(covariance)
    mahalanobis = (centred * torch.linalg.solve(covariance, centred)).sum(0)
    return -0.5 * (mahalanobis + log_determinant) - x.shape[1] * HALF_LOG_2PI


def _enumerated(
    x: Float[Tensor, "batch pixels"], prior: Conditional, factors: Sequence[nn.Linear]
) -> Float64[Tensor, " batch"] | None:
    """Return log sum_h p(h) p(x|h) over all joint states h, Bernoulli pixels; None above ``MAX_STATES`` states."""
    observation, *layers = factors
    sizes = [layer.in_features for layer in factors]
    bits = [isinstance(layer, LinearBits | BitsPrior) for layer in (*layers, prior)]
    counts = [2**size if binary else size for size, binary in zip(sizes, bits, strict=True)]
    if math.prod(counts) > MAX_STATES:
        return None
    each = [
        (_bits(size) if binary else torch.eye(size)).to(x.device, torch.float64)
        for size, binary in zip(sizes, bits, strict=True)
    ]
    # h_1 varies slowest, so that the states above one h_1 are neighbours.
    numbers = torch.meshgrid(*(torch.arange(count, device=x.device) for count in counts), indexing="ij")
    latents = [states[number.flatten()][:, None] for states, number in zip(each, numbers, strict=True)]
    log_prior = prior.log_prob(latents[-1], None)
    for layer, below, above in zip(layers, latents, latents[1:], strict=False):
        log_prior = log_prior + cast(Conditional, layer).log_prob(below, above)
    log_prior = log_prior.view(counts[0], -1).logsumexp(1)
    x = x.double()
    parts = []
    for h, log_p in zip(each[0].split(_CHUNK), log_prior.split(_CHUNK), strict=True):
        logits = observation(h)
        # As in bernoulli_log_prob, but with the pixels summed by a product of matrices.
        log_joint = logits @ x.T + (log_p - F.softplus(logits).sum(-1))[:, None]
        parts.append(log_joint.logsumexp(0))
    return torch.stack(parts).logsumexp(0)


def _bits(size: int) -> Float[Tensor, "states {size}"]:
    """Return every state of ``size`` bits, the first bit slowest."""
    return (torch.arange(2**size)[:, None] >> torch.arange(size - 1, -1, -1) & 1).float()
