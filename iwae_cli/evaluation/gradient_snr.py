"""Signal-to-noise ratio of gradient estimates: the size of their mean relative to their spread.

Source: Rainforth, Kosiorek, Le, Maddison, Igl, Wood, Teh 2018, "Tighter Variational Bounds are Not Necessarily
Better", arXiv 1802.04537.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.noise import GeneratorNoise, generator
from iwae_cli.core.progress import Progress, announce
from iwae_cli.evaluation.estimator import Estimates, Estimator, EstimatorInput, finite, with_cheaper, without_nan
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.objectives.base import Objective
from iwae_cli.record.summary import Row

NETWORKS = ("inference", "generative")

MEAN_OF_ABS_NORMAL = math.sqrt(2 / math.pi)
"""E|N(0, 1)| = .80: without signal the ratio of M draws is on average this over sqrt(M)."""


@dataclass(frozen=True)
class SignalToNoise:
    """Ratios for the gradient of one network, over M draws of the latents with fixed observations.

    Attributes:
        per_parameter: sqrt of the median over parameters of mean^2 / variance - 1/M; NaN if below ``floor``.
        floor: .80 / sqrt(M), the average ratio without signal.
        directional: E[|g_par| / |g_perp|], the parts of a gradient along and across the mean gradient; NaN if not
            above ``directional_floor``, or if there is one parameter only.
        directional_floor: the same along a direction without signal, the difference of two means.
        parameters: number of parameters whose gradient varies; the others have no ratio and are left out.
    """

    per_parameter: float
    floor: float
    directional: float
    directional_floor: float
    parameters: int


class _Moments:
    """Moments of a stream of gradients.

    The direction is the mean of the first half of the draws, and the parts along and across it are those of the second
    half: draws that make up the mean point along it by construction.
    """

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._half = draws // 2
        self._seen = 0
        self._ratios: list[float] = []
        self._ratios_of_noise: list[float] = []

    def add(self, gradient: Float64[Tensor, " parameters"]) -> None:
        if self._seen == 0:
            # Sums of differences from the first one: a mean much larger than the noise would cost all its digits.
            self._first = gradient
            self._sum, self._sum_squares = torch.zeros_like(gradient), torch.zeros_like(gradient)
        difference = gradient - self._first
        self._sum += difference
        self._sum_squares += difference.square()
        self._seen += 1
        if self._seen == self._half // 2:
            self._quarter = self._sum / self._seen
        elif self._seen == self._half:
            self._mean = self._sum / self._seen
            self._noise = self._quarter - self._mean
        elif self._seen > self._half:
            self._ratios.append(_ratio(gradient, self._first + self._mean))
            self._ratios_of_noise.append(_ratio(difference - self._mean, self._noise))

    def result(self) -> SignalToNoise:
        m = self._draws
        variance = (self._sum_squares - self._sum.square() / m) / (m - 1)
        mean = self._first + self._sum / m
        # A spread below the rounding of the gradients themselves counts as none.
        varies = variance > (mean.abs() * torch.finfo(torch.float32).eps).square() * 1e-6
        squared = (mean.square() / variance)[varies] - 1 / m
        floor = MEAN_OF_ABS_NORMAL / math.sqrt(m)
        median = math.sqrt(max(0.0, float(squared.quantile(0.5)))) if len(squared) else math.nan
        directional, noise = float(np.mean(self._ratios)), float(np.mean(self._ratios_of_noise))
        return SignalToNoise(
            per_parameter=median if median > floor else math.nan,
            floor=floor,
            directional=directional if math.isfinite(noise) and directional > noise else math.nan,
            directional_floor=noise,
            parameters=int(varies.sum()),
        )


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

    Args:
        x: one batch, the same for every draw, so that the noise is that of the latents alone.
        draws: M, at least 8.
        check: called before every gradient; may raise to stop.
        on_draw: called with the number of finished draws.
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
        for objective in objectives.values():
            if (refusal := objective.check_networks(model)) is not None:
                raise UserError(refusal)
        split = subject.data.evaluation_split("train", subject.evaluation.binarization_seed)
        x = split.x[: self.images].to(next(model.parameters()))
        found: dict[int, dict[str, SignalToNoise]] = {}
        # The cost of a gradient is proportional to its samples.
        total, done = self.draws * sum(self.ks), 0
        announce(self._plan(len(x)))
        with Progress("gradients", total=total, unit="sample", images_per_unit=len(x)) as progress:
            for k, objective in objectives.items():
                progress.change(f"gradients, k = {k}", total)

                def on_draw(draw: int, k: int = k, done: int = done) -> None:
                    progress.update(done + draw * k)

                found[k] = gradient_snr(model, objective, x, draws=self.draws, seed=seed, check=check, on_draw=on_draw)
                done += self.draws * k
        reasons: dict[str, str] = {}
        floor = MEAN_OF_ABS_NORMAL / math.sqrt(self.draws)
        numbers = {name: self._numbers(name, {k: found[k][name] for k in self.ks}, reasons) for name in NETWORKS}
        return Estimates(
            {"gradient_snr": {"images": len(x), "draws": self.draws, "floor": floor, **numbers}},
            self._rows(),
            {"train": split.sha256},
            reasons,
            notes=[
                f"of the gradients of {_named(next(iter(objectives.values())))}",
                "inference, generative: signal-to-noise ratio of the gradient, median over parameters; with "
                f"{self.draws} draws a ratio below {floor:.3f} cannot be distinguished from no signal",
                "directional: length along the mean gradient over length across it, below it the same without signal",
                "slope: of log ratio against log k",
            ],
        )

    def _numbers(self, network: str, found: dict[int, SignalToNoise], reasons: dict[str, str]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for k, ratio in found.items():
            why = {
                "per_parameter": f"below the floor of {ratio.floor:.3f} of {self.draws} draws, or no gradient varies",
                "directional": f"not above {ratio.directional_floor:.3f}, the value of a direction without signal",
                "directional_floor": "there is one parameter only, or the gradient does not vary",
            }
            held = {key: getattr(ratio, key) for key in why} | {"parameters": ratio.parameters}
            numbers[str(k)] = without_nan(held, f"{network}.{k}.", reasons, "", **why)
        known = {k: ratio.per_parameter for k, ratio in found.items() if math.isfinite(ratio.per_parameter)}
        slope = np.polyfit(np.log(list(known)), np.log(list(known.values())), 1)[0] if len(known) > 1 else math.nan
        reason = "fewer than two values of k give a ratio above the floor"
        return numbers | {"slope": finite(slope, f"{network}.slope", reasons, reason)}

    def _rows(self) -> list[Row]:
        """Return the rows of the table: three for each k, side by side for the two networks, and the slopes."""
        labels = {"per_parameter": "k = {}", "directional": "  directional, k = {}"}
        labels["directional_floor"] = "  directional without signal, k = {}"
        rows = [
            (label.format(k), f"gradient_snr.{network}.{k}.{key}", "{:.3f}")
            for k in self.ks
            for key, label in labels.items()
            for network in NETWORKS
        ]
        return rows + [("slope", f"gradient_snr.{network}.slope", "{:.3f}") for network in NETWORKS]

    def _plan(self, images: int) -> str:
        plan = (
            f"gradients: {self.draws:,} draws at each k of {', '.join(map(str, self.ks))}, on {images} images: "
            f"{self.draws * sum(self.ks) * images:,} samples, each with its gradient"
        )
        shorter = [f"estimator.ks={self.ks[:-1]}".replace(" ", "")] if len(self.ks) > 2 else []
        return with_cheaper(plan, {"draws": (self.draws, 50), "images": (self.images, 5)}, *shorter)


def _named(objective: Objective) -> str:
    gradient = getattr(objective, "gradient", None)
    return type(objective).__name__ + (f", gradient={gradient}" if gradient else "")
