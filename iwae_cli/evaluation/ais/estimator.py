"""The estimator: paths of more and more temperatures for the data, and a sandwich of bounds that checks them.

Sources: Neal 2001 (Statistics and Computing 11) for the method; Wu, Burda, Salakhutdinov, Grosse 2017
(arXiv 1611.04273) for its use on decoders; Grosse, Ghahramani, Adams 2015 (arXiv 1511.02543) for bidirectional
Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from iwae_cli.core.errors import UserError, check_range
from iwae_cli.core.progress import Progress, announce
from iwae_cli.evaluation.ais.paths import WARM_UP, Paths, Start, Tally
from iwae_cli.evaluation.estimator import (
    Estimates,
    Estimator,
    EstimatorInput,
    PerImage,
    monte_carlo_variance,
    require_probabilities,
    standard_error,
    stderr_mc,
    with_cheaper,
)
from iwae_cli.evaluation.likelihood import log_likelihood
from iwae_cli.evaluation.settings import MAX_K
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.priors import OneHotPrior
from iwae_cli.record.summary import LIMIT, SPLITS, split_rows

SIMULATED_ROWS = (
    ("simulated: lower, nats", "lower", "{:.2f}"),
    ("simulated: upper, nats", "upper", "{:.2f}"),
    ("simulated: exact, nats", "exact", "{:.2f}"),
    ("simulated: upper - lower, nats", "gap", "{:.2f}"),
    ("simulated: stderr_gap, nats", "stderr_gap", "± {:.3f}"),
)


@dataclass(frozen=True)
class Annealed:
    """Per-image results, nats."""

    temperatures: int  # transitions from the start to the posterior
    log_px: PerImage  # log-mean-exp over the chains of their log-weights; a lower bound on log p(x) in expectation
    ess: PerImage  # effective sample size of the chains' weights, between 1 and the number of chains
    stderr: PerImage  # Monte Carlo error of log_px: sqrt(1/ESS - 1/chains), a floor if few chains have the weight
    acceptance: PerImage  # mean acceptance of HMC; for bits the share that changed


@dataclass(frozen=True)
class Sandwich:
    """Bounds on log p(x) of simulated observations, in expectation, nats."""

    temperatures: int  # as for the data
    lower: PerImage  # annealing from the start to the posterior
    upper: PerImage  # annealing backwards from the h that generated x
    exact: PerImage | None  # log p(x) in closed form; None if the model has none


@final
@dataclass(frozen=True)
class AIS(Estimator):
    """Annealed importance sampling with parallel chains, along f_beta = start^(1-beta) p(x, h)^beta.

    A chain begins at a draw of the start and is moved at every temperature by HMC jointly over all layers, or by one
    Gibbs sweep over all bits. Step sizes, one for each image and temperature, come from other chains with other noise
    and are fixed before the measured chains begin: adapting them within those would void the bound. The temperatures
    are doubled until the mean over the images changes by less than ``tolerance``.

    The noise is keyed by image: no number depends on how images are batched beyond the rounding of matrix products
    of another shape. L_k of the same images has the same noise as without ``estimator``.
    """

    recipe = 1  # L_k of the same images beside it

    chains: int = 16
    temperatures: int = 500
    max_temperatures: int = 4000
    tolerance: float = 0.1
    leapfrog_steps: int = 10
    start: Start = "prior"
    images: int | None = 100
    k: int = 5000
    simulated: int = 100

    def __post_init__(self) -> None:
        for name, least in {"chains": 2, "temperatures": 1, "leapfrog_steps": 1, "simulated": 0}.items():
            check_range(name, getattr(self, name), least)
        if self.max_temperatures < self.temperatures:
            raise ValueError(
                f"max_temperatures must be >= temperatures = {self.temperatures}, got {self.max_temperatures}"
            )
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be finite and > 0, got {self.tolerance}")
        check_range("k", self.k, 1, MAX_K)
        check_range("images", self.images, 1)

    def anneal(
        self, model: LatentVariableModel, x: Shaped[Tensor, "n pixels"], *, stream: str, **how: Any
    ) -> list[Annealed]:
        """Return log p(x) of every observation for each number of temperatures that was tried; the last one counts.

        ``stream`` is a key of the noise, with the seed and the index of each image; ``how``: seed, rows, workers, check
        and tally of ``Paths``.
        """
        paths = self._paths(model, stream, **how)
        paths.tally.start(f"annealing {stream}, step sizes")
        steps = paths.share(lambda i: paths.tune(i, paths.observed(x, i), self.temperatures), len(x))
        levels: list[Annealed] = []
        for temperatures in self.doubled:
            if self.converged(levels):
                break

            def forward(images: Sequence[int], temperatures: int = temperatures) -> np.ndarray:
                return paths.forward(images, paths.observed(x, images), temperatures, steps[:, images])

            more = temperatures * len(x) if len(levels) > 1 else 0
            paths.tally.start(f"annealing {stream}, {temperatures:,} temperatures", more)
            log_px, ess, acceptance = paths.share(forward, len(x))
            stderr = np.sqrt(monte_carlo_variance(ess, self.chains))
            levels.append(Annealed(temperatures, log_px, ess, stderr, acceptance))
        return levels

    @property
    def doubled(self) -> list[int]:
        """The numbers of temperatures that may be tried."""
        tried = [self.temperatures]
        while 2 * tried[-1] <= self.max_temperatures:
            tried.append(2 * tried[-1])
        return tried

    def converged(self, levels: Sequence[Annealed]) -> bool:
        """Return whether the last doubling changed the mean by less than ``tolerance``."""
        return len(levels) > 1 and bool(abs(levels[-1].log_px.mean() - levels[-2].log_px.mean()) < self.tolerance)

    def sandwich(self, model: LatentVariableModel, temperatures: int | None = None, **how: Any) -> Sandwich:
        """Return bounds from bidirectional Monte Carlo on ``simulated`` observations x, each with the h it came from.

        That h is an exact draw of p(h|x), which the backward chains must start from. Real data have none, so the
        sandwich holds for them as far as they resemble the model's draws. ``temperatures`` is those of the estimator,
        which None takes, times a power of two; other arguments as in ``anneal``.
        """
        count = temperatures or self.temperatures
        paths = self._paths(model, "simulated", **how)

        def both(images: Sequence[int]) -> np.ndarray:
            h, x = model.generative.sample(len(images), paths.noise("draw", images))
            steps = paths.tune(images, x, self.temperatures)
            lower = paths.forward(images, x, count, steps)[0]
            exact = model.generative.exact_log_px(x)
            absent = torch.full((len(images),), math.nan) if exact is None else exact
            return np.stack([lower, paths.backward(images, x, h, count, steps), absent.double().cpu().numpy()])

        lower, upper, exact = paths.share(both, self.simulated)
        return Sandwich(count, lower, upper, None if np.isnan(exact).all() else exact)

    def _paths(self, model: LatentVariableModel, stream: str, seed: int, **how: Any) -> Paths:
        _require_movable(model)
        return Paths(model, self.chains, self.leapfrog_steps, self.start, (seed, "ais", stream), **how)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """Return log p(x) for every split of the evaluation beside L_k, and the sandwich for simulated observations."""
        model, estimates, how = subject.model, Estimates(), subject.how(check)
        _require_movable(model)
        whole = [subject.split(name) for name in subject.evaluation.splits]
        splits = [replace(split, x=split.x[: self.images], labels=None) for split in whole]
        images = {split.name: len(split.x) for split in splits}
        n, real = sum(images.values()), model.inference.reparameterized
        least, most = (self._transitions(n, tried, real) for tried in (self.doubled[:2], self.doubled))
        announce(self._plan(images, least, most, real))
        by_q = {}
        for split in splits:
            with Progress(f"evaluating {split.name}", total=len(split.x), unit="image") as progress:
                by_q[split.name] = log_likelihood(model, split, k=self.k, on_progress=progress.update, **how).log_px
        with Progress("annealing", total=least, unit="transition", may_grow=most > least) as progress:
            how["tally"] = tally = Tally(progress, least)
            for split in splits:
                levels = self.anneal(model, split.x, stream=split.name, **how)
                unsure = np.full(len(split.x), math.nan)  # a handful of chains cannot tell their error
                require_probabilities(f"log p(x) by AIS of {split.name}", split.x, levels[-1].log_px, unsure)
                each = {key: getattr(levels[-1], key) for key in ("log_px", "stderr", "ess", "acceptance")}
                each["log_px_q"] = by_q[split.name]
                estimates.add(split.name, self._summary(model, split.x, levels, by_q[split.name]), each)
                estimates.hashes[split.name] = split.sha256
            numbers = estimates.numbers
            if self.simulated:
                longest = max(numbers[name]["temperatures"] for name in images)
                more = 2 * (longest - min(longest, 2 * self.temperatures)) * self.simulated
                tally.start(f"annealing simulated, {longest:,} temperatures", more)
                bounds = self.sandwich(model, longest, **how)
                estimates.add("simulated", _simulated(bounds), {"lower": bounds.lower, "upper": bounds.upper})
        estimates.rows = split_rows(numbers)
        estimates.lay_out(SIMULATED_ROWS, self.k)
        estimates.notes = self._notes(numbers)
        return estimates

    def _transitions(self, images: int, tried: Sequence[int], real: bool) -> int:
        """Return the number of transitions of all images with these numbers of temperatures."""
        tuning = WARM_UP + self.temperatures if real else 0
        return images * (tuning + sum(tried)) + self.simulated * (tuning + 2 * tried[-1])

    def _plan(self, images: Mapping[str, int], least: int, most: int, real: bool) -> str:
        subjects = [f"{n:,} images of {name}" for name, n in images.items()]
        subjects += [f"{self.simulated:,} simulated"] if self.simulated else []
        path = f"{self.chains} chains each, {self.temperatures:,} temperatures"
        if self.max_temperatures > self.temperatures:
            path += f" (doubled up to {self.max_temperatures:,})"
        transitions = f"{least:,} to {most:,} transitions" if most > least else f"{least:,} transitions"
        moves = f"{self.leapfrog_steps} leapfrog steps" if real else "one Gibbs sweep"
        plan = f"annealing: {', '.join(subjects)}; {path}: {transitions} of all chains of an image, {moves} each"
        few = {"simulated": 20, "chains": 4, "temperatures": 100, "max_temperatures": 400}
        asked = {name: (getattr(self, name), value) for name, value in few.items()}
        return with_cheaper(plan, {"images": (max(images.values()), 20), **asked})

    def _summary(
        self,
        model: LatentVariableModel,
        x: Shaped[Tensor, "n pixels"],
        levels: Sequence[Annealed],
        by_q: PerImage,
    ) -> dict[str, Any]:
        last = levels[-1]
        nll, variance = -last.log_px.mean(), last.stderr**2
        numbers: dict[str, Any] = {
            "nll_ais": nll,
            "n": len(x),
            "chains": self.chains,
            "temperatures": last.temperatures,
            "converged": self.converged(levels),
            "stderr_images": standard_error(last.log_px),
            "stderr_mc": stderr_mc(variance),
            "bias_mc": -variance.mean() / 2,
            "nll_q": {str(self.k): -by_q.mean()},
            "above_ais": (last.log_px - by_q).mean(),
            "above_ais_stderr": standard_error(last.log_px - by_q),
            "by_temperatures": {str(level.temperatures): level.log_px.mean() for level in levels},
            "ess_median": np.median(last.ess),
            "ess_min": last.ess.min(),
            "acceptance": last.acceptance.mean(),
            "acceptance_min": last.acceptance.min(),
        }
        if not x.is_floating_point():
            numbers["bits_per_dim"] = nll / (x.shape[1] * math.log(2))
        with torch.no_grad():
            exact = model.generative.exact_log_px(x.to(next(model.parameters())))
        if exact is not None:
            numbers["exact_nll"] = -exact.double().cpu().numpy().mean()
        return numbers

    def _notes(self, numbers: Mapping[str, Any]) -> list[str]:
        notes = []
        for name in (name for name in SPLITS if name in numbers):
            split = numbers[name]
            if not split["converged"]:
                notes.append(
                    f"{name}: {split['temperatures']} temperatures are not shown to be enough (their doubling changed "
                    f"the mean by {self.tolerance:g} nats or more, or was not tried): NLL_AIS is probably too high; "
                    f"write estimator.max_temperatures={4 * split['temperatures']}"
                )
            if (bias := abs(split["bias_mc"] or 0)) > LIMIT:
                notes.append(
                    f"{name}: log p(x) is at least {bias:.2f} nats higher than estimated (bias_mc); more "
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


def _simulated(found: Sandwich) -> dict[str, Any]:
    gap = found.upper - found.lower
    numbers: dict[str, Any] = {
        "n": len(gap),
        "temperatures": found.temperatures,
        "lower": found.lower.mean(),
        "upper": found.upper.mean(),
        "gap": gap.mean(),
        "stderr_gap": standard_error(gap),
    }
    if found.exact is not None:
        numbers["exact"] = found.exact.mean()
    return numbers
