"""Families of q(h|given) that are richer than a diagonal Gaussian, each on the features that a network makes of given.

Each can be sampled and scored in one pass. What makes ``FullGaussian`` and ``Coupling`` richer begins at zero: both
begin as a diagonal Gaussian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwae_cli.core.noise import Noise
from iwae_cli.models.conditionals import Conditional, Draws, Given
from iwae_cli.models.networks import (
    full_normal_log_prob,
    gaussian_mixture_log_prob,
    normal_log_prob,
    standard_normal_log_prob,
)

COUPLING_UNITS = 100
"""Hidden units of a coupling block."""


class ZeroLinear(nn.Module):
    """A linear layer that begins at zero: ``Architecture.build`` draws the initial weights of ``nn.Linear`` alone."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, given: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return F.linear(given, self.weight, self.bias)


class FullGaussian(Conditional):
    """N(loc, L L^T) of ``outputs`` units with L lower triangular; both depend on the ``features`` of ``body``."""

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.loc = nn.Linear(features, outputs)
        self.log_diagonal = nn.Linear(features, outputs)
        self.below_diagonal = ZeroLinear(features, outputs * (outputs - 1) // 2)

    def forward(
        self, given: Float[Tensor, "*n i"]
    ) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d"], Float[Tensor, "*n d d"]]:
        """Return location, logarithm of the diagonal of L, and L."""
        features = self.body(given)
        loc, log_diagonal = self.loc(features), self.log_diagonal(features)
        cholesky = torch.diag_embed(log_diagonal.exp())
        rows, columns = torch.tril_indices(loc.shape[-1], loc.shape[-1], -1, device=loc.device)
        cholesky[..., rows, columns] = self.below_diagonal(features)
        return loc, log_diagonal, cholesky

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        loc, log_diagonal, cholesky = self(given)
        standard = noise.normal(level, k, batch, loc.shape[-1])
        product = "bij,kbj->kbi" if cholesky.dim() == 3 else "kbij,kbj->kbi"
        h = loc + torch.einsum(product, cholesky, standard)
        return h, standard_normal_log_prob(standard) - log_diagonal.sum(-1)

    def log_prob(self, h: Float[Tensor, "k n d"], given: Given) -> Float[Tensor, "k n"]:
        loc, log_diagonal, cholesky = self(given)
        if cholesky.dim() == 3:  # one L for all draws of a row
            return full_normal_log_prob(h, loc, cholesky)
        standard = torch.linalg.solve_triangular(cholesky, (h - loc)[..., None], upper=False)[..., 0]
        return standard_normal_log_prob(standard) - log_diagonal.sum(-1)

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        loc: Tensor = self(given)[0]
        return loc


class CouplingBlock(nn.Module):
    """z = (a, b) becomes (a, b exp(s) + t) with its order reversed; s in (-1, 1) and t depend on a and the features.

    Source: Dinh, Sohl-Dickstein, Bengio 2017, arXiv 1605.08803.
    """

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.kept, self.moved = size - size // 2, size // 2
        self.of_kept = nn.Linear(self.kept, COUPLING_UNITS)
        self.of_features = nn.Linear(features, COUPLING_UNITS, bias=False)
        self.head = ZeroLinear(COUPLING_UNITS, 2 * self.moved)

    def _step(
        self, kept: Float[Tensor, "k n a"], features: Float[Tensor, "*#n f"]
    ) -> tuple[Float[Tensor, "k n b"], Float[Tensor, "k n b"]]:
        """Return s and t."""
        hidden = torch.tanh(self.of_kept(kept) + self.of_features(features))
        log_factor, shift = self.head(hidden).chunk(2, -1)
        return torch.tanh(log_factor), shift

    def forward(
        self, z: Float[Tensor, "k n d"], features: Float[Tensor, "*#n f"]
    ) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"]]:
        """Return the image of z, and the log-determinant of the derivative."""
        kept, moved = z.split([self.kept, self.moved], -1)
        log_factor, shift = self._step(kept, features)
        return torch.cat([kept, moved * log_factor.exp() + shift], -1).flip(-1), log_factor.sum(-1)

    def inverse(
        self, h: Float[Tensor, "k n d"], features: Float[Tensor, "*#n f"]
    ) -> tuple[Float[Tensor, "k n d"], Float[Tensor, "k n"]]:
        """Return the z whose image is h, and the log-determinant of ``forward`` there."""
        kept, moved = h.flip(-1).split([self.kept, self.moved], -1)
        log_factor, shift = self._step(kept, features)
        return torch.cat([kept, (moved - shift) * (-log_factor).exp()], -1), log_factor.sum(-1)


class Coupling(Conditional):
    """A diagonal Gaussian of at least two units, on the features of ``body``, moved by affine coupling ``blocks``.

    Two blocks move every unit.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.body = body
        self.loc = nn.Linear(features, outputs)
        self.log_scale = nn.Linear(features, outputs)
        made = nn.ModuleList(CouplingBlock(features, outputs) for _ in range(blocks))
        self.blocks = cast(Sequence[CouplingBlock], made)

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        features = self.body(given)
        loc, log_scale = self.loc(features), self.log_scale(features)
        standard = noise.normal(level, k, batch, loc.shape[-1])
        h, log_q = loc + log_scale.exp() * standard, standard_normal_log_prob(standard) - log_scale.sum(-1)
        for block in self.blocks:
            h, log_determinant = block(h, features)
            log_q = log_q - log_determinant
        return h, log_q

    def log_prob(self, h: Float[Tensor, "k n d"], given: Given) -> Float[Tensor, "k n"]:
        features = self.body(given)
        log_determinants = h.new_zeros(())
        for block in reversed(self.blocks):
            h, log_determinant = block.inverse(h, features)
            log_determinants = log_determinants + log_determinant
        return normal_log_prob(h, self.loc(features), self.log_scale(features)) - log_determinants

    def mean(self, given: Given) -> None:
        return None


class GaussianMixture(Conditional):
    """1/S sum_s N(loc_s, diag(exp(log_scale_s))^2), locations and scales from ``given``.

    In training, draw i comes from component i mod S, and all are scored under the whole mixture: E[1/k sum_i w_i] =
    p(x) still holds, with less variance, and the bounds are MISELBO (Kviman et al. 2022, arXiv 2202.10951) and SIWAE
    (Kviman et al. 2023, arXiv 2209.15514). In evaluation the components are drawn at random, so that any number of
    draws is a sample of q. Layers above the first draw at random in training, too: the components of two layers must
    not be paired.

    Args:
        body: makes ``features`` of ``given``.
        components: S.
        stratified: whether training takes the components in turn.
    """

    def __init__(self, body: nn.Module, features: int, outputs: int, components: int, stratified: bool) -> None:
        super().__init__()
        self.body = body
        self.loc = nn.Linear(features, components * outputs)
        self.log_scale = nn.Linear(features, components * outputs)
        self.components = components
        self.strata = components if stratified else 1

    def forward(self, given: Float[Tensor, "*n i"]) -> tuple[Float[Tensor, "*n s d"], Float[Tensor, "*n s d"]]:
        """Return locations and log-scales of the components."""
        features = self.body(given)
        sizes = (self.components, -1)
        return self.loc(features).unflatten(-1, sizes), self.log_scale(features).unflatten(-1, sizes)

    def sample(self, given: Given, k: int, batch: int, level: int, noise: Noise) -> Draws:
        """Return draws that are smooth functions of the parameters of their component, and their log-densities."""
        loc, log_scale = self(given)
        if self.training and self.strata > 1:
            chosen = (torch.arange(k, device=loc.device) % self.components)[:, None].expand(k, batch)
        else:
            chosen = (noise.uniform(level, k, batch, 1)[..., 0] * self.components).long()
        index = chosen[..., None, None].expand(k, batch, 1, loc.shape[-1])
        of_chosen = (v.expand(k, batch, *v.shape[-2:]).gather(-2, index)[..., 0, :] for v in (loc, log_scale))
        chosen_loc, chosen_log_scale = of_chosen
        h = chosen_loc + chosen_log_scale.exp() * noise.normal(level, k, batch, loc.shape[-1])
        return h, gaussian_mixture_log_prob(h, loc, log_scale)

    def log_prob(self, h: Float[Tensor, "k n d"], given: Given) -> Float[Tensor, "k n"]:
        return gaussian_mixture_log_prob(h, *self(given))

    def mean(self, given: Given) -> Float[Tensor, "*_ d"]:
        loc: Tensor = self(given)[0]
        return loc.mean(-2)
