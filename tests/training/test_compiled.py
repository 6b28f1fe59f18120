"""The compiled step against the plain one: the same noise, the same gradients; and when it is chosen at all."""

from __future__ import annotations

import copy
from typing import Any

import draws
import numpy as np
import pytest
import torch
from draws import noise
from every_architecture import GaussianConvolutional, GaussianMLP, LinearGaussianModel, SigmoidBeliefNetwork
from every_objective import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, REINFORCE, RWS, TVO, UMIWAE, VIMCO, VR
from own_parts import OwnStandardNormal

from iwae_cli.core.device import Device, compiler
from iwae_cli.core.interfaces import Model, Particles
from iwae_cli.core.noise import GeneratorNoise, Noise
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.base import Losses, Objective
from iwae_cli.training.steps.choose import compiling_pays, should_compile
from iwae_cli.training.steps.compiled import CompiledStep
from iwae_cli.training.steps.graph import CannotCompileError
from iwae_cli.training.steps.plain import PlainStep

ONE, TWO, BITS = GaussianMLP([3], [[5, 4]]), GaussianMLP([3, 2], [[5], [4]]), SigmoidBeliefNetwork([4, 3])
CASES: dict[str, tuple[Architecture, Objective]] = {
    "ELBO": (ONE, ELBO(2)),
    "ELBO, analytic KL": (ONE, ELBO(2, analytic_kl=True)),
    "IWAE": (TWO, IWAE(3)),
    "IWAE STL": (TWO, IWAE(3, "stl")),
    "IWAE DReG": (TWO, IWAE(3, "dreg")),
    "CIWAE": (ONE, CIWAE(3, 0.3)),
    "MIWAE": (ONE, MIWAE(2, 3)),
    "PIWAE DReG": (ONE, PIWAE(2, 3, "dreg")),
    "VR": (ONE, VR(3, 2.0)),
    "VR-max": (ONE, VR(3, "max")),
    "TVO": (ONE, TVO(3)),
    "JVI": (ONE, JVI(3)),
    "RWS, wake and sleep": (BITS, RWS(3, "both")),
    "VIMCO": (BITS, VIMCO(3)),
    "VIMCO, zero": (BITS, VIMCO(3, "zero")),
    "REINFORCE": (BITS, REINFORCE(3)),
    "RWS DReG": (ONE, RWS(3, gradient="dreg")),
    "VampPrior": (GaussianMLP([3], [[5, 4]], prior="vamp", prior_components=3), IWAE(3)),
    "UMIWAE": (ONE, UMIWAE(2, 3, 2)),
    "TVO, moments": (ONE, TVO(3, 3, "moments")),
    "TVO, covariance": (BITS, TVO(3, gradient="covariance")),
    "linear-Gaussian": (LinearGaussianModel([3, 2]), IWAE(3, "dreg")),
    "convolutional": (GaussianConvolutional(2, [3, 2], 4), IWAE(3)),
}
BATCH, SIDE = 4, 4


def built(architecture: Architecture, seed: int = 3, dtype: torch.dtype = torch.float64) -> LatentVariableModel:
    return draws.built(architecture, (SIDE, SIDE), dtype, seed=seed, mean=0.3).train()


def sgd(model: LatentVariableModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.rand(BATCH, SIDE**2, generator=torch.Generator().manual_seed(seed)) < 0.5).to(dtype)


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traced graph as it is: making machine code of it takes seconds."""
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs, options: graph)


@pytest.mark.parametrize("case", CASES)
def test_the_graph_has_the_gradients_of_the_plain_step(case: str, traced_only: None) -> None:
    """Two steps each, so that the second sees the weights that the first has changed."""
    architecture, objective = CASES[case]
    plain, compiled, rtol = built(architecture), built(architecture), 1e-12
    optimizer = sgd(plain)
    step = CompiledStep(PlainStep(compiled, objective, sgd(compiled)), torch.zeros_like(batch(0)))
    for seed in (1, 2):
        expected = PlainStep(plain, objective, optimizer)(batch(seed), noise(seed))
        bound = step(batch(seed), noise(seed))
        assert not bound.requires_grad and bound.shape == (BATCH,)
        torch.testing.assert_close(bound, expected, rtol=rtol, atol=0)
        for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad, rtol=rtol, atol=rtol * float(p.grad.abs().max()), msg=name)
            torch.testing.assert_close(q, p, rtol=rtol, atol=rtol, msg=name)


def stepped(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def adam_of_two_rates(model: LatentVariableModel) -> torch.optim.Adam:
    groups = [{"params": [*model.generative.parameters()], "lr": 0.02, "betas": (0.8, 0.99)}]
    return torch.optim.Adam([*groups, {"params": [*model.inference.parameters()]}], lr=0.01, eps=1e-4, fused=True)


def test_adam_in_machine_code_is_that_of_torch() -> None:
    """Also after it loads another state, and with steps of its own in between."""
    objective = IWAE(3, "dreg")
    plain, compiled = built(TWO), built(TWO)
    reference, optimizer = adam_of_two_rates(plain), adam_of_two_rates(compiled)
    step = CompiledStep(PlainStep(compiled, objective, optimizer), batch(0))
    for seed in range(1, 6):
        PlainStep(plain, objective, reference)(batch(seed), noise(seed))
        step(batch(seed), noise(seed))
        assert all(p.grad is None for p in compiled.parameters())
        for mine, of_torch in zip(stepped(optimizer), stepped(reference), strict=True):
            torch.testing.assert_close(mine, of_torch, rtol=1e-9, atol=1e-12)
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)
        for each in (reference, optimizer):
            each.param_groups[0]["lr"] /= 2
        if seed == 3:
            # Load a state in which parameters differ in their number of steps.
            known = reference.state_dict()
            known["state"][0]["step"] += 3
            reference.load_state_dict(copy.deepcopy(known))
            optimizer.load_state_dict(copy.deepcopy(known))
        # The plain step may use the same optimizer.
        PlainStep(plain, objective, reference)(batch(9), noise(9))
        PlainStep(compiled, objective, optimizer)(batch(9), noise(9))
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("case", "options"),
    [
        *((case, {}) for case in ("IWAE DReG", "RWS, wake and sleep", "convolutional", "frozen")),
        *(("IWAE", options) for options in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True})),
    ],
)
def test_adam_is_in_the_graph_of_one_loss_and_of_two(case: str, options: dict[str, Any], traced_only: None) -> None:
    """With other options than those of the graph, torch's own is called."""
    architecture, objective = CASES.get(case, (TWO, IWAE(3, "dreg")))
    plain = built(architecture)
    plain.generative.requires_grad_(case != "frozen")
    compiled = copy.deepcopy(plain)
    # What is frozen may be known to an optimizer, which then leaves it alone.
    reference, optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-4, **options) for model in (plain, compiled)
    )
    step = CompiledStep(PlainStep(compiled, objective, optimizer), batch(0))
    for seed in (1, 2, 3):
        expected = PlainStep(plain, objective, reference)(batch(seed), noise(seed))
        torch.testing.assert_close(step(batch(seed), noise(seed)), expected, rtol=1e-9, atol=0)
    assert all((p.grad is None) == (not options) for p in compiled.parameters())
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-12)


class InDouble(GeneratorNoise):
    """The float32 draws, in float64."""

    def normal(self, layer: int, k: int, batch: int, size: int) -> torch.Tensor:
        return super().normal(layer, k, batch, size).double()


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_adam_in_machine_code_is_as_exact_as_the_plain_step_at_the_size_of_mnist() -> None:
    """In float32 and with the cheaper forms; both are compared to the plain step in float64."""
    plain = ONE.build((28, 28), np.full(784, 0.3), torch.Generator().manual_seed(3))
    compiled, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    of_plain, of_compiled, of_exact = (
        torch.optim.Adam(model.parameters(), lr=0.01, eps=1.0) for model in (plain, compiled, exact)
    )
    step = CompiledStep(PlainStep(compiled, IWAE(3), of_compiled), torch.zeros(BATCH, 784))
    for seed in (1, 2, 3):
        x = (torch.rand(BATCH, 784, generator=torch.Generator().manual_seed(seed)) < 0.5).float()
        PlainStep(plain, IWAE(3), of_plain)(x, noise(seed, torch.float32))
        step(x, noise(seed, torch.float32))
        PlainStep(exact, IWAE(3), of_exact)(x.double(), InDouble(torch.Generator().manual_seed(seed)))

    def away(optimizer: torch.optim.Optimizer) -> float:
        every = zip(stepped(optimizer), stepped(of_exact), strict=True)
        return max(
            float((mine[name] - right[name]).abs().max() / right[name].abs().max())
            for mine, right in every
            for name in ("exp_avg", "exp_avg_sq")
        )

    assert 0 < away(of_plain) < 1e-3
    assert away(of_compiled) < 3 * away(of_plain)


def test_hooks_of_the_optimizer_are_called_or_refused(traced_only: None) -> None:
    """A hook that is registered before the step is traced keeps Adam out of the graph; a later one is refused."""
    model, seen = built(ONE), []

    def hook(*_: object) -> None:
        seen.append([p.grad is not None for p in model.parameters()])

    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with_hook = torch.optim.Adam(model.parameters(), lr=0.01)
    with_hook.register_step_pre_hook(hook)
    CompiledStep(PlainStep(model, IWAE(3), with_hook), batch(0))(batch(1), noise(1))
    step = CompiledStep(PlainStep(model, IWAE(3), optimizer), batch(0))
    optimizer.register_step_pre_hook(hook)
    with pytest.raises(RuntimeError, match="hooks"):
        step(batch(1), noise(1))
    assert seen == [[True] * len([*model.parameters()])]


def test_other_settings_than_those_of_the_graph_are_refused(traced_only: None) -> None:
    model = built(ONE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = CompiledStep(PlainStep(model, IWAE(3), optimizer), batch(0))
    optimizer.load_state_dict(torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.5, 0.999)).state_dict())
    with pytest.raises(RuntimeError, match=r"0\.5, 0\.999"):
        step(batch(1), noise(1))


class Transposed(torch.nn.Linear):
    """The same layer, written so that its gradient lies in memory the other way round."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", input, self.weight) + self.bias


def test_fused_adam_sees_every_gradient_where_its_parameter_lies(traced_only: None) -> None:
    def build() -> LatentVariableModel:
        model = built(ONE)
        for layer in list(model.generative.modules()):
            if type(layer) is torch.nn.Linear:
                layer.__class__ = Transposed
        return model

    def adam(model: LatentVariableModel) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        optimizer.register_step_post_hook(lambda *_: None)  # so that it is called, and no part of the graph
        return optimizer

    plain, compiled = build(), build()
    step = CompiledStep(PlainStep(compiled, IWAE(3), optimizer := adam(compiled)), batch(0))
    reference = adam(plain)
    for seed in (1, 2, 3):
        PlainStep(plain, IWAE(3), reference)(batch(seed), noise(seed))
        step(batch(seed), noise(seed))
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[q]["exp_avg"], reference.state[p]["exp_avg"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q, p, rtol=1e-9, atol=1e-9)


class Branches(IWAE):
    """Does what a graph cannot: looks at a value."""

    def losses(self, model: Model, x: torch.Tensor, particles: Particles, noise: Noise) -> Losses:
        if float(particles.log_w.detach().max()) > 0:
            raise AssertionError("log-weights of binary pixels are below zero")
        return super().losses(model, x, particles, noise)


def test_a_loss_that_depends_on_values_is_refused_in_one_line() -> None:
    model = built(ONE)
    with pytest.raises(CannotCompileError) as caught:
        CompiledStep(PlainStep(model, Branches(3), sgd(model)), batch(1))
    assert str(caught.value) and "\n" not in str(caught.value)


MNIST, ONE_LAYER, TWO_LAYERS = 2980, 423_484, 566_234  # steps a pass in batches of 20; parameters


@pytest.mark.parametrize(
    ("steps", "k", "parameters", "expected"),
    [
        (65 * 3, 5, 136_764, False),  # schedule=smoke on the digits
        (65 * 100, 5, 136_764, False),  # schedule=quick on the digits
        (MNIST, 1, ONE_LAYER, False),
        (MNIST * 5, 1, ONE_LAYER, False),
        (MNIST * 7, 1, ONE_LAYER, True),
        (MNIST * 13, 5, ONE_LAYER, True),
        (MNIST * 13, 50, TWO_LAYERS, True),
        (MNIST * 3280, 1, ONE_LAYER, True),
    ],
)
def test_compiling_is_chosen_where_it_pays(steps: int, k: int, parameters: int, expected: bool) -> None:
    assert compiling_pays(steps, 20 * k, parameters) is expected


def test_a_model_with_a_part_of_a_user_is_compiled_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would freeze what such a part counts."""
    monkeypatch.setattr("iwae_cli.training.steps.choose.compiler", lambda: "g++")
    model, device = built(ONE), Device("cpu")
    assert should_compile(model, IWAE(3), device, 10**9, BATCH, None)
    model.generative.prior = OwnStandardNormal(3)
    assert not should_compile(model, IWAE(3), device, 10**9, BATCH, None)
    assert should_compile(model, IWAE(3), Device("cpu", compile="on"), 10**9, BATCH, None)
