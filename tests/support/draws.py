"""Models with drawn weights, noise of a seed, observations that a model draws, and the split that holds them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.data.base import Split
from iwae_cli.models.architectures.discrete import SigmoidBeliefNetwork
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import Architecture, LatentVariableModel


def built(
    architecture: Architecture,
    shape: int | tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 1,
    mean: float | np.ndarray = 0.4,
    times: float = 1.0,
    plus: float = 0.0,
) -> LatentVariableModel:
    """A model, its weights ``times`` the initial ones and then ``plus`` standard normal numbers, in evaluation mode."""
    random = torch.Generator().manual_seed(seed)
    shape = (shape,) if isinstance(shape, int) else shape
    means = np.broadcast_to(np.asarray(mean, dtype=float), math.prod(shape)).copy()
    model = architecture.build(shape, means, random, levels=17).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(times)
            if plus:
                p.add_(plus * torch.randn(p.shape, generator=random, dtype=dtype))
    return model.eval()


def linear_gaussian(*latent_sizes: int) -> LatentVariableModel:
    """A chain whose posteriors are well away from the prior."""
    model = built(LinearGaussianModel(list(latent_sizes)), 4, mean=0.0)
    with torch.no_grad():
        for layer in (model.generative.observation, *model.generative.layers):
            layer.log_scale.fill_(-0.7)
    return model


def sigmoid_belief_network() -> LatentVariableModel:
    """Two layers of bits, few enough to enumerate; weights so large that bits depend on one another."""
    model = built(SigmoidBeliefNetwork([3, 2]), 6)
    with torch.no_grad():
        for layer in (model.generative.observation, *model.generative.layers):
            layer.weight.mul_(6)
    return model


def posterior(model: LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, (n, d), and precision, (d, d), of p(h|x) in a linear-Gaussian model of one layer."""
    layer = model.generative.observation
    scaled = layer.linear.weight * (-2 * layer.log_scale).exp()[:, None]
    precision = torch.eye(scaled.shape[1], dtype=x.dtype) + layer.linear.weight.T @ scaled
    return torch.linalg.solve(precision, ((x - layer.linear.bias) @ scaled).T).T, precision


def make_exact(model: LatentVariableModel) -> None:
    """Let q, linear with a full covariance, be that posterior."""
    q, pixels = model.inference.layers[0], len(model.generative.observation.linear.bias)
    with torch.no_grad():
        at_zero, precision = posterior(model, torch.zeros(1, pixels, dtype=torch.float64))
        at_units, _ = posterior(model, torch.eye(pixels, dtype=torch.float64))
        cholesky = torch.linalg.cholesky(torch.linalg.inv(precision))
        q.linear.weight.copy_((at_units - at_zero).T)
        q.linear.bias.copy_(at_zero[0])
        q.log_diagonal.copy_(cholesky.diagonal().log())
        q.below_diagonal.copy_(cholesky.tril(-1))


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(seed), dtype)


def drawn(model: LatentVariableModel, n: int) -> Tensor:
    """(n, pixels) from p(x)."""
    with torch.no_grad():
        return model.generative.sample(n, noise(7))[1]


def binary(n: int, pixels: int = 9) -> Tensor:
    """(n, pixels) of 0 and 1."""
    return (torch.rand(n, pixels, generator=torch.Generator().manual_seed(2)) < 0.4).to(torch.uint8)


def split_of(x: Tensor) -> Split:
    return Split("test", x, "")
