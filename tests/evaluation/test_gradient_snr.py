"""Signal-to-noise ratios against gradients of a known distribution, and against the slopes of the theory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import evaluation
from every_architecture import GaussianMLP, LinearGaussianModel
from objective_toys import chain_a
from torch import Tensor

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.data.linear_gaussian import LinearGaussian
from iwae_cli.evaluation.estimator import EstimatorInput
from iwae_cli.evaluation.gradient_snr import GradientSNR, gradient_snr
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Losses, Objective
from iwae_cli.objectives.iwae import IWAE
from iwae_cli.record.summary import decimals, table_of


class Known(Objective):
    """A gradient of signal + noise N(0, I) for every parameter of p, and of the signal alone for those of q."""

    num_samples = 1

    def __init__(self, signal: list[float]) -> None:
        self.signal = signal

    def bound(self, log_w: Tensor) -> Tensor:
        return log_w[0]

    def losses(self, model: Any, x: Tensor, particles: Any, noise: Any) -> Losses:
        theta = torch.cat([p.flatten() for p in model.generative.parameters()])
        phi = torch.cat([p.flatten() for p in model.inference.parameters()])
        signal = torch.tensor(self.signal, dtype=theta.dtype).repeat(len(theta))[: len(theta)]
        random = noise.normal(0, 1, 1, len(theta))[0, 0]
        return Losses((theta * (signal + random)).sum(), phi.sum(), particles.log_w[0].detach())


def fixture(pixels: int, latents: int, copies: int) -> tuple[LatentVariableModel, Tensor]:
    model = LinearGaussianModel([latents]).build((pixels,), np.zeros(pixels), torch.Generator().manual_seed(3)).double()
    _, x = model.generative.sample(1, GeneratorNoise(torch.Generator().manual_seed(4), torch.float64))
    return model, x.detach().expand(copies, -1)


def test_the_ratio_of_known_gradients() -> None:
    """Half of the parameters at 0.5, a quarter each at 0.3 and 0.9: the median lies at 0.5."""
    model, x = fixture(30, 5, 1)
    found = gradient_snr(model, Known([0.5, 0.3, 0.5, 0.9]), x, draws=500, seed=0)["generative"]
    n = found.parameters
    assert n == 30 * 5 + 30 + 30 == sum(p.numel() for p in model.generative.parameters())
    assert found.floor == pytest.approx(0.7979 / math.sqrt(500), rel=1e-3)
    assert found.per_parameter == pytest.approx(0.5, abs=0.02)
    # |g_par| is near |mean| = sqrt(0.35 n), |g_perp| near sqrt(n - 1).
    assert found.directional == pytest.approx(math.sqrt(0.35 * n / (n - 1)), rel=0.05)
    assert found.directional_floor == pytest.approx(0.8 / math.sqrt(n), rel=0.15)


@pytest.mark.parametrize("objective", [Known([0.5, 0.3, 0.5, 0.9]), IWAE(4)], ids=["independent", "correlated"])
def test_the_errors_are_the_spread_over_other_draws(objective: Objective) -> None:
    model, x = fixture(6, 2, 4)
    found = [gradient_snr(model, objective, x, draws=40, seed=seed)["generative"] for seed in range(30)]
    for key in ("per_parameter", "directional"):
        spread = np.std([getattr(one, key) for one in found], ddof=1)
        stated = np.sqrt(np.mean([getattr(one, f"{key}_stderr") ** 2 for one in found]))
        # 30 seeds know the spread within 13%.
        assert stated == pytest.approx(spread, rel=0.35), key


def test_the_error_of_the_slope_is_its_spread_over_other_draws() -> None:
    slopes, stated = [], []
    for seed in range(16):
        chosen = subject(seed=seed)
        numbers = GradientSNR(ks=[1, 4], draws=30, images=10).estimate(chosen, lambda: None).numbers["gradient_snr"]
        slopes.append(numbers["generative"]["slope"])
        stated.append(numbers["generative"]["slope_stderr"])
    # 16 seeds know the spread within 18%.
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(np.std(slopes, ddof=1), rel=0.45)


def test_a_single_ratio_is_debiased() -> None:
    """With 50 draws mean^2/variance is 1/50 too large; over many parameters the debiased one is right."""
    model, x = fixture(60, 30, 1)
    ratios = [
        gradient_snr(model, Known([0.2]), x, draws=50, seed=seed)["generative"].per_parameter for seed in range(10)
    ]
    # Median of a noncentral chi-squared of one degree of freedom (0.2^2 * 50 = 2), divided by 50, less 1/50.
    sample = np.random.default_rng(0).standard_normal(400_000) + math.sqrt(2)
    expected = math.sqrt(np.median(sample**2) / 50 - 1 / 50)
    assert np.mean(ratios) == pytest.approx(expected, rel=0.06)
    assert expected < 0.19 < math.sqrt(np.median(sample**2) / 50)


def test_a_gradient_without_noise_has_no_ratio() -> None:
    model, x = fixture(4, 2, 1)
    found = gradient_snr(model, Known([1.0]), x, draws=20, seed=0)["inference"]
    assert found.parameters == 0
    assert math.isnan(found.per_parameter) and math.isnan(found.directional)


@pytest.mark.parametrize(
    ("gradient", "network", "slope", "copies", "ks", "one_copy"),
    [
        ("total", "inference", -0.5, 256, [4, 16, 64], [0.25, 0.126, 0.055]),
        ("dreg", "inference", 0.5, 16, [4, 16, 64], [1.5, 2.95, 6.0]),
        ("total", "generative", 0.5, 16, [32, 128, 512], None),
    ],
)
def test_slopes_over_k(
    gradient: Any, network: str, slope: float, copies: int, ks: list[int], one_copy: list[float] | None
) -> None:
    """Rainforth et al. 2018, theorem 1, and Tucker et al. 2019 (arXiv 1810.04152) for DReG.

    The values are known for one observation; n copies of it have a ratio sqrt(n) times larger.
    """
    model, x = chain_a(), torch.full((copies, 1), 0.9, dtype=torch.float64)
    ratios = [gradient_snr(model, IWAE(k, gradient), x, draws=100, seed=k)[network].per_parameter for k in ks]
    found = np.polyfit(np.log(ks), np.log(ratios), 1)[0]
    assert found == pytest.approx(slope, abs=0.15), ratios
    if one_copy is not None:
        assert ratios == pytest.approx([math.sqrt(copies) * ratio for ratio in one_copy], rel=0.2)


def test_a_mixture_takes_its_components_in_turn_as_in_training() -> None:
    class Recording(Known):
        """It keeps the draws."""

        num_samples = 6

        def losses(self, model: Any, x: Tensor, particles: Any, noise: Any) -> Losses:
            drawn.append(particles.latents[0].detach())
            return super().losses(model, x, particles, noise)

    drawn: list[Tensor] = []
    architecture = GaussianMLP([2], [[4]], posterior="mixture", posterior_size=3)
    model = architecture.build((4,), np.full(4, 0.4), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, p in model.inference.named_parameters():
            p.zero_()
            if name.endswith("loc.bias"):
                p.copy_(torch.tensor([-50.0, -50, 0, 0, 50, 50]))
    gradient_snr(model, Recording([1.0]), torch.zeros(2, 4), draws=8, seed=0)
    in_turn = torch.tensor([-50.0, 0.0, 50.0]).repeat(2)[:, None, None].expand(6, 2, 2)
    assert len(drawn) == 8
    for h in drawn:
        torch.testing.assert_close((h / 50).round() * 50, in_turn)
    assert not model.training and not model.inference.training


def subject(**changed: Any) -> EstimatorInput:
    data = LinearGaussian(pixels=3, n_train=50).load()
    model, _ = fixture(3, 2, 1)
    return EstimatorInput(model.float(), data, evaluation(**changed), IWAE)


def test_the_report() -> None:
    chosen = GradientSNR(ks=[1, 4, 16], draws=60, images=30)
    found = chosen.estimate(subject(), lambda: None)
    numbers = found.numbers["gradient_snr"]
    assert (numbers["images"], numbers["draws"]) == (30, 60)
    assert numbers["floor"] == pytest.approx(0.7979 / math.sqrt(60), rel=1e-3)
    assert numbers["inference"]["1"]["per_parameter"] > numbers["floor"]
    assert numbers["generative"]["slope"] is not None
    nulls = [
        f"{name}.{k}.{key}"
        for name in ("inference", "generative")
        for k in ("1", "4", "16")
        for key, value in numbers[name][k].items()
        if value is None
    ]
    nulls += [f"{name}.slope" for name in ("inference", "generative") if numbers[name]["slope"] is None]
    assert sorted(found.reasons) == sorted(nulls)
    columns, lines = table_of({**found.numbers, "rows": found.rows})
    assert columns == ["inference", "generative"] and len(lines) == 3 * 5 + 2
    error = numbers["inference"]["1"]["per_parameter_stderr"]
    assert lines["  other draws: stderr, k = 1"][0] == f"± {error:.{decimals(error)}f}"
    assert lines["k = 1"][0] == f"{numbers['inference']['1']['per_parameter']:.{decimals(error)}f}"
    assert (
        found.notes[0] == "of the gradients of IWAE, gradient=total"
        and "60 draws a ratio below 0.103" in found.notes[1]
    )


def test_a_gradient_that_varies_in_few_draws_has_no_error() -> None:
    class Rare(Known):
        """One draw of all differs."""

        def losses(self, model: Any, x: Tensor, particles: Any, noise: Any) -> Losses:
            self.calls = getattr(self, "calls", 0) + 1
            theta = torch.cat([p.flatten() for p in model.generative.parameters()])
            phi = torch.cat([p.flatten() for p in model.inference.parameters()])
            return Losses((theta * (1 + (self.calls == 7))).sum(), phi.sum(), particles.log_w[0].detach())

    chosen = subject()
    rare = EstimatorInput(chosen.model, chosen.data, chosen.evaluation, lambda k: Rare([1.0]))
    found = GradientSNR(ks=[1, 2], draws=40).estimate(rare, lambda: None)
    numbers = found.numbers["gradient_snr"]["generative"]
    assert numbers["1"]["per_parameter"] > 1 and numbers["1"]["per_parameter_stderr"] is None
    assert found.reasons["generative.1.per_parameter_stderr"] == "in half of the draws no gradient varies"
    assert found.reasons["generative.slope_stderr"] == "half of the draws have no ratio, or 0"


def test_a_ratio_below_the_floor_is_null_with_its_reason() -> None:
    chosen = subject()
    silent = EstimatorInput(chosen.model, chosen.data, chosen.evaluation, lambda k: Known([0.0]))
    found = GradientSNR(ks=[1, 2], draws=100).estimate(silent, lambda: None)
    assert found.numbers["gradient_snr"]["generative"]["1"]["per_parameter"] is None
    assert "below the floor of 0.080 of 100 draws" in found.reasons["generative.1.per_parameter"]
    assert found.numbers["gradient_snr"]["generative"]["slope"] is None
