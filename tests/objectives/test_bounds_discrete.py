"""The score-function objectives on the package's own discrete models, every tuple of draws enumerated."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from draws import built
from every_architecture import Categorical, SigmoidBeliefNetwork
from every_objective import REINFORCE, TVO, VIMCO
from torch import Tensor

from iwae_cli.core.interfaces import Particles
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective


def log_mean_exp(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))


BITS = [torch.tensor(list(product((0.0, 1.0), repeat=d)), dtype=torch.float64) for d in (2, 1)]
MODELS = {
    # Two stochastic layers: every pair of a state of h_1 and a state of h_2.
    "sbn": (SigmoidBeliefNetwork([2, 1]), [(a, b) for a in BITS[0] for b in BITS[1]]),
    "categorical": (Categorical(4), [(row,) for row in torch.eye(4, dtype=torch.float64)]),
}
NOISE = GeneratorNoise(generator("cpu", 0, "unused"), torch.float64)


def small_model(name: str) -> tuple[LatentVariableModel, Tensor, list[tuple[Tensor, ...]]]:
    architecture, states = MODELS[name]
    model = built(architecture, 3, seed=0, mean=np.array([0.3, 0.5, 0.8]), plus=0.5)
    return model, torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64), states


def particles_of(model: LatentVariableModel, x: Tensor, chosen: tuple[tuple[Tensor, ...], ...]) -> Particles:
    latents = tuple(torch.stack(layer)[:, None] for layer in zip(*chosen, strict=True))
    log_q = model.inference(x, latents)
    return Particles(latents, model.generative(x, latents), log_q, reparameterized=False, rescore=log_q.detach)


def gradients(model: LatentVariableModel, generative: Tensor, inference: Tensor) -> list[Tensor]:
    return [
        gradient
        for loss, network in ((generative, model.generative), (inference, model.inference))
        for gradient in torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("objective", "bound"),
    [
        *((VIMCO(2, baseline), log_mean_exp) for baseline in ("geometric", "arithmetic", "zero")),
        (VIMCO(3), log_mean_exp),
        *((objective, lambda log_w: log_w.mean(0)) for objective in (REINFORCE(2), REINFORCE(3))),
        (TVO(2, partitions=1, gradient="covariance"), lambda log_w: log_w.mean(0)),
    ],
    ids=["vimco", "arithmetic", "zero", "vimco3", "reinforce", "reinforce3", "tvo1"],
)
def test_the_expected_gradient_is_that_of_the_enumerated_bound(name: str, objective: Objective, bound) -> None:
    model, x, states = small_model(name)
    everything = particles_of(model, x, tuple(states))
    log_q, log_w = everything.log_q[:, 0], everything.log_w[:, 0]
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-12)
    value, reported = torch.zeros(2, dtype=torch.float64)
    expected: list[Tensor] | None = None
    for chosen in product(range(len(states)), repeat=objective.num_samples):
        index = torch.tensor(chosen)
        probability = log_q[index].sum().exp()
        value = value + probability * bound(log_w[index])
        losses = objective.losses(model, x, particles_of(model, x, tuple(states[i] for i in chosen)), NOISE)
        reported = reported + probability.detach() * losses.bound[0]
        found = [-probability.detach() * g for g in gradients(model, losses.generative, losses.inference)]
        expected = found if expected is None else [a + b for a, b in zip(expected, found, strict=True)]
    assert expected is not None and reported.item() == pytest.approx(value.item(), abs=1e-12)
    for estimate, truth in zip(expected, gradients(model, value, value), strict=True):
        torch.testing.assert_close(estimate, truth, rtol=0, atol=1e-12)
        assert truth.abs().max() > 1e-3
