"""One step of training against the same step written out by hand, and what must hold for every model and objective."""

from __future__ import annotations

import copy
import math

import draws
import pytest
import torch
from every_architecture import GaussianMLP, LinearGaussianModel
from every_objective import ELBO, IWAE

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.training.steps.plain import PlainStep

MODELS = {
    "one layer": GaussianMLP([3], [[5, 4]]),
    "two layers": GaussianMLP([3, 2], [[5], [4]]),
    "three layers": GaussianMLP([4, 3, 2], [[5], [4], [4]]),
    "linear-Gaussian": LinearGaussianModel([2]),
    "linear-Gaussian chain": LinearGaussianModel([3, 2]),
}
OBJECTIVES = {f"{kind.__name__} {g}": kind(k=3, gradient=g) for kind in (ELBO, IWAE) for g in ("total", "stl", "dreg")}
LR = 0.01
K, BATCH, PIXELS = 3, 4, 6


def built(architecture: Architecture) -> LatentVariableModel:
    return draws.built(architecture, PIXELS, seed=3, mean=0.3).train()


def noise() -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(5), torch.float64)


@pytest.fixture
def x() -> torch.Tensor:
    return (torch.rand(BATCH, PIXELS) < 0.5).double()


def log_mean_exp(log_w: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(log_w, 0) - math.log(K)


def by_hand(model: LatentVariableModel, objective: str, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of minus the bound for every parameter, from the formulas, with torch.autograd.grad; and the bound."""
    frozen = copy.deepcopy(model.inference)  # its parameters are other tensors, so none of q's weights gets a gradient
    latents, log_q = model.inference.sample(x, K, noise())
    log_p = model.generative(x, latents)
    path = log_p - frozen(x, latents)
    kind, gradient = objective.split()
    bound = (log_p - log_q).mean(0) if kind == "ELBO" else log_mean_exp(log_p - log_q)
    equal = torch.full((K, BATCH), 1 / K, dtype=torch.float64)
    w = equal if kind == "ELBO" else (log_p - log_q).detach().softmax(0)
    squared = w if kind == "ELBO" else w**2  # Tucker et al. 2019, equation 8
    surrogate = {
        "total": (bound, bound),
        "stl": ((w * log_p).sum(0), (w * path).sum(0)),
        "dreg": ((w * log_p).sum(0), (squared * path).sum(0)),
    }[gradient]
    gradients = []
    for network, value in zip((model.generative, model.inference), surrogate, strict=True):
        gradients += torch.autograd.grad(-value.mean(), list(network.parameters()), retain_graph=True)
    return gradients, bound.detach()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_is_the_one_written_out(model: str, objective: str, x: torch.Tensor) -> None:
    trained, untouched = built(MODELS[model]), built(MODELS[model])
    optimizer = torch.optim.SGD(trained.parameters(), lr=LR)
    for _ in range(2):  # twice: gradients do not add up over steps
        gradients, expected = by_hand(untouched, objective, x)
        with torch.no_grad():
            parameters = [*untouched.generative.parameters(), *untouched.inference.parameters()]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= LR * gradient
        bound = PlainStep(trained, OBJECTIVES[objective], optimizer)(x, noise())
        torch.testing.assert_close(bound, expected, rtol=1e-12, atol=0)
        assert not bound.requires_grad
    before = built(MODELS[model]).parameters()
    for (name, parameter), other, begun in zip(trained.named_parameters(), untouched.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-12, atol=1e-14, msg=name)
        assert not torch.equal(parameter, begun), f"{name} is not trained (T12)"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_layer_that_does_not_train_stays_and_the_others_move(objective: str, x: torch.Tensor) -> None:
    model = built(MODELS["two layers"])
    model.inference.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    PlainStep(model, OBJECTIVES[objective], torch.optim.SGD(trained, lr=LR))(x, noise())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
