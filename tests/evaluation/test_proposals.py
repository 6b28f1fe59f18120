"""Refined proposals against models whose log p(x) is known, and against quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from draws import built, drawn, split_of
from every_architecture import GaussianConvolutional, GaussianMLP, LinearGaussianModel, SigmoidBeliefNetwork
from grids import log_px_on_grid

from iwae_cli.core import noise as noise_module
from iwae_cli.core.noise import KeyedNoise
from iwae_cli.evaluation import proposals
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.evaluation.proposals import GROUP, SHARE, refine, why_not
from iwae_cli.models.base import LatentVariableModel

PIXELS = 6


def two_dimensional() -> LatentVariableModel:
    """Two latents and a posterior that q, drawn at random, is far from."""
    return built(GaussianMLP([2], [[8]]), PIXELS, times=2.5)


def test_on_a_linear_gaussian_model_it_finds_the_posterior() -> None:
    """The posterior is a Gaussian, so nine tenths of the draws have nearly the weight of log p(x)."""
    model = built(LinearGaussianModel([3]), PIXELS)
    x = drawn(model, 30)
    with torch.no_grad():
        model.inference.layers[0].linear.bias.add_(1.0)
    exact = model.generative.exact_log_px(x).detach().numpy()
    by_q = log_likelihood(model, split_of(x), k=500, seed=0, rows=5000)
    refined = log_likelihood(model, split_of(x), k=500, seed=0, rows=5000, refined=True)
    assert refined.ess.min() > 250 > 5 * np.median(by_q.ess)
    error = np.sqrt(np.maximum(1 / refined.ess - 1 / 500, 0))
    assert (np.abs(refined.log_px - exact) < 5 * error + 1e-3).all()
    assert np.abs(refined.log_px - exact).mean() < np.abs(by_q.log_px - exact).mean() / 5


def test_its_bounds_are_below_log_p_in_expectation() -> None:
    """Of 200 fits of one image on other noise each: E[L_k] <= log p(x), nearer than by q; and E[w] = p(x)."""
    model = two_dimensional()
    x = drawn(model, 1)
    log_px = log_px_on_grid(model, x, [2]).item()
    copies = split_of(x.repeat(200, 1))
    refined = log_likelihood(model, copies, k=5, seed=0, rows=10**5, refined=True)
    by_q = log_likelihood(model, copies, k=5, seed=0, rows=10**5)
    for k in (1, 5):
        error = refined.bounds[k].std() / math.sqrt(200)
        assert by_q.bounds[k].mean() < refined.bounds[k].mean() < log_px + 3 * error
    # The mean weight is p(x) itself: the density that is scored is that of the draws.
    weights = np.exp(refined.log_px - log_px)
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(200)


@pytest.mark.usefixtures("coarse")
def test_the_fit_and_the_estimate_share_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal fitted to the draws that it is scored on would exceed log p(x)."""
    keys: list[tuple[object, ...]] = []
    derive = noise_module.derive
    monkeypatch.setattr(noise_module, "derive", lambda *key: keys.append(key) or derive(*key))
    model = built(GaussianMLP([4, 3], [[8], [6]]), PIXELS)
    x = drawn(model, 5)
    proposal = refine(model, x, range(5), 3, "test")
    of_fit = set(keys)
    keys.clear()
    with torch.no_grad():
        proposal.sample(x, 100, KeyedNoise(3, "test", range(5), dtype=torch.float64))
    assert of_fit and keys and of_fit.isdisjoint(keys)
    assert all(3 in key and "test" in key for key in of_fit), "another seed or split is another fit"
    assert not torch.equal(refine(model, x, range(5), 4, "test").loc, proposal.loc)
    assert not torch.equal(refine(model, x, range(5), 3, "train").loc, proposal.loc)


def test_where_a_fit_diverges_q_itself_is_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two_dimensional()
    x = drawn(model, 30)
    monkeypatch.setattr(proposals, "RATE_LOC", math.inf)
    lost = log_likelihood(model, split_of(x), k=500, seed=0, rows=10**5, refined=True)
    by_q = log_likelihood(model, split_of(x), k=500, seed=0, rows=10**5)
    error = np.sqrt(1 / lost.ess + 1 / by_q.ess)
    assert (np.abs(lost.log_px - by_q.log_px) < 6 * error).all()


@pytest.mark.parametrize(("wider", "narrower"), [(-8, 0), (2, 0), (4, 0), (0, 2), (2, 2)])
def test_a_fit_is_not_bound_to_the_scale_of_q_or_p(wider: int, narrower: int) -> None:
    """q is e^wider times as wide as it was, and the noise of x, hence the posterior, e^narrower times narrower."""
    model = built(LinearGaussianModel([3]), PIXELS)
    with torch.no_grad():
        model.inference.layers[0].log_diagonal.add_(wider)
        model.generative.observation.log_scale.sub_(narrower)
        x = drawn(model, 20)
        exact = model.generative.exact_log_px(x).numpy()
    refined = log_likelihood(model, split_of(x), k=500, seed=0, rows=5000, refined=True)
    assert np.median(refined.ess) > 400
    assert (np.abs(refined.log_px - exact) < 5 * np.sqrt(1 / refined.ess)).all()


@pytest.mark.usefixtures("coarse")
def test_no_weight_exceeds_that_of_q_alone_divided_by_its_share() -> None:
    model = two_dimensional()
    x = drawn(model, 5)
    proposal = refine(model, x, range(5), 0, "test")
    with torch.no_grad():
        latents, log_r = proposal.sample(x, 200, KeyedNoise(0, "test", range(5), dtype=torch.float64))
        assert (log_r >= model.inference(x, latents) + math.log(SHARE) - 1e-12).all()


MODELS = {
    "linear_gaussian": (LinearGaussianModel([3]), (PIXELS,)),
    "three_layers": (GaussianMLP([4, 3, 2], [[8], [6], [5]]), (PIXELS,)),
    "grey": (GaussianMLP([3], [[8]], likelihood="discretized_logistic"), (PIXELS,)),
    "conv": (GaussianConvolutional(3, [2, 3], 8), (8, 8)),
}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("name", list(MODELS))
def test_a_fit_depends_on_its_image_alone(name: str) -> None:
    """Bit for bit, for every model with real latents."""
    architecture, shape = MODELS[name]
    model = built(architecture, shape)
    x = drawn(model, GROUP + 5).float()
    model.float()
    whole = refine(model, x, range(len(x)), 0, "test")
    others = x.clone()
    others[1:GROUP] = x[0]
    for images in (x[: GROUP + 3], others):
        part = refine(model, images, range(len(images)), 0, "test")
        unchanged = [i for i in range(len(images)) if torch.equal(images[i], x[i])]
        assert torch.equal(part.loc[unchanged], whole.loc[unchanged])
        assert torch.equal(part.cholesky[unchanged], whole.cholesky[unchanged])


def test_discrete_latents_have_none() -> None:
    assert why_not(two_dimensional()) is None
    assert "discrete" in str(why_not(built(SigmoidBeliefNetwork([4]), PIXELS)))
