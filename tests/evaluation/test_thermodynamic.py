"""The two sums of thermodynamic integration hold log p(x) between them where it is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_runs import TINY, finished, read_json

from iwae_cli.cli.evaluate import evaluate as iwae_eval
from iwae_cli.data.base import Data
from iwae_cli.evaluation.estimator import EstimatorInput, array_name
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.evaluation.thermodynamic import Thermodynamic
from iwae_cli.models.architectures.linear_gaussian import LinearGaussianModel


def test_the_exact_value_lies_between_the_sums_and_they_meet() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=random)
    data = Data("real", "", x, x, x, None, "none", (4,))
    model = LinearGaussianModel([2]).build((4,), data.mean(), random).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=random, dtype=p.dtype)
        model.inference.layers[0].log_diagonal.fill_(0.3)  # wide: weights of small variance
    how = {"k": 5000, "seed": 0, "binarization_seed": 0, "rows": 2000, "workers": 1, "weights": "last"}
    subject = EstimatorInput(model, data, Evaluation(**how, splits=["test"], jackknife=False))
    gaps = []
    for partitions in (2, 20):
        found = Thermodynamic(5000, partitions).estimate(subject, lambda: None)
        names = ("left", "right", "exact", "log_px", "ess")
        left, right, exact, log_px, ess = (found.arrays[array_name("test", name)] for name in names)
        np.testing.assert_allclose(exact, model.generative.exact_log_px(x.double()).detach().numpy())
        assert (left < log_px).all() and (log_px < right).all() and (left < exact).all()
        # Where few draws have most of the weight, the right sum may lie below.
        assert (exact < right)[ess > 100].all() and (ess > 100).sum() >= 20
        gaps.append((right - left).mean())
        assert found.numbers["test"]["difference"] == float(gaps[-1])
    # By equal steps of the moments the difference is at most the rise over J.
    assert gaps[1] < gaps[0] / 5


def test_iwae_eval_prints_them(tmp_path: Path, capsys) -> None:
    folder = finished(tmp_path, *TINY)
    asked = ["estimator=thermodynamic", "estimator.k=200", "estimator.images=7", "evaluation.splits=[test,validation]"]
    assert iwae_eval([str(folder), *asked]) == 0
    assert "right - left, nats" in capsys.readouterr().out
    (result,) = (folder / "evaluations").glob("thermodynamic*/result.json")
    held = read_json(result)
    for split in ("test", "validation"):
        assert held[split]["n"] == 7 and held[split]["left"] < held[split]["log_px"] < held[split]["right"]
