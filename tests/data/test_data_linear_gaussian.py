"""The synthetic data, against scipy's multivariate normal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from iwae_cli.data.linear_gaussian import LinearGaussian


@pytest.mark.parametrize(("pixels", "latent_size", "noise_std"), [(10, 2, 0.5), (3, 5, 1.7)])
def test_the_generators_own_nll_is_exact(pixels: int, latent_size: int, noise_std: float) -> None:
    made = LinearGaussian(pixels=pixels, latent_size=latent_size, noise_std=noise_std, seed=4)
    data = made.load()
    mean, weight = made.parameters()
    law = multivariate_normal(mean, weight @ weight.T + noise_std**2 * np.eye(pixels))
    nll = -law.logpdf(data.test.double().numpy()).mean()
    assert data.facts["generator_nll"] == pytest.approx(nll, rel=1e-12)
    assert json.loads(json.dumps(data.facts)) == data.facts
    assert (data.levels, data.binarization, data.image_shape) == (None, "none", (pixels,))
    # The draws follow that law: the mean of -log p is its entropy, up to 5 standard errors (variance of a chi2 / 4).
    train = -law.logpdf(data.train.double().numpy()).mean()
    assert train == pytest.approx(law.entropy(), abs=5 * math.sqrt(pixels / 2 / len(data.train)))


def test_splits_are_independent_of_each_others_size_and_keyed_by_the_seed() -> None:
    one, other = LinearGaussian(n_train=30).load(), LinearGaussian(n_train=60, n_test=700).load()
    assert torch.equal(one.train, other.train[:30])
    assert torch.equal(one.test, other.test[:500])
    assert not torch.equal(one.train, one.test[:30])
    assert not torch.equal(one.train, LinearGaussian(n_train=30, seed=1).load().train)


@pytest.mark.parametrize(
    ("argument", "value"), [("pixels", 0), ("latent_size", 0), ("n_test", 0), ("noise_std", math.nan), ("seed", -1)]
)
def test_wrong_arguments_are_named(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        LinearGaussian(**{argument: value})
