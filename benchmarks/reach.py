"""How long a method takes until its mean log p(x) is right: ladders of effort, climbed in turn.

A rung is right if the bias of the mean over the images, against a far more precise reference, is less than ``BIAS``
by ``ERRORS`` standard errors; it counts if the next rung is right, too. With normal noise, one of 400 methods with a
bias of 0.025 on every rung passed by luck, and none of 1,200 with 0.03. A rung is repeated with other noise until it is
right, or wrong by as many standard errors, or too noisy to be shown right by ``MOST`` estimates, or the method's time
is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.cases import BIAS

ERRORS = 2
"""Standard errors by which a bias must be less than ``BIAS``, or more."""

LEAST, MOST = 2, 30
"""Estimates of a rung."""

REFERENCE_ESTIMATES, REFERENCE_SEED = 4, 1000
"""Estimates whose mean weight is the reference; the first of their seeds, which no rung has."""


@dataclass(frozen=True)
class Ladder:
    """Efforts ``first``, ``first * factor``, ...; ``shown`` names one in the table."""

    first: int
    factor: int
    shown: str = "k = {:,}"


@dataclass(frozen=True)
class Estimate:
    """What a worker answers: log p(x) of every image, nats, and the seconds that all of them took."""

    log_px: Sequence[float]
    wall: float
    cpu: float


@dataclass(frozen=True)
class Reference:
    """Log p(x) of every image, nats, and the standard error of its mean."""

    log_px: np.ndarray
    error: float

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> Reference:
        """Return the logarithm of the mean weight over estimates of equal effort."""
        found = np.array([estimate.log_px for estimate in estimates])
        return cls(np.logaddexp.reduce(found) - math.log(len(found)), _error(found))


@dataclass
class Rung:
    """Estimates of one effort."""

    effort: int
    estimates: list[Estimate] = field(default_factory=list)

    def bias(self, reference: Reference) -> tuple[float, float]:
        """Return the bias of the mean log p(x) and its standard error, nats; the error is infinite for one estimate."""
        found = np.array([estimate.log_px for estimate in self.estimates])
        return float(found.mean() - reference.log_px.mean()), math.hypot(_error(found), reference.error)

    def is_right(self, reference: Reference) -> bool | None:
        """Return whether the bias is less than ``BIAS``; None as long as the estimates do not show it."""
        bias, error = self.bias(reference)
        if abs(bias) + ERRORS * error < BIAS:
            return True
        wrong = abs(bias) - ERRORS * error > BIAS
        # The error after MOST estimates; the rest of the time is for the next rung, where noise is less.
        noisy = ERRORS * error * math.sqrt(len(self.estimates) / MOST) > BIAS
        return False if wrong or noisy or len(self.estimates) >= MOST else None


@dataclass
class Climber:
    """A method on its ladder; ``reached`` is the rung that was right, once the next was right, too."""

    ladder: Ladder
    rungs: list[Rung] = field(default_factory=list)
    reached: Rung | None = None

    def next(self, reference: Reference, limit: float) -> Rung | None:
        """Return the rung of the next estimate; None if there is no more to do within ``limit`` processor seconds."""
        if not self.rungs:
            self.rungs.append(Rung(self.ladder.first))
            return self.rungs[0]
        rung = self.rungs[-1]
        right = rung.is_right(reference)
        if right and len(self.rungs) > 1 and self.rungs[-2].is_right(reference):
            self.reached = self.rungs[-2]
            return None
        if len(rung.estimates) < LEAST:
            return rung
        expected = rung.estimates[-1].cpu
        if right is not None:
            rung = Rung(rung.effort * self.ladder.factor)
            expected *= self.ladder.factor * LEAST
        if sum(estimate.cpu for rung in self.rungs for estimate in rung.estimates) + expected > limit:
            return None
        if rung is not self.rungs[-1]:
            self.rungs.append(rung)
        return rung


def climb(
    ask: Callable[[str, int, int], Estimate | None],
    ladders: Mapping[str, Ladder],
    reference: Reference,
    limit: float,
) -> dict[str, dict[str, Any]]:
    """Let the methods climb in turn, each for at most ``limit`` processor seconds; return by label what is shown.

    ``shown`` (the effort), ``ms`` and ``cpu_ms`` (an image), ``bias`` and ``error`` (nats) are those of the rung that
    was ``reached``, or of the last one; ``top`` is the pooled log p(x) of the last rung minus the reference, with its
    error; ``rungs`` are all of them.

    Args:
        ask: takes the label of a method, an effort and a seed; returns None if the method failed.
        ladders: by label.
        reference: what the estimates are compared with.
        limit: processor seconds, so that other load on the machine lets no method climb less far.
    """
    climbers = {label: Climber(ladder) for label, ladder in ladders.items()}
    waiting, seed = list(climbers), 0
    while waiting:
        for label in list(waiting):
            rung = climbers[label].next(reference, limit)
            estimate = ask(label, rung.effort, seed) if rung else None
            if rung and estimate:
                rung.estimates.append(estimate)
            else:
                waiting.remove(label)
        seed += 1
        waiting = waiting[1:] + waiting[:1]
    return {label: _found(climber, reference) for label, climber in climbers.items()}


def _found(climber: Climber, reference: Reference) -> dict[str, Any]:
    rungs = [rung for rung in climber.rungs if len(rung.estimates) >= LEAST]
    if not rungs:
        return {}
    top = Reference.of(rungs[-1].estimates)
    described = [_described(rung, reference) for rung in rungs]
    shown = climber.reached or rungs[-1]
    return {
        **described[rungs.index(shown)],
        "shown": climber.ladder.shown.format(shown.effort),
        "reached": climber.reached is not None,
        "top": [float(np.mean(top.log_px - reference.log_px)), math.hypot(top.error, reference.error)],
        "rungs": described,
    }


def _described(rung: Rung, reference: Reference) -> dict[str, Any]:
    bias, error = rung.bias(reference)
    per_image = 1000 / len(reference.log_px)
    times = {
        "ms": [per_image * estimate.wall for estimate in rung.estimates],
        "cpu_ms": [per_image * estimate.cpu for estimate in rung.estimates],
    }
    return {"effort": rung.effort, "bias": bias, "error": error, **times}


def _error(found: np.ndarray) -> float:
    """Return the standard error of the mean over estimates (r, images) by other noise on the same images."""
    r, n = found.shape
    return math.sqrt(found.var(0, ddof=1).mean() / (r * n)) if r > 1 else math.inf
