"""The jackknife of an evaluation: against its definition by leaving out, and against an exact log p(x)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluations import evaluation

from iwae_cli.core.noise import KeyedNoise
from iwae_cli.data.base import Split
from iwae_cli.evaluation.likelihood import log_likelihood, summarize
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import LatentVariableModel


@pytest.fixture
def model() -> LatentVariableModel:
    """q is the prior, so that L_8 has a bias of some tenths of a nat."""
    generator = torch.Generator().manual_seed(3)
    model = LinearGaussianModel([2]).build((3,), np.zeros(3), generator).double().eval()
    with torch.no_grad():
        model.inference.layers[0].linear.weight.zero_()
    return model


def test_it_is_k_bounds_less_the_mean_of_those_that_leave_one_out(model: LatentVariableModel) -> None:
    k, x = 70, torch.randn(5, 3, dtype=torch.float64)
    found = log_likelihood(model, Split("test", x, ""), k=k, seed=4, rows=64, with_jackknife=True)
    with torch.no_grad():
        log_w = model(x, k, KeyedNoise(4, "test", range(5), 0, torch.float64))
    without = [torch.cat([log_w[:j], log_w[j + 1 :]]).logsumexp(0) - math.log(k - 1) for j in range(k)]
    expected = k * (log_w.logsumexp(0) - math.log(k)) - (k - 1) * torch.stack(without).mean(0)
    assert found.jackknife == pytest.approx(expected.numpy(), abs=1e-9)


def test_a_missing_value_is_null_with_the_reason(model: LatentVariableModel) -> None:
    x = torch.full((1, 3), 60.0, dtype=torch.float64)
    found = log_likelihood(model, Split("test", x, ""), k=64, seed=4, rows=64, with_jackknife=True)
    assert found.jackknife is not None
    found.jackknife[0] = math.nan
    numbers, reasons = summarize(found, 3)
    assert numbers["nll_jackknife"] is None
    assert "one weight is larger than all others together" in reasons["nll_jackknife"]


def test_it_needs_two_samples_and_is_off_unless_asked_for(model: LatentVariableModel) -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    assert log_likelihood(model, Split("test", x, ""), k=8, seed=4, rows=64).jackknife is None
    with pytest.raises(ValueError, match="jackknife needs k >= 2, got k=1"):
        evaluation(k=1, jackknife=True)
