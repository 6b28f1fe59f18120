"""The estimator for models with one layer of one or two real latents: the truth beside L_k, and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.core.progress import Progress
from iwae_cli.evaluation.estimator import Estimates, Estimator, EstimatorInput, standard_error
from iwae_cli.evaluation.grid.picture import OVERVIEW, posteriors
from iwae_cli.evaluation.grid.quadrature import Box, Quadrature, prior_box, quadrature
from iwae_cli.evaluation.likelihood import Likelihood, log_likelihood
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.priors import OneHotPrior
from iwae_cli.record.figures import plot_posteriors
from iwae_cli.record.summary import SPLITS

TOLERANCE = 1e-3  # error in nats above which a note says what to type
BORDER_TOLERANCE = 1e-4  # likewise the share of the mass of an image near the border
PICTURED = 3  # images in the picture

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
    ("first images", "n", "{:,}"),
)


@final
@dataclass(frozen=True)
class Grid(Estimator):
    """log p(x) by quadrature beside L_k of the same images by q and by refined proposals, and their picture."""

    recipe = 1  # fits that reach narrow posteriors

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
                shown = posteriors(subject, split, grid.log_px[:PICTURED], box, check)
                estimates.figures["posteriors.png"] = partial(plot_posteriors, posteriors=shown)
                notes.append(f"posteriors.png: p(h|x) of {len(shown)} images of {name}, and its approximations")
                if any(math.isnan(kl) for posterior in shown for kl in posterior.divergences.values()):
                    more = f", write estimator.points={2 * max(self.points, OVERVIEW) - 1}"
                    finer = more * (box.low.shape[-1] == 1)  # with two latents its distance is fixed
                    notes.append(
                        "posteriors.png: KL is unknown where a density lies partly outside of the grid, "
                        f"write estimator.span={2 * self.span:g}, or is narrow beside the distance of its points{finer}"
                    )
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
    # AIS moves no categorical latent.
    ais = "" if isinstance(model.generative.prior, OneHotPrior) else "write estimator=ais, or "
    raise UserError(
        f"estimator=grid is for one layer of one or two real latents, and this model has {' + '.join(map(str, sizes))} "
        f"{kind} ones: {ais}train one with model=one_layer model.latent_sizes=[2]"
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
