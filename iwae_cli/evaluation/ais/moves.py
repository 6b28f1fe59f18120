"""Moves of the chains at one inverse temperature: Hamiltonian Monte Carlo for real latents, Gibbs for bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise

Scores = Callable[[Latents], tuple[Tensor, Tensor]]
"""Maps h to (base, gap), each (chains, batch), nats: log f_beta(h) = base(h) + beta gap(h)."""


@dataclass(frozen=True)
class Chains:
    """States h of the chains of some images, with the two parts of log f_beta(h) = base(h) + beta gap(h), nats."""

    latents: Latents
    base: Float[Tensor, "chains batch"]
    gap: Float[Tensor, "chains batch"]

    def log_density(self, beta: float) -> Float64[Tensor, "chains batch"]:
        """Return log f_beta(h), not normalized."""
        return self.base.double() + beta * self.gap.double()

    def where(self, accepted: Shaped[Tensor, "chains batch"], proposal: Chains) -> Chains:
        """Return ``proposal`` where it was accepted, the present state elsewhere."""
        pairs = zip(proposal.latents, self.latents, strict=True)
        return Chains(
            tuple(torch.where(accepted[..., None], new, old) for new, old in pairs),
            torch.where(accepted, proposal.base, self.base),
            torch.where(accepted, proposal.gap, self.gap),
        )


def hamiltonian_move(
    scores: Scores, chains: Chains, beta: float, step: Float[Tensor, " batch"], leapfrog: int, noise: Noise
) -> tuple[Chains, Float[Tensor, "chains batch"]]:
    """Make one transition of Hamiltonian Monte Carlo over all layers at once (Neal 2011, arXiv 1206.1901).

    It leaves f_beta invariant, and is its own reversal, if ``step``, the size of a leapfrog step for each image, does
    not depend on ``chains``. A trajectory has ``leapfrog`` steps; one that diverges is rejected. The acceptance
    probability of each proposal is returned with the chains.
    """

    def force(latents: Latents) -> tuple[Chains, Latents]:
        with torch.enable_grad():
            live = tuple(h.detach().requires_grad_() for h in latents)
            base, gap = scores(live)
            # Only for the latents: no gradients of the networks' weights are computed.
            gradient = torch.autograd.grad((base + beta * gap).sum(), live)
        return Chains(latents, base.detach(), gap.detach()), gradient

    def kick(momenta: Latents, gradient: Latents, size: Tensor) -> Latents:
        return tuple(p + size * g for p, g in zip(momenta, gradient, strict=True))

    def kinetic(momenta: Latents) -> Tensor:
        return sum((0.5 * p.double().square().sum(-1) for p in momenta), start=torch.zeros(()).double())

    size = step[:, None]
    momenta = tuple(noise.normal(layer, *h.shape) for layer, h in enumerate(chains.latents, start=1))
    before = kinetic(momenta)
    _, gradient = force(chains.latents)
    latents, proposal = chains.latents, chains
    momenta = kick(momenta, gradient, size / 2)
    for i in range(leapfrog):
        latents = tuple(h + size * p for h, p in zip(latents, momenta, strict=True))
        proposal, gradient = force(latents)
        momenta = kick(momenta, gradient, size if i + 1 < leapfrog else size / 2)
    log_ratio = proposal.log_density(beta) - kinetic(momenta) - chains.log_density(beta) + before
    probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
    k, batch = probability.shape
    accepted = noise.uniform(0, k, batch, 1)[..., 0] < probability
    return chains.where(accepted, proposal), probability.to(step.dtype)


def gibbs_sweep(
    scores: Scores, chains: Chains, beta: float, noise: Noise, backwards: bool = False
) -> tuple[Chains, Float[Tensor, "chains batch"]]:
    """Draw every bit of every layer in turn given all others, which leaves f_beta invariant.

    The sweep ``backwards`` is the reversal of the forward one. The share of bits that changed is returned too.
    """
    order = [(layer, unit) for layer, h in enumerate(chains.latents) for unit in range(h.shape[-1])]
    uniform = [noise.uniform(layer, *h.shape) for layer, h in enumerate(chains.latents, start=1)]
    changed = torch.zeros_like(chains.base)
    for layer, unit in reversed(order) if backwards else order:
        flipped = chains.latents[layer].clone()
        flipped[..., unit] = 1 - flipped[..., unit]
        latents = (*chains.latents[:layer], flipped, *chains.latents[layer + 1 :])
        proposal = Chains(latents, *scores(latents))
        probability = torch.sigmoid(proposal.log_density(beta) - chains.log_density(beta))
        accepted = uniform[layer][..., unit] < probability
        chains = chains.where(accepted, proposal)
        changed += accepted
    return chains, changed / len(order)
