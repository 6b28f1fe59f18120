"""ELBO and IWAE against numbers that were computed elsewhere (Fixture A), and their special cases."""

from __future__ import annotations

import pytest
import torch
from every_objective import ELBO, IWAE
from objective_toys import LOG_PX_A, GivenNoise, chain_a, expected_gradients, fixture_a, outcome_gradients

from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel

# k: L_k, dL_k/d location of q, dL_k/d log scale of q, dL_k/d slope of p.
FIXTURE_A = {
    1: (-1.9288565475, -1.752000, -0.690000, -1.590876),
    2: (-1.6633089557, -0.791765, -0.064626, -0.777222),
    3: (-1.5949536217, -0.479548, 0.013761, -0.586837),
}


def test_fixture_a_is_what_it_says():
    (model, x), chain = fixture_a(1), chain_a()
    assert chain.generative.exact_log_px(x).item() == pytest.approx(LOG_PX_A, abs=1e-9)
    h = torch.linspace(-2, 2, 7, dtype=torch.float64).view(7, 1, 1)
    torch.testing.assert_close(model.generative(x, (h,)), chain.generative(x, (h,)), rtol=1e-12, atol=0)
    torch.testing.assert_close(model.inference(x, (h,)), chain.inference(x, (h,)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("objective", "k"),
    [
        *((IWAE(k, gradient), k) for k in (1, 2, 3) for gradient in ("total", "dreg")),
        *((ELBO(draws, "dreg"), 1) for draws in (1, 2)),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.k}-{value.gradient}" if isinstance(value, ELBO | IWAE) else "",
)
def test_value_and_gradients_on_fixture_a(objective, k):
    value, location, log_scale, slope = FIXTURE_A[k]
    # 40 points in three dimensions carry what the six printed digits need.
    gradients, bound = expected_gradients(objective, points=80 if k < 3 else 40)
    assert bound.item() == pytest.approx(value, abs=1e-9 if k < 3 else 1e-6)
    assert gradients["inference.loc"].item() == pytest.approx(location, abs=2e-6)
    assert gradients["inference.log_scale"].item() == pytest.approx(log_scale, abs=2e-6)
    assert gradients["generative.slope"].item() == pytest.approx(slope, abs=2e-6)


def test_stl_matches_at_one_sample_and_not_at_two():
    one, _ = expected_gradients(IWAE(1, "stl"))
    assert one["inference.loc"].item() == pytest.approx(FIXTURE_A[1][1], abs=2e-6)
    two, _ = expected_gradients(IWAE(2, "stl"))
    # An independent run of 400,000 draws gave -1.3615 with standard error 0.0013.
    assert two["inference.loc"].item() == pytest.approx(-1.3615, abs=4 * 0.0013)
    assert abs(two["inference.loc"].item() - FIXTURE_A[2][1]) > 0.5


def test_analytic_kl_equals_the_sampled_elbo_in_mean():
    sampled, bound = expected_gradients(ELBO(1))
    analytic, analytic_bound = expected_gradients(ELBO(1, analytic_kl=True))
    assert analytic_bound.item() == pytest.approx(bound.item(), abs=1e-10)
    for name, gradient in sampled.items():
        torch.testing.assert_close(analytic[name], gradient, rtol=0, atol=1e-10)


def test_analytic_kl_is_another_estimator():
    model, x = fixture_a(2)
    noise = GivenNoise({1: torch.tensor([[[-1.0], [1.0]]], dtype=torch.float64)})
    spread = []
    for analytic in (False, True):
        _, bound = outcome_gradients(ELBO(1, analytic_kl=analytic), model, x, noise)
        spread.append(bound[1] - bound[0])
    # The KL has no noise left: what differs between the two draws is the likelihood alone.
    likelihood = model.generative.log_likelihood(x, model.draw(x, 1, noise).latents)[0]
    torch.testing.assert_close(spread[1], (likelihood[1] - likelihood[0]).detach())
    assert abs(spread[0] - spread[1]) > 0.1


def test_analytic_kl_refuses_deeper_models():
    message = ELBO(analytic_kl=True).check(LinearGaussianModel([2, 2]))
    assert message is not None and "objective.analytic_kl" in message
    assert ELBO(analytic_kl=True).check(LinearGaussianModel([2])) is None
    assert ELBO().check(LinearGaussianModel([2, 2])) is None
