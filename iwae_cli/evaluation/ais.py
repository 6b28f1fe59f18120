"""Annealed importance sampling: an estimate of log p(x) that does not rest on q, and a sandwich that checks it.

Sources: Neal 2001 (Statistics and Computing 11) for the method; Wu, Burda, Salakhutdinov, Grosse 2017
(arXiv 1611.04273) for its use on decoders; Grosse, Ghahramani, Adams 2015 (arXiv 1511.02543) for bidirectional
Monte Carlo.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from iwae_cli.core.errors import UserError
from iwae_cli.core.interfaces import Latents
from iwae_cli.core.noise import Noise, numpy_generator
from iwae_cli.core.numerics import effective_sample_size, log_mean_exp
from iwae_cli.core.progress import Progress, announce
from iwae_cli.data.base import SPLITS, Split
from iwae_cli.evaluation.estimator import Estimates, Estimator, EstimatorInput
from iwae_cli.evaluation.workers import available_cores, map_batches, processes
from iwae_cli.models.base import LatentVariableModel
from iwae_cli.models.priors import OneHotPrior

SIGMOID_SPAN = 4.0
"""The schedule is the sigmoid from -4 to 4: small steps at both ends, where the path bends most."""

TARGET_ACCEPTANCE = 0.65
"""Near the optimum of HMC in many dimensions (Neal 2011, arXiv 1206.1901)."""

FIRST_STEP = 0.1
ADAPTATION = 0.2
WARM_UP = 30
"""Step sizes begin at 0.1, move by exp(0.2 (acceptance - 0.65)), 30 times before the path begins."""

Start = Literal["prior", "inference"]
_Scores = Callable[[Latents], tuple[Tensor, Tensor]]


class ImageNoise:
    """Every image reads its own stream, keyed by (*key, image), in the order of the calls.

    An image's numbers depend on no other image, so that no result depends on how images are batched. Drawn in float32
    whatever ``dtype`` is.
    """

    def __init__(
        self, key: Sequence[int | str], images: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._streams = [numpy_generator(*key, int(image)) for image in images]
        self._dtype = dtype
        self._device = device

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Standard normal draws; ``layer`` is not used, the order of the calls decides."""
        return self._stacked([s.standard_normal((k, size), dtype=np.float32) for s in self._streams], batch)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        """Uniform draws on [0, 1); ``layer`` is not used, the order of the calls decides."""
        return self._stacked([s.random((k, size), dtype=np.float32) for s in self._streams], batch)

    def _stacked(self, draws: list[np.ndarray], batch: int) -> Tensor:
        if batch != len(draws):
            raise ValueError(f"batch must be the {len(draws)} images of this noise, got {batch}")
        return torch.from_numpy(np.stack(draws, axis=1)).to(device=self._device, dtype=self._dtype)


class _Unfolded:
    """Noise for ``chains * batch`` draws of p(h), which has one batch axis, from noise of (chains, batch)."""

    def __init__(self, noise: Noise, chains: int) -> None:
        self._noise = noise
        self._chains = chains

    def normal(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        return self._noise.normal(layer, self._chains, batch // self._chains, size).reshape(k, batch, size)

    def uniform(self, layer: int, k: int, batch: int, size: int) -> Float[Tensor, "k batch size"]:
        return self._noise.uniform(layer, self._chains, batch // self._chains, size).reshape(k, batch, size)


def sigmoid_schedule(temperatures: int) -> list[float]:
    """Inverse temperatures 0 = beta_0 < ... < beta_T = 1, equally spaced on the axis of a sigmoid."""
    points = [1 / (1 + math.exp(SIGMOID_SPAN * (1 - 2 * t / temperatures))) for t in range(temperatures + 1)]
    betas = [(point - points[0]) / (points[-1] - points[0]) for point in points]
    return [0.0, *betas[1:-1], 1.0]


@dataclass(frozen=True)
class Chains:
    """Where the chains of some images stand: h and the two parts of log f_beta(h) = base(h) + beta gap(h), nats."""

    latents: Latents
    base: Float[Tensor, "chains batch"]
    gap: Float[Tensor, "chains batch"]

    def log_density(self, beta: float) -> Float64[Tensor, "chains batch"]:
        """log f_beta(h), not normalized."""
        return self.base.double() + beta * self.gap.double()

    def where(self, accepted: Shaped[Tensor, "chains batch"], proposal: Chains) -> Chains:
        """``proposal`` where it was accepted."""
        pairs = zip(proposal.latents, self.latents, strict=True)
        return Chains(
            tuple(torch.where(accepted[..., None], new, old) for new, old in pairs),
            torch.where(accepted, proposal.base, self.base),
            torch.where(accepted, proposal.gap, self.gap),
        )


def hamiltonian_move(
    scores: _Scores, chains: Chains, beta: float, step: Float[Tensor, " batch"], leapfrog: int, noise: Noise
) -> tuple[Chains, Float[Tensor, "chains batch"]]:
    """One transition of Hamiltonian Monte Carlo over all layers at once (Neal 2011, arXiv 1206.1901).

    Leaves f_beta invariant, and is its own reversal, as long as ``step`` does not depend on ``chains``. A trajectory
    that diverges is rejected.

    Args:
        scores: h to (base, gap).
        chains: where they stand.
        beta: inverse temperature of the target.
        step: of the leapfrog, one for each image.
        leapfrog: steps of one trajectory.
        noise: momenta and acceptance.

    Returns:
        The chains after it, and the probability with which each proposal was accepted.
    """

    def force(latents: Latents) -> tuple[Chains, Latents]:
        with torch.enable_grad():
            live = tuple(h.detach().requires_grad_() for h in latents)
            base, gap = scores(live)
            # For the latents alone: the weights of the networks are not differentiated.
            gradient = torch.autograd.grad((base + beta * gap).sum(), live)
        return Chains(latents, base.detach(), gap.detach()), gradient

    def pushed(momenta: Latents, gradient: Latents, size: Tensor) -> Latents:
        return tuple(p + size * g for p, g in zip(momenta, gradient, strict=True))

    def kinetic(momenta: Latents) -> Tensor:
        return sum((0.5 * p.double().square().sum(-1) for p in momenta), start=torch.zeros(()).double())

    size = step[:, None]
    momenta = tuple(noise.normal(layer, *h.shape) for layer, h in enumerate(chains.latents, start=1))
    before = kinetic(momenta)
    _, gradient = force(chains.latents)
    latents, proposal = chains.latents, chains
    momenta = pushed(momenta, gradient, size / 2)
    for i in range(leapfrog):
        latents = tuple(h + size * p for h, p in zip(latents, momenta, strict=True))
        proposal, gradient = force(latents)
        momenta = pushed(momenta, gradient, size if i + 1 < leapfrog else size / 2)
    log_ratio = proposal.log_density(beta) - kinetic(momenta) - chains.log_density(beta) + before
    probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)
    k, batch = probability.shape
    accepted = noise.uniform(0, k, batch, 1)[..., 0] < probability
    return chains.where(accepted, proposal), probability.to(step.dtype)


def gibbs_sweep(
    scores: _Scores, chains: Chains, beta: float, noise: Noise, backwards: bool = False
) -> tuple[Chains, Float[Tensor, "chains batch"]]:
    """Draw every bit of every layer in turn given all others; leaves f_beta invariant.

    The sweep ``backwards`` is the reversal of the other one.

    Returns:
        The chains after it, and the share of bits that changed.
    """
    order = [(layer, unit) for layer, h in enumerate(chains.latents) for unit in range(h.shape[-1])]
    uniform = [noise.uniform(layer, *h.shape) for layer, h in enumerate(chains.latents, start=1)]
    changed = torch.zeros_like(chains.base)
    for layer, unit in reversed(order) if backwards else order:
        flipped = chains.latents[layer].clone()
        flipped[..., unit] = 1 - flipped[..., unit]
        latents = (*chains.latents[:layer], flipped, *chains.latents[layer + 1 :])
        proposal = Chains(latents, *scores(latents))
        probability = torch.sigmoid(proposal.log_density(beta) - chains.log_density(beta))
        accepted = uniform[layer][..., unit] < probability
        chains = chains.where(accepted, proposal)
        changed += accepted
    return chains, changed / len(order)


@dataclass(frozen=True)
class Annealed:
    """Per-image results; arrays are (n,), float64, nats.

    Attributes:
        temperatures: transitions from the start to the posterior.
        log_px: log-mean-exp over the chains of their log-weights; a lower bound on log p(x) in expectation.
        ess: effective sample size of the chains' weights, between 1 and the number of chains.
        stderr: Monte Carlo error of ``log_px``: sqrt(1/ESS - 1/chains), a floor where few chains have the weight.
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
        upper: annealing backwards from the h that x was made from; at least log p(x) in expectation.
        exact: log p(x) where the model has it, else None.
    """

    temperatures: int
    lower: Float64[np.ndarray, " n"]
    upper: Float64[np.ndarray, " n"]
    exact: Float64[np.ndarray, " n"] | None


class Tally:
    """How many transitions have been made, each of all chains of one image, by all threads.

    Args:
        progress: what shows it; None: nothing does.
        planned: how many there are to be, as far as is known.
    """

    def __init__(self, progress: Progress | None = None, planned: int = 0) -> None:
        self._progress = progress
        self._planned = planned
        self._done = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Tally], tuple[()]]:
        # A process that helps shows nothing.
        return Tally, ()

    def begins(self, title: str, more: int = 0) -> None:
        """The next part of the work, with so many ``more`` transitions than were planned."""
        with self._lock:
            self._planned += more
            if self._progress is not None:
                self._progress.change(title, self._planned)

    def moved(self, images: int) -> None:
        """One transition of some images has been made."""
        with self._lock:
            # Other processes are as far as this one.
            self._done = min(self._planned, self._done + images * processes())
            if self._progress is not None:
                self._progress.update(self._done)


@final
class AIS(Estimator):
    """Annealed importance sampling with parallel chains, along f_beta = start^(1-beta) p(x, h)^beta.

    A chain begins at a draw of the start and is moved at every temperature by HMC jointly over all layers, or by one
    Gibbs sweep over all bits. Step sizes, one for each image and temperature, come from other chains with other noise
    and are frozen before the measured ones begin: adapting them within would void the bound. The temperatures are
    doubled until the mean over the images changes by less than ``tolerance``.

    The noise is keyed by image: no number depends on how images are batched beyond the rounding of matrix products
    of another shape.

    Args:
        chains: per image.
        temperatures: transitions of the first, coarsest path.
        max_temperatures: where doubling ends; equal to ``temperatures``: no doubling.
        tolerance: nats.
        leapfrog_steps: of every HMC transition.
        start: ``prior``, so that the estimate does not depend on q; or ``inference``, q, which is nearer.
        images: how many of each split, the first ones; null: all.
        simulated: observations drawn from the model for bidirectional Monte Carlo; 0: none.

    Raises:
        ValueError: a number out of range or an unknown start.
    """

    def __init__(
        self,
        chains: int = 16,
        temperatures: int = 500,
        max_temperatures: int = 4000,
        tolerance: float = 0.1,
        leapfrog_steps: int = 10,
        start: Start = "prior",
        images: int | None = 100,
        simulated: int = 100,
    ) -> None:
        least = {"chains": (chains, 2), "temperatures": (temperatures, 1), "leapfrog_steps": (leapfrog_steps, 1)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be >= {minimum}, got {value}")
        if max_temperatures < temperatures:
            raise ValueError(f"max_temperatures must be >= temperatures = {temperatures}, got {max_temperatures}")
        if not (math.isfinite(tolerance) and tolerance > 0):
            raise ValueError(f"tolerance must be finite and > 0, got {tolerance}")
        if start not in ("prior", "inference"):
            raise ValueError(f"start must be prior or inference, got {start}")
        if images is not None and images < 1:
            raise ValueError(f"images must be >= 1 or null, got {images}")
        if simulated < 0:
            raise ValueError(f"simulated must be >= 0, got {simulated}")
        self.chains = chains
        self.temperatures = temperatures
        self.max_temperatures = max_temperatures
        self.tolerance = tolerance
        self.leapfrog_steps = leapfrog_steps
        self.start: Start = start
        self.images = images
        self.simulated = simulated

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
        """log p(x) of every observation, for each number of temperatures that was tried; the last one counts.

        Args:
            model: in evaluation mode, on its device.
            x: observations.
            seed, stream: key of the noise, with the index of each image.
            rows: bound on chains x images computed at once by one worker.
            workers: threads that share the images; None is one per core on a CPU, one on another device.
            check: called by every worker whenever p is evaluated; may raise to stop.
            tally: told of every transition, and of every doubling but the first, which is always needed.

        Raises:
            UserError: latents that are neither real nor bits.
        """
        tally = tally or Tally()
        work = _Work(self, model, seed, stream, check, tally)
        share = _Sharing(model, self.chains, rows, workers)
        tally.begins(f"annealing {stream}, step sizes")
        steps = np.concatenate(share(lambda i: work.tune(i, work.observed(x, i)), len(x)), axis=1)
        levels: list[Annealed] = []
        temperatures = self.temperatures
        while True:

            def forward(images: Sequence[int], temperatures: int = temperatures) -> np.ndarray:
                return work.forward(images, work.observed(x, images), temperatures, steps[:, images])

            more = temperatures * len(x) if len(levels) > 1 else 0
            tally.begins(f"annealing {stream}, {temperatures:,} temperatures", more)
            parts = share(forward, len(x))
            log_px, ess, acceptance = np.concatenate(parts, axis=1)
            variance = np.maximum(0.0, 1 / ess - 1 / self.chains)
            levels.append(Annealed(temperatures, log_px, ess, np.sqrt(variance), acceptance))
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
        """Bidirectional Monte Carlo on ``simulated`` observations x of the model, each with the h it was made from.

        That h is an exact draw of p(h|x), which is what the backward chains must start from; there is none for real
        data, so the sandwich speaks of real data as far as they resemble the model's.

        Args:
            model, seed, rows, workers, check, tally: as in ``anneal``.
            temperatures: ``temperatures`` times a power of two; None: as they are.

        Raises:
            UserError: latents that are neither real nor bits.
        """
        count = self.temperatures if temperatures is None else temperatures
        work = _Work(self, model, seed, "simulated", check, tally or Tally())

        def both(images: Sequence[int]) -> np.ndarray:
            h, x = model.generative.sample(len(images), work.noise("draw", images))
            steps = work.tune(images, x)
            lower = work.forward(images, x, count, steps)[0]
            exact = model.generative.exact_log_px(x)
            absent = torch.full((len(images),), math.nan) if exact is None else exact
            return np.stack([lower, work.backward(images, x, h, count, steps), absent.double().cpu().numpy()])

        share = _Sharing(model, self.chains, rows, workers)
        lower, upper, exact = np.concatenate(share(both, self.simulated), axis=1)
        return Sandwich(count, lower, upper, None if np.isnan(exact).all() else exact)

    def estimate(self, subject: EstimatorInput, check: Callable[[], None]) -> Estimates:
        """See the class; for every split of the evaluation, then for simulated observations."""
        evaluation, model = subject.evaluation, subject.model
        _require_movable(model)
        splits: dict[str, Split] = {
            name: subject.data.evaluation_split(name, evaluation.binarization_seed) for name in evaluation.splits
        }
        images = {name: min(len(split.x), self.images or len(split.x)) for name, split in splits.items()}
        least, most = self._transitions(sum(images.values()), model)
        announce(self._plan(images, least, most, model.inference.reparameterized))
        with Progress(
            "annealing", total=least, unit="transition", things="transitions", may_grow=most > least
        ) as progress:
            return self._estimate(subject, check, splits, Tally(progress, least))

    def _transitions(self, images: int, model: LatentVariableModel) -> tuple[int, int]:
        """How many of all images there will be: at least, and if every doubling is needed."""
        paths = [self.temperatures]
        while 2 * paths[-1] <= self.max_temperatures:
            paths.append(2 * paths[-1])
        tuning = WARM_UP + self.temperatures if model.inference.reparameterized else 0
        least, most = (
            images * (tuning + sum(some)) + self.simulated * (tuning + 2 * some[-1]) for some in (paths[:2], paths)
        )
        return least, most

    def _plan(self, images: Mapping[str, int], least: int, most: int, real: bool) -> str:
        """What is about to be done, and how to make it less."""
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
        cheaper = [f"estimator.{name}={few}" for name, (asked, few) in fewer.items() if asked > few]
        return f"{plan}; cheaper: {' '.join(cheaper)}" if cheaper else plan

    def _estimate(
        self, subject: EstimatorInput, check: Callable[[], None], splits: Mapping[str, Split], tally: Tally
    ) -> Estimates:
        evaluation, model = subject.evaluation, subject.model
        common: dict[str, Any] = {
            "rows": evaluation.rows,
            "workers": evaluation.workers,
            "check": check,
            "tally": tally,
        }
        numbers: dict[str, Any] = {}
        hashes: dict[str, str] = {}
        reasons: dict[str, str] = {}
        arrays: dict[str, np.ndarray] = {}
        for name, split in splits.items():
            x = split.x[: self.images]
            levels = self.anneal(model, x, seed=evaluation.seed, stream=name, **common)
            exact = _exact(model, x)
            numbers[name], missing = self._summary(levels, exact, x.shape[1])
            hashes[name] = split.sha256
            reasons |= {f"{name}.{key}": reason for key, reason in missing.items()}
            prefix = "" if name == "test" else f"{name}_"
            for key in ("log_px", "stderr", "ess", "acceptance"):
                arrays[f"{prefix}{key}"] = getattr(levels[-1], key)
        if self.simulated:
            longest = max(numbers[name]["temperatures"] for name in splits)
            planned = min(longest, 2 * self.temperatures)
            tally.begins(f"annealing simulated, {longest:,} temperatures", 2 * (longest - planned) * self.simulated)
            found = self.sandwich(model, seed=evaluation.seed, temperatures=longest, **common)
            numbers["simulated"], missing = _summary_of(found)
            reasons |= {f"simulated.{key}": reason for key, reason in missing.items()}
            arrays |= {"simulated_lower": found.lower, "simulated_upper": found.upper}
        return Estimates(numbers, hashes, reasons, arrays)

    def _summary(
        self, levels: Sequence[Annealed], exact: np.ndarray | None, pixels: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
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
        return _without_nan(numbers, "one image has no standard error" if n == 1 else "a log-weight is not finite")

    def table(self, numbers: Mapping[str, Any]) -> list[list[str]]:
        """One column for each split; below, in the first one, what was found of simulated observations."""
        splits = {name: numbers[name] for name in SPLITS if name in numbers}

        def row(label: str, key: str, form: str) -> list[str]:
            return [label, *("\N{EN DASH}" if s[key] is None else form.format(s[key]) for s in splits.values())]

        table = [
            ["", *splits],
            row("NLL_AIS, nats", "nll_ais", "{:.2f}"),
            row("  another test set: stderr_images", "stderr_images", "± {:.2f}"),
            row("  other noise: stderr_mc", "stderr_mc", "± {:.4f}"),
            row("  Jensen's bias: bias_mc", "bias_mc", "{:+.4f}"),
        ]
        if all("exact_nll" in split for split in splits.values()):
            table.append(row("exact NLL, nats", "exact_nll", "{:.2f}"))
        for level in dict.fromkeys(level for split in splits.values() for level in split["by_temperatures"]):
            values = [split["by_temperatures"].get(level) for split in splits.values()]
            cells = ["\N{EN DASH}" if value is None else f"{value:.2f}" for value in values]
            table.append([f"mean log p(x), {level} temperatures", *cells])
        table += [
            row("images", "n", "{:,}"),
            row("effective chains, median", "ess_median", "{:.1f}"),
            row("effective chains, least", "ess_min", "{:.1f}"),
            row("acceptance", "acceptance", "{:.2f}"),
        ]
        if "simulated" in numbers:
            s = numbers["simulated"]
            for label, key in (("lower", "lower"), ("upper", "upper"), ("exact", "exact"), ("upper - lower", "gap")):
                if s.get(key) is not None:
                    error = f" ± {s['stderr_gap']:.3f}" if key == "gap" and s["stderr_gap"] is not None else ""
                    table.append([f"simulated: {label}, nats", f"{s[key]:.2f}{error}"])
        return table

    def notes(self, numbers: Mapping[str, Any]) -> list[str]:
        """Where the numbers are not to be trusted, and in which direction they err."""
        notes = []
        for name in (name for name in SPLITS if name in numbers):
            split = numbers[name]
            if not split["converged"]:
                notes.append(
                    f"{name}: it is not seen that {split['temperatures']} temperatures are enough (their doubling "
                    f"changed the mean by {self.tolerance:g} nats or more, or was not tried): NLL_AIS is probably too "
                    f"high; write estimator.max_temperatures={4 * split['temperatures']}"
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


class _Sharing:
    """Images shared by threads, as many at a time as the bound on the rows allows."""

    def __init__(self, model: LatentVariableModel, chains: int, rows: int, workers: int | None) -> None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        self._workers = workers or (available_cores() if on_cpu else 1)
        self._most = max(1, rows // chains)

    def __call__(
        self,
        work: Callable[[Sequence[int]], np.ndarray],
        n: int,
    ) -> list[np.ndarray]:
        def with_gradients(images: Sequence[int]) -> np.ndarray:
            # Tensors made in inference mode can take no part in a derivative.
            with torch.inference_mode(False), torch.no_grad():
                return work(images)

        # No image knows of the others, so that a few can be spread over all workers.
        batch = min(self._most, -(-n // self._workers))
        return map_batches(with_gradients, n, batch=batch, workers=self._workers)


def _require_movable(model: LatentVariableModel) -> None:
    if isinstance(getattr(model.generative, "prior", None), OneHotPrior):
        raise UserError(
            "estimator=ais moves real latents and bits, not a categorical one, whose log p(x) is exact: "
            "without estimator=ais, iwae-eval reports it as exact_nll"
        )


class _Work:
    """What is done to one batch of images."""

    def __init__(
        self,
        settings: AIS,
        model: LatentVariableModel,
        seed: int,
        stream: str,
        check: Callable[[], None],
        tally: Tally,
    ) -> None:
        _require_movable(model)
        self._settings = settings
        self._model = model
        self._key = (seed, "ais", stream)
        self._check = check
        self._tally = tally
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._discrete = not model.inference.reparameterized

    def observed(self, x: Tensor, images: Sequence[int]) -> Float[Tensor, "batch pixels"]:
        return x[images[0] : images[-1] + 1].to(device=self._device, dtype=self._dtype)

    def noise(self, purpose: str, images: Sequence[int]) -> ImageNoise:
        return ImageNoise((*self._key, purpose), images, self._dtype, self._device)

    def tune(self, images: Sequence[int], x: Float[Tensor, "batch pixels"]) -> Float64[np.ndarray, "temperatures n"]:
        """Step sizes for every temperature of the coarsest path and every image, from chains that are thrown away."""
        settings = self._settings
        log_step = np.full(len(images), math.log(FIRST_STEP))
        steps = np.empty((settings.temperatures, len(images)))
        if self._discrete:
            return np.ones_like(steps)
        noise = self.noise("tune", images)
        scores = self._scores(x)
        chains = self._begin(scores, x, noise)
        betas = sigmoid_schedule(settings.temperatures)[1:]
        for t, beta in enumerate([betas[0]] * WARM_UP + betas):
            step = self._steps(np.exp(log_step))
            chains, probability = hamiltonian_move(scores, chains, beta, step, settings.leapfrog_steps, noise)
            self._tally.moved(len(images))
            log_step += ADAPTATION * (probability.mean(0).double().cpu().numpy() - TARGET_ACCEPTANCE)
            if t >= WARM_UP:
                steps[t - WARM_UP] = np.exp(log_step)
        return steps

    def forward(
        self, images: Sequence[int], x: Float[Tensor, "batch pixels"], temperatures: int, steps: np.ndarray
    ) -> Float64[np.ndarray, "3 n"]:
        """Start to posterior: log p(x), effective sample size, acceptance."""
        noise = self.noise(f"forward {temperatures}", images)
        scores = self._scores(x)
        chains = self._begin(scores, x, noise)
        log_w, acceptance = self._walk(scores, chains, temperatures, steps, noise, backwards=False)
        return torch.stack([log_mean_exp(log_w), effective_sample_size(log_w), acceptance]).cpu().numpy()

    def backward(
        self,
        images: Sequence[int],
        x: Float[Tensor, "batch pixels"],
        h: Latents,
        temperatures: int,
        steps: np.ndarray,
    ) -> Float64[np.ndarray, " n"]:
        """Posterior, from an exact draw h of it, to the start: E[1/w] = 1/p(x), hence the sign."""
        noise = self.noise(f"backward {temperatures}", images)
        scores = self._scores(x)
        latents = tuple(layer.expand(self._settings.chains, -1, -1) for layer in h)
        log_w, _ = self._walk(scores, Chains(latents, *scores(latents)), temperatures, steps, noise, backwards=True)
        return -log_mean_exp(-log_w).cpu().numpy()

    def _walk(
        self,
        scores: _Scores,
        chains: Chains,
        temperatures: int,
        steps: np.ndarray,
        noise: Noise,
        backwards: bool,
    ) -> tuple[Float64[Tensor, "chains batch"], Float64[Tensor, " batch"]]:
        """Log-weights and acceptance of the chains along the path; ``backwards`` is the exact reversal."""
        betas = sigmoid_schedule(temperatures)
        log_w = torch.zeros_like(chains.base, dtype=torch.float64)
        accepted = torch.zeros_like(log_w[0])
        for t in range(temperatures, 0, -1) if backwards else range(1, temperatures + 1):
            width = betas[t] - betas[t - 1]
            if not backwards:
                log_w += width * chains.gap.double()
            # The finer paths take each step size of the coarsest one several times.
            step = steps[(t - 1) * len(steps) // temperatures]
            chains, probability = self._move(scores, chains, betas[t], step, noise, backwards)
            self._tally.moved(chains.base.shape[1])
            accepted += probability.double().mean(0)
            if backwards:
                log_w += width * chains.gap.double()
        return log_w, accepted / temperatures

    def _move(
        self, scores: _Scores, chains: Chains, beta: float, step: np.ndarray, noise: Noise, backwards: bool
    ) -> tuple[Chains, Tensor]:
        if self._discrete:
            return gibbs_sweep(scores, chains, beta, noise, backwards)
        return hamiltonian_move(scores, chains, beta, self._steps(step), self._settings.leapfrog_steps, noise)

    def _steps(self, values: np.ndarray) -> Float[Tensor, " batch"]:
        return torch.from_numpy(values).to(device=self._device, dtype=self._dtype)

    def _scores(self, x: Float[Tensor, "batch pixels"]) -> _Scores:
        generative, inference = self._model.generative, self._model.inference

        def from_prior(latents: Latents) -> tuple[Tensor, Tensor]:
            self._check()
            return generative.log_prior(latents), generative.log_likelihood(x, latents)

        def from_inference(latents: Latents) -> tuple[Tensor, Tensor]:
            self._check()
            log_q = inference(x, latents)
            return log_q, generative(x, latents) - log_q

        return from_prior if self._settings.start == "prior" else from_inference

    def _begin(self, scores: _Scores, x: Float[Tensor, "batch pixels"], noise: Noise) -> Chains:
        chains, batch = self._settings.chains, x.shape[0]
        if self._settings.start == "prior":
            drawn, _ = self._model.generative.sample(chains * batch, _Unfolded(noise, chains))
            latents = tuple(h.reshape(chains, batch, -1) for h in drawn)
        else:
            latents, _ = self._model.inference.sample(x, chains, noise)
        return Chains(latents, *scores(latents))


def _exact(model: LatentVariableModel, x: Shaped[Tensor, "n pixels"]) -> Float64[np.ndarray, " n"] | None:
    parameter = next(model.parameters())
    with torch.no_grad():
        exact = model.generative.exact_log_px(x.to(device=parameter.device, dtype=parameter.dtype))
    return None if exact is None else exact.double().cpu().numpy()


def _summary_of(found: Sandwich) -> tuple[dict[str, Any], dict[str, str]]:
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
    return _without_nan(numbers, "one observation has no standard error" if n == 1 else "a log-weight is not finite")


def _without_nan(numbers: dict[str, Any], reason: str) -> tuple[dict[str, Any], dict[str, str]]:
    missing = [key for key, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**numbers, **dict.fromkeys(missing)}, dict.fromkeys(missing, reason)
