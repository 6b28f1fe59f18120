"""What L_1 by q loses to log p(x): to the family of q, and to the network that computes its parameters.

With q* the best member of the family for one image,

    log p(x) - L_1(q) = KL(q(h|x) || p(h|x)) = approximation gap + amortization gap,
    approximation gap = log p(x) - L_1(q*),    amortization gap = L_1(q*) - L_1(q).

The family: diagonal or full Gaussians for h_1, as q(h_1|x) itself; q(h_2|h_1), q(h_3|h_2), ... are kept. With several
layers the approximation gap hence contains all that the upper layers lose.

q* is fitted to each image (see ``proposals.fit``). A fit may fail, so it is compared with q on noise of its own, and
the better one is q*. Its L_1, from other noise again, is unbiased for the one that was chosen: no gap is cut at zero,
and the maximum of two noisy values, which is too high on average, does not enter. What the fit misses counts as
approximation gap, so that the amortization gap is a lower bound in expectation.

log p(x) is replaced by log p^: L_k by q or by refined proposals (see ``proposals.refine``), the one whose mean over the
images of the split, less its Monte Carlo error, is higher. Both are lower bounds in expectation. The higher one is so
up to the choice: one for a split adds less than .4 of the Monte Carlo error of their difference, the true one, which
few effective samples understate; a choice for each image would add that of each image. The total gap is hence a lower
bound in expectation but for that.

Source: Cremer, Li, Duvenaud 2018, "Inference Suboptimality in Variational Autoencoders", arXiv 1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.noise import BLOCK
from iwae_cli.core.progress import Progress
from iwae_cli.data.base import Split
from iwae_cli.evaluation.estimator import (
    Estimates,
    Estimator,
    EstimatorInput,
    PerImage,
    share_below_10,
    standard_error,
    stderr_mc,
)
from iwae_cli.evaluation.likelihood import CHUNK, Likelihood, in_pieces, log_likelihood
from iwae_cli.evaluation.proposals import GROUP, fit, why_not
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.evaluation.workers import map_batches
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.conditionals import CholeskyConditional, DiagonalGaussian
from iwae_cli.models.posteriors import FullGaussian
from iwae_cli.record.summary import Row

CHOICE = 4 * BLOCK  # draws from which q* is chosen


def _with_errors(label: str, key: str) -> tuple[Row, Row, Row]:
    return (
        (f"{label}, nats", key, "{:.2f}"),
        (f"  {label}: stderr_images", f"{key}_stderr_images", "± {:.2f}"),
        (f"  {label}: stderr_mc", f"{key}_stderr_mc", "± {:.3f}"),
    )


ROWS = (
    *_with_errors("approximation gap", "approximation_gap"),
    *_with_errors("amortization gap", "amortization_gap"),
    *_with_errors("total gap", "total_gap"),
    *_with_errors("log p^", "log_px"),
    ("  log p^: bias_mc", "bias_mc", "{:+.4f}"),
    *_with_errors("L_1(q*)", "elbo_best"),
    *_with_errors("L_1(q)", "elbo"),
    ("L_{k} by q, nats", "log_px_q", "{:.2f}"),
    ("L_{k} by refined proposals, nats", "log_px_refined", "{:.2f}"),
    ("exact log p(x), nats", "exact", "{:.2f}"),
    ("first images", "n", "{:,}"),
    ("  with a q* better than q", "fitted", "{:.1%}"),
    ("effective sample size of log p^, median", "ess_median", "{:,.1f}"),
    ("  images below 10", "ess_share_below_10", "{:.1%}"),
)


@dataclass(frozen=True)
class Elbos:
    """Per-image results of one split, nats."""

    q: PerImage  # L_1(q)
    best: PerImage  # L_1(q*)
    fitted: Bool[np.ndarray, " n"]  # whether q* is the fitted member, not q
    variance_q: PerImage  # squared Monte Carlo errors of q, best and best - q, whose draws share their noise
    variance_best: PerImage
    variance_gap: PerImage


def elbos(
    model: LatentVariableModel,
    split: Split,
    *,
    k: int,
    seed: int,
    rows: int,
    workers: int | None = None,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] | None = None,
) -> Elbos:
    """Return L_1 by q and by the best member of its family for every image; arguments as in ``log_likelihood``.

    Raises:
        UserError: the family of q is not known.
    """
    parameter, stream = next(model.parameters()), f"{split.name}, gaps"
    diagonal = is_diagonal(model)
    piece = min(max(1, rows // GROUP // BLOCK) * BLOCK, CHUNK)

    def score(images: Sequence[int]) -> Float64[np.ndarray, "values batch"]:
        x = split.x[images[0] : images[-1] + 1].to(parameter)
        proposals = (model.inference, fit(model, x, images, seed, stream, check, diagonal))

        def log_weights(draws: int, stream: str) -> Iterator[Float[Tensor, "proposals n batch"]]:
            for n, noise in in_pieces(draws, piece, seed, stream, images, x, check):
                drawn = [proposal.sample(x, n, noise) for proposal in proposals]
                yield torch.stack([(model.generative(x, h) - log_q).double() for h, log_q in drawn])

        by_q, by_fit = torch.cat([*log_weights(CHOICE, f"{stream}, choice")], 1).mean(1)
        fitted = by_fit > by_q
        sums = torch.zeros(2, 3, len(images), dtype=torch.float64, device=x.device)
        for number, (of_q, of_fit) in enumerate(log_weights(k, stream)):
            best = torch.where(fitted, of_fit, of_q)
            values = torch.stack([of_q, best, best - of_q])
            if number == 0:
                first = values[:, :1]  # differences from it: squares of log-weights would cost digits
            sums += torch.stack([(values - first).sum(1), (values - first).square().sum(1)])
        means = sums[0] / k
        variances = (sums[1] / k - means.square()).clamp(min=0) / (k - 1)
        return torch.cat([(first[:, 0] + means)[:2], variances, fitted[None]]).cpu().numpy()

    parts = map_batches(score, len(split.x), GROUP, workers, parameter.device, on_progress)
    q, best, variance_q, variance_best, variance_gap, fitted = np.concatenate(parts, axis=1)
    return Elbos(q, best, fitted.astype(bool), variance_q, variance_best, variance_gap)


def is_diagonal(model: LatentVariableModel) -> bool:
    """Return whether the family of q(h_1|x) is the diagonal Gaussians, not the full ones; else raise UserError."""
    if (refusal := why_not(model)) is not None:
        raise UserError(f"estimator=gaps is not for this model: {refusal}")
    first = model.inference.layers[0]
    if not isinstance(first, DiagonalGaussian | CholeskyConditional | FullGaussian):
        raise UserError(
            "estimator=gaps fits the best Gaussian with diagonal or full covariance to each image, and q(h_1|x) of "
            f"this model is a {type(first).__name__}"
        )
    return isinstance(first, DiagonalGaussian)


@final
@dataclass(frozen=True)
class Gaps(Estimator):
    """Approximation and amortization gap of q, for every split of the evaluation."""

    recipe = 1  # fits that reach narrow posteriors

    k: int = 5000
    images: int | None = 100

    def __post_init__(self) -> None:
        check_range("k", self.k, 2, MAX_K)
        check_range("images", self.images, 1)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return both gaps, their sum, and the bounds that they are the differences of."""
        diagonal = is_diagonal(subject.model)
        above = "" if len(subject.model.inference.layers) == 1 else "; the layers above are those of q"
        notes = [
            f"q* is the best {'diagonal' if diagonal else 'full'} Gaussian for h_1 of each image{above}",
            "log p^ is the higher of two lower bounds in expectation, and the choice adds less than .4 of the Monte "
            "Carlo error of their difference; but for that the total gap is at least this, and but for what the fit of "
            "q* misses, so is the approximation gap",
        ]
        estimates = Estimates(notes=notes)
        for name in subject.evaluation.splits:
            split = subject.split(name, self.images)
            found, by = self._bounds(subject, split, check)
            with np.errstate(invalid="ignore"):
                chosen = max(by, key=lambda of: _less_its_error(by[of]))
                numbers = self._numbers(found, by, chosen)
            each = {"log_px": by[chosen].log_px, "elbo": found.q, "elbo_best": found.best}
            estimates.add(name, numbers, each)
            estimates.hashes[name] = split.sha256
            notes.append(f"{name}: log p^ is L_{self.k} by {'q' if chosen == 'q' else 'refined proposals'}")
        estimates.lay_out(ROWS, self.k)
        return estimates

    def _bounds(
        self, subject: EstimatorInput, split: Split, check: Callable[[], None]
    ) -> tuple[Elbos, dict[str, Likelihood]]:
        """Return L_1, and L_k by each proposal."""
        model, n, how = subject.model, len(split.x), subject.how(check) | {"k": self.k}
        with Progress(f"gaps of {split.name}", total=3 * n, unit="image") as progress:
            found = elbos(model, split, **how, on_progress=progress.update)
            by_q = log_likelihood(model, split, **how, on_progress=lambda done: progress.update(n + done))
            how |= {"refined": True, "on_progress": lambda done: progress.update(2 * n + done)}
            return found, {"q": by_q, "refined": log_likelihood(model, split, **how)}

    def _numbers(self, found: Elbos, by: dict[str, Likelihood], chosen: str) -> dict[str, Any]:
        """Return the numbers of one split; ``bias_mc`` and the effective sample sizes belong to log p^."""
        log_px, variance, ess = by[chosen].log_px, by[chosen].variance, by[chosen].ess
        # log p^ and L_1 have independent noise, both L_1 the same.
        values = {
            "approximation_gap": (log_px - found.best, variance + found.variance_best),
            "amortization_gap": (found.best - found.q, found.variance_gap),
            "total_gap": (log_px - found.q, variance + found.variance_q),
            "log_px": (log_px, variance),
            "elbo_best": (found.best, found.variance_best),
            "elbo": (found.q, found.variance_q),
        }
        numbers: dict[str, Any] = {"n": len(log_px), "log_px_by": chosen, "fitted": found.fitted.mean()}
        numbers |= {f"log_px_{proposal}": likelihood.log_px.mean() for proposal, likelihood in by.items()}
        for key, (of_image, squared_error) in values.items():
            numbers[key] = of_image.mean()
            numbers[f"{key}_stderr_images"] = standard_error(of_image)
            numbers[f"{key}_stderr_mc"] = stderr_mc(squared_error)
        numbers |= {"bias_mc": -variance.mean() / 2, "ess_median": np.median(ess)}
        numbers["ess_share_below_10"] = share_below_10(ess)
        if by["q"].exact is not None:
            numbers["exact"] = by["q"].exact.mean()
        return numbers


def _less_its_error(likelihood: Likelihood) -> float:
    """Return mean L_k less its Monte Carlo error; -inf instead of NaN, which ``max`` would keep if it came first."""
    value = float(likelihood.log_px.mean()) - stderr_mc(likelihood.variance)
    return -math.inf if math.isnan(value) else value
