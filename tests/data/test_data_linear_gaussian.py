"""The synthetic data, against scipy's multivariate normal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from iwae_cli.data.linear_gaussian import LinearGaussian


@pytest.mark.parametrize(("pixels", "latent_size", "noise_std"), [(10, 2, 0.5), (3, 5, 1.7), (1, 1, 0.1)])
def test_the_generators_own_nll_is_exact(pixels: int, latent_size: int, noise_std: float) -> None:
    made = LinearGaussian(pixels=pixels, latent_size=latent_size, noise_std=noise_std, seed=4)
    data = made.load()
    mean, weight = made.parameters()
    law = multivariate_normal(mean, weight @ weight.T + noise_std**2 * np.eye(pixels))
    nll = -law.logpdf(data.test.double().numpy()).mean()
    assert data.facts["generator_nll"] == pytest.approx(nll, rel=1e-12)
    assert json.loads(json.dumps(data.facts)) == data.facts
    # The draws follow that law: the mean of -log p is its entropy, up to 5 standard errors (variance of a chi2 / 4).
    train = -law.logpdf(data.train.double().numpy()).mean()
    assert train == pytest.approx(law.entropy(), abs=5 * math.sqrt(pixels / 2 / len(data.train)))


def test_sizes_and_facts_of_the_protocol() -> None:
    data = LinearGaussian(pixels=3, n_train=30, n_validation=20, n_test=10).load()
    assert [tuple(x.shape) for x in (data.train, data.validation, data.test)] == [(30, 3), (20, 3), (10, 3)]
    assert {x.dtype for x in (data.train, data.validation, data.test)} == {torch.float32}
    assert (data.levels, data.binarization, data.image_shape) == (None, "none", (3,))
    assert LinearGaussian.observation == "real"
    assert "30 training, 20 validation and 10 test" in data.protocol


def test_splits_are_independent_of_each_others_size_and_keyed_by_the_seed() -> None:
    one, other = LinearGaussian(n_train=30).load(), LinearGaussian(n_train=60, n_test=700).load()
    assert torch.equal(one.train, other.train[:30])
    assert torch.equal(one.test, other.test[:500])
    assert not torch.equal(one.train, one.test[:30])
    assert not torch.equal(one.train, LinearGaussian(n_train=30, seed=1).load().train)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *((size, 0, "must be >= 1, got 0") for size in ("pixels", "latent_size", "n_train", "n_validation", "n_test")),
        *(("noise_std", std, "must be between 0.0001 and 1e") for std in (0.0, -1.0, math.nan, math.inf)),
        ("seed", -1, "must be >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} {message}"):
        LinearGaussian(**{argument: value})
