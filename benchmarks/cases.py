"""The cases that are measured, and the settings that all programs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

LEARNING_RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
"""Adam (Kingma and Ba 2015), as ``optimizer=adam``."""

BIAS = 0.02
"""Nats: the bias of a mean log p(x) below which it counts as right."""

BIAS_IMAGES = 20
"""First test images, over which the mean is: refined proposals are fitted to so many at once."""

SIZES: dict[str, tuple[list[int], list[list[int]]]] = {
    "one_layer": ([50], [[200, 200]]),
    "two_layer": ([100, 50], [[200, 200], [100, 100]]),
    "tiny": ([3], [[8]]),
}
"""Latent and hidden sizes, as ``model.latent_sizes`` and ``model.hidden_sizes``; all tanh, Bernoulli pixels."""

CHECK_STEPS = 3
"""Training steps that every program makes from the same weights with the same noise."""

CHECK_IMAGES, CHECK_K = 24, 5000
"""Images, and samples of each, of an estimate on which programs must agree within their Monte Carlo error."""


@dataclass(frozen=True)
class Case:
    """One kind of work.

    Attributes:
        kind: ``train``: the unit is one step, from drawing a minibatch to updating the weights; ``evaluate``: the unit
            is -L_k of one test image; ``reach``: see ``benchmarks.reach``.
        model: key of ``SIZES``.
        k: samples per image; of one estimate of the reference in ``reach``.
        batch: images in a training step; zero for evaluation, where each program splits ``images`` as it likes.
        cores: cores that a program may use; it is pinned to them.
        quick: whether ``--quick`` measures it.
    """

    kind: Literal["train", "evaluate", "reach"]
    model: str
    k: int
    batch: int = 0
    cores: int = 1
    quick: bool = False

    @property
    def name(self) -> str:
        """Such as ``20x50`` (batch x k), ``20x50 two_layer``, ``NLL_5000``, ``NLL_5000 2 cores``, ``NLL to 0.02``."""
        works = {"train": f"{self.batch}x{self.k}", "evaluate": f"NLL_{self.k}", "reach": f"NLL to {BIAS}"}
        work = works[self.kind]
        model = "" if self.model == "one_layer" else f" {self.model}"
        return work + model + (f" {self.cores} cores" if self.cores > 1 else "")

    @property
    def weights(self) -> str:
        """Name of the weights that every program begins from; those of ``reach`` are trained for longer."""
        return "trained" if self.kind == "reach" else "weights"

    @property
    def images(self) -> int:
        """Test images that a program evaluates at once: about a second of work."""
        return 3 if self.k == 100_000 else 24 * self.cores


CASES = (
    Case("train", "one_layer", 1, 20, quick=True),
    Case("train", "one_layer", 5, 20, quick=True),
    Case("train", "one_layer", 50, 20),
    Case("train", "one_layer", 1, 100),
    Case("train", "one_layer", 50, 100),
    Case("train", "two_layer", 5, 20),
    Case("train", "two_layer", 50, 20),
    Case("evaluate", "one_layer", 5000, quick=True),
    Case("evaluate", "two_layer", 5000),
    Case("evaluate", "one_layer", 100_000),
    Case("evaluate", "one_layer", 5000, cores=2),
    Case("reach", "one_layer", 50_000),
)
TINY = (Case("train", "tiny", 2, 4), Case("evaluate", "tiny", 64), Case("reach", "tiny", 5000))
"""For tests of the benchmark itself."""


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        case: the work.
        files: folder of ``data.npz`` and the weights (see ``benchmarks.prepare``).
        overrides: of the command line of ours.
        whole: train until the validation bound reaches this, nats, instead of being timed in rounds.
        seed: of a whole run.
    """

    case: Case
    files: Path
    overrides: tuple[str, ...] = ()
    whole: float | None = None
    seed: int = 0

    def data(self, name: str) -> np.ndarray:
        """``train``: (n, pixels) grey levels 0 to ``white``; ``validation``, ``test``: in {0, 1}; all uint8."""
        with np.load(self.files / "data.npz") as file:
            return np.asarray(file[name])

    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights that every program begins from, by their names in ours; a matrix is (outputs, inputs)."""
        name = "initial" if self.whole is not None else self.case.weights
        with np.load(self.files / f"{name}_{self.case.model}.npz") as file:
            return {name: file[name] for name in file.files}

    def check_batch(self, step: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return images (batch, pixels) and standard normal draws (k, batch, d_l) of one step of the check, float32."""
        case, random = self.case, np.random.default_rng(step)
        test = self.data("test")
        x = test[random.integers(0, len(test), case.batch)].astype(np.float32)
        sizes = SIZES[case.model][0]
        return x, [random.standard_normal((case.k, case.batch, size), dtype=np.float32) for size in sizes]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``from_json``."""
        return {**vars(self), "case": vars(self.case), "files": str(self.files)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Job:
        """The inverse of ``to_json``."""
        fields = {"case": Case(**value["case"]), "files": Path(value["files"]), "overrides": tuple(value["overrides"])}
        return cls(**{**value, **fields})
