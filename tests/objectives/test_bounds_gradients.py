"""The estimators' expectations, by quadrature and by enumeration, against derivatives found another way."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from every_architecture import Categorical, GaussianMLP, SigmoidBeliefNetwork
from every_objective import CIWAE, ELBO, IWAE, JVI, MIWAE, PIWAE, REINFORCE, RWS, TVO, UMIWAE, VIMCO, VR
from objective_toys import (
    POSTERIOR_MEAN_A,
    POSTERIOR_VARIANCE_A,
    X_A,
    GivenNoise,
    ScalarChainP,
    ScalarChainQ,
    expected_gradients,
    fixture_a,
    outcome_gradients,
    quadrature,
)
from torch import Tensor

from iwae_cli.config.build import build
from iwae_cli.core.interfaces import Particles
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.chain import GenerativeChain, InferenceChain
from iwae_cli.models.conditionals import GaussianConditional, LinearBits
from iwae_cli.models.priors import BitsPrior
from iwae_cli.objectives.base import Objective, score_term

CONF = Path(__file__).resolve().parents[2] / "conf" / "objective"
PHI = ("inference.loc", "inference.log_scale")
BASELINES = ("geometric", "arithmetic", "zero")

# Of two draws each, with the estimator of the gradient left open.
TWO_DRAWS = {
    "iwae": lambda gradient: IWAE(2, gradient),
    "vr0.5": lambda gradient: VR(2, 0.5, gradient),
    "vr-0.5": lambda gradient: VR(2, -0.5, gradient),
    "vr1.5": lambda gradient: VR(2, 1.5, gradient),
    "ciwae0.3": lambda gradient: CIWAE(2, 0.3, gradient),
    "tvo": lambda gradient: TVO(2, 3, gradient=gradient),
    "tvo-linear": lambda gradient: TVO(2, 2, "linear", gradient=gradient),
    "jvi": lambda gradient: JVI(2, gradient),
}
LINEAR = {
    "elbo": lambda gradient: ELBO(2, gradient),
    "miwae2x1": lambda gradient: MIWAE(2, 1, gradient),
    "tvo1": lambda gradient: TVO(2, 1, gradient=gradient),
}


def derivative_of_expected_bound(objective: Objective, parameter: str, points: int = 80) -> float:
    """Central difference of the expected value, which no estimator of a gradient has touched."""
    step, values = 1e-4, []
    nodes, weights = quadrature(objective.num_samples, points)
    for sign in (1, -1):
        model, x = fixture_a(weights.numel())
        with torch.no_grad():
            dict(model.named_parameters())[parameter].add_(sign * step)
            bound = objective.bound(model(x, objective.num_samples, GivenNoise({1: nodes[..., None]})))
        values.append((bound @ weights).item())
    return (values[0] - values[1]) / (2 * step)


# Fixture A


@pytest.mark.parametrize("name", [*TWO_DRAWS, *LINEAR])
def test_total_and_dreg_are_unbiased(name):
    make = (TWO_DRAWS | LINEAR)[name]
    total, bound = expected_gradients(make("total"))
    dreg, same_bound = expected_gradients(make("dreg"))
    assert bound.item() == same_bound.item()
    # Powers above one of the weights cost the quadrature digits: 2e-6, 3e-7, 6e-8 at 60, 80, 100 points.
    tolerance = 1e-6 if name == "vr-0.5" else 1e-8
    for parameter in (*PHI, "generative.slope", "generative.log_scale"):
        assert dreg[parameter].item() == pytest.approx(total[parameter].item(), abs=tolerance)
        # The difference quotient errs by step^2 times a third derivative of order 10, and rounding by 1e-16 / step.
        found = derivative_of_expected_bound(make("total"), parameter)
        assert total[parameter].item() == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("name", TWO_DRAWS)
def test_stl_is_biased_for_phi_and_right_for_theta(name):
    total, _ = expected_gradients(TWO_DRAWS[name]("total"))
    stl, _ = expected_gradients(TWO_DRAWS[name]("stl"))
    assert abs(stl["inference.loc"] - total["inference.loc"]) > 0.02
    for parameter in ("generative.slope", "generative.log_scale"):
        assert stl[parameter].item() == pytest.approx(total[parameter].item(), abs=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_stl_is_right_where_the_bound_is_linear(name):
    total, _ = expected_gradients(LINEAR[name]("total"))
    stl, _ = expected_gradients(LINEAR[name]("stl"))
    for parameter, gradient in total.items():
        assert stl[parameter].item() == pytest.approx(gradient.item(), abs=1e-8)


def test_groups_have_the_gradient_of_one_group():
    # E[MIWAE(2, 2)] = E[IWAE(2)]; four dimensions of 20 points.
    for gradient in ("total", "dreg"):
        two, _ = expected_gradients(IWAE(2, gradient))
        for objective in (MIWAE(2, 2, gradient), UMIWAE(2, 2, 3, gradient)):
            groups, bound = expected_gradients(objective, points=20)
            assert bound.item() == pytest.approx(-1.6633089557, abs=1e-5)
            for parameter in PHI:
                assert groups[parameter].item() == pytest.approx(two[parameter].item(), abs=1e-4)


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_piwae_pairs_the_two_bounds(gradient):
    noise = GivenNoise({1: torch.randn(6, 50, 1, dtype=torch.float64)})
    model, x = fixture_a(50)
    found, bound = outcome_gradients(PIWAE(2, 3, gradient), model, x, noise)
    iwae, iwae_bound = outcome_gradients(IWAE(6), model, x, noise)
    miwae, _ = outcome_gradients(MIWAE(2, 3, gradient), model, x, noise)
    torch.testing.assert_close(bound, iwae_bound)
    for parameter, value in found.items():
        other = iwae if parameter.startswith("generative") else miwae
        torch.testing.assert_close(value, other[parameter], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(found["inference.loc"], iwae["inference.loc"])


def test_theta_has_one_gradient_whatever_the_estimator_and_each_draw():
    noise = GivenNoise({1: torch.randn(4, 50, 1, dtype=torch.float64)})
    model, x = fixture_a(50)
    families = [
        [IWAE(4), IWAE(4, "stl"), IWAE(4, "dreg"), VIMCO(4), RWS(4), PIWAE(2, 2)],
        [TVO(4), TVO(4, gradient="stl"), TVO(4, gradient="dreg"), TVO(4, gradient="covariance")],
        *([make(g) for g in ("total", "stl", "dreg")] for make in (
            lambda g: VR(4, 0.5, g), lambda g: CIWAE(4, 0.3, g), lambda g: MIWAE(2, 2, g), lambda g: JVI(4, g),
        )),
    ]  # fmt: skip
    for family in families:
        first, *others = (outcome_gradients(objective, model, x, noise)[0] for objective in family)
        for other in others:
            for parameter in ("generative.slope", "generative.log_scale"):
                torch.testing.assert_close(other[parameter], first[parameter], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*TWO_DRAWS, "elbo"])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_path_gradients_vanish_at_the_posterior_for_every_draw(name, gradient):
    noise = GivenNoise({1: torch.randn(2, 50, 1, dtype=torch.float64)})
    model, x = fixture_a(50, shift=0.0, widen=1.0)
    objective = (TWO_DRAWS | LINEAR)[name]
    found, bound = outcome_gradients(objective(gradient), model, x, noise)
    torch.testing.assert_close(bound, torch.full_like(bound, -1.4958208120), rtol=0, atol=1e-9)
    total, _ = outcome_gradients(objective("total"), model, x, noise)
    for parameter in PHI:
        assert found[parameter].abs().max() < 1e-12
    assert total["inference.loc"].abs().max() > (0.01 if name != "jvi" else 0)


# Score functions, on continuous latents by quadrature


@pytest.mark.parametrize(
    ("objective", "pathwise"),
    [
        *((VIMCO(2, baseline), IWAE(2)) for baseline in BASELINES),
        (TVO(2, 1, gradient="covariance"), ELBO(2)),
        (REINFORCE(2), ELBO(2)),
    ],
)
def test_score_functions_have_the_expectation_of_the_pathwise_gradient(objective, pathwise):
    found, bound = expected_gradients(objective)
    truth, same_bound = expected_gradients(pathwise)
    assert bound.item() == pytest.approx(same_bound.item(), abs=1e-12)
    for parameter, gradient in truth.items():
        assert found[parameter].item() == pytest.approx(gradient.item(), abs=1e-8)


def mixed() -> LatentVariableModel:
    """Gaussian h_1, whose draws are live, and bits h_2; binary x of two pixels."""
    torch.manual_seed(4)
    p = GenerativeChain(BitsPrior(2), LinearBits(3, 2), [GaussianConditional(2, [4], 3)])
    return LatentVariableModel(p, InferenceChain([GaussianConditional(2, [4], 3), LinearBits(3, 2)])).double()


def test_the_score_holds_the_live_latents_of_a_q_of_both_kinds():
    model, x = mixed(), torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    gaussian, bits = model.inference.layers
    e, u = torch.randn(5, 3, 2, 3, dtype=torch.float64), torch.rand(5, 3, 2, 2, dtype=torch.float64)

    def score(e: Tensor, u: Tensor) -> Tensor:
        return score_term(model, x, model.draw(x, 3, GivenNoise({1: e, 2: u})))

    loc, log_scale = gaussian(x)
    h = (loc + log_scale.exp() * e).detach()
    drawn = (u < torch.sigmoid(bits(h))).double()
    of_bits = torch.distributions.Bernoulli(logits=bits(h)).log_prob(drawn).sum(-1)
    expected = torch.distributions.Normal(loc, log_scale.exp()).log_prob(h).sum(-1) + of_bits
    parameters = list(model.inference.parameters())
    truth = torch.autograd.grad(expected.sum(), parameters)
    # The second is how several trainings at once are differentiated.
    for found in (torch.stack([score(*one) for one in zip(e, u, strict=True)]), torch.func.vmap(score)(e, u)):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), parameters), truth)


def test_reinforce_is_the_gradient_of_half_the_variance_of_the_log_weights():
    noise = GivenNoise({1: torch.randn(5, 30, 1, dtype=torch.float64)})
    model, x = fixture_a(30)
    found, _ = outcome_gradients(REINFORCE(5), model, x, noise)
    latents = tuple(h.detach() for h in model.draw(x, 5, noise).latents)
    log_w = model.generative(x, latents).detach() - model.inference(x, latents)
    half = torch.autograd.grad(log_w.var(0).sum() / 2, (model.inference.loc, model.inference.log_scale))
    for parameter, gradient in zip(PHI, half, strict=True):
        torch.testing.assert_close(found[parameter], -gradient, rtol=1e-10, atol=1e-12)


def test_wake_phi_has_one_expectation_in_both_forms_and_less_variance_in_the_second():
    nodes, weights = quadrature(2, 80)
    moments = []
    for gradient in ("score", "dreg"):
        model, x = fixture_a(weights.numel())
        found, _ = outcome_gradients(RWS(2, gradient=gradient), model, x, GivenNoise({1: nodes[..., None]}))
        moments.append([(found[name] @ weights, found[name] ** 2 @ weights) for name in PHI])
    for (score, squared), (path, path_squared) in zip(*moments, strict=True):
        assert path.item() == pytest.approx(score.item(), abs=1e-8)
        assert path_squared < 0.5 * squared
    noise = GivenNoise({1: torch.randn(3, 50, 1, dtype=torch.float64)})
    model, x = fixture_a(50, shift=0.0, widen=1.0)
    found, _ = outcome_gradients(RWS(3, gradient="dreg"), model, x, noise)
    assert max(found[parameter].abs().max() for parameter in PHI) < 1e-12


def midpoints(k: int) -> Tensor:
    """k draws of a standard normal that fill it evenly, as one column (k, 1, 1)."""
    return torch.special.ndtri((torch.arange(k, dtype=torch.float64) + 0.5) / k).view(k, 1, 1)


def test_the_covariance_form_tends_to_the_derivative_of_thermodynamic_integration():
    # pi_beta is Gaussian here, with precision (1-beta)/s^2 + beta/v: f(beta) = E_{pi_beta}[log w] is exact.
    tvo = TVO(20_000, 3, beta_1=0.2, gradient="covariance")
    scale = 1.3 * math.sqrt(POSTERIOR_VARIANCE_A)

    def left_sum(location: Tensor, log_scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for beta, end in pairwise(tvo.points(torch.zeros(1, 1))):
            q, p = (-2 * log_scale).exp(), 1 / POSTERIOR_VARIANCE_A
            precision = (1 - beta) * q + beta * p
            mean = ((1 - beta) * q * location + beta * p * POSTERIOR_MEAN_A) / precision
            log_p = -0.5 * p * (1 / precision + (mean - POSTERIOR_MEAN_A) ** 2) + 0.5 * math.log(p)
            log_q = -0.5 * q * (1 / precision + (mean - location) ** 2) - log_scale
            total = total + (end - beta) * (log_p - log_q - 1.4958208120)
        return total

    phi = [torch.tensor(v, dtype=torch.float64, requires_grad=True)
           for v in (POSTERIOR_MEAN_A + 0.4, math.log(scale))]  # fmt: skip
    value = left_sum(*phi)
    truth = torch.autograd.grad(value, phi)
    model, x = fixture_a(1)
    found, bound = outcome_gradients(tvo, model, x, GivenNoise({1: midpoints(tvo.k)}))
    # Midpoints err by about 1/k times the derivative of the integrand at the ends, some tens.
    assert bound.item() == pytest.approx(value.item(), abs=3e-3)
    for parameter, gradient in zip(PHI, truth, strict=True):
        assert found[parameter].item() == pytest.approx(gradient.item(), abs=5e-3)


def test_wake_phi_tends_to_the_derivative_of_the_inclusive_divergence():
    # E_{p(z|x)}[dlog q] for Gaussians, in closed form.
    scale2 = 1.3**2 * POSTERIOR_VARIANCE_A
    model, x = fixture_a(1)
    found, bound = outcome_gradients(RWS(20_000), model, x, GivenNoise({1: midpoints(20_000)}))
    assert bound.item() == pytest.approx(-1.4958208120, abs=1e-3)
    assert found["inference.loc"].item() == pytest.approx(-0.4 / scale2, abs=5e-3)
    second = (POSTERIOR_VARIANCE_A + 0.4**2) / scale2 - 1
    assert found["inference.log_scale"].item() == pytest.approx(second, abs=5e-3)


def test_wake_phi_at_two_draws_is_its_formula():
    nodes, weights = quadrature(2, 80)
    model, x = fixture_a(weights.numel())
    found, _ = outcome_gradients(RWS(2), model, x, GivenNoise({1: nodes[..., None]}))
    scale = 1.3 * math.sqrt(POSTERIOR_VARIANCE_A)
    location = POSTERIOR_MEAN_A + 0.4
    z = location + scale * nodes.numpy()
    log_w = -0.5 * z**2 - (X_A - 1.3 * z) ** 2 + 0.5 * nodes.numpy() ** 2
    share = 1 / (1 + np.exp(log_w[1] - log_w[0]))
    score = nodes.numpy() / scale
    torch.testing.assert_close(
        found["inference.loc"][0], torch.from_numpy(share * score[0] + (1 - share) * score[1]), rtol=1e-9, atol=1e-10
    )


def test_sleep_phi_is_the_likelihood_of_the_models_own_draws():
    # q does not look at x here, and z ~ N(0, 1): E[dlog q(z)] in closed form, by 80 nodes exactly.
    nodes, weights = quadrature(1, 80)
    n = weights.numel()
    model, x = fixture_a(n)
    noise = GivenNoise({1: nodes[..., None], 0: torch.zeros(1, n, 1, dtype=torch.float64)})
    # Layer 1 is the only latent one: the dream is given the same nodes as the draw.
    found, _ = outcome_gradients(RWS(1, "sleep"), model, x, noise)
    location, scale2 = POSTERIOR_MEAN_A + 0.4, 1.3**2 * POSTERIOR_VARIANCE_A
    assert (found["inference.loc"] @ weights).item() == pytest.approx(-location / scale2, abs=1e-10)
    second = (1 + location**2) / scale2 - 1
    assert (found["inference.log_scale"] @ weights).item() == pytest.approx(second, abs=1e-10)
    # slope of q: the score times the dreamt x = 1.3 z, and not times the x that was observed.
    slope = 1.3 / scale2
    assert (found["inference.slope"] @ weights).item() == pytest.approx(slope, abs=1e-10)


def test_both_is_the_mean_of_wake_and_sleep():
    values = {0: torch.randn(1, 30, 1, dtype=torch.float64), 1: torch.randn(1, 30, 1, dtype=torch.float64)}

    class Two(GivenNoise):
        def _draw(self, kind, layer, *shape):
            return values[layer].expand(shape) * torch.arange(1, shape[0] + 1, dtype=torch.float64).view(-1, 1, 1)

    model, x = fixture_a(30)
    sleep = outcome_gradients(RWS(3, "sleep"), model, x, Two({}))[0]
    for gradient in ("score", "dreg"):
        wake, both = (outcome_gradients(RWS(3, phi, gradient), model, x, Two({}))[0] for phi in ("wake", "both"))
        for parameter in PHI:
            torch.testing.assert_close(both[parameter], (wake[parameter] + sleep[parameter]) / 2)
            assert not torch.allclose(wake[parameter], sleep[parameter])
    for parameter in ("generative.slope", "generative.log_scale"):
        assert torch.equal(wake[parameter], sleep[parameter])


@pytest.mark.parametrize("baseline", BASELINES)
def test_vimco_learns_from_the_signals_of_its_formula(baseline):
    inf = math.inf
    log_w = torch.tensor(
        [[0.5, 0.5, 0.5, -inf, 1e4], [-0.3, -inf, -inf, -inf, -1e4], [1.1, 1.1, -inf, -inf, 0.0]], dtype=torch.float64
    )
    log_q = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    latents = (torch.zeros(3, 5, 1, dtype=torch.float64),)
    log_p = log_w.clone().requires_grad_()
    particles = Particles(latents, log_p, log_q, reparameterized=False, rescore=log_q.detach)
    model, _ = fixture_a(5)
    losses = VIMCO(3, baseline).losses(model, torch.zeros(5, 1, dtype=torch.float64), particles, GivenNoise({}))
    found = -5 * torch.autograd.grad(losses.inference, log_q)[0]
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for image in range(3):
        values = log_w[:, image].tolist()
        total = sum(math.exp(v) for v in values)
        for j, v in enumerate(values):
            others = values[:j] + values[j + 1 :]
            mean = {
                "geometric": math.exp(sum(others) / 2),
                "arithmetic": sum(math.exp(other) for other in others) / 2,
                "zero": 0.0,
            }[baseline]
            stand_in = total - math.exp(v) + mean
            # Where nothing stands in, all others being zero, the baseline is 0 and not -inf.
            without = math.log(stand_in / 3) if stand_in > 0 else 0.0
            expected[j, image] = math.log(total / 3) - without - math.exp(v) / total
    expected[:, 3] = -1 / 3  # no weight at all: no signal, and equal shares
    # Without the largest the bound falls by 1e4, without another by nothing; the share of the largest is 1.
    expected[:, 4] = torch.tensor([1e4 - 1, 0, 0], dtype=torch.float64)
    if baseline != "geometric":  # of 1, e^0 and e^-1e4: the mean is 1/2; of others that are 1/3 with 0
        stand_in = {"arithmetic": math.log(1 / 2), "zero": math.log(1 / 3)}[baseline]
        of_others = {"arithmetic": math.log(2 / 3), "zero": 0.0}[baseline]
        expected[:, 4] = torch.tensor([1e4 - math.log(3) - stand_in - 1, of_others, of_others], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_of_zero_beside_others_gives_finite_gradients():
    noise = GivenNoise({1: torch.randn(3, 4, 1, dtype=torch.float64),
                        0: torch.randn(1, 4, 1, dtype=torch.float64)})  # fmt: skip

    class Truncated(ScalarChainP):
        """Impossible for the given draws of an image."""

        def log_likelihood(self, x, latents):
            impossible = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
            log_p = super().log_likelihood(x, latents)
            return torch.where(impossible, -math.inf, log_p) if latents[0].shape[0] == 3 else log_p

    model, x = fixture_a(4)
    model = LatentVariableModel(Truncated([1.3], [-0.35], 4), model.inference)
    objectives = [
        make(gradient)
        for gradient in ("total", "stl", "dreg")
        for make in (
            lambda g: IWAE(3, g), lambda g: ELBO(3, g), lambda g: VR(3, 0.5, g), lambda g: VR(3, -0.5, g),
            lambda g: VR(3, 2.0, g), lambda g: CIWAE(3, 0.3, g), lambda g: MIWAE(1, 3, g), lambda g: PIWAE(3, 1, g),
            lambda g: TVO(3, gradient=g), lambda g: JVI(3, g),
        )
    ] + [VR(3, "max"), TVO(3, gradient="covariance"), VIMCO(3), RWS(3)]  # fmt: skip
    for objective in objectives:
        found, bound = outcome_gradients(objective, model, x, noise)
        assert bound[0].isfinite() and bound[3] == -math.inf
        for parameter, gradient in found.items():
            assert gradient.isfinite().all(), (type(objective).__name__, objective.__dict__, parameter)


# Two stochastic layers


def two_layers(n: int) -> tuple[LatentVariableModel, Tensor]:
    """x | h_1 ~ N(1.2 h_1, 0.6^2), h_1 | h_2 ~ N(0.8 h_2, 0.7^2), h_2 ~ N(0, 1), observed at 0.5."""
    p = ScalarChainP([1.2, 0.8], [math.log(0.6), math.log(0.7)], n)
    q = ScalarChainQ([0.3, -0.2], [0.4, 0.5], [-0.5, -0.3], n)
    return LatentVariableModel(p, q), torch.full((n, 1), 0.5, dtype=torch.float64)


@pytest.mark.parametrize("name", ["iwae", "vr0.5", "ciwae0.3", "tvo"])
def test_dreg_is_unbiased_with_two_layers(name):
    """Where the parameters of the distributions are frozen in place of the weights of q, it errs by more than 0.04."""
    nodes, weights = quadrature(4, 16)
    model, x = two_layers(weights.numel())
    noise = GivenNoise({1: nodes[:2, :, None], 2: nodes[2:, :, None]})
    total, dreg = (outcome_gradients(TWO_DRAWS[name](gradient), model, x, noise)[0] for gradient in ("total", "dreg"))
    for parameter in ("inference.loc", "inference.slope", "inference.log_scale"):
        assert ((dreg[parameter] - total[parameter]) @ weights).abs().max() < 1e-5  # what 16 points a dimension leave


# Signal-to-noise ratios


def snr(objective: Objective, parameter: str, replicates: int) -> float:
    model, x = fixture_a(replicates)
    noise = GeneratorNoise(generator("cpu", 5, "snr", objective.num_samples), torch.float64)
    gradient = outcome_gradients(objective, model, x, noise)[0][parameter]
    # mean^2 / var of the mean of M draws is too large by 1/M.
    squared = gradient.mean() ** 2 / gradient.var() - 1 / replicates
    assert squared > 4 / replicates  # well above the floor, where a signal of zero would read about 0.8/sqrt(M)
    return math.sqrt(squared)


@pytest.mark.parametrize(
    ("baseline", "slope", "at_16", "at_64", "n"),
    [("geometric", -0.5, 0.25, 0.13, 20_000), ("zero", 0.5, 3.5, 7.7, 5000)],
)
def test_the_baseline_decides_whether_the_signal_of_vimco_grows(baseline, slope, at_16, at_64, n):
    # At k = 256 and with the geometric mean a ratio is about 0.06; without a signal it would read 0.8/sqrt(n) = 0.006.
    ks = (8, 16, 64, 256)
    ratios = [snr(VIMCO(k, baseline), "inference.loc", n) for k in ks]
    assert ratios[1] == pytest.approx(at_16, rel=0.05, abs=0.025)
    assert ratios[2] == pytest.approx(at_64, rel=0.05, abs=0.025)
    assert np.polyfit(np.log(ks), np.log(ratios), 1)[0] == pytest.approx(slope, abs=0.15)


# Every parameter, and no other

TRAINED = [
    *(make(gradient) for make in (TWO_DRAWS | LINEAR).values() for gradient in ("total", "dreg")),
    *(PIWAE(2, 2, gradient) for gradient in ("total", "stl", "dreg")),
    *(RWS(3, phi) for phi in ("wake", "sleep", "both")),
    *(ELBO(2, "stl"), IWAE(3, "stl"), VR(3, "max"), TVO(3, gradient="covariance"), REINFORCE(3)),
    *(VIMCO(3, baseline) for baseline in BASELINES),
    *(
        ELBO(1, analytic_kl=True),
        RWS(3, gradient="dreg"),
        UMIWAE(2, 2, 3),
        UMIWAE(2, 2, 3, "dreg"),
        TVO(3, 3, "moments"),
    ),
]
BITS, CATEGORY = SigmoidBeliefNetwork([3, 2]), Categorical(4)


@pytest.mark.parametrize("discrete", [None, BITS, CATEGORY], ids=["gaussian", "bits", "category"])
@pytest.mark.parametrize("objective", TRAINED, ids=lambda o: f"{type(o).__name__}-{getattr(o, 'gradient', '')}")
def test_every_named_parameter_is_trained_by_its_own_loss(objective, discrete):
    if discrete and objective.through_latents:
        return
    layers = 1 if getattr(objective, "analytic_kl", False) else 2
    architecture = discrete or GaussianMLP([3, 2][:layers], [[5], [4]][:layers])
    assert objective.check(architecture) is None
    model = architecture.build((6,), np.full(6, 0.5), torch.Generator().manual_seed(2)).double()
    x = (torch.rand(4, 6, dtype=torch.float64) < 0.5).double()
    noise = GeneratorNoise(generator("cpu", 1, "step"), torch.float64)
    losses = objective.losses(model, x, model.draw(x, objective.num_samples, noise), noise)
    assert not losses.bound.requires_grad and losses.bound.shape == (4,)
    for loss, network in ((losses.generative, model.generative), (losses.inference, model.inference)):
        assert loss.isfinite()
        parameters = dict(network.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0, name
    if not objective.through_latents:
        # Losses of the score leave the generative network alone.
        theta = torch.autograd.grad(losses.inference, list(model.generative.parameters()), allow_unused=True)
        assert all(gradient is None for gradient in theta)


# The files


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_names_an_objective_with_all_its_arguments(file):
    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    objective = build(dict(node), Objective, "objective")
    assert ["_target_", *inspect.signature(type(objective)).parameters] == list(node)
    # dreg.yaml and stl.yaml are the IWAE with that gradient.
    module, gradient = ("iwae", file.stem) if file.stem in ("dreg", "stl") else (file.stem, node.get("gradient"))
    assert (type(objective).__module__.rpartition(".")[2], node.get("gradient")) == (module, gradient)
    assert (objective.caveats == ()) == (objective.lower_bound and gradient != "stl")
    assert "arXiv" in (type(objective).__doc__ or "") or file.stem in ("jvi", "piwae", "vimco")


def test_every_objective_has_a_yaml():
    modules = {file.stem for file in (CONF.parents[1] / "iwae_cli" / "objectives").glob("*.py")} - {"__init__", "base"}
    assert modules | {"dreg", "stl"} == {file.stem for file in CONF.glob("*.yaml")}
