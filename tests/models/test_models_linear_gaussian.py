"""The linear-Gaussian chain against the joint precision of (h_L, ..., h_1, x), built and inverted here."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from draws import built, drawn, noise, split_of
from scipy import stats
from torch import Tensor

from iwae_cli.evaluation.likelihood import log_likelihood, summarize
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel
from iwae_cli.models.base import LatentVariableModel

PIXELS = 5
SIZES = [[1], [3], [3, 2], [4, 3, 2]]
every_chain = pytest.mark.parametrize("sizes", SIZES, ids=str)


def build(sizes: list[int]) -> LatentVariableModel:
    return built(LinearGaussianModel(sizes), PIXELS, seed=0, mean=np.linspace(-1, 1, PIXELS), plus=0.4)


class Joint:
    """Mean and covariance of (x, h_1, ..., h_L), from the precision A^T D^-1 A of the chain v = A^-1 (c + noise).

    Nothing is marginalized or conditioned by the package: each variable less its prediction from the one above is
    independent noise, which gives A row by row.
    """

    def __init__(self, model: LatentVariableModel) -> None:
        layers = [
            (
                layer.linear.weight.detach().numpy(),
                layer.linear.bias.detach().numpy(),
                layer.log_scale.detach().exp().numpy(),
            )
            for layer in (model.generative.observation, *model.generative.layers)
        ]
        sizes = [w.shape[0] for w, _, _ in layers] + [layers[-1][0].shape[1]]
        edges = np.cumsum([0, *sizes])
        self.part = [slice(a, b) for a, b in pairwise(edges)]
        a = np.eye(edges[-1])
        constant, variance = np.zeros(edges[-1]), np.ones(edges[-1])
        for level, (weight, bias, scale) in enumerate(layers):
            a[self.part[level], self.part[level + 1]] = -weight
            constant[self.part[level]] = bias
            variance[self.part[level]] = scale**2
        self.mean = np.linalg.solve(a, constant)
        self.covariance = np.linalg.inv(a.T @ np.diag(1 / variance) @ a)

    def conditional(self, target: int, given: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(A, c, C) of v_target | v_given ~ N(A v_given + c, C)."""
        t, g = self.part[target], self.part[given]
        gain = self.covariance[t, g] @ np.linalg.inv(self.covariance[g, g])
        covariance = self.covariance[t, t] - gain @ self.covariance[g, t]
        return gain, self.mean[t] - gain @ self.mean[g], covariance

    def log_px(self, x: Tensor) -> np.ndarray:
        p = self.part[0]
        return np.atleast_1d(stats.multivariate_normal(self.mean[p], self.covariance[p, p]).logpdf(x.numpy()))


def set_exact_posterior(model: LatentVariableModel) -> None:
    """q(h_1|x) = p(h_1|x), and q(h_l|h_(l-1)) = p(h_l|h_(l-1)), which does not depend on what lies below."""
    joint = Joint(model)
    with torch.no_grad():
        for level, layer in enumerate(model.inference.layers):
            gain, constant, covariance = (torch.from_numpy(v) for v in joint.conditional(level + 1, level))
            factor = torch.linalg.cholesky((covariance + covariance.T) / 2)
            layer.linear.weight.copy_(gain)
            layer.linear.bias.copy_(constant)
            layer.log_diagonal.copy_(factor.diagonal().log())
            layer.below_diagonal.copy_(factor.tril(-1))


@every_chain
def test_the_exact_marginal(sizes: list[int]) -> None:
    """T1, T7: an order of layers or a conditioning gone wrong would show in the marginal."""
    model = build(sizes)
    x = 3 * torch.randn(20, PIXELS, dtype=torch.float64)
    exact = model.generative.exact_log_px(x)
    np.testing.assert_allclose(exact.detach().numpy(), Joint(model).log_px(x), rtol=1e-10)


@every_chain
def test_log_p_is_the_density_of_the_joint(sizes: list[int]) -> None:
    model, x = build(sizes), drawn(build(sizes), 6)
    latents = tuple(torch.randn(4, 6, d, dtype=torch.float64) for d in sizes)
    joint = Joint(model)
    values = torch.cat([x.expand(4, 6, PIXELS), *latents], dim=-1)
    expected = stats.multivariate_normal(joint.mean, joint.covariance).logpdf(values.numpy())
    np.testing.assert_allclose(model.generative(x, latents).detach().numpy(), expected, rtol=1e-9)


@every_chain
def test_with_the_exact_posterior_every_log_weight_is_log_p_without_a_path_derivative(sizes: list[int]) -> None:
    """T2: STL and DReG have no variance left for any weights; the total derivative keeps that of the score."""
    model = build(sizes)
    x = drawn(model, 4)
    assert model(x, 16, noise()).std(0).min() > 0.01
    set_exact_posterior(model)
    particles = model.draw(x, 16, noise())
    expected = torch.from_numpy(Joint(model).log_px(x)).expand(16, 4)
    torch.testing.assert_close(particles.log_w, expected, rtol=0, atol=1e-10)

    def largest(values: Tensor) -> float:
        phi = list(model.inference.parameters())
        found = [torch.autograd.grad(v, phi, retain_graph=True, materialize_grads=True) for v in values.flatten()]
        return max(g.abs().max().item() for sample in found for g in sample)

    assert largest(particles.log_w_frozen) < 1e-10
    assert largest(particles.log_w) > 0.1


@pytest.mark.parametrize("sizes", [[1], [3]], ids=str)
def test_the_closed_form_kl(sizes: list[int]) -> None:
    model = build(sizes)
    x = drawn(model, 6)
    layer = model.inference.layers[0]
    q = torch.distributions.MultivariateNormal(layer.linear(x), scale_tril=layer.cholesky())
    prior = torch.distributions.MultivariateNormal(torch.zeros(sizes[0]).double(), torch.eye(sizes[0]).double())
    expected = torch.distributions.kl_divergence(q, prior)
    torch.testing.assert_close(model.kl(x), expected, rtol=1e-9, atol=1e-9)


def wide_posterior(model: LatentVariableModel) -> None:
    """q near the exact posterior and wider, so that the weights have a finite variance."""
    set_exact_posterior(model)
    with torch.no_grad():
        for layer in model.inference.layers:
            layer.linear.bias += 0.2
            layer.log_diagonal += 0.25
            layer.below_diagonal *= 1.25


@every_chain
def test_the_bounds_lie_below_and_the_estimate_agrees(sizes: list[int]) -> None:
    """T1: E[L_k] <= log p(x) for every k, and L_5000 is log p(x) within the errors that it states."""
    model = build(sizes)
    wide_posterior(model)
    x = drawn(model, 50)
    likelihood = log_likelihood(model.eval(), split_of(x), k=5000, seed=0, rows=4000, workers=1)
    summary, _ = summarize(likelihood, PIXELS)
    exact = Joint(model).log_px(x)
    assert likelihood.exact is not None
    np.testing.assert_allclose(likelihood.exact, exact, rtol=1e-10)
    assert abs(likelihood.log_px.mean() - exact.mean()) < 3 * summary["stderr_mc"] + 2 * abs(summary["bias_mc"])
    assert summary["stderr_mc"] < 0.02
    # L_1 and L_5 are means over 5,000 and 1,000 groups an image, so that their gap is no accident.
    gaps = [exact.mean() - likelihood.bounds[m].mean() for m in (1, 5, 50)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > gaps[1] > 5 * summary["stderr_mc"]
