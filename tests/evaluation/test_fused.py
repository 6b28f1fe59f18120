"""The fused log-weights equal those of the model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from draws import binary, built
from evaluations import evaluation
from every_architecture import GaussianMLP, LinearGaussianModel, SigmoidBeliefNetwork

from iwae_cli.core.device import Device
from iwae_cli.core.errors import UserError
from iwae_cli.core.noise import KeyedNoise
from iwae_cli.core.numerics import log_mean_exp
from iwae_cli.data.base import Split
from iwae_cli.evaluation.fused import FusedScorer, check_bf16
from iwae_cli.evaluation.likelihood import log_likelihood, summarize
from iwae_cli.models.base import Architecture, LatentVariableModel


def mlp(pixels: int, *sizes: Any, weights: float = 1.0) -> LatentVariableModel:
    """A model whose weights and biases all matter, its weights ``weights`` times the initial ones."""
    means = np.linspace(0.1, 0.9, pixels)
    return built(GaussianMLP(*sizes), pixels, torch.float32, mean=means, times=weights, plus=0.1)


SIZES = {
    "one layer": ([3], [[8, 7]]),
    "two layers": ([4, 3], [[8, 7], [6]]),
    "three layers": ([5, 4, 3], [[8], [7, 6], [5]]),
}


def both(
    model: LatentVariableModel, x: torch.Tensor, k: int, rows: int = 10_000, bf16: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log w by the model and by the fused way."""
    dtype = next(model.parameters()).dtype
    with torch.inference_mode():
        plain = model(x.to(dtype), k, KeyedNoise(0, "test", range(len(x)), 0, dtype))
        fast = FusedScorer(model, rows, bf16).log_weights(
            x.to(dtype), k, lambda images, start: KeyedNoise(0, "test", images, start, dtype), range(len(x))
        )
    return plain, fast


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("pixels", [1, 16, 50])  # groups of 16: mostly padding, none, some
def test_log_weights_are_those_of_the_model(name: str, pixels: int) -> None:
    model = mlp(pixels, *SIZES[name], weights=5.0).double()
    plain, fast = both(model, binary(5, pixels), 300, rows=128)
    assert plain.std() > 0.1
    torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-11)


def test_in_float32_they_differ_by_rounding() -> None:
    """The error of both against float64 on the same noise: the fused way is as good."""
    model, x = mlp(784, *SIZES["two layers"]), binary(5, 784)
    plain, fast = both(model, x, 300)
    exact, _ = both(model.double(), x, 300)
    assert fast.dtype == torch.float32
    error = (fast - exact).abs()
    assert error.max() < 4 * (plain - exact).abs().max() < 1e-6 * exact.abs().max() * 4
    assert (fast - exact).mean().abs() < 1e-7 * exact.abs().mean()


def test_bf16_errs_by_the_rounding_of_the_factors() -> None:
    """Eight bits of every weight and every tanh: visible in log w, and almost nothing in L_k."""
    model, x = mlp(784, *SIZES["two layers"]), binary(5, 784)
    exact, fast = both(model, x, 2000, bf16=True)
    assert fast.dtype == torch.float32
    assert (fast - exact).std() > 1e-3
    shift = log_mean_exp(fast.double()) - log_mean_exp(exact.double())
    assert shift.abs().max() < 2e-3 * exact.abs().mean()


def test_bf16_of_numbers_that_have_eight_bits_is_exact() -> None:
    """Weights of few bits, and every tanh -1 or 1, by steep slopes; products and sums then round nowhere."""
    model, x = mlp(48, [3], [[8]]), binary(5, 48)
    head, slope = model.generative.observation.head, model.generative.observation.body[0]
    with torch.no_grad():
        slope.weight.mul_(1e6)
        head.weight.copy_((head.weight * 16).round() / 16)
        head.bias.copy_((head.bias * 16).round() / 16)
    plain, fast = both(model, x, 200, bf16=True)
    assert plain.std() > 1
    # The rest is the rounding of log w itself, of some tens of nats, in float32.
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_out_of_range_are_taken_term_by_term(dtype: torch.dtype) -> None:
    """Logits of thousands on the wrong side: no product of probabilities is a number above zero."""
    model, x = mlp(50, [3], [[8]]).to(dtype), binary(4, 50)
    with torch.no_grad():
        for p in model.generative.parameters():
            p.mul_(2000)
    plain, fast = both(model, x, 100)
    assert (plain < -5000).any()
    torch.testing.assert_close(fast, plain, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=0)


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("k", "rows", "refined"), [(1, 64, False), (63, 5000, False), (700, 64, False), (200, 700, True)]
)
def test_results_do_not_depend_on_the_chunks(k: int, rows: int, refined: bool) -> None:
    model, x = mlp(9, *SIZES["two layers"]).double(), binary(18, 9)
    split = Split("test", x, "")
    plain = log_likelihood(model, split, k=k, seed=3, rows=2000, workers=1, plain=True, refined=refined)
    fast = log_likelihood(model, split, k=k, seed=3, rows=rows, workers=2, refined=refined)
    for name in ("log_px", "ess", "top_weight", "khat"):
        np.testing.assert_allclose(getattr(fast, name), getattr(plain, name), rtol=1e-9)
    assert list(fast.bounds) == list(plain.bounds)


@pytest.mark.parametrize(
    "other",
    [
        GaussianMLP([3], [[8]], likelihood="discretized_logistic"),
        GaussianMLP([3], [[8]], activation="relu"),
        LinearGaussianModel([2]),
        SigmoidBeliefNetwork([4]),
    ],
)
def test_other_models_are_left_to_the_plain_way(other: Architecture) -> None:
    assert FusedScorer.fits(mlp(9, [3], [[8]]), binary(3, 9))
    model = other.build((9,), np.full(9, 0.4), torch.Generator().manual_seed(1), levels=17).eval()
    assert not FusedScorer.fits(model, binary(3, 9))
    is_plain(model, binary(3, 9))


def is_plain(model: LatentVariableModel, x: torch.Tensor) -> None:
    split = Split("test", x, "")
    plain = log_likelihood(model, split, k=70, seed=0, rows=640, plain=True)
    assert np.array_equal(plain.log_px, log_likelihood(model, split, k=70, seed=0, rows=640).log_px)


def test_the_shift_of_bf16_is_measured_on_some_images() -> None:
    """Every second batch of eight: of 401 images the first eight, not the next, and so on."""
    model, x = mlp(9, [2], [[4]]), binary(401, 9)
    split = Split("test", x, "")
    rounded = log_likelihood(model, split, k=64, seed=0, rows=640, bf16=True)
    exact = log_likelihood(model, split, k=64, seed=0, rows=640)
    assert rounded.float32 is not None and exact.float32 is None
    both = np.arange(401) // 8 % 2 == 0
    assert np.array_equal(np.isnan(rounded.float32), ~both)
    np.testing.assert_allclose(rounded.float32[both], exact.log_px[both], rtol=1e-6)
    differences = exact.log_px - rounded.log_px
    assert (np.abs(differences) > 1e-5).mean() > 0.5
    summary, reasons = summarize(rounded, 9)
    assert not reasons
    assert summary["bf16_shift_images"] == both.sum() == 201
    assert summary["bf16_shift"] == pytest.approx(differences[both].mean(), abs=1e-6)
    assert summary["bf16_shift_stderr"] == pytest.approx(differences[both].std(ddof=1) / 201**0.5, rel=1e-2)
    assert not {key for key in summarize(exact, 9)[0] if "bf16" in key}


@pytest.mark.parametrize(
    ("model", "device", "fits"),
    [
        (GaussianMLP([2], [[4]]), Device("cpu"), True),
        (GaussianMLP([2], [[4]]), Device("cpu", "float64"), False),
        (GaussianMLP([2], [[4]], likelihood="discretized_logistic"), Device("cpu"), False),
        (LinearGaussianModel([2]), Device("cpu"), False),
    ],
)
@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_is_refused_before_any_work(
    model: Architecture, device: Device, fits: bool, has_instructions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iwae_cli.evaluation.fused.has_bf16", lambda: has_instructions)
    check_bf16(evaluation(), model, device)
    possible = fits and has_instructions
    with nullcontext() if possible else pytest.raises(UserError, match=r"evaluation\.precision=float32"):
        check_bf16(evaluation(precision="bf16"), model, device)
