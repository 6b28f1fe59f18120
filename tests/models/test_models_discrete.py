"""Discrete latents against plain loops over every state, written without the package."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from draws import built, noise
from every_architecture import Categorical, SigmoidBeliefNetwork
from scipy import stats
from torch import Tensor

from iwae_cli.core.noise import GeneratorNoise, KeyedNoise
from iwae_cli.models.base import Architecture, LatentVariableModel

PIXELS = 3
EVERY_X = torch.tensor(list(product([0, 1], repeat=PIXELS)), dtype=torch.float64)
ARCHITECTURES: dict[str, Architecture] = {
    "one layer": SigmoidBeliefNetwork([4]),
    "two layers": SigmoidBeliefNetwork([2, 2]),
    "three layers": SigmoidBeliefNetwork([2, 1, 3]),
    "categorical": Categorical(5),
}
every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))


def build(name: str) -> LatentVariableModel:
    return built(ARCHITECTURES[name], PIXELS, seed=0, mean=np.linspace(0.2, 0.7, PIXELS), plus=0.7)


def bernoulli(value: np.ndarray, logits: np.ndarray) -> float:
    probability = 1 / (1 + np.exp(-logits))
    return float(np.prod(np.where(value == 1, probability, 1 - probability)))


def linear(layer: torch.nn.Linear, value: np.ndarray) -> np.ndarray:
    return layer.weight.detach().numpy() @ value + layer.bias.detach().numpy()


def states(name: str) -> list[tuple[np.ndarray, ...]]:
    if name == "categorical":
        return [(row,) for row in np.eye(5)]
    sizes = ARCHITECTURES[name].latent_sizes  # type: ignore[attr-defined]
    layers = [[np.array(v, dtype=float) for v in product([0, 1], repeat=d)] for d in sizes]
    return list(product(*layers))


def p_joint(name: str, model: LatentVariableModel, x: np.ndarray, h: tuple[np.ndarray, ...]) -> float:
    p = model.generative
    logits = p.prior.logits.detach().numpy()
    if name == "categorical":
        prior = np.exp(logits) / np.exp(logits).sum()
        return float(prior @ h[0]) * bernoulli(x, linear(p.observation, h[0]))
    total = bernoulli(h[-1], logits)
    for layer, below, above in zip((p.observation, *p.layers), (x, *h[:-1]), h, strict=True):
        total *= bernoulli(below, linear(layer, above))
    return total


def q_of(name: str, model: LatentVariableModel, x: np.ndarray, h: tuple[np.ndarray, ...]) -> float:
    q = model.inference
    if name == "categorical":
        odds = np.exp(linear(q.layers[0], x))
        return float(odds @ h[0] / odds.sum())
    total = 1.0
    for layer, given, value in zip(q.layers, (x, *h[:-1]), h, strict=True):
        total *= bernoulli(value, linear(layer, given))
    return total


def as_latents(name: str) -> tuple[Tensor, ...]:
    """Every state as (states, 1, d_l)."""
    return tuple(torch.from_numpy(np.stack(layer))[:, None] for layer in zip(*states(name), strict=True))


@every_architecture
def test_densities_are_those_of_plain_loops(name: str) -> None:
    model = build(name)
    latents = tuple(h.expand(-1, len(EVERY_X), -1) for h in as_latents(name))
    log_p, log_q = (f(EVERY_X, latents).detach().numpy() for f in (model.generative, model.inference))
    for i, h in enumerate(states(name)):
        for j, x in enumerate(EVERY_X.numpy()):
            assert log_p[i, j] == pytest.approx(math.log(p_joint(name, model, x, h)), rel=1e-10)
            assert log_q[i, j] == pytest.approx(math.log(q_of(name, model, x, h)), rel=1e-10)


@every_architecture
def test_the_enumerated_log_px(name: str) -> None:
    model = build(name)
    exact = model.generative.exact_log_px(EVERY_X)
    assert exact is not None
    expected = [math.log(sum(p_joint(name, model, x, h) for h in states(name))) for x in EVERY_X.numpy()]
    np.testing.assert_allclose(exact.detach().numpy(), expected, rtol=1e-12)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-12)
    # It can be differentiated, and their sum is 1 for all weights.
    weights = list(model.generative.parameters())
    of_one, of_sum = (torch.autograd.grad(v, weights, retain_graph=True) for v in (exact[5], exact.exp().sum()))
    assert min(g.abs().max() for g in of_one) > 1e-3 and max(g.abs().max() for g in of_sum) < 1e-12


@every_architecture
def test_float32_weights_are_enumerated_in_float64(name: str) -> None:
    model = build(name).float()
    exact = model.generative.exact_log_px(EVERY_X.float())
    assert exact is not None
    assert exact.dtype == torch.float64
    expected = model.double().generative.exact_log_px(EVERY_X)
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=0)


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value; cells that expect fewer than five are taken together."""
    n = counts.sum()
    rare = probabilities * n < 5
    observed, expected = counts[~rare], probabilities[~rare] * n
    if rare.any():
        observed, expected = np.append(observed, counts[rare].sum()), np.append(expected, n - expected.sum())
    return float(stats.chisquare(observed, expected).pvalue)


def numbered(name: str, latents: tuple[Tensor, ...], x: Tensor) -> np.ndarray:
    """Index of (state, x) in ``states`` and ``EVERY_X``."""
    keys = {tuple(np.concatenate(h)): i for i, h in enumerate(states(name))}
    joined = torch.cat(latents, -1).reshape(-1, sum(h.shape[-1] for h in latents))
    found = np.array([keys[tuple(row)] for row in joined.numpy()])
    bits = (x.reshape(-1, PIXELS) @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long().numpy()
    return found * len(EVERY_X) + bits


@every_architecture
def test_p_and_q_draw_every_state_as_often_as_they_should(name: str) -> None:
    model, n, x = build(name), 20_000, EVERY_X[[6]]
    of_p = np.array([[p_joint(name, model, x, h) for x in EVERY_X.numpy()] for h in states(name)]).ravel()
    of_q = np.array([q_of(name, model, x[0].numpy(), h) for h in states(name)])
    with torch.no_grad():
        from_p = numbered(name, *model.generative.sample(n, noise()))
        latents, log_q = model.inference.sample(x, n, KeyedNoise(0, "t", [0], dtype=torch.float64))
    from_q = numbered(name, latents, x.expand(n, 1, -1)) // len(EVERY_X)
    np.testing.assert_allclose(log_q[:, 0].numpy(), np.log(of_q[from_q]), rtol=1e-9)
    counts = np.bincount(from_p, minlength=len(of_p))
    assert chi_square(counts, of_p) > 1e-3
    assert chi_square(np.bincount(from_q, minlength=len(of_q)), of_q) > 1e-3
    # The test can fail: the same counts against the states in another order.
    assert chi_square(counts, np.roll(of_p, 8)) < 1e-9


def test_a_categorical_q_can_be_the_exact_posterior() -> None:
    """T2 for discrete latents: log p(h|x) is linear in x, up to a constant; every log w is then log p(x)."""
    model = build("categorical")
    p, q = model.generative, model.inference
    weight, bias = p.observation.weight.detach(), p.observation.bias.detach()
    logits = weight.T + bias
    assert model(EVERY_X, 20, noise()).std(0).max() > 0.1
    with torch.no_grad():
        q.layers[0].weight.copy_(logits)
        q.layers[0].bias.copy_(torch.log_softmax(p.prior.logits, 0) + torch.log(torch.sigmoid(-logits)).sum(1))
    exact = p.exact_log_px(EVERY_X)
    torch.testing.assert_close(model(EVERY_X, 20, noise()), exact.expand(20, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sizes", "known"), [([14], True), ([7, 7], True), ([15], False), ([200, 200, 200], False)])
def test_enumeration_stops_where_it_says(sizes: list[int], known: bool) -> None:
    model = SigmoidBeliefNetwork(sizes).build((2,), np.full(2, 0.5), torch.Generator().manual_seed(0))
    exact = model.generative.exact_log_px(torch.zeros(1, 2))
    assert (exact is not None) == known


def test_many_states_are_enumerated_in_pieces() -> None:
    """2^12 states of the first layer are more than one piece; every x together has probability one."""
    draw = torch.Generator().manual_seed(0)
    model = SigmoidBeliefNetwork([12, 2]).build((PIXELS,), np.full(PIXELS, 0.3), draw).double()
    exact = model.generative.exact_log_px(EVERY_X)
    assert exact is not None
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_extreme_logits_stay_finite() -> None:
    for name in ARCHITECTURES:
        model = build(name).float()
        with torch.no_grad():
            for p in model.parameters():
                p *= 1e3
        particles = model.draw(EVERY_X.float(), 20, GeneratorNoise(torch.Generator().manual_seed(0)))
        assert particles.log_q.isfinite().all()
        assert particles.log_p.isfinite().all()
