"""The base class of everything that ``iwae-eval`` computes from a trained model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Shaped
from torch import Tensor

from iwae_cli.core.errors import RunFailed, UserError
from iwae_cli.data.base import Data, Split
from iwae_cli.evaluation.settings import Evaluation
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record.summary import SPLITS, Row

NOT_FINITE = "a log-weight is not finite"
ALONE = "one image has no standard error"
LEAST_ESS = 30  # effective sample size below which the Monte Carlo error is a floor
SURE = math.log(1e6)
ROUNDING = 0.1  # nats of one image that sums of float32 numbers, and products of bfloat16 ones, may be wrong by

PerImage = Float64[np.ndarray, " n"]
"""A number of every image, in the order of the data set."""


def _no_objective(k: int) -> Objective:
    raise UserError("this estimator needs an objective: write objective: null into its yaml")


@dataclass(frozen=True)
class EstimatorInput:
    """What an estimator computes from.

    Attributes:
        model: in evaluation mode, on its device; its dtype is the dtype of the computation.
        data: what it was trained on.
        evaluation: splits, seeds, and the bound on memory.
        objective: returns the run's objective, with the overrides of ``objective``, at another k; for an estimator
            whose yaml has the key ``objective``.
    """

    model: LatentVariableModel
    data: Data
    evaluation: Evaluation
    objective: Callable[[int], Objective] = _no_objective

    def split(self, name: str, first: int | None = None) -> Split:
        """Return a split to score, all of it or its first images: as many as ``evaluation.images`` and ``first``."""
        limits = [limit for limit in (self.evaluation.images, first) if limit is not None]
        return self.data.evaluation_split(name, self.evaluation.binarization_seed, min(limits, default=None))

    def how(self, check: Callable[[], None]) -> dict[str, Any]:
        """Return the arguments ``seed``, ``rows``, ``workers`` and ``check`` of what computes values of every image."""
        asked = self.evaluation
        return {"seed": asked.seed, "rows": asked.rows, "workers": asked.workers, "check": check}


@dataclass
class Estimates:
    """What an estimator found, or has found so far.

    Attributes:
        numbers: for ``result.json``: plain JSON without NaN and infinity.
        rows: the table: (label, dotted key of a number, format). Rows with one label are printed side by side if their
            keys name different splits.
        hashes: sha256 of the splits that were used, by name.
        reasons: why a number is None, by its dotted name.
        arrays: per-image values, float64, for an npz file.
        notes: sentences to print below the table.
        figures: functions that draw a PNG file at a path, by its name.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def add(
        self, name: str, numbers: Mapping[str, Any], arrays: Mapping[str, PerImage], broken: str = NOT_FINITE
    ) -> None:
        """Add numbers and arrays of a split, or of ``simulated`` data; ``broken`` says why a number is not finite."""
        errors = [key for key in numbers if "stderr" in key and not key.endswith("stderr_mc")]
        alone = "one observation has no standard error" if name == "simulated" else ALONE
        why = dict.fromkeys(errors, alone) if numbers["n"] == 1 else {}
        self.numbers[name] = without_nan(numbers, f"{name}.", self.reasons, broken, **why)
        self.arrays |= {array_name(name, key): values for key, values in arrays.items()}

    def lay_out(self, layout: Sequence[Row], k: int) -> None:
        """Make the rows of ``layout`` for all data whose numbers hold their keys; ``{k}`` in a label becomes ``k``."""
        self.rows += [
            (label.format(k=k), f"{name}.{key}", form)
            for label, key, form in layout
            for name in (*SPLITS, "simulated")
            if key in self.numbers.get(name, {})
        ]


class Estimator(ABC):
    """A way to measure a trained model; a yaml of the group ``estimator`` names one, and describes its settings.

    Attributes:
        file: name of the file of ``Estimates.arrays``.
        recipe: raised where the same settings report other numbers, so that no older result answers.
    """

    file: ClassVar[str] = "estimates.npz"
    recipe: ClassVar[int] = 0

    @abstractmethod
    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return everything that goes into the record; call ``check`` often, which may raise to stop.

        Raises:
            UserError: the model has no such number.
        """


def finite(value: float, key: str, reasons: dict[str, str], reason: str) -> float | None:
    """Return ``value`` for ``result.json``; None if it is not finite, and then ``reason`` is put under ``key``."""
    if math.isfinite(value):
        return float(value)
    reasons[key] = reason
    return None


def without_nan(
    numbers: Mapping[str, Any], prefix: str, reasons: dict[str, str], reason: str, **why: str
) -> dict[str, Any]:
    """Return ``numbers`` with None for every float in it that is not finite, and why: ``why[key]``, else ``reason``."""

    def known(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_nan(value, f"{prefix}{key}.", reasons, reason)
        return finite(value, f"{prefix}{key}", reasons, why.get(key, reason)) if isinstance(value, float) else value

    return {key: known(key, value) for key, value in numbers.items()}


def standard_error(values: np.ndarray) -> float:
    """Return sd / sqrt(n); NaN for fewer than two values."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def monte_carlo_variance(ess: PerImage, k: int) -> PerImage:
    """Return 1/ESS - 1/k, the squared Monte Carlo error of L_k; a floor where few samples have most of the weight."""
    return np.maximum(0.0, 1 / ess - 1 / k)


def monte_carlo_error(ess: PerImage, k: int) -> PerImage:
    """Return the Monte Carlo error of L_k; NaN where too few samples have the weight to tell it, as with one always."""
    return np.where(ess < LEAST_ESS, math.nan, np.sqrt(monte_carlo_variance(ess, k)))


def stderr_mc(variance: PerImage) -> float:
    """Return the Monte Carlo error of a mean over images from that of each, squared."""
    return math.sqrt(variance.sum()) / len(variance)


def share_below_10(ess: PerImage) -> float:
    """Return the share of images whose effective sample size is below 10; NaN unless all are known."""
    return math.nan if np.isnan(ess).any() else float((ess < 10).mean())


def require_probabilities(name: str, x: Shaped[Tensor, "n pixels"], log_px: PerImage, error: PerImage | None) -> None:
    """Raise RunFailed where estimates of log p(x), nats, say that an observation of integers has a probability above 1.

    An estimate p^ of p(x) is a mean of weights, so E[p^] <= 1 for any q, and p^ exceeds e^t with probability e^-t at
    most (Markov's inequality). The images have independent noise, so the product of all p^ does the same. A right
    model is thus refused twice in a million evaluations at most, and where six standard errors are less than that
    bound, still less often.

    ``error`` is the Monte Carlo standard error, NaN where too few samples have the weight; None: exact values.
    """
    if x.is_floating_point():  # a density may be above 1
        return
    n = len(log_px)
    slack = ROUNDING + (0.0 if error is None else np.fmin(6 * error, SURE + math.log(n)))
    known = np.where(np.isfinite(log_px), log_px, -math.inf)  # others are named where they are summarized
    if not (known > slack).any() and not known.sum() > SURE + n * ROUNDING:
        return
    worst = int(known.argmax())
    raise RunFailed(
        f"{name} is above 0 in {int((known > 0).sum())} of {n} images, {log_px[worst]:.4g} nats in image {worst}: no "
        "probability of integers is above 1, so a density of the model is wrong; iwae_cli.check(model) may find it"
    )


def array_name(split: str, key: str) -> str:
    """Return the name of a per-image array in an npz file; those of the test split have no prefix."""
    return key if split == "test" else f"{split}_{key}"


def with_cheaper(plan: str, fewer: Mapping[str, tuple[int, int]], *more: str) -> str:
    """Return a plan with the overrides that make it cheaper; ``fewer``: argument -> its value and a small one."""
    shown = [f"estimator.{name}={few}" for name, (asked, few) in fewer.items() if asked > few] + [*more]
    return f"{plan}; cheaper: {' '.join(shown)}" if shown else plan
