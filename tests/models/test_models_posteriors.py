"""Families of q: densities that integrate to one and belong to the draws, gradients, and how good each can become."""

from __future__ import annotations

import math

import pytest
import torch
from objective_toys import quadrature
from torch import Tensor, nn

from iwae_cli.core.noise import GeneratorNoise, KeyedNoise
from iwae_cli.models.conditionals import Conditional, GaussianConditional
from iwae_cli.models.posteriors import Coupling, FullGaussian, GaussianMixture
from iwae_cli.models.priors import MixturePrior, VampPrior

INPUTS, FEATURES = 3, 5
DENSE = {
    "diagonal": lambda d: GaussianConditional(INPUTS, [FEATURES], d),
    "full": lambda d: FullGaussian(body(), FEATURES, d),
    "coupling": lambda d: Coupling(body(), FEATURES, d, 3),
    "mixture": lambda d: GaussianMixture(body(), FEATURES, d, 3, stratified=True),
}


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, FEATURES), nn.Tanh())


def made(name: str, size: int) -> Conditional:
    """With arbitrary weights, also where they begin at zero."""
    torch.manual_seed(3)
    conditional = DENSE[name](size).double().eval()
    with torch.no_grad():
        for parameter in conditional.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
    return conditional


def noise(seed: int = 0) -> GeneratorNoise:
    return GeneratorNoise(torch.Generator().manual_seed(seed), torch.float64)


def grid(points: int = 601, reach: float = 25.0) -> tuple[Tensor, float]:
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    h = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    return h, 2 * math.log(2 * reach / (points - 1))


@pytest.mark.parametrize("name", DENSE)
def test_the_density_integrates_to_one_and_is_that_of_the_draws(name: str) -> None:
    q, x = made(name, 2), torch.randn(2, INPUTS, dtype=torch.float64)
    h, log_cell = grid()
    with torch.no_grad():
        density = (q.log_prob(h.expand(-1, 2, 2), x) + log_cell).exp()  # (points, 2)
        drawn, log_q = q.sample(x, 40_000, 2, 1, noise())
        torch.testing.assert_close(q.log_prob(drawn, x), log_q, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(density.sum(0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
        mean = torch.einsum("mn,mnd->nd", density, h.expand(-1, 2, 2))
        square = torch.einsum("mn,mnd,mne->nde", density, h.expand(-1, 2, 2), h.expand(-1, 2, 2))
        error = (square.diagonal(dim1=1, dim2=2) - mean.square()).sqrt() / 200
        assert ((drawn.mean(0) - mean).abs() < 4.5 * error).all()
        of_draws = torch.einsum("knd,kne->nde", drawn, drawn) / len(drawn)
        assert (of_draws - square).abs().max() < 0.05 * square.abs().max()
        closed = q.mean(x)
        assert (closed is None) == (name == "coupling")
        if closed is not None:
            torch.testing.assert_close(closed, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_draws_and_density_given_a_draw_of_the_layer_below_agree(name: str, size: int) -> None:
    """One ``given`` for every draw, as in the upper layers of a model, and every parameter has a gradient."""
    q, given = made(name, size), torch.randn(7, 4, INPUTS, dtype=torch.float64)
    h, log_q = q.sample(given, 7, 4, 2, noise())
    torch.testing.assert_close(q.log_prob(h, given), log_q, rtol=1e-9, atol=1e-9)
    one_by_one = torch.stack([q.log_prob(h[i : i + 1], given[i])[0] for i in range(7)])
    torch.testing.assert_close(one_by_one, log_q, rtol=1e-9, atol=1e-9)
    gradients = torch.autograd.grad((h.square().sum() + log_q.sum()), list(q.parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    # The draws of an image are those of its own noise, for any number of them.
    keyed = KeyedNoise(0, "test", range(4), dtype=torch.float64)
    first, _ = q.sample(given[0], 3, 4, 1, keyed)
    more, _ = q.sample(given[0], 90, 4, 1, keyed)
    torch.testing.assert_close(more[:3], first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["full", "coupling"])
def test_richer_families_begin_as_a_diagonal_gaussian(name: str) -> None:
    q, x = DENSE[name](4).double(), torch.randn(3, INPUTS, dtype=torch.float64)
    h, _ = q.sample(x, 2000, 3, 1, noise())
    centred = h - h.mean(0)
    covariance = torch.einsum("knd,kne->nde", centred, centred) / len(h)
    scale = covariance.diagonal(dim1=1, dim2=2).sqrt()
    correlation = covariance / (scale[:, :, None] * scale[:, None, :])
    assert (correlation - torch.eye(4, dtype=torch.float64)).abs().max() < 0.1
    standardized = (h - h.mean(0)) / scale
    assert (standardized.pow(4).mean(0) - 3).abs().max() < 0.8  # of a Gaussian: 3, with an error of 0.2


def test_stratified_draws_take_the_components_in_turn() -> None:
    """E[w] = p(x) for draws in turn, by quadrature over each component."""
    q, x = made("mixture", 1), torch.randn(1, INPUTS, dtype=torch.float64)
    assert isinstance(q, GaussianMixture)
    q.train()
    nodes, weights = quadrature(1, 80)
    h, _ = q.sample(x, 3, 1, 1, noise())
    loc, log_scale = (v[0, :, 0] for v in q(x))
    again = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 0, 0]
    torch.testing.assert_close(h[:, 0, 0], loc + log_scale.exp() * again)
    points = loc[:, None] + log_scale.exp()[:, None] * nodes  # (components, nodes)
    log_p = -0.5 * points.square() - 0.5 * math.log(2 * math.pi)  # an unnormalized posterior would do as well
    w = (log_p - q.log_prob(points.reshape(-1, 1, 1), x).view(points.shape)).exp()
    assert (w @ weights).mean().item() == pytest.approx(1, abs=1e-4)


def elbo(q: Conditional, target: Tensor, steps: int = 1500) -> float:
    """The best E_q[log N(h; (1, -1), target) - log q(h)] that training finds: 0 is the most."""
    x, loc = torch.ones(1, INPUTS, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(loc, target)
    q.train()
    optimizer = torch.optim.Adam(q.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        h, log_q = q.sample(x, 30, 1, 1, noise(step))
        optimizer.zero_grad()
        (-(p.log_prob(h) - log_q).mean()).backward()
        optimizer.step()
        schedule.step()
    q.eval()
    with torch.no_grad():
        h, log_q = q.sample(x, 100_000, 1, 1, noise(-1 % 2**32))
        return float((p.log_prob(h) - log_q).mean())


def test_nested_families_come_closer_to_a_correlated_posterior() -> None:
    target = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    found = {name: elbo(DENSE[name](2).double(), target) for name in DENSE}
    # The best diagonal Gaussian has the precisions 1/(1 - 0.81) of the target: -KL = log(1 - 0.81) / 2 = -0.830.
    assert found["diagonal"] == pytest.approx(0.5 * math.log(1 - 0.81), abs=0.02)
    assert found["full"] == pytest.approx(0, abs=0.005)
    assert found["coupling"] == pytest.approx(0, abs=0.02)  # b exp(s) + t(a) with t linear in a is this target
    assert found["diagonal"] + 0.2 < found["mixture"] < 0


def test_a_mixture_prior_draws_by_its_weights() -> None:
    prior = MixturePrior(3, 2).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        prior.loc.copy_(torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, -2.0]]))
        prior.log_scale.copy_(torch.tensor([[-0.5, 0.0], [0.2, -0.3], [-1.0, 0.3]]))
        h, log_cell = grid()
        assert (prior.log_prob(h, None) + log_cell).exp().sum().item() == pytest.approx(1, abs=1e-9)
        drawn, log_p = prior.sample(None, 200, 100, 1, noise())
        torch.testing.assert_close(prior.log_prob(drawn, None), log_p)
        nearest = torch.cdist(drawn.reshape(-1, 2), prior.loc).argmin(1).bincount(minlength=3) / 20_000
        torch.testing.assert_close(nearest.double(), torch.softmax(prior.logits, 0), rtol=0, atol=0.03)
        mean = prior.mean(None)
        torch.testing.assert_close(drawn.mean((0, 1)), mean, rtol=0, atol=0.1)


def test_a_vamp_prior_is_the_mixture_of_its_q_given_learned_images() -> None:
    torch.manual_seed(0)
    q = GaussianConditional(6, [5], 2).double()
    prior = VampPrior(q, torch.full((6,), 0.4, dtype=torch.float64), 4)
    prior.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():
        prior.images[0, 0], prior.images[1, 1] = 1.7, -0.3  # clamped
        h = torch.randn(50, 7, 2, dtype=torch.float64)
        each = torch.stack([q.log_prob(h, image.clamp(0, 1).expand(7, -1)) for image in prior.images])
        torch.testing.assert_close(prior.log_prob(h, None), each.logsumexp(0) - math.log(4))
    assert {id(p) for p in q.parameters()} < {id(p) for p in prior.parameters()}
    gradient = torch.autograd.grad(prior.log_prob(h, None).sum(), prior.images)[0]
    assert gradient[0, 0] == 0 and gradient[1, 1] == 0 and (gradient[2:].abs() > 0).all()
