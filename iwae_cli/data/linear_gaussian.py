"""Synthetic data whose density is known exactly: draws from a linear-Gaussian model."""

from __future__ import annotations

import math
from typing import final

import numpy as np
import torch
from jaxtyping import Float

from iwae_cli.core.interfaces import Observation
from iwae_cli.core.noise import numpy_generator
from iwae_cli.data.base import SPLITS, Data, Dataset

MAX_PIXELS = 10_000
"""Largest number of pixels or latents: the covariance of x is a dense matrix."""
MAX_OBSERVATIONS = 10_000_000
NOISE_STDS = (1e-4, 1e6)
"""Range of noise_std: below, the covariance is singular in float64; above, float32 holds nothing but the noise."""


@final
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
        ValueError: a size outside 1 to ``MAX_PIXELS`` or ``MAX_OBSERVATIONS``, a negative seed, or a ``noise_std``
            outside ``NOISE_STDS``.
    """

    name = "linear_gaussian"
    observation: Observation = "real"

    def __init__(
        self,
        pixels: int = 10,
        latent_size: int = 2,
        noise_std: float = 0.5,
        n_train: int = 2_000,
        n_validation: int = 200,
        n_test: int = 500,
        seed: int = 0,
    ) -> None:
        sizes = {
            "pixels": pixels,
            "latent_size": latent_size,
            "n_train": n_train,
            "n_validation": n_validation,
            "n_test": n_test,
        }
        for argument, value in sizes.items():
            if value < 1:
                raise ValueError(f"{argument} must be >= 1, got {value}")
            most = MAX_OBSERVATIONS if argument.startswith("n_") else MAX_PIXELS
            if value > most:
                raise ValueError(f"{argument} must be <= {most:,}, got {value:,}")
        least, largest = NOISE_STDS
        if not least <= noise_std <= largest:
            raise ValueError(f"noise_std must be between {least:g} and {largest:g}, got {noise_std:g}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        self._pixels = pixels
        self._latent_size = latent_size
        self._noise_std = noise_std
        self._sizes = dict(zip(SPLITS, (n_train, n_validation, n_test), strict=True))
        self._seed = seed

    def parameters(self) -> tuple[Float[np.ndarray, " pixels"], Float[np.ndarray, "pixels latent_size"]]:
        """Return mean and W of the generator, float64."""
        draw = numpy_generator("linear_gaussian", self._seed, "parameters")
        return draw.standard_normal(self._pixels), draw.standard_normal((self._pixels, self._latent_size))

    def load(self) -> Data:
        """Return three drawn splits; no file is read."""
        mean, weight = self.parameters()
        splits = {name: torch.from_numpy(self._draw(name, mean, weight)) for name in SPLITS}
        return Data(
            name=self.name,
            protocol=(
                f"{self._sizes['train']:,} training, {self._sizes['validation']:,} validation and "
                f"{self._sizes['test']:,} test observations of {self._pixels} real values, not binarized; synthetic, "
                f"{self._latent_size} latents, noise_std {self._noise_std:g}, generator seed {self._seed}"
            ),
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            levels=None,
            binarization="none",
            image_shape=(self._pixels,),
            facts={"generator_nll": self._nll(splits["test"].numpy(), mean, weight)},
        )

    def _draw(self, split: str, mean: np.ndarray, weight: np.ndarray) -> Float[np.ndarray, "n pixels"]:
        draw = numpy_generator("linear_gaussian", self._seed, split)
        noise = draw.standard_normal((self._sizes[split], self._latent_size + self._pixels))
        h, e = noise[:, : self._latent_size], noise[:, self._latent_size :]
        return np.asarray(mean + h @ weight.T + self._noise_std * e, dtype=np.float32)

    def _nll(self, x: np.ndarray, mean: np.ndarray, weight: np.ndarray) -> float:
        covariance = weight @ weight.T + self._noise_std**2 * np.eye(self._pixels)
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, (x.astype(np.float64) - mean).T)
        log_det = 2 * np.log(np.diag(factor)).sum()
        return float(0.5 * ((white**2).sum(0).mean() + log_det + self._pixels * math.log(2 * math.pi)))
