"""The estimate of log p(x): L_k per image in one pass over the samples, with everything known of its error.

-L_k is an upper bound on the negative log-likelihood in expectation, not the thing itself; it is always reported as
NLL_k beside three numbers that are never mixed: the error over images, the Monte Carlo error, and the Jensen bias.
Source of the protocol: Burda, Grosse, Salakhutdinov 2016, arXiv 1509.00519 (k = 5000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from iwae_cli.core.noise import BLOCK, KeyedNoise
from iwae_cli.core.numerics import SMALLEST_TAIL, StreamingLogWeights, accumulator_device, tail_size
from iwae_cli.data.base import Split
from iwae_cli.evaluation.fused import FusedScorer
from iwae_cli.evaluation.workers import available_cores, map_batches
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.jvi import jackknife

CHUNK = 8 * BLOCK
"""Samples of one image computed at once; the number of images at once fills the rows that are left."""

PIECE = 128 * BLOCK
"""Samples of one image that the fast way sums up together, as it has computed them a few at a time."""

IMAGES = 8
"""Images that the fast way sums up together, one computed after the other."""

COMPARED = 200
"""Images, or all if there are fewer than twice as many, that are computed without bfloat16 too."""


@dataclass(frozen=True)
class Likelihood:
    """Per-image results of one split, in the order of the data set; arrays are (n,), float64, nats.

    Attributes:
        k: samples per image.
        log_px: L_k.
        bounds: L_m for every level m up to k (see ``numerics.grid_levels``).
        ess: effective sample size, between 1 and k.
        khat: Pareto k-hat; NaN where it is not defined (equal weights, or fewer than five in the tail).
        top_weight: largest normalized weight.
        exact: log p(x) in closed form where the model has one, else None.
        jackknife: the jackknife estimate of log p(x) if it was asked for, else None; NaN where it has no value.
        float32: L_k without bfloat16, on the same noise, of the images it was computed for; NaN for the others; None
            where all of it is without.
    """

    k: int
    log_px: Float64[np.ndarray, " n"]
    bounds: dict[int, Float64[np.ndarray, " n"]]
    ess: Float64[np.ndarray, " n"]
    khat: Float64[np.ndarray, " n"]
    top_weight: Float64[np.ndarray, " n"]
    exact: Float64[np.ndarray, " n"] | None
    jackknife: Float64[np.ndarray, " n"] | None = None
    float32: Float64[np.ndarray, " n"] | None = None


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
    check: Callable[[], None] = lambda: None,
    on_progress: Callable[[int], None] | None = None,
) -> Likelihood:
    """L_k and its diagnostics for every image of ``split``.

    The noise of an image is a function of (seed, stream, image, sample) alone, and each image is reduced in float64
    in a fixed order, so the result does not depend on ``rows`` or ``workers`` beyond the rounding of matrix products
    of another shape.

    Args:
        model: in evaluation mode, on its device; its dtype is the dtype of the computation.
        split: what is scored.
        k: samples per image.
        seed: evaluation seed.
        rows: bound on images x samples computed at once by one worker (at least one block of 64).
        workers: threads that share the images; None is one per core on a CPU, one on another device.
        stream: name of the noise stream; the split's name by default.
        with_jackknife: estimate by the jackknife too; keeps all k log-weights of a batch of images.
        plain: compute the log-weights by the model itself, even where ``FusedScorer`` computes them faster (they differ
            by the rounding of sums of another order).
        bf16: multiply numbers of bfloat16 (see ``FusedScorer``), and compute some of the images in float32 too.
        check: called by every worker before every piece of its work; may raise to stop.
        on_progress: called with the number of images done; may raise to stop.

    Raises:
        ValueError: ``bf16`` of a model that ``FusedScorer`` does not fit, or not in float32 on a CPU.
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    chunk = min(-(-k // BLOCK) * BLOCK, max(BLOCK, rows // BLOCK * BLOCK), CHUNK)
    if workers is None:
        workers = available_cores() if device.type == "cpu" else 1
    fast = not plain and device.type == "cpu" and FusedScorer.fits(model, split.x)
    scorer = FusedScorer(model, rows) if fast else None
    if bf16 and (scorer is None or dtype != torch.float32):
        raise ValueError("bf16 is for Gaussian models of binary pixels in float32 on a CPU")
    rounded = FusedScorer(model, rows, bf16=True) if bf16 else scorer
    batch, piece = max(1, rows // chunk), chunk
    if scorer is not None:
        piece = PIECE
        batch = max(1, min(IMAGES, IMAGES * PIECE // k))
    apart = max(1, len(split.x) // COMPARED)

    def noise(images: Sequence[int], start: int) -> KeyedNoise:
        check()
        return KeyedNoise(seed, stream or split.name, images, start, dtype, device)

    def score(images: Sequence[int]) -> tuple[dict[int, np.ndarray], list[np.ndarray], dict[str, np.ndarray]]:
        x = split.x[images[0] : images[-1] + 1].to(device=device, dtype=dtype)
        streaming = StreamingLogWeights(k, len(images), block=BLOCK, device=accumulator_device(device))
        kept = []
        compare = bf16 and images[0] // batch % apart == 0
        compared = StreamingLogWeights(k, len(images), block=BLOCK) if compare else None
        for start in range(0, k, piece):
            n = min(piece, k - start)
            if scorer is None or rounded is None:
                log_w = model(x, n, noise(images, start)).to(accumulator_device(device))
            else:
                log_w = rounded.log_weights(x, n, noise, images, start)
                if compared is not None:
                    compared.add(scorer.log_weights(x, n, noise, images, start))
            streaming.add(log_w)
            if with_jackknife:
                kept.append(log_w.to(torch.float64))
        extra = {"exact": model.generative.exact_log_px(x), "jackknife": jackknife(torch.cat(kept)) if kept else None}
        if bf16:
            extra["float32"] = torch.full((len(images),), math.nan) if compared is None else compared.log_px()
        return (
            {m: bound.cpu().numpy() for m, bound in streaming.bounds().items()},
            [v.cpu().numpy() for v in (streaming.ess(), streaming.khat(), streaming.top_weight())],
            {name: v.to(torch.float64).cpu().numpy() for name, v in extra.items() if v is not None},
        )

    results = map_batches(score, len(split.x), batch=batch, workers=workers, on_progress=on_progress)
    bounds = {m: np.concatenate([b[m] for b, _, _ in results]) for m in results[0][0]}
    ess, khat, top_weight = (np.concatenate([d[i] for _, d, _ in results]) for i in range(3))
    extra = {name: np.concatenate([e[name] for _, _, e in results]) for name in results[0][2]}
    names = ("exact", "jackknife", "float32")
    return Likelihood(k, bounds[k], bounds, ess, khat, top_weight, *(extra.get(name) for name in names))


def summarize(likelihood: Likelihood, pixels: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The numbers of one split for ``result.json``, and why any of them is missing.

    - ``nll`` = -mean L_k, nats. ``bits_per_dim`` = nll / (pixels ln 2).
    - ``stderr_images`` = sd / sqrt(n): another test set; already contains the Monte Carlo noise.
    - ``stderr_mc`` = sqrt(sum v) / n with v = max(0, 1/ESS - 1/k): other noise, same images. A floor where
      ESS < 30 or k-hat > 0.5.
    - ``khat_share_above_0.7`` is a share of all images; one whose k-hat is not defined counts as not above.
    - ``bias_mc`` = -mean(v) / 2: Jensen's bias of mean L_k below mean log p(x), a floor in size.
    - ``stderr_mc`` and ``bias_mc`` are not known where k = 1.

    ``nll_jackknife`` = -(k L_k - (k-1) mean L_k-1), where it was asked for (Nowozin 2018): less biased, and no bound.

    ``bf16_shift`` = NLL_k in bfloat16 - NLL_k in float32, nats, of the ``bf16_shift_images`` that both were computed
    for, with its standard error over them.

    Returns:
        (numbers, reasons): plain floats, ints and None; ``reasons`` has an entry for every None.
    """
    n = len(likelihood.log_px)
    reasons: dict[str, str] = {}

    def number(name: str, value: float, reason: str) -> float | None:
        if math.isfinite(value):
            return float(value)
        reasons[name] = reason
        return None

    not_finite = _not_finite(likelihood.k, likelihood.log_px)
    v = np.maximum(0.0, 1 / likelihood.ess - 1 / likelihood.k)
    # One weight is always all of the weight: it would say that there is no error.
    alone = "one sample says nothing of its own error; use evaluation.k=2 or more" if likelihood.k == 1 else ""
    with np.errstate(invalid="ignore"):
        nll = -likelihood.log_px.mean()
        spread = likelihood.log_px.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    khat = likelihood.khat[~np.isnan(likelihood.khat)]
    summary: dict[str, Any] = {
        "nll": number("nll", nll, not_finite),
        "k": likelihood.k,
        "n": n,
        "stderr_images": number("stderr_images", spread, not_finite or "one image has no standard error"),
        "stderr_mc": number("stderr_mc", math.nan if alone else math.sqrt(v.sum()) / n, not_finite or alone),
        "bias_mc": number("bias_mc", math.nan if alone else -v.mean() / 2, not_finite or alone),
        "bounds": {
            str(m): number(f"bounds.{m}", bound.mean(), not_finite or _not_finite(m, bound))
            for m, bound in likelihood.bounds.items()
        },
        "ess_median": number("ess_median", float(np.median(likelihood.ess)), not_finite),
        "ess_min": number("ess_min", likelihood.ess.min(), not_finite),
        "ess_share_below_10": number(
            "ess_share_below_10", (likelihood.ess < 10).mean() if not not_finite else math.nan, not_finite
        ),
        "khat_share_above_0.7": number(
            "khat_share_above_0.7",
            (khat > 0.7).sum() / n if len(khat) else math.nan,
            not_finite or _no_khat(likelihood.k),
        ),
        "top_weight_share_above_0.5": number(
            "top_weight_share_above_0.5",
            (likelihood.top_weight > 0.5).mean() if not not_finite else math.nan,
            not_finite,
        ),
        "bits_per_dim": number("bits_per_dim", nll / (pixels * math.log(2)), not_finite),
    }
    if likelihood.exact is not None:
        summary["exact_nll"] = number(
            "exact_nll", -likelihood.exact.mean(), "the exact log p(x) of the model is not finite"
        )
    if likelihood.jackknife is not None:
        summary["nll_jackknife"] = number(
            "nll_jackknife",
            -likelihood.jackknife.mean(),
            not_finite or "for some image one weight outweighs all others, and leaving it out leaves nothing",
        )
    if likelihood.float32 is not None:
        both = ~np.isnan(likelihood.float32)
        why = not_finite or "L_k is not finite in float32 for some image"
        with np.errstate(invalid="ignore"):
            shift = likelihood.float32[both] - likelihood.log_px[both]
            error = shift.std(ddof=1) / math.sqrt(len(shift)) if len(shift) > 1 else math.nan
        summary |= {
            "bf16_shift": number("bf16_shift", shift.mean() if len(shift) else math.nan, why),
            "bf16_shift_stderr": number(
                "bf16_shift_stderr", error, why if n > 1 else "one image has no standard error"
            ),
            "bf16_shift_images": len(shift),
        }
    return summary, reasons


def _no_khat(k: int) -> str:
    """Why it is not defined for any image, in words."""
    if tail_size(k) < SMALLEST_TAIL:
        return (
            f"k-hat is fitted to the largest fifth of the weights, {SMALLEST_TAIL} at least, and k = {k} has too few; "
            f"use evaluation.k={5 * SMALLEST_TAIL} or more"
        )
    return "k-hat is fitted to the largest weights, and in every image all weights are equal"


def _not_finite(m: int, bound: Float64[np.ndarray, " n"]) -> str:
    """Which images have an L_m that is not finite, in words; empty if none has."""
    at = np.flatnonzero(~np.isfinite(bound))
    if not len(at):
        return ""
    return f"L_{m} is not finite for {len(at)} of {len(bound)} images (the first is image {at[0]}: {bound[at[0]]})"
