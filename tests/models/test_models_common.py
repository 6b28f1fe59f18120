"""Properties of every model: densities of its own draws, separate gradients of theta and phi, initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draws import noise
from every_architecture import (
    Categorical,
    GaussianConvolutional,
    GaussianMLP,
    LinearGaussianModel,
    SigmoidBeliefNetwork,
)
from torch import Tensor, nn

from iwae_cli.core.interfaces import Model
from iwae_cli.core.noise import GeneratorNoise, KeyedNoise
from iwae_cli.models.base import Architecture, LatentVariableModel, Networks
from iwae_cli.models.chain import MEAN_DRAWS, InferenceChain
from iwae_cli.models.conditionals import GaussianConditional, LinearConditional

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Case:
    architecture: Architecture
    image_shape: tuple[int, ...]
    latent_sizes: list[int]
    levels: int | None = None

    @property
    def pixels(self) -> int:
        return math.prod(self.image_shape)

    def mean(self) -> np.ndarray:
        """Return the mean of the training split, in the units of x."""
        white = self.levels - 1 if self.architecture.observation == "grey" and self.levels else 1
        return white * np.linspace(0.1, 0.8, self.pixels)

    def build(self, seed: int = 0, spread: float = 0.3) -> LatentVariableModel:
        """Return the model in float64, away from the initial weights, whose zeros would hide faults."""
        generator = torch.Generator().manual_seed(seed)
        model = self.architecture.build(self.image_shape, self.mean(), generator, self.levels).double()
        with torch.no_grad():
            for p in model.parameters():
                p += spread * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        return model

    def x(self, batch: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        match self.architecture.observation:
            case "binary":
                return torch.randint(2, (batch, self.pixels), generator=generator).double()
            case "grey":
                assert self.levels
                return torch.randint(self.levels, (batch, self.pixels), generator=generator).double()
        return torch.randn(batch, self.pixels, generator=generator, dtype=torch.float64)


CASES = {
    "one layer": Case(GaussianMLP([3], [[7, 5]]), (3, 2), [3]),
    "three layers": Case(GaussianMLP([4, 3, 2], [[7], [6], [5]]), (3, 2), [4, 3, 2]),
    "grey": Case(GaussianMLP([4, 2], [[7], [6]], likelihood="discretized_logistic"), (2, 2), [4, 2], levels=5),
    "linear gaussian chain": Case(LinearGaussianModel([3, 2]), (5,), [3, 2]),
    "conv": Case(GaussianConvolutional(3, [2, 3], 6), (4, 4), [3]),
    "conv grey colour": Case(
        GaussianConvolutional(3, [2, 3], 6, likelihood="discretized_logistic"), (3, 4, 8), [3], levels=5
    ),
    "full": Case(GaussianMLP([3], [[7]], posterior="full"), (3, 2), [3]),
    "full, two layers": Case(GaussianMLP([4, 3], [[7], [6]], posterior="full"), (3, 2), [4, 3]),
    "real": Case(GaussianMLP([3], [[7]], likelihood="gaussian"), (3, 2), [3]),
    "coupling, two layers": Case(GaussianMLP([4, 3], [[7], [6]], posterior="coupling"), (3, 2), [4, 3]),
    "mixture, two layers": Case(GaussianMLP([4, 3], [[7], [6]], posterior="mixture"), (3, 2), [4, 3]),
    "mixture prior, gated": Case(
        GaussianMLP([4, 3], [[7], [6]], prior="mixture", activation="gated", prior_components=3), (3, 2), [4, 3]
    ),
    "vamp": Case(GaussianMLP([3], [[7]], prior="vamp", prior_components=3), (3, 2), [3]),
    "conv, coupling": Case(GaussianConvolutional(3, [2, 3], 6, posterior="coupling"), (4, 4), [3]),
    "discrete, three layers": Case(SigmoidBeliefNetwork([4, 3, 2]), (3, 2), [4, 3, 2]),
    "categorical": Case(Categorical(4), (3, 2), [4]),
}
DISCRETE = {"discrete, three layers", "categorical"}
every_model = pytest.mark.parametrize("name", list(CASES))


def test_every_architecture_is_among_the_cases() -> None:
    modules = {type(case.architecture).__module__.rpartition(".")[2] for case in CASES.values()}
    assert modules == {path.stem for path in (ROOT / "iwae_cli/models/architectures").glob("*.py")} - {"__init__"}


@every_model
def test_shapes_and_structure(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    assert isinstance(model, Model)
    assert case.architecture.layers == len(case.latent_sizes)
    assert case.architecture.discrete == (name in DISCRETE) != model.inference.reparameterized
    particles = model.draw(case.x(4), 6, noise())
    assert [tuple(h.shape) for h in particles.latents] == [(6, 4, d) for d in case.latent_sizes]
    assert particles.log_p.shape == particles.log_q.shape == particles.log_w.shape == (6, 4)
    assert particles.log_w.isfinite().all()
    latents, x = model.generative.sample(9, noise())
    assert [tuple(h.shape) for h in latents] == [(1, 9, d) for d in case.latent_sizes]
    assert x.shape == (9, case.pixels)
    assert model.generative.mean(latents).shape == (1, 9, case.pixels)


@every_model
def test_log_q_of_a_draw_is_its_density(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    x = case.x(4)
    particles = model.draw(x, 6, noise())
    torch.testing.assert_close(model.inference(x, particles.latents), particles.log_q, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(particles.rescore(), particles.log_q, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(particles.log_w_frozen, particles.log_w, rtol=1e-11, atol=1e-11)
    log_p = model.generative.log_likelihood(x, particles.latents) + model.generative.log_prior(particles.latents)
    torch.testing.assert_close(particles.log_p, log_p)
    torch.testing.assert_close(model(x, 6, noise()), particles.log_w)
    # One sample of one image has the same scores alone.
    alone = tuple(h[2:3, 1:2] for h in particles.latents)
    for network, scores in ((model.generative, particles.log_p), (model.inference, particles.log_q)):
        assert network(x[1:2], alone).item() == pytest.approx(scores[2, 1].item(), rel=1e-10)


def largest_z(network: nn.Module, evaluate: Callable[[int], Tensor], batches: int = 60) -> float:
    """Return the largest |mean / standard error| over batches of the gradient of every parameter."""
    parameters = list(network.parameters())
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(evaluate(seed).mean(), parameters)])
        for seed in range(batches)
    ]
    mean, error = torch.stack(gradients).mean(0), torch.stack(gradients).std(0) / math.sqrt(batches)
    return (mean[error > 0] / error[error > 0]).abs().max().item()


@every_model
def test_p_and_q_draw_what_they_score(name: str) -> None:
    """E[d/dtheta log p(x, h)] = 0 over draws of p itself and not of another p; the same for log q(h|x) with h fixed."""
    case = CASES[name]
    model, other = case.build(), case.build(seed=5)
    x = case.x(5)

    def p_score(sampler: LatentVariableModel, seed: int) -> Tensor:
        with torch.no_grad():
            latents, drawn = sampler.generative.sample(200, noise(seed))
        return model.generative(drawn, latents)

    def q_score(sampler: LatentVariableModel, seed: int) -> Tensor:
        with torch.no_grad():
            latents, _ = sampler.inference.sample(x, 40, noise(seed))
        return model.inference(x, latents)

    for network, score in ((model.generative, p_score), (model.inference, q_score)):
        # Of some 200 numbers about normal with 59 degrees of freedom none is this far out.
        assert largest_z(network, partial(score, model)) < 5.5
        assert largest_z(network, partial(score, other)) > 10


@every_model
def test_every_parameter_gets_a_gradient_and_no_network_gets_the_others(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    theta, phi = dict(model.generative.named_parameters()), dict(model.inference.named_parameters())
    common = {id(p) for p in theta.values()} & {id(p) for p in phi.values()}
    assert bool(common) == (name == "vamp")
    assert len(theta) + len(phi) - len(common) == len(dict(model.named_parameters()))
    particles = model.draw(case.x(8), 6, noise())

    def reached(value: Tensor, parameters: dict[str, nn.Parameter]) -> set[str]:
        gradients = torch.autograd.grad(
            value.sum(), list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return {n for n, g in zip(parameters, gradients, strict=True) if g.count_nonzero()}

    assert reached(particles.log_p, theta) == set(theta)
    detached = tuple(h.detach() for h in particles.latents)
    assert reached(model.inference(case.x(8), detached), phi) == set(phi)
    assert reached(model.generative(case.x(8), detached), phi) == (set(phi) if common else set())
    if not particles.reparameterized:
        # Nothing but the score: detached latents, so that log p and the frozen log q know nothing of phi.
        assert not any(h.requires_grad for h in particles.latents)
        assert reached(particles.log_p, phi) == set()
        assert reached(particles.log_q, phi) == set(phi)
        return
    assert reached(particles.log_p, phi) == set(phi)
    # With frozen weights the gradient goes through the latents, to every parameter that moves them.
    assert reached(particles.log_w_frozen, phi) == set(phi)


@every_model
def test_freezing_keeps_the_path_and_drops_the_score(name: str) -> None:
    """d/dphi log q (total) = path + score, each from autograd of another graph; summed over the samples."""
    case, model = CASES[name], CASES[name].build()
    x = case.x(2)
    phi = list(model.inference.parameters())

    def gradient(value: Tensor) -> list[Tensor]:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in phi]
        return list(torch.autograd.grad(value.sum(), phi, materialize_grads=True, allow_unused=True))

    particles = model.draw(x, 3, noise())
    detached = tuple(h.detach() for h in particles.latents)
    path = gradient(particles.rescore())
    total = gradient(model.draw(x, 3, noise()).log_q)
    score = gradient(model.inference(x, detached))
    for t, p, s in zip(total, path, score, strict=True):
        torch.testing.assert_close(t, p + s, rtol=1e-9, atol=1e-9)
    if name in DISCRETE:
        assert all(p.count_nonzero() == 0 for p in path)


@pytest.mark.parametrize(
    ("name", "former"),
    [
        ("linear gaussian chain", "p.0.log_scale p.0.linear.weight p.0.linear.bias p.1.log_scale p.1.linear.weight "
         "p.1.linear.bias q.0.log_diagonal q.0.below_diagonal q.0.linear.weight q.0.linear.bias q.1.log_diagonal "
         "q.1.below_diagonal q.1.linear.weight q.1.linear.bias"),
        ("discrete, three layers", "generative.prior_logits p.0.weight p.0.bias p.1.weight p.1.bias p.2.weight "
         "p.2.bias q.0.weight q.0.bias q.1.weight q.1.bias q.2.weight q.2.bias"),
        ("categorical", "generative.prior_logits generative.observation.weight generative.observation.bias "
         "inference.logits.weight inference.logits.bias"),
    ],
)  # fmt: skip
def test_checkpoints_of_version_0_2_0_are_loaded(name: str, former: str) -> None:
    """Its names in the order of its parameters, which has not changed: the optimizer's state relies on it."""
    names = former.replace("p.", "generative.layers.").replace("q.", "inference.layers.").split()
    model, other = CASES[name].build(), CASES[name].build(seed=5)
    other.load_state_dict(dict(zip(names, model.state_dict().values(), strict=True)))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@every_model
def test_initial_weights_are_glorot_and_reproducible(name: str) -> None:
    case = CASES[name]
    first, again, other = (
        case.architecture.build(case.image_shape, case.mean(), torch.Generator().manual_seed(seed), case.levels)
        for seed in (0, 0, 1)
    )
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), other.parameters(), strict=True))
    weights = [m.weight for m in first.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert weights
    for weight in weights:
        bound = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()))
        assert weight.abs().max() <= bound
        if weight.numel() > 30:
            # Uniform on (-bound, bound): the sd is bound / sqrt 3, the largest is close to the bound.
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)
            assert weight.abs().max() > 0.8 * bound
    # No two layers of equal shape begin identical (the authors' code seeds them alike).
    drawn = [w.detach().numpy().tobytes() for w in weights if w.numel() > 1]
    assert len(set(drawn)) == len(drawn)
    biases = [m.bias for m in first.inference.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert all(bias is None or bias.count_nonzero() == 0 for bias in biases)


def test_the_seed_decides_what_modules_draw_themselves() -> None:
    class Convolved(GaussianMLP):
        def networks(self, *given: Any) -> Networks:
            made = super().networks(*given)
            made.inference.layers[0].body.append(nn.Conv1d(5, 5, 1))
            return made

    def weights(architecture: Architecture, seed: int) -> dict[str, Tensor]:
        torch.rand(1)
        state = torch.random.get_rng_state()
        model = architecture.build((2, 2), np.full(4, 0.5), torch.Generator().manual_seed(seed))
        assert torch.equal(torch.random.get_rng_state(), state)
        return dict(model.named_parameters())

    first, again, other = (weights(Convolved([3], [[5]]), seed) for seed in (0, 0, 1))
    own = "inference.layers.0.body.2.weight"
    assert torch.equal(first[own], again[own]) and not torch.equal(first[own], other[own])
    # The other weights are those that they are without it.
    assert all(torch.equal(first[name], p) for name, p in weights(GaussianMLP([3], [[5]]), 0).items())


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.architecture.observation != "grey"])
def test_pixels_begin_at_the_training_mean(name: str) -> None:
    """With all weights zero the model knows nothing but the output bias: for binary pixels, clip(mean, .001, .999)."""
    case = CASES[name]
    mean = np.linspace(0, 1, case.pixels)
    model = case.architecture.build(case.image_shape, mean, torch.Generator().manual_seed(0)).double()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.zeros_(module.weight)
    latents, _ = model.generative.sample(2, noise())
    clipped = np.clip(mean, 0.001, 0.999) if case.architecture.observation == "binary" else mean
    expected = np.broadcast_to(clipped, (1, 2, case.pixels))
    np.testing.assert_allclose(model.generative.mean(latents).detach().numpy(), expected, rtol=1e-5)


@every_model
def test_posterior_means(name: str) -> None:
    """Against the plain average of draws of q."""
    case, model = CASES[name], CASES[name].build()
    x = case.x(5)
    with torch.no_grad():
        means = model.inference.posterior_means(x, 4000, noise())
        latents, _ = model.inference.sample(x, 20_000, noise(1))
    assert [tuple(m.shape) for m in means] == [(5, d) for d in case.latent_sizes]
    for mean, h in zip(means, latents, strict=True):
        # The error of both averages: the draws' own sd bounds that of their means.
        error = h.std(0) * math.sqrt(1 / (MEAN_DRAWS if "coupling" in name else 4000) + 1 / 20_000)
        assert ((mean - h.mean(0)).abs() < 4.5 * error).all()
        assert mean.std(0).min() > 0


def test_a_mean_above_a_linear_one_is_that_of_draws() -> None:
    """Between two networks a linear layer, whose own mean needs no draws; all of one size."""
    torch.manual_seed(0)
    layers = [GaussianConditional(3, [5], 3), LinearConditional(3, 3), GaussianConditional(3, [5], 3)]
    q, x = InferenceChain(layers).double(), torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(2)
        means = q.posterior_means(x, 4000, noise())
        latents, _ = q.sample(x, 20_000, noise(1))
    for mean, h in zip(means, latents, strict=True):
        error = h.std(0) * math.sqrt(1 / 4000 + 1 / 20_000)
        assert ((mean - h.mean(0)).abs() < 4.5 * error).all()


@every_model
def test_closed_form_kl(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    x = case.x(3)
    with torch.no_grad():
        if name in DISCRETE or len(case.latent_sizes) > 1 or name in ("conv, coupling", "vamp"):
            assert not model.has_kl
            with pytest.raises(TypeError):
                model.kl(x)
            return
        latents, log_q = model.inference.sample(x, 40_000, noise())
        differences = log_q - model.generative.log_prior(latents)
        error = differences.std(0) / math.sqrt(40_000)
        assert ((model.kl(x) - differences.mean(0)).abs() < 4 * error).all()


@every_model
def test_float32_is_close_to_float64_on_the_same_noise(name: str) -> None:
    case, model = CASES[name], CASES[name].build()
    x = case.x(4)
    with torch.no_grad():
        double = model(x, 64, KeyedNoise(0, "t", range(4), dtype=torch.float64)).double()
        # The draws of an image are those of its own noise, for any number of them.
        torch.testing.assert_close(model(x, 30, KeyedNoise(0, "t", range(4), dtype=torch.float64)), double[:30])
        single = model.float()(x.float(), 64, KeyedNoise(0, "t", range(4))).double()
    # A discrete unit may flip where a probability and its uniform number nearly agree.
    close = torch.isclose(single, double, rtol=1e-4, atol=1e-3)
    assert close.double().mean() > (0.98 if name in DISCRETE else 0.9999)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: GaussianMLP([], []), "latent_sizes"),
        (lambda: GaussianMLP([5], [[5, -1]]), "hidden_sizes"),
        (lambda: GaussianMLP([5], [[]]), "hidden_sizes"),
        (lambda: GaussianMLP([5, 2], [[5]]), "hidden_sizes"),
        (lambda: LinearGaussianModel([2, 0]), "latent_sizes"),
        (lambda: SigmoidBeliefNetwork([-3]), "latent_sizes"),
        (lambda: Categorical(1), "categories"),
        (lambda: GaussianConvolutional(0, [2, 3], 5), "latent_size"),
        (lambda: GaussianConvolutional(5, [2], 5), "channels"),
        (lambda: GaussianConvolutional(5, [2, 3], 0), "hidden_size"),
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], Architecture], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument} "):
        make()


def test_which_models_know_log_px_exactly() -> None:
    exact = {n for n, c in CASES.items() if c.build().generative.exact_log_px(c.x(1)) is not None}
    assert exact == {"linear gaussian chain"} | DISCRETE


BINARY = [GaussianMLP([3], [[8]]), SigmoidBeliefNetwork([3]), Categorical(3), GaussianConvolutional(3, [2, 3], 8)]
GREY = [
    GaussianMLP([3], [[8]], likelihood="discretized_logistic"),
    GaussianConvolutional(3, [2, 3], 8, likelihood="discretized_logistic"),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("architecture", [*BINARY, *GREY, LinearGaussianModel([2])], ids=lambda a: type(a).__name__)
def test_values_that_the_likelihood_cannot_observe_are_refused(architecture: Architecture, training: bool) -> None:
    """By hand the log-probability of grey levels under a Bernoulli is a number like any other: +172 nats."""
    model = architecture.build((8, 8), np.full(64, 0.4), torch.Generator().manual_seed(1), levels=17).train(training)
    random = torch.Generator().manual_seed(0)
    binary = torch.randint(0, 2, (3, 64), generator=random).float()
    given = {"binary": binary, "grey": 16 * binary, "half": binary + 0.5, "negative": -binary, "above": 17 * binary}
    given |= {"nan": binary * math.nan, "infinite": binary / 0}
    kind = {"binary": BINARY, "grey": GREY}
    allowed = {"binary"} if architecture in kind["binary"] else {"binary", "grey"}
    if architecture not in (*BINARY, *GREY):
        allowed = set(given) - {"nan", "infinite"}
    for name, x in given.items():
        noise = GeneratorNoise(torch.Generator().manual_seed(0))
        if name in allowed:
            assert model(x, 2, noise).isfinite().all()
            continue
        for call in (model, model.draw, lambda x, k, noise: model.generative.exact_log_px(x)):
            if not (call == model.draw and training):  # a training step does not pay for it
                with pytest.raises(ValueError, match=r"^x must be .* for \w+, got values from"):
                    call(x, 2, noise)


ACTIVATIONS = {"tanh": np.tanh, "relu": lambda a: np.maximum(a, 0), "elu": lambda a: np.where(a > 0, a, np.expm1(a))}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_of_an_mlp(activation: str) -> None:
    architecture = GaussianMLP([3, 2], [[8, 7], [6]], activation=activation)
    model = architecture.build((5,), np.full(5, 0.4), torch.Generator().manual_seed(1))
    p, q = model.generative, model.inference
    for part, size in ((p.observation, 3), (p.layers[0], 2), (q.layers[0], 5), (q.layers[1], 3)):
        given = torch.randn(4, size, generator=torch.Generator().manual_seed(2))
        values = given.numpy()
        for linear in [layer for layer in part.body if isinstance(layer, nn.Linear)]:
            values = ACTIVATIONS[activation](values @ linear.weight.detach().numpy().T + linear.bias.detach().numpy())
        np.testing.assert_allclose(part.body(given).detach().numpy(), values, atol=1e-6)
