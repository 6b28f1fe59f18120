"""One program in its own process, which works and pauses as lines of JSON on its standard input say.

The first line is the job. The worker answers ``ready`` after the first unit of work (after imports, data and
compilation), then one ``round`` for every ``{"seconds": s}``, and ``done`` at the end of the input. A program runs its
own loop, data loading included, and calls ``tick`` between two units; waiting there is not timed. In a case of kind
``reach`` it answers one ``estimate`` for every ``{"effort": e, "seed": s}`` instead.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import numpy as np

from benchmarks.cases import BIAS_IMAGES, CHECK_IMAGES, CHECK_K, Case, Job

VALIDATION_K, VALIDATE_EVERY = 50, 500
"""Samples of the validation bound of a whole run; steps between two of them."""

Tick = Callable[[int], bool]
"""Takes the number of units done since the last call; returns False to stop."""


class Peer(Protocol):
    """A program that is measured.

    Attributes:
        settings: its versions and choices, for the record.
    """

    settings: str

    def train(self, tick: Tick) -> None:
        """Train on the training split from ``job.weights()``, until ``tick`` says to stop."""

    def check(self) -> tuple[list[float] | None, dict[str, np.ndarray] | None]:
        """Return the bounds before each step on ``job.check_batch`` and the weights after them; None if unknown."""
        ...

    def evaluate(self, images: np.ndarray, tick: Tick) -> None:
        """Compute -L_k of binary images (n, pixels) repeatedly, until ``tick`` says to stop."""

    def nll(self, images: np.ndarray, k: int) -> float:
        """Return -L_k, nats, mean over binary images (n, pixels)."""
        ...


class Climbing(Peer, Protocol):
    """A program that is measured in a case of kind ``reach``."""

    def log_px(self, images: np.ndarray, effort: int, seed: int) -> np.ndarray:
        """Return log p(x) of every binary image (n, pixels), nats, (n,); other noise for every ``seed``."""
        ...


def by_parts(peer: Peer, images: np.ndarray, case: Case, tick: Tick) -> None:
    """Implement ``Peer.evaluate`` by ``nll`` of ``case.images`` at a time."""
    start = 0
    while True:
        peer.nll(images[start : start + case.images], case.k)
        if not tick(case.images):
            return
        start = (start + case.images) % (len(images) - case.images)


def serve(make: Callable[[Job], Peer]) -> None:
    """Run the worker; see the module."""
    # Keep everything that a program prints out of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.from_json(json.loads(sys.stdin.readline()))
    peer = make(job)
    base = _resident_mb()
    if job.whole is not None:
        _whole(job, peer, answers)
        return
    if job.case.kind == "reach":
        _estimates(job, cast("Climbing", peer), answers)
        return
    checked = _check(job, peer)
    rounds = _Rounds(answers, {"settings": peer.settings, "check": checked})
    if job.case.kind == "train":
        peer.train(rounds.tick)
    else:
        peer.evaluate(job.data("test"), rounds.tick)
    _say(answers, "done", base_mb=base, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


class _Rounds:
    """A clock that runs for the seconds of a round, and then waits for the next."""

    def __init__(self, answers: TextIO, facts: dict[str, Any]) -> None:
        self._answers, self._facts = answers, facts
        self._until = -1.0
        self._units = 0
        self._begun = (0.0, 0.0)

    def tick(self, units: int) -> bool:
        """See ``Tick``."""
        now = time.perf_counter()
        self._units += units
        if now < self._until:
            return True
        if self._until < 0:
            _say(self._answers, "ready", **self._facts)
        else:
            cpu = time.process_time() - self._begun[1]
            _say(self._answers, "round", units=self._units, wall=now - self._begun[0], cpu=cpu)
        line = sys.stdin.readline()
        if not line:
            return False
        self._units = 0
        self._begun = (time.perf_counter(), time.process_time())
        self._until = self._begun[0] + json.loads(line)["seconds"]
        return True


def _check(job: Job, peer: Peer) -> dict[str, Any]:
    if job.case.kind == "evaluate":
        images = job.data("test")[:CHECK_IMAGES]
        nll = peer.nll(images, min(job.case.k, CHECK_K))
        return {"nll": nll, "stderr_mc": getattr(peer, "stderr_mc", None)}
    bounds, weights = peer.check()
    file = job.files / f"checked_{os.getpid()}.npz"
    if weights is not None:
        np.savez(file, **weights)  # type: ignore[arg-type]
    return {"bounds": bounds, "weights": None if weights is None else str(file)}


def _whole(job: Job, peer: Peer, answers: TextIO) -> None:
    """Train until the validation bound is reached, without counting the time of validations."""
    target = job.whole
    assert target is not None
    validation = job.data("validation")
    steps, validating, next_validation, curve = 0, 0.0, VALIDATE_EVERY, []
    begun = time.perf_counter()

    def tick(units: int) -> bool:
        nonlocal steps, validating, next_validation
        steps += units
        if steps < next_validation:
            return True
        next_validation += VALIDATE_EVERY
        before = time.perf_counter()
        bound = -peer.nll(validation, VALIDATION_K)
        after = time.perf_counter()
        validating += after - before
        curve.append((steps, after - begun - validating, bound))
        return bound < target

    peer.train(tick)
    seconds = curve[-1][1]
    _say(answers, "done", steps=steps, seconds=seconds, validating=validating, curve=curve, settings=peer.settings)


def _estimates(job: Job, peer: Climbing, answers: TextIO) -> None:
    """Estimate log p(x) of the same images with the efforts that are asked for."""
    images = job.data("test")[:BIAS_IMAGES]
    _say(answers, "ready", settings=peer.settings)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        log_px = peer.log_px(images, **json.loads(line))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        _say(answers, "estimate", log_px=log_px.tolist(), wall=wall, cpu=cpu)


def _say(answers: TextIO, kind: str, **facts: Any) -> None:
    print(json.dumps({"kind": kind, **facts}), file=answers, flush=True)


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
