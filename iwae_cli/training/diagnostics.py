"""Where the training bound comes from: KL of every layer, reconstruction term, effective sample size, gradient norms.

They are computed on few steps of a pass, beside the step and not in it: from a copy of the model as it is before the
update, on the minibatch and the noise of that step. So every form of a step has them, and none is slower for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise
from iwae_cli.core.numerics import effective_sample_size
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import DiagonalGaussian
from iwae_cli.models.priors import StandardNormal
from iwae_cli.objectives.base import Objective

EVERY = 500
"""One step in so many of a pass is measured, in the time of two to four others. So is the last whole minibatch of every
validated pass, since the validation takes longer: with few steps in a pass only such passes have diagnostics."""


def diagnostics(
    model: LatentVariableModel, objective: Objective, x: Float[Tensor, "batch pixels"], noise: Noise
) -> dict[str, float]:
    """Return the diagnostics of one step before its update; means over images and draws, nats.

    - ``train/kl/l``: E_q[log q(h_l|.) - log p(h_l|.)] of layer l = 1, 2, ..., nearest to x first. The sum
      is a KL, and so is the term of the top layer; one below it may be negative.
    - ``train/reconstruction``: E_q[log p(x|h_1)]; without the sum of the KL terms it is the mean log-weight.
    - ``train/ess``: effective sample size of all draws of an image; absent with one draw.
    - ``train/gradient_norm/p``, ``train/gradient_norm/q``: Euclidean norm of the gradient of the objective's loss,
      without a roulette; absent for a network that is not trained.

    Neither ``model`` nor ``objective`` is changed, also where their classes count or remember. KL and reconstruction
    are absent for a model whose networks are not the two chains: they may have other factors.
    """
    model, objective = copy.deepcopy((model, objective))
    particles = model.draw(x, objective.num_samples, noise)
    losses = objective.losses(model, x, particles, noise)
    found: dict[str, float] = {}
    with torch.no_grad():
        log_w = particles.log_w
        if type(model.generative) is GenerativeChain and type(model.inference) is InferenceChain:
            terms = [_mean(term) for term in kl_terms(model, x, particles.latents)]
            found |= {f"train/kl/{layer}": value for layer, value in enumerate(terms, start=1)}
            found["train/reconstruction"] = _mean(log_w) + sum(terms)
        if objective.num_samples > 1:
            found["train/ess"] = _mean(effective_sample_size(log_w))
    p, q = ([w for w in network.parameters() if w.requires_grad] for network in (model.generative, model.inference))
    if losses.generative is losses.inference:
        both = _gradients(losses.generative, [*p, *q])
        gradients = {"p": both[: len(p)], "q": both[len(p) :]}
    else:
        gradients = {"p": _gradients(losses.generative, p), "q": _gradients(losses.inference, q)}
    for name, own in gradients.items():
        if own:
            norm = torch.nn.utils.get_total_norm([gradient for gradient in own if gradient is not None])
            found[f"train/gradient_norm/{name}"] = float(norm)
    return found


def kl_terms(
    model: LatentVariableModel, x: Float[Tensor, "batch pixels"], latents: Latents
) -> list[Float[Tensor, "k batch"]]:
    """Return log q(h_l|h_(l-1)) - log p(h_l|h_(l+1)) of every layer, nearest to x first, nats."""
    q, p = model.inference, model.generative
    below, above = (x / q.white, *latents[:-1]), (*latents[1:], None)
    every = zip(latents, q.layers, below, (*p.layers, p.prior), above, strict=True)
    return [of_q.log_prob(h, under) - of_p.log_prob(h, over) for h, of_q, under, of_p, over in every]


@torch.no_grad()
def kl_of_units(
    model: LatentVariableModel, x: Float[Tensor, "batch pixels"], latents: Latents
) -> list[Float64[np.ndarray, " _units"]]:
    """Return ``kl_terms`` by unit, means over images and draws; empty unless all factors are diagonal Gaussians."""
    q, p = model.inference, model.generative
    if type(p) is not GenerativeChain or type(q) is not InferenceChain:
        return []
    of_q = zip(q.layers, (x / q.white, *latents[:-1]), strict=True)
    of_p = zip((*p.layers, p.prior), (*latents[1:], None), strict=True)
    found = []
    for h, *pair in zip(latents, of_q, of_p, strict=True):
        terms = []
        for layer, given in pair:
            # A subclass may have another density.
            if type(layer).log_prob not in (DiagonalGaussian.log_prob, StandardNormal.log_prob):
                return []
            loc, log_scale = layer(given) if isinstance(layer, DiagonalGaussian) else 2 * [h.new_zeros(())]
            terms.append(-((h - loc) / log_scale.exp()).square() / 2 - log_scale)
        found.append((terms[0] - terms[1]).cpu().double().flatten(0, 1).mean(0).numpy())
    return found


def _gradients(loss: Float[Tensor, ""], weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) if weights else ()


def _mean(values: Float[Tensor, "k batch"] | Float[Tensor, " batch"]) -> float:
    return float(values.cpu().double().mean())
