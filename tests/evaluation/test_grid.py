"""Quadrature and posteriors on a grid against closed forms, adaptive quadrature, L_k and simulation."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from draws import built, drawn, posterior, split_of
from evaluations import evaluation
from every_architecture import GaussianMLP, LinearGaussianModel, SigmoidBeliefNetwork
from scipy.integrate import quad
from torch import Tensor

from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.core.noise import BLOCK, GeneratorNoise
from iwae_cli.data.base import Data
from iwae_cli.evaluation.estimator import Estimates, EstimatorInput
from iwae_cli.evaluation.grid import Grid, estimator, picture
from iwae_cli.evaluation.grid.picture import log_densities
from iwae_cli.evaluation.grid.quadrature import prior_box, quadrature
from iwae_cli.evaluation.proposals import refine
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.models.conditionals import Conditional
from iwae_cli.models.likelihoods import MLPPixels
from iwae_cli.models.networks import normal_log_prob
from iwae_cli.models.priors import Prior
from iwae_cli.record.figures import Posterior
from iwae_cli.record.summary import table_of

PIXELS = 6


def linear_gaussian(latents: int, log_scale: float = 0.0) -> LatentVariableModel:
    model = built(LinearGaussianModel([latents]), PIXELS)
    with torch.no_grad():
        model.generative.observation.log_scale.fill_(log_scale)  # type: ignore[operator, union-attr]
    return model


def nonlinear(latents: int = 2) -> LatentVariableModel:
    """Posteriors that q, whose weights are drawn at random, differs from by about a nat."""
    return built(GaussianMLP([latents], [[8]]), PIXELS)


def exact(model: LatentVariableModel, x: Tensor) -> np.ndarray:
    return model.generative.exact_log_px(x).detach().numpy()  # type: ignore[union-attr]


def estimate(model: LatentVariableModel, x: Tensor, *splits: str, **settings: object) -> Estimates:
    """The estimator on a data set whose splits are all ``x``."""
    subject = EstimatorInput(model, toy(x), evaluation(splits=list(splits or ["test"]), workers=1))
    chosen = Grid(**{"k": 200, "points": 141, "images": None} | settings)  # type: ignore[arg-type]
    return chosen.estimate(subject, lambda: None)


def toy(x: Tensor) -> Data:
    binary = bool(((x == 0) | (x == 1)).all())
    x = x.to(torch.uint8 if binary else torch.float32)
    levels, binarization = (2, "fixed") if binary else (None, "none")
    return Data("toy", "", x, x, x, levels, binarization, (PIXELS,))  # type: ignore[arg-type]


@pytest.fixture
def coarse_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in {"OVERVIEW": 101, "WINDOW": 41, "REPEATS": 200}.items():
        monkeypatch.setattr(picture, name, fewer)


@pytest.mark.parametrize("latents", [1, 2])
def test_on_a_linear_gaussian_model_it_is_the_closed_form(latents: int) -> None:
    model = linear_gaussian(latents)
    x = drawn(model, 12)
    found = quadrature(model, x, prior_box(model, 7, 141, 0), rows=2000)
    np.testing.assert_allclose(found.log_px, exact(model, x), atol=1e-9)
    assert found.error.max() < 1e-9 and found.border.max() < 1e-6


def test_neither_rows_nor_workers_nor_other_images_change_it() -> None:
    """In float32, whose products would differ by 1e-7 for parts of another size."""
    model = nonlinear().float()
    x = drawn(nonlinear(), 12).float()
    box = prior_box(model, 7, 61, 0)
    few, many = (quadrature(model, x, box, rows=rows, workers=w) for rows, w in ((64, 2), (10**5, 1)))
    one = quadrature(model, x[3:4], box, rows=64)
    for name in ("log_px", "error", "border"):
        np.testing.assert_allclose(getattr(few, name), getattr(many, name), rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(getattr(one, name), getattr(many, name)[3:4], rtol=1e-13, atol=1e-14)


def test_a_coarse_grid_reports_an_error_that_bounds_its_own() -> None:
    """The reported error is that of the grid of half the points, which is much coarser."""
    model = linear_gaussian(2, log_scale=-1.2)
    x = drawn(model, 30)
    truth = exact(model, x)
    box = prior_box(model, 7, 21, 0)
    reported = []
    for points in (21, 41, 81, 161):
        found = quadrature(model, x, replace(box, points=points), rows=10**5)
        half = quadrature(model, x, replace(box, points=(points + 1) // 2), rows=10**5)
        error = np.abs(found.log_px - truth)
        np.testing.assert_allclose(found.error, np.abs(half.log_px - found.log_px), atol=1e-12)
        reported.append(found.error.max())
        assert error.max() <= found.error.max() + 1e-12
        if found.error.max() < 0.3:
            # Then it is the error of the half, the own one being far below.
            np.testing.assert_allclose(found.error, np.abs(half.log_px - truth), rtol=0.01, atol=1e-9)
    assert reported[0] > 0.5 and 1e-3 < reported[1] < reported[0] and reported[3] < 1e-9


def test_it_agrees_with_adaptive_quadrature_under_a_prior_of_distant_parts() -> None:
    model = built(GaussianMLP([1], [[8]], prior=Distant()), PIXELS, times=2.5)
    x = drawn(model, 6)
    found = quadrature(model, x, prior_box(model, 7, 4001, 0), rows=10**5)
    for image, log_px in zip(x, found.log_px, strict=True):

        def density(h: float, image: Tensor = image) -> float:
            with torch.no_grad():
                return float(model.generative(image[None], (torch.tensor([[[h]]], dtype=torch.float64),)).exp())

        parts = [quad(density, centre - 4, centre + 4, epsabs=0, epsrel=1e-10)[0] for centre in (0.0, 60.0)]
        assert log_px == pytest.approx(math.log(sum(parts)), abs=1e-7)
    assert found.error.max() < 1e-9


class Distant(Prior):
    """0.99 N(0, .25) + 0.01 N(60, .25): seven standard deviations around the mean end before 60."""

    def build(self, size: int) -> Conditional:
        return DistantParts()


class DistantParts(Conditional):
    def sample(self, given, k, batch, level, noise):  # type: ignore[no-untyped-def]
        h = 0.5 * noise.normal(level, k, batch, 1) + 60.0 * (noise.uniform(level, k, batch, 1) < 0.01)
        return h, self.log_prob(h, None)

    def log_prob(self, h, given):  # type: ignore[no-untyped-def]
        scale = torch.full((1,), math.log(0.5), dtype=h.dtype)
        parts = [math.log(share) + normal_log_prob(h, at + 0 * scale, scale) for share, at in ((0.99, 0), (0.01, 60))]
        return torch.logaddexp(*parts)

    def mean(self, given):  # type: ignore[no-untyped-def]
        return torch.full((1,), 0.6)


@pytest.mark.usefixtures("coarse_picture")
def test_bounds_lie_below_it_within_their_errors() -> None:
    model = nonlinear()
    x = drawn(model, 25)
    found = estimate(model, x, "validation", "test", k=500, images=20)
    assert found.hashes["test"] == toy(x[:20]).evaluation_split("test", 0).sha256, "of the images that were used"
    test = found.numbers["test"]
    assert test["n"] == 20 and found.arrays["validation_log_px"].shape == (20,)
    assert test["nll_grid"] == pytest.approx(-found.arrays["log_px"].mean(), rel=1e-12)
    assert test["grid_error"] == found.arrays["error"].max() < 1e-6
    for key, prefix in (("q", ""), ("refined", "refined_")):
        above = found.arrays["log_px"] - found.arrays[f"log_px_{key}"]
        assert test[f"{prefix}above_grid"] == pytest.approx(above.mean())
        assert test[f"{prefix}above_grid_max"] == pytest.approx(above.max())
        stderr = test[f"{prefix}above_grid_stderr"]
        assert stderr == pytest.approx(above.std(ddof=1) / math.sqrt(20))
        assert -3 * stderr < above.mean() < 3 * stderr + 0.05
    assert np.abs(found.arrays["log_px"] - found.arrays["log_px_refined"]).max() < 0.15
    assert test["refined_above_grid_stderr"] < test["above_grid_stderr"]
    columns, lines = table_of({**found.numbers, "rows": found.rows})
    assert columns == ["test", "validation"]
    assert lines["NLL by the grid, nats"][0] == f"{test['nll_grid']:.4f}"
    assert lines["NLL_500 refined, nats"][1] == f"{found.numbers['validation']['nll_refined']:.4f}"
    # This q reaches beyond the grid, which the posterior does not.
    assert found.reasons == {} and len(found.notes) == 3 and "write estimator.span=14" in found.notes[2]


@pytest.mark.usefixtures("coarse_picture")
def test_a_grid_that_is_too_small_or_too_coarse_says_what_to_type() -> None:
    model = linear_gaussian(1, log_scale=-1.2)
    x = drawn(model, 20)
    small = " ".join(estimate(model, x, span=1.5).notes)
    assert "near the border" in small and "higher than by the grid" in small
    assert small.count("write estimator.span=3 estimator.points=281") >= 2
    coarse = " ".join(estimate(model, x, points=31).notes)
    assert "write estimator.points=61" in coarse and "border" not in coarse
    # The advice works.
    assert len(estimate(model, x, points=121).notes) == 2


@pytest.mark.parametrize("latents", [1, 2])
def test_densities_integrate_to_one_and_the_resampled_one_tends_to_the_posterior(latents: int) -> None:
    model = nonlinear(latents)
    x = drawn(model, 2)
    box = prior_box(model, 14, 201, 0)  # q is wider than the prior
    log_px = quadrature(model, x, box, rows=10**5).log_px
    proposal = refine(model, x, range(2), 0, "test")
    h = box.at(box.indices())[:, None].expand(-1, 2, -1)
    found = log_densities(model, x, h, log_px, proposal, ks=(1, 5, 50), seed=0, rows=10**5)
    mass = {name: np.exp(log + float(box.log_cell())) for name, log in found.items()}
    for name, values in mass.items():
        # The resampled one is a mean over ``REPEATS`` sets of draws.
        np.testing.assert_allclose(values.sum(0), 1, atol=0.1 if "resampled" in name else 1e-4)
    np.testing.assert_allclose(found["resampled, k = 1"], found["q(h|x)"], atol=1e-9)
    truth = found["exact p(h|x)"]
    kl = {}
    for name, values in mass.items():
        total = values.sum(0)
        kl[name] = (values * (found[name] - truth)).sum(0) / total - np.log(total)
    assert (kl["q(h|x)"] > 0.05).all()
    for less, more in (("resampled, k = 5", "q(h|x)"), ("resampled, k = 50", "resampled, k = 5")):
        assert (kl[less] > 0).all() and (kl[less] < 0.5 * kl[more]).all()
    assert (kl["refined q"] < 0.5 * kl["q(h|x)"]).all()


class Within(MLPPixels):
    """p(x|h) that is zero beyond 3, without change of its values elsewhere."""

    def log_prob(self, h: Tensor, given: Any) -> Tensor:
        return super().log_prob(h, given).masked_fill(given[..., 0].abs() > 3, -math.inf)


@pytest.mark.usefixtures("coarse")
def test_a_divergence_leaves_out_points_without_mass() -> None:
    """Of q nothing is beyond 3 here, or little: there 0 times an infinite ratio of densities is nothing."""
    model = nonlinear(1)
    with torch.no_grad():
        model.inference.layers[0].log_scale.bias.fill_(-4)
        model.inference.layers[0].log_scale.weight.fill_(0)
    x, box = drawn(model, 2), prior_box(model, 40, 8001, 0)
    found = []
    for cls in (MLPPixels, Within):
        model.generative.observation.__class__ = cls
        log_px = quadrature(model, x, box, rows=10**5).log_px
        asked = EstimatorInput(model, toy(x), evaluation(splits=["test"]))
        found.append([one.divergences["q(h|x)"] for one in picture.posteriors(asked, split_of(x), log_px, box, Mock())])
    assert min(found[0]) > 0.1
    np.testing.assert_allclose(found[1], found[0], rtol=0.05)


@pytest.mark.usefixtures("coarse")
def test_a_signal_is_seen_between_the_pieces_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the densities at its points, and before them of what finds the window."""
    model = nonlinear(1)
    x, box = drawn(model, 1), prior_box(model, 7, 401, 0)
    log_px = quadrature(model, x, box, rows=10**5).log_px
    proposal = refine(model, x, range(1), 0, "test")
    at_once, calls = BLOCK * BLOCK // picture.REPEATS, []
    for points in (at_once, 3 * at_once):
        check = Mock()
        h = torch.linspace(-1, 1, points).double()[:, None, None]
        log_densities(model, x, h, log_px, proposal, ks=(5,), seed=0, rows=BLOCK, check=check)
        calls.append(check.call_count)
    assert calls[1] == calls[0] + 2, "three pieces, not one"

    monkeypatch.setattr(picture, "refine", lambda *_: proposal)
    monkeypatch.setattr(picture, "log_densities", lambda *_, **__: pytest.fail("the window did not see it"))
    asked = EstimatorInput(model, toy(x), evaluation(splits=["test"]))
    with pytest.raises(Interrupted):
        picture.posteriors(asked, split_of(x), log_px, box, Mock(side_effect=Interrupted(signal.SIGTERM)))


def test_the_density_of_the_resampled_q_is_that_of_simulated_draws() -> None:
    """One in five draws of q, chosen by its weight, 20,000 times: their distribution function is its integral."""
    model = nonlinear(1)
    x = drawn(model, 1)
    box = prior_box(model, 7, 1001, 0)
    log_px = quadrature(model, x, box, rows=10**5).log_px
    proposal = refine(model, x, range(1), 0, "test")
    h = box.at(box.indices())[:, None]
    found = log_densities(model, x, h, log_px, proposal, ks=(5,), seed=0, rows=10**5)
    expected = np.exp(found["resampled, k = 5"][:, 0] + float(box.log_cell())).cumsum()
    n = 20_000
    with torch.no_grad():
        noise = GeneratorNoise(torch.Generator().manual_seed(1), torch.float64)
        (draws,), log_q = model.inference.sample(x.expand(n, -1), 5, noise)
        log_w = model.generative(x.expand(n, -1), (draws,)) - log_q  # (5, n)
        chosen = torch.distributions.Categorical(logits=log_w.T).sample()
    resampled = np.sort(draws[chosen, torch.arange(n), 0].numpy())
    observed = np.searchsorted(resampled, h[:, 0, 0].numpy(), side="right") / n
    by_q = np.exp(found["q(h|x)"][:, 0] + float(box.log_cell())).cumsum()
    assert np.abs(observed - expected / expected[-1]).max() < 0.03 < 0.1 < np.abs(observed - by_q).max()


@pytest.mark.usefixtures("coarse_picture")
def test_the_picture_shows_what_is_near_the_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Posterior] = []
    monkeypatch.setattr(estimator, "plot_posteriors", lambda path, posteriors: shown.extend(posteriors))
    model = nonlinear()
    found = estimate(model, drawn(model, 5), span=14)
    found.figures["posteriors.png"]("anywhere")  # type: ignore[arg-type]
    assert len(shown) == 3 and ["posteriors.png" in note for note in found.notes] == [False, True]
    for each in shown:
        steps = [side[1] - side[0] for side in each.sides]
        assert steps[0] == pytest.approx(steps[1]), "a square"
        assert list(each.densities) == list(each.divergences)
        for name in ("exact p(h|x)", "q(h|x)", "refined q"):
            assert 0.95 < each.densities[name].sum() * math.prod(steps) < 1.001
        ordered = [each.divergences[name] for name in ("q(h|x)", "resampled, k = 5", "resampled, k = 50")]
        assert ordered == sorted(ordered, reverse=True) and ordered[2] >= 0


@pytest.mark.usefixtures("coarse_picture")
def test_kl_is_not_cut_off_at_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(q || p(h|x)) = log p(x) - L_1 of two Gaussians in closed form; some of q lies beyond the frame."""
    shown: list[Posterior] = []
    monkeypatch.setattr(estimator, "plot_posteriors", lambda path, posteriors: shown.extend(posteriors))
    model = linear_gaussian(2, log_scale=-0.5)
    q: Any = model.inference.layers[0]
    with torch.no_grad():
        q.linear.weight.mul_(0.3)
        q.linear.bias.copy_(torch.tensor([0.6, -0.4]))
        q.log_diagonal.copy_(torch.tensor([-0.4, -0.3]))
        q.below_diagonal.zero_()
    x = drawn(model, 3).float().double()
    estimate(model, x).figures["posteriors.png"]("anywhere")  # type: ignore[arg-type]
    with torch.no_grad():
        of, precision = posterior(model, x)
        truth = torch.distributions.MultivariateNormal(of, precision_matrix=precision)
        approximation = torch.distributions.MultivariateNormal(q.mean(x), torch.diag((2 * q.log_diagonal).exp()))
        expected = torch.distributions.kl_divergence(approximation, truth)
    found = [each.divergences["q(h|x)"] for each in shown]
    assert expected.min() > 0.3
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize("points", [561, 8001])
def test_kl_of_one_narrow_latent_is_right_or_unknown(points: int) -> None:
    """Posterior and q are narrow beside the distance of 281 points, and of 561; 8,001 do."""
    model = linear_gaussian(1, log_scale=-5)
    q: Any = model.inference.layers[0]
    x = drawn(model, 2)
    with torch.no_grad():
        of, precision = posterior(model, x)
        q.log_diagonal.copy_(-precision.diagonal().log() / 2 + 0.3)
        q.linear.weight.zero_()
        q.linear.bias.copy_(of[0])
        truth = torch.distributions.MultivariateNormal(of, precision_matrix=precision)
        approximation = torch.distributions.MultivariateNormal(q.mean(x), torch.diag((2 * q.log_diagonal).exp()))
        expected = torch.distributions.kl_divergence(approximation, truth).numpy()
    box = prior_box(model, 7, points, 0)
    log_px = model.generative.exact_log_px(x).detach().numpy()
    asked = EstimatorInput(model, toy(x), evaluation(splits=["test"]))
    found = [one.divergences["q(h|x)"] for one in picture.posteriors(asked, split_of(x), log_px, box, Mock())]
    if points == 561:
        assert np.isnan(found).any()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-3)


class Positive(Conditional):
    """Gamma(2, 1) or LogNormal(0, 1) for one latent: of torch, which raise ValueError below zero, or without checks."""

    def __init__(self, name: str, checked: bool) -> None:
        super().__init__()
        of: Any = getattr(torch.distributions, name)
        one = torch.ones(1, dtype=torch.float64)
        self.of = of(2 * one if name == "Gamma" else 0 * one, one, validate_args=checked)

    def sample(self, given, k, batch, level, noise):  # type: ignore[no-untyped-def]
        h = noise.normal(level, k, batch, 1).exp()
        return h, self.log_prob(h, None)

    def log_prob(self, h, given):  # type: ignore[no-untyped-def]
        return self.of.log_prob(h).sum(-1)

    def mean(self, given):  # type: ignore[no-untyped-def]
        return self.of.mean


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(("prior", "words"), [("Gamma", "p[(]h[)]"), (None, "q[(]h[|]x[)]")])
def test_a_bounded_support_is_refused_before_any_work(prior: str | None, words: str, checked: bool) -> None:
    model = linear_gaussian(1)
    if prior is not None:
        model.generative.prior = Positive(prior, checked)
    model.inference.layers[0] = Positive("LogNormal", checked)  # type: ignore[index]
    with pytest.raises(UserError, match=f"estimator=grid .* {words} .*estimator=sandwich") as refusal:
        estimate(model, drawn(linear_gaussian(1), 2))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        (GaussianMLP([3], [[8]]), "3 real"),
        (GaussianMLP([2, 1], [[8], [4]]), "2 [+] 1 real"),
        (SigmoidBeliefNetwork([2]), "2 discrete"),
    ],
    ids=["three latents", "two layers", "bits"],
)
def test_other_models_are_refused_before_any_work(architecture: Architecture, words: str) -> None:
    model = built(architecture, PIXELS)
    with pytest.raises(UserError, match=f"{words}.*estimator=ais.*model.latent_sizes="):
        estimate(model, drawn(model, 2))
