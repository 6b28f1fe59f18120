"""Signal-to-noise ratio of gradient estimates: the size of their mean relative to their spread.

Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh 2018, "Tighter Variational Bounds are Not Necessarily
Better", arXiv 1802.04537.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.core.progress import Progress, announce
from iwae_cli.evaluation.estimator import (
    Estimates,
    Estimator,
    EstimatorInput,
    standard_error,
    with_cheaper,
    without_nan,
)
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record.summary import PLUS_MINUS, Row

NETWORKS = ("inference", "generative")

MEAN_OF_ABS_NORMAL = math.sqrt(2 / math.pi)  # .80: without signal the mean ratio of M draws is this over sqrt(M)

GROUPS, HALVES = 10, 20
"""Groups of draws (8 of 8 draws), and how many times one half of them is drawn for an error."""


@dataclass(frozen=True)
class SignalToNoise:
    """Ratios for the gradient of one network, over M draws of the latents with fixed observations.

    ``directional`` is E[|g_par| / |g_perp|], the parts of a gradient along and across the mean gradient. The standard
    deviation over ``halves`` is the standard error of all draws, also for a median, where leaving out few draws would
    say too much (Shao and Wu 1989). Near the floor, and of 20 draws or fewer, it is up to 2.5 times too large.
    """

    per_parameter: float  # sqrt of the median over parameters of mean^2 / variance - 1/M; NaN if below the floor
    per_parameter_stderr: float  # for other draws; NaN as the ratio
    halves: tuple[float, ...]  # the same of random halves of the draws, also below the floor
    floor: float  # .80 / sqrt(M), the average ratio without signal
    directional: float  # NaN if not above its floor, or if there is one parameter only
    directional_stderr: float  # for other draws and the same direction; NaN as the ratio
    directional_floor: float  # the same along a direction without signal, the difference of two means
    parameters: int  # whose gradient varies; the others have no ratio and are left out


class _Moments:
    """Moments of a stream of gradients.

    The direction is the mean of the first half of the draws, and the parts along and across it are those of the second
    half: draws that make up the mean point along it by construction. Each group of draws has sums of its own: 20
    float64 numbers for every parameter.
    """

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._half = draws // 2
        self._seen = 0
        self._groups = min(GROUPS, draws)
        self._ratios: list[float] = []
        self._ratios_of_noise: list[float] = []

    def add(self, gradient: Float64[Tensor, " parameters"]) -> None:
        if self._seen == 0:
            # Sums of differences from the first one: a mean much larger than the noise would cost all its digits.
            self._first = gradient
            self._sums, self._squares = gradient.new_zeros(2, self._groups, len(gradient))
        difference, group = gradient - self._first, self._seen % self._groups
        self._sums[group] += difference
        self._squares[group] += difference.square()
        self._seen += 1
        if self._seen == self._half // 2:
            self._quarter = self._sums.sum(0) / self._seen
        elif self._seen == self._half:
            self._mean = self._sums.sum(0) / self._seen
            self._noise = self._quarter - self._mean
        elif self._seen > self._half:
            self._ratios.append(_ratio(gradient, self._first + self._mean))
            self._ratios_of_noise.append(_ratio(difference - self._mean, self._noise))

    def result(self) -> SignalToNoise:
        m, groups = self._draws, self._groups
        median, parameters = self._median(list(range(groups)))
        random = generator("cpu", 0, "gradient snr", "halves")
        halves = [torch.randperm(groups, generator=random)[: groups // 2].tolist() for _ in range(HALVES)]
        ratios = tuple(self._median(half)[0] for half in halves)
        floor = MEAN_OF_ABS_NORMAL / math.sqrt(m)
        directional, noise = float(np.mean(self._ratios)), float(np.mean(self._ratios_of_noise))
        seen, directed = median > floor, math.isfinite(noise) and directional > noise
        return SignalToNoise(
            per_parameter=median if seen else math.nan,
            per_parameter_stderr=float(np.std(ratios, ddof=1)) if seen else math.nan,
            halves=ratios,
            floor=floor,
            directional=directional if directed else math.nan,
            directional_stderr=standard_error(np.array(self._ratios)) if directed else math.nan,
            directional_floor=noise,
            parameters=parameters,
        )

    def _median(self, groups: list[int]) -> tuple[float, int]:
        """Return the ratio of the draws of these groups, and the number of parameters whose gradient varies."""
        m = sum(len(range(group, self._draws, self._groups)) for group in groups)
        total, squares = self._sums[groups].sum(0), self._squares[groups].sum(0)
        variance, mean = (squares - total.square() / m) / (m - 1), self._first + total / m
        # A spread below the rounding of the gradients themselves counts as none.
        varies = variance > (mean.abs() * torch.finfo(torch.float32).eps).square() * 1e-6
        squared = (mean.square() / variance)[varies] - 1 / m
        median = math.sqrt(max(0.0, float(np.median(squared.cpu().numpy())))) if len(squared) else math.nan
        return median, len(squared)


def _ratio(vector: Float64[Tensor, " n"], along: Float64[Tensor, " n"]) -> float:
    """Return |part of ``vector`` along ``along``| / |the rest|; NaN if there is no rest."""
    unit = along / along.norm()
    parallel = vector @ unit
    rest = (vector - parallel * unit).norm()
    return float(parallel.abs() / rest) if len(vector) > 1 and rest > 0 else math.nan


def gradient_snr(
    model: LatentVariableModel,
    objective: Objective,
    x: Float[Tensor, "batch pixels"],
    *,
    draws: int,
    seed: int,
    check: Callable[[], None] = lambda: None,
    on_draw: Callable[[int], None] = lambda _: None,
) -> dict[str, SignalToNoise]:
    """Return the ratios of the gradients that a training step on ``x`` would use, for ``inference`` and ``generative``.

    The batch is the same for each of the M ``draws``, 8 at least, so that the noise is that of the latents alone.
    ``check`` is called before every gradient and may raise to stop; ``on_draw`` gets the number of finished draws.
    """
    moments = {name: _Moments(draws) for name in NETWORKS}
    # As a training step draws: a mixture takes its components in turn.
    model.train()
    for draw in range(draws):
        noise = GeneratorNoise(generator(x.device, seed, "gradient snr", draw), x.dtype)
        losses = objective.drawn_losses(model, x, noise)
        for name in NETWORKS:
            check()
            # Each loss has the right gradient for its own parameters only.
            parameters = list(getattr(model, name).parameters())
            found = torch.autograd.grad(getattr(losses, name), parameters, retain_graph=True, materialize_grads=True)
            moments[name].add(torch.cat([part.flatten() for part in found]).double())
        on_draw(draw + 1)
    model.eval()
    return {name: moments[name].result() for name in NETWORKS}


@final
@dataclass(frozen=True)
class GradientSNR(Estimator):
    """Signal-to-noise ratios over k, for the run's objective or another one, on the first training images.

    Rainforth et al. 2018 find for IWAE that the encoder's falls as k^(-1/2) while the decoder's grows as k^(1/2).
    The values of k, ``ks``, rise; the images are one batch.
    """

    recipe = 1  # errors of ratios and slope

    ks: list[int]
    draws: int = 200
    images: int = 20

    def __post_init__(self) -> None:
        if not self.ks:
            raise ValueError("ks must hold at least one k, got []")
        if self.ks[0] < 1 or sorted(set(self.ks)) != self.ks:
            raise ValueError(f"ks must be >= 1 and rise, got {self.ks}")
        check_range("draws", self.draws, 8)
        check_range("images", self.images, 1)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return the ratios for every k, and the slope of log ratio against log k."""
        model, seed = subject.model, subject.evaluation.seed
        objectives = {k: subject.objective(k) for k in self.ks}
        strata = model.inference.strata
        for k, objective in objectives.items():
            if k % strata:
                whole = ",".join(map(str, sorted({-(-k // strata) * strata for k in self.ks})))
                raise UserError(
                    f"estimator.ks holds {k}, no multiple of the {strata} components of q, from which draws are taken "
                    f"in turn: write estimator.ks=[{whole}]"
                )
            if (refusal := objective.check_networks(model)) is not None:
                # Another posterior would be another training.
                raise UserError(f"the gradients of this model: {refusal.partition(', or model.')[0]}")
        split = subject.data.evaluation_split("train", subject.evaluation.binarization_seed)
        x = split.x[: self.images].to(next(model.parameters()))
        found: dict[int, dict[str, SignalToNoise]] = {}
        # The cost of a gradient is proportional to its samples.
        draws = {k: objective.num_samples for k, objective in objectives.items()}
        total, done = self.draws * sum(draws.values()) * len(x), 0
        announce(self._plan(len(x), total))
        with Progress("gradients", total=total, unit="sample") as progress:
            for k, objective in objectives.items():
                progress.change(f"gradients, k = {k}", total)

                def on_draw(draw: int, k: int = k, done: int = done) -> None:
                    progress.update(done + draw * draws[k] * len(x))

                found[k] = gradient_snr(model, objective, x, draws=self.draws, seed=seed, check=check, on_draw=on_draw)
                done += self.draws * draws[k] * len(x)
        reasons: dict[str, str] = {}
        floor = MEAN_OF_ABS_NORMAL / math.sqrt(self.draws)
        numbers = {name: self._numbers(name, {k: found[k][name] for k in self.ks}, reasons) for name in NETWORKS}
        return Estimates(
            {"gradient_snr": {"images": len(x), "draws": self.draws, "floor": floor, **numbers}},
            self._rows(
                {k: f"{n // k} groups of k = {k}" if n > k and n % k == 0 else f"k = {k}" for k, n in draws.items()}
            ),
            {"train": split.sha256},
            reasons,
            notes=[
                f"of the gradients of {_named(next(iter(objectives.values())))}",
                "inference, generative: signal-to-noise ratio of the gradient, median over parameters; with "
                f"{self.draws} draws a ratio below {floor:.3f} cannot be distinguished from no signal",
                "stderr: for other draws; that of directional for the same direction",
                "directional: length along the mean gradient over length across it, below it the same without signal",
                "slope: of log ratio against log k",
            ],
        )

    def _numbers(self, network: str, found: dict[int, SignalToNoise], reasons: dict[str, str]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for k, ratio in found.items():
            weak = f"below the floor of {ratio.floor:.3f} of {self.draws} draws, or no gradient varies"
            unknown = "in half of the draws no gradient varies"
            undirected = f"not above {ratio.directional_floor:.3f}, the value of a direction without signal"
            why = {
                "per_parameter": weak,
                "per_parameter_stderr": unknown if math.isfinite(ratio.per_parameter) else weak,
                "directional": undirected,
                "directional_stderr": undirected,
                "directional_floor": "there is one parameter only, or the gradient does not vary",
            }
            held = {key: getattr(ratio, key) for key in why} | {"parameters": ratio.parameters}
            numbers[str(k)] = without_nan(held, f"{network}.{k}.", reasons, "", **why)
        known = {k: ratio for k, ratio in found.items() if math.isfinite(ratio.per_parameter)}
        slope = _slope({k: ratio.per_parameter for k, ratio in known.items()})
        slopes = [
            _slope(dict(zip(known, half, strict=True)))
            for half in zip(*(r.halves for r in known.values()), strict=True)
        ]
        held = {"slope": slope, "slope_stderr": float(np.std(slopes, ddof=1)) if slopes else math.nan}
        reason = "fewer than two values of k give a ratio above the floor"
        lost = "half of the draws have no ratio, or 0" if math.isfinite(slope) else reason
        return numbers | without_nan(held, f"{network}.", reasons, "", slope=reason, slope_stderr=lost)

    def _rows(self, draws: Mapping[int, str]) -> list[Row]:
        """Return the rows of the table: five for each k, side by side for the two networks, and the slopes."""
        labels = {
            "{k}.per_parameter": "{draws}",
            "{k}.per_parameter_stderr": "  other draws: stderr, {draws}",
            "{k}.directional": "  directional, {draws}",
            "{k}.directional_stderr": "    other draws: stderr, directional, {draws}",
            "{k}.directional_floor": "  directional without signal, {draws}",
        }
        every = [(label.format(draws=draws[k]), key.format(k=k)) for k in self.ks for key, label in labels.items()]
        every += [("slope", "slope"), ("  other draws: stderr, slope", "slope_stderr")]
        return [
            (label, f"gradient_snr.{network}.{key}", f"{PLUS_MINUS} {{:.3f}}" if "stderr" in key else "{:.3f}")
            for label, key in every
            for network in NETWORKS
        ]

    def _plan(self, images: int, samples: int) -> str:
        plan = (
            f"gradients: {self.draws:,} draws at each k of {', '.join(map(str, self.ks))}, on {images} images: "
            f"{samples:,} samples, each with its gradient"
        )
        shorter = [f"estimator.ks={self.ks[:-1]}".replace(" ", "")] if len(self.ks) > 2 else []
        return with_cheaper(plan, {"draws": (self.draws, 50), "images": (self.images, 5)}, *shorter)


def _slope(ratios: Mapping[int, float]) -> float:
    """Return the slope of log ratio against log k; NaN for fewer than two, or where one is 0."""
    if len(ratios) < 2 or min(ratios.values()) <= 0:
        return math.nan
    return float(np.polyfit(np.log(list(ratios)), np.log(list(ratios.values())), 1)[0])


def _named(objective: Objective) -> str:
    choices = ((key, getattr(objective, key, None)) for key in ("gradient", "baseline", "m"))
    return ", ".join([type(objective).__name__, *(f"{key}={value}" for key, value in choices if value is not None)])
