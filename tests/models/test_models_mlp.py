"""The paper's networks: their sizes, and densities that integrate to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from every_architecture import GaussianConvolutional, GaussianMLP
from torch import Tensor

from iwae_cli.config.build import build as build_node
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.data.base import Split
from iwae_cli.evaluation.likelihood import log_likelihood, summarize
from iwae_cli.models.base import Architecture, LatentVariableModel

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"


def from_yaml(name: str) -> Architecture:
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    architecture = build_node(node, Architecture, "model")
    assert isinstance(architecture, Architecture)
    return architecture


def count(*sizes: int) -> int:
    """Parameters of linear layers of these sizes, with biases."""
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes))


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("name", "theta", "phi"),
    [
        # 784-200-200-(50) with two heads, and (50)-200-200-784.
        ("one_layer", count(50, 200, 200, 784), count(784, 200, 200, 50) + count(200, 50)),
        # 784-200-200-(100)-100-100-(50), and (50)-100-100-(100)-200-200-784.
        (
            "two_layer",
            count(50, 100, 100, 100) + count(100, 100) + count(100, 200, 200, 784),
            count(784, 200, 200, 100) + count(200, 100) + count(100, 100, 100, 50) + count(100, 50),
        ),
        # Learned logits of the top layer, then linear layers.
        ("sbn_200_200_200", 200 + count(200, 200, 200, 784), count(784, 200, 200, 200)),
        ("discrete", 10 + count(10, 784), count(784, 10)),
        ("categorical", 20 + count(20, 784), count(784, 20)),
        # 28x28 -> 32 of 14x14 -> 64 of 7x7 -> 256; the last transposed convolution has a bias for every pixel.
        (
            "conv",
            count(50, 256, 64 * 49) + (64 * 16 * 32 + 32) + 32 * 16 + 784,
            (16 * 32 + 32) + (32 * 16 * 64 + 64) + count(64 * 49, 256, 50) + count(256, 50),
        ),
    ],
)
def test_presets_have_the_sizes_of_their_papers(name: str, theta: int, phi: int) -> None:
    model = from_yaml(name).build((28, 28), np.full(784, 0.1), generator("cpu", 0))
    assert (parameters(model.generative), parameters(model.inference)) == (theta, phi)
    if name == "one_layer":
        assert theta + phi == 425_284


def test_every_preset_is_constructed_and_scores() -> None:
    names = sorted(path.stem for path in CONF.glob("*.yaml"))
    assert {"one_layer", "two_layer", "conv", "discrete", "categorical", "linear_gaussian"} <= set(names)
    for name in names:
        architecture = from_yaml(name)
        model = architecture.build((8, 8), np.full(64, 0.5), generator("cpu", 0))
        log_w = model(torch.zeros(2, 64), 3, GeneratorNoise(generator("cpu", 1)))
        assert log_w.shape == (3, 2)
        assert log_w.isfinite().all(), name


def test_the_layers_are_where_the_paper_puts_them() -> None:
    """784-200-200-(100)-100-100-(50): the order of the sizes, which their sum does not show."""
    model = GaussianMLP([4, 2], [[8, 7], [6, 5]]).build((10,), np.full(10, 0.5), generator("cpu", 0))
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters() if k.endswith("weight")}
    upwards = [v for k, v in shapes.items() if k.startswith("inference")]
    assert upwards == [(8, 10), (7, 8), (4, 7), (4, 7), (6, 4), (5, 6), (2, 5), (2, 5)]
    downwards = [v for k, v in shapes.items() if k.startswith("generative.layers")]
    assert downwards == [(5, 2), (6, 5), (4, 6), (4, 6)]
    assert [v for k, v in shapes.items() if k.startswith("generative.observation")] == [(7, 4), (8, 7), (10, 8)]
    activations = [type(m).__name__ for m in model.modules() if not list(m.children())]
    assert set(activations) == {"Linear", "Tanh", "StandardNormal"}


# --- densities integrate to one -------------------------------------------------------------------------------------


def wild(architecture: Architecture, image_shape: tuple[int, ...], levels: int | None = None) -> LatentVariableModel:
    draw = torch.Generator().manual_seed(0)
    mean = np.full(math.prod(image_shape), 0.4)
    model = architecture.build(image_shape, mean, draw, levels).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        for module in model.modules():
            # Scales around 1, which a grid can resolve and contain.
            if hasattr(module, "log_scale"):
                module.log_scale.weight *= 0.2
                module.log_scale.bias *= 0.2
    return model.eval()


def grid(layers: int, points: int = 240, reach: float = 12.0) -> tuple[tuple[Tensor, ...], float]:
    """All points of a rectangular grid as latents of shape (points^layers, 1, 1), and the log of a cell's size."""
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    mesh = torch.meshgrid(*[axis] * layers, indexing="ij")
    return tuple(m.reshape(-1, 1, 1) for m in mesh), layers * math.log(2 * reach / (points - 1))


def integral(log_density: Tensor, log_cell: float) -> Tensor:
    return torch.logsumexp(log_density, 0) + log_cell


GAUSSIAN = {
    "one layer": (GaussianMLP([1], [[4, 3]]), (3,), 2),
    "two layers": (GaussianMLP([1, 1], [[4], [3]]), (3,), 2),
    "grey": (GaussianMLP([1, 1], [[4], [3]], likelihood="discretized_logistic"), (2,), 4),
}


@pytest.mark.parametrize("name", list(GAUSSIAN))
def test_p_and_q_integrate_to_one(name: str) -> None:
    """Sum over every x and integral over h of p(x, h); integral of q(h|x) for every x."""
    architecture, shape, levels = GAUSSIAN[name]
    model = wild(architecture, shape, levels)
    latents, log_cell = grid(architecture.layers)
    every_x = torch.tensor(list(product(range(levels), repeat=shape[0])), dtype=torch.float64)
    wide = tuple(h.expand(-1, len(every_x), 1) for h in latents)
    with torch.no_grad():
        log_px = integral(model.generative(every_x, wide), log_cell)
        assert log_px.exp().sum().item() == pytest.approx(1, abs=1e-8)
        assert log_px.std() > 0.1
        q = integral(model.inference(every_x, wide), log_cell).exp()
        torch.testing.assert_close(q, torch.ones_like(q), rtol=0, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
def test_the_convolutional_q_integrates_to_one(likelihood: str) -> None:
    model = wild(GaussianConvolutional(1, [2, 2], 3, likelihood=likelihood), (4, 4), 3)  # type: ignore[arg-type]
    latents, log_cell = grid(1)
    x = torch.randint(3 if likelihood == "discretized_logistic" else 2, (5, 16)).double()
    with torch.no_grad():
        q = integral(model.inference(x, (latents[0].expand(-1, 5, 1),)), log_cell).exp()
    torch.testing.assert_close(q, torch.ones_like(q), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list(GAUSSIAN))
def test_the_estimate_agrees_with_quadrature(name: str) -> None:
    architecture, shape, levels = GAUSSIAN[name]
    model = wild(architecture, shape, levels)
    latents, log_cell = grid(architecture.layers)
    with torch.no_grad():
        _, x = model.generative.sample(30, GeneratorNoise(torch.Generator().manual_seed(2), torch.float64))
        exact = integral(model.generative(x, tuple(h.expand(-1, 30, 1) for h in latents)), log_cell)
        # Weights against a q that is too narrow have no finite variance, and then no error to hold this against.
        for layer in model.inference.layers:
            layer.loc.weight *= 0.3
            layer.log_scale.weight *= 0.3
            layer.log_scale.bias.fill_(0.5)
    likelihood = log_likelihood(model, Split("test", x, ""), k=5000, seed=0, rows=4000, workers=1)
    summary, _ = summarize(likelihood, len(x[0]))
    assert summary["ess_min"] > 30
    difference = abs(summary["nll"] + exact.mean().item())
    assert difference < 3 * summary["stderr_mc"] + 2 * abs(summary["bias_mc"])
    assert summary["stderr_mc"] < 0.02


@dataclass(eq=False)
class WithOneMore(GaussianMLP):
    extra: int = 1


def test_the_arguments_of_a_class_that_adds_one_can_be_checked() -> None:
    # This module does not know the names in the annotations of the base class.
    assert {"activation", "prior", "extra"} <= get_type_hints(WithOneMore.__init__).keys()
