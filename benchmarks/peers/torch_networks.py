"""Networks of plain torch for the peers that want some, with parameters named as in ours."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.cases import SIZES

PIXELS = 784


def tanh_layers(*sizes: int) -> nn.Sequential:
    """Linear layers, each followed by tanh."""
    return nn.Sequential(*[part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())])


class Conditional(nn.Module):
    """Location and log-scale of a diagonal Gaussian."""

    def __init__(self, inputs: int, hidden: list[int], outputs: int) -> None:
        super().__init__()
        self.body = tanh_layers(inputs, *hidden)
        self.loc = nn.Linear(hidden[-1], outputs)
        self.log_scale = nn.Linear(hidden[-1], outputs)

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """Both, (..., outputs)."""
        features = self.body(given)
        return self.loc(features), self.log_scale(features)


class Logits(nn.Module):
    """Logits of the pixels."""

    def __init__(self, inputs: int, hidden: list[int]) -> None:
        super().__init__()
        self.body = tanh_layers(inputs, *hidden)
        self.head = nn.Linear(hidden[-1], PIXELS)

    def forward(self, given: Tensor) -> Tensor:
        """(..., pixels)."""
        logits: Tensor = self.head(self.body(given))
        return logits


class Generative(nn.Module):
    """What ``generative.*`` names in ours."""

    def __init__(self, model: str) -> None:
        super().__init__()
        latent, hidden = SIZES[model]
        self.observation = Logits(latent[0], hidden[0][::-1])
        self.layers = nn.ModuleList(
            Conditional(above, sizes[::-1], below)
            for (below, above), sizes in zip(pairwise(latent), hidden[1:], strict=True)
        )


class Inference(nn.Module):
    """What ``inference.*`` names in ours."""

    def __init__(self, model: str) -> None:
        super().__init__()
        latent, hidden = SIZES[model]
        self.layers = nn.ModuleList(
            Conditional(below, sizes, above)
            for (below, above), sizes in zip(pairwise([PIXELS, *latent]), hidden, strict=True)
        )


def binarized(images: Tensor, white: float) -> Tensor:
    """Return redrawn pixels, float32."""
    return (torch.rand(images.shape) * white < images).float()
