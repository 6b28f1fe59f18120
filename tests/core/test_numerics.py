"""Functions of log-weights against direct computations, known distributions and exact properties."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from iwae_cli.core.noise import BLOCK
from iwae_cli.core.numerics import (
    StreamingLogWeights,
    effective_sample_size,
    grid_levels,
    log_mean_exp,
    normalized_weights,
    pareto_khat,
    tail_size,
)

INF = math.inf


def normal_log_w(k: int, batch: int, scale: float, seed: int = 0) -> Tensor:
    return scale * torch.randn(k, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- log-mean-exp ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 700.0, -800.0])
def test_log_mean_exp_is_stable_at_any_offset(shift: float) -> None:
    log_w = normal_log_w(7, 3, 2.0)
    expected = special.logsumexp(log_w.numpy(), axis=0) - math.log(7) + shift
    np.testing.assert_allclose(log_mean_exp(log_w + shift).numpy(), expected, rtol=1e-14, atol=1e-11)


@pytest.mark.parametrize(
    ("values", "expected", "gradient"),
    [
        ([0.0, -INF], math.log(0.5), [1, 0]),
        ([1e4, 0.0], 1e4 - math.log(2), [1, 0]),
        ([1e4, 1e4], 1e4, [0.5, 0.5]),
        ([-1e4, -INF], -1e4 - math.log(2), [1, 0]),
        ([-1e4, -1e4], -1e4, [0.5, 0.5]),
        ([-INF, -INF], -INF, [0, 0]),
        ([1e300, -1e300], 1e300, [1, 0]),
        ([math.log(3), 0.0], math.log(2), [0.75, 0.25]),
        ([5.0], 5.0, [1]),
        ([-INF], -INF, [0]),
    ],
)
def test_extreme_weights_have_their_value_and_gradient(
    values: list[float], expected: float, gradient: list[float]
) -> None:
    # The other image of the batch is not affected.
    log_w = torch.tensor([values, [2.0] * len(values)], dtype=torch.float64).T.requires_grad_()
    bound = log_mean_exp(log_w)
    assert bound.tolist() == pytest.approx([expected, 2.0], rel=1e-15)
    (found,) = torch.autograd.grad(bound.sum(), log_w)
    torch.testing.assert_close(found[:, 0], torch.tensor(gradient, dtype=torch.float64))
    torch.testing.assert_close(found[:, 1], torch.full_like(found[:, 1], 1 / len(values)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([math.nan, 0.0], math.nan), ([math.nan, INF], math.nan), ([INF, 0.0], INF), ([INF, -INF], INF), ([INF], INF)],
)
def test_nan_and_infinite_weights_propagate(values: list[float], expected: float) -> None:
    # The other image of the batch is not affected.
    log_w = torch.stack([torch.tensor(values), torch.zeros(len(values))], dim=1)
    found = log_mean_exp(log_w)
    assert found[0].item() == pytest.approx(expected, nan_ok=True)
    assert found[1] == 0


def test_log_mean_exp_has_the_gradient_of_finite_differences() -> None:
    log_w = normal_log_w(4, 2, 3.0).requires_grad_()
    assert torch.autograd.gradcheck(log_mean_exp, log_w)
    assert torch.autograd.gradgradcheck(log_mean_exp, log_w)


# --- normalized weights and effective sample size -------------------------------------------------------------------


def test_normalized_weights_are_a_softmax_also_of_zero_weights() -> None:
    log_w = torch.tensor([[0.0, -INF, 1e4], [math.log(3), -INF, -INF]], dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.5, 1.0], [0.75, 0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(normalized_weights(log_w), expected)
    assert normalized_weights(torch.tensor([[math.nan], [0.0]])).isnan().all()


@pytest.mark.parametrize(
    ("weights", "expected"), [([1, 1, 1, 1], 4), ([1, 0, 0, 0], 1), ([1, 1, 0, 0], 2), ([3, 1], 16 / 10), ([7], 1)]
)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_effective_sample_size(weights: list[float], expected: float, shift: float) -> None:
    log_w = torch.tensor(weights, dtype=torch.float64).log()[:, None] + shift
    assert effective_sample_size(log_w).item() == pytest.approx(expected, rel=1e-11)


# --- levels ---------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_the_papers_that_divide_k() -> None:
    for k in (*range(1, 2001), 5000):
        levels = grid_levels(k)
        assert levels == sorted({k} | {m for m in (1, 5, 50, 500) if m <= k and k % m == 0})
        assert all(b % a == 0 for a, b in pairwise(levels)), (k, levels)
    with pytest.raises(ValueError) as refusal:
        grid_levels(0)
    assert str(refusal.value) == "k must be >= 1, got 0"


# --- streaming ------------------------------------------------------------------------------------------------------


def stream(log_w: Tensor, cut: list[int], block: int = BLOCK) -> dict[str, Tensor]:
    streaming = StreamingLogWeights(log_w.shape[0], log_w.shape[1], block=block)
    for piece in log_w.split(cut):
        streaming.add(piece)
    results = {f"L_{m}": bound for m, bound in streaming.bounds().items()}
    results |= {"log_px": streaming.log_px(), "ess": streaming.ess()}
    return results | {"khat": streaming.khat(), "top": streaming.top_weight()}


def cuts(k: int) -> list[list[int]]:
    blocks, rest = divmod(k, BLOCK)
    rng = np.random.default_rng(0)
    found = [[k], [BLOCK] * blocks + [rest] * (rest > 0)]
    for _ in range(5):
        sizes: list[int] = []
        while sum(sizes) < blocks:
            sizes.append(int(rng.integers(1, blocks - sum(sizes) + 1)))
        found.append([s * BLOCK for s in sizes] + [rest] * (rest > 0))
    return found


@pytest.mark.parametrize("k", [500, 640, 5000])
def test_any_cut_gives_the_same_bits(k: int) -> None:
    log_w = normal_log_w(k, 4, 3.0) - 90
    one, *others = (stream(log_w, cut) for cut in cuts(k))
    assert len(one) == len(grid_levels(k)) + 4
    for other in others:
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("k", [1, 50, 64, 500, 5000])
@pytest.mark.parametrize("shift", [0.0, -5e3, 5e3])
def test_streaming_equals_the_direct_computation(k: int, shift: float) -> None:
    log_w = normal_log_w(k, 3, 2.5, seed=k)
    found = stream(log_w + shift, cuts(k)[-1] if k > BLOCK else [k])
    values = log_w.numpy()
    for m in grid_levels(k):
        groups = special.logsumexp(values.reshape(k // m, m, 3), axis=1) - math.log(m)
        np.testing.assert_allclose(found[f"L_{m}"].numpy(), groups.mean(0) + shift, rtol=1e-13, atol=1e-10)
    weights = special.softmax(values, axis=0)
    np.testing.assert_allclose(found["ess"].numpy(), 1 / (weights**2).sum(0), rtol=1e-8)
    np.testing.assert_allclose(found["top"].numpy(), weights.max(0), rtol=1e-8)
    largest = torch.from_numpy(-np.sort(-values, axis=0)[: tail_size(k) + 1])
    torch.testing.assert_close(found["khat"], pareto_khat(largest), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_float32_pieces_are_summed_in_float64() -> None:
    log_w = normal_log_w(5000, 2, 3.0).float()
    found = stream(log_w, [512] * 9 + [392])
    expected = special.logsumexp(log_w.double().numpy(), axis=0) - math.log(5000)
    assert found["log_px"].dtype == torch.float64
    np.testing.assert_allclose(found["log_px"].numpy(), expected, rtol=1e-14)


def test_streaming_of_zero_and_nan_weights() -> None:
    log_w = torch.zeros(128, 4, dtype=torch.float64)
    log_w[1:, 0] = -INF
    log_w[:, 1] = -INF
    log_w[5, 2] = math.nan
    found = stream(log_w, [64, 64])
    assert found["log_px"][0].item() == pytest.approx(-math.log(128))
    assert found["L_1"][0] == -INF
    assert found["ess"][0].item() == pytest.approx(1)
    assert found["top"][0].item() == pytest.approx(1)
    assert found["log_px"][1] == -INF
    assert found["log_px"][2].isnan()
    assert found["ess"][2].isnan()
    assert found["log_px"][3] == 0
    assert found["ess"][3].item() == pytest.approx(128)
    # A single weight is the heaviest tail; zero, NaN and equal weights have no tail.
    assert found["khat"][0] > 1
    assert found["khat"][1:].isnan().all()


def test_wrong_pieces_are_refused() -> None:
    streaming = StreamingLogWeights(100, 1, block=64)
    with pytest.raises(ValueError, match="0 of 100 samples"):
        streaming.log_px()
    with pytest.raises(ValueError, match="log_w must not exceed 100 samples, got 128"):
        streaming.add(torch.zeros(128, 1))
    streaming.add(torch.zeros(10, 1))
    with pytest.raises(ValueError, match="pieces must start at multiples of 64 samples, got 10"):
        streaming.add(torch.zeros(10, 1))


# --- Pareto k-hat ---------------------------------------------------------------------------------------------------


def zhang_stephens(x: np.ndarray) -> float:
    """Zhang and Stephens 2009 (Technometrics 51, 316-325), section 3, with 30 + sqrt(n) points for 20 + sqrt(n).

    In their parametrization X ~ GPD(k, sigma), F(x) = 1 - (1 - k x / sigma)^(1/k), theta = k / sigma, so that the
    shape of today's parametrization is -k. The profile likelihood is taken from scipy's density, the weights from
    their formula 1 / sum_i exp(l_i - l_j), the quartile by its definition.
    """
    x = np.sort(x)
    n = len(x)
    m = 30 + math.floor(math.sqrt(n))
    quartile = x[math.floor(n / 4 + 0.5) - 1]
    theta = np.array([1 / x[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * quartile) for j in range(1, m + 1)])

    def their_k(t: float) -> float:
        return float(-np.log(1 - t * x).mean())

    profile = np.array([stats.genpareto.logpdf(x, -their_k(t), scale=their_k(t) / t).sum() for t in theta])
    weights = np.array([1 / np.exp(profile - profile[j]).sum() for j in range(m)])
    shape = -their_k(float((theta * weights).sum()))
    # The weak prior of Vehtari et al. (2024), appendix: worth 10 observations at 0.5.
    return (n * shape + 10 * 0.5) / (n + 10)


def largest_log_weights(exceedances: np.ndarray, threshold: float = 1.0) -> Tensor:
    weights = np.append(np.sort(exceedances)[::-1] + threshold, threshold)
    return torch.from_numpy(np.log(weights))[:, None]


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.2, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("m", [5, 40, 212])
def test_khat_is_the_estimate_of_zhang_and_stephens(shape: float, m: int) -> None:
    x = stats.genpareto.rvs(shape, size=m, random_state=np.random.default_rng(m))
    assert pareto_khat(largest_log_weights(x)).item() == pytest.approx(zhang_stephens(x), abs=1e-7)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.2, 0.5, 0.7, 1.0, 2.0])
def test_khat_finds_the_shape_of_known_samples(shape: float) -> None:
    m, columns = 2000, 20
    rng = np.random.default_rng(1)
    x = stats.genpareto.rvs(shape, scale=0.7, size=(columns, m), random_state=rng)
    found = pareto_khat(torch.cat([largest_log_weights(row) for row in x], dim=1))
    # The asymptotic sd of the shape is (1 + shape) / sqrt(m); the prior pulls by 10 / m at most.
    error = (1 + max(shape, 0)) / math.sqrt(m)
    assert found.mean().item() == pytest.approx(shape, abs=4 * error / math.sqrt(columns) + 0.01)
    assert 0.5 * error < found.std().item() < 2 * error


def test_khat_is_nan_where_there_is_nothing_to_fit() -> None:
    assert pareto_khat(torch.full((40, 2), -88.0)).isnan().all()
    assert pareto_khat(torch.tensor([[3.0], [2.0], [1.0], [0.5], [0.0]])).isnan().all()  # four above the threshold
    assert not pareto_khat(torch.tensor([[3.0], [2.0], [1.0], [0.5], [0.2], [0.0]])).isnan().any()
    # Undefined columns leave the others alone.
    x = stats.genpareto.rvs(0.6, size=39, random_state=np.random.default_rng(0))
    good = largest_log_weights(x)
    bad = torch.stack([torch.full((40,), 1.0), torch.full((40,), -INF), torch.full((40,), math.nan)], dim=1)
    found = pareto_khat(torch.cat([bad, good], dim=1).to(torch.float64))
    assert found[:3].isnan().all()
    torch.testing.assert_close(found[3:], pareto_khat(good), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rounding", [0, 2e-6])
@pytest.mark.parametrize(("ties", "scale"), [(5, 1), (11, 1), (30, 1), (37, 1), (11, 9), (30, 9)])
def test_khat_is_that_of_the_weights_above_ties(ties: int, scale: float, rounding: float) -> None:
    """A fit to the ties gives shapes up to 400 for bounded weights. With ``scale`` 9 the tail is heavy indeed."""
    distinct = scale * torch.linspace(3, 1, 40 - ties, dtype=torch.float64)
    rounded = rounding * torch.linspace(1, 0, ties, dtype=torch.float64)
    khat = pareto_khat(torch.cat([distinct, rounded])[:, None])
    alone = pareto_khat(torch.cat([distinct, rounded[:1]])[:, None])
    if ties > 10:
        assert torch.equal(khat, alone) or (khat.isnan() and ties == 37)
    assert khat.isnan() if ties == 37 else (khat > 0.7 if scale == 9 else khat < 0.3)


def test_khat_of_weights_that_underflow_is_that_of_a_heavy_tail() -> None:
    assert pareto_khat(torch.linspace(0, -30_000, 40, dtype=torch.float64)[:, None]) > 0.7


@pytest.mark.parametrize(("k", "size"), [(1, 0), (24, 4), (25, 5), (225, 45), (500, 67), (5000, 212)])
def test_tail_size(k: int, size: int) -> None:
    assert tail_size(k) == size
