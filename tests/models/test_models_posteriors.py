"""Families of q and of priors: where they begin, their gradients, and how good each can become."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draws import built, noise
from every_architecture import GaussianMLP, LinearGaussianModel
from every_objective import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, REINFORCE, RWS, TVO, UMIWAE, VIMCO, VR
from grids import grid, log_px_on_grid
from objective_toys import quadrature
from small_runs import TINY, finished, read_json
from torch import Tensor, nn

from iwae_cli.cli.evaluate import evaluate
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import Conditional, GaussianConditional, LinearBits
from iwae_cli.models.posteriors import Coupling, FullGaussian, GaussianMixture
from iwae_cli.models.priors import MixturePrior, VampPrior
from iwae_cli.objectives.base import BoundObjective, Objective

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


def elbo(q: Conditional, p: GenerativeChain, x: Tensor, steps: int = 600) -> float:
    """The best E_q[log p(x, h) - log q(h|x)] that training of q finds."""
    q.train()
    optimizer = torch.optim.Adam(q.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        h, log_q = q.sample(x, 30, 1, 1, noise(step))
        optimizer.zero_grad()
        (-(p(x, (h,)) - log_q).mean()).backward()
        optimizer.step()
        schedule.step()
    q.eval()
    with torch.no_grad():
        h, log_q = q.sample(x, 100_000, 1, 1, noise(-1 % 2**32))
        return float((p(x, (h,)) - log_q).mean())


def test_nested_families_come_closer_to_a_correlated_posterior() -> None:
    """p(h|x) of x | h ~ N(W h, I/4) and h ~ N(0, I) has the precision I + 4 W^T W, here a correlation of 0.86."""
    weight = torch.tensor([[2.0, -2.0], [1.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    built = LinearGaussianModel([2]).build((INPUTS,), np.zeros(INPUTS), torch.Generator().manual_seed(0)).double()
    p, x = built.generative.requires_grad_(False), torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64)
    p.observation.linear.weight.copy_(weight)
    p.observation.linear.bias.zero_()
    p.observation.log_scale.fill_(-math.log(2))
    torch.manual_seed(0)
    exact = float(p.exact_log_px(x))
    found = {name: elbo(DENSE[name](2).double(), p, x) - exact for name in DENSE}
    # The best diagonal Gaussian has the mean of the posterior, and the diagonal of its precision as its precisions.
    precision = torch.eye(2, dtype=torch.float64) + 4 * weight.T @ weight
    kl = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    assert kl > 0.6 and found["diagonal"] == pytest.approx(-kl, abs=0.02)
    assert found["full"] == pytest.approx(0, abs=0.005)
    assert found["coupling"] == pytest.approx(0, abs=0.02)  # b exp(s) + t(a) with t linear in a is this posterior
    assert found["diagonal"] + 0.2 < found["mixture"] < 0


def test_a_mixture_prior_draws_by_its_weights() -> None:
    prior = MixturePrior(3, 2).double()
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
        prior.loc.copy_(torch.tensor([[-4.0, 0.0], [0.0, 3.0], [4.0, -2.0]]))
        prior.log_scale.copy_(torch.tensor([[-0.5, 0.0], [0.2, -0.3], [-1.0, 0.3]]))
        (h,), log_cell = grid([2], 401, 25.0)
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


def wild(**settings: Any) -> LatentVariableModel:
    return built(GaussianMLP([2], [[6]], **settings), 4, seed=0, plus=0.3)


class Inside(PIWAE):
    """As a user may write it: it keeps no gradient of its own, and not every gradient serves it."""

    stratified = True

    def __init__(self, k: int, gradient: Any = "dreg") -> None:
        super().__init__(2, k, gradient)
        del self.gradient


class Cut(ELBO):
    """The ELBO of log-weights below 10 alone."""

    weights, doubly_weights = BoundObjective.weights, BoundObjective.doubly_weights

    def bound(self, log_w: Tensor) -> Tensor:
        return torch.where(log_w > 10, log_w.sigmoid() + 9, log_w).mean(0)


def test_objectives_that_need_independent_draws_refuse_components_in_turn() -> None:
    model = wild(posterior="mixture", posterior_size=4)
    for fine in (
        IWAE(8), IWAE(4, "stl"), ELBO(4), ELBO(4, "dreg"), MIWAE(3, 4), PIWAE(2, 4), VR(4, 0.5), CIWAE(4, 0.3), TVO(4),
        RWS(4), CIWAE(4, 1, "dreg"), TVO(4, 1, gradient="dreg"),
    ):  # fmt: skip
        assert fine.check_networks(model) is None
    for wrong in (
        IWAE(4, "dreg"), CIWAE(4, 0.9, "dreg"), PIWAE(2, 4, "dreg"), UMIWAE(2, 4), JVI(4), VIMCO(4), REINFORCE(4),
        TVO(4, gradient="covariance"), RWS(4, gradient="dreg"), Inside(4), Cut(4, "dreg"),
    ):  # fmt: skip
        assert "independent draws" in (wrong.check_networks(model) or ""), wrong
        assert wrong.check_networks(wild(posterior="coupling")) is None
    for k in (MIWAE(4, 6), IWAE(2)):  # groups, too, must hold every component equally often
        assert "objective.k=" in (k.check_networks(model) or "")


def test_what_a_chain_says_of_its_layers_follows_a_layer_that_is_replaced() -> None:
    q = built(GaussianMLP([2], [[5]]), 4).inference
    q.layers[0] = made("mixture", 2)
    model = LatentVariableModel(built(GaussianMLP([2], [[5]]), 4).generative, q)
    assert q.strata == 3 and "independent draws" in (VIMCO(3).check_networks(model) or "")
    assert "objective.k=6" in (IWAE(5).check_networks(model) or "")
    q.layers[0] = LinearBits(4, 2).double()
    assert q.strata == 1 and not q.reparameterized and not model.draw(torch.ones(1, 4).double(), 2).reparameterized


def test_a_chain_of_a_user_may_say_it_itself() -> None:
    class OfClass(InferenceChain):
        reparameterized, strata = False, 2

    class OfObject(InferenceChain):
        def __init__(self) -> None:
            super().__init__([])
            self.reparameterized, self.strata = False, 2

    for chain in (OfClass([]), OfObject()):
        assert not chain.reparameterized and chain.strata == 2
    assert InferenceChain([]).reparameterized and InferenceChain([]).strata == 1


def test_in_turn_the_path_derivative_of_the_elbo_is_unbiased_and_baselines_are_not() -> None:
    model, x = wild(posterior="mixture", posterior_size=3), torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        model.inference.layers[0].loc.bias += torch.tensor([1.5, 0.0, -1.5, 0.0, 0.0, 1.5])  # apart from each other

    def gradient(objective: Objective, in_turn: bool, n: int = 50) -> tuple[Tensor, Tensor]:
        """Mean and squared error of the gradient of the locations of the components."""
        model.train(in_turn)
        losses = (objective.drawn_losses(model, x.expand(300, 4), noise(seed + 1000 * in_turn)) for seed in range(n))
        bias = model.inference.layers[0].loc.bias
        found = torch.stack([torch.autograd.grad(one.inference, bias)[0] for one in losses])
        return found.mean(0), found.var(0) / n

    mean, error = gradient(ELBO(3), False, 100)
    off = {}
    for name, objective in {"dreg": ELBO(3, "dreg"), "reinforce": REINFORCE(3)}.items():
        of_turns, its_error = gradient(objective, True)
        off[name] = float(((of_turns - mean).square() / (error + its_error)).mean().sqrt())
    assert off["dreg"] < 1.6 and off["reinforce"] > 2.5, off


def test_a_stratified_bound_is_a_lower_bound_that_is_tighter_than_with_random_components() -> None:
    model = wild(posterior="mixture", posterior_size=4)
    with torch.no_grad():
        # Components far from each other.
        model.inference.layers[0].loc.bias += torch.tensor([2.0, 0.0, -2.0, 0.0, 0.0, 2.0, 0.0, -2.0])
        x = model.generative.sample(1, noise(3))[1].expand(40_000, 4)
        exact = log_px_on_grid(model, x[:1], [2])
        bounds = {}
        for mode in (True, False):
            model.train(mode)
            bounds[mode] = IWAE(4).bound(model.draw(x, 4, noise(4)).log_w)
    error = {mode: float(bound.std()) / 200 for mode, bound in bounds.items()}
    assert bounds[True].mean() < exact + 4 * error[True]
    # The spread between components is no noise of the mean weight any more.
    assert bounds[True].mean() > bounds[False].mean() + 4 * (error[True] + error[False])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"posterior": "coupling", "latent_sizes": [1]},
            "posterior=coupling needs two latents or more in every layer",
        ),
        ({"posterior": "mixture", "posterior_size": 1}, "posterior_size must be >= 2, got 1"),
        (
            {"prior": "vamp", "posterior": "full"},
            "prior=vamp needs model.posterior=diagonal, got full: write model.prior=mixture",
        ),
        (
            {"prior": "vamp", "latent_sizes": [3, 2], "hidden_sizes": [[4], [4]]},
            "prior=vamp needs one stochastic layer",
        ),
        ({"prior": "mixture", "prior_components": 0}, "prior_components must be >= 1, got 0"),
        ({"prior": "vamp", "likelihood": "gaussian"}, "prior=vamp needs pixels in [0, 1]"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        GaussianMLP(**{"latent_sizes": [2], "hidden_sizes": [[4]], **settings})
    assert str(caught.value).startswith(message)


CHOICES = {
    "posterior=full": ("gaps", "sandwich"),
    "posterior=coupling": ("sandwich", "grid"),
    "posterior=mixture": ("sandwich",),
    "prior=mixture": ("ais", "grid"),
    "prior=vamp": ("sandwich",),
}
SMALL = {
    "ais": (
        *("estimator.images=2", "estimator.temperatures=4", "estimator.max_temperatures=4"),
        *("estimator.leapfrog_steps=1", "estimator.chains=2", "estimator.simulated=0"),
    ),
    "gaps": ("estimator.images=3",),
    "sandwich": ("estimator.simulated=4",),
    "grid": ("estimator.images=2", "estimator.points=41", "estimator.k=20"),
}


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("choice", CHOICES)
def test_runs_and_their_estimators(tmp_path: Path, choice: str) -> None:
    asked = ("model.latent_sizes=[2]", f"model.{choice}", *["model.prior_components=4"] * choice.startswith("prior"))
    folder = finished(tmp_path, *TINY[1:], *asked, "evaluation.refine=20")
    result = read_json(folder / "result.json")
    assert result["test"]["nll"] > 0 and result["test"]["refined"]["n"] == 20 and len(result["active_units"]) == 1
    for estimator in CHOICES[choice]:
        assert evaluate([str(folder), f"estimator={estimator}", *SMALL[estimator], "evaluation.splits=[test]"]) == 0
    if choice in ("posterior=coupling", "posterior=mixture"):
        assert evaluate([str(folder), "estimator=gaps"]) == 2
