"""Noise of a seed, observations that a model draws, binary images, and the split that holds them."""

from __future__ import annotations

import torch
from torch import Tensor

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.data.base import Split
from iwae_cli.models.base import LatentVariableModel


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
