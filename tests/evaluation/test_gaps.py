"""Approximation and amortization gap against linear-Gaussian models, in which both are closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from draws import drawn, make_exact, posterior
from evaluations import evaluation
from every_architecture import LinearGaussianModel, SigmoidBeliefNetwork
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.data.base import Data, Split
from iwae_cli.evaluation.estimator import Estimates, EstimatorInput
from iwae_cli.evaluation.gaps import Gaps, elbos
from iwae_cli.evaluation.likelihood import Likelihood, log_likelihood
from iwae_cli.evaluation.proposals import GROUP, Fitted
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import (
    CholeskyConditional,
    Conditional,
    DiagonalGaussian,
    GaussianConditional,
    LinearConditional,
)
from iwae_cli.models.priors import StandardNormal

PIXELS, LATENTS, N = 5, 3, GROUP + 3


def initialized(model: LatentVariableModel) -> LatentVariableModel:
    """Random parameters: correlated posteriors, and a q not far from them."""
    generator = torch.Generator().manual_seed(3)
    model = model.double().eval()
    with torch.no_grad():
        for network, scale in ((model.generative, 0.8), (model.inference, 0.2)):
            for parameter in network.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def one_layer(q: Conditional) -> LatentVariableModel:
    generative = GenerativeChain(StandardNormal(LATENTS), LinearConditional(LATENTS, PIXELS), [])
    return initialized(LatentVariableModel(generative, InferenceChain([q])))


def estimated(model: LatentVariableModel, x: Tensor, k: int = 2000, seed: int = 0) -> Estimates:
    return Gaps(k, images=None).estimate(subject(model, x, seed), lambda: None)


def subject(model: LatentVariableModel, x: Tensor, seed: int = 0) -> EstimatorInput:
    data = Data("drawn", "", x[:1], x[:1], x, None, "none", (x.shape[1],))
    return EstimatorInput(model, data, evaluation(splits=["test"], workers=1, seed=seed))


def kl(loc: Tensor, covariance: Tensor, of: Tensor, precision: Tensor) -> Tensor:
    """KL(N(loc, covariance) || N(of, precision^-1)), (n,), nats; ``loc`` and ``of`` are (n, d)."""
    away = loc - of
    trace = (precision * covariance).sum((-1, -2)) - away.shape[-1]
    return 0.5 * (trace + (away @ precision * away).sum(-1) - torch.logdet(covariance) - torch.logdet(precision))


def close(found: Estimates, key: str, exact: float, missed: float = 0.01) -> None:
    """A number agrees within five Monte Carlo errors, which are small, and what the fit may miss."""
    error = 5 * found.numbers["test"][f"{key}_stderr_mc"] + missed
    away = abs(found.numbers["test"][key] - exact)
    assert away < error < 0.03 + 0.03 * abs(exact), (key, exact, away, error)


@pytest.mark.parametrize("q", [GaussianConditional(PIXELS, [8], LATENTS), LinearConditional(PIXELS, LATENTS)])
def test_both_gaps_of_a_mean_field_q(q: DiagonalGaussian) -> None:
    """The best member has the mean and the precisions of the posterior; the rest of KL(q || p(h|x)) is amortization."""
    model = one_layer(q)
    x = drawn(model, N)
    with torch.no_grad():
        mean, precision = posterior(model, x)
        loc, log_scale = q(x)
        of_q = kl(loc, torch.diag_embed((2 * log_scale).exp()), mean, precision)
        of_best = kl(mean, torch.diag(1 / precision.diagonal()), mean, precision)
        log_px = model.generative.exact_log_px(x)
    assert of_best.mean() > 0.09 and of_q.mean() > 1
    found = estimated(model, x)
    close(found, "approximation_gap", of_best.mean().item())
    close(found, "amortization_gap", (of_q - of_best).mean().item())
    close(found, "total_gap", of_q.mean().item(), missed=0)
    close(found, "log_px", log_px.mean().item(), missed=0)
    close(found, "elbo_best", (log_px - of_best).mean().item())
    close(found, "elbo", (log_px - of_q).mean().item(), missed=0)
    numbers = found.numbers["test"]
    assert numbers["exact"] == pytest.approx(log_px.mean().item(), rel=1e-9)
    assert (numbers["n"], numbers["fitted"], numbers["log_px_by"]) == (N, 1, "refined")
    # Paired: the approximation gap is the same for every image, though log p(x) varies by nats.
    assert numbers["approximation_gap_stderr_images"] < 0.02 < 0.2 < numbers["log_px_stderr_images"]
    expected = (of_q - of_best).std().item() / math.sqrt(N)
    assert numbers["amortization_gap_stderr_images"] == pytest.approx(expected, rel=0.05)
    each = found.arrays["elbo_best"] - found.arrays["elbo"]
    np.testing.assert_allclose(each, (of_q - of_best).numpy(), atol=0.5)
    assert numbers["approximation_gap"] + numbers["amortization_gap"] == pytest.approx(numbers["total_gap"])


@pytest.mark.parametrize("narrower", [0, 2])
def test_a_full_covariance_has_no_approximation_gap(narrower: int) -> None:
    """Also where the posterior is e^narrower times narrower, and q far wider than it."""
    q = CholeskyConditional(PIXELS, LATENTS)
    model = one_layer(q)
    with torch.no_grad():
        model.generative.observation.log_scale.sub_(narrower)
    x = drawn(model, N)
    with torch.no_grad():
        mean, precision = posterior(model, x)
        of_q = kl(q.mean(x), q.cholesky() @ q.cholesky().T, mean, precision).mean().item()
    found = estimated(model, x)
    assert of_q > 1
    close(found, "approximation_gap", 0)
    close(found, "amortization_gap", of_q)


def test_an_exact_q_has_no_gap() -> None:
    """q is the posterior itself, so that no fit can be better: neither gap is negative by more than the fit misses."""
    q = CholeskyConditional(PIXELS, LATENTS)
    model = one_layer(q)
    x = drawn(model, N)
    make_exact(model)
    numbers = estimated(model, x).numbers["test"]
    assert all(abs(numbers[key]) < 1e-3 for key in ("approximation_gap", "amortization_gap", "total_gap"))
    assert numbers["log_px"] == pytest.approx(numbers["exact"], abs=1e-6) and numbers["log_px_by"] == "q"


def test_the_layers_above_count_as_approximation() -> None:
    """With q(h_2|h_1) kept, the best L_1 is log E_p(h_1|x)[exp -KL(q(h_2|h_1) || p(h_2|h_1))] + log p(x)."""
    model = initialized(
        LinearGaussianModel([3, 2]).build((PIXELS,), np.zeros(PIXELS), torch.Generator().manual_seed(1))
    )
    x = drawn(model, GROUP)
    with torch.no_grad():
        below, above, q = model.generative.observation, model.generative.layers[0], model.inference.layers[1]
        # p(h_1|x) by conditioning h_1 ~ N(b, W W^T + D) on x.
        prior = above.linear.weight @ above.linear.weight.T + torch.diag((2 * above.log_scale).exp())
        scaled = below.linear.weight * (-2 * below.log_scale).exp()[:, None]
        precision = torch.linalg.inv(prior) + below.linear.weight.T @ scaled
        pull = (x - below.linear.bias) @ scaled + torch.linalg.solve(prior, above.linear.bias)
        root = torch.linalg.cholesky(torch.linalg.inv(precision))
        eps = torch.randn(20_000, GROUP, 3, generator=torch.Generator().manual_seed(2)).double()
        h = torch.linalg.solve(precision, pull.T).T + eps @ root.T
        upper = LatentVariableModel(GenerativeChain(StandardNormal(2), above, []), model.inference)
        mean, precision = posterior(upper, h.flatten(0, 1))
        lost = kl(q.mean(h).flatten(0, 1), q.cholesky() @ q.cholesky().T, mean, precision).view(h.shape[:2])
        exact = (math.log(len(h)) - (-lost).logsumexp(0)).mean().item()
    found = estimated(model, x, k=5000)
    assert exact > 0.3
    close(found, "approximation_gap", exact)


def test_where_no_fit_is_better_q_stays_and_the_choice_is_no_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """p(h|x) = N(0, I), q = N(a, I). For N(-a, I), exactly as good, chance decides; N(9, I) is worse for any noise."""
    q = LinearConditional(PIXELS, LATENTS)
    model = one_layer(q)
    with torch.no_grad():
        for layer in (model.generative.observation, q):
            layer.linear.weight.zero_()
        q.log_scale.zero_()
    n = 20 * GROUP

    def fits_at(loc: Tensor) -> None:
        def fit(model: LatentVariableModel, x: Tensor, *_: object) -> Fitted:
            eye = torch.eye(LATENTS).double().expand(len(x), -1, -1)
            return Fitted(model.inference, loc.expand(len(x), -1), eye)

        monkeypatch.setattr("iwae_cli.evaluation.gaps.fit", fit)

    fits_at(-q.linear.bias.detach())
    found = elbos(model, Split("test", drawn(model, n), ""), k=256, seed=0, rows=10**5)
    gap, error = found.best - found.q, np.sqrt(found.variance_gap.sum()) / n
    assert 0.4 < found.fitted.mean() < 0.6 and (gap[~found.fitted] == 0).all()
    # The maximum of both on the same noise would be higher by .4 sd for every image, which is many errors.
    deviation = found.variance_gap[found.fitted].mean() ** 0.5
    assert abs(gap.mean()) < 4 * error < 0.5 * 0.4 * deviation
    fits_at(torch.full((LATENTS,), 9.0).double())
    found = elbos(model, Split("test", drawn(model, n), ""), k=256, seed=0, rows=10**5)
    assert not found.fitted.any() and (found.best == found.q).all() and not found.variance_gap.any()


def assert_errors_are_what_varies(model: LatentVariableModel, k: int, *keys: str) -> dict[str, Any]:
    """Images that are one image differ by noise alone: its sd, here known to a twelfth, is the Monte Carlo error."""
    numbers = estimated(model, drawn(model, 1).expand(4 * GROUP, -1), k).numbers["test"]
    for key in keys:
        assert numbers[f"{key}_stderr_images"] == pytest.approx(numbers[f"{key}_stderr_mc"], rel=0.25), key
    return numbers


def test_the_monte_carlo_errors_of_l_1_are_what_varies() -> None:
    """q is nats from the best diagonal Gaussian."""
    model = one_layer(GaussianConditional(PIXELS, [8], LATENTS))
    assert_errors_are_what_varies(model, 64, "elbo", "elbo_best", "approximation_gap", "amortization_gap", "total_gap")


def test_the_monte_carlo_errors_of_the_gaps_are_what_varies() -> None:
    """q* is the posterior, so that its L_1 has hardly any error, and the approximation gap has that of log p^."""
    model = one_layer(CholeskyConditional(PIXELS, LATENTS))
    make_exact(model)
    q: Any = model.inference.layers[0]
    with torch.no_grad():
        q.linear.bias.add_(0.3 * q.cholesky().sum(1))
        q.log_diagonal.add_(0.1)
    keys = "log_px", "approximation_gap", "total_gap", "amortization_gap", "elbo"
    numbers = assert_errors_are_what_varies(model, 20, *keys)
    assert numbers["elbo_best_stderr_mc"] < 0.2 * numbers["approximation_gap_stderr_mc"]


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize(
    ("higher", "error", "by"),
    [(0.1, 0.2, "refined"), (0.1, 0.05, "q"), (-0.1, 0.0, "refined"), (math.nan, 0.0, "refined")],
)
def test_log_px_is_not_the_higher_one_by_noise(
    monkeypatch: pytest.MonkeyPatch, higher: float, error: float, by: str
) -> None:
    """How much higher L_k by q is than the refined one, and by how much of its Monte Carlo error."""

    def given(*asked: Any, refined: bool = False, **how: Any) -> Likelihood:
        found = log_likelihood(*asked, **how)
        variance = 0.0 if refined else 2 * error**2  # of each of two images
        log_px = np.full(2, -3.0 if refined else -3 + higher)
        return replace(found, log_px=log_px, ess=np.full(2, 1 / (variance + 1 / 64)))

    monkeypatch.setattr("iwae_cli.evaluation.gaps.log_likelihood", given)
    model = one_layer(LinearConditional(PIXELS, LATENTS))
    found = estimated(model, drawn(model, 2), k=64)
    numbers = found.numbers["test"]
    assert numbers["log_px_by"] == by and numbers["log_px"] == numbers[f"log_px_{by}"]
    if math.isnan(higher):
        assert numbers["log_px_q"] is None and set(found.reasons) == {"test.log_px_q"}


class Laplace(Conditional):
    """A family without a fit."""

    def sample(self, *_: object) -> None:  # type: ignore[override]
        raise AssertionError("refused before any work")

    log_prob = mean = sample  # type: ignore[assignment]


@pytest.mark.parametrize("q", ["discrete", "Laplace"])
def test_other_models_are_refused_before_any_work(q: str) -> None:
    model = one_layer(Laplace())
    if q == "discrete":
        model = SigmoidBeliefNetwork([4]).build((6,), np.full(6, 0.4), torch.Generator().manual_seed(1))

    def check() -> None:
        raise AssertionError("refused before any work")

    with pytest.raises(UserError, match=q) as refusal:
        Gaps().estimate(subject(model, torch.zeros(2, 6)), check)
    assert "estimator=gaps" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.usefixtures("coarse")
def test_what_is_not_finite_has_a_reason() -> None:
    model = one_layer(LinearConditional(PIXELS, LATENTS))
    with torch.no_grad():
        model.generative.observation.linear.bias.fill_(math.inf)
    broken = estimated(model, torch.zeros(2, PIXELS).double(), k=10)
    assert broken.numbers["test"]["total_gap"] is None and "finite" in broken.reasons["test.total_gap"]
