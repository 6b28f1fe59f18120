"""Bounds from both sides against enumeration, closed forms of Gaussian pairs, and a posterior that q misses half of."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from draws import built, linear_gaussian, make_exact, posterior, sigmoid_belief_network
from evaluations import evaluation
from every_architecture import Categorical

from iwae_cli.cli.help import choices, conf_folder
from iwae_cli.config.build import build
from iwae_cli.data.digits import Digits
from iwae_cli.evaluation.estimator import EstimatorInput
from iwae_cli.evaluation.sandwich import Bounds, Sandwich
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.record.summary import table_of


def bounds(model: LatentVariableModel, k: int, simulated: int, **how: Any) -> Bounds:
    return Sandwich(k, simulated).bounds(model, **{"seed": 0, "rows": 20_000, "workers": 1} | how)


def assert_mean(values: np.ndarray, expected: float, slack: float = 0.0) -> None:
    """Within four standard errors, which are small."""
    stderr = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - expected) < 4 * stderr + slack, (values.mean(), expected, stderr)


@pytest.mark.parametrize(
    "make",
    [lambda: linear_gaussian(2), lambda: linear_gaussian(3, 2), sigmoid_belief_network],
    ids=["one layer", "two layers", "bits"],
)
def test_lower_truth_upper(make: Callable[[], LatentVariableModel]) -> None:
    found = bounds(make(), k=50, simulated=300)
    assert found.exact is not None and list(found.lower) == list(found.upper) == [1, 5, 50]
    widths = []
    for m in found.lower:
        for gap in (found.exact - found.lower[m], found.upper[m] - found.exact):
            # k is small on purpose, so that the gap of each bound is visible.
            assert gap.mean() > 3 * gap.std(ddof=1) / math.sqrt(len(gap)) > 0
        widths.append((found.upper[m] - found.lower[m]).mean())
    assert widths[0] > 2 * widths[1] > 4 * widths[2], "the sandwich narrows with k"


def test_every_expectation_by_enumeration() -> None:
    """p and q as tables of their probabilities: all x, all exact draws, all draws of q, for k = 3."""
    model = built(Categorical(3), 5)
    with torch.no_grad():
        model.generative.observation.weight.mul_(3)  # type: ignore[union-attr]
        model.generative.prior.logits.copy_(torch.tensor([0.5, 0.0, -1.0]))  # type: ignore[union-attr]
    found = bounds(model, k=3, simulated=2000)

    p, q = (
        {name: value.numpy() for name, value in net.state_dict().items()} for net in (model.generative, model.inference)
    )
    x = np.array(list(product((0.0, 1.0), repeat=5)))
    ones = 1 / (1 + np.exp(-(p["observation.weight"].T + p["observation.bias"])))  # (h, pixels)
    prior = np.exp(p["prior.logits"]) / np.exp(p["prior.logits"]).sum()
    joint = prior * np.prod(np.where(x[:, None] == 1, ones, 1 - ones), -1)  # (x, h)
    q_of = np.exp(x @ q["layers.0.weight"].T + q["layers.0.bias"])
    q_of /= q_of.sum(1, keepdims=True)
    assert joint.sum() == pytest.approx(1)
    w = joint / q_of

    def expected(of: Callable[[np.ndarray], np.ndarray], with_exact: bool, k: int = 3) -> float:
        total = 0.0
        for states in product(range(3), repeat=k):
            chance = np.prod(q_of[:, states[with_exact:]], 1) * (joint[:, states[0]] if with_exact else joint.sum(1))
            total += (chance * of(w[:, states])).sum()
        return total

    def bound(w: np.ndarray) -> np.ndarray:
        return np.log(w.mean(1))

    def ess(w: np.ndarray) -> np.ndarray:
        return w.sum(1) ** 2 / (w**2).sum(1)

    for m in (1, 3):
        assert_mean(found.lower[m], expected(bound, False, m))
        assert_mean(found.upper[m], expected(bound, True, m))
    assert_mean(found.ess, expected(ess, False))
    assert_mean(found.forward_ess, expected(ess, True))
    # The definition of the forward one: E[1/ESS] is the share of the weight that the exact draw has.
    assert expected(lambda w: 1 / ess(w), True) == pytest.approx(expected(lambda w: w[:, 0] / w.sum(1), True))
    assert found.exact is not None
    assert_mean(found.exact, (joint.sum(1) * np.log(joint.sum(1))).sum())
    assert expected(bound, True) - expected(bound, False) > 0.05 and expected(ess, False) - expected(ess, True) > 0.05


def divergence(a: np.ndarray, b: np.ndarray, moment: np.ndarray) -> float:
    """KL(N(., a) || N(., b)), whose means differ by a vector of this mean outer product."""
    log_det = np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    return float(np.trace(np.linalg.solve(b, a + moment)) - len(a) + log_det) / 2


@pytest.mark.parametrize("q_is", ["wider and moved", "the prior"])
def test_a_gaussian_pair(q_is: str) -> None:
    """EUBO and ELBO differ from log p by the two KL divergences; with q = p(h) the first is a mutual information."""
    model = linear_gaussian(2)
    make_exact(model)
    precision = posterior(model, torch.zeros(1, 4, dtype=torch.float64))[1].detach().numpy()
    covariance = np.linalg.inv(precision)
    q: Any = model.inference.layers[0]
    shift, scale = np.array([0.3, -0.2]), 1.3
    with torch.no_grad():
        if q_is == "the prior":
            for parameter in q.parameters():
                parameter.zero_()
            moment = np.eye(2) - covariance
            # Half of log det(I + W^T D^-1 W) is the mutual information of x and h.
            assert divergence(covariance, np.eye(2), moment) == pytest.approx(np.linalg.slogdet(precision)[1] / 2)
        else:
            q.linear.bias += torch.from_numpy(shift)
            q.log_diagonal += math.log(scale)
            q.below_diagonal *= scale
            moment = np.outer(shift, shift)
    found = bounds(model, k=1000, simulated=600)
    assert found.exact is not None
    of_q = (q.cholesky() @ q.cholesky().T).detach().numpy()
    assert_mean(found.upper[1] - found.exact, divergence(covariance, of_q, moment))
    assert_mean(found.exact - found.lower[1], divergence(of_q, covariance, moment))
    if q_is == "wider and moved":
        standardized = np.linalg.solve(np.linalg.cholesky(covariance), shift)
        rho = scale**4 / (2 * scale**2 - 1) * math.exp(standardized @ standardized / (2 * scale**2 - 1))
        assert rho > 1.3
        for ess in (found.ess, found.forward_ess):
            assert_mean(1000 / ess, rho, slack=0.01)  # the limit, reached as 1/k


def test_a_part_that_q_misses_shows_in_the_forward_sample_size_alone() -> None:
    """Two categories with one decoder; q gives the second exp(-20) of the probability, and draws none of it."""
    model = built(Categorical(2), 6)
    with torch.no_grad():
        model.generative.observation.weight.zero_()  # type: ignore[union-attr]
        model.inference.layers[0].weight.zero_()  # type: ignore[union-attr]
        model.inference.layers[0].bias.copy_(torch.tensor([0.0, -20.0]))  # type: ignore[union-attr]
    k, n = 500, 400
    found = bounds(model, k=k, simulated=n)
    np.testing.assert_allclose(found.ess, k)
    missed = found.forward_ess < 10
    assert abs(missed.mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    np.testing.assert_allclose(found.forward_ess[~missed], k)
    np.testing.assert_allclose(found.forward_ess[missed], 1, rtol=1e-3)
    assert found.exact is not None
    np.testing.assert_allclose(found.exact - found.lower[k], math.log(2), rtol=1e-6)
    np.testing.assert_allclose((found.upper[1] - found.exact)[missed], 20 - math.log(2), rtol=1e-6)


def test_the_error_of_the_upper_bound_is_over_observations() -> None:
    """q never draws a tenth of every posterior: what varies from seed to seed is how many exact draws fall there."""
    model = built(Categorical(2), 6)
    with torch.no_grad():
        model.generative.observation.weight.zero_()  # type: ignore[union-attr]
        model.generative.prior.logits.copy_(torch.tensor([0.0, -math.log(9)]))  # type: ignore[union-attr]
        model.inference.layers[0].weight.zero_()  # type: ignore[union-attr]
        model.inference.layers[0].bias.copy_(torch.tensor([0.0, -20.0]))  # type: ignore[union-attr]
    k, n, away, upper, errors, data = 100, 100, [], [], [], Digits().load()
    for seed in range(40):
        asked = EstimatorInput(model, data, evaluation(seed=seed, workers=1))
        found = Sandwich(k, n).estimate(asked, lambda: None)
        numbers = found.numbers["simulated"]
        assert numbers["stderr_mc"] < 1e-9 and "1/100 of the posteriors" in found.notes[1]
        away.append(numbers["upper_bounds"][str(k)] - numbers["exact"])
        upper.append(numbers["upper_bounds"][str(k)])
        errors.append([numbers["stderr_gap"], numbers["stderr_upper"]])
    # U - log p(x): log .9 without, and log((.1 e^20 + 99 .9) / 100) with the exact draw in that tenth.
    expected = 0.9 * math.log(0.9) + 0.1 * math.log((0.1 * math.exp(20) + 99 * 0.9) / k)
    gap, total = np.sqrt(np.square(errors).mean(0))
    assert abs(np.mean(away) - expected) < 3 * gap / math.sqrt(40)
    assert np.std(away, ddof=1) == pytest.approx(gap, rel=0.3)
    assert np.std(upper, ddof=1) == pytest.approx(total, rel=0.3)


@pytest.mark.parametrize("name", choices([conf_folder()])["model"])
def test_every_model(name: str) -> None:
    node = yaml.safe_load((conf_folder() / "model" / f"{name}.yaml").read_text())
    variants: list[dict[str, Any]] = [{}] + ([{"likelihood": "discretized_logistic"}] if "likelihood" in node else [])
    for changed in variants:
        architecture = build(node | changed, Architecture, "model")
        assert isinstance(architecture, Architecture)
        model = architecture.build((8, 8), np.full(64, 0.4), torch.Generator().manual_seed(1), 17).eval()
        found = bounds(model, k=10, simulated=4, rows=64)
        assert all(np.isfinite(values).all() for values in (*found.lower.values(), *found.upper.values()))
        assert found.upper[10].mean() > found.lower[10].mean()
        assert (found.exact is not None) == (name in ("categorical", "discrete", "linear_gaussian"))


def subject(model: LatentVariableModel) -> EstimatorInput:
    return EstimatorInput(model, Digits().load(), evaluation(workers=1))


def test_the_report_agrees_with_its_arrays() -> None:
    seen: list[None] = []
    found = Sandwich(50, 30).estimate(subject(linear_gaussian(2)), lambda: seen.append(None))
    numbers, arrays = found.numbers["simulated"], found.arrays
    assert {array.shape for array in arrays.values()} == {(30,)} and len(seen) > 30
    gap = arrays["simulated_U_50"] - arrays["simulated_L_50"]
    assert numbers["gap"] == pytest.approx(gap.mean())
    assert numbers["stderr_gap"] == pytest.approx(gap.std(ddof=1) / math.sqrt(30))
    assert numbers["stderr_upper"] == pytest.approx(arrays["simulated_U_50"].std(ddof=1) / math.sqrt(30))
    assert numbers["gap"] == pytest.approx(numbers["upper_bounds"]["50"] - numbers["bounds"]["50"])
    assert numbers["exact"] == pytest.approx(arrays["simulated_exact"].mean())
    assert numbers["stderr_mc"] == pytest.approx(math.sqrt((1 / arrays["simulated_ess"] - 1 / 50).sum()) / 30)
    for prefix in ("", "forward_"):
        ess = arrays[f"simulated_{prefix}ess"]
        assert numbers[f"{prefix}ess_median"] == np.median(ess) and numbers[f"{prefix}ess_min"] == ess.min()
        assert numbers[f"{prefix}ess_share_below_10"] == (ess < 10).mean()
    assert found.reasons == {}
    _, lines = table_of({**found.numbers, "rows": found.rows})
    shown = [
        float(cells[0])
        for label, cells in lines.items()
        if label.startswith(("U_", "exact", "L_")) and "-" not in label
    ]
    assert len(shown) == 7 and shown == sorted(shown, reverse=True)
    assert not any("\N{EN DASH}" in cells for cells in lines.values())


def test_numbers_that_are_not_finite_have_a_reason() -> None:
    model = linear_gaussian(2).float()
    with torch.no_grad():
        model.inference.layers[0].log_diagonal.fill_(-60)  # type: ignore[union-attr]
    found = Sandwich(5, 3).estimate(subject(model), lambda: None)
    numbers = found.numbers["simulated"]
    assert numbers["upper_bounds"]["1"] is None and numbers["gap"] is None
    assert numbers["forward_ess_share_below_10"] is None
    assert {
        key for key in found.reasons if key.startswith("simulated.upper_bounds")
    } and "simulated.gap" in found.reasons
