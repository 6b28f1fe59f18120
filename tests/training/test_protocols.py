"""KL warm-up against closed forms, the settings and objectives that are refused, and a run with every protocol."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from every_objective import ELBO, IWAE, MIWAE, PIWAE, REINFORCE, RWS, TVO, VIMCO
from objective_toys import (
    POSTERIOR_MEAN_A,
    POSTERIOR_VARIANCE_A,
    X_A,
    GivenNoise,
    fixture_a,
    outcome_gradients,
    quadrature,
)
from small_runs import TINY, finished, read_json, run

from iwae_cli.objectives.base import Objective
from iwae_cli.record.jsonl import read_history
from iwae_cli.training.settings import Training
from iwae_cli.training.warmup import WarmedUp

BETA = 0.3


def expected(objective: Objective, beta: float = BETA) -> dict[str, float]:
    """Expectation of the bound and of the gradients of one step on Fixture A, by quadrature over the draws."""
    nodes, weights = quadrature(objective.num_samples, 60)
    model, x = fixture_a(weights.numel())
    warmed = WarmedUp(model)
    warmed.set_kl_weight(beta)
    gradients, bound = outcome_gradients(objective, warmed, x, GivenNoise({1: nodes[..., None]}))
    found = {name: float(gradient[0] @ weights) for name, gradient in gradients.items()}
    return {**found, "bound": float(bound @ weights)}


def test_the_kl_is_weighted_inside_log_w() -> None:
    """The ELBO of Fixture A in closed form: E_q[log p(x|z)] and KL(q || N(0, 1)) of Gaussians."""
    loc = torch.tensor(POSTERIOR_MEAN_A + 0.4, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(math.log(1.3 * math.sqrt(POSTERIOR_VARIANCE_A)), dtype=torch.float64, requires_grad=True)
    slope = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    variance = (2 * log_scale).exp()
    fit = -((X_A - slope * loc) ** 2 + slope**2 * variance) / (2 * 0.5) - 0.5 * math.log(2 * math.pi * 0.5)
    kl = 0.5 * (loc**2 + variance - 1 - 2 * log_scale)
    value = fit - BETA * kl
    truth = torch.autograd.grad(value, (loc, log_scale, slope))
    for objective in (ELBO(1), ELBO(1, "stl"), ELBO(1, "dreg"), IWAE(1)):
        found = expected(objective)
        assert found["bound"] == pytest.approx(value.item(), abs=1e-9)
        for name, gradient in zip(("inference.loc", "inference.log_scale", "generative.slope"), truth, strict=True):
            assert found[name] == pytest.approx(gradient.item(), abs=1e-8)


def test_the_gradient_of_a_weighted_bound_is_that_of_its_expectation() -> None:
    nodes, weights = quadrature(2, 60)
    values = []
    for step in (1e-4, -1e-4):
        model, x = fixture_a(weights.numel())
        with torch.no_grad():
            model.inference.get_parameter("loc").add_(step)
            drawn = model.draw(x, 2, GivenNoise({1: nodes[..., None]}))
            prior = model.generative.log_prior(drawn.latents)
            log_w = drawn.log_p - prior + BETA * (prior - drawn.log_q)
        values.append(float((log_w.logsumexp(0) - math.log(2)) @ weights))
    slope = (values[0] - values[1]) / 2e-4
    assert expected(IWAE(2))["inference.loc"] == pytest.approx(slope, abs=1e-6)
    # The coefficients of dreg are for a weight of one: this is why it is refused.
    assert abs(expected(IWAE(2, "dreg"))["inference.loc"] - slope) > 0.01
    assert expected(IWAE(2, "dreg"), 1.0)["inference.loc"] == pytest.approx(-0.791765, abs=1e-5)


REFUSED = (
    IWAE(3, "dreg"), PIWAE(2, 2, "dreg"), ELBO(1, analytic_kl=True), VIMCO(3), RWS(3), TVO(3, gradient="covariance"),
    REINFORCE(3),
)  # fmt: skip


@pytest.mark.parametrize("objective", REFUSED, ids=lambda o: type(o).__name__)
def test_a_warm_up_is_refused_where_it_would_be_another_gradient(objective: Objective) -> None:
    assert "training.kl_warmup=0" in (Training(kl_warmup=3).check(objective) or "")
    assert Training().check(objective) is None
    for fine in (
        IWAE(3),
        IWAE(3, "stl"),
        PIWAE(2, 2),
        TVO(3),
        ELBO(),
        ELBO(3, "dreg"),
        IWAE(1, "dreg"),
        MIWAE(2, 1, "dreg"),
    ):
        assert Training(kl_warmup=3).check(fine) is None
    assert "roulette" in (Training("roulette", kl_warmup=3).check(IWAE(3)) or "")


def test_an_average_too_slow_for_float32_is_said(tmp_path: Path) -> None:
    code, _, err = run(*TINY, "schedule.passes=1", "training.ema=0.99999", f"output_dir={tmp_path}")
    assert code == 0 and "training.ema=0.99999 averages so slowly that float32 loses much of it" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_warmup": -1}, "kl_warmup must be >= 0, got -1"),
        ({"clip": 0.0}, "clip must be null or finite and at least 1e-06, got 0.0"),
        ({"clip": math.inf}, "clip must be null or finite and at least 1e-06, got inf"),
        ({"ema": 1.0}, "ema must be null or from 0.01 to 0.999999 (such as 0.999), got 1.0"),
        ({"ema": math.nan}, "ema must be null or from 0.01 to 0.999999 (such as 0.999), got nan"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Training(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_warmup_beyond_the_training_is_said_and_its_bound_is_not_shown_as_one(tmp_path: Path) -> None:
    code, _, err = run(*TINY, "training.kl_warmup=5", f"output_dir={tmp_path}")
    assert code == 0
    assert "never has its whole weight: training.kl_warmup=5 is longer than schedule.passes=2" in err
    (line,) = [line for line in err.splitlines() if line.startswith("training  pass")]
    assert "nats" not in line


def test_a_run_with_every_protocol(tmp_path: Path) -> None:
    """Its own folder, a weight of the KL in every row, an early end, the best averaged weights, and one answer."""
    asked = (
        *TINY, "training.kl_warmup=2", "training.clip=1.0", "training.ema=0.5", "schedule.passes=30",
        "optimizer.lr=0.3", "schedule.patience=2", "evaluation.weights=best",
    )  # fmt: skip
    folder = finished(tmp_path, *asked)
    rows = [row for _, row in read_history(folder)]
    assert [row["train/kl_weight"] for row in rows][:3] == [0.5, 1, 1]
    result = read_json(folder / "result.json")
    best = max(range(len(rows)), key=lambda number: rows[number]["validation/bound"])
    assert len(rows) == best + 1 + 2 < 30 and result["epochs"] == len(rows)
    assert result["status"] == "finished" and result["evaluation"]["step"] == result["steps"] * (best + 1) // len(rows)
    code, out, _ = run(*asked, f"output_dir={tmp_path}")
    assert code == 0 and folder.name in out
    code, _, err = run(*asked[:-1], "evaluation.weights=last", f"output_dir={tmp_path}")
    assert code == 2 and "evaluation.weights=best" in err
    assert finished(tmp_path, *TINY).name != folder.name
