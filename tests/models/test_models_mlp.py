"""The paper's networks: their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from every_architecture import GaussianMLP

from iwae_cli.config.build import build as build_node
from iwae_cli.core.noise import generator
from iwae_cli.models.base import Architecture

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


@dataclass(eq=False)
class WithOneMore(GaussianMLP):
    extra: int = 1


def test_the_arguments_of_a_class_that_adds_one_can_be_checked() -> None:
    # This module does not know the names in the annotations of the base class.
    assert {"activation", "prior", "extra"} <= get_type_hints(WithOneMore.__init__).keys()
