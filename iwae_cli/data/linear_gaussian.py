"""Synthetic data whose density is known exactly: draws from a linear-Gaussian model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch.distributions import MultivariateNormal

from iwae_cli.core.errors import check_range
from iwae_cli.core.noise import numpy_generator
from iwae_cli.data.base import SPLITS, Data, Dataset

MAX_PIXELS = 10_000
"""Largest number of pixels or latents: the covariance of x is a dense matrix."""
MAX_OBSERVATIONS = 10_000_000
NOISE_STDS = (1e-4, 1e6)
"""Range of noise_std: below, the covariance is singular in float64; above, float32 holds nothing but the noise."""


@final
@dataclass(frozen=True)
class LinearGaussian(Dataset):
    """x = mean + W h + noise_std e with h ~ N(0, I), e ~ N(0, I) and fixed mean and W of standard normal entries.

    ``facts["generator_nll"]`` is the mean of -log N(x; mean, W W' + noise_std^2 I) over the test split, nats:
    a floor for the NLL of any model, up to chance.

    Args:
        pixels: size of x.
        latent_size: size of h.
        noise_std: standard deviation of the observation noise.
        n_train, n_validation, n_test: observations in each split; a longer split begins with the shorter one.
        seed: of the generator; not the seed of any run.

    Raises:
        ValueError: a number out of range.
    """

    name = "linear_gaussian"
    observation = "real"
    pixels: int = 10
    latent_size: int = 2
    noise_std: float = 0.5
    n_train: int = 2_000
    n_validation: int = 200
    n_test: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pixels", "latent_size"):
            check_range(name, getattr(self, name), 1, MAX_PIXELS)
        for name in ("n_train", "n_validation", "n_test"):
            check_range(name, getattr(self, name), 1, MAX_OBSERVATIONS)
        least, most = NOISE_STDS
        if not least <= self.noise_std <= most:
            raise ValueError(f"noise_std must be between {least:g} and {most:g}, got {self.noise_std:g}")
        check_range("seed", self.seed, 0)

    def parameters(self) -> tuple[Float[np.ndarray, " pixels"], Float[np.ndarray, "pixels latent_size"]]:
        """Return mean and W of the generator, float64."""
        draw = numpy_generator("linear_gaussian", self.seed, "parameters")
        return draw.standard_normal(self.pixels), draw.standard_normal((self.pixels, self.latent_size))

    def load(self) -> Data:
        """Return three drawn splits; no file is read."""
        mean, weight = self.parameters()
        covariance = weight @ weight.T + self.noise_std**2 * np.eye(self.pixels)
        density = MultivariateNormal(torch.from_numpy(mean), torch.from_numpy(covariance))
        train, validation, test = (torch.from_numpy(self._draw(name, mean, weight)) for name in SPLITS)
        facts = {"generator_nll": -float(density.log_prob(test.double()).mean())}
        protocol = (
            f"{self.n_train:,} training, {self.n_validation:,} validation and {self.n_test:,} test observations of "
            f"{self.pixels} real values, not binarized; synthetic, {self.latent_size} latents, "
            f"noise_std {self.noise_std:g}, generator seed {self.seed}"
        )
        return Data(self.name, protocol, train, validation, test, None, "none", (self.pixels,), facts)

    def _draw(self, split: str, mean: np.ndarray, weight: np.ndarray) -> Float[np.ndarray, "n pixels"]:
        draw = numpy_generator("linear_gaussian", self.seed, split)
        noise = draw.standard_normal((getattr(self, f"n_{split}"), self.latent_size + self.pixels))
        h, e = noise[:, : self.latent_size], noise[:, self.latent_size :]
        return np.asarray(mean + h @ weight.T + self.noise_std * e, dtype=np.float32)
