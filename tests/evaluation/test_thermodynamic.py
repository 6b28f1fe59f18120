"""The two sums of thermodynamic integration hold log p(x) between them where it is exact."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import evaluation
from every_architecture import GaussianMLP
from small_runs import TINY, finished, read_json

from iwae_cli.cli.evaluate import evaluate as iwae_eval
from iwae_cli.data.base import Data
from iwae_cli.evaluation.estimator import EstimatorInput, array_name
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.evaluation.thermodynamic import Thermodynamic
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel


def subject(k: int, images: int = 30, wide: float = 0.3, seed: int = 0) -> EstimatorInput:
    """A linear-Gaussian model and observations; the wider q is, the smaller is the variance of the weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(images, 4, generator=random)
    data = Data("real", "", x, x, x, None, "none", (4,))
    model = LinearGaussianModel([2]).build((4,), data.mean(), random).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=random, dtype=p.dtype)
        model.inference.layers[0].log_diagonal.fill_(wide)
    how = {"k": k, "seed": seed, "binarization_seed": 0, "rows": 2000, "workers": 1, "weights": "last"}
    return EstimatorInput(model, data, Evaluation(**how, splits=["test"], jackknife=False))


def test_the_exact_value_lies_between_the_sums_and_they_meet() -> None:
    chosen = subject(5000)
    x, generative = chosen.data.test, chosen.model.generative
    gaps = []
    for partitions in (2, 20):
        found = Thermodynamic(5000, partitions).estimate(chosen, lambda: None)
        names = ("left", "right", "exact", "log_px", "ess")
        left, right, exact, log_px, ess = (found.arrays[array_name("test", name)] for name in names)
        np.testing.assert_allclose(exact, generative.exact_log_px(x.double()).detach().numpy())
        assert (left < log_px).all() and (log_px < right).all() and (left < exact).all()
        # Where few draws have most of the weight, the right sum may lie below.
        assert (exact < right)[ess > 100].all() and (ess > 100).sum() >= 20
        gaps.append((right - left).mean())
        assert found.numbers["test"]["difference"] == float(gaps[-1])
    # By equal steps of the moments the difference is at most the rise over J.
    assert gaps[1] < gaps[0] / 5


def test_the_monte_carlo_errors_are_the_spread_over_other_draws() -> None:
    found = [
        Thermodynamic(101, 4).estimate(subject(101, 20, 0.8, seed), lambda: None).numbers["test"] for seed in range(40)
    ]
    for key in ("left", "right"):
        spread = np.std([one[key] for one in found], ddof=1)
        stated = np.sqrt(np.mean([one[f"{key}_stderr_mc"] ** 2 for one in found]))
        # 40 seeds know the spread within 11%.
        assert stated == pytest.approx(spread, rel=0.3), key


def test_few_effective_draws_are_counted_where_the_right_sum_is_no_upper_bound() -> None:
    found = Thermodynamic(50).estimate(subject(50, wide=0.0), lambda: None)
    numbers = found.numbers["test"]
    assert numbers["right"] + 3 * numbers["right_stderr_mc"] < numbers["exact"]
    assert numbers["ess_share_below_enough"] == 1  # below 5 for each of 20 intervals
    some = Thermodynamic(50, 4).estimate(subject(50, wide=0.0), lambda: None)
    share = float((some.arrays[array_name("test", "ess")] < 5 * 4).mean())
    assert some.numbers["test"]["ess_share_below_enough"] == share and 0.05 < share < 0.95
    rows = dict((key, label) for label, key, _ in found.rows)
    assert "upper bound where the ESS is large" in rows["test.right"]
    assert rows["test.ess_share_below_enough"] == "  images below 5 x 20 partitions"
    assert rows["test.right_stderr_mc"] == "  other noise: stderr_mc of right"


@pytest.mark.parametrize("k", [2, 5])
def test_a_right_model_of_integers_is_not_refused_where_few_draws_agree(k: int) -> None:
    """x is almost certain and q too wide: of few draws all may have weights above 1, and no error is known."""
    x = torch.zeros(100, 4, dtype=torch.uint8)
    model = GaussianMLP([2], [[3]]).build((4,), np.full(4, 1e-3), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        model.generative.observation.head.bias.fill_(-20)
        model.inference.layers[0].log_scale.bias.fill_(math.log(3))
    asked = EstimatorInput(model, Data("zeros", "", x, x, x, 2, "fixed", (4,)), evaluation(splits=["test"], workers=1))
    found = Thermodynamic(k, images=None).estimate(asked, lambda: None)
    assert (found.arrays["log_px"] > 0).any()


def test_iwae_eval_prints_them(tmp_path: Path, capsys) -> None:
    folder = finished(tmp_path, *TINY)
    asked = ["estimator=thermodynamic", "estimator.k=200", "estimator.images=7", "evaluation.splits=[test,validation]"]
    assert iwae_eval([str(folder), *asked]) == 0
    out = capsys.readouterr().out
    assert " nats " in out and "…" not in out and "\nfirst images " in out
    (result,) = (folder / "evaluations").glob("thermodynamic*/result.json")
    held = read_json(result)
    for split in ("test", "validation"):
        assert held[split]["n"] == 7 and held[split]["left"] < held[split]["log_px"] < held[split]["right"]
