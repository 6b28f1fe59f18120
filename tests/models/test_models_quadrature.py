"""Families of p and q with one or two latents in all against sums over a grid of them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import own_models
import pytest
import torch
from draws import drawn, split_of
from grids import grid, log_px_on_grid

from iwae_cli.evaluation.fused import FusedScorer
from iwae_cli.evaluation.likelihood import log_likelihood, summarize
from iwae_cli.models.architectures.mlp import GaussianMLP
from iwae_cli.models.base import LatentVariableModel

FAMILIES: dict[str, dict[str, Any]] = {
    "one layer": {"sizes": [1]},
    "two layers": {"sizes": [1, 1]},
    "grey": {"sizes": [1, 1], "levels": 3, "likelihood": "discretized_logistic"},
    "real": {"levels": None, "likelihood": "gaussian", "noise_std": 0.7},
    "full": {"posterior": "full"},
    "coupling": {"posterior": "coupling"},
    "mixture": {"posterior": "mixture"},
    "mixture prior": {"prior": "mixture", "prior_components": 3},
    "vamp": {"prior": "vamp", "prior_components": 3},
    "gated": {"posterior": "mixture", "prior": "mixture", "prior_components": 3, "activation": "gated"},
    "own prior": {"prior": own_models.MixturePrior(3)},
}
every_family = pytest.mark.parametrize("name", FAMILIES)
PIXELS = 3


def built(
    sizes: tuple[int, ...] = (2,), levels: int | None = 2, **settings: Any
) -> tuple[LatentVariableModel, tuple[int, ...], int | None]:
    """A model with arbitrary weights, and scales near 1, which a grid can resolve and contain."""
    random = torch.Generator().manual_seed(0)
    architecture = GaussianMLP(list(sizes), [[6]] * len(sizes), **settings)
    model = architecture.build((PIXELS,), np.full(PIXELS, 0.4), random, levels).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += (0.05 if "blocks" in name else 0.3) * torch.randn(p.shape, generator=random, dtype=p.dtype)
            if "log_" in name:
                p *= 0.2
    return model, sizes, levels


@every_family
def test_p_and_q_integrate_to_one(name: str) -> None:
    """Sum over every x and integral over h of p(x, h); integral of q(h|x) over h."""
    model, sizes, levels = built(**FAMILIES[name])
    every_x = torch.tensor(list(product(range(levels or 2), repeat=PIXELS)), dtype=torch.float64)
    if levels:
        log_px = log_px_on_grid(model, every_x, sizes)
        assert log_px.exp().sum().item() == pytest.approx(1, abs=1e-8)
        assert log_px.std() > 0.1
    latents, log_cell = grid(sizes, 241, 16.0)
    with torch.no_grad():
        q = model.inference(every_x[2:4], tuple(h.expand(-1, 2, -1) for h in latents)).logsumexp(0) + log_cell
    torch.testing.assert_close(q.exp(), torch.ones_like(q), rtol=0, atol=1e-6)


@every_family
def test_the_estimate_agrees_with_quadrature(name: str) -> None:
    model, sizes, _ = built(**FAMILIES[name])
    with torch.no_grad():
        # A wide q, so that the weights have a finite variance.
        for parameter, p in model.inference.named_parameters():
            if "log_" in parameter:
                p.fill_(0.8 if parameter.endswith("bias") else 0.0)
    x = drawn(model, 12)
    exact = log_px_on_grid(model, x, sizes).mean().item()
    for refined in (False, True):
        found = log_likelihood(model, split_of(x), k=5000, seed=0, rows=4000, workers=1, refined=refined)
        summary, _ = summarize(found, PIXELS)
        assert abs(summary["nll"] + exact) < 3 * summary["stderr_mc"] + 2 * abs(summary["bias_mc"])
        assert summary["stderr_mc"] < 0.02
    assert FusedScorer.fits(model, x) == (name in ("one layer", "two layers"))
