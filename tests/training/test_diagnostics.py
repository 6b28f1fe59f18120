"""KL of every layer, reconstruction term, effective sample size and gradient norms, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_architecture import (
    Categorical,
    GaussianConvolutional,
    GaussianMLP,
    LinearGaussianModel,
    SigmoidBeliefNetwork,
)
from every_objective import ELBO, IWAE, MIWAE, PIWAE, RWS, TVO, VIMCO
from small_runs import TINY, finished, last_of_each
from test_compiled import batch
from test_shared_parameter import with_shared_bias
from torch import Tensor, nn

from iwae_cli.core.noise import GeneratorNoise
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.chain import InferenceChain
from iwae_cli.objectives.base import Objective
from iwae_cli.training import trainer
from iwae_cli.training.diagnostics import diagnostics, kl_of_units, kl_terms
from iwae_cli.training.steps.plain import PlainStep

SHAPE = (4, 4)
X = (torch.arange(3 * 16).reshape(3, 16) * 7 % 5 < 2).float()


def noise(seed: int = 1, dtype: torch.dtype = torch.float32) -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(seed), dtype)


def built(architecture: Architecture, shape: tuple[int, ...] = SHAPE, levels: int | None = 2) -> LatentVariableModel:
    """A model whose parameters are all away from their initial values."""
    random = torch.Generator().manual_seed(0)
    model = architecture.build(shape, np.full(math.prod(shape), 0.4), random, levels)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random))
    return model


def test_the_kl_of_a_network_is_the_analytic_one() -> None:
    model = built(GaussianMLP([4], [[6]]))
    with torch.no_grad():
        expected = float(model.kl(X).mean())
    found = [diagnostics(model, ELBO(2000), X, noise(seed))["train/kl/1"] for seed in range(20)]
    assert abs(np.mean(found) - expected) < 4 * np.std(found, ddof=1) / len(found) ** 0.5 < 0.15


MODELS: dict[str, tuple[Architecture, Callable[[], Objective]]] = {
    "one layer": (GaussianMLP([4], [[6]]), lambda: IWAE(7)),
    "two layers": (GaussianMLP([4, 3], [[6], [5]]), lambda: IWAE(7, "dreg")),
    "convolutions": (GaussianConvolutional(3, [4, 5], 6), lambda: ELBO(7, "stl")),
    "groups of draws": (GaussianMLP([4], [[6]]), lambda: MIWAE(2, 3)),
    "three layers of bits": (SigmoidBeliefNetwork([4, 3, 2]), lambda: VIMCO(7)),
    "a category": (Categorical(3), lambda: RWS(7, "both")),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_terms_are_those_of_each_factor_of_the_same_draws(name: str) -> None:
    architecture, objective = MODELS[name]
    model, of = built(architecture), objective()
    found = diagnostics(model, of, X, noise())
    with torch.no_grad():
        particles = model.draw(X, of.num_samples, noise())
        ess = 1 / particles.log_w.double().softmax(0).square().sum(0)
        h, q, p = particles.latents, model.inference.layers, [*model.generative.layers, model.generative.prior]
        for level in range(len(h)):
            log_q = q[level].log_prob(h[level], h[level - 1] if level else X)
            log_p = p[level].log_prob(h[level], h[level + 1] if level + 1 < len(h) else None)
            assert found.pop(f"train/kl/{level + 1}") == pytest.approx(float((log_q - log_p).mean()), abs=1e-5)
        reconstruction = float(model.generative.log_likelihood(X, h).mean())
    assert found.pop("train/reconstruction") == pytest.approx(reconstruction, abs=1e-5)
    assert found.pop("train/ess") == pytest.approx(float(ess.mean()), rel=1e-5)
    assert set(found) == {"train/gradient_norm/p", "train/gradient_norm/q"}
    assert "train/ess" not in diagnostics(built(GaussianMLP([4], [[6]])), ELBO(1), X, noise())


def test_the_kl_of_the_units_adds_up_and_is_the_analytic_one() -> None:
    model = built(GaussianMLP([3, 2], [[6], [5]]))
    drawn = model.draw(X, 4, noise())
    for units, term in zip(kl_of_units(model, X, drawn.latents), kl_terms(model, X, drawn.latents), strict=True):
        assert units.sum() == pytest.approx(float(term.detach().mean()), rel=1e-5)
    model = built(GaussianMLP([3], [[6]]))
    with torch.no_grad():
        (found,) = kl_of_units(model, X, model.draw(X, 40_000, noise()).latents)
        loc, log_scale = model.inference.layers[0](X)
    exact = 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).mean(0)
    assert found == pytest.approx(exact.numpy(), rel=0.03, abs=0.01)


def test_units_that_are_not_diagonal_gaussians_have_no_kl() -> None:
    discrete, full = SigmoidBeliefNetwork([3]), LinearGaussianModel([3])
    for model in (built(discrete), built(full, levels=None)):
        assert kl_of_units(model, X, model.draw(X, 2, noise()).latents) == []
    model = built(GaussianMLP([3], [[6]]))
    latents = model.draw(X, 2, noise()).latents
    layer = model.inference.layers[0]
    layer.__class__ = type("Own", (type(layer),), {"log_prob": lambda self, h, given: h.sum(-1)})
    assert kl_of_units(model, X, latents) == []


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "iwae": lambda: IWAE(5),
    "dreg": lambda: IWAE(5, "dreg"),
    "stl": lambda: ELBO(5, "stl"),
    "analytic KL": lambda: ELBO(5, analytic_kl=True),
    "piwae": lambda: PIWAE(2, 3, "dreg"),
    "rws": lambda: RWS(5, "both"),
    "tvo": lambda: TVO(5, gradient="covariance"),
}


def plain_gradients(model: LatentVariableModel, objective: Objective, x: Tensor = X) -> None:
    """Leave in ``grad`` what the plain step uses, and every weight as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    PlainStep(model, objective, torch.optim.SGD(trained, lr=0.0))(x, noise())


def norm(parameters: Sequence[nn.Parameter]) -> float:
    return float(sum(p.grad.double().square().sum() for p in parameters if p.grad is not None)) ** 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_norms_are_those_of_the_plain_step(name: str) -> None:
    model, objective = built(GaussianMLP([4], [[6]])), OBJECTIVES[name]()
    found = diagnostics(model, objective, X, noise())
    assert all(p.grad is None for p in model.parameters()), "the gradients of the step itself are left alone"
    plain_gradients(model, objective)
    for network in ("p", "q"):
        own = [*(model.generative if network == "p" else model.inference).parameters()]
        assert found[f"train/gradient_norm/{network}"] == pytest.approx(norm(own), rel=1e-5)


def test_parameters_of_both_networks_count_in_both_norms() -> None:
    model = with_shared_bias()
    x = batch(1)
    found = diagnostics(model, IWAE(5), x, noise())
    plain_gradients(model, IWAE(5), x)
    assert model.shared
    assert found["train/gradient_norm/p"] == pytest.approx(norm([*model.generative.parameters()]), rel=1e-5)
    assert found["train/gradient_norm/q"] == pytest.approx(norm([*model.inference.parameters()]), rel=1e-5)


def test_a_frozen_network_has_no_norm() -> None:
    model = built(GaussianMLP([4], [[6]]))
    model.generative.requires_grad_(False)
    for objective in (IWAE(5), IWAE(5, "dreg")):
        found = diagnostics(model, objective, X, noise())
        assert "train/gradient_norm/p" not in found and found["train/gradient_norm/q"] > 0


class SkipChain(InferenceChain):
    """A user's own chain; its factors may be others."""


class Counts(IWAE):
    """An objective that counts its calls, as one that anneals does."""

    calls = 0

    def losses(self, *given: Any) -> Any:
        self.calls += 1
        return super().losses(*given)


def test_what_a_users_classes_count_is_left_alone_and_other_chains_have_no_kl() -> None:
    model, objective = built(GaussianMLP([4], [[6]])), Counts(5)
    layer = model.inference.layers[0]
    layer.body.append(nn.BatchNorm1d(6))  # its running mean changes with every call
    model.inference = SkipChain([layer])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = diagnostics(model.train(), objective, X, noise())
    assert set(found) == {"train/ess", "train/gradient_norm/p", "train/gradient_norm/q"}
    assert objective.calls == 0 and len(before) > 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_few_images_that_a_pass_ends_with_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,297 images in batches of 81 leave one over."""
    rows: list[int] = []

    def counted(model: Any, objective: Any, x: torch.Tensor, noise: Any) -> dict[str, float]:
        rows.append(len(x))
        return {"train/kl/1": 1.0}

    monkeypatch.setattr(trainer, "diagnostics", counted)
    finished(tmp_path, *last_of_each(*TINY, "batch_size=81"))
    assert rows == [81, 81]
