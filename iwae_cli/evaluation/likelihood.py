"""L_k, the importance-weighted estimate of log p(x): per-image values in one pass over the samples, with their errors.

-L_k is in expectation an upper bound on the negative log-likelihood. It is reported as NLL_k beside three separate
numbers: the error over images, the Monte Carlo error, and the Jensen bias.
Source of the protocol: Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519 (k = 5000).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from iwae_cli.core.errors import Interrupted, UserError
from iwae_cli.core.noise import BLOCK, KeyedNoise, Noise
from iwae_cli.core.numerics import SMALLEST_TAIL, StreamingLogWeights, accumulator_device, tail_size
from iwae_cli.core.progress import Progress
from iwae_cli.data.base import Data, Split
from iwae_cli.evaluation.active_units import RULES, active_units
from iwae_cli.evaluation.estimator import (
    ALONE,
    Estimates,
    Estimator,
    EstimatorInput,
    PerImage,
    array_name,
    finite,
    monte_carlo_error,
    monte_carlo_variance,
    require_probabilities,
    standard_error,
    stderr_mc,
    without_nan,
)
from iwae_cli.evaluation.fused import FusedScorer
from iwae_cli.evaluation.proposals import DISCRETE, GROUP, refine, why_not
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.evaluation.workers import map_batches, processes, threads
from iwae_cli.models.base import Architecture, LatentVariableModel
from iwae_cli.objectives.jvi import jackknife
from iwae_cli.record.summary import DISCRETE_UNITS, split_rows

log = logging.getLogger("iwae_cli")

CHUNK = 8 * BLOCK  # samples of one image that a model scores at once; as many images as fill the remaining rows
PIECE = 128 * BLOCK  # samples of one image that FusedScorer returns at once; it computes them in smaller chunks
IMAGES = 8  # images per batch of FusedScorer, which computes one after the other
DEFAULT_REFINED = 200  # evaluation.refine of conf/evaluation/default.yaml
ENOUGH_SECONDS = 0.2  # measured for a forecast
COMPARED = 200  # images that are also computed without bfloat16; all, if there are fewer than twice as many
OF_A_DENSITY = (
    "real values: NLL is of a density, in nats, it changes with their unit, and there are no bits per dimension"
)


@dataclass(frozen=True)
class Likelihood:
    """Per-image results of one split, in the order of the data set, nats."""

    k: int  # samples per image
    log_px: PerImage  # L_k
    bounds: dict[int, PerImage]  # L_m for every level m up to k, see numerics.grid_levels
    ess: PerImage  # effective sample size, between 1 and k
    khat: PerImage  # Pareto k-hat; NaN where it is not defined: equal weights in the tail, or fewer than five
    top_weight: PerImage  # largest normalized weight
    exact: PerImage | None = None  # log p(x) in closed form; None if the model has none
    jackknife: PerImage | None = None  # estimate of log p(x); NaN where it has no value; None if not asked for
    float32: PerImage | None = None  # L_k without bfloat16 on the same noise; NaN where not computed; None without bf16

    @property
    def variance(self) -> PerImage:
        """Squared Monte Carlo error of ``log_px``, see ``monte_carlo_variance``."""
        return monte_carlo_variance(self.ess, self.k)


def check_refine(evaluation: Evaluation, model: Architecture, data: Data | None = None) -> None:
    """Raise UserError if ``evaluation.refine`` is not for this model, or it or ``images`` exceeds a split."""
    refine = evaluation.refine
    if refine == "all" and model.discrete:
        raise UserError(f"evaluation.refine=all: {DISCRETE}; write evaluation.refine=0")
    for name in evaluation.splits if data is not None else ():
        images = len(getattr(data, name))
        if evaluation.images is not None and evaluation.images > images:
            raise UserError(
                f"evaluation.images={evaluation.images} is more than the {images:,} images of {name}; "
                "write evaluation.images=null, or evaluation.splits without it"
            )
        images = evaluation.images or images
        # The default serves data sets with fewer images, too: it takes a smaller split whole.
        if refine != "all" and refine > images and refine != DEFAULT_REFINED:
            raise UserError(
                f"evaluation.refine={refine} is more than the {images:,} images of {name}; "
                "write evaluation.refine=all, or evaluation.splits without it"
            )


@final
class LogLikelihood(Estimator):
    """L_k of every split and the active units, without ``estimator=``; its settings are those of ``evaluation``."""

    file = "log_likelihood.npz"

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return L_k with its errors and diagnostics, and the active units by our rule and by the authors'."""
        model, evaluation = subject.model, subject.evaluation
        estimates, how = Estimates(), subject.how(check) | {"k": evaluation.k}
        numbers, reasons = estimates.numbers, estimates.reasons
        for name in evaluation.splits:
            split = subject.split(name)
            pixels = None if split.x.is_floating_point() else split.x.shape[1]
            with Progress(f"evaluating {name}", total=len(split.x), unit="image") as progress:
                likelihood = log_likelihood(
                    model,
                    split,
                    with_jackknife=evaluation.jackknife,
                    bf16=evaluation.precision == "bf16",
                    on_progress=progress.update,
                    **how,
                )
            numbers[name], missing = summarize(likelihood, pixels)
            estimates.hashes[name] = split.sha256
            kept = {"": likelihood}
            images = len(split.x) if evaluation.refine == "all" else min(evaluation.refine, len(split.x))
            if images:
                with Progress(f"refining {name}", total=images, unit="image") as progress:
                    first = replace(split, x=split.x[:images], labels=None)
                    refined = _refined(model, first, on_progress=progress.update, **how)
                if isinstance(refined, str):
                    numbers[name]["gap_q"], missing["gap_q"] = None, f"evaluation.refine: {refined}"
                else:
                    found, why = summarize_gap(likelihood, refined, pixels)
                    numbers[name] |= found
                    missing |= why
                    kept["refined_"] = refined
            reasons |= {f"{name}.{key}": reason for key, reason in missing.items()}
            for prefix, values in kept.items():
                for key in ("log_px", "ess", "khat", "top_weight"):
                    estimates.arrays[array_name(name, f"{prefix}{key}")] = getattr(values, key)
        how = {"seed": evaluation.seed, "rows": evaluation.rows, "workers": evaluation.workers}
        for key, (of, first_images, draws) in RULES.items():
            x = subject.data.evaluation_split(of, evaluation.binarization_seed, first_images).x
            numbers[key] = active_units(model, x, draws, stream=key, on_progress=lambda _: check(), **how)
            if numbers[key] is None:
                discrete = not model.inference.reparameterized
                reasons[key] = DISCRETE_UNITS if discrete else "E_q[h|x] is not finite for some image"
        estimates.rows = split_rows(numbers)
        estimates.notes = [] if subject.data.levels else [OF_A_DENSITY]
        return estimates


def piece_size(k: int, rows: int) -> int:
    """Return how many of ``k`` samples of one image a model scores at once, in whole blocks: at most ``rows``."""
    return min(-(-k // BLOCK) * BLOCK, max(BLOCK, rows // BLOCK * BLOCK), CHUNK)


def in_pieces(
    k: int, piece: int, seed: int, stream: str, images: Sequence[int], x: Tensor, check: Callable[[], None]
) -> Iterator[tuple[int, Noise]]:
    """Yield the size of every piece of ``k`` samples, and its noise of the dtype and on the device of ``x``.

    ``check`` is called before each and may raise to stop; other arguments as in ``KeyedNoise``.
    """
    for start in range(0, k, piece):
        check()
        yield min(piece, k - start), KeyedNoise(seed, stream, images, start, x.dtype, x.device)


def _refined(model: LatentVariableModel, split: Split, **how: Any) -> Likelihood | str:
    """Return L_k by refined proposals, or why there is none: what q has found is not to be lost by that."""
    if (reason := why_not(model)) is not None:
        return reason
    try:
        found = log_likelihood(model, split, refined=True, **how)
    except (UserError, Interrupted, MemoryError):
        raise
    except Exception as error:  # a class from outside may refuse latents that a Gaussian draws
        log.info("how the refined proposals failed", exc_info=True)
        return f"a Gaussian for h_1 does not serve this model ({f'{type(error).__name__}: {error}'.splitlines()[0]})"
    if lost := int((~np.isfinite(found.log_px)).sum()):
        return f"L_{found.k} by the refined proposal is not finite for {lost} of {len(found.log_px)} images"
    return found


def work(model: LatentVariableModel, data: Data, evaluation: Evaluation) -> tuple[int, int]:
    """Return the numbers of images that are evaluated and refined, over all splits."""
    sizes = [min(evaluation.images or math.inf, len(getattr(data, name))) for name in evaluation.splits]
    most = math.inf if evaluation.refine == "all" else evaluation.refine
    return int(sum(sizes)), int(sum(min(most, size) for size in sizes)) if why_not(model) is None else 0


def forecast(model: LatentVariableModel, data: Data, evaluation: Evaluation) -> float:
    """Return how many seconds L_k of all splits will take, from a few images with few samples that are timed now."""
    images, refined = work(model, data, evaluation)
    device = next(model.parameters()).device
    at_once = threads(evaluation.workers, device) * processes()
    how = {"seed": 0, "stream": "forecast", "rows": evaluation.rows, "workers": evaluation.workers}

    def timed(n: int, k: int, **more: bool) -> float:
        # Seconds for one image.
        first = data.evaluation_split(evaluation.splits[0], evaluation.binarization_seed, n * at_once)
        started = time.monotonic()
        log_likelihood(model, first, k=k, **how, **more)  # type: ignore[arg-type]
        return (time.monotonic() - started) / len(first.x)

    k = min(BLOCK, evaluation.k)
    while True:
        n = max(IMAGES, evaluation.rows // min(k, CHUNK))
        per_image = timed(n, k, bf16=evaluation.precision == "bf16")
        if per_image * n * at_once > ENOUGH_SECONDS or k == evaluation.k:
            break
        k = min(4 * k, evaluation.k)
    per_sample = per_image / k
    seconds = images * evaluation.k * per_sample
    if refined:
        # The fit takes as long for any k.
        k = min(BLOCK, evaluation.k)
        seconds += refined * (timed(GROUP, k, refined=True) + (evaluation.k - k) * per_sample)
    return seconds


def log_likelihood(
    model: LatentVariableModel,
    split: Split,
    *,
    k: int,
    seed: int,
    rows: int,
    workers: int | None = None,
    stream: str | None = None,
    with_jackknife: bool = False,
    plain: bool = False,
    bf16: bool = False,
    refined: bool = False,
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] | None = None,
) -> Likelihood:
    """Return L_k and its diagnostics for every image of ``split``.

    The noise of an image is a function of (seed, stream, image, sample) alone, and each image is reduced in float64
    in a fixed order, so the result does not depend on ``rows`` or ``workers`` beyond the rounding of matrix products
    of another shape.

    Args:
        model: in evaluation mode, on its device; its dtype is the dtype of the computation.
        split, k: the images, and samples of each.
        seed, stream: key of the noise; the stream is named as the split by default.
        rows: bound on images x samples computed at once by one worker (at least one block of 64).
        workers: threads that share the images; None is one per core on a CPU, one on another device.
        with_jackknife: also compute the jackknife estimate; keeps all k log-weights of a batch of images.
        plain: let the model compute, not ``FusedScorer``, whose sums are rounded in another order.
        bf16: multiply numbers of bfloat16 (see ``FusedScorer``), and compute some of the images in float32 too.
        refined: draw from proposals refined for each image (see ``proposals``), not from q; for a model that has them.
        check: called by every worker before each of its computations; may raise to stop.
        on_progress: called with the number of finished images; may raise to stop.

    Raises:
        RunFailed: estimates that are no log-probabilities, of integers.
        ValueError: values of x that p(x|h) has not; ``bf16`` for a model that ``FusedScorer`` does not fit, or not in
            float32 on a CPU.
    """
    model.generative.require_observable(split.x)
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    fused = not plain and device.type == "cpu" and FusedScorer.fits(model, split.x)
    if bf16 and not (fused and dtype == torch.float32):
        raise ValueError("bf16 is for Gaussian models of binary pixels in float32 on a CPU")
    scorer = FusedScorer(model, rows) if fused else None
    rounded = FusedScorer(model, rows, bf16=True) if bf16 else scorer
    if fused:
        piece, batch = PIECE, max(1, min(IMAGES, IMAGES * PIECE // k))
    else:
        piece = piece_size(k, rows)
        batch = max(1, rows // piece)
    if refined:
        # The images of one batch are fitted together, in groups that are the same for any rows.
        batch = GROUP
        piece = piece if fused else min(piece, max(BLOCK, rows // GROUP // BLOCK * BLOCK))
    compare_every = max(1, len(split.x) // COMPARED)  # bf16: so many batches, of which one is in float32 as well
    key = stream or split.name

    def noise(images: Sequence[int], start: int) -> KeyedNoise:
        check()
        return KeyedNoise(seed, key, images, start, dtype, device)

    def score(images: Sequence[int]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        # L_m by level m, and the other results by name; (images,) each.
        x = split.x[images[0] : images[-1] + 1].to(device=device, dtype=dtype)
        proposal = refine(model, x, images, seed, key, check) if refined else None
        sums = StreamingLogWeights(k, len(images), block=BLOCK, device=accumulator_device(device))
        compare = bf16 and images[0] // batch % compare_every == 0
        sums_float32 = StreamingLogWeights(k, len(images), block=BLOCK) if compare else None
        kept = []
        for start in range(0, k, piece):
            n = min(piece, k - start)
            if scorer is None or rounded is None:
                latents, log_q = (proposal or model.inference).sample(x, n, noise(images, start))
                log_w = (model.generative(x, latents) - log_q).to(accumulator_device(device))
            else:
                log_w = rounded.log_weights(x, n, noise, images, start, proposal)
                if sums_float32 is not None:
                    sums_float32.add(scorer.log_weights(x, n, noise, images, start))
            sums.add(log_w)
            if with_jackknife:
                kept.append(log_w.to(torch.float64))
        found = {"ess": sums.ess(), "khat": sums.khat(), "top_weight": sums.top_weight()}
        exact = None if refined else model.generative.exact_log_px(x)
        if exact is not None:
            found["exact"] = exact
        if with_jackknife:
            found["jackknife"] = jackknife(torch.cat(kept))
        if bf16:
            not_computed = torch.full((len(images),), math.nan)
            found["float32"] = not_computed if sums_float32 is None else sums_float32.log_px()
        return {m: bound.cpu() for m, bound in sums.bounds().items()}, {name: v.cpu() for name, v in found.items()}

    results = map_batches(score, len(split.x), batch, workers, device, on_progress)
    bounds, values = (
        {key: torch.cat([part[key] for part in parts]).to(torch.float64).numpy() for key in parts[0]}
        for parts in zip(*results, strict=True)
    )
    what = f"L_{k} of {split.name}{', refined,' if refined else ''}"
    require_probabilities(what, split.x, bounds[k], monte_carlo_error(values["ess"], k))
    if "exact" in values:
        require_probabilities(f"the exact log p(x) of {split.name}", split.x, values["exact"], None)
    return Likelihood(k, bounds[k], bounds, **values)


def summarize(likelihood: Likelihood, pixels: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the numbers of one split, plain floats, ints and None, and why any of them is None.

    docs/numbers.md defines them. ``bits_per_dim`` is left out where ``pixels`` is None: for real values, whose NLL is
    of a density and depends on their unit. An image whose k-hat is not defined counts as not above 0.7.
    """
    k, n, log_px, ess = likelihood.k, len(likelihood.log_px), likelihood.log_px, likelihood.ess
    reasons: dict[str, str] = {}
    broken = _not_finite(k, log_px)
    v = likelihood.variance
    khat = likelihood.khat[~np.isnan(likelihood.khat)]
    # One sample always has all of the weight: without this rule it would claim to have no error.
    one_sample = "one sample says nothing of its own error; use evaluation.k=2 or more"
    why = {"stderr_images": ALONE, "stderr_mc": one_sample, "bias_mc": one_sample}
    why["khat_share_above_0.7"] = (
        "k-hat is fitted to the largest weights, and in every image too many of these are equal"
    )
    if tail_size(k) < SMALLEST_TAIL:
        why["khat_share_above_0.7"] = (
            f"k-hat is fitted to the largest fifth of the weights, {SMALLEST_TAIL} at least, and k = {k} has too few; "
            f"use evaluation.k={5 * SMALLEST_TAIL} or more"
        )
    with np.errstate(invalid="ignore"):
        found: dict[str, Any] = {
            "nll": -log_px.mean(),
            "k": k,
            "n": n,
            "stderr_images": standard_error(log_px),
            "stderr_mc": stderr_mc(v) if k > 1 else math.nan,
            "bias_mc": -v.mean() / 2 if k > 1 else math.nan,
            "bounds": {
                str(m): finite(bound.mean(), f"bounds.{m}", reasons, broken or _not_finite(m, bound))
                for m, bound in likelihood.bounds.items()
            },
            "ess_median": np.median(ess),
            "ess_min": ess.min(),
            "ess_share_below_10": math.nan if broken else (ess < 10).mean(),
            "khat_share_above_0.7": (khat > 0.7).sum() / n if len(khat) and not broken else math.nan,
            "top_weight_share_above_0.5": math.nan if broken else (likelihood.top_weight > 0.5).mean(),
        }
        if pixels is not None:
            found["bits_per_dim"] = -log_px.mean() / (pixels * math.log(2))
        if likelihood.jackknife is not None:
            found["nll_jackknife"] = -likelihood.jackknife.mean()
            why["nll_jackknife"] = (
                "in some image one weight is larger than all others together, and L_k-1 without it has no value"
            )
        if likelihood.float32 is not None:
            both = ~np.isnan(likelihood.float32)
            shift = likelihood.float32[both] - log_px[both]
            found["bf16_shift"] = shift.mean() if len(shift) else math.nan
            found["bf16_shift_stderr"] = standard_error(shift)
            found["bf16_shift_images"] = len(shift)
            why["bf16_shift"] = "L_k is not finite in float32 for some image"
            why["bf16_shift_stderr"] = why["bf16_shift"] if n > 1 else why["stderr_images"]
        numbers = without_nan(found, "", reasons, broken, **({} if broken else why))
        if likelihood.exact is not None:
            reason = "the exact log p(x) of the model is not finite"
            numbers["exact_nll"] = finite(-likelihood.exact.mean(), "exact_nll", reasons, reason)
    return numbers, reasons


def summarize_gap(by_q: Likelihood, refined: Likelihood, pixels: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the numbers of refined proposals on the first images of a split, and why any of them is missing.

    Both L_k are lower bounds on log p(x), so NLL_k by q is too high by ``gap_q`` at least.
    """
    numbers, missing = summarize(refined, pixels)
    reasons = {f"refined.{key}": reason for key, reason in missing.items()}
    n = len(refined.log_px)
    with np.errstate(invalid="ignore"):
        gap = refined.log_px - by_q.log_px[:n]
    broken = "L_k of q or of the refined proposal is not finite for some image"
    found: dict[str, Any] = {
        "gap_q": finite(gap.mean(), "gap_q", reasons, broken),
        "gap_q_stderr": finite(standard_error(gap), "gap_q_stderr", reasons, broken if n > 1 else ALONE),
        "refined": numbers,
    }
    if n == len(by_q.log_px):
        found["nll_refined"] = numbers["nll"]
        if numbers["nll"] is None:
            reasons["nll_refined"] = missing["nll"]
    return found, reasons


def _not_finite(m: int, bound: PerImage) -> str:
    """Return which images have an L_m that is not finite; empty if none has."""
    at = np.flatnonzero(~np.isfinite(bound))
    if not len(at):
        return ""
    return f"L_{m} is not finite for {len(at)} of {len(bound)} images (the first is image {at[0]}: {bound[at[0]]})"
