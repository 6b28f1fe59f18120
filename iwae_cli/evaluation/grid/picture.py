"""The posterior of some images on a grid, beside q, q resampled by its weights, and the refined proposal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from iwae_cli.core.noise import BLOCK
from iwae_cli.data.base import Split
from iwae_cli.evaluation.estimator import EstimatorInput, PerImage
from iwae_cli.evaluation.grid.quadrature import Box
from iwae_cli.evaluation.likelihood import in_pieces
from iwae_cli.evaluation.proposals import Refined, mixture_log_prob, refine
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record.figures import Posterior
from iwae_cli.record.folder import drawable

KS = (5, 50)  # numbers of draws that q is resampled from
REPEATS = 1000  # sets of k - 1 draws over which the density of the resampled q is averaged
OVERVIEW = 281  # points on each side of the grid that finds the posterior of an image and gives KL
RESOLVED = 0.01  # how far the mass of a density on that grid may be from one for its KL to be known
WINDOW = 101  # and of the one that shows it
DEPTH = (6.0, 3.5)  # how far below their maxima log p(h|x) and log q(h|x) are shown, nats


@torch.no_grad()
def log_densities(
    model: LatentVariableModel,
    x: Float[Tensor, "n pixels"],
    h: Float64[Tensor, "m n d"],
    log_px: PerImage,
    proposal: Refined,
    *,
    ks: Sequence[int] = KS,
    seed: int,
    rows: int,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Float64[np.ndarray, "m n"]]:
    """Return the log-densities that the picture shows, by name: the posterior, q, q resampled from k, the refined one.

    One of k draws of q, chosen with probabilities proportional to their weights w, has the density
    q(h|x) E[k w(h) / (w(h) + w_2 + ... + w_k)] (Cremer, Morris, Duvenaud 2017, arXiv 1704.02916; Bachman and Precup
    2015), here with the mean over ``REPEATS`` sets of draws of q. It is q for k = 1 and tends to p(h|x) as k grows.

    ``x`` are the first images of their split, ``h`` points for each, ``log_px`` is log p(x) in nats, ``proposal`` was
    fitted to them, ``ks`` are numbers of draws, and ``rows`` bounds images x points, and images x draws, at once.
    """
    n, per_set = len(x), max(ks) - 1
    pieces = in_pieces(REPEATS * per_set, max(BLOCK, rows // n // BLOCK * BLOCK), seed, "resampled", range(n), x, check)
    sets = torch.cat([model(x, *piece).double() for piece in pieces]).view(REPEATS, per_set, n)
    others = {k: sets[:, : k - 1].logsumexp(1) for k in ks}
    of_x = torch.from_numpy(log_px).to(x.device)
    parts = []
    # A row of a network is taken to be at least 64 numbers.
    for points in h.split(max(1, BLOCK * rows // (n * REPEATS))):
        check()
        given = points.to(x.dtype)
        log_p, log_q = model.generative(x, (given,)).double(), model.inference(x, (given,)).double()
        found = {"exact p(h|x)": log_p - of_x, "q(h|x)": log_q}
        for k in ks:
            chosen = torch.sigmoid((log_p - log_q)[:, None] - others[k]).mean(1)
            found[f"resampled, k = {k}"] = log_q + (k * chosen).clamp_min(torch.finfo(chosen.dtype).tiny).log()
        found["refined q"] = mixture_log_prob(proposal.gaussian_log_prob(given).double(), log_q)
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


@torch.no_grad()
def _window(
    model: LatentVariableModel, x: Float[Tensor, "n pixels"], overview: Box, rows: int, check: Callable[[], None]
) -> Box:
    """Return a square for every image that holds p(h|x) and q(h|x) as far down as ``DEPTH``."""
    h = overview.at(overview.indices())
    parts = []
    for part in h.split(max(1, rows // len(x))):
        check()
        given = part[:, None].expand(-1, len(x), -1).to(x.dtype)
        parts.append(torch.stack([model.generative(x, (given,)), model.inference(x, (given,))]))
    log_density = torch.cat(parts, 1)  # (2, points, images)
    depth = torch.tensor(DEPTH, device=x.device)[:, None, None]
    seen = (log_density > log_density.amax(1, keepdim=True) - depth).any(0)[..., None]
    low = torch.where(seen, h[:, None], math.inf).amin(0)
    high = torch.where(seen, h[:, None], -math.inf).amax(0)
    step = (overview.high - overview.low) / (overview.points - 1)
    half = 0.55 * (high - low + step).amax(-1, keepdim=True)
    return Box((low + high) / 2 - half, (low + high) / 2 + half, WINDOW)


def posteriors(
    subject: EstimatorInput, split: Split, log_px: PerImage, box: Box, check: Callable[[], None]
) -> list[Posterior]:
    """Return what the picture shows of the first images of a split."""
    model, data, evaluation = subject.model, subject.data, subject.evaluation
    x = split.x[: len(log_px)].to(next(model.parameters()))
    proposal = refine(model, x, range(len(x)), evaluation.seed, split.name, check)
    whole = replace(box, points=max(OVERVIEW, box.points) if box.low.shape[-1] == 1 else OVERVIEW)
    window = _window(model, x, whole, evaluation.rows, check)
    logs, on_whole = (
        log_densities(model, x, h, log_px, proposal, seed=evaluation.seed, rows=evaluation.rows, check=check)
        for h in (window.at(window.indices()[:, None]), whole.at(whole.indices())[:, None].expand(-1, len(x), -1))
    )
    # Of densities that are normalized on the whole grid: at least zero, but for rounding.
    masses = {name: np.logaddexp.reduce(log, axis=0) for name, log in on_whole.items()}
    shares = {name: log - masses[name] for name, log in on_whole.items()}
    # The mass of a resampled q has the noise of its draws.
    sums = np.stack([mass for name, mass in masses.items() if not name.startswith("resampled")])  # (densities, n)
    resolved = (abs(np.expm1(sums + float(whole.log_cell()))) < RESOLVED).all(0)
    exact, *_ = shares.values()
    with np.errstate(invalid="ignore"):  # 0 times inf, where an approximation has no mass
        terms = {
            name: np.where(np.exp(share) == 0, 0, np.exp(share) * (share - exact)) for name, share in shares.items()
        }
    divergences = {name: np.where(resolved, np.maximum(0, term.sum(0)), math.nan) for name, term in terms.items()}
    images = data.pictured(x)
    shape = (WINDOW,) * box.low.shape[-1]
    return [
        Posterior(
            images[i] if drawable(data.image_shape) else None,
            [
                np.linspace(low, high, WINDOW)
                for low, high in zip(window.low[i].tolist(), window.high[i].tolist(), strict=True)
            ],
            {name: np.exp(log[:, i]).reshape(shape) for name, log in logs.items()},
            {name: float(divergence[i]) for name, divergence in divergences.items()},
        )
        for i in range(len(x))
    ]
