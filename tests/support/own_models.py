"""A user's own package: priors, a model whose networks share parameters, pictures in colour."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from iwae_cli.data.base import Data, Dataset
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import Networks
from iwae_cli.models.conditionals import Conditional
from iwae_cli.models.networks import normal_log_prob
from iwae_cli.models.priors import Prior


class MixturePrior(Prior):
    """A mixture of Gaussians with learned weights, locations and scales."""

    def __init__(self, components: int) -> None:
        if components < 1:
            raise ValueError(f"components must be >= 1, got {components}")
        self.components = components

    def build(self, size):
        return Mixture(self.components, size)


class Mixture(Conditional):
    """sum_c pi_c N(loc_c, diag(scale_c)^2)."""

    def __init__(self, components: int, size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.zeros(components, size))
        self.log_scale = nn.Parameter(torch.zeros(components, size))

    def initialize(self, generator):
        nn.init.normal_(self.loc, generator=generator)

    def sample(self, given, k, batch, level, noise):
        below = torch.softmax(self.logits, 0).cumsum(0)[:-1]
        chosen = (noise.uniform(level, k, batch, 1) >= below).sum(-1)
        h = self.loc[chosen] + self.log_scale[chosen].exp() * noise.normal(level, k, batch, self.loc.shape[1])
        return h, self.log_prob(h, None)

    def log_prob(self, h, given):
        each = normal_log_prob(h[..., None, :], self.loc, self.log_scale)
        return torch.logsumexp(torch.log_softmax(self.logits, 0) + each, -1)

    def mean(self, given):
        return torch.softmax(self.logits, 0) @ self.loc


class Vamp(Mixture):
    """The VampPrior (Tomczak and Welling 2018, arXiv 1705.07120): components are q at learned inputs."""

    def __init__(self, q: Conditional, pixels: int, components: int) -> None:
        nn.Module.__init__(self)
        self.q = q
        self.inputs = nn.Parameter(torch.rand(components, pixels))

    @property
    def logits(self):
        return self.inputs.new_zeros(len(self.inputs))

    @property
    def loc(self):
        return self.q(self.inputs)[0]

    @property
    def log_scale(self):
        return self.q(self.inputs)[1]

    def initialize(self, generator):
        nn.init.uniform_(self.inputs, generator=generator)


class VampMLP(GaussianMLP):
    """A Gaussian model of one layer whose prior shares the parameters of q."""

    def networks(self, image_shape, mean, levels):
        made: Networks = super().networks(image_shape, mean, levels)
        made.generative.prior = Vamp(made.inference.layers[0], len(mean), 4)
        return made


class Colours(Dataset):
    """Pictures in three colours, each pixel 0 or 1."""

    name = "colours"
    observation = "binary"

    def __init__(self, height: int = 4, width: int = 8) -> None:
        self.shape = (3, height, width)

    def load(self) -> Data:
        x = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (60, math.prod(self.shape)), dtype=np.uint8))
        return Data(
            name="colours",
            protocol="60 drawn pictures",
            train=x[:40],
            validation=x[40:50],
            test=x[50:],
            levels=2,
            binarization="fixed",
            image_shape=self.shape,
        )
