"""The estimator: paths of more and more temperatures for the data, and a sandwich of bounds that checks them.

Sources: Neal 2001 (Statistics and Computing 11) for the method; Wu, Burda, Salakhutdinov, Grosse 2017
(arXiv 1611.04273) for its use on decoders; Grosse, Ghahramani, Adams 2015 (arXiv 1511.02543) for bidirectional
Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float64, Shaped
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.progress import Progress, announce
from iwae_cli.evaluation.ais.paths import WARM_UP, Paths, Start, Tally
from iwae_cli.evaluation.estimator import Estimates, Estimator, EstimatorInput, array_name, finite, with_cheaper
from iwae_cli.evaluation.workers import map_batches, threads
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.priors import OneHotPrior
from iwae_cli.record.summary import SPLITS, split_rows

SIMULATED_ROWS = (
    ("lower", "lower", "{:.2f}"),
    ("upper", "upper", "{:.2f}"),
    ("exact", "exact", "{:.2f}"),
    ("upper - lower", "gap", "{:.2f}"),
    ("stderr_gap", "stderr_gap", "± {:.3f}"),
)


@dataclass(frozen=True)
class Annealed:
    """Per-image results; arrays are (n,), float64, nats.

    Attributes:
        temperatures: transitions from the start to the posterior.
        log_px: log-mean-exp over the chains of their log-weights; a lower bound on log p(x) in expectation.
        ess: effective sample size of the chains' weights, between 1 and the number of chains.
        stderr: Monte Carlo error of ``log_px``: sqrt(1/ESS - 1/chains), a floor if few chains have most of the weight.
        acceptance: mean acceptance of HMC; for bits the share that changed.
    """

    temperatures: int
    log_px: Float64[np.ndarray, " n"]
    ess: Float64[np.ndarray, " n"]
    stderr: Float64[np.ndarray, " n"]
    acceptance: Float64[np.ndarray, " n"]


@dataclass(frozen=True)
class Sandwich:
    """Bounds on log p(x) of simulated observations; arrays are (n,), float64, nats.

    Attributes:
        temperatures: as for the data.
        lower: annealing from the start to the posterior; at most log p(x) in expectation.
        upper: annealing backwards from the h that generated x; at least log p(x) in expectation.
        exact: log p(x) in closed form; None if the model has none.
    """

    temperatures: int
    lower: Float64[np.ndarray, " n"]
    upper: Float64[np.ndarray, " n"]
    exact: Float64[np.ndarray, " n"] | None


@final
@dataclass(frozen=True)
class AIS(Estimator):
    """Annealed importance sampling with parallel chains, along f_beta = start^(1-beta) p(x, h)^beta.

    A chain begins at a draw of the start and is moved at every temperature by HMC jointly over all layers, or by one
    Gibbs sweep over all bits. Step sizes, one for each image and temperature, come from other chains with other noise
    and are fixed before the measured chains begin: adapting them within those would void the bound. The temperatures
    are doubled until the mean over the images changes by less than ``tolerance``.

    The noise is keyed by image: no number depends on how images are batched beyond the rounding of matrix products
    of another shape.

    Args:
        chains: per image.
        temperatures: transitions of the first, coarsest path.
        max_temperatures: limit of the doubling; equal to ``temperatures``: no doubling.
        tolerance: nats.
        leapfrog_steps: of every HMC transition.
        start: ``prior``, so that the estimate does not depend on q; or ``inference``, q, which is nearer.
        images: number of images of each split, the first ones; null: all.
        simulated: observations drawn from the model for bidirectional Monte Carlo; 0: none.

    Raises:
        ValueError: a number out of range.
    """

    chains: int = 16
    temperatures: int = 500
    max_temperatures: int = 4000
    tolerance: float = 0.1
    leapfrog_steps: int = 10
    start: Start = "prior"
    images: int | None = 100
    simulated: int = 100

    def __post_init__(self) -> None:
        for name, least in {"chains": 2, "temperatures": 1, "leapfrog_steps": 1, "simulated": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        first, last = self.temperatures, self.max_temperatures
        if last < first:
            raise ValueError(f"max_temperatures must be >= temperatures = {first}, got {last}")
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance must be finite and > 0, got {self.tolerance}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be >= 1 or null, got {self.images}")

    def anneal(
        self,
        model: LatentVariableModel,
        x: Shaped[Tensor, "n pixels"],
        *,
        seed: int,
        stream: str,
        rows: int = 2000,
        workers: int | None = None,
        check: Callable[[], None] = lambda: None,
        tally: Tally | None = None,
    ) -> list[Annealed]:
        """Return log p(x) of every observation for each number of temperatures that was tried; the last one counts.

        Args:
            model: in evaluation mode, on its device.
            x: observations.
            seed, stream: key of the noise, with the index of each image.
            rows: bound on chains x images computed at once by one worker.
            workers: threads that share the images; None is one per core on a CPU, one on another device.
            check: called by every worker whenever p is evaluated; may raise to stop.
            tally: counts the transitions; it is given those of every doubling but the first, which is always needed.

        Raises:
            UserError: latents that are neither real nor bits.
        """
        tally = tally or Tally()
        paths = self._paths(model, (seed, "ais", stream), check, tally)
        tally.start(f"annealing {stream}, step sizes")
        steps = self._share(
            lambda i: paths.tune(i, paths.observed(x, i), self.temperatures), len(x), paths.device, rows, workers
        )
        levels: list[Annealed] = []
        temperatures = self.temperatures
        while True:

            def forward(images: Sequence[int], temperatures: int = temperatures) -> np.ndarray:
                return paths.forward(images, paths.observed(x, images), temperatures, steps[:, images])

            more = temperatures * len(x) if len(levels) > 1 else 0
            tally.start(f"annealing {stream}, {temperatures:,} temperatures", more)
            log_px, ess, acceptance = self._share(forward, len(x), paths.device, rows, workers)
            stderr = np.sqrt(np.maximum(0.0, 1 / ess - 1 / self.chains))
            levels.append(Annealed(temperatures, log_px, ess, stderr, acceptance))
            temperatures *= 2
            if temperatures > self.max_temperatures or self.converged(levels):
                return levels

    def converged(self, levels: Sequence[Annealed]) -> bool:
        """Whether the last doubling changed the mean by less than ``tolerance``."""
        if len(levels) < 2:
            return False
        return bool(abs(levels[-1].log_px.mean() - levels[-2].log_px.mean()) < self.tolerance)

    def sandwich(
        self,
        model: LatentVariableModel,
        *,
        seed: int,
        temperatures: int | None = None,
        rows: int = 2000,
        workers: int | None = None,
        check: Callable[[], None] = lambda: None,
        tally: Tally | None = None,
    ) -> Sandwich:
        """Return bounds from bidirectional Monte Carlo on ``simulated`` observations x, each with the h it came from.

        That h is an exact draw of p(h|x), which the backward chains must start from. Real data have none, so the
        sandwich holds for them as far as they resemble the model's draws.

        Args:
            model, seed, rows, workers, check, tally: as in ``anneal``.
            temperatures: ``temperatures`` times a power of two; None: ``temperatures``.

        Raises:
            UserError: latents that are neither real nor bits.
        """
        count = temperatures or self.temperatures
        paths = self._paths(model, (seed, "ais", "simulated"), check, tally or Tally())

        def both(images: Sequence[int]) -> np.ndarray:
            h, x = model.generative.sample(len(images), paths.noise("draw", images))
            steps = paths.tune(images, x, self.temperatures)
            lower = paths.forward(images, x, count, steps)[0]
            exact = model.generative.exact_log_px(x)
            absent = torch.full((len(images),), math.nan) if exact is None else exact
            return np.stack([lower, paths.backward(images, x, h, count, steps), absent.double().cpu().numpy()])

        lower, upper, exact = self._share(both, self.simulated, paths.device, rows, workers)
        return Sandwich(count, lower, upper, None if np.isnan(exact).all() else exact)

    def _paths(
        self, model: LatentVariableModel, key: tuple[int | str, ...], check: Callable[[], None], tally: Tally
    ) -> Paths:
        _require_movable(model)
        return Paths(model, self.chains, self.leapfrog_steps, self.start, key, check, tally)

    def _share(
        self,
        work: Callable[[Sequence[int]], np.ndarray],
        n: int,
        device: torch.device,
        rows: int,
        workers: int | None,
    ) -> np.ndarray:
        """Return ``work`` of ``n`` images by threads, joined along its last axis."""

        def with_gradients(images: Sequence[int]) -> np.ndarray:
            # Tensors made in inference mode cannot be differentiated.
            with torch.inference_mode(False), torch.no_grad():
                return work(images)

        workers = threads(workers, device)
        # Images are independent, so a few of them can be spread over all workers.
        batch = min(max(1, rows // self.chains), -(-n // workers))
        return np.concatenate(map_batches(with_gradients, n, batch=batch, workers=workers), axis=1)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return log p(x) for every split of the evaluation, and the sandwich for simulated observations."""
        evaluation, model = subject.evaluation, subject.model
        _require_movable(model)
        splits = {name: subject.data.evaluation_split(name, evaluation.binarization_seed) for name in evaluation.splits}
        x = {name: split.x[: self.images] for name, split in splits.items()}
        images = {str(name): len(some) for name, some in x.items()}
        least, most = self._transitions(sum(images.values()), model)
        announce(self._plan(images, least, most, model.inference.reparameterized))
        numbers: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        arrays: dict[str, np.ndarray] = {}
        with Progress(
            "annealing", total=least, unit="transition", things="transitions", may_grow=most > least
        ) as progress:
            tally = Tally(progress, least)
            common: dict[str, Any] = {"rows": evaluation.rows, "workers": evaluation.workers}
            common |= {"seed": evaluation.seed, "check": check, "tally": tally}
            for name in splits:
                levels = self.anneal(model, x[name], stream=name, **common)
                numbers[name] = self._summary(name, levels, _exact(model, x[name]), x[name].shape[1], reasons)
                for key in ("log_px", "stderr", "ess", "acceptance"):
                    arrays[array_name(name, key)] = getattr(levels[-1], key)
            if self.simulated:
                longest = max(numbers[name]["temperatures"] for name in splits)
                more = 2 * (longest - min(longest, 2 * self.temperatures)) * self.simulated
                tally.start(f"annealing simulated, {longest:,} temperatures", more)
                found = self.sandwich(model, temperatures=longest, **common)
                numbers["simulated"] = _simulated(found, reasons)
                arrays |= {"simulated_lower": found.lower, "simulated_upper": found.upper}
        rows = split_rows(numbers)
        for label, key, form in SIMULATED_ROWS:
            if key in numbers.get("simulated", {}):
                rows.append((f"simulated: {label}, nats", f"simulated.{key}", form))
        hashes = {str(name): split.sha256 for name, split in splits.items()}
        return Estimates(numbers, rows, hashes, reasons, arrays, self._notes(numbers))

    def _transitions(self, images: int, model: LatentVariableModel) -> tuple[int, int]:
        """Return the number of transitions of all images: the least, and with every doubling."""
        paths = [self.temperatures]
        while 2 * paths[-1] <= self.max_temperatures:
            paths.append(2 * paths[-1])
        tuning = WARM_UP + self.temperatures if model.inference.reparameterized else 0
        least, most = (
            images * (tuning + sum(some)) + self.simulated * (tuning + 2 * some[-1]) for some in (paths[:2], paths)
        )
        return least, most

    def _plan(self, images: Mapping[str, int], least: int, most: int, real: bool) -> str:
        """Return what is about to be computed, and which overrides make it less."""
        subjects = [f"{n:,} images of {name}" for name, n in images.items()]
        subjects += [f"{self.simulated:,} simulated"] if self.simulated else []
        doubled = f" (doubled up to {self.max_temperatures:,})" if self.max_temperatures > self.temperatures else ""
        path = f"{self.chains} chains each, {self.temperatures:,} temperatures{doubled}"
        each = f"{self.leapfrog_steps} leapfrog steps" if real else "one Gibbs sweep"
        plan = (
            f"annealing: {', '.join(subjects)}; {path}: {least:,} {f'to {most:,} ' if most > least else ''}"
            f"transitions of all chains of an image, {each} each"
        )
        fewer = {
            "images": (max(images.values()), 20),
            "simulated": (self.simulated, 20),
            "chains": (self.chains, 4),
            "temperatures": (self.temperatures, 100),
            "max_temperatures": (self.max_temperatures, 400),
        }
        return with_cheaper(plan, fewer)

    def _summary(
        self, name: str, levels: Sequence[Annealed], exact: np.ndarray | None, pixels: int, reasons: dict[str, str]
    ) -> dict[str, Any]:
        """Return the numbers of one split."""
        last = levels[-1]
        n, nll = len(last.log_px), -float(last.log_px.mean())
        variance = last.stderr**2
        numbers: dict[str, Any] = {
            "nll_ais": nll,
            "n": n,
            "chains": self.chains,
            "temperatures": last.temperatures,
            "converged": self.converged(levels),
            "stderr_images": float(last.log_px.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
            "stderr_mc": math.sqrt(variance.sum()) / n,
            "bias_mc": -float(variance.mean()) / 2,
            "by_temperatures": {str(level.temperatures): float(level.log_px.mean()) for level in levels},
            "ess_median": float(np.median(last.ess)),
            "ess_min": float(last.ess.min()),
            "acceptance": float(last.acceptance.mean()),
            "acceptance_min": float(last.acceptance.min()),
            "bits_per_dim": nll / (pixels * math.log(2)),
        }
        if exact is not None:
            numbers["exact_nll"] = -float(exact.mean())
        return _without_nan(name, numbers, "one image has no standard error" if n == 1 else "", reasons)

    def _notes(self, numbers: Mapping[str, Any]) -> list[str]:
        """Return where the numbers are not reliable, and in which direction they err."""
        notes = []
        for name in (name for name in SPLITS if name in numbers):
            split = numbers[name]
            if not split["converged"]:
                notes.append(
                    f"{name}: {split['temperatures']} temperatures are not shown to be enough (their doubling changed "
                    f"the mean by {self.tolerance:g} nats or more, or was not tried): NLL_AIS is probably too high; "
                    f"write estimator.max_temperatures={4 * split['temperatures']}"
                )
            bias = split["bias_mc"]
            if bias is not None and abs(bias) > 0.05:
                notes.append(
                    f"{name}: log p(x) is at least {abs(bias):.2f} nats higher than estimated (bias_mc); more "
                    "temperatures or chains help"
                )
        if "simulated" in numbers:
            notes.append("simulated: log p(x) of the model's own draws lies between lower and upper, on average")
        return notes


def _require_movable(model: LatentVariableModel) -> None:
    if isinstance(getattr(model.generative, "prior", None), OneHotPrior):
        raise UserError(
            "estimator=ais moves real latents and bits, not a categorical one, whose log p(x) is exact: "
            "without estimator=ais, iwae-eval reports it as exact_nll"
        )


def _exact(model: LatentVariableModel, x: Shaped[Tensor, "n pixels"]) -> Float64[np.ndarray, " n"] | None:
    parameter = next(model.parameters())
    with torch.no_grad():
        exact = model.generative.exact_log_px(x.to(device=parameter.device, dtype=parameter.dtype))
    return None if exact is None else exact.double().cpu().numpy()


def _simulated(found: Sandwich, reasons: dict[str, str]) -> dict[str, Any]:
    """Return the numbers of the simulated observations."""
    gap = found.upper - found.lower
    n = len(gap)
    numbers: dict[str, Any] = {
        "n": n,
        "temperatures": found.temperatures,
        "lower": float(found.lower.mean()),
        "upper": float(found.upper.mean()),
        "gap": float(gap.mean()),
        "stderr_gap": float(gap.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
    }
    if found.exact is not None:
        numbers["exact"] = float(found.exact.mean())
    return _without_nan("simulated", numbers, "one observation has no standard error" if n == 1 else "", reasons)


def _without_nan(name: str, numbers: dict[str, Any], reason: str, reasons: dict[str, str]) -> dict[str, Any]:
    """Replace numbers that are not finite by None, with the reason."""
    why = reason or "a log-weight is not finite"
    return {k: finite(v, f"{name}.{k}", reasons, why) if isinstance(v, float) else v for k, v in numbers.items()}
