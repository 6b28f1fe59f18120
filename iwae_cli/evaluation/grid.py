"""log p(x) by quadrature, and the posterior on a grid, for models with one layer of one or two real latents.

p(x) is the integral of p(x, h): the sum over equally spaced points times the volume of a cell. For a smooth function
that vanishes at the borders of the grid this rule converges faster than any power of the spacing (Trefethen and
Weideman 2014, SIAM Review 56). Every other point is a grid too, and so much worse that the change to it is nearly its
whole error, far above that of the full grid. Rounding is not in it: in float32 about 1e-6 nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Shaped
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.noise import BLOCK, GeneratorNoise, KeyedNoise, generator
from iwae_cli.core.progress import Progress
from iwae_cli.data.base import Split
from iwae_cli.evaluation.estimator import Estimates, Estimator, EstimatorInput, PerImage, standard_error
from iwae_cli.evaluation.likelihood import Likelihood, in_pieces, log_likelihood
from iwae_cli.evaluation.proposals import Refined, mixture_log_prob, refine
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.record.figures import Posterior, plot_posteriors
from iwae_cli.record.folder import drawable
from iwae_cli.record.summary import SPLITS

PART = BLOCK  # points scored at once: a fixed number, so that products have one shape however images are batched
PRIOR_DRAWS = 4096  # of the prior, which place the grid
FARTHEST = 5.0  # standard deviations that the farthest of them counts as at least
BORDER = 0.9  # points beyond this share of the half side are near the border
TOLERANCE = 1e-3  # error in nats above which a note says what to type
BORDER_TOLERANCE = 1e-4  # likewise the share of the mass of an image near the border
PICTURED = 3  # images in the picture
KS = (5, 50)  # numbers of draws that q is resampled from
REPEATS = 1000  # sets of k - 1 draws over which the density of the resampled q is averaged
OVERVIEW = 281  # points on each side of the grid that finds the posterior of an image and gives KL
WINDOW = 101  # and of the one that shows it
DEPTH = (6.0, 3.5)  # how far below their maxima log p(h|x) and log q(h|x) are shown, nats

ROWS = (
    ("NLL by the grid, nats", "nll_grid", "{:.4f}"),
    ("  change with half the points, at most", "grid_error", "{:.1e}"),
    ("  mass near its border, at most", "grid_border", "{:.1e}"),
    ("  another test set: stderr_images", "stderr_images", "± {:.2f}"),
    ("NLL_{k} by q, nats", "nll", "{:.4f}"),
    ("  above the grid", "above_grid", "{:+.4f}"),
    ("  paired: stderr", "above_grid_stderr", "± {:.4f}"),
    ("  in one image, at most", "above_grid_max", "{:+.4f}"),
    ("NLL_{k} refined, nats", "nll_refined", "{:.4f}"),
    ("  above the grid, refined", "refined_above_grid", "{:+.4f}"),
    ("  paired: stderr, refined", "refined_above_grid_stderr", "± {:.4f}"),
    ("  in one image, at most, refined", "refined_above_grid_max", "{:+.4f}"),
    ("images", "n", "{:,}"),
)


@dataclass(frozen=True)
class Box:
    """Equally spaced points between two corners of a box, or of a box for each image."""

    low: Float64[Tensor, "*n d"]
    high: Float64[Tensor, "*n d"]
    points: int  # on each side

    def __len__(self) -> int:
        return self.points ** self.low.shape[-1]

    def indices(self, start: int = 0, count: int | None = None) -> Int[Tensor, "m d"]:
        """Return the indices on each side of ``count`` points (None: of all) from the one with number ``start`` on."""
        last = len(self) if count is None else min(len(self), start + count)
        sides = (self.points,) * self.low.shape[-1]
        return torch.stack(torch.unravel_index(torch.arange(start, last, device=self.low.device), sides), -1)

    def at(self, indices: Int[Tensor, "m *#n d"]) -> Float64[Tensor, "m *n d"]:
        """Return the points with these indices."""
        return self.low + indices * (self.high - self.low) / (self.points - 1)

    def log_cell(self) -> Float64[Tensor, "*n"]:
        """Return the logarithm of the volume of a cell."""
        return ((self.high - self.low) / (self.points - 1)).log().sum(-1)


@dataclass(frozen=True)
class Quadrature:
    """Per-image results."""

    log_px: PerImage  # log p(x), nats
    error: PerImage  # by how much it differs from the same by every other point of each side, nats
    border: PerImage  # share of the mass near the border of the grid


@torch.no_grad()
def prior_box(model: LatentVariableModel, span: float, points: int, seed: int) -> Box:
    """Return the box of ``span`` standard deviations of p(h) around its mean, which a prior need not know: from draws.

    A few draws far away, of a mixture, may be the posterior of some image. ``FARTHEST`` keeps them well inside.
    """
    parameter = next(model.parameters())
    noise = KeyedNoise(seed, "grid", [0], dtype=parameter.dtype, device=parameter.device)
    drawn = model.generative.prior.sample(None, PRIOR_DRAWS, 1, 1, noise)[0][:, 0].double()
    mean = drawn.mean(0)
    reach = span * torch.maximum(drawn.std(0), (drawn - mean).abs().amax(0) / FARTHEST)
    return Box(mean - reach, mean + reach, points)


def quadrature(
    model: LatentVariableModel,
    x: Shaped[Tensor, "n pixels"],
    box: Box,
    *,
    rows: int,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] | None = None,
) -> Quadrature:
    """Return log p(x) of every image by the points of ``box``, with two measures of its error.

    The model has one layer of real latents, and ``box``, one for all images, an odd number of points on each side.
    Other arguments as in ``likelihood.log_likelihood``; ``rows`` bounds images x points.
    """
    parameter = next(model.parameters())
    p = model.generative

    def integrate(images: Sequence[int]) -> Float64[np.ndarray, "sums batch"]:
        observed = x[images[0] : images[-1] + 1].to(parameter)
        sums = torch.full((3, len(images)), -math.inf, dtype=torch.float64, device=parameter.device)
        for start in range(0, len(box), PART):
            check()
            indices = box.indices(start, PART)
            # One h for all images: the networks are evaluated once for the batch.
            h = box.at(indices)[:, None].to(parameter.dtype)
            log_p = (p.observation.log_prob(observed, h) + p.prior.log_prob(h, None)).double()
            counted = _counted(indices, box.points)[..., None]
            sums = torch.logaddexp(sums, log_p.masked_fill(~counted, -math.inf).logsumexp(1))
        return sums.cpu().numpy()

    found = map_batches(integrate, len(x), max(1, rows // PART), workers, parameter.device, on_progress)
    every, other, border = np.concatenate(found, axis=1)
    cell, doubled = float(box.log_cell()), box.low.shape[-1] * math.log(2)
    with np.errstate(invalid="ignore"):
        return Quadrature(every + cell, np.abs(other + doubled - every), np.exp(border - every))


def _counted(indices: Int[Tensor, "m d"], points: int) -> Bool[Tensor, "3 m"]:
    """Return which points belong to the grid, to that of every other point, and to its border."""
    from_centre = (2 * indices - (points - 1)).abs()
    every = torch.ones_like(indices[:, 0], dtype=torch.bool)
    return torch.stack([every, (indices % 2 == 0).all(-1), (from_centre > BORDER * (points - 1)).any(-1)])


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


@final
@dataclass(frozen=True)
class Grid(Estimator):
    """log p(x) by quadrature beside L_k of the same images by q and by refined proposals, and their picture."""

    k: int
    span: float = 7.0
    points: int = 561
    images: int | None = 100

    def __post_init__(self) -> None:
        check_range("k", self.k, 1, MAX_K)
        if not 0 < self.span < math.inf:
            raise ValueError(f"span must be finite and > 0, got {self.span}")
        check_range("points", self.points, 3)
        if self.points % 2 == 0:
            raise ValueError(f"points must be odd, got {self.points}")
        check_range("images", self.images, 1)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return log p(x) for every split of the evaluation, and the picture for one of them."""
        model, evaluation = subject.model, subject.evaluation
        drawn = _require_few_latents(model)
        box = prior_box(model, self.span, self.points, evaluation.seed)
        _require_densities(model, drawn, box)
        how = subject.how(check)
        seed = how.pop("seed")
        notes = [f"above the grid: NLL_{self.k} minus NLL by the grid on the same images; in expectation it is above 0"]
        estimates = Estimates(notes=notes)
        pictured = next(name for name in SPLITS if name in evaluation.splits)
        for name in evaluation.splits:
            split = subject.split(name, self.images)
            with Progress(f"grid of {name}", total=len(split.x), unit="image") as progress:
                how["on_progress"] = progress.update
                grid = quadrature(model, split.x, box, **how)
                by = {}
                for key, refined in (("q", False), ("refined", True)):
                    progress.change(f"L_{self.k} of {name}, {key}", len(split.x))
                    by[key] = log_likelihood(model, split, k=self.k, seed=seed, refined=refined, **how)
            found = {"log_px": grid.log_px, "error": grid.error, "border": grid.border}
            found |= {f"log_px_{key}": estimate.log_px for key, estimate in by.items()}
            with np.errstate(invalid="ignore"):
                estimates.add(name, self._summary(grid, by), found, "a log-density or a log-weight is not finite")
                notes += self._notes(name, grid, by)
            estimates.hashes[name] = split.sha256
            if name == pictured and np.isfinite(grid.log_px[:PICTURED]).all():
                posteriors = _posteriors(subject, split, grid.log_px[:PICTURED], box, check)
                estimates.figures["posteriors.png"] = partial(plot_posteriors, posteriors=posteriors)
                notes.append(f"posteriors.png: p(h|x) of {len(posteriors)} images of {name}, and its approximations")
        estimates.lay_out(ROWS, self.k)
        return estimates

    def _summary(self, grid: Quadrature, by: Mapping[str, Likelihood]) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "nll_grid": -grid.log_px.mean(),
            "n": len(grid.log_px),
            "stderr_images": standard_error(grid.log_px),
            "grid_error": grid.error.max(),
            "grid_border": grid.border.max(),
            "k": self.k,
        }
        for key, estimate in by.items():
            above = grid.log_px - estimate.log_px
            nll, prefix = ("nll", "") if key == "q" else (f"nll_{key}", f"{key}_")
            numbers |= {
                nll: -estimate.log_px.mean(),
                f"{prefix}above_grid": above.mean(),
                f"{prefix}above_grid_stderr": standard_error(above),
                f"{prefix}above_grid_max": above.max(),
            }
        return numbers

    def _notes(self, name: str, grid: Quadrature, by: Mapping[str, Likelihood]) -> list[str]:
        notes = []
        more = f"estimator.points={2 * self.points - 1}"
        if (error := grid.error.max()) > TOLERANCE:
            notes.append(f"{name}: half of the points change log p(x) by up to {error:.2g} nats; write {more}")
        wider = f"write estimator.span={2 * self.span:g} {more}"
        if (border := grid.border.max()) > BORDER_TOLERANCE:
            notes.append(f"{name}: up to {border:.2g} of the mass of an image is near the border of the grid; {wider}")
        for key, estimate in by.items():
            if beyond := int((estimate.log_px - grid.log_px > 5 * np.sqrt(estimate.variance) + TOLERANCE).sum()):
                notes.append(
                    f"{name}: L_{self.k} by {key} of {beyond} images is higher than by the grid, which therefore "
                    f"misses a part of their mass; {wider}"
                )
        return notes


def _require_few_latents(model: LatentVariableModel) -> Float[Tensor, "1 pixels"]:
    """Return a drawn image; raise UserError unless the model has one layer of one or two real latents."""
    parameter = next(model.parameters())
    with torch.no_grad():
        drawn, x = model.generative.sample(1, GeneratorNoise(generator(parameter.device, 0), parameter.dtype))
    sizes = [layer.shape[-1] for layer in drawn]
    if model.inference.reparameterized and len(sizes) == 1 and sizes[0] <= 2:
        return x
    kind = "real" if model.inference.reparameterized else "discrete"
    raise UserError(
        f"estimator=grid is for one layer of one or two real latents, and this model has {' + '.join(map(str, sizes))} "
        f"{kind} ones: write estimator=ais, or train one with model=one_layer model.latent_sizes=[2]"
    )


@torch.no_grad()
def _require_densities(model: LatentVariableModel, x: Float[Tensor, "1 pixels"], box: Box) -> None:
    """Raise UserError unless p(h) and q(h|x) have a density at the corners, the centre and the sides of a box."""
    corners = replace(box, points=3)
    h = corners.at(corners.indices())[:, None].to(x.dtype)
    for name, log_density in (
        ("p(h)", lambda: model.generative.prior.log_prob(h, None)),
        ("q(h|x)", lambda: model.inference(x, (h,))),
    ):
        try:
            positive = bool(log_density().isfinite().all())
        except ValueError:  # of torch.distributions, outside of a support
            positive = False
        if not positive:
            raise UserError(
                f"estimator=grid is for densities that are positive everywhere, and {name} of this model is not within "
                "estimator.span standard deviations of the prior: write estimator=sandwich"
            )


@torch.no_grad()
def _window(
    model: LatentVariableModel, x: Float[Tensor, "n pixels"], box: Box, rows: int, check: Callable[[], None]
) -> Box:
    """Return a square for every image that holds p(h|x) and q(h|x) as far down as ``DEPTH``."""
    overview = replace(box, points=OVERVIEW)
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
    step = (box.high - box.low) / (OVERVIEW - 1)
    half = 0.55 * (high - low + step).amax(-1, keepdim=True)
    return Box((low + high) / 2 - half, (low + high) / 2 + half, WINDOW)


def _posteriors(
    subject: EstimatorInput, split: Split, log_px: PerImage, box: Box, check: Callable[[], None]
) -> list[Posterior]:
    """Return what the picture shows of the first images of a split."""
    model, data, evaluation = subject.model, subject.data, subject.evaluation
    x = split.x[: len(log_px)].to(next(model.parameters()))
    proposal = refine(model, x, range(len(x)), evaluation.seed, split.name, check)
    window = _window(model, x, box, evaluation.rows, check)
    whole = replace(box, points=OVERVIEW)
    logs, on_whole = (
        log_densities(model, x, h, log_px, proposal, seed=evaluation.seed, rows=evaluation.rows, check=check)
        for h in (window.at(window.indices()[:, None]), whole.at(whole.indices())[:, None].expand(-1, len(x), -1))
    )
    # Of densities that are normalized on the whole grid: at least zero, but for rounding.
    shares = {name: log - np.logaddexp.reduce(log, axis=0) for name, log in on_whole.items()}
    exact, *_ = shares.values()
    divergences = {name: (np.exp(share) * (share - exact)).sum(0) for name, share in shares.items()}
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
            {name: max(0.0, float(divergence[i])) for name, divergence in divergences.items()},
        )
        for i in range(len(x))
    ]
