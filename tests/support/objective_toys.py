"""Models small enough to be integrated or enumerated, with one copy of their parameters per row of the batch.

A row is one outcome of the noise: a node of a quadrature, a state of an enumeration, or a replicate of a draw. One
backward pass then gives the gradient estimate of every outcome, and a weighted sum over rows its expectation.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from iwae_cli.core.noise import Noise
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.kl import register_kl
from iwae_cli.objectives.base import Objective


class GivenNoise(Noise):
    """Given noise: one tensor (k, batch, size) per layer."""

    def __init__(self, values: dict[int, Tensor]) -> None:
        self._values = values

    def _draw(self, kind: str, layer: int, *shape: int) -> Tensor:
        assert self._values[layer].shape == shape
        return self._values[layer]


def rows(values: list[float], n: int) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64)[:, None].repeat(1, n))


def normal(h: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return -0.5 * ((h - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


class ScalarChainP(GenerativeChain):
    """x | h_1 ~ N(slope_0 h_1, exp(log_scale_0)^2), h_1 | h_2 ~ N(slope_1 h_2, ...), ..., h_L ~ N(0, 1)."""

    def __init__(self, slope: list[float], log_scale: list[float], n: int) -> None:
        nn.Module.__init__(self)
        self.slope, self.log_scale = rows(slope, n), rows(log_scale, n)

    def require_observable(self, x):
        """Every real number is."""

    def log_likelihood(self, x, latents):
        return normal(x[:, 0], self.slope[0] * latents[0][..., 0], self.log_scale[0])

    def log_prior(self, latents):
        h = [latent[..., 0] for latent in latents]
        log_p = -0.5 * h[-1] ** 2 - 0.5 * math.log(2 * math.pi)
        for level in range(1, len(h)):
            log_p = log_p + normal(h[level - 1], self.slope[level] * h[level], self.log_scale[level])
        return log_p

    def sample(self, n, noise):
        depth = len(self.slope)
        values = [noise.normal(depth, 1, n, 1)]
        for level in range(depth - 1, -1, -1):
            loc = self.slope[level][:, None] * values[0]
            values.insert(0, loc + self.log_scale[level][:, None].exp() * noise.normal(level, 1, n, 1))
        return tuple(values[1:]), values[0][0]

    def mean(self, latents):
        return self.slope[0][:, None] * latents[0]


class ScalarChainQ(InferenceChain):
    """h_1 | x ~ N(loc_0 + slope_0 x, exp(log_scale_0)^2), h_2 | h_1 ~ N(loc_1 + slope_1 h_1, ...), ..."""

    def __init__(self, loc: list[float], slope: list[float], log_scale: list[float], n: int) -> None:
        nn.Module.__init__(self)
        self.loc, self.slope, self.log_scale = rows(loc, n), rows(slope, n), rows(log_scale, n)

    def sample(self, x, k, noise):
        latents, log_q, given = [], 0, x[:, 0]
        for level in range(len(self.loc)):
            loc = self.loc[level] + self.slope[level] * given
            given = loc + self.log_scale[level].exp() * noise.normal(level + 1, k, x.shape[0], 1)[..., 0]
            log_q = log_q + normal(given, loc, self.log_scale[level])
            latents.append(given[..., None])
        return tuple(latents), log_q

    def forward(self, x, latents):
        log_q, given = 0, x[:, 0]
        for level, latent in enumerate(latents):
            h = latent[..., 0]
            log_q = log_q + normal(h, self.loc[level] + self.slope[level] * given, self.log_scale[level])
            given = h
        return log_q

    def posterior_means(self, x, draws, noise):
        raise NotImplementedError


@register_kl(ScalarChainQ, ScalarChainP)
def scalar_kl(q, p, x):
    assert len(q.loc) == 1
    loc, log_scale = q.loc[0] + q.slope[0] * x[:, 0], q.log_scale[0]
    return 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale)


X_A = 0.9
POSTERIOR_VARIANCE_A = 1 / (1 + 1.3**2 / 0.5)
POSTERIOR_MEAN_A = POSTERIOR_VARIANCE_A * 1.3 * X_A / 0.5
LOG_PX_A = -1.4958208120


def fixture_a(n: int, shift: float = 0.4, widen: float = 1.3) -> tuple[LatentVariableModel, Tensor]:
    """z ~ N(0, 1), x | z ~ N(1.3 z, 0.5), x = 0.9, q = N(posterior mean + shift, (widen posterior sd)^2)."""
    scale = widen * math.sqrt(POSTERIOR_VARIANCE_A)
    model = LatentVariableModel(
        ScalarChainP([1.3], [0.5 * math.log(0.5)], n),
        ScalarChainQ([POSTERIOR_MEAN_A + shift], [0.0], [math.log(scale)], n),
    )
    return model, torch.full((n, 1), X_A, dtype=torch.float64)


def chain_a() -> LatentVariableModel:
    """The same p, and a q that is the same at x = 0.9, as a model of the package."""
    model = LinearGaussianModel([1]).build((1,), np.zeros(1), torch.Generator()).double()
    values = {
        "generative.observation.linear.weight": 1.3,
        "generative.observation.log_scale": 0.5 * math.log(0.5),
        "inference.layers.0.linear.weight": POSTERIOR_VARIANCE_A * 1.3 / 0.5,
        "inference.layers.0.linear.bias": 0.4,
        "inference.layers.0.log_diagonal": math.log(1.3 * math.sqrt(POSTERIOR_VARIANCE_A)),
    }
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).fill_(value)
    return model


def quadrature(dimensions: int, points: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes (dimensions, n) of independent standard normals and their weights (n,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    weights = weights / weights.sum()
    grid = np.array(list(product(nodes, repeat=dimensions))).T
    volume = np.prod(np.array(list(product(weights, repeat=dimensions))), axis=1)
    return torch.from_numpy(grid), torch.from_numpy(volume)


def outcome_gradients(
    objective: Objective, model: LatentVariableModel, x: Tensor, noise: GivenNoise
) -> tuple[dict[str, Tensor], Tensor]:
    """The ascent direction that a training step would take for every row's parameters, and every row's bound."""
    n = x.shape[0]
    losses = objective.losses(model, x, model.draw(x, objective.num_samples, noise), noise)
    gradients = {}
    for loss, network, name in (
        (losses.generative, model.generative, "generative"),
        (losses.inference, model.inference, "inference"),
    ):
        parameters = dict(network.named_parameters())
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for key, gradient in zip(parameters, found, strict=True):
            gradients[f"{name}.{key}"] = -n * gradient
    return gradients, losses.bound


def expected_gradients(objective: Objective, points: int = 80, **q: float) -> tuple[dict[str, Tensor], Tensor]:
    """Expectation over the draws of Fixture A of the gradient estimate and of the bound, by quadrature."""
    nodes, weights = quadrature(objective.num_samples, points)
    model, x = fixture_a(weights.numel(), **q)
    noise = GivenNoise({1: nodes[..., None]})
    gradients, bound = outcome_gradients(objective, model, x, noise)
    return {name: g @ weights for name, g in gradients.items()}, bound @ weights
