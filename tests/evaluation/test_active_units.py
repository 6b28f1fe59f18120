"""Active units of models whose active units are known by construction."""

from __future__ import annotations

import math

import numpy as np
import torch
from every_architecture import GaussianMLP, LinearGaussianModel

from iwae_cli.evaluation.active_units import active_units
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import InferenceChain


def zeroed(model: LatentVariableModel) -> LatentVariableModel:
    """No unit is active: every location and log-scale of q is 0, and so q = N(0, I)."""
    with torch.no_grad():
        for p in model.inference.parameters():
            p.zero_()
    return model.double().eval()


def mlp(latent_sizes: list[int], hidden_sizes: list[list[int]], pixels: int = 6) -> LatentVariableModel:
    architecture = GaussianMLP(latent_sizes, hidden_sizes)
    return zeroed(architecture.build((pixels,), np.full(pixels, 0.5), torch.Generator().manual_seed(0)))


def linear(inference: InferenceChain, layer: int, index: int) -> torch.nn.Linear:
    """Matrix ``index`` of the network of one stochastic layer: its tanh layers, then location, then log-scale."""
    parts = [part for part in inference.layers[layer].modules() if isinstance(part, torch.nn.Linear)]
    return parts[index]


def counted(model: LatentVariableModel, x: torch.Tensor, draws: int = 500, **change: int) -> list[int]:
    arguments = {"seed": 0, "rows": 2000, "workers": 1} | change
    return active_units(model, x, draws=draws, stream="units", **arguments)  # type: ignore[arg-type]


def half_on(n: int = 40, pixels: int = 6) -> torch.Tensor:
    """Pixel 0 is on in every second image, all others in none."""
    x = torch.zeros(n, pixels, dtype=torch.uint8)
    x[::2, 0] = 1
    return x


def live(model: LatentVariableModel, unit: int, variance: float) -> None:
    """Let E_q[h_unit|x] be g or 0, each for half of the images: its variance is g^2 / 4, with n below it."""
    with torch.no_grad():
        linear(model.inference, 0, 0).weight[0, 0] = 1.0  # feature 0 = tanh(pixel 0)
        linear(model.inference, 0, 1).weight[unit, 0] = 2 * math.sqrt(variance) / math.tanh(1)


def test_units_whose_mean_does_not_move_are_not_active() -> None:
    model = mlp([5], [[4]])
    with torch.no_grad():
        linear(model.inference, 0, 1).bias.fill_(3.0)  # a mean that is not zero
        linear(model.inference, 0, 2).weight.fill_(1.0)  # a scale that follows x
    assert counted(model, half_on()) == [0]


def test_a_mean_that_is_not_finite_says_nothing_of_any_unit() -> None:
    model = mlp([5], [[4]])
    with torch.no_grad():
        linear(model.inference, 0, 0).weight[0, 0] = math.nan
    assert active_units(model, half_on(), draws=500, stream="units", seed=0, rows=2000, workers=1) is None


def test_the_limit_is_a_variance_of_a_hundredth_over_n() -> None:
    """With 4 images, n - 1 instead of n would turn a variance of .0099 into .0132."""
    model = mlp([3], [[4]])
    live(model, 0, 0.0101)
    live(model, 1, 0.0099)
    assert counted(model, half_on(4)) == [1]


def test_one_draw_sees_units_where_there_are_none() -> None:
    """h_1 ~ N(0, I) for every x, and mu_2 = tanh(h_1): E[h_2|x] is the same for every x, one draw of mu_2 is not.

    Var(tanh(h)) = .394, so 500 draws leave .0008 and one leaves .39.
    """
    model = mlp([4, 3], [[2], [4]])
    with torch.no_grad():
        linear(model.inference, 1, 0).weight.copy_(torch.eye(4))
        linear(model.inference, 1, 1).weight[:2, :2] = torch.eye(2)
    assert counted(model, half_on(200), draws=500) == [0, 0]
    assert counted(model, half_on(200), draws=1) == [0, 2]


def test_a_unit_of_the_second_layer_is_active_if_x_reaches_it() -> None:
    model = mlp([4, 3], [[2], [4]])
    live(model, 1, 4.0)
    with torch.no_grad():
        linear(model.inference, 1, 0).weight[0, 1] = 1.0
        linear(model.inference, 1, 1).weight[2, 0] = 1.0
    assert counted(model, half_on(), draws=500) == [1, 1]


def test_a_linear_gaussian_chain_needs_no_draws() -> None:
    model = zeroed(LinearGaussianModel([3, 2]).build((6,), np.zeros(6), torch.Generator().manual_seed(0)))
    first, second = (layer.linear.weight for layer in model.inference.layers)
    with torch.no_grad():
        first[0, 0], first[1, 0] = 1.0, 0.1  # variances 1/4 and 1/400
        second[1, 0] = 1.0
    assert counted(model, half_on().float(), draws=1) == [1, 1] == counted(model, half_on().float(), draws=500)


def test_neither_rows_nor_workers_matter() -> None:
    torch.manual_seed(0)
    model = mlp([4, 3], [[5], [4]])
    with torch.no_grad():
        for p in model.inference.parameters():
            p.normal_()
    x = (torch.rand(60, 6) < 0.5).to(torch.uint8)
    reference = counted(model, x, draws=10)
    assert sum(reference) > 0
    for rows, workers in ((64, 2), (100, 1)):
        assert counted(model, x, draws=10, rows=rows, workers=workers) == reference
